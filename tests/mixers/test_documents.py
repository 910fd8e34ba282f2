"""Documents in the forms that mixers take, and megatron-core's PackedSeqParams as such documents."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.mixers.documents import Documents, from_packed_seq_params
from testing.documents import RAGGED, documents_of

ONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rotary_angles_restart_in_each_document_of_every_slice(size):
    """Plain and scaled tables: the entry of each token is that of its position in its document."""
    whole = documents_of(RAGGED)
    table = torch.arange(96.0)[:, None, None, None].expand(96, 1, 1, 4)
    parts = [Documents.of(whole.starts_bs, whole.cu_seqlens, group(rank, size)) for rank in range(size)]
    expected = torch.cat([torch.arange(n) for row in RAGGED for n in row]).view(3, 96).t().float()
    angles = torch.cat([part.rotary_angles(table) for part in parts])
    assert angles.shape == (96, 3, 1, 4) and torch.equal(angles, expected[..., None, None].expand_as(angles))
    both = torch.cat([part.rotary_angles(torch.stack((table, -table))) for part in parts], 1)
    assert torch.equal(both, torch.stack((angles, -angles)))


def packed(bounds: list[int], dtype=torch.int32, **more) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=dtype)
    return PackedSeqParams(**dict(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens) | more)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_seq_params_are_documents(dtype):
    """Empty documents are ignored, and the tokens after the last document are one of their own."""
    found = from_packed_seq_params(packed([0, 3, 3, 4, 9], dtype), 12, 1, ONE)
    expected = documents_of([[3, 1, 5, 3]])
    assert torch.equal(found.starts_bs, expected.starts_bs) and torch.equal(found.positions_bs, expected.positions_bs)
    assert found.cu_seqlens.dtype == torch.int32 and found.cu_seqlens.tolist() == [0, 3, 4, 9, 12, 12]


def test_packed_seq_params_are_converted_once_and_again_when_they_change():
    params = packed([0, 2, 6])
    first = from_packed_seq_params(params, 6, 1, ONE)
    assert from_packed_seq_params(params, 6, 1, ONE) is first
    params.cu_seqlens_q[1] = 5
    assert from_packed_seq_params(params, 6, 1, ONE).starts_bs.tolist() == [[0, 0, 0, 0, 0, 5]]


@pytest.mark.parametrize(
    ("params", "rows", "message"),
    [
        (object(), 1, "it is a object"),
        (packed([0, 6], qkv_format="sbhd"), 1, "qkv_format is 'sbhd'"),
        (packed([0, 6], cu_seqlens_q=None), 1, "cu_seqlens_q missing"),
        (packed([0, 6], cu_seqlens_kv=torch.tensor([0, 5])), 1, "cu_seqlens_kv differs"),
        (packed([0, 4], cu_seqlens_q_padded=torch.tensor([0, 6])), 1, "cu_seqlens_q_padded differs"),
        (packed([0, 6]), 2, "there are 2 sequences on 1 context"),
        (packed([0, 6], local_cp_size=2), 1, "1 sequences on 2 context"),
    ],
)
def test_packed_seq_params_that_cannot_be_obeyed_are_refused(params, rows, message):
    with pytest.raises(UserError, match=f"^packed_seq_params: .*{message}"):
        from_packed_seq_params(params, 6, rows, ONE)


@pytest.mark.parametrize("bounds", [[0, 4, 3, 6], [0, 7], [1, 6]])
def test_boundaries_out_of_order_are_refused(bounds):
    with pytest.raises(RuntimeError, match="does not rise from 0 to at most 6 tokens"):
        from_packed_seq_params(packed(bounds), 6, 1, ONE)
