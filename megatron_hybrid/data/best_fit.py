"""Best-fit-decreasing bin packing of document lengths into sequences.

Documents are placed from the longest to the shortest, each into the sequence with the least room that still holds it (H. Ding
et al., "Fewer Truncations Improve Language Modeling", 2024, uses the same rule). Documents of one length are interchangeable,
and so are sequences with equal room. One step therefore places all documents of a length into all sequences of a room,
and the cost depends on the number of distinct lengths rather than on the number of documents.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Documents grouped by sequence."""

    order: np.ndarray
    """int64 [n]: document numbers, sequence after sequence, ascending within a sequence."""
    offsets: np.ndarray
    """int64 [sequences + 1]: where the documents of each sequence begin in `order`."""


def pack_best_fit(lengths: np.ndarray, capacity: int) -> Packed:
    """Pack documents into sequences of `capacity` tokens by best fit decreasing.

    Args:
        lengths: tokens per document [n], from 1 to capacity.

    Raises:
        ValueError: a length outside 1 to capacity.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}: each must be from 1 to {capacity}")
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    sequence_of = np.empty(len(lengths), np.int64)
    sequences = _Sequences(capacity)
    values, counts = np.unique(lengths, return_counts=True)
    done = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist()):
        placed = sequences.place(length, count)
        sequence_of[longest_first[done : done + count]] = placed
        done += count
    per_sequence = np.bincount(sequence_of, minlength=sequences.count)
    offsets = np.concatenate([[0], np.cumsum(per_sequence)])
    return Packed(np.argsort(sequence_of, kind="stable"), offsets)


class _Sequences:
    """Open sequences, grouped by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._by_room: dict[int, list[np.ndarray]] = {}  # room: sequence numbers, oldest first
        self._rooms: list[int] = []  # the keys of _by_room in ascending order

    def place(self, length: int, count: int) -> np.ndarray:
        """Place `count` documents of one length. Return the sequence number of each [count]."""
        placed = []
        while count:
            room, sequences = self._take(length, count)
            each = room // length  # a sequence that takes one becomes the best fit for the next
            full = min(len(sequences), count // each)
            rest = count - full * each if full < len(sequences) else 0
            placed += [np.repeat(sequences[:full], each), np.repeat(sequences[full : full + 1], rest)]
            count -= full * each + rest
            self._give_back(room - each * length, sequences[:full])
            if full < len(sequences):
                self._give_back(room - rest * length, sequences[full : full + 1])
                self._give_back(room, sequences[full + 1 :])
        return np.concatenate(placed)

    def _take(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """Remove and return the sequences with the least room for a length; open new ones if there is none."""
        at = bisect_left(self._rooms, length)
        if at == len(self._rooms):
            new = -(-count // (self.capacity // length))
            self.count += new
            return self.capacity, np.arange(self.count - new, self.count)
        room = self._rooms.pop(at)
        groups = self._by_room.pop(room)
        return room, groups[0] if len(groups) == 1 else np.concatenate(groups)

    def _give_back(self, room: int, sequences: np.ndarray) -> None:
        if not len(sequences) or not room:
            return
        if room not in self._by_room:
            self._by_room[room] = []
            insort(self._rooms, room)
        self._by_room[room].append(sequences)
