"""Membership of one host without a server: an append-only log under a lock, wake-ups, and death seen by the kernel.

`local[:FILE]`: FILE is the log (local_log), FILE.d the directory of lock, members and sockets (local_members); the
default FILE keeps them in /tmp/sheepdog_locks. Order is the order of the log, so it is the same for everybody; a
wake-up only says "look", and losing one costs at most POLL_S. Two FILEs are two clusters.

A stopped process counts as alive. A member file removed by somebody else ends the member: it gets Lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections import deque
from dataclasses import replace
from typing import ClassVar

import asyncio_dgram

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.limits import LEASE_NS
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, Resumed, Suspended, View, Votes
from sheepdog.cluster.drivers.base import MAX_MESSAGE_BYTES, MAX_QUEUED_BYTES, OnEvent
from sheepdog.cluster.drivers.local_log import Damaged, EventLog, Header, Record, RecordKind
from sheepdog.cluster.drivers.local_members import MemberCard, MemberDirectory, pid_namespace
from sheepdog.cluster.drivers.local_watch import DeathWatch

DEFAULT_FILE = "/tmp/sheepdog_shm"
DEFAULT_DIRECTORY = "/tmp/sheepdog_locks"
POLL_S = 1.0  # safety net for lost wake-ups and removed files; costs two system calls
TOUCH_S = 3600.0  # programs that tidy up /tmp count in days
BATCH_BYTES = 1 << 20  # appended under one lock: short enough for the others to get it too
LOCK_RETRY_S = 0.002  # mean wait when another member holds the lock, which takes it tens of microseconds
OPEN_PATIENCE_S = 10.0  # for the lock, and for a predecessor of the same id that is just exiting
TWIN_RETRY_S = 0.05  # while that predecessor exits
LEAVE_PATIENCE_S = 5.0  # then the process leaves without saying so, and the others find its lock free
STUCK_S = 2.0  # appends that fail for this long are reported
PUBLISH_BYTES = 256 << 10  # how far the published read position may lag behind
TRIM_BYTES = 1 << 20  # space behind everybody's position that is worth a system call

_logger = logging.getLogger(__name__)


class LocalDriver:
    """The `local` driver; see cluster/drivers/base.py for the promises."""

    name: ClassVar[str] = "local"

    def __init__(self, argument: str = "") -> None:
        self.max_message = MAX_MESSAGE_BYTES
        path = os.path.abspath(argument or DEFAULT_FILE)
        self._log = EventLog(path)
        self._directory = MemberDirectory(f"{path}.d" if path != DEFAULT_FILE else DEFAULT_DIRECTORY)
        self._deaths = DeathWatch(self._directory, self._suspect)
        self._me = Peer(b"", 0, b"")
        self._generation = 0
        self._cursor = 0
        self._published = 0
        self._view: dict[int, Peer] = {}  # by incarnation, which is by age
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._suspects: dict[int, None] = {}
        self._events: deque[Event] = deque()
        self._delivering = False
        self._suspended = False
        self._stuck_since: float | None = None
        self._member_fd = -1
        self._socket: asyncio_dgram.DatagramStream | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._left: asyncio.Future[None] | None = None
        self._flushing: asyncio.Handle | None = None
        self._poll: asyncio.Handle | None = None
        self._renewing: asyncio.Handle | None = None
        self._backlog = False  # the log is not read to its end
        self._next_touch = 0.0

    # --- attaching -------------------------------------------------------------------------------------------------

    async def open(self, me: Peer, on_event: OnEvent) -> None:
        if len(me.id) + len(me.payload) > self.max_message:
            raise UsageError(f"local driver: a payload of {len(me.payload)} bytes is too large")
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        try:
            self._directory.open()
            bound = await self._join(me)
            self._socket = await asyncio_dgram.from_socket(bound)
        except OSError as error:
            self._release()
            raise UsageError(f"local driver: {error.filename or 'shared state'}: {error.strerror}") from error
        except BaseException:
            self._release()
            raise
        self._receiver = self._loop.create_task(self._receive())
        self._next_touch = self._loop.time() + TOUCH_S
        self._poll = self._loop.call_later(POLL_S, self._tick)
        self._advance(wake=True)
        self.renew()

    async def _join(self, me: Peer) -> socket.socket:
        """Becomes a member; returns the socket on which it is woken."""
        deadline = self._loop.time() + OPEN_PATIENCE_S
        while True:
            pause_s = LOCK_RETRY_S
            if self._directory.try_lock():
                try:
                    joined = self._join_locked(me)
                finally:
                    self._directory.unlock()
                if joined is not None:
                    return joined
                problem, pause_s = "a member with the same identity is still running", TWIN_RETRY_S
            else:
                problem = "the lock is held by a process that does not go on"
            if self._loop.time() > deadline:
                raise UsageError(f"local driver: {self._directory.path}: {problem}")
            await asyncio.sleep(random.uniform(0.5, 1.5) * pause_s)

    def _join_locked(self, me: Peer) -> socket.socket | None:
        """None: the id is attached already."""
        self._log.open()
        header = self._log.read_header()
        files = self._directory.incarnations()
        dead = [incarnation for incarnation in files if self._directory.is_dead(incarnation)]
        peers = [self._directory.card(incarnation).peer for incarnation in files if incarnation not in dead]
        if any(peer.id == me.id for peer in peers):
            return None
        if header is None and peers:
            raise UsageError(f"local driver: the log of {self._directory.path} is damaged while others use it")
        if header is None or not peers:
            header = self._log.reset(header)
        else:
            header = self._log.append(header, [(RecordKind.LEAVE, incarnation, b"") for incarnation in dead])
        for incarnation in dead:
            self._directory.remove(incarnation)
        # From the clock, so that it is new even if the log was deleted (a reboot empties /tmp).
        incarnation = max(header.incarnation + 1, time.time_ns() // 1_000_000)
        self._me = replace(me, incarnation=incarnation)
        card = MemberCard(self._me, os.getpid(), pid_namespace())
        fd, bound = self._directory.create(card, header.end)
        try:
            entry = (RecordKind.JOIN, incarnation, card.encode())
            self._log.append(replace(header, incarnation=incarnation), [entry])
        except OSError:
            self._directory.remove(incarnation)
            os.close(fd)
            bound.close()
            raise
        self._member_fd = fd
        self._generation = header.generation
        self._cursor = self._published = header.end
        for peer in peers:
            self._view[peer.incarnation] = peer
            self._deaths.add(self._directory.card(peer.incarnation))
        return bound

    def local_address(self) -> str | None:
        return None

    def reach(self) -> None: ...

    def votes(self) -> Votes | None:
        return None

    def renew(self) -> None:
        """Reads the log up to now; if this process is in it still, it may answer for another lease.

        A process that was stopped and goes on reads here that the others have expelled it.
        """
        if self._renewing is None and self._member_fd >= 0:
            self._renewing = self._loop.call_soon(self._renew)

    def _renew(self) -> None:
        self._renewing = None
        began_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._advance()
        if self._member_fd < 0 or self._suspended:
            return
        if self._backlog:
            self.renew()  # not read to the end yet
            return
        self._events.append(Leased(began_ns + LEASE_NS))
        self._deliver()

    # --- sending ---------------------------------------------------------------------------------------------------

    def broadcast(self, data: bytes) -> None:
        if len(data) > self.max_message:
            raise UsageError(f"local driver: a message of {len(data)} bytes is too large")
        if not self._me.incarnation:
            raise UsageError("local driver: not opened")
        if self._member_fd < 0 or self._left is not None:  # lost or leaving: nobody would hear it
            return
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            raise UsageError("local driver: too many messages wait to be ordered")
        self._queue.append(bytes(data))
        self._queued_bytes += len(data)
        self._flush_soon()

    def _flush_soon(self, delay_s: float = 0.0) -> None:
        if self._flushing is None and self._member_fd >= 0:
            if delay_s:
                self._flushing = self._loop.call_later(delay_s, self._flush)
            else:
                self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Appends what waits: LEAVEs of the dead, own messages, own LEAVE. Comes back by itself until all is done."""
        self._flushing = None
        if self._member_fd < 0:
            return
        if not self._directory.try_lock():
            self._stuck("another process holds the lock")
            self._flush_soon(random.uniform(0.5, 1.5) * LOCK_RETRY_S)
            return
        outcome: bool | OSError | Damaged
        try:
            outcome = self._flush_locked()
        except (OSError, Damaged) as error:
            outcome = error
        finally:
            self._directory.unlock()
        self._flushed(outcome)

    def _flushed(self, outcome: bool | OSError | Damaged) -> None:
        if isinstance(outcome, OSError):
            self._stuck(f"{outcome.strerror}")
            self._flush_soon(POLL_S)
            return
        if isinstance(outcome, Damaged):
            self._lose(str(outcome))
            return
        self._stuck_since = None
        if self._left is not None and self._left.done():
            self._release()
            return
        self._advance(wake=outcome)
        if self._queue or self._suspects or self._left is not None:
            self._flush_soon()

    def _flush_locked(self) -> bool:
        """Whether anything was appended; each queued message leaves the queue when its record counts."""
        header = self._valid_header()
        dead = self._proven_dead(header)
        entries = [(RecordKind.LEAVE, incarnation, b"") for incarnation in dead]
        count = size = 0
        for data in self._queue:
            if count and size + len(data) > BATCH_BYTES:
                break
            entries.append((RecordKind.MESSAGE, self._me.incarnation, data))
            count, size = count + 1, size + len(data)
        leaving = self._left is not None and count == len(self._queue)
        if leaving:
            entries.append((RecordKind.LEAVE, self._me.incarnation, b""))
        if entries:
            header = self._log.append(header, entries)
        for _ in range(count):
            self._queued_bytes -= len(self._queue.popleft())
        for incarnation in dead:
            self._directory.remove(incarnation)
        if leaving and self._left is not None:
            self._directory.remove(self._me.incarnation)
            for incarnation in self._directory.incarnations():  # of whom some may not be in the view yet
                self._directory.wake(incarnation)
            self._left.set_result(None)
        self._trim(header)
        return bool(entries)

    def _proven_dead(self, header: Header) -> list[int]:
        """Suspects whose LEAVE is to be appended; those that stay suspects are asked for again after reading on."""
        dead = []
        for incarnation in list(self._suspects):
            if incarnation not in self._view:
                del self._suspects[incarnation]
            elif not self._directory.is_dead(incarnation):  # its lock outlives it in a child: wait for that one
                del self._suspects[incarnation]
                self._deaths.poll(incarnation)
            elif self._directory.exists(incarnation) or self._cursor == header.end:
                dead.append(incarnation)  # without a file and with unread records: its LEAVE may be among them
        return dead

    def _valid_header(self) -> Header:
        header = self._log.read_header()
        if header is None or header.generation != self._generation or header.end < self._cursor:
            raise Damaged("the shared log was overwritten")
        if os.fstat(self._member_fd).st_nlink == 0:
            raise Damaged("the member file was removed")
        return header

    def _trim(self, header: Header) -> None:
        if header.end - header.trimmed > TRIM_BYTES:
            living = [number for number in self._directory.incarnations() if not self._directory.is_dead(number)]
            self._log.trim(header, min((self._directory.position(number) for number in living), default=header.end))

    def _stuck(self, reason: str) -> None:
        """Appending fails: reading goes on, so nothing is suspended, but people should know."""
        now = self._loop.time()
        if self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > STUCK_S:
            self._stuck_since = now
            _logger.warning("local driver: ordered messages are stuck: %s: %s", self._directory.path, reason)

    # --- receiving -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            try:
                await self._socket.recv()
            except OSError:  # of an earlier send or receive; the poll covers the pause
                await asyncio.sleep(POLL_S)
            except asyncio_dgram.TransportClosed:
                return
            self._advance()

    def _advance(self, wake: bool = False) -> None:
        """Reads what is new, wakes the others if this process wrote it, and delivers."""
        if self._member_fd < 0:
            return
        try:
            header = self._valid_header()
            if self._cursor < header.end:
                records, self._cursor = self._log.read(self._cursor, header.end)
                for record in records:
                    self._fold(record)
                self._backlog = self._cursor < header.end
                if self._backlog:  # a large backlog is read in turns
                    self._loop.call_soon(self._advance)
                if self._cursor - self._published > PUBLISH_BYTES:
                    self._published = self._cursor
                    self._directory.publish(self._member_fd, self._cursor)
        except Damaged as error:
            self._lose(str(error))
            return
        except OSError as error:
            if not self._suspended:
                self._suspended = True
                self._events.append(Suspended(f"local driver: {error.strerror}"))
        else:
            if self._suspended:
                self._suspended = False
                self._events.append(Resumed())
        if wake:
            self._wake_others()
        self._deliver()

    def _fold(self, record: Record) -> None:
        """Turns a record into an event; the same records make the same events on every member."""
        incarnation = record.incarnation
        if record.kind == RecordKind.MESSAGE:
            if incarnation in self._view:
                self._events.append(Delivery(record.sequence, self._view[incarnation], record.data))
        elif record.kind == RecordKind.JOIN:
            card = MemberCard.decode(incarnation, record.data)
            self._view[incarnation] = card.peer
            if incarnation != self._me.incarnation:
                self._deaths.add(card)
            self._events.append(View(record.sequence, tuple(self._view.values()), (card.peer,), ()))
        elif incarnation == self._me.incarnation:
            raise Damaged("this member was removed")
        elif incarnation in self._view:  # not so if two reapers were killed on the way: then it left already
            peer = self._view.pop(incarnation)
            self._deaths.remove(incarnation)
            self._suspects.pop(incarnation, None)
            self._events.append(View(record.sequence, tuple(self._view.values()), (), (peer,)))

    def _deliver(self) -> None:
        if self._delivering:  # a handler made us read on: the loop below goes on with it
            return
        self._delivering = True
        try:
            while self._events:
                self._on_event(self._events.popleft())
        finally:
            self._delivering = False
            if self._events:  # a handler raised: the rest follows
                self._loop.call_soon(self._deliver)

    def _wake_others(self) -> None:
        for incarnation in self._view:
            if incarnation != self._me.incarnation:
                self._directory.wake(incarnation)

    # --- watching --------------------------------------------------------------------------------------------------

    def _suspect(self, incarnation: int) -> None:
        self._suspects[incarnation] = None
        self._flush_soon()

    def _tick(self) -> None:
        """The safety net, once in POLL_S."""
        self._poll = None
        if not (self._log.in_place() and self._directory.in_place()):
            self._lose("the shared files were removed")
            return
        self._advance()
        if self._member_fd < 0:
            return
        members = list(self._view)
        older = members[members.index(self._me.incarnation) - 1] if self._me.incarnation in self._view else 0
        if older and older != self._me.incarnation and self._directory.is_dead(older):
            self._suspect(older)  # a driver closed without leaving in a process that lives on
        if self._loop.time() > self._next_touch:
            self._next_touch = self._loop.time() + TOUCH_S
            self._log.touch()
            self._directory.touch()
            os.utime(self._member_fd)
        self._poll = self._loop.call_later(POLL_S, self._tick)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        if self._member_fd < 0 or self._left is not None:
            return
        self._left = self._loop.create_future()
        self._flush_soon()
        try:
            await asyncio.wait_for(asyncio.shield(self._left), LEAVE_PATIENCE_S)
        except TimeoutError:
            _logger.warning("local driver: left without telling: %s is stuck", self._directory.path)
        self._release()

    async def close(self) -> None:
        self._release()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
            self._receiver = None

    def _lose(self, reason: str) -> None:
        self._release()
        self._events.append(Lost(f"local driver: {reason}"))
        self._deliver()

    def _release(self) -> None:
        """Frees everything at once; closing the member file frees its lock, which is what being dead means."""
        for handle in (self._flushing, self._poll, self._renewing):
            if handle is not None:
                handle.cancel()
        self._flushing = self._poll = self._renewing = None
        self._deaths.close()
        if self._left is not None and not self._left.done():
            self._left.set_result(None)
        self._events.clear()
        self._queue.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._member_fd >= 0:
            os.close(self._member_fd)
            self._member_fd = -1
        self._directory.close()
        self._log.close()
