"""Copies of large objects, piece by piece: copy on write, and moves to another redundancy (core.moves)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home_writes import IoDone
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES, COPY_PARALLEL
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.script import Script, Step, gather, run

if TYPE_CHECKING:
    from sheepdog.cluster.core.gateway import Gateway
    from sheepdog.cluster.core.router import Router


def copy_large(
    gateway: Gateway, oid: ObjectId, source: ObjectId, size: int, offset: int, data: Buffer, flags: int, done: IoDone
) -> None:
    """Makes `oid` a copy of `source` with `data` laid over it; `flags` as of the SUBMIT that would create it."""
    script = copied_in_pieces(gateway.router, oid, source, flags & ~Flag.CREATE, size)
    run(script, _copied(gateway, oid, offset, data, flags, done))


def copied_in_pieces(router: Router, oid: ObjectId, source: ObjectId, flags: int, size: int) -> Script[int]:
    """Makes `oid` anew, a copy of `source`; `flags` of each change.

    A large object is not held in memory as a whole. Nobody reads the copy before it is answered and named, so what is
    there of it is left from a copy that was interrupted.
    """
    for flag, length in ((Flag.REMOVE, 0), (Flag.CREATE, size)):
        result, _ = yield _change(router, oid, flags | flag, 0, length)
        if result:
            return int(result)
    starts = range(0, size, COPY_CHUNK_BYTES)
    steps = [_copying(router, oid, source, flags, start, min(COPY_CHUNK_BYTES, size - start)) for start in starts]
    results: list[int] = yield gather(steps, COPY_PARALLEL)
    return next((result for result in results if result), int(Result.SUCCESS))


def _copying(router: Router, oid: ObjectId, source: ObjectId, flags: int, start: int, length: int) -> Step:
    return lambda done: run(_copy_piece(router, oid, source, flags, start, length), done)


def _copy_piece(router: Router, oid: ObjectId, source: ObjectId, flags: int, start: int, length: int) -> Script[int]:
    result, piece = yield lambda done: router.read(source, start, length, done)
    if not result and bytes(piece).count(0) != length:
        result, _ = yield _change(router, oid, flags, start, 0, piece)
    return int(result)


def _change(router: Router, oid: ObjectId, flags: int, offset: int, length: int, data: Buffer = b"") -> Step:
    return lambda done: router.change(oid, flags, offset, length, data, 0, done)


def _copied(
    gateway: Gateway, oid: ObjectId, offset: int, data: Buffer, flags: int, done: IoDone
) -> Callable[[int], None]:
    """The copy is complete: lays the client's data over it, unless a snapshot came between its chunks."""

    def answer(result: int, body: Buffer) -> None:
        if result == Result.READONLY:
            gateway.change(oid, Flag.REMOVE, 0, 0, b"", 0, lambda _result, _body: done(result, body))
        else:
            done(result, body)

    def write(result: int) -> None:
        if result:
            done(result, b"")
        elif gateway.may_change(oid, answer, lambda: _copied(gateway, oid, offset, data, flags, done)(Result.SUCCESS)):
            gateway.change(oid, flags & ~Flag.CREATE, offset, 0, data, 0, done)

    return write
