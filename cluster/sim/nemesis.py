"""The one who breaks things: processes, power, links, the membership engine, disks; at random moments or aimed.

It stays within what the system promises to stand: copies are destroyed only while all others are current, and nodes
that are down or stopped at a time are counted. Each fault has a stream of chance of its own, so that one can be left
out (`Faults.skip`) and the others stay as they were: that is how a failing seed is made small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sheepdog.cluster.core.errors import NoSpace
from sheepdog.cluster.core.ids import NodeId, ObjectId, plain_oid
from sheepdog.cluster.core.messages import Kind
from sheepdog.cluster.sim.cluster import Machine, SimCluster
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

MAX_NEW_MACHINES = 2
_TOLD_NS = 5 * MILLISECOND  # after so long a node's state says that it has lost a disk
AIMED = (
    Kind.FLUSH,
    Kind.APPLY,
    Kind.ANSWER,
    Kind.SUBMIT,
    Kind.INVENTORY,
    Kind.SETTLE,
    Kind.PULL,
    Kind.FETCH,
    Kind.DROP,
    Kind.ROLLBACK,
    Kind.COMPLETE,
    Kind.DRAIN,
)


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
    stop: float = 0.0  # SIGSTOP, and SIGCONT later
    hold: float = 0.0  # one direction between two nodes, or all of one node's, lets nothing through for a while
    slow: float = 0.0  # one direction, or a disk, takes long
    cut_off: float = 0.0  # a node does not reach the membership engine, perhaps not the others either
    aim: float = 0.0  # a message of a certain kind is lost with its link, or its sender or receiver dies over it
    full: float = 0.0  # a disk is full for a while
    rot: float = 0.0  # a block changes by itself
    new_disk: float = 0.0  # a node loses all that it stored, or one of its disks, while it is down
    join: float = 0.0  # a new node
    disk: float = 0.0  # a node loses one of its disks, while all nodes are whole
    max_down: int = 2  # nodes that are down or stopped at a time, except in a full stop
    max_outage_ns: int = 600 * MILLISECOND
    max_stop_ns: int = 600 * MILLISECOND  # of stops, partitions and slow spells
    spare_gateways: bool = False  # nothing happens to nodes that store nothing
    unflushed: int = 0  # not all writes are durable, so power of one fails only while all copies are current, and until
    # they are again so many may be lost in all: the one without power has lost what was not flushed
    skip: tuple[int, ...] = ()  # faults that do not happen, by number


class Nemesis:
    """Acts until `stop`; then everything that is down is started again. `on_blackout`: power failed everywhere."""

    def __init__(self, cluster: SimCluster, faults: Faults, on_blackout: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self.counts: dict[str, int] = {}  # by kind
        self.stopped = False
        self._cluster = cluster
        self._fabric = cluster.fabric
        self._faults = faults
        self._on_blackout = on_blackout
        self._world = cluster.world
        self._schedule = cluster.world.stream("nemesis")
        self._random: Random = self._schedule  # of the present fault
        self.number = 0  # faults chosen so far, also those that were skipped
        self._weak: dict[str, None] = {}  # lost power, and perhaps what was not flushed; by name
        self._rotten: dict[ObjectId, Machine] = {}  # where the one bad copy of an object is
        self._born = len(cluster.machines)
        acts: dict[str, Callable[[], bool]] = {
            "kill": lambda: self._kill(False),
            "power": lambda: self._kill(True),
            "everybody": lambda: self._everybody(False),
            "blackout": lambda: self._everybody(True),
            "link": self._break_link,
            "leave": self._leave,
            "stop": self._stop,
            "hold": self._hold,
            "slow": self._slow,
            "cut_off": self._cut_off,
            "aim": self._aim,
            "full": self._fill,
            "rot": self._rot,
            "new_disk": self._new_disk,
            "join": self._join,
            "disk": self._lose_disk,
        }
        self._acts = {name: act for name, act in acts.items() if getattr(faults, name)}

    def start(self) -> None:
        self._later()

    def stop(self) -> None:
        """No more faults; all machines run again soon."""
        self.stopped = True
        self._fabric.trap = None
        for machine in self._cluster.machines:
            machine.disk.heal()
        self._cluster.start_all()

    def _later(self) -> None:
        delay_ns = int(self._schedule.expovariate(1.0) * self._faults.mean_ns)
        self._world.after(delay_ns, self._act)

    def _act(self) -> None:
        if self.stopped or not self._acts:
            return
        weights = [getattr(self._faults, name) for name in self._acts]
        name = self._schedule.choices(list(self._acts), weights)[0]
        number, self.number = self.number, self.number + 1
        if number not in self._faults.skip:
            self._random = self._world.stream(f"fault {number}")
            if self._acts[name]():
                self.count += 1
                self.counts[name] = self.counts.get(name, 0) + 1
        self._later()

    # -- processes and power ---------------------------------------------------------------------------------------

    def _victim(self) -> Machine | None:
        up = [m for m in self._cluster.machines if m.process is not None and not m.process.life.stopped]
        down = len(self._cluster.machines) - len(up)
        if not self._may_lose_one_more():
            return None
        up = [machine for machine in up if machine.vnodes or not self._faults.spare_gateways]
        return self._random.choice(up) if up and down < self._faults.max_down else None

    def _may_lose_one_more(self) -> bool:
        """False while a node that lost power needs the others to bring it up to date."""
        if self._weak and not self._cluster.unsettled():
            self._weak = {}
        lost = {machine.name for machine in self._cluster.machines if not machine.up} | self._weak.keys()
        return not self._weak or len(lost) < self._faults.unflushed

    def _restart_later(self, machine: Machine, random: Random | None = None) -> None:
        """Mostly soon, sometimes before anybody has noticed."""
        chance = (random or self._random).random()
        delay_ns = int(chance * chance * self._faults.max_outage_ns)
        self._world.after(delay_ns, machine.start)

    def _kill(self, power: bool) -> bool:
        if power and self._faults.unflushed and self._cluster.unsettled():
            return False
        machine = self._victim()
        if machine is None:
            return False
        if power and self._faults.unflushed:
            self._weak[machine.name] = None
        machine.kill(power)
        self._restart_later(machine)
        return True

    def _everybody(self, power: bool) -> bool:
        for machine in self._cluster.machines:
            machine.kill(power)
            self._restart_later(machine)
        if self._random.random() < 0.3:  # somebody is missing for long: the others have to wait
            late = self._random.choice(self._cluster.machines)
            late.hold_off(self._random.randrange(2 * SECOND))
        if power:
            self._on_blackout()
        return True

    def _leave(self) -> bool:
        machine, random = self._victim(), self._random
        if machine is None or machine.process is None:
            return False
        process = machine.process
        self._world.say(f"{machine.name} leaves")

        def gone() -> None:
            if process.alive:
                process.end(leave=True)
                self._restart_later(machine, random)

        process.node.stop(gone)
        return True

    def _spell_ns(self) -> int:
        """How long something takes that passes by itself: mostly short."""
        chance = self._random.random()
        return MILLISECOND + int(chance * chance * self._faults.max_stop_ns)

    def _stop(self) -> bool:
        machine = self._victim()
        if machine is not None:
            machine.pause(self._spell_ns())
        return machine is not None

    def _join(self) -> bool:
        if len(self._cluster.machines) - self._born >= MAX_NEW_MACHINES:
            return False
        self._cluster.add_machine().start()
        return True

    # -- links and the engine --------------------------------------------------------------------------------------

    def _break_link(self) -> bool:
        links = self._fabric.links()
        if not links:
            return False
        pair = self._random.choice(links)
        outage_ns = self._random.randrange(50 * MILLISECOND) if self._random.random() < 0.5 else 0
        self._world.say(f"link {pair[0]} - {pair[1]} breaks for {outage_ns / 1e6:.1f} ms")
        self._fabric.break_link(pair, outage_ns)
        return True

    def _ways(self) -> list[tuple[NodeId, NodeId]]:
        """One direction, both of two nodes, or all from or to one node."""
        ids = [machine.id for machine in self._cluster.machines]
        one = self._random.choice(ids)
        others = [other for other in ids if other != one]
        if not others:
            return []
        chance = self._random.random()
        if chance < 0.6:
            others = [self._random.choice(others)]
        out, back = [(one, other) for other in others], [(other, one) for other in others]
        return [out, back, out + back][self._random.randrange(3)]

    def _hold(self) -> bool:
        ways, duration_ns = self._ways(), self._spell_ns()
        for way in ways:
            self._world.say(f"nothing gets from {way[0]} to {way[1]} for {duration_ns / 1e6:.1f} ms")
            self._fabric.hold(way, duration_ns)
        if ways and self._random.random() < 0.3:  # TCP gives up while it lasts
            self._fabric.break_link((min(ways[0]), max(ways[0])), duration_ns)
        return bool(ways)

    def _slow(self) -> bool:
        duration_ns = self._spell_ns()
        if self._random.random() < 0.5:
            machine = self._random.choice(self._cluster.machines)
            machine.disk.slow = self._random.randrange(5, 50)
            self._world.after(duration_ns, lambda: setattr(machine.disk, "slow", 1))
            return True
        ways = self._ways()
        for way in ways:
            self._fabric.slow_down(way, duration_ns, self._random.randrange(5, 100))
        return bool(ways)

    def _cut_off(self) -> bool:
        machine = self._victim()
        if machine is None or machine.process is None:
            return False
        duration_ns = self._spell_ns()
        self._world.say(f"{machine.name} does not reach the engine for {duration_ns / 1e6:.1f} ms")
        machine.process.attachment.cut_off(duration_ns)
        if self._random.random() < 0.5:
            for other in self._cluster.machines:
                if other is not machine:
                    self._fabric.hold((machine.id, other.id), duration_ns)
                    self._fabric.hold((other.id, machine.id), duration_ns)
        return True

    def _aim(self) -> bool:
        kind, left = self._random.choice(AIMED), self._random.randrange(1, 4)
        what, random = self._random.choice(("link", "sender", "receiver")), self._random

        def trap(sender: NodeId, receiver: NodeId, seen: int) -> None:
            nonlocal left
            if seen != kind:
                return
            left -= 1
            if left:
                return
            self._fabric.trap = None
            if what == "link":
                self._fabric.break_link((min(sender, receiver), max(sender, receiver)))
            else:
                machine = self._cluster.machine(sender if what == "sender" else receiver)
                self._world.after(0, lambda: self._shoot(machine, random))

        self._fabric.trap = trap
        return True

    def _shoot(self, machine: Machine, random: Random) -> None:
        down = sum(not other.up for other in self._cluster.machines)
        if not self.stopped and machine.up and down < self._faults.max_down and self._may_lose_one_more():
            machine.kill()
            self._restart_later(machine, random)

    # -- disks -----------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        if any(machine.disk.fault for machine in self._cluster.machines):
            return False
        disk = self._random.choice(self._cluster.machines).disk
        disk.fault, disk.fault_chance = NoSpace, self._random.choice((0.2, 1.0))
        self._world.after(self._spell_ns(), disk.heal)
        return True

    def _rot(self) -> bool:
        """Only one copy of an object is ever bad, and while all are current."""
        if self._cluster.unsettled():
            return False
        machine = self._random.choice(self._cluster.machines)
        good = [
            (oid, copy)
            for oid, copy in machine.disk.copies().items()
            if copy.blocks and self._rotten.get(plain_oid(oid), machine) is machine
        ]
        if not good:
            return False
        oid, copy = self._random.choice(good)
        block = self._random.choice(list(copy.blocks))
        self._world.say(f"{machine.name}: block {block} of {oid:x} rots")
        self._rotten[plain_oid(oid)] = machine
        machine.disk.rot(oid, block)
        return True

    @property
    def rotten(self) -> dict[ObjectId, Machine]:
        """The objects of which a block went bad, and where."""
        return self._rotten

    def _lose_disk(self) -> bool:
        machines = self._cluster.machines
        if self._cluster.unsettled() or any(machine.node.replica.missing for machine in machines):
            return False
        machine, random = self._random.choice(machines), self._random
        machine.lose_disk()
        if random.random() < 0.5:
            self._world.after(random.randrange(_TOLD_NS), lambda: self._die_of_disk(machine, random))
        return True

    def _die_of_disk(self, machine: Machine, random: Random) -> None:
        """Perhaps before its state says what it has lost."""
        if self.stopped or not machine.up:
            return
        machine.kill()
        if random.random() < 0.5:
            machine.disk.take_away_lost()
        self._restart_later(machine, random)

    def _new_disk(self) -> bool:
        storing = [machine for machine in self._cluster.machines if machine.vnodes]
        if self._cluster.unsettled() or len(storing) < 2:
            return False
        machine = self._random.choice(storing)
        machine.kill(power=True)
        if machine.disk.random.random() < 0.5:
            machine.replace_disk()
        else:
            machine.lose_disk_while_down()
        self._restart_later(machine)
        return True
