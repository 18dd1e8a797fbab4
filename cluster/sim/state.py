"""The small durable state of a simulated node (`ports.NodeState`): changes become durable in call order."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.ids import EpochRecord
from sheepdog.cluster.core.ports import Done, Proven
from sheepdog.cluster.sim.store import SimDisk
from sheepdog.cluster.sim.world import MICROSECOND, MILLISECOND, Life, World


class SimStateDisk:
    """What is on the platter; outlives the processes."""

    def __init__(self, world: World, name: str, disk: SimDisk) -> None:
        self.disk = disk
        self.random = world.stream(f"state {name}")
        self.wipe()

    def wipe(self) -> None:
        """Another, empty disk."""
        self.config: bytes | None = None
        self.epochs: dict[int, EpochRecord] = {}
        self.proven = Proven()
        self.undo = bytearray()
        self.scrub: bytes | None = None
        self.stale = b""
        self.untold = False  # a disk went, and `proven` does not say so yet (host.known_disks)

    def told(self) -> None:
        self.untold = False

    def forget_untold(self) -> None:
        """A process starts (host.multi_disk.Disks.settle)."""
        if self.untold:
            self.proven = Proven()
            self.untold = False

    def crash(self, power: bool) -> None:
        if power:
            del self.undo[self.random.randint(min(self.disk.undo_durable, len(self.undo)), len(self.undo)) :]
        self.disk.undo_written = len(self.undo)


class SimNodeState:
    """`ports.NodeState` of one process."""

    def __init__(self, disk: SimStateDisk, world: World, life: Life) -> None:
        self._life = life
        self._disk = disk
        self._world = world
        self._ready_ns = 0

    def _change(self, change: Callable[[], None], done: Done) -> None:
        random, world = self._disk.random, self._world
        self._ready_ns = max(self._ready_ns, world.now_ns) + 50 * MICROSECOND + random.randrange(4 * MILLISECOND)

        def written() -> None:
            if self._life.alive:
                change()
                # Mostly on the platter before the process knows it.
                delay_ns = random.randrange(MILLISECOND) if random.random() < 0.5 else 0
                world.after(delay_ns, lambda: self._life.do(self, lambda: done(None)))

        world.after(self._ready_ns - world.now_ns, written)

    def stall(self, duration_ns: int) -> None:
        """The disk takes nothing for so long."""
        self._ready_ns = max(self._ready_ns, self._world.now_ns + duration_ns)

    def save_config(self, config: bytes, done: Done) -> None:
        self._change(lambda: setattr(self._disk, "config", config), done)

    def append_epoch(self, record: EpochRecord, done: Done) -> None:
        self._change(lambda: self._disk.epochs.__setitem__(record.epoch, record), done)

    def drop_epochs(self, last: int, done: Done) -> None:
        def drop() -> None:
            for number in [number for number in self._disk.epochs if number > last]:
                del self._disk.epochs[number]

        self._change(drop, done)

    def clear_epochs(self, done: Done) -> None:
        self._change(self._disk.epochs.clear, done)

    def load_config(self) -> bytes | None:
        return self._disk.config

    def load_epochs(self) -> list[EpochRecord]:
        return [self._disk.epochs[number] for number in sorted(self._disk.epochs)]

    def save_proven(self, proven: Proven, done: Done) -> None:
        self._change(lambda: setattr(self._disk, "proven", proven), done)

    def load_proven(self) -> Proven:
        return self._disk.proven

    def save_scrub(self, data: bytes, done: Done) -> None:
        self._change(lambda: setattr(self._disk, "scrub", data), done)

    def load_scrub(self) -> bytes | None:
        return self._disk.scrub

    def save_stale(self, data: bytes, done: Done) -> None:
        self._change(lambda: setattr(self._disk, "stale", data), done)

    def load_stale(self) -> bytes:
        return self._disk.stale

    def append_undo(self, record: bytes) -> None:
        if self._life.alive:
            self._disk.undo += record
            self._disk.disk.undo_written = len(self._disk.undo)

    def replace_undo(self, records: bytes) -> None:
        if self._life.alive:
            self._disk.undo = bytearray(records)
            self._disk.disk.undo_written = self._disk.disk.undo_durable = len(records)

    def load_undo(self) -> list[bytes]:
        return [bytes(self._disk.undo)]
