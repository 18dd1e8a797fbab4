"""One node: puts the machines together, follows the cluster's state, and switches epochs.

epoch switch   1 the record is written to the epoch log; meanwhile nothing is served in the new epoch
               2 once it is durable (and the VDI table is there): this node's inventory goes to every home
               3 each home with all inventories settles, serves, recovers, and tells when it is done
               4 when all homes are done, every copy here is current: `settled` is remembered durably
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sheepdog.cluster.core.cache import Cache
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.commands import Command
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.dispatch import Dispatch
from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.executor import Executor
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId
from sheepdog.cluster.core.inode_writes import InodeWrites
from sheepdog.cluster.core.join_rules import contradiction
from sheepdog.cluster.core.limits import CACHE_END_NS, LEASE_NS, UNSETTLED_TICKS
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.part import Part
from sheepdog.cluster.core.past import Past
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import (
    Clock,
    Engine,
    Event,
    Leased,
    Log,
    Network,
    NodeState,
    Store,
    View,
    Votes,
)
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.scrub import Scrub
from sheepdog.cluster.core.state import ClusterState, Status, node_key
from sheepdog.cluster.core.strip_check import StripCheck
from sheepdog.cluster.core.vigil import Vigil
from sheepdog.cluster.core.void_epochs import parting


class CacheDisk(NamedTuple):
    """Where the object cache keeps its bytes."""

    store: Store
    identity: str  # of what is in it: another one when that was lost
    size_bytes: int
    direct_io: bool = False  # told to administrators


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
        self.votes: Callable[[], Votes | None] = lambda: None  # set by the daemon, too
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
        self.everyone = Everyone(self.context)
        self.operations = Operations(self.context)
        self.copies = Copies(self.context, state, self._must_work, self.operations.settled)
        self.gateway = Gateway(self.context, self.copies.replica, self.everyone)
        self.gateway.move_object = self.operations.move_object
        self.coherence = self.gateway.coherence = Coherence(self.context, self.everyone, self.operations)
        self.cache_disk = cache_disk
        identity = "" if cache_disk is None else cache_disk.identity
        self.claims = self.gateway.claims = Claims(self.context, self.everyone, self.gateway.drain, identity)
        self.cache: Cache | None = None
        if cache_disk is not None:
            self.cache = Cache(self.context, self.gateway, self.claims, cache_disk.store, cache_disk.size_bytes)
            self.gateway.push = self.cache.volumes.push_here
        inodes = InodeWrites(self.context, self.gateway, self.operations, self.coherence)
        self.gateway.inode_write, self.gateway.inode_create = inodes.write, inodes.create
        self.part = Part(self.context, self.gateway, self.claims, self.coherence, self.cache)
        self._executor = Executor(
            self.context, self.gateway, self.everyone, inodes, self.part.freeze, self.part.left_dirty, self.copies
        )
        self.part.queries["inodes"] = self._executor.table.inodes_here
        self.part.queries["orphans"] = self._executor.sweep.candidates_here
        self.dispatch = Dispatch(self.context, self.gateway, self.copies, self.part)
        self.vigil = Vigil(self.context, self.machine.propose, self._may_expel, self.machine.awaited)
        self.scrub = Scrub(self.context, state, self.gateway.repair, StripCheck(self.context, lambda: self.copies.home))
        self._durable = False  # the current epoch's record is on the disk
        self._told = False  # the homes of the current epoch know what is here
        self._saved = b""  # the configuration, as it is on the disk or will be
        self._recorded = 0  # newest epoch that is durable in the log
        self._remembered: list[EpochRecord] = []  # the log as it was at the start, until the first epoch
        self._former: dict[int, Placement | None] = {}
        self._grace_until_ns = 0  # until then, members that were declared dead may answer from what they knew

    @property
    def cluster(self) -> ClusterState:
        return self.machine.state

    @property
    def home(self) -> Home | None:
        """The home machine of this node; None outside of epochs."""
        return self.copies.home

    @property
    def replica(self) -> Replica:
        return self.copies.replica

    @property
    def door(self) -> Gateway | Cache:
        """What takes clients' requests."""
        return self.gateway if self.cache is None else self.cache

    def start(self) -> None:
        """Reads what the disks remember of the cluster; before the engine is attached."""
        self.copies.load()
        self.scrub.load()
        self._recorded = self.cluster.epoch
        self._remembered = list(self.cluster.epochs)
        self.machine.log_since = self.copies.log_since

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
            self.cache.volumes.end_orderly(leave)

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

    def coordinator_due(self) -> None:
        self.vigil.look()

    def _may_expel(self, node: NodeId, ticks: int) -> bool:
        """No object can depend on that member and those that are gone anyhow: not by what the others have told."""
        state, home, settled = self.cluster, self.copies.home, self.copies.all_done()
        lost = [node, *(member.id for member in self.machine.gone())]
        if home is None or not (settled or (ticks > UNSETTLED_TICKS and not state.partial)):
            return False
        if any(one not in lost for one in home.waiting_for()):
            return False
        kept = [(state.copies, state.policy), *((vdi.copies, vdi.policy) for vdi in state.vdis.records() if vdi.copies)]
        needed = min(state.fewest_copies(), *(1 + _spare(copies, policy) for copies, policy in kept))
        if settled:  # whatever they had forgotten before
            return self._past().knows_all([self.context.epoch] * len(self.context.placement.nodes), needed, lost)
        return home.past.knows_all(home.told(), needed, lost)

    def refused(self, reason: str) -> None:
        self.on_exit(1, f"failed to join Sheepdog: {reason}")

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
        self._save_config()
        self.coherence.changed()
        self._claims_changed()
        self.part.ended((operation["owner"], operation["number"]))
        self.operations.ended(operation)
        self._executor.sweep.consider()

    def _claims_changed(self) -> None:
        if self.cache is not None:
            self.cache.volumes.changed()
        self.claims.changed()

    def state_changed(self, command: Command) -> None:
        kind = command["t"]
        if kind in ("header", "add", "inode"):
            self.context.placement.forget()
            self._save_config()
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
            self.cache.volumes.stop(result)
        self.gateway.stop(result)
        self.operations.forget_all(result)

    # -- epochs ----------------------------------------------------------------------------------------------------

    def formatted(self) -> None:
        """The cluster was formatted: nothing of before counts."""
        store = self.context.store
        self.context.epoch = self.context.fence = 0
        self._recorded = 0
        self._remembered = []
        self._former.clear()
        self._disk.clear_epochs(self._must_work)
        self.copies.forget()
        self.operations.forget_all(Result.VDI_NOT_EMPTY)
        if self.cache is not None:
            self.cache.volumes.forget_all()
        self.gateway.start_over(Result.NO_OBJ)
        for oid, _ in list(store.inventory()):
            store.remove(oid, self._must_work)
        self.gateway.thaw()

    def epoch_changed(self) -> None:
        """The newest record of the state is the epoch from now on."""
        context, state = self.context, self.cluster
        record = state.epochs[-1]
        if context.epoch:
            self.copies.end_epoch()
        elif not self._drop_void_epochs():
            return
        else:
            self.part.joined()
        context.epoch = record.epoch
        context.fence = state.era << 32 | record.epoch
        context.placement = Placement(record.epoch, record.members, context.me, context.copies_of)
        # After a full stop the epoch goes on, and its record names the processes of before.
        present = {member.id: member for member in state.members}
        context.origins.begin([present.get(member.id, member) for member in record.members])
        context.peers.forget_all()
        context.network.connect([node for node in context.placement.nodes if node != context.me])
        self._log(5, f"epoch {record.epoch} with {len(record.members)} nodes")
        self._durable = self._told = False
        self.vigil.begin()
        self.copies.begin()
        self.copies.home = home = Home(context, self.replica.strips, self._former_placement, self._past(), self.copies)
        self.gateway.router.begin(home)
        self.everyone.begin()
        self._record()
        self._executor.sweep.consider()
        self.dispatch.begin()
        self._exit_if_only_gateways(record.members)

    def _drop_void_epochs(self) -> bool:
        """What this node has recorded and the cluster does not know (core.void_epochs) must not be taken, here or after
        a full stop, for the cluster's epochs of the same numbers. False if it must not be dropped either.

        Only now is it known which history a cluster goes on with that was waiting for its members.
        """
        reason = contradiction(self.cluster, self.context.me, self._remembered)
        if reason is not None:  # once more for each event that comes before this process has ended
            self.refused(reason)
            return False
        remembered, self._remembered = self._remembered, []
        common, after = parting(reversed(remembered), self.cluster.epochs)
        if after:
            self.context.probe("node.void_epochs")
            self._log(4, f"epochs {common + 1} to {after[0].epoch} of this node are not the cluster's: dropped")
            self._recorded = common
            self._disk.drop_epochs(common, self._must_work)
            mine = [one.epoch for one in remembered if one.epoch <= common and self._was_in(one)]
            self.copies.step_back(max(mine, default=0), common)
        return True

    def _was_in(self, record: EpochRecord) -> bool:
        return any(member.id == self.context.me for member in record.members)

    def _past(self) -> Past:
        return Past(self.context.placement, self._former_placement, self._former_members, self._fewest_copies)

    def _fewest_copies(self) -> int:
        """Of any VDI, also in earlier epochs, and of one that nobody here knows."""
        return self.cluster.fewest_copies()

    def _former_members(self, epoch: int) -> tuple[Member, ...] | None:
        record = self.cluster.record(epoch) if epoch >= self.cluster.forced else None
        return None if record is None else record.members

    def _former_placement(self, epoch: int) -> Placement | None:
        if epoch < self.cluster.forced:
            return None
        if epoch not in self._former:
            record = self.cluster.record(epoch)
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

        self._saved = self.cluster.config()
        self._disk.save_config(self._saved, next_record)

    def _save_config(self) -> None:
        """If it has changed."""
        config = self.cluster.config()
        if config != self._saved:
            self._saved = config
            self._disk.save_config(config, self._must_work)

    def _must_work(self, error: StoreError | None) -> None:
        if error is not None:
            self._log(3, f"the node's own state cannot be written: {error}")
            self._retire(Result.EIO)
            self.on_exit(1, f"cannot write the node's state: {error}")

    def _tell_inventory(self) -> None:
        """Tells each home which of its objects are here, once the epoch is durable and the VDI table known."""
        context = self.context
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
            self.cache.volumes.begin()
        self.copies.tell()

    def _exit_if_only_gateways(self, members: tuple[Member, ...]) -> None:
        before = self.cluster.epochs[-2].members if len(self.cluster.epochs) > 1 else ()
        if not any(member.vnodes for member in members) and any(member.vnodes for member in before):
            self._log(5, "only gateway nodes are remaining, exiting")
            self.on_exit(0, "only gateway nodes are remaining")

    # -- from the network ------------------------------------------------------------------------------------------

    def on_link(self, node: NodeId, up: bool) -> None:
        self.context.peers.on_link(node, up)

    # -- what administration asks ------------------------------------------------------------------------------------

    def recovery_progress(self) -> tuple[bool, int, int]:
        """(in recovery, objects finished, objects in all) of the objects this node is home of."""
        home = self.home
        if home is None or self.cluster.status != Status.RUNNING:
            return False, 0, 0
        recovery = home.recovery
        return not home.active or bool(recovery.unfinished), recovery.finished, recovery.total


def _spare(copies: int, policy: int) -> int:
    """So many copies or strips may be missing."""
    coding = policy_of(policy)
    return coding.parity if coding is not None else copies - 1
