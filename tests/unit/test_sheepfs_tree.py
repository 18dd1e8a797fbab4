"""The tree of cli.md 3.1 and the rules of 3.2 over volumes in memory: no kernel, no daemon."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable

import pytest
from tests.support.memory_cluster import OBJECT, MemoryCluster

from sheepdog.frontends.sheepfs.files import Settings
from sheepdog.frontends.sheepfs.filesystem import FileSystem
from sheepdog.frontends.sheepfs.transport import Attributes
from sheepdog.frontends.sheepfs.tree import ROOT_INODE

SIZE = 3 * OBJECT + 1000


class Mount:
    """A file system used by paths, as the kernel would use it."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster({"web": SIZE, "db": OBJECT})
        self.settings = Settings()
        self.files = FileSystem(self.cluster, self.settings)

    def find(self, path: str) -> Attributes:
        """Of what needs no asking."""
        found = self.files.lookup_now(ROOT_INODE, b".")
        for part in path.split("/"):
            assert found is not None
            found = self.files.lookup_now(found.inode, part.encode())
        assert found is not None
        return found

    async def walk(self, path: str) -> Attributes:
        found = await self.files.lookup(ROOT_INODE, b".")
        for part in path.split("/"):
            found = await self.files.lookup(found.inode, part.encode())
        return found

    async def stat(self, path: str) -> Attributes:
        return await self.files.attributes((await self.walk(path)).inode)

    async def names(self, path: str) -> list[str]:
        handle = await self.files.open_directory((await self.walk(path)).inode if path else ROOT_INODE)
        listed = [entry.name.decode() for entry in self.files.listing(handle, 0)]
        self.files.close_directory(handle)
        return listed

    async def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return (await self.files.open((await self.walk(path)).inode, flags)).handle

    async def read(self, path: str, offset: int = 0, length: int = 1 << 20) -> bytes:
        handle = await self.open(path)
        try:
            return bytes(await self.files.file(handle).read(offset, length))
        finally:
            self.files.release(handle)

    async def write(self, path: str, text: str | bytes, offset: int = 0, flags: int = os.O_RDWR) -> int:
        handle = await self.open(path, flags)
        try:
            data = text.encode() if isinstance(text, str) else text
            return await self.files.file(handle).write(offset, data)
        finally:
            self.files.release(handle)


Scenario = Callable[[Mount], Awaitable[None]]


def play(scenario: Scenario) -> None:
    async def main() -> None:
        await scenario(Mount())

    asyncio.run(main())


def failure(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


async def refused(code: int, request: Awaitable[object]) -> None:
    with pytest.raises(OSError) as caught:
        await request
    assert caught.value.errno == code, os.strerror(caught.value.errno or 0)


def test_the_tree_has_the_names_kinds_and_modes_of_old() -> None:
    async def scenario(mount: Mount) -> None:
        assert await mount.names("") == ["cluster", "node", "vdi", "volume", "config", "snapshot", "stat"]
        assert await mount.names("cluster") == ["info"]
        assert await mount.names("node") == ["info", "list"]
        assert await mount.names("vdi") == ["list", "mount", "lock", "share", "unmount", "volume"]
        assert await mount.names("config") == ["page_cache", "object_cache", "sheep_info"]
        assert await mount.names("volume") == []
        for directory in ("cluster", "node", "vdi", "volume", "config"):
            assert mount.find(directory).mode == stat.S_IFDIR | 0o755
        for file in ("cluster/info", "vdi/mount", "config/sheep_info"):
            assert mount.find(file).mode == stat.S_IFREG | 0o644
        link = mount.find("vdi/volume")
        assert stat.S_ISLNK(link.mode)
        assert mount.files.readlink(link.inode) == b"../volume"

    play(scenario)


def test_inode_numbers_are_stable_distinct_and_never_reused() -> None:
    async def scenario(mount: Mount) -> None:
        fixed = [mount.find(path).inode for path in ("cluster", "cluster/info", "node", "vdi/mount", "config")]
        assert len(set(fixed)) == len(fixed)
        await mount.write("vdi/mount", "web")
        first = mount.find("volume/web").inode
        await mount.write("vdi/unmount", "web")
        await refused(errno.ENOENT, mount.files.attributes(first))
        await mount.write("vdi/mount", "web")
        assert mount.find("volume/web").inode != first

    play(scenario)


def test_status_files_are_made_anew_for_each_open_and_keep_their_text_while_open() -> None:
    async def scenario(mount: Mount) -> None:
        handle = await mount.open("vdi/list")
        first = await mount.files.file(handle).read(0, 100)
        assert first == b"vdi list 1\n"
        assert await mount.read("vdi/list") == b"vdi list 2\n"
        assert await mount.files.file(handle).read(4, 4) == b"list"
        assert await mount.files.file(handle).read(100, 4) == b""
        assert (await mount.stat("vdi/list")).size == len(b"vdi list 2\n")
        mount.cluster.down = True
        assert await mount.read("node/info") == b""

    play(scenario)


def test_status_files_refuse_writers() -> None:
    async def scenario(mount: Mount) -> None:
        for path in ("cluster/info", "node/info", "node/list", "vdi/list"):
            await refused(errno.EIO, mount.write(path, "x\n"))

    play(scenario)


def test_mounting_shows_the_volume_and_unmounting_takes_it_away() -> None:
    async def scenario(mount: Mount) -> None:
        assert await mount.write("vdi/mount", "web\n") == 4
        assert await mount.names("volume") == ["web"]
        assert (await mount.stat("volume/web")).size == SIZE
        await mount.write("vdi/mount", "web")
        assert len(mount.cluster.opened) == 1, "mounting twice must not open twice"
        mount.cluster.volumes["web"].size = 2 * SIZE
        assert (await mount.stat("volume/web")).size == SIZE
        await mount.write("vdi/mount", "web")
        assert (await mount.stat("volume/web")).size == 2 * SIZE, "mounting again must look the size up"
        await refused(errno.EINVAL, mount.write("vdi/unmount", "db"))
        await mount.write("vdi/unmount", "web\n")
        assert await mount.names("volume") == []
        volume = mount.cluster.volumes["web"]
        assert volume.closed == 1
        assert volume.calls[-1][0] == "flush", "what was written must be flushed before the connection goes"

    play(scenario)


@pytest.mark.parametrize("name", ["", "nope", "a/b", ".", "..", "web\n\n", "web -s 1", "x" * 256, "\udcff"])
def test_mounting_what_cannot_be_a_volume_is_invalid(name: str) -> None:
    async def scenario(mount: Mount) -> None:
        await refused(errno.EINVAL, mount.write("vdi/mount", os.fsencode(name)))
        assert await mount.names("volume") == []

    play(scenario)


def test_mounting_without_a_cluster_is_an_io_error() -> None:
    async def scenario(mount: Mount) -> None:
        mount.cluster.down = True
        await refused(errno.EIO, mount.write("vdi/mount", "web"))

    play(scenario)


@pytest.mark.parametrize(("way", "others"), [("share", ("mount", "lock")), ("lock", ("mount", "share"))])
def test_a_shared_or_locked_volume_is_opened_so_and_stays_so(way: str, others: tuple[str, ...]) -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write(f"vdi/{way}", "web")
        assert mount.cluster.volumes["web"].calls == [(way, 0, 0)]
        await mount.write(f"vdi/{way}", "web")  # looks at its size
        assert mount.cluster.volumes["web"].calls == [(way, 0, 0), ("refresh", 0, 0)]
        for other in others:
            await refused(errno.EBUSY, mount.write(f"vdi/{other}", "web"))
        await mount.write("vdi/mount", "db")
        await refused(errno.EBUSY, mount.write(f"vdi/{way}", "db"))
        await mount.write("vdi/unmount", "db")
        mount.cluster.alone.add("db")
        await refused(errno.EBUSY, mount.write(f"vdi/{way}", "db"))
        await refused(errno.EINVAL, mount.write(f"vdi/{way}", "nobody"))

    play(scenario)


def test_unmounting_is_refused_while_the_volume_is_open() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        handle = await mount.open("volume/web")
        await refused(errno.EBUSY, mount.write("vdi/unmount", "web"))
        mount.files.release(handle)
        await mount.write("vdi/unmount", "web")

    play(scenario)


def test_a_volume_that_cannot_be_flushed_stays_mounted() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("volume/web", b"unflushed")
        volume = mount.cluster.volumes["web"]
        volume.fail = errno.ENOSPC
        await refused(errno.EIO, mount.write("vdi/unmount", "web"))
        assert (await mount.names("volume"), volume.closed) == (["web"], 0)
        volume.fail = 0
        assert await mount.read("volume/web", 0, 9) == b"unflushed"
        await mount.write("vdi/unmount", "web")
        assert (await mount.names("volume"), volume.closed) == ([], 1)

    play(scenario)


def test_a_flush_without_an_end_fails_the_unmount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.frontends.sheepfs.volumes.CLOSE_LIMIT_S", 0.3)

    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        mount.cluster.volumes["web"].latency_s = 60
        unmounting = asyncio.create_task(mount.write("vdi/unmount", "web"))
        await asyncio.sleep(0.05)
        await refused(errno.EBUSY, mount.open("volume/web"))  # what it wrote now would be missed
        await refused(errno.EIO, unmounting)
        mount.cluster.volumes["web"].latency_s = 0
        mount.files.release(await mount.open("volume/web"))
        await mount.write("vdi/unmount", "web")

    play(scenario)


def test_what_has_nothing_to_flush_or_never_can_goes_away() -> None:
    async def scenario(mount: Mount) -> None:
        mount.cluster.snapshot("web", "monday")
        await mount.write("vdi/mount", "web:monday")
        await mount.write("vdi/lock", "db")
        mount.cluster.snapshots["web", 1][1].fail = errno.EIO
        await mount.write("vdi/unmount", "web:monday")  # nobody wrote to it
        mount.cluster.volumes["db"].fail = errno.EIO
        mount.cluster.volumes["db"].is_lost = True
        await refused(errno.EIO, mount.write("vdi/unmount", "db"))
        assert await mount.names("volume") == []

    play(scenario)


def test_mounting_from_many_writers_at_once_opens_once() -> None:
    async def scenario(mount: Mount) -> None:
        mount.cluster.volumes["web"].latency_s = 0.01
        await asyncio.gather(*(mount.write("vdi/mount", "web") for _ in range(8)))
        assert len(mount.cluster.opened) == 1

    play(scenario)


def test_reads_stop_at_the_end_of_the_volume() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        assert await mount.read("volume/web", 0, 4096) == bytes(4096)
        assert await mount.read("volume/web", SIZE - 10, 4096) == bytes(10)
        assert await mount.read("volume/web", SIZE, 4096) == b""
        assert await mount.read("volume/web", SIZE + 4096, 4096) == b""

    play(scenario)


def test_writes_are_cut_at_the_end_of_the_volume_and_refused_from_there_on() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        assert await mount.write("volume/web", b"a" * 100, SIZE - 60) == 60
        assert await mount.read("volume/web", SIZE - 61, 100) == b"\0" + b"a" * 60
        await refused(errno.ENOSPC, mount.write("volume/web", b"a", SIZE))
        await refused(errno.ENOSPC, mount.write("volume/web", b"a", SIZE + 4096))

    play(scenario)


@pytest.mark.parametrize(("flags", "durable"), [(0, 0), (os.O_SYNC, 1), (os.O_DSYNC, 1)])
def test_only_synchronous_opens_write_durably(flags: int, durable: int) -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("volume/web", b"x" * 512, 512, os.O_RDWR | flags)
        assert mount.cluster.volumes["web"].durable_writes == durable

    play(scenario)


def test_fsync_flushes_the_volume() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        handle = await mount.open("volume/web")
        await mount.files.file(handle).write(0, b"x")
        await mount.files.file(handle).fsync()
        assert [call[0] for call in mount.cluster.volumes["web"].calls] == ["write", "flush"]

    play(scenario)


def test_failures_of_the_cluster_reach_the_caller() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        mount.cluster.volumes["web"].fail = errno.ENOSPC
        await refused(errno.ENOSPC, mount.write("volume/web", b"x"))
        mount.cluster.volumes["web"].fail = errno.EIO
        await refused(errno.EIO, mount.read("volume/web"))

    play(scenario)


def test_making_a_volume_smaller_changes_nothing() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("volume/web", b"keep")
        found = await mount.files.truncate(mount.find("volume/web").inode, 0)
        assert found.size == SIZE
        assert await mount.read("volume/web", 0, 4) == b"keep"

    play(scenario)


def test_making_a_volume_larger_resizes_it() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        handle = await mount.open("volume/web")
        assert (await mount.files.truncate(mount.find("volume/web").inode, 4 * OBJECT)).size == 4 * OBJECT
        assert mount.cluster.volumes["web"].size == 4 * OBJECT
        assert await mount.files.file(handle).write(4 * OBJECT - 3, b"abcd") == 3
        mount.cluster.volumes["web"].fail = errno.EFBIG
        await refused(errno.EFBIG, mount.files.truncate(mount.find("volume/web").inode, 5 * OBJECT))
        assert (await mount.stat("volume/web")).size == 4 * OBJECT

    play(scenario)


def test_removing_files_is_refused_and_says_what_would_allow_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await refused(errno.EPERM, mount.files.unlink(mount.find("volume").inode, b"web"))
        assert "volume web is not deleted: sheepfs was started without --allow-remove" in caplog.text
        assert await mount.names("volume") == ["web"]
        await refused(errno.EPERM, mount.files.unlink(mount.find("vdi").inode, b"list"))
        await refused(errno.ENOENT, mount.files.unlink(mount.find("volume").inode, b"db"))
        assert "web" in mount.cluster.volumes

    play(scenario)


def test_removing_a_volumes_file_deletes_the_volume_where_that_was_allowed() -> None:
    async def scenario(mount: Mount) -> None:
        mount.files = FileSystem(mount.cluster, mount.settings, may_remove=True)
        mount.cluster.snapshot("web", "monday")
        await mount.write("vdi/mount", "web")
        await mount.write("vdi/mount", "web:monday")
        parent = mount.find("volume").inode
        await refused(errno.EPERM, mount.files.unlink(parent, b"web:monday"))
        handle = await mount.open("volume/web")
        await refused(errno.EBUSY, mount.files.unlink(parent, b"web"))
        mount.files.release(handle)
        await mount.files.unlink(parent, b"web")
        assert await mount.names("volume") == ["web:monday"]
        assert "web" not in mount.cluster.volumes
        assert len(mount.cluster.snapshots) == 1

    play(scenario)


@pytest.mark.parametrize(("text", "value"), [("1\n", 1), ("0", 0), ("-7\n", 1), (" 2 ", 1)])
def test_switches_take_integers(text: str, value: int) -> None:
    async def scenario(mount: Mount) -> None:
        for name in ("page_cache", "object_cache"):
            await mount.write(f"config/{name}", text)
            assert await mount.read(f"config/{name}") == b"%d\n" % value
            assert (await mount.stat(f"config/{name}")).size == 5

    play(scenario)


@pytest.mark.parametrize("text", ["", "on", "1.0", "0x1", "1 2"])
def test_switches_refuse_anything_else(text: str) -> None:
    async def scenario(mount: Mount) -> None:
        await refused(errno.EINVAL, mount.write("config/page_cache", text))
        assert await mount.read("config/page_cache") == b"0\n"

    play(scenario)


def test_switches_act_on_what_is_opened_next() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("config/object_cache", "1")
        await mount.write("vdi/mount", "web")
        assert mount.cluster.opened[-1][2] is True
        inode = mount.find("volume/web").inode
        assert (await mount.files.open(inode, os.O_RDWR)).direct
        await mount.write("config/page_cache", "1")
        assert not (await mount.files.open(inode, os.O_RDWR)).direct

    play(scenario)


def test_the_gateway_can_be_changed_and_volumes_go_with_it() -> None:
    async def scenario(mount: Mount) -> None:
        assert await mount.read("config/sheep_info") == b"127.0.0.1:7000\n"
        assert (await mount.stat("config/sheep_info")).size == len("127.0.0.1") + 6
        await mount.write("vdi/mount", "web")
        await mount.write("config/sheep_info", "::1:7003\n")
        assert await mount.read("config/sheep_info") == b"::1:7003\n"
        assert mount.cluster.volumes["web"].address == ("::1", 7003)
        mount.cluster.volumes["web"].fail = errno.ECONNREFUSED
        await refused(errno.EINVAL, mount.write("config/sheep_info", "10.0.0.1:7001"))
        assert await mount.read("config/sheep_info") == b"10.0.0.1:7001\n"

    play(scenario)


@pytest.mark.parametrize("text", ["", "127.0.0.1", ":7000", "host:", "host:0", "host:65536", "host:7x", " host:7000"])
def test_a_malformed_gateway_is_invalid_and_changes_nothing(text: str) -> None:
    async def scenario(mount: Mount) -> None:
        await refused(errno.EINVAL, mount.write("config/sheep_info", text))
        assert await mount.read("config/sheep_info") == b"127.0.0.1:7000\n"

    play(scenario)


def test_seek_finds_data_and_holes_and_the_end_counts_as_a_hole() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("volume/web", b"x", OBJECT + 5)
        file = mount.files.file(await mount.open("volume/web"))
        assert file.seek(0, data=True) == OBJECT
        assert file.seek(0, data=False) == 0
        assert file.seek(OBJECT + 100, data=True) == OBJECT + 100
        assert file.seek(OBJECT, data=False) == 2 * OBJECT
        assert failure(lambda: file.seek(2 * OBJECT, data=True)) == errno.ENXIO
        assert failure(lambda: file.seek(SIZE, data=False)) == errno.ENXIO
        await mount.write("volume/web", b"x", SIZE - 1)
        assert file.seek(3 * OBJECT, data=False) == SIZE

    play(scenario)


def test_a_listing_read_in_parts_is_the_listing_of_the_time_of_opening() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("vdi/mount", "db")
        handle = await mount.files.open_directory(mount.find("volume").inode)
        first = mount.files.listing(handle, 0)[0]
        assert first.name == b"web"
        await mount.write("vdi/unmount", "web")
        assert [entry.name for entry in mount.files.listing(handle, first.cookie)] == [b"db"]

    play(scenario)


def test_snapshots_are_read_only_files_that_need_no_mounting() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("volume/web", b"first")
        mount.cluster.snapshot("web", "monday")
        await mount.write("volume/web", b"later")
        mount.cluster.snapshot("web", "")
        assert await mount.names("snapshot") == ["web", "db"]
        assert await mount.names("snapshot/web") == ["monday", "2"]
        assert await mount.names("snapshot/db") == []
        found = await mount.stat("snapshot/web/monday")
        assert (found.mode, found.size) == (stat.S_IFREG | 0o444, SIZE)
        assert found.inode == (await mount.stat("snapshot/web/1")).inode
        await refused(errno.EROFS, mount.open("snapshot/web/monday", os.O_RDWR))
        await refused(errno.EROFS, mount.files.truncate(found.inode, 2 * SIZE))
        for name, content in (("monday", b"first"), ("2", b"later")):
            handle = await mount.open(f"snapshot/web/{name}", os.O_RDONLY)
            assert await mount.files.file(handle).read(0, 5) == content
            mount.files.release(handle)
        await refused(errno.ENOENT, mount.stat("snapshot/web/tuesday"))
        await refused(errno.ENOENT, mount.stat("snapshot/nope"))
        assert mount.cluster.catalogs == 1, "one look at the cluster serves all of this"

    play(scenario)


def test_a_snapshot_is_opened_once_for_all_and_closed_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.frontends.sheepfs.snapshots.IDLE_S", 0.01)

    async def scenario(mount: Mount) -> None:
        mount.cluster.snapshot("web", "monday")
        handles = [await mount.open("snapshot/web/monday", os.O_RDONLY) for _ in range(3)]
        assert len(mount.cluster.opened) == 1
        for handle in handles:
            mount.files.release(handle)
        volume = mount.cluster.snapshots["web", 1][1]
        await asyncio.sleep(0.1)
        assert volume.closed == 1
        mount.files.release(await mount.open("snapshot/web/monday", os.O_RDONLY))
        assert len(mount.cluster.opened) == 2

    play(scenario)


def test_mkdir_takes_a_snapshot() -> None:
    async def scenario(mount: Mount) -> None:
        parent = (await mount.walk("snapshot/web")).inode
        made = await mount.files.make_directory(parent, b"monday")
        assert stat.S_ISDIR(made.mode)
        assert mount.cluster.orders == [("vdi", "snapshot", "-s", "monday", "--", "web")]
        assert await mount.names("snapshot/web") == ["monday"]
        assert stat.S_ISREG((await mount.stat("snapshot/web/monday")).mode)
        await refused(errno.EEXIST, mount.files.make_directory(parent, b"monday"))
        await refused(errno.EINVAL, mount.files.make_directory(parent, b"17"))
        await refused(errno.ENOSYS, mount.files.make_directory((await mount.walk("snapshot")).inode, b"new"))
        await refused(errno.ENOSYS, mount.files.make_directory(ROOT_INODE, b"new"))

    play(scenario)


@pytest.mark.parametrize("allowed", [False, True])
def test_rm_of_a_snapshot_must_be_allowed(allowed: bool) -> None:
    async def scenario(mount: Mount) -> None:
        mount.files = FileSystem(mount.cluster, mount.settings, may_remove=allowed)
        mount.cluster.snapshot("web", "monday")
        parent = (await mount.walk("snapshot/web")).inode
        if not allowed:
            await refused(errno.EPERM, mount.files.unlink(parent, b"monday"))
            assert list(mount.cluster.snapshots) == [("web", 1)]
            return
        handle = await mount.open("snapshot/web/monday", os.O_RDONLY)
        await refused(errno.EBUSY, mount.files.unlink(parent, b"monday"))
        mount.files.release(handle)
        await mount.files.unlink(parent, b"monday")
        assert await mount.names("snapshot/web") == []

    play(scenario)


def test_snapshots_without_a_cluster_are_an_io_error() -> None:
    async def scenario(mount: Mount) -> None:
        mount.cluster.down = True
        await refused(errno.EIO, mount.names("snapshot"))

    play(scenario)


def test_redundancy_is_an_attribute_of_the_file() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        inode = mount.find("volume/web").inode
        assert mount.files.attribute_names(inode) == [b"user.sheepdog.copies"]
        assert await mount.files.get_attribute(inode, b"user.sheepdog.copies") == b"3"
        await mount.files.set_attribute(inode, b"user.sheepdog.copies", b"2")
        assert await mount.files.get_attribute(inode, b"user.sheepdog.copies") == b"2"
        for value in (b"", b"two", b"-1", b"99"):
            await refused(errno.EINVAL, mount.files.set_attribute(inode, b"user.sheepdog.copies", value))
        await refused(errno.EOPNOTSUPP, mount.files.set_attribute(inode, b"user.other", b"1"))
        await refused(errno.ENODATA, mount.files.get_attribute(inode, b"security.capability"))
        await refused(errno.ENODATA, mount.files.get_attribute(ROOT_INODE, b"user.sheepdog.copies"))

    play(scenario)


def metrics(text: bytes) -> dict[str, int]:
    """Samples of an exposition, each after its HELP and TYPE."""
    found: dict[str, int] = {}
    described: set[str] = set()
    for line in text.decode().splitlines():
        if line.startswith("#"):
            described.add(line.split()[2])
            continue
        name, value = line.rsplit(" ", 1)
        assert name.partition("{")[0] in described
        found[name] = int(value)
    return found


def test_statistics_count_what_went_through_the_file() -> None:
    async def scenario(mount: Mount) -> None:
        assert await mount.names("stat/volume") == []
        await mount.write("vdi/mount", "web")
        handle = await mount.open("volume/web")
        file = mount.files.file(handle)
        await file.write(0, b"x" * 5000)
        await file.read(0, 1000)
        await file.read(SIZE - 10, 1000)
        await file.fsync()
        await file.zero(0, OBJECT)
        assert await mount.names("stat/volume") == ["web"]
        found = metrics(await mount.read("stat/volume/web"))
        assert {
            name.removesuffix('{volume="web"}').removeprefix("sheepdog_volume_"): found[name] for name in found
        } == {
            "size_bytes": SIZE,
            "allocated_bytes": 0,
            "open_files": 1,
            "reads_total": 2,
            "read_bytes_total": 1010,
            "writes_total": 1,
            "written_bytes_total": 5000,
            "flushes_total": 1,
            "discards_total": 1,
            "discarded_bytes_total": OBJECT,
        }
        mount.files.release(handle)
        await mount.write("vdi/unmount", "web")
        assert await mount.names("stat/volume") == []

    play(scenario)


def test_statistics_of_the_cluster() -> None:
    async def scenario(mount: Mount) -> None:
        mount.cluster.snapshot("web", "monday")
        found = metrics(await mount.read("stat/cluster"))
        assert found["sheepdog_nodes"] == 1
        assert found['sheepdog_node_free_bytes{node="127.0.0.1:7000"}'] == 1 << 39
        assert (found["sheepdog_volumes"], found["sheepdog_snapshots"]) == (2, 1)
        assert found["sheepdog_provisioned_bytes"] == SIZE + OBJECT
        mount.cluster.down = True
        assert await mount.read("stat/cluster") == b""

    play(scenario)


def test_closing_the_file_system_flushes_every_volume() -> None:
    async def scenario(mount: Mount) -> None:
        await mount.write("vdi/mount", "web")
        await mount.write("vdi/mount", "db")
        await mount.files.close()
        assert all(volume.calls[-1][0] == "flush" and volume.closed for volume in mount.cluster.volumes.values())

    play(scenario)
