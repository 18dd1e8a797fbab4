"""One seed from beginning to end: clients, faults, calm, and then everything is checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.script import run
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.sim.audit import audit, audit_all_but_leaks
from sheepdog.cluster.sim.clients import NOT_NOW, OBJECT_BYTES, BlockClient, Door, Volume, make_volume
from sheepdog.cluster.sim.cluster import HEALTH_LIMIT_NS, NodeFactory, SimCluster
from sheepdog.cluster.sim.history import History, Violation
from sheepdog.cluster.sim.nemesis import Faults, Nemesis
from sheepdog.cluster.sim.volumes import Asking, Snapshotter, VolumeOwner
from sheepdog.cluster.sim.world import MILLISECOND, SECOND, Stuck, World

LAST_BLOCK = OBJECT_BYTES // 4096 - 1


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
    think_ns: int = 2 * MILLISECOND  # the longest pause of a client between two requests
    durable_chance: float = 0.3
    flushes: bool = False  # owners make their writes durable by flushes
    owners: int = 0  # clients with a volume of their own, which snapshot, clone, discard and delete
    snapshotters: int = 0  # for each owner somebody else who takes snapshots of its volume
    tolerated: tuple[Result, ...] = ()  # results that clients may see besides success and "not now"


class Failure(AssertionError):
    """A seed that failed: the message says how to run it again."""


class Run:
    """See the module; `execute` raises Failure."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.world = World(seed)
        self.cluster = SimCluster(self.world, scenario.machines, scenario.make_node)
        self.history = History()
        self.errors: dict[int, int] = {}
        self.nemesis = Nemesis(self.cluster, scenario.faults)
        self.clients: list[BlockClient] = []
        self.doors: list[Door] = []
        self.owners: list[VolumeOwner] = []
        self.leaked = 0  # objects left behind by gateways that died while they freed them
        self.snapshotters: list[Snapshotter] = []

    def execute(self) -> None:
        try:
            self._execute()
        except (AssertionError, Exception) as error:
            raise Failure(f"scenario {self.scenario.name}, seed {self.world.seed}: {error!r}") from error

    def _execute(self) -> None:
        scenario, cluster = self.scenario, self.cluster
        cluster.start_all()
        cluster.format(scenario.copies, scenario.flags)
        volume = make_volume(cluster, "shared", scenario.objects, scenario.blocks, policy=scenario.policy)
        self._start_clients(volume)
        self.nemesis.start()
        self._live(scenario.duration_ns)
        self.nemesis.stop()
        self._live(200 * MILLISECOND)
        self._calm_down()
        self._read_all(volume)
        others: list[Asking] = [*self.owners, *self.snapshotters]
        for who in others:
            ended: list[None] = []
            run(who.check_all(), ended.append)
            self.world.run_until(lambda: bool(ended), HEALTH_LIMIT_NS, "a last look")  # noqa: B023
        self._judge()

    def _start_clients(self, volume: Volume) -> None:
        values = [0]
        for number in range(self.scenario.clients):
            door = Door(self.cluster, f"client{number}", number % self.scenario.machines)
            client = BlockClient(door, volume, self.history, values, self.errors)
            client.durable_chance = self.scenario.durable_chance
            client.think_ns = self.scenario.think_ns
            self.doors.append(door)
            self.clients.append(client)
            client.start()
        for number in range(self.scenario.owners):
            self._start_owner(number, values)

    def _start_owner(self, number: int, values: list[int]) -> None:
        scenario = self.scenario
        door = Door(self.cluster, f"owner{number}", number)
        owner = VolumeOwner(door, f"own{number}", scenario.objects, scenario.blocks, values)
        owner.flushes = scenario.flushes
        owner.durable = scenario.durable_chance >= 1 and not scenario.flushes
        self.doors.append(door)
        self.owners.append(owner)
        if number < scenario.snapshotters:
            owner.alone = False
            other = Door(self.cluster, f"snapshotter{number}", number + 1)
            self.doors.append(other)
            snapshotter = Snapshotter(other, owner, scenario.objects, scenario.blocks)
            self.snapshotters.append(snapshotter)
            snapshotter.start()
        owner.start()

    def _live(self, duration_ns: int) -> None:
        """Time goes on; clients notice now and then that their gateway is gone."""
        end_ns = self.world.now_ns + duration_ns
        while self.world.now_ns < end_ns:
            self.world.run_for(5 * MILLISECOND)
            for door in self.doors:
                door.watch()

    def _calm_down(self) -> None:
        everybody: list[BlockClient | Asking] = [*self.clients, *self.owners, *self.snapshotters]
        for client in everybody:
            client.stopped = True
        try:
            self.world.run_until(lambda: all(client.idle for client in everybody), HEALTH_LIMIT_NS, "answers")
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
                    self.world.run_until(lambda: not door.busy, SECOND, "a read in peace")  # noqa: B023

    def _judge(self) -> None:
        allowed = [*NOT_NOW, *self.scenario.tolerated]
        if not {"home.object_lost", "home.object_unknown"}.isdisjoint(self.cluster.probes()):
            allowed.append(
                Result.EIO
            )  # all current copies were down: nothing is promised but that no old ones are shown
        bad = {result: count for result, count in self.errors.items() if result not in allowed}
        if bad:
            raise Violation(f"clients saw results {bad}")
        self.history.check()
        if self.nemesis.count:
            self.leaked = len(audit_all_but_leaks(self.cluster))
        else:
            audit(self.cluster)
