"""sheepfs over a real cluster: the files that tell about it, volumes as files, and nodes that die underneath."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.fake_sheep import FakeSheep
from tests.support.mounts import LoopMount, SheepFs, mounted
from tests.support.processes import BIN, environment, having_argument, locked_bytes, run, wait_ended, wait_until

from sheepdog.cluster.client.memory import may_lock_all
from sheepdog.cluster.core.errors import Result

MIB = 1 << 20
OBJECT = 4 * MIB
PATIENCE_S = 60.0  # twice what a request waits for a gateway

_CACHES = shutil.ignore_patterns("__pycache__")  # any Python on this machine may write there meanwhile

MountSheepFs = Callable[..., SheepFs]
MountLoop = Callable[..., LoopMount]


@pytest.fixture(params=["pyfuse3", "direct"])
def transport(request: pytest.FixtureRequest) -> str:
    needs.fuse()
    needs.root()
    if request.param == "pyfuse3":
        pytest.importorskip("pyfuse3")
    return f"--transport={request.param}"


@pytest.fixture
def cluster3(standing3: Cluster) -> Cluster:
    return standing3


@pytest.fixture
def sheepfs(transport: str, cluster3: Cluster, mount_sheepfs: MountSheepFs) -> SheepFs:
    return mount_sheepfs(cluster3, 0, transport)


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    return errno.errorcode[caught.value.errno or 0]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_status_files_say_what_dog_says(cluster3: Cluster, sheepfs: SheepFs) -> None:
    cluster3.dog("vdi", "create", "web", "100M")
    for file in ("cluster/info", "node/list", "vdi/list"):
        noun, verb = file.split("/")
        assert (sheepfs.place / file).read_text() == cluster3.dog(noun, verb), file
    lines = (sheepfs.place / "node/info").read_text().splitlines()
    assert lines[0].split() == ["Id", "Size", "Used", "Avail", "Use%"]
    assert len(lines) >= 5
    assert (sheepfs.place / "config/sheep_info").read_text() == f"127.0.0.1:{cluster3.port(0)}\n"


def test_a_volume_holds_what_was_written_on_every_node(cluster3: Cluster, sheepfs: SheepFs) -> None:
    cluster3.dog("vdi", "create", "web", "50M")
    volume = sheepfs.volume("web")
    assert volume.stat().st_size == 50 * MIB
    model = bytearray(50 * MIB)
    chance = random.Random(1)
    with volume.open("r+b", buffering=0) as file:
        for _ in range(60):
            size = chance.choice([1, 512, 4096, 65536, MIB, 5 * MIB + 7])
            offset = chance.randrange(len(model) - size)
            model[offset : offset + size] = chance.randbytes(size)
            assert os.pwrite(file.fileno(), model[offset : offset + size], offset) == size
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), len(model), 0) == model
    for node in range(3):
        assert cluster3.try_dog("vdi", "read", "web", node=node, check=True).stdout == model
    sheepfs.release("web")
    assert digest(sheepfs.volume("web")) == hashlib.sha256(model).hexdigest()


def test_unknown_volumes_and_the_working_volume_of_a_name(cluster3: Cluster, sheepfs: SheepFs) -> None:
    assert failure(lambda: sheepfs.volume("nope")) == "EINVAL"
    cluster3.dog("vdi", "create", "web", "8M")
    with sheepfs.volume("web").open("r+b") as file:
        file.write(b"old")
    cluster3.dog("vdi", "snapshot", "-s", "first", "web")
    with sheepfs.volume("web").open("r+b") as file:  # mounted before, and follows the snapshot
        file.write(b"new")
    wait_until(lambda: _released(sheepfs, "web"), 10, "unmount of a closed volume")
    with sheepfs.volume("web").open("rb") as file:
        assert file.read(3) == b"new"
    assert cluster3.try_dog("vdi", "read", "-s", "first", "web", "0", "3", check=True).stdout == b"old"


def _released(sheepfs: SheepFs, name: str) -> bool:
    return _unmounted(sheepfs.place, name)


def _unmounted(place: Path, name: str) -> bool:
    """The kernel reports a close after close(2) has returned; until then the volume is busy."""
    try:
        (place / "vdi/unmount").write_text(f"{name}\n")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def test_a_filesystem_survives_the_death_of_a_node(
    cluster3: Cluster, sheepfs: SheepFs, mount_loop: MountLoop, directory: Path
) -> None:
    """Of the very node that sheepfs talks to, in the middle of writing."""
    needs.loop_devices()
    cluster3.dog("vdi", "create", "web", "512M")
    volume = sheepfs.volume("web")
    run(["mkfs.ext4", "-q", volume])
    loop = mount_loop(volume)
    source = Path(shutil.copytree(Path(os.__file__).parent / "asyncio", directory / "source", ignore=_CACHES))
    copying = subprocess.Popen(
        ["sh", "-c", f"for i in $(seq 12); do cp -r {source} {loop.place}/$i && sync -f {loop.place}; done"],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    time.sleep(0.7)
    cluster3.kill(0)
    _, complaint = copying.communicate(timeout=PATIENCE_S)
    assert copying.returncode == 0, complaint.decode()
    run(["sync", "-f", loop.place])
    for turn in range(1, 13):
        run(["diff", "-r", source, loop.place / str(turn)])
    cluster3.start(0)
    cluster3.wait_members(3)
    cluster3.wait_recovered()
    loop.unmount()
    run(["e2fsck", "-fn", volume])


def test_requests_wait_while_the_whole_cluster_restarts(cluster3: Cluster, sheepfs: SheepFs) -> None:
    cluster3.dog("vdi", "create", "web", "16M")
    volume = sheepfs.volume("web")
    payload = os.urandom(OBJECT)
    with volume.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), payload, 2 * MIB)
        os.fsync(file.fileno())
        for node in range(3):
            cluster3.kill(node)
        assert (sheepfs.place / "vdi/list").read_text() == "", "no cluster: empty, no error"
        results: list[bytes] = []
        reader = threading.Thread(target=lambda: results.append(os.pread(file.fileno(), OBJECT, 2 * MIB)))
        reader.start()
        time.sleep(1)
        assert reader.is_alive()
        cluster3.start(2, 0, 1)
        reader.join(PATIENCE_S)
        assert results == [payload]
        os.pwrite(file.fileno(), payload, 8 * MIB)
        assert os.pread(file.fileno(), OBJECT, 8 * MIB) == payload


def test_the_gateway_can_be_changed(cluster3: Cluster, sheepfs: SheepFs) -> None:
    cluster3.dog("vdi", "create", "web", "16M")
    volume = sheepfs.volume("web")
    setting = sheepfs.place / "config/sheep_info"
    with volume.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"one", 0)
        setting.write_text(f"127.0.0.1:{cluster3.port(2)}\n")
        assert setting.read_text() == f"127.0.0.1:{cluster3.port(2)}\n"
        assert os.pread(file.fileno(), 3, 0) == b"one"
        assert failure(lambda: setting.write_text("nonsense")) == "EINVAL"
        assert failure(lambda: setting.write_text("127.0.0.1:1")) == "EINVAL"
        assert os.pread(file.fileno(), 3, 0) == b"one"


def test_discarded_space_comes_back(cluster3: Cluster, mount_sheepfs: MountSheepFs) -> None:
    needs.fuse()
    needs.root()
    cluster3.dog("vdi", "create", "web", "100M")
    volume = mount_sheepfs(cluster3, 0, "--transport=direct").volume("web")
    with volume.open("r+b", buffering=0) as file:
        file.write(b"\xff" * (40 * MIB))
        os.fsync(file.fileno())
    before = sum(map(len, (cluster3.objects(node) for node in range(3))))
    run(["fallocate", "-p", "-o", str(3 * MIB), "-l", str(30 * MIB), volume])
    expected = b"\xff" * (3 * MIB) + bytes(30 * MIB) + b"\xff" * (7 * MIB) + bytes(60 * MIB)
    assert volume.read_bytes() == expected
    wait_until(
        lambda: sum(map(len, (cluster3.objects(node) for node in range(3)))) <= before - 3 * 7, 30, "freed objects"
    )
    assert cluster3.dog("vdi", "list", "-r").split()[4] == str(3 * OBJECT)


def test_snapshots_are_files(cluster3: Cluster, sheepfs: SheepFs, mount_loop: MountLoop) -> None:
    """Taken by mkdir, listed, read, and mounted read-only, while the volume goes on."""
    needs.loop_devices()
    cluster3.dog("vdi", "create", "web", "64M")
    volume = sheepfs.volume("web")
    run(["mkfs.ext4", "-q", volume])
    with volume.open("rb") as file:
        os.fsync(file.fileno())
    before = digest(volume)
    (sheepfs.place / "snapshot/web/empty").mkdir()
    loop = mount_loop(volume)
    (loop.place / "file").write_text("written after the snapshot")
    loop.unmount()
    snapshot = sheepfs.place / "snapshot/web/empty"
    assert digest(snapshot) == before
    assert digest(sheepfs.place / "snapshot/web/1") == before
    assert digest(volume) != before
    frozen = mount_loop(snapshot, "ro")
    assert not (frozen.place / "file").exists()
    frozen.unmount()
    assert failure((sheepfs.place / "snapshot/web/empty").mkdir) == "EEXIST"
    assert "empty" in cluster3.dog("vdi", "list")


def test_a_file_of_a_pebibyte(cluster3: Cluster, sheepfs: SheepFs) -> None:
    """A hyper volume: written in parallel, sparse, grown, discarded, and through a gateway that restarts."""
    size = 1 << 50
    cluster3.dog("vdi", "create", "-y", "huge", str(size))
    volume = sheepfs.volume("huge")
    assert volume.stat().st_size == size
    places = [n * 37 << 32 | n * 4093 for n in range(40)]
    with volume.open("r+b", buffering=0) as file:

        def write(place: int) -> int:
            return os.pwrite(file.fileno(), place.to_bytes(8, "little") * 600, place)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(write, places)) == [4800] * len(places)
        assert os.pwrite(file.fileno(), b"beyond the end", size - 6) == 6
        os.fsync(file.fileno())
        for place in places:
            assert os.pread(file.fileno(), 4801, place) == place.to_bytes(8, "little") * 600 + b"\0"
        cluster3.kill(0)
        cluster3.start(0)
        assert os.pread(file.fileno(), 8, places[9]) == places[9].to_bytes(8, "little")
        os.ftruncate(file.fileno(), 2 * size)
        assert os.pwrite(file.fileno(), b"after it", 2 * size - 8) == 8
    assert volume.stat().st_size == 2 * size
    assert volume.stat().st_blocks * 512 == (len(places) + 2) * OBJECT
    assert cluster3.try_dog("vdi", "read", "huge", str(2 * size - 8), "8", check=True).stdout == b"after it"
    wait_until(lambda: _released(sheepfs, "huge"), 10, "the file is closed")
    assert not volume.exists()


def test_copies_and_statistics(cluster3: Cluster, sheepfs: SheepFs) -> None:
    cluster3.dog("vdi", "create", "-c", "2", "web", "64M")
    volume = sheepfs.volume("web")
    assert os.getxattr(volume, "user.sheepdog.copies") == b"2"
    with volume.open("r+b", buffering=0) as file:
        file.write(b"x" * 5000)
    assert 'sheepdog_volume_written_bytes_total{volume="web"} 5000\n' in (sheepfs.place / "stat/volume/web").read_text()
    assert "sheepdog_nodes 3\n" in (sheepfs.place / "stat/cluster").read_text()


def test_what_the_options_and_orders_on_files_do(
    new_cluster: Callable[..., Cluster], mount_sheepfs: MountSheepFs
) -> None:
    """-k, -o, --allow-remove, setfattr and blkdiscard, as far as the cluster and the kernel can tell."""
    needs.fuse()
    needs.root()
    needs.loop_devices()
    needs.program("losetup", "blkdiscard", "setfattr")
    cluster = new_cluster(3)
    cluster.start(extra={0: ("-w", "object:size=64M")})
    cluster.wait_members(3)
    cluster.format("-c", "2")
    cluster.dog("vdi", "create", "web", "16M")
    sheepfs = mount_sheepfs(cluster, 0, "-k", "-o", "--allow-remove", "--transport=direct")
    volume = sheepfs.volume("web")

    device = run(["losetup", "--find", "--show", "--direct-io=on", volume]).stdout.decode().strip()
    try:
        with open(device, "r+b", buffering=0) as disk:
            disk.write(b"x" * 3 * OBJECT)
            os.fsync(disk.fileno())
        assert used(cluster) == 3 * OBJECT
        run(["blkdiscard", "--offset", str(OBJECT), "--length", str(OBJECT), device])
        assert used(cluster) == 2 * OBJECT
    finally:
        run(["losetup", "-d", device])
        wait_until(lambda: not run(["losetup", "-j", volume]).stdout, 10, "the loop device lets go")

    assert requests_of_two_reads(sheepfs, OBJECT // 2) == 1, "-k: the second is answered by the kernel"
    (sheepfs.place / "config/page_cache").write_text("0")
    assert requests_of_two_reads(sheepfs, OBJECT // 2) == 2

    def looked_up(name: str) -> bool:
        before = cache_lookups(cluster)
        requests_of_two_reads(sheepfs, OBJECT // 2, name)
        return cache_lookups(cluster) > before

    data = {name for node in range(3) for name in cluster.objects(node) if name.startswith("00")}
    for name in ("cached", "plain"):  # what this gateway has written itself, unflushed, is in its cache in any case
        cluster.dog("vdi", "create", name, "16M")
        cluster.dog("vdi", "write", name, "0", str(OBJECT), node=2, stdin=b"x" * OBJECT)
    sheepfs.volume("cached")
    wait_until(lambda: looked_up("cached"), 30, "-o: the sheep looks into its cache")
    (sheepfs.place / "config/object_cache").write_text("0")
    sheepfs.volume("plain")
    assert not any(looked_up("plain") for _ in range(3))

    run(["setfattr", "-n", "user.sheepdog.copies", "-v", "3", volume])
    assert os.getxattr(volume, "user.sheepdog.copies") == b"3"
    cluster.wait_recovered()
    assert len(data) == 2 and all(data <= set(cluster.objects(node)) for node in range(3))

    (sheepfs.place / "snapshot/web/monday").mkdir()
    assert "monday" in cluster.dog("vdi", "list")
    (sheepfs.place / "snapshot/web/monday").unlink()
    assert "monday" not in cluster.dog("vdi", "list")
    wait_until(lambda: removed(volume), 10, "the volume is closed")
    assert "web" not in cluster.dog("vdi", "list")


def used(cluster: Cluster) -> int:
    """Bytes of the objects that the volume owns."""
    return int(cluster.dog("vdi", "list", "-r", "web").split()[4])


def cache_lookups(cluster: Cluster) -> int:
    found = json.loads(cluster.dog("vdi", "cache", "info", "--json", node=0))
    return int(found["hits"]) + int(found["misses"])


def requests_of_two_reads(sheepfs: SheepFs, offset: int, name: str = "web") -> int:
    """How many reads reach sheepfs when a file is opened and one block of it is read twice."""

    def reads() -> int:
        text = (sheepfs.place / "stat/volume/web").read_text()
        return int(
            next(line.split()[1] for line in text.splitlines() if line.startswith("sheepdog_volume_reads_total"))
        )

    before = reads()
    with (sheepfs.place / "volume" / name).open("rb", buffering=0) as file:
        for _ in range(2):
            assert os.pread(file.fileno(), 4096, offset) == b"x" * 4096
    return reads() - before


def removed(volume: Path) -> bool:
    """The kernel reports a close after close(2) has returned; until then the volume is busy."""
    try:
        volume.unlink()
    except OSError as error:
        assert error.errno == errno.EBUSY
        return False
    return True


def test_mounting_needs_no_cluster_and_leaves_no_process(transport: str, directory: Path) -> None:
    """The tree is there, status files are empty; kill -9 of the daemon fails callers instead of hanging them."""
    place = directory / "dir"
    place.mkdir()
    for end, streams in (("umount", ""), ("kill", "<&- >&- 2>&-")):
        run(["sh", "-c", f'exec "$@" {streams}', "sh", BIN / "sheepfs", "-p", "1", transport, place])
        try:
            assert (place / "cluster/info").read_text() == ""
            assert failure(lambda: (place / "vdi/mount").write_text("web\n")) == "EIO"
            (daemon,) = having_argument(str(place))
            assert not may_lock_all() or locked_bytes(daemon) > 10 * MIB
            if end == "kill":
                os.kill(daemon, signal.SIGKILL)
                wait_ended([daemon], 10, "sheepfs")
                assert failure(lambda: os.listdir(place)) in ("ENOTCONN", "ECONNABORTED")
        finally:
            run(["umount", place])
        wait_ended([daemon], 10, "sheepfs")
        assert not mounted(place)


def test_without_fuse_it_says_what_is_missing(directory: Path) -> None:
    needs.root()
    hidden = f'mount --bind {directory} /dev && exec "$@"'  # no /dev/null either: it is not needed before the mount
    sheepfs = [str(BIN / "sheepfs"), "--transport=direct", str(directory)]
    done = run(["unshare", "--mount", "sh", "-c", hidden, "sh", *sheepfs], check=False)
    said = "cannot open /dev/fuse: No such file or directory; FUSE has to be in the kernel: modprobe fuse\n"
    assert (done.returncode, done.stderr.decode()) == (1, said)


@pytest.mark.parametrize("option", ("-f", "-d"))
def test_in_the_foreground_it_says_what_it_does(option: str, transport: str, directory: Path) -> None:
    """On stderr, with -d each request; what the transport cannot carry is said in any case."""
    place = directory / "dir"
    place.mkdir()
    log = directory / "log"
    with log.open("wb") as stderr:
        sheepfs = subprocess.Popen(
            [BIN / "sheepfs", option, "-p", "1", transport, place], env=environment(), stderr=stderr
        )
    try:
        wait_until(lambda: mounted(place) or sheepfs.poll() is not None, PATIENCE_S, "the mount")
        assert (place / "config/sheep_info").read_text() == "127.0.0.1:1\n"
        assert sheepfs.poll() is None, "the process that was started is the one that serves"
    finally:
        run(["umount", place], check=False)
        assert sheepfs.wait(PATIENCE_S) == 0
    said = log.read_text(errors="replace")
    assert ("LOOKUP" in said) == (option == "-d"), said
    assert ("discards do not reach the cluster" in said) == ("pyfuse3" in transport), said


def test_unmounting_says_when_a_volume_could_not_be_flushed(transport: str, directory: Path) -> None:
    place = directory / "dir"
    place.mkdir()
    with FakeSheep() as sheep:
        sheep.create("web", 16 * MIB)
        run([BIN / "sheepfs", "-p", str(sheep.address[1]), transport, place])
        try:
            (place / "vdi/mount").write_text("web\n")
            with (place / "volume/web").open("r+b", buffering=0) as file:
                file.write(b"unflushed")
            sheep.flush_result = Result.EIO
            with pytest.raises(OSError) as caught:
                wait_until(lambda: _unmounted(place, "web"), 10, "unmount of a closed volume")
            assert caught.value.errno == errno.EIO
            assert (place / "volume/web").read_bytes()[:9] == b"unflushed"
            sheep.flush_result = Result.SUCCESS
            before = sheep.flushes
            wait_until(lambda: _unmounted(place, "web"), 10, "unmount of a closed volume")
            assert sheep.flushes > before and os.listdir(place / "volume") == []
        finally:
            run(["umount", place])
        wait_until(lambda: not having_argument(str(place)), 10, "end of sheepfs")


def test_several_mounts_at_once(cluster3: Cluster, directory: Path, transport: str) -> None:
    cluster3.dog("vdi", "create", "web", "16M")
    places = [directory / name for name in ("a", "b c")]
    try:
        for place in places:
            place.mkdir()
            run([BIN / "sheepfs", "-p", str(cluster3.port(0)), transport, place])
            (place / "vdi/mount").write_text("web\n")
        with (places[0] / "volume/web").open("r+b", buffering=0) as file:
            file.write(b"seen by both")
        other = places[1] / "volume/web"
        assert other.read_bytes()[:12] == bytes(12), "the map is that of the mount: the object is new"
        wait_until(lambda: _unmounted(places[1], "web"), 10, "unmount of a closed volume")
        (places[1] / "vdi/mount").write_text("web\n")
        assert other.read_bytes()[:12] == b"seen by both"
        with (places[0] / "volume/web").open("r+b", buffering=0) as file:
            file.write(b"SEEN")
        assert other.read_bytes()[:12] == b"SEEN by both", "an object that both know"
    finally:
        for place in places:
            run(["umount", place], check=False)
    wait_until(lambda: not any(having_argument(str(place)) for place in places), 10, "end of sheepfs")
