"""What a request costs in Python function calls, counted over all nodes: the same on every machine.

The simulator runs the shipped core; store and network are its own and not counted. A change that makes a write dearer
shows here and has to say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.bench.counting import calls
from tests.sim.test_directed import fresh
from tests.sim.test_late_map_writes import new_vdi

from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.world import SECOND

REQUESTS = 64  # many enough that timers do not count
# Through the object's home 98, two of them for the lease; through another node 117, one of them to find the bytes there
# that its home need not send back. Six of them, of small compiled functions, took the place of calls that cost ten
# times as much and are not counted here (iterators, deques).
# 30 more since home and replicas tell the gateway themselves: two messages of their own here, where a link puts those
# of a turn into one frame. They brought a hop less (and 4 to 5 us of user time, as much less of the kernel's).
# 8 make the objects that took the place of nested functions, dictionaries' tuples and numbers: together 10,000
# instructions less.
WRITE_LIMIT = 150.0
MANY = 100  # volumes, and as many snapshots
NOBODY = Vid(0)
READ_LIMIT = 22.0  # at the object's home 22, two of them for the lease; at another replica 19


def calls_per_request(
    start: Callable[[int, Callable[[], None]], None], run: Callable[[Callable[[], bool]], None]
) -> float:
    """Calls of functions of cluster/core per request; all REQUESTS are under way together."""
    done = 0

    def answered() -> None:
        nonlocal done
        done += 1

    def all_of_them() -> None:
        for number in range(REQUESTS):
            start(number, answered)
        run(lambda: done == REQUESTS)

    return calls(all_of_them) / REQUESTS


def costs() -> Iterator[tuple[float, float]]:
    """Calls for a write and for a read, through each of three nodes."""
    cluster, volume = fresh(3, 3)
    oid = data_oid(volume.vid, 0)
    data = bytes(BLOCK_SIZE)

    def run(ended: Callable[[], bool]) -> None:
        cluster.world.run_until(ended, 5 * SECOND, "answers")

    for machine in cluster.machines:
        gateway = machine.node.gateway

        def write(number: int, answered: Callable[[], None]) -> None:
            gateway.write(oid, BLOCK_SIZE * number, data, False, lambda result, _: answered())  # noqa: B023

        def read(number: int, answered: Callable[[], None]) -> None:
            gateway.read(oid, BLOCK_SIZE * number, BLOCK_SIZE, lambda result, _: answered())  # noqa: B023

        calls_per_request(write, run)  # placement and connections are remembered from here on
        written = calls_per_request(write, run)
        cluster.world.run_for(SECOND)
        calls_per_request(read, run)
        yield written, calls_per_request(read, run)


def test_calls_per_request() -> None:
    for write, read in costs():
        assert 20 < write <= WRITE_LIMIT
        assert 2 < read <= READ_LIMIT


def test_creating_and_snapshots_cost_the_same_among_many() -> None:
    cluster, _ = fresh(1, 1)

    def create(name: bytes, base: Vid = NOBODY) -> int:
        """Calls that a new volume, or a snapshot of the volume `one`, takes."""
        made: list[Vid] = []
        counted = calls(lambda: made.append(new_vdi(cluster, base, base != NOBODY, name)))
        if name == b"one":
            working[0] = made[0]
        return counted

    working = [NOBODY]
    create(b"one")
    few = create(b"new1"), create(b"one", working[0])
    for number in range(MANY):
        create(b"volume%d" % number)
        create(b"one", working[0])
    later = create(b"new2"), create(b"one", working[0])
    for before, after in zip(few, later, strict=True):
        assert after <= 1.2 * before, (few, later)
