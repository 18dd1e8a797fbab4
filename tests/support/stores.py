"""A store driven by a queue instead of an event loop: every call waits for its answer."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.sim_disk import SimDisk, SimWorkers

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import ObjectId, Version, Vid
from sheepdog.cluster.core.ports import Buffer, Clock, Done, Timer
from sheepdog.cluster.host.disk import Disk, RealDisk
from sheepdog.cluster.host.journal import WrittenBefore
from sheepdog.cluster.host.object_store import ObjectStore
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.workers import ThreadWorkers, Workers

JOURNAL_BYTES = 8 << 20
WAIT_S = 20  # for one answer; a lost callback fails the test instead of hanging it


class Driver:
    """Waits for callbacks; `call_soon` is what a loop would offer. With `workers` there are no threads."""

    def __init__(self, workers: SimWorkers | None = None) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.call_soon = self._calls.put
        self.sim_workers = workers

    def step(self) -> None:
        if self.sim_workers is None:
            self._calls.get(timeout=WAIT_S)()
            return
        if self._calls.empty() and not self.sim_workers.step():
            raise TimeoutError("nothing happens any more")
        if not self._calls.empty():
            self._calls.get()()

    def wait(self, start: Callable[[Done], object]) -> StoreError | None:
        """Starts something with a callback and returns what the callback got."""
        results: list[StoreError | None] = []
        start(results.append)
        while not results:
            self.step()
        return results[0]

    def settle(self) -> None:
        """Runs what has arrived."""
        while not self._calls.empty():
            self.step()


class _Timer:
    def cancel(self) -> None:
        pass


class StoppedClock(Clock):
    """Time stands still: timers fire when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def now_ns(self) -> int:
        return 0

    def wall_ns(self) -> int:
        return 0

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        self.calls.append(call)
        return _Timer()

    def fire(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class StoreDriver(Driver):
    """An object store whose failures are raised. META is `path`; its only disk is path/obj unless others are named."""

    def __init__(
        self,
        path: str,
        nosync: bool = False,
        disk: Disk | None = None,
        disks: Sequence[str] = (),
        options: StoreOptions | None = None,
        seed: int = 0,
        before: WrittenBefore | None = None,
        forget_proven: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.clock = StoppedClock()
        self.logged: list[str] = []
        self.failed: list[str] = []
        self.disk = disk or RealDisk()
        self.workers: Workers
        if isinstance(self.disk, SimDisk):
            self.workers = self.sim_workers = SimWorkers(self.call_soon, self.random)
        else:
            self.workers = ThreadWorkers(self.call_soon)
        self.store = ObjectStore(
            path,
            disks or [f"{path}/obj"],
            self.disk,
            self.workers,
            self.clock,
            self.call_soon,
            lambda level, text: self.logged.append(text),
            lambda path, text, last: self.failed.append(text),
            options or StoreOptions(nosync=nosync, journal_bytes=JOURNAL_BYTES),
            self.random.randbytes,
            before,
            forget_proven,
        )
        self.store.open()

    def done(self, start: Callable[[Done], object]) -> None:
        """The whole turn: what is acknowledged is applied after its answer."""
        error = self.wait(start)
        self.settle()
        if error is not None:
            raise error

    def create(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool = False
    ) -> None:
        self.done(lambda done: self.store.create(oid, size, offset, data, version, durable, done))

    def write(self, oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool = False) -> None:
        self.done(lambda done: self.store.write(oid, offset, data, version, durable, done))

    def punch(self, oid: ObjectId, offset: int, length: int, version: Version, durable: bool = False) -> None:
        self.done(lambda done: self.store.punch(oid, offset, length, version, durable, done))

    def remove(self, oid: ObjectId) -> None:
        self.done(lambda done: self.store.remove(oid, done))

    def flush(self, vids: frozenset[Vid] | None = None) -> None:
        self.done(lambda done: self.store.flush(vids, done))

    def read(self, oid: ObjectId, offset: int, length: int) -> bytes:
        results: list[Buffer | StoreError] = []
        self.store.read(oid, offset, length, results.append)
        while not results:
            self.step()
        if isinstance(results[0], StoreError):
            raise results[0]
        return bytes(results[0])

    def restore_write(self, oid: ObjectId, offset: int, data: Buffer) -> None:
        self.done(lambda done: self.store.restore_write(oid, offset, data, done))

    def restore_finish(self, oid: ObjectId, version: Version) -> None:
        self.done(lambda done: self.store.restore_finish(oid, version, done))

    def close(self) -> None:
        """Orderly end."""
        self.wait(lambda done: self.store.close(lambda: done(None)))
        self.workers.stop()

    def crash(self) -> None:
        """Ends without a word, as kill -9 would: threads finish their call, nothing else happens."""
        self.workers.stop()


def flip(path: Path, offset: int) -> None:
    """One bit of the file becomes another."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
