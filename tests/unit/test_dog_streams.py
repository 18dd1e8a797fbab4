"""Commands that move the bytes of volumes: several requests under way, outcomes in order, streams proved first."""

from __future__ import annotations

import io
import random
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import pytest
from tests.support.fake_sheep import FakeSheep
from tests.unit.conftest import Dog
from xxhash import xxh3_64_intdigest

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import connect, connect_near
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.inode import HEADER_SIZE
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.same_host import LOOPBACK, local_name
from sheepdog.tools.dog import backup, check, filling, transfer
from sheepdog.tools.dog import data as data_commands
from sheepdog.tools.dog.difference import SIZE, Piece, Shape, Writer, pieces, proved
from sheepdog.tools.dog.main import main
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.window import WIDTH, buffers, in_order, is_zero, run_all, unequal_range

MIB = 1 << 20
LIMIT_S = 20.0
CHANGES = {Opcode.NEW_VDI, Opcode.DEL_VDI, Opcode.WRITE_OBJ, Opcode.CREATE_AND_WRITE_OBJ, Opcode.REMOVE_OBJ}


# -- the window


def test_outcomes_come_in_order_and_no_more_is_begun_than_fits() -> None:
    begun = 0
    gates = [threading.Event() for _ in range(20)]

    def call(number: int) -> int:
        assert gates[number].wait(LIMIT_S)
        return number

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal begun
        for number in range(20):
            begun += 1
            yield partial(call, number)

    taken = []
    for gate in gates[1:]:
        gate.set()  # all could be ready before the first
    threading.Timer(0.05, gates[0].set).start()
    for number in in_order(calls(), width=3):
        assert begun <= number + 3
        taken.append(number)
    assert taken == list(range(20))


def test_calls_run_at_the_same_time() -> None:
    together = threading.Barrier(WIDTH, timeout=LIMIT_S)
    run_all(together.wait for _ in range(2 * WIDTH))


def test_the_first_error_in_order_is_told_when_nothing_is_under_way() -> None:
    later = threading.Event()
    ended: list[str] = []

    def fail_first() -> None:
        assert later.wait(LIMIT_S)
        raise OSError("first")

    def fail_second() -> None:
        later.set()
        raise OSError("second")

    def end_slowly() -> None:
        time.sleep(0.1)
        ended.append("slow")

    begun = iter([fail_first, fail_second, end_slowly])
    with pytest.raises(OSError, match="first"):
        run_all((*begun, *repeat(lambda: ended.append("never"), 3)), width=3)
    assert ended == ["slow"]


def test_buffers_are_used_again_when_their_call_is_over() -> None:
    def fill(space: memoryview, number: int) -> tuple[memoryview, int]:
        space[:] = bytes([number]) * len(space)
        return space, number

    space = buffers(WIDTH, 64)
    for data, number in in_order(partial(fill, next(space), number) for number in range(100)):
        assert set(data) == {number}


@pytest.mark.parametrize("seed", range(20))
def test_unequal_range_is_that_of_a_plain_comparison(seed: int) -> None:
    chooser = random.Random(seed)
    size = chooser.choice([512, 4096, 65536, 65536 + 512, 300_000])
    first = bytearray(chooser.randbytes(size))
    second = first.copy()
    for _ in range(chooser.choice([0, 1, 1, 2, 9])):
        second[chooser.randrange(size)] ^= 1 << chooser.randrange(8)
    differing = [at for at in range(0, size, 512) if first[at : at + 512] != second[at : at + 512]]
    expected = (differing[0], min(differing[-1] + 512, size)) if differing else (size, size)
    assert unequal_range(memoryview(first), memoryview(second), 512) == expected


def test_zeros() -> None:
    for size in (0, 1, 65536, 65537, 200_000):
        data = bytearray(size)
        assert is_zero(data)
        for at in {0, size // 2, size - 1} if size else ():
            data[at] = 1
            assert not is_zero(data)
            data[at] = 0


# -- what uses it


def output(patched: pytest.MonkeyPatch, *words: str) -> bytes:
    """The bytes that a command writes."""
    out = io.BytesIO()
    patched.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
    assert main(words) == 0
    return out.getvalue()


def test_several_requests_are_under_way(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these commands would wait for ever if it asked for one part after the other."""
    sheep.create("a", 4 * WIDTH * MIB)
    data = random.Random(1).randbytes(4 * WIDTH * MIB)
    dog("vdi", "snapshot", "-s", "old", "a")

    def with_all(call: Callable[..., object]) -> Callable[..., object]:
        together = threading.Barrier(WIDTH, timeout=LIMIT_S)

        def wrapped(*arguments: object) -> object:
            together.wait()
            return call(*arguments)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(BlockingVolume, "write", with_all(BlockingVolume.write))
        patched.setattr(BlockingVolume, "read_into", with_all(BlockingVolume.read_into))
        assert dog("vdi", "write", "a", stdin=data) == (0, "", "")
        assert sheep.content(sheep.vid("a")) == data
        assert output(patched, "vdi", "read", "a") == data
    dog("vdi", "snapshot", "-s", "new", "a")
    with monkeypatch.context() as patched:
        patched.setattr(Channel, "ask", with_all(Channel.ask))
        stream = output(patched, "vdi", "backup", "a", "-F", "old", "-s", "new")
    assert len(stream) == 8 + WIDTH * (16 + 4 * MIB) + 16
    with monkeypatch.context() as patched:
        patched.setattr(BlockingVolume, "write", with_all(BlockingVolume.write))
        assert dog("vdi", "restore", "-s", "old", "a", stdin=stream) == (0, "", "")


# -- backup and restore


@pytest.mark.parametrize("original", [False, True])
def test_backup_and_restore(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch, original: bool) -> None:
    sheep.create("a", 10 * MIB)
    dog("vdi", "write", "a", "0", "9M", stdin=b"a" * 9 * MIB)
    dog("vdi", "snapshot", "-s", "t1", "a")
    dog("vdi", "write", "a", "5000", "1", stdin=b"b")
    dog("vdi", "snapshot", "-s", "t2", "a")
    dog("vdi", "write", "a", "0", "3", stdin=b"now")
    assert dog("vdi", "backup", "a", "-s", "t2")[::2] == (64, "Please specify snapshots with '-F' and '-s' options\n")
    with monkeypatch.context() as patched:
        stream = output(patched, "vdi", "backup", "a", "-F", "t1", "-s", "t2")
    assert len(stream) == 8 + 16 + 512 + 16
    assert stream[:20] == bytes.fromhex("01000000 92119211 00000000 00120000 00020000")
    assert stream[20:24] == (xxh3_64_intdigest(stream[:20] + stream[24:536]) & 0xFFFFFFFF).to_bytes(4, "little")
    assert dog("vdi", "restore", "a")[::2] == (
        64,
        "We can restore a backup file only to snapshots\nPlease specify the '-s' option\n",
    )
    assert dog("vdi", "restore", "-s", "nono", "a") == (1, "", "Snapshot ID 0 or tag nono doesn't exist\n")
    before = dog("vdi", "list", "-r")
    flipped = [
        stream[:at] + bytes([stream[at] ^ 4]) + stream[at + 1 :] for at in (8, 13, 17, 21, 24, 535, 537, 545, 551)
    ]
    for bad in (b"", b"garbage!", stream[:30], stream[:-1], *flipped):
        sheep.log.clear()
        assert dog("vdi", "restore", "-s", "t1", "a", stdin=bad) == (1, "", "The backup file is corrupted\n")
        assert {opcode for opcode, *_ in sheep.log}.isdisjoint(CHANGES), "nothing is touched"
    assert dog("vdi", "list", "-r") == before
    if original:  # Sheepdog 1.0 wrote no checks
        stream = stream[:20] + bytes(4) + stream[24:540] + bytes(12)
    assert dog("vdi", "restore", "-s", "t1", "a", stdin=stream) == (0, "", "")
    assert dog("vdi", "read", "a", "0", "4")[1] == "nowa"
    rows = [row.split(" ") for row in dog("vdi", "list", "-r")[1].splitlines()]
    restored = [row[2] for row in rows if row[0] == "s" and not row[9]]
    assert len(restored) == 1
    assert len(rows) == 4
    assert dog("vdi", "read", "a", "-s", restored[0], "4999", "3")[1] == "aba"


def test_a_volume_that_has_grown(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the old end is there, and the size is the new one to the byte."""
    first, last = b"first" * 2000, b"last" * 100
    sheep.create("a", 6 * MIB + 1)
    dog("vdi", "write", "a", "5000", str(len(first)), stdin=first)
    dog("vdi", "snapshot", "-s", "t1", "a")
    assert dog("vdi", "resize", "a", str(13 * MIB + 7)) == (0, "", "")
    dog("vdi", "write", "a", str(13 * MIB + 7 - len(last)), stdin=last)
    dog("vdi", "snapshot", "-s", "t2", "a")
    wanted = sheep.content(sheep.vid("a"))
    assert wanted.endswith(last)
    with monkeypatch.context() as patched:
        stream = output(patched, "vdi", "backup", "a", "-F", "t1", "-s", "t2")
    assert stream[8:20] == bytes.fromhex("feffffff 00000000 08000000")
    assert stream[24:32] == (13 * MIB + 7).to_bytes(8, "little")
    dog("vdi", "rollback", "-f", "-s", "t1", "a")
    dog("vdi", "delete", "-s", "t2", "a")
    assert dog("vdi", "restore", "-s", "t1", "a", stdin=stream) == (0, "", "")
    rows = [row.split(" ") for row in dog("vdi", "list", "-r", "a")[1].splitlines()]
    assert [row[3] for row in rows] == [str(size) for size in (6 * MIB + 1, 13 * MIB + 7, 6 * MIB + 1)]
    with monkeypatch.context() as patched:
        assert output(patched, "vdi", "read", "a", "-s", rows[1][2]) == wanted


def test_a_size_is_told_once_and_first_and_can_be() -> None:
    def stream(*records: tuple[int, bytes]) -> io.BytesIO:
        out = io.BytesIO()
        writer = Writer(out)
        for index, data in records:
            writer.add(index, 0, data)
        writer.end()
        return io.BytesIO(out.getvalue())

    shape = Shape(1, 4 * MIB)
    small, large, huge = (size.to_bytes(8, "little") for size in (MIB, 5 * MIB, (1 << 42) + 1))
    for records in ([(SIZE, large), (1, bytes(512))], [(SIZE, small), (0, bytes(512))]):
        with proved(stream(*records), shape) as (_, total):
            assert total == 8 + 512
    for bad in (
        [(SIZE, small), (1, bytes(512))],
        [(SIZE, large), (2, bytes(512))],
        [(SIZE, huge)],
        [(SIZE, large[:4])],
        [(SIZE, large), (SIZE, large)],
        [(0, bytes(512)), (SIZE, large)],
    ):
        with pytest.raises(Failure, match="corrupted"), proved(stream(*bad), shape):
            pytest.fail("an unsound stream was offered")


def old_and_now(dog: Dog, sheep: FakeSheep) -> None:
    """Volume `a` begins with "old" in its snapshot t1, and with "now" itself."""
    sheep.create("a", 10 * MIB)
    dog("vdi", "write", "a", "0", "3", stdin=b"old")
    dog("vdi", "snapshot", "-s", "t1", "a")
    dog("vdi", "write", "a", "0", "3", stdin=b"now")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), OSError("gone")])
def test_a_restore_that_breaks_off_gives_the_former_state_back(
    dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old_and_now(dog, sheep)
    stream = io.BytesIO()
    writer = Writer(stream)
    for number in range(2):
        writer.add(number, 0, bytes(512))
    writer.end()

    def interrupted(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(BlockingVolume, "write", interrupted)
        try:
            assert dog("vdi", "restore", "-s", "t1", "a", stdin=stream.getvalue())[0] in (2, 130)
        except SystemExit:
            assert isinstance(error, SystemExit)
    assert dog("vdi", "read", "a", "0", "3")[1] == "now"
    assert [row.split(" ")[0] for row in dog("vdi", "list", "-r", "a")[1].splitlines()] == ["s", "="]


def test_only_one_restore_at_a_time(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one would keep the first one's half of the work, and go back to that."""
    old_and_now(dog, sheep)
    stream = io.BytesIO()
    writer = Writer(stream)
    writer.add(0, 0, b"new".ljust(512))
    writer.end()
    others: list[tuple[int, str, str]] = []
    write = BlockingVolume.write

    def meanwhile(volume: BlockingVolume, *words: Any) -> None:
        if not others:
            others.append((0, "", ""))  # its own writes are no such moment
            others.append(dog("vdi", "restore", "-s", "t1", "a", stdin=stream.getvalue()))
        write(volume, *words)

    with monkeypatch.context() as patched:
        patched.setattr(BlockingVolume, "write", meanwhile)
        assert dog("vdi", "restore", "-s", "t1", "a", stdin=stream.getvalue())[0] == 0
    status, _, told = others[1]
    assert (status, told.splitlines()[0]) == (1, "a is being restored, or was by a command that was killed.")
    assert dog("vdi", "read", "a", "0", "3")[1] == "now"
    rows = [row.split(" ") for row in dog("vdi", "list", "-r", "a")[1].splitlines()]
    assert [(row[0], row[9]) for row in rows] == [("s", "t1"), ("s", ""), ("=", "")]
    assert dog("vdi", "read", "-s", rows[1][2], "a", "0", "3")[1] == "new"


class Pipe(io.BytesIO):
    """Cannot be read twice."""

    def seekable(self) -> bool:
        return False


def big_stream(count: int) -> bytes:
    stream = io.BytesIO()
    writer = Writer(stream)
    for number in range(count):
        writer.add(number, 0, random.Random(number).randbytes(4 * MIB))
    writer.end()
    return stream.getvalue()


def test_a_pipe_is_proved_without_holding_it_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    stream = big_stream(16)
    shape = Shape(16, 4 * MIB)
    source = Pipe(stream)
    tracemalloc.start()
    try:
        with proved(source, shape) as (sound, total):
            assert total == 16 * 4 * MIB
            found = [crc32(piece.data) for piece in pieces(sound, shape, repeat(memoryview(bytearray(MIB))))]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [
        crc32(random.Random(n).randbytes(4 * MIB)[at : at + MIB]) for n in range(16) for at in range(0, 4 * MIB, MIB)
    ]
    assert peak < 8 * MIB
    assert not list(tmp_path.iterdir()), "the file has no name"
    with pytest.raises(Failure, match="corrupted"), proved(Pipe(stream[:-1]), shape):
        pytest.fail("an unsound stream was offered")


def test_no_room_for_a_pipe_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    expected = pytest.raises(Failure, match=r"Failed to keep the stream in .*none: No such file or directory")
    with expected, proved(Pipe(big_stream(1)), Shape(1, 4 * MIB)):
        pytest.fail("nothing was kept")


def test_ranges_outside_the_volume_are_refused() -> None:
    for shape in (Shape(1, 4 * MIB), Shape(2, 4 * MIB - 512)):
        with pytest.raises(Failure, match="corrupted"), proved(io.BytesIO(big_stream(2)), shape):
            pytest.fail("an unsound stream was offered")


def test_what_follows_a_stream_is_left_alone() -> None:
    source = io.BytesIO(b"before" + big_stream(1) + b"after")
    source.seek(6)
    shape = Shape(1, 4 * MIB)
    with proved(source, shape) as (sound, _):
        assert [Piece(*piece[:2], memoryview(b"")) for piece in pieces(sound, shape, buffers())] == [
            Piece(0, 0, memoryview(b""))
        ]
    assert source.read() == b"after"


# -- progress


class Recorder:
    """In place of Progress: what commands count."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        Recorder.made.append(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int) -> None:
        self.done += count


def test_whatever_moves_many_bytes_counts_them(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backup, check, data_commands, filling):
        monkeypatch.setattr(module, "Progress", Recorder)
    monkeypatch.setattr(check, "_repair_object", lambda *_: None)
    Recorder.made.clear()
    dog("vdi", "create", "-P", "a", "10M")
    dog("vdi", "snapshot", "-s", "t1", "a")
    dog("vdi", "write", "a", "3M", stdin=b"x" * 5 * MIB)
    dog("vdi", "snapshot", "-s", "t2", "a")
    with monkeypatch.context() as patched:
        assert output(patched, "vdi", "read", "a", "1M", "5M") == bytes(2 * MIB) + b"x" * 3 * MIB
        stream = output(patched, "vdi", "backup", "a", "-F", "t1", "-s", "t2")
    dog("vdi", "restore", "-s", "t1", "a", stdin=stream)
    dog("vdi", "clone", "-n", "-s", "t2", "a", "b")
    dog("vdi", "check", "a")
    assert [(one.title, one.total) for one in Recorder.made] == [
        ("copy", 12 * MIB), ("write", 5 * MIB), ("read", 5 * MIB), ("backup", 8 * MIB), ("restore", 5 * MIB),
        ("copy", 12 * MIB), ("check", 16 * MIB),
    ]  # fmt: skip
    assert [one.done for one in Recorder.made] == [
        12 * MIB, 5 * MIB, 5 * MIB, 8 * MIB, 5 * MIB, 12 * MIB, 16 * MIB,
    ]  # fmt: skip


# -- copies


@pytest.mark.parametrize("words", [("clone", "-n", "-s", "t", "a", "b"), ("create", "-P", "b", "10M")])
def test_a_volume_that_cannot_be_filled_is_not_left_behind(dog: Dog, sheep: FakeSheep, words: tuple[str, ...]) -> None:
    """Its name would stand for a copy that lacks what came after the failure."""
    sheep.create("a", 10 * MIB)
    dog("vdi", "write", "a", stdin=b"a" * 10 * MIB)
    dog("vdi", "snapshot", "-s", "t", "a")
    before = dog("vdi", "list", "-r")
    sheep.results[Opcode.CREATE_AND_WRITE_OBJ] = Result.NO_SPACE
    assert dog("vdi", *words) == (1, "", "Server has no space for new objects\n")
    del sheep.results[Opcode.CREATE_AND_WRITE_OBJ]
    assert dog("vdi", "list", "-r") == before
    assert dog("vdi", *words) == (0, "", "")


def test_only_a_copy_needs_the_map_of_its_source(dog: Dog, sheep: FakeSheep) -> None:
    sheep.create("a", 4 << 40)
    dog("vdi", "snapshot", "-s", "t", "a")
    sheep.log.clear()
    assert dog("vdi", "clone", "-s", "t", "a", "b") == (0, "", "")
    assert sum(length for _, _, _, _, length in sheep.log) == HEADER_SIZE
    assert dog("vdi", "clone", "-n", "-s", "t", "a", "c") == (0, "", "")
    assert sum(length for _, _, _, _, length in sheep.log) == 2 * HEADER_SIZE + (4 << 20)


# -- the way on one host


def test_a_sheep_on_this_host_is_reached_without_tcp() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener, socket.socket(socket.AF_UNIX) as near:
        address = listener.getsockname()
        with connect_near(address) as found:
            assert found.family == socket.AF_INET
        near.bind(local_name(address[1]))
        near.listen()
        with connect_near(address) as found:
            assert found.family == socket.AF_UNIX
        with connect(address) as found:
            assert found.family == socket.AF_INET


def test_what_moves_many_bytes_goes_the_near_way(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    near: list[str] = []

    def connect_here(module: str, address: Address) -> socket.socket:
        near.append(module)
        return connect(address)

    for module in (backup, data_commands, filling, transfer):
        monkeypatch.setattr(module, "connect_near", partial(connect_here, module.__name__.rpartition(".")[2]))
    dog("vdi", "create", "-P", "a", "4M")
    dog("vdi", "write", "a", stdin=b"x")
    dog("vdi", "snapshot", "-s", "t1", "a")
    dog("vdi", "export", "a", "/dev/null")
    with monkeypatch.context() as patched:
        stream = output(patched, "vdi", "backup", "a", "-F", "t1", "-s", "t1")
    dog("vdi", "restore", "-s", "t1", "a", stdin=stream)
    assert list(dict.fromkeys(near)) == ["filling", "data", "transfer", "backup"]
