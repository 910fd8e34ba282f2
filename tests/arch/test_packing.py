"""Packing: padded sizes, and which part of every tensor each rank holds."""

from itertools import product

import pytest

from megatron_hybrid.arch.layer import in_module_order, layer_parameters, outer_parameters
from megatron_hybrid.arch.packing import PackedParameter, TensorSpec
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.config.presets import olmo3_7b, olmo_hybrid_7b, olmo_hybrid_tiny

DEGREES = (1, 2, 3, 4, 8)


def parameter(model, index: int, name: str) -> PackedParameter:
    return {p.name: p for p in layer_parameters(model, model.block(index))}[name]


@pytest.mark.parametrize(("ranks", "heads"), [(1, 30), (2, 30), (4, 32), (8, 32)])
def test_padded_sizes_of_the_7b(ranks, heads):
    model = olmo_hybrid_7b()
    in_proj, qkv = (
        parameter(model, 0, "self_attention.in_proj.weight"),
        parameter(model, 3, "self_attention.linear_qkv.weight"),
    )
    assert in_proj.padded_groups(ranks) == qkv.padded_groups(ranks) == heads
    assert qkv.rank_shape(ranks) == (3 * heads * 128 // ranks, 3840)
    rows = heads // ranks * (96 + 96 + 192 + 192 + 1 + 1)
    assert in_proj.rank_shape(ranks) == (-(-rows // 16) * 16, 3840)
    assert parameter(model, 0, "self_attention.out_proj.weight").rank_shape(ranks) == (3840, heads * 192 // ranks)
    table = outer_parameters(model)["embedding"]
    assert table.padded_size(table.tensors[0], ranks) == 100352


def test_the_vocabulary_is_padded_to_whole_fp8_rows():
    table = outer_parameters(olmo_hybrid_tiny())["output"]
    assert [table.padded_size(table.tensors[0], ranks) for ranks in (1, 2, 4)] == [272, 288, 320]
    assert table.slices(1, 2)[0].source == TensorSlice((144, 0), (113, 128))


def test_groups_stay_whole():
    model = olmo_hybrid_7b().model_copy(update={"num_key_value_heads": 6})
    qkv = parameter(model, 3, "self_attention.linear_qkv.weight")
    assert [qkv.padded_size(tensor, 4) for tensor in qkv.tensors] == [40 * 128, 8 * 128, 8 * 128]


def test_ranks_share_the_rows_of_a_headless_tensor():
    """Three heads of 4 rows are padded to four heads on two or four ranks; 10 rows without heads to 10 and 12 rows."""
    heads, low_rank = TensorSpec("q.weight", (12, 5)), TensorSpec("f.weight", (10, 5))
    packed = PackedParameter("in.weight", (heads, low_rank), "rows", 3, headless=("f.weight",))
    assert [packed.rank_sizes(ranks) for ranks in (1, 2, 4)] == [(12, 10), (8, 5), (4, 3)]
    assert packed.rank_shape(4) == (7, 5) and packed.numel == 110
    placed = packed.placed("mixer", "kda")
    for ranks in (1, 2, 4):
        rows = [
            s.source for rank in range(ranks) for s in placed.slices(rank, ranks) if s.tensor.name == "kda.f.weight"
        ]
        assert [place.offset[0] for place in rows] == list(range(0, 10, -(-10 // ranks)))
        assert sum(place.shape[0] for place in rows) == 10
    (last,) = placed.slices(3, 4)
    assert last.tensor.name == "kda.f.weight" and last.target == TensorSlice((4, 0), (1, 5)) and last.chunk == (1, 5)


@pytest.mark.parametrize("ranks", DEGREES)
@pytest.mark.parametrize("model", [olmo_hybrid_tiny(), olmo3_7b().model_copy(update={"num_key_value_heads": 8})])
def test_ranks_hold_every_element_once(model, ranks):
    parameters = [
        p
        for index in (0, 3)
        for p in layer_parameters(model, model.block(index))
        if p.groups % ranks == 0 or p.groups < 999
    ]
    for packed in [*parameters, *outer_parameters(model).values()]:
        held: dict[str, int] = {}
        for rank, place in product(range(1 if packed.split == "replicated" else ranks), [packed]):
            taken = []
            for part in place.slices(rank, ranks):
                assert part.source.shape == part.target.shape
                assert all(
                    at + n <= size
                    for at, n, size in zip(part.target.offset, part.target.shape, packed.rank_shape(ranks), strict=True)
                )
                assert not [t for t in taken if t.intersection(part.target)]
                taken.append(part.target)
                assert all(n % c == 0 for n, c in zip(part.source.shape, part.chunk, strict=True))
                held[part.tensor.name] = held.get(part.tensor.name, 0) + part.source.numel
        assert held == {tensor.name: tensor.numel for tensor in packed.tensors}


def test_a_rank_of_padding_alone_holds_nothing():
    packed = PackedParameter("w", (TensorSpec("w", (6, 2)),), "rows", groups=3)
    assert [len(packed.slices(rank, 4)) for rank in range(4)] == [1, 1, 1, 0]
    assert packed.rank_shape(4) == (2, 2)


def test_module_order_puts_own_parameters_first():
    model = olmo_hybrid_tiny()
    names = [p.name for p in in_module_order(layer_parameters(model, model.block(0)))]
    assert names == [
        "input_layernorm.weight",
        *(f"self_attention.{name}" for name in ("conv_weight", "A_log", "dt_bias", "o_norm_weight")),
        *(f"self_attention.{name}.weight" for name in ("in_proj", "out_proj")),
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def test_slices_of_tensors():
    whole = TensorSlice((0, 0), (4, 6))
    right = TensorSlice((1, 3), (3, 3))
    assert whole.intersection(right) == right and right.numel == 9
    assert right.intersection(TensorSlice((0, 0), (1, 6))) is None
    assert right.relative_to((1, 1)) == TensorSlice((0, 2), (3, 3))
