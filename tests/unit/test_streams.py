"""Frames out of any chunking, receive buffers never used again too early, output that survives partial sends."""

from __future__ import annotations

import random
from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.streams import (
    ARENA_BYTES,
    BODY_STEP_BYTES,
    DIRECT_BODY_BYTES,
    IOV_MAX,
    LARGE_BODY_BYTES,
    MIN_RECEIVE_BYTES,
    Arena,
    BufferPool,
    Intake,
    Outbox,
    unpinned,
)

HEADER = Struct("<4sII")  # a mark, a number, the body's length


def length_of(header: bytes) -> int:
    mark, _, length = HEADER.unpack(header)
    if mark != b"head":
        raise PeerError("no header")
    return int(length)


def frame(number: int, length: int) -> bytes:
    return HEADER.pack(b"head", number, length) + random.Random(number).randbytes(length)


def new_intake(arena: Arena) -> Intake:
    return Intake(arena, HEADER.size, length_of)


def receive(intake: Intake, stream: memoryview) -> int:
    """What a socket does: as much as fits."""
    space = intake.space()
    count = min(len(space), len(stream))
    space[:count] = stream[:count]
    if count:
        intake.fill(count)
    return count


def take_all(intake: Intake) -> list[tuple[int, Buffer]]:
    frames = []
    while (taken := intake.next()) is not None:
        header, body = taken
        _, number, length = HEADER.unpack(header)
        assert len(body) == length
        frames.append((number, body))
    return frames


LENGTHS = st.one_of(
    st.integers(0, 100),
    st.integers(DIRECT_BODY_BYTES - 20, DIRECT_BODY_BYTES + 20),
    st.integers(MIN_RECEIVE_BYTES, ARENA_BYTES + 100),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(LENGTHS, max_size=20), min_size=1, max_size=3),
    st.lists(st.one_of(st.integers(1, 100), st.integers(1, 2 * ARENA_BYTES)), min_size=1, max_size=30),
)
def test_any_chunking_on_connections_that_share_an_arena(lengths: list[list[int]], chunks: list[int]) -> None:
    arena = Arena(BufferPool())
    intakes = [new_intake(arena) for _ in lengths]
    streams = [memoryview(b"".join(frame(n, length) for n, length in enumerate(of_one))) for of_one in lengths]
    got: list[list[tuple[int, Buffer]]] = [[] for _ in lengths]
    turn = 0
    while any(streams):
        for index, intake in enumerate(intakes):
            chunk = chunks[turn % len(chunks)]
            turn += 1
            intake.space()  # a receive that found nothing must not harm
            count = receive(intake, streams[index][:chunk]) if streams[index] else 0
            if count:
                streams[index] = streams[index][count:]
                got[index] += take_all(intake)
    for of_one, frames in zip(lengths, got, strict=True):
        # Bodies were kept all the time: what came later must not have overwritten them.
        assert [bytes(body) for _, body in frames] == [frame(n, size)[HEADER.size :] for n, size in enumerate(of_one)]
        assert [number for number, _ in frames] == list(range(len(of_one)))
    assert not any(intake.unfinished for intake in intakes)


def test_frames_not_taken_wait_while_others_receive() -> None:
    arena = Arena(BufferPool())
    paused, busy = new_intake(arena), new_intake(arena)
    stream = b"".join(frame(n, 1000) for n in range(20))
    assert receive(paused, memoryview(stream)) == len(stream)
    assert paused.next() is not None
    for number in range(200):
        data = memoryview(frame(number, 9000))
        assert receive(busy, data) == len(data)
        assert len(take_all(busy)) == 1
    assert paused.unfinished
    assert [bytes(body) for _, body in take_all(paused)] == [frame(n, 1000)[HEADER.size :] for n in range(1, 20)]


def test_a_long_body_grows_with_its_bytes() -> None:
    pool = BufferPool()
    intake = new_intake(Arena(pool))
    length = BODY_STEP_BYTES + 3_000_000
    data = memoryview(frame(7, length))
    receive(intake, data[: HEADER.size + 10])
    assert take_all(intake) == []
    assert len(intake.space()) <= BODY_STEP_BYTES  # the header alone claims no more
    done = HEADER.size + 10
    while done < len(data):
        done += receive(intake, data[done:])
    ((number, body),) = take_all(intake)
    assert number == 7
    assert body == data[HEADER.size :]


def test_the_header_behind_a_large_frame_comes_alone() -> None:
    """So the body goes straight where it stays; behind a small frame as much is received as there is."""
    intake = new_intake(Arena(BufferPool()))
    lengths = [ARENA_BYTES, LARGE_BODY_BYTES, 100, DIRECT_BODY_BYTES + 1, 0]
    stream = memoryview(b"".join(frame(number, length) for number, length in enumerate(lengths)))
    received: list[int] = []
    found: list[tuple[int, Buffer]] = []
    while stream:
        count = receive(intake, stream)
        stream = stream[count:]
        received.append(count)
        found += take_all(intake)
    assert [(number, len(body)) for number, body in found] == list(enumerate(lengths))
    assert all(bytes(body) == frame(number, len(body))[HEADER.size :] for number, body in found)
    head = HEADER.size
    behind = 100 + head + DIRECT_BODY_BYTES + 1 + head  # all the rest at once
    assert received == [ARENA_BYTES, head, head, LARGE_BODY_BYTES, head, behind]


def test_a_broken_header_is_told() -> None:
    intake = new_intake(Arena(BufferPool()))
    receive(intake, memoryview(frame(1, 5) + b"x" * HEADER.size))
    assert intake.next() is not None
    with pytest.raises(PeerError):
        intake.next()


def test_buffers_are_used_again_only_when_nobody_looks() -> None:
    pool = BufferPool()
    first = pool.take(1000)
    part = first[10:20]
    memory = first.obj
    del first
    second = pool.take(1000)
    assert second.obj is not memory  # `part` still looks at it
    del part
    assert pool.take(1000).obj is memory
    assert not unpinned(second.obj)  # type: ignore[arg-type]


def test_the_buffer_used_last_is_the_next() -> None:
    """What the processor's cache may still have; not the next of all that were ever needed at once."""
    pool = BufferPool()
    views = [pool.take(1000) for _ in range(8)]
    memory = views[-1].obj
    views.clear()
    for _ in range(20):
        assert pool.take(1000).obj is memory


def test_an_arena_is_its_own_successor_when_all_was_handled() -> None:
    arena = Arena(BufferPool())
    intake = new_intake(arena)
    memory = arena.view.obj
    data = memoryview(b"".join(frame(n, 4096) for n in range(16)))
    for _ in range(100):
        receive(intake, data)
        assert len(take_all(intake)) == 16
    assert arena.view.obj is memory


def test_a_pool_forgets_sizes_out_of_use() -> None:
    pool = BufferPool(retained_bytes=4 << 20)
    pool.take(4 << 20)
    small = pool.take(1 << 20)
    memory = small.obj
    del small
    assert pool.take(1 << 20).obj is memory


class FullSocket:
    """Takes as many bytes a call as it is told, then is full."""

    def __init__(self, room: list[int]) -> None:
        self.room = room
        self.taken = bytearray()

    def sendmsg(self, buffers: list[Buffer]) -> int:
        assert 0 < len(buffers) <= IOV_MAX
        if not self.room:
            raise BlockingIOError
        data = b"".join(buffers)[: self.room.pop(0)]
        self.taken += data
        return len(data)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.binary(max_size=30), max_size=4), max_size=30),
    st.lists(st.lists(st.integers(1, 200), max_size=3), max_size=30),
)
def test_output_keeps_its_order_over_partial_sends(added: list[list[bytes]], rooms: list[list[int]]) -> None:
    outbox = Outbox()
    taken = b""
    for index, buffers in enumerate(added):
        outbox.add(list(buffers))
        sock = FullSocket(list(rooms[index]) if index < len(rooms) else [])
        outbox.send(sock.sendmsg)
        taken += sock.taken
    last = FullSocket([1 << 20] * 10)
    assert outbox.send(last.sendmsg)
    assert taken + last.taken == b"".join(part for buffers in added for part in buffers)
    assert outbox.size == 0


def test_more_buffers_than_one_call_takes() -> None:
    outbox = Outbox()
    for number in range(3 * IOV_MAX):
        outbox.add([b"%05d" % number])
    sock = FullSocket([7, 10_000, 1 << 20, 1 << 20, 1 << 20])
    assert outbox.send(sock.sendmsg)
    assert bytes(sock.taken) == b"".join(b"%05d" % number for number in range(3 * IOV_MAX))
