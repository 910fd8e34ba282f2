"""Attention to packed documents on one GPU: Transformer Engine's THD layout against block-diagonal masks, and whether it is exact.

python benchmarks/document_attention.py

30 heads of 128, bf16, forward and backward. Lengths of documents are log-normal with a median of 400 tokens, as in web text. The
oracle of values and gradients is fp32 SDPA on each document alone. About two minutes on an H200.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

HEADS, WIDTH, WINDOW = 30, 128, 4096
SHAPES = {"1 x 8,192": (1, 8192), "4 x 8,192": (4, 8192), "1 x 65,536": (1, 65536)}
LONGEST_MASK = 8192
"""Longest row for which a whole block-diagonal mask is tried."""
ERRORS = {"bf16": 1e-2, "fp32": 1e-5}


def rows_of(kind: str, b: int, s: int) -> list[list[int]]:
    """Return the lengths of the documents of each row."""
    import numpy as np

    if kind == "two documents":
        return [[s // 2 - 1, s - s // 2 + 1]] * b
    random, rows = np.random.default_rng(0), []
    for _ in range(b):
        row: list[int] = []
        while (room := s - sum(row)) > 0:
            row.append(min(room, int(random.lognormal(np.log(400), 1.0)) + 1))
        rows.append(row)
    return rows


def on_device(documents):
    """Return documents with their tensors on the GPU."""
    from dataclasses import fields, replace

    return replace(documents, **{f.name: getattr(documents, f.name).cuda() for f in fields(documents)})


def inputs(b: int, s: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Return q, k and v [s, b, h, d], and a gradient of the output."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(s, b, HEADS, WIDTH, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    return [q, k, v, torch.randn(s, b, HEADS * WIDTH, device="cuda", dtype=dtype)]


def both_passes(attention: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run forward and backward. Return the output and the gradients of q, k and v."""
    *qkv, grad = tensors
    out = attention(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def make(kind: type, window: int | None, groups):
    """Return an attention module as SelfAttention makes it."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, kv_channels=WIDTH)
    more = dict(window_size=(window - 1, 0)) if window else {}
    config = TransformerConfig(**sizes, attention_dropout=0.0, params_dtype=torch.bfloat16, bf16=True, **more)
    return kind(config, 1, AttnMaskType.causal, "self", softmax_scale=WIDTH**-0.5, pg_collection=groups)


def call(module, documents) -> Callable:
    from megatron.core.transformer.enums import AttnMaskType

    return lambda q, k, v: module(q, k, v, attention_mask=None, attn_mask_type=AttnMaskType.causal, documents=documents)


# ---- oracle and alternatives


def one_by_one(rows: list[list[int]], window: int | None) -> Callable:
    """Return SDPA on each document alone, in fp32."""

    def attend(q, k, v):
        out = []
        for row, lengths in enumerate(rows):
            parts = [x[:, row].float().transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)]
            out.append(torch.cat([_causal(*part, window) for part in zip(*parts, strict=True)], 2))
        return torch.cat(out).permute(2, 0, 1, 3).flatten(2).to(q.dtype)

    return attend


def _causal(q, k, v, window: int | None):
    s = q.shape[2]
    if window is None or window >= s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    behind = torch.arange(s, device="cuda")[:, None] - torch.arange(s, device="cuda")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(behind >= 0) & (behind < window))


def whole_mask(documents) -> Callable:
    """Return SDPA with a block-diagonal mask."""
    starts = documents.starts_bs
    at = torch.arange(starts.shape[1], device="cuda")
    mask = (at <= at[:, None]) & (at >= starts[..., None])

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), attn_mask=mask[:, None])
        return out.permute(2, 0, 1, 3).flatten(2)

    return attend


def flex(documents) -> Callable:
    """Return FlexAttention. Its block mask is made once, as a model would for all of its layers."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts, (b, s) = documents.starts_bs, documents.starts_bs.shape
    run = torch.compile(flex_attention)
    mask = torch.compile(create_block_mask)(lambda b, h, q, k: (k <= q) & (k >= starts[b, q]), b, None, s, s)

    def attend(q, k, v):
        out = run(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), block_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    return attend


def padded(documents, capacity: int):
    """Return the documents with empty ones up to a capacity."""
    from dataclasses import replace

    bounds = documents.cu_seqlens
    return replace(documents, cu_seqlens=torch.cat((bounds, bounds[-1:].expand(capacity + 1 - len(bounds)))))


class Tight:
    """Documents that know the longest one's length, rounded up to a power of two, as the loader could count it."""

    def __init__(self, documents, rows: list[list[int]]) -> None:
        self.cu_seqlens, self.starts_bs = documents.cu_seqlens, documents.starts_bs
        self.longest = 1 << (max(map(max, rows)) - 1).bit_length()


# ---- what is reported


def measured(way: Callable, tensors: list[torch.Tensor], samples: int = 5) -> tuple[float, float]:
    """Return the milliseconds of both passes, and the GB that they need above what is allocated before."""
    from kernel_timing import gpu_ms

    def run():
        both_passes(way, tensors)

    ms = gpu_ms(run, samples, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return ms, (torch.cuda.max_memory_allocated() - before) / 1e9


def times(groups) -> Iterator[list[dict]]:
    for shape, (b, s) in SHAPES.items():
        for kind in ("two documents", "web text"):
            yield times_of(f"{shape}, {kind}", rows_of(kind, b, s), groups)


def times_of(case: str, rows: list[list[int]], groups) -> list[dict]:
    """Return time and memory of the THD layout and of each alternative."""
    from report import row

    from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
    from megatron_hybrid.mixers.attention.transformer_engine import TransformerEngineAttention
    from testing.documents import documents_of

    te, local = (make(kind, None, groups) for kind in (TransformerEngineAttention, ScaledDotProductAttention))
    documents, tensors, found = on_device(documents_of(rows)), inputs(len(rows), sum(rows[0])), []
    ways = {
        "no documents": lambda: call(te, None),
        "THD, longest = the longest document": lambda: call(te, Tight(documents, rows)),
        "THD, 8 times as many empty documents": lambda: call(te, padded(documents, 8 * len(documents.cu_seqlens))),
    }
    if "web text" in case:  # the masks cost as much for two documents, and FlexAttention is compiled for each case
        ways["SDPA, masks of blocks"] = lambda: call(local, documents)
        ways["FlexAttention"] = lambda: flex(documents)
    if "web text" in case and sum(rows[0]) <= LONGEST_MASK:
        ways["SDPA, whole mask"] = lambda: whole_mask(documents)
    ms, memory = measured(call(te, documents), tensors, 10)
    for name, make_way in ways.items():
        try:
            theirs, bytes_ = measured(make_way(), tensors)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"{case}: {name} does not run: {error!s:.200}", flush=True)
            continue
        found.append(row(case, "forward + backward", "ms", ms, theirs, name))
        found.append(row(case, "memory of a call", "GB", memory, bytes_, name))
    return found


def accuracy(groups) -> list[dict]:
    from report import bounded

    from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
    from megatron_hybrid.mixers.attention.transformer_engine import TransformerEngineAttention
    from testing.documents import RAGGED, documents_of, relative_error

    found = []
    cases = {"ragged": RAGGED, "2 x 8,192": rows_of("web text", 2, 8192), "full row": [[8192]]}
    for name, rows in cases.items():
        documents = on_device(documents_of(rows))
        for window in (None, WINDOW if name != "ragged" else 7):
            for kind, dtype in ((TransformerEngineAttention, "bf16"), (ScaledDotProductAttention, "fp32")):
                tensors = inputs(len(rows), sum(rows[0]), dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])
                ours = both_passes(call(make(kind, window, groups), documents), tensors)
                expected = both_passes(one_by_one(rows, window), tensors)
                case = f"{name}, {kind.__name__}, {dtype}, {'window' if window else 'no window'}"
                for what, a, b in zip(("output", "dq", "dk", "dv"), ours, expected, strict=True):
                    error = relative_error(a.float(), b.float())
                    found.append(bounded(case, f"relative error of {what}", "", error, ERRORS[dtype]))
    return found


def fp8_takes_documents(groups) -> str:
    """Return whether FP8 attention runs on documents, in words."""
    from megatron_hybrid.base.errors import ConfigError
    from megatron_hybrid.mixers.attention.transformer_engine import TransformerEngineAttention
    from megatron_hybrid.mixers.documents import Documents
    from megatron_hybrid.model.backends.transformer_engine import Fp8Attention
    from megatron_hybrid.precision.attention_probe import probe_attention

    sizes = (8192, 1, HEADS, HEADS, WIDTH)
    documents = Documents.of_equal_length(*sizes[:2], torch.device("cuda"))
    fp8, plain = (make(kind, None, groups) for kind in (Fp8Attention, TransformerEngineAttention))
    try:
        found = probe_attention(fp8, plain, *sizes, documents)
    except ConfigError as error:
        return f"FP8 attention does not take documents: {error}"
    return f"FP8 attention takes documents ({found.backend}), relative error {found.error:.2g}"


def main() -> None:
    from report import write

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    torch.backends.cuda.matmul.allow_tf32 = False
    groups = start_distributed(Launch.from_environment(), ParallelConfig(), seed=0, quiet=True)
    fp8 = fp8_takes_documents(groups)
    print(fp8, flush=True)
    packages = ("torch", "transformer-engine", "nvidia-cudnn-cu13")
    rows: list[dict] = []
    for found in itertools.chain([accuracy(groups)], times(groups)):
        printed, rows = len(rows), rows + found
        write("document_attention", rows, packages, torch.cuda.get_device_name(), notes=[fp8], printed=printed)
    stop_distributed()


if __name__ == "__main__":
    main()
