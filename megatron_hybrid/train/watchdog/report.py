"""Report of one rank about itself when the run hangs, and its exchange through files in run_dir."""

import json
import os
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.train.watchdog.flight_recorder import Collectives

_COMMUNICATION = ("/torch/distributed/", "/megatron/core/pipeline_parallel/")
_PACKAGE = str(Path(__file__).resolve().parents[2])


@dataclass
class Report:
    """State of a rank.

    Attributes:
        place: innermost line of this package that the main thread executes.
        communicates: True if the main thread is inside a communication call.
        stack: Python stack of the main thread.
        all_stacks: Python stacks of the other threads.
    """

    rank: int
    host: str
    step: int
    activity: str
    place: str
    communicates: bool
    stack: str
    all_stacks: str
    collectives: Collectives

    @classmethod
    def of_this_rank(cls, rank: int, host: str) -> Self:
        """Take the stacks and the collectives of this rank."""
        frames, main = sys._current_frames(), threading.main_thread().ident
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frame = frames.get(main or 0)
        stack = "".join(traceback.format_stack(frame))
        others = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(other))}"
            for ident, other in frames.items()
            if ident not in (main, threading.get_ident())
        ]
        return cls(
            rank,
            host,
            heartbeat.step,
            heartbeat.activity,
            _place(frame),
            any(folder in stack for folder in _COMMUNICATION),
            stack,
            "\n".join(others),
            Collectives.of_this_rank(),
        )

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def text(self) -> str:
        """Return what the rank prints."""
        waiting = "; ".join(self.collectives.waiting())
        collective = f", in {waiting}" if waiting else ", in no collective"
        return f"{self.name}, while {self.activity}, at {self.place}{collective}:\n{self.stack}"

    def write(self, folder: Path) -> None:
        """Write the report to a folder, complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{self.rank:05d}.txt").write_text(f"{self.text()}\n{self.all_stacks}")
        temporary = folder / f".rank-{self.rank:05d}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / f"rank-{self.rank:05d}.json")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**data | {"collectives": Collectives.from_json(data["collectives"])})


def read_reports(folder: Path, known: dict[int, Report]) -> None:
    """Add the reports in a folder that are not known yet."""
    for file in folder.glob("rank-*.json"):
        rank = int(file.stem.removeprefix("rank-"))
        if rank not in known:
            known[rank] = Report.from_json(json.loads(file.read_text()))


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return f"{file[len(_PACKAGE) + 1 :]}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown place"
