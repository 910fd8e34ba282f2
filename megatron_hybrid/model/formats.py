"""What a run really computes with: one line a kind of layer and part, with its format, backend and the reason."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from hybrid_kernels.linear_cross_entropy import explain as explain_linear_cross_entropy
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.tp_comm_overlap import WORDS
from megatron_hybrid.mixers.attention.module import SelfAttention
from megatron_hybrid.mixers.gated_delta_net.module import GatedDeltaNet
from megatron_hybrid.model.megatron_config import apex_weight_gradients
from megatron_hybrid.model.parts import LOCAL, Parts, choose_parts
from megatron_hybrid.precision.attention_probe import probe_attention

Row = tuple[str, str, str, str, str]


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
    parts, reason = choose_parts(chunks[0].model.backend, precision, dtype)
    rows: list[Row] = [("layers", "part", "format", "backend", "why")]
    rows += _linears(chunks, parts, reason, precision, dtype)
    rows += _mixers(chunks, parts, reason, precision, dtype, sequence_length, batch_size)
    rows += _head(chunks, dtype, sequence_length // _context_ranks(chunks), batch_size)
    rows.append((_stage(chunks), "norms", dtype, parts.name, reason))
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


def _linears(chunks, parts: Parts, reason: str, precision: PrecisionConfig, dtype: str) -> Iterator[Row]:
    what, recipe = "projections, MLP", precision.recipe
    if recipe is None:
        apex = " with Apex's weight gradients" if parts is LOCAL and apex_weight_gradients() else ""
        yield _stage(chunks), what, dtype, parts.name + apex, reason
        return
    layers, start = _layers(chunks), precision.num_layers_at_start_in_bf16
    end = chunks[0].model.num_layers - precision.num_layers_at_end_in_bf16
    for plain in ([i for i in layers if i < start], [i for i in layers if i >= end]):
        if plain:
            yield (
                _ranges(plain),
                what,
                dtype,
                parts.name,
                "precision.num_layers_at_start_in_bf16 / num_layers_at_end_in_bf16",
            )
    fp8 = [i for i in layers if start <= i < end]
    if not fp8:
        return
    held, why = "", f"precision.fp8_recipe = {recipe.name}"
    if precision.fp8_param_gather:
        held, why = ", weights held in fp8", f"{why}, fp8_param_gather = true"
    yield _ranges(fp8), what, recipe.description + held, parts.name, why


def _mixers(chunks, parts, reason, precision, dtype, sequence_length, batch_size) -> Iterator[Row]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    gdn = next((m for m in modules if isinstance(m, GatedDeltaNet)), None)
    attention = next((m for m in modules if isinstance(m, SelfAttention)), None)
    for symbol, mixer in (("G", gdn), ("A", attention)):
        for choice in mixer.backends(sequence_length // _context_ranks(chunks), batch_size) if mixer else ():
            yield symbol, choice.op, dtype, choice.backend, _why(choice)
    if attention:
        yield _attention(attention, parts, reason, precision, dtype, sequence_length, batch_size)


def _why(choice) -> str:
    return "; ".join([choice.reason, *(f"not {name}: {lack}" for name, lack in choice.rejected.items())])


def _head(chunks, dtype, sequence_length, batch_size) -> Iterator[Row]:
    last = next((chunk for chunk in chunks if chunk.post_process), None)
    if last is not None:
        weight = last.shared_embedding_or_output_weight()
        hidden = weight.detach()[:1].expand(sequence_length * batch_size, -1)
        choice = explain_linear_cross_entropy(hidden, weight)
        yield "last", choice.op, dtype, choice.backend, _why(choice)


def _attention(mixer: SelfAttention, parts, reason, precision, dtype, sequence_length, batch_size) -> Row:
    exchange = mixer.exchange
    if exchange.ranks > 1:
        reason += f"; {exchange.heads} heads of whole sequences on each of {exchange.ranks} context parallel ranks"
    if parts is LOCAL:
        return "A", "attention", dtype, "torch's scaled_dot_product_attention", reason
    sizes = (sequence_length, batch_size, exchange.heads, exchange.groups, mixer.head_dim)
    fp8 = mixer.another_core_attention(parts.attention) if precision.fp8_attention else None
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        found = probe_attention(fp8, mixer.another_core_attention(parts.plain_attention), *sizes)
    if fp8 is None:
        return "A", "attention", dtype, found.backend, reason
    why = f"precision.fp8_attention = true; differs from {dtype} by {found.error:.2g}, as it should"
    return "A", "attention", "fp8, delayed scaling", found.backend, why
