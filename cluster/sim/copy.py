"""What a simulated disk holds of one object."""

from __future__ import annotations

from struct import pack_into

from xxhash import xxh3_64_intdigest

from sheepdog.cluster.core.ids import Version
from sheepdog.cluster.core.limits import BLOCK_SIZE

_ZERO = bytes(BLOCK_SIZE)


class Copy:
    """The bytes of one copy; blocks that are not in `blocks` are holes."""

    __slots__ = ("blocks", "rotten", "size", "version")

    def __init__(self, size: int, version: Version) -> None:
        self.size = size
        self.version = version
        self.blocks: dict[int, bytes] = {}
        self.rotten: dict[int, None] = {}  # blocks whose bytes do not match their hash any more

    def clone(self) -> Copy:
        twin = Copy(self.size, self.version)
        twin.blocks = dict(self.blocks)
        twin.rotten = dict(self.rotten)
        return twin

    def table(self) -> bytes:
        table = bytearray(8 * (-(-self.size // BLOCK_SIZE)))
        for number, block in self.blocks.items():
            pack_into("<Q", table, 8 * number, xxh3_64_intdigest(block) or 1)
        return bytes(table)

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
        if first == last and length == BLOCK_SIZE:
            return self.blocks.get(first, _ZERO)
        whole = b"".join([self.blocks.get(number, _ZERO) for number in range(first, last + 1)])
        start = offset - first * BLOCK_SIZE
        return whole[start : start + length]

    def bad(self, offset: int, length: int) -> tuple[int, ...]:
        """Rotten blocks in a range."""
        first, last = offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
        return tuple(number for number in self.rotten if first <= number <= last)

    def overwrite(self, offset: int, data: bytes, skip_zero_blocks: bool = False) -> None:
        position = 0
        while position < len(data):
            number, start = divmod(offset + position, BLOCK_SIZE)
            part = data[position : position + BLOCK_SIZE - start]
            position += len(part)
            if len(part) < BLOCK_SIZE:
                block = self.blocks.get(number, _ZERO)
                part = block[:start] + part + block[start + len(part) :]
            if skip_zero_blocks and part == _ZERO:
                continue
            self.blocks[number] = part
            self.rotten.pop(number, None)

    def punch(self, offset: int, length: int) -> None:
        end = offset + length
        first, last = -(-offset // BLOCK_SIZE), (-(-end // BLOCK_SIZE) if end == self.size else end // BLOCK_SIZE)
        for number in range(first, last):
            self.blocks.pop(number, None)
            self.rotten.pop(number, None)
        for start, stop in ((offset, min(first * BLOCK_SIZE, end)), (max(last * BLOCK_SIZE, offset), end)):
            if start < stop and start // BLOCK_SIZE in self.blocks:
                self.overwrite(start, bytes(stop - start))
