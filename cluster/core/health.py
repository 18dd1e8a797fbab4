"""Health: what one node knows of the state of the cluster, and what all their reports together mean.

Every node reports only what it sees itself (`report`); whoever asked them all judges (`findings`, `costs_of_stopping`).

 healthy    every copy is where it belongs
 degraded   everything is served; one more failure may cost more than it would have
 halted     some requests are refused, or wait until somebody does something
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.ids import NO_VERSION, Member, NodeId, ObjectId, strip_index, strip_of
from sheepdog.cluster.core.limits import MAX_STRIPS, NEARLY_FULL_PERCENT
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status, node_from_key

if TYPE_CHECKING:
    from sheepdog.cluster.core.node import Node


class Level(enum.IntEnum):
    """Also the exit status of `dog cluster health`."""

    HEALTHY = 0
    DEGRADED = 1
    HALTED = 2


class Finding(NamedTuple):
    """One thing that is not as it should be."""

    level: Level
    text: str


class Cost(NamedTuple):
    """Why a node should not stop now. `kind`: "data" or "availability"."""

    kind: str
    text: str


class Redundancy(NamedTuple):
    """`volumes` VDIs (snapshots too) are kept as `copies` copies, or as strips by `policy` (0: copies)."""

    copies: int
    policy: int
    volumes: int

    @property
    def needed(self) -> int:
        """So many zones must be there to read."""
        coding = policy_of(self.policy) if self.policy else None
        return coding.data if coding is not None else 1

    @property
    def wanted(self) -> int:
        coding = policy_of(self.policy) if self.policy else None
        return coding.strips if coding is not None else self.copies

    def __str__(self) -> str:
        coding = policy_of(self.policy) if self.policy else None
        what = f"{coding.data}:{coding.parity} strips" if coding is not None else _count(self.copies, "copy", "copies")
        return f"{_count(self.volumes, 'volume')} of {what}"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """See the module. Nodes are named as text (`HOST:PORT`), sizes are bytes."""

    state: str = "running"  # or: unformatted, waiting, shutdown, killed
    epoch: int = 0
    absent: list[str] = field(default_factory=list)  # a waiting cluster waits for these
    suspended: bool = False  # the membership engine is out of reach
    peering: list[str] = field(default_factory=list)  # this node serves when it knows what these hold
    unfinished: int = 0  # objects of this home that are not on all their nodes yet
    finished: int = 0
    total: int = 0
    restored_bytes: int = 0  # fetched by this node since its start
    sole: dict[str, int] = field(default_factory=dict)  # by node: so many objects would be lost with it
    full: int = 0  # objects that are refused writes, for want of space on some node
    skipped: int = 0  # objects that wait for space on a node that is nearly full (format -F)
    lost: int = 0  # objects of which no current copy is on any member
    knows_all: bool = True  # False: all copies of some objects may be on nodes that are away
    recovery_enabled: bool = True
    recovery_waits_s: int = 0  # so long recovery waits for `away` to come back
    away: list[str] = field(default_factory=list)
    strict: bool = False
    redundancy: list[list[int]] = field(default_factory=list)  # [copies, policy, volumes]
    used: int = 0
    free: int = 0
    failed_disks: list[str] = field(default_factory=list)
    clients: int = 0  # connections
    cached_away: dict[str, str] = field(default_factory=dict)  # volume: the node whose cache has what nobody else has
    votes: list[int] = field(default_factory=list)  # ports.Votes of the membership engine on this machine; or nothing

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NodeReport:
        """What a newer node says more is ignored."""
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})

    @property
    def redundancies(self) -> list[Redundancy]:
        return [Redundancy(*values) for values in self.redundancy]


Reports = Mapping[NodeId, NodeReport | None]  # None: it does not answer


def report(node: Node, failed_disks: Sequence[str], clients: int) -> NodeReport:
    """What this node sees now."""
    cluster, home, context = node.cluster, node.home, node.context
    recovery = home.recovery if home is not None else None
    waits_ns = recovery.waits_ns() if recovery is not None else 0
    used, free = context.store.usage()
    return NodeReport(
        state=_state(cluster),
        epoch=context.epoch,
        absent=[str(absent) for absent in cluster.missing_members()] if cluster.status == Status.WAITING else [],
        suspended=node.gateway.gate.suspended,
        peering=[str(member) for member in home.waiting_for()] if home is not None else [],
        unfinished=recovery.unfinished if recovery is not None else 0,
        finished=recovery.finished if recovery is not None else 0,
        total=recovery.total if recovery is not None else 0,
        restored_bytes=node.copies.puller.bytes_pulled + node.copies.rebuilder.bytes_rebuilt,
        sole=recovery.sole() if recovery is not None else {},
        full=recovery.full() if recovery is not None else 0,
        skipped=recovery.skipped() if recovery is not None else 0,
        lost=home.lost if home is not None else 0,
        knows_all=home.knows_all if home is not None else True,
        recovery_enabled=not cluster.disable_recovery,
        recovery_waits_s=-(-waits_ns // 1_000_000_000),
        away=[str(one) for one in cluster.away_nodes()] if waits_ns else [],
        strict=bool(cluster.flags & ClusterFlag.STRICT),
        redundancy=_redundancies(cluster),
        used=used,
        free=free,
        failed_disks=list(failed_disks),
        clients=clients,
        cached_away=_cached_away(node),
        votes=list(node.votes() or ()),
    )


def object_report(node: Node, oid: ObjectId) -> dict[str, Any]:
    """What this node holds of an object (strip -1: a whole copy); as its home also what a request meets."""
    store, home = node.context.store, node.home
    ids = [oid, *(strip_of(oid, strip) for strip in range(MAX_STRIPS))]
    held = [(one, version) for one in ids if (version := store.version(one)) is not None]
    at_home = home is not None and node.context.placement.home(oid) == home.me
    return {
        "epoch": node.context.epoch,
        "state": home.state_of(oid) if home is not None and at_home else "",
        "copies": [
            {
                "strip": strip_index(one),
                "version": list(version),
                "size": store.size(one),
                "current": version != NO_VERSION and node.replica.is_current(one),
            }
            for one, version in held
        ],
    }


def _state(cluster: ClusterState) -> str:
    if cluster.status == Status.WAITING:
        return "waiting" if cluster.ctime else "unformatted"
    return cluster.status.name.lower()


def _cached_away(node: Node) -> dict[str, str]:
    """Volumes that are refused because acknowledged writes are in a cache that is away, or lost."""
    vdis = node.cluster.vdis
    return {
        record.name.decode(errors="replace"): str(node_from_key(claim.owner))
        for vid, claim in sorted(vdis.claims.items())
        if node.claims.unreachable(vid) and (record := vdis.get(vid)) is not None
    }


def _redundancies(cluster: ClusterState) -> list[list[int]]:
    counts: dict[tuple[int, int], int] = {}
    for record in cluster.vdis.records():
        if not record.deleted:
            key = (record.copies or cluster.copies, record.policy)
            counts[key] = counts.get(key, 0) + 1
    return [[copies, policy, counts[copies, policy]] for copies, policy in sorted(counts)]


# -- the judge -----------------------------------------------------------------------------------------------------


def findings(members: Sequence[Member], reports: Reports) -> list[Finding]:
    """Everything that is not as it should be, the worst first. Nothing: healthy."""
    known = [(member, one) for member in members if (one := reports.get(member.id)) is not None]
    found = [
        Finding(Level.DEGRADED, f"node {member.id} does not answer")
        for member in members
        if reports.get(member.id) is None
    ]
    running = [one for _, one in known if one.state == "running"]
    if known and not running:
        found.append(_not_running(known[0][1]))
    else:
        found += _placement_findings(members, running)
        found += _node_findings(known)
        found += _recovery_findings(running)
        found += _cache_findings(running)
    return sorted(found, key=lambda one: -one.level)


def level_of(found: Iterable[Finding]) -> Level:
    return max((one.level for one in found), default=Level.HEALTHY)


def _not_running(one: NodeReport) -> Finding:
    if one.state == "unformatted":
        return Finding(Level.HALTED, "the cluster is not formatted")
    if one.state == "waiting":
        absent = ", ".join(one.absent) or "somebody"
        return Finding(Level.HALTED, f"the cluster waits for members of its last epoch: {absent}")
    return Finding(Level.HALTED, f"the cluster is not running ({one.state})")


def _zones(members: Iterable[Member]) -> int:
    return len({member.zone for member in members if member.vnodes})


def _placement_findings(members: Sequence[Member], running: Sequence[NodeReport]) -> list[Finding]:
    zones = _zones(members)
    if not zones:
        return [Finding(Level.HALTED, "no node stores anything: all are gateways")]
    found = []
    for redundancy in running[0].redundancies if running else ():
        if zones >= redundancy.wanted:
            continue
        where = f"{redundancy}: only {_count(zones, 'zone')}"
        if zones < redundancy.needed:
            found.append(Finding(Level.HALTED, f"{where}, they cannot be read"))
        elif running[0].strict:
            found.append(Finding(Level.HALTED, f"{where}, writes are refused (strict mode)"))
        else:
            found.append(Finding(Level.DEGRADED, where))
    return found


def _node_findings(known: Sequence[tuple[Member, NodeReport]]) -> list[Finding]:
    found = []
    newest = max((one.epoch for _, one in known), default=0)
    suspended = [member for member, one in known if one.suspended]
    for member in suspended:
        level = Level.HALTED if len(suspended) == len(known) else Level.DEGRADED
        found.append(Finding(level, f"node {member.id}: the membership engine is out of reach, its requests wait"))
    for member, one in known:
        if one.epoch < newest:
            found.append(Finding(Level.DEGRADED, f"node {member.id} is still in epoch {one.epoch}, not {newest}"))
        elif one.peering:
            waits = f"node {member.id} waits to hear what {', '.join(one.peering)} holds"
            found.append(Finding(Level.DEGRADED, waits))
        found += [
            Finding(Level.DEGRADED, f"node {member.id}: disk {path} is out of service") for path in one.failed_disks
        ]
        size = one.used + one.free
        if member.vnodes and size and one.used * 100 >= size * NEARLY_FULL_PERCENT:
            found.append(Finding(Level.DEGRADED, f"node {member.id} is {one.used * 100 // size} % full"))
    return found


def _recovery_findings(running: Sequence[NodeReport]) -> list[Finding]:
    found = []
    lost = sum(one.lost for one in running)
    if lost:
        text = f"{_count(lost, 'object')} without a current copy: requests fail until a node that has one returns"
        found.append(Finding(Level.HALTED, text))
    elif not all(one.knows_all for one in running):
        text = "nodes or disks away may hold all copies of some objects: requests for these fail until they return"
        found.append(Finding(Level.HALTED, text))
    full = sum(one.full for one in running)
    if full:
        text = f"{_count(full, 'object')} refused for writing: a node that shall hold them has no space"
        found.append(Finding(Level.HALTED, text))
    skipped = sum(one.skipped for one in running)
    if skipped:
        text = (
            f"{_count(skipped, 'object')} short of a copy: recovery does not fill disks (-F), a node needs more space"
        )
        found.append(Finding(Level.DEGRADED, text))
    left = sum(one.unfinished for one in running)
    if left:
        found.append(Finding(Level.DEGRADED, _recovery_text(left, running)))
    sole = sum(count for one in running for count in one.sole.values())
    if sole:
        found.append(Finding(Level.DEGRADED, f"{_count(sole, 'object')} would be lost with one more node"))
    return found


def _cache_findings(running: Sequence[NodeReport]) -> list[Finding]:
    away: dict[str, str] = {}
    for one in running:
        away |= one.cached_away
    text = "volume {}: refused; acknowledged writes are in the cache of {}, which is away or has lost it"
    return [Finding(Level.HALTED, text.format(name, node)) for name, node in away.items()]


def _recovery_text(left: int, running: Sequence[NodeReport]) -> str:
    text = f"{_count(left, 'object')} short of copies"
    waits_s = max(one.recovery_waits_s for one in running)
    if not all(one.recovery_enabled for one in running):
        return f"{text}; recovery is disabled"
    if waits_s:
        away = dict.fromkeys(name for one in running for name in one.away)
        return f"{text}; recovery waits {waits_s} s for {', '.join(away)}"
    total = sum(one.total for one in running)
    finished = sum(one.finished for one in running)
    return f"{text}; recovery has done {finished} of {total}"


def costs_of_stopping(target: Member, members: Sequence[Member], reports: Reports) -> list[Cost]:
    """What would become unavailable, or be lost, if `target` and its machine stopped now. Nothing: it may."""
    others = [member for member in members if member.id != target.id]
    if not others:
        return [Cost("availability", "it is the only node")]
    unknown = [Cost("data", f"node {member.id} does not answer: nobody knows what it holds")
               for member in others if reports.get(member.id) is None]  # fmt: skip
    known = [one for one in reports.values() if one is not None]
    if any(one.state != "running" for one in known):
        return [*unknown, Cost("availability", "the cluster is not running, and would wait for this node again")]
    costs = [*unknown, *_vote_costs(reports.get(target.id))]
    if not target.vnodes:
        return costs
    if len({one.epoch for one in known}) > 1 or any(one.peering or one.suspended for one in known):
        costs.append(Cost("availability", "the nodes are just agreeing on what they hold; ask again in a moment"))
    sole = sum(one.sole.get(str(target.id), 0) for one in known)
    if sole:
        costs.append(Cost("data", f"{_count(sole, 'object')} would have no other current copy"))
    return costs + _redundancy_costs(target, others, known) + _space_costs(target, others, reports)


def _vote_costs(mine: NodeReport | None) -> list[Cost]:
    """The engine on the machine goes with it, if it is the machine that stops."""
    if mine is None or not mine.votes:
        return []
    own, present, needed = mine.votes
    if present - own >= needed:
        return []
    left = f"{_count(present - own, 'vote')} of the {needed} that it needs"
    return [Cost("availability", f"the membership engine would have {left}, should it stop with this machine")]


def _redundancy_costs(target: Member, others: Sequence[Member], known: Sequence[NodeReport]) -> list[Cost]:
    """Of what is complete now: each object is in as many zones as it wants, or in all of them."""
    now, then = _zones([target, *others]), _zones(others)
    if not then:
        return [Cost("data", "no other node stores anything")]
    costs = []
    for redundancy in known[0].redundancies if known else ():
        left = min(redundancy.wanted, now) - 1
        if left < redundancy.needed:
            costs.append(Cost("data", f"{redundancy}: what this node holds of them could not be read"))
        elif known[0].strict and then < redundancy.wanted:
            costs.append(Cost("availability", f"{redundancy}: with {_count(then, 'zone')} strict mode refuses writes"))
    return costs


def _space_costs(target: Member, others: Sequence[Member], reports: Reports) -> list[Cost]:
    """Recovery will put on the others what this node holds, if they have zones enough for all copies."""
    mine = reports.get(target.id)
    storing = [one for member in others if member.vnodes and (one := reports.get(member.id)) is not None]
    if (
        mine is None
        or not mine.recovery_enabled
        or _zones(others) < max((r.wanted for r in mine.redundancies), default=0)
    ):
        return []
    free = sum(one.free for one in storing)
    if free >= mine.used:
        return []
    return [Cost("availability", f"the others have {free >> 20} MB free for the {mine.used >> 20} MB that it holds")]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
