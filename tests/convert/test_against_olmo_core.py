"""Comparison with OLMo-core itself: checkpoints that it writes, and its logits."""

import json
import sys
import types

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.olmo_core.names import olmo_core_names
from megatron_hybrid.convert.verify import verify
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
