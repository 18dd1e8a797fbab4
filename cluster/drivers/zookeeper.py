"""Membership by a ZooKeeper ensemble: `zookeeper:HOST:PORT[,HOST:PORT...][/CLUSTER][,timeout=MS]`.

 BASE/queue/e-NNNNNNNNNN   the log (zookeeper_log): sequential znodes, read by all in order
 BASE/members/ID           ephemeral, one for each attached process: incarnation, and how far it has read
 BASE/checkpoint           the roster at a position of the log; entries below it that all have read are deleted

BASE is /CLUSTER, or /sheepdog: several clusters share an ensemble. An incarnation is the number of a session.

A member that is gone without a word is declared DEAD in the log by the oldest living one, so leaves have a place in
the one order too. The lease is renewed by a write to the own znode: a quorum has seen it, and only a valid session
may write, whereas reads and pings are answered by servers that are cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, ClassVar

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Event, Leased, Lost, Peer, Resumed, Suspended, View, Votes
from sheepdog.cluster.drivers.base import MAX_MESSAGE_BYTES, MAX_QUEUED_BYTES, OnEvent
from sheepdog.cluster.drivers.zookeeper_argument import DEFAULT_TIMEOUT_MS, complaint, lease_ns, own_address, parse
from sheepdog.cluster.drivers.zookeeper_client import (
    Client,
    Connection,
    NodeExistsError,
    NoNodeError,
    Unreachable,
    ZnodeStat,
    current_task,
    reason_of,
    session_begins,
)
from sheepdog.cluster.drivers.zookeeper_collect import Gaps, append, shorten
from sheepdog.cluster.drivers.zookeeper_log import (
    MAX_ENTRY_MESSAGES,
    MESSAGE_OVERHEAD_BYTES,
    Entry,
    EntryKind,
    Roster,
    dead_entry,
    join_entry,
    messages_entry,
    position_path,
)

GRACE_PERCENT = 110  # two hosts' clocks run at speeds that differ by far less than a tenth
CONNECT_PATIENCE_S = 10.0  # at the start: longer than an election, short enough for a person with a wrong address
JOIN_PATIENCE_S = 15.0  # beyond the timeout, in which the session of a dead predecessor ends
TWIN_RETRY_S = 0.2
LEAVE_PATIENCE_S = 5.0  # then the others see a death instead
READ_ON_S = 0.005  # a round trip, while entries are on their way
BATCH_BYTES = MAX_MESSAGE_BYTES  # of one entry; a single message of the largest size fits (a znode holds 1 MiB)
GAP_ROUNDS = 10  # between looks for gaps, about a second each: only somebody else's writing makes them
READ_WINDOW = 32  # entries asked for at a time while there are more: a round trip takes milliseconds
CHECKPOINT_ENTRIES = 1000  # between two checkpoints: a late joiner reads that many in a second
PUBLISH_ENTRIES = 250  # how far the published read position may lag behind

_logger = logging.getLogger(__name__)


class ZooKeeperDriver:
    """The `zookeeper` driver; see cluster/drivers/base.py for the promises."""

    name: ClassVar[str] = "zookeeper"

    def __init__(self, argument: str = "") -> None:
        self._servers, self._base, self._timeout_ms = parse(argument)
        self.max_message = MAX_MESSAGE_BYTES
        self._lease_ns = lease_ns(self._timeout_ms)  # until the servers have their say
        self._me = Peer(b"", 0, b"")
        self._roster = Roster()
        self._position = 0  # of the next entry to read
        self._folded = 0  # transaction of the entry that was read last
        self._counter = 0  # of own entries
        self._published = self._checkpoint = 0  # positions
        self._joined = False  # the own join was read
        self._over = False  # lost, left or closed: no more events
        self._leaving = False
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._struck: dict[int, None] = {}  # whose death this member has declared
        self._suspended_for: str | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._client: Client | None = None

    def local_address(self) -> str | None:
        """The address by which this host talks to the servers: the other members reach it there, too."""
        return own_address(self._servers)

    def reach(self) -> None:
        session_s = min(self._timeout_ms, DEFAULT_TIMEOUT_MS) / 1000  # kazoo waits so long for a server that hangs
        if not asyncio.run(session_begins(self._servers, session_s, CONNECT_PATIENCE_S)):
            raise UsageError(f"zookeeper driver: {self._servers}: {complaint(self._servers)}")

    # --- attaching -------------------------------------------------------------------------------------------------

    async def open(self, me: Peer, on_event: OnEvent) -> None:
        if len(me.id) + len(me.payload) > self.max_message // 2:
            raise UsageError(f"zookeeper driver: a payload of {len(me.payload)} bytes is too large")
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._up = asyncio.Event()
        self._woken = asyncio.Event()  # something new may be in the log
        self._to_send = asyncio.Event()
        self._sent = asyncio.Event()
        self._look = asyncio.Event()  # somebody may have gone
        self._client = Client(self._servers, self._timeout_ms / 1000, self._changed)
        self._gaps = Gaps(self._client, self._base)
        problem = ""
        try:
            self._client.start()
            await asyncio.wait_for(self._up.wait(), CONNECT_PATIENCE_S)
            self._lease_ns = lease_ns(self._client.timeout_ms)
            problem = "the ensemble does not answer, or a member with the same identity is still running"
            await asyncio.wait_for(self._join(me), self._timeout_ms / 1000 + JOIN_PATIENCE_S)
        except Exception as error:
            await self.close()
            if not isinstance(error, TimeoutError):
                problem = self._explained(error)
            reason = problem or await asyncio.to_thread(complaint, self._servers)
            raise UsageError(f"zookeeper driver: {self._servers}: {reason}") from error
        except BaseException:
            await self.close()
            raise
        for body in (self._read_all, self._send_all, self._watch_all, self._collect_all):
            self._tasks.append(self._loop.create_task(self._guarded(body)))

    async def _join(self, me: Peer) -> None:
        client = self._there
        while True:
            try:
                for name in ("queue", "members"):
                    await client.ensure(f"{self._base}/{name}")
                self._me = replace(me, incarnation=client.session)
                await self._claim_id()
                await self._begin_at_checkpoint()
                names = dict.fromkeys(await client.children(f"{self._base}/members"))
                break
            except Unreachable:
                await self._up.wait()
        # Nobody else is attached with this id now, so whoever the roster has under it is dead.
        dead = [n for n, peer in self._roster.members.items() if peer.id == me.id or peer.id.hex() not in names]
        if dead:
            await self._append(dead_entry(self._me.incarnation, 0, dead))
        await self._append(join_entry(self._me, self._lease_ns))

    async def _claim_id(self) -> None:
        """Makes the own ephemeral znode; waits for the end of a predecessor that has just died."""
        client, path = self._there, self._member_path(self._me)
        while True:
            try:
                await client.create(path, self._member_data(), ephemeral=True)
                return
            except NodeExistsError:
                stat = await client.exists(path)
                if stat is not None and self._is_owner(stat, self._me):
                    return  # the answer to an earlier attempt was lost
                await asyncio.sleep(TWIN_RETRY_S)

    async def _begin_at_checkpoint(self) -> None:
        """The roster as of the log's end. The own znode is there already, so nothing is deleted meanwhile."""
        try:
            data, _ = await self._there.get(f"{self._base}/checkpoint")
            self._roster, self._position = Roster.decode(data)
        except NoNodeError:
            self._roster, self._position = Roster(), 0
        self._checkpoint = self._position
        while await self._read_window(READ_WINDOW) or await self._skip_gap():
            pass

    @property
    def _there(self) -> Client:
        if self._client is None:
            raise UsageError("zookeeper driver: not opened")
        return self._client

    def _member_path(self, peer: Peer) -> str:
        return f"{self._base}/members/{peer.id.hex()}"

    def _member_data(self) -> bytes:
        position = self._position if self._joined else None  # while joining, nothing may be deleted
        return json.dumps({"incarnation": self._me.incarnation, "position": position}).encode()

    @staticmethod
    def _is_owner(stat: ZnodeStat, peer: Peer) -> bool:
        owner: int = stat.ephemeralOwner
        return (owner - peer.incarnation) % (1 << 64) == 0

    # --- the connection --------------------------------------------------------------------------------------------

    def _changed(self, state: Connection) -> None:
        if state is Connection.LOST:
            self._lose("the session has expired")
        elif state is Connection.DOWN:
            self._up.clear()
            self._suspend("the connection to the servers is lost")
        else:
            self._up.set()
            self._woken.set()
            self._look.set()
            if self._joined:
                self.renew()

    def _suspend(self, reason: str) -> None:
        if self._suspended_for is None and self._joined:
            self._suspended_for = reason
            self._emit(Suspended(f"zookeeper driver: {reason}"))

    def _lose(self, reason: str) -> None:
        """The end of this incarnation."""
        if not self._over:
            self._end()
            if self._joined or self._tasks:  # `open` has succeeded: nobody else would tell that it is over
                self._deliver(Lost(f"zookeeper driver: {reason}"))

    def _emit(self, event: Event) -> None:
        if not self._over:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # the handler's bug must not stop the order of events
            self._loop.call_exception_handler({"message": "a membership event was not handled", "exception": error})

    def votes(self) -> Votes | None:
        return None  # the servers may be anywhere

    def renew(self) -> None:
        """Asks for a new lease; comes back by itself until there is one."""
        if self._joined and not self._over and (self._renewal is None or self._renewal.done()):
            self._renewal = self._loop.create_task(self._guarded(self._renew))

    async def _renew(self) -> None:
        lease_s = self._lease_ns / 1e9
        late = self._loop.call_later(lease_s, self._suspend, f"no answer of the servers for {lease_s:.1f} s")
        try:
            while True:
                began_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                try:
                    await self._read_up_to(await self._publish())
                    break
                except Unreachable:
                    await self._up.wait()
        finally:
            late.cancel()
        self._renewal = None  # who finds that this lease is over already asks for the next one at once
        self._emit(Leased(began_ns + self._lease_ns))
        if self._suspended_for is not None and self._up.is_set():
            self._suspended_for = None
            self._emit(Resumed())

    async def _read_up_to(self, transaction: int) -> None:
        """Everything that was ordered before it is folded: the others may have expelled this member."""
        while self._folded < transaction:
            position = self._position
            stat = await self._there.exists(self._entry_path(position))
            if stat is None and not await self._skip_gap():
                return
            if stat is not None and position == self._position and stat.czxid > transaction:
                return
            await asyncio.sleep(READ_ON_S)

    async def _skip_gap(self) -> bool:
        """Goes on behind a number that no entry has; False: all that there are have been read."""
        position = self._position
        following = await self._gaps.next_after(position, self._folded)
        if following is not None and position == self._position:
            _logger.warning("zookeeper driver: something in %s/queue is not of this cluster", self._base)
            self._position = following
            self._woken.set()
        return position != self._position

    async def _publish(self) -> int:
        """Writes the own znode; the transaction of that."""
        self._published = self._position
        return await self._there.set(self._member_path(self._me), self._member_data())

    async def _guarded(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a task of the driver; what it cannot go on without ends this incarnation."""
        try:
            await body()
        except Exception as error:
            self._lose(self._explained(error))

    def _explained(self, error: Exception) -> str:
        reason = reason_of(error)
        if reason is None:  # a bug of ours, or entries that nobody of ours has written
            self._loop.call_exception_handler({"message": "a task of the driver ended", "exception": error})
        return reason or f"internal error: {type(error).__name__}"

    # --- sending ---------------------------------------------------------------------------------------------------

    def broadcast(self, data: bytes) -> None:
        if len(data) > self.max_message:
            raise UsageError(f"zookeeper driver: a message of {len(data)} bytes is too large")
        if not self._me.incarnation:
            raise UsageError("zookeeper driver: not opened")
        if self._over or self._leaving:  # nobody would hear it
            return
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            raise UsageError("zookeeper driver: too many messages wait to be ordered")
        self._queue.append(bytes(data))
        self._queued_bytes += len(data)
        self._to_send.set()

    async def _append(self, entry: Entry) -> None:
        """Repeats until the entry is in the log; it may be there twice then."""
        data = entry.encode()
        while True:
            try:
                await append(self._there, self._base, data)
                return
            except Unreachable:
                await self._up.wait()

    async def _send_all(self) -> None:
        """One entry at a time; what was queued meanwhile goes into the next one together."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while self._queue:
                count = size = 0
                for data in self._queue:
                    size += len(data) + MESSAGE_OVERHEAD_BYTES
                    if count and (size > BATCH_BYTES or count == MAX_ENTRY_MESSAGES):
                        break
                    count += 1
                self._counter += 1
                messages = [self._queue[index] for index in range(count)]
                await self._append(messages_entry(self._me.incarnation, self._counter, messages))
                for _ in range(count):
                    self._queued_bytes -= len(self._queue.popleft())
            if self._leaving:
                self._counter += 1
                await self._append(Entry(EntryKind.LEAVE, self._me.incarnation, self._counter, b""))
                self._sent.set()
                return

    # --- receiving -------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        window = 1
        while True:
            self._woken.clear()
            try:
                if await self._read_window(window):
                    window = min(2 * window, READ_WINDOW)
                    continue
                window = 1
                if await self._there.exists(self._entry_path(self._position), self._woken.set) is None:
                    await self._woken.wait()
            except Unreachable:
                await self._up.wait()

    def _entry_path(self, position: int) -> str:
        return f"{self._base}/queue/{position_path(position)}"

    async def _read_window(self, window: int) -> bool:
        """Folds what is there of the next entries; whether all of them were."""
        paths = [self._entry_path(self._position + index) for index in range(window)]
        for found in await self._there.get_many(paths):
            if isinstance(found, NoNodeError):
                return False
            if isinstance(found, BaseException):
                raise found
            data, stat = found
            self._position += 1
            entry = Entry.decode(data)
            if entry is not None:  # else its transaction says nothing: it may have got its name at any time
                self._folded = stat.czxid
                self._fold(stat.czxid, entry)
            if self._over:
                return False
        if self._joined and self._position - self._published >= PUBLISH_ENTRIES:
            await self._publish()
        return True

    def _fold(self, transaction: int, entry: Entry) -> None:
        for event in self._roster.fold(transaction, entry):
            if isinstance(event, View):
                self._look.set()
                for peer in event.left:
                    self._struck.pop(peer.incarnation, None)
                if self._me in event.left:
                    if not self._leaving:
                        self._lose("this member was declared dead")
                    return
                if self._me in event.joined:
                    self._joined = True
                if event.grace_ns:
                    event = event._replace(grace_ns=event.grace_ns * GRACE_PERCENT // 100)
            if self._joined:
                self._emit(event)
        if self._joined and entry.author == self._me.incarnation and entry.kind == EntryKind.JOIN:
            self.renew()

    # --- watching the others ---------------------------------------------------------------------------------------

    async def _watch_all(self) -> None:
        """Each watches the next older living member; the oldest one watches all, and declares who is dead."""
        while True:
            self._look.clear()
            try:
                if self._joined and not await self._older_lives():
                    await self._declare_dead()
                await self._look.wait()
            except Unreachable:
                await self._up.wait()

    async def _older_lives(self) -> bool:
        members = list(self._roster.members.values())
        if self._me not in members:
            return True  # leaving
        for peer in reversed(members[: members.index(self._me)]):
            stat = await self._there.exists(self._member_path(peer), self._look.set)
            if stat is not None and self._is_owner(stat, peer):
                return True
        return False

    async def _declare_dead(self) -> None:
        asked = list(self._roster.members.items())  # who joins meanwhile is not in the answer, and lives
        names = dict.fromkeys(await self._there.children(f"{self._base}/members", self._look.set))
        gone = [n for n, peer in asked if peer.id.hex() not in names]
        dead = [n for n in gone if n in self._roster.members and n not in self._struck]
        if dead:
            await self._append(dead_entry(self._me.incarnation, 0, dead))
            self._struck.update(dict.fromkeys(dead))

    # --- keeping the log short -------------------------------------------------------------------------------------

    async def _collect_all(self) -> None:
        """The oldest member moves the checkpoint, and deletes what everybody has read. All look for gaps, as they
        otherwise do when a lease is wanted."""
        rounds = 0
        while True:
            rounds += 1
            await asyncio.sleep(random.uniform(0.5, 1.5))
            if rounds % GAP_ROUNDS == 0:
                with contextlib.suppress(Unreachable):
                    await self._skip_gap()
            if self._position - self._checkpoint < CHECKPOINT_ENTRIES:
                continue
            if next(iter(self._roster.members), 0) != self._me.incarnation:
                self._checkpoint = self._position - CHECKPOINT_ENTRIES // 2  # look again a little later
                continue
            position = self._position
            try:
                if await shorten(self._there, self._base, position, self._roster.encode(position)):
                    self._checkpoint = position
            except Unreachable:
                await self._up.wait()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        if self._over or self._leaving or not self._joined:
            return
        self._leaving = True
        self._to_send.set()
        try:
            await asyncio.wait_for(self._sent.wait(), LEAVE_PATIENCE_S)
        except TimeoutError:
            _logger.warning("zookeeper driver: left without telling: %s cannot be reached", self._servers)
        self._end()

    async def close(self) -> None:
        self._end()
        tasks, self._tasks = self._tasks, []
        if self._renewal is not None:
            tasks.append(self._renewal)
            self._renewal = None
        current = asyncio.current_task()
        for task in tasks:
            if task is not current:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not current), return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.stop()

    def _end(self) -> None:
        """No more events, and nothing more is sent."""
        self._over = True
        self._queue.clear()
        self._queued_bytes = 0
        for task in (*self._tasks, *([self._renewal] if self._renewal is not None else [])):
            if task is not current_task():
                task.cancel()
