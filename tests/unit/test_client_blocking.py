"""The blocking volume: the same promises from many threads."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
import threading
from functools import partial

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import lookup
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import is_data
from sheepdog.cluster.wire.header import VDI_RESPONSE
from sheepdog.cluster.wire.opcodes import Opcode

MIB = 1 << 20
SHIFT = 20


def test_reads_and_writes_at_any_alignment() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", 5 * MIB + 7, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        model = bytearray(volume.size)
        chance = random.Random(2)
        for _ in range(60):
            offset = chance.randrange(volume.size)
            data = chance.randbytes(min(chance.choice((1, 600, 5000, 3 * MIB)), volume.size - offset))
            volume.write(offset, data, durable=chance.random() < 0.5)
            model[offset : offset + len(data)] = data
            start = chance.randrange(volume.size)
            assert volume.read(start, 2 * MIB) == model[start : start + 2 * MIB]
        volume.zero(MIB + 1, 2 * MIB, durable=True)
        model[MIB + 1 : 3 * MIB + 1] = bytes(2 * MIB)
        buffer = bytearray(b"?" * 6 * MIB)
        assert volume.read_into(0, memoryview(buffer)) == volume.size
        assert buffer == model + b"?" * (6 * MIB - volume.size)
        with pytest.raises(OSError) as caught:
            volume.write(volume.size - 1, b"ab")
        assert caught.value.errno == errno.ENOSPC
        volume.discard(0, volume.size)
        volume.resize(6 * MIB)
        assert volume.read(0, 6 * MIB) == bytes(6 * MIB)
        volume.close()
        assert sheep.inode(vid).vdi_size == 6 * MIB
        assert not any(is_data(oid) for oid in sheep.objects)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_threads_share_a_map(seed: int) -> None:
    """Each thread owns every eighth 1000 bytes, so all of them create and copy the same objects."""
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v", patience_s=5)
        model = bytearray(volume.size)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            chance = random.Random(seed * 100 + number)
            try:
                for step in range(30):
                    offset = (chance.randrange(volume.size // 8000) * 8 + number) * 1000
                    data = chance.randbytes(1000)
                    volume.write(offset, data, durable=chance.random() < 0.2)
                    model[offset : offset + 1000] = data
                    assert volume.read(offset, 1000) == data
                    if number == 0 and step % 10 == 5:
                        with sheep.lock:
                            sheep.snapshot("v")
                    if number == 1 and step % 10 == 7:
                        sheep.cut()
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert volume.read(0, volume.size) == model
        vid = volume.inode.vdi_id
        volume.close()
        assert sheep.content(vid) == model


def test_no_gateway() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", MIB)
        impatient = Connection(sheep.address, patience_s=0)
        volume = BlockingVolume.open(sheep.address, "v", patience_s=0.2)
        volume.write(0, b"y" * 4096)
        sheep.__exit__(None, None, None)
        request = lookup(b"v")
        for _ in range(2):  # cut, then refused
            with pytest.raises(ConnectionError):
                impatient.ask(request.header, request.payload)
        for call in (
            partial(volume.write, 0, b"x"),
            volume.flush,
            partial(volume.discard, 0, MIB),
            partial(volume.zero, 0, 4096),
            volume.refresh,
        ):
            with pytest.raises(OSError, match="no gateway at") as caught:
                call()
            assert caught.value.errno == errno.EIO


def test_a_lookup_tells_its_result() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", MIB)
        connection = Connection(sheep.address)
        found, missing = lookup(b"v"), lookup(b"w")
        assert VDI_RESPONSE.unpack(connection.call(found.header, found.payload).header).vdi_id == vid
        assert connection.ask(missing.header, missing.payload).result == Result.NO_VDI
        with pytest.raises(SheepError) as caught:
            connection.call(missing.header, missing.payload)
        assert caught.value.errno == errno.ENOENT
        sheep.handlers[Opcode.GET_VDI_INFO] = lambda header, payload: (b"\xff" * 48, b"")
        liar = Connection(sheep.address, patience_s=0)
        with pytest.raises(OSError):
            liar.ask(found.header, found.payload)
        connection.close()


def test_no_event_loop_is_imported() -> None:
    code = "import sys; import sheepdog.cluster.client.blocking; print('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "False\n"


def test_refresh_learns_what_others_did() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 2 * MIB, shift=SHIFT)
        writer = BlockingVolume.open(sheep.address, "v")
        reader = BlockingVolume.open(sheep.address, "v", read_only=True)
        writer.write(5, b"first")
        assert reader.read(5, 5) == bytes(5)
        other = BlockingVolume.open(sheep.address, "v")
        other.resize(5 * MIB)
        sheep.snapshot("v", b"t")
        frozen = BlockingVolume.open(sheep.address, "v", b"t")
        writer.refresh()
        assert writer.size == 5 * MIB
        writer.write(5 * MIB - 4, b"last")
        writer.write(5, b"again")
        for volume in (reader, frozen):
            volume.refresh()
            assert volume.size == 5 * MIB
        assert reader.read(5, 5) == b"again"
        assert reader.read(5 * MIB - 4, 4) == b"last"
        assert frozen.read(5, 5) == b"first"
        sheep.snapshot("v")
        writer.write(5, b"third")
        reader.refresh()
        assert reader.read(5, 5) == b"third"


def test_connections_are_shared_by_all_threads() -> None:
    """Threads that come and go do not each leave a connection behind."""
    with FakeSheep() as sheep:
        sheep.create("v", MIB, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        volume.write(0, b"x")
        volume.read(0, 1)
        before = sheep.accepted
        for _ in range(5):
            thread = threading.Thread(target=volume.read, args=(0, 1))
            thread.start()
            thread.join()
        assert sheep.accepted == before
        volume.close()


def test_extents_by_blocks() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", 6 * MIB + 5000, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        size = volume.size

        def seen(offset: int, length: int, objects: int = 100) -> list[tuple[int, int, bool]]:
            return [tuple(extent) for extent in volume.block_extents(offset, length, objects)]  # type: ignore[misc]

        assert seen(0, size) == [(0, size, False)]
        assert seen(size, 10) == seen(5, 0) == []
        volume.write(MIB + 5000, b"x")
        volume.write(2 * MIB - 1, b"over the border")
        volume.write(6 * MIB + 4096, b"end")
        assert seen(0, size) == [
            (0, MIB + 4096, False),
            (MIB + 4096, 4096, True),
            (MIB + 8192, MIB - 3 * 4096, False),
            (2 * MIB - 4096, 8192, True),
            (2 * MIB + 4096, 4 * MIB, False),
            (6 * MIB + 4096, 904, True),
        ]
        assert seen(MIB + 4097, 2) == [(MIB + 4097, 2, True)]
        assert seen(MIB + 1, 4096) == [(MIB + 1, 4095, False), (MIB + 4096, 1, True)]
        assert seen(0, size, 1) == seen(0, 2 * MIB), "as far as one object's blocks are known"
        sheep.snapshot("v", b"t")
        assert BlockingVolume.open(sheep.address, "v", b"t").block_extents(0, size) == volume.block_extents(0, size)
        sheep.results[Opcode.MAP_OBJ] = Result.NO_SUPPORT
        assert seen(0, size) == [
            (0, MIB, False), (MIB, 2 * MIB, True), (3 * MIB, 3 * MIB, False), (6 * MIB, 5000, True)
        ]  # fmt: skip
        assert sheep.entries(vid)[1] == vid


def test_trim_makes_holes_of_parts() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        volume.write(0, b"x" * 4 * MIB)
        volume.trim(MIB - 10_000, 2 * MIB + 20_000)
        assert volume.read(0, 4 * MIB) == (b"x" * (MIB - 8192) + bytes(8192 + 2 * MIB + 8192) + b"x" * (MIB - 8192)), (
            "the blocks that lie wholly in the range"
        )
        volume.trim(100, 200)
        assert volume.read(0, 4096) == b"x" * 4096
        sheep.snapshot("v", b"t")
        volume.write(0, b"y")
        count = len(sheep.log)
        volume.trim(3 * MIB + 8192, MIB // 2)
        assert volume.read(3 * MIB + 8192, 4096) == b"x" * 4096, "a part of a shared object is not worth a copy"
        assert {entry[0] for entry in sheep.log[count:]} == {Opcode.READ_OBJ}


def test_zero_of_parts_sends_no_data() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        volume.write(0, b"x" * 4 * MIB)
        count = len(sheep.log)
        volume.zero(5, 3 * MIB)
        assert volume.read(0, 4 * MIB) == b"x" * 5 + bytes(3 * MIB) + b"x" * (MIB - 5)
        assert [entry[0] for entry in sheep.log[count:] if is_data(entry[2])] == [  # type: ignore[arg-type]
            Opcode.ZERO_OBJ, Opcode.ZERO_OBJ, Opcode.READ_OBJ, Opcode.READ_OBJ,
        ]  # fmt: skip
        volume.write(0, b"z" * 4 * MIB)
        sheep.snapshot("v", b"t")
        volume.zero(100, 2 * MIB, durable=True)
        assert volume.read(0, 4 * MIB) == b"z" * 100 + bytes(2 * MIB) + b"z" * (2 * MIB - 100)
        assert BlockingVolume.open(sheep.address, "v", b"t").read(0, 4 * MIB) == b"z" * 4 * MIB


def test_a_discard_takes_nothing_from_an_unnoticed_snapshot() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=SHIFT)
        volume = BlockingVolume.open(sheep.address, "v")
        volume.write(0, b"x" * 4 * MIB)
        sheep.snapshot("v", b"t")
        volume.discard(MIB, 2 * MIB)
        assert volume.read(0, 4 * MIB) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
        assert BlockingVolume.open(sheep.address, "v").read(0, 4 * MIB) == volume.read(0, 4 * MIB)
        assert BlockingVolume.open(sheep.address, "v", b"t").read(0, 4 * MIB) == b"x" * 4 * MIB
