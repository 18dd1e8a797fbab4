"""One node: puts the machines together, switches epochs, and fences messages of other epochs.

epoch switch   1 the record is written to the epoch log; meanwhile nothing is served in the new epoch
               2 once it is durable (and the VDI table is there): this node's inventory goes to every home
               3 each home with all inventories settles, serves, recovers, and tells when it is done
               4 when all homes are done, every copy here is current: `settled` is remembered durably
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sheepdog.cluster.core.cache import Cache
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.executor import Executor
from sheepdog.cluster.core.gateway import FLUSH_CACHES, Gateway, OperationKey
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.ids import (
    NO_VERSION,
    STRIP_SHIFT,
    Epoch,
    Member,
    NodeId,
    ObjectId,
    Version,
    Vid,
    plain_oid,
    vid_of,
)
from sheepdog.cluster.core.inode_writes import InodeWrites
from sheepdog.cluster.core.limits import (
    CACHE_END_NS,
    LEASE_NS,
    LOST_PART_ENTRIES,
    MAX_EARLY_MESSAGES,
    MAX_ENDED_OPERATIONS,
)
from sheepdog.cluster.core.membership import ClusterMachine, Command
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.origins import Origin, encode_origins
from sheepdog.cluster.core.past import Past
from sheepdog.cluster.core.peering import (
    FIRM,
    UNDOABLE,
    Holding,
    Standing,
    Verdict,
    decode_members,
    decode_oids,
    encode_oids,
    parts,
)
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import Clock, Engine, Event, Leased, Log, Network, NodeState, Store, View
from sheepdog.cluster.core.puller import Puller
from sheepdog.cluster.core.rebuilder import Rebuilder
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.scrub import Scrub
from sheepdog.cluster.core.state import ClusterState, Status, node_key
from sheepdog.cluster.core.vigil import Vigil


class CacheDisk(NamedTuple):
    """Where the object cache keeps its bytes."""

    store: Store
    identity: str  # of what is in it: another one when that was lost
    size_bytes: int


class Node:
    """See the module. `on_exit(status, reason)` is set by the daemon and called when the node must end."""

    payload = b""

    def __init__(
        self,
        me: Member,
        clock: Clock,
        network: Network,
        store: Store,
        state: NodeState,
        engine: Engine,
        log: Log,
        fixed_vnodes: bool = False,
        cache_disk: CacheDisk | None = None,
    ) -> None:
        self.on_exit: Callable[[int, str], None] = lambda status, reason: None
        self.on_lost: Callable[[str], None] = lambda reason: self.on_exit(1, reason)
        self.context = Context(me.id, clock, network, store, log, engine.renew)
        self._disk = state
        self._engine = engine
        self._log = log
        self.machine = ClusterMachine(
            me,
            fixed_vnodes,
            ClusterState.from_disk(state.load_config(), state.load_epochs()),
            clock,
            engine,
            self,
            log,
        )
        self.context.bind(self.machine)
        self.replica = Replica(self.context)
        self.puller = Puller(self.context)
        self.rebuilder = Rebuilder(self.context, self.puller)
        self.everyone = Everyone(self.context)
        self.gateway = Gateway(self.context, self.replica, self.everyone)
        self.operations = Operations(self.context)
        self.coherence = self.gateway.coherence = Coherence(self.context, self.everyone, self.operations)
        identity = "" if cache_disk is None else cache_disk.identity
        self.claims = self.gateway.claims = Claims(self.context, self.everyone, self.gateway.drain, identity)
        self.cache: Cache | None = None
        if cache_disk is not None:
            self.cache = Cache(self.context, self.gateway, self.claims, cache_disk.store, cache_disk.size_bytes)
            self.gateway.push = self.cache.push_here
        inodes = InodeWrites(self.context, self.gateway, self.operations, self.coherence)
        self.gateway.inode_write, self.gateway.inode_create = inodes.write, inodes.create
        self._executor = Executor(self.context, self.gateway, self.everyone, inodes, self.freeze, self.left_dirty)
        self.vigil = Vigil(self.context, self.machine.propose, self._may_expel)
        self.scrub = Scrub(self.context, state, self.gateway.repair)
        self.home: Home | None = None
        self._standing = Standing(0)
        self._lacking: dict[ObjectId, int] = {}  # no current copy here of these; they existed in that epoch
        self._settled = 0
        self._complete: dict[NodeId, None] = {}  # homes that are done in this epoch
        self._ended: dict[tuple[str, int], None] = {}  # the last operations: nobody freezes for them any more
        self._early: list[tuple[NodeId, Message]] = []
        self._durable = False  # the current epoch's record is on the disk
        self._told = False  # the homes of the current epoch know what is here
        self._recorded = 0  # newest epoch that is durable in the log
        self._former: dict[int, Placement | None] = {}
        self._grace_until_ns = 0  # until then, members that were declared dead may answer from what they knew
        self._handlers: dict[int, Callable[[NodeId, Message], None]] = {
            Kind.ANSWER: self.context.peers.on_answer,
            Kind.APPLY: self.replica.on_apply,
            Kind.STABLE: self.replica.on_stable,
            Kind.LEVEL: self.replica.on_level,
            Kind.TABLE: self.puller.on_table,
            Kind.FETCH: self._on_fetch,
            Kind.SUBMIT: lambda sender, message: self._at_home().on_submit(sender, message),
            Kind.READ: self._on_read,
            Kind.INVENTORY: self._on_inventory,
            Kind.SETTLE: self._on_settle,
            Kind.PULL: self._on_pull,
            Kind.DROP: self._on_drop,
            Kind.ROLLBACK: self._on_roll_back,
            Kind.LOST: self._on_lost_copies,
            Kind.COMPLETE: self._on_complete,
            Kind.FLUSH: self._on_flush,
            Kind.DRAIN: self._on_drain,
            Kind.QUERY: self._on_query,
            Kind.PING: lambda sender, message: self.context.peers.answer(sender, message, Result.SUCCESS),
        }

    @property
    def cluster(self) -> ClusterState:
        return self.machine.state

    @property
    def door(self) -> Gateway | Cache:
        """What takes clients' requests."""
        return self.gateway if self.cache is None else self.cache

    def start(self) -> None:
        """Reads what the disks remember of the cluster; before the engine is attached."""
        self._settled = self._disk.load_settled()
        self._standing = Standing(self._settled)
        self._executor.table.begin(self._settled)
        self.scrub.load()
        self._recorded = self.cluster.epoch
        self.replica.strips.undo.load(self._disk, self.context.store.version)

    def stop(self, done: Callable[[], None]) -> None:
        """Leaves the cluster orderly. Nothing is answered any more: the others go on without this node at once.

        What is dirty in the cache is pushed before; what that does not manage in time, the next start finds.
        """
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self.gateway.suspend(True)
                self._engine.leave()
                self.context.store.flush(None, lambda _: done())

        if self.cache is None or self.cluster.result():
            leave()
        else:
            self.context.clock.after(CACHE_END_NS, leave)
            self.cache.end_orderly(leave)

    # -- from the engine -------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        if isinstance(event, Leased):
            self.gateway.gate.leased(event.until_ns)
            return
        if isinstance(event, View) and event.grace_ns:
            self._grace_until_ns = max(self._grace_until_ns, self.context.clock.now_ns() + event.grace_ns)
        self.machine.on_event(event)

    def expelled(self, member: Member) -> None:
        self._grace_until_ns = max(self._grace_until_ns, self.context.clock.now_ns() + LEASE_NS)

    def _may_expel(self) -> bool:
        """Everything is recovered, and every volume has another copy: no object can depend on one member."""
        state = self.cluster
        fewest = min([state.copies, *(vdi.copies for vdi in state.vdis.records() if vdi.copies)])
        return len(self._complete) == len(self.context.placement.nodes) and fewest > 1

    def refused(self, reason: str) -> None:
        self._log(3, f"failed to join Sheepdog: {reason}")
        self.on_exit(1, reason)

    def lost(self, reason: str) -> None:
        """This incarnation is over. Another one (a new Node on the same store) may join, as after a crash.

        `on_lost` comes first: clients with requests under way must learn that nobody knows what became of them, so
        their connections have to be closed before the requests end.
        """
        self._log(3, f"lost the cluster: {reason}")
        self.on_lost(reason)
        self.context.network.connect(())
        self.context.retire()
        self._retire(Result.CLUSTER_ERROR)

    def suspended(self, suspended: bool, reason: str) -> None:
        if suspended:
            self._log(4, f"the membership engine is out of reach: {reason}; requests wait")
        else:
            self._log(5, "the membership engine answers again; requests go on")
        self.gateway.suspend(suspended)

    def operation_due(self, operation: Command) -> None:
        if operation["op"] == "load" or self.context.epoch:
            self._executor.execute(operation)

    def operation_ended(self, operation: Command) -> None:
        self.context.placement.forget()
        if operation["op"] == "load":
            self._tell_inventory()
        self.coherence.changed()
        self._claims_changed()
        key = operation["owner"], operation["number"]
        self._ended = {**dict(list(self._ended.items())[1 - MAX_ENDED_OPERATIONS :]), key: None}
        if self.cache is not None:
            self.cache.thaw(key)
        self.gateway.thaw(key)
        self.operations.ended(operation)
        self._executor.sweep.consider()

    def _claims_changed(self) -> None:
        if self.cache is not None:
            self.cache.changed()
        self.claims.changed()

    def state_changed(self, command: Command) -> None:
        kind = command["t"]
        if kind in ("header", "add", "inode"):
            self.context.placement.forget()
        elif kind in ("coherence", "release"):
            self.coherence.changed()
        elif kind == "cache":
            self._claims_changed()
        elif kind == "recovery":
            self._save_config()
            if self.home is not None and self.home.active:
                self.home.recovery.run()
        elif kind == "reweight" and self.machine.me.vnodes:
            self.operations.publish_space()
        elif kind == "shutdown":
            self._end("shutdown")
        elif kind == "kill" and command["node"] == node_key(self.context.me):
            self._end("killed by the administrator")

    def _end(self, reason: str) -> None:
        self._log(5, f"stopping: {reason}")
        self._retire(Result.SHUTDOWN)
        self.context.store.flush(None, lambda _: self.on_exit(0, reason))

    def _retire(self, result: Result) -> None:
        """This node serves no more."""
        self.scrub.retire()
        if self.cache is not None:
            self.cache.stop(result)
        self.gateway.stop(result)
        self.operations.forget_all(result)

    # -- epochs ----------------------------------------------------------------------------------------------------

    def formatted(self) -> None:
        """The cluster was formatted: nothing of before counts."""
        store = self.context.store
        self.context.epoch = self.context.fence = 0
        self._recorded = 0
        self._former.clear()
        self.context.origins.clear()
        self.replica.strips.clear()
        self._lacking = {}
        self._settled = 0
        self._standing = Standing(0)
        self._disk.clear_epochs(self._must_work)
        self._disk.save_settled(0, self._must_work)
        self.operations.forget_all(Result.VDI_NOT_EMPTY)
        if self.cache is not None:
            self.cache.forget_all()
        self.gateway.start_over(Result.NO_OBJ)
        for oid, _ in list(store.inventory()):
            store.remove(oid, self._must_work)
        self.gateway.thaw()

    def epoch_changed(self) -> None:
        """The newest record of the state is the epoch from now on."""
        context, state = self.context, self.cluster
        record = state.epochs[-1]
        self._end_epoch()
        context.epoch = record.epoch
        context.fence = state.era << 32 | record.epoch
        context.placement = Placement(record.epoch, record.members, context.me, context.copies_of)
        # After a full stop the epoch goes on, and its record names the processes of before.
        present = {member.id: member for member in state.members}
        context.origins.begin([present.get(member.id, member) for member in record.members])
        context.peers.forget_all()
        context.network.connect([node for node in context.placement.nodes if node != context.me])
        self._log(5, f"epoch {record.epoch} with {len(record.members)} nodes")
        self._complete = {}
        self._durable = self._told = False
        self.vigil.begin()
        self.replica.begin()
        self.puller.begin()
        self.rebuilder.begin()
        past = Past(context.placement, self._former_placement, self._former_members, self._fewest_copies)
        self.home = Home(context, self.replica.strips, self._former_placement, past, self)
        self.gateway.begin(self.home)
        self.everyone.begin()
        self._record()
        self._executor.sweep.consider()
        early, self._early = self._early, []
        for sender, message in early:
            self.on_message(sender, message)
        self._exit_if_only_gateways(record.members)

    def _end_epoch(self) -> None:
        """What this node knows of its copies at the end of the epoch that is over."""
        context = self.context
        if not context.epoch:
            return
        settled = self.replica.all_settled()
        known = self._lacking
        self._lacking = {} if settled else dict(known)
        for oid in self.replica.missing:
            self._lacking[oid] = known.get(oid, 0) if oid in self.replica.lost else context.epoch
        self._standing.advance(context.epoch, settled, context.store.inventory(), self.replica.is_current)

    def _fewest_copies(self) -> int:
        state = self.cluster
        copies = [copies for vdi in state.vdis.records() for copies in (vdi.copies, *(c for _, c in vdi.former_copies))]
        return min([state.copies, *filter(None, copies)])

    def _former_members(self, epoch: int) -> tuple[Member, ...] | None:
        record = self.cluster.record(epoch) if epoch >= self.cluster.forced else None
        return None if record is None else record.members

    def _former_placement(self, epoch: int) -> Placement | None:
        if epoch not in self._former:
            record = self.cluster.record(epoch) if epoch >= self.cluster.forced else None
            self._former[epoch] = None if record is None else self._placement_at(epoch, record.members)
        return self._former[epoch]

    def _placement_at(self, epoch: int, members: tuple[Member, ...]) -> Placement:
        context = self.context
        return Placement(Epoch(epoch), members, context.me, lambda oid: context.copies_at(oid, epoch))

    def _record(self) -> None:
        """Makes the configuration and all new epoch records durable, then goes on to peering."""
        fence = self.context.fence
        records = [record for record in self.cluster.epochs if record.epoch > self._recorded]

        def next_record(error: StoreError | None) -> None:
            if error is not None:
                self._must_work(error)
                return
            if self.context.fence != fence:
                return
            if records:
                record = records.pop(0)
                self._recorded = max(self._recorded, record.epoch)
                self._disk.append_epoch(record, next_record)
            else:
                self._durable = True
                self._tell_inventory()

        self._disk.save_config(self.cluster.config(), next_record)

    def _save_config(self) -> None:
        self._disk.save_config(self.cluster.config(), self._must_work)

    def _must_work(self, error: StoreError | None) -> None:
        if error is not None:
            self._log(3, f"the node's own state cannot be written: {error}")
            self._retire(Result.EIO)
            self.on_exit(1, f"cannot write the node's state: {error}")

    def _tell_inventory(self) -> None:
        """Tells each home which of its objects are here, once the epoch is durable and the VDI table known."""
        context, placement = self.context, self.context.placement
        if not self._durable or not self.cluster.loaded or self._told:
            return
        grace_ns = self._grace_until_ns - context.clock.now_ns()
        if grace_ns > 0:  # nobody serves in this epoch before all have told
            fence = context.fence
            context.clock.after(grace_ns, lambda: self._tell_inventory() if context.fence == fence else None)
            return
        self._told = True
        self.claims.settle()
        if self.cache is not None:
            self.cache.begin()
        by_home: list[list[Holding]] = [[] for _ in placement.members]
        for oid, version in context.store.inventory():
            home = placement.home(oid)
            if home is not None:
                by_home[home].append(Holding(oid, version, self._standing.as_of(oid, version)))
                if oid >> STRIP_SHIFT:
                    steps = self.replica.strips.undo.steps(oid, version)
                    by_home[home].extend(
                        Holding(oid, step.before, step.touched, UNDOABLE if step.back else FIRM) for step in steps
                    )
        for oid, known in self._lacking.items():
            home = placement.home(oid)
            if home is not None:
                by_home[home].append(Holding(oid, NO_VERSION, known))
        origins: list[list[Origin]] = [[] for _ in placement.members]
        for origin in context.origins:
            home = placement.home(origin.oid)
            if home is not None:
                origins[home].append(origin)
        for home, holdings in enumerate(by_home):
            bodies = [encode_origins(origins[home]), *parts(holdings)]
            for index, body in enumerate(bodies):
                flags = Flag.LAST if index == len(bodies) - 1 else 0
                message = Message(
                    Kind.INVENTORY,
                    context.fence,
                    offset=index,
                    length=self._standing.complete,
                    flags=flags if index else flags | Flag.ORIGINS,
                    body=body,
                )
                if home == placement.me:
                    self._at_home().on_inventory(context.me, message)
                else:
                    context.peers.request(placement.nodes[home], message, _delivered)

    def _exit_if_only_gateways(self, members: tuple[Member, ...]) -> None:
        before = self.cluster.epochs[-2].members if len(self.cluster.epochs) > 1 else ()
        if not any(member.vnodes for member in members) and any(member.vnodes for member in before):
            self._log(5, "only gateway nodes are remaining, exiting")
            self.on_exit(0, "only gateway nodes are remaining")

    # -- from the home machine of this node ------------------------------------------------------------------------

    def settled_locally(self, verdict: Verdict) -> None:
        self.replica.settle(self.context.placement.me, verdict)
        self.operations.settled()

    def completed_locally(self) -> None:
        self._home_done(self.context.me)

    def restored_locally(self, oid: ObjectId) -> None:
        self.replica.restored(oid)

    def _home_done(self, node: NodeId) -> None:
        self._complete[node] = None
        context = self.context
        if len(self._complete) < len(context.placement.nodes) or self.replica.missing:
            return
        if not self.replica.all_settled() or self._settled >= context.epoch:
            return
        self._settled = context.epoch
        self._lacking = {}
        self._standing.settle(context.epoch)
        self._disk.save_settled(context.epoch, self._must_work)
        self._log(6, f"all copies are current in epoch {context.epoch}")

    # -- from the network ------------------------------------------------------------------------------------------

    def on_link(self, node: NodeId, up: bool) -> None:
        self.context.peers.on_link(node, up)

    def on_message(self, sender: NodeId, message: Message) -> None:
        """One message of a peer. Another epoch's is not obeyed: an older one is dropped (its sender will notice
        and ask again), a newer one waits until this node gets there."""
        context = self.context
        if message.fence != context.fence:
            if message.fence > context.fence and len(self._early) < MAX_EARLY_MESSAGES:
                context.probe("node.early_message")
                self._early.append((sender, message))
            else:
                context.probe("node.stale_message")
            return
        if sender not in context.placement.index_of:
            return
        self._handlers[message.kind](sender, message)

    def _at_home(self) -> Home:
        assert self.home is not None  # there is one as soon as there is an epoch
        return self.home

    def _on_inventory(self, sender: NodeId, message: Message) -> None:
        self.context.peers.answer(sender, message, Result.SUCCESS)
        self._at_home().on_inventory(sender, message)

    def _on_settle(self, sender: NodeId, message: Message) -> None:
        self.replica.settle(self.context.placement.index_of[sender], Verdict.decode(message))
        self.context.peers.answer(sender, message, Result.SUCCESS)

    def _on_pull(self, sender: NodeId, message: Message) -> None:
        fence = self.context.fence

        def pulled(result: int) -> None:
            if self.context.fence == fence:
                if not result:
                    self.replica.restored(message.oid)
                self.context.peers.answer(sender, message, result)

        self.pull(message, pulled)

    def pull(self, message: Message, pulled: Callable[[int], None]) -> None:
        """Restores a copy or a strip here."""
        placement, oid = self.context.placement, message.oid
        members = decode_members(_body(message), len(placement.nodes))
        repair = bool(message.flags & Flag.REPAIR)
        if not oid >> STRIP_SHIFT:
            self.puller.pull(oid, message.version, [placement.nodes[index] for index in members], repair, pulled)
            return
        policy = self.context.policy_of(plain_oid(oid))
        if policy is None or len(members) != policy.strips:
            pulled(Result.INVALID_PARMS)
        else:
            self.replica.strips.replaced(oid)
            self.rebuilder.rebuild(oid, policy, message.version, members, repair, pulled)

    def agree(self, message: Message, agreed: Callable[[int], None]) -> None:
        strip, fence = message.oid, self.context.fence

        def done(error: StoreError | None) -> None:
            if self.context.fence != fence:
                return
            if error is not None:
                self.replica.missing[strip] = None
            else:
                self.context.spoilt.pop(strip, None)
            agreed(Result.SUCCESS if error is None else error.result)

        state = Version(message.offset, message.length, message.sequence)
        self.replica.strips.agree(strip, state, message.version, _body(message), done)

    def drop(self, oid: ObjectId) -> None:
        if oid >> STRIP_SHIFT:
            self.replica.strips.replaced(oid)
            self.replica.restored(oid)
        else:
            self.context.origins.forget(oid)
        self.context.store.remove(oid, lambda _: None)

    def _on_drop(self, sender: NodeId, message: Message) -> None:
        self.context.peers.answer(sender, message, Result.SUCCESS)
        self.drop(message.oid)

    def copies_lost(self, oids: Sequence[ObjectId]) -> None:
        """A disk of this node went, and these copies and strips with it (the store keeps them without a version).

        What is left is not all that this node should have, and must not be taken for it after a restart.
        """
        context, placement = self.context, self.context.placement
        if not oids:
            return
        self._settled = 0
        self._disk.save_settled(0, self._must_work)
        if not context.epoch:
            return
        context.probe("node.copies_lost")
        by_home: dict[int, list[ObjectId]] = {}
        for oid in oids:
            if context.store.version(oid) is None:
                continue  # removed meanwhile
            self.replica.missing[oid] = None
            if oid >> STRIP_SHIFT:
                self.replica.strips.undo.drop(oid)
            home = placement.home(oid)
            if home is not None:
                by_home.setdefault(home, []).append(oid)
        for home, lost in by_home.items():
            node = placement.nodes[home]
            self._complete.pop(node, None)
            if home == placement.me:
                self._at_home().on_lost(home, lost)
                continue
            for start in range(0, len(lost), LOST_PART_ENTRIES):
                body = encode_oids(lost[start : start + LOST_PART_ENTRIES])
                context.peers.request(node, Message(Kind.LOST, context.fence, body=body), _delivered)

    def is_only_here(self, oid: ObjectId) -> bool:
        """Without the copy (strip) on this node the object would be lost."""
        context, whole = self.context, plain_oid(oid)
        policy = context.policy_of(whole)
        needed = 1 if policy is None else policy.data
        return len(context.placement.replicas(whole)) <= needed

    def _on_lost_copies(self, sender: NodeId, message: Message) -> None:
        self.context.peers.answer(sender, message, Result.SUCCESS)
        self._complete.pop(self.context.me, None)
        self._at_home().on_lost(self.context.placement.index_of[sender], decode_oids(_body(message)))

    def _on_roll_back(self, sender: NodeId, message: Message) -> None:
        self.agree(message, lambda result: self.context.peers.answer(sender, message, result))

    def _on_fetch(self, sender: NodeId, message: Message) -> None:
        if message.oid >> STRIP_SHIFT and message.version == NO_VERSION:
            self.replica.strips.on_fetch(sender, message)
        else:
            self.puller.on_fetch(sender, message)

    def _on_read(self, sender: NodeId, message: Message) -> None:
        if message.oid >> STRIP_SHIFT:
            self.gateway.strip_reads.on_read(sender, message)
        else:
            self._at_home().on_read(sender, message)

    def _on_complete(self, sender: NodeId, message: Message) -> None:
        self.context.peers.answer(sender, message, Result.SUCCESS)
        self.replica.recovered(self.context.placement.index_of[sender])
        self._home_done(sender)

    def _on_flush(self, sender: NodeId, message: Message) -> None:
        flush = self.gateway.flush_here if message.body == FLUSH_CACHES else self.gateway.flush_store
        flush(vid_of(message.oid), self._answering(sender, message))

    def _on_drain(self, sender: NodeId, message: Message) -> None:
        answer = self._answering(sender, message)
        owner, number = json.loads(bytes(_body(message)))
        if (owner, number) in self._ended:  # asked again over a new link, when it was all over
            answer(Result.SUCCESS, b"")
        else:
            self.freeze(vid_of(message.oid), (owner, number), answer)

    def freeze(self, vid: Vid, by: OperationKey, answered: Callable[[int, Buffer], None]) -> None:
        """This node's part of a freeze (gateway.freeze): its cache has nothing more of the volume than the cluster."""

        def pushed(result: int) -> None:
            if result or by in self._ended:  # it may have ended while the cache was pushing
                if self.cache is not None and by in self._ended:
                    self.cache.thaw(by)
                answered(result, b"")
            else:
                self.gateway.freeze(vid, by, lambda: answered(Result.SUCCESS, b""))

        if self.claims.lost(vid):
            pushed(Result.VDI_LOCKED)
        elif self.cache is None:
            pushed(Result.SUCCESS)
        else:
            self.cache.freeze(vid, by, pushed)

    def left_dirty(self, done: Callable[[str, list[Vid]], None]) -> None:
        """The volumes that this node's cache may have unpushed data of, and which contents of it that are."""
        if self.cache is None:
            done("", [])
        else:
            self.cache.left_dirty(lambda vids: done(self.claims.identity, vids))

    def _on_query(self, sender: NodeId, message: Message) -> None:
        question = json.loads(bytes(_body(message)))
        if question == "inodes":
            self._executor.table.inodes_here(self._answering(sender, message))
        elif question == "orphans":
            self._executor.sweep.candidates_here(self._answering(sender, message))
        else:
            answer = self._answering(sender, message)
            if not self.claims.asked(question, answer):
                self.coherence.asked(question, answer)

    def _answering(self, sender: NodeId, message: Message) -> Callable[[int, Buffer], None]:
        def answer(result: int, body: Buffer) -> None:
            self.context.peers.answer(sender, message, result, body)

        return answer

    # -- what administration asks ------------------------------------------------------------------------------------

    def recovery_progress(self) -> tuple[bool, int, int]:
        """(in recovery, objects finished, objects in all) of the objects this node is home of."""
        home = self.home
        if home is None or self.cluster.status != Status.RUNNING:
            return False, 0, 0
        recovery = home.recovery
        return not home.active or bool(recovery.unfinished), recovery.finished, recovery.total


def _body(message: Message) -> Buffer:
    assert isinstance(message.body, (bytes, bytearray, memoryview))
    return message.body


def _delivered(_: Any) -> None:
    """Asked only to have the message delivered."""
