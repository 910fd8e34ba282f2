"""Checkpoints in OLMo-core's format, with random weights."""

import json
import warnings
from pathlib import Path

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.convert.olmo_core.names import olmo_core_names
from testing.peers import transformers_model, true_tensors_of
from tools import convert_from_olmo_core

NORM = dict(name="rms", eps=1e-6, bias=False)


def to_ours(source, target, *options) -> int:
    return convert_from_olmo_core.main([str(source), str(target), "--quiet", *options])


def olmo_core_config(model: ModelConfig, old: bool = False) -> dict:
    """Return the configuration that OLMo-core's ConfigSaver writes for this model."""
    rope = dict(name="default", theta=model.rope_theta, full_precision=True, scaling=None) if model.rope_theta else None
    attention = dict(
        name="default", n_heads=model.num_attention_heads, bias=False, rope=rope, qk_norm=NORM, backend="flash_2", type="attention"
    )  # fmt: skip
    if model.num_key_value_heads:
        attention["n_kv_heads"] = model.num_key_value_heads
    if "W" in model.layers:
        window = model.sliding_window
        attention["sliding_window"] = dict(
            pattern=[window if k == "W" else -1 for k in model.layers], force_full_attention_on_first_layer=False
        )
    shared = dict(layer_norm=NORM, feed_forward=dict(hidden_size=model.ffn_hidden_size, bias=False, activation="silu"))
    config = dict(
        name="default",
        d_model=model.hidden_size,
        vocab_size=model.vocab_size,
        n_layers=model.num_layers,
        lm_head=dict(name="default", layer_norm=NORM, bias=False, loss_implementation="default"),
        dtype="float32",
        init_std=0.02,
        tie_word_embeddings=model.tie_embeddings,
    )
    block = dict(name="reordered_norm", sequence_mixer=attention, **shared)
    gdn = model.gdn
    if gdn is None:
        config["block"] = block
    elif old:
        arguments = dict(
            head_dim=gdn.key_head_dim,
            expand_v=gdn.value_head_dim / gdn.key_head_dim,
            use_gate=True,
            allow_neg_eigval=True,
        )
        fla = dict(name="GatedDeltaNet", dtype="float32", fla_layer_kwargs=arguments)
        indices = [i for i, k in enumerate(model.layers) if k == "A"]
        config["block"] = dict(
            name="fla_hybrid", attention=attention, fla=fla, fla_hybrid_attention_indices=indices, **shared
        )
    else:
        mixer = dict(
            type="gated_delta_net", n_heads=gdn.num_key_heads, n_v_heads=gdn.num_value_heads, head_dim=gdn.key_head_dim,
            expand_v=gdn.value_head_dim / gdn.key_head_dim, allow_neg_eigval=gdn.allow_negative_eigenvalues, conv_size=4,
            conv_bias=False, norm_eps=1e-5, dtype="float32",
        )  # fmt: skip
        config["block"] = dict(gdn=dict(name="default", sequence_mixer=mixer, **shared), attn=block)
        config["block_pattern"] = ["gdn" if k == "G" else "attn" for k in model.layers]
    tokenizer = dict(vocab_size=60, eos_token_id=model.eos_token_id, pad_token_id=model.pad_token_id)
    return dict(model=config, dataset=dict(tokenizer=tokenizer))


def olmo_core_state(model: ModelConfig, old: bool = False, optimizer: bool = False) -> dict:
    """Return a state dict with OLMo-core's names and random weights."""
    tensors = true_tensors_of(transformers_model(model), model)
    state: dict = {"model": {}}
    moments: dict = {}
    generator = torch.Generator().manual_seed(2)
    for name in model_tensors(model):
        key = olmo_core_names(name)[-1 if old else 0]
        tensor = tensors[name].unsqueeze(1) if name.endswith("_conv.weight") else tensors[name]
        state["model"][key] = tensor.clone()
        for part in ("exp_avg", "exp_avg_sq"):
            moments[f"state.{key}.{part}"] = torch.rand(tensor.shape, generator=generator)
        moments[f"state.{key}.step"] = torch.tensor(17.0)
        moments[f"param_groups.{key}.lr"] = 1e-3
    return state | ({"optim": moments} if optimizer else {})


def save(folder: Path, config: dict, state: dict) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "model_and_optim", no_dist=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
