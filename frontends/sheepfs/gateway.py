"""The cluster behind sheepfs: volumes and reports through one of its sheep."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import ShutOutError
from sheepdog.cluster.client.exclusive import VolumeLock
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.shared import SharedVolume
from sheepdog.cluster.client.volume import Volume
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import Vid, format_address
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.wire.header import REQUEST, Request
from sheepdog.cluster.wire.opcodes import Opcode, protocol_version
from sheepdog.cluster.wire.structures import NODE_LIST_SIZE, unpack_nodes
from sheepdog.frontends.sheepfs.cluster import Buffer, Extent, NodeSpace, Outcome, VolumeInfo
from sheepdog.frontends.sheepfs.hyper import ThreadedHyperVolume
from sheepdog.frontends.sheepfs.transport import log

MOVE_LIMIT_S = 10.0  # connecting and looking the volume up at the new gateway
MEMBERS_INTERVAL_S = 60.0  # nodes that joined since then are no refuge yet
REPORT_LIMIT_S = 10.0  # a status file of a cluster that does not answer is empty after this long; another node is asked
ORDER_LIMIT_S = 60.0  # an order, such as a snapshot, that has to wait for a node that is being expelled
READING = ("info", "list")  # verbs of `dog` that only look

T = TypeVar("T")


class GatewayVolume:
    """An open volume and the connection that is its own: volumes do not wait for each other.

    When its gateway dies the volume goes on through another node of the cluster, as the members were last known.
    """

    def __init__(self, session: Session, volume: Volume, name: str, lock: VolumeLock | None = None) -> None:
        """`lock` is what the session's `admission` renews."""
        self._session = session
        self._lock = lock
        self._volume = volume
        self._name = name
        self._following = asyncio.get_running_loop().create_task(self._follow_members())
        # The calls of every request go straight to the volume.
        self.submit_read = volume.submit_read
        self.submit_write = volume.submit_write

    @property
    def size(self) -> int:
        return self._volume.size

    @property
    def read_only(self) -> bool:
        return self._volume.read_only

    @property
    def is_lost(self) -> bool:
        return self._lock is not None and self._lock.is_lost

    def plain_read(self, offset: int, length: int) -> tuple[Address, bytearray] | None:
        gateway = self._session.gateway
        header = self._volume.plain_read(offset, length)
        return None if gateway is None or header is None else (gateway, header)

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._volume.read(offset, length)

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        await self._volume.write(offset, data, durable)

    async def flush(self) -> None:
        await self._volume.flush()

    async def zero(self, offset: int, length: int) -> None:
        await self._volume.zero(offset, length)

    async def resize(self, size: int) -> None:
        await self._volume.resize(size)

    async def refresh(self) -> None:
        await self._volume.refresh()

    def allocated_bytes(self) -> int:
        return self._volume.allocated_bytes()

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        return self._volume.extents(offset, length)

    async def move(self, address: Address) -> None:
        """Only where the volume's name is known: the address may be that of another cluster."""
        async with asyncio.timeout(MOVE_LIMIT_S):
            session = await Session.open(address)
            try:
                await Volume.open(session, self._name, read_only=True)
            finally:
                await session.close()
        self._following.cancel()
        self._session.roam([])  # it may be another cluster
        self._session.move(address)
        self._following = asyncio.get_running_loop().create_task(self._follow_members())

    async def settle(self) -> None:
        await self._volume.close()  # which leaves the session as it is

    async def close(self) -> None:
        self._following.cancel()
        try:
            await self._volume.close()
        finally:
            await self._session.close()
        if self._lock is not None:
            await asyncio.to_thread(self._lock.release)

    async def _follow_members(self) -> None:
        while True:
            try:
                self._session.roam(await members(self._session))
            except (OSError, PeerError) as problem:
                log.warning("volume %s: cannot learn the nodes of the cluster: %s", self._name, problem)
            await asyncio.sleep(MEMBERS_INTERVAL_S)


class SharedGatewayVolume(SharedVolume):
    """A volume for which other hosts are ways, too: the gateway knows what this client has seen, so it is no other."""

    is_lost = False

    def plain_read(self, offset: int, length: int) -> None:
        """Reads are asked again when the map has changed meanwhile."""

    async def settle(self) -> None:
        await self.flush()

    async def move(self, address: Address) -> None:
        raise OSError(errno.EBUSY, "a shared volume stays with its gateway")


def _connected(address: Address, work: Callable[[Connection], T]) -> T:
    """Blocking administration with a connection of its own; its failures are OSErrors."""
    connection = Connection(address, patience_s=0, answer_limit_s=REPORT_LIMIT_S)
    try:
        return work(connection)
    except PeerError as problem:
        raise OSError(errno.EIO, str(problem)) from problem
    finally:
        connection.close()


async def members(session: Session) -> list[Address]:
    """Where the nodes of the cluster listen."""
    header = REQUEST.pack(
        Request(protocol_version(Opcode.GET_NODE_LIST), Opcode.GET_NODE_LIST, data_length=NODE_LIST_SIZE)
    )
    reply = await session.call(bytearray(header), limit=NODE_LIST_SIZE)
    return [(format_address(member.id.address), member.id.port) for member in unpack_nodes(reply.data)]


class GatewayCluster:
    """`Cluster` over the native protocol.

    The sheep at `address` is asked first; when it does not answer, the nodes that the cluster was last seen with.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._others: list[Address] = []
        self._snapshots: dict[Vid, InodeHeader] = {}  # frozen inodes never change

    @property
    def address(self) -> Address:
        return self._address

    @address.setter
    def address(self, address: Address) -> None:
        self._address = address
        self._others = []  # it may be another cluster

    async def open(self, name: str, snap_id: int, object_cache: bool) -> GatewayVolume | ThreadedHyperVolume:
        session = await self._session()
        try:
            volume = await Volume.open(session, name, b"", snap_id, object_cache=object_cache)
        except OSError as problem:
            await session.close()
            if problem.errno != errno.EOPNOTSUPP:
                raise
            return await ThreadedHyperVolume.open(session.address, name)
        except BaseException:
            await session.close()
            raise
        return GatewayVolume(session, volume, name)

    async def open_exclusive(self, name: str, object_cache: bool) -> GatewayVolume | ThreadedHyperVolume:
        session = await self._session()
        lock = VolumeLock(session.address, name.encode())
        try:
            await asyncio.to_thread(lock.take)
        except BaseException:
            await session.close()
            raise

        async def renew(address: Address) -> None:
            try:
                await asyncio.to_thread(lock.renew, address)
            except ShutOutError as problem:
                log.error("volume %s", problem.strerror)
                raise

        session.admission = renew
        try:
            volume = await Volume.open(session, name, object_cache=object_cache)
        except BaseException as problem:
            await session.close()
            if isinstance(problem, OSError) and problem.errno == errno.EOPNOTSUPP:
                return await ThreadedHyperVolume.open(session.address, name, lock)
            await asyncio.to_thread(lock.release)
            raise
        return GatewayVolume(session, volume, name, lock)

    async def open_shared(self, name: str) -> SharedGatewayVolume:
        return await SharedGatewayVolume.open(self._address, name)

    async def dog(self, *words: str) -> Outcome:
        session = await self._session()
        gateway = session.address
        await session.close()
        assert not isinstance(gateway, str)  # `dog` knows no sockets but TCP, and neither do our options
        noun, verb, *rest = words
        where = ("-a", gateway[0], "-p", str(gateway[1]))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sheepdog.tools.dog.main", noun, verb, *where, *rest,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(REPORT_LIMIT_S if verb in READING else ORDER_LIMIT_S):
                text, complaint = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return Outcome(process.returncode, text.decode(errors="replace"), complaint.decode(errors="replace"))

    async def catalog(self) -> list[VolumeInfo]:
        return await self._in_thread(self._read_catalog)

    async def space(self) -> list[NodeSpace]:
        return await self._in_thread(_read_space)

    def _read_catalog(self, connection: Connection) -> list[VolumeInfo]:
        vids = inodes.volume_ids(connection)
        headers: dict[Vid, InodeHeader] = {vid: self._snapshots[vid] for vid in vids if vid in self._snapshots}
        for header in inodes.headers(connection, [vid for vid in vids if vid not in headers]):
            if isinstance(header, InodeHeader):
                headers[Vid(header.vdi_id)] = header
        self._snapshots = {vid: header for vid, header in headers.items() if header.snap_ctime}
        return [_info(headers[vid]) for vid in vids if vid in headers]

    async def _in_thread(self, work: Callable[[Connection], T]) -> T:
        """Administration is blocking code."""
        session = await self._session()
        await session.close()
        return await asyncio.to_thread(_connected, session.address, work)

    async def _session(self) -> Session:
        """A connection to the first node that takes one; OSError with what the preferred one said."""
        failure: OSError | None = None
        for address in [self._address, *self._others]:
            try:
                session = await Session.open(address)
            except OSError as problem:
                failure = failure or OSError(errno.EIO, str(problem))
                continue
            try:
                async with asyncio.timeout(REPORT_LIMIT_S):  # a stopped process is connected to, and says nothing
                    self._others = await members(session)
                return session
            except (OSError, PeerError) as problem:
                await session.close()
                failure = failure or OSError(errno.EIO, str(problem) or f"no answer from {describe(address)}")
        assert failure is not None
        raise failure


def _info(header: InodeHeader) -> VolumeInfo:
    data, parity = divmod(header.copy_policy, 16)
    return VolumeInfo(
        vid=header.vdi_id,
        name=os.fsdecode(header.name),
        snap_id=header.snap_id,
        tag=os.fsdecode(header.tag),
        is_snapshot=bool(header.snap_ctime),
        size=header.vdi_size,
        changed_ns=_nanoseconds(header.snap_ctime or header.create_time),
        redundancy=f"{2 * data}:{parity}" if header.copy_policy else str(header.nr_copies),
    )


def _nanoseconds(time: int) -> int:
    """Inode times are seconds << 32 | nanoseconds."""
    return (time >> 32) * 1_000_000_000 + (time & 0xFFFFFFFF)


def _read_space(connection: Connection) -> list[NodeSpace]:
    found = []
    for member in admin.node_list(connection):
        host = format_address(member.id.address)
        try:
            node = Connection((host, member.id.port), patience_s=0, answer_limit_s=REPORT_LIMIT_S)
            try:
                disk = admin.disk_usage(node)
            finally:
                node.close()
        except (OSError, PeerError):
            continue  # gateways, and nodes that are just leaving
        found.append(NodeSpace(f"{host}:{member.id.port}", disk.size, disk.free))
    return found
