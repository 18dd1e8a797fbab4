"""Requests leave nothing for the collector: under load it looks every five seconds, and each may hold megabytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

from tests.sim.test_directed import fresh

from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.world import SECOND

REQUESTS = 50
OTHERS = REQUESTS // 2  # objects freed meanwhile: of timers and of the simulator


def garbage(work: Callable[[], None]) -> int:
    """Objects that only the collector frees after `work`."""
    gc.collect()
    gc.disable()
    try:
        work()
        return gc.collect()
    finally:
        gc.enable()


def test_reads_and_writes_are_freed_when_they_are_answered() -> None:
    cluster, volume = fresh(3, 3)
    oid = data_oid(volume.vid, 0)
    data = bytes(BLOCK_SIZE)
    answers = 0

    def answered(result: int, _: object) -> None:
        nonlocal answers
        assert result == 0
        answers += 1

    def each(call: Callable[[int], None]) -> None:
        for number in range(REQUESTS):
            wanted = answers + 1
            call(BLOCK_SIZE * number)
            cluster.world.run_until(partial(reached, wanted), 5 * SECOND, "answer")

    def write_at(gateway: Gateway, at: int) -> None:
        gateway.write(oid, at, data, True, answered)

    def read_at(gateway: Gateway, at: int) -> None:
        gateway.read(oid, at, BLOCK_SIZE, answered)

    def reached(wanted: int) -> bool:
        return answers == wanted

    for machine in cluster.machines:
        gateway = machine.node.gateway

        write = partial(each, partial(write_at, gateway))
        read = partial(each, partial(read_at, gateway))
        write()  # connections and placements are remembered from here on
        assert garbage(write) < OTHERS
        assert garbage(read) < OTHERS
