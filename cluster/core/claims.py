"""Which gateway caches which volume: one at a time, agreed on in the order of all events.

 take     from then on every other gateway asks the owner to let go before it touches the volume's data. The claim holds
          once all nodes know of it and what they had under way for the volume has ended
 dirty    the owner may have acknowledged writes that only its cache has: the claim outlives its process
 release  the owner has pushed everything
 evict    the owner is gone and was not dirty: its cached bytes are void from then on
 lost     the owner is back without its cache; found: with it
 purge    the administrator gives up what was not pushed

While the owner of a dirty claim is away (or has lost its cache) nobody serves the volume: that would be old data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.ids import ObjectId, Vid, inode_oid, is_data, is_inode, vid_of
from sheepdog.cluster.core.messages import Buffer, Kind
from sheepdog.cluster.core.state import node_from_key, node_key
from sheepdog.cluster.core.vdi import Claim

IoDone: TypeAlias = Callable[[int, Buffer], None]
ResultDone: TypeAlias = Callable[[int], None]
LetGo: TypeAlias = Callable[[Vid, ResultDone], None]
Drain: TypeAlias = Callable[[Vid, Callable[[], None]], None]


class Claims:
    """Of one node. `identity` names the contents of this node's cache; empty without one."""

    def __init__(self, context: Context, everyone: Everyone, drain: Drain, identity: str) -> None:
        self.identity = identity
        self.let_go: LetGo = lambda vid, done: done(Result.SUCCESS)  # set by the cache: pushes and releases
        self._context = context
        self._everyone = everyone
        self._drain = drain
        self.me = node_key(context.me)
        self._held: dict[Vid, list[tuple[Callable[[], None], IoDone]]] = {}  # requests that wait for another's cache
        self._watching: list[tuple[Vid, int, IoDone]] = []

    def mine(self, vid: Vid) -> Claim | None:
        """This node's claim, backed by the cache that it has now."""
        claim = self._context.state.vdis.claims.get(vid)
        return claim if claim is not None and self._is_mine(claim) else None

    def _is_mine(self, claim: Claim) -> bool:
        return bool(self.identity) and (claim.owner, claim.cache) == (self.me, self.identity)

    def lost(self, vid: Vid) -> bool:
        """This node owns the volume's claim, but not the cache that it is about."""
        claim = self._context.state.vdis.claims.get(vid)
        return claim is not None and claim.owner == self.me and claim.dirty and not self._is_mine(claim)

    def settle(self) -> None:
        """At a start: all nodes are told which claims of this node have lost their cache, or have it again."""
        for vid, claim in list(self._context.state.vdis.claims.items()):
            if claim.owner == self.me:
                gone = "lost" if claim.dirty else "release"
                what = ("found" if claim.lost else "") if self._is_mine(claim) else gone
                if what:
                    self._propose(vid, what, lambda _: None)

    def unreachable(self, vid: Vid) -> bool:
        """Acknowledged data of this volume is in a cache that is away: whatever needs all of it is refused."""
        claim = self._context.state.vdis.claims.get(vid)
        return claim is not None and claim.dirty and not self._is_mine(claim) and not self._present(claim)

    def _present(self, claim: Claim) -> bool:
        away = (
            claim.owner == self.me or claim.lost or node_from_key(claim.owner) not in self._context.placement.index_of
        )
        return not away

    # -- the owner ---------------------------------------------------------------------------------------------------

    def take(self, vid: Vid, dirty: bool, done: ResultDone) -> None:
        """SUCCESS: until it lets go, no other gateway touches the volume's data, and none has anything under way."""

        self._propose(vid, "take", lambda answer: self._until_known(vid, answer, done), dirty=dirty)

    def set_dirty(self, vid: Vid, dirty: bool, done: ResultDone) -> None:
        self._propose(vid, "dirty", lambda answer: done(_result(answer)), dirty=dirty)

    def release(self, vid: Vid, done: ResultDone) -> None:
        self._propose(vid, "release", lambda answer: done(_result(answer)))

    def purge(self, vid: Vid, done: ResultDone) -> None:
        """What was not pushed is given up, wherever it is."""
        self._propose(vid, "purge", lambda answer: self._until_known(vid, answer, done))

    def _until_known(self, vid: Vid, answer: Any, done: ResultDone) -> None:
        """An ordered event may reach the others after this node; each answers when it has nothing under way either."""
        result, number = answer if isinstance(answer, tuple) else (answer, 0)
        if result:
            done(result)
            return
        self._everyone.ask(
            Kind.QUERY,
            inode_oid(vid),
            json.dumps(["claimed", vid, number]).encode(),
            lambda answered: self._watch(vid, number, answered),
            lambda asked, _: done(asked),
        )

    def _propose(self, vid: Vid, what: str, done: Callable[[Any], None], dirty: bool = False) -> None:
        command = {"t": "cache", "vid": vid, "do": what, "cache": self.identity, "dirty": dirty}
        self._context.machine.propose(command, done)

    # -- everybody else ----------------------------------------------------------------------------------------------

    def held(self, oid: ObjectId, changes: bool, again: Callable[[], None], done: IoDone) -> bool:
        """True if the request waits for another gateway's cache, or was refused because that is away.

        Only data is cached; who changes the map may free objects, so that counts too.
        """
        claim = self._context.state.vdis.claims.get(vid_of(oid))
        if claim is None or self._is_mine(claim) or not (is_data(oid) or (changes and is_inode(oid))):
            return False
        self.revoke(vid_of(oid), again, done)
        return True

    def revoke(self, vid: Vid, again: Callable[[], None], done: IoDone) -> None:
        """`again` once nobody else caches the volume; `done` with an error if that cannot be had."""
        if self.unreachable(vid):
            self._say_unreachable(vid)
            done(Result.VDI_LOCKED, b"")
            return
        waiting = self._held.get(vid)
        if waiting is not None:
            waiting.append((again, done))
            return
        self._held[vid] = [(again, done)]
        claim = self._context.state.vdis.claims.get(vid)
        if claim is None:
            self._revoked(vid, Result.SUCCESS)
        elif not self._present(claim):
            self._propose(vid, "evict", lambda answer: self._revoked(vid, _result(answer)))
        else:
            self._context.probe("claims.revoke")
            self._everyone.ask(
                Kind.QUERY,
                inode_oid(vid),
                json.dumps(["uncache", vid]).encode(),
                lambda answered: answered(Result.SUCCESS, b""),
                lambda result, _: self._revoked(vid, result),
            )

    def _revoked(self, vid: Vid, result: int) -> None:
        for again, done in self._held.pop(vid, []):
            if result:
                done(result, b"")
            else:
                again()  # looks at the claim again: the event may not have reached this node yet

    def _say_unreachable(self, vid: Vid) -> None:
        claim = self._context.state.vdis.claims[vid]
        record = self._context.state.vdis.get(vid)
        name = record.name.decode("utf-8", "replace") if record is not None else f"{vid:x}"
        self._context.log(
            3,
            f"volume {name}: acknowledged writes are in the object cache of {node_from_key(claim.owner)}, which is "
            f"away or has lost it; start it again, or give them up with: dog vdi cache purge {name}",
        )

    def asked(self, question: object, answered: IoDone) -> bool:
        """A peer's question; False if it is none of ours."""
        match question:
            case ["claimed", int(vid), int(number)]:
                self._watch(Vid(vid), number, answered)
            case ["uncache", int(vid)]:
                if self.lost(Vid(vid)):
                    answered(Result.VDI_LOCKED, b"")
                elif self.mine(Vid(vid)) is None:
                    answered(Result.SUCCESS, b"")
                else:
                    self.let_go(Vid(vid), lambda result: answered(result, b""))
            case _:
                return False
        return True

    def _watch(self, vid: Vid, number: int, answered: IoDone) -> None:
        self._watching.append((vid, number, answered))
        self.changed()

    def changed(self) -> None:
        """The claims are others: some questions may have their answer."""
        watching, self._watching = self._watching, []
        for vid, number, answered in watching:
            if self._context.state.vdis.claim_number >= number:
                self._drain(vid, partial(answered, Result.SUCCESS, b""))
            else:
                self._watching.append((vid, number, answered))


def _result(answer: Any) -> int:
    return int(answer[0] if isinstance(answer, tuple) else answer)
