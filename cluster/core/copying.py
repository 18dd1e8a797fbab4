"""Copy on write of a large object, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home_writes import IoDone
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.script import Script, Step, run

if TYPE_CHECKING:
    from sheepdog.cluster.core.gateway import Gateway


def copy_large(
    gateway: Gateway, oid: ObjectId, source: ObjectId, size: int, offset: int, data: Buffer, flags: int, done: IoDone
) -> None:
    """Makes `oid` a copy of `source` with `data` laid over it; `flags` as of the SUBMIT that would create it."""
    run(_chunks(gateway, oid, source, flags, size), _copied(gateway, oid, offset, data, flags, done))


def _chunks(gateway: Gateway, oid: ObjectId, cow_oid: ObjectId, flags: int, size: int) -> Script[int]:
    """A large object is not held in memory as a whole. Nobody reads the copy before it is answered and named."""
    result, _ = yield lambda done: gateway.change(oid, flags, 0, size, b"", 0, done)
    for start in range(0, size, COPY_CHUNK_BYTES):
        if result:
            break
        length = min(COPY_CHUNK_BYTES, size - start)
        result, chunk = yield _read_step(gateway, cow_oid, start, length)
        if not result and bytes(chunk).count(0) != length:
            result, _ = yield _write_step(gateway, oid, flags & ~Flag.CREATE, start, chunk)
    return int(result)


def _read_step(gateway: Gateway, oid: ObjectId, offset: int, length: int) -> Step:
    return lambda done: gateway.raw_read(oid, offset, length, done)


def _write_step(gateway: Gateway, oid: ObjectId, flags: int, offset: int, data: Buffer) -> Step:
    return lambda done: gateway.change(oid, flags, offset, 0, data, 0, done)


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
