"""Bytes of peer messages (our own protocol between sheep; clients never see it).

A link starts with a hello (42 bytes: magic, version, port, address, and port and address for traffic between nodes, 0
if that is the same), then carries frames in both directions:
a 96-byte little-endian header and `body_length` bytes. The magic's first byte is no protocol version
that a client could send, so peers and clients share one port.

header: u8 kind, u8 flags, u8 copies, u8 strip (0: a whole object, else number + 1), u16 gateway, u16 0,
        u64 fence, u64 rid, u64 oid, u32 offset, u32 length,
        u32 version.epoch, u32 version.term, u64 version.counter, u64 sequence, u64 watermark,
        u32 result, u32 body_length, u64 origin, u64 floor

An ANSWER that says no more than that its request succeeded waits for the next ones of the same turn: they go together,
as the ids of their requests (u64 each) in the body of one ANSWERS frame.
Most of the work for an answer is its frame, at both ends.
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import Final, NamedTuple

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, NodeId, ObjectId, make_version
from sheepdog.cluster.core.limits import MAX_PEER_BODY_BYTES
from sheepdog.cluster.core.messages import Buffer, Kind, Message
from sheepdog.cluster.wire.streams import Arena, Intake

PEER_MAGIC: Final = b"\xf5SHP"
PEER_VERSION: Final = 6
HELLO: Final = Struct("<4sHH16sH16s")
HEADER: Final = Struct("<BBBBH2xQQQIIIIQQQIIQQ")
_ANSWERS_HEADER: Final = Struct("<B7xQ60xI16x")  # the same without what is 0
HEADER_SIZE: Final = HEADER.size
_pack_header: Final = HEADER.pack  # looked up once, not for each frame
_unpack_header: Final = HEADER.unpack_from
_unpack_length: Final = Struct("<76xI").unpack_from  # body_length alone
_OID_MASK: Final = (1 << STRIP_SHIFT) - 1
_KINDS: Final = frozenset(int(kind) for kind in Kind)
_ANSWER: Final = int(Kind.ANSWER)
_ANSWERS: Final = int(Kind.ANSWERS)
RID_SIZE: Final = 8


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


def encode(message: Message) -> list[Buffer]:
    """The buffers of one frame, header first; the body is not copied."""
    body = message.body
    length = sum(map(len, body)) if isinstance(body, list) else len(body)
    version = message.version
    oid = message.oid
    strip = oid >> STRIP_SHIFT
    header = _pack_header(
        message.kind,
        message.flags,
        message.copies,
        strip,
        message.gateway,
        message.fence,
        message.rid,
        oid & _OID_MASK if strip else oid,
        message.offset,
        message.length,
        version[0],
        version[1],
        version[2],
        message.sequence,
        message.watermark,
        message.result,
        length,
        message.origin,
        message.floor,
    )
    if not length:
        return [header]
    return [header, *body] if isinstance(body, list) else [header, body]


def is_success_only(message: Message) -> bool:
    """An answer that `encode_answers` can tell."""
    return message.kind == _ANSWER and not (
        message.result or message.flags or message.length or message.body or message.version is not NO_VERSION
    )


def encode_answers(fence: int, rids: list[int]) -> list[Buffer]:
    """The buffers of one frame that says that these requests succeeded."""
    return [
        _ANSWERS_HEADER.pack(_ANSWERS, fence, len(rids) * RID_SIZE),
        array("Q", rids).tobytes(),
    ]


def decode_answers(buffer: Buffer, start: int, body: Buffer) -> list[Message] | None:
    """The ANSWERs that the frame with its header at `start` stands for; None for another kind of frame. PeerError."""
    if buffer[start] != _ANSWERS:
        return None
    if len(body) % RID_SIZE:
        raise PeerError(f"list of answers of {len(body)} bytes")
    _, fence, _ = _ANSWERS_HEADER.unpack_from(buffer, start)
    rids: list[int] = memoryview(body).cast("Q").tolist()
    return [Message(_ANSWER, fence, rid) for rid in rids]


def body_length(buffer: Buffer, start: int = 0) -> int:
    """Length of the body that follows the header at `start`; PeerError if it cannot be."""
    length: int = _unpack_length(buffer, start)[0]
    if length > MAX_PEER_BODY_BYTES:
        raise PeerError(f"peer message of {length} bytes")
    return length


class PeerIntake(Intake):
    """What a link receives, cut into frames."""

    __slots__ = ()

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena, HEADER_SIZE, body_length)

    def length_at(self, buffer: Buffer, start: int) -> int:
        return body_length(buffer, start)


def decode(buffer: Buffer, start: int, body: Buffer) -> Message:
    """The message whose header is at `start`; `body` is kept, not copied. PeerError for an unknown kind."""
    (
        kind,
        flags,
        copies,
        strip,
        gateway,
        fence,
        rid,
        oid,
        offset,
        length,
        version_epoch,
        term,
        counter,
        sequence,
        watermark,
        result,
        _,
        origin,
        floor,
    ) = _unpack_header(buffer, start)
    if kind not in _KINDS:
        raise PeerError(f"unknown kind of peer message: {kind}")
    return Message(
        kind,
        fence,
        rid,
        ObjectId(oid | strip << STRIP_SHIFT) if strip else oid,
        offset,
        length,
        flags,
        make_version(version_epoch, term, counter) if counter or version_epoch or term else NO_VERSION,
        sequence,
        watermark,
        copies,
        result,
        body,
        origin,
        floor,
        gateway,
    )
