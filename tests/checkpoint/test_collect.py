"""Slices of parameters and flattened ranges of them, compared with plain indexing."""

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.collect import range_of_slice, select_from_range
from megatron_hybrid.config.presets import olmo_hybrid_7b, olmo_hybrid_tiny
from megatron_hybrid.model.param_layout import ParamLayout


@pytest.mark.parametrize(
    ("shape", "at", "size"),
    [
        ((7,), (2,), (4,)),
        ((6, 5), (1, 0), (3, 5)),
        ((6, 5), (0, 0), (6, 3)),
        ((6, 5), (2, 1), (3, 3)),
        ((4, 4), (0, 0), (4, 4)),
    ],
)
def test_every_range_of_a_parameter_meets_its_slice_where_indexing_says(shape, at, size):
    part = TensorSlice(at, size)
    parameter = torch.arange(torch.Size(shape).numel()).view(shape)
    inside = part.narrow(parameter).flatten().tolist()
    for start in range(parameter.numel()):
        for stop in range(start + 1, parameter.numel() + 1):
            expected = [value for value in inside if start <= value < stop]
            lo, hi = range_of_slice(part, shape, start, stop)
            assert inside[lo:hi] == expected
            assert select_from_range(part, shape, start, parameter.view(-1)[start:stop]).tolist() == expected


def parameter_shapes(model: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Local parameter shapes of one G and one A layer, as the modules make them."""
    d, h, gdn = model.attention_head_dim, model.hidden_size, model.gdn
    groups = round_up(model.kv_heads, tp) // tp
    q, kv, vocab = (
        groups * model.num_attention_heads // model.kv_heads * d,
        groups * d,
        round_up(model.vocab_size, 16 * tp),
    )
    keys = round_up(gdn.num_key_heads, tp) // tp
    heads = keys * gdn.num_value_heads // gdn.num_key_heads
    key, value = keys * gdn.key_head_dim, heads * gdn.value_head_dim
    return {
        "embedding.word_embeddings.weight": (vocab // tp, h),
        "output_layer.weight": (vocab // tp, h),
        "decoder.layers.0.self_attention.in_proj.weight": (round_up(2 * (key + value + heads), 16), h),
        "decoder.layers.0.self_attention.conv_weight": (2 * key + value, 4),
        "decoder.layers.0.self_attention.A_log": (heads,),
        "decoder.layers.0.self_attention.out_proj.weight": (h, value),
        "decoder.layers.0.mlp.linear_fc1.weight": (2 * model.ffn_hidden_size // tp, h),
        "decoder.layers.0.mlp.linear_fc2.weight": (h, model.ffn_hidden_size // tp),
        "decoder.layers.3.self_attention.linear_qkv.weight": (q + 2 * kv, h),
        "decoder.layers.3.self_attention.q_norm_weight": (q,),
        "decoder.layers.3.self_attention.linear_proj.linear.weight": (h, q),
    }


@pytest.mark.parametrize(
    ("preset", "tp"),
    [
        (preset, tp)
        for preset in (olmo_hybrid_7b, olmo_hybrid_tiny)
        for tp in (1, 2, 4, 8)
        if tp <= preset().num_attention_heads
    ],
)
def test_the_ranks_pieces_tile_each_tensor_once(preset, tp):
    model = preset()
    held = dict.fromkeys(model_tensors(model), 0)
    for name, shape in parameter_shapes(model, tp).items():
        for rank in range(tp):
            parameter = torch.empty(shape, device="meta")
            for piece in ParamLayout(model, rank, tp).slices(name, 0):
                assert piece.target.narrow(parameter).shape == piece.source.shape, "the piece is inside the parameter"
                assert all(
                    o + n <= total
                    for o, n, total in zip(piece.source.offset, piece.source.shape, piece.tensor.shape, strict=True)
                )
                held[piece.tensor.name] += torch.Size(piece.source.shape).numel()
    for name, count in held.items():
        if count:
            assert count == model_tensors(model)[name].numel, name
    assert sum(count > 0 for count in held.values()) >= 20
