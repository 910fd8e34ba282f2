"""Damage files of both formats and convert them, many times. Prints the results as one line of JSON.

python -m tests.convert.fuzz FOLDER SEED COUNT SECONDS      (FOLDER/hf and FOLDER/ours are converted to FOLDER/out/target)
"""

import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.exporter import to_huggingface
from megatron_hybrid.convert.hf.importer import from_huggingface
from megatron_hybrid.convert.job import run
from megatron_hybrid.convert.ranks import Ranks
from megatron_hybrid.convert.verify import verify


class OpenedFiles:
    """Real paths of the files that Python opens inside `with`."""

    def __init__(self):
        self.paths, self._watching = set(), False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self._watching and event == "open" and isinstance(arguments[0], (str, bytes)):
            self.paths.add(os.path.realpath(os.fsdecode(arguments[0])))

    def __enter__(self) -> None:
        self._watching = True

    def __exit__(self, *_) -> None:
        self._watching = False

    def outside(self, folder: Path) -> list[str]:
        """Return the paths outside the folder, Python and this project."""
        known = {os.path.realpath(p) + os.sep for p in (folder, sys.prefix, sys.base_prefix, os.getcwd())}
        return [path for path in self.paths if not path.startswith(tuple(known))]


def convert(folder: Path, kind: str, target: Path) -> None:
    """Run a whole conversion, in one of the directions.

    Raises:
        ConversionError: the files are refused.
    """
    plan = from_huggingface if kind == "hf" else to_huggingface
    run(plan(folder / kind, target), Ranks(), lambda total: lambda count: None)
    if kind == "ours":
        verify(folder / kind)


def main(folder: Path, seed: int, count: int, seconds: float) -> None:
    opened, rng = OpenedFiles(), random.Random(seed)
    places = {kind: sorted((folder / kind).iterdir()) for kind in ("hf", "ours")}
    originals = {path: path.read_bytes() for paths in places.values() for path in paths}
    outcome = {"refused": 0, "converted": 0}
    target = folder / "out" / "target"
    target.parent.mkdir()
    start, slowest = time.monotonic(), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while sum(outcome.values()) < count and time.monotonic() - start < seconds:
        kind = rng.choice(["hf", "hf", "ours"])
        victims = rng.sample(places[kind], rng.choice([1, 1, 1, 2]))
        for path in victims:
            path.write_bytes(mutated(rng, originals[path], path.suffix == ".json"))
        began = time.process_time()  # other tests run at the same time
        try:
            with opened:
                convert(folder, kind, target)
            outcome["converted"] += 1
        except ConversionError:
            outcome["refused"] += 1
            assert not target.exists() and not list(target.parent.iterdir()), "something was written"
        slowest = max(slowest, time.process_time() - began)
        shutil.rmtree(target, ignore_errors=True)
        for path in victims:
            path.write_bytes(originals[path])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = {"done": sum(outcome.values()), "slowest": slowest, "strange": opened.outside(folder), "grown_kib": grown}
    print(json.dumps(outcome | found))


def mutated(rng: random.Random, data: bytes, is_json: bool) -> bytes:
    """Return the data with one of many kinds of damage, from a flipped bit to a malicious header."""
    if not is_json and rng.random() < 0.6:  # aim at the header
        length = int.from_bytes(data[:8], "little")
        header = _mutated_json(rng, data[8 : 8 + length])
        stated = rng.choice([len(header)] * 6 + [len(header) + 8, 0, 1 << 40, (1 << 64) - 1, rng.randrange(1 << 20)])
        return stated.to_bytes(8, "little") + header + data[8 + length :]
    if is_json and rng.random() < 0.8:
        return _mutated_json(rng, data)
    kind, at = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + rng.randbytes(rng.randrange(1, 64))
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 32) :]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 16)) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 100])):
        changed[rng.randrange(len(changed) if kind == 4 else min(64, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


HARM: list = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.5, 1e308, float("nan"), float("inf"), "", "F32", "F64",
    "../x", "/etc/passwd", "..", "model.safetensors", "a\0b", "x" * 300, [], [[]], {}, [0, 4], [4, 0], [-4, 0], [1 << 40] * 3,
    {"a": 1}, ["q"] * 3, "olmo3", "\ud800",
]  # fmt: skip


def _mutated_json(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:  # text, wherever
        at = rng.randrange(len(data))
        return (
            data[:at] + rng.choice([b'"', b"{", b"[", b",", b"9" * 5000, b"\xff", b"[" * 3000, b"\\u0000"]) + data[at:]
        )
    value = json.loads(data)
    places = []

    def walk(node: object) -> None:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])  # type: ignore[index]

    walk(value)
    for _ in range(rng.choice([1, 1, 1, 3])):
        node, key = rng.choice(places)
        if isinstance(node, list) and key >= len(node) or isinstance(node, dict) and key not in node:
            continue
        if kind < 3 and isinstance(node, dict):
            moved = node.pop(key)
            if kind == 2:
                node[rng.choice(["../x", "", "a", f"{key}x", "model.layers.0.mlp.up_proj.weight"])] = moved
        elif kind == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] += rng.choice([-1, 1, -4, 4, 8, 1 << 32, -node[key]])
        elif kind == 4:
            other, where = rng.choice(places)
            if not (isinstance(other, list) and where >= len(other) or isinstance(other, dict) and where not in other):
                node[key] = json.loads(json.dumps(other[where]))
        else:
            node[key] = rng.choice(HARM)
    text = json.dumps(value).encode()
    if kind == 9 and text.startswith(b"{") and b":" in text:  # the first entry twice
        first = json.dumps(next(iter(value.items()), ("a", 1)))[1:-1].replace(", ", ":", 1).encode()
        text = b"{" + first + b"," + text[1:]
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
