"""Attention to packed documents equals attention to each document alone, in fp64, values and gradients."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from megatron_hybrid.mixers.attention import local
from megatron_hybrid.mixers.documents import Documents
from testing.documents import RAGGED, documents_of

HEADS, GROUPS, WIDTH = 4, 2, 8


def inputs(rows) -> list[torch.Tensor]:
    """Return q, k and v [s, b, h, d]."""
    generator = torch.Generator().manual_seed(0)
    sizes = (sum(rows[0]), len(rows))
    return [
        torch.randn(*sizes, heads, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def one_by_one(q, k, v, rows, window: int | None) -> torch.Tensor:
    """Attend to each document alone, by formula: [s, b, h * d]."""
    out = torch.empty_like(q)
    for row, lengths in enumerate(rows):
        parts = [x[:, row].transpose(0, 1).split(lengths, 1) for x in (q, k, v)]
        out[:, row] = torch.cat([_attend(*part, window) for part in zip(*parts, strict=True)], 1).transpose(0, 1)
    return out.flatten(2)


def _attend(q, k, v, window: int | None) -> torch.Tensor:
    k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
    at = torch.arange(q.shape[1])
    behind = at[:, None] - at
    hidden = (behind < 0) | (behind >= (window or len(at)))
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def with_gradients(function, tensors) -> list[torch.Tensor]:
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("entries", [local.MASK_ENTRIES, 3 * 96 * 20], ids=["one block", "blocks"])
@pytest.mark.parametrize("window", [None, 1, 7, 200])
def test_local_attention(window, entries, monkeypatch):
    monkeypatch.setattr(local, "MASK_ENTRIES", entries)
    attention = local.ScaledDotProductAttention.__new__(local.ScaledDotProductAttention)
    torch.nn.Module.__init__(attention)
    attention.window, attention.scale = window, None
    documents = documents_of(RAGGED)
    found = with_gradients(lambda q, k, v: attention(q, k, v, documents=documents), inputs(RAGGED))
    expected = with_gradients(lambda q, k, v: one_by_one(q, k, v, RAGGED, window), inputs(RAGGED))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_blocks_keep_masks_small(monkeypatch):
    """No mask has more than MASK_ENTRIES entries, whatever the length."""
    monkeypatch.setattr(local, "MASK_ENTRIES", 3 * 96 * 5)
    sizes, attend = [], F.scaled_dot_product_attention

    def watched(*tensors, attn_mask, **options):
        sizes.append(attn_mask.numel())
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = (x.permute(1, 2, 0, 3) for x in inputs(RAGGED))
    local.attend_in_documents(q, k, v, documents_of(RAGGED).starts_bs, None, None)
    assert len(sizes) == 20 and max(sizes) <= 3 * 96 * 5


class Thd(torch.nn.Module):
    """TEDotProductAttention's THD layout by formula: [t, h, d] and boundaries, with as many empty documents as there may be."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params=None):
        packed = packed_seq_params
        assert attention_mask is None and attn_mask_type is AttnMaskType.causal
        if packed is None:
            return query.flatten(2)
        assert packed.qkv_format == "thd" and packed.pad_between_seqs is False and packed.cu_seqlens_q_padded is None
        assert packed.cu_seqlens_q is packed.cu_seqlens_kv and packed.cu_seqlens_q.dtype == torch.int32
        assert type(packed.max_seqlen_q) is int and packed.max_seqlen_q == packed.max_seqlen_kv
        lengths = packed.cu_seqlens_q.diff().tolist()
        assert max(lengths) <= packed.max_seqlen_q and 0 in lengths
        parts = [x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)]
        return torch.cat([_attend(*part, None) for part in zip(*parts, strict=True)], 1).transpose(0, 1).flatten(1)


@pytest.fixture
def transformer_engine(monkeypatch):
    """The module of Transformer Engine's attention, on top of Thd."""
    name, stand_in = "megatron_hybrid.mixers.attention.transformer_engine", ModuleType("stand_in")
    stand_in.TEDotProductAttention = Thd
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", stand_in)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__(name, fromlist=["TransformerEngineAttention"])
    sys.modules.pop(name, None)


@pytest.mark.parametrize("rows", [RAGGED, RAGGED[:1]], ids=["three rows", "one row"])
def test_thd_layout(rows, transformer_engine):
    attention, documents = transformer_engine.TransformerEngineAttention(), documents_of(rows)
    options = dict(attention_mask=None, attn_mask_type=AttnMaskType.causal, documents=documents)
    found = with_gradients(lambda q, k, v: attention(q, k, v, **options), inputs(rows))
    expected = with_gradients(lambda q, k, v: one_by_one(q, k, v, rows, None), inputs(rows))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    q, k, v = inputs(rows)
    assert torch.equal(attention(q, k, v, None, AttnMaskType.causal), q.flatten(2))


def test_a_probes_documents_are_several_per_row():
    documents = Documents.of_equal_length(100, 2, torch.device("cpu"))
    bounds = documents.cu_seqlens.unique().tolist()
    assert bounds == [*range(0, 100, 7), *range(100, 201, 7), 200]
