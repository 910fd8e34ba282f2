"""Documents of a run for `--dry-run`: those that an earlier start has packed, or else an assumption. Uses no torch."""

from megatron_hybrid.arch.documents import AttendedLength
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.describe import Documents
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.build import open_sources
from megatron_hybrid.data.indexed import read_index
from megatron_hybrid.data.prepare_documents import DocumentPreparation
from megatron_hybrid.data.sources import TokenSource


def look_at_documents(config: RunConfig) -> Documents:
    """Return what the files on this machine say of a run's documents. Files that are missing or wrong say nothing."""
    data = config.data
    if data.documents == "keep":
        return Documents.assumed(data)
    try:
        opened = open_sources(data, config.model.vocab_size)
        preparation = DocumentPreparation(opened, data, config.model.eos_token_id, config.run_dir)
    except (UserError, OSError):  # reported by check_files
        return Documents.assumed(data)
    found = _packed(preparation) if data.documents == "pack" else None
    return found or Documents.assumed(data, _mean_length(list(opened.values())))


def _packed(preparation: DocumentPreparation) -> Documents | None:
    """Return the documents that an earlier start of the run has packed; None if there was none."""
    try:
        preparation.open()
    except UserError:
        return None
    statistics = preparation.statistics
    assert statistics is not None
    attended = AttendedLength(round(statistics.squares / statistics.slots), "by the packing in run_dir")
    return Documents(attended, tuple(preparation.describe()))


def _mean_length(sources: list[TokenSource]) -> float | None:
    """Return the mean tokens of a document by the indexes of megatron-core datasets; None if there are none."""
    indexed = [shard for source in sources for shard in source.shards if shard.index_path]
    documents = sum(len(read_index(shard.index_path).document_indices) - 1 for shard in indexed if shard.index_path)
    return sum(shard.num_tokens for shard in indexed) / documents if documents else None
