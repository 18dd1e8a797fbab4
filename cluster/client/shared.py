"""A volume that clients of several gateways have open at a time, for asyncio: the paths of a multipath disk.

Each client holds a shared lock through a gateway of its own and keeps a map of its own. When another one changes the
map, this one's gateway answers INODE_INVALIDATED before the change is acknowledged; the map is then read again and the
request is done anew. So what one client has written and was told, every other one reads. It needs a cluster that
enforces locks (`dog cluster format -l`), and no other client behind the same gateway may share the volume.

The map here is never the authority. So: what the map does not give to this volume itself (holes, and what a snapshot
has) is confirmed by asking the gateway; the map is changed one object at a time, under a lock, since a longer range
could put back what another client has replaced; and a connection that breaks ends with its requests, because the node
that comes back knows nothing of our share: lock and map come first. While the map is being read the gateway takes the
old one for current, so nothing that was read by the old one counts then.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Self, TypeVar

from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.follow import MAX_ROUNDS, inode_of, os_error
from sheepdog.cluster.client.machine import Extent, VolumeMachine
from sheepdog.cluster.client.requests import (
    Request,
    lock,
    read_header,
    release,
    understanding_coherence,
    whole_inode,
)
from sheepdog.cluster.client.session import RETRY_LAST_S, Done, Reply, Session
from sheepdog.cluster.client.volume import ReadDone, Volume, WriteDone
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, unpack_map
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.wire.header import VDI_RESPONSE

ANSWER_LIMIT_S = 20.0  # one attempt; a gateway that holds a request longer is given up, as the initiator would
PATIENCE_S = 30.0  # a request, over all attempts: the initiator has another path to try
PROBE_BYTES = 512  # of an inode: no length by which a gateway takes the map for read
# The map, or the vid, is not what we thought; the last one if another client has given the object back.
_STALE = frozenset((Result.INODE_INVALIDATED, Result.READONLY, Result.NO_OBJ))

T = TypeVar("T")


class _CoherentSession(Session):
    """Its requests say that we understand INODE_INVALIDATED."""

    def submit(self, header: bytearray, payload: Buffer, done: Done, limit: int = 0) -> None:
        super().submit(understanding_coherence(header), payload, done, limit)

    async def ask(self, request: Request) -> Reply:
        return await self.call(request.header, request.payload, request.limit)


class SharedVolume:
    """See the module; made by `open`. The methods are those of `Volume`."""

    def __init__(self, address: Address, name: bytes) -> None:
        self._address = address
        self._name = name
        self._changing = asyncio.Lock()  # the map: who changes an entry, and who reads all of it
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0  # of the map
        self._vouched = False  # the gateway tells when this map is old: not from when another one is asked for
        self._session: _CoherentSession
        self._machine: VolumeMachine
        self._volume: Volume

    @classmethod
    async def open(cls, address: Address, name: str | bytes) -> Self:
        """Takes the shared lock. SheepError: VDI_LOCKED (EBUSY) while somebody has it for himself, NO_VDI (ENOENT)."""
        made = cls(address, name.encode() if isinstance(name, str) else name)
        await made._connect()
        return made

    @property
    def size(self) -> int:
        return self._machine.size

    @property
    def object_size(self) -> int:
        return self._machine.object_size

    @property
    def read_only(self) -> bool:
        return False

    def allocated_bytes(self) -> int:
        """As far as this client has heard."""
        return self._volume.allocated_bytes()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As far as this client has heard."""
        return self._volume.extents(offset, length)

    # -- requests

    async def read(self, offset: int, length: int) -> Buffer:
        async def attempt() -> Buffer:
            generation, foreign = self._generation, self._is_foreign(offset, length)
            data = await self._volume.read(offset, length)
            if foreign:
                await self._probe()
            if generation != self._generation or not self._vouched:
                raise SheepError(Result.INODE_INVALIDATED)
            return data

        return await self._repeated(attempt)

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise os_error(errno.ENOSPC)
        for piece in self._machine.pieces(offset, len(view)):
            part = view[piece.position : piece.position + piece.length]
            await self._repeated(partial(self._write, offset + piece.position, part, durable))

    async def _write(self, offset: int, data: memoryview, durable: bool) -> None:
        if not self._is_foreign(offset, len(data)):
            await self._volume.write(offset, data, durable)
            return
        async with self._changing:
            await self._volume.write(offset, data, durable)
            await self._still_current()

    async def flush(self) -> None:
        async def attempt() -> None:
            await self._volume.flush()

        await self._repeated(attempt)

    async def zero(self, offset: int, length: int, durable: bool = False) -> None:
        """As `Volume.zero`: whole objects are given back."""
        for piece in self._machine.pieces(offset, min(length, self.size - offset)):
            start = offset + piece.position
            await self._repeated(partial(self._zero, start, piece.length))
        if durable:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """As `Volume.discard`."""
        size, end = self.object_size, min(offset + length, self.size)
        first = -(-offset // size) * size
        last = end if end == self.size else end // size * size
        if first < last:
            await self.zero(first, last - first)

    async def _zero(self, offset: int, length: int) -> None:
        async with self._changing:
            if self._machine.entries[offset // self.object_size]:
                await self._volume.zero(offset, length)
                await self._still_current()
            else:
                await self._probe()

    async def resize(self, size: int) -> None:
        async def attempt() -> None:
            async with self._changing:
                await self._volume.resize(size)

        await self._repeated(attempt)

    async def refresh(self) -> None:
        await self._reload(self._generation)

    async def close(self) -> None:
        """Everything written is durable, and the lock is released as far as the gateway can be reached."""
        try:
            await self.flush()
            await self._session.ask(release(self._machine.vid, shared=True))
        finally:
            await self._session.close()

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        """`read` with a callback, which comes exactly once."""

        async def body() -> None:
            try:
                data = await self.read(offset, length)
            except OSError as error:
                done(error, b"")
            else:
                done(None, data)

        self._begin(body())

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        """`write` with a callback, which comes exactly once."""

        async def body() -> None:
            try:
                await self.write(offset, data, durable)
            except OSError as error:
                done(error)
            else:
                done(None)

        self._begin(body())

    def _begin(self, body: Awaitable[None]) -> None:
        task = asyncio.ensure_future(body)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the map

    def _is_foreign(self, offset: int, length: int) -> bool:
        """Some of the range is not in objects of this volume's own, as far as we know."""
        size, machine = self.object_size, self._machine
        first, last = offset // size, (offset + max(length, 1) - 1) // size
        return any(owner != machine.vid for owner in machine.entries[first : last + 1])

    async def _probe(self) -> None:
        """SheepError INODE_INVALIDATED if the map was an old one until now."""
        oid = inode_oid(self._machine.vid)
        await self._session.ask(Request(read_header(oid, 0, PROBE_BYTES), b"", PROBE_BYTES))

    async def _still_current(self) -> None:
        """A map write may reach an inode that a snapshot has just frozen, which nobody would look into again."""
        oid = inode_oid(self._machine.vid)
        inode = inode_of(0, (await self._session.ask(Request(read_header(oid, 0, HEADER_SIZE), b"", HEADER_SIZE))).data)
        if not isinstance(inode, InodeHeader):
            raise inode
        if inode.is_snapshot:
            raise SheepError(Result.READONLY)

    async def _repeated(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Until an attempt was made with a map that is current and through a connection that holds."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        for _ in range(MAX_ROUNDS):
            generation, session = self._generation, self._session
            try:
                async with asyncio.timeout(ANSWER_LIMIT_S):
                    if session.is_over:
                        await self._connect_again(session, deadline)
                        continue
                    return await attempt()
            except SheepError as error:
                if error.result in _STALE:
                    await self._reload(generation)
                elif not session.is_over:
                    raise
            except TimeoutError:
                await session.close()
            if asyncio.get_running_loop().time() > deadline:
                break
        raise os_error(errno.EIO)

    async def _reload(self, generation: int) -> None:
        """Reads the whole inode, unless somebody else has done so since `generation`."""
        async with self._changing:
            if self._generation == generation:
                await self._read_map(self._session)

    async def _read_map(self, session: _CoherentSession) -> None:
        self._vouched = False
        found = VDI_RESPONSE.unpack((await session.ask(lock(self._name, shared=True))).header)
        reply = await session.ask(whole_inode(Vid(found.vdi_id)))
        inode = inode_of(0, reply.data[:HEADER_SIZE])
        if not isinstance(inode, InodeHeader):
            raise inode
        if inode.store_policy:
            raise OSError(errno.EOPNOTSUPP, "a hyper volume cannot be shared")
        if inode.object_size > COPY_CHUNK_BYTES:  # copied in parts: another client could write between them
            raise OSError(errno.EOPNOTSUPP, f"a volume with objects above {COPY_CHUNK_BYTES} bytes cannot be shared")
        entries: array[int] = unpack_map(reply.data[HEADER_SIZE : HEADER_SIZE + 4 * inode.object_count])
        machine = VolumeMachine(inode, entries, read_only=False)
        machine.sharing = True
        if self._generation:
            machine.map_writes, machine.map_flushed = self._machine.map_writes, self._machine.map_flushed
        self._session, self._machine = session, machine
        self._volume = Volume(session, machine)
        self._generation += 1
        self._vouched = True

    # -- the connection

    async def _connect(self) -> None:
        session = await _CoherentSession.open(self._address, lasting=False)
        try:
            await self._read_map(session)
        except BaseException:
            await session.close()
            raise

    async def _connect_again(self, broken: _CoherentSession, deadline: float) -> None:
        """Lock and map before anything else; OSError when the time is over."""
        async with self._changing:
            while self._session is broken:
                try:
                    await self._connect()
                except OSError as error:
                    if asyncio.get_running_loop().time() > deadline:
                        raise OSError(errno.EIO, f"no gateway at {describe(self._address)}") from error
                    await asyncio.sleep(RETRY_LAST_S / 4)
