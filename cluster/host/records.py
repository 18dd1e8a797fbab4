"""Records of the journal: their bytes (docs/format.md) and what the store keeps of one until it is in place.

header (96 bytes, little-endian): u64 checksum, u32 magic, u8 kind, u8 strip + 1, 2 zero bytes, u64 lsn, u64 oid,
u64 size, u64 offset, u64 length, u64 version.epoch, u64 version.term, u64 version.counter, u64 durable lsn, u32 hashes,
u32 payload bytes; then `hashes` x u64, then the payload, then zeros up to a multiple of 8.
The checksum is XXH3-64 of the header behind it and of the hashes; the payload is covered by the hashes, one per 4 KiB
block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from librt.strings import BytesWriter, write_i64_le

from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer, Done
from sheepdog.cluster.core.words import write_u32, write_u64
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.trailer import ZERO_BLOCK, block_hash, hash_of

RECORD_MAGIC: Final = 0x4345524A  # "JREC"
_FULL: Final = Struct("<QIBB2xQQQQQQQQQII")
_OID_MASK: Final = (1 << STRIP_SHIFT) - 1
RECORD_HEADER: Final = _FULL.size
assert RECORD_HEADER == 96

# A position in the journal: number of the segment << 32 | offset in its file.
SEGMENT_SHIFT: Final = 32


class RecordKind:
    """What a record says. Blocks are whole, offsets multiples of 4096; an object's last block may be short.

    Plain integers: comparing with a member of an enumeration is a call.
    """

    WRITE: Final = 1  # payload: the bytes of `length` at `offset`
    INTENT: Final = 2  # the bytes go straight to the object's file; here are their hashes
    DONE: Final = 3  # the intent at lsn `offset` is on the disk
    PUNCH: Final = 4  # `length` at `offset` (any bytes) become zeros: holes, and at the edges the blocks of the payload
    CREATE: Final = 5  # a new object of `size` bytes: holes, and the payload at `offset`; a zero hash is a hole
    CREATE_LARGE: Final = 6  # the same, its bytes in the file, here their hashes
    REMOVE: Final = 7
    RESTORE: Final = 8  # a restore begins: what came before is void, the file alone counts
    RESTORED: Final = 9  # it is complete: the file has `version`
    CHECKPOINT: Final = 10  # everything before lsn `offset` is in place
    END: Final = 11  # the journal goes on in the next segment


class Parsed(NamedTuple):
    """A record read back. `payload_offset` is relative to the record's start."""

    kind: int
    lsn: int
    oid: ObjectId
    size: int
    offset: int
    length: int
    version: Version
    durable_lsn: int
    hashes: tuple[int, ...]
    payload_offset: int
    payload_length: int
    total: int


class Record:
    """One change on its way from the journal to the object's file."""

    __slots__ = (
        "acked_by_journal",
        "carries_data",
        "copy",
        "count",
        "data",
        "done",
        "durable",
        "end",
        "first",
        "hashes",
        "kind",
        "length",
        "lsn",
        "offset",
        "path",
        "replaces",
        "version",
        "wants_data",
    )

    def __init__(
        self,
        kind: int,
        copy: Copy,
        first: int,
        count: int,
        length: int,
        hashes: list[int],
        data: Buffer,
        version: Version,
        durable: bool,
        done: Done | None,
    ) -> None:
        self.kind = kind
        self.copy = copy
        self.first = first  # block
        self.count = count  # blocks
        self.length = length  # bytes
        self.hashes = hashes  # empty: holes
        self.data = data
        self.version = version
        self.durable = durable
        self.wants_data = durable  # CREATE_LARGE: its bytes, too, are on the disk at `done`
        self.done = done
        self.offset = first << 12
        self.carries_data = kind in (RecordKind.WRITE, RecordKind.CREATE, RecordKind.PUNCH)  # into the journal
        self.acked_by_journal = self.carries_data or kind == RecordKind.DONE  # else by its effect
        self.replaces: Copy | None = None  # CREATE, CREATE_LARGE, REMOVE: the object's copy until then, pinned
        self.path = ""  # CREATE_LARGE: where the file is until then
        self.lsn = 0
        self.end = 0  # lsn behind the record

    def block(self, block: int) -> Buffer:
        """Bytes of one block (the last may be short)."""
        if self.count == 1:
            return self.data
        start = (block - self.first) * BLOCK_SIZE
        return memoryview(self.data)[start : start + BLOCK_SIZE]

    def hash(self, block: int) -> int:
        return self.hashes[block - self.first] if self.hashes else 0


class PunchRecord(Record):
    """A range that becomes zeros. `edges`: what the blocks cut by its ends hold then; None: they are holes."""

    __slots__ = ("_edges",)

    def __init__(
        self,
        copy: Copy,
        offset: int,
        length: int,
        edges: dict[int, Buffer | None],
        version: Version,
        durable: bool,
        done: Done | None,
    ) -> None:
        hashes = [0 if data is None else hash_of(data) for data in edges.values()]
        payload = b"".join(_padded(data or b"") for data in edges.values())
        first = offset >> 12
        count = (offset + length + BLOCK_SIZE - 1 >> 12) - first
        super().__init__(RecordKind.PUNCH, copy, first, count, length, hashes, payload, version, durable, done)
        self.offset = offset
        self._edges = {
            block: (value, data) for (block, data), value in zip(edges.items(), hashes, strict=True) if data is not None
        }

    def block(self, block: int) -> Buffer:
        edge = self._edges.get(block)
        return ZERO_BLOCK if edge is None else edge[1]

    def hash(self, block: int) -> int:
        edge = self._edges.get(block)
        return 0 if edge is None else edge[0]

    def edges(self) -> Iterator[tuple[int, Buffer]]:
        for block, (_, data) in self._edges.items():
            yield block, data


def cut_blocks(offset: int, length: int, size: int) -> list[int]:
    """Blocks that a range of an object of `size` bytes covers only in part, ascending."""
    end = offset + length
    blocks = [offset >> 12] if offset & BLOCK_SIZE - 1 else []
    if end & BLOCK_SIZE - 1 and end != size and end >> 12 not in blocks:
        blocks.append(end >> 12)
    return blocks


def _padded(data: Buffer) -> bytes:
    return bytes(data) + bytes(BLOCK_SIZE - len(data))


def pack(
    kind: int,
    lsn: int,
    durable_lsn: int,
    oid: ObjectId,
    size: int,
    offset: int,
    length: int,
    version: Version,
    hashes: list[int],
    payload_length: int,
) -> bytes:
    """Header and hashes of a record; the payload and `padding` follow."""
    strip = oid >> STRIP_SHIFT
    record = BytesWriter()
    write_u32(record, RECORD_MAGIC)
    record.append(kind)
    record.append(strip)
    record.append(0)
    record.append(0)
    write_i64_le(record, lsn)
    write_u64(record, oid & _OID_MASK if strip else oid)
    write_i64_le(record, size)
    write_i64_le(record, offset)
    write_i64_le(record, length)
    write_i64_le(record, version[0])
    write_i64_le(record, version[1])
    write_i64_le(record, version[2])
    write_i64_le(record, durable_lsn)
    write_u32(record, len(hashes))
    write_u32(record, payload_length)
    if len(hashes) == 1:  # most records by far
        write_u64(record, hashes[0])
    else:
        record.write(array("Q", hashes).tobytes())
    body = record.getvalue()
    return block_hash(body).to_bytes(8, "little") + body


def padding(payload_length: int) -> int:
    return -payload_length & 7


def record_size(hashes: int, payload_length: int) -> int:
    return RECORD_HEADER + 8 * hashes + (payload_length + 7 & ~7)


def parse(data: memoryview, start: int, lsn: int) -> Parsed | None:
    """The record at data[start:], which must be the one of `lsn`; None for anything else (the tail, torn or rotten)."""
    if start + RECORD_HEADER > len(data):
        return None
    (
        checksum,
        magic,
        kind,
        strip,
        own_lsn,
        oid,
        size,
        offset,
        length,
        epoch,
        term,
        counter,
        durable_lsn,
        count,
        payload_length,
    ) = _FULL.unpack_from(data, start)
    if magic != RECORD_MAGIC or own_lsn != lsn:
        return None
    end = start + RECORD_HEADER + 8 * count
    total = record_size(count, payload_length)
    if start + total > len(data) or block_hash(data[start + 8 : end]) != checksum:
        return None
    hashes = tuple(data[start + RECORD_HEADER : end].cast("Q")) if count else ()
    if payload_length and not _payload_fits(data[end : end + payload_length], hashes):
        return None
    version = Version(epoch, term, counter) if epoch or term or counter else NO_VERSION
    return Parsed(
        kind,
        lsn,
        ObjectId(oid | strip << STRIP_SHIFT),
        size,
        offset,
        length,
        version,
        durable_lsn,
        hashes,
        end - start,
        payload_length,
        total,
    )


def _payload_fits(payload: memoryview, hashes: tuple[int, ...]) -> bool:
    """Every block has its hash; a zero hash (a hole) takes any bytes, they are not used."""
    for index, expected in enumerate(hashes):
        block: Buffer = payload[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
        if expected and hash_of(block) != expected:
            return False
    return True
