"""What clients saw, and whether it is possible: each 4 KiB block is a linearizable register.

Every write has a value of its own, so a history can be checked in linear time (Gibbons and Korach 1997): all
operations of one value form a *cluster*; its *zone* reaches from its earliest end to its latest start. If the end
comes first the zone is *forward*: the value was certainly in the register all that time. Otherwise it is *backward*:
the value was there at some moment within. A history is linearizable exactly if no read ends before its write
begins, no two forward zones overlap, and no backward zone lies inside a forward one.

A power loss of everybody ends an *era*. What was not flushed may be lost, in any combination; so each era is checked by
itself, and begins with one of the values that the era before may have left: those that do not certainly come before
a durable write.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
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
    durable: bool = False  # its answer promised that it survives a power loss


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
    flushes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # by volume: begin and end
    blackouts: list[int] = field(default_factory=list)  # times at which power failed everywhere
    operations: int = 0

    def add(self, register: Register, operation: Operation) -> None:
        self.operations += 1
        self.registers.setdefault(register, []).append(operation)

    def flushed(self, volume: str, start_ns: int, end_ns: int) -> None:
        """All that was acknowledged before `start_ns` is durable since `end_ns`."""
        self.flushes.setdefault(volume, []).append((start_ns, end_ns))

    def check(self) -> None:
        """Violation with the story of the first register that cannot have happened."""
        for register in sorted(self.registers):
            operations = self.registers[register]
            problem = check_eras(operations, self.blackouts, self.flushes.get(register[0], []))
            if problem is not None:
                raise Violation(f"block {register}: {problem.text}\n{_story(operations, problem)}")


def check_register(operations: Iterable[Operation]) -> Problem | None:
    """Why this history of one register is impossible; None when it is linearizable."""
    return check_eras(operations, (), ())


def check_eras(
    operations: Iterable[Operation], blackouts: Sequence[int], flushes: Sequence[tuple[int, int]]
) -> Problem | None:
    """The same over power losses of everybody, ascending; no operation reaches over one."""
    eras: list[list[Operation]] = [[] for _ in range(len(blackouts) + 1)]
    for operation in operations:
        eras[bisect_right(blackouts, operation.start_ns)].append(operation)
    initial = {INITIAL: None}
    for index, era in enumerate(eras):
        last_ns = blackouts[index] if index < len(blackouts) else NEVER
        flushed_ns = max((start_ns for start_ns, end_ns in flushes if end_ns <= last_ns), default=-1)
        found = _check_era(era, initial, flushed_ns)
        if isinstance(found, Problem):
            return found
        initial = found
    return None


def _check_era(operations: list[Operation], initial: dict[int, None], flushed_ns: int) -> dict[int, None] | Problem:
    """The values that may be there after a power loss. Each value is written at most once in all of the history."""
    writes: dict[int, Operation] = {}
    reads: dict[int, list[Operation]] = {}
    for operation in operations:
        if not operation.is_write:
            reads.setdefault(operation.value, []).append(operation)
        elif operation.value in writes or operation.value == INITIAL:
            return Problem(f"value {operation.value} was written twice: the history is no use", (operation.value,))
        else:
            writes[operation.value] = operation
    first = sorted(value for value in reads if value not in writes)
    if len(first) > 1 or (first and first[0] not in initial):
        return Problem(f"values {first} were read, and only one of {sorted(initial)} can have been there", tuple(first))
    for value in first:
        writes[value] = Operation(True, value, -1, -1, "nobody")
    zones: dict[int, _Zone] = {}
    for value, write in writes.items():
        readers = reads.get(value, [])
        if any(reader.end_ns < write.start_ns for reader in readers):
            return Problem(f"value {value} was read before it was written", (value,))
        low = min([write.end_ns, *(reader.end_ns for reader in readers)])
        high = max([write.start_ns, *(reader.start_ns for reader in readers)])
        zones[value] = _Zone(low, high, value)
    happened = [zone for zone in zones.values() if zone.low < NEVER]
    problem = _conflict([zone for zone in happened if zone.low < zone.high], [z for z in happened if z.low >= z.high])
    if problem is not None:
        return problem
    durable = [
        zones[value]
        for value, write in writes.items()
        if value not in first and (write.durable or write.end_ns <= flushed_ns) and write.end_ns < NEVER
    ]
    return _left(zones, first or list(initial), durable)


def _left(zones: dict[int, _Zone], first: list[int], durable: list[_Zone]) -> dict[int, None]:
    """What a power loss may leave: any value that does not certainly come before a durable write of another one."""
    highest = sorted(durable, key=lambda zone: zone.high)[-2:]
    left: dict[int, None] = {} if durable else dict.fromkeys(first)
    for value, zone in zones.items():
        others_ns = [other.high for other in highest if other.value != value]
        if value not in first and all(zone.low >= high_ns for high_ns in others_ns):
            left[value] = None
    return left


def _conflict(forward: list[_Zone], backward: list[_Zone]) -> Problem | None:
    # A backward zone reaches from the earliest end to the latest start the other way round.
    backward = [_Zone(zone.high, zone.low, zone.value) for zone in backward]
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
