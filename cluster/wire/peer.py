"""Bytes of peer messages (our own protocol between sheep; clients never see it).

A link starts with a hello (42 bytes: magic, version, port, address, and port and address for traffic between nodes, 0
if that is the same), then carries frames in both directions:
a 104-byte little-endian header and `body_length` bytes. The magic's first byte is no protocol version
that a client could send, so peers and clients share one port.

header: u8 kind, u8 flags, u8 copies, u8 strip (0: a whole object, else number + 1), u32 body_length,
        i64 fence, i64 rid, u64 oid, i64 offset, i64 length,
        i32 version.epoch, i32 version.term, i64 version.counter, i64 sequence, i64 watermark,
        i32 result, i32 gateway, i64 origin, i64 floor

What is signed is never negative. Compiled code has such numbers at hand, where `struct` makes an object of each.

An ANSWER that says no more than that its request succeeded waits for the next ones of the same turn: they go together,
as the ids of their requests (i64 each) in the body of one ANSWERS frame. The APPLIED of one turn share a frame, too,
with origin and sequence of each (i64) in its body.
Most of the work for an answer is its frame, at both ends.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from librt.strings import BytesWriter, read_i32_le, read_i64_le, write_i32_le, write_i64_le

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, NodeId, ObjectId, make_version
from sheepdog.cluster.core.limits import MAX_PEER_BODY_BYTES
from sheepdog.cluster.core.messages import PEER_VERSION, Buffer, Kind, Message
from sheepdog.cluster.core.words import read_u32, read_u64, write_u32, write_u64
from sheepdog.cluster.wire.streams import Arena, Intake, Outbox

PEER_MAGIC: Final = b"\xf5SHP"
HELLO: Final = Struct("<4sHH16sH16s")
HEADER_SIZE: Final = 104
_AFTER_FENCE: Final = bytes(HEADER_SIZE - 16)  # of a header that says no more
_OID_MASK: Final = (1 << STRIP_SHIFT) - 1
_IS_KIND: Final = bytes(int(number in set(Kind)) for number in range(256))
_ANSWERS: Final = int(Kind.ANSWERS)
_APPLIED: Final = int(Kind.APPLIED)
NUMBER_SIZE: Final = 8


class Hello(NamedTuple):
    """Who is at the other end, and where else it may be reached for the traffic between nodes (`sheep -i`)."""

    node: NodeId
    io: NodeId | None = None


def encode_hello(hello: Hello) -> bytes:
    node, io = hello
    return HELLO.pack(PEER_MAGIC, PEER_VERSION, node.port, node.address, *((io.port, io.address) if io else (0, b"")))


def decode_hello(data: Buffer) -> Hello:
    """PeerError for anything but a hello of our version."""
    if len(data) != HELLO.size:
        raise PeerError("short hello")
    magic, version, port, address, io_port, io_address = HELLO.unpack(data)
    if magic != PEER_MAGIC:
        raise PeerError("not a peer")
    if version != PEER_VERSION:
        raise PeerError(f"peer speaks version {version} of the peer protocol, this node {PEER_VERSION}")
    return Hello(NodeId(address, port), NodeId(io_address, io_port) if io_port else None)


def encode(message: Message, outbox: Outbox) -> None:
    """Adds the buffers of one frame, header first; the body is not copied."""
    body = message.body
    if isinstance(body, list):
        outbox.put(_encode_header(message, sum(map(len, body))))
        outbox.add(body)
    else:
        length = len(body)
        outbox.put(_encode_header(message, length))
        if length:
            outbox.put(body)


def encoded(message: Message) -> bytes:
    """One frame as bytes."""
    body = message.body
    whole = b"".join(body) if isinstance(body, list) else bytes(body)
    return _encode_header(message, len(whole)) + whole


def _encode_header(message: Message, length: int) -> bytes:
    """`length`: of the body."""
    version = message.version
    oid = message.oid
    strip = oid >> STRIP_SHIFT
    header = BytesWriter()
    header.append(message.kind)
    header.append(message.flags)
    header.append(message.copies)
    header.append(strip)
    write_u32(header, length)
    write_i64_le(header, message.fence)
    write_i64_le(header, message.rid)
    write_u64(header, oid & _OID_MASK if strip else oid)
    write_i64_le(header, message.offset)
    write_i64_le(header, message.length)
    write_i32_le(header, version[0])
    write_i32_le(header, version[1])
    write_i64_le(header, version[2])
    write_i64_le(header, message.sequence)
    write_i64_le(header, message.watermark)
    write_i32_le(header, message.result)
    write_i32_le(header, message.gateway)
    write_i64_le(header, message.origin)
    write_i64_le(header, message.floor)
    return header.getvalue()


def encode_answers(fence: int, rids: list[int]) -> bytes:
    """One frame that says that these requests succeeded."""
    return _encode_numbers(_ANSWERS, fence, rids)


def encode_applied(fence: int, writes: list[int]) -> bytes:
    """One frame with several APPLIED: origin and sequence, in turns."""
    return _encode_numbers(_APPLIED, fence, writes)


def _encode_numbers(kind: int, fence: int, numbers: list[int]) -> bytes:
    frame = BytesWriter()
    write_i32_le(frame, kind)  # no flags, copies or strip
    write_i32_le(frame, len(numbers) * NUMBER_SIZE)
    write_i64_le(frame, fence)
    frame.write(_AFTER_FENCE)
    for number in numbers:
        write_i64_le(frame, number)
    return frame.getvalue()


def fence_of(header: bytes) -> int:
    return read_i64_le(header, 8)


def decode_answers(body: Buffer) -> list[int]:
    """The requests that an ANSWERS frame with this body says have succeeded. PeerError."""
    return _decode_numbers(body, NUMBER_SIZE)


def decode_applied(body: Buffer) -> list[int]:
    """What was given to `encode_applied`. PeerError."""
    return _decode_numbers(body, 2 * NUMBER_SIZE)


def _decode_numbers(body: Buffer, unit: int) -> list[int]:
    if len(body) % unit:
        raise PeerError(f"list of answers of {len(body)} bytes")
    data = bytes(body)
    return [read_i64_le(data, start) for start in range(0, len(data), NUMBER_SIZE)]


def body_length(header: bytes) -> int:
    """Length of the body that follows the header; PeerError if it cannot be."""
    length = read_u32(header, 4)
    if length > MAX_PEER_BODY_BYTES:
        raise PeerError(f"peer message of {length} bytes")
    return length


class PeerIntake(Intake):
    """What a link receives, cut into frames."""

    __slots__ = ()

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena, HEADER_SIZE, body_length)

    def length_of(self, header: bytes) -> int:
        return body_length(header)


def decode(header: bytes, body: Buffer) -> Message:
    """The message of one frame; `body` is kept, not copied. PeerError for an unknown kind or an impossible range."""
    kind = header[0]
    if not _IS_KIND[kind]:
        raise PeerError(f"unknown kind of peer message: {kind}")
    strip = header[3]
    oid = read_u64(header, 24)
    offset = read_i64_le(header, 32)
    length = read_i64_le(header, 40)
    if offset < 0 or length < 0:
        raise PeerError(f"peer message of a range {offset}+{length}")
    epoch = read_i32_le(header, 48)
    term = read_i32_le(header, 52)
    counter = read_i64_le(header, 56)
    return Message(
        kind,
        read_i64_le(header, 8),
        read_i64_le(header, 16),
        ObjectId(oid | strip << STRIP_SHIFT if strip else oid),
        offset,
        length,
        header[1],
        make_version(epoch, term, counter) if counter or epoch or term else NO_VERSION,
        read_i64_le(header, 64),
        read_i64_le(header, 72),
        header[2],
        read_i32_le(header, 80),
        body,
        read_i64_le(header, 88),
        read_i64_le(header, 96),
        read_i32_le(header, 84),
    )
