"""One-step changes of the replicated state: pure functions of (state, sender, command), equal on every node.

vdis       what an operation changes                         put: [record...], attributes: [vid, ids], move_lock,
                                                             table, partial, collected (in which epoch; `_commit`),
                                                             swept, attributes_gone: [vid], forgotten: [vid],
                                                             doubtful, mended: [[frozen vid, new vid]]
header     a client wrote the header of an inode             vid, tag, size, vm_state_size
add        register a vid (NOTIFY_VDI_ADD)                   vid, copies, policy, shift, use
inode      a client made the inode of a registered vid       record
lock       lookup and lock (LOCK_VDI)                        name, tag, snap_id, shared
release    unlock (RELEASE_VDI)                              vid, shared
coherence  a sharer's client writes the map, or reads it     vid, write
cache      who caches a volume (core.claims)                  vid, do, cache, dirty
find       lookup in the order of all events (GET_VDI_INFO)  name, tag, snap_id
recovery   automatic recovery on or off                      enabled
shutdown   all nodes stop
kill       one node stops                                    node
reweight   every storing node publishes its space anew       (each does so with `weigh`, see membership)
epoch      a new epoch without a change of members           time, copies (the cluster's default from now on; optional)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status, node_key
from sheepdog.cluster.core.vdi import Claim, LockState, Sharing, VdiRecord, VdiTable

Command = dict[str, Any]
MAX_PARTICIPANTS = 31  # protocol.md 8.5
MAX_FORMER_COPIES = 8  # changes of redundancy remembered of one VDI: more than happen while some node is away


def apply_command(state: ClusterState, sender: str, command: Command) -> Any:
    """Applies one command; returns what its proposer is told (AGAIN: the VDI table is not here yet)."""
    if command["t"] in _NEED_TABLE and state.status == Status.RUNNING and not state.loaded:
        return Result.AGAIN
    return _HANDLERS[command["t"]](state, sender, command)


def misplaced(state: ClusterState, changes: Command) -> int:
    """The time of a new epoch if one is needed to bring a new inode where it belongs; else 0.

    It is when the epoch changed since the making began: the table did not know the VDI then, and the inode was kept
    with as many copies as the table said, or the cluster's default.
    """
    vid, epoch, time_s = changes.get("made", (0, state.epoch, 0))
    if state.epoch == epoch:
        return 0
    old = state.vdis.get(Vid(vid))
    kept = old.copies if old is not None and old.copies else state.copies
    made = next(values for values in changes["put"] if values["vid"] == vid)
    if not made["copies"] or made["copies"] == kept:
        return 0
    made["former_copies"] = [[state.epoch + 1, kept]]
    return int(time_s)


def _vdis(state: ClusterState, _: str, command: Command) -> Result:
    if "table" in command:
        found = VdiTable.from_json(command["table"])
        if state.loaded:
            state.vdis.merge(found, whole=not command.get("partial"))
        else:
            state.vdis, state.loaded = found, True
        state.partial = command.get("partial", 0)
        for one in state.vdis.records():
            state.note_copies(one.copies)
    for values in command.get("put", ()):
        record = VdiRecord.from_json(values)
        state.note_copies(record.copies)
        old = state.vdis.get(record.vid)
        if old is not None:
            record.take_lock(old)
            if old.copies != record.copies:  # an epoch begins with it (membership)
                record.former_copies = [*old.former_copies, [state.epoch + 1, old.copies]][-MAX_FORMER_COPIES:]
            if record.deleted:
                record.take_lock(VdiRecord(record.vid, b""))
        state.vdis.put(record)
    if "attributes" in command:
        vid, ids = command["attributes"]
        state.vdis.attributes[Vid(vid)] = ids
        if not ids:
            del state.vdis.attributes[Vid(vid)]
    for vid in command.get("attributes_gone", ()):
        state.vdis.attributes.pop(Vid(vid), None)
    for vid in command.get("forgotten", ()):
        state.vdis.forget(Vid(vid))
    if "doubtful" in command:
        state.doubtful = [*state.doubtful, *command["doubtful"]]
        state.sweeps += 1
    state.doubtful = [pair for pair in state.doubtful if pair not in command.get("mended", ())]
    state.swept = max(state.swept, command.get("swept", 0))
    if "move_lock" in command:
        _move_lock(state, *command["move_lock"])
    return Result.SUCCESS


def _move_lock(state: ClusterState, source: int, target: int) -> None:
    """After a snapshot the client goes on with the new working vid without locking it (protocol.md 8.5)."""
    old, new = state.vdis.get(Vid(source)), state.vdis.get(Vid(target))
    if old is not None and new is not None:
        new.take_lock(old)
        new.sharing = [Sharing.INVALIDATED for _ in new.sharing]  # each of them has to learn the new vid
        old.take_lock(VdiRecord(old.vid, b""))


def _header(state: ClusterState, _: str, command: Command) -> Result:
    record = state.vdis.get(Vid(command["vid"]))
    if record is not None and not record.deleted:
        if not record.is_snapshot:  # else it got its own when it was frozen, which was after this was written
            record.tag = command["tag"].encode("latin-1")
        record.size = command["size"]
        record.vm_state_size = command["vm_state_size"]
    return Result.SUCCESS


def _add(state: ClusterState, _: str, command: Command) -> Result:
    vid = Vid(command["vid"])
    if state.partial:
        return Result.WAIT_FOR_JOIN
    state.note_copies(command["copies"])
    if state.vdis.get(vid) is None:
        state.vdis.put(
            VdiRecord(
                vid,
                b"",
                copies=command["copies"],
                policy=command["policy"],
                shift=command["shift"],
            )
        )
    if command["use"]:
        state.vdis.mark(vid, False)
    return Result.SUCCESS


def _inode(state: ClusterState, _: str, command: Command) -> Result:
    """A client made the inode of a registered vid: a snapshot, a tombstone, or a working VDI of a free name."""
    made = VdiRecord.from_json(command["record"])
    record = state.vdis.get(made.vid)
    if record is None or not record.may_become(made):
        return Result.INVALID_PARMS
    if not made.deleted and not made.is_snapshot:
        working = state.vdis.working(made.name)
        if working is not None and working.vid != made.vid:
            return Result.VDI_EXIST
    state.vdis.put(made)
    return Result.SUCCESS


def _find(state: ClusterState, _: str, command: Command) -> VdiRecord | Result:
    found = state.vdis.lookup(command["name"].encode("latin-1"), command["tag"].encode("latin-1"), command["snap_id"])
    return state.unknown(found) if isinstance(found, Result) else found


def _lock(state: ClusterState, sender: str, command: Command) -> tuple[Result, VdiRecord | None]:
    record = _find(state, sender, command)
    if isinstance(record, Result):
        return record, None
    # A snapshot cannot be changed, so nobody needs it alone (protocol.md 8.5).
    if not state.flags & ClusterFlag.LOCKS or record.is_snapshot:
        return Result.SUCCESS, record
    if command["shared"]:
        if record.lock == LockState.LOCKED:
            return Result.VDI_LOCKED, record
        if sender not in record.owners and len(record.owners) >= MAX_PARTICIPANTS:
            return Result.VDI_LOCKED, record
        record.share(sender)
        return Result.SUCCESS, record
    if record.lock != LockState.UNLOCKED:
        return Result.VDI_LOCKED, record
    record.lock, record.owners = LockState.LOCKED, [sender]
    return Result.SUCCESS, record


def _release(state: ClusterState, sender: str, command: Command) -> Result:
    record = state.vdis.get(Vid(command["vid"]))
    if record is not None and record.is_snapshot:
        record = state.vdis.heir(record.vid)  # the client has not noticed that a snapshot has moved its lock
    if record is None:
        return Result.SUCCESS
    if command["shared"]:
        if record.lock == LockState.SHARED and sender in record.owners:
            record.unshare(sender)
    elif record.lock == LockState.LOCKED:
        record.lock, record.owners = LockState.UNLOCKED, []
    return Result.SUCCESS


def _coherence(state: ClusterState, sender: str, command: Command) -> tuple[Result, int]:
    """protocol.md 8.6: the sender's client changes the map, or reads it as a whole."""
    record = state.vdis.get(Vid(command["vid"]))
    if record is None or record.lock != LockState.SHARED:
        return Result.SUCCESS, 0
    for position, (owner, sharing) in enumerate(zip(record.owners, record.sharing, strict=True)):
        if not command["write"]:
            if owner == sender or sharing == Sharing.MODIFIED:
                record.sharing[position] = Sharing.SHARED
        elif owner != sender:
            record.sharing[position] = Sharing.INVALIDATED
        elif sharing != Sharing.INVALIDATED:  # else its client's map lacks what somebody else writes just now
            record.sharing[position] = Sharing.MODIFIED
    record.rounds += 1
    return Result.SUCCESS, record.rounds


def _cache(state: ClusterState, sender: str, command: Command) -> Any:
    """core.claims: what each of these means."""
    vid, vdis = Vid(command["vid"]), state.vdis
    claim = vdis.claims.get(vid)
    mine = claim is not None and (claim.owner, claim.cache) == (sender, command["cache"])
    match command["do"]:
        case "take":
            return _claim(state, sender, command)
        case "dirty" if claim is not None and mine:
            claim.dirty = command["dirty"]
        case "release" if claim is not None and (mine or (claim.owner == sender and not claim.dirty)):
            del vdis.claims[vid]
        case "lost" | "found" if claim is not None and claim.owner == sender:
            claim.lost = command["do"] == "lost"
        case "evict" if claim is not None:
            here = [node_key(member.id) for member in state.members]
            if claim.dirty or (claim.owner in here and claim.owner != sender):
                return Result.VDI_LOCKED
            del vdis.claims[vid]
        case "purge":
            vdis.claims.pop(vid, None)
            vdis.claim_number += 1
            return Result.SUCCESS, vdis.claim_number
        case "dirty":
            return Result.VDI_LOCKED
    return Result.SUCCESS


def _claim(state: ClusterState, sender: str, command: Command) -> tuple[Result, int]:
    """Of a volume that nobody else caches, shares, or has locked elsewhere."""
    vid, vdis = Vid(command["vid"]), state.vdis
    record, claim = vdis.get(vid), vdis.claims.get(vid)
    if record is None or record.deleted or record.is_snapshot:
        return Result.NO_VDI, 0
    if record.lock == LockState.SHARED or (record.lock == LockState.LOCKED and sender not in record.owners):
        return Result.VDI_LOCKED, 0
    if claim is not None and (claim.owner, claim.cache) != (sender, command["cache"]):
        return Result.VDI_LOCKED, 0
    dirty = command["dirty"] or (claim is not None and claim.dirty)
    vdis.claims[vid] = Claim(sender, command["cache"], dirty)
    vdis.claim_number += 1
    return Result.SUCCESS, vdis.claim_number


def _recovery(state: ClusterState, _: str, command: Command) -> Result:
    state.disable_recovery = not command["enabled"]
    return Result.SUCCESS


def _shutdown(state: ClusterState, _: str, __: Command) -> Result:
    state.status = Status.SHUTDOWN
    return Result.SUCCESS


def _epoch(state: ClusterState, _: str, command: Command) -> Result:
    state.copies = command.get("copies", state.copies)
    state.policy = command.get("policy", state.policy)
    return Result.SUCCESS


def _nothing(_: ClusterState, __: str, ___: Command) -> Result:
    return Result.SUCCESS


_NEED_TABLE = ("find", "lock", "release", "add", "cache")
_HANDLERS: dict[str, Callable[[ClusterState, str, Command], Any]] = {
    "vdis": _vdis,
    "header": _header,
    "add": _add,
    "find": _find,
    "inode": _inode,
    "lock": _lock,
    "release": _release,
    "coherence": _coherence,
    "cache": _cache,
    "recovery": _recovery,
    "shutdown": _shutdown,
    "kill": _nothing,
    "reweight": _nothing,
    "epoch": _epoch,
}
