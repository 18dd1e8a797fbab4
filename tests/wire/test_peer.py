"""Frames between nodes: each field where the layout says, at the ends of its range; what cannot be one is refused."""

from __future__ import annotations

from struct import Struct

import pytest

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version
from sheepdog.cluster.core.messages import Kind, Message
from sheepdog.cluster.wire.peer import HEADER_SIZE, body_length, decode, decode_answers, encode, encode_answers

FIELDS = Struct("<BBBBH2xQQQIIIIQQQIIQQ")  # as the module's text lists them
BODY = bytes(range(7))
MESSAGES = [
    Message(Kind.STABLE, 0),
    Message(
        Kind.APPLY, 2**63, 2**64 - 1, ObjectId(2**64 - 1), 2**32 - 1, 2**32 - 1, 255,
        Version(2**32 - 1, 2**32 - 1, 2**64 - 1),
        2**64 - 2, 2**64 - 3, 255, 2**32 - 1, BODY, 2**64 - 4, 2**64 - 5, 2**16 - 1,
    ),
    Message(
        Kind.FETCH, 1, 2, ObjectId(4 << STRIP_SHIFT | 3), 5, 6, 7, Version(8, 9, 10), 11, 12, 13, 14, b"", 15, 16, 17
    ),
]  # fmt: skip


def fields(message: Message) -> tuple[object, ...]:
    return tuple(getattr(message, name) for name in Message.__slots__)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: Kind(message.kind).name)
def test_every_field_has_its_place(message: Message) -> None:
    frame = b"".join(encode(message))
    strip, plain = message.oid >> STRIP_SHIFT, message.oid & (1 << STRIP_SHIFT) - 1
    epoch, term, counter = message.version
    expected = FIELDS.pack(
        message.kind, message.flags, message.copies, strip, message.gateway, message.fence, message.rid, plain,
        message.offset, message.length, epoch, term, counter, message.sequence, message.watermark, message.result,
        len(message.payload()), message.origin, message.floor,
    )  # fmt: skip
    assert frame == expected + message.payload()
    assert body_length(b"x" + frame, 1) == len(message.payload())
    got = decode(b"x" + frame[:HEADER_SIZE], 1, frame[HEADER_SIZE:])
    assert fields(got) == fields(message)
    assert (got.version is NO_VERSION) == (message.version is NO_VERSION)


def test_answers_of_success_share_a_frame() -> None:
    rids = [1, 2**64 - 1, 3]
    frame = b"".join(encode_answers(9, rids))
    plain = decode(frame, 0, frame[HEADER_SIZE:])
    assert (plain.kind, plain.fence, body_length(frame)) == (Kind.ANSWERS, 9, 8 * len(rids))
    answers = decode_answers(b"x" + frame, 1, frame[HEADER_SIZE:])
    assert answers is not None
    assert [fields(answer) for answer in answers] == [fields(Message(Kind.ANSWER, 9, rid)) for rid in rids]
    assert decode_answers(b"".join(encode(MESSAGES[1])), 0, b"") is None
    with pytest.raises(PeerError, match="list of answers of 7 bytes"):
        decode_answers(frame, 0, bytes(7))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(PeerError, match="unknown kind"):
        decode(bytes([255]) + bytes(HEADER_SIZE - 1), 0, b"")
