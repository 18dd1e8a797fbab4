"""The daemon `sheep`: the one place that puts the parts together.

Order of a start: lock on META (mistakes up to here are printed), log, store, listening sockets, membership engine.
Order of an end: leave the cluster, make everything durable, close the store, remove the pid file.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.cluster.core.limits import DEFAULT_VNODES
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Event, Peer
from sheepdog.cluster.core.state import node_key
from sheepdog.cluster.host import lifecycle
from sheepdog.cluster.host.disk import RealDisk
from sheepdog.cluster.host.links import Links
from sheepdog.cluster.host.logs import Logs
from sheepdog.cluster.host.loop import Collector, HostClock, Turn, describe, new_loop, prepare_process
from sheepdog.cluster.host.node_state import DirectoryLock, NodeStateFiles
from sheepdog.cluster.host.object_store import ObjectStore
from sheepdog.cluster.host.options import Options
from sheepdog.cluster.host.server import Server
from sheepdog.cluster.host.workers import ThreadWorkers
from sheepdog.cluster.wire.streams import Arena, BufferPool

END_TIMEOUT_S = 30.0  # for making everything durable at the end; a hung disk must not keep a host from rebooting
VERSION = "1.0"  # of the command lines and the protocol that this daemon stands in for


def run(options: Options) -> int:
    """Runs a sheep to its end; the exit status. Without -f the caller's process returns once META is locked."""
    startup = lifecycle.Startup() if options.foreground else lifecycle.detach()
    try:
        lock = DirectoryLock(options.metadata)
        logs = Logs(options.log, options.metadata)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    startup.done(options.metadata)
    try:
        return Daemon(options, logs).run()
    except UsageError as error:
        logs.write(3, str(error))
        if options.foreground:
            print(error, file=sys.stderr)
        return 1
    except Exception as error:
        logs.write(2, f"internal error: {describe(error)}")
        if options.foreground:
            raise
        return 1
    finally:
        logs.close()
        lock.release()


class _Broadcasts:
    """`ports.Engine` over a driver."""

    def __init__(self, broadcast: Callable[[bytes], None], leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._broadcast = broadcast
        self._leave = leave
        self.leaving: asyncio.Task[None] | None = None

    def broadcast(self, data: bytes) -> None:
        self._broadcast(data)

    def leave(self) -> None:
        if self.leaving is None:
            self.leaving = asyncio.get_running_loop().create_task(self._leave())


class Daemon:
    """One sheep, from its store to its last log line."""

    def __init__(self, options: Options, logs: Logs) -> None:
        self.options = options
        self.logs = logs
        self._log = logs.write
        self._loop = new_loop(self._log)
        self._status = 1
        self._serving = False  # clients are let in once this node has joined
        self._ending: asyncio.Future[None] = self._loop.create_future()
        self._pid_file: lifecycle.PidFile | None = None
        prepare_process(self._log)
        self._turn = Turn(self._loop)
        arena = Arena(BufferPool())
        self.address = resolve(options.my_address) if options.my_address else resolve("127.0.0.1")
        from sheepdog.cluster.drivers import registry

        self._driver = registry.create(options.driver)
        self._broadcasts = _Broadcasts(self._driver.broadcast, self._driver.leave)
        self._workers = ThreadWorkers(self._call_soon)
        disk = RealDisk()
        self._state = NodeStateFiles(options.metadata, disk, self._workers, self._log)
        self._state.open()
        objects = options.disks[0] if options.disks else f"{options.metadata}/obj"
        self.store = ObjectStore(objects, disk, self._workers, self._log, self._disk_failed, options.nosync)
        self.store.open()
        node_id = NodeId(self.address, options.port)
        self.links = Links(node_id, self._loop, self._turn, arena, self._log)
        me = self._member(node_id)
        self.node = Node(
            me,
            HostClock(self._loop),
            self.links,
            self.store,
            self._state,
            self._broadcasts,
            self._log,
            options.vnodes is not None,
        )
        self.links.on_message = self.node.on_message
        self.links.on_link = self.node.on_link
        self.node.on_exit = self._end
        from sheepdog.frontends.qemu.connection import Clients
        from sheepdog.frontends.qemu.operations import handlers
        from sheepdog.frontends.qemu.requests import Requests

        node = self.node
        requests = Requests(node.gateway, lambda: node.cluster, handlers(node, logs, self.store, objects))
        self._clients = Clients(self._loop, self._turn, arena, requests.dispatch, lambda: node.cluster.epoch, self._log)
        self._clients.peers = self.links
        self._server = Server(self._loop, self.links.adopt, self._clients.adopt, self._log)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _member(self, node_id: NodeId) -> Member:
        options = self.options
        vnodes = 0 if options.gateway else options.vnodes or DEFAULT_VNODES
        zone = int.from_bytes(self.address[12:], "little") if options.zone is None else options.zone
        space = 0 if options.gateway else capacity(self.options.disks or (self.options.metadata,))
        return Member(node_id, zone, vnodes, space)

    def run(self) -> int:
        options = self.options
        self._log(6, f"sheepdog daemon (version {VERSION}) started")
        for line in options.without_effect():
            self._log(4, line)
        if options.nosync:
            self._log(4, "-n: writes are acknowledged before they are on the disk; a power failure may lose them")
        if options.pid_file:
            self._pid_file = lifecycle.PidFile(options.pid_file)
        self._server.listen_tcp(options.bind_address, options.port)
        self._server.listen_unix(f"{options.metadata}/sock")
        lifecycle.handle_signals(self._loop, self._terminate, self.logs.reopen)
        self.node.start()
        collector = Collector(self._loop, self._turn)
        collector.start()
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._live())
        finally:
            collector.stop()
            self._loop.close()
        return self._status

    async def _live(self) -> None:
        me = Peer(bytes.fromhex(node_key(self.node.context.me)), 0, self.node.payload)
        try:
            await self._driver.open(me, self._on_event)
            await self._ending
        finally:
            self._server.stop_listening()
            self._clients.close()
            self.links.close()
            await self._leave()
            closed: asyncio.Future[None] = self._loop.create_future()
            self.store.close(lambda: None if closed.done() else closed.set_result(None))
            try:
                await asyncio.wait_for(closed, END_TIMEOUT_S)
            except TimeoutError:
                self._log(
                    3, f"the store was not closed within {END_TIMEOUT_S:.0f} s; it will be checked at the next start"
                )
            self._workers.stop()
            if self._pid_file is not None:
                self._pid_file.remove()
            self._log(6, "shutdown")

    async def _leave(self) -> None:
        if self._broadcasts.leaving is None:
            self._broadcasts.leave()
        assert self._broadcasts.leaving is not None
        try:
            await asyncio.wait_for(self._broadcasts.leaving, END_TIMEOUT_S)
        except (TimeoutError, OSError, UsageError) as error:
            self._log(4, f"could not leave the membership engine orderly: {error}")
        await self._driver.close()

    def _on_event(self, event: Event) -> None:
        self.node.on_event(event)
        if self.node.machine.joined and not self._serving:
            self._serving = True
            self._server.admit_clients()

    def _terminate(self, signal_name: str) -> None:
        self._log(5, f"{signal_name}: leaving the cluster")
        self.node.stop(lambda: self._end(0, signal_name))

    def _disk_failed(self, directory: str, reason: str) -> None:
        self._log(2, f"disk {directory} failed and is out of service: {reason}; no disk is left, leaving the cluster")
        self._end(1, "the disk failed")

    def _end(self, status: int, reason: str) -> None:
        if not self._ending.done():
            self._status = status
            self._log(5, f"ending: {reason}")
            self._ending.set_result(None)


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


def resolve(text: str) -> bytes:
    """The 16-byte form of an IPv4 or IPv6 address (options have been checked)."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(12) + socket.inet_aton(text)
