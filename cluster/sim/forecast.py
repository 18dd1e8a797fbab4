"""What happens to a cluster when nodes or zones fail: what moves, how long that takes, what is at risk.

Two answers, from the shipped code. `plan` is arithmetic on the real ring: sampled objects are placed with and without
the failed nodes. `rehearse` runs the real core in the simulated world with the same nodes, clients that write, and the
failure at a random moment, and checks everything that is promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.ids import Member, ObjectId, Vid, data_oid
from sheepdog.cluster.core.ring import Ring, auto_vnodes
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Failure, Run, Scenario
from sheepdog.cluster.sim.world import SECOND

SAMPLE_OBJECTS = 20_000  # placed twice in a second; shares of 1 % are then right to a tenth of themselves
MAX_REHEARSED = 12  # nodes in a simulated world: more take minutes, and show nothing else


@dataclass(slots=True)
class Topology:
    """The nodes, and how volumes are kept. `used_bytes`: of all copies together."""

    members: list[Member]
    copies: int = 3
    policy: int = 0  # 0: whole copies, else the byte of a D:P
    used_bytes: int = 0
    automatic: bool = True  # vnodes by capacity, and so anew for every membership

    def ring(self, indexes: Sequence[int]) -> Ring:
        """Of these members alone."""
        members = [self.members[index] for index in indexes]
        if self.automatic:
            spaces = auto_vnodes([member.space if member.vnodes else 0 for member in members])
            members = [replace(member, vnodes=vnodes) for member, vnodes in zip(members, spaces, strict=True)]
        return Ring(members)

    @property
    def wide(self) -> int:
        """Copies or strips of an object."""
        code = policy_of(self.policy) if self.policy else None
        return code.strips if code is not None else self.copies

    @property
    def needed(self) -> int:
        """Copies or strips without which an object cannot be read."""
        code = policy_of(self.policy) if self.policy else None
        return code.data if code is not None else 1


@dataclass(slots=True)
class Plan:
    """Shares are of all objects, bytes of all copies; `receives` and `holds` by index of the member."""

    failed: list[int]
    moved_bytes: int = 0
    receives: dict[int, int] = field(default_factory=dict)
    sends: dict[int, int] = field(default_factory=dict)
    holds: dict[int, int] = field(default_factory=dict)
    unreadable: float = 0.0  # until a failed node is back
    one_more: float = 0.0  # readable, but not after one further failure, before the recovery has ended
    narrow: float = 0.0  # fewer copies than wanted for good: there are not zones enough
    seconds: float = 0.0


def plan(topology: Topology, failed: Sequence[int], rate_bytes: float, seed: int = 0) -> Plan:
    """`rate_bytes`: how fast a node reads or writes for recovery, in a second."""
    random = Random(f"plan {seed}")
    gone = dict.fromkeys(failed)
    everybody = range(len(topology.members))
    alive = [index for index in everybody if index not in gone]
    before, after = topology.ring(everybody), topology.ring(alive)
    found = Plan(list(failed))
    oids = [data_oid(Vid(random.randrange(1, 1 << 24)), random.randrange(1 << 16)) for _ in range(SAMPLE_OBJECTS)]
    copies_before = sum(len(before.replicas(oid, topology.wide)) for oid in oids)
    size = topology.used_bytes / max(copies_before, 1)
    for oid in oids:
        _move(topology, found, oid, before.replicas(oid, topology.wide), after, alive, size)
    for name in ("unreadable", "one_more", "narrow"):
        setattr(found, name, getattr(found, name) / SAMPLE_OBJECTS)
    busiest = max([*found.receives.values(), *found.sends.values()], default=0)
    found.seconds = busiest / rate_bytes
    return found


def _move(
    topology: Topology,
    found: Plan,
    oid: ObjectId,
    old: Sequence[int],
    after: Ring,
    alive: Sequence[int],
    size: float,
) -> None:
    """Adds one sampled object."""
    new = [alive[index] for index in after.replicas(oid, topology.wide)]
    left = [index for index in old if index in new or index not in found.failed]
    found.unreadable += len(left) < topology.needed
    found.one_more += len(left) == topology.needed and len(left) < len(old)
    found.narrow += len(new) < topology.wide
    for index in new:
        found.holds[index] = found.holds.get(index, 0) + int(size)
        if index in old or len(left) < topology.needed:
            continue
        found.moved_bytes += int(size)
        found.receives[index] = found.receives.get(index, 0) + int(size)
        for source in left[: topology.needed]:  # a strip is made of that many others
            found.sends[source] = found.sends.get(source, 0) + int(size)


@dataclass(slots=True)
class Rehearsal:
    """What the simulated clusters did."""

    seeds: int = 0
    operations: int = 0
    violations: list[str] = field(default_factory=list)
    pauses_ns: list[int] = field(default_factory=list)  # the longest that any client waited, by seed
    errors: int = 0  # requests that ended with an error


def rehearse_one(topology: Topology, failed: Sequence[int], seed: int, found: Rehearsal) -> None:
    """One run: clients write, the nodes fail at a random moment and stay away for a while, and come back."""
    members = topology.members
    storing = [index for index, member in enumerate(members) if member.vnodes]
    zones = {zone: number for number, zone in enumerate(dict.fromkeys(members[index].zone for index in storing))}
    scenario = Scenario(
        "rehearsal",
        machines=len(storing),
        copies=topology.copies,
        policy=topology.policy,
        zone_of=tuple(zones[members[index].zone] for index in storing),
        duration_ns=3 * SECOND,
        faults=Faults(kill=0),
        clients=3,
    )
    run = Run(scenario, seed)
    moment_ns = SECOND // 2 + run.world.stream("moment").randrange(SECOND)
    for index in failed:
        machine = run.cluster.machines[storing.index(index)]
        run.world.after(moment_ns, machine.kill)
        run.world.after(moment_ns + SECOND, machine.start)
    try:
        run.execute()
    except Failure as failure:
        if "clients saw results" not in str(failure):
            found.violations.append(str(failure).split("\n")[0])
    found.seeds += 1
    found.operations += run.operations
    found.errors += sum(run.errors.values())
    found.pauses_ns.append(max(client.longest_ns for client in run.clients))
