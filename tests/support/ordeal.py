"""A nemesis that takes what copies hold at any moment: while others are being made, and several at a time.

The other one (cluster.sim.nemesis) takes a copy only while all are current. Here a machine that was away, or of which
the disk has lost or refused something, is *weak* until it has everything again; no more are so than may be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from sheepdog.cluster.core.errors import DiskError, NoSpace
from sheepdog.cluster.core.ids import NodeId
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.nemesis import AIMED, Faults, Nemesis
from sheepdog.cluster.sim.world import MILLISECOND

_HEALED_NS = 600 * MILLISECOND  # the longest spell of a disk that refuses writes


@dataclass(slots=True)
class Trials(Faults):
    """`unflushed`: how many machines may be weak or away at a time, but in a full stop."""

    late: float = 0.0  # a disk takes writes and says later that they have failed
    shot: float = 0.0  # power of the sender or receiver of some message, or of both, fails over it
    relief: float = 0.0  # all disks are well again


class Ordeal(Nemesis):
    """Acts of the same names are those of the nemesis, done when it would not."""

    def __init__(self, cluster: SimCluster, faults: Trials, on_blackout: Callable[[], None]) -> None:
        super().__init__(cluster, faults, on_blackout)
        more: dict[str, Callable[[], bool]] = {"late": self._fail_late, "shot": self._aim_power, "relief": self._relief}
        self._acts |= {name: act for name, act in more.items() if getattr(faults, name)}

    # -- who may be harmed -----------------------------------------------------------------------------------------

    def _forget_weak(self) -> None:
        """Those that have everything again count no more."""
        machines = self._cluster.machines
        if any(machine.disk.fault or machine.disk.late for machine in machines) or self._cluster.unsettled():
            return
        if not any(machine.node.replica.missing for machine in machines):
            rotten = {machine.name for machine in machines if any(one.rotten for one in machine.disk.copies().values())}
            self._weak = {name: None for name in self._weak if name in rotten}

    def _harmed(self) -> dict[str, None]:
        away = [machine.name for machine in self._cluster.machines if machine.vnodes and not _runs(machine)]
        return self._weak | dict.fromkeys(away)

    def _may_lose_one_more(self) -> bool:
        self._forget_weak()
        return len(self._harmed()) < self._faults.unflushed

    def _may_harm(self, machine: Machine) -> bool:
        return bool(machine.vnodes) and len(self._harmed() | {machine.name: None}) <= self._faults.unflushed

    def _victim(self) -> Machine | None:
        machine = super()._victim()
        if machine is not None:
            self._weak[machine.name] = None  # what is written while it is away it lacks for some time
        return machine

    def _restart_later(self, machine: Machine, random: Random | None = None) -> None:
        self._weak[machine.name] = None
        super()._restart_later(machine, random)

    def _victims(self) -> list[Machine]:
        """Machines that may be weak from now on, and are so; perhaps none."""
        self._forget_weak()
        found = []
        for machine in self._random.sample(self._cluster.machines, self._random.choice((1, 1, 2, 3))):
            if self._may_harm(machine):
                self._weak[machine.name] = None
                found.append(machine)
        if found:
            self._world.say(f"weak: {', '.join(self._weak)}")
        return found

    # -- power -----------------------------------------------------------------------------------------------------

    def _kill(self, power: bool) -> bool:
        if not power:
            return super()._kill(False)
        victims = self._victims()
        for machine in victims:
            machine.kill(power=True)
            self._restart_later(machine)
        return bool(victims)

    def _everybody(self, power: bool) -> bool:
        """Of some it may be the power that fails. Who ends together with all others lacks nothing."""
        if not power:
            for machine in self._victims():
                machine.kill(power=True)
        weak = dict(self._weak)
        super()._everybody(power)
        self._weak = weak
        return True

    def _aim_power(self) -> bool:
        kind, left, what = self._random.choice(AIMED), self._random.randrange(1, 5), self._random.randrange(3)
        random = self._random

        def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
            nonlocal left
            left -= seen == kind
            if not left:
                self._fabric.trap = None
                ends = [[sender], [receiver], [sender, receiver]][what]
                self._world.after(0, partial(self._shoot_down, [self._cluster.machine(node) for node in ends], random))

        self._fabric.trap = trap
        return True

    def _shoot_down(self, machines: list[Machine], random: Random) -> None:
        self._forget_weak()
        for machine in machines:
            if not self.stopped and self._may_harm(machine):
                machine.kill(power=True)
                self._restart_later(machine, random)

    # -- disks -----------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        victims = self._victims()
        for machine in victims:
            machine.disk.fault = self._random.choice((NoSpace, NoSpace, DiskError))
            machine.disk.fault_chance = self._random.choice((0.1, 0.5, 1.0))
            self._heal_later(machine)
        return bool(victims)

    def _fail_late(self) -> bool:
        victims = self._victims()
        for machine in victims:
            machine.disk.late = self._random.choice((NoSpace, DiskError))
            machine.disk.late_chance = self._random.choice((0.05, 0.3, 1.0))
            self._heal_later(machine)
        return bool(victims)

    def _heal_later(self, machine: Machine) -> None:
        self._world.after(int(self._random.random() ** 2 * _HEALED_NS), machine.disk.heal)

    def _relief(self) -> bool:
        for machine in self._cluster.machines:
            machine.disk.heal()
        return True

    def _rot(self) -> bool:
        victims = self._victims()
        for machine in victims:
            blocks = [(oid, block) for oid, copy in machine.disk.copies().items() for block in copy.blocks]
            for oid, block in self._random.sample(blocks, min(len(blocks), self._random.choice((1, 3)))):
                machine.disk.rot(oid, block)
        return bool(victims)

    def _lose_disk(self) -> bool:
        victims, random = self._victims(), self._random
        for machine in victims:
            if not machine.up:
                machine.lose_disk_while_down()
                continue
            machine.lose_disk()
            if random.random() < 0.5:
                self._world.after(random.randrange(5 * MILLISECOND), partial(self._die_of_disk, machine, random))
        return bool(victims)

    def _new_disk(self) -> bool:
        victims = self._victims()
        for machine in victims:
            machine.kill(power=True)
            if self._random.random() < 0.5:
                machine.replace_disk()
            else:
                machine.lose_disk_while_down()
            self._restart_later(machine)
        return bool(victims)


def _runs(machine: Machine) -> bool:
    return machine.process is not None and not machine.process.life.stopped and machine.serves()
