"""What a run really computes with: one line a kind of layer and part, with its format, backend and the reason."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from hybrid_kernels.linear_cross_entropy import explain as explain_linear_cross_entropy
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.tp_comm_overlap import WORDS
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.mixers.mixer import FormatQuery, Mixer, full_reason
from megatron_hybrid.model.backends.choose import choose_backend
from megatron_hybrid.model.backends.local import LOCAL
from megatron_hybrid.model.megatron_config import apex_weight_gradients

Row = tuple[str, str, str, str, str]
_SCALING = {"delayed": "delayed", "tensorwise": "current", "blockwise": "blockwise"}


def format_table(
    chunks,
    precision: PrecisionConfig,
    dtype: str,
    sequence_length: int,
    batch_size: int,
    optimizer: str,
) -> list[str]:
    """The table of this rank's stage, aligned; its layers are counted from the model's first, 0.

    With Transformer Engine it runs attention once (precision/attention_probe.py).

    Args:
        sequence_length: of the whole sequences.

    Raises:
        ConfigError: FP8 attention that does not run, or is wrong, on this machine.
    """
    backend, reason = choose_backend(chunks[0].model.backend, precision, dtype)
    rows: list[Row] = [("layers", "part", "format", "backend", "why")]
    rows += _linears(chunks, backend, reason, precision, dtype)
    query = FormatQuery(sequence_length, batch_size, dtype, precision.fp8_attention, backend, reason)
    rows += _mixers(chunks, query)
    rows += _head(chunks, dtype, sequence_length // _context_ranks(chunks), batch_size)
    rows.append((_stage(chunks), "norms", dtype, backend.name, reason))
    if chunks[0].config.tp_comm_overlap:
        sent = f"fp8 {precision.fp8_recipe}" if precision.fp8_recipe else dtype
        rows.append((_stage(chunks), "TP communication", sent, "Transformer Engine's user buffers", WORDS))
    rows.append(("all", "optimizer", "fp32", optimizer, "the fastest installed"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) for row in rows]  # noqa: B905 - the last is free


def _context_ranks(chunks) -> int:
    return chunks[0].pg_collection.cp.size()


def _layers(chunks) -> list[int]:
    return [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]


def _stage(chunks) -> str:
    layers = _layers(chunks)
    return "all" if len(layers) == chunks[0].model.num_layers else _ranges(layers)


def _ranges(layers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`: a stage of interleaved pipelines has several."""
    layers = sorted(layers)
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def _linears(chunks, backend: Backend, reason: str, precision: PrecisionConfig, dtype: str) -> Iterator[Row]:
    what = "projections, MLP"
    if not precision.fp8:
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
    scaling = _SCALING[precision.fp8_recipe]
    name = f"fp8 e4m3 (gradients e5m2), {scaling} scaling" if scaling != "blockwise" else "fp8 e4m3, blockwise scaling"
    held, why = "", f"precision.fp8_recipe = {precision.fp8_recipe}"
    if precision.fp8_param_gather:
        held, why = ", weights held in fp8", f"{why}, fp8_param_gather = true"
    yield _ranges(fp8), what, name + held, backend.name, why


def _mixers(chunks, query: FormatQuery) -> Iterator[Row]:
    """Yield the rows of each mixer in this stage, as its first layer reports them."""
    model, found = chunks[0].model, dict[str, tuple[str, Mixer]]()
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            symbol = model.layers[layer.layer_number - 1]
            found.setdefault(model.known_blocks[symbol].mixer, (symbol, layer.self_attention))
    for symbol, mixer in found.values():
        for row in mixer.formats(query):
            yield symbol, *row


def _head(chunks, dtype, sequence_length, batch_size) -> Iterator[Row]:
    last = next((chunk for chunk in chunks if chunk.post_process), None)
    if last is not None:
        weight = last.shared_embedding_or_output_weight()
        hidden = weight.detach()[:1].expand(sequence_length * batch_size, -1)
        choice = explain_linear_cross_entropy(hidden, weight)
        yield "last", choice.op, dtype, choice.backend, full_reason(choice)
