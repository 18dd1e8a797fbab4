"""From a closed process group and the quorum to one order of events: the machine of the corosync driver. No I/O.

The group (CPG) gives every process of a ring the same stream of messages and changes. It knows nothing of quorum,
and each side of a broken network gets a valid stream of its own. So:

* What comes after a change of ring waits for the quorum's verdict about that ring, which arrives on another way.
  Not quorate, or over before there was a verdict: suspended while the ring lasts, and lost with the next one, since
  others may have gone on meanwhile, or begun anew. So they may in a ring that this node's daemon has missed, because
  it stood still: corosync_quorum. Of nodes that were apart at most one side goes on, so a member that is back is lost.
* A message is delivered when a process of each member's node has acknowledged it (CPG would deliver a sender's own
  message before any other node has it, and a power failure could take it away again), or when the members that have
  not are gone: the ring that follows has the same messages everywhere. A node whose processes are stopped is not
  waited for once a BEAT has come back in the same ring that was sent ROUNDS_NS after the message: by then the daemons
  of all nodes have it, or the token would not go round and the ring would have been left.

CPG knows processes only by numbers. A process that wants to be a member announces itself (JOIN) and is *pending*
until the oldest established member has sent the roster as of that JOIN (ROSTER). When nobody is established, the
pending ones found the roster, in the order in which they announced themselves since the group last changed. A member
that is asked may be stopped: who gets no answer announces itself again and asks the next older one, turn by turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ports import Delivery, Event, Leased, Lost, Peer, Resumed, Suspended, View
from sheepdog.cluster.drivers.corosync_messages import (
    REFERENCE,
    Kind,
    Ordered,
    Seat,
    decode,
    encode,
    header,
    parse,
    seat_of,
    seat_values,
)
from sheepdog.cluster.drivers.corosync_quorum import Quorum, Right, Ring
from sheepdog.cluster.drivers.cpg import Change, Process, Reason, Verdict

ANSWER_NS = 2_000_000_000  # a member answers in milliseconds; twice ROUNDS_NS if the node of another one is silent
MAX_PATIENCE = 5  # times ANSWER_NS: an answer to an earlier turn does not count, so a slow group is asked less often
ROUNDS_NS = 200_000_000  # the token goes round a hundred times meanwhile; each time a daemon may ask for what it lacks
GRACE_PERCENT = 110  # two hosts' clocks run at speeds that differ by far less than a tenth


class Gone(NamedTuple):
    """Members that left; `proven`: they cannot answer anybody any more."""

    processes: tuple[Process, ...]
    proven: bool


Item: TypeAlias = "Ring | Change | tuple[Process, bytes]"


class Order:
    """Of one attachment. `send` queues a message to the group; `emit` gets the events."""

    def __init__(
        self,
        me: Peer,
        process: Process,
        lease_ns: int,
        send: Callable[[bytes], None],
        emit: Callable[[Event], None],
        now_ns: Callable[[], int],
    ) -> None:
        self.me = me
        self.lost = False
        self.established = False
        self.origin = 0  # incarnation of the first founder: two orders of one group never have the same
        self.quorum = Quorum()
        self._process = process
        self._lease_ns = lease_ns
        self._send = send
        self._emit_event = emit
        self._now_ns = now_ns
        self._counter = 0
        # the stream
        self._inbox: deque[Item] = deque()
        self._ring = Ring(0, ())
        self._newest = 0  # sequence of the latest ring in the stream
        self._clear = False  # what follows in the stream may be handled
        self._undecided: dict[Process, None] = {}  # members that went with their node, in rings without verdict
        self._suspended: str | None = None
        # the group
        self._present: tuple[Process, ...] = ()
        self._announced: dict[Process, Seat] = {}  # since the group last changed; of those that are pending
        self._attempt = 0
        self._turn = 0  # how many members did not answer
        self._asked_ns: int | None = None  # when an answer was asked for last
        self._returned_ns = 0  # when the latest JOIN of ours that has come back was sent
        # the order
        self._roster: dict[Process, Seat] = {}
        self._sequence = 0
        self._queue: deque[tuple[int, int, Ordered | Gone]] = deque()  # not stable yet; with position and time
        self._position = 0
        self._stable_up_to = 0  # everybody who is left has what is up to this position
        self._coming: dict[Process, None] = {}  # whose JOIN is in the queue
        self._leaving: dict[Process, None] = {}  # whose Gone is in the queue
        self._references: dict[tuple[int, int], int] = {}  # message in the queue -> position
        self._acked: dict[int, int] = {}  # node -> position
        self._lease: tuple[int, int] | None = None  # position in the queue before it, and its end
        self._to_ack: tuple[int, int] | None = None
        self._beats: dict[int, int] = {}  # counter -> time of sending

    # --- what comes in ---------------------------------------------------------------------------------------------

    def on_message(self, process: Process, data: bytes) -> None:
        self._inbox.append((process, data))

    def on_change(self, change: Change) -> None:
        self._inbox.append(change)

    def on_ring(self, sequence: int, nodes: tuple[int, ...]) -> None:
        """A new ring, or the present one once more: it is told again to a process that joins the group."""
        if sequence != self._newest:
            self._newest = sequence
            self._inbox.append(Ring(sequence, nodes))

    def on_quorum(self, verdict: Verdict) -> None:
        """Told in the order of the rings; it may change while the ring lasts."""
        self.quorum.tell(verdict)
        if verdict.sequence == self._ring.sequence:
            if self.established and not verdict.quorate:
                self._clear = False
            elif not self.established:
                self._announce()

    def broadcast(self, data: bytes) -> None:
        self._order(Kind.DATA, data)

    def beat(self) -> None:
        """Asks for a lease."""
        self._counter += 1
        self._beats[self._counter] = self._now_ns()
        self._send(header(Kind.BEAT, self.me.incarnation, self._counter, self.origin))

    def advance(self) -> None:
        """Handles what has come in, as far as may be; to be called after any of the above."""
        while not self.lost:
            if self.established and not self._clear and not self._decide():
                break
            if not self._inbox:
                break
            item = self._inbox.popleft()
            if isinstance(item, Ring):
                self._on_ring(item)
            elif isinstance(item, Change):
                self._on_change(item)
            else:
                self._on_data(*item)
        self._acknowledge()
        self._drain()

    @property
    def waiting(self) -> bool:
        """Something is in the queue, or an answer is asked for: `tick` is wanted."""
        return bool(self._queue) or (self._asked_ns is not None and not self.established)

    def tick(self) -> None:
        """Asks whether the ring still lives when a message has waited for too long; asks the next one to answer."""
        if not self.established:
            self._ask_the_next()
        elif self._queue and self._may_deliver():
            due_ns = self._queue[0][1] + ROUNDS_NS
            if self._now_ns() >= due_ns and not any(sent_ns >= due_ns for sent_ns in self._beats.values()):
                self.beat()

    def _acknowledge(self) -> None:
        if self._to_ack is not None and not self.lost:
            reference, self._to_ack = self._to_ack, None
            if any(process.node != self._process.node for process in self._present):
                self._send(header(Kind.ACK, self.me.incarnation, 0, self.origin) + REFERENCE.pack(*reference))

    def suspend(self, reason: str) -> None:
        """Until `resume`, or until the present doubt about the ring is over."""
        if self._suspended is None and not self.lost:
            self._suspended = reason
            self._emit_event(Suspended(reason))

    def resume(self) -> None:
        if self._suspended is not None and (self._clear or not self.established) and not self.lost:
            self._suspended = None
            self._emit_event(Resumed())

    def lose(self, reason: str) -> None:
        if not self.lost:
            self.lost = True
            self._emit_event(Lost(reason))

    # --- rings -----------------------------------------------------------------------------------------------------

    def _on_ring(self, ring: Ring) -> None:
        self._ring = ring
        self.quorum.begin(ring)
        if self.established:
            self._clear = False
        else:
            # Some may have given us a seat, and others have seen us go with our node: an incarnation never comes back.
            self.me = replace(self.me, incarnation=self.me.incarnation + 1)
            self._announced.clear()
            self._announce()

    def _decide(self) -> bool:
        """Whether this order goes on in the present ring."""
        right = self._right()
        if right is Right.LOST:
            self.lose(right.value)
        elif right is Right.NO:
            nodes = ", ".join(map(str, self._ring.nodes))
            self.suspend(f"no quorum: only nodes {nodes} are in reach")
        elif right is Right.YES:
            self._clear = True
            self.quorum.gone_on(self._ring)
            if self._undecided:
                gone, self._undecided = tuple(self._undecided), {}
                self._stable_up_to = self._position  # those who are left have the same messages
                self._enqueue(Gone(gone, proven=False))
            self.resume()
        return self._clear

    def _right(self) -> Right:
        right = self.quorum.right_of(self._ring, bool(self._undecided))
        if right is Right.NO and any(isinstance(item, Ring) for item in self._inbox):
            return Right.LOST
        return right

    def _went_with_node(self, process: Process, reason: int) -> bool:
        return reason == Reason.NODEDOWN and self._is_known(process)

    def _is_known(self, process: Process) -> bool:
        """A member at the end of the queue."""
        return (process in self._roster or process in self._coming) and process not in self._leaving

    # --- the group -------------------------------------------------------------------------------------------------

    def _on_change(self, change: Change) -> None:
        self._present = change.members
        if not self.established:
            self._announced.clear()
            self._announce()
            return
        proven = []
        for process, reason in change.left:
            if self._went_with_node(process, reason):
                self._undecided[process] = None
            elif self._is_known(process):
                proven.append(process)
        if self._process in proven:
            self.lose("this process has left the group")
        elif proven:
            self._enqueue(Gone(tuple(proven), proven=True))

    def _ask_the_next(self) -> None:
        if self._asked_ns is None or self.lost:
            return
        if self._now_ns() >= self._asked_ns + ANSWER_NS * min(self._turn + 1, MAX_PATIENCE):
            self._turn += 1
            self.suspend("no member has answered yet; asking on")
            self._announce()

    def _announce(self) -> None:
        """Asks to become a member, where the ring is quorate; again after every change, which may have taken the
        one that would have answered."""
        self._attempt += 1  # an answer to an earlier one does not count any more
        self._asked_ns = None
        if self._process not in self._present or self.lost:
            return
        right = self.quorum.of(self._ring)
        if right is not Right.YES:
            if right is Right.NO:
                self.suspend("no quorum yet")
            return
        if not self._turn:  # else it is still told why it waits
            self.resume()
        self._asked_ns = self._now_ns()
        values = {
            **seat_values(Seat(self.me, self._lease_ns, False)),
            "turn": self._turn,
            "asked": self._asked_ns,  # for us alone, when it comes back
            "ring": self._ring.sequence,
            "present": sorted(self._present),
        }
        self._order(Kind.JOIN, encode(values, self._attempt))

    # --- messages --------------------------------------------------------------------------------------------------

    def _order(self, kind: Kind, body: bytes) -> None:
        self._counter += 1
        self._send(header(kind, self.me.incarnation, self._counter, self.origin) + body)

    def _on_data(self, process: Process, data: bytes) -> None:
        try:
            parsed = parse(data)
        except PeerError as error:
            if not self.established or process in self._roster:  # what a newcomer wants is its own affair
                self.lose(f"corosync driver: {error}")
            return
        if parsed is None:
            return
        kind, incarnation, counter, origin, body = parsed
        if self.established and origin not in (0, self.origin):
            return  # of another order: its members are lost, and do not know it yet
        if kind == Kind.BEAT:
            self._on_beat(incarnation, counter)
        elif kind == Kind.ACK:
            position = self._references.get(REFERENCE.unpack(body))
            if position is not None:
                self._acked[process.node] = max(self._acked.get(process.node, 0), position)
        else:
            self._to_ack = incarnation, counter
            message = Ordered(kind, process, incarnation, counter, body)
            if not self.established and self._while_pending(message):
                return
            self._enqueue(message)

    def _on_beat(self, incarnation: int, counter: int) -> None:
        if incarnation != self.me.incarnation or counter not in self._beats:
            return
        sent_ns = self._beats[counter]
        self._beats = {number: when for number, when in self._beats.items() if number > counter}
        if not self.established:
            return
        self._lease = self._position, sent_ns + self._lease_ns
        for position, arrived_ns, _ in self._queue:  # all in this ring: a change of it would have come before
            if arrived_ns + ROUNDS_NS <= sent_ns:
                self._stable_up_to = max(self._stable_up_to, position)

    def _while_pending(self, message: Ordered) -> bool:
        """True for a message that does not go into the queue: what comes after our last JOIN does."""
        if message.kind == Kind.JOIN:
            values, attempt = decode(message.body)
            if values["ring"] == self._ring.sequence and values["present"] == [[*one] for one in sorted(self._present)]:
                # Sent by one that knew this ring to be quorate, and was pending when the group was as it is now.
                self._announced[message.process] = seat_of(values)
            if message.process == self._process:
                self._returned_ns = values["asked"]
                if attempt == self._attempt:
                    self._clear_queue()
            if self._process in self._present and all(process in self._announced for process in self._present):
                self._found()
                return True
            return message.process == self._process
        if message.kind == Kind.ROSTER:
            values, attempt = decode(message.body)
            if Process(*values["for"]) == self._process:
                if attempt == self._attempt:
                    self._adopt(values)
                return True
        return False

    def _clear_queue(self) -> None:
        self._queue.clear()
        self._references.clear()
        self._acked.clear()
        self._leaving.clear()
        self._coming.clear()

    def _found(self) -> None:
        """All that are there are pending: they are the first members."""
        self._clear_queue()
        self._establish()
        self._sequence = 0
        self.origin = next(iter(self._announced.values())).peer.incarnation
        for process, seat in self._announced.items():
            seat.established = True
            self._take_seat(process, seat)
        self._announced.clear()
        self.resume()

    def _establish(self) -> None:
        """The first lease is there before the first view: without one nothing is held. It counts from a JOIN that came
        back, not from the latest one: where the daemon is late, that was sent when the ring was over."""
        self.established = self._clear = True
        self.quorum.gone_on(self._ring)
        self._emit_event(Leased(self._returned_ns + self._lease_ns))

    def _adopt(self, values: dict[str, Any]) -> None:
        """The roster as of our JOIN; what came after it follows from the queue."""
        self._establish()
        self._sequence, self.origin = values["sequence"], values["origin"]
        self._roster = {Process(*row["process"]): seat_of(row) for row in values["members"]}
        self._roster[self._process].established = True
        self._announced.clear()
        self._emit_event(View(self._sequence, self._peers(), (self.me,), ()))
        self.resume()

    def _peers(self) -> tuple[Peer, ...]:
        return tuple(seat.peer for seat in self._roster.values())

    def _take_seat(self, process: Process, seat: Seat) -> None:
        self._roster[process] = seat
        self._sequence += 1
        if self._process in self._roster:
            self._emit_event(View(self._sequence, self._peers(), (seat.peer,), ()))

    # --- the queue -------------------------------------------------------------------------------------------------

    def _enqueue(self, item: Ordered | Gone) -> None:
        self._position += 1
        self._queue.append((self._position, self._now_ns(), item))
        if isinstance(item, Gone):
            self._leaving.update(dict.fromkeys(item.processes))
            return
        self._references[item.incarnation, item.counter] = self._position
        if item.kind == Kind.JOIN:
            self._coming[item.process] = None
            self._leaving.pop(item.process, None)  # it comes again

    def _needed(self) -> Iterator[int]:
        """Nodes that must have acknowledged a message."""
        for process in self._roster:
            if process.node != self._process.node and process not in self._leaving and process not in self._undecided:
                yield process.node

    def _drain(self) -> None:
        """Delivers what is stable. In a ring without verdict, nothing is, nor between a node's end and its ring."""
        while self._queue and self._may_deliver():
            position, _, item = self._queue[0]
            if isinstance(item, Gone):
                self._queue.popleft()
                self._remove(item)
                continue
            if position > self._stable_up_to and any(self._acked.get(node, 0) < position for node in self._needed()):
                break
            self._queue.popleft()
            del self._references[item.incarnation, item.counter]
            self._deliver(item)
        if self._lease is None or not self._may_deliver():
            return
        if not self._queue or self._queue[0][0] > self._lease[0]:
            until_ns, self._lease = self._lease[1], None  # all that was ordered before it is known here
            self._emit_event(Leased(until_ns))
            self.resume()

    def _may_deliver(self) -> bool:
        return self.established and self._clear and not self._undecided and not self.lost

    def _deliver(self, message: Ordered) -> None:
        if message.kind == Kind.JOIN:
            self._on_join(message)
            return
        seat = self._roster.get(message.process)
        if seat is None or seat.peer.incarnation != message.incarnation:
            return
        if message.kind == Kind.ROSTER:
            values, _ = decode(message.body)
            newcomer = self._roster.get(Process(*values["for"]))
            if newcomer is not None:
                newcomer.established = True
        else:
            self._sequence += 1
            self._emit_event(Delivery(self._sequence, seat.peer, message.body))

    def _on_join(self, message: Ordered) -> None:
        values, attempt = decode(message.body)
        process, seat = message.process, seat_of(values)
        self._coming.pop(process, None)
        if any(other.peer.id == seat.peer.id and which != process for which, other in self._roster.items()):
            return  # a twin waits until the other one is gone
        if process in self._roster and self._roster[process].peer != seat.peer:
            self._remove(Gone((process,), proven=True))
        if process not in self._roster:
            self._take_seat(process, seat)
        able = [which for which, other in self._roster.items() if other.established and which != process]
        if able and able[values.get("turn", 0) % len(able)] == self._process:
            rows = [{"process": which, **seat_values(other)} for which, other in self._roster.items()]
            roster = {"for": process, "sequence": self._sequence, "origin": self.origin, "members": rows}
            self._order(Kind.ROSTER, encode(roster, attempt))

    def _remove(self, gone: Gone) -> None:
        seats = [self._roster.pop(process) for process in gone.processes if process in self._roster]
        for process in gone.processes:
            self._leaving.pop(process, None)
        if not seats:
            return
        grace_ns = 0 if gone.proven else max(seat.lease_ns for seat in seats) * GRACE_PERCENT // 100
        self._sequence += 1
        self._emit_event(View(self._sequence, self._peers(), (), tuple(seat.peer for seat in seats), grace_ns))
