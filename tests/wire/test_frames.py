"""Cutting streams into frames: any segmentation, bounded memory, payloads that stay as they were."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.exchanges import REQUESTS, RESPONSES

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.limits import MAX_ADMIN_PAYLOAD_BYTES, MAX_REQUEST_BYTES
from sheepdog.cluster.wire.frames import (
    RequestParser,
    ResponseParser,
    request_payload_length,
    response_payload_length,
)
from sheepdog.cluster.wire.header import OBJECT_REQUEST, REQUEST, ObjectRequest, Request
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.cluster.wire.streams import Arena, BufferPool, Intake

Frames = list[tuple[bytes, bytes]]


def take(parser: Intake) -> Frames:
    """The complete frames that wait, copied."""
    frames = []
    while (frame := parser.next()) is not None:
        header, body = frame
        frames.append((header, bytes(body)))
    return frames


def feed(parser: Intake, data: bytes) -> Frames:
    """Receives `data` in as many pieces as the parser makes of it."""
    frames = []
    rest = memoryview(data)
    while rest:
        space = parser.space()
        count = min(len(space), len(rest))
        assert count, "a parser must always have room"
        space[:count] = rest[:count]
        parser.fill(count)
        rest = rest[count:]
        frames += take(parser)
    return frames


def test_recorded_conversations() -> None:
    arena = Arena(BufferPool())
    for messages, parser in ((REQUESTS, RequestParser(arena)), (RESPONSES, ResponseParser(arena))):
        stream = b"".join(message.header + message.payload for message in messages)
        assert feed(parser, stream) == [(message.header, message.payload) for message in messages]
        assert not parser.unfinished


sizes = st.integers(0, 200) | st.sampled_from([4096, 16_384, 16_385, 70_000, 300_000])


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request of any opcode; one without WRITE has a length, but no payload."""
    size = draw(sizes)
    write = draw(st.booleans())
    flags = draw(st.integers(0, 0xFFFF)) & ~Flags.WRITE | (Flags.WRITE if write else 0)
    header = Request(draw(st.integers(0, 255)), draw(st.integers(0, 255)), flags, 0, draw(st.integers(0, 99)), size)
    seed = draw(st.binary(min_size=1, max_size=4))
    return REQUEST.pack(header), (seed * size)[:size] if write else b""


@settings(max_examples=60, deadline=None)
@given(st.lists(requests(), max_size=6), st.data())
def test_any_segmentation_gives_the_same_frames(messages: Frames, data: st.DataObject) -> None:
    stream = b"".join(header + payload for header, payload in messages)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    arena = Arena(BufferPool())
    parser, neighbour = RequestParser(arena), RequestParser(arena)
    frames = []
    for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames += feed(parser, stream[first:last])
        feed(neighbour, stream[:100])  # another connection uses the arena meanwhile
        neighbour = RequestParser(arena)
    assert frames == messages
    assert not parser.unfinished


def test_byte_by_byte() -> None:
    messages = REQUESTS[:6]
    parser = RequestParser(Arena(BufferPool()))
    stream = b"".join(message.header + message.payload for message in messages)[:70_000]
    frames = [frame for start in range(len(stream)) for frame in feed(parser, stream[start : start + 1])]
    assert frames == [(message.header, message.payload) for message in messages][: len(frames)]
    assert len(frames) >= 4


def test_payloads_keep_their_bytes_until_dropped() -> None:
    """Views are handed out, so a buffer must not be filled again while somebody still looks at it."""
    parser = RequestParser(Arena(BufferPool()))
    kept = []
    for number in range(300):
        size = (4096, 40_000)[number % 2]
        header = REQUEST.pack(Request(opcode=Opcode.WRITE_OBJ, flags=Flags.WRITE, id=number, data_length=size))
        stream = memoryview(header + bytes([number % 251]) * size)
        while stream:
            space = parser.space()
            count = min(len(space), len(stream), 10_000)
            space[:count] = stream[:count]
            parser.fill(count)
            stream = stream[count:]
            while (frame := parser.next()) is not None:
                kept.append(frame[1])
    assert len(kept) == 300
    for number, payload in enumerate(kept):
        assert bytes(payload) == bytes([number % 251]) * len(payload)


def test_buffers_are_used_again_once_dropped() -> None:
    parser = RequestParser(Arena(BufferPool()))
    stream = REQUEST.pack(Request(opcode=3, flags=Flags.WRITE, data_length=1 << 20)) + bytes(1 << 20)
    feed(parser, stream)
    tracemalloc.start()
    for _ in range(50):
        feed(parser, stream)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 << 20
    assert peak < 8 << 20


def test_write_flag_decides_not_the_opcode() -> None:
    for opcode in range(256):
        header = Request(opcode=opcode, data_length=1000)
        assert request_payload_length(REQUEST.pack(header)) == 0
        assert request_payload_length(REQUEST.pack(header._replace(flags=0xFFFF))) == 1000


def test_a_large_answer_may_be_asked_for() -> None:
    header = OBJECT_REQUEST.pack(ObjectRequest(opcode=Opcode.READ_OBJ, data_length=0xFFFFFFFF))
    assert feed(RequestParser(Arena(BufferPool())), header) == [(header, b"")]


@pytest.mark.parametrize(
    ("opcode", "limit"),
    [
        (Opcode.WRITE_OBJ, MAX_REQUEST_BYTES),
        (Opcode.CREATE_AND_WRITE_PEER, MAX_REQUEST_BYTES),
        (Opcode.NEW_VDI, MAX_ADMIN_PAYLOAD_BYTES),
        (0xFF, MAX_ADMIN_PAYLOAD_BYTES),
    ],
)
def test_too_long_requests_are_refused_by_their_header(opcode: int, limit: int) -> None:
    fits = Request(opcode=opcode, flags=Flags.WRITE, data_length=limit)
    assert request_payload_length(REQUEST.pack(fits)) == limit
    good = REQUEST.pack(Request(opcode=Opcode.GET_NODE_LIST))
    parser = RequestParser(Arena(BufferPool()))
    stream = good + REQUEST.pack(fits._replace(data_length=limit + 1))
    parser.space()[: len(stream)] = stream
    parser.fill(len(stream))
    frame = parser.next()  # what came before the fault is still delivered
    assert frame is not None
    with pytest.raises(PeerError):
        parser.next()


def test_too_long_responses_are_refused() -> None:
    assert response_payload_length(response(2, 0, 1, data_length=MAX_REQUEST_BYTES)) == MAX_REQUEST_BYTES
    with pytest.raises(PeerError):
        feed(ResponseParser(Arena(BufferPool())), response(2, 0, 1, data_length=MAX_REQUEST_BYTES + 1))


def test_a_header_alone_does_not_claim_its_payload() -> None:
    header = REQUEST.pack(Request(opcode=Opcode.WRITE_OBJ, flags=Flags.WRITE, data_length=MAX_REQUEST_BYTES))
    tracemalloc.start()
    parser = RequestParser(Arena(BufferPool()))
    assert feed(parser, header + bytes(1000)) == []
    assert parser.unfinished
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_growing_payload_arrives_whole() -> None:
    size = 12_587_576
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    header = REQUEST.pack(Request(opcode=Opcode.CREATE_AND_WRITE_OBJ, flags=Flags.WRITE, data_length=size))
    assert feed(RequestParser(Arena(BufferPool())), header + payload) == [(header, payload)]
