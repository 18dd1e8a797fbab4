"""VDI and cluster operations that all nodes see in one order (protocol.md 8, 9).

An operation is queued by an ordered event; when it is at the head of the queue its executor runs it (`Executor`)
and ends it with a commit that changes the VDI table everywhere at once. If the executor dies, another node runs the
whole operation again: every step may be repeated, because nobody can use what it makes before the commit.
Lookups are ordered too, so that a client finds what another client was just told exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VID, Vid
from sheepdog.cluster.core.limits import DEFAULT_COPIES, DEFAULT_SHIFT, RETRY_DELAY_NS
from sheepdog.cluster.core.state import STORE_NAMES, Status, node_key
from sheepdog.cluster.core.vdi import VdiRecord

VdiDone: TypeAlias = Callable[[Result, VdiRecord | None], None]
ResultDone: TypeAlias = Callable[[Result], None]
MoveDone: TypeAlias = Callable[[Result, Vid], None]
AttributeDone: TypeAlias = Callable[[Result, int, int], None]
Values: TypeAlias = dict[str, Any]


class Operations:
    """What a door asks for. Every `done` is called once; a cluster that is not running answers at once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._number = context.clock.wall_ns()  # operation numbers must not repeat after a restart of this node
        self._waiting: dict[int, Callable[[Values], None]] = {}
        self._formatting: list[ResultDone] = []  # formats that are not durable on all nodes yet
        self._settled_fence = -1  # of the latest epoch in which all nodes have what they recorded on their disks
        self.opened_snapshots: dict[Vid, int] = {}  # by clients of this node, and how often

    # -- queued operations -----------------------------------------------------------------------------------------

    def _queue(self, operation: Values, ended: Callable[[Values], None]) -> None:
        refusal = self._context.state.result()
        if refusal:
            ended({"result": int(refusal)})
            return
        self._number += 1
        operation["owner"] = node_key(self._context.me)
        operation["incarnation"] = self._context.machine.me.incarnation
        operation["number"] = self._number
        self._waiting[self._number] = ended
        self._context.machine.propose({"t": "op", "operation": operation})

    def ended(self, operation: Values) -> None:
        """An operation was committed (on every node); its owner answers the client."""
        if operation["owner"] == node_key(self._context.me):
            waiting = self._waiting.pop(operation["number"], None)
            if waiting is not None:
                waiting(operation)

    def forget_all(self, result: Result) -> None:
        """The queue is gone (format, or this node left): everybody who waits is told."""
        waiting, self._waiting = self._waiting, {}
        for ended in waiting.values():
            ended({"result": int(result)})
        formatting, self._formatting = self._formatting, []
        for done in formatting:
            done(result)

    def _vdi_ended(self, done: VdiDone) -> Callable[[Values], None]:
        def ended(operation: Values) -> None:
            vid = operation.get("vid", 0)
            done(Result(operation["result"]), self._context.state.vdis.get(Vid(vid)) if vid else None)

        return ended

    def create_vdi(
        self,
        name: bytes,
        size: int,
        base: Vid,
        copies: int,
        policy: int,
        store_policy: int,
        shift: int,
        snap_id: int,
        done: VdiDone,
    ) -> None:
        """NEW_VDI in all its meanings (protocol.md 8.3): create, clone, roll back, snapshot, rebase."""
        operation = {
            "op": "create",
            "name": name.decode("latin-1"),
            "size": size,
            "base": base,
            "copies": copies,
            "policy": policy,
            "store_policy": store_policy,
            "shift": shift,
            "snapshot": bool(snap_id),
            "time": self._now(),
        }
        self._queue(operation, self._vdi_ended(done))

    def snapshot_vdi(self, name: bytes, tag: bytes, copies: int, policy: int, done: VdiDone) -> None:
        """Freezes the volume of this name, whatever it is when its turn has come, under a tag: VDI_EXIST if a snapshot
        has it. What goes on has its size and, unless `copies` are given, its redundancy.

        With NEW_VDI alone a client names the base that it has seen: when another snapshot came first, the volume would
        go back to it, and what was written since would be left in a snapshot without a tag.
        """
        operation = {
            "op": "create",
            "name": name.decode("latin-1"),
            "tag": tag.decode("latin-1"),
            "size": 0,
            "base": 0,
            "copies": copies,
            "policy": policy,
            "store_policy": 0,
            "shift": 0,
            "snapshot": True,
            "time": self._now(),
        }
        self._queue(operation, self._vdi_ended(done))

    def delete_vdi(self, name: bytes, tag: bytes, snap_id: int, done: VdiDone) -> None:
        """DEL_VDI: the name is free afterwards, data objects that nothing else names are gone (protocol.md 8.7)."""
        operation = {"op": "delete", **_target(name, tag, snap_id)}
        self._queue(operation, self._vdi_ended(done))

    def attribute(
        self, payload: bytes, snap_id: int, create: bool, exclusive: bool, delete: bool, done: AttributeDone
    ) -> None:
        """GET_VDI_ATTR (protocol.md 9); done(result, vid of the name's hash, attribute id)."""
        operation = {
            "op": "attribute",
            "payload": payload.hex(),
            "snap_id": snap_id,
            "create": create,
            "exclusive": exclusive,
            "delete": delete,
        }

        def ended(values: Values) -> None:
            done(Result(values["result"]), values.get("vid", 0), values.get("attribute", 0))

        self._queue(operation, ended)

    def alter_copies(self, vid: Vid, copies: int, done: ResultDone) -> None:
        """ALTER_VDI_COPY: another number of copies from a new epoch on, in which they are made or dropped."""
        operation = {
            "op": "alter",
            "vid": vid,
            "copies": copies,
            "time": self._context.clock.wall_ns() // 1_000_000_000,
        }
        self._queue(operation, lambda values: done(Result(values["result"])))

    def move_objects(self, vid: Vid, done: ResultDone) -> None:
        """Gives a volume some objects of its own in place of those that snapshots share with it (core.moves)."""
        self._queue({"op": "move", "vid": vid}, lambda values: done(Result(values["result"])))

    def move_object(self, vid: Vid, index: int, done: MoveDone) -> None:
        """Gives a volume this large object of its own, if others' are being replaced; whose it is then (core.moves)."""
        operation = {"op": "move", "vid": vid, "index": index}
        self._queue(operation, lambda values: done(Result(values["result"]), Vid(values.get("vid", NO_VID))))

    def late_map_write(self, vid: Vid, made: list[tuple[int, int]], done: ResultDone) -> None:
        """A client wrote its own objects into the map of the frozen `vid`: the volume that goes on gets those entries
        too, where it still has the old ones. `made`: (index, old entry)."""
        operation = {"op": "late", "vid": vid, "made": made}
        self._queue(operation, lambda values: done(Result(values["result"])))

    # -- one-step changes --------------------------------------------------------------------------------------------

    def _once_loaded(self, command: Values, answered: Callable[[Any], None]) -> None:
        """After a cold start the VDI table comes a moment after the first requests: those are ordered again."""

        def looked(answer: Any) -> None:
            if answer != Result.AGAIN:
                answered(answer)
                return
            self._context.probe("operations.not_loaded")
            self._context.clock.after(RETRY_DELAY_NS, again)

        def again() -> None:
            refusal = self._context.state.result()
            if refusal:
                answered(refusal)
            else:
                self._context.machine.propose(dict(command), looked)

        self._context.machine.propose(dict(command), looked)

    def find_vdi(self, name: bytes, tag: bytes, snap_id: int, done: VdiDone) -> None:
        """GET_VDI_INFO: a lookup in the order of all events."""
        if self._refused(done):
            return

        def found(answer: Any) -> None:
            if isinstance(answer, VdiRecord):
                done(Result.SUCCESS, answer)
            else:
                done(answer, None)

        self._once_loaded({"t": "find", **_target(name, tag, snap_id)}, found)

    def lock_vdi(self, name: bytes, tag: bytes, snap_id: int, shared: bool, done: VdiDone) -> None:
        """LOCK_VDI: lookup, and the lock if the cluster enforces locks (protocol.md 8.5)."""
        if self._refused(done):
            return
        command = {"t": "lock", "shared": shared, **_target(name, tag, snap_id)}

        def locked(answer: Any) -> None:
            result, record = answer if isinstance(answer, tuple) else (answer, None)
            if record is not None and record.is_snapshot:
                self.opened_snapshots[record.vid] = self.opened_snapshots.get(record.vid, 0) + 1
            done(result, record)

        self._once_loaded(command, locked)

    def release_vdi(self, vid: Vid, shared: bool, done: ResultDone) -> None:
        """There is nothing to release of a snapshot that a client of this node has opened; a vid that was frozen under
        its client means the lock of the volume that goes on."""
        opened = self.opened_snapshots.pop(vid, 0)
        if opened > 1:
            self.opened_snapshots[vid] = opened - 1
        if opened:
            done(Result.SUCCESS)
            return
        self._once_loaded({"t": "release", "vid": vid, "shared": shared}, done)

    def add_vdi(self, vid: Vid, copies: int, policy: int, shift: int, use: bool, done: ResultDone) -> None:
        """NOTIFY_VDI_ADD: registers a vid before its inode is written (`cluster snapshot load`)."""
        command = {"t": "add", "vid": vid, "copies": copies, "policy": policy, "shift": shift, "use": use}
        self._once_loaded(command, done)

    def format(
        self,
        ctime: int,
        copies: int,
        policy: int,
        flags: int,
        shift: int,
        store_name: str,
        done: ResultDone,
        recovery_delay_s: int = 0,
    ) -> None:
        """MAKE_FS: everything is wiped, epoch 1 begins; done when it is durable on all nodes."""
        if store_name not in STORE_NAMES:
            done(Result.NO_STORE)
            return
        coding = policy_of(policy)
        if policy and coding is None:
            done(Result.INVALID_PARMS)
            return
        command = {
            "t": "format",
            "ctime": ctime,
            "copies": coding.strips if coding is not None else copies or DEFAULT_COPIES,
            "policy": policy,
            "flags": flags,
            "shift": shift or DEFAULT_SHIFT,
            "store_name": store_name,
            "recovery_delay_s": recovery_delay_s,
            "time": self._now_s(),
        }

        def applied(result: Result) -> None:
            if result or self._settled_fence == self._context.fence:
                done(result)
            else:
                self._formatting.append(done)

        self._context.machine.propose(command, applied)

    def settled(self) -> None:
        """All members of the epoch have told what they hold, and so have its record on their disks."""
        self._settled_fence = self._context.fence
        formatting, self._formatting = self._formatting, []
        for done in formatting:
            done(Result.SUCCESS)

    def shutdown(self, done: ResultDone) -> None:
        self._context.machine.propose({"t": "shutdown"}, done)

    def kill(self, done: ResultDone) -> None:
        """This node stops."""
        self._context.machine.propose({"t": "kill", "node": node_key(self._context.me)}, done)

    def set_recovery(self, enabled: bool, done: ResultDone) -> None:
        self._context.machine.propose({"t": "recovery", "enabled": enabled}, done)

    def new_epoch(self, done: ResultDone, copies: int = 0, policy: int = 0) -> None:
        """A new epoch with the same members: VDIs created later get another redundancy; `policy` as in their inodes."""
        coding = policy_of(policy)
        command = {"t": "epoch", "time": self._now_s()}
        if copies or coding is not None:
            command["copies"] = copies if coding is None else coding.strips
            command["policy"] = policy
        self._context.machine.propose(command, done)

    def reweight(self, done: ResultDone) -> None:
        """Every storing node publishes its free space, in an epoch of its own."""
        if self._context.state.status != Status.RUNNING:
            done(Result.WAIT_FOR_FORMAT if not self._context.state.ctime else Result.WAIT_FOR_JOIN)
            return
        self._context.machine.propose({"t": "reweight"}, done)

    def publish_space(self) -> None:
        """This node's part of `reweight`."""
        _, free = self._context.store.usage()
        self._context.machine.propose({"t": "weigh", "space": free, "time": self._now_s()})

    def set_vnodes(self, vnodes: int, done: ResultDone) -> None:
        """Another number of virtual nodes for this node, in a cluster where nodes have fixed ones."""
        self._context.machine.propose({"t": "weigh", "vnodes": vnodes, "time": self._now_s()}, done)

    def _now_s(self) -> int:
        return self._context.clock.wall_ns() // 1_000_000_000

    def force_recover(self, done: ResultDone) -> None:
        """Starts a waiting cluster with the nodes that are present.

        One that runs with a part of the table of VDIs takes that for all there is.
        """
        state = self._context.state
        if not (state.ctime and state.status == Status.WAITING) and not (
            state.status == Status.RUNNING and state.partial
        ):
            done(Result.FORCE_RECOVER)
            return
        command = {"t": "start", "time": self._now_s()}
        self._context.machine.propose(command, done)

    def _refused(self, done: VdiDone) -> bool:
        refusal = self._context.state.result()
        if refusal:
            done(refusal, None)
        return bool(refusal)

    def _now(self) -> int:
        seconds, rest = divmod(self._context.clock.wall_ns(), 1_000_000_000)
        return seconds << 32 | rest


def _target(name: bytes, tag: bytes, snap_id: int) -> Values:
    return {"name": name.decode("latin-1"), "tag": tag.decode("latin-1"), "snap_id": snap_id}
