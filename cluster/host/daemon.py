"""The daemon `sheep`: the one place that puts the parts together.

Order of a start: lock on META, log, the membership engine is in reach, store, pid file, listening sockets, attaching
to the engine, joining. What fails up to here is printed: so long waits whoever started it (`lifecycle.Startup`).
Order of an end: leave the cluster, make everything durable, close the store, remove the pid file.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable

from sheepdog.cluster.core.errors import StoreError, UsageError
from sheepdog.cluster.core.ids import Member, NodeId, ObjectId
from sheepdog.cluster.core.limits import DEFAULT_VNODES
from sheepdog.cluster.core.membership import EXPELLED
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Event, Peer, Resumed, Suspended, Votes
from sheepdog.cluster.core.state import node_key
from sheepdog.cluster.drivers import registry
from sheepdog.cluster.drivers.base import Driver
from sheepdog.cluster.host import lifecycle, usage
from sheepdog.cluster.host.cache_files import CacheFiles
from sheepdog.cluster.host.coders import best_coder
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.disk_control import DiskControl
from sheepdog.cluster.host.disk_watch import DiskWatch
from sheepdog.cluster.host.kernel_sync import LoopWorkers
from sheepdog.cluster.host.links import Links
from sheepdog.cluster.host.logs import Logs
from sheepdog.cluster.host.loop import Collector, busy_poll_s, describe, new_loop, prepare_process
from sheepdog.cluster.host.node_state import DirectoryLock, NodeStateFiles
from sheepdog.cluster.host.object_store import ObjectStore
from sheepdog.cluster.host.options import Options
from sheepdog.cluster.host.reach import until_reached
from sheepdog.cluster.host.server import Server, check_port
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.turn import HostClock, Turn
from sheepdog.cluster.wire.streams import Arena, BufferPool
from sheepdog.frontends.qemu.connection import Clients
from sheepdog.frontends.qemu.operations import handlers
from sheepdog.frontends.qemu.requests import Requests

CLIENT_PATIENCE_S = 60.0  # out of reach of the membership engine: clients wait so long, then they may look elsewhere
REJOIN_FIRST_S, REJOIN_MAX_S = 0.2, 5.0  # between attempts to attach again; each takes a while of its own
JOIN_PATIENCE_S = 5.0  # from listening on: then the command returns, whoever does not let the node in yet
END_TIMEOUT_S = 30.0  # for making everything durable at the end; a hung disk must not keep a host from rebooting


def run(options: Options) -> int:
    """Runs a sheep to its end; the exit status. Without -f the caller's process returns once the node has joined, or
    JOIN_PATIENCE_S after it listens."""
    try:
        driver = registry.create(options.driver)
        busy_s = busy_poll_s(os.environ)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    startup = lifecycle.Startup() if options.foreground else lifecycle.detach()
    try:
        lock = DirectoryLock(options.metadata)
        logs = Logs(options.log, options.metadata)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        check_port(options.bind_address, options.port)
        driver.reach()
        return Daemon(options, logs, busy_s, startup).run()
    except (UsageError, StoreError) as error:
        logs.write(3, str(error))
        print(error, file=sys.stderr)  # nobody hears it any more once the daemon is on its own
        return 1
    except OSError as error:
        line = f"{error.filename or ','.join((options.metadata, *options.disks))}: {error.strerror}"
        logs.write(3, f"{line} ({describe(error)})")
        print(line, file=sys.stderr)
        return 1
    except Exception as error:
        logs.write(2, f"internal error: {describe(error)}")
        if options.foreground:
            raise
        startup.tell(f"internal error: {describe(error)}")
        return 1
    finally:
        logs.close()
        lock.release()


class _Attachment:
    """`ports.Engine` of one incarnation of the node, over a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.leaving: asyncio.Task[None] | None = None

    def broadcast(self, data: bytes) -> None:
        self.driver.broadcast(data)

    def renew(self) -> None:
        self.driver.renew()

    def votes(self) -> Votes | None:
        return self.driver.votes()

    def leave(self) -> None:
        if self.leaving is None:
            self.leaving = asyncio.get_running_loop().create_task(self.driver.leave())


class Daemon:
    """One sheep, from its store to its last log line."""

    def __init__(self, options: Options, logs: Logs, busy_s: float, startup: lifecycle.Startup) -> None:
        """`busy_s`: see `turn.BusyPoll`."""
        self.options = options
        self.logs = logs
        self._startup = startup
        self._log = logs.write
        self._loop = new_loop(self._log, busy_s)
        self._status = 1
        self._failed_disks: list[str] = []  # since the start
        self._serving = False  # clients are let in once this node has joined
        self._ending: asyncio.Future[None] = self._loop.create_future()
        self._pid_file: lifecycle.PidFile | None = None
        self._lost = asyncio.Event()
        self._expelled = False  # ... because it did not answer the others
        self._patience: asyncio.TimerHandle | None = None
        prepare_process(self._log)
        self._turn = Turn(self._loop)
        self._arena = Arena(BufferPool())
        self._clock = HostClock(self._loop)
        driver = registry.create(options.driver)
        self.address = announced(options, driver)
        self._workers = LoopWorkers(self._loop, self._call_soon)
        self._coder = best_coder(self._log)
        disk = RealDisk()
        self._state = NodeStateFiles(options.metadata, disk, self._workers, self._log, options.nosync)
        self._state.open()
        disks = options.disks or (f"{options.metadata}/obj",)
        self.store = ObjectStore(
            options.metadata,
            disks,
            disk,
            self._workers,
            self._clock,
            self._turn.at_end,
            self._log,
            self._disk_failed,
            store_options(options),
            before=self._state.undo,
            forget_proven=self._state.forget_settled,
            after_look=self._turn.after_look,
        )
        self.store.open()
        self.store.disks.on_lost = lambda oids, told: self._call_later(lambda: self.node.copies.lost(oids, told))
        self._disks = DiskControl(self.store, self._workers, self._log, self._is_only_here)
        self._cache = self._open_cache(disk) if options.cache is not None else None
        self._id = NodeId(self.address, options.port)
        io = options.io_address
        io_id = None if io is None else NodeId(resolve(io.host), io.port)
        self.links = Links(self._id, self._loop, self._turn, self._arena, self._log, io_id)
        self._server = Server(self._loop, self.links.adopt, self._adopt_client, self._log)
        self._check_fixed_vnodes()
        self._begin_incarnation(driver)

    def _open_cache(self, disk: RealDisk) -> CacheFiles:
        options = self.options
        assert options.cache is not None
        directory = options.cache.directory or f"{options.metadata}/cache"
        size, direct = options.cache.size_bytes, options.cache.direct_io
        cache = CacheFiles(directory, size, disk, self._workers, self._clock, self._turn.at_end, self._log, direct)
        self._log(6, f"object cache of {size} bytes in {directory}")
        return cache

    def _adopt_client(self, sock: socket.socket) -> None:
        self._clients.adopt(sock)

    def _begin_incarnation(self, driver: Driver) -> None:
        """A node that knows what the disks know, as after a crash, and doors that lead to it."""
        self._attachment = _Attachment(driver)
        self.node = node = Node(
            self._member(self._id),
            self._clock,
            self.links,
            self.store,
            self._state,
            self._attachment,
            self._log,
            self.options.vnodes is not None,
            None if self._cache is None else self._cache.disk,
        )
        node.context.coder = self._coder
        self.links.on_message = node.dispatch.on_message
        self.links.on_successes = node.dispatch.on_successes
        self.links.on_applied = node.dispatch.on_applied
        self.links.on_link = node.on_link
        if self.options.recovery is not None:
            throttle = self.options.recovery
            node.context.throttle = (throttle.objects, throttle.interval_ms * 1_000_000)
        node.on_exit = self._end
        node.on_lost = self._on_lost
        node.votes = self._attachment.votes
        requests = Requests(
            node.door,
            node.context.current_state,
            handlers(node, self.logs, self.store, self._disks, self._failed_disks),
            None if node.cache is None else node.cache.volumes.wanted,
        )
        self._clients = Clients(
            self._loop, self._turn, self._arena, requests.dispatch, node.context.current_epoch, self._log
        )
        self._clients.peers = self.links
        node.start()

    def _is_only_here(self, oid: ObjectId) -> bool:
        return self.node.copies.is_only_here(oid)  # of the present incarnation

    def _call_later(self, call: Callable[[], None]) -> None:
        """In a turn of its own: the store is in the middle of something."""
        self._loop.call_soon(call)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _member(self, node_id: NodeId) -> Member:
        options = self.options
        vnodes = 0 if options.gateway else self._fixed_vnodes(node_id) or DEFAULT_VNODES
        zone = int.from_bytes(self.address[12:], "little") if options.zone is None else options.zone
        space = 0 if options.gateway else capacity(self.options.disks or (self.options.metadata,))
        return Member(node_id, zone, vnodes, space)

    def _fixed_vnodes(self, node_id: NodeId) -> int | None:
        """What -V says; once it is in use, what the latest epoch says, which `dog node vnodes set` may have changed."""
        wanted, epochs = self.options.vnodes, self._state.load_epochs()
        if wanted is None or not epochs:
            return wanted
        return next((one.vnodes for one in epochs[-1].members if one.id == node_id and one.vnodes), wanted)

    def _check_fixed_vnodes(self) -> None:
        """UsageError for a start with another number than the latest epoch has (cli.md 4, "Vnodes")."""
        previous = self._fixed_vnodes(self._id)
        if previous != self.options.vnodes:
            raise UsageError(
                f"mismatch specified vnodes is compared with the previous. previous vnodes:{previous} "
                "(`dog node vnodes set` changes them)"
            )

    def run(self) -> int:
        options = self.options
        self._log(6, f"sheepdog daemon (version {usage.VERSION}) started")
        for line in options.without_effect():
            self._log(4, line)
        if options.nosync:
            self._log(4, "-n: writes are acknowledged before they are on the disk; a power failure may lose them")
        if options.pid_file:
            self._pid_file = lifecycle.PidFile(options.pid_file)
        self._server.listen_tcp(options.bind_address, options.port)
        io = options.io_address
        if io is not None and not (io.port == options.port and options.bind_address in (None, io.host)):
            self._server.listen_tcp(io.host, io.port)
        self._server.listen_unix(f"{options.metadata}/sock")
        lifecycle.handle_signals(self._loop, self._terminate, self.logs.reopen)
        self._loop.call_later(JOIN_PATIENCE_S, self._return_without_joining)
        collector = Collector(self._loop, self._turn)
        collector.start()
        self.store.rebalance.begin()
        DiskWatch(self.store.copies, self._clock).start()
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._live())
        finally:
            collector.stop()
            self._loop.close()
        return self._status

    def _return_without_joining(self) -> None:
        self._startup.tell(f"sheep runs, but has not joined the cluster yet; {self.logs.place} may tell why")
        self._startup.done(self.options.metadata)

    async def _live(self) -> None:
        staying = self._loop.create_task(self._stay_joined())
        try:
            await asyncio.wait((staying, self._ending), return_when=asyncio.FIRST_COMPLETED)
            if staying.done():
                staying.result()
        finally:
            staying.cancel()
            await asyncio.gather(staying, return_exceptions=True)
            self._server.stop_listening()
            self._clients.close()
            self.links.close()
            await self._leave()
            await self._close("store", self.store.close)
            if self._cache is not None and await self._close("object cache", self._cache.close):
                self._cache.closed()
            self._workers.stop()
            if self._pid_file is not None:
                self._pid_file.remove()
            self._log(6, "shutdown")

    async def _close(self, what: str, close: Callable[[Callable[[], None]], None]) -> bool:
        closed: asyncio.Future[None] = self._loop.create_future()
        close(lambda: None if closed.done() else closed.set_result(None))
        try:
            await asyncio.wait_for(closed, END_TIMEOUT_S)
        except TimeoutError:
            self._log(
                3, f"the {what} was not closed within {END_TIMEOUT_S:.0f} s; it will be checked at the next start"
            )
            return False
        return True

    async def _stay_joined(self) -> None:
        """Attaches to the membership engine; UsageError. Does so again, for as long as it takes, when it is lost."""
        await self._attachment.driver.open(self._peer(), self._on_event)
        while True:
            await self._lost.wait()
            self._lost.clear()
            others = [member.id for member in self.node.cluster.members if member.id != self._id]
            await self._attachment.driver.close()
            self._begin_incarnation(registry.create(self.options.driver))
            if self._expelled:
                await until_reached(others, lambda line: self._log(4, line))
            await self._attach_again()

    async def _attach_again(self) -> None:
        delay_s, complaint = REJOIN_FIRST_S, ""
        while True:
            try:
                await self._attachment.driver.open(self._peer(), self._on_event)
                return
            except UsageError as error:
                if str(error) != complaint:
                    complaint = str(error)
                    self._log(4, f"cannot join again yet: {error}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, REJOIN_MAX_S)
            self._attachment.driver = registry.create(self.options.driver)

    def _peer(self) -> Peer:
        return Peer(bytes.fromhex(node_key(self._id)), 0, self.node.payload)

    async def _leave(self) -> None:
        if self._attachment.leaving is None:
            self._attachment.leave()
        assert self._attachment.leaving is not None
        try:
            await asyncio.wait_for(self._attachment.leaving, END_TIMEOUT_S)
        except (TimeoutError, OSError, UsageError) as error:
            self._log(4, f"could not leave the membership engine orderly: {error}")
        await self._attachment.driver.close()

    def _on_event(self, event: Event) -> None:
        self.node.on_event(event)
        if isinstance(event, Suspended):
            self._lose_patience_later()
        elif self._lost.is_set():
            return
        elif self.node.machine.joined and (not self._serving or isinstance(event, Resumed)):
            self._serving = True
            self._stop_patience()
            self._server.admit_clients()
            self._startup.done(self.options.metadata)

    def _on_lost(self, reason: str) -> None:
        """What became of the requests under way is not known here any more: clients have to ask again."""
        self._serving = False
        self._server.hold_clients()
        self._clients.hang_up()
        self._lose_patience_later()
        self._expelled = reason == EXPELLED
        self._lost.set()

    def _lose_patience_later(self) -> None:
        if self._patience is None:
            self._patience = self._loop.call_later(CLIENT_PATIENCE_S, self._lose_patience)

    def _stop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        self._patience = None
        self._log(4, f"out of the cluster for {CLIENT_PATIENCE_S:.0f} s: clients are turned away until it is back")
        self._server.turn_clients_away()
        self._clients.hang_up()

    def _terminate(self, signal_name: str) -> None:
        self._log(5, f"{signal_name}: leaving the cluster")
        self.node.stop(lambda: self._end(0, signal_name))

    def _disk_failed(self, directory: str, reason: str, last: bool) -> None:
        self._failed_disks.append(directory)
        if last:
            self._log(2, f"{directory} is out of service: {reason}; leaving the cluster")
            self._end(1, "nothing can be stored here any more", f"{directory} is out of service: {reason}")

    def _end(self, status: int, reason: str, told: str = "") -> None:
        """`told`: what whoever waits for the start is told, if the log has said more already."""
        if not self._ending.done():
            self._status = status
            self._log(3 if status else 5, f"ending: {reason}")
            self._startup.tell(told or reason)
            self._ending.set_result(None)


def store_options(options: Options) -> StoreOptions:
    """What the command line says about the store."""
    journal = options.journal
    return StoreOptions(
        nosync=options.nosync,
        journal_bytes=journal.size_bytes if journal else 0,
        journal_directory=journal.directory if journal else None,
        journal_skip=journal.skip if journal else False,
        direct_io=options.direct_io,
    )


def capacity(paths: tuple[str, ...]) -> int:
    """Bytes of the file systems that the paths are on: what a node weighs (it does not change while disks fill)."""
    total = 0
    seen: dict[int, None] = {}
    for path in paths:
        where = path if os.path.isdir(path) else os.path.dirname(path)
        device = os.stat(where).st_dev
        if device not in seen:
            seen[device] = None
            status = os.statvfs(where)
            total += status.f_blocks * status.f_frsize
    return total


def announced(options: Options, driver: Driver) -> bytes:
    """The address that the other nodes use, part of this node's identity: the only one that it listens on, if that is
    so. UsageError when it cannot be told now."""
    if options.my_address:
        return resolve(options.my_address)
    if options.bind_address and any(only := resolve(options.bind_address)):  # 0.0.0.0 and :: are all
        return only
    return resolve(driver.local_address() or "127.0.0.1")


def resolve(text: str) -> bytes:
    """The 16-byte form of an IPv4 or IPv6 address (options have been checked)."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(12) + socket.inet_aton(text)
