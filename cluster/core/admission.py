"""Whether a node may join, and what a waiting cluster learns from one that does."""

from __future__ import annotations

import json
from typing import Any

from sheepdog.cluster.core.state import (
    PROTOCOL_VERSION,
    ClusterFlag,
    ClusterState,
    Status,
    member_from_json,
    record_from_json,
)

Command = dict[str, Any]


def refusal(state: ClusterState, join: Command) -> str | None:
    """Why a node may not join (cli.md 1.7); None when it may."""
    if join["protocol"] != PROTOCOL_VERSION:
        return f"it speaks version {join['protocol']} of the protocol between sheep, the cluster {PROTOCOL_VERSION}"
    config = json.loads(join["config"]) if join["config"] is not None else None
    if state.ctime and config is not None and config["ctime"] != state.ctime:
        return "its store belongs to another cluster (different creation time)"
    last = join["epochs"][-1][0] if join["epochs"] else 0
    if state.status == Status.RUNNING and last > state.epoch:
        return f"its epoch {last} is newer than the cluster's {state.epoch}"
    storing = member_from_json(join["member"]).vnodes > 0
    automatic = bool(state.flags & ClusterFlag.AUTO_VNODES)
    if state.ctime and storing and join["fixed"] == automatic:
        return "its vnodes are fixed (-V), the cluster's automatic" if automatic else "it has no fixed vnodes (-V)"
    if state.status == Status.SHUTDOWN:
        return "the cluster is shutting down"
    return None


def learn(state: ClusterState, join: Command) -> None:
    """A waiting cluster takes over what a formatted joiner remembers, if it is newer."""
    config = json.loads(join["config"])
    epochs = [record_from_json(value) for value in join["epochs"]]
    newest = epochs[-1].epoch if epochs else 0
    term = max(state.term, config["term"])
    if not state.ctime or newest > state.epoch:
        for name, value in config.items():
            setattr(state, name, value)
        known = {record.epoch: record for record in state.epochs}
        known.update({record.epoch: record for record in epochs})
        state.epochs = [known[number] for number in sorted(known)]
        state.members = state.weighted(state.members)
    state.term = term
