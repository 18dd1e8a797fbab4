"""The cluster machine: joins, leaves, epochs and ordered operations, on top of any membership engine.

The engine gives one order of views and messages to all attached processes; this machine turns it into the
replicated `ClusterState`. A process is *attached* when the engine shows it, and *joined* once an ACCEPT for it
was delivered. Every state change is a command that all joined nodes apply at the same place of the order.

 sender       command  effect
 any node     join     asks to be let in; says what its disks remember
 coordinator  accept   the node is a member; carries the state as of a place in the order
 coordinator  reject   the node must go (cli.md 1.7)
 coordinator  leave    members that the engine no longer shows are gone
 joined node  op       queues an operation; the first of the queue runs, alone
 executor     commit   ends the running operation with its changes
 joined node  others   one-step changes, see `Commands`

The coordinator is the oldest joined process; if there is none, the oldest attached one founds the cluster
from what its own disk remembers. The executor of an operation is its owner, or the coordinator once the owner is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sheepdog.cluster.core.commands import Command, apply_command, misplaced
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.fragments import Fragments, Key
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member
from sheepdog.cluster.core.join_rules import join_command, learn, refusal
from sheepdog.cluster.core.limits import MAX_EXPELLED
from sheepdog.cluster.core.listener import Listener
from sheepdog.cluster.core.member_index import MemberIndex
from sheepdog.cluster.core.ports import (
    Clock,
    Delivery,
    Engine,
    Event,
    Log,
    Lost,
    Peer,
    Resumed,
    Suspended,
    View,
)
from sheepdog.cluster.core.state import ClusterState, Status, member_from_json, node_key
from sheepdog.cluster.core.void_epochs import note_log

Answer = Callable[[Any], None]
EXPELLED = "the others expelled this node, because it did not answer them"


class ClusterMachine:
    """See the module. `fixed_vnodes`: this node was started with a fixed number of virtual nodes."""

    def __init__(
        self,
        me: Member,
        fixed_vnodes: bool,
        state: ClusterState,
        clock: Clock,
        engine: Engine,
        listener: Listener,
        log: Log,
    ) -> None:
        self.me = me
        self.fixed_vnodes = fixed_vnodes
        self.state = state
        self.joined = False
        self.log_since = 0  # from this epoch on this node's log has all that it recorded; 0: it cannot tell
        self._clock = clock
        self._engine = engine
        self._listener = listener
        self._log = log
        self._view: tuple[Key, ...] = ()
        self._accepted: dict[Key, None] = {}
        self._joins: dict[Key, Command] = {}  # delivered and not answered yet
        self._answered: set[Key] = set()  # answered by this coordinator; membership tests only
        self._struck: set[Key] = set()  # members this node proposed to strike out; membership tests only
        self._compared: tuple[object, object] = (None, None)  # the view and the members that were compared last
        self._history: list[tuple[int, Key, Command]] = []  # since attach, until joined
        self._fragments = Fragments()
        self._index = MemberIndex()
        self._waiting: dict[int, Answer] = {}
        self._next_id = 0
        self._executing: Any = None
        self._asked_to_join = False

    # -- towards the engine ------------------------------------------------------------------------------------

    def propose(self, command: Command, answer: Answer | None = None) -> None:
        """Broadcasts a command; `answer` gets what applying it here returned."""
        if answer is not None:
            self._next_id += 1
            command["id"] = self._next_id
            self._waiting[self._next_id] = answer
        for part in self._fragments.cut(json.dumps(command).encode()):
            self._engine.broadcast(part)

    # -- events ------------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        if isinstance(event, View):
            self._on_view(event)
        elif isinstance(event, Delivery):
            sender = (event.sender.id, event.sender.incarnation)
            data = self._fragments.whole(sender, event.data)
            if data is not None:
                self._on_command(event.sequence, sender, json.loads(data))
        elif isinstance(event, Suspended):
            self._listener.suspended(True, event.reason)
        elif isinstance(event, Resumed):
            self._listener.suspended(False, "")
        elif isinstance(event, Lost):
            self._listener.lost(event.reason)

    def _on_view(self, view: View) -> None:
        self._view = tuple(_key(peer) for peer in view.members)
        for peer in view.left:
            key = _key(peer)
            self._accepted.pop(key, None)
            self._joins.pop(key, None)
            self._fragments.forget(key)
        if view.left:
            self._listener.coordinator_due()
        mine = next((key for key in self._view if key[0] == _id_bytes(self.me)), None)
        if mine is None:
            return
        if not self._asked_to_join:
            self._asked_to_join = True
            self.me = Member(self.me.id, self.me.zone, self.me.vnodes, self.me.space, mine[1])
            self.propose(join_command(self.state, self.me, self.fixed_vnodes, self.log_since))
        self._coordinate()

    @property
    def _my_key(self) -> Key:
        return _id_bytes(self.me), self.me.incarnation

    def coordinator(self) -> Key | None:
        """The oldest joined process; None when nobody has joined."""
        return next((key for key in self._view if key in self._accepted), None)

    def is_coordinator(self) -> bool:
        return self.joined and self.coordinator() == self._my_key

    def awaited(self) -> Member | None:
        """The coordinator, while it owes an answer to one that wants to join, or the end of one that is gone."""
        key = self.coordinator()
        if not self.joined or key == self._my_key or not (self._joins or self.gone()):
            return None
        return next((member for member in self.state.members if _member_key(member) == key), None)

    def gone(self) -> list[Member]:
        """Members that the engine no longer shows."""
        shown = set(self._view)  # membership tests only
        return [member for member in self.state.members if _member_key(member) not in shown]

    def _now_s(self) -> int:
        return self._clock.wall_ns() // 1_000_000_000

    def _coordinate(self) -> None:
        """What falls to this node if it is the oldest: founding, letting in, striking out, taking over."""
        if not self.joined:
            if self.coordinator() is None and self._view and self._view[0] == self._my_key:
                self._answer_join(self._my_key)
            return
        if self.is_coordinator():
            self._strike_out()
            for key in list(self._joins):
                self._answer_join(key)
        self._run_head()

    def _strike_out(self) -> None:
        """Coordinator: proposes that members leave which the engine no longer shows."""
        if self._view is self._compared[0] and self.state.members is self._compared[1]:
            return  # both are made anew when they change, and most events change neither
        self._compared = self._view, self.state.members
        gone = self.gone()
        if any(_member_key(member) not in self._struck for member in gone):
            self._struck.update(_member_key(member) for member in gone)
            nodes = [[node_key(member.id), member.incarnation] for member in gone]
            self.propose({"t": "leave", "nodes": nodes, "time": self._now_s()})

    # -- joining -----------------------------------------------------------------------------------------------

    def _answer_join(self, key: Key) -> None:
        """Coordinator (or founder): lets a node in or refuses it."""
        join = self._joins.get(key)
        if join is None or key in self._answered:
            return
        self._answered.add(key)
        reason = None if not self.joined else refusal(self.state, join)
        who = [key[0].hex(), key[1]]
        if reason is not None:
            self.propose({"t": "reject", "who": who, "reason": reason})
            return
        founding = not self.joined
        state = ClusterState() if founding else self.state
        self.propose(
            {
                "t": "accept",
                "who": who,
                "join": join,
                "as_of": self._applied,
                "state": state.encode(),
                "time": self._now_s(),
            }
        )

    def _on_command(self, sequence: int, sender: Key, command: Command) -> None:
        kind = command["t"]
        if kind == "join":
            self._joins[sender] = command
            if not self.joined:
                self._history.append((sequence, sender, command))
            self._applied = sequence
            self._coordinate()
            self._listener.coordinator_due()
            return
        if kind in ("accept", "reject"):
            # Also of a coordinator that is expelled and does not know it yet: who has not joined cannot tell.
            self._on_verdict(sequence, command)
        elif self.joined:
            self._apply(sender, command)
        else:
            self._history.append((sequence, sender, command))
        self._applied = sequence
        self._coordinate()

    _applied = 0  # sequence of the last event applied here

    def _on_verdict(self, sequence: int, command: Command) -> None:
        key: Key = (bytes.fromhex(command["who"][0]), command["who"][1])
        self._joins.pop(key, None)
        if key not in self._view or key in self._accepted:
            return  # gone meanwhile, or answered by two coordinators
        if command["t"] == "reject":
            if key == self._my_key:
                self._listener.refused(command["reason"])
            return
        self._accepted[key] = None
        if key == self._my_key:
            self._enter(command)
        elif self.joined:
            self._admit(command["join"], command["time"])
        else:
            self._history.append((sequence, key, command))

    def _enter(self, command: Command) -> None:
        """This node is let in: takes the state over and catches up with the order."""
        self.state = ClusterState.decode(command["state"])
        self.joined = True
        self._accepted.update((_member_key(member), None) for member in self.state.members)
        for sequence, sender, earlier in self._history:
            if sequence <= command["as_of"]:
                continue
            if earlier["t"] == "accept":
                if not any(_member_key(member) == sender for member in self.state.members):
                    self._admit(earlier["join"], earlier["time"], quiet=True)
            elif earlier["t"] != "join":
                self._apply(sender, earlier, quiet=True)
        self._history.clear()
        self._admit(command["join"], command["time"])

    def _admit(self, join: Command, time_s: int, quiet: bool = False) -> None:
        """A node becomes a member; equal on all joined nodes."""
        state = self.state
        member = member_from_json(join["member"])
        others = [other for other in state.members if other.id != member.id]
        if len(others) < len(state.members):  # back before it was struck out
            state.vdis.unlock_node(node_key(member.id))
        state.members = state.weighted([*others, member])
        state.note_return(member.id)
        note_log(state, join)
        if state.status == Status.RUNNING:
            self._new_epoch(time_s, quiet)
            return
        if state.status == Status.WAITING and join["config"] is not None:
            learn(state, join)
        self._try_start(time_s, quiet)

    def _try_start(self, time_s: int, quiet: bool) -> None:
        """Starts a formatted cluster once all members of its latest epoch are back (cli.md 4, "Full restart")."""
        state = self.state
        if state.status != Status.WAITING or not state.ctime or not state.epochs or state.missing_members():
            return
        self.start(time_s, quiet)

    def start(self, time_s: int, quiet: bool = False) -> None:
        """The waiting cluster runs with the nodes that are present."""
        state = self.state
        state.status = Status.RUNNING
        state.term += 1
        state.loaded = False
        state.partial = 0
        state.sweeps += 1
        state.doubtful = []
        state.away = []  # with everybody back, or given up by an administrator, there is nobody to wait for
        state.queue = [{"op": "load", "owner": "", "number": 0}]
        if _places(state.members) != _places(state.epochs[-1].members):
            self._new_epoch(time_s, quiet)
        elif not quiet:
            self._listener.epoch_changed()

    def _new_epoch(self, time_s: int, quiet: bool = False) -> None:
        state = self.state
        state.sweeps += 1  # a gateway may have died while it freed something
        state.epochs.append(EpochRecord(Epoch(state.epoch + 1), time_s, state.members))
        if state.loaded and not state.partial:
            state.count_copies()
        self._load_the_rest()
        if not quiet:
            self._listener.epoch_changed()

    def _load_the_rest(self) -> None:
        """Somebody may have brought what the VDI table lacks."""
        state = self.state
        if state.partial and not any(operation["op"] == "load" for operation in state.queue):
            state.queue.append({"op": "load", "owner": "", "number": state.epoch})

    # -- commands ----------------------------------------------------------------------------------------------

    def _apply(self, sender: Key, command: Command, quiet: bool = False) -> None:
        """Applies a command of a joined sender; equal on all joined nodes."""
        kind = command["t"]
        answer: Any = Result.SUCCESS
        if self._is_expelled(sender):
            return
        if kind == "leave":
            self._leave(command, quiet)
        elif kind == "expel":
            self._expel(command, quiet)
        elif kind == "op":
            self.state.queue.append(command["operation"])
        elif kind == "commit":
            self._commit(command, quiet)
        elif kind == "weigh":
            self._weigh(sender, command, quiet)
        elif kind == "format":
            self._format(command, quiet)
        elif kind == "start":
            if self.state.status == Status.WAITING and self.state.ctime:
                self.state.forced = self.state.epoch + 1
                self.start(command["time"], quiet)
            elif self.state.status == Status.RUNNING and self.state.partial:
                self.state.forced = self.state.epoch + 1
                self._new_epoch(command["time"], quiet)
            else:
                answer = Result.FORCE_RECOVER
        else:
            answer = apply_command(self.state, sender[0].hex(), command)
            if kind == "epoch":
                self._new_epoch(command["time"], quiet)
            if not quiet:
                self._listener.state_changed(command)
        if sender == self._my_key and "id" in command:
            waiting = self._waiting.pop(command["id"], None)
            if waiting is not None:
                waiting(answer)

    def _leave(self, command: Command, quiet: bool) -> None:
        """Strikes out processes; the same node may have joined again meanwhile, as another incarnation."""
        state = self.state
        gone = [member for member in state.members if [node_key(member.id), member.incarnation] in command["nodes"]]
        if not gone:
            return
        state.members = state.weighted([member for member in state.members if member not in gone])
        for member in gone:
            state.vdis.unlock_node(node_key(member.id))
        state.note_leave(gone, command["time"])
        if state.status == Status.RUNNING:
            self._new_epoch(command["time"], quiet)

    def _weigh(self, sender: Key, command: Command, quiet: bool) -> None:
        """The sender has another number of virtual nodes, or another space, from a new epoch on."""
        state = self.state
        if state.status != Status.RUNNING:
            return
        changes = {name: command[name] for name in ("vnodes", "space") if name in command}
        if sender == self._my_key:
            self.me = replace(self.me, **changes)
        members = [replace(one, **changes) if _member_key(one) == sender else one for one in state.members]
        state.members = state.weighted(members)
        self._new_epoch(command["time"], quiet)

    def _is_expelled(self, sender: Key) -> bool:
        return bool(self.state.expelled) and [sender[0].hex(), sender[1]] in self.state.expelled

    def _expel(self, command: Command, quiet: bool) -> None:
        """Strikes out a silent member, if nothing has changed since it was proposed; it may come back as another
        incarnation. Until it knows, it may go on sending: what it has ordered after this does not count."""
        state = self.state
        member = next((one for one in state.members if [node_key(one.id), one.incarnation] == command["who"]), None)
        if state.status != Status.RUNNING or state.epoch != command["epoch"] or member is None:
            return
        if _member_key(member) == self._my_key:
            self.joined = False
            self._listener.lost(EXPELLED)
            return
        self._accepted.pop(_member_key(member), None)
        state.expelled = [*state.expelled, command["who"]][-MAX_EXPELLED:]
        state.members = state.weighted([one for one in state.members if one != member])
        state.vdis.unlock_node(node_key(member.id))
        state.note_leave([member], command["time"])
        if not quiet:
            self._log(4, f"{member.id} was expelled: it did not answer")
            self._listener.expelled(member)
        self._new_epoch(command["time"], quiet)

    def _format(self, command: Command, quiet: bool) -> None:
        state = self.state
        members, had = state.members, state.epoch
        self.state = state = ClusterState(
            status=Status.RUNNING,
            ctime=command["ctime"],
            copies=command["copies"],
            policy=command["policy"],
            shift=command["shift"],
            flags=command["flags"],
            store_name=command["store_name"],
            recovery_delay_s=command.get("recovery_delay_s", 0),
            era=state.era + 1,
            term=1,
            loaded=True,
        )
        state.members = state.weighted(members)
        state.epochs.append(EpochRecord(Epoch(1), command["time"], state.members))
        self._executing = None
        if not quiet:
            self._log(5, f"the cluster was formatted (epoch before: {had})")
            self._listener.formatted()
            self._listener.epoch_changed()

    def _commit(self, command: Command, quiet: bool) -> None:
        """The operation at the head of the queue ends; a second commit of it finds another head."""
        queue = self.state.queue
        operation = command["operation"]
        if not queue or _name(queue[0]) != _name(operation):
            return
        queue.pop(0)
        changes = command["changes"]
        begins = changes.get("epoch") or misplaced(self.state, changes)
        apply_command(self.state, "", {"t": "vdis", **changes})
        if self._executing == _name(operation):
            self._executing = None
        self.state.sweeps += operation["op"] in ("delete", "bury")
        queue.extend(command.get("next", ()))
        if changes.get("collected", self.state.epoch) != self.state.epoch:
            self._load_the_rest()
        if begins:
            self._new_epoch(begins, quiet)
        if not quiet:
            self._listener.operation_ended({**operation, **command})

    def _run_head(self) -> None:
        """Starts the operation at the head of the queue if it is this node's to execute."""
        queue = self.state.queue
        if not self.joined or not queue or self.state.status != Status.RUNNING:
            return
        head = queue[0]
        if self._executing == _name(head):
            return
        # The same node as another incarnation does not take over again: two would run the operation at a time.
        owner = self._index.find(self.state.members, head["owner"])
        owner_here = owner is not None and owner.incarnation == head.get("incarnation", owner.incarnation)
        mine = head["owner"] == node_key(self.me.id) if owner_here else self.is_coordinator()
        if mine:
            self._executing = _name(head)
            self._listener.operation_due(head)


def _places(members: tuple[Member, ...]) -> list[tuple[Any, ...]]:
    """What placement depends on."""
    return [(member.id, member.zone, member.vnodes) for member in members]


def _name(operation: Command) -> tuple[Any, Any]:
    return operation["owner"], operation["number"]


def _key(peer: Peer) -> Key:
    return peer.id, peer.incarnation


def _id_bytes(member: Member) -> bytes:
    return bytes.fromhex(node_key(member.id))


def _member_key(member: Member) -> Key:
    return _id_bytes(member), member.incarnation
