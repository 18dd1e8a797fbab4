"""Repair by order: `dog vdi check` found a copy here that differs from the others."""

from __future__ import annotations

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.home_writes import IoDone
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import MAX_RETRIES, RETRY_DELAY_NS
from sheepdog.cluster.core.messages import Flag, Kind, Message
from sheepdog.cluster.core.replica import Replica


def repair(context: Context, home: Home | None, replica: Replica, oid: ObjectId, done: IoDone) -> None:
    """Makes this node's copy anew from the others'; NO_OBJ if none belongs here. Done when it is current."""
    replicas = context.placement.replicas(oid)
    me = context.placement.me
    if home is None or me not in replicas:
        done(Result.NO_OBJ, b"")
        return
    if context.policy_of(oid) is not None:
        _repair_strip(context, oid, home, replicas[0], done)
        return
    if replicas[0] == me:
        _repair_at_home(context, replica, oid, home, done)
        return
    replica.missing[oid] = None
    fence, tries = context.fence, 0

    def look() -> None:
        nonlocal tries
        tries += 1
        if oid not in replica.missing or context.fence != fence:
            done(Result.SUCCESS, b"")
        elif tries > MAX_RETRIES:
            done(Result.AGAIN, b"")
        else:
            context.clock.after(RETRY_DELAY_NS, look)

    def answered(answer: Message) -> None:
        if answer.result:  # the home has none either
            replica.missing.pop(oid, None)
            done(answer.result, b"")
        else:
            look()

    message = Message(Kind.READ, context.fence, 0, oid, 0, 1, Flag.REPAIR)
    context.peers.request(context.placement.nodes[replicas[0]], message, answered)


def _repair_at_home(context: Context, replica: Replica, oid: ObjectId, home: Home, done: IoDone) -> None:
    if not home.active:
        home.hold(lambda: repair(context, home, replica, oid, done))
    elif home.is_lost(oid) or not home.exists(oid, None):
        done(home.absent(oid), b"")
    else:
        home.recovery.suspect(oid, home.me)
        home.recovery.when_restored(oid, lambda result: done(result, b""))


def _repair_strip(context: Context, oid: ObjectId, home: Home, first: int, done: IoDone) -> None:
    """Makes this node's strip anew from the others."""
    if first == context.placement.me:
        home.requests.repair_strip(oid, first, done)
        return
    message = Message(Kind.READ, context.fence, 0, oid, 0, 0, Flag.REPAIR)
    context.peers.request(context.placement.nodes[first], message, lambda answer: done(answer.result, b""))
