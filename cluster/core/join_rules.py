"""Who may join a cluster, and what a waiting cluster learns from those who do (cli.md 1.7 and 4, "Full restart")."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sheepdog.cluster.core.ids import EpochRecord, Member, NodeId
from sheepdog.cluster.core.limits import JOIN_HISTORY_EPOCHS
from sheepdog.cluster.core.messages import PEER_VERSION
from sheepdog.cluster.core.state import (
    ClusterFlag,
    ClusterState,
    Status,
    member_from_json,
    member_to_json,
    node_key,
    record_from_json,
    record_to_json,
)
from sheepdog.cluster.core.void_epochs import Join, are_void, makes_void, parting, parting_of

_NEWER = "it may hold what the others lack: shut them down and start all nodes together"
_STOP = "to change it, shut all down and start them with the same program"
_OTHER = "if nothing that was written there since is needed, start it with empty disks"


def join_command(state: ClusterState, me: Member, fixed: bool, log_since: int) -> dict[str, Any]:
    """What a node says of itself; `state` as its disks remember it, `log_since` see `ClusterMachine`."""
    return {
        "t": "join",
        "member": member_to_json(me),
        "fixed": fixed,
        "protocol": PEER_VERSION,
        "config": state.config().decode() if state.ctime else None,
        "epochs": [record_to_json(record) for record in state.epochs[-JOIN_HISTORY_EPOCHS:]],
        "since": log_since,
    }


def refusal(state: ClusterState, join: Join) -> str | None:
    """Why a node may not join (cli.md 1.7); None when it may."""
    if join["protocol"] != PEER_VERSION:
        other = join["protocol"]
        return f"it speaks version {other} of the protocol between sheep, the cluster {PEER_VERSION}; {_STOP}"
    config = json.loads(join["config"]) if join["config"] is not None else None
    if state.ctime and config is not None and config["ctime"] != state.ctime:
        return "its store belongs to another cluster (different creation time)"
    last = join["epochs"][-1][0] if join["epochs"] else 0
    if state.status == Status.RUNNING and not are_void(state, join):
        if last > state.epoch:
            return f"its epoch {last} is newer than the cluster's {state.epoch}; {_NEWER}"
        other = _contradiction(state, join)
        if other is not None:
            return other
    storing = member_from_json(join["member"]).vnodes > 0
    automatic = bool(state.flags & ClusterFlag.AUTO_VNODES)
    if state.ctime and storing and join["fixed"] == automatic:
        return "its vnodes are fixed (-V), the cluster's automatic" if automatic else "it has no fixed vnodes (-V)"
    if state.status == Status.SHUTDOWN:
        return "the cluster is shutting down"
    return None


def contradiction(state: ClusterState, me: NodeId, remembered: Sequence[EpochRecord]) -> str | None:
    """Why a node cannot go on in a cluster whose history is another one than what it remembers: both may have been
    served in. None if it can."""
    return _contradiction(state, {"member": [node_key(me)], "epochs": [record_to_json(one) for one in remembered]})


def _contradiction(state: ClusterState, join: Join) -> str | None:
    common, _ = parting_of(state, join)
    if are_void(state, join) or common < state.forced:  # an administrator has given up what came after
        return None
    return f"its epochs from {common + 1} on are not the cluster's; {_OTHER}"


def _leads(state: ClusterState, join: Join) -> bool:
    """The joiner's history goes further, or it is the one of two that was lived through."""
    newest = join["epochs"][-1][0] if join["epochs"] else 0
    common, _ = parting_of(state, join)
    if common < min(newest, state.epoch):
        if are_void(state, join):
            return False
        if makes_void(state, join):
            return True
    return newest > state.epoch


def learn(state: ClusterState, join: Join) -> None:
    """A waiting cluster takes over what a formatted joiner remembers, if it is newer."""
    config = json.loads(join["config"])
    term = max(state.term, config["term"])
    if not state.ctime or _leads(state, join):
        for name, value in config.items():
            setattr(state, name, value)
        epochs = [record_from_json(value) for value in join["epochs"]]
        common, _ = parting(reversed(state.epochs), epochs)
        known = {record.epoch: record for record in state.epochs if record.epoch <= common}
        known.update({record.epoch: record for record in epochs})
        state.epochs = [known[number] for number in sorted(known)]
        state.members = state.weighted(state.members)
    state.term = term
