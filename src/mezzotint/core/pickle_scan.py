"""Look at a pickle's operations before anything executes them.

A pickle of some hundred bytes can put a tuple twice into the next one, sixty times over. Nothing in
it is forbidden, but to hash the last tuple, or to print it, takes for ever. So the values that a
key or a call would have to go through are counted first, from the operations alone.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from io import BufferedReader, BytesIO
from typing import Any

OPERATIONS_LIMIT = 3_000_000  # a state dict has about 30 for each tensor
EXPANDED_LIMIT = 100_000  # values in a key, in the arguments of a call, or in a result
VISITS_LIMIT = 2_000_000  # values counted in one pickle, for all keys and calls together

KEYED = ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET")  # operations that hash values
CALLS = ("REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BINPERSID")
GET, PUT = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
INTO = ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "BUILD")  # change the value below


@dataclass(eq=False, slots=True)
class _Value:
    """A value on the pickle's stack, known only by the values in it."""

    parts: list[_Value] = field(default_factory=list)
    is_mark: bool = False


class _Scan:
    """The stack and the memo of a pickle machine that executes nothing."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}
        self.visits = 0

    def expanded(self, value: _Value) -> int:
        """Return the number of values in `value`, shared ones counted as often as they occur.

        Counting ends above EXPANDED_LIMIT.
        """
        count, left = 0, [value]
        while left and count <= EXPANDED_LIMIT:
            parts = left.pop().parts
            # What is left is counted later: a value of many parts must not fill the memory now.
            count += 1
            left += parts[: max(0, EXPANDED_LIMIT + 1 - count - len(left))]
        self.visits += count
        if self.visits > VISITS_LIMIT:
            raise ValueError(f"its keys and calls go through more than {VISITS_LIMIT:,} values")
        return count

    def execute(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the stack what an operation does."""
        name, stack = operation.name, self.stack
        if name in GET:
            stack.append(self.memo[int(argument)])
        elif name in PUT:
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name == "MARK":
            stack.append(_Value(is_mark=True))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name != "STOP":
            taken = self.take(operation)
            for value in _hashed(name, taken):
                if self.expanded(value) > EXPANDED_LIMIT:
                    raise ValueError(
                        f"its operation {name} goes through more than {EXPANDED_LIMIT:,} values, "
                        "counting shared ones as often as they occur"
                    )
            if name in INTO:
                container = taken.pop()
                container.parts += taken
                stack.append(container)
            else:
                stack.extend(_Value(taken) for _ in operation.stack_after)

    def take(self, operation: pickletools.OpcodeInfo) -> list[_Value]:
        """Pop what an operation works on, the topmost value first."""
        before, taken = operation.stack_before, list[_Value]()
        if pickletools.markobject in before:
            while not (top := self.stack.pop()).is_mark:
                taken.append(top)
            before = before[: before.index(pickletools.markobject)]
        return taken + [self.stack.pop() for _ in before]


def _hashed(name: str, taken: list[_Value]) -> list[_Value]:
    """Return which of the values that an operation takes it hashes, or hands to a call."""
    if name in ("SETITEM", "SETITEMS"):
        return taken[:-1][1::2]  # value, key, ..., the container last
    if name == "DICT":
        return taken[1::2]
    if name == "ADDITEMS":
        return taken[:-1]
    if name in ("REDUCE", "BUILD"):
        return taken[:1]  # the arguments or the state
    return taken if name in KEYED or name in CALLS else []


def scan_pickle(stream: BytesIO | BufferedReader) -> int:
    """Read one pickle; return how many values are in its result, at most EXPANDED_LIMIT + 1.

    Nothing is built or called. The stream is left behind the pickle's last operation.

    Errors: ValueError for a damaged pickle, one of more than OPERATIONS_LIMIT operations, and one
        that hashes more than EXPANDED_LIMIT values at once or hands them to a call.
    """
    scan = _Scan()
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > OPERATIONS_LIMIT:
            raise ValueError(f"it has more than {OPERATIONS_LIMIT:,} operations")
        try:
            scan.execute(operation, argument)
        except (IndexError, KeyError):
            raise ValueError(f"its operation {operation.name} has nothing to work on") from None
    return scan.expanded(scan.stack[-1]) if scan.stack else 0
