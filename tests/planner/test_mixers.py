"""The planner and the registry: costs agree with packings, and the planner knows no mixer."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.arch.costs import Gemm
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import default_blocks, mixer_spec, mixer_specs
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.presets import olmo3_7b, olmo_hybrid_7b
from megatron_hybrid.planner.activations import layer_bytes
from megatron_hybrid.planner.memory import fullest
from megatron_hybrid.planner.plan import Plan

PLANNER = Path(__file__).resolve().parents[2] / "megatron_hybrid" / "planner"


def kimi() -> ModelConfig:
    """A model with Kimi Delta Attention at Kimi Linear's head sizes."""
    kda = dict(num_heads=32, key_head_dim=128, value_head_dim=128)
    sizes = dict(hidden_size=2304, ffn_hidden_size=9216, vocab_size=163840, num_attention_heads=32, head_dim=128)
    return ModelConfig(layer_pattern="KKKA*2", kda=kda, **sizes)


def plans(tp: int) -> list[Plan]:
    parallel = ParallelConfig(tensor_parallel_size=tp)
    return [Plan(model, parallel, tp, 4096, 1, 1) for model in (olmo_hybrid_7b(), olmo3_7b(), kimi())]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_gemms_multiply_by_every_weight_of_the_packing(tp):
    seen = set()
    for plan in plans(tp):
        for symbol, shard in plan.shards.items():
            seen.add(symbol)
            work = mixer_spec(shard.block.mixer).work(shard, "forward")
            gemms = Counter((one.n, one.k) for one in work if isinstance(one, Gemm))
            linears, others = (
                Counter(one.rank_shape(tp) for one in shard.parameters if one.is_gemm == is_linear)
                for is_linear in (True, False)
            )
            assert linears <= gemms and gemms - linears <= others, "low-rank projections are no linears"
    assert seen == set(default_blocks()), "the models have every kind of layer"


def test_only_padded_heads_grow_what_a_layer_saves():
    """30 heads are padded to 32 at TP4; 32 heads are not."""
    for plan, is_padded in zip(plans(4)[:2], (True, False), strict=True):
        for symbol, shard in plan.shards.items():
            padded, true = (layer_bytes(one, "none").saved for one in (shard, plan.unpadded_shards[symbol]))
            assert padded > true if is_padded else padded == true


def test_a_block_with_another_norm_is_planned():
    """Norms belong to the block: the same mixer with its norm in front saves the input of a norm, and not its output."""
    plan = plans(1)[0]
    shard = plan.shards["A"]
    post, pre, peri = (
        layer_bytes(replace(shard, block=shard.block.model_copy(update={"norm": norm})), "none").saved
        for norm in ("post", "pre", "peri")
    )
    norm = shard.element * shard.hidden + 4
    assert pre == post, "both save one input per norm"
    assert peri == post + 2 * norm


def test_blocks_are_named_by_their_titles():
    titles = {block.title for block in default_blocks().values()}
    named = {name.removeprefix("activations: ") for plan in plans(1) for name in fullest(plan).parts()}
    assert titles <= named


def test_the_planner_names_no_mixer():
    words = {word for spec in mixer_specs() for word in (spec.name, spec.prefix)} - {"attention"}  # also a rate's name
    symbols = "".join(default_blocks())
    pattern = re.compile(rf"{'|'.join(words)}|[\"'][{symbols}][\"']")
    found = [
        f"{path.name}: {match[0]}" for path in PLANNER.glob("*.py") for match in pattern.finditer(path.read_text())
    ]
    assert not found
