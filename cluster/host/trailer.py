"""The trailer of an object file: header atom and table of block hashes (docs/format.md).

An object of `size` bytes is a file with the data at offset 0, zeros up to the next multiple of 4096, then the
trailer: 512 bytes of header and one 64-bit XXH3 hash per 4 KiB block, little-endian. A hash of zero says that
the block is a hole and reads as zeros; a block whose hash happens to be zero is stored as one. Nothing in a trailer
differs between copies of equal version.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import Final

from xxhash import xxh3_64_intdigest

from sheepdog.cluster.core.errors import Corrupt
from sheepdog.cluster.core.ids import STRIP_SHIFT, ObjectId, Version, plain_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer

block_hash: Final = xxh3_64_intdigest

MAGIC: Final = b"SHEEPOBJ"
FORMAT: Final = 1
HEADER_SIZE: Final = 512  # one atom of every disk
ENTRY_SIZE: Final = 8
FIRST_ENTRY: Final = HEADER_SIZE // ENTRY_SIZE  # index of block 0's hash in the trailer seen as 64-bit words
RESTORING: Final = 1  # flag: a restore has begun and not finished; the copy has no version
ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
_ZERO_BLOCK_HASH: Final = block_hash(ZERO_BLOCK)

_HEADER = struct.Struct("<8sIIQIIQQQQ")  # magic, format, flags, oid, strip + 1, zero, size, epoch, term, counter
_FLAGS_OFFSET = 12
_VERSION = struct.Struct("<QQQ")
_VERSION_OFFSET = 40
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = HEADER_SIZE - _CHECKSUM.size

assert sys.byteorder == "little", "the table is used in place"


def block_count(size: int) -> int:
    return (size + BLOCK_SIZE - 1) // BLOCK_SIZE


def trailer_offset(size: int) -> int:
    """Where the trailer of an object of `size` bytes starts."""
    return (size + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE


def trailer_size(size: int) -> int:
    return HEADER_SIZE + ENTRY_SIZE * block_count(size)


def offset_in_file(length: int) -> int | None:
    """Where the trailer of a file of `length` bytes starts; None when no object file has this length."""
    blocks, rest = divmod(length - HEADER_SIZE, BLOCK_SIZE + ENTRY_SIZE)
    return None if rest or blocks < 0 else blocks * BLOCK_SIZE


class Header:
    """What the header atom says."""

    __slots__ = ("flags", "oid", "size", "version")

    def __init__(self, oid: ObjectId, size: int, version: Version, flags: int = 0) -> None:
        self.oid = oid
        self.size = size
        self.version = version
        self.flags = flags

    def pack_into(self, trailer: bytearray) -> None:
        """Writes the header atom to the start of a trailer."""
        oid, strip = plain_oid(self.oid), self.oid >> STRIP_SHIFT
        _HEADER.pack_into(trailer, 0, MAGIC, FORMAT, self.flags, oid, strip, 0, self.size, *self.version)
        seal(trailer)


def parse_header(atom: Buffer) -> Header:
    """Raises Corrupt when the 512 bytes are not a header of this format."""
    magic, form, flags, oid, strip, _, size, epoch, term, counter = _HEADER.unpack_from(atom)
    if magic != MAGIC:
        raise Corrupt("no object header")
    if form != FORMAT:
        raise Corrupt(f"object header of format {form}, this is {FORMAT}")
    view = memoryview(atom)
    if _CHECKSUM.unpack_from(atom, _CHECKSUM_OFFSET)[0] != block_hash(view[:_CHECKSUM_OFFSET]):
        raise Corrupt("object header does not match its checksum")
    return Header(ObjectId(oid | strip << STRIP_SHIFT), size, Version(epoch, term, counter), flags)


def seal(trailer: bytearray) -> None:
    """Renews the checksum of the header atom."""
    _CHECKSUM.pack_into(trailer, _CHECKSUM_OFFSET, block_hash(memoryview(trailer)[:_CHECKSUM_OFFSET]))


def set_version(trailer: bytearray, version: Version) -> None:
    _VERSION.pack_into(trailer, _VERSION_OFFSET, *version)
    seal(trailer)


def set_flags(trailer: bytearray, flags: int) -> None:
    struct.pack_into("<I", trailer, _FLAGS_OFFSET, flags)
    seal(trailer)


def hash_blocks(data: Buffer, entries: memoryview, first: int) -> int:
    """Hashes whole blocks (the last may be short) into entries[first:]; returns how many of them were holes before."""
    view = memoryview(data)
    length = len(view)
    index = first
    filled = 0
    for start in range(0, length, BLOCK_SIZE):
        block: Buffer = view[start : start + BLOCK_SIZE]
        if len(block) < BLOCK_SIZE:
            block = bytes(block) + bytes(BLOCK_SIZE - len(block))
        if not entries[index]:
            filled += 1
        entries[index] = block_hash(block) or 1
        index += 1
    return filled


def _block(index: int) -> slice:
    return slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)


_BLOCKS: Final = [
    _block(index) for index in range(1024)
]  # of 4 MiB, made once: a tenth of what it takes to verify 1 MiB


def _whole_blocks(view: memoryview) -> list[int]:
    """Hashes as the function gives them. The calls stay in C: a loop would cost as much again as the hashing."""
    count = len(view) // BLOCK_SIZE
    blocks = _BLOCKS[:count] if count <= len(_BLOCKS) else map(_block, range(count))
    return list(map(block_hash, map(view.__getitem__, blocks)))


def hash_of(block: Buffer) -> int:
    """Hash of one block, zero-padded when it is short."""
    if len(block) < BLOCK_SIZE:
        block = bytes(block) + bytes(BLOCK_SIZE - len(block))
    return block_hash(block) or 1


def block_hashes(data: Buffer) -> list[int]:
    """The hash of each block; the last may be short."""
    if len(data) == BLOCK_SIZE:
        return [block_hash(data) or 1]
    view = memoryview(data)
    hashes = _whole_blocks(view)
    if 0 in hashes:
        hashes = [value or 1 for value in hashes]
    if rest := len(view) % BLOCK_SIZE:
        hashes.append(hash_of(view[-rest:]))
    return hashes


def hashes_of_filled(data: Buffer) -> list[int]:
    """The same, but 0 for blocks that are all zero: they stay holes."""
    hashes = block_hashes(data)
    if _ZERO_BLOCK_HASH in hashes:  # rarely: no look at each block
        view = memoryview(data)
        for index, value in enumerate(hashes):
            if value == _ZERO_BLOCK_HASH:
                block = bytes(view[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
                if block == ZERO_BLOCK[: len(block)]:
                    hashes[index] = 0
    return hashes


def filled_runs(hashes: list[int], length: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of runs of blocks that are no holes, of `length` bytes with these hashes."""
    if 0 not in hashes:  # nearly always
        if length:
            yield 0, length
        return
    begin = -1
    for start, value in zip(range(0, length, BLOCK_SIZE), hashes, strict=True):
        if not value and begin >= 0:
            yield begin, start
            begin = -1
        elif value and begin < 0:
            begin = start
    if begin >= 0:
        yield begin, length


def is_bad(block: Buffer, entry: int) -> bool:
    """Whether a whole block does not match its entry; a hole must be zeros."""
    found = block_hash(block)
    return found != entry and (found or 1) != (entry or _ZERO_BLOCK_HASH)


def bad_blocks(data: Buffer, entries: memoryview, first: int) -> list[int]:
    """Which of the whole blocks of `data` (counted from 0) do not match entries[first:]; a hole must be zeros."""
    if len(data) == BLOCK_SIZE:
        return [0] if is_bad(data, entries[first]) else []
    found = _whole_blocks(memoryview(data))
    count = len(found)
    expected = entries[first : first + count].tolist()
    if found == expected:  # nearly always: no look at each block
        return []
    return [
        position
        for position, (one, entry) in enumerate(zip(found, expected, strict=True))
        if (one or 1) != (entry or _ZERO_BLOCK_HASH)
    ]
