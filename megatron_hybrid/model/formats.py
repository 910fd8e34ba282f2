"""Table of the formats and backends that a run uses: one row per kind of layer and part, with the reason."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from hybrid_kernels.linear_cross_entropy import explain as explain_linear_cross_entropy
from hybrid_kernels.rmsnorm import explain as explain_rmsnorm
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.distributed.tp_comm_overlap import WORDS
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.mixers.formats import FormatQuery, full_reason
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.model.backends.choose import choose_backend
from megatron_hybrid.model.backends.local import LOCAL
from megatron_hybrid.model.hybrid_model import HybridLanguageModel
from megatron_hybrid.model.megatron_config import DTYPES, apex_weight_gradients
from megatron_hybrid.model.norms import RMSNorm

Row = tuple[str, str, str, str, str]


def format_table(
    chunks: Sequence[HybridLanguageModel],
    precision: PrecisionConfig,
    dtype: str,
    sequence_length: int,
    batch_size: int,
    optimizer: str,
    documents: bool = False,
    launches: tuple[str, str] | None = None,
) -> list[str]:
    """Return the aligned table of this rank's stage. Layers are numbered from 0, the model's first.

    With Transformer Engine it runs attention once (precision/attention_probe.py).

    Args:
        sequence_length: length of whole sequences.
        documents: sequences hold several documents, which do not see each other.
        launches: how kernels are launched, and why; None: no row.

    Raises:
        ConfigError: attention to documents, or FP8 attention, that does not run or is wrong on this machine.
    """
    backend, reason = choose_backend(chunks[0].model.backend, precision, dtype)
    rows: list[Row] = [("layers", "part", "format", "backend", "why")]
    rows += _linears(chunks, backend, reason, precision, dtype)
    query = FormatQuery(sequence_length, batch_size, dtype, precision.fp8_attention, backend, reason, documents)
    rows += _mixers(chunks, query)
    rows += _head(chunks, dtype, sequence_length // _context_ranks(chunks), batch_size)
    rows.append(_norms(chunks, backend, dtype, reason))
    if chunks[0].config.tp_comm_overlap:
        sent = f"fp8 {precision.fp8_recipe}" if precision.fp8_recipe else dtype
        rows.append((_stage(chunks), "TP communication", sent, "Transformer Engine's user buffers", WORDS))
    rows.append(("all", "optimizer", "fp32", optimizer, "the fastest installed"))
    if launches is not None:
        rows.append(("all", "launches", "", *launches))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) for row in rows]  # noqa: B905 - the last is free


def _context_ranks(chunks: Sequence[HybridLanguageModel]) -> int:
    return int(chunks[0].pg_collection.cp.size())


def _layers(chunks: Sequence[HybridLanguageModel]) -> list[int]:
    return [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]


def _stage(chunks: Sequence[HybridLanguageModel]) -> str:
    layers = _layers(chunks)
    return "all" if len(layers) == chunks[0].model.num_layers else _ranges(layers)


def _ranges(layers: Iterable[int]) -> str:
    """Return `0-2, 5` for `[0, 1, 2, 5]`. A rank of an interleaved pipeline has several ranges."""
    layers = sorted(layers)
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def _linears(
    chunks: Sequence[HybridLanguageModel], backend: Backend, reason: str, precision: PrecisionConfig, dtype: str
) -> Iterator[Row]:
    what, recipe = "projections, MLP", precision.recipe
    if recipe is None:
        apex = " with Apex's weight gradients" if backend is LOCAL and apex_weight_gradients() else ""
        yield _stage(chunks), what, dtype, backend.name + apex, reason
        return
    layers, start = _layers(chunks), precision.num_layers_at_start_in_bf16
    end = chunks[0].model.num_layers - precision.num_layers_at_end_in_bf16
    for plain in ([i for i in layers if i < start], [i for i in layers if i >= end]):
        if plain:
            yield (
                _ranges(plain),
                what,
                dtype,
                backend.name,
                "precision.num_layers_at_start_in_bf16 / num_layers_at_end_in_bf16",
            )
    fp8 = [i for i in layers if start <= i < end]
    if not fp8:
        return
    held, why = "", f"precision.fp8_recipe = {recipe.name}"
    if precision.fp8_param_gather:
        held, why = ", weights held in fp8", f"{why}, fp8_param_gather = true"
    yield _ranges(fp8), what, recipe.description + held, backend.name, why


def _norms(chunks: Sequence[HybridLanguageModel], backend: Backend, dtype: str, reason: str) -> Row:
    if backend.norm is not RMSNorm:
        return _stage(chunks), "norms", dtype, backend.name, reason
    row = torch.empty(1, chunks[0].config.hidden_size, dtype=DTYPES[dtype], device=local_device())
    choice = explain_rmsnorm(row, row[0])
    return _stage(chunks), "norms", dtype, choice.backend, full_reason(choice)


def _mixers(chunks: Sequence[HybridLanguageModel], query: FormatQuery) -> Iterator[Row]:
    """Yield the rows of each mixer in this stage, as its first layer reports them."""
    model, found = chunks[0].model, dict[str, tuple[str, Mixer]]()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            symbol = model.layers[layer.layer_number - 1]
            found.setdefault(model.known_blocks[symbol].mixer, (symbol, layer.self_attention))
    for symbol, mixer in found.values():
        for row in mixer.formats(query):
            yield symbol, *row


def _head(chunks: Sequence[HybridLanguageModel], dtype: str, sequence_length: int, batch_size: int) -> Iterator[Row]:
    last = next((chunk for chunk in chunks if chunk.post_process), None)
    if last is not None:
        weight = last.shared_embedding_or_output_weight()
        hidden = weight.detach()[:1].expand(sequence_length * batch_size, -1)
        choice = explain_linear_cross_entropy(hidden, weight)
        yield "last", choice.op, dtype, choice.backend, full_reason(choice)
