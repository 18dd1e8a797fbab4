"""Byte streams without their sockets: frames out of what arrives, few system calls for what leaves.

`Intake` cuts a stream into frames (a header of fixed size and a body whose length the header tells), `Outbox` keeps
what waits to be sent. Both belong to one connection; all connections of a process share one `Arena`.

Bytes are received into large shared buffers and handed on as memoryviews of them, uncopied. A buffer is used again only
when nothing refers to it any more: a bytearray refuses to be resized while a memoryview of it lives, so asking it to
shrink and grow by one byte tells. A consumer may keep a body as long as it likes and need not say when it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import Final, TypeAlias

from sheepdog.cluster.core.messages import Buffer

ARENA_BYTES: Final = 256 * 1024  # one receive buffer: fits the processor's second-level cache, takes 60 writes of 4 KiB
MIN_RECEIVE_BYTES: Final = 64 * 1024  # less room than this is not worth a system call: go on in another buffer
DIRECT_BODY_BYTES: Final = 16 * 1024  # larger unfinished bodies get a buffer of their own and are never copied again
# Behind one of these mostly comes another: copying what a receive brings of its body costs more than another call.
LARGE_BODY_BYTES: Final = ARENA_BYTES // 2
BODY_STEP_BYTES: Final = 4 << 20  # memory a header alone can claim; what is longer grows as its bytes arrive
RETAINED_BYTES: Final = 64 << 20  # buffers remembered for another use: the bodies that a busy node has under way
RECYCLE_TRIES: Final = 4  # remembered buffers looked at before a new one is made: the last one, then the oldest
IOV_MAX: Final = 1024  # buffers one sendmsg takes (Linux)
_EMPTY: Final = memoryview(b"")

Frame: TypeAlias = tuple[bytes, Buffer]
"""(header, body)."""
BodyLength: TypeAlias = Callable[[bytes], int]
"""Length of the body that follows this header; PeerError when it cannot be."""


def unpinned(buffer: bytearray) -> bool:
    """True when no memoryview of the (non-empty) buffer lives."""
    try:
        buffer.pop()
    except BufferError:
        return False
    buffer.append(0)  # stays within the allocation: no copy
    return True


class BufferPool:
    """Buffers that are used again once nobody looks at them. Sizes are rounded up to powers of two."""

    def __init__(self, retained_bytes: int = RETAINED_BYTES) -> None:
        self._lent: dict[int, deque[bytearray]] = {}
        self._room = retained_bytes

    def take(self, size: int) -> memoryview:
        """A buffer of at least `size` bytes with undefined contents; it is free again when all its views are gone."""
        size = 1 << max(size - 1, 1).bit_length()
        lent = self._lent.get(size)
        if lent is None:
            lent = self._lent[size] = deque()
        if lent and unpinned(lent[-1]):  # the last one: the processor's cache may still have it
            return memoryview(lent[-1])
        for _ in range(min(RECYCLE_TRIES, len(lent))):
            buffer = lent[0]
            lent.rotate(-1)
            if unpinned(buffer):
                return memoryview(buffer)
        if self._room < size:
            self._forget_other_sizes(size)
        buffer = bytearray(size)
        if self._room >= size:
            self._room -= size
            lent.append(buffer)
        return memoryview(buffer)

    def _forget_other_sizes(self, wanted: int) -> None:
        """The load has changed: what other sizes no longer need makes room."""
        for size, lent in self._lent.items():
            for _ in range(len(lent)):
                if self._room >= wanted:
                    return
                if size == wanted or not unpinned(lent[0]):
                    break
                lent.popleft()
                self._room += size


class Arena:
    """The receive buffer that all connections of a process fill one after the other."""

    def __init__(self, pool: BufferPool) -> None:
        self.pool = pool
        self.view = pool.take(ARENA_BYTES)
        self.position = 0  # everything before it is handed out

    def reserve(self, size: int) -> None:
        """Makes room for `size` bytes that are kept and a worthwhile receive after them."""
        if len(self.view) - self.position < size + MIN_RECEIVE_BYTES:
            self.view = _EMPTY  # if nobody else looks at it, the same buffer comes back
            self.view = self.pool.take(ARENA_BYTES)
            self.position = 0


class Intake:
    """Cuts the bytes of one connection into frames.

    Use: receive into `space()`, tell `fill(count)`, take frames from `next()` until it gives None. After None, an
    unfinished frame waits in memory of its own; frames not taken yet stay where they are and
    forbid the next `space()`.
    """

    __slots__ = (
        "_arena",
        "_body",
        "_body_length",
        "_end",
        "_have",
        "_head",
        "_header_size",
        "_large",
        "_length",
        "_rest",
        "_start",
        "_take_header",
        "_view",
    )

    def __init__(self, arena: Arena, header_size: int, body_length: BodyLength) -> None:
        self._arena = arena
        self._header_size = header_size
        self._body_length = body_length
        self._take_header = Struct(f"{header_size}s").unpack_from  # half the work of bytes(view[start:end])
        self._view: memoryview = _EMPTY  # received and not taken: view[start:end]
        self._start = 0
        self._end = 0
        self._rest = b""  # of an unfinished small frame
        self._head = b""  # header of an unfinished large frame ...
        self._body: memoryview | None = None  # ... its body ...
        self._length = 0  # ... which will have this length ...
        self._have = 0  # ... and has this many bytes
        self._large = False  # the last frame was: the next header comes alone, its body goes where it stays

    @property
    def unfinished(self) -> bool:
        """A frame has begun and not ended."""
        return bool(self._rest) or self._body is not None or self._end > self._start

    def space(self) -> memoryview:
        """Where to receive next; valid until any other connection asks for space."""
        body = self._body
        if body is not None:
            if self._have == len(body):
                body = self._grow()
            return body[self._have : self._length]
        arena = self._arena
        size = len(self._rest)
        arena.reserve(size)
        start = arena.position + size
        return arena.view[start : start + self._header_size] if self._large else arena.view[start:]

    def fill(self, count: int) -> None:
        """`count` bytes (at least one) were received into `space()`."""
        if self._body is not None:
            self._have += count
            return
        self._large = False
        arena = self._arena
        self._view = view = arena.view
        self._start = start = arena.position
        rest = self._rest
        if rest:
            count += len(rest)
            view[start : start + len(rest)] = rest
            self._rest = b""
        self._end = arena.position = start + count

    def length_of(self, header: bytes) -> int:
        """As `body_length`; a method that is replaced costs a compiled caller a fifth of a function that is kept."""
        return self._body_length(header)

    def next(self) -> Frame | None:
        """The next complete frame, or None. PeerError (of `body_length`): the stream is broken, nothing can follow."""
        body = self._body
        if body is not None:
            if self._have < self._length:
                return None
            self._body = None
            self._large = self._length >= LARGE_BODY_BYTES
            return self._head, body[: self._length]
        start = self._start
        view = self._view
        body_at = start + self._header_size
        if body_at <= self._end:
            header: bytes = self._take_header(view, start)[0]
            length = self.length_of(header)
            end = body_at + length
            if end <= self._end:
                self._start = end
                return header, view[body_at:end] if length else b""
            if length > DIRECT_BODY_BYTES:
                self._begin_body(header, length, body_at)
                return None
        if start < self._end:
            self._rest = bytes(view[start : self._end])
        self._forget()
        return None

    def _begin_body(self, header: bytes, length: int, body_at: int) -> None:
        have = self._end - body_at
        body = self._arena.pool.take(max(min(length, BODY_STEP_BYTES), have))
        body[:have] = self._view[body_at : self._end]
        self._head = header
        self._body = body
        self._length = length
        self._have = have
        self._forget()

    def _grow(self) -> memoryview:
        """The body is longer than its buffer: twice the size, at most what is needed."""
        assert self._body is not None
        grown = self._arena.pool.take(min(2 * self._have, self._length))
        grown[: self._have] = self._body[: self._have]
        self._body = grown
        return grown

    def _forget(self) -> None:
        self._view = _EMPTY
        self._start = self._end = 0


class Outbox:
    """What waits to be sent on one connection, in order; buffers are kept until the kernel has taken them."""

    __slots__ = ("_buffers", "size")

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self.size = 0  # bytes

    def add(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            self.put(buffer)

    def put(self, buffer: Buffer) -> None:
        """As `add` of one."""
        self._buffers.append(buffer)
        self.size += len(buffer)

    def send(self, sendmsg: Callable[[list[Buffer]], int]) -> bool:
        """Sends until nothing is left (True) or the socket is full (False). OSError: the connection is broken."""
        buffers = self._buffers
        first = 0
        try:
            while first < len(buffers):
                whole = not first and len(buffers) <= IOV_MAX
                sent = sendmsg(buffers if whole else buffers[first : first + IOV_MAX])
                self.size -= sent
                first = self._taken(first, sent) if self.size else len(buffers)
        except (BlockingIOError, InterruptedError):
            pass
        if first == len(buffers):
            self._buffers = []
            return True
        del buffers[:first]
        return False

    def _taken(self, first: int, sent: int) -> int:
        """The kernel took `sent` bytes from buffer `first` on: the first buffer that still has some."""
        buffers = self._buffers
        while sent:
            length = len(buffers[first])
            if sent < length:
                buffers[first] = memoryview(buffers[first])[sent:]
                break
            sent -= length
            first += 1
        return first
