"""Which blocks of an object hold data: one bit a block, the first block's lowest in the first byte."""

from __future__ import annotations

from sheepdog.cluster.core.limits import BLOCK_SIZE

_PER_BYTE = 8 * BLOCK_SIZE


def map_size(object_size: int) -> int:
    """Bytes of the map of an object."""
    return -(-object_size // _PER_BYTE)


def block_map(table: bytes | bytearray | memoryview) -> bytes:
    """The map of a copy with this table of block hashes (8 bytes a block, zero for a hole)."""
    hashes = memoryview(table).cast("Q")
    count = len(hashes)
    if 0 not in hashes:
        bits = (1 << count) - 1
    else:
        bits = int("".join("1" if value else "0" for value in reversed(hashes.tolist())) or "0", 2)
    return bits.to_bytes(-(-count // 8), "little")


def runs(block_map: bytes | bytearray | memoryview, count: int) -> list[tuple[int, int, bool]]:
    """(first block, number of blocks, whether they hold data) of every run among the first `count` blocks."""
    bits = int.from_bytes(block_map, "little")
    found = []
    first = 0
    while first < count:
        rest = bits >> first
        data = bool(rest & 1)
        # The lowest bit that differs from this block's ends the run.
        other = ~rest if data else rest
        length = (other & -other).bit_length() - 1 if other else count
        length = min(length, count - first)
        found.append((first, length, data))
        first += length
    return found
