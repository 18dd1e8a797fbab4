"""The table of all VDIs after a cold start, collected from the inode objects of all members."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import PeerError, Result, StoreError
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VERSION,
    ObjectId,
    Vid,
    is_attribute,
    is_inode,
    vid_of,
)
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader
from sheepdog.cluster.core.limits import RECLAIM_PARALLEL
from sheepdog.cluster.core.messages import Buffer, Kind
from sheepdog.cluster.core.script import Script, Step, gather
from sheepdog.cluster.core.state import node_key
from sheepdog.cluster.core.vdi import Claim, VdiTable

Values = dict[str, Any]
LeftDirty = Callable[[Callable[[str, list[Vid]], None]], None]
"""Tells the identity of this node's cache, and the volumes that it may have unpushed data of."""


class TableLoad:
    """Of one node."""

    def __init__(self, context: Context, everyone: Everyone, left_dirty: LeftDirty) -> None:
        self._context = context
        self._everyone = everyone
        self._left_dirty = left_dirty
        self._settled = 0

    def load(self, _: Values) -> Script[Values]:
        """The VDI table after a cold start: of each inode the copy that is current, as peering decides."""
        answers: dict[Any, Buffer] = yield self._ask_inodes()
        best: dict[int, tuple[tuple[Any, ...], InodeHeader]] = {}
        attributes: set[tuple[Vid, int]] = set()
        claims: dict[Vid, Claim] = {}
        for node in sorted(answers):
            inodes, places, cache, cached = json.loads(bytes(answers[node]))
            claims.update((Vid(vid), Claim(node_key(node), cache, True)) for vid in cached)
            attributes.update((Vid(vid), place) for vid, place in places)
            for vid, as_of, version, text in inodes:
                rank = (as_of, tuple(version))
                if vid not in best or rank > best[vid][0]:
                    best[vid] = (rank, InodeHeader.unpack(bytes.fromhex(text)))
        table, unfinished = VdiTable.of_inodes(header for _, (_, header) in sorted(best.items()))
        for vid, claim in sorted(claims.items()):
            record = table.get(vid)
            if record is not None and not record.deleted and not record.is_snapshot:
                table.claims[vid] = claim
        table.claim_number = self._context.state.vdis.claim_number
        for owner, place in sorted(attributes):
            table.attributes.setdefault(owner, []).append(place)
        self._context.log(6, f"{len(table)} vdis found on {len(answers)} nodes")
        burials = [{"op": "bury", "owner": "", "number": vid, "vid": vid} for vid in unfinished]
        return {"result": int(Result.SUCCESS), "changes": {"table": table.to_json()}, "next": burials}

    def _ask_inodes(self) -> Step:
        return lambda done: self._everyone.ask(
            Kind.QUERY, NO_OID, b'"inodes"', self.inodes_here, lambda _, answers: done(answers)
        )

    def inodes_here(self, answered: Callable[[int, Buffer], None]) -> None:
        """JSON of this node's [[vid, as_of, version, hex of the inode's header]...], [[vid, attribute id]...], its
        cache's identity and the [vid...] that it may have unpushed data of."""
        here = [(oid, version) for oid, version in self._context.store.inventory() if version != NO_VERSION]
        copies = [(oid, version) for oid, version in here if is_inode(oid)]
        attributes = [(vid_of(oid), oid & 0xFFFFFFFF) for oid, _ in here if is_attribute(oid)]

        def collect(parts: list[Any]) -> None:
            found = []
            for (oid, version), data in zip(copies, parts, strict=True):
                header = None if isinstance(data, StoreError) else self._header(oid, data)
                if header is not None:
                    as_of = max(self._settled, version.epoch)
                    found.append([vid_of(oid), as_of, list(version), header.pack().hex()])
            self._left_dirty(
                lambda cache, vids: answered(Result.SUCCESS, json.dumps([found, attributes, cache, vids]).encode())
            )

        gather([self._read_header(oid) for oid, _ in copies], RECLAIM_PARALLEL)(collect)

    def begin(self, settled: int) -> None:
        """The node starts; `settled` is the newest epoch in which all its copies were proven current."""
        self._settled = settled

    def _read_header(self, oid: ObjectId) -> Step:
        return lambda done: self._context.store.read(oid, 0, HEADER_SIZE, done)

    def _header(self, oid: ObjectId, data: Buffer) -> InodeHeader | None:
        try:
            header = InodeHeader.unpack(data)
        except PeerError as error:
            self._context.log(3, f"object {oid:016x} is no inode: {error}")
            return None
        header.vdi_id = vid_of(oid)
        return header
