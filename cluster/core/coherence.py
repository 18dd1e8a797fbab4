"""Volumes that several gateways have open at a time: shared locks (protocol.md 8.6, iSCSI multipath).

Each participant's client keeps a map of its own. Before a client is told that its map write is done, every other
participant's gateway knows that its client's map is old, and answers that client's requests INODE_INVALIDATED until it
has read the inode again. Only in clusters that enforce locks; nobody else ever sees that answer.

 modified     its client may hold the newest map; at most one
 shared       its client's map is up to date
 invalidated  another gateway changed the map, or the client has not read it yet

Two rules close the gaps between what is ordered and what a node has heard of. Who writes the map while invalidated
stays so: of two that write at a time neither client has the other's entry. And a client reads the map only after
all members know that it does: what a writer who had not heard of it then has written by now, it reads.
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
from sheepdog.cluster.core.script import Script, run
from sheepdog.cluster.core.state import node_key
from sheepdog.cluster.core.vdi import LockState, Sharing, VdiRecord


class Coherence:
    """Of one node."""

    def __init__(self, context: Context, everyone: Everyone, operations: Operations) -> None:
        self._context = context
        self._operations = operations
        self._everyone = everyone
        self._me = node_key(context.me)
        self._known: dict[Vid, int] = {}  # shared volume -> round of this node's that all members have heard of
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
        run(self._tell(current, writes=False), lambda result: done(Result(result), current))

    def claim(self, vid: Vid) -> Script[int]:
        """Before and after a map write: nobody else holds the newest map; all of them know that theirs is old."""
        record = self._shared(vid)
        if record is None or (record.others_invalidated(self._me) and self._known.get(record.vid) == record.rounds):
            return int(Result.SUCCESS)
        return (yield from self._tell(record.vid, writes=True))

    def _tell(self, vid: Vid, writes: bool) -> Script[int]:
        """Orders the event, and waits until all members have heard of it: it may reach them later than this node."""
        command = {"t": "coherence", "vid": vid, "write": writes}
        result, round_number = yield lambda done: self._context.machine.propose(command, done)
        if result:
            return int(result)
        question = json.dumps(["coherent", vid, round_number]).encode()
        result = yield lambda done: self._everyone.ask(
            Kind.QUERY,
            inode_oid(vid),
            question,
            lambda answered: answered(Result.SUCCESS, b""),
            lambda result, _: done(result),
        )
        if not result and writes:
            self._known[vid] = round_number
        return int(result)

    def asked(self, question: object, answered: Callable[[int, Buffer], None]) -> None:
        """A peer's question of `_tell`; answered once this node has applied that event."""
        match question:
            case ["coherent", int(vid), int(round_number)]:
                self._watching.append((Vid(vid), round_number, answered))
                self.changed()
            case _:
                raise PeerError("unknown query")

    def changed(self) -> None:
        """The table of VDIs is another: some questions may have their answer."""
        self._known = {vid: rounds for vid, rounds in self._known.items() if self._shared(vid)}
        watching, self._watching = self._watching, []
        for vid, round_number, answered in watching:
            record = self._context.state.vdis.get(vid)
            if record is None or record.lock != LockState.SHARED or record.rounds >= round_number:
                answered(Result.SUCCESS, b"")
            else:
                self._watching.append((vid, round_number, answered))
