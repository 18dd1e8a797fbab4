"""Epochs that some nodes have recorded and that never were active.

A node records an epoch before it tells what it holds, and nothing is decided or answered in an epoch before every
member has told (core.node, core.home). So an epoch that one of its members never recorded was never active: it is void.

Such epochs are left when everybody stops at a change of members, most of all at a join: the newcomer may be the only
one that has recorded the epoch which began with it. The others start again without it, rightly, since nothing was
answered in it; and when the newcomer is back it remembers an epoch that they do not know. It is let in if everything of
that kind is void by the word of members who are here.

Their word is the epoch log that each of them told when it came. It counts if the log is older than the parting of the
two histories and unbroken since: who has got other disks meanwhile may have recorded the epoch without knowing it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from sheepdog.cluster.core.ids import EpochRecord
from sheepdog.cluster.core.state import ClusterState, node_key, record_from_json, record_to_json

Join = Mapping[str, Any]  # a join command: what a node is, and what its disks remember


def parting(own: Iterable[EpochRecord], others: Sequence[EpochRecord]) -> tuple[int, list[EpochRecord]]:
    """The newest epoch of a log, which is given newest first, that another history has too, and the records after it.

    0 if there is none. What is older than all that the others still have is taken for theirs.
    """
    first = others[0].epoch if others else 0
    known = {record.epoch: record for record in others}
    after: list[EpochRecord] = []
    for record in own:
        if record.epoch < first or known.get(record.epoch) == record:
            return record.epoch, after
        after.append(record)
    return 0, after


def parting_of(state: ClusterState, join: Join) -> tuple[int, list[EpochRecord]]:
    """As `parting`, of a joiner and the cluster."""
    return parting(map(record_from_json, reversed(join["epochs"])), state.epochs)


def note_log(state: ClusterState, join: Join) -> None:
    """A member was let in: `state.logs` gets what its epoch log is worth. To be called when it is in `members`."""
    member = join["member"][0]
    present = {node_key(one.id) for one in state.members}  # membership tests only
    state.logs = {node: log for node, log in state.logs.items() if node in present and node != member}
    if join["epochs"] and join.get("since"):
        newest = record_from_json(join["epochs"][-1])
        state.logs[member] = [join["since"], newest.epoch, _digest(newest)]


def are_void(state: ClusterState, join: Join) -> bool:
    """Whatever a joiner has recorded that is not in the cluster's history is void; False if nobody here can tell."""
    common, after = parting_of(state, join)
    return not after or _all_void(after, _witnesses(state, common) - {join["member"][0]})


def makes_void(state: ClusterState, join: Join) -> bool:
    """What the cluster's history has after its parting from the joiner's is void by the joiner's own word."""
    common, _ = parting_of(state, join)
    after = [record for record in state.epochs if record.epoch > common]
    return 0 < join.get("since", 0) <= common and _all_void(after, {join["member"][0]})


def _all_void(records: Sequence[EpochRecord], witnesses: Collection[str]) -> bool:
    """Each has a member among the witnesses, none of whom has recorded any of them."""
    return all(any(node_key(member.id) in witnesses for member in record.members) for record in records)


def _witnesses(state: ClusterState, common: int) -> set[str]:
    """Members that have recorded after `common` what is in the cluster's history, and nothing else; not ordered."""
    known: dict[int, EpochRecord] = {record.epoch: record for record in state.epochs}
    digests: dict[int, str] = {}
    found = set()
    for member in state.members:
        since, newest, digest = state.logs.get(node_key(member.id), (0, 0, ""))
        if 0 < since <= common and newest in known:
            if newest not in digests:
                digests[newest] = _digest(known[newest])
            if digests[newest] == digest:
                found.add(node_key(member.id))
    return found


def _digest(record: EpochRecord) -> str:
    return blake2b(json.dumps(record_to_json(record)).encode(), digest_size=8).hexdigest()
