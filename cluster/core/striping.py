"""Where the bytes of an erasure-coded object are (design.md 8): pure arithmetic.

An object is cut into stripes of D units of 64 KiB. Unit i of every stripe is on strip i, the stripe's P parity units
are on the strips behind; unit u of stripe s is at offset s * 64 KiB of its strip. So a range of an object is one
contiguous range on each strip that it touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sheepdog.cluster.core.erasure import Buffer, Coder, Policy

UNIT: Final = (
    64 * 1024
)  # small enough that a stripe of 16:P fits the smallest object, large enough to read from one node


class Piece:
    """Part of a range of an object: `length` bytes at `offset` of data strip `strip`, `start` bytes into the range."""

    __slots__ = ("length", "offset", "start", "strip")

    def __init__(self, strip: int, offset: int, start: int, length: int) -> None:
        self.strip = strip
        self.offset = offset
        self.start = start
        self.length = length


class Span(NamedTuple):
    """A range of a strip."""

    offset: int
    length: int


class Change:
    """What is written to one strip. `delta`: the bytes are XORed into what is there."""

    __slots__ = ("data", "delta", "offset")

    def __init__(self, offset: int, data: list[Buffer], delta: bool = False) -> None:
        self.offset = offset
        self.data = data
        self.delta = delta


NOTHING: Final = Change(0, [])


def mask_of(changes: Sequence[Change]) -> int:
    """The strips that a change touches, a bit each."""
    mask = 0
    for strip, change in enumerate(changes):
        if change.data:
            mask |= 1 << strip
    return mask


def stripe_size(policy: Policy) -> int:
    return policy.data * UNIT


def strip_size(policy: Policy, size: int) -> int:
    """Bytes of each strip of an object of `size` bytes."""
    return size // policy.data


def cut(policy: Policy, offset: int, length: int) -> list[tuple[int, int]]:
    """A range as writes that can be coded at once: within one stripe, or whole stripes. (offset, length), ascending."""
    stripe, end = stripe_size(policy), offset + length
    first, last = -(-offset // stripe) * stripe, end // stripe * stripe
    if first > last:
        return [(offset, length)]
    parts = [(offset, first - offset), (first, last - first), (last, end - last)]
    return [part for part in parts if part[1]] or [(offset, 0)]


def pieces(policy: Policy, offset: int, length: int) -> list[Piece]:
    """The units that a range touches, ascending."""
    found = []
    start = 0
    while start < length:
        stripe, rest = divmod(offset + start, stripe_size(policy))
        strip, within = divmod(rest, UNIT)
        part = min(UNIT - within, length - start)
        found.append(Piece(strip, stripe * UNIT + within, start, part))
        start += part
    return found


def spans(parts: Sequence[Piece]) -> dict[int, Span]:
    """The one range of each data strip that the pieces of a contiguous range touch."""
    found: dict[int, Span] = {}
    for part in parts:
        before = found.get(part.strip)
        if before is None:
            found[part.strip] = Span(part.offset, part.length)
        else:
            found[part.strip] = Span(before.offset, before.length + part.length)
    return found


def rows_to_range(policy: Policy, offset: int, length: int) -> tuple[int, int]:
    """(offset, length) of the whole stripes of the object that a range of any strip belongs to."""
    first, last = offset // UNIT, -(-(offset + length) // UNIT)
    stripe = stripe_size(policy)
    return first * stripe, (last - first) * stripe


def gather(parts: Sequence[Piece], found: dict[int, tuple[int, Buffer]], length: int) -> Buffer:
    """The bytes of a range from those of its strips: (offset of the first byte in the strip, bytes) by strip."""
    if len(parts) == 1:
        offset, data = found[parts[0].strip]
        return data if len(data) == length else memoryview(data)[parts[0].offset - offset :][:length]
    views = {strip: (offset, memoryview(data)) for strip, (offset, data) in found.items()}
    units = []
    for part in parts:  # ascending
        offset, view = views[part.strip]
        start = part.offset - offset
        units.append(view[start : start + part.length])
    return b"".join(units)  # clears no memory before: a third of the time


def encode_stripes(coder: Coder, policy: Policy, offset: int, data: Buffer) -> list[Change]:
    """Whole stripes: what each strip holds from now on."""
    view, stripe = memoryview(data), stripe_size(policy)
    strips: list[list[Buffer]] = [[] for _ in range(policy.strips)]
    for start in range(0, len(view), stripe):
        units: list[Buffer] = [view[at : at + UNIT] for at in range(start, start + stripe, UNIT)]
        for strip, unit in enumerate([*units, *coder.encode(policy, units)]):
            strips[strip].append(unit)
    return [Change(offset // policy.data, parts) for parts in strips]


def encode_part(
    coder: Coder, policy: Policy, parts: Sequence[Piece], data: Buffer, old: Sequence[Buffer] | None
) -> list[Change]:
    """A change within one stripe: new bytes for the data strips, deltas for the parity strips.

    `old`: what the pieces hold now; None for zeros.
    """
    view = memoryview(data)
    changes: list[Change] = [NOTHING] * policy.strips
    deltas: list[list[Buffer]] = []  # of each piece what adds up to its change
    low, high = parts[0].offset, 0
    for number, part in enumerate(parts):
        new: Buffer = view[part.start : part.start + part.length]
        changes[part.strip] = Change(part.offset, [new])
        deltas.append([new] if old is None else [old[number], new])
        low, high = min(low, part.offset), max(high, part.offset + part.length)
    if len(parts) == 1:
        parity = coder.delta(policy, parts[0].strip, deltas[0])
    else:
        units: list[Buffer] = [bytes(high - low)] * policy.data
        for part, delta in zip(parts, deltas, strict=True):
            unit = bytearray(high - low)
            change = delta[0] if len(delta) == 1 else coder.xor(*delta)
            unit[part.offset - low : part.offset - low + part.length] = change
            units[part.strip] = unit
        parity = coder.encode(policy, units)
    for number, bytes_ in enumerate(parity):
        changes[policy.data + number] = Change(low, [bytes_], True)
    return changes


def encode_creation(coder: Coder, policy: Policy, offset: int, data: Buffer) -> list[Change]:
    """A new object, zero but for `data`: what the strips begin with."""
    if not any_bytes(data):
        return [NOTHING] * policy.strips
    parts = cut(policy, offset, len(data))
    stripe = stripe_size(policy)
    if len(parts) == 1 and (offset % stripe or len(data) % stripe):
        return encode_part(coder, policy, pieces(policy, offset, len(data)), data, None)
    head, tail = offset % stripe, -(offset + len(data)) % stripe
    if head or tail:
        data = b"".join((bytes(head), data, bytes(tail)))
    return encode_stripes(coder, policy, offset - head, data)


def any_bytes(data: Buffer) -> bool:
    """Something is not zero."""
    return bool(data) and (bool(data[0]) or bool(data[-1]) or bytes(data).count(0) != len(data))
