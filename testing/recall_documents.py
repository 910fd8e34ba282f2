"""Data of benchmarks/drope_yarn.py: sources of the standard library with records stored and recalled in them, as bytes.

A document has an exact length. It has `[store KEY NUMBER]` at random places, and `[recall KEY NUMBER]` several times after each.
"""

import itertools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

END = 256
DIGITS = 5
RECORDS_PER_TOKEN = 8 / 1024
"""Stored records per token of a training document."""
RECALLS = 2
"""Times that a training document recalls a record."""
OTHERS = 7
"""Records in a test besides the one that is recalled."""
HELD_OUT = 10
"""Every file of this number is held out."""


def library_text() -> tuple[bytes, bytes]:
    """Return the text of training and of tests: whole files of the standard library, in a fixed order."""
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(f for f in folder.rglob("*.py") if not skipped & set(f.relative_to(folder).parts))
    random.Random(0).shuffle(files)
    texts = [f.read_bytes() for f in files]
    train = b"\n".join(text for number, text in enumerate(texts) if number % HELD_OUT)
    return train, b"\n".join(texts[::HELD_OUT])


def records(draw: random.Random, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield different keys, each with a number."""
    keys = set[str]()
    while len(keys) < count:
        key = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        if key not in keys:
            keys.add(key)
            yield key.encode(), str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)).encode()


def stored(key: bytes, number: bytes) -> bytes:
    return b"\n[store %s %s]\n" % (key, number)


def inserted(text: bytes, places: list[tuple[int, bytes]]) -> bytes:
    """Return the text with pieces inserted before the bytes at their places."""
    parts, last = list[bytes](), 0
    for place, piece in sorted(places, key=lambda item: item[0]):
        parts += [text[last:place], piece]
        last = place
    return b"".join([*parts, text[last:]])


def training_document(draw: random.Random, text: bytes, length: int) -> bytes:
    """Return a document of `length` - 1 bytes, before its end-of-document token."""
    placed = list[tuple[int, bytes]]()
    pairs = list(records(draw, round(length * RECORDS_PER_TOKEN)))
    pieces = [[stored(*pair), *[b"\n[recall %s %s]\n" % pair] * RECALLS] for pair in pairs]
    room = length - 1 - sum(map(len, itertools.chain(*pieces)))
    for of_record in pieces:
        placed += zip(sorted(draw.randint(0, room) for _ in of_record), of_record, strict=True)
    start = draw.randrange(len(text) - room)
    return inserted(text[start : start + room], placed)


def test_document(draw: random.Random, text: bytes, length: int, depth: float) -> bytes:
    """Return a document of `length` bytes that ends with the recall of a record stored at a depth, 0 to 1."""
    pairs = list(records(draw, 1 + OTHERS))
    end = b"\n[recall %s %s]" % pairs[0]
    room = length - len(end) - sum(len(stored(*pair)) for pair in pairs)
    start = draw.randrange(len(text) - room)
    places = [(round(depth * room), stored(*pairs[0])), *((draw.randint(0, room), stored(*pair)) for pair in pairs[1:])]
    return inserted(text[start : start + room], places) + end


def write_documents(prefix: Path, text: bytes, length: int, count: int, seed: int) -> None:
    """Write training documents as an indexed dataset, unless it exists."""
    from megatron_hybrid.data.indexed import IndexedWriter

    if prefix.with_suffix(".idx").exists():
        return
    draw = random.Random(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(count):
            tokens = np.append(np.frombuffer(training_document(draw, text, length), np.uint8).astype(np.uint16), END)
            writer.add(tokens.astype(np.uint16), np.array([length]))
        writer.finish()
