"""Session and volume against a gateway that is strict, slow, out of order or breaks."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.machine import Extent
from sheepdog.cluster.client.session import Session
from sheepdog.cluster.client.volume import Volume
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, is_data
from sheepdog.cluster.wire.opcodes import Flags, Opcode

MIB = 1 << 20
SHIFT = 20


def run(sheep: FakeSheep, body: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        session = await Session.open(sheep.address, patience_s=3)
        try:
            await body(session)
        finally:
            await session.close()

    asyncio.run(main())


def test_holes_cost_no_request_and_first_write_creates() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", 8 * MIB, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            sheep.log.clear()
            assert await volume.read(MIB - 5, 10) == bytes(10)
            assert sheep.log == []
            await volume.write(3 * MIB - 2, b"abcd")
            assert await volume.read(3 * MIB - 3, 6) == b"\0abcd\0"
            assert list(volume.extents(0, volume.size)) == [
                Extent(0, 2 * MIB, False),
                Extent(2 * MIB, 2 * MIB, True),
                Extent(4 * MIB, 4 * MIB, False),
            ]

        run(sheep, body)
        writes = [entry for entry in sheep.log if entry[0] != Opcode.READ_OBJ]
        assert [entry[0] for entry in writes] == [Opcode.CREATE_AND_WRITE_OBJ] * 2 + [Opcode.WRITE_OBJ]
        assert writes[2][2:] == (0x80 << 56 | vid << 32, 4664 + 4 * 2, 8)
        assert list(sheep.entries(vid)) == [0, 0, vid, vid, 0, 0, 0, 0]


@pytest.mark.parametrize("cached", [False, True])
def test_reads_of_data_ask_for_the_object_cache(cached: bool) -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 8 * MIB, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v", object_cache=cached)
            await volume.write(0, bytes(3 * MIB))
            sheep.log.clear()
            await volume.read(4096, 4096)  # within an object, and over two
            await volume.read(MIB - 5, 10)
            await volume.refresh()
            await volume.read(0, 512)

        run(sheep, body)
        reads = [entry for entry in sheep.log if entry[0] == Opcode.READ_OBJ]
        assert len([entry for entry in reads if is_data(ObjectId(entry[2]))]) == 4
        assert all(bool(entry[1] & Flags.CACHE) == (cached and is_data(ObjectId(entry[2]))) for entry in reads)


def test_flags_tell_durability() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.write(0, b"x")
            assert all(entry[1] & Flags.CACHE for entry in sheep.log if entry[1] & Flags.WRITE)
            sheep.log.clear()
            # The object's map entry is volatile, so a durable write has to flush it.
            await volume.write(0, b"y", durable=True)
            assert [(entry[0], entry[1]) for entry in sheep.log] == [
                (Opcode.WRITE_OBJ, Flags.WRITE),
                (Opcode.FLUSH_VDI, 0),
            ]
            sheep.log.clear()
            await volume.write(0, b"z", durable=True)
            await volume.write(MIB, b"z", durable=True)
            assert [entry[0] for entry in sheep.log] == [
                Opcode.WRITE_OBJ,
                Opcode.CREATE_AND_WRITE_OBJ,
                Opcode.WRITE_OBJ,
            ]
            assert not any(entry[1] & Flags.CACHE for entry in sheep.log)
            sheep.log.clear()
            sheep.flush_result = Result.INVALID_PARMS
            await volume.flush()
            await volume.flush()
            await volume.write(0, b"w")
            assert [(entry[0], entry[1]) for entry in sheep.log] == [
                (Opcode.FLUSH_VDI, 0),
                (Opcode.WRITE_OBJ, Flags.WRITE),
            ]

        run(sheep, body)


def test_limits_of_the_volume() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", MIB + 100, shift=SHIFT)
        sheep.snapshot("v", b"t")

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            for offset, size in ((MIB + 99, 2), (MIB + 100, 1), (5 * MIB, 1), (0, MIB + 101)):
                with pytest.raises(OSError) as caught:
                    await volume.write(offset, bytes(size))
                assert caught.value.errno == errno.ENOSPC
            await volume.write(MIB + 98, b"ab")
            assert await volume.read(MIB + 96, 1000) == b"\0\0ab"
            assert await volume.read(MIB + 100, 10) == b""
            await volume.write(7, b"")
            frozen = await Volume.open(session, "v", tag=b"t")
            with pytest.raises(OSError) as caught:
                await frozen.write(0, b"x")
            assert caught.value.errno == errno.EROFS
            for name, tag, result in (("w", b"", Result.NO_VDI), ("v", b"u", Result.NO_TAG)):
                with pytest.raises(SheepError) as refused:
                    await Volume.open(session, name, tag=tag)
                assert refused.value.result == result
            await volume.resize(3 * MIB)
            await volume.write(3 * MIB - 1, b"e")
            with pytest.raises(OSError):
                await volume.resize(MIB)

        run(sheep, body)


def test_a_resize_that_a_snapshot_overtakes_begins_again() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", MIB, shift=SHIFT)

        def before(opcode: int, oid: int) -> None:
            if opcode == Opcode.WRITE_OBJ and not sheep.inode(vid).is_snapshot:
                sheep.snapshot("v", b"t")

        sheep.before = before

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.resize(3 * MIB)
            assert volume.size == 3 * MIB
            assert (await Volume.open(session, "v")).size == 3 * MIB
            assert (await Volume.open(session, "v", tag=b"t")).size == MIB

        run(sheep, body)


def test_clone_copies_on_write_and_snapshot_never_changes() -> None:
    with FakeSheep() as sheep:
        base = sheep.create("v", 4 * MIB, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.write(0, b"A" * 2 * MIB)
            sheep.snapshot("v", b"t")
            frozen = sheep.content(base)
            sheep.log.clear()
            await volume.write(MIB - 1, b"BB")  # the volume still believes in the frozen vid
            await volume.write(100, b"C")
            assert sheep.content(base) == frozen
            assert await volume.read(MIB - 2, 4) == b"ABBA"
            creates = [entry for entry in sheep.log if entry[0] == Opcode.CREATE_AND_WRITE_OBJ]
            assert [entry[1] & Flags.COW for entry in creates] == [Flags.COW] * 2
            assert volume.inode.vdi_id == base + 1
            assert list(sheep.entries(base + 1)) == [base + 1, base + 1, 0, 0]
            # A whole object needs nothing of its ancestor.
            sheep.snapshot("v", b"u")
            sheep.log.clear()
            await volume.write(MIB, b"D" * MIB)
            assert [entry[1] & Flags.COW for entry in sheep.log if entry[0] == Opcode.CREATE_AND_WRITE_OBJ] == [0]
            old = await Volume.open(session, "v", snap_id=1)
            assert await old.read(0, 4 * MIB) == frozen

        run(sheep, body)
        assert sheep.content(base + 2) == b"A" * 100 + b"C" + b"A" * (MIB - 102) + b"B" + b"D" * MIB + bytes(2 * MIB)


def test_discard_frees_whole_objects_and_zero_clears_the_rest() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", 5 * MIB + 10, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.write(0, b"x" * volume.size)
            sheep.log.clear()
            await volume.discard(MIB - 1, 2 * MIB + 1)
            assert [entry[3:] for entry in sheep.log if entry[0] == Opcode.WRITE_OBJ] == [(4664 + 4, 8)]
            assert list(sheep.entries(vid)) == [vid, 0, 0, vid, vid, vid]
            assert await volume.read(MIB - 1, 2 * MIB + 2) == b"x" + bytes(2 * MIB) + b"x"
            await volume.write(MIB + 5, b"again")
            await volume.discard(4 * MIB, MIB + 10)
            await volume.zero(MIB - 3, MIB)
            assert await volume.read(MIB - 5, 15) == b"xx" + bytes(13)
            await volume.zero(0, volume.size, durable=True)

        run(sheep, body)
        assert sheep.content(vid) == bytes(5 * MIB + 10)
        assert not any(is_data(oid) for oid in sheep.objects)  # type: ignore[arg-type]


def test_map_entry_is_written_before_the_write_ends() -> None:
    with FakeSheep() as sheep:
        vid = sheep.create("v", 2 * MIB, shift=SHIFT)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            sheep.delay_s = 0.02
            results = []

            async def write(position: int) -> None:
                await volume.write(position, b"w")
                results.append(sheep.entries(vid)[0])

            # All of them want to create the same object: one does.
            await asyncio.gather(*(write(position) for position in range(20)))
            assert results == [vid] * 20

        run(sheep, body)
        assert sheep.content(vid)[:21] == b"w" * 20 + b"\0"
        assert sum(entry[0] == Opcode.CREATE_AND_WRITE_OBJ for entry in sheep.log) == 1


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_with_snapshots_breaks_and_reordering(seed: int) -> None:
    """Concurrent requests, snapshots in their middle, a gateway that reorders and breaks: no byte is wrong."""
    chance = random.Random(seed)
    size = 12 * MIB + 12345
    with FakeSheep() as sheep:
        vid = sheep.create("v", size, shift=SHIFT)
        model = bytearray(size)
        frozen: dict[int, bytes] = {}

        async def step(volume: Volume, first: int, last: int) -> None:
            """One request inside its own part of the volume, mirrored in the model."""
            kind = chance.random()
            offset = chance.randrange(first, last)
            length = min(last - offset, chance.choice((1, 511, 4096, 70000, 2 * MIB)))
            if kind < 0.7:
                data = chance.randbytes(length)
                await volume.write(offset, data, durable=chance.random() < 0.3)
                model[offset : offset + length] = data
            elif kind < 0.8:
                await volume.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            elif kind < 0.85:
                await volume.flush()
            else:
                assert await volume.read(offset, length) == model[offset : offset + length]

        async def body(session: Session) -> None:
            nonlocal vid
            volume = await Volume.open(session, "v")
            sheep.batch = chance.choice((1, 3, 8))
            cuts = sorted(chance.sample(range(1, size, 1000), 5))
            parts = list(zip([0, *cuts], [*cuts, size], strict=True))
            for _ in range(12):
                if chance.random() < 0.3:
                    sheep.break_after = chance.randrange(10)
                if chance.random() < 0.4:
                    asyncio.get_running_loop().call_later(chance.random() * 0.02, freeze)
                await asyncio.gather(*(step(volume, first, last) for first, last in parts))
                assert await volume.read(0, size) == model
                # What was under way may be in the snapshot or not, but later nothing in it changes.
                for old, content in frozen.items():
                    frozen[old] = content or sheep.content(old)
            await volume.close()

        def freeze() -> None:
            nonlocal vid
            with sheep.lock:
                frozen[vid] = b""
                vid = sheep.snapshot("v")

        run(sheep, body)
        assert sheep.content(vid) == model
        for old, content in frozen.items():
            assert not content or sheep.content(old) == content


def test_large_answers_arrive_whole() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 64 * MIB)
        chance = random.Random(1)
        data = chance.randbytes(20 * MIB)

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.write(3 * MIB, data)
            reads = await asyncio.gather(*(volume.read(i * MIB, 3 * MIB) for i in range(24)))
            padded = bytes(3 * MIB) + data + bytes(10 * MIB)
            for i, part in enumerate(reads):
                assert part == padded[i * MIB : (i + 3) * MIB]

        run(sheep, body)


def test_no_gateway_is_an_io_error_after_a_while() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB)

        async def body() -> None:
            session = await Session.open(sheep.address, patience_s=0.3)
            volume = await Volume.open(session, "v")
            await volume.write(0, b"x")
            sheep.__exit__(None, None, None)
            with pytest.raises(OSError) as caught:
                await volume.read(0, 1)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError):
                await volume.write(0, b"y")
            await session.close()

        asyncio.run(body())


def test_closing_a_session_ends_what_is_under_way() -> None:
    with FakeSheep() as sheep:
        sheep.create("v", 8 * MIB, shift=SHIFT)
        sheep.delay_s = 0.05

        async def body() -> None:
            session = await Session.open(sheep.address)
            volume = await Volume.open(session, "v")
            writes = [asyncio.create_task(volume.write(i * MIB // 2, b"x" * MIB)) for i in range(10)]
            await asyncio.sleep(0.12)
            await session.close()
            ends = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 5)
            failed = [end for end in ends if isinstance(end, OSError)]
            assert failed
            assert {error.errno for error in failed} == {errno.EIO}
            with pytest.raises(OSError):
                await asyncio.wait_for(volume.flush(), 5)

        asyncio.run(body())


def test_a_wrong_answer_cuts_the_stream_and_the_request_is_sent_again() -> None:
    """An unknown id or more data than was asked for: nothing behind it in the stream can be believed."""
    with FakeSheep() as sheep:
        sheep.create("v", 4 * MIB)
        asked = 0

        def lie(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            nonlocal asked
            asked += 1
            sheep.handlers.clear()
            return b"\0" * 8 + b"\xff" * 4 + (4).to_bytes(4, "little") + bytes(32), b"abcd"

        async def body(session: Session) -> None:
            volume = await Volume.open(session, "v")
            await volume.write(0, b"x")
            sheep.handlers[Opcode.READ_OBJ] = lie
            assert await volume.read(0, 1) == b"x"

        run(sheep, body)
        assert asked == 1
