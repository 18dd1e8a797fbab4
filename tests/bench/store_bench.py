"""CPU and time of one operation of the object store, without network.

python -m tests.bench.store_bench [DIRECTORY]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

from tests.support.stores import StoreDriver

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.host import reading, trailer
from sheepdog.cluster.host.store_options import StoreOptions

OBJECTS = 16
SIZE = 4 << 20
TURNS = 5
JOURNAL = 512 << 20  # what a node with some free space takes


def measure(name: str, count: int, run: Callable[[int], None]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    run(count)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:38} {count / wall:10.0f} IOPS {cpu / count * 1e6:9.1f} us CPU {wall / count * 1e6:9.1f} us")


@contextmanager
def unverified(driver: StoreDriver) -> Iterator[None]:
    """Reads without hashes: every block's is 1, and nobody computes any."""
    copies = [copy for copy in driver.store.copies.by_oid.values() if copy.fd >= 0]
    tables = [bytes(copy.trailer) for copy in copies]
    for copy in copies:
        copy.trailer[trailer.HEADER_SIZE :] = b"\1\0\0\0\0\0\0\0" * trailer.block_count(copy.size)
    try:
        with (
            mock.patch.object(reading, "block_hash", lambda block: 1),
            mock.patch.object(trailer, "bad_blocks", lambda data, entries, first: []),
        ):
            yield
    finally:
        for copy, table in zip(copies, tables, strict=True):
            copy.trailer[:] = table


def compare(name: str, count: int, run: Callable[[int], None], driver: StoreDriver) -> None:
    """CPU of verified reads beside unverified ones, in turns; the least of each counts, for others use this machine."""
    best = [float("inf"), float("inf")]
    for turn in range(2 * TURNS):
        with unverified(driver) if turn % 2 else nullcontext():
            began = time.process_time()
            run(count)
            best[turn % 2] = min(best[turn % 2], (time.process_time() - began) / count * 1e6)
    print(f"{name:38} {best[0]:9.1f} us CPU verified {best[1]:9.1f} not: {100 * (1 - best[1] / best[0]):.0f} % less")


def bench(directory: str, nosync: bool) -> None:
    driver = StoreDriver(directory, options=StoreOptions(nosync=nosync, journal_bytes=JOURNAL))
    rng = random.Random(1)
    oids = [data_oid(Vid(1), index) for index in range(OBJECTS)]
    data, large = rng.randbytes(4096), rng.randbytes(1 << 20)
    counter = 1

    def version() -> Version:
        nonlocal counter
        counter += 1
        return Version(1, 1, counter)

    for oid in oids:
        driver.create(oid, SIZE, 0, rng.randbytes(SIZE), version())
    store = driver.store
    places = [(rng.choice(oids), rng.randrange(SIZE >> 12) << 12) for _ in range(4096)]

    waiting = 0

    def done(result: object) -> None:
        nonlocal waiting
        assert not isinstance(result, StoreError)
        waiting -= 1

    def many(count: int, depth: int, submit: Callable[[int], None]) -> None:
        """Keeps `depth` operations in flight."""
        nonlocal waiting
        for number in range(count):
            waiting += 1
            submit(number)
            while waiting >= depth:
                driver.step()
        while waiting:
            driver.step()

    def overwrite(count: int, block: bytes = data, shift: int = 0) -> None:
        def submit(number: int) -> None:
            oid, offset = places[number & 4095]
            store.write(oid, min(offset + shift, SIZE - len(block)), block, version(), False, done)

        many(count, 16, submit)

    def durable(count: int, depth: int) -> None:
        def submit(number: int) -> None:
            oid, offset = places[number & 4095]
            store.write(oid, offset, data, version(), True, done)

        many(count, depth, submit)

    def read(count: int, length: int = 4096) -> None:
        def submit(number: int) -> None:
            oid, offset = places[number & 4095]
            store.read(oid, min(offset, SIZE - length), length, done)

        many(count, 16, submit)

    def create(count: int) -> None:
        many(count, 16, lambda n: store.create(data_oid(Vid(2), n), SIZE, 0, data, version(), False, done))

    print(f"-- {directory}, {'nosync' if nosync else 'sync'}")
    measure("4 KiB overwrite", 50_000, overwrite)
    measure("4 KiB overwrite, unaligned", 20_000, lambda count: overwrite(count, data, 512))
    measure("1 MiB overwrite", 200, lambda count: overwrite(count, large))
    for length, count in ((4096, 20_000), (64 << 10, 3_000), (1 << 20, 200)):
        compare(f"{length >> 10} KiB read", count, partial(read, length=length), driver)
    measure("create 4 MiB thin", 200, create)
    for depth, count in ((1, 300), (16, 4_000), (64, 10_000)):
        measure(f"4 KiB durable, depth {depth}", count, partial(durable, depth=depth))
    driver.close()


def bench_open(directory: str, count: int) -> None:
    driver = StoreDriver(directory, nosync=True)
    for number in range(count):
        driver.create(data_oid(Vid(3), number), 4096, 0, b"x", Version(1, 1, number + 1))
    driver.close()
    for name in ("with the index", "without"):
        began = time.perf_counter()
        driver = StoreDriver(directory, nosync=True)
        print(f"open {count} objects {name}: {time.perf_counter() - began:.2f} s")
        driver.crash()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as path:
        bench(str(Path(path) / "sync"), False)
        bench(str(Path(path) / "nosync"), True)
        bench_open(str(Path(path) / "many"), 20_000)


if __name__ == "__main__":
    main()
