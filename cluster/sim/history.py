"""What clients saw, and whether it is possible: each 4 KiB block is a linearizable register.

Every write has a value of its own, so a history can be checked in linear time (Gibbons and Korach 1997): all
operations of one value form a *cluster*; its *zone* reaches from its earliest end to its latest start. If the end
comes first the zone is *forward*: the value was certainly in the register all that time. Otherwise it is *backward*:
the value was there at some moment within. A history is linearizable exactly if no read ends before its write
begins, no two forward zones overlap, and no backward zone lies inside a forward one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

NEVER = 1 << 62  # end of an operation whose outcome nobody knows: it may take effect at any later time, or never
STORY_LINES = 12  # of the beginning and of the end of a failed register's story
INITIAL = 0  # value of a block that nobody has written

Register = tuple[str, int]  # (volume, block number)


class Operation(NamedTuple):
    """One access to one block. `end_ns` is NEVER for a write without a (successful) answer."""

    is_write: bool
    value: int
    start_ns: int
    end_ns: int
    who: str


class Violation(AssertionError):
    """Something promised did not hold."""


class Problem(NamedTuple):
    """Why a history is impossible, and the values that show it."""

    text: str
    values: tuple[int, ...]


class _Zone(NamedTuple):
    low: int
    high: int
    value: int


@dataclass(slots=True)
class History:
    """Operations by register."""

    registers: dict[Register, list[Operation]] = field(default_factory=dict)
    operations: int = 0

    def add(self, register: Register, operation: Operation) -> None:
        self.operations += 1
        self.registers.setdefault(register, []).append(operation)

    def check(self) -> None:
        """Violation with the story of the first register that cannot have happened."""
        for register in sorted(self.registers):
            problem = check_register(self.registers[register])
            if problem is not None:
                raise Violation(f"block {register}: {problem.text}\n{_story(self.registers[register], problem)}")


def check_register(operations: Iterable[Operation]) -> Problem | None:
    """Why this history of one register is impossible; None when it is linearizable."""
    writes: dict[int, Operation] = {INITIAL: Operation(True, INITIAL, -1, -1, "nobody")}
    reads: dict[int, list[Operation]] = {}
    for operation in operations:
        if operation.is_write:
            if operation.value in writes:
                return Problem(f"value {operation.value} was written twice: the history is no use", (operation.value,))
            writes[operation.value] = operation
        else:
            reads.setdefault(operation.value, []).append(operation)
    forward: list[_Zone] = []
    backward: list[_Zone] = []
    for value, write in writes.items():
        readers = reads.pop(value, [])
        if write.end_ns >= NEVER and not readers:
            continue  # it may never have happened
        if any(reader.end_ns < write.start_ns for reader in readers):
            return Problem(f"value {value} was read before it was written", (value,))
        low = min([write.end_ns, *(reader.end_ns for reader in readers)])
        high = max([write.start_ns, *(reader.start_ns for reader in readers)])
        if low < high:
            forward.append(_Zone(low, high, value))
        else:
            backward.append(_Zone(high, low, value))
    if reads:
        return Problem(f"values {sorted(reads)} were read and never written", tuple(sorted(reads)))
    return _conflict(forward, backward)


def _conflict(forward: list[_Zone], backward: list[_Zone]) -> Problem | None:
    forward.sort()
    for one, next_one in pairwise(forward):
        if next_one.low < one.high:
            text = f"values {one.value} and {next_one.value} were both certainly there at {next_one.low / 1e9:.6f}"
            return Problem(text, (one.value, next_one.value))
    lows = [zone.low for zone in forward]
    for zone in backward:
        index = bisect_right(lows, zone.low) - 1
        if index >= 0 and forward[index].low < zone.low and zone.high < forward[index].high:
            text = (
                f"value {zone.value} was there between {zone.low / 1e9:.6f} and {zone.high / 1e9:.6f}, "
                f"while {forward[index].value} certainly was"
            )
            return Problem(text, (zone.value, forward[index].value))
    return None


def _start(operation: Operation) -> int:
    return operation.start_ns


def _story(operations: list[Operation], problem: Problem) -> str:
    """The operations on the values in question, and what was written in between."""
    involved = [operation for operation in operations if operation.value in problem.values]
    first, last = min(map(_start, involved), default=0), max(map(_start, involved), default=0)
    told = [
        operation
        for operation in sorted(operations, key=_start)
        if operation in involved or (operation.is_write and first <= operation.start_ns <= last)
    ]
    lines = [_tell(operation) for operation in told]
    if len(lines) > 2 * STORY_LINES:
        lines[STORY_LINES:-STORY_LINES] = [f"  ... {len(lines) - 2 * STORY_LINES} more"]
    return "\n".join(lines)


def _tell(operation: Operation) -> str:
    end = "     never" if operation.end_ns >= NEVER else f"{operation.end_ns / 1e9:10.6f}"
    kind = "write" if operation.is_write else "read "
    return f"  {operation.start_ns / 1e9:10.6f} .. {end} {kind} {operation.value:6d} {operation.who}"
