r"""Fast scan of the records that fill the directory of a torch.distributed.checkpoint folder.

The directory of a large checkpoint holds hundreds of thousands of records: a class, no arguments, and a dictionary of numbers, texts
and `torch.Size`s. One match of a regular expression skips a record, where `pickle_scan` follows 20 to 30 opcodes one by one.

    h! ) \x81 \x94 } \x94 (    h+ SIZE    h/ SIZE    u b          a slice: class, state, two fields
"""

import re
from collections.abc import Iterable

LARGEST_VALUE = 16
"""Bound on the expanded size of a tuple or `torch.Size` in a record. Its other values are hashed and printed by identity."""
_MEMOIZED = (2, 2, 5, 8)
"""Memo entries of a record by the number of its last group: the record and its state, and three for each size. A text is another."""
_MOST_SHARED = 48
"""Classes and field names."""
_NUMBER = rb"(?:K.|M..|J....)"
_TEXT = rb"\x8c(?:%b)\x94" % b"|".join(b"%b.{%d}" % (re.escape(bytes([length])), length) for length in range(81))


class RecordScanner:
    """Matcher of records, which learns the memo entries of classes and field names while the scan follows opcodes."""

    def __init__(self) -> None:
        self._shared, self._known, self._pattern = dict[bytes, None](), 0, re.compile(rb"(?!)")

    def learn(self, opcode: bytes) -> None:
        """Add an opcode that gets a memo entry of a text or a class."""
        if len(self._shared) < _MOST_SHARED:
            self._shared[opcode] = None

    def skip(self, data: bytes, at: int, most_memoized: int) -> tuple[int, int, int]:
        """Return the number of records that follow byte `at`, of their memo entries, and the position after them.

        It stops after the record that goes beyond `most_memoized` entries.
        """
        if len(self._shared) > self._known + 1:  # a new kind of record has at least a class and a field
            self._known, self._pattern = len(self._shared), _compile(self._shared)
        match = self._pattern.scanner(data, at).match  # type: ignore[attr-defined]
        records, memoized = 0, 0
        while memoized <= most_memoized and (record := match()):
            records += 1
            memoized += _MEMOIZED[record.lastindex or 0] + (record.start(1) > 0)
            at = record.end()
        return records, memoized, at


def _compile(shared: Iterable[bytes]) -> re.Pattern[bytes]:
    """Return the pattern of a record, whose groups are a text, a size and another size.

    Keys, classes and callables are only those of `shared`, so that nothing large is hashed or called.
    """
    short = b"".join(re.escape(opcode[1:]) for opcode in shared if len(opcode) == 2)
    long = [re.escape(opcode[1:]) for opcode in shared if len(opcode) != 2]
    get = rb"(?:h[%b]|j(?:%b))" % (short, b"|".join(long)) if long else rb"h[%b]" % short
    sizes = rb"(?:%b{1,3}[\x85-\x87]|\(%b{4,8}t)" % (_NUMBER, _NUMBER)
    size = rb"(%b%b%b\x94\x85\x94R\x94)" % (get, get, sizes)
    scalars = rb"(?:%b(?:%b|[N\x88\x89]|h.|j....)(?=[hju]))*+" % (get, _NUMBER)
    text = rb"(%b%b)" % (get, _TEXT)
    fields = rb"%b(?:%b%b)?+(?:%b%b(?:%b%b)?+)?+" % (scalars, text, scalars, size, scalars, size, scalars)
    return re.compile(rb"%b\)\x81\x94}\x94\(%bub" % (get, fields), re.DOTALL)
