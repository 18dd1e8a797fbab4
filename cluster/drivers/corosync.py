"""Membership by corosync: `corosync[:GROUP]`, the default where a corosync daemon runs.

One process group (GROUP, by default `sheepdog`) on the local daemon; corosync_order makes one order of events out of
what the daemon tells. A lease is a message that came back: a node that is cut off cannot send, since it has no token.

The daemon's death is this member's end (Lost); a new attachment is tried when it is back. What waits for the daemon's
answer goes through corosync_calls, lest a stopped one stops us.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from dataclasses import replace
from typing import ClassVar, NamedTuple

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Event, Leased, Lost, Peer, Votes
from sheepdog.cluster.drivers import cpg
from sheepdog.cluster.drivers.base import MAX_MESSAGE_BYTES, MAX_QUEUED_BYTES, OnEvent
from sheepdog.cluster.drivers.corosync_calls import answer, own_address, patiently
from sheepdog.cluster.drivers.corosync_messages import HEADER_BYTES
from sheepdog.cluster.drivers.corosync_order import Order

DEFAULT_GROUP = "sheepdog"
MAX_GROUP_BYTES = 127  # cpg.h
LEASE_NS = 1_000_000_000  # others wait so long after losing a node; coming back takes a message a millisecond
RETRY_S = 0.01  # when the daemon's queue is full: it empties within a token's round
TICK_S = 0.1  # between looks at messages that are not acknowledged
STOP_PATIENCE_S = 5.0  # for a daemon that does not answer at the end

_logger = logging.getLogger(__name__)


class _Connected(NamedTuple):
    """The connections to the daemon, and the number of its node."""

    group: cpg.Group
    quorum: cpg.Quorum
    node: int

    def close(self) -> None:
        self.group.close()
        self.quorum.close()


class CorosyncDriver:
    """The `corosync` driver; see cluster/drivers/base.py for the promises."""

    name: ClassVar[str] = "corosync"

    def __init__(self, argument: str = "") -> None:
        self._group_name = (argument or DEFAULT_GROUP).encode()
        if len(self._group_name) > MAX_GROUP_BYTES:
            raise UsageError(f"corosync driver: the group's name has more than {MAX_GROUP_BYTES} bytes")
        absent = cpg.missing()
        if absent is not None:
            raise UsageError(f"corosync driver: {absent} is not installed")
        self.max_message = MAX_MESSAGE_BYTES
        self._group: cpg.Group | None = None
        self._quorum: cpg.Quorum | None = None
        self._readers: list[int] = []
        self._verdicts: deque[cpg.Verdict] = deque()  # not told to the order yet
        self._judging: asyncio.Task[None] | None = None
        self._node = 0
        self._votes: Votes | None = None  # as of the latest quorate ring
        self._order: Order | None = None
        self._queue: deque[bytes] = deque()  # what the daemon has not taken yet
        self._queued_bytes = 0
        self._sending: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None  # a lease was asked for
        self._ticking: asyncio.TimerHandle | None = None  # a message waits to be acknowledged
        self._over = False
        self._flushed = asyncio.Event()

    def local_address(self) -> str | None:
        """The address of this node's first ring. UsageError while corosync does not run."""
        try:
            return own_address()
        except cpg.CorosyncError as error:
            raise UsageError(f"corosync driver: {error}") from error

    def reach(self) -> None:
        self.local_address()

    # --- attaching -------------------------------------------------------------------------------------------------

    async def open(self, me: Peer, on_event: OnEvent) -> None:
        if len(me.id) + len(me.payload) > self.max_message // 4:
            raise UsageError(f"corosync driver: a payload of {len(me.payload)} bytes is too large")
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        try:
            connected = await answer(lambda: patiently(_connect), discard=_Connected.close)
        except cpg.CorosyncError as error:
            raise UsageError(f"corosync driver: {error}") from error
        group, quorum, self._node = connected
        incarnation = time.time_ns() // 1000  # of one process: it cannot attach twice in a microsecond
        process = cpg.Process(self._node, os.getpid())
        order = Order(replace(me, incarnation=incarnation), process, LEASE_NS, self._send, self._emit, _boot_time_ns)
        self._group, self._quorum, self._order = group, quorum, order
        group.on_message, group.on_change, group.on_ring = order.on_message, order.on_change, order.on_ring
        quorum.on_quorum = self._on_quorum
        try:
            for handle in (group, quorum):
                descriptor = handle.fileno()
                self._loop.add_reader(descriptor, self._readable, handle)
                self._readers.append(descriptor)
            await answer(lambda: patiently(lambda: group.join(self._group_name)))
        except cpg.CorosyncError as error:
            await self.close()
            raise UsageError(f"corosync driver: {error}") from error
        self._readable(quorum)

    def _on_quorum(self, verdict: cpg.Verdict) -> None:
        self._verdicts.append(verdict)
        if self._judging is None:
            self._judging = self._loop.create_task(self._judge())

    async def _judge(self) -> None:
        """Tells the order all verdicts, each after the votes that it rests on are known.

        Until then its ring goes on with nothing: two nodes that are both quorate alone must know it.
        """
        try:
            while self._verdicts and not self._over:
                verdict = self._verdicts.popleft()
                if verdict.quorate:
                    await self._learn_votes(verdict.nodes)
                self._there.on_quorum(verdict)
                self._advance()
        finally:
            self._judging = None

    async def _learn_votes(self, nodes: tuple[int, ...]) -> None:
        """They tell who could have gone on without whom."""
        quorum = self._there.quorum
        while True:
            try:
                votes = await answer(lambda: patiently(lambda: cpg.votes(nodes)), None)  # a dead daemon is an answer
            except cpg.CorosyncError as error:
                if error.code in (cpg.Code.TIMEOUT, cpg.Code.TRY_AGAIN):
                    await asyncio.sleep(TICK_S)
                    continue
                quorum.needed, self._votes = 0, None  # something else than votes decides
                return
            quorum.needed, quorum.tie_breaker = votes.quorum, votes.two_node
            quorum.votes.update(votes.of_nodes)
            self._votes = Votes(votes.of_nodes.get(self._node, 0), votes.total, votes.quorum)
            return

    @property
    def _there(self) -> Order:
        if self._order is None:
            raise UsageError("corosync driver: not opened")
        return self._order

    def _readable(self, handle: cpg.Group | cpg.Quorum) -> None:
        """Takes over what the daemon has to tell."""
        if self._over:
            return
        try:
            handle.dispatch()
        except cpg.CorosyncError as error:
            self._stop_reading()
            self._there.lose(f"corosync driver: the daemon is gone: {error}")
            return
        self._advance()

    def _advance(self) -> None:
        order = self._there
        if self._over:
            return
        order.advance()
        if order.waiting and self._ticking is None and not self._over:
            self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        order = self._there
        order.tick()
        if order.waiting and not self._over:
            self._ticking = self._loop.call_later(TICK_S, self._tick)

    def _emit(self, event: Event) -> None:
        if self._over:
            return
        if isinstance(event, Lost):
            self._end()
        elif isinstance(event, Leased) and self._late is not None:
            self._late.cancel()
            self._late = None
        try:
            self._on_event(event)
        except Exception as error:  # the handler's bug must not stop the order of events
            self._loop.call_exception_handler({"message": "a membership event was not handled", "exception": error})

    # --- sending ---------------------------------------------------------------------------------------------------

    def broadcast(self, data: bytes) -> None:
        if len(data) > self.max_message - HEADER_BYTES:
            raise UsageError(f"corosync driver: a message of {len(data)} bytes is too large")
        order = self._there
        if self._over or order.lost:
            return
        if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            raise UsageError("corosync driver: too many messages wait to be ordered")
        order.broadcast(bytes(data))

    def votes(self) -> Votes | None:
        return self._votes

    def renew(self) -> None:
        """Asks for a new lease."""
        if self._late is None and self._order is not None and not self._over:
            self._late = self._loop.call_later(LEASE_NS / 1e9, self._no_answer)
            self._order.beat()

    def _send(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._flush()

    def _flush(self) -> None:
        if self._sending is not None:
            return
        while self._queue and self._group is not None and not self._over:
            try:
                self._group.send(self._queue[0])
            except cpg.CorosyncError as error:
                if error.code == cpg.Code.TRY_AGAIN:
                    self._sending = self._loop.call_later(RETRY_S, self._flush_again)
                return  # of any other error, `dispatch` tells
            self._queued_bytes -= len(self._queue.popleft())
        self._flushed.set()

    def _flush_again(self) -> None:
        self._sending = None
        self._flush()

    def _no_answer(self) -> None:
        self._there.suspend(f"no answer of the daemon for {LEASE_NS / 1e9:.1f} s")

    # --- the end ---------------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        group = self._group
        if group is None or self._over:
            return
        self._flushed.clear()
        self._flush()
        try:
            async with asyncio.timeout(STOP_PATIENCE_S):
                await self._flushed.wait()
                self._end()
                await answer(lambda: group.leave(self._group_name), STOP_PATIENCE_S)
        except (TimeoutError, cpg.CorosyncError) as error:
            _logger.warning("corosync driver: left without telling: %s", str(error) or "the daemon takes nothing")
        self._end()

    async def close(self) -> None:
        self._end()
        handles = [handle for handle in (self._group, self._quorum) if handle is not None]
        self._group = self._quorum = None
        for handle in handles:
            with contextlib.suppress(cpg.CorosyncError):
                await answer(handle.close, STOP_PATIENCE_S)

    def _stop_reading(self) -> None:
        for descriptor in self._readers:
            self._loop.remove_reader(descriptor)
        self._readers.clear()

    def _end(self) -> None:
        """No more events, and nothing more is sent."""
        if self._over:
            return
        self._over = True
        self._stop_reading()
        if self._judging is not None:
            self._judging.cancel()
        for timer in (self._sending, self._late, self._ticking):
            if timer is not None:
                timer.cancel()
        self._queue.clear()
        self._queued_bytes = 0


def _boot_time_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _connect() -> _Connected:
    group = cpg.Group()
    try:
        node = group.local_node()
        return _Connected(group, cpg.Quorum(), node)
    except BaseException:
        group.close()
        raise
