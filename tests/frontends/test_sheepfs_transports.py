"""Both transports against the real kernel, with volumes in memory behind them: one test body, two ways to /dev/fuse."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pwd
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.memory_cluster import OBJECT
from tests.support.mounts import LoopMount, mounted
from tests.support.processes import alive, environment, run, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
SIZE = 16 * OBJECT + 1536  # not a multiple of a page
HUGE = 5 << 40
PUNCH_HOLE, ZERO_RANGE = 0x03, 0x11


class MemoryMount:
    """sheepfs over volumes in memory, as a process of its own."""

    def __init__(self, transport: str, place: Path, latency_ms: int = 0) -> None:
        place.mkdir(exist_ok=True)
        self.place = place
        self.log = place.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.support.memory_cluster", transport, str(place),
                    f"web={SIZE}", f"huge={HUGE}", "small=1000", f"disk={1 << 30}",
                ],
                cwd=REPOSITORY,
                env=environment() | {"PYTHONPATH": "src:.", "LATENCY_MS": str(latency_ms)},
                stdout=log,
                stderr=log,
            )  # fmt: skip
        wait_until(lambda: mounted(place) or self.process.poll() is not None, START_SECONDS, f"mount on {place}")
        assert self.process.poll() is None, self.log.read_text()

    def volume(self, name: str = "web") -> Path:
        (self.place / "vdi/mount").write_text(f"{name}\n")
        return self.place / "vdi/volume" / name

    def unmount(self) -> None:
        run(["umount", self.place], seconds=START_SECONDS)
        assert self.process.wait(START_SECONDS) == 0, self.log.read_text()

    def close(self) -> None:
        if mounted(self.place):
            run(["umount", "-l", self.place], check=False, seconds=START_SECONDS)
        if alive(self.process.pid):
            self.process.terminate()
            try:
                self.process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(START_SECONDS)


@pytest.fixture(params=["pyfuse3", "direct"])
def transport(request: pytest.FixtureRequest) -> str:
    needs.fuse()
    needs.root()
    if request.param == "pyfuse3":
        pytest.importorskip("pyfuse3")
    return str(request.param)


@pytest.fixture
def make_mount(transport: str, directory: Path, teardown: ExitStack) -> Callable[..., MemoryMount]:
    def make(latency_ms: int = 0) -> MemoryMount:
        mount = MemoryMount(transport, directory / "dir", latency_ms)
        teardown.callback(mount.close)
        return mount

    return make


@pytest.fixture
def mount(make_mount: Callable[..., MemoryMount]) -> Iterator[MemoryMount]:
    mount = make_mount()
    yield mount
    assert "request failed" not in mount.log.read_text(), "a handler raised what nobody foresaw"


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    return errno.errorcode[caught.value.errno or 0]


def test_the_tree_and_what_may_be_done_to_it(mount: MemoryMount) -> None:
    place = mount.place
    found = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    assert found == [
        "cluster", "cluster/info", "config", "config/object_cache", "config/page_cache", "config/sheep_info",
        "node", "node/info", "node/list",
        "snapshot", "snapshot/disk", "snapshot/huge", "snapshot/small", "snapshot/web",
        "stat", "stat/cluster", "stat/volume",
        "vdi", "vdi/list", "vdi/lock", "vdi/mount", "vdi/share", "vdi/unmount", "vdi/volume", "volume",
    ]  # fmt: skip
    assert (place / "vdi/list").read_text().startswith("vdi list ")
    assert (place / "cluster/info").stat().st_size == len((place / "cluster/info").read_text())
    assert os.readlink(place / "vdi/volume") == "../volume"
    assert failure((place / "new").touch) == "ENOSYS"
    assert failure((place / "new").mkdir) == "ENOSYS"
    assert failure(lambda: (place / "vdi/list").rename(place / "vdi/other")) == "ENOSYS"
    assert failure(lambda: (place / "cluster/info").write_text("x")) == "EIO"
    assert failure(lambda: (place / "vdi/mount").write_text("nope\n")) == "EINVAL"
    assert failure(lambda: (place / "vdi/unmount").write_text("web\n")) == "EINVAL"
    assert failure(lambda: (place / "config/page_cache").write_text("maybe")) == "EINVAL"
    assert failure((place / "absent").stat) == "ENOENT"
    with open("/proc/mounts") as table:
        rows = [line.split() for line in table if line.split()[1] == str(place)]
    assert [row[::2][:2] for row in rows] == [["sheepfs", "fuse"]]
    mount.unmount()


def test_volumes_come_and_go(mount: MemoryMount) -> None:
    volume = mount.volume()
    assert volume.stat().st_size == SIZE
    assert volume.stat().st_blksize == 4096
    with volume.open("r+b"):
        assert failure(lambda: (mount.place / "vdi/unmount").write_text("web\n")) == "EBUSY"
    assert failure(volume.unlink) == "EPERM"
    assert volume.exists()
    # The kernel reports the close to the file system after close(2) has returned.
    wait_until(lambda: _try_unmount(mount), 10, "unmount of a closed volume")
    assert not volume.exists()
    assert list((mount.place / "volume").iterdir()) == []


def _try_unmount(mount: MemoryMount) -> bool:
    try:
        (mount.place / "vdi/unmount").write_text("web\n")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def test_bytes_at_any_offset_and_size(mount: MemoryMount) -> None:
    volume = mount.volume()
    model = bytearray(SIZE)
    chance = random.Random(7)
    sizes = [1, 3, 511, 512, 513, 1024, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1, 3 << 20]
    with volume.open("r+b", buffering=0) as file:
        for _ in range(150):
            size = chance.choice(sizes)
            offset = chance.choice(
                [chance.randrange(SIZE), SIZE - size, OBJECT - size // 2, 4096 * chance.randrange(9)]
            )
            data = chance.randbytes(min(size, SIZE - offset))
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            model[offset : offset + len(data)] = data
            start, length = chance.randrange(SIZE), chance.choice(sizes)
            assert os.pread(file.fileno(), length, start) == model[start : start + length]
        os.fsync(file.fileno())
    assert volume.read_bytes() == model


def test_the_end_of_a_volume(mount: MemoryMount) -> None:
    volume = mount.volume()
    with volume.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"x" * 100, SIZE - 40) == 40
        assert failure(lambda: os.pwrite(file.fileno(), b"x", SIZE)) == "ENOSPC"
        assert os.pread(file.fileno(), 100, SIZE - 40) == b"x" * 40
        assert os.pread(file.fileno(), 100, SIZE) == b""
        os.ftruncate(file.fileno(), 0)
    assert volume.stat().st_size == SIZE
    with volume.open("wb") as file:
        file.write(b"not lost")
    assert volume.read_bytes()[-40:] == b"x" * 40
    assert run(["sh", "-c", f"echo x >> {volume}"], check=False).returncode != 0
    copied = run(["dd", "if=/dev/zero", f"of={mount.volume('small')}", "bs=300", "conv=notrunc"], check=False)
    assert b"No space left on device" in copied.stderr
    assert b"1000 bytes" in copied.stderr


def test_a_larger_size_resizes(mount: MemoryMount) -> None:
    volume = mount.volume("small")
    with volume.open("r+b", buffering=0) as file:
        assert failure(lambda: os.pwrite(file.fileno(), b"x", 4096)) == "ENOSPC"
        run(["truncate", "-s", str(OBJECT), volume])
        assert os.fstat(file.fileno()).st_size == OBJECT
        assert os.pwrite(file.fileno(), b"x", 4096) == 1
    assert volume.stat().st_size == OBJECT


def test_direct_io_by_sectors(mount: MemoryMount) -> None:
    volume = mount.volume()
    pattern = b"".join(bytes([value]) * 512 for value in range(8))
    with mmap.mmap(-1, 4096) as page:
        descriptor = os.open(volume, os.O_RDWR | os.O_DIRECT)
        try:
            page[:] = pattern
            for sector in range(8):
                assert (
                    os.pwritev(descriptor, [memoryview(page)[512 * sector :][:512]], OBJECT - 2048 + 512 * sector)
                    == 512
                )
            page[:] = bytes(4096)
            assert os.preadv(descriptor, [page], OBJECT - 2048) == 4096
            assert page[:] == pattern
        finally:
            os.close(descriptor)


def test_files_beyond_four_tebibytes(mount: MemoryMount) -> None:
    volume = mount.volume("huge")
    assert volume.stat().st_size == HUGE
    with volume.open("r+b", buffering=0) as file:
        for offset in (0, (4 << 40) - 1, HUGE - 5):
            assert os.pwrite(file.fileno(), b"there", offset) == 5
        assert os.pread(file.fileno(), 9, (4 << 40) - 1) == b"there\0\0\0\0"
    assert volume.stat().st_blocks * 512 == 4 * OBJECT


def test_many_at_once(make_mount: Callable[..., MemoryMount]) -> None:
    """Slow answers and parallel callers: no request waits for another, none gets another's bytes."""
    mount = make_mount(latency_ms=3)
    volume = mount.volume()
    wrong: list[int] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        with volume.open("r+b", buffering=0) as file:
            for turn in range(20):
                offset = (number * 20 + turn) * 8192
                data = chance.randbytes(8192)
                os.pwrite(file.fileno(), data, offset)
                if os.pread(file.fileno(), 8192, offset) != data:
                    wrong.append(offset)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    mount.unmount()


def test_the_page_cache_can_be_switched_on(mount: MemoryMount) -> None:
    (mount.place / "config/page_cache").write_text("1\n")
    volume = mount.volume()
    with volume.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as view:
        view[OBJECT - 3 : OBJECT + 3] = b"mapped"
        view.flush()
    (mount.place / "config/page_cache").write_text("0\n")
    with volume.open("rb", buffering=0) as fresh:
        assert os.pread(fresh.fileno(), 6, OBJECT - 3) == b"mapped"


def test_a_filesystem_on_a_loop_device(mount: MemoryMount, directory: Path, teardown: ExitStack) -> None:
    needs.loop_devices()
    volume = mount.volume()
    source = shutil.copytree(
        REPOSITORY / "frontends", directory / "source", ignore=shutil.ignore_patterns("__pycache__")
    )
    run(["mkfs.ext4", "-q", volume])
    for option in ("rw", "ro"):
        loop = LoopMount(volume, directory / "mnt", option)
        teardown.callback(loop.close)
        tree = loop.place / "tree"
        if option == "rw":
            run(["cp", "-r", source, tree])
            run(["sync", "-f", tree])
        run(["diff", "-r", source, tree])
        loop.unmount()
    run(["e2fsck", "-fn", volume])
    wait_until(lambda: _try_unmount(mount), 10, "unmount of a closed volume")
    mount.unmount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(mount: MemoryMount, number: signal.Signals) -> None:
    file = os.open(mount.volume(), os.O_RDWR)
    mount.process.send_signal(number)
    assert mount.process.wait(START_SECONDS) == 0, mount.log.read_text()
    assert not mounted(mount.place)
    assert failure(lambda: os.pread(file, 1, 0)) in ("ENOTCONN", "ECONNABORTED")
    with suppress(OSError):  # a close may tell it too
        os.close(file)


def test_the_next_mount_is_left_alone(make_mount: Callable[..., MemoryMount]) -> None:
    """A server that is still flushing after `umount` must not take down what was mounted there since."""
    first = make_mount(latency_ms=1500)
    first.volume()
    run(["umount", first.place], seconds=START_SECONDS)
    second = make_mount()
    assert first.process.poll() is None, "ended before the second mount: this run shows nothing"
    assert first.process.wait(START_SECONDS) == 0
    assert mounted(second.place)
    assert (second.place / "cluster/info").read_text()
    second.unmount()


def test_a_killed_server_hangs_nobody(make_mount: Callable[..., MemoryMount]) -> None:
    mount = make_mount(latency_ms=60_000)
    file = os.open(mount.volume(), os.O_RDWR)
    outcome: list[str] = []
    writer = threading.Thread(target=lambda: outcome.append(failure(lambda: os.pwrite(file, b"x", 0))))
    writer.start()
    wait_until(writer.is_alive, 5, "a writer waits")
    mount.process.kill()
    mount.process.wait(START_SECONDS)
    writer.join(START_SECONDS)
    assert outcome and outcome[0] in ("ENOTCONN", "ECONNABORTED", "EIO")
    with suppress(OSError):
        os.close(file)
    run(["umount", "-l", mount.place], seconds=START_SECONDS)


def test_snapshots(mount: MemoryMount) -> None:
    volume = mount.volume()
    with volume.open("r+b", buffering=0) as file:
        file.write(b"first")
        (mount.place / "snapshot/web/monday").mkdir()
        os.pwrite(file.fileno(), b"later", 0)
    snapshot = mount.place / "snapshot/web/monday"
    assert snapshot.is_file()
    assert snapshot.stat().st_size == SIZE
    with snapshot.open("rb") as frozen:
        assert frozen.read(5) == b"first"
        assert failure(lambda: snapshot.open("r+b")) == "EROFS"
    assert [path.name for path in (mount.place / "snapshot/web").iterdir()] == ["monday"]
    assert failure((mount.place / "snapshot/web/monday").mkdir) == "EEXIST"
    assert failure(snapshot.unlink) == "EPERM"
    assert failure((mount.place / "snapshot/nope/x").mkdir) == "ENOENT"
    assert failure(lambda: (mount.place / "snapshot/web/new").write_bytes(b"")) == "ENOSYS"
    for name in ("web:monday", "web:1"):  # the same by an order
        (mount.place / "vdi/mount").write_text(f"{name}\n")
        mounted = mount.place / "volume" / name
        assert stat.S_IMODE(mounted.stat().st_mode) == 0o444
        with mounted.open("rb") as frozen:
            assert frozen.read(5) == b"first"
        assert failure(partial(mounted.open, "r+b")) == "EROFS"
        assert failure(partial(os.truncate, mounted, 2 * SIZE)) == "EROFS"
    for name in ("web:tuesday", "web:", ":monday", "nope:1"):
        assert failure(partial((mount.place / "vdi/mount").write_text, name)) == "EINVAL", name


def test_attributes(mount: MemoryMount) -> None:
    volume = mount.volume()
    assert os.listxattr(volume) == ["user.sheepdog.copies"]
    assert os.getxattr(volume, "user.sheepdog.copies") == b"3"
    os.setxattr(volume, "user.sheepdog.copies", b"2")
    assert os.getxattr(volume, "user.sheepdog.copies") == b"2"
    assert failure(lambda: os.setxattr(volume, "user.sheepdog.copies", b"99")) == "EINVAL"
    assert failure(lambda: os.getxattr(volume, "user.other")) == "ENODATA"
    assert os.listxattr(mount.place / "vdi/list") == []


def test_statistics(mount: MemoryMount) -> None:
    volume = mount.volume()
    volume.read_bytes()
    text = (mount.place / "stat/volume/web").read_text()
    assert f'sheepdog_volume_read_bytes_total{{volume="web"}} {SIZE}\n' in text
    assert "sheepdog_nodes 1\n" in (mount.place / "stat/cluster").read_text()


SCENARIO = """\
set -e
mount --bind {device} /dev/fuse
exec setpriv --reuid {user} --regid {group} --clear-groups sh -euc '
    {python} -m tests.support.memory_cluster auto {place} web=100000 > {log} 2>&1 &
    for turn in $(seq 100); do grep -q " {place} " /proc/mounts && break; sleep 0.1; done
    echo web > {place}/vdi/mount
    echo hello | dd of={place}/volume/web conv=notrunc,fsync status=none
    head -c 6 {place}/volume/web
    stat -c %U {place}/volume/web
    fusermount3 -u {place}
    wait $!
'
"""


def test_without_privileges(directory: Path) -> None:
    """In a mount namespace of its own, where /dev/fuse is open to all as it is on most machines."""
    needs.root()
    needs.fuse()
    needs.program("unshare", "setpriv", "fusermount3")
    pytest.importorskip("pyfuse3")
    user = pwd.getpwnam("nobody")
    if run(["setpriv", "--reuid", user.pw_name, sys.executable, "-c", ""], check=False).returncode:
        pytest.skip(f"{sys.executable} is closed to other users")
    directory.chmod(0o755)
    device, place = directory / "fuse", directory / "dir"
    os.mknod(device, stat.S_IFCHR | 0o666, Path("/dev/fuse").stat().st_rdev)
    device.chmod(0o666)
    place.mkdir()
    os.chown(place, user.pw_uid, user.pw_gid)
    place.with_suffix(".log").touch()
    os.chown(place.with_suffix(".log"), user.pw_uid, user.pw_gid)
    script = SCENARIO.format(
        device=device,
        place=place,
        log=place.with_suffix(".log"),
        python=sys.executable,
        user=user.pw_uid,
        group=user.pw_gid,
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        cwd=REPOSITORY,
        env=environment() | {"PYTHONPATH": "src:.", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.decode() == f"hello\n{user.pw_name}\n", done.stderr.decode()
    assert done.returncode == 0


class TestDirectOnly:
    """What only the direct transport can carry; the other must refuse, not pretend."""

    def fallocate(self, file: int, mode: int, offset: int, length: int) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.fallocate(file, mode, ctypes.c_long(offset), ctypes.c_long(length))
        return ctypes.get_errno() if result else 0

    def test_holes_are_punched_and_ranges_zeroed(self, mount: MemoryMount, transport: str) -> None:
        volume = mount.volume()
        with volume.open("r+b", buffering=0) as file:
            for index in range(16):
                os.pwrite(file.fileno(), b"\xff" * OBJECT, index * OBJECT)
            result = self.fallocate(file.fileno(), PUNCH_HOLE, OBJECT // 2, 2 * OBJECT)
            if transport == "pyfuse3":
                assert result == errno.EOPNOTSUPP
                return
            assert result == 0
            assert self.fallocate(file.fileno(), ZERO_RANGE, 15 * OBJECT, SIZE) == 0
            assert self.fallocate(file.fileno(), 0, 0, OBJECT) == errno.EOPNOTSUPP
            assert os.pread(file.fileno(), OBJECT, 0) == b"\xff" * (OBJECT // 2) + bytes(OBJECT // 2)
            assert os.pread(file.fileno(), OBJECT, OBJECT) == bytes(OBJECT)
            assert os.pread(file.fileno(), OBJECT, 2 * OBJECT) == bytes(OBJECT // 2) + b"\xff" * (OBJECT // 2)
            assert os.pread(file.fileno(), OBJECT, 15 * OBJECT) == bytes(OBJECT)
        wait_until(lambda: volume.stat().st_blocks * 512 == 14 * OBJECT, 5, "freed objects in st_blocks")

    def test_holes_are_seen(self, mount: MemoryMount, transport: str, directory: Path) -> None:
        if transport == "pyfuse3":
            pytest.xfail("libfuse's binding carries no LSEEK")
        volume = mount.volume("huge")
        with volume.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"x", 3 << 40)
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 3 << 40
            assert os.lseek(file.fileno(), 3 << 40, os.SEEK_HOLE) == (3 << 40) + OBJECT
            assert failure(lambda: os.lseek(file.fileno(), (3 << 40) + OBJECT, os.SEEK_DATA)) == "ENXIO"
        run(["cp", "--sparse=always", volume, directory / "copy"], seconds=30)
        assert (directory / "copy").stat().st_blocks * 512 <= OBJECT

    def test_trim_reaches_the_volume(self, mount: MemoryMount, transport: str, directory: Path) -> None:
        if transport == "pyfuse3":
            pytest.xfail("libfuse's binding carries no FALLOCATE")
        needs.loop_devices()
        volume = mount.volume("disk")
        run(["mkfs.ext4", "-q", volume])
        loop = LoopMount(volume, directory / "mnt")
        try:
            (loop.place / "file").write_bytes(os.urandom(30 << 20))
            run(["sync", "-f", loop.place])
            full = volume.stat().st_blocks
            (loop.place / "file").unlink()
            run(["sync", "-f", loop.place])  # ext4 frees the blocks when its journal commits
            run(["fstrim", loop.place])
            wait_until(lambda: volume.stat().st_blocks * 512 < full * 512 - (16 << 20), 10, "space given back")
        finally:
            loop.close()
        run(["e2fsck", "-fn", volume])

    def test_mapping_a_direct_file(self, mount: MemoryMount, transport: str) -> None:
        if transport == "pyfuse3":
            pytest.xfail("libfuse's binding cannot allow it; switch config/page_cache on")
        volume = mount.volume()
        with volume.open("r+b") as file:
            with mmap.mmap(file.fileno(), SIZE) as view:
                view[OBJECT - 3 : OBJECT + 3] = b"mapped"
                view.flush()
            assert os.pread(file.fileno(), 6, OBJECT - 3) == b"mapped"
