"""Volumes that several gateways have open at a time: shared locks (protocol.md 8.6, iSCSI multipath).

Each participant's client keeps a map of its own. Before a client is told that its map write is done, every other
participant's gateway knows that its client's map is old, and answers that client's requests INODE_INVALIDATED until it
has read the inode again. Only in clusters that enforce locks; nobody else ever sees that answer.

 modified     its client may hold the newest map; at most one
 shared       its client's map is up to date
 invalidated  another gateway changed the map
"""

from __future__ import annotations

import json
from collections.abc import Callable

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.core.messages import Buffer, Kind
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.script import Script, Step
from sheepdog.cluster.core.state import node_key
from sheepdog.cluster.core.vdi import LockState, Sharing, VdiRecord


class Coherence:
    """Of one node."""

    def __init__(self, context: Context, everyone: Everyone, operations: Operations) -> None:
        self._context = context
        self._operations = operations
        self._everyone = everyone
        self._me = node_key(context.me)
        self._watching: list[tuple[Vid, int, Callable[[int, Buffer], None]]] = []

    def _shared(self, vid: Vid, follows: bool = False) -> VdiRecord | None:
        """The shared volume that a client means by a vid: it says the frozen one as long as it has not noticed a
        snapshot, unless that is what it has opened. `follows`: it says of itself that it has not."""
        vdis = self._context.state.vdis
        record = vdis.get(vid)
        if record is not None and record.is_snapshot and (follows or vid not in self._operations.opened_snapshots):
            record = vdis.heir(vid)
        return record if record is not None and record.lock == LockState.SHARED else None

    def is_shared(self, vid: Vid) -> bool:
        """Several clients may have this volume open, each with a map of its own."""
        return self._shared(vid) is not None

    def is_invalidated(self, vid: Vid, follows: bool = False) -> bool:
        """The client of this gateway must read the inode again before anything else."""
        record = self._shared(vid, follows)
        return record is not None and record.sharing_of(self._me) == Sharing.INVALIDATED

    def refresh(self, vid: Vid, done: Callable[[Result, Vid], None]) -> None:
        """The client is about to read the inode: a map write from now on invalidates it again. Tells whose it gets."""
        record = self._shared(vid)
        current = vid if record is None else record.vid
        command = {"t": "coherence", "vid": current, "write": False}
        self._context.machine.propose(command, lambda answer: done(answer[0], current))

    def claim(self, vid: Vid) -> Script[int]:
        """Before and after a map write: nobody else holds the newest map; all of them know that theirs is old."""
        record = self._shared(vid)
        while record is not None and not record.is_modified_by(self._me):
            result, round_number = yield self._invalidate_others(record.vid)
            if result:
                return int(result)
            yield self._until_applied(record.vid, round_number)
            record = self._shared(vid)
        return int(Result.SUCCESS)

    def _invalidate_others(self, vid: Vid) -> Step:
        command = {"t": "coherence", "vid": vid, "write": True}
        return lambda done: self._context.machine.propose(command, done)

    def _until_applied(self, vid: Vid, round_number: int) -> Step:
        """An ordered event may reach the others after it has reached this node."""
        question = json.dumps(["coherent", vid, round_number]).encode()
        return lambda done: self._everyone.ask(
            Kind.QUERY,
            inode_oid(vid),
            question,
            lambda answered: answered(Result.SUCCESS, b""),
            lambda result, _: done(result),
        )

    def asked(self, question: object, answered: Callable[[int, Buffer], None]) -> None:
        """A peer's question of `claim`; answered once this node has applied that event."""
        match question:
            case ["coherent", int(vid), int(round_number)]:
                self._watching.append((Vid(vid), round_number, answered))
                self.changed()
            case _:
                raise PeerError("unknown query")

    def changed(self) -> None:
        """The table of VDIs is another: some questions may have their answer."""
        watching, self._watching = self._watching, []
        for vid, round_number, answered in watching:
            record = self._context.state.vdis.get(vid)
            if record is None or record.lock != LockState.SHARED or record.rounds >= round_number:
                answered(Result.SUCCESS, b"")
            else:
                self._watching.append((vid, round_number, answered))
