"""Output of `--dry-run`: the resolved configuration, and its size, layout and work on a number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hybrid.arch import flops
from megatron_hybrid.arch.documents import ASSUMED_LENGTH, AttendedLength, assumed_attended_length
from megatron_hybrid.arch.layer import BEFORE_LAYERS
from megatron_hybrid.arch.model import fold_pattern
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig


@dataclass(frozen=True)
class Documents:
    """Attended length of the data, and the documents that were found."""

    attended: AttendedLength
    lines: tuple[str, ...] = ()
    """A line per source, if its documents were found before."""

    @classmethod
    def assumed(cls, data: DataConfig, mean_length: float | None = None) -> "Documents":
        """Return documents with log-normal lengths of this mean; None: of the mean that the planner assumes."""
        if data.documents == "keep":
            return cls(AttendedLength(data.sequence_length, "documents are kept together"))
        packed = data.documents == "pack"
        return cls(assumed_attended_length(mean_length or ASSUMED_LENGTH, data.sequence_length, packed))


_PART_NAMES = {
    "embedding": "embedding",
    "embedding_norm": "embedding norm",
    "final_norm": "final norm",
    "output": "output",
}


def describe(config: RunConfig, world_size: int, documents: Documents | None = None) -> str:
    """Return the run as YAML, with its size, layout and work as comments. The result is a valid configuration file.

    Args:
        documents: of the data; None: lengths are assumed if documents are separated.

    Raises:
        ConfigError: the run does not fit `world_size` ranks.
    """
    config.check_world(world_size)
    found = documents or Documents.assumed(config.data)
    blocks = [
        _parameters(config, found.attended.tokens),
        _layout(config, world_size),
        _stages(config),
        _heads(config),
        _documents(config, found),
        _work(config, world_size, found.attended.tokens),
    ]
    comment = "\n#\n".join("\n".join(f"# {line}" for line in block) for block in blocks if block)
    return f"{dump_run(config)}\n{comment}\n"


def _parameters(config: RunConfig, attended: int) -> list[str]:
    model = config.model
    work = flops.training_flops_by_part(model, attended)
    rows = [("part", "layers", "parameters", "GFLOP per token")]
    for part, count in flops.parameters_by_part(model).items():
        block = model.blocks_by_symbol.get(part)
        name, layers = (block.title, str(model.layers.count(part))) if block else (_PART_NAMES[part], "")
        rows.append((name, layers, f"{count:,}", f"{work.get(part, 0) / 1e9:.4g}"))
    total = flops.training_flops_per_token(model, attended)
    rows.append(("all", str(model.num_layers), f"{flops.count_parameters(model):,}", f"{total / 1e9:.4g}"))
    return ["Parameters, and training work (forward and backward)", *_table(rows)]


def _layout(config: RunConfig, world_size: int) -> list[str]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline_parallel_size
    sequence = " with sequence parallelism" if parallel.sequence_parallel_on else ""
    sequence += ", communication overlapped" if parallel.tp_comm_overlap else ""
    sharing = " with a distributed optimizer" if parallel.distributed_optimizer else ""
    if config.train.engine == "deepspeed":
        sharing = f" with DeepSpeed's ZeRO {config.zero.stage}"
    return [
        f"Layout of {world_size} ranks",
        f"  tensor    {parallel.tensor_parallel_size}{sequence}",
        *_context(config),
        f"  pipeline  {parallel.pipeline_parallel_size}" + (f" x {virtual} chunks, interleaved" if virtual > 1 else ""),
        f"  data      {parallel.data_parallel_size(world_size)}{sharing}",
    ]


def _context(config: RunConfig) -> list[str]:
    """Return the line on context parallelism; empty for one rank."""
    ranks, model = config.parallel.context_parallel_size, config.model
    if ranks == 1:
        return []
    words = f", {config.data.sequence_length // ranks:,} tokens of each sequence per rank"
    for block in model.blocks_by_symbol.values():
        if note := mixer_spec(block.mixer).context_note(model, block, config.layout):
            return [f"  context   {ranks}{words}, {note}"]
    return [f"  context   {ranks}{words}"]


def _stage_layers(config: RunConfig) -> tuple[int, ...]:
    return config.parallel.stage_layers(
        config.model.num_layers, flops.output_in_layers(config.model, config.precision.fp8)
    )


def _stages(config: RunConfig) -> list[str]:
    """Return the table of pipeline stages; empty for one stage."""
    model, parallel = config.model, config.parallel
    if parallel.num_stages == 1:
        return []
    outside = flops.parameters_by_part(model)
    rows = [("stage", "pipeline rank", "chunk", "layers", "kinds", "parameters")]
    first = 0
    for stage, count in enumerate(_stage_layers(config)):
        kinds = model.layers[first : first + count]
        size = sum(flops.layer_size(model, kind) for kind in kinds)
        if stage == 0:
            size += sum(outside.get(name, 0) for name in BEFORE_LAYERS)
        if stage == parallel.num_stages - 1:
            size += outside["final_norm"] + (outside["embedding"] if model.tie_embeddings else outside["output"])
        chunk, rank = divmod(stage, parallel.pipeline_parallel_size)
        rows.append(
            (str(stage), str(rank), str(chunk), f"{first}-{first + count - 1}", fold_pattern(kinds), f"{size:,}")
        )
        first += count
    return ["Pipeline stages (the first with the embedding, the last with final norm and output)", *_table(rows)]


def _heads(config: RunConfig) -> list[str]:
    """Return the table of heads over the tensor parallel ranks, with padding heads; empty for one rank."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    if ranks == 1:
        return []
    groups = (mixer_spec(block.mixer).head_groups(model, block) for block in model.blocks_by_symbol.values())
    counts = {
        (name, true, group.padded(true, ranks)): None for group in groups for name, true in group.heads
    }  # a set that keeps its order
    rows = [("heads", "true", "padded to", "per rank")]
    rows += [
        (name, str(true), str(padded) if padded > true else "-", str(padded // ranks)) for name, true, padded in counts
    ]
    return [f"Heads over {ranks} tensor parallel ranks", *_table(rows)]


def _documents(config: RunConfig, documents: Documents) -> list[str]:
    """Return the lines on separated documents; empty if they are kept together."""
    if config.data.documents == "keep":
        return []
    attended, sequence = documents.attended, config.data.sequence_length
    return [
        f"Documents ({config.data.documents})",
        *(f"  {line}" for line in documents.lines),
        f"  attention costs as much as on sequences of {attended.tokens:,} tokens, not {sequence:,} ({attended.origin})",
    ]


def _work(config: RunConfig, world_size: int, attended: int) -> list[str]:
    train, sequence = config.train, config.data.sequence_length
    unit = train.micro_batch_size * config.parallel.data_parallel_size(world_size)
    tokens = train.samples_after(train.steps) * sequence
    work = flops.training_flops_per_token(config.model, attended)
    size = train.global_batch_size
    lines = [
        "Work",
        f"  per step  {size:,} sequences x {sequence:,} = {size * sequence:,} tokens, "
        f"{size // unit} microbatches of {train.micro_batch_size} on each data parallel rank",
    ]
    if train.batch_ramp is not None:
        ramp = train.batch_ramp
        lines.append(f"  ramp      from {ramp.start:,} sequences by {ramp.increment:,} over {ramp.samples:,} samples")
    return [
        *lines,
        f"  per token {work / 1e9:.4g} GFLOP (forward and backward, without recomputation)",
        f"  run       {train.steps:,} steps, {tokens:,} tokens, {tokens * work:.4g} FLOP",
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines with aligned columns: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [
        all(row[column][:1].isdigit() or row[column] in ("", "-") for row in rows[1:]) for column in range(len(widths))
    ]
    return [
        "  "
        + "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
