"""Frames between nodes: each field where the layout says, at the ends of its range; what cannot be one is refused."""

from __future__ import annotations

from struct import Struct

import pytest

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version
from sheepdog.cluster.core.limits import MAX_PEER_BODY_BYTES
from sheepdog.cluster.core.messages import Buffer, Kind, Message
from sheepdog.cluster.wire.peer import (
    HEADER_SIZE,
    body_length,
    decode,
    decode_answers,
    decode_applied,
    encode,
    encode_answers,
    encode_applied,
    encoded,
    fence_of,
)
from sheepdog.cluster.wire.streams import Outbox

FIELDS = Struct("<BBBBIqqQqqiiqqqiiqq")  # as the module's text lists them
BODY = bytes(range(7))
MESSAGES = [
    Message(Kind.STABLE, 0),
    Message(
        Kind.APPLY, 2**62, 2**63 - 1, ObjectId(2**64 - 1), 2**63 - 1, 2**63 - 1, 255,
        Version(2**31 - 1, 2**31 - 1, 2**63 - 1),
        2**63 - 2, 2**63 - 3, 255, 2**31 - 1, BODY, 2**63 - 4, 2**63 - 5, 2**31 - 1,
    ),
    Message(
        Kind.FETCH, 1, 2, ObjectId(4 << STRIP_SHIFT | 3), 5, 6, 7, Version(8, 9, 10), 11, 12, 13, 14, b"", 15, 16, 17
    ),
]  # fmt: skip


def fields(message: Message) -> tuple[object, ...]:
    return tuple(getattr(message, name) for name in Message.__slots__)


def queued(message: Message) -> bytes:
    """What a link sends."""
    outbox, sent = Outbox(), bytearray()

    def sendmsg(buffers: list[Buffer]) -> int:
        sent.extend(b"".join(buffers))
        return len(sent)

    encode(message, outbox)
    assert outbox.send(sendmsg)
    return bytes(sent)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: Kind(message.kind).name)
def test_every_field_has_its_place(message: Message) -> None:
    frame = encoded(message)
    assert queued(message) == frame
    strip, plain = message.oid >> STRIP_SHIFT, message.oid & (1 << STRIP_SHIFT) - 1
    epoch, term, counter = message.version
    expected = FIELDS.pack(
        message.kind, message.flags, message.copies, strip, len(message.payload()), message.fence, message.rid, plain,
        message.offset, message.length, epoch, term, counter, message.sequence, message.watermark, message.result,
        message.gateway, message.origin, message.floor,
    )  # fmt: skip
    assert frame == expected + message.payload()
    header, body = frame[:HEADER_SIZE], frame[HEADER_SIZE:]
    assert (body_length(header), fence_of(header)) == (len(body), message.fence)
    got = decode(header, body)
    assert fields(got) == fields(message)
    assert (got.version is NO_VERSION) == (message.version is NO_VERSION)


def test_a_body_in_parts_leaves_as_one() -> None:
    whole, parts = Message(Kind.ANSWER, 1, body=BODY), Message(Kind.ANSWER, 1, body=[BODY[:3], b"", BODY[3:]])
    assert encoded(parts) == queued(parts) == encoded(whole)


def test_answers_of_success_share_a_frame() -> None:
    rids = [1, 2**63 - 1, 3]
    frame = encode_answers(9, rids)
    header, body = frame[:HEADER_SIZE], frame[HEADER_SIZE:]
    assert fields(decode(header, b"")) == fields(Message(Kind.ANSWERS, 9))
    assert body_length(header) == len(body)
    assert decode_answers(memoryview(body)) == rids
    with pytest.raises(PeerError, match="list of answers of 7 bytes"):
        decode_answers(bytes(7))


def test_applied_writes_share_a_frame() -> None:
    writes = [1, 2**63 - 1, 3, 4]
    frame = encode_applied(9, writes)
    header, body = frame[:HEADER_SIZE], frame[HEADER_SIZE:]
    assert fields(decode(header, b"")) == fields(Message(Kind.APPLIED, 9))
    assert decode_applied(memoryview(body)) == writes
    with pytest.raises(PeerError, match="list of answers of 24 bytes"):
        decode_applied(bytes(24))


@pytest.mark.parametrize("kind", range(256))
def test_an_unknown_kind_is_refused(kind: int) -> None:
    header = bytes([kind]) + bytes(HEADER_SIZE - 1)
    if kind in set(Kind):
        assert decode(header, b"").kind == kind
    else:
        with pytest.raises(PeerError, match="unknown kind"):
            decode(header, b"")


@pytest.mark.parametrize("place", [32, 40], ids=["offset", "length"])
def test_a_range_before_the_object_is_refused(place: int) -> None:
    header = bytearray(HEADER_SIZE)
    header[0] = Kind.READ
    header[place : place + 8] = (-1).to_bytes(8, "little", signed=True)
    with pytest.raises(PeerError, match="range"):
        decode(bytes(header), b"")


def test_a_body_may_be_as_long_as_the_largest_object() -> None:
    header = bytearray(HEADER_SIZE)
    header[4:8] = MAX_PEER_BODY_BYTES.to_bytes(4, "little")
    assert body_length(bytes(header)) == MAX_PEER_BODY_BYTES
    header[4] += 1
    with pytest.raises(PeerError, match="bytes"):
        body_length(bytes(header))
