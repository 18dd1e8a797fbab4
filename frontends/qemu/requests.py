"""Requests of the native protocol: which are let in, and what object I/O asks of the gateway (protocol.md 3.3.1-3.3.4).

Operations on VDIs and administration are in `operations`; they are handed in as a table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from sheepdog.cluster.core.blocks import map_size
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import (
    ObjectId,
    Vid,
    is_attribute,
    is_btree,
    is_data,
    is_inode,
    is_ledger,
    is_vmstate,
    vid_of,
)
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE, BTREE_NODE_SIZE, DEFAULT_SHIFT, INODE_SIZE, LEDGER_SIZE
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.state import ClusterState
from sheepdog.cluster.core.words import read_u32, read_u64
from sheepdog.cluster.wire.header import COW_OID_AT, OFFSET_AT, OID_AT
from sheepdog.cluster.wire.opcodes import GATEWAY_VERSION, SERVED_WHILE_WAITING, Flags, Opcode, admit
from sheepdog.frontends.qemu.connection import Call

IoDone: TypeAlias = Callable[[int, Buffer], None]
Handler: TypeAlias = Callable[[Call], None]

HOLD_CHECK_S: Final = 0.1  # how often held requests look whether the members are there: a guest does not notice
_UNUSED_BITS: Final = 0x7 << 56  # protocol.md 6.1
_DATA: Final = frozenset(
    (
        Opcode.CREATE_AND_WRITE_OBJ,
        Opcode.READ_OBJ,
        Opcode.WRITE_OBJ,
        Opcode.DISCARD_OBJ,
        Opcode.FLUSH_VDI,
    )
)
_CACHED: Final = Flags.CACHE | Flags.DIRECT
_WAITING: Final = frozenset((Result.WAIT_FOR_FORMAT, Result.WAIT_FOR_JOIN))


class Gateway(Protocol):
    """What object I/O needs of `core.gateway.Gateway`; every `done` comes exactly once."""

    def read(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> None: ...

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None: ...

    def create(
        self, oid: ObjectId, cow_oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone
    ) -> None: ...

    def zero(self, oid: ObjectId, offset: int, length: int, durable: bool, done: IoDone) -> None: ...

    def block_map(self, oid: ObjectId, done: IoDone) -> None: ...

    def remove(self, oid: ObjectId, done: IoDone) -> None: ...

    def flush(self, vid: Vid, done: IoDone) -> None: ...

    def read_invalidated(
        self, oid: ObjectId, offset: int, length: int, done: IoDone, follows: bool = False
    ) -> bool: ...


Wanted: TypeAlias = Callable[[ObjectId, bool], None]


class Requests:
    """Gives every request to its handler; a refused one is answered, its connection stays."""

    def __init__(
        self,
        gateway: Gateway,
        cluster: Callable[[], ClusterState],
        operations: Mapping[int, Handler],
        wanted: Wanted | None = None,
    ) -> None:
        """`cluster` gives the state as it is now; `operations` are the handlers of everything but object I/O.

        `wanted(oid, writing)` is told of what clients let be cached; None without a cache.
        """
        self._gateway = gateway
        self._wanted = wanted
        self._cluster = cluster
        self._handlers: dict[int, Handler] = {
            Opcode.CREATE_AND_WRITE_OBJ: self._create,
            Opcode.READ_OBJ: self._read,
            Opcode.WRITE_OBJ: self._write,
            Opcode.DISCARD_OBJ: self._discard,
            Opcode.ZERO_OBJ: self._zero,
            Opcode.MAP_OBJ: self._map,
            Opcode.FLUSH_VDI: self._flush,
            **operations,
        }
        self._held: list[Call] = []  # bounded by what connections may have under way

    def dispatch(self, call: Call) -> None:
        """Answers the call, now or later (protocol.md 2.8, 12.2)."""
        opcode = call.opcode
        result = admit(opcode, call.version)
        if not result:
            state = self._cluster().result()
            if not state or (opcode in SERVED_WHILE_WAITING and state in _WAITING) or opcode == Opcode.STAT_CLUSTER:
                handler = self._handlers.get(opcode)
                if handler is not None:
                    handler(call)
                    return
                result = Result.INVALID_PARMS
            elif state == Result.WAIT_FOR_JOIN and opcode in _DATA and call.version < GATEWAY_VERSION:
                self._hold(call)
                return
            else:
                result = state
        call.fail(result)

    def _hold(self, call: Call) -> None:
        """Members are missing: an image that is open already (its lookup was answered before) waits for them, since an
        error would break the guest. dog, which says version 2, is told at once."""
        self._held.append(call)
        if len(self._held) == 1:
            asyncio.get_running_loop().call_later(HOLD_CHECK_S, self._look_again)

    def _look_again(self) -> None:
        held, self._held = self._held, []
        for call in held:
            self.dispatch(call)

    def _read(self, call: Call) -> None:
        oid, offset = _object_of(call)
        if call.flags & Flags.WRITE or offset + call.length > self._size_of(oid):
            call.fail(Result.INVALID_PARMS)
        elif call.flags & Flags.TGT and self._is_old(call, oid, offset, call.length, call.read):
            return
        elif call.length:
            if self._wanted is not None and call.flags & _CACHED == Flags.CACHE:
                self._wanted(oid, False)
            self._gateway.read(oid, offset, call.length, call.read)
        else:
            self._touch(oid, call)

    def _is_old(self, call: Call, oid: ObjectId, offset: int, length: int, done: IoDone) -> bool:
        """Answered here: the client has an old map of a shared volume."""
        return self._gateway.read_invalidated(oid, offset, length, done, bool(call.flags & Flags.FOLLOWS))

    def _write(self, call: Call) -> None:
        oid, offset = _object_of(call)
        data = call.payload
        if len(data) != call.length:  # announced, but not sent for want of the WRITE flag
            call.fail(Result.INVALID_PARMS)
            return
        beyond = offset + len(data) - self._size_of(oid)
        if beyond > 0:
            if not is_data(oid):
                call.fail(Result.INVALID_PARMS)
                return
            # `dog benchmark io` adds the object's place in the volume to the offset; refused, it would end.
            data = data[: max(len(data) - beyond, 0)]
        if call.flags & Flags.TGT and self._is_old(call, oid, offset, 0, call.written):
            return
        if data:
            if self._wanted is not None and call.flags & _CACHED == Flags.CACHE:
                self._wanted(oid, True)
            self._gateway.write(oid, offset, data, _durable(call), call.written)
        else:
            self._touch(oid, call)

    def _touch(self, oid: ObjectId, call: Call) -> None:
        """Reading or writing nothing: the object must be there, and that is all (dog clears empty maps so)."""
        self._gateway.read(oid, 0, 1, call.written)

    def _create(self, call: Call) -> None:
        oid, offset = _object_of(call)
        data = call.payload
        if len(data) != call.length or offset + len(data) > self._size_of(oid):
            call.fail(Result.INVALID_PARMS)
            return
        if call.flags & Flags.TGT and self._is_old(call, oid, offset, 0, call.written):
            return
        source = ObjectId(read_u64(call.header, COW_OID_AT) if call.flags & Flags.COW else 0)
        self._gateway.create(oid, source, offset, data, _durable(call), call.written)

    def _discard(self, call: Call) -> None:
        oid, _ = _object_of(call)
        if is_data(oid):
            self._gateway.remove(oid, call.written)
        else:
            call.fail(Result.INVALID_PARMS)

    def _zero(self, call: Call) -> None:
        """As a read, length and offset are the header's and no payload comes; flags as of a write."""
        oid, offset = _object_of(call)
        if not is_data(oid) or call.flags & Flags.WRITE or offset + call.length > self._size_of(oid):
            call.fail(Result.INVALID_PARMS)
        elif not (call.flags & Flags.TGT and self._is_old(call, oid, offset, 0, call.written)):
            self._gateway.zero(oid, offset, call.length, _durable(call), call.written)

    def _map(self, call: Call) -> None:
        """The answer has one bit for each 4096 bytes of the object, lowest bits first; set: they hold data."""
        oid, _ = _object_of(call)
        if not is_data(oid) or call.flags & Flags.WRITE or call.length != map_size(self._size_of(oid)):
            call.fail(Result.INVALID_PARMS)
        else:
            self._gateway.block_map(oid, call.read)

    def _flush(self, call: Call) -> None:
        oid, _ = _object_of(call)
        self._gateway.flush(vid_of(oid), call.written)

    def _size_of(self, oid: ObjectId) -> int:
        """The object's nominal size in bytes (protocol.md 6.2); 0 for what is no object id."""
        if oid & _UNUSED_BITS:
            return 0
        if is_data(oid) or is_vmstate(oid):
            record = self._cluster().vdis.get(vid_of(oid))
            return 1 << (record.shift if record is not None else DEFAULT_SHIFT)
        if is_inode(oid):
            return INODE_SIZE
        if is_attribute(oid):
            return ATTRIBUTE_SIZE
        if is_btree(oid):
            return BTREE_NODE_SIZE
        return LEDGER_SIZE if is_ledger(oid) else 0


def _object_of(call: Call) -> tuple[ObjectId, int]:
    header = call.header
    return ObjectId(read_u64(header, OID_AT)), read_u32(header, OFFSET_AT)


def _durable(call: Call) -> bool:
    """Only CACHE allows a later flush to make it durable; DIRECT or neither do not (protocol.md 5.3)."""
    return not call.flags & Flags.CACHE
