"""Checks the data with all ranks together.

The check of large files takes long. So the ranks share the work through torch.distributed's key-value store, and wait for
each other without a time limit (distributed/shared_progress.py).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.base.errors import UserError, join
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.generated import GeneratedDataset
from megatron_hybrid.data.prepare_documents import DocumentPreparation
from megatron_hybrid.data.verdicts import VerdictCache
from megatron_hybrid.distributed.shared_progress import SharedProgress

_REPORT_EVERY_S = 30.0
_checks = itertools.count()  # every rank counts the same checks; the number separates their keys


class StoreTeam:
    """Coordinates all ranks through the key-value store. Every rank creates one at the same point."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"data_check/{next(_checks)}", store)
        self._progress = SharedProgress()

    def claim(self, work: str, count: int) -> Iterator[int]:
        """Yield the numbers below `count` that this rank works on, until all are claimed or a rank has failed."""
        while not self._store.check(["error"]) and (number := self._store.add(f"next/{work}", 1) - 1) < count:
            self._progress.advance()
            yield number

    def same(self, name: str, value: str) -> bool:
        """Return whether a value equals that of the first rank that calls this."""
        return self._store.compare_set(name, "", value).decode() == value

    def together[T](self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and wait for all. Every rank calls it.

        Raises:
            UserError: on every rank, the error of the rank that failed.
        """
        try:
            result = work()
        except BaseException as error:
            text = str(error) if isinstance(error, UserError) else f"rank {self.rank} failed: {error!r}"
            self._store.compare_set("error", "", text)
            self._progress.finish()
            if isinstance(error, UserError):
                error.printed_by = "each rank"  # launchers may end the first rank as soon as this one has ended
                self._progress.wait()
            raise
        self._progress.finish()
        self._progress.wait()
        if self._store.check(["error"]):
            raise DataError(self._store.get("error").decode())
        return result


def open_data(config: RunConfig, curriculum: Curriculum | None = None) -> tuple[Blend, dict[str, Blend]]:
    """Open the blends of a run and check their files, on all ranks together. Every rank calls it.

    Raises:
        DataError: on every rank alike, naming the file and the offset of what is wrong.
    """
    documents = _prepare_documents(config) if config.data.documents != "keep" else None
    team = StoreTeam()
    cache = VerdictCache(config.run_dir, team.rank)
    report = _Progress() if team.rank == 0 else (lambda done, total: None)

    def build() -> tuple[Blend, dict[str, Blend]]:
        vocab_size = config.model.vocab_size
        opened = build_train_and_validation(config.data, vocab_size, cache, True, team, report, documents, curriculum)
        training, validation = opened
        _check_same_streams({"train": training} | {join("validation", n): b for n, b in validation.items()}, team)
        return opened

    opened = team.together(build)
    if team.rank == 0 and Path(config.run_dir).is_dir():
        cache.collect()
    return opened


def _prepare_documents(config: RunConfig) -> DocumentPreparation:
    """Find and pack the documents of all sources, on all ranks together, and print what was found."""

    def look_up() -> DocumentPreparation:
        opened = open_sources(config.data, config.model.vocab_size)
        return DocumentPreparation(opened, config.data, config.model.eos_token_id, config.run_dir)

    preparation = StoreTeam().together(look_up)
    for stage in preparation.stages:
        team = StoreTeam()
        team.together(partial(stage, team))
    team = StoreTeam()
    team.together(preparation.open)
    if team.rank == 0:
        print(*preparation.describe(), sep="\n", flush=True)
    return preparation


def _check_same_streams(opened: Mapping[str, Blend], team: StoreTeam) -> None:
    """Check that all ranks have opened the same files. Otherwise they would silently train on different samples."""
    for name, blend in opened.items():
        for index, dataset in enumerate(blend.datasets):
            if isinstance(dataset, GeneratedDataset):
                continue
            source, field = dataset.source, join("data", name, index)
            mine = f"{len(source.shards)} files with {source.num_tokens:,} tokens"
            if not team.same(field, mine):
                raise DataError(
                    f"{field}: rank {team.rank} opened {mine} of {source.name}, other ranks did not; the files must be the "
                    "same on every node and must not change while a run starts"
                )


class _Progress:
    """Prints the progress of a long check."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _REPORT_EVERY_S / 3

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() > self._next:
            print(f"checking tokens: {done:,} of {total:,} pieces", flush=True)
            self._next = time.monotonic() + _REPORT_EVERY_S
