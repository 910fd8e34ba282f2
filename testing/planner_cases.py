"""Layouts whose memory the planner must predict exactly."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.presets import olmo_hybrid_tiny
from megatron_hybrid.planner.plan import Plan
from testing.models import small
from testing.parallel import OVERLAP, layout


def plan_of(model: ModelConfig, parallel: dict, world_size: int, dtype: str = "bf16") -> Plan:
    return Plan(model, ParallelConfig(**parallel), world_size, 32, 1, 8, dtype)


TINY = dict(vocab_size=131, hidden_size=40, ffn_hidden_size=72, num_attention_heads=3, head_dim=8, eos_token_id=None)
MODEL = olmo_hybrid_tiny().model_copy(update=TINY)
WINDOWED = MODEL.model_copy(update=dict(layer_pattern="GWA,GG", sliding_window=8, num_key_value_heads=1))
TIED = MODEL.model_copy(update=dict(tie_embeddings=True))
PERI_NORM = ModelConfig(**small("GA*4", 40, 3, 3, 8))
CASES = {
    # name: (ranks, model, layout, dtype)
    "one rank": (1, MODEL, layout(), "bf16"),
    "one rank, fp32, plain optimizer": (1, MODEL, layout(distributed_optimizer=False), "fp32"),
    "DP4": (4, MODEL, layout(), "bf16"),
    "DP3, fp32, overlapped": (3, WINDOWED, layout(**OVERLAP), "fp32"),
    "DP2, plain optimizer": (2, WINDOWED, layout(distributed_optimizer=False), "bf16"),
    "TP3, padded heads": (3, MODEL, layout(3), "bf16"),
    "TP2, DP2": (4, MODEL, layout(2), "bf16"),
    "TP2, PP2": (4, MODEL, layout(2, 2), "bf16"),
    "PP2, VPP2, DP2": (4, MODEL, layout(pp=2, vpp=2, **OVERLAP), "bf16"),
    "PP2, DP2, tied embeddings": (4, TIED, layout(pp=2), "bf16"),
    "TP2, PP2, VPP2, peri-norm": (4, PERI_NORM, layout(2, 2, 2, **OVERLAP), "bf16"),
    "CP2, DP2": (4, MODEL, layout(cp=2), "bf16"),
    "CP2, TP2, overlapped": (4, MODEL, layout(2, cp=2, **OVERLAP), "bf16"),
    "PP3, uneven": (3, MODEL, layout(pp=3, pipeline_split=[1, 5, 2]), "bf16"),
}
