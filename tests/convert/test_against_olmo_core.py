"""Comparison with OLMo-core itself: checkpoints that it writes, and its logits."""

import json
import sys
import types

import pytest
import torch

from megatron_hybrid.arch.flops import count_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config import presets
from megatron_hybrid.convert.olmo_core.config import model_from_olmo_core
from megatron_hybrid.convert.olmo_core.names import olmo_core_names
from megatron_hybrid.convert.verify import verify
from testing import jobs
from testing.models import small
from tests.convert import jobs as convert_jobs
from tests.convert.folders import BASE
from tests.convert.olmo_core_files import to_ours


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
    its delta rule is then transformers'.
    """
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
            out, state = torch_chunk_gated_delta_rule(
                q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
            )
            return out.contiguous(), state

        modules = types.ModuleType("fla.modules")
        modules.FusedRMSNormGated = FusedRMSNormGated  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
        monkeypatch.setitem(sys.modules, "fla.modules", modules)
        monkeypatch.setattr(recurrent, "has_fla", lambda: True)
        monkeypatch.setattr(recurrent, "dispatch_chunk_gated_delta_rule", delta_rule)
        monkeypatch.setattr(convolution, "dispatch_causal_conv1d", _convolution)
    return package


SMALL = small("GGGGA", 24, 4, 2, 8, vocab_size=67, eos_token_id=5, pad_token_id=6)


def build_olmo_core(fields: dict, std: float = 0.2):
    """OLMo-core's model with random weights, and its configuration."""
    from olmo_core.nn.layer_norm import LayerNormConfig
    from olmo_core.nn.lm_head import LMHeadConfig
    from olmo_core.nn.transformer.config import TransformerConfig

    ours, norm = ModelConfig(**fields), LayerNormConfig(name="rms", eps=1e-6, bias=False)
    config = TransformerConfig(
        d_model=ours.hidden_size,
        vocab_size=ours.vocab_size,
        n_layers=ours.num_layers,
        block=blocks_of(ours, norm),
        block_pattern=["gdn" if symbol == "G" else "attn" for symbol in ours.layers],
        lm_head=LMHeadConfig(layer_norm=norm, bias=False),
        embed_scale=ours.embed_scale,
        embedding_norm=norm if ours.embedding_norm else None,
    )
    model = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else noise if "A_log" in name else std * noise
    return model, config


def blocks_of(ours: ModelConfig, norm) -> dict:
    """OLMo-core's configuration of the blocks of OLMo Hybrid, or of AI2's small suite."""
    from olmo_core.nn.attention import AttentionConfig, GateConfig
    from olmo_core.nn.attention.recurrent import GatedDeltaNetConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.rope import RoPEConfig
    from olmo_core.nn.transformer.config import TransformerBlockConfig

    names, section = {"pre": "default", "post": "reordered_norm", "peri": "peri_norm"}, ours.gdn
    gdn, attn = ours.known_blocks["G"], ours.known_blocks["A"]
    mixer = GatedDeltaNetConfig(
        n_heads=section.num_key_heads,
        head_dim=section.key_head_dim,
        expand_v=section.value_head_dim / section.key_head_dim,
    )
    attention = AttentionConfig(
        n_heads=ours.num_attention_heads,
        n_kv_heads=ours.kv_heads,
        head_dim=ours.attention_head_dim,
        bias=False,
        qk_norm=norm,
        use_head_qk_norm=attn.qk_norm == "per_head",
        gate=GateConfig(granularity="elementwise", full_precision=True) if attn.output_gate else None,
        rope=RoPEConfig() if ours.rope_theta else None,
    )
    shared = dict(layer_norm=norm, feed_forward=FeedForwardConfig(hidden_size=ours.ffn_hidden_size, bias=False))
    return {
        "gdn": TransformerBlockConfig(name=names[gdn.norm], sequence_mixer=mixer, **shared),
        "attn": TransformerBlockConfig(name=names[attn.norm], sequence_mixer=attention, **shared),
    }


@pytest.mark.parametrize(("fields", "flat"), [(BASE, True), (BASE, False), (SMALL, True)])
def test_checkpoints_that_olmo_core_writes(fields, flat, olmo_core, tmp_path):
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.optim import SkipStepAdamWConfig

    model, config = build_olmo_core(fields)
    optimizer = SkipStepAdamWConfig(lr=1e-3).build(model)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.latest_loss = torch.tensor(1.0)
        optimizer.step()
    save_model_and_optim_state(tmp_path / "step3/model_and_optim", model, optimizer, flatten_optimizer_state=flat)
    (tmp_path / "step3/config.json").write_text(json.dumps({"model": config.as_config_dict()}))

    assert to_ours(tmp_path / "step3", tmp_path / "ours", "--eos-token-id", "5", "--pad-token-id", "6") == 0
    ours = ModelConfig(**fields)
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


@pytest.mark.parametrize("fields", [BASE, SMALL], ids=["OLMo Hybrid", "small suite"])
def test_logits_agree_with_olmo_core(fields, olmo_core, tmp_path, ranks):
    from olmo_core.distributed.checkpoint import save_model_and_optim_state

    model, config = build_olmo_core(fields)
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


SUITE = {
    "olmo_hybrid_small_275m": 275_493_760,
    "olmo_hybrid_small_810m": 810_354_816,
    "olmo_hybrid_small_1.4b": 1_422_110_720,
}
"""Parameters, as the suite's script states them."""
CASES = {
    "small suite": SMALL,
    "small suite, all heads": SMALL | dict(num_key_value_heads=None, layer_pattern="AGA"),
    "small suite, rotary embedding": SMALL | dict(rope_theta=5e5),
    "small suite, plain embedding": SMALL | dict(embed_scale=1.0, embedding_norm=False, layer_pattern="GA"),
    "embedding scale alone": BASE | dict(embed_scale=4.0),
    "peri-norm, no gate": SMALL | dict(blocks={symbol: {"norm": "peri"} for symbol in "GA"}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_olmo_core(case, olmo_core, ranks):
    ours = ModelConfig(**CASES[case])
    model, _ = build_olmo_core(CASES[case], std=0.05)
    peer = dict(model.named_parameters())
    theirs = {name: (peer[olmo_core_names(name)[0]], spec.shape) for name, spec in model_tensors(ours).items()}
    assert len(theirs) == len(peer)
    tokens = torch.randint(0, 67, (2, 80), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    tensors = {name: parameter.detach().view(shape) for name, (parameter, shape) in theirs.items()}
    (found,) = ranks.run(jobs.logits_and_gradients, 1, model=CASES[case], tensors=tensors, tokens=tokens)
    assert (found["logits"][..., :67] - logits).norm() / logits.norm() < 1e-5
    for name, (parameter, shape) in theirs.items():
        error = (found["gradients"][name] - parameter.grad.view(shape)).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", presets.SMALL)
def test_presets_are_the_suite_of_olmo_core(name, olmo_core):
    """The configuration as the suite's script builds it: blocks that are overridden by number, a tokenizer's padded vocabulary."""
    from olmo_core.data import TokenizerConfig
    from olmo_core.nn.layer_norm import LayerNormConfig
    from olmo_core.nn.lm_head import LMHeadConfig
    from olmo_core.nn.transformer.config import TransformerConfig

    ours, norm = presets.SMALL[name](), LayerNormConfig(name="rms", eps=1e-6, bias=False)
    blocks, tokenizer = blocks_of(ours, norm), TokenizerConfig.dolma2()
    config = TransformerConfig(
        d_model=ours.hidden_size,
        vocab_size=tokenizer.padded_vocab_size(),
        n_layers=ours.num_layers,
        block=blocks["gdn"],
        block_overrides={index: blocks["attn"] for index in range(4, ours.num_layers, 5)},
        lm_head=LMHeadConfig(layer_norm=norm, bias=False),
        embed_scale=ours.hidden_size**0.5,
        embedding_norm=norm,
    )
    assert config.num_params == count_parameters(ours) == SUITE[name]
    written = json.loads(json.dumps({"model": config.as_config_dict(), "dataset": {"tokenizer": tokenizer.as_dict()}}))
    assert _without_titles(model_from_olmo_core(written)) == _without_titles(ours)


def _without_titles(model: ModelConfig) -> dict:
    fields = model.model_dump()
    for block in fields["blocks"].values():
        del block["title"]
    return fields | {"layer_pattern": model.layers}
