"""The copies and strips on this node: how current each is known to be, and how one is restored here.

Each home is told of those of its objects at the start of an epoch (`tell`). What the home of this node decides about
them comes as a call, what others decide comes through core.dispatch. When all homes are done, every copy here is
current: `settled` is remembered durably, and after a restart this node's word counts for that epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import NoSpace, Result, StoreError
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, NodeId, ObjectId, Version, plain_oid
from sheepdog.cluster.core.limits import LOST_PART_ENTRIES, RECOVERY_FULL_PERCENT, RECOVERY_RETRY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.origins import Origin, encode_origins
from sheepdog.cluster.core.peering import (
    FIRM,
    UNDOABLE,
    Holding,
    Verdict,
    decode_members,
    encode_oids,
    parts,
)
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import Done, NodeState, Proven
from sheepdog.cluster.core.puller import Puller
from sheepdog.cluster.core.rebuilder import Rebuilder
from sheepdog.cluster.core.replica import Replica
from sheepdog.cluster.core.stale_strips import StaleStrips
from sheepdog.cluster.core.standing import Standing
from sheepdog.cluster.core.state import ClusterFlag


class Copies:
    """Of one node, over all epochs (home_writes.HomeHooks). `must_work` gets the outcome of writes to the node's own
    state; `settled` is called when the home of this node knows all inventories."""

    def __init__(self, context: Context, state: NodeState, must_work: Done, settled: Callable[[], None]) -> None:
        self.replica = Replica(context, self._went_bad, self._consider_settled)
        self.puller = Puller(context, self.replica.strips.changes)
        self.rebuilder = Rebuilder(context, self.puller, self.replica.strips.changes)
        self.home: Home | None = None  # this node's, of the present epoch
        self._context = context
        self._disk = state
        self._must_work = must_work
        self._on_settled = settled
        self._standing = Standing(0)
        self._stale = StaleStrips(state)
        self._proven = self._saved = Proven()  # the second is on the disk
        self._surplus: dict[ObjectId, Version | None] = {}  # copies that go as soon as that misleads nobody
        self._complete: dict[NodeId, None] = {}  # homes that are done in this epoch

    # -- epochs ----------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> int:
        """Up to this epoch what is here is all that should be."""
        return self._standing.complete

    @property
    def forgotten(self) -> int:
        """Up to this epoch not all is remembered here: some disk was lost since."""
        return max(0, self._proven.forgotten)

    def as_of(self, oid: ObjectId, version: Version) -> int:
        """The newest epoch in which the copy here was known to be current."""
        return self._standing.as_of(oid, version)

    def lacking(self) -> Iterator[tuple[ObjectId, int]]:
        """Objects that exist, or did in that epoch, and of which the copy here is no good."""
        if self.replica.all_settled():
            for oid in self.replica.missing:
                yield oid, self._context.epoch
        else:
            for oid, _, known, earlier in self._standing.lacks():
                if known and not earlier:
                    yield oid, known

    def load(self) -> None:
        """What the disk remembers."""
        self._proven = self._saved = self._disk.load_proven()
        store, settled = self._context.store, self._proven.settled
        unfinished = [oid for oid, version in store.inventory() if version == NO_VERSION]
        stale = self._stale.load(store.version, settled)
        losses = self._stale.losses(store.version)
        self._standing = Standing(settled, self._context.state.epoch, self._proven.broken, unfinished, stale, losses)
        if self._proven.dropped:
            self._standing.complete = 0
        self.replica.strips.load(self._disk, store.version)

    @property
    def log_since(self) -> int:
        """From which epoch on this node remembers all that it recorded; 0: its disks may be others than before."""
        return self._proven.forgotten + 1

    def step_back(self, member: int, common: int) -> None:
        """Epochs after `common` that this node has recorded are none of the cluster's: what it noted in them was so in
        `member`, the last one that was, with this node. Before the first epoch of this process."""
        settled, broken, forgotten, dropped = self._proven
        self._standing.step_back(member)
        self._prove(Proven(min(settled, member), min(broken, member), min(forgotten, common), dropped))

    def forget(self) -> None:
        """The cluster was formatted: nothing of before counts."""
        self._context.origins.clear()
        self.replica.strips.clear()
        self._stale.clear()
        self._standing = Standing(0)
        self._prove(Proven())

    def _prove(self, proven: Proven, done: Callable[[], None] | None = None) -> None:
        """`done` when that is on the disk."""
        self._proven = proven

        def saved(error: StoreError | None) -> None:
            self._must_work(error)
            if error is None:
                self._saved = proven
                self._drop_surplus()
                if done is not None:
                    done()

        self._disk.save_proven(proven, saved)

    def _went_bad(self, oid: ObjectId) -> None:
        """A current copy here did: after a restart the copies without a version are not taken for new ones."""
        self._stale.went_bad([oid], self._must_work)
        if self._proven.broken < self._context.epoch:
            self._prove(self._proven._replace(broken=self._context.epoch))

    def end_epoch(self) -> None:
        """Keeps what is known of the copies at the end of the epoch that is over."""
        context, complete, all_done = self._context, self._complete, self.all_done()
        nodes, home_of = context.placement.nodes, context.placement.home
        in_flight = [*self.replica.unstable(), *self.at_home().writing]
        self.replica.reconsider()

        def equal(oid: ObjectId) -> bool:
            if all_done:
                return True
            home = home_of(oid)
            return home is not None and nodes[home] in complete

        self._standing.advance(context.epoch, self.replica, context.store.inventory(), in_flight, equal)

    def begin(self) -> None:
        """A new epoch: what is here is settled anew. `home` is set before the first message of it."""
        self._complete = {}
        self._surplus = {}
        if self._proven.forgotten < 0:
            self._prove(self._proven._replace(forgotten=self._first_epoch() - 1))
        self.replica.begin()
        self.puller.begin()
        self.rebuilder.begin()

    def _first_epoch(self) -> int:
        """From which epoch on the disks here are a witness: from this one, unless it began before this process did."""
        context = self._context
        placement = context.placement
        began_with_it = placement.members[placement.me].incarnation == context.machine.me.incarnation
        return context.epoch if began_with_it else context.epoch + 1

    def tell(self) -> None:
        """Tells each home which of its objects are here."""
        context, placement = self._context, self._context.placement
        origins: list[list[Origin]] = [[] for _ in placement.members]
        for origin in context.origins:
            home = placement.home(origin.oid)
            if home is not None:
                origins[home].append(origin)
        for member, holdings in enumerate(self._holdings(placement)):
            bodies = [encode_origins(origins[member]), *parts(holdings)]
            for index, body in enumerate(bodies):
                flags = Flag.LAST if index == len(bodies) - 1 else 0
                message = Message(
                    Kind.INVENTORY,
                    context.fence,
                    offset=index,
                    length=self._standing.complete,
                    flags=flags if index else flags | Flag.ORIGINS,
                    watermark=self.forgotten,
                    body=body,
                )
                if member == placement.me:
                    self.at_home().on_inventory(context.me, message)
                else:
                    context.peers.request(placement.nodes[member], message, _delivered)

    def _holdings(self, placement: Placement) -> list[list[Holding]]:
        """By home: the copies here, the states to which strips can go back, and what is known to lack."""
        by_home: list[list[Holding]] = [[] for _ in placement.members]
        for oid, version in self._context.store.inventory():
            home = placement.home(oid)
            if home is not None and not (version == NO_VERSION and oid in self._standing.lacking):
                by_home[home].append(Holding(oid, version, self._standing.as_of(oid, version)))
                by_home[home].extend(self._standing.unsettled(oid, version))
                if oid >> STRIP_SHIFT:
                    steps = self.replica.strips.undo.steps(oid, version)
                    by_home[home].extend(
                        Holding(oid, step.before, step.touched, UNDOABLE if step.back else FIRM) for step in steps
                    )
        for lack in self._standing.lacks():
            home = placement.home(lack.oid)
            if home is not None:
                by_home[home].append(lack)
        return by_home

    def home_done(self, node: NodeId) -> None:
        """Everything that node is home of is recovered."""
        self._complete[node] = None
        self._consider_settled()

    def _consider_settled(self) -> None:
        context = self._context
        if not self.all_done() or self.replica.missing or not self.replica.all_settled():
            return
        forgotten = min(self._proven.forgotten, context.epoch - 1)
        proven = Proven(settled=context.epoch, forgotten=forgotten)
        if self._proven == proven:
            return
        self._standing.settle(context.epoch)
        self._prove(proven)
        context.log(6, f"all copies are current in epoch {context.epoch}")

    def home_undone(self, node: NodeId) -> None:
        """That node has something to recover again."""
        self._complete.pop(node, None)

    def all_done(self) -> bool:
        """Nothing is left to be recovered anywhere."""
        return len(self._complete) == len(self._context.placement.nodes)

    # -- what homes decide -----------------------------------------------------------------------------------------

    def at_home(self) -> Home:
        assert self.home is not None  # there is one as soon as there is an epoch
        return self.home

    def settled_locally(self, verdict: Verdict, known: Callable[[], None]) -> None:
        self.settled(self._context.placement.me, verdict, known)
        self._on_settled()

    def settled(self, home: int, verdict: Verdict, known: Callable[[], None]) -> None:
        """A home has decided; `known`, in this epoch, when that will not be forgotten where it must not be."""
        context, placement = self._context, self._context.placement
        fence = context.fence
        self.replica.settle(home, verdict)
        self._drop_surplus()

        def saved(error: StoreError | None) -> None:
            self._must_work(error)
            if error is None and context.fence == fence:
                known()

        def decided(strip: ObjectId) -> bool:
            return placement.home(strip) == home and strip not in self.replica.lost

        used = frozenset(verdict.undecided)  # also where it is not to stay
        missing = [oid for oid in verdict.missing if oid not in used]
        lost = {oid: self._standing.lost(oid, known) for oid, known in verdict.lost}
        self._stale.settle(decided, missing, context.epoch, context.store.version, saved, lost)

    def when_durable(self, durable: Callable[[], None]) -> None:
        """Who notes that all is current (`settled`) counts for more than the others after a loss of power everywhere.
        So what all told each other is on the disks by then, although nobody waited for it (core.strip_levels)."""
        self._flush_told(self._context.fence, durable)

    def _flush_told(self, fence: int, durable: Callable[[], None]) -> None:
        if self._context.fence == fence:
            self._context.store.flush(None, partial(self._told_flushed, fence, durable))

    def _told_flushed(self, fence: int, durable: Callable[[], None], error: StoreError | None) -> None:
        if error is not None:  # what was on that disk is lost now, and this node tells of that
            self._context.clock.after(RECOVERY_RETRY_NS, partial(self._flush_told, fence, durable))
        elif self._context.fence == fence:
            durable()

    def completed_locally(self) -> None:
        self.home_done(self._context.me)

    def restored_locally(self, oid: ObjectId) -> None:
        self.replica.restored(oid)

    def spoilt_locally(self, oid: ObjectId, version: Version = NO_VERSION) -> None:
        if oid >> STRIP_SHIFT:
            self.replica.refuse(oid, version)
        else:
            self.replica.spoil(oid)

    def note_bad(self, strip: ObjectId, noted: Callable[[], None]) -> None:
        """If the strip here lacks a write, that is remembered until it is made anew; `noted`, in this epoch, when that
        is durable."""
        context = self._context
        if strip not in context.spoilt:
            noted()
            return
        self.replica.refused[strip] = False
        fence = context.fence

        def saved(error: StoreError | None) -> None:
            self._must_work(error)
            if error is None and context.fence == fence:
                noted()

        self._stale.lacks_write(strip, context.epoch, context.store.version, saved)

    def pull(self, message: Message, pulled: Callable[[int], None]) -> None:
        """Restores a copy or a strip here; or only hurries, and then never calls `pulled`."""
        placement, oid = self._context.placement, message.oid
        members = decode_members(message.payload(), len(placement.nodes))
        if message.flags & Flag.HURRY:
            self.puller.hurry(oid)
            self.rebuilder.hurry(oid)
            return
        repair = bool(message.flags & Flag.REPAIR)
        urgent = bool(message.flags & Flag.URGENT)
        if message.flags & Flag.WITNESS:
            pulled = partial(self._pulled_by_witness, oid, pulled)
        if not (urgent or self._may_take(oid)):
            pulled(Result.NO_SPACE)
            return
        if repair:
            self.replica.doubt(oid)
        if not oid >> STRIP_SHIFT:
            sources = [placement.nodes[index] for index in members]
            self.puller.pull(oid, message.version, sources, repair, pulled, urgent)
            return
        policy = self._context.policy_of(plain_oid(oid))
        if policy is None or len(members) != policy.strips:
            pulled(Result.INVALID_PARMS)
        else:
            self.replica.strips.replaced(oid)
            made = partial(self._strip_made, oid, pulled)
            self.rebuilder.rebuild(oid, policy, message.version, members, repair, made, urgent)

    def _strip_made(self, strip: ObjectId, pulled: Callable[[int], None], result: int) -> None:
        if result == Result.SUCCESS:
            self._stale.made_anew(strip, self._context.store.version, self._must_work)
        pulled(result)

    def _pulled_by_witness(self, oid: ObjectId, pulled: Callable[[int], None], result: int) -> None:
        """Without space for the copy the object may be read before it is here: that nothing is here proves nothing."""
        if result == Result.NO_SPACE:
            self.replica.doubt(oid)
        pulled(result)

    def _may_take(self, oid: ObjectId) -> bool:
        """False where the cluster was formatted with -F and a new copy here would leave clients too little space."""
        context = self._context
        if not context.state.flags & ClusterFlag.AVOID_DISKFULL or context.store.version(oid) is not None:
            return True
        policy = context.policy_of(plain_oid(oid)) if oid >> STRIP_SHIFT else None
        size = context.size_of(plain_oid(oid)) // (1 if policy is None else policy.data)
        used, free = context.store.usage()
        return (used + size) * 100 <= (used + free) * RECOVERY_FULL_PERCENT

    def agree(self, message: Message, agreed: Callable[[int], None]) -> None:
        """Brings a strip here back to the state that all of them can have, or takes writes back."""
        strip, fence = message.oid, self._context.fence

        def done(error: StoreError | None) -> None:
            if self._context.fence != fence:
                return
            if error is None:
                self.replica.restored(strip)
            elif not isinstance(error, NoSpace):
                self.replica.spoil(strip)
            agreed(Result.SUCCESS if error is None else error.result)

        state = Version(message.offset, message.length, message.sequence)
        if message.version == NO_VERSION:
            self.replica.strips.take_back(strip, state, done)
            return
        as_is = bool(message.flags & Flag.AS_IS)
        self.replica.strips.agree(strip, state, message.version, message.payload(), as_is, done)

    def drop(self, oid: ObjectId, flags: int) -> None:
        """Removes a copy that does not belong here any more.

        Where the object lives on elsewhere (SURPLUS), that it is not here must not be taken for its deletion: not by
        what this node knew of earlier epochs, nor by what it will know after a restart.
        """
        if flags & Flag.SURPLUS:
            self._surplus[oid] = self._context.store.version(oid)
            self._drop_surplus()
        else:
            self._remove(oid)
            self._consider_settled()

    def _drop_surplus(self) -> None:
        if not self._surplus or not self.replica.all_settled():
            return
        if self._saved.settled == self._context.epoch or self._saved.dropped:
            surplus, self._surplus = self._surplus, {}
            for oid, version in surplus.items():
                if self._context.store.version(oid) == version:
                    self._remove(oid)
                else:  # made anew meanwhile, with more copies than before
                    self._context.probe("copies.surplus_made_anew")
            self._consider_settled()
        elif not self._proven.dropped:
            self._context.probe("copies.claim_given_up")
            self._prove(self._proven._replace(dropped=1))

    def _remove(self, oid: ObjectId) -> None:
        if oid >> STRIP_SHIFT:
            self.replica.strips.replaced(oid)
        else:
            self._context.origins.forget(oid)
        self.replica.restored(oid)
        self._context.store.remove(oid, lambda _: None)

    # -- disks -----------------------------------------------------------------------------------------------------

    def lost(self, oids: Sequence[ObjectId], told: Callable[[], None] = lambda: None) -> None:
        """A disk of this node went, and these copies and strips with it (the store keeps them without a version).

        What is left is not all that this node should have, and must not be taken for it after a restart: `told` when
        the disk says so.
        """
        context, placement = self._context, self._context.placement
        if not oids:
            told()
            return
        if not context.epoch:
            self._prove(Proven(), told)
            return
        self._stale.went_bad(oids, self._must_work)
        forgotten = max(self._proven.forgotten, context.epoch)
        self._prove(self._proven._replace(settled=0, broken=context.epoch, forgotten=forgotten), told)
        context.probe("node.copies_lost")
        by_home: dict[int, list[ObjectId]] = {}
        for oid in oids:
            if context.store.version(oid) is None:
                continue  # removed meanwhile
            self.replica.spoil(oid)
            if oid >> STRIP_SHIFT:
                self.replica.strips.undo.drop(oid)
            home = placement.home(oid)
            if home is not None:
                by_home.setdefault(home, []).append(oid)
        for home, lost in by_home.items():
            node = placement.nodes[home]
            self.home_undone(node)
            if home == placement.me:
                self.at_home().on_lost(home, lost)
                continue
            for start in range(0, len(lost), LOST_PART_ENTRIES):
                body = encode_oids(lost[start : start + LOST_PART_ENTRIES])
                context.peers.request(node, Message(Kind.LOST, context.fence, body=body), _delivered)

    def is_only_here(self, oid: ObjectId) -> bool:
        """Without the copy (strip) on this node the object would be lost."""
        context, whole = self._context, plain_oid(oid)
        policy = context.policy_of(whole)
        needed = 1 if policy is None else policy.data
        return len(context.placement.replicas(whole)) <= needed


def _delivered(_: Message) -> None:
    """Asked only to have the message delivered."""
