"""A scenario for every seed: each leaves out most kinds of faults and does much of the others.

Runs that do a little of everything are all alike. Drawn at random, some have three nodes and nothing but power
losses, some eleven that are stopped and cut off while a coded volume is written.
"""

from __future__ import annotations

from random import Random

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.clients import OBJECT_BYTES
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Scenario
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

_LAST_BLOCK = OBJECT_BYTES // 4096 - 1
_CODED_BLOCKS = (0, 1, 16, 17, _LAST_BLOCK)  # units are 16 blocks: two data strips, and the last one
_POLICIES = (0x11, 0x12, 0x22)  # D/2 in the upper half, P in the lower: 2:1, 2:2, 4:2
_PASSING = ("kill", "link", "leave", "stop", "hold", "slow", "cut_off", "aim")  # what any cluster must stand
_STOPS_OF_ALL = ("everybody", "blackout")
LONG_NS = 9 * SECOND  # stops so long that the others expel a node (SILENT_TICKS), or its session ends


def scenario_of(seed: int) -> Scenario:
    """What `seed` is run with."""
    random = Random(f"swarm {seed}")
    policy = random.choice(_POLICIES) if random.random() < 0.3 else 0
    code = policy_of(policy) if policy else None
    if code is not None:
        copies, machines = 3, code.strips + random.randrange(3)
        tolerance = code.parity
    else:
        copies = random.choice((1, 2, 2, 3, 3, 3, 4))
        machines = copies + random.choice((0, 0, 1, 2, 3))
        tolerance = copies - 1
    scenario = Scenario(
        f"swarm {seed}",
        machines=machines,
        copies=copies,
        policy=policy,
        blocks=_CODED_BLOCKS if policy else random.choice(((0,), (0, 1), (0, 1, _LAST_BLOCK))),
        clients=random.choice((1, 2, 3, 3, 4, 6)),
        objects=random.choice((1, 2, 3, 5)),
        gateways=random.choice((0, 0, 0, 1, 2)),
        session_ns=random.choice((0, 3 * SECOND, 6 * SECOND)),
        think_ns=random.choice((MILLISECOND // 2, 2 * MILLISECOND, 8 * MILLISECOND)),
        durable_chance=random.choice((0.0, 0.3, 1.0)),
        hang_up_chance=random.choice((0.0, 0.0, 0.05)),
        tolerated=(Result.EIO,) if copies == 1 else (),  # while the only copy is away
    )
    scenario.faults = _faults(random, tolerance, scenario)
    if random.random() < 0.4:
        scenario.owners = random.choice((1, 1, 2))
        scenario.owner_policy = policy
        scenario.snapshotters = random.randrange(2)
    if random.random() < 0.1:
        scenario.flags |= ClusterFlag.STRICT
    _add_later_kinds(Random(f"swarm, later {seed}"), tolerance, scenario)
    return scenario


def _add_later_kinds(random: Random, tolerance: int, scenario: Scenario) -> None:
    """What the swarm did not do at first: chance of its own, so that most seeds are what they were."""
    faults = scenario.faults
    if random.random() < 0.1:
        scenario.sharers = random.choice((2, 2, 3))
    # A copy that rotted and one that was lost are two of the few that there are.
    if tolerance > (1 if faults.rot else 0) and random.random() < 0.1:
        faults.disk = 0.5
    if scenario.owners > scenario.snapshotters and random.random() < 0.4:
        scenario.alterers = random.randrange(2)
        scenario.altering_owners = not scenario.alterers
        scenario.duration_ns = max(scenario.duration_ns, 5 * SECOND)  # a change takes more than a second
    scenario.nosync = random.random() < 0.3


def _faults(random: Random, tolerance: int, scenario: Scenario) -> Faults:
    faults = Faults(kill=0)
    chosen = random.sample(_PASSING, random.randint(1, 4))
    if random.random() < 0.35:
        chosen.append(random.choice(_STOPS_OF_ALL))
    for name in chosen:
        setattr(faults, name, random.choice((0.3, 1.0, 1.0, 3.0)))
    if random.random() < 0.15:
        faults.full = 0.5
    if random.random() < 0.2:
        faults.join = 0.4
    if tolerance and random.random() < 0.2:
        faults.rot = 1.0
    # A copy that rotted and one that was lost are two of the few that there are.
    if tolerance > (1 if faults.rot else 0) and random.random() < 0.25:
        faults.new_disk = 0.5
    if tolerance and random.random() < 0.2:
        faults.power = 0.5
        faults.unflushed = tolerance
    if faults.blackout:
        faults.power = 0.0  # one after the other they could take what was not flushed, too
    faults.max_down = random.choice((1, 2, 2, 3))
    faults.mean_ns = random.choice((60, 120, 250, 250)) * MILLISECOND
    faults.max_outage_ns = random.choice((100, 600, 600, 1500)) * MILLISECOND
    if random.random() < 0.2 and (faults.stop or faults.cut_off or faults.hold):
        faults.max_stop_ns = LONG_NS
        faults.mean_ns = 1500 * MILLISECOND
        scenario.duration_ns = 10 * SECOND
        scenario.think_ns = max(scenario.think_ns, 4 * MILLISECOND)
    return faults
