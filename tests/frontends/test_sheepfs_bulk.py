"""Large reads of a volume's file: right while a gateway dies, of what was written just before, and without a copy."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.mounts import SheepFs
from tests.support.processes import having_argument

MIB = 1 << 20
SIZE = 16 * MIB
READERS = 4
PASSES = 12


def read(file: int, offset: int) -> bytes:
    """1 MiB, past the page cache."""
    with closing(mmap.mmap(-1, MIB)) as aligned:
        assert os.preadv(file, [aligned], offset) == MIB
        return aligned[:]


def pipes(mount: SheepFs) -> int:
    """Of the sheepfs process: each connection for large reads has one, with two ends."""
    (pid,) = having_argument(str(mount.place))
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return len({link for link in links if link.startswith("pipe:")})


def test_large_reads_while_the_gateway_dies(cluster3: Cluster, mount_sheepfs: Callable[..., SheepFs]) -> None:
    needs.root()
    data = random.Random(7).randbytes(SIZE)
    cluster3.dog("vdi", "create", "v", str(SIZE))
    cluster3.dog("vdi", "write", "v", stdin=data)
    mount = mount_sheepfs(cluster3, 0, "--transport=direct")
    file = os.open(mount.volume("v"), os.O_RDWR | os.O_DIRECT)
    before = pipes(mount)

    def reader(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(PASSES * SIZE // MIB // READERS):
            offset = chance.randrange(SIZE // MIB) * MIB
            assert read(file, offset) == data[offset : offset + MIB]

    try:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(reader, range(READERS)))
            assert pipes(mount) > before, "large reads went the usual way"
            work = [pool.submit(reader, seed) for seed in range(READERS)]
            cluster3.kill(0)
            for one in work:
                one.result()
        for number in range(8):
            fresh = random.Random(number).randbytes(MIB)
            with closing(mmap.mmap(-1, MIB)) as aligned:
                aligned[:] = fresh
                assert os.pwritev(file, [aligned], number % 3 * MIB) == MIB
            assert read(file, number % 3 * MIB) == fresh, "a read sees the write before it"
    finally:
        os.close(file)
