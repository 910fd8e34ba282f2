"""Bounds on what a pickle can build, found by reading its opcodes without running them.

A short pickle can expand without limit: a far memo index allocates all indices before it, and a tuple that holds another one twice,
thirty levels deep, takes 2^30 steps to hash or to print.
"""

import pickletools
import struct
from collections.abc import Callable

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.pickle_records import LARGEST_VALUE, RecordScanner

_MOST_OPCODES = 500_000
"""Opcodes outside the records that fill a checkpoint's directory. That of a 7B model with its optimizer on 64 ranks has 80,000."""
_MOST_OBJECTS = 3_200_000
"""Of a checkpoint with 200,000 slices of tensors. They take about 300 MB. Each slice has 16, texts included."""
_BYTES_PER_OBJECT = 4
"""Least bytes that an object takes in a pickle. It is 8.8 in those of torch.distributed.checkpoint, and 1 in a bomb of lists."""
_LARGEST_TUPLE = 10_000
"""Values in a tuple, all that it holds counted each time that it occurs."""
_LARGEST_CLASS = 3
"""Expanded size of a class, which is built from the names of its module and itself."""
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_BUILDS = (
    *_TUPLES,
    "EMPTY_LIST",
    "EMPTY_DICT",
    "EMPTY_SET",
    "LIST",
    "DICT",
    "FROZENSET",
    "NEWOBJ",
    "NEWOBJ_EX",
    "REDUCE",
    "OBJ",
    "INST",
)
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_CODES = {opcode.name: code for code, opcode in _OPCODES.items()}


def _codes(*names: str) -> frozenset[int]:
    return frozenset(_CODES[name] for name in names)


_PUSHES = frozenset(
    code
    for code, opcode in _OPCODES.items()
    if not opcode.stack_before and len(opcode.stack_after) == 1 and opcode.stack_after != [pickletools.markobject]
) - _codes("GET", "BINGET", "LONG_BINGET", *_BUILDS)
"""Opcodes that push a value without others in it, and count as no object."""
_MARK, _MEMOIZE, _DUP, _POP, _BUILD, _STOP = (
    _CODES[name] for name in ("MARK", "MEMOIZE", "DUP", "POP", "BUILD", "STOP")
)
_PUTS, _GETS = _codes("PUT", "BINPUT", "LONG_BINPUT"), _codes("GET", "BINGET", "LONG_BINGET")
_DECIMAL = _codes("PUT", "GET")
_TUPLE_CODES, _BUILD_CODES = _codes(*_TUPLES), _codes(*_BUILDS)
_EFFECTS = {
    code: (
        pickletools.markobject in opcode.stack_before,
        len([value for value in opcode.stack_before if value not in (pickletools.markobject, pickletools.stackslice)]),
        len(opcode.stack_after),
    )
    for code, opcode in _OPCODES.items()
}
"""Effect of an opcode on the stack: does it pop a mark and all above it, how many other values does it pop and push."""


def _line(data: bytes, at: int) -> int:
    return data.index(b"\n", at) + 1


def _counted(format: str) -> Callable[[bytes, int], int]:
    """Return a function that skips an argument with its length before it."""
    unpack_from, size = struct.Struct(format).unpack_from, struct.calcsize(format)

    def skip(data: bytes, at: int) -> int:
        (length,) = unpack_from(data, at)
        if length < 0 or at + size + length > len(data):
            raise ValueError("an argument ends after the pickle")
        return at + size + int(length)

    return skip


def _argument(opcode: pickletools.OpcodeInfo) -> int | Callable[[bytes, int], int]:
    """Return the bytes of an opcode's argument, or a function that returns the position after it."""
    if opcode.arg is None:
        return 0
    if opcode.arg.n >= 0:
        return opcode.arg.n
    if opcode.name in ("GLOBAL", "INST"):
        return lambda data, at: _line(data, _line(data, at))
    formats = {
        pickletools.TAKEN_FROM_ARGUMENT1: "<B",
        pickletools.TAKEN_FROM_ARGUMENT4: "<i",
        pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
        pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
    }
    return _line if opcode.arg.n == pickletools.UP_TO_NEWLINE else _counted(formats[opcode.arg.n])


_FIXED = [-1] * 256
"""Bytes of an opcode and its argument; -1: see _VARIABLE."""
_VARIABLE: dict[int, Callable[[bytes, int], int]] = {}
for _code, _opcode in _OPCODES.items():
    if isinstance(_size := _argument(_opcode), int):
        _FIXED[_code] = 1 + _size
    else:
        _VARIABLE[_code] = _size
_IS_PUSH = [code in _PUSHES for code in range(256)]


class _Stack:
    """The stack of an unpickler, with the expanded size of every value in place of the value."""

    def __init__(self, where: str) -> None:
        self.where, self.sizes, self.marks, self.memo = where, list[int](), list[int](), list[int]()
        self.objects, self.records = 0, RecordScanner()

    def run(self, code: int, argument: bytes, at: int) -> None:
        """Follow an opcode other than those of `refuse_bombs`, whose argument ends at byte `at`.

        Raises:
            ConversionError: beyond a limit.
            Exception: the pickle is damaged.
        """
        if code in _PUTS:
            self._remember(_index(code, argument))
        elif code in _GETS:
            size = self.memo[_index(code, argument)]
            self.sizes.append(size)
            if size <= _LARGEST_CLASS:
                self.records.learn(bytes([code]) + argument)
        elif code == _DUP:
            self.sizes.append(self.sizes[-1])
        elif code == _POP and self.marks and self.marks[-1] == len(self.sizes):
            self.marks.pop()
        else:
            self._replace(code)
        if code in _BUILD_CODES:
            self._count_objects(1, at)

    def skip_records(self, data: bytes, at: int) -> int:
        """Follow the records after byte `at` of a pickle; return the position after them."""
        count, memoized, at = self.records.skip(data, at, _MOST_OBJECTS - self.objects)
        if count:
            self.sizes.extend([1] * count)
            self.memo.extend([LARGEST_VALUE] * memoized)
            self._count_objects(memoized, at)
        return at

    def _count_objects(self, count: int, at: int) -> None:
        self.objects += count
        if self.objects > min(_MOST_OBJECTS, 1000 + at // _BYTES_PER_OBJECT):
            raise ConversionError(
                f"{self.where}: {self.objects:,} objects in the first {at:,} bytes of its pickle; refused"
            )

    def _remember(self, index: int) -> None:
        memo = self.memo
        if index > len(memo) + 1:
            raise ConversionError(f"{self.where}: a memo index of {index} in its pickle; refused")
        memo.extend([LARGEST_VALUE] * (index + 1 - len(memo)))
        memo[index] = self.sizes[-1]

    def _replace(self, code: int) -> None:
        """Pop and push what an opcode does. A value that is pushed holds all that was popped."""
        pops_mark, pops, pushes = _EFFECTS[code]
        sizes, size = self.sizes, 1
        if pops_mark:
            mark = self.marks.pop()
            size += sum(sizes[mark:])
            del sizes[mark:]
        for _ in range(pops):
            size += sizes.pop()
        if code in _TUPLE_CODES and size > _LARGEST_TUPLE:
            raise ConversionError(
                f"{self.where}: a tuple of more than {_LARGEST_TUPLE:,} values in its pickle; refused"
            )
        if pushes:
            sizes.append(size)


def _index(code: int, argument: bytes) -> int:
    return int(argument) if code in _DECIMAL else int.from_bytes(argument, "little")


def refuse_bombs(data: bytes, where: str) -> None:
    """Check the opcodes of a pickle. The directory of a checkpoint takes about 20 ms per MB.

    Raises:
        ConversionError: it would take too much memory or time.
        Exception: it is damaged, in any way that the standard library reports.
    """
    stack, at = _Stack(where), 0
    sizes, marks, memo, fixed, is_push = stack.sizes, stack.marks, stack.memo, _FIXED, _IS_PUSH
    for _ in range(_MOST_OPCODES):
        if (code := data[at]) == _STOP:
            return
        begin = at + 1
        if (length := fixed[code]) > 0:
            at += length
        else:
            at = _VARIABLE[code](data, begin)
        if is_push[code]:
            sizes.append(1)
        elif code == _MEMOIZE:
            memo.append(sizes[-1])
        elif code == _MARK:
            marks.append(len(sizes))
        else:
            stack.run(code, data[begin:at], at)
            if code == _BUILD:
                at = stack.skip_records(data, at)
    raise ConversionError(
        f"{where}: more than {_MOST_OPCODES:,} opcodes in its pickle that describe no slices of tensors; refused"
    )
