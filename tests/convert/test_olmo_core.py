"""OLMo-core's checkpoints: both generations of names, sharded, with the optimizer; and never a pickle run."""

import json
import os
import pickle
import random
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.tensors import model_tensors
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core import from_olmo_core, olmo_core_names
from megatron_hybrid.convert.olmo_core_config import model_from_olmo_core
from megatron_hybrid.convert.torch_checkpoint import METADATA, TorchCheckpoint
from megatron_hybrid.convert.verify import verify
from tests.convert import jobs as convert_jobs
from tests.convert.folders import BASE, MODELS, OLMO3, weights
from tests.peers import transformers_model, true_tensors_of
from tools import convert_from_olmo_core

NORM = dict(name="rms", eps=1e-6, bias=False)


def to_ours(source, target, *options) -> int:
    return convert_from_olmo_core.main([str(source), str(target), "--quiet", *options])


def olmo_core_config(model: ModelConfig, old: bool = False) -> dict:
    """What OLMo-core's ConfigSaver writes for this model."""
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
    """A state dict with OLMo-core's names and random weights."""
    tensors = true_tensors_of(transformers_model(model), model)
    state: dict = {"model": {}}
    moments: dict = {}
    generator = torch.Generator().manual_seed(2)
    for name, spec in model_tensors(model).items():
        key = olmo_core_names(name)[-1 if old else 0]
        tensor = tensors[name].unsqueeze(1) if spec.kind == "conv" else tensors[name]
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


CASES = {
    **{name: (fields, False) for name, fields in MODELS.items()},
    "olmo3": (OLMO3, False),
    "older names": (BASE, True),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_arrive_bit_for_bit(case, tmp_path):
    fields, old = CASES[case]
    model = ModelConfig(**fields)
    folder = save(tmp_path / "step10", olmo_core_config(model, old), olmo_core_state(model, old))
    assert to_ours(folder, tmp_path / "ours") == 0
    expected = true_tensors_of(transformers_model(model), model)
    with CheckpointReader(tmp_path / "ours") as reader:
        assert ModelConfig(**reader.index.model) == model
        assert not reader.has_optimizer() and reader.index.state == {}
        assert set(reader.index.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor), name
    assert not verify(tmp_path / "ours").problems


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_optimizer_goes_along(dtype, tmp_path, ranks):
    model = ModelConfig(**BASE)
    state = olmo_core_state(model, optimizer=True)
    folder = save(tmp_path / "step17", olmo_core_config(model), state)
    assert to_ours(folder / "model_and_optim", tmp_path / "ours", "--dtype", dtype) == 0
    with CheckpointReader(tmp_path / "ours") as reader:
        assert reader.has_optimizer() and reader.index.state["updates"] == 17
        for name, spec in model_tensors(model).items():
            key = olmo_core_names(name)[0]
            for part in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(
                    reader.read(name, state=part), state["optim"][f"state.{key}.{part}"].view(spec.shape)
                )
            if dtype == "bf16" and not spec.always_fp32:
                assert torch.equal(reader.read(name, state="master"), state["model"][key].view(spec.shape))
                assert torch.equal(reader.read(name), state["model"][key].view(spec.shape).bfloat16())
    assert not verify(tmp_path / "ours").problems
    saved = ranks.run(
        convert_jobs.load_and_save, 2, checkpoint=str(tmp_path / "ours"), folder=str(tmp_path / "run"),
        parallel=dict(tensor_parallel_size=2), train=dict(dtype=dtype),
    )  # fmt: skip
    assert saved[0]["updates"] == 17
    with CheckpointReader(tmp_path / "ours") as before, CheckpointReader(tmp_path / "run/step-00000001") as after:
        for name in model_tensors(model):
            for part in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(before.read(name, state=part), after.read(name, state=part))

    assert to_ours(folder, tmp_path / "alone", "--no-optimizer") == 0
    assert set(weights(tmp_path / "alone")) == set(model_tensors(model))


def _save_sharded(folder: str, fields: dict) -> None:
    """Runs on ranks: every matrix split by rows, unevenly, as FSDP does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = olmo_core_state(ModelConfig(**fields), optimizer=True)
    for part in state.values():
        for key, value in part.items():
            if isinstance(value, torch.Tensor) and value.dim():
                part[key] = distribute_tensor(value, mesh, [Shard(0)])
    dcp.save(state, checkpoint_id=Path(folder) / "model_and_optim")


def test_sharded_over_ranks(tmp_path, ranks):
    ranks.run(_save_sharded, 3, folder=str(tmp_path / "step1"), fields=BASE)
    (tmp_path / "step1/config.json").write_text(json.dumps(olmo_core_config(ModelConfig(**BASE))))
    whole = save(
        tmp_path / "whole", olmo_core_config(ModelConfig(**BASE)), olmo_core_state(ModelConfig(**BASE), optimizer=True)
    )
    assert len(list((tmp_path / "step1/model_and_optim").glob("*.distcp"))) >= 3
    assert to_ours(tmp_path / "step1", tmp_path / "a") == 0
    assert to_ours(whole, tmp_path / "b") == 0
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.update(mystery=1), "unknown field 'mystery'"),
        (lambda m: m["block"]["gdn"].update(name="reordered_norm"), "block with its norms before"),
        (lambda m: m["block"]["attn"].update(name="default"), "block with its norms after"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].pop("bias"), "bias = None"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].update(gate={}), "gate = {}"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].update(qk_norm=None), "qk_norm is None"),
        (lambda m: m["block"]["attn"]["sequence_mixer"]["rope"].update(scaling={"factor": 2}), "rope.scaling"),
        (lambda m: m["block"]["attn"]["layer_norm"].update(eps=1e-5), "different eps"),
        (lambda m: m["block"]["attn"]["feed_forward"].update(hidden_size=41), "differ in ffn_hidden_size"),
        (lambda m: m.update(n_layers=0), "n_layers 0"),
        (lambda m: m.update(block_pattern=["gdn", "x"]), "block_pattern"),
        (lambda m: m.update(vocab_size=68), "embeddings.weight is F32 [67, 24]"),
    ],
)
def test_wrong_configs_are_named(change, told, tmp_path, capsys):
    config = json.loads(json.dumps(olmo_core_config(ModelConfig(**BASE))))
    change(config["model"])
    folder = save(tmp_path / "step1", config, olmo_core_state(ModelConfig(**BASE)))
    assert to_ours(folder, tmp_path / "ours") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_missing_and_unknown_tensors(tmp_path, capsys):
    model = ModelConfig(**BASE)
    state = olmo_core_state(model, optimizer=True)
    name = "blocks.1.attention.w_g.weight"
    cases = {
        f"missing: {name}": {"model": {k: v for k, v in state["model"].items() if k != name}},
        "does not have: model.extra": {"model": state["model"] | {"extra": torch.zeros(1)}},
        "missing optimizer state": state
        | {"optim": {k: v for k, v in state["optim"].items() if not k.endswith(f"{name}.exp_avg")}},
        "different numbers of updates": state | {"optim": state["optim"] | {f"state.{name}.step": torch.tensor(3.0)}},
    }
    for number, (told, changed) in enumerate(cases.items()):
        folder = save(tmp_path / f"step{number}", olmo_core_config(model), changed)
        assert to_ours(folder, tmp_path / "ours") == 1
        assert told in capsys.readouterr().err


class Hostile:
    """Unpickled as usual, it would make a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capsys):
    model = ModelConfig(**BASE)
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    trap, directory = tmp_path / "trap", folder / "model_and_optim"
    good = (directory / METADATA).read_bytes()
    metadata = pickle.loads(good)  # noqa: S301 - written above
    metadata.planner_data = Hostile(trap)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    assert to_ours(folder, tmp_path / "ours") == 1
    assert "posix.system" in capsys.readouterr().err

    (directory / METADATA).write_bytes(good)
    place = next(iter(metadata.storage_data.values()))
    with zipfile.ZipFile(directory / "evil", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Hostile(trap)))
        archive.writestr("archive/data/0", bytes(4096))
    evil = (directory / "evil").read_bytes()
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = place.relative_path, 0, len(evil)
    metadata.planner_data = None
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    (directory / place.relative_path).write_bytes(evil)
    assert to_ours(folder, tmp_path / "ours") == 1
    assert "posix.system" in capsys.readouterr().err
    assert not trap.exists() and not (tmp_path / "ours").exists()


def test_metadata_cannot_name_files_outside(tmp_path, capsys):
    model = ModelConfig(**BASE)
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    path = folder / "model_and_optim" / METADATA
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - written above
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    assert to_ours(folder, tmp_path / "ours") == 1
    assert "not the name of a file" in capsys.readouterr().err


def test_memo_bombs_are_refused(tmp_path):
    (tmp_path / METADATA).write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # LONG_BINPUT at two thousand million
    with pytest.raises(ConversionError, match="memo index"):
        TorchCheckpoint(tmp_path)


def test_damaged_metadata_is_refused(tmp_path):
    model = ModelConfig(**BASE | dict(layer_pattern="GA"))
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    path = folder / "model_and_optim" / METADATA
    good, rng = path.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        try:
            from_olmo_core(folder, tmp_path / "ours")
        except ConversionError:
            refused += 1
    assert refused > 150


def test_released_shapes_are_understood():
    """The two 7B models as OLMo-core describes them."""
    from megatron_hybrid.config.presets import olmo3_7b, olmo_hybrid_7b

    for preset in (olmo_hybrid_7b(), olmo3_7b()):
        assert model_from_olmo_core(json.loads(json.dumps(olmo_core_config(preset)))) == preset
    assert (
        model_from_olmo_core(json.loads(json.dumps(olmo_core_config(olmo_hybrid_7b(), old=True)))) == olmo_hybrid_7b()
    )


class FusedRMSNormGated(torch.nn.Module):
    """fla's gated output norm, in plain torch."""

    def __init__(self, width, eps, device=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, device=device))
        self.eps = eps

    def forward(self, x, gate):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return normed * self.weight * torch.nn.functional.silu(gate)


def _convolution(x, weight, bias, activation, **_):
    """fla's causal convolution [b, s, channels], in plain torch."""
    assert bias is None and activation == "silu"
    padded = torch.nn.functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    mixed = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0])
    return torch.nn.functional.silu(mixed).transpose(1, 2), None


@pytest.fixture
def olmo_core(monkeypatch):
    """OLMo-core itself. Where fla is missing, or there is no GPU for it, the three pieces of fla that it uses are plain torch;
    its delta rule is then transformers'."""
    package = pytest.importorskip(
        "olmo_core", reason="ai2-olmo-core is not installed: pip install ai2-olmo-core==3.0.0"
    )
    pytest.importorskip("olmo_core.nn.transformer.config", reason="ai2-olmo-core's own requirements are not installed")
    try:
        import fla.modules  # noqa: F401

        has_fla = torch.cuda.is_available()
    except ImportError:
        has_fla = False
    if not has_fla:
        from olmo_core.nn import convolution
        from olmo_core.nn.attention import recurrent
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        def delta_rule(q, k, v, g, beta, cu_seqlens, use_qk_l2norm_in_kernel):
            return torch_chunk_gated_delta_rule(
                q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
            )

        modules = types.ModuleType("fla.modules")
        modules.FusedRMSNormGated = FusedRMSNormGated  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
        monkeypatch.setitem(sys.modules, "fla.modules", modules)
        monkeypatch.setattr(recurrent, "has_fla", lambda: True)
        monkeypatch.setattr(recurrent, "dispatch_chunk_gated_delta_rule", delta_rule)
        monkeypatch.setattr(convolution, "dispatch_causal_conv1d", _convolution)
    return package


def build_olmo_core():
    """OLMo-core's model of BASE with random weights, and its configuration."""
    from olmo_core.nn.attention import AttentionConfig
    from olmo_core.nn.attention.recurrent import GatedDeltaNetConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.layer_norm import LayerNormConfig
    from olmo_core.nn.lm_head import LMHeadConfig
    from olmo_core.nn.rope import RoPEConfig
    from olmo_core.nn.transformer.config import TransformerBlockConfig, TransformerConfig

    norm = LayerNormConfig(name="rms", eps=1e-6, bias=False)
    shared = dict(layer_norm=norm, feed_forward=FeedForwardConfig(hidden_size=40, bias=False))
    gdn = GatedDeltaNetConfig(n_heads=3, head_dim=4, expand_v=2.5)
    attention = AttentionConfig(n_heads=3, bias=False, qk_norm=norm, rope=RoPEConfig())
    config = TransformerConfig(
        d_model=24,
        vocab_size=67,
        n_layers=4,
        block={
            "gdn": TransformerBlockConfig(name="default", sequence_mixer=gdn, **shared),
            "attn": TransformerBlockConfig(name="reordered_norm", sequence_mixer=attention, **shared),
        },
        block_pattern=["gdn", "gdn", "gdn", "attn"],
        lm_head=LMHeadConfig(layer_norm=norm, bias=False),
    )
    model = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else noise if "A_log" in name else 0.2 * noise
    return model, config


@pytest.mark.parametrize("flat", [True, False])
def test_checkpoints_that_olmo_core_writes(flat, olmo_core, tmp_path):
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.optim import SkipStepAdamWConfig

    model, config = build_olmo_core()
    optimizer = SkipStepAdamWConfig(lr=1e-3).build(model)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.latest_loss = torch.tensor(1.0)
        optimizer.step()
    save_model_and_optim_state(tmp_path / "step3/model_and_optim", model, optimizer, flatten_optimizer_state=flat)
    (tmp_path / "step3/config.json").write_text(json.dumps({"model": config.as_config_dict()}))

    assert to_ours(tmp_path / "step3", tmp_path / "ours", "--eos-token-id", "5", "--pad-token-id", "6") == 0
    ours = ModelConfig(**BASE)
    theirs = dict(model.named_parameters())
    with CheckpointReader(tmp_path / "ours") as reader:
        assert ModelConfig(**reader.index.model) == ours
        assert reader.index.state["updates"] == 3
        for name, spec in model_tensors(ours).items():
            parameter = theirs[olmo_core_names(name)[0]]
            assert torch.equal(reader.read(name), parameter.detach().view(spec.shape)), name
            for part in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(reader.read(name, state=part), optimizer.state[parameter][part].view(spec.shape)), (
                    name
                )
    assert not verify(tmp_path / "ours").problems


def test_logits_agree_with_olmo_core(olmo_core, tmp_path, ranks):
    from olmo_core.distributed.checkpoint import save_model_and_optim_state

    model, config = build_olmo_core()
    save_model_and_optim_state(tmp_path / "step0/model_and_optim", model)
    (tmp_path / "step0/config.json").write_text(json.dumps({"model": config.as_config_dict()}))
    assert to_ours(tmp_path / "step0", tmp_path / "ours") == 0
    tokens = torch.randint(0, 67, (2, 40), generator=torch.Generator().manual_seed(1))
    device = "cuda" if torch.cuda.is_available() and "fla.ops" in sys.modules else "cpu"
    with torch.no_grad():
        expected = model.to(device)(tokens.to(device)).cpu()
    (ours,) = ranks.run(convert_jobs.logits, 1, checkpoint=str(tmp_path / "ours"), tokens=tokens)
    error = (ours["logits"][..., :67] - expected).norm() / expected.norm()
    assert error < (1e-5 if device == "cpu" else 1e-2), error
