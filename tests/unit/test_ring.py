"""Placement: vectors of protocol.md 10.4, and what makes a ring worth having."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core import ring as ring_module
from sheepdog.cluster.core.hashing import next_hash, node_hash, object_hash
from sheepdog.cluster.core.ids import Member, NodeId, ObjectId, Vid, data_oid
from sheepdog.cluster.core.ring import Ring, auto_vnodes


def member(last: int, port: int = 7000, zone: int = 0, vnodes: int = 128, network: int = 10) -> Member:
    return Member(NodeId(bytes(12) + bytes([network, 0, 0, last]), port), zone, vnodes, 1 << 30)


LOOPBACK = [member(1, 7000 + zone, zone, network=127) for zone in range(3)]
WEIGHTED = [member(last, zone=last, vnodes=vnodes) for last, vnodes in ((1, 128), (2, 64), (3, 192), (4, 128))]


@pytest.mark.parametrize(
    ("oid", "ports"),
    [
        (0x80F348BA00000000, (7001, 7002, 7000)),
        (0x00F348BA00000000, (7001, 7002, 7000)),
        (0x00F348BA00000001, (7002, 7000, 7001)),
        (0x807C2B2500000000, (7002, 7001, 7000)),
        (0x007C2B2500000000, (7001, 7000, 7002)),
        (0x007C2B2500000001, (7000, 7001, 7002)),
        (0x207C2B25594A8B4E, (7001, 7002, 7000)),
        (0x407C2B2500000000, (7001, 7002, 7000)),
    ],
)
def test_three_equal_nodes(oid: int, ports: tuple[int, ...]) -> None:
    replicas = Ring(LOOPBACK).replicas(ObjectId(oid), 3)
    assert tuple(LOOPBACK[index].id.port for index in replicas) == ports


@pytest.mark.parametrize(
    ("oid", "last_bytes"),
    [
        (0x807C2B2500000000, (4, 3, 1)),
        (0x007C2B2500000000, (1, 4, 2)),
        (0x007C2B2500000001, (1, 4, 3)),
        (0x007C2B2500000002, (2, 3, 4)),
        (0x007C2B2500000003, (4, 1, 2)),
        (0x0085BC3100000000, (3, 4, 1)),
        (0x8085BC3100000000, (1, 4, 3)),
        (0x20713A7188A952E1, (4, 3, 1)),
    ],
)
def test_four_weighted_nodes(oid: int, last_bytes: tuple[int, ...]) -> None:
    ring = Ring(WEIGHTED)
    replicas = ring.replicas(ObjectId(oid), 3)
    assert tuple(WEIGHTED[index].id.address[15] for index in replicas) == last_bytes
    assert ring.home(ObjectId(oid)) == replicas[0]


def on_ring(members: list[Member], here: int, copies: int) -> tuple[int, ...]:
    """The rule of 10.4 read aloud: every point at or after the object, then every point before it."""
    points = []
    for index, node in enumerate(members):
        point = node_hash(node.id)
        for _ in range(node.vnodes):
            point = next_hash(point)
            points.append((point, index))
    points.sort()
    placed: list[int] = []
    for _, index in [p for p in points if p[0] >= here] + [p for p in points if p[0] < here]:
        if len(placed) < copies and members[index].zone not in [members[other].zone for other in placed]:
            placed.append(index)
    return tuple(placed)


clusters = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 4), st.integers(0, 6)), max_size=8, unique_by=lambda node: node[0]
).map(lambda nodes: [member(last, zone=zone, vnodes=vnodes) for last, zone, vnodes in sorted(nodes)])


@given(clusters, st.integers(0, 2**64 - 1).map(ObjectId), st.integers(1, 6))
def test_every_cluster_follows_the_rule(members: list[Member], oid: ObjectId, copies: int) -> None:
    ring = Ring(members)
    replicas = ring.replicas(oid, copies)
    assert replicas == on_ring(members, object_hash(oid), copies)
    assert replicas == ring.replicas(oid, copies), "a cached answer differs from the first"
    assert ring.zones == len({node.zone for node in members if node.vnodes})
    assert len(replicas) == min(copies, ring.zones)
    assert ring.home(oid) == (replicas[0] if replicas else None)


def test_an_object_on_a_point_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    point = next_hash(node_hash(LOOPBACK[1].id))
    for here, owner in ((point, 1), (point - 1, 1), (point + 1, 2)):
        monkeypatch.setattr(ring_module, "object_hash", lambda oid, here=here: here)
        few_points = [LOOPBACK[0], replace(LOOPBACK[1], vnodes=1), LOOPBACK[2]]
        assert Ring(few_points).replicas(ObjectId(0), 3) == on_ring(few_points, here, 3)
        assert (Ring(few_points).home(ObjectId(0)) == 1) == (owner == 1)


def test_answers_for_other_numbers_of_copies_are_kept_apart() -> None:
    ring = Ring(WEIGHTED)
    placed = [ring.replicas(ObjectId(5), copies) for copies in (2, 4, 1, 3)]
    assert [len(replicas) for replicas in placed] == [2, 4, 1, 3]


def test_nobody_stores() -> None:
    for members in ([], [member(1, vnodes=0)]):
        ring = Ring(members)
        assert (ring.home(ObjectId(1)), ring.replicas(ObjectId(1), 3), ring.zones) == (None, (), 0)


def share(ring: Ring, members: list[Member], objects: int) -> list[int]:
    held = [0] * len(members)
    for index in range(objects):
        held[ring.replicas(data_oid(Vid(1), index), 1)[0]] += 1
    return held


def test_objects_spread_by_weight() -> None:
    objects = 6000
    held = share(Ring(WEIGHTED), WEIGHTED, objects)
    total = sum(node.vnodes for node in WEIGHTED)
    for node, count in zip(WEIGHTED, held, strict=True):
        assert count == pytest.approx(objects * node.vnodes / total, rel=0.3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 4))
def test_a_leaving_node_moves_only_its_own_objects(gone: int) -> None:
    members = [member(last, zone=last) for last in range(5)]
    rest = members[:gone] + members[gone + 1 :]
    before, after = Ring(members), Ring(rest)
    for index in range(300):
        oid = data_oid(Vid(7), index)
        old = [members[i].id for i in before.replicas(oid, 3)]
        new = [rest[i].id for i in after.replicas(oid, 3)]
        kept = [node for node in old if node != members[gone].id]
        assert new[: len(kept)] == kept
        assert len(new) == 3


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "PLACEMENT_CACHE_ENTRIES", 16)
    ring = Ring(LOOPBACK)
    first = [ring.replicas(ObjectId(oid), 2) for oid in range(100)]
    assert len(ring._cache) <= 16
    assert [ring.replicas(ObjectId(oid), 2) for oid in range(100)] == first


MB = 1 << 20
USABLE = [int((size - 3.1) * MB) for size in (100, 200, 300, 400)]  # a file system keeps about 3 MB for itself


def test_auto_vnodes_figures() -> None:
    assert auto_vnodes(USABLE[:3]) == [63, 128, 193]
    assert auto_vnodes(USABLE) == [50, 102, 154, 206]


@given(st.integers(1, 2**63), st.integers(1, 50))
def test_equal_spaces_give_exactly_the_default(space: int, nodes: int) -> None:
    assert auto_vnodes([space] * nodes) == [128] * nodes


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_auto_vnodes_of_anything(spaces: list[int]) -> None:
    vnodes = auto_vnodes(spaces)
    assert len(vnodes) == len(spaces)
    for space, count in zip(spaces, vnodes, strict=True):
        assert 0 <= count <= 65535
        if not space:
            assert count == 0


def test_nodes_without_space_do_not_count() -> None:
    assert auto_vnodes([0, 5, 0, 5]) == [0, 128, 0, 128]
    assert auto_vnodes([0, 0]) == [0, 0]
    assert auto_vnodes([]) == []


def test_one_giant_among_many_fits_its_field() -> None:
    assert max(auto_vnodes([1] * 1000 + [1 << 60])) == 65535
