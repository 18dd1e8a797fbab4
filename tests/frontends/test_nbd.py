"""NBD clients that nobody here wrote, against nbdkit with our plugin and real nodes."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import native, needs
from tests.support.cluster import Cluster, started
from tests.support.nbd import (
    NbdServer,
    captive,
    certificates,
    export_info,
    holding,
    keys,
    nbd_map,
    nbdsh,
    release,
)
from tests.support.ports import BLOCK
from tests.support.processes import environment, locked_bytes, run, wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
HOLE = "hole,zero"
TLS_PORT = BLOCK - 1  # of the cluster's own block


@pytest.fixture(autouse=True)
def tools() -> None:
    needs.program("nbdkit", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
    needs.libnbd()


@pytest.fixture
def cluster3(standing3: Cluster) -> Cluster:
    return standing3


@pytest.fixture
def serve(teardown: ExitStack, directory: Path) -> Callable[..., NbdServer]:
    def start(cluster: Cluster, *words: str, node: int = 0, listen: str = "", name: str = "nbd") -> NbdServer:
        server = NbdServer(cluster, directory, *words, node=node, listen=listen, name=name)
        teardown.callback(server.close)
        return server

    return start


def content(cluster: Cluster, name: str, *words: str) -> bytes:
    """A whole volume or snapshot by the native door, through another node; `words`: -s TAG, or offset and length."""
    where = [name, *words] if words and words[0].isdigit() else [*words, name]
    return cluster.try_dog("vdi", "read", *where, node=2, check=True).stdout


def image(path: Path, size: int, seed: int) -> bytes:
    """A sparse file with data in some places."""
    chance = random.Random(seed)
    data = bytearray(size)
    for _ in range(6):
        offset = chance.randrange(size - 300_000)
        data[offset : offset + 300_000] = chance.randbytes(300_000)
    path.write_bytes(data)
    return bytes(data)


def test_names_sizes_and_capabilities(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "web", "20M")
    cluster3.dog("vdi", "create", "odd@name", str(8 * MIB + 100))
    cluster3.dog("vdi", "snapshot", "-s", "monday", "web")
    cluster3.dog("vdi", "snapshot", "web")
    server = serve(cluster3)
    listed = json.loads(run(["nbdinfo", "--list", "--json", server.uri("")]).stdout)["exports"]
    assert sorted(export["export-name"] for export in listed) == ["odd@name", "web", "web@2", "web@monday"]
    web = export_info(server.uri("web"))
    assert web["export-size"] == 20 * MIB
    assert str(web["description"]).startswith("Sheepdog volume, 20M, 3 copies, vid ")
    assert not web["is_read_only"]
    for ability in (
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ):
        assert web[ability], ability
    assert not web["is_rotational"]
    assert [web[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")] == [512, 4096, OBJECT]
    odd = export_info(server.uri("odd@name"))
    assert (odd["export-size"], odd["block_size_minimum"]) == (8 * MIB + 100, 1)
    for snapshot in ("web@monday", "web@2", "web@1"):
        assert export_info(server.uri(snapshot))["is_read_only"], snapshot
    for missing in ("nix", "web@tuesday", "web@9", "@", ""):
        refused = run(["nbdinfo", server.uri(missing)], check=False)
        assert refused.returncode != 0, missing
    assert "there is no volume or snapshot web@tuesday" in server.text()
    assert "Traceback" not in server.text()


def test_a_server_of_named_volumes(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    for name in ("web", "db"):
        cluster3.dog("vdi", "create", name, "8M")
    server = serve(cluster3, "web", "--readonly", "--mode", "640", "--group", "root")
    assert server.first_line == server.uri("web")
    mode = server.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o640
    assert export_info(server.uri(""))["description"] == export_info(server.uri("web"))["description"]
    assert export_info(server.uri("web"))["is_read_only"]
    assert run(["nbdinfo", server.uri("db")], check=False).returncode != 0
    second = cluster3.try_dog("nbd", "serve", "web", "--socket", str(server.socket))
    assert second.returncode != 0 and b"a server listens at" in second.stderr
    assert server.stop() == 0
    server = serve(cluster3, "web")  # the socket that was left behind is no obstacle
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    assert cluster3.try_dog("nbd", "serve", "nix", "--socket", str(directory / "x")).returncode == 1


def test_what_uri_prints_works(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "web", "8M")
    server = serve(cluster3, "web")
    place = ("--socket", str(server.socket))
    words = json.loads(cluster3.dog("nbd", "uri", "web", *place, "--json"))
    assert words["uri"] == cluster3.dog("nbd", "uri", "web", *place, "-r").strip() == server.uri("web")
    assert words["uri"] in cluster3.dog("nbd", "uri", "web", *place)
    for way in ("qemu_drive", "qemu_blockdev"):
        option, value = words[way].split(" ", 1)
        fields = (
            value.strip("'").removeprefix("if=virtio,").replace("node-name=disk0,", "").replace("format=", "driver=")
        )
        assert option == {"qemu_drive": "-drive", "qemu_blockdev": "-blockdev"}[way]
        run(["qemu-io", "-c", "write -P 7 0 64k", "--image-opts", fields])
    assert content(cluster3, "web")[: 64 << 10] == b"\7" * (64 << 10)
    assert f"socket='{server.socket}'" in words["libvirt"].replace('"', "'")


def test_the_lines_for_what_is_read_only_work(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """QEMU and libvirt refuse to write-open it, so the lines must say what it is: a snapshot, or all of the server."""
    needs.program("qemu-system-x86_64")
    cluster3.dog("vdi", "create", "web", "8M")
    cluster3.dog("vdi", "snapshot", "-s", "t", "web")
    for name, server in (("web@t", serve(cluster3)), ("web", serve(cluster3, "--readonly", name="readonly"))):
        more = () if "@" in name else ("--readonly",)
        words = json.loads(cluster3.dog("nbd", "uri", name, "--socket", str(server.socket), *more, "--json"))
        assert "  <readonly/>\n" in words["libvirt"]
        for disk in (words["qemu_drive"], f"{words['qemu_blockdev']} -device virtio-blk-pci,drive=disk0"):
            machine = ["qemu-system-x86_64", "-accel", "tcg", "-S", "-display", "none", "-nodefaults"]
            done = run([*machine, "-monitor", "stdio", *shlex.split(disk)], stdin=b"info block\nquit\n")
            assert b"(raw, read-only)" in done.stdout or b"(nbd, read-only)" in done.stdout, done.stdout.decode()


def test_copies_both_ways(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    size = 30 * MIB + 512
    data = image(directory / "image", size, 1)
    cluster3.dog("vdi", "create", "v", str(size))
    server = serve(cluster3)
    uri = server.uri("v")
    run(["nbdcopy", str(directory / "image"), uri])
    assert content(cluster3, "v") == data
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(directory / "image"), uri])
    cluster3.dog("vdi", "snapshot", "-s", "t", "v")
    run(["nbdcopy", server.uri("v@t"), str(directory / "back")])
    assert (directory / "back").read_bytes() == data
    run(["nbdcopy", "--flush", server.uri("v@t"), "null:"])
    cluster3.dog("vdi", "create", "w", str(size))
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(directory / "image"), server.uri("w")])
    assert content(cluster3, "w") == data
    other = image(directory / "other", size, 2)
    run(["nbdcopy", "--destination-is-zero", str(directory / "other"), uri], check=False)
    run(["nbdcopy", str(directory / "other"), uri])
    assert content(cluster3, "v") == other
    assert content(cluster3, "v", "-s", "t") == data


def test_thin_volumes_stay_thin(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    cluster3.dog("vdi", "create", "v", "20G")
    server = serve(cluster3)
    uri = server.uri("v")
    assert nbd_map(uri) == [(0, 20 << 30, HOLE)]
    nbdsh(uri, "h.pwrite(b'x' * 4096, 3 << 30)", "h.pwrite(b'y' * 10, (7 << 30) + 5)")
    mapped = [(offset, length) for offset, length, kind in nbd_map(uri) if kind == "data"]
    assert mapped == [(3 << 30, 4096), (7 << 30, 4096)]
    begin = time.monotonic()
    run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(directory / "thin")])
    assert time.monotonic() - begin < 20, "20 GB of holes were read"
    assert (directory / "thin").stat().st_size == 20 << 30
    with (directory / "thin").open("rb") as file:
        file.seek(3 << 30)
        assert file.read(4097) == b"x" * 4096 + b"\0"
        file.seek((7 << 30) + 4)
        assert file.read(12) == b"\0" + b"y" * 10 + b"\0"
    data = json.loads(run(["qemu-img", "map", "--output=json", "-f", "raw", uri]).stdout)
    assert sum(part["length"] for part in data if part["data"]) == 2 * 4096


def test_fua_zero_trim_and_flush(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "v", "40M")
    server = serve(cluster3)
    nbdsh(
        server.uri("v"),
        "M = 1 << 20",
        "model = bytearray(40 * M)",
        "def write(offset, data, flags=0):",
        "    h.pwrite(data, offset, flags); model[offset:offset + len(data)] = data",
        "def zero(offset, length, flags=0):",
        "    h.zero(length, offset, flags); model[offset:offset + length] = bytes(length)",
        "def check():",
        "    assert h.pread(40 * M, 0) == model"
        if False
        else "    assert b''.join(h.pread(4 * M, o) for o in range(0, 40 * M, 4 * M)) == bytes(model)",
        "write(0, os.urandom(16 * M)); check()",
        "write(20 * M + 100, os.urandom(5 * M), nbd.CMD_FLAG_FUA); check()",
        "zero(4 * M, 8 * M); check()",
        "zero(M, 512, nbd.CMD_FLAG_FUA); check()",
        "zero(13 * M, 2 * M, nbd.CMD_FLAG_NO_HOLE); check()",
        "zero(28 * M, 4 * M, nbd.CMD_FLAG_FAST_ZERO); check()",
        "h.trim(8 * M, 20 * M); got = h.pread(4 * M, 20 * M); model[20 * M:24 * M] = bytes(4 * M)",
        "assert got == bytes(4 * M), 'a whole object is given back'",
        "model[24 * M:28 * M] = bytes(4 * M)",
        "check(); h.flush(); h.cache(M, 0)",
        "h.trim(4096, 4096, nbd.CMD_FLAG_FUA); assert h.pread(4096, 8192) == model[8192:12288]",
        # A fast zero either happens or says that it would not be one, and then nothing has happened.
        "try: zero(512, 5 * M, nbd.CMD_FLAG_FAST_ZERO)",
        "except nbd.Error as e: assert e.errnum == errno.ENOTSUP",
        "h.shutdown()",
    )
    gone = [part for part in nbd_map(server.uri("v")) if part[2] == HOLE]
    assert any(start <= 4 * MIB and start + length >= 12 * MIB for start, length, _ in gone)
    before = used(cluster3, "v")
    nbdsh(server.uri("v"), "h.zero(8 << 20, 4 << 20, nbd.CMD_FLAG_NO_HOLE)")
    assert used(cluster3, "v") == before + 2 * OBJECT, "NO_HOLE makes objects"
    nbdsh(server.uri("v"), "h.zero(8 << 20, 4 << 20)")
    assert used(cluster3, "v") == before


def test_erasure_coded_volumes(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "-c", "2:1", "v", "16M")
    server = serve(cluster3)
    uri = server.uri("v")
    nbdsh(
        uri,
        "model = bytearray(16 << 20)",
        "for turn in range(40):",
        "    offset = int.from_bytes(os.urandom(3), 'little') % (15 << 20); data = os.urandom(1 + turn * 2500)",
        "    h.pwrite(data, offset, turn % 2 * nbd.CMD_FLAG_FUA); model[offset:offset + len(data)] = data",
        "    h.zero(5000, offset + 100); model[offset + 100:offset + 5100] = bytes(5000)",
        "h.zero(6 << 20, 3 << 20); model[3 << 20:9 << 20] = bytes(6 << 20)",
        "assert b''.join(h.pread(4 << 20, o << 20) for o in range(0, 16, 4)) == bytes(model)",
        "h.trim(4 << 20, 12 << 20); assert h.pread(4 << 20, 12 << 20) == bytes(4 << 20)",
        "h.flush()",
    )
    extents = nbd_map(uri)
    holes = [(start, start + length) for start, length, kind in extents if kind == HOLE]
    for first, last in ((4 * MIB, 8 * MIB), (12 * MIB, 16 * MIB)):
        assert any(start <= first and end >= last for start, end in holes), extents
    assert any(kind == "data" and start < 4 * MIB for start, _, kind in extents)
    zeros = " + ".join(f"h.pread({end - start}, {start})" for start, end in holes)
    nbdsh(uri, f"assert not any({zeros})")


def test_hyper_volumes(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """Two connections, each with several requests at once, make objects in the same index; all of it is found again."""
    size = 1 << 50
    cluster3.dog("vdi", "create", "-y", "v", str(size))
    server = serve(cluster3)
    uri = server.uri("v")
    assert export_info(uri)["export-size"] == size
    nbdsh(
        uri,
        f"others = [h, connect({uri!r})]",
        "places = [n * 37 * (4 << 30) + n * 4093 for n in range(60)]",
        "flying = []",
        "for turn, place in enumerate(places):",
        "    n = others[turn % 2]; data = nbd.Buffer.from_bytearray(bytearray(b'%08d' % turn * 1000))",
        "    flying.append((n, n.aio_pwrite(data, place), data))",
        "for n, cookie, _ in flying:",
        "    while not n.aio_command_completed(cookie): n.poll(-1)",
        "others[1].pwrite(b'end', (1 << 50) - 3, nbd.CMD_FLAG_FUA)",
        "for turn, place in enumerate(places):",
        "    assert others[1 - turn % 2].pread(8004, place) == b'%08d' % turn * 1000 + bytes(4)",
        "h.pwrite(b'x' * (9 << 20), 3 << 40)",
        "h.zero(1 << 20, (3 << 40) + 4096); h.trim(4 << 20, (3 << 40) + (4 << 20))",
        "assert h.pread(2 << 20, 3 << 40) == b'x' * 4096 + bytes(1 << 20) + b'x' * ((1 << 20) - 4096)",
        "assert h.pread(9 << 20, 3 << 40)[4 << 20:] == bytes(4 << 20) + b'x' * (1 << 20)",
        "found = []",
        "h.block_status(3 << 30, 37 * (4 << 30), lambda name, offset, entries, error: found.extend(entries))",
        "assert found[:2] == [4 << 20, 0] and found[3] == 3, found",
        "h.flush()",
    )
    assert content(cluster3, "v", str(size - 4), "4") == b"\0end"
    assert content(cluster3, "v", str(59 * 37 * (4 << 30) + 59 * 4093), "8") == b"00000059"
    assert cluster3.dog("vdi", "check", "v") == "finish check&repair v\n"
    run(["nbdinfo", f"{server.uri('v')}"])


def used(cluster: Cluster, name: str) -> int:
    """Bytes of the objects that a volume owns."""
    return int(cluster.dog("vdi", "list", "-r", name).split()[4])


def test_errors_reach_the_client(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "v", "8M")
    cluster3.dog("vdi", "snapshot", "-s", "t", "v")
    server = serve(cluster3)
    nbdsh(
        server.uri("v@t"),
        "h.set_strict_mode(0)",
        "for call in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):",
        "    try: call()",
        "    except nbd.Error as e: assert e.errnum == errno.EPERM, e",
        "    else: assert False",
        "for call in (lambda: h.pread(512, 8 << 20), lambda: h.pread(512, 1 << 40)):",
        "    try: call()",
        "    except nbd.Error as e: assert e.errnum == errno.EINVAL, e",
        "    else: assert False",
        "assert h.pread(512, 0) == bytes(512)",
    )


def test_a_flush_covers_all_connections(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """What makes multi-conn true: writes by one connection, a flush by another, then every node loses its power.

    Here the power failure is that of the processes only; that a flush reaches every node is the store's to prove.
    What is proven: all connections see each other's writes at once, and one volume is behind them all.
    """
    cluster3.dog("vdi", "create", "v", "40M")
    server = serve(cluster3)
    uri = server.uri("v")
    nbdsh(
        uri,
        "others = []",
        "for _ in range(4):",
        f"    others.append(connect({uri!r}))",
        "assert all(n.can_multi_conn() for n in others)",
        "for turn in range(30):",
        "    a, b, c = (others[(turn + i) % 4] for i in range(3))",
        "    data = os.urandom(5000)",
        "    place = turn * 1300000",
        "    a.pwrite(data, place)",
        "    assert b.pread(5000, place) == data",
        "    c.flush()",
        "    b.zero(100, place); assert a.pread(5000, place) == bytes(100) + data[100:]",
        "for n in others: n.shutdown()",
    )
    hold = holding(uri, "h.pwrite(b'1' * 512, 0)")
    try:
        before = flushes(cluster3)
        nbdsh(uri, "h.flush()", "os._exit(0)")
        assert flushes(cluster3) > before, "the flush of a connection that wrote nothing was not passed on"
    finally:
        release(hold)


def flushes(cluster: Cluster) -> int:
    """Flushes that the gateway was asked for: the twelfth counter of STAT."""
    answer = native.ask(cluster.socket(0), 0xB8, 120)
    return int(struct.unpack("<15Q", answer.payload)[11])


def test_many_connections_create_the_same_objects(
    cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path
) -> None:
    """Four connections with their own threads write interleaved blocks into objects that none of them has yet."""
    cluster3.dog("vdi", "create", "v", "32M")
    server = serve(cluster3)
    nbdsh(
        None,
        f"uri = {server.uri('v')!r}",
        "import threading",
        "def work(me):",
        "    n = connect(uri)",
        "    for block in range(me, 512, 4):",
        "        n.pwrite(bytes([me + 1]) * 65536, block * 65536)",
        "    n.shutdown()",
        "threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]",
        "[t.start() for t in threads]; [t.join() for t in threads]",
    )
    expected = b"".join(bytes([block % 4 + 1]) * 65536 for block in range(512))
    assert content(cluster3, "v") == expected


def test_qemu(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    cluster3.dog("vdi", "create", "v", "64M")
    server = serve(cluster3)
    uri = server.uri("v")
    chance = random.Random(5)
    commands = []
    for _ in range(15):
        offset, length = chance.randrange(0, 60 * MIB), chance.randrange(1, 3 * MIB)
        pattern = chance.randrange(1, 255)
        commands += ["-c", f"write -P {pattern} {offset} {length}", "-c", f"read -P {pattern} {offset} {length}"]
    commands += [
        "-c",
        "write -f -P 9 0 4k",
        "-c",
        "write -z -u 8M 8M",
        "-c",
        "read -P 0 8M 8M",
        "-c",
        "discard 16M 4M",
        "-c",
        "flush",
    ]
    done = run(["qemu-io", "-f", "raw", "-t", "writeback", *commands, uri])
    assert b"verification failed" not in done.stdout and b"failed" not in done.stdout.lower(), done.stdout.decode()
    run(
        [
            "qemu-img",
            "bench",
            "-f",
            "raw",
            "-c",
            "500",
            "-d",
            "16",
            "-s",
            "4096",
            "-w",
            "--pattern=1",
            "--flush-interval=100",
            uri,
        ]
    )
    run(["qemu-img", "create", "-f", "qcow2", uri, "32M"])
    node = {"driver": "nbd", "server": {"type": "unix", "path": str(server.socket)}, "export": "v"}
    qcow = "json:" + json.dumps({"driver": "qcow2", "file": node})
    run(["qemu-io", "-c", "write -P 3 1M 5M", "-c", "read -P 3 1M 5M", qcow])
    run(["qemu-img", "check", qcow])


def test_a_live_volume_grows(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """Old connections keep their size (NBD has no word for it); a new one sees the new size, and all share the data."""
    cluster3.dog("vdi", "create", "v", "8M")
    server = serve(cluster3)
    uri = server.uri("v")
    nbdsh(
        uri,
        "import subprocess",
        "h.pwrite(b'old', 0)",
        f"subprocess.run({[*grow_command(cluster3, 'v', '50M')]!r}, check=True)",
        f"n = connect({uri!r})",
        "assert (h.get_size(), n.get_size()) == (8 << 20, 50 << 20)",
        "n.pwrite(b'new', 45 << 20); h.pwrite(b'yes', 3)",
        "assert n.pread(6, 0) == b'oldyes'",
    )
    data = content(cluster3, "v")
    assert len(data) == 50 * MIB
    assert data[:6] == b"oldyes" and data[45 * MIB : 45 * MIB + 3] == b"new"


def grow_command(cluster: Cluster, name: str, size: str) -> list[str]:
    from tests.support.processes import BIN

    return [str(BIN / "dog"), "vdi", "resize", "-p", str(cluster.port(1)), name, size]


def test_a_snapshot_under_load_is_followed(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "v", "16M")
    server = serve(cluster3)
    nbdsh(server.uri("v"), "h.pwrite(b'a' * 65536, 1 << 20)")
    from tests.support.processes import BIN

    snapshot = [str(BIN / "dog"), "vdi", "snapshot", "-p", str(cluster3.port(1)), "-s", "t", "v"]
    nbdsh(
        server.uri("v"),
        "import subprocess",
        "h.pwrite(b'b' * 65536, 1 << 20)",
        f"subprocess.run({snapshot!r}, check=True)",
        "h.pwrite(b'c' * 65536, (1 << 20) + 32768)",
        "assert h.pread(65536 * 2, 1 << 20) == b'b' * 32768 + b'c' * 65536 + bytes(32768)",
    )
    assert content(cluster3, "v", "-s", "t")[MIB : MIB + 65536 * 2] == b"b" * 65536 + bytes(65536)
    run(["nbdinfo", server.uri("v@t")])


def test_locks_refuse_a_second_client(
    new_cluster: Callable[..., Cluster], serve: Callable[..., NbdServer], directory: Path
) -> None:
    cluster = started(new_cluster(1))
    cluster.format("-c", "1", "-l")
    cluster.dog("vdi", "create", "v", "8M")
    first = serve(cluster)
    hold = holding(first.uri("v"))
    try:
        nbdsh(first.uri("v"), "h.pwrite(b'x' * 512, 0)")  # the same server: one volume, more connections
        (directory / "second").mkdir()
        second = NbdServer(cluster, directory / "second")
        try:
            refused = run(["nbdinfo", second.uri("v")], check=False)
            assert refused.returncode != 0
            assert "v is locked by another client" in second.text()
            release(hold)
            wait_until(lambda: run(["nbdinfo", second.uri("v")], check=False).returncode == 0, 10, "the lock is free")
        finally:
            second.close()
    finally:
        release(hold)
    assert "v" not in cluster.dog("vdi", "lock", "list").split()


def test_exclusive_refuses_a_second_connection(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "v", "8M")
    server = serve(cluster3, "--exclusive")
    uri = server.uri("v")
    nbdsh(
        uri,
        "assert not h.can_multi_conn()",
        f"try: connect({uri!r})",
        "except nbd.Error: pass",
        "else: assert False, 'two writers'",
        "h.pwrite(b'x' * 512, 0); h.shutdown()",
    )
    assert "v is in use by another connection" in server.text()
    wait_until(lambda: run(["nbdinfo", uri], check=False).returncode == 0, 10, "the next one is let in")


def test_swap_locks_what_is_used_and_no_more(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """All code, so that none has to be read while the kernel has no memory, and not what nbdkit only reserves."""
    needs.root()
    cluster3.dog("vdi", "create", "web", "8M")
    server = serve(cluster3, "web", "--swap")
    assert export_info(server.uri("web"))["export-size"] == 8 * MIB
    assert 10 * MIB < locked_bytes(server.process.pid) < 64 * MIB
    memory = Path(f"/proc/{server.process.pid}/smaps").read_text()
    code = re.findall(
        r"^\S+ r-xp \S+ \S+ [1-9]\d* +(\S+)\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB", memory, re.MULTILINE
    )
    assert any("libpython" in name for name, _, _ in code)
    assert [name for name, size, resident in code if size != resident] == []


def test_clean_shutdown_flushes(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    cluster3.dog("vdi", "create", "v", "8M")
    server = serve(cluster3)
    hold = holding(server.uri("v"), "h.pwrite(b'x' * 512, 0)")
    before = flushes(cluster3)
    try:
        assert server.stop() == 0, server.text()
    finally:
        release(hold)
    assert flushes(cluster3) > before, "what the client had not flushed was left to luck"
    assert content(cluster3, "v")[:512] == b"x" * 512
    assert server.text() == ""


def test_clients_that_leave_while_the_server_ends_leave_nothing_behind(
    new_cluster: Callable[..., Cluster], serve: Callable[..., NbdServer]
) -> None:
    """nbdkit closes nothing for them, and ends once the last one has left."""
    cluster = started(new_cluster(1))
    cluster.format("-c", "1", "-l")
    cluster.dog("vdi", "create", "v", "8M")
    server = serve(cluster)
    hold = holding(server.uri("v"), "h.pwrite(b'x' * 512, 0)")
    before = flushes(cluster)
    server.process.terminate()
    release(hold)
    assert server.process.wait(20) == 0, server.text()
    assert flushes(cluster) > before
    assert "v" not in cluster.dog("vdi", "lock", "list").split()


@pytest.mark.parametrize(
    ("harm", "reason"), [(signal.SIGKILL, "no (gateway at|answer within) .*"), (signal.SIGSTOP, "no answer within 5 s")]
)
def test_shutdown_without_a_sheep_is_bounded_and_says_what_was_not_flushed(
    cluster3: Cluster, serve: Callable[..., NbdServer], harm: signal.Signals, reason: str
) -> None:
    cluster3.dog("vdi", "create", "v", "8M")
    server = serve(cluster3, node=1)
    hold = holding(server.uri("v"), "h.pwrite(b'x' * 512, 0)")
    try:
        cluster3.kill(1, harm)
        assert server.stop() == 1
    finally:
        release(hold)
    assert re.fullmatch(f"v: could not be flushed and closed: {reason}\n", server.text())


def test_tls_with_keys(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    needs.program("certtool")
    cluster3.dog("vdi", "create", "v", "8M")
    path = keys(directory)
    server = serve(cluster3, "v", "--tls-psk", str(path))
    uri = server.first_line
    assert uri == f"nbds+unix://alice@/v?socket={server.socket}&tls-psk-file={path}"
    nbdsh(uri, "assert h.get_tls_negotiated()", "h.pwrite(b'secret', 0)")
    assert run(["nbdinfo", server.uri("v")], check=False).returncode != 0, "a client without TLS was let in"
    words = json.loads(
        cluster3.dog("nbd", "uri", "v", "--socket", str(server.socket), "--tls-psk", str(path), "--json")
    )
    _, credentials, _, drive = words["qemu_blockdev"].split(" ")
    run(["qemu-io", "--object", credentials, "--image-opts", drive.replace("node-name=disk0,", ""), "-c", "read 0 4k"])
    (directory / "wrong").mkdir()
    wrong = keys(directory / "wrong")
    assert run(["nbdinfo", uri.replace(str(path), str(wrong))], check=False).returncode != 0, "a wrong key was let in"
    assert content(cluster3, "v")[:6] == b"secret"


def test_tls_with_certificates(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    needs.program("certtool")
    cluster3.dog("vdi", "create", "v", "8M")
    pki = certificates(directory)
    listen = f"localhost:{cluster3.ports[TLS_PORT]}"
    server = serve(cluster3, "v", "--tls-certificates", str(pki), "--tls-verify-peer", listen=listen)
    uri = f"nbds://{listen}/v?tls-certificates={pki}"
    assert server.first_line == uri
    nbdsh(uri, "assert h.get_tls_negotiated()", "h.pwrite(b'secret', 0)")
    assert run(["nbdinfo", f"nbd://{listen}/v"], check=False).returncode != 0
    (directory / "nobody").mkdir()
    (directory / "nobody" / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    assert run(["nbdinfo", uri.replace(str(pki), str(directory / "nobody"))], check=False).returncode != 0, (
        "a client without a certificate was let in"
    )
    words = json.loads(cluster3.dog("nbd", "uri", "v", "--listen", listen, "--tls-certificates", str(pki), "--json"))
    _, credentials, _, drive = words["qemu_blockdev"].split(" ")
    run(["qemu-io", "--object", credentials, "--image-opts", drive.replace("node-name=disk0,", ""), "-c", "read 0 4k"])
    assert content(cluster3, "v")[:6] == b"secret"


def test_tls_with_certificates_at_a_socket(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    needs.program("certtool")
    cluster3.dog("vdi", "create", "v", "8M")
    pki = certificates(directory)
    server = serve(cluster3, "v", "--tls-certificates", str(pki))
    words = json.loads(
        cluster3.dog("nbd", "uri", "v", "--socket", str(server.socket), "--tls-certificates", str(pki), "--json")
    )
    _, credentials, _, drive = words["qemu_blockdev"].split(" ")
    run(["qemu-io", "--object", credentials, "--image-opts", drive.replace("node-name=disk0,", ""), "-c", "read 0 4k"])


def test_the_only_volume_needs_no_name(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    server = serve(cluster3)
    assert run(["nbdinfo", server.uri("")], check=False).returncode != 0
    cluster3.dog("vdi", "create", "only", "8M")
    cluster3.dog("vdi", "snapshot", "-s", "t", "only")
    assert run(["nbdinfo", "--size", server.uri("")]).stdout.strip() == str(8 * MIB).encode()
    cluster3.dog("vdi", "create", "other", "8M")
    assert run(["nbdinfo", server.uri("")], check=False).returncode != 0


def test_verified_load_while_a_sheep_dies(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    needs.program("fio")
    cluster3.dog("vdi", "create", "v", "64M")
    server = serve(cluster3)
    fio = subprocess.Popen(
        [
            "fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri('v')}", "--rw=randwrite", "--bs=4k-64k",
            "--iodepth=16", "--size=32M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
            "--verify_state_save=0", "--rate=6M,6M",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )  # fmt: skip
    try:
        time.sleep(1.5)
        cluster3.kill(2, signal.SIGKILL)
        time.sleep(1)
        cluster3.start(2)
        output, _ = fio.communicate(timeout=120)
    finally:
        fio.kill()
        fio.wait(10)
    assert fio.returncode == 0, output.decode()
    assert re.search(rb"err= *0", output), output.decode()


def test_the_gateway_restarts(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path) -> None:
    """Requests wait for it; nothing that was acknowledged is lost, no client sees an error.

    Every block is read again in the end, by the client through the gateway that was away and by another door elsewhere.
    """
    written = directory / "written"
    cluster3.dog("vdi", "create", "v", "16M")
    server = serve(cluster3, node=1)
    failures: list[BaseException] = []

    def load() -> None:
        try:
            nbdsh(
                server.uri("v"),
                "import time",
                "end = time.monotonic() + 6",
                "turn = 0; last = {}",
                "while time.monotonic() < end:",
                "    turn += 1",
                "    place = turn % 4096 * 4096; last[place] = data = b'%08d' % turn * 512",
                "    h.pwrite(data, place, 0 if turn % 3 else nbd.CMD_FLAG_FUA)",
                "    assert h.pread(4096, place) == data",
                "for place, data in last.items():",
                "    assert h.pread(4096, place) == data, place",
                f"open({str(written)!r}, 'wb').write(b''.join(last.get(n * 4096, bytes(4096)) for n in range(4096)))",
            )
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(1.5)
    cluster3.kill(1, signal.SIGKILL)
    time.sleep(1)
    cluster3.start(1)
    thread.join(90)
    assert not thread.is_alive() and not failures, failures
    expected = written.read_bytes()
    assert len(expected) == 16 * MIB and any(expected)
    assert content(cluster3, "v") == expected


def test_by_hand_and_with_filters(cluster3: Cluster, directory: Path) -> None:
    """nbdkit as docs/nbd.md starts it, with its own filters in front of the plugin."""
    cluster3.dog("vdi", "create", "v", "16M")
    data = image(directory / "image", 16 * MIB, 3)
    copy = f"nbdcopy {directory / 'image'} 'nbd+unix:///v?socket='$unixsocket"
    captive(cluster3, [], [], copy)
    assert content(cluster3, "v") == data
    # This filter refuses every write that would change something: what is there is what was written.
    captive(cluster3, ["--filter=checkwrite"], [], copy)
    cluster3.dog("vdi", "write", "v", "5000", "1", stdin=bytes([data[5000] ^ 1]))
    with pytest.raises(AssertionError, match="nbdcopy"):
        captive(cluster3, ["--filter=checkwrite"], [], copy)
    log = directory / "filter.log"
    captive(
        cluster3,
        ["--filter=log", "--filter=delay", "--filter=retry", "--filter=error"],
        [f"logfile={log}", "rdelay=1ms", "wdelay=1ms", "retry-delay=1", "error-pwrite=EIO", "error-pwrite-rate=10%"],
        "qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -f -P 2 1M 4k' -c flush 'nbd+unix:///v?socket='$unixsocket",
    )
    assert "Write" in log.read_text() and "Flush" in log.read_text()
    assert content(cluster3, "v")[: MIB + 4096] == b"\1" * MIB + b"\2" * 4096
    failed = "qemu-io -f raw -c 'read 0 4k' 'nbd+unix:///v?socket='$unixsocket && exit 1 || exit 0"
    captive(cluster3, ["--filter=error"], ["error-pread=EIO", "error-pread-rate=1"], failed)


def test_nbdfuse(cluster3: Cluster, serve: Callable[..., NbdServer], directory: Path, teardown: ExitStack) -> None:
    needs.program("nbdfuse", "fusermount3")
    needs.fuse()
    cluster3.dog("vdi", "create", "v", "16M")
    server = serve(cluster3)
    place = directory / "disk"
    place.touch()
    process = subprocess.Popen(["nbdfuse", str(place), server.uri("v")], env=environment())

    def unmount() -> None:
        run(["fusermount3", "-u", str(place)], check=False)
        process.wait(20)

    teardown.callback(unmount)
    wait_until(lambda: place.stat().st_size == 16 * MIB, 20, "the volume appears")
    with place.open("r+b") as file:
        os.pwrite(file.fileno(), b"through a file".ljust(512), 5 * MIB)
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 1024, 5 * MIB) == b"through a file".ljust(512) + bytes(512)
    assert content(cluster3, "v")[5 * MIB : 5 * MIB + 14] == b"through a file"


def test_requests_are_exchanged_without_pythons_lock(cluster3: Cluster, serve: Callable[..., NbdServer]) -> None:
    """The server has loaded the compiled exchange: everything here has been tested with it."""
    needs.native_exchange()
    cluster3.dog("vdi", "create", "v", "8M")
    server = serve(cluster3)
    nbdsh(server.uri("v"), "h.pwrite(b'x' * 4096, 4096)", "assert h.pread(4096, 4096) == b'x' * 4096")
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/cluster/client/native." in maps
