"""The table of all VDIs after a cold start, collected from the inode objects of all members.

Nodes that are away may have inodes of which nobody else has a copy. Then the table is *partial*: nothing is made or
deleted, since ids that seem free may be taken and objects that nothing seems to name may be named; what is not known,
or known only as it was before others may have changed it, is out of reach rather than missing. The table is collected
again in every epoch until nothing can be missing any more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.errors import PeerError, Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VERSION,
    NodeId,
    ObjectId,
    Vid,
    inode_oid,
    is_attribute,
    is_inode,
    vid_of,
)
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader
from sheepdog.cluster.core.limits import RECLAIM_PARALLEL
from sheepdog.cluster.core.messages import Buffer, Kind
from sheepdog.cluster.core.past import Past
from sheepdog.cluster.core.script import Script, Step, gather
from sheepdog.cluster.core.state import ClusterState, node_key
from sheepdog.cluster.core.vdi import Claim, VdiTable

Values = dict[str, Any]
LeftDirty = Callable[[Callable[[str, list[Vid]], None]], None]
"""Tells the identity of this node's cache, and the volumes that it may have unpushed data of."""


class _Found:
    """What all members have told (`TableLoad.inodes_here`)."""

    def __init__(self, answers: Mapping[NodeId, Buffer]) -> None:
        self.inodes: dict[int, InodeHeader] = {}
        self.attributes: dict[tuple[Vid, int], None] = {}
        self.claims: dict[Vid, Claim] = {}
        self.complete: dict[NodeId, int] = {}
        self.forgotten: dict[NodeId, int] = {}
        self.lacking: dict[int, int] = {}  # vid: the newest epoch in which its inode existed for a member that lacks it
        self._ranks: dict[int, tuple[Any, ...]] = {}
        self._holders: dict[int, list[NodeId]] = {}
        for node in sorted(answers):
            inodes, places, cache, cached, known = json.loads(bytes(answers[node]))
            self.complete[node], self.forgotten[node], lacking = known
            for vid, epoch in lacking:
                self.lacking[vid] = max(epoch, self.lacking.get(vid, 0))
            self.claims.update((Vid(vid), Claim(node_key(node), cache, True)) for vid in cached)
            self.attributes.update(((Vid(vid), place), None) for vid, place in places)
            for number, as_of, version, text in inodes:
                self._holders.setdefault(number, []).append(node)
                rank = (as_of, tuple(version))
                if number not in self._ranks or rank > self._ranks[number]:
                    self._ranks[number] = rank
                    self.inodes[number] = InodeHeader.unpack(bytes.fromhex(text))

    def table(self, claim_number: int) -> tuple[VdiTable, list[Vid]]:
        """As VdiTable.of_inodes."""
        table, unfinished = VdiTable.of_inodes(self.inodes[vid] for vid in sorted(self.inodes))
        for vid, claim in sorted(self.claims.items()):
            record = table.get(vid)
            if record is not None and not record.deleted and not record.is_snapshot:
                table.claims[vid] = claim
        table.claim_number = claim_number
        for vid, place in sorted(self.attributes):
            table.attributes.setdefault(vid, []).append(place)
        return table, unfinished

    def forget_doubtful(self) -> None:
        """A working VDI whose parent is not known may be the rest of a snapshot that was never committed; and of two of
        one name nobody can tell which goes on."""
        working = Counter(inode.name for inode in self.inodes.values() if inode.name and not inode.snap_ctime)
        doubtful = [
            vid
            for vid, inode in self.inodes.items()
            if not inode.snap_ctime
            and (
                (inode.parent_vdi_id and inode.parent_vdi_id not in self.inodes)
                or (inode.name and working[inode.name] > 1)
            )
        ]
        for vid in doubtful:
            del self.inodes[vid]

    def forget_outdated(self, past: Past, member_of: Mapping[NodeId, int]) -> None:
        """Nodes that are away may have frozen, renamed or deleted what an old inode shows as a volume to be used."""
        outdated = []
        for vid, inode in self.inodes.items():
            holders = [member_of[node] for node in self._holders[vid] if node in member_of]
            if past.superseded(inode_oid(Vid(vid)), self._ranks[vid][0], copies=inode.nr_copies, holders=holders):
                outdated.append(vid)
        for vid in outdated:
            del self.inodes[vid]


class TableLoad:
    """Of one node."""

    def __init__(
        self, context: Context, gateway: Gateway, everyone: Everyone, left_dirty: LeftDirty, copies: Copies
    ) -> None:
        self._context = context
        self._gateway = gateway
        self._everyone = everyone
        self._left_dirty = left_dirty
        self._copies = copies

    def load(self, _: Values) -> Script[Values]:
        """The operation `load`. Of each inode the copy counts that is current, as peering decides."""
        epoch = self._context.epoch
        answers: dict[NodeId, Buffer] = yield self._ask_inodes()
        found, state = _Found(answers), self._context.state
        if state.loaded:
            yield from self._forget_removed(found)
        partial = self._partial(found)
        if partial:
            found.forget_doubtful()
            found.forget_outdated(self._copies.at_home().past, self._context.placement.index_of)
        table, unfinished = found.table(state.vdis.claim_number)
        changes: Values = {"table": table.to_json(), "partial": partial, "collected": epoch}
        if state.loaded and self._note_former_copies(table, state):
            changes["table"], changes["epoch"] = table.to_json(), self._context.clock.wall_ns() // 1_000_000_000
        self._context.log(6, f"{len(table)} vdis found on {len(answers)} nodes")
        burials = [] if partial else [{"op": "bury", "owner": "", "number": vid, "vid": vid} for vid in unfinished]
        return {"result": int(Result.SUCCESS), "changes": changes, "next": burials}

    def _partial(self, found: _Found) -> int:
        """The epoch of the start, if there may be more than was found; else 0."""
        state = self._context.state
        complete = [found.complete.get(node, 0) for node in self._context.placement.nodes]
        copies = [inode.nr_copies for inode in found.inodes.values() if inode.nr_copies]
        past = self._copies.at_home().past
        for node, epoch in found.forgotten.items():
            past.forgot(node, epoch)
        lost = [vid for vid, known in found.lacking.items() if vid not in found.inodes]
        if past.knows_all(complete, min([state.fewest_copies(), *copies])) and all(
            past.is_deleted(inode_oid(Vid(vid)), found.lacking[vid], complete) for vid in lost
        ):
            return 0
        self._context.probe("table.partial")
        self._context.log(4, "nodes that are away may hold volumes of which nobody here knows: waiting for them")
        return state.partial or state.epoch

    def _forget_removed(self, found: _Found) -> Script[None]:
        """While the cluster runs, peering knows which of the inodes that were found exist no more (`format -R`)."""
        news = [vid for vid in sorted(found.inodes) if self._context.state.vdis.get(Vid(vid)) is None]
        results = yield gather([self._read(inode_oid(Vid(vid))) for vid in news], RECLAIM_PARALLEL)
        for vid, (result, _) in zip(news, results, strict=True):
            if result == Result.NO_OBJ:
                del found.inodes[vid]

    def _note_former_copies(self, table: VdiTable, state: ClusterState) -> bool:
        """True if objects of VDIs that were not known have to be placed anew: until now they were kept as any other."""
        misplaced = False
        for record in table.records():
            if state.vdis.get(record.vid) is None and (record.policy or record.copies not in (0, state.copies)):
                record.former_copies = [[state.partial, record.copies], [state.epoch + 1, state.copies]]
                misplaced = True
        return misplaced

    def _ask_inodes(self) -> Step:
        return lambda done: self._everyone.ask(
            Kind.QUERY, NO_OID, b'"inodes"', self.inodes_here, lambda _, answers: done(answers)
        )

    def inodes_here(self, answered: Callable[[int, Buffer], None]) -> None:
        """JSON of this node's [[vid, as_of, version, hex of the inode's header]...], [[vid, attribute id]...], its
        cache's identity, the [vid...] that it may have unpushed data of, and [the epoch up to which this is complete,
        the one up to which nothing is remembered, [[vid, epoch in which it existed]...] of inodes that are bad here].
        """
        here = [(oid, version) for oid, version in self._context.store.inventory() if version != NO_VERSION]
        copies = [(oid, version) for oid, version in here if is_inode(oid)]
        lacking = [(vid_of(oid), epoch) for oid, epoch in self._copies.lacking() if is_inode(oid)]
        attributes = [(vid_of(oid), oid & 0xFFFFFFFF) for oid, _ in here if is_attribute(oid)]

        def collect(parts: list[Any]) -> None:
            found = []
            for (oid, version), data in zip(copies, parts, strict=True):
                header = None if isinstance(data, StoreError) else self._header(oid, data)
                if header is not None:
                    as_of = self._copies.as_of(oid, version)
                    found.append([vid_of(oid), as_of, list(version), header.pack().hex()])
            told = [found, attributes]
            self._left_dirty(
                lambda cache, vids: answered(
                    Result.SUCCESS,
                    json.dumps([*told, cache, vids, [self._copies.complete, self._copies.forgotten, lacking]]).encode(),
                )
            )

        gather([self._read_header(oid) for oid, _ in copies], RECLAIM_PARALLEL)(collect)

    def _read(self, oid: ObjectId) -> Step:
        """Of the current copy, wherever it is."""
        return lambda done: self._gateway.raw_read(oid, 0, HEADER_SIZE, done)

    def _read_header(self, oid: ObjectId) -> Step:
        """Of the copy here."""
        return lambda done: self._context.store.read(oid, 0, HEADER_SIZE, done)

    def _header(self, oid: ObjectId, data: Buffer) -> InodeHeader | None:
        try:
            header = InodeHeader.unpack(data)
        except PeerError as error:
            self._context.log(3, f"object {oid:016x} is no inode: {error}")
            return None
        header.vdi_id = vid_of(oid)
        return header
