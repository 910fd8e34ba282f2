"""Run a conversion: one or several processes write files into a temporary folder, which is renamed when it is complete.

    .converting-NAME/              next to the target NAME, while the conversion runs
        plan.json                  sources and headers of the conversion
        model-00001-of-00004.safetensors
        model-00001-of-00004.safetensors.done.json     its size and hash, written when the file is safe on disk

To resume after an interruption, run the same command again. It starts over if sources or options have changed.
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

from megatron_hybrid.base.synced_files import replace_synced, sync
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.writer import (
    OutputTensor,
    Progress,
    Settle,
    header_bytes,
    in_file_order,
    write_file,
)
from megatron_hybrid.convert.ranks import Ranks

_PLAN, _DONE = "plan.json", ".done.json"
Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: `files` of tensors, then `finish(folder, facts)`, which writes the files next to them."""

    target: Path
    files: dict[str, list[OutputTensor]]
    sources: Sequence[Path]
    with_hash: bool
    finish: Callable[[Path, Facts], None]
    notes: Sequence[str] = ()
    """Notes for the user: values that were chosen, and what is left out."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)


def split_into_files(tensors: Sequence[OutputTensor], max_bytes: int) -> dict[str, list[OutputTensor]]:
    """Distribute tensors in order over few files of about the same size, of at most `max_bytes`.

    The number of files is even, so that two ranks can share them. A tensor larger than `max_bytes` has its own file.
    """
    total = sum(t.nbytes for t in tensors)
    count = max(1, -(-total // max_bytes))
    count += count % 2 if count > 1 else 0
    even = max(1, -(-total // count))
    groups: list[list[OutputTensor]] = [[]]
    at = held = turn = 0
    for tensor in tensors:
        due = (at + tensor.nbytes // 2) // even  # the file that the tensor's middle falls into
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
        progress: called with the bytes that this rank has to write. Returns a function that is called as they are written.

    Raises:
        ConversionError: the target exists, or a source cannot be converted.
        OSError: reading or writing failed. The temporary folder is kept, so that the conversion can be resumed.
    """
    folder = conversion.target.parent / f".converting-{conversion.target.name}"

    def prepare() -> None:
        _check_target(conversion.target)
        if ranks.rank == 0:
            _prepare(folder, conversion)

    def publish() -> None:
        if ranks.rank == 0:
            _publish(folder, conversion)

    ranks.agree(_error_of(prepare))
    try:
        ranks.agree(_error_of(lambda: _write_share(folder, conversion, ranks, progress)))
    except ValueError:
        if ranks.rank == 0:  # a source that cannot be converted: a resumed run would fail again
            shutil.rmtree(folder, ignore_errors=True)
        raise
    ranks.agree(_error_of(publish))


def _error_of(work: Callable[[], None]) -> Exception | None:
    """Run `work` and return its error, which the ranks then agree on."""
    try:
        work()
    except (ValueError, OSError) as error:
        return error
    return None


def _write_share(folder: Path, conversion: Conversion, ranks: Ranks, progress: Callable[[int], Progress]) -> None:
    """Write this rank's files."""
    names = list(conversion.files)
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in conversion.files.values()]
    mine = [names[i] for i in ranks.share(sizes) if not (folder / (names[i] + _DONE)).exists()]
    advance = progress(sum(tensor.nbytes for name in mine for tensor in conversion.files[name]))
    with ThreadPoolExecutor(1) as disk:  # the next file is written while one is synced to disk
        settled = [disk.submit(_settle, folder / name, _begin(folder / name, conversion, advance)) for name in mine]
        for future in settled:
            future.result()


def _begin(path: Path, conversion: Conversion, advance: Progress) -> Settle:
    return write_file(path, conversion.files[path.name], advance, conversion.with_hash)


def _settle(path: Path, settle: Settle) -> None:
    _write_json(path.with_name(path.name + _DONE), settle())


def how_to_resume(target: Path) -> str:
    """Return what a user must know about an interrupted conversion to `target`."""
    folder = target.parent / f".converting-{target.name}"
    done = len(list(folder.glob("*" + _DONE)))
    if not folder.exists():
        return f"{target} was not written"
    return f"{target} was not written; {done} finished files are in {folder}: run the same command again to resume, or remove it"


def _check_target(target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConversionError(f"{target} exists; name another folder, or remove it first")
    if not target.name or target.name == "..":
        raise ConversionError(f"{target} cannot be created; name a folder that does not exist yet")


def _prepare(folder: Path, conversion: Conversion) -> None:
    """Create the temporary folder. An existing one of the same conversion is kept."""
    plan = _plan(conversion)
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        if json.loads((folder / _PLAN).read_text()) == plan:
            return
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink() or not ((folder / _PLAN).is_file() or not any(folder.iterdir())):
            raise ConversionError(
                f"{folder} is in the way, and no conversion created it; remove it or name another target"
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
    """Check that all files are there, write the rest, and rename the folder."""
    if json.loads((folder / _PLAN).read_text())["sources"] != _sources(conversion):
        shutil.rmtree(folder)
        raise ConversionError(
            "the files being converted changed meanwhile; run the command again when they no longer change"
        )
    facts: Facts = {}
    for name in conversion.files:
        done = folder / (name + _DONE)
        if not done.is_file():
            raise ConversionError(f"{folder}: a rank's {name} is not there; do all ranks see the same disk?")
        facts[name] = json.loads(done.read_text())
        if (folder / name).stat().st_size != facts[name]["bytes"]:
            raise ConversionError(
                f"{folder / name}: its size is not what was written; remove {folder} and run the command again"
            )
    conversion.finish(folder, facts)
    for name in [*(name + _DONE for name in conversion.files), _PLAN]:
        (folder / name).unlink()
    sync(folder)
    os.rename(folder, conversion.target)
    sync(conversion.target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file and sync it to disk."""
    replace_synced(path, text.encode("utf-8"))


def _write_json(path: Path, data: object) -> None:
    write_text(path, json.dumps(data))
