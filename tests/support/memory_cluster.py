"""A cluster in memory for sheepfs: the doors can be tested without a daemon.

Run as `python -m tests.support.memory_cluster TRANSPORT MOUNTPOINT NAME=SIZE...` it mounts in the foreground.
Environment: `LATENCY_MS` delays every request of a volume as a network would.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterable

from sheepdog.cluster.client.address import Address
from sheepdog.frontends.sheepfs.cluster import Buffer, Extent, NodeSpace, Outcome, ReadDone, VolumeInfo, WriteDone

OBJECT = 4 << 20


class MemoryVolume:
    """A sparse volume. `calls` records what the door asked for; `fail` makes every request fail with this errno."""

    def __init__(self, size: int, latency_s: float = 0.0) -> None:
        self.size = size
        self.latency_s = latency_s
        self.objects: dict[int, bytearray] = {}
        self.calls: list[tuple[str, int, int]] = []
        self.durable_writes = 0
        self.closed = 0
        self.fail = 0
        self.read_only = False
        self.is_lost = False
        self.address: Address | None = None

    async def _arrive(self, what: str, offset: int, length: int) -> None:
        self.calls.append((what, offset, length))
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        self._check(what, offset, length)

    def _check(self, what: str, offset: int, length: int) -> None:
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        if offset < 0 or offset + length > self.size:
            raise AssertionError(f"{what} outside the volume: {offset}+{length}")

    def submit_read(self, offset: int, length: int, done: ReadDone) -> None:
        self.calls.append(("read", offset, length))
        self._answer(lambda: done(None, self._read(offset, length)), lambda failure: done(failure, b""))

    def submit_write(self, offset: int, data: Buffer, durable: bool, done: WriteDone) -> None:
        self.calls.append(("write", offset, len(data)))
        self.durable_writes += durable

        def act() -> None:
            self._write(offset, data)
            done(None)

        self._answer(act, done)

    def _answer(self, act: Callable[[], object], failed: Callable[[OSError], None]) -> None:
        def answer() -> None:
            if self.fail:
                failed(OSError(self.fail, os.strerror(self.fail)))
            else:
                act()

        if self.latency_s:
            asyncio.get_running_loop().call_later(self.latency_s, answer)
        else:
            answer()

    def _read(self, offset: int, length: int) -> bytes:
        self._check("read", offset, length)
        result = bytearray()
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            found = self.objects.get(index)
            result += bytes(part) if found is None else found[start : start + part]
            offset, length = offset + part, length - part
        return bytes(result)

    def _write(self, offset: int, data: Buffer) -> None:
        self._check("write", offset, len(data))
        data = memoryview(data)
        while data:
            index, start = divmod(offset, OBJECT)
            part = min(len(data), OBJECT - start)
            self.objects.setdefault(index, bytearray(OBJECT))[start : start + part] = data[:part]
            offset, data = offset + part, data[part:]

    def plain_read(self, offset: int, length: int) -> None:
        """There is no gateway."""

    async def read(self, offset: int, length: int) -> bytes:
        await self._arrive("read", offset, length)
        return self._read(offset, length)

    async def write(self, offset: int, data: Buffer, durable: bool = False) -> None:
        await self._arrive("write", offset, len(data))
        self.durable_writes += durable
        self._write(offset, data)

    async def flush(self) -> None:
        await self._arrive("flush", 0, 0)

    async def zero(self, offset: int, length: int) -> None:
        await self._arrive("zero", offset, length)
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            if part == OBJECT:
                self.objects.pop(index, None)
            elif index in self.objects:
                self.objects[index][start : start + part] = bytes(part)
            offset, length = offset + part, length - part

    async def resize(self, size: int) -> None:
        await self._arrive("resize", 0, 0)
        self.size = size

    async def refresh(self) -> None:
        await self._arrive("refresh", 0, 0)

    def allocated_bytes(self) -> int:
        return len(self.objects) * OBJECT

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            yield Extent(offset, part, index in self.objects)
            offset, length = offset + part, length - part

    async def move(self, address: Address) -> None:
        self.calls.append(("move", 0, 0))
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        self.address = address

    async def settle(self) -> None:
        await self.flush()

    async def close(self) -> None:
        await self.flush()
        self.closed += 1


class MemoryCluster:
    """Volumes by name, snapshots by (name, id). `down` makes it unreachable."""

    def __init__(self, sizes: dict[str, int], latency_s: float = 0.0) -> None:
        self.address: Address = ("127.0.0.1", 7000)
        self.volumes = {name: MemoryVolume(size, latency_s) for name, size in sizes.items()}
        self.snapshots: dict[tuple[str, int], tuple[str, MemoryVolume]] = {}
        self.copies = dict.fromkeys(sizes, "3")
        self.opened: list[tuple[str, int, bool, Address]] = []
        self.orders: list[tuple[str, ...]] = []
        self.catalogs = 0
        self.down = False
        self.alone: set[str] = set()  # volumes that somebody has for himself

    def _arrive(self) -> None:
        if self.down:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    async def open(self, name: str, snap_id: int, object_cache: bool) -> MemoryVolume:
        self.opened.append((name, snap_id, object_cache, self.address))
        self._arrive()
        try:
            return self.snapshots[name, snap_id][1] if snap_id else self.volumes[name]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    async def open_shared(self, name: str) -> MemoryVolume:
        if name in self.alone:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        volume = await self.open(name, 0, False)
        volume.calls.append(("share", 0, 0))
        return volume

    async def open_exclusive(self, name: str, object_cache: bool) -> MemoryVolume:
        if name in self.alone:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        volume = await self.open(name, 0, object_cache)
        volume.calls.append(("lock", 0, 0))
        return volume

    async def dog(self, *words: str) -> Outcome:
        self._arrive()
        self.orders.append(words)
        match words:
            case ("vdi", "snapshot", "-s", tag, "--", name):
                return self.snapshot(name, tag)
            case ("vdi", "delete", "-s", number, "--", name):
                del self.snapshots[name, int(number)]
            case ("vdi", "delete", "--", name):
                del self.volumes[name]
            case ("vdi", "alter-copy", "-f", "-c", copies, "--", name):
                if int(copies) > 31:
                    return Outcome(1, "", "Invalid number of copies\n")
                self.copies[name] = copies
        return Outcome(0, f"{' '.join(words[:2])} {len(self.orders)}\n", "")

    def snapshot(self, name: str, tag: str) -> Outcome:
        taken = [snap_id for family, snap_id in self.snapshots if family == name]
        if tag and any(self.snapshots[name, snap_id][0] == tag for snap_id in taken):
            return Outcome(3, "", "exists already\n")
        source = self.volumes[name]
        frozen = MemoryVolume(source.size)
        frozen.read_only = True
        frozen.objects = {index: bytearray(content) for index, content in source.objects.items()}
        self.snapshots[name, len(taken) + 1] = tag, frozen
        return Outcome(0, "", "")

    async def catalog(self) -> list[VolumeInfo]:
        self._arrive()
        self.catalogs += 1
        frozen = [
            VolumeInfo(1000 + number, name, snap_id, tag, True, volume.size, number, "3")
            for number, ((name, snap_id), (tag, volume)) in enumerate(self.snapshots.items())
        ]
        working = [
            VolumeInfo(number, name, 100, "", False, volume.size, number, self.copies[name])
            for number, (name, volume) in enumerate(self.volumes.items())
        ]
        return working + frozen

    async def space(self) -> list[NodeSpace]:
        self._arrive()
        return [NodeSpace("127.0.0.1:7000", 1 << 40, 1 << 39)]


def main() -> None:
    """Serve until unmounted; the result of every volume's calls is counted on stdout."""
    from sheepdog.frontends.sheepfs.daemon import Readiness, log_to_stderr
    from sheepdog.frontends.sheepfs.files import Settings
    from sheepdog.frontends.sheepfs.filesystem import FileSystem
    from sheepdog.frontends.sheepfs.main import chosen, serve_until_unmounted
    from sheepdog.frontends.sheepfs.transport import MountOptions

    transport_name, mountpoint, *volumes = sys.argv[1:]
    sizes = {name: int(size) for name, _, size in (text.partition("=") for text in volumes)}
    latency_s = float(os.environ.get("LATENCY_MS", "0")) / 1000

    async def serve() -> None:
        files = FileSystem(MemoryCluster(sizes, latency_s), Settings())
        await serve_until_unmounted(transport, files, Readiness())

    log_to_stderr(debug="SHEEPFS_DEBUG" in os.environ)
    transport = chosen(transport_name)
    transport.mount(MountOptions(mountpoint, "SHEEPFS_DEBUG" in os.environ))
    try:
        asyncio.run(serve())
    finally:
        transport.close()


if __name__ == "__main__":
    main()
