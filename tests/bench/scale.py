"""What a node pays for the number of nodes: CPU of the parts of a membership change, of placement look-ups.

    python -m tests.bench.scale

One process, the shipped core, members made up; the time of one node, which is what every node spends.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId, ObjectId, Vid, data_oid
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.state import ClusterFlag, ClusterState, Status

NODES = (3, 10, 30, 100, 300, 1000)
LOOKUPS = 20_000
EPOCHS = 10  # records in the state that a joining node gets
ROW = "| {:>5} | {:>10} | {:>10} | {:>11} | {:>10} | {:>10} | {:>9} |"


def member(number: int) -> Member:
    return Member(NodeId(bytes(12) + (0x0A000000 + number).to_bytes(4), 7000), number, 128, 1 << 40)


def timed(call: Callable[[], object]) -> float:
    """CPU milliseconds of one call, the best of three."""
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return 1000 * best


def main() -> None:
    print(ROW.format("nodes", "weigh ms", "ring ms", "welcome ms", "welcome kB", "cold us", "warm us"))
    print(ROW.format(*["---:"] * 7))
    for count in NODES:
        members = [member(number) for number in range(count)]
        state = ClusterState(ctime=1, flags=ClusterFlag.AUTO_VNODES, status=Status.RUNNING)
        weigh = timed(lambda: state.weighted(members))  # noqa: B023
        state.members = state.weighted(members)
        state.epochs = [EpochRecord(Epoch(number + 1), 1, state.members) for number in range(EPOCHS)]
        ring = timed(lambda: Placement(Epoch(1), state.members, members[0].id, lambda oid: 3))  # noqa: B023
        text = state.encode()
        welcome = timed(lambda: ClusterState.decode(text))  # noqa: B023
        oids: list[ObjectId] = [data_oid(Vid(7), index) for index in range(LOOKUPS)]
        placement = Placement(Epoch(1), state.members, members[0].id, lambda oid: 3)
        begin = time.process_time()
        for oid in oids:
            placement.replicas(oid)
        cold = time.process_time() - begin
        begin = time.process_time()
        for oid in oids:
            placement.replicas(oid)
        warm = time.process_time() - begin
        figures = [f"{weigh:.2f}", f"{ring:.1f}", f"{welcome:.2f}", f"{len(text) / 1000:.1f}"]
        print(ROW.format(count, *figures, f"{1e6 * cold / LOOKUPS:.1f}", f"{1e6 * warm / LOOKUPS:.2f}"))


if __name__ == "__main__":
    main()
