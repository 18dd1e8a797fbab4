"""What the ring promises in numbers: how even it is, and how little moves. Counted, over several networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sheepdog.cluster.core.ids import Member, NodeId, ObjectId, Vid, data_oid
from sheepdog.cluster.core.ring import Ring, auto_vnodes

OBJECTS = [data_oid(Vid(1 + number % 7), number) for number in range(3000)]
NETWORKS = range(10)
COPIES = 3


def nodes(network: int, count: int, zones: int = 0) -> list[Member]:
    """`count` nodes, each a zone of its own unless there are only so many zones."""
    return [
        Member(NodeId(bytes(12) + bytes([10, network, 0, last + 1]), 7000), last % (zones or count), 128, 1 << 40)
        for last in range(count)
    ]


def places(members: list[Member], copies: int = COPIES) -> dict[ObjectId, set[NodeId]]:
    ring = Ring(members)
    return {oid: {members[index].id for index in ring.replicas(oid, copies)} for oid in OBJECTS}


def held(members: list[Member], copies: int = COPIES) -> list[int]:
    found = places(members, copies)
    return [sum(node.id in where for where in found.values()) for node in members]


def moved(before: list[Member], after: list[Member], copies: int = COPIES) -> int:
    """Copies that have to be made."""
    old, new = places(before, copies), places(after, copies)
    return sum(len(new[oid] - old[oid]) for oid in OBJECTS)


def test_ten_nodes_are_even() -> None:
    """The fullest holds at most 1.15 times the mean; one network in ten may have a ring that is a little worse."""
    ratios = []
    for network in NETWORKS:
        counts = held(nodes(network, 10))
        ratios.append(max(counts) * len(counts) / sum(counts))
    ratios.sort()
    assert ratios[-2] <= 1.15, ratios
    assert ratios[-1] <= 1.20, ratios


@pytest.mark.parametrize("zones", [0, 4])
def test_a_join_moves_what_the_new_node_takes(zones: int) -> None:
    """... and nothing else; that is at most 1.2 times its fair share."""
    for network in NETWORKS:
        members = nodes(network, 11, zones)
        count = moved(members[:10], members)
        assert count == held(members)[10], "a copy has moved between old nodes"
        if not zones:
            assert count <= 1.2 * COPIES * len(OBJECTS) / 11


def test_a_leave_moves_what_the_node_held() -> None:
    for network in NETWORKS:
        members = nodes(network, 10)
        for gone in (0, 4, 9):
            rest = members[:gone] + members[gone + 1 :]
            assert moved(members, rest) == held(members)[gone]


def test_a_zone_that_leaves_moves_what_it_held() -> None:
    members = nodes(1, 12, 4)
    rest = [node for node in members if node.zone != 2]
    there = held(members)
    assert moved(members, rest) == sum(there[index] for index, node in enumerate(members) if node.zone == 2)


def test_shares_follow_capacity() -> None:
    """Automatic weights: a disk of three times the size holds three times as much, where zones allow it."""
    sizes = [1, 2, 3, 2, 1, 3]
    counts = [0] * len(sizes)
    for network in NETWORKS:
        members = nodes(network, len(sizes))
        weighted = [replace(node, vnodes=vnodes) for node, vnodes in zip(members, auto_vnodes(sizes), strict=True)]
        counts = [sum(pair) for pair in zip(counts, held(weighted, 1), strict=True)]
    for size, count in zip(sizes, counts, strict=True):
        assert count == pytest.approx(len(NETWORKS) * len(OBJECTS) * size / sum(sizes), rel=0.15)


def test_another_weight_moves_only_the_difference() -> None:
    """Reweight, or `dog vnodes set`: at most 1.2 times the change of the shares moves."""
    members = nodes(3, 8)
    heavier = [replace(members[0], vnodes=192), *members[1:]]
    before, after = held(members), held(heavier)
    least = sum(max(0, new - old) for old, new in zip(before, after, strict=True))
    assert 0 < moved(members, heavier) <= 1.2 * least


def test_gateways_hold_nothing_and_move_nothing() -> None:
    members = nodes(5, 6)
    gateway = replace(nodes(5, 7)[6], vnodes=0)
    assert moved(members, [*members, gateway]) == 0
    assert held([*members, gateway])[6] == 0


def test_copies_are_in_as_many_zones_as_there_are() -> None:
    for zones in (2, 3, 5):
        members = nodes(7, 10, zones)
        ring = Ring(members)
        for oid in OBJECTS[:500]:
            where = ring.replicas(oid, COPIES)
            assert len({members[index].zone for index in where}) == len(where) == min(zones, COPIES)
