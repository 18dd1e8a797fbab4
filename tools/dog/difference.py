"""The stream of `dog vdi backup|restore`: its bytes, written and proved.

Little-endian: u32 version 1, u32 magic; for each changed range, ascending, u32 object index, u32 offset, u32 length,
u32 check and `length` bytes; at the end u32 index 0xffffffff, u32 0, u32 number of records, u32 check. Ranges are whole
512-byte sectors of one object. If the volume has grown, a record with index 0xfffffffe, offset 0 and length 8 comes
first: its bytes are the new size. `check` is the lower half of the 64-bit XXH3 of the header and of all records so far
without their checks, this one with its bytes included: a stream that lost, repeated or changed anything is refused.
Sheepdog 1.0 wrote zeros for the number and every check, and reads ours unless the volume has grown; nothing but zeros
there is taken as its stream.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase
from itertools import repeat
from struct import Struct
from typing import BinaryIO, NamedTuple, cast

from xxhash import xxh3_64

from sheepdog.cluster.core.limits import MAX_MAP_ENTRIES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.window import CHUNK_BYTES

VERSION, MAGIC = 1, 0x11921192
END, SIZE = 0xFFFFFFFF, 0xFFFFFFFE
SECTOR = 512
SPOOL_DIRECTORY = "/var/tmp"  # for large files; /tmp is often kept in memory
_RECORD = Struct("<IIII")
_FIELDS = Struct("<III")  # of a record, what its check covers
_CHECK_MASK = 0xFFFFFFFF
_SIZE = Struct("<Q")  # bytes
_BEGINNING = Struct("<II").pack(VERSION, MAGIC)


class Shape(NamedTuple):
    """What the ranges of a stream must fit into, unless it says that the volume has grown."""

    object_count: int
    object_size: int


class Piece(NamedTuple):
    """Bytes of one object; if its number is SIZE, the volume's new size instead (`size`), before anything else."""

    number: int
    offset: int
    data: memoryview

    @property
    def size(self) -> int:
        return int(_SIZE.unpack(self.data)[0])


class Writer:
    """Writes a stream."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._sum = xxh3_64(_BEGINNING)
        self._count = 0
        out.write(_BEGINNING)

    def grown(self, size: int) -> None:
        """The volume has so many bytes now. Before all ranges."""
        self.add(SIZE, 0, _SIZE.pack(size))

    def add(self, index: int, offset: int, data: Buffer) -> None:
        self._record(index, offset, len(data), data)
        self._count += 1

    def end(self) -> None:
        self._record(END, 0, self._count, b"")
        self._out.flush()

    def _record(self, index: int, offset: int, length: int, data: Buffer) -> None:
        self._sum.update(_FIELDS.pack(index, offset, length))
        self._sum.update(data)
        self._out.write(_RECORD.pack(index, offset, length, self._sum.intdigest() & _CHECK_MASK))
        self._out.write(data)


def pieces(source: BufferedIOBase, shape: Shape, space: Iterator[memoryview], summed: bool = True) -> Iterator[Piece]:
    """What a stream holds, cut to the size of the buffers that `space` gives; Failure where it is not sound.

    Without `summed` its sums, proved before, are not made again.
    """
    _expect(_take(source, memoryview(bytearray(len(_BEGINNING)))) == _BEGINNING)
    total, count, original = xxh3_64(_BEGINNING), 0, True
    objects = shape.object_count
    while True:
        index, offset, length, said = _RECORD.unpack(_take(source, memoryview(bytearray(_RECORD.size))))
        total.update(_FIELDS.pack(index, offset, length))
        if index == END:
            break
        if index == SIZE:
            _expect(not count and not offset and length == _SIZE.size)
        else:
            _expect(index < objects and offset + length <= shape.object_size)
        end = offset + length
        while offset < end:
            data = _take(source, next(space)[: end - offset])
            if summed:
                total.update(data)
            piece = Piece(index, offset, data)
            if index == SIZE:
                objects = max(objects, -(-piece.size // shape.object_size))
                _expect(objects <= MAX_MAP_ENTRIES)
            yield piece
            offset += len(data)
        original = original and not said
        _expect(original or said == total.intdigest() & _CHECK_MASK or not summed)
        count += 1
    right = said == total.intdigest() & _CHECK_MASK or not summed
    _expect((original and not length and not said) or (length == count and right))


def _take(source: BufferedIOBase, space: memoryview) -> memoryview:
    _expect(source.readinto(space) == len(space))
    return space


def _expect(sound: bool) -> None:
    if not sound:
        raise Failure("The backup file is corrupted")


@contextmanager
def proved(source: BufferedIOBase, shape: Shape) -> Iterator[tuple[BufferedIOBase, int]]:
    """A stream that is sound to its end, at its beginning, and how many bytes its ranges have; Failure if it is not.

    A file is read here and can be read again. What comes through a pipe is kept in a nameless file, never in memory.
    """
    if source.seekable():
        start = source.tell()
        total = _prove(source, shape)
        source.seek(start)
        yield source, total
        return
    from tempfile import TemporaryFile  # costs time that no other command shall pay

    directory = os.environ.get("TMPDIR") or SPOOL_DIRECTORY
    with ExitStack() as stack:
        try:
            spool = cast("BufferedIOBase", stack.enter_context(TemporaryFile(dir=directory)))
            total = _prove(cast("BufferedIOBase", _Keeping(source, spool)), shape)
            spool.seek(0)
        except OSError as error:
            raise _not_kept(directory, error) from error
        yield spool, total


def _prove(source: BufferedIOBase, shape: Shape) -> int:
    return sum(len(piece.data) for piece in pieces(source, shape, repeat(memoryview(bytearray(CHUNK_BYTES)))))


class _Keeping:
    """Reads from a source and keeps what came."""

    def __init__(self, source: BufferedIOBase, spool: BufferedIOBase) -> None:
        self._source = source
        self._spool = spool

    def readinto(self, space: memoryview) -> int:
        count = self._source.readinto(space)
        self._spool.write(space[:count])
        return count


def _not_kept(directory: str, error: OSError) -> Failure:
    reason = error.strerror or str(error)
    return Failure(f"Failed to keep the stream in {directory}: {reason} (TMPDIR can name another directory)", 2)
