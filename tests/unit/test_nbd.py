"""The NBD door without nbdkit: names, sharing, locks, what the plugin answers, what clients are told."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.support.fake_sheep import Answer, FakeSheep
from tests.support.processes import run

from sheepdog.cluster.client.address import describe
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.core.errors import Result, UsageError
from sheepdog.cluster.core.ids import ObjectId, is_data
from sheepdog.cluster.core.vdi import LockState
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import VdiState, pack_vdi_state
from sheepdog.frontends.nbd import exports as exports_module
from sheepdog.frontends.nbd.endpoints import SERVER_FILES, Endpoint, Tls, endpoint_of
from sheepdog.frontends.nbd.exports import Export, Exports, Refused, readings
from sheepdog.frontends.nbd.parameters import Parameters, parse_address
from sheepdog.frontends.nbd.serve import Server, clear_away, environment
from sheepdog.frontends.nbd.sockets import widen_accepted

MIB = 1 << 20
SHIFT = 20
PLUGIN = Path(exports_module.__file__).with_name("plugin.py")
# Runs the plugin where nothing is installed, as in the Python that nbdkit was built with.
BARE = """
import runpy, sys, types
sys.path.insert(0, sys.argv[1])
sys.modules["nbdkit"] = types.ModuleType("nbdkit")
runpy.run_path(sys.argv[2])
"""


class Locks:
    """LOCK_VDI, RELEASE_VDI and GET_VDI_COPIES of a cluster that enforces locks."""

    def __init__(self, sheep: FakeSheep) -> None:
        self.held: set[int] = set()
        self._sheep = sheep
        sheep.handlers[Opcode.LOCK_VDI] = self._lock
        sheep.handlers[Opcode.RELEASE_VDI] = self._release
        sheep.handlers[Opcode.GET_VDI_COPIES] = self._states

    def _lock(self, header: bytes, payload: bytes) -> Answer:
        request = wire.VDI_REQUEST.unpack(header)
        found = self._sheep._vdi(request._replace(opcode=Opcode.GET_VDI_INFO), payload)
        answer = wire.VDI_RESPONSE.unpack(found[0])
        if not answer.result:
            if answer.vdi_id in self.held:
                answer = answer._replace(result=Result.VDI_LOCKED)
            self.held.add(answer.vdi_id)
        return wire.VDI_RESPONSE.pack(answer), b""

    def _release(self, header: bytes, payload: bytes) -> Answer:
        request = wire.VDI_REQUEST.unpack(header)
        self.held.discard(request.base_vdi_id)
        return self._sheep._vdi_answer(request, 0)

    def _states(self, header: bytes, payload: bytes) -> Answer:
        owner = self._sheep.members[0].id
        states = [VdiState(vid, 1, 0, 0, 0, SHIFT, 0, LockState.LOCKED, owner, ()) for vid in sorted(self.held)]
        return self._sheep._answer(wire.REQUEST.unpack(header), 0, b"".join(map(pack_vdi_state, states)))


@pytest.fixture
def sheep() -> Iterator[FakeSheep]:
    with FakeSheep() as fake:
        fake.locks = Locks(fake)  # type: ignore[attr-defined]
        yield fake


def door(sheep: FakeSheep, *names: str, **settings: Any) -> Exports:
    return Exports(Parameters(sheep.address, list(names), **settings))


def held(sheep: FakeSheep) -> set[int]:
    found: set[int] = sheep.locks.held  # type: ignore[attr-defined]
    return found


# -- names


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("web", [Export(b"web")]),
        ("web@monday", [Export(b"web@monday"), Export(b"web", b"monday")]),
        ("web@7", [Export(b"web@7"), Export(b"web", b"", 7)]),
        ("web@0", [Export(b"web@0"), Export(b"web", b"0")]),
        ("a@b@c", [Export(b"a@b@c"), Export(b"a@b", b"c")]),
        ("@tag", [Export(b"@tag")]),
        ("web@", [Export(b"web@")]),
        ("", []),
        ("x" * 256, []),
        ("x" * 255, [Export(b"x" * 255)]),
        ("x" * 200 + "@" + "t" * 100, [Export(b"x" * 200, b"t" * 100)]),
        ("\udcff", [Export(b"\xff")]),
    ],
)
def test_readings(text: str, found: list[Export]) -> None:
    assert readings(text) == found


def test_listing_and_default(sheep: FakeSheep) -> None:
    sheep.create("web", 3 * MIB, shift=SHIFT)
    sheep.snapshot("web", b"monday")
    sheep.snapshot("web", b"2024")  # digits would be read as an id
    sheep.create("a@b", MIB, shift=SHIFT)
    names = [name for name, _ in door(sheep).listing()]
    assert names == ["a@b", "web", "web@2", "web@monday"]
    for name in names:
        handle = door(sheep).open(name, True)
        assert str(handle.export) == name
    assert door(sheep).listing()[1][1].startswith("Sheepdog volume, 3M, 3 copies, vid ")
    assert [name for name, _ in door(sheep, "web", "nix").listing()] == ["web", "nix"]
    assert door(sheep).default() == ""
    assert door(sheep, "web").default() == "web"
    assert door(sheep, "web", "a@b").default() == ""
    assert door(sheep, "web", "a@b", default="a@b").default() == "a@b"


def test_what_is_refused(sheep: FakeSheep) -> None:
    sheep.create("web", MIB, shift=SHIFT)
    assert door(sheep).default() == "web"
    sheep.create("other", MIB, shift=SHIFT)
    for exports, name in ((door(sheep), "nix"), (door(sheep), ""), (door(sheep), "web@t"), (door(sheep, "db"), "web")):
        with pytest.raises(Refused) as caught:
            exports.open(name, False)
        assert caught.value.errno == errno.ENOENT
    assert held(sheep) == set()
    sheep.formatted = False
    with pytest.raises(OSError) as other:
        door(sheep).open("web", True)
    assert not isinstance(other.value, Refused)


# -- sharing and locks


def test_a_sheep_that_is_not_there_is_named(tmp_path: Path) -> None:
    with FakeSheep() as sheep:
        sheep.create("web", MIB)
    for address in (sheep.address, str(tmp_path / "sock")):
        exports = Exports(Parameters(address, patience_s=0))
        for asks in (exports.listing, lambda exports=exports: exports.open("web", False)):
            with pytest.raises(Refused, match=f"no sheep at {re.escape(describe(address))}: "):
                asks()


def test_connections_share_one_volume(sheep: FakeSheep) -> None:
    vid = sheep.create("web", 4 * MIB, shift=SHIFT)
    exports = door(sheep)
    first, second = exports.open("web", False), exports.open("web", False)
    assert first.volume is second.volume and held(sheep) == {vid}
    first.volume.write(0, b"one map")
    BlockingVolume.open(sheep.address, "web").resize(6 * MIB)
    third = exports.open("web", False)
    assert third.volume.size == 6 * MIB
    before = sheep.flushes
    exports.close(first)
    exports.close(second)
    assert held(sheep) == {vid}
    exports.close(third)
    assert held(sheep) == set() and sheep.flushes > before
    again = exports.open("web", False)
    assert again.volume is not first.volume and again.volume.read(0, 7) == b"one map"


def test_a_locked_volume_is_refused_with_words(sheep: FakeSheep) -> None:
    vid = sheep.create("web", MIB, shift=SHIFT)
    sheep.snapshot("web", b"t")
    (current,) = sheep.used - {vid}
    one, other = door(sheep), door(sheep)
    mine = one.open("web", False)
    assert held(sheep) == {current}
    with pytest.raises(Refused, match="web is locked by another client") as caught:
        other.open("web", False)
    assert caught.value.errno == errno.EBUSY
    assert held(sheep) == {current}, "a refusal must not release the lock of another"
    for name in ("web@t", "web"):
        other.close(other.open(name, True))  # readers take no lock, and give none back
    one.close(mine)
    other.close(other.open("web", False))
    assert held(sheep) == set()


def test_a_failed_open_gives_the_lock_back(sheep: FakeSheep) -> None:
    vid = sheep.create("web", MIB, shift=SHIFT)
    exports = door(sheep, patience_s=0.1)
    sheep.results[Opcode.READ_OBJ] = Result.EIO
    with pytest.raises(OSError):
        exports.open("web", False)
    assert held(sheep) == set()
    del sheep.results[Opcode.READ_OBJ]
    exports.open("web", False)
    assert held(sheep) == {vid}


def test_exclusive(sheep: FakeSheep) -> None:
    sheep.create("web", MIB, shift=SHIFT)
    exports = door(sheep, exclusive=True)
    handle = exports.open("web", False)
    with pytest.raises(Refused, match="web is in use by another connection"):
        exports.open("web", False)
    exports.close(handle)
    exports.close(exports.open("web", False))
    readers = [exports.open("web", True) for _ in range(2)]
    assert readers[0].volume is readers[1].volume


def test_comings_and_goings_at_once(sheep: FakeSheep) -> None:
    """Whoever opens while the last one closes gets a volume that is open and locked."""
    vid = sheep.create("web", MIB, shift=SHIFT)
    exports = door(sheep)
    failures: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for turn in range(15):
                handle = exports.open("web", False)
                assert held(sheep) == {vid}
                data = b"%d %d" % (me, turn)
                handle.volume.write(100 * me, data)
                assert handle.volume.read(100 * me, len(data)) == data
                exports.close(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == [] and held(sheep) == set()


def test_close_all(sheep: FakeSheep) -> None:
    for name in ("a", "b"):
        sheep.create(name, MIB, shift=SHIFT)
    exports = door(sheep)
    handles = [exports.open(name, False) for name in ("a", "b", "a")]
    handles[0].volume.write(0, b"x")
    before = sheep.flushes
    assert exports.close_all(20) == []
    assert held(sheep) == set() and sheep.flushes >= before + 1
    with pytest.raises(OSError):
        handles[0].volume.read(0, 1)


def test_what_cannot_be_flushed_is_told_in_bounded_time(sheep: FakeSheep) -> None:
    for name in ("a", "b"):
        sheep.create(name, MIB, shift=SHIFT)
    exports = door(sheep)
    for name in ("a", "b"):
        exports.open(name, False).volume.write(0, b"x")
    sheep.delay_s = 60.0  # as a stopped process: connected, and silent
    assert exports.close_all(0.3) == [
        f"{name}: could not be flushed and closed: no answer within 0.3 s" for name in ("a", "b")
    ]


def test_a_failed_last_flush_is_told(plugin: Any, sheep: FakeSheep, capfd: pytest.CaptureFixture[str]) -> None:
    sheep.create("web", MIB, shift=SHIFT)
    sheep.create("b", MIB, shift=SHIFT)
    module, exports = plugin.module, door(sheep)
    handles = [module.open(False), module.open(False)]
    exports.open("b", False)
    sheep.flush_result = Result.EIO
    module.close(handles[0])
    assert capfd.readouterr().err == "", "another client has it open"
    module.close(handles[1])
    told = "could not be flushed and closed: Input/output error (sheep answered 0x03)"
    assert capfd.readouterr().err == f"web: {told}\n"
    assert exports.close_all(20) == [f"b: {told}"]
    assert held(sheep) == set(), "the locks are given back all the same"


# -- zeros


def test_zero_is_fast_where_no_data_is_written(sheep: FakeSheep) -> None:
    sheep.create("web", 6 * MIB + 100, shift=SHIFT)
    handle = door(sheep).open("web", False)
    assert handle.volume.zero_is_fast(5, 6 * MIB)
    handle.volume.write(3 * MIB, b"shared with a snapshot")
    sheep.snapshot("web", b"t")
    handle.volume.write(MIB, b"x" * MIB)
    handle.volume.write(6 * MIB, b"tail")
    for offset, length, fast in (
        (MIB, MIB, True),
        (0, 3 * MIB, True),
        (0, MIB, True),
        (6 * MIB, 100, True),
        (3 * MIB, MIB - 1, False),
        (3 * MIB + 1, MIB - 1, False),
        (2 * MIB, MIB + 1, False),
        (4 * MIB - 1, MIB, False),
        (MIB, MIB - 1, True),
        (MIB + 1, MIB - 1, True),
        (6 * MIB, 99, True),
        (3 * MIB, MIB, True),
        (2 * MIB, 4 * MIB, True),
    ):
        assert handle.volume.zero_is_fast(offset, length) == fast, (offset, length)
        count = len(sheep.log)
        handle.volume.zero(offset, length)
        assert handle.volume.read(offset, length) == bytes(length)
        sent = [entry for entry in sheep.log[count:] if entry[0] in (Opcode.WRITE_OBJ, Opcode.CREATE_AND_WRITE_OBJ)]
        assert fast != any(is_data(ObjectId(entry[2])) for entry in sent), "data was sent, or not"
        if not fast:
            sheep.snapshot("web")
        handle.volume.write(MIB, b"x" * MIB)
        handle.volume.write(6 * MIB, b"tail")


def test_fill_keeps_the_space(sheep: FakeSheep) -> None:
    vid = sheep.create("web", 4 * MIB, shift=SHIFT)
    handle = door(sheep).open("web", False)
    handle.fill(MIB - 10, 2 * MIB + 20, True)
    assert list(sheep.entries(vid)[:4]) == [vid] * 4


# -- the plugin


@pytest.fixture
def plugin(sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as nbdkit loads it, with a stand-in for nbdkit's module."""
    fake = ModuleType("nbdkit")
    fake.__dict__.update(
        THREAD_MODEL_PARALLEL=3, FLAG_MAY_TRIM=1, FLAG_FUA=2, FLAG_FAST_ZERO=8, FUA_NATIVE=2, CACHE_EMULATE=1,
        FLAG_REQ_ONE=4, EXTENT_HOLE=1, EXTENT_ZERO=2, errors=[], export_name=lambda: "web", debug=lambda text: None,
    )  # fmt: skip
    fake.set_error = fake.errors.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nbdkit", fake)
    monkeypatch.setattr(traceback, "format_exception", traceback.format_exception)
    spec = importlib.util.spec_from_file_location("plugin_under_test", PLUGIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.config("address", f"{sheep.address[0]}:{sheep.address[1]}")
    module.config("patience", "0.2")
    module.config_complete()
    return SimpleNamespace(module=module, nbdkit=fake)


def test_plugin_requests(plugin: Any, sheep: FakeSheep) -> None:
    vid = sheep.create("web", 5 * MIB, shift=SHIFT)
    module, nbdkit = plugin.module, plugin.nbdkit
    assert module.thread_model() == nbdkit.THREAD_MODEL_PARALLEL
    handle = module.open(False)
    assert module.get_size(handle) == 5 * MIB
    assert module.block_size(handle) == (512, 4096, MIB)
    assert module.can_write(handle) and module.can_multi_conn(handle) and module.can_extents(handle)
    module.pwrite(handle, memoryview(b"data"), 3 * MIB, 0)
    before = sheep.flushes
    module.pwrite(handle, memoryview(b"more"), MIB, nbdkit.FLAG_FUA)
    buffer = bytearray(6)
    module.pread(handle, memoryview(buffer), MIB - 1, 0)
    assert buffer == b"\0more\0"
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    assert list(module.extents(handle, 4 * MIB, 512, 0)) == [
        (512, MIB - 512, hole), (MIB, 4096, 0), (MIB + 4096, 2 * MIB - 4096, hole), (3 * MIB, 4096, 0),
        (3 * MIB + 4096, MIB - 4096 + 512, hole),
    ]  # fmt: skip
    assert list(module.extents(handle, 4 * MIB, MIB, nbdkit.FLAG_REQ_ONE)) == [
        (MIB, 4096, 0), (MIB + 4096, 2 * MIB - 4096, hole)
    ]  # fmt: skip
    module.zero(handle, MIB, MIB, nbdkit.FLAG_MAY_TRIM | nbdkit.FLAG_FAST_ZERO)
    assert sheep.entries(vid)[1] == 0
    module.zero(handle, 100, 0, 0)
    assert sheep.entries(vid)[0] == vid, "without MAY_TRIM the space is kept"
    sheep.snapshot("web", b"t")
    for flags in (nbdkit.FLAG_FAST_ZERO, nbdkit.FLAG_FAST_ZERO | nbdkit.FLAG_MAY_TRIM):
        module.pwrite(handle, memoryview(b"x"), MIB, 0)  # learns of the snapshot
        with pytest.raises(OSError):
            module.zero(handle, 100, 3 * MIB, flags)
        assert nbdkit.errors.pop() == errno.EOPNOTSUPP
    module.trim(handle, 2 * MIB, 3 * MIB, nbdkit.FLAG_FUA)
    assert sheep.entries(sheep.vid("web"))[3] == 0 and sheep.flushes > before
    before = sheep.flushes
    module.flush(handle, 0)
    assert sheep.flushes == before + 1
    module.close(handle)


def test_plugin_errors(plugin: Any, sheep: FakeSheep) -> None:
    sheep.create("web", 5 * MIB, shift=SHIFT)
    module, nbdkit = plugin.module, plugin.nbdkit
    handle = module.open(False)
    module.pwrite(handle, memoryview(b"x"), 0, 0)
    for result, number in (
        (Result.EIO, errno.EIO),
        (Result.NO_SPACE, errno.ENOSPC),
        (Result.INVALID_PARMS, errno.EINVAL),
        (Result.HALT, errno.EIO),
    ):
        sheep.results[Opcode.WRITE_OBJ] = result
        with pytest.raises(OSError):
            module.pwrite(handle, memoryview(b"x"), 0, 0)
        assert nbdkit.errors.pop() == number
    frozen = module.open(True)
    assert frozen.volume is handle.volume
    with pytest.raises(OSError):
        module.pwrite(handle, memoryview(b"x"), 5 * MIB, 0)
    assert nbdkit.errors.pop() == errno.ENOSPC
    module.close(frozen)
    module.close(handle)
    reader = module.open(True)
    assert not module.can_write(reader)
    with pytest.raises(OSError):
        module.pwrite(reader, memoryview(b"x"), 0, 0)
    assert nbdkit.errors.pop() == errno.EPERM, "EROFS is no error of NBD's"
    begin = time.monotonic()
    sheep.__exit__(None, None, None)
    with pytest.raises(OSError):
        module.pread(reader, memoryview(bytearray(1)), 0, 0)
    assert nbdkit.errors.pop() == errno.EIO and time.monotonic() - begin < 10


def test_plugin_messages_are_one_line(plugin: Any) -> None:
    module = plugin.module
    with pytest.raises(Refused) as caught:
        module.open(False)
    assert traceback.format_exception(Refused, caught.value, caught.tb) == ["there is no volume or snapshot web"]
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        assert len(traceback.format_exception(type(error), error, error.__traceback__)) > 1, "a bug keeps its trace"
    with pytest.raises(UsageError):
        module.config("adress", "x")


# -- the command line


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7001", ("10.0.0.1", 7001)),
        ("host", ("host", 7000)),
        ("[::1]:7001", ("::1", 7001)),
        ("[::1]", ("::1", 7000)),
        ("::1", ("::1", 7000)),
        ("/run/sock", "/run/sock"),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address


def test_parameters_survive_the_command_line() -> None:
    for parameters in (
        Parameters(),
        Parameters(("::1", 7001), ["a", "b=c"], "a", True, 2.5),
        Parameters("/run/sock", patience_s=0, spread=True, swap=True),
    ):
        again = Parameters()
        for word in parameters.words():
            again.set(*word.split("=", 1))
        assert again == parameters
    for key, value in (("address", "x:y"), ("exclusive", "yes"), ("swap", "yes"), ("patience", "long"), ("x", "")):
        with pytest.raises(UsageError):
            Parameters().set(key, value)


def test_nbdkit_command() -> None:
    server = Server(endpoint_of("/run/s", "", "pki", "", True), Parameters(volumes=["v"], swap=True), True, threads=4)
    words = server.command()
    assert words[:3] == ["nbdkit", "--foreground", "--log=stderr"]
    for word in ("--readonly", "--threads=4", "swap=1", "--tls=require", "--tls-verify-peer", "volume=v"):
        assert word in words
    assert f"--tls-certificates={Path('pki').absolute()}" in words
    assert str(PLUGIN) in words
    plain = Server(endpoint_of("", "", "", "", False)).command()
    assert not [word for word in plain if "tls" in word]
    assert environment({"PYTHONPATH": "/x"})["PYTHONPATH"].endswith(":/x")
    assert environment({})["LISTEN_PID"] == str(os.getpid())


def test_clients_at_a_unix_socket_get_room_for_large_answers(plugin: Any, sheep: FakeSheep, directory: Path) -> None:
    """Only they: what listens, and what this process has connected itself, stays as it was; nothing is left open."""
    sheep.create("web", 5 * MIB, shift=SHIFT)
    with Server(Endpoint(str(directory / "s"))).listen() as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            plugin.module.close(plugin.module.open(False))
            assert room(accepted) > room(client) == room(listener)
            before = set(os.listdir("/proc/self/fd"))
            widen_accepted()
            assert set(os.listdir("/proc/self/fd")) <= before  # a thread of another test may still close its own


def room(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_the_socket_has_its_permissions(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(directory / "s")
    server = Server(Endpoint(path), mode=0o640)
    listener = server.listen()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    with pytest.raises(OSError, match="a server listens"):
        server.listen()
    listener.close()
    server.listen().close()  # what was left behind goes away
    os.unlink(path)
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        clear_away(path)
    assert Path(path).read_text() == "precious"
    with pytest.raises(UsageError, match="no group"):
        Server(Endpoint(str(directory / "t")), group="no such group").listen()

    def refuse(path: str, **_: str) -> None:
        raise PermissionError(errno.EPERM, "not permitted", path)

    monkeypatch.setattr("shutil.chown", refuse)
    with pytest.raises(PermissionError):
        Server(Endpoint(str(directory / "t")), group="root").listen()
    assert not (directory / "t").exists()
    with pytest.raises(OSError, match="too long"):
        Server(Endpoint(str(directory / ("x" * 200)))).listen()
    with pytest.raises(UsageError, match="cannot listen at nohost"):
        Server(Endpoint(("nohost.invalid", 1))).listen()


@pytest.mark.parametrize("content", [b"", b"alice\n", b"\xff\xfe\0" * 100, b"\0:\1\n"], ids=repr)
def test_what_is_no_file_of_keys_is_told_before_the_server_is(directory: Path, content: bytes) -> None:
    keys = directory / "keys.psk"
    keys.write_bytes(content)
    with pytest.raises(UsageError, match="no keys"):
        Tls(keys=str(keys)).check_server()
    assert Endpoint("/run/s", Tls(keys=str(keys))).uri("v").startswith("nbds+unix://USER@/v?")
    with pytest.raises(OSError, match="directory"):
        Tls(keys=str(directory)).check_server()
    with pytest.raises(OSError, match="No such file"):
        Tls(keys=str(directory / "none")).check_server()


def test_certificates_are_looked_for_before_the_server_is_told(directory: Path) -> None:
    pki = Tls(str(directory))
    for name in SERVER_FILES:
        with pytest.raises(UsageError, match=f"there is no {name}"):
            pki.check_server()
        (directory / name).touch()
    pki.check_server()


def test_what_clients_will_miss(directory: Path) -> None:
    other = directory / "other.psk"
    assert "not on this host" in Tls(keys=str(other)).client_lacks()
    other.write_text("alice:00ff\n")
    assert "keys.psk only" in Tls(keys=str(other)).client_lacks()
    assert not Tls(keys=str(other.rename(directory / "keys.psk"))).client_lacks()
    pki = Endpoint(("h", 1), Tls(str(directory)))
    assert "there is no ca-cert.pem on this host" in pki.tls.client_lacks()
    assert "-certfile" not in pki.kernel("v"), "the server's directory has no certificate of a client's"
    for name in ("ca-cert.pem", "client-cert.pem"):
        (directory / name).touch()
    assert not pki.tls.client_lacks()
    assert "-certfile" in pki.kernel("v")
    assert not Tls().client_lacks()


def test_a_certificate_is_of_a_host_also_at_a_socket() -> None:
    socket, host = Endpoint("/run/s", Tls("/pki")), Endpoint(("h", 1), Tls("/pki"))
    assert socket.blockdev("v")[-1].endswith(",tls-creds=tls0,tls-hostname=localhost")
    assert socket.drive("v")[-1].endswith(",file.tls-creds=tls0,file.tls-hostname=localhost")
    assert "tls='yes' tlsHostname=\"localhost\"" in socket.libvirt("v")
    assert "hostname" not in host.blockdev("v")[-1]
    assert host._replace(tls=Tls("/pki", hostname="n")).blockdev("v")[-1].endswith(",tls-hostname=n")
    assert "hostname" not in Endpoint("/run/s", Tls(keys="/k")).drive("v")[-1].lower()


def test_uris() -> None:
    assert Endpoint(("10.0.0.1", 10809)).uri("web@t") == "nbd://10.0.0.1/web@t"
    assert Endpoint(("::1", 1)).uri("a/b c") == "nbd://[::1]:1/a%2Fb%20c"
    assert Endpoint("/run/a b").uri("v") == "nbd+unix:///v?socket=/run/a%20b"
    assert Endpoint(("h", 10809), Tls("/pki")).uri("v") == "nbds://h/v?tls-certificates=/pki"
    assert Endpoint(("", 10809)).uri("v") == f"nbd://{socket.gethostname()}/v"


def test_words_for_qemu_and_the_kernel(directory: Path) -> None:
    keys = directory / "keys.psk"
    keys.write_text("alice:00ff\nbob:11\n")
    endpoint = Endpoint("/run/a,b", Tls(keys=str(keys)))
    assert endpoint.uri("v") == f"nbds+unix://alice@/v?socket=/run/a%2Cb&tls-psk-file={keys}"
    assert endpoint.drive("v,1") == [
        "-object",
        f"tls-creds-psk,id=tls0,endpoint=client,username=alice,dir={directory}",
        "-drive",
        "if=virtio,format=raw,discard=unmap,file.driver=nbd,file.server.type=unix,file.server.path=/run/a,,b,"
        "file.export=v,,1,file.tls-creds=tls0",
    ]
    assert endpoint.blockdev("v")[-1].startswith("driver=nbd,node-name=disk0,discard=unmap,server.type=unix,")
    assert endpoint.blockdev("v@t", True)[-1].startswith("driver=nbd,node-name=disk0,read-only=on,server.type=unix,")
    assert endpoint.drive("v@t", True)[-1].startswith("if=virtio,format=raw,readonly=on,file.driver=nbd,")
    assert (endpoint.libvirt("v"), endpoint.kernel("v")) == ("", []), "they know no keys"
    assert "tls='yes'" in Endpoint(("h", 1), Tls(certificates="/pki")).libvirt("v")
    assert 'name="a&lt;b"' in Endpoint(("h", 1)).libvirt("a<b")
    assert "<readonly/>" in Endpoint(("h", 1)).libvirt("v@t", True)
    assert "<readonly/>" not in Endpoint(("h", 1)).libvirt("v")
    words = Endpoint(("h", 1)).kernel("v")
    assert words[:3] == ["nbd-client", "h", "1"]
    # By itself the kernel gives up one connection of several after 30 s, which a cluster without quorum may take.
    assert int(words[words.index("-timeout") + 1]) >= 3600
    with pytest.raises(UsageError):
        endpoint_of("", "/run/x", "", "", False)


def test_the_plugin_needs_no_installed_package() -> None:
    """nbdkit's Python is the system's, also when `dog` runs from an environment of its own."""
    source = environment({})["PYTHONPATH"]
    run([sys.executable, "-I", "-S", "-c", BARE, source, PLUGIN])
