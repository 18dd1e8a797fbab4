"""A cluster in memory for sheepfs: the doors can be tested without a daemon.

Run as `python -m tests.support.memory_cluster TRANSPORT MOUNTPOINT NAME=SIZE...` it mounts in the foreground.
Environment: `LATENCY_MS` delays every request of a volume as a network would.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Sequence

from sheepdog.cluster.client.address import Address

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

    async def _arrive(self, what: str, offset: int, length: int) -> None:
        self.calls.append((what, offset, length))
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        if offset < 0 or offset + length > self.size:
            raise AssertionError(f"{what} outside the volume: {offset}+{length}")

    async def read(self, offset: int, length: int) -> bytes:
        await self._arrive("read", offset, length)
        result = bytearray()
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            found = self.objects.get(index)
            result += bytes(part) if found is None else found[start : start + part]
            offset, length = offset + part, length - part
        return bytes(result)

    async def write(self, offset: int, data: bytes | memoryview, durable: bool) -> None:
        await self._arrive("write", offset, len(data))
        self.durable_writes += durable
        data = memoryview(data)
        while data:
            index, start = divmod(offset, OBJECT)
            part = min(len(data), OBJECT - start)
            self.objects.setdefault(index, bytearray(OBJECT))[start : start + part] = data[:part]
            offset, data = offset + part, data[part:]

    async def flush(self) -> None:
        await self._arrive("flush", 0, 0)

    async def discard(self, offset: int, length: int) -> None:
        await self._arrive("discard", offset, length)
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            if part == OBJECT:
                self.objects.pop(index, None)
            elif index in self.objects:
                self.objects[index][start : start + part] = bytes(part)
            offset, length = offset + part, length - part

    async def extents(self, offset: int, length: int) -> Sequence[tuple[int, int, bool]]:
        await self._arrive("extents", offset, length)
        found: list[tuple[int, int, bool]] = []
        while length:
            index, start = divmod(offset, OBJECT)
            part = min(length, OBJECT - start)
            found.append((offset, part, index in self.objects))
            offset, length = offset + part, length - part
        return found

    def allocated_bytes(self) -> int:
        return len(self.objects) * OBJECT

    async def close(self) -> None:
        self.closed += 1


class MemoryCluster:
    """Volumes by name. `down` makes it unreachable."""

    def __init__(self, sizes: dict[str, int], latency_s: float = 0.0) -> None:
        self.address: Address = ("127.0.0.1", 7000)
        self.volumes = {name: MemoryVolume(size, latency_s) for name, size in sizes.items()}
        self.opened: list[tuple[str, str, bool, Address]] = []
        self.down = False
        self.reports = 0

    async def open(self, name: str, tag: str, object_cache: bool) -> MemoryVolume:
        self.opened.append((name, tag, object_cache, self.address))
        if self.down:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        try:
            return self.volumes[name]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    async def report(self, noun: str, verb: str) -> str:
        self.reports += 1
        return "" if self.down else f"{noun} {verb} {self.reports}\n"


def main() -> None:
    """Serve until unmounted; the result of every volume's calls is counted on stdout."""
    from sheepdog.frontends.sheepfs.daemon import log_to_stderr
    from sheepdog.frontends.sheepfs.filesystem import FileSystem
    from sheepdog.frontends.sheepfs.main import chosen
    from sheepdog.frontends.sheepfs.transport import MountOptions
    from sheepdog.frontends.sheepfs.volumes import Settings

    transport_name, mountpoint, *volumes = sys.argv[1:]
    sizes = {name: int(size) for name, _, size in (text.partition("=") for text in volumes)}
    latency_s = float(os.environ.get("LATENCY_MS", "0")) / 1000

    async def serve() -> None:
        await transport.serve(FileSystem(MemoryCluster(sizes, latency_s), Settings()))

    log_to_stderr(debug=False)
    transport = chosen(transport_name)
    transport.mount(MountOptions(mountpoint))
    try:
        asyncio.run(serve())
    finally:
        transport.close()


if __name__ == "__main__":
    main()
