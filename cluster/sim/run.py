"""One seed from beginning to end: clients, faults, calm, and then everything is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import (
    ObjectId,
    plain_oid,
)
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.script import run
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.alterers import Alterer, alter, redundancies
from sheepdog.cluster.sim.audit import audit, audit_all_but_leaks
from sheepdog.cluster.sim.clients import (
    NOT_NOW,
    OBJECT_BYTES,
    BlockClient,
    Door,
    Volume,
    make_thin_volume,
    make_volume,
)
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, Machine, NodeFactory, SimCluster
from sheepdog.cluster.sim.history import History, Violation
from sheepdog.cluster.sim.lockers import Lock, Locker
from sheepdog.cluster.sim.nemesis import Faults, Nemesis
from sheepdog.cluster.sim.sharers import Shared, SharedSnapshotter, Sharer, blocks_of
from sheepdog.cluster.sim.volumes import Asking, Snapshotter, VolumeOwner
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, Stuck, World

_UNKNOWN = {
    "home.object_lost",
    "home.object_unknown",
    "table.partial",
    "gateway.nobody_stores",
}  # membership tests only
LAST_BLOCK = OBJECT_BYTES // 4096 - 1
_RESTS, _ALTERATIONS = 0.2, 0.3  # among an owner's acts, of which reads and writes are 16


@dataclass(slots=True)
class Scenario:
    """What a seed is run with."""

    name: str
    machines: int = 3
    copies: int = 3
    flags: int = int(ClusterFlag.AUTO_VNODES)  # of the cluster
    policy: int = 0  # of the clients' volume: 0 as many copies, else the byte of a D:P
    clients: int = 3
    objects: int = 3
    blocks: tuple[int, ...] = (0, 1, LAST_BLOCK)
    duration_ns: int = 2 * SECOND
    faults: Faults = field(default_factory=Faults)
    make_node: NodeFactory = Node
    cache_bytes: int = 0  # of each gateway's object cache; 0: none
    doors: int = 0  # how many machines the clients begin at; 0: all that store
    gateways: int = 0  # more machines, which store nothing
    zone_of: tuple[int, ...] = ()  # failure domain of each machine; empty: every machine is one
    session_ns: int = 0  # of the membership engine; 0: only proven deaths count (cluster.sim.engine)
    think_ns: int = 2 * MILLISECOND  # the longest pause of a client between two requests
    durable_chance: float = 0.3
    nosync: bool = False  # the nodes believe that nothing waits for a disk
    roam_chance: float = 0.02  # of a client to talk to another gateway from the next request on
    hang_up_chance: float = 0.0  # of a client's connection to break over a request
    owner_policy: int = 0  # like `policy`, of the owners' volumes
    flushes: bool = False  # owners make their writes durable by flushes
    owners: int = 0  # clients with a volume of their own, which snapshot, clone, discard and delete
    snapshotters: int = 0  # for each owner somebody else who takes snapshots of its volume
    alterers: int = 0  # for so many of the other owners somebody who changes the redundancy of its volume ...
    altering_owners: bool = False  # ... and the rest do so themselves
    lockers: int = 0  # clients that want the volume for themselves
    sharers: int = 0  # clients, each behind a gateway of its own, that have one more volume open together
    tolerated: tuple[Result, ...] = ()  # results that clients may see besides success and "not now"


class Failure(AssertionError):
    """A seed that failed: the message says how to run it again."""


class Run:
    """See the module; `execute` raises Failure."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.world = World(seed)
        self.cluster = SimCluster(
            self.world,
            scenario.machines,
            scenario.make_node,
            scenario.gateways,
            scenario.session_ns,
            scenario.zone_of,
            scenario.cache_bytes,
        )
        for machine in self.cluster.machines:
            machine.disk.nosync = scenario.nosync
        self.history = History()
        self.errors: dict[int, int] = {}
        self.nemesis = Nemesis(self.cluster, scenario.faults, lambda: self.history.blackouts.append(self.world.now_ns))
        self.clients: list[BlockClient] = []
        self.doors: list[Door] = []
        self.owners: list[VolumeOwner] = []
        self.leaked = 0  # objects left behind by gateways that died while they freed them
        self.snapshotters: list[Snapshotter] = []
        self.sharers: list[Sharer] = []
        self.others: list[Asking] = []  # everybody but `clients`

    @property
    def operations(self) -> int:
        """What clients asked for so far."""
        owners, sharers = sum(one.operations for one in self.owners), sum(one.operations for one in self.sharers)
        return sum(client.requests for client in self.clients) + owners + sharers

    def execute(self) -> None:
        try:
            self._execute()
        except (AssertionError, Exception) as error:
            raise Failure(f"scenario {self.scenario.name}, seed {self.world.seed}: {error!r}") from error

    def _execute(self) -> None:
        scenario, cluster = self.scenario, self.cluster
        cluster.start_all()
        cluster.format(
            scenario.copies, scenario.flags | (ClusterFlag.LOCKS if scenario.lockers or scenario.sharers else 0)
        )
        volume = make_volume(cluster, "shared", scenario.objects, scenario.blocks, policy=scenario.policy)
        self._start_clients(volume)
        self.nemesis.start()
        self._live(scenario.duration_ns)
        self.nemesis.stop()
        self._live(200 * MILLISECOND)
        self._calm_down()
        self._read_all(volume)
        for who in self.others:
            ended: list[None] = []
            run(who.check_all(), ended.append)
            self.world.run_until(partial(bool, ended), HEALTH_LIMIT_NS, "a last look")
        self._mend_rot()
        self.world.run_for(100 * MILLISECOND)  # what was ordered last reaches everybody
        self._judge()

    def _mend_rot(self) -> None:
        """What has rotted and nobody read is found by a check of the volume, and made good."""
        for machine in self.cluster.machines:
            for oid, copy in machine.disk.copies().items():
                if not copy.rotten:
                    continue
                self._repair(machine, plain_oid(oid))
        self.world.run_until(self.cluster.healthy, HEALTH_LIMIT_NS, "health after repairs")

    def _repair(self, machine: Machine, oid: ObjectId) -> None:
        results: list[int] = []
        machine.node.gateway.repair(oid, lambda result, _: results.append(result))
        self.world.run_until(lambda: bool(results), HEALTH_LIMIT_NS, "a repair")

    def _start_clients(self, volume: Volume) -> None:
        values = [0]
        for number in range(self.scenario.clients):
            door = Door(self.cluster, f"client{number}", number % (self.scenario.doors or self.scenario.machines))
            client = BlockClient(door, volume, self.history, values, self.errors)
            client.durable_chance = self.scenario.durable_chance
            client.think_ns = self.scenario.think_ns
            client.roam_chance = self.scenario.roam_chance
            client.hang_up_chance = self.scenario.hang_up_chance
            self.doors.append(door)
            self.clients.append(client)
            client.start()
        for number in range(self.scenario.owners):
            self._start_owner(number, values)
        lock = Lock()
        for number in range(self.scenario.lockers):
            self._start(Locker(Door(self.cluster, f"locker{number}", number), volume.name.encode(), lock))
        if self.scenario.sharers:
            self._start_sharers(self.scenario.sharers, values)

    def _start(self, who: Asking) -> None:
        self.doors.append(who.door)
        self.others.append(who)
        who.start()

    def _start_sharers(self, count: int, values: list[int]) -> None:
        count = min(count, len(self.cluster.machines))
        blocks = tuple(block for number in range(count) for block in blocks_of(number))
        shared = Shared("paths", self.scenario.objects, self.history, values, blocks)
        make_thin_volume(self.cluster, shared.name, shared.objects, policy=self.scenario.owner_policy)
        for number in range(count):
            self.sharers.append(Sharer(self.cluster, number, shared))
            self._start(self.sharers[-1])
        self._start(SharedSnapshotter(Door(self.cluster, "path snapshotter", count), shared))

    def _start_owner(self, number: int, values: list[int]) -> None:
        scenario = self.scenario
        first = scenario.machines if scenario.faults.spare_gateways else 0
        door = Door(self.cluster, f"owner{number}", first + number)
        owner = VolumeOwner(door, f"own{number}", scenario.objects, scenario.blocks, values)
        owner.flushes = scenario.flushes
        owner.policy = scenario.owner_policy
        owner.recycling = bool(scenario.flags & ClusterFlag.RECYCLE)
        owner.durable = (scenario.durable_chance >= 1 or bool(scenario.faults.blackout)) and not scenario.flushes
        self.owners.append(owner)
        if number < scenario.snapshotters:
            owner.alone = False
            other = Door(self.cluster, f"snapshotter{number}", number + 1)
            self.snapshotters.append(Snapshotter(other, owner, scenario.objects, scenario.blocks))
            self._start(self.snapshotters[-1])
        else:
            self._alter(number, owner)
        self._start(owner)

    def _alter(self, number: int, owner: VolumeOwner) -> None:
        """The owner's volume gets another redundancy now and then, if the scenario says so and there is one."""
        scenario = self.scenario
        kinds = redundancies(scenario.machines, scenario.copies, scenario.owner_policy)
        if not kinds:
            return
        if number < scenario.snapshotters + scenario.alterers:
            owner.alone = False
            owner.more_acts = [(_RESTS, owner.rest)]
            door = Door(self.cluster, f"alterer{number}", number + 1)
            self._start(Alterer(door, owner.name, scenario.objects, kinds))
        elif scenario.altering_owners:
            owner.more_acts = [(_ALTERATIONS, partial(alter, owner, owner.name, scenario.objects, kinds))]

    def _live(self, duration_ns: int) -> None:
        """Time goes on; clients notice now and then that their gateway is gone."""
        end_ns = self.world.now_ns + duration_ns
        while self.world.now_ns < end_ns:
            self.world.run_for(5 * MILLISECOND)
            for door in self.doors:
                door.watch()

    def _calm_down(self) -> None:
        everybody: list[BlockClient | Asking] = [*self.clients, *self.others]
        for client in everybody:
            client.stopped = True
        try:
            limit_ns = self.world.now_ns + HEALTH_LIMIT_NS
            while not all(client.idle for client in everybody):
                if self.world.now_ns > limit_ns:
                    raise Stuck("clients wait for answers")
                self._live(5 * MILLISECOND)
            self.world.run_until(self.cluster.healthy, HEALTH_LIMIT_NS, "health")
        except Stuck as stuck:
            raise Violation(f"{stuck}; {self.cluster.unhealthy()}") from stuck

    def _read_all(self, volume: Volume) -> None:
        """Every block through every gateway: what was acknowledged is there."""
        for machine in self.cluster.machines:
            door = Door(self.cluster, f"reader{machine.number}", machine.number)
            reader = BlockClient(door, volume, self.history, [0], self.errors)
            for index in range(volume.objects):
                for block in volume.blocks:
                    reader.read(index, block, 1, lambda: None)
                    self.world.run_until(partial(_is_idle, door), HEALTH_LIMIT_NS, "a read in peace")

    def _judge(self) -> None:
        if self.scenario.cache_bytes:
            self.world.run_for(SECOND)  # claims that readers took are known to all
        allowed = [*NOT_NOW, *self.scenario.tolerated]
        faults = self.nemesis.counts
        if "full" in faults:
            allowed.append(Result.NO_SPACE)
        if "rot" in faults:
            allowed.append(Result.EIO)  # while the good copies are away
        if not _UNKNOWN.isdisjoint(self.cluster.probes()):
            allowed.append(
                Result.EIO
            )  # all current copies were down: nothing is promised but that no old ones are shown
        bad = {result: count for result, count in self.errors.items() if result not in allowed}
        if bad:
            raise Violation(f"clients saw results {bad}")
        self.history.check()
        if self.nemesis.count and not self.scenario.faults.spare_gateways:
            self.leaked = len(audit_all_but_leaks(self.cluster))
        else:
            audit(self.cluster)


def _is_idle(door: Door) -> bool:
    return not door.busy
