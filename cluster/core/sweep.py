"""The sweep: finds and frees what deleted VDIs have left behind when gateways or clients died at a bad moment.

 data objects   of a deleted VDI, and named by the map of no living one
 others         vmstate, B-tree nodes and ledgers of a deleted VDI
 attributes     of a name that nothing has any more, or that were made and never committed
 vids           with `format -R`, of families that are deleted altogether
 snapshots      that failed in the middle: on the disks too the volume becomes what the table says
 maps           of deleted VDIs whose inode could not be written when a cold start found them

It is an ordered operation, so no VDI comes or goes meanwhile. What belongs to a living VDI is never touched, even if
no map names it: a client may have created it and be about to name it. It goes when that VDI is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import chain
from typing import Any

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import (
    NO_OID,
    ObjectId,
    Vid,
    attribute_oid,
    inode_oid,
    is_attribute,
    is_data,
    is_inode,
    plain_oid,
    vid_of,
)
from sheepdog.cluster.core.inode import SNAP_CTIME_OFFSET
from sheepdog.cluster.core.inode_writes import InodeWrites
from sheepdog.cluster.core.limits import RECLAIM_PARALLEL, SWEEP_DELAY_NS
from sheepdog.cluster.core.messages import Buffer, Flag, Kind
from sheepdog.cluster.core.script import Script, Step, gather
from sheepdog.cluster.core.state import ClusterFlag, Status
from sheepdog.cluster.core.vdi import VdiRecord

Values = dict[str, Any]
Erase = Callable[[VdiRecord], Script[int]]


class Sweep:
    """Of one node. `erase` frees what a deleted VDI names and empties its map."""

    def __init__(
        self,
        context: Context,
        gateway: Gateway,
        everyone: Everyone,
        inodes: InodeWrites,
        erase: Erase,
        lacking: Callable[[], Iterable[tuple[ObjectId, int]]],
    ) -> None:
        """`lacking`: copies that this node should have and has not (core.copies)."""
        self._context = context
        self._gateway = gateway
        self._everyone = everyone
        self._inodes = inodes
        self._erase = erase
        self._lacking = lacking
        self._planned = False

    def consider(self) -> None:
        """Something may have been left behind: the coordinator orders a sweep, one for many deletions in a row."""
        if not self._planned and self._is_due():
            self._planned = True
            self._context.clock.after(SWEEP_DELAY_NS, self._order)

    def _is_due(self) -> bool:
        state, machine = self._context.state, self._context.machine
        # While volumes may be unknown, what seems to belong to nothing may be theirs.
        running = state.status == Status.RUNNING and state.loaded and not state.partial and self._context.fence > 0
        return running and state.swept < state.sweeps and machine.is_coordinator()

    def _order(self) -> None:
        self._planned = False
        state = self._context.state
        if self._is_due() and not any(operation["op"] == "sweep" for operation in state.queue):
            operation = {"op": "sweep", "owner": "sweep", "number": state.sweeps}
            self._context.machine.propose({"t": "op", "operation": operation})

    def candidates_here(self, answered: Callable[[int, Buffer], None]) -> None:
        """JSON of the ids of what is known here of deleted VDIs (not their inodes), and of all attributes."""
        dead = frozenset(record.vid for record in self._context.state.vdis.records() if record.deleted)
        found = dict.fromkeys(
            plain_oid(oid)
            for oid, _ in chain(self._context.store.inventory(), self._lacking())
            if not is_inode(oid) and (is_attribute(oid) or vid_of(oid) in dead)
        )
        answered(Result.SUCCESS, json.dumps(list(found)).encode())

    def run(self, operation: Values) -> Script[Values]:
        """The operation `sweep`: its number says which wishes for one it fulfils."""
        buried = yield from self._bury()
        answers: dict[Any, Buffer] = yield self._ask()
        candidates = sorted({ObjectId(oid) for node in sorted(answers) for oid in json.loads(bytes(answers[node]))})
        attributes = [oid for oid in candidates if is_attribute(oid)]
        others = [oid for oid in candidates if not is_attribute(oid)]
        named = yield from self._inodes.named([oid for oid in others if is_data(oid)])
        orphans = [oid for oid in others if oid not in named]
        gone, lost_attributes = self._useless_attributes(attributes)
        if orphans or lost_attributes:
            self._context.probe("sweep.orphans")
            what = f"{len(orphans)} objects and {len(lost_attributes)} attributes"
            self._context.log(5, f"{what} belonged to nothing any more: freed")
        kept = yield from self._remove([*orphans, *lost_attributes])
        forgotten = yield from self._forget_families(frozenset(vid_of(oid) for oid in kept))
        mended = []
        for frozen, made in self._context.state.doubtful:
            if (yield from self.undo_snapshot(Vid(frozen), Vid(made))):
                mended.append([frozen, made])
        changes: Values = {
            "put": buried,
            "swept": operation["number"],
            "attributes_gone": gone,
            "mended": mended,
            "forgotten": forgotten,
        }
        return {"result": int(Result.SUCCESS), "changes": changes}

    def _bury(self) -> Script[list[Values]]:
        """The tombstones of those whose map is empty now; what is out of reach yet waits for another sweep."""
        tombstones = []
        for record in [record for record in self._context.state.vdis.records() if record.is_unburied]:
            if not (yield from self._erase(record)):
                self._context.probe("sweep.buried")
                tombstones.append(record.tombstone())
        return tombstones

    def undo_snapshot(self, frozen: Vid, made: Vid) -> Script[bool]:
        """A snapshot was not committed: its volume is not frozen, and the VDI `made` to go on does not exist.

        False if the volume's inode cannot be written now. Then `made` stays, or a cold start would find no volume that
        goes on.
        """
        vdis = self._context.state.vdis
        record = vdis.get(frozen)
        if record is not None and not record.snap_ctime:  # else it was frozen by another snapshot since
            result, _ = yield self._change(inode_oid(frozen), 0, SNAP_CTIME_OFFSET, bytes(8))
            if result not in (Result.SUCCESS, Result.NO_OBJ):
                self._context.probe("sweep.snapshot_in_doubt")
                return False
        if vdis.get(made) is None:
            yield self._change(inode_oid(made), Flag.REMOVE, 0, b"")
        return True

    def _change(self, oid: ObjectId, flags: int, offset: int, data: Buffer) -> Step:
        return lambda done: self._gateway.change(oid, flags | Flag.DURABLE, offset, 0, data, 0, done)

    def _ask(self) -> Step:
        return lambda done: self._everyone.ask(
            Kind.QUERY, NO_OID, b'"orphans"', self.candidates_here, lambda _, answers: done(answers)
        )

    def _useless_attributes(self, present: Iterable[ObjectId]) -> tuple[list[int], list[ObjectId]]:
        """(name vids that go from the table, attribute objects to remove)."""
        vdis = self._context.state.vdis
        living = frozenset(vid_of_name(record.name) for record in vdis.records() if record.name)
        gone = [int(vid) for vid in sorted(vdis.attributes) if vid not in living]
        kept = frozenset(
            attribute_oid(vid, place) for vid, places in vdis.attributes.items() if vid in living for place in places
        )
        return gone, [oid for oid in present if oid not in kept]

    def _remove(self, oids: Sequence[ObjectId]) -> Script[list[ObjectId]]:
        """Returns those that could not be removed now."""
        answers = yield gather([self._change(oid, Flag.REMOVE, 0, b"") for oid in oids], RECLAIM_PARALLEL)
        gone = (Result.SUCCESS, Result.NO_OBJ)
        return [oid for oid, (result, _) in zip(oids, answers, strict=True) if result not in gone]

    def _forget_families(self, needed: Container[Vid]) -> Script[list[int]]:
        """With `format -R`: the vids that are free again, because all VDIs that descend from each other are deleted.

        Not while nodes are away that may hold objects of theirs which nobody here knows, nor while some of those that
        are known cannot be removed (`needed`): a VDI that got the vid would find them.
        """
        state, home = self._context.state, self._gateway.router.home
        if not state.flags & ClusterFlag.RECYCLE or home is None or not home.knows_all:
            return []
        forgotten: list[int] = []
        for family in state.vdis.dead_families():
            if any(vid in needed for vid in family):
                continue
            left = yield from self._remove([inode_oid(vid) for vid in family])
            if not left:
                forgotten += family
        return forgotten
