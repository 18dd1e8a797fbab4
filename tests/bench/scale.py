"""What a node pays for the number of nodes: CPU of membership changes, of notifications, of placement look-ups.

    python -m tests.bench.scale

One process, the shipped core, members made up. A change or a notification is what every node is given by the engine,
one message or two; the coordinator, the oldest node, does more than the others. The time is one node's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import count

from sheepdog.cluster.core.commands import Command
from sheepdog.cluster.core.fragments import Fragments
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId, ObjectId, Vid, data_oid
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.messages import PEER_VERSION
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import Clock, Delivery, Peer, Timer, View
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status, member_to_json, node_key

NODES = (3, 10, 30, 100, 300, 1000)
LOOKUPS = 20_000
EPOCHS = 10  # records in the state that a joining node gets
NOTIFICATIONS = 200
CHANGES = 3  # the best of so many
COLUMNS = ("nodes", "leave ms", "join ms", "notify us", "leave ms*", "join ms*", "notify us*", "ring ms", "welcome ms",
           "welcome kB", "cold us", "warm us")  # fmt: skip
ROW = "| " + " | ".join(f"{{:>{max(5, len(name))}}}" for name in COLUMNS) + " |"


def member(number: int, incarnation: int = 1) -> Member:
    return Member(NodeId(bytes(12) + (0x0A000000 + number).to_bytes(4), 7000), number, 128, 1 << 40, incarnation)


def peer(one: Member) -> Peer:
    return Peer(bytes.fromhex(node_key(one.id)), one.incarnation, b"")


def timed(call: Callable[[], object]) -> float:
    """CPU milliseconds of one call, the best of three."""
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return 1000 * best


class Listening:
    """A `core.listener.Listener` without a node behind it."""

    def epoch_changed(self) -> None: ...

    def formatted(self) -> None: ...

    def operation_due(self, operation: Command) -> None: ...

    def operation_ended(self, operation: Command) -> None: ...

    def state_changed(self, command: Command) -> None: ...

    def refused(self, reason: str) -> None:
        raise AssertionError(reason)

    def expelled(self, member: Member) -> None: ...

    def coordinator_due(self) -> None: ...

    def suspended(self, suspended: bool, reason: str) -> None: ...

    def lost(self, reason: str) -> None:
        raise AssertionError(reason)


class Machine(Listening, Clock):
    """The machine of one node among others that only send; it is its own engine, whose messages come at once."""

    def __init__(self, me: int, members: Sequence[Member]) -> None:
        self._sequence = count(1)
        self._peers = [peer(one) for one in members]
        self._sent: list[bytes] = []
        self._fragments = Fragments()
        self._me = self._peers[me]
        self.machine = ClusterMachine(members[me], False, ClusterState(), self, self, self, lambda level, text: None)
        state = ClusterState(ctime=1, flags=ClusterFlag.AUTO_VNODES, status=Status.RUNNING)
        state.members = state.weighted(members)
        state.epochs = [EpochRecord(Epoch(number + 1), 1, state.members) for number in range(EPOCHS)]
        self.machine.on_event(View(next(self._sequence), tuple(self._peers), (self._me,), ()))
        joining = json.loads(self.proposed()[-1])
        self.say(joining, self._me)
        self.say(accepted(self._me, joining, state), self._peers[0])
        assert self.machine.joined and len(self.machine.state.members) == len(members)

    # what the machine asks for: its ports

    def broadcast(self, data: bytes) -> None:
        self._sent.append(data)

    def renew(self) -> None: ...

    def leave(self) -> None: ...

    def now_ns(self) -> int:
        return 0

    def wall_ns(self) -> int:
        return 1_000_000_000

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        raise AssertionError("the machine needs no timers")

    # what happens

    def proposed(self) -> list[bytes]:
        """The commands that the machine has sent."""
        whole = (Fragments().whole((self._me.id, self._me.incarnation), data) for data in self._sent)
        return [data for data in whole if data is not None]

    def say(self, command: Command, sender: Peer) -> None:
        for part in self._fragments.cut(json.dumps(command).encode()):
            self.machine.on_event(Delivery(next(self._sequence), sender, part))

    def view(self, joined: tuple[Peer, ...], left: tuple[Peer, ...]) -> None:
        self._peers = [*(one for one in self._peers if one not in left), *joined]
        self.machine.on_event(View(next(self._sequence), tuple(self._peers), joined, left))

    def leave_and_join(self, one: Member) -> tuple[float, float]:
        """CPU milliseconds of the loss of a node and of its return."""
        who = peer(one)
        begin = time.process_time()
        self.view((), (who,))
        self.say({"t": "leave", "nodes": [[node_key(one.id), one.incarnation]], "time": 1}, self._peers[0])
        self._ring()
        left = time.process_time()
        joining: Command = {"t": "join", "member": member_to_json(one), "config": None, "epochs": []}
        joining |= {"fixed": False, "protocol": PEER_VERSION}
        self.view((who,), ())
        self.say(joining, who)
        self.say(accepted(who, joining, ClusterState()), self._peers[0])
        self._ring()
        joined = time.process_time()
        assert len(self.machine.state.members) == len(self._peers)
        return 1000 * (left - begin), 1000 * (joined - left)

    def _ring(self) -> None:
        state = self.machine.state
        Placement(Epoch(state.epoch), state.members, state.members[0].id, lambda oid: 3)

    def notify(self) -> float:
        """CPU microseconds of a cluster-wide change that has no work behind it."""
        begin = time.process_time()
        for number in range(NOTIFICATIONS):
            self.say({"t": "recovery", "enabled": bool(number % 2)}, self._peers[1])
        return 1e6 * (time.process_time() - begin) / NOTIFICATIONS


def accepted(who: Peer, joining: Command, state: ClusterState) -> Command:
    return {
        "t": "accept", "who": [who.id.hex(), who.incarnation], "join": joining, "as_of": 1,
        "state": state.encode(), "time": 1,
    }  # fmt: skip


def membership(members: Sequence[Member]) -> list[str]:
    """Columns of the change and of the notification: those of a node, then those of the coordinator."""
    figures = []
    for me in (1, 0):
        machine = Machine(me, members)
        changes = [machine.leave_and_join(members[-1]) for _ in range(CHANGES)]
        figures += [f"{min(one[0] for one in changes):.1f}", f"{min(one[1] for one in changes):.1f}"]
        figures.append(f"{min(machine.notify() for _ in range(CHANGES)):.0f}")
    return figures


def placement(members: Sequence[Member]) -> list[str]:
    state = ClusterState(ctime=1, flags=ClusterFlag.AUTO_VNODES, status=Status.RUNNING)
    state.members = state.weighted(members)
    state.epochs = [EpochRecord(Epoch(number + 1), 1, state.members) for number in range(EPOCHS)]
    ring = timed(lambda: Placement(Epoch(1), state.members, members[0].id, lambda oid: 3))
    text = state.encode()
    welcome = timed(lambda: ClusterState.decode(text))
    oids: list[ObjectId] = [data_oid(Vid(7), index) for index in range(LOOKUPS)]
    found = Placement(Epoch(1), state.members, members[0].id, lambda oid: 3)
    looked: list[float] = []
    for _ in range(2):
        begin = time.process_time()
        for oid in oids:
            found.replicas(oid)
        looked.append(1e6 * (time.process_time() - begin) / LOOKUPS)
    return [f"{ring:.1f}", f"{welcome:.1f}", f"{len(text) / 1000:.1f}", f"{looked[0]:.1f}", f"{looked[1]:.2f}"]


def main() -> None:
    print(ROW.format(*COLUMNS))
    print(ROW.format(*["---:"] * len(COLUMNS)))
    for nodes in NODES:
        members = [member(number) for number in range(nodes)]
        print(ROW.format(nodes, *membership(members), *placement(members)), flush=True)
    print("* of the coordinator, the oldest node. A change: what the engine tells, the state, weights and the ring.")


if __name__ == "__main__":
    main()
