"""The one who breaks things: processes, power, links, disks, at random moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND


@dataclass(slots=True)
class Faults:
    """How often what happens: weights of the kinds of faults, and the mean time between two."""

    mean_ns: int = 250 * MILLISECOND
    kill: float = 1.0  # kill -9 of one sheep
    power: float = 0.0  # power loss of one node
    everybody: float = 0.0  # kill -9 of all, cold start in any order
    blackout: float = 0.0  # power loss of all
    link: float = 0.0  # one link breaks
    leave: float = 0.0  # orderly stop
    disk: float = 0.0  # a node loses one of its disks, while all nodes are whole
    max_down: int = 2  # nodes that are down at a time, except in a full stop
    max_outage_ns: int = 600 * MILLISECOND


class Nemesis:
    """Acts until `stop`; then everything that is down is started again."""

    def __init__(self, cluster: SimCluster, faults: Faults) -> None:
        self.count = 0
        self.stopped = False
        self._cluster = cluster
        self._faults = faults
        self._world = cluster.world
        self._random = cluster.world.stream("nemesis")
        kinds: list[tuple[float, Callable[[], None]]] = [
            (faults.kill, lambda: self._kill(False)),
            (faults.power, lambda: self._kill(True)),
            (faults.everybody, lambda: self._everybody(False)),
            (faults.blackout, lambda: self._everybody(True)),
            (faults.link, self._break_link),
            (faults.leave, self._leave),
            (faults.disk, self._lose_disk),
        ]
        self._kinds = [kind for kind in kinds if kind[0]]

    def start(self) -> None:
        self._later()

    def stop(self) -> None:
        """No more faults; all machines run again soon."""
        self.stopped = True
        self._cluster.start_all()

    def _later(self) -> None:
        delay_ns = int(self._random.expovariate(1.0) * self._faults.mean_ns)
        self._world.after(delay_ns, self._act)

    def _act(self) -> None:
        if self.stopped or not self._kinds:
            return
        weights = [weight for weight, _ in self._kinds]
        self._random.choices([act for _, act in self._kinds], weights)[0]()
        self._later()

    def _victim(self) -> Machine | None:
        up = [machine for machine in self._cluster.machines if machine.up]
        down = len(self._cluster.machines) - len(up)
        return self._random.choice(up) if up and down < self._faults.max_down else None

    def _restart_later(self, machine: Machine) -> None:
        """Mostly soon, sometimes before anybody has noticed."""
        chance = self._random.random()
        delay_ns = int(chance * chance * self._faults.max_outage_ns)
        self._world.after(delay_ns, machine.start)

    def _kill(self, power: bool) -> None:
        machine = self._victim()
        if machine is not None:
            self.count += 1
            machine.kill(power)
            self._restart_later(machine)

    def _everybody(self, power: bool) -> None:
        self.count += 1
        for machine in self._cluster.machines:
            machine.kill(power)
            self._restart_later(machine)

    def _break_link(self) -> None:
        links = self._cluster.fabric.links()
        if links:
            self.count += 1
            pair = self._random.choice(links)
            outage_ns = self._random.randrange(50 * MILLISECOND) if self._random.random() < 0.5 else 0
            self._world.say(f"link {pair[0]} - {pair[1]} breaks for {outage_ns / 1e6:.1f} ms")
            self._cluster.fabric.break_link(pair, outage_ns)

    def _lose_disk(self) -> None:
        machines = self._cluster.machines
        whole = all(
            machine.serves()
            and machine.state.settled == machine.node.context.epoch
            and not machine.node.replica.missing
            for machine in machines
        )
        if whole:
            self.count += 1
            self._random.choice(machines).lose_disk()

    def _leave(self) -> None:
        machine = self._victim()
        if machine is not None and machine.process is not None:
            self.count += 1
            process = machine.process
            self._world.say(f"{machine.name} leaves")

            def gone() -> None:
                if process.alive:
                    process.end(leave=True)
                    self._restart_later(machine)

            process.node.stop(gone)
