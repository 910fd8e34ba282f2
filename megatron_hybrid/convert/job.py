"""Running a conversion: files written by one process or several, into a temporary folder that is renamed when whole.

    .converting-NAME/              beside the target NAME, while it is under way
        plan.json                  what is being made of what
        model-00001-of-00004.safetensors
        model-00001-of-00004.safetensors.done.json     its size and hash: written when the file is safe on disk

The same command again goes on where it was interrupted, if neither sources nor options have changed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.ranks import Ranks
from megatron_hybrid.convert.safetensors_writer import (
    OutputTensor,
    Progress,
    Settle,
    header_bytes,
    in_file_order,
    write_file,
)

_PLAN, _DONE = "plan.json", ".done.json"
Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Conversion:
    """What to make: `files` of tensors, then `finish(folder, facts)` writes what belongs beside them."""

    target: Path
    files: dict[str, list[OutputTensor]]
    sources: Sequence[Path]
    with_hash: bool
    finish: Callable[[Path, Facts], None]
    notes: Sequence[str] = ()
    """What the user should know of the result: values that were chosen, and what is left out."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)


def split_into_files(tensors: Sequence[OutputTensor], max_bytes: int) -> dict[str, list[OutputTensor]]:
    """Tensors in order over few files of about the same size, at most `max_bytes` each: an even number, which two ranks share well.

    A tensor is never split: one larger than `max_bytes` has a file to itself.
    """
    total = sum(t.nbytes for t in tensors)
    count = max(1, -(-total // max_bytes))
    count += count % 2 if count > 1 else 0
    even = max(1, -(-total // count))
    groups: list[list[OutputTensor]] = [[]]
    at = held = turn = 0
    for tensor in tensors:
        due = (at + tensor.nbytes // 2) // even  # the share that the tensor's middle falls into
        if groups[-1] and (due > turn or held + tensor.nbytes > max_bytes):
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        at, held, turn = at + tensor.nbytes, held + tensor.nbytes, due
    return {
        f"model-{n:05d}-of-{len(groups):05d}.safetensors": in_file_order(group) for n, group in enumerate(groups, 1)
    }


def run(conversion: Conversion, ranks: Ranks, progress: Callable[[int], Progress]) -> None:
    """Write the target folder. Every rank calls this with the same conversion.

    Args:
        progress: given the bytes this rank has to write; returns what is called as they are written.

    Raises:
        ConversionError: the target exists, or something cannot be read; the temporary folder stays where going on is possible.
    """
    target = conversion.target
    folder = target.parent / f".converting-{target.name}"
    error: BaseException | None = None
    try:
        _check_target(target)
        if ranks.rank == 0:
            _prepare(folder, conversion)
    except (ValueError, OSError) as failure:
        error = failure
    ranks.agree(error)
    try:
        names = list(conversion.files)
        sizes = [sum(t.nbytes for t in tensors) for tensors in conversion.files.values()]
        mine = [names[i] for i in ranks.share(sizes) if not (folder / (names[i] + _DONE)).exists()]
        advance = progress(sum(t.nbytes for name in mine for t in conversion.files[name]))
        with ThreadPoolExecutor(1) as disk:  # the next file is begun while one is put on disk
            settled = [disk.submit(_settle, folder / name, _begin(folder / name, conversion, advance)) for name in mine]
            for future in settled:
                future.result()
    except (ValueError, OSError) as failure:
        error = failure
    try:
        ranks.agree(error)
    except ValueError:
        if ranks.rank == 0:  # a source that cannot be converted: going on would meet it again
            shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        if ranks.rank == 0:
            _publish(folder, conversion)
    except (ValueError, OSError) as failure:
        error = failure
    ranks.agree(error)


def _begin(path: Path, conversion: Conversion, advance: Progress) -> Settle:
    return write_file(path, conversion.files[path.name], advance, conversion.with_hash)


def _settle(path: Path, settle: Settle) -> None:
    _write_json(path.with_name(path.name + _DONE), settle())


def how_to_go_on(target: Path) -> str:
    """What to say of an interrupted conversion to `target`."""
    folder = target.parent / f".converting-{target.name}"
    done = len(list(folder.glob("*" + _DONE)))
    if not folder.exists():
        return f"{target} was not written"
    return f"{target} was not written; {done} finished files are in {folder}: run the same command again to go on, or remove it"


def _check_target(target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConversionError(f"{target} exists; name another folder, or remove it first")
    if not target.name or target.name == "..":
        raise ConversionError(f"{target} cannot be made; name a folder that does not exist yet")


def _prepare(folder: Path, conversion: Conversion) -> None:
    """Make the temporary folder; keep it if it is of the very same conversion."""
    plan = _plan(conversion)
    with suppress(OSError, ValueError):
        if json.loads((folder / _PLAN).read_text()) == plan:
            return
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink() or not ((folder / _PLAN).is_file() or not any(folder.iterdir())):
            raise ConversionError(
                f"{folder} is in the way, and no conversion made it; remove it or name another target"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _check_space(folder, conversion.nbytes)
    _write_json(folder / _PLAN, plan)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        folder.rmdir()
        raise ConversionError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _plan(conversion: Conversion) -> dict[str, Any]:
    headers = {name: hashlib.sha256(header_bytes(tensors)).hexdigest() for name, tensors in conversion.files.items()}
    return {"sources": _sources(conversion), "headers": headers, "hash": conversion.with_hash}


def _sources(conversion: Conversion) -> list[list[Any]]:
    return [[str(p), (s := p.stat()).st_size, s.st_mtime_ns] for p in conversion.sources]


def _publish(folder: Path, conversion: Conversion) -> None:
    """Check that all files are there, write the rest, and give the folder its name."""
    if json.loads((folder / _PLAN).read_text())["sources"] != _sources(conversion):
        shutil.rmtree(folder)
        raise ConversionError("the files being converted changed meanwhile; start anew when they no longer do")
    facts: Facts = {}
    for name in conversion.files:
        done = folder / (name + _DONE)
        if not done.is_file():
            raise ConversionError(f"{folder}: a rank's {name} is not there; do all ranks see the same disk?")
        facts[name] = json.loads(done.read_text())
        if (folder / name).stat().st_size != facts[name]["bytes"]:
            raise ConversionError(f"{folder / name}: its size is not what was written; remove {folder} and start anew")
    conversion.finish(folder, facts)
    for name in [*(name + _DONE for name in conversion.files), _PLAN]:
        (folder / name).unlink()
    _sync(folder)
    os.rename(folder, conversion.target)
    _sync(conversion.target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file and put it safely on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_json(path: Path, data: object) -> None:
    write_text(path, json.dumps(data))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
