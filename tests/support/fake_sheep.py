"""A gateway in a thread: the client protocol over a dictionary, strict about what clients may send.

It keeps the rules that clients depend on (READONLY of snapshots, copies on write, reclaim of objects that
no map names) and can misbehave on request: answer in reverse order, drop connections, delay.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType

from tests.support.processes import readable

from sheepdog.cluster.core.blocks import map_size
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import (
    Epoch,
    EpochRecord,
    Member,
    NodeId,
    ObjectId,
    Vid,
    inode_oid,
    is_data,
    is_inode,
    vid_of,
)
from sheepdog.cluster.core.inode import (
    HEADER_SIZE,
    InodeHeader,
    entries_written,
    nominal_size,
    unpack_map,
)
from sheepdog.cluster.core.limits import INODE_SIZE
from sheepdog.cluster.core.strings import until_nul
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.cluster.wire.structures import (
    BITMAP_SIZE,
    CLUSTER_INFO_SIZE,
    EPOCH_HEADER,
    NODE_LIST_SIZE,
    NODE_SIZE,
    ClusterInfo,
    EpochHeader,
    pack_cluster_info,
    pack_epoch,
    pack_nodes,
)

Answer = tuple[bytes, bytes]  # header, payload
RECEIVE_LIMIT_S = 30


class FakeSheep:
    """One node that is a whole cluster. Use as a context manager; `address` is where it listens."""

    def __init__(self, nodes: int = 1) -> None:
        self.objects: dict[int, bytearray] = {}
        self.used: set[int] = set()
        self.deleted: set[int] = set()
        self.log: list[tuple[int, int, int, int, int]] = []  # opcode, flags, oid, offset, length
        self.payloads: list[bytes] = []  # of the same requests
        self.flushes = 0
        self.accepted = 0  # connections, ever
        self.flush_result = Result.SUCCESS
        self.batch = 1  # answers held back until there are so many, then sent in reverse order
        self.delay_s = 0.0
        self.break_after: int | None = None  # requests until every connection is cut (once)
        self.results: dict[int, Result] = {}  # opcode -> what it is answered, instead of being done
        self.unreadable: set[int] = set()  # objects whose reads fail
        self.before: Callable[[int, int], None] = lambda opcode, oid: None
        self.handlers: dict[int, Callable[[bytes, bytes], Answer]] = {}
        self.formatted = True
        self.ctime = 0x6B01FD6B00000000
        self.copies, self.policy, self.shift = 3, 0, 22
        self.created = 0x6B01FD6B
        self.lock = threading.RLock()
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.members = [
            Member(NodeId(bytes(12) + b"\x7f\0\0\1", self.address[1] + i), i, 128, 10 << 30) for i in range(nodes)
        ]
        self.epochs = [EpochRecord(Epoch(1), 1795292655, tuple(self.members))]
        self._running = True
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FakeSheep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept in progress, which close does not
        self._listener.close()
        self.cut()

    # -- what tests look at

    def cut(self) -> None:
        """Breaks every connection."""
        with self.lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def inode(self, vid: int) -> InodeHeader:
        return InodeHeader.unpack(self.objects[inode_oid(Vid(vid))])

    def vid(self, name: str) -> int:
        """Of the working volume."""
        found = self._lookup(name.encode(), b"", 0)
        assert isinstance(found, InodeHeader)
        return found.vdi_id

    def entries(self, vid: int) -> array[int]:
        count = self.inode(vid).object_count
        return unpack_map(self.objects[inode_oid(Vid(vid))][HEADER_SIZE : HEADER_SIZE + 4 * count])

    def content(self, vid: int) -> bytes:
        """The whole volume as a reader of its map sees it."""
        inode = self.inode(vid)
        data = bytearray(inode.vdi_size)
        for index, owner in enumerate(self.entries(vid)):
            if owner:
                start = index * inode.object_size
                part = self.objects[owner << 32 | index][: len(data) - start]
                data[start : start + len(part)] = part
        return bytes(data)

    def create(self, name: str, size: int, base: int = 0, shift: int = 0) -> int:
        """A new volume; returns its vid."""
        return self._new(name.encode(), size, base, shift or self.shift, 0, 0)

    def snapshot(self, name: str, tag: bytes = b"") -> int:
        """Freezes the working volume; returns the vid under which it goes on."""
        with self.lock:
            found = self._lookup(name.encode(), b"", 0)
            assert not isinstance(found, Result)
            self._set(replace(found, tag=tag))
            return self._new(name.encode(), found.vdi_size, found.vdi_id, 0, 1, 0)

    # -- volumes

    def _headers(self) -> list[InodeHeader]:
        return [self.inode(vid) for vid in sorted(self.used - self.deleted)]

    def _lookup(self, name: bytes, tag: bytes, snap_id: int) -> InodeHeader | Result:
        family = [inode for inode in self._headers() if inode.name == name]
        working = [inode for inode in family if not inode.is_snapshot]
        if not tag and not snap_id:
            return working[0] if working else Result.NO_VDI
        found = [i for i in family if i.is_snapshot and ((tag and i.tag == tag) or (snap_id and i.snap_id == snap_id))]
        if found:
            return found[-1]
        return Result.NO_TAG if working else Result.NO_VDI

    def _set(self, inode: InodeHeader) -> None:
        self.objects[inode_oid(Vid(inode.vdi_id))][:HEADER_SIZE] = inode.pack()

    def _snapshot(self, name: bytes, tag: bytes) -> tuple[int, int]:
        """(result, vid of the volume that goes on)"""
        working = self._lookup(name, b"", 0)
        if isinstance(working, Result):
            return working, 0
        if tag and not isinstance(self._lookup(name, tag, 0), Result):
            return Result.VDI_EXIST, 0
        self._set(replace(working, tag=tag))
        like = working.block_size_shift, 1, working.nr_copies, working.copy_policy
        return 0, self._new(name, working.vdi_size, working.vdi_id, *like)

    def _new(self, name: bytes, size: int, base: int, shift: int, snap: int, copies: int, policy: int = 0) -> int:
        self.created += 60
        vid = int(vid_of_name(name)) or 1
        while vid in self.used:
            vid += 1
        family = [inode.snap_id for inode in self._headers() if inode.name == name]
        data = bytearray(INODE_SIZE)
        if base:
            data[HEADER_SIZE:] = self.objects[inode_oid(Vid(base))][HEADER_SIZE:]
            shift = self.inode(base).block_size_shift
        if snap:
            working = self._lookup(name, b"", 0)
            assert not isinstance(working, Result)
            self._set(replace(working, snap_ctime=self.created << 32))
        self.objects[inode_oid(Vid(vid))] = data
        self.used.add(vid)
        self._set(
            InodeHeader(
                name,
                create_time=self.created << 32,
                vdi_size=size,
                copy_policy=policy,
                nr_copies=copies or self.copies,
                block_size_shift=shift or self.shift,
                snap_id=max(family, default=0) + 1,
                vdi_id=vid,
                parent_vdi_id=base,
            )
        )
        return vid

    def _delete(self, vid: int) -> None:
        inode = self.inode(vid)
        old = self.entries(vid)
        self._set(replace(inode, name=b"", vdi_size=0))
        self.deleted.add(vid)
        self.objects[inode_oid(Vid(vid))][HEADER_SIZE:] = bytes(INODE_SIZE - HEADER_SIZE)
        self._reclaim(enumerate(old))

    def _reclaim(self, dropped: Iterable[tuple[int, int]]) -> None:
        named = {
            owner << 32 | index
            for vid in self.used - self.deleted
            for index, owner in enumerate(self.entries(vid))
            if owner
        }
        for index, owner in dropped:
            if owner and owner << 32 | index not in named:
                self.objects.pop(owner << 32 | index, None)

    # -- connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self.lock:
                if not self._running:  # it ended between the client's connect and this
                    connection.close()
                    return
                self._connections.append(connection)
                self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(RECEIVE_LIMIT_S)
        stream = _Stream(connection)
        held: list[bytes] = []
        try:
            while header := stream.read(wire.HEADER_SIZE):
                request = wire.REQUEST.unpack(header)
                payload = b""
                if request.flags & Flags.WRITE and request.data_length:
                    payload = stream.read(request.data_length)
                    if len(payload) != request.data_length:
                        return
                if self.delay_s:
                    time.sleep(self.delay_s)
                with self.lock:
                    if connection not in self._connections:
                        return  # cut: the client has sent the request again, and goes on
                    if self.break_after is not None:
                        self.break_after -= 1
                        if self.break_after < 0:
                            self.break_after = None
                            self.cut()
                            return
                    answer, data = self._handle(header, payload)
                held.append(answer + data)
                if len(held) >= self.batch or not readable(connection):
                    connection.sendall(b"".join(reversed(held)))
                    held.clear()
        except OSError:
            pass
        finally:
            connection.close()

    # -- requests

    def _handle(self, header: bytes, payload: bytes) -> Answer:
        request = wire.REQUEST.unpack(header)
        opcode = Opcode(request.opcode)
        if opcode in self.results:
            return self._answer(request, self.results[opcode])
        if opcode in self.handlers:
            return self.handlers[opcode](header, payload)
        if opcode < Opcode.NEW_VDI or opcode == Opcode.FLUSH_VDI:
            return self._object(wire.OBJECT_REQUEST.unpack(header), payload)
        return self._admin(opcode, header, payload)

    def _answer(self, request: wire.Request | wire.ObjectRequest, result: int, data: bytes = b"") -> Answer:
        epoch = self.epochs[-1].epoch
        return response(request.opcode, request.id, epoch, result, len(data)), data

    def _object(self, request: wire.ObjectRequest, payload: bytes) -> Answer:
        oid, offset = request.oid, request.offset
        self.log.append((request.opcode, request.flags, oid, offset, request.data_length))
        self.payloads.append(payload)
        self.before(request.opcode, oid)
        if request.opcode == Opcode.FLUSH_VDI:
            self.flushes += 1
            return self._answer(request, self.flush_result)
        size = nominal_size(ObjectId(oid), self._shift(oid))
        if offset + request.data_length > size:
            return self._answer(request, Result.INVALID_PARMS)
        if request.opcode == Opcode.READ_OBJ:
            if oid not in self.objects or oid in self.unreadable:
                return self._answer(request, Result.NO_OBJ)
            return self._answer(request, 0, bytes(self.objects[oid][offset : offset + request.data_length]))
        if request.opcode == Opcode.MAP_OBJ:
            if oid not in self.objects:
                return self._answer(request, Result.NO_OBJ)
            assert request.data_length == map_size(size)
            blocks = (self.objects[oid][start : start + 4096] for start in range(0, size, 4096))
            bits = sum(1 << number for number, block in enumerate(blocks) if any(block))
            return self._answer(request, 0, bits.to_bytes(map_size(size), "little"))
        header = is_inode(ObjectId(oid)) and offset < HEADER_SIZE and oid in self.objects
        if (is_data(ObjectId(oid)) or header) and self.inode(vid_of(ObjectId(oid))).is_snapshot:
            return self._answer(request, Result.READONLY)
        if request.opcode == Opcode.CREATE_AND_WRITE_OBJ:
            if bool(request.flags & Flags.COW) != bool(request.cow_oid):
                return self._answer(request, Result.INVALID_PARMS)
            if request.cow_oid and request.cow_oid not in self.objects:
                return self._answer(request, Result.NO_OBJ)
            self.objects[oid] = bytearray(self.objects[request.cow_oid]) if request.cow_oid else bytearray(size)
        elif oid not in self.objects:
            return self._answer(request, Result.NO_OBJ)
        if request.opcode == Opcode.ZERO_OBJ:
            self.objects[oid][offset : offset + request.data_length] = bytes(request.data_length)
        elif is_inode(ObjectId(oid)):
            self._write_inode(vid_of(ObjectId(oid)), offset, payload)
        else:
            self.objects[oid][offset : offset + len(payload)] = payload
        return self._answer(request, 0)

    def _write_inode(self, vid: int, offset: int, payload: bytes) -> None:
        data = self.objects[inode_oid(Vid(vid))]
        touched = entries_written(offset, len(payload))
        old = [(i, struct.unpack_from("<I", data, HEADER_SIZE + 4 * i)[0]) for i in touched]
        data[offset : offset + len(payload)] = payload
        self._reclaim(old)

    def _shift(self, oid: int) -> int:
        vid = vid_of(ObjectId(oid))
        return self.inode(vid).block_size_shift if vid in self.used - self.deleted else self.shift

    def _vdi_answer(self, request: wire.VdiRequest, result: int, vid: int = 0, attr: int = 0) -> Answer:
        fields = wire.VdiResponse(0, request.opcode, 0, 1, request.id, 0, result, vid, attr, self.copies, self.shift)
        return wire.VDI_RESPONSE.pack(fields), b""

    def _admin(self, opcode: Opcode, header: bytes, payload: bytes) -> Answer:
        request = wire.REQUEST.unpack(header)
        if opcode in (Opcode.NEW_VDI, Opcode.GET_VDI_INFO, Opcode.DEL_VDI):
            return self._vdi(wire.VDI_REQUEST.unpack(header), payload)
        if opcode in (Opcode.READ_VDIS, Opcode.READ_DEL_VDIS):
            bitmap = bytearray(BITMAP_SIZE)
            for vid in self.used if opcode == Opcode.READ_VDIS else self.deleted:
                bitmap[vid >> 3] |= 1 << (vid & 7)
            return self._answer(request, 0, bytes(bitmap))
        if opcode == Opcode.OIDS_EXIST:
            missing = [oid for oid in struct.unpack(f"<{len(payload) // 8}Q", payload) if oid not in self.objects]
            data = struct.pack(f"<{len(missing)}Q", *missing)
            return self._answer(request, Result.NO_OBJ if missing else Result.SUCCESS, data)
        if opcode == Opcode.GET_NODE_LIST:
            assert request.data_length == NODE_LIST_SIZE
            data = pack_nodes(self.members)
            fields = wire.NodeResponse(0, opcode, 0, self.epochs[-1].epoch, request.id, len(data), 0, len(self.members))
            return wire.NODE_RESPONSE.pack(fields), data
        if opcode == Opcode.STAT_CLUSTER:
            return self._stat_cluster(wire.CLUSTER_REQUEST.unpack(header))
        if opcode == Opcode.CLUSTER_INFO:
            assert request.data_length == CLUSTER_INFO_SIZE
            info = ClusterInfo(
                10, 0, 0, self.epochs[-1].epoch, self.ctime, 4, self.copies, self.policy, 1, self.shift, b"plain"
            )
            return self._answer(request, 0, pack_cluster_info(info, self.members))
        return self._answer(request, Result.INVALID_PARMS)

    def _vdi(self, request: wire.VdiRequest, payload: bytes) -> Answer:
        if not self.formatted:
            return self._vdi_answer(request, Result.WAIT_FOR_FORMAT)
        name, tag = until_nul(payload[:256]), until_nul(payload[256:])
        found = self._lookup(name, tag, request.snap_id if request.opcode != Opcode.NEW_VDI else 0)
        if request.opcode == Opcode.NEW_VDI:
            if not request.snap_id and not isinstance(found, Result):
                return self._vdi_answer(request, Result.VDI_EXIST)
            if request.snap_id and not request.base_vdi_id:
                return self._vdi_answer(request, *self._snapshot(name, tag))
            vid = self._new(
                name,
                request.vdi_size,
                request.base_vdi_id,
                request.block_size_shift,
                request.snap_id,
                request.copies,
                request.copy_policy,
            )
            return self._vdi_answer(request, 0, vid)
        if isinstance(found, Result):
            return self._vdi_answer(request, found)
        if request.opcode == Opcode.DEL_VDI:
            self._delete(found.vdi_id)
        return self._vdi_answer(request, 0, found.vdi_id)

    def _stat_cluster(self, request: wire.ClusterRequest) -> Answer:
        slots = request.nodes_nr
        plain = wire.Request(0, request.opcode, 0, 0, request.id, 0)
        if not self.formatted:
            return self._answer(plain, Result.WAIT_FOR_FORMAT)
        if slots and any(len(record.members) > slots for record in self.epochs):
            return self._answer(plain, Result.BUFFER_SMALL)
        first: EpochHeader | None = EpochHeader(self.ctime, 0, 0, 0, 0, self.copies, self.policy, 4, b"plain")
        records = []
        for record in reversed(self.epochs):
            records.append(pack_epoch(record, slots, first))
            first = None
        size = EPOCH_HEADER.size + slots * NODE_SIZE
        return self._answer(plain, 0, b"".join(records[: request.data_length // size]))


class _Stream:
    """Exact reads without reading ahead, so that the socket tells whether more requests wait."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer at the end of the stream."""
        parts = bytearray()
        while len(parts) < size and (part := self._connection.recv(size - len(parts))):
            parts += part
        return bytes(parts)
