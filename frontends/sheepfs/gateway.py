"""The cluster behind sheepfs: volumes and reports through one of its sheep."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.volume import Volume
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import format_address
from sheepdog.cluster.wire.header import REQUEST, Request
from sheepdog.cluster.wire.opcodes import Opcode, protocol_version
from sheepdog.cluster.wire.structures import NODE_LIST_SIZE, unpack_nodes
from sheepdog.frontends.sheepfs.cluster import Buffer, Extent
from sheepdog.frontends.sheepfs.transport import log

MOVE_LIMIT_S = 10.0  # connecting and looking the volume up at the new gateway
MEMBERS_INTERVAL_S = 60.0  # nodes that joined since then are no refuge yet
REPORT_LIMIT_S = 10.0  # a status file of a cluster that does not answer is empty after this long


class GatewayVolume:
    """An open volume and the connection that is its own: volumes do not wait for each other.

    When its gateway dies the volume goes on through another node of the cluster, as the members were last known.
    """

    def __init__(self, session: Session, volume: Volume, name: str) -> None:
        self._session = session
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
        self._session.move(address)

    async def close(self) -> None:
        self._following.cancel()
        try:
            await self._volume.close()
        finally:
            await self._session.close()

    async def _follow_members(self) -> None:
        while True:
            try:
                self._session.roam(await members(self._session))
            except (OSError, PeerError) as problem:
                log.warning("volume %s: cannot learn the nodes of the cluster: %s", self._name, problem)
            await asyncio.sleep(MEMBERS_INTERVAL_S)


async def members(session: Session) -> list[Address]:
    """Where the nodes of the cluster listen."""
    header = REQUEST.pack(
        Request(protocol_version(Opcode.GET_NODE_LIST), Opcode.GET_NODE_LIST, data_length=NODE_LIST_SIZE)
    )
    reply = await session.call(bytearray(header), limit=NODE_LIST_SIZE)
    return [(format_address(member.id.address), member.id.port) for member in unpack_nodes(reply.data)]


class GatewayCluster:
    """`Cluster` over the native protocol."""

    def __init__(self, address: Address) -> None:
        self.address = address

    async def open(self, name: str, tag: str, object_cache: bool) -> GatewayVolume:
        session = await Session.open(self.address)
        try:
            snap_id = int(tag) if tag.isdigit() else 0
            volume = await Volume.open(session, name, b"" if snap_id else tag.encode(), snap_id)
        except BaseException:
            await session.close()
            raise
        return GatewayVolume(session, volume, name)

    async def report(self, noun: str, verb: str) -> str:
        assert not isinstance(self.address, str)  # `dog` knows no sockets but TCP, and neither do our options
        host, port = self.address
        command = [sys.executable, "-m", "sheepdog.tools.dog.main", noun, verb, "-a", host, "-p", str(port)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(REPORT_LIMIT_S):
                text, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return ""
        return text.decode(errors="replace")
