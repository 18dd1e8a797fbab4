"""Repair by order: `dog vdi check` or the scrub found a copy here that is not right."""

from __future__ import annotations

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.home_writes import IoDone
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId
from sheepdog.cluster.core.limits import MAX_RETRIES, RETRY_DELAY_NS
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.replica import Replica


def repair(context: Context, home: Home | None, replica: Replica, oid: ObjectId, done: IoDone) -> None:
    """Makes this node's copy or strip anew from the others'; NO_OBJ if none belongs here. Done when it is current.

    EIO: nobody has what is bad. AGAIN: the epoch has ended, or it takes too long.
    """
    replicas = context.placement.replicas(oid)
    me = context.placement.me
    if home is None or me not in replicas:
        done(Result.NO_OBJ, b"")
        return
    done = _bounded(context, done)
    coded = context.policy_of(oid) is not None
    if replicas[0] == me:
        (home.requests.repair_strip if coded else home.requests.repair_copy)(oid, me, done)
        return
    if not coded:
        replica.missing[oid] = None

    def answered(answer: Message) -> None:
        if not coded and context.store.version(oid) != NO_VERSION:
            replica.missing.pop(oid, None)  # it is right, or as right as it can be
        done(answer.result, b"")

    message = Message(Kind.READ, context.fence, oid=oid, flags=Flag.REPAIR)
    context.peers.request(context.placement.nodes[replicas[0]], message, answered)


def _bounded(context: Context, done: IoDone) -> IoDone:
    """`done`, once: with the epoch all answers end, and without one the asker would wait for ever."""
    fence, looks, waiting = context.fence, 0, True

    def ended(result: int, data: Buffer) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            done(result, data)

    def look() -> None:
        nonlocal looks
        looks += 1
        if context.fence != fence or looks > MAX_RETRIES:
            ended(Result.AGAIN, b"")
        elif waiting:
            context.clock.after(RETRY_DELAY_NS, look)

    look()
    return ended
