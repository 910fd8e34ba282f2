"""Find the documents of a run's sources and pack them, before the first step.

The work is done in stages, each of which needs the results of all processes in the stage before it. Within a stage the processes
share the work (`Team`). Results are kept in the run's folder, so that a run that resumes does not repeat them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.data.packing import Packer, PackingIndex, PackingStatistics
from megatron_hybrid.data.sample_readers import MaskedReader, PackedReader, SampleReader
from megatron_hybrid.data.source_documents import DocumentFinder, SourceDocuments
from megatron_hybrid.data.sources import TokenSource
from megatron_hybrid.data.validate import Alone, Team
from megatron_hybrid.data.work_files import WorkFiles, digest

Stage = Callable[[Team], None]


class DocumentPreparation:
    """The documents of several sources. Run `stages` in order, then `open`."""

    def __init__(
        self,
        opened: Mapping[SourceConfig, TokenSource],
        config: DataConfig,
        eos_token_id: int | None,
        folder: str | Path,
    ) -> None:
        """Look up where the boundaries of every file are.

        Args:
            opened: the sources of the configuration, as `open_sources` returns them.
            eos_token_id: ends the documents of files that have neither an index nor metadata.
            folder: of the run; all processes must see the same.

        Raises:
            DataError: a file whose document boundaries are unknown.
        """
        self.opened, self.config = dict(opened), config
        self._files = WorkFiles(Path(folder) / "documents")
        self._finders = {source: DocumentFinder(source, eos_token_id, self._files) for source in opened.values()}
        self.stages: tuple[Stage, ...] = (self._find, self._pack, self._join) if self._packs else (self._find,)
        """Each must have returned on every process before the next one is called with a new team."""
        self._documents: dict[TokenSource, SourceDocuments] = {}
        self._packing: dict[TokenSource, PackingIndex] = {}

    @property
    def _packs(self) -> bool:
        return self.config.documents == "pack"

    def open(self) -> None:
        """Open the results. Call it when all stages have returned on every process. Raises DataError if one is missing."""
        self._documents = {source: finder.open() for source, finder in self._finders.items()}
        self._packing = {source: packer.open() for source, packer in self._packers().items()} if self._packs else {}

    def reader(self, source: TokenSource) -> SampleReader:
        """Return the reader of a source's samples. Raises DataError if the source is shorter than one sample."""
        if self._packs:
            return PackedReader(self._documents[source], self._packing[source], self.config.sequence_length)
        return MaskedReader(self._documents[source], self.config.sequence_length)

    @property
    def statistics(self) -> PackingStatistics | None:
        """Packing statistics of all sources together; None with data.documents mask."""
        return sum((index.statistics for index in self._packing.values()), PackingStatistics()) if self._packs else None

    def describe(self) -> list[str]:
        """Return a line per source: its documents, and how well they are packed."""
        lines = []
        for source, documents in self._documents.items():
            packed = f"; packed: {self._packing[source].statistics}" if self._packs else ""
            lines.append(f"{source.name}: {documents}{packed}")
        return lines

    def _packers(self) -> dict[TokenSource, Packer]:
        length = self.config.sequence_length
        return {source: Packer(finder.open(), length, self._files) for source, finder in self._finders.items()}

    def _find(self, team: Team) -> None:
        work = [(finder, number) for finder in self._finders.values() for number in range(len(finder.names))]
        _share(team, "find", [finder.names[number] for finder, number in work], lambda n: work[n][0].find(work[n][1]))

    def _pack(self, team: Team) -> None:
        work = [(packer, window) for packer in self._packers().values() for window in range(packer.num_windows)]
        _share(team, "pack", [f"{p.name}/{window}" for p, window in work], lambda n: work[n][0].pack(work[n][1]))

    def _join(self, team: Team) -> None:
        packers = list(self._packers().values())
        _share(team, "join", [packer.name for packer in packers], lambda n: packers[n].join())


def _share(team: Team, stage: str, names: Sequence[str], work: Callable[[int], None]) -> None:
    """Do this process's share of the named pieces of work."""
    for number in team.claim(f"{stage}/{digest(names)}", len(names)):
        work(number)


def prepare_alone(preparation: DocumentPreparation) -> DocumentPreparation:
    """Run all stages in this process and open the results."""
    for stage in preparation.stages:
        stage(Alone())
    preparation.open()
    return preparation
