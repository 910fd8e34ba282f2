"""Bounds on what a pickle can build, found by reading its opcodes without running them.

A short pickle can expand without limit: a far memo index allocates all indices before it, and a tuple that holds another one twice,
thirty levels deep, takes 2^30 steps to hash or to print.
"""

import pickletools

from megatron_hybrid.convert.errors import ConversionError

_MOST_OBJECTS = 3_000_000
"""Of a checkpoint with 200,000 slices of tensors. They take about 300 MB."""
_BYTES_PER_OBJECT = 4
"""Least bytes that an object takes in a pickle. It is 8.8 in those of torch.distributed.checkpoint, and 1 in a bomb of lists."""
_LARGEST_TUPLE = 10_000
"""Values in a tuple, all that it holds counted each time that it occurs."""
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
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
_EFFECTS = {
    opcode.name: (pickletools.markobject in opcode.stack_before, len(opcode.stack_before), len(opcode.stack_after))
    for opcode in pickletools.opcodes
}
"""Effect of an opcode on the stack: does it pop a mark, how many values does it pop, how many does it push."""


class _Stack:
    """The stack of an unpickler, with the expanded size of every value in place of the value. A mark is 0."""

    def __init__(self, where: str) -> None:
        self.where, self.sizes, self.memo, self.objects = where, list[int](), dict[int, int](), 0

    def run(self, name: str, argument: object) -> None:
        """Follow one opcode.

        Raises:
            ConversionError: beyond a limit.
            IndexError, KeyError: the pickle is damaged.
        """
        if name == "MARK":
            self.sizes.append(0)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.sizes[-1]
        elif name in _PUTS:
            if not isinstance(argument, int) or argument > len(self.memo) + 1:
                raise ConversionError(f"{self.where}: a memo index of {argument!r:.50} in its pickle; refused")
            self.memo[argument] = self.sizes[-1]
        elif name in _GETS:
            self.sizes.append(self.memo[int(str(argument))])
        elif name == "DUP":
            self.sizes.append(self.sizes[-1])
        else:
            self._replace(name)

    def _replace(self, name: str) -> None:
        pops_mark, pops, pushes = _EFFECTS[name]
        size = 1 + (self._pop_mark(pops) if pops_mark else sum(self.sizes.pop() for _ in range(pops)))
        if name in _TUPLES and size > _LARGEST_TUPLE:
            raise ConversionError(
                f"{self.where}: a tuple of more than {_LARGEST_TUPLE:,} values in its pickle; refused"
            )
        self.objects += name in _BUILDS
        self.sizes += [size] * pushes

    def _pop_mark(self, pops: int) -> int:
        """Pop everything down to the mark, the mark, and what the opcode pops below it."""
        total = 0
        while (size := self.sizes.pop()) != 0:
            total += size
        return total + sum(self.sizes.pop() for _ in range(pops - 2))


def refuse_bombs(data: bytes, where: str) -> None:
    """Check the opcodes of a pickle.

    Raises:
        ConversionError: it would take too much memory or time.
        Exception: it is damaged, in any way that the standard library reports.
    """
    stack = _Stack(where)
    for opcode, argument, at in pickletools.genops(data):
        stack.run(opcode.name, argument)
        if stack.objects > min(_MOST_OBJECTS, 1000 + (at or 0) // _BYTES_PER_OBJECT):
            raise ConversionError(
                f"{where}: {stack.objects:,} objects in the first {at:,} bytes of its pickle; refused"
            )
