"""This node's part of what is asked of every node (core.everyone): flush, freeze, and questions about what is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sheepdog.cluster.core.cache import Cache
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.gateway import FLUSH_CACHES, Gateway, OperationKey
from sheepdog.cluster.core.ids import NO_VID, NodeId, Vid, vid_of
from sheepdog.cluster.core.limits import MAX_ENDED_OPERATIONS
from sheepdog.cluster.core.messages import Buffer, Message
from sheepdog.cluster.core.vdi import VdiRecord, VdiTable

Answered = Callable[[int, Buffer], None]


def frozen_by(operation: dict[str, Any], vdis: VdiTable) -> Vid:
    """The volume whose writes an ordered operation holds until its end; NO_VID: of none, or of one that is not here."""
    kind, record = operation["op"], None
    if kind == "create" and operation["snapshot"]:
        record = vdis.working(operation["name"].encode("latin-1"))
    elif kind == "delete":
        name, tag = operation["name"].encode("latin-1"), operation["tag"].encode("latin-1")
        found = vdis.lookup(name, tag, operation["snap_id"])
        record = found if isinstance(found, VdiRecord) else None
    elif kind == "move":
        record = vdis.get(Vid(operation["vid"]))
    elif kind == "late":
        record = vdis.heir(Vid(operation["vid"]))
    return NO_VID if record is None else record.vid


class Part:
    """Of one node. `queries` answers the questions that have a name (set by the node)."""

    def __init__(
        self, context: Context, gateway: Gateway, claims: Claims, coherence: Coherence, cache: Cache | None
    ) -> None:
        self.queries: dict[str, Callable[[Answered], None]] = {}
        self._context = context
        self._gateway = gateway
        self._claims = claims
        self._coherence = coherence
        self._cache = None if cache is None else cache.volumes
        self._ended: dict[OperationKey, None] = {}  # the last operations: nobody freezes for them any more

    # -- from other nodes ------------------------------------------------------------------------------------------

    def on_flush(self, sender: NodeId, message: Message) -> None:
        flush = self._gateway.flush_here if message.body == FLUSH_CACHES else self._gateway.flush_store
        flush(vid_of(message.oid), self._answering(sender, message))

    def on_drain(self, sender: NodeId, message: Message) -> None:
        answer = self._answering(sender, message)
        owner, number = json.loads(bytes(message.payload()))
        if (owner, number) in self._ended:  # asked again over a new link, when it was all over
            answer(Result.SUCCESS, b"")
        else:
            self.freeze(vid_of(message.oid), (owner, number), answer)

    def on_query(self, sender: NodeId, message: Message) -> None:
        question = json.loads(bytes(message.payload()))
        answer = self._answering(sender, message)
        query = self.queries.get(question) if isinstance(question, str) else None
        if query is not None:
            query(answer)
        elif not self._claims.asked(question, answer):
            self._coherence.asked(question, answer)

    def _answering(self, sender: NodeId, message: Message) -> Answered:
        def answer(result: int, body: Buffer) -> None:
            self._context.peers.answer(sender, message, result, body)

        return answer

    # -- from this node's executor ---------------------------------------------------------------------------------

    def freeze(self, vid: Vid, by: OperationKey, answered: Answered) -> None:
        """This node's part of a freeze (gateway.freeze): its cache has nothing more of the volume than the cluster."""

        def pushed(result: int) -> None:
            if result or by in self._ended:  # it may have ended while the cache was pushing
                if self._cache is not None and by in self._ended:
                    self._cache.thaw(by)
                answered(result, b"")
            else:
                self._gateway.freeze(vid, by, lambda: answered(Result.SUCCESS, b""))

        if self._claims.lost(vid):
            pushed(Result.VDI_LOCKED)
        elif self._cache is None:
            pushed(Result.SUCCESS)
        else:
            self._cache.freeze(vid, by, pushed)

    def joined(self) -> None:
        """An operation that is under way when this node joins may have asked all members by then: what it froze is
        frozen here, too."""
        state = self._context.state
        if state.queue and state.loaded:
            operation = state.queue[0]
            vid = frozen_by(operation, state.vdis)
            if vid != NO_VID:
                self._context.probe("part.joined_frozen")
                self._gateway.freeze(vid, (str(operation["owner"]), int(operation["number"])), lambda: None)

    def ended(self, by: OperationKey) -> None:
        """The operation is over: what it froze here goes on."""
        self._ended = {**dict(list(self._ended.items())[1 - MAX_ENDED_OPERATIONS :]), by: None}
        if self._cache is not None:
            self._cache.thaw(by)
        self._gateway.thaw(by)

    def left_dirty(self, done: Callable[[str, list[Vid]], None]) -> None:
        """The volumes that this node's cache may have unpushed data of, and which contents of it that are."""
        if self._cache is None:
            done("", [])
        else:
            self._cache.left_dirty(lambda vids: done(self._claims.identity, vids))
