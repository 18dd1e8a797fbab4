"""Payload structures: recorded bytes, offsets of protocol.md 14, round trips, and any bytes at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.exchanges import of

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId
from sheepdog.cluster.wire import structures
from sheepdog.cluster.wire.structures import DiskInfo, EpochHeader, NodeRecord, VdiState

LOOPBACK = bytes(12) + b"\x7f\0\0\x01"
NODE = Member(NodeId(LOOPBACK, 17800), zone=0, vnodes=128, space=0x120645B000)

node_ids = st.builds(NodeId, st.binary(min_size=16, max_size=16), st.integers(0, 65535))
members = st.builds(
    Member, node_ids, zone=st.integers(0, 2**32 - 1), vnodes=st.integers(0, 65535), space=st.integers(0, 2**64 - 1)
)
member_lists = st.lists(members, max_size=5)


def test_recorded_node() -> None:
    recorded = of("13.12")[1].payload[:80]
    assert structures.NODE.unpack(recorded) == NodeRecord(LOOPBACK, 17800, bytes(16), 0, 128, 0, 0x120645B000)
    assert structures.unpack_nodes(recorded) == [NODE]
    private = 24  # the original leaks process pointers here
    assert structures.pack_node(NODE) == bytes(private) + recorded[private:]


def test_recorded_epoch_log() -> None:
    recorded = of("13.13")[1].payload
    header = EpochHeader(0x6B01FD6B11A6C0C8, 0x6B01FD6B, 1, 3, 0, 2, 0, 0x0C, b"plain".ljust(16, b"\0"))
    [(told, nodes)] = structures.unpack_epochs(recorded, slots=3)
    assert (told, len(nodes)) == (header, 3)
    record = EpochRecord(Epoch(1), 0x6B01FD6B, (NODE, NODE, NODE))
    assert structures.pack_epoch(record, 3, header)[:48] == recorded[:48]


@given(member_lists, st.integers(0, 6), st.sampled_from([80, 592]))
def test_node_lists(nodes: list[Member], slots: int, size: int) -> None:
    data = structures.pack_nodes(nodes, size)
    assert len(data) == size * len(nodes)
    assert structures.unpack_nodes(data, size) == nodes
    record = EpochRecord(Epoch(7), 8, tuple(nodes))
    epoch = structures.pack_epoch(record, slots)
    assert len(epoch) == 48 + 80 * slots
    [(header, told)] = structures.unpack_epochs(epoch, slots)
    assert (header.epoch, header.began_s, header.ctime, header.nr_nodes) == (7, 8, 0, len(told))
    assert told == nodes[:slots]


@given(member_lists)
def test_cluster_info(nodes: list[Member]) -> None:
    info = structures.ClusterInfo(10, 1, 0, 5, 6, 7, 3, 0x22, 1, 22, b"plain")
    data = structures.pack_cluster_info(info, nodes)
    assert len(data) == 491_568
    told, told_nodes = structures.unpack_cluster_info(data)
    assert told == info._replace(nr_nodes=len(nodes), store=b"plain".ljust(16, b"\0"))
    assert told_nodes == nodes


def test_cluster_info_offsets() -> None:
    info = structures.ClusterInfo(0x0A, 1, 0, 0x04030201, 0x0807060504030201, 0x0C, 3, 0x22, 2, 22, b"plain")
    data = structures.pack_cluster_info(info, [NODE])
    assert data[:2] == b"\x0a\x01"
    assert data[2:16] == bytes.fromhex("0100 01020304 0102030405060708")
    assert data[16:25] == bytes.fromhex("0c00 03 22 02 16 000000")
    assert data[25:48] == b"plain".ljust(23, b"\0")
    assert data[48:128] == structures.pack_node(NODE)
    assert len(structures.pack_cluster_info(info, [NODE], 592)) == 491_408


def test_the_buffer_tells_how_dog_was_built() -> None:
    assert [structures.node_record_size(room) for room in (491_520, 491_568, 491_360, 491_408, 0)] == [
        80,
        80,
        592,
        592,
        80,
    ]


states = st.builds(
    VdiState,
    vid=st.integers(0, 2**24 - 1),
    copies=st.integers(0, 255),
    snapshot=st.integers(0, 1),
    deleted=st.integers(0, 1),
    copy_policy=st.integers(0, 255),
    block_size_shift=st.integers(0, 31),
    parent=st.integers(0, 2**24 - 1),
    lock_state=st.integers(1, 3),
    owner=st.none() | node_ids.filter(lambda node: any(node.address) or node.port),
    participants=st.lists(st.tuples(st.integers(1, 3), node_ids), max_size=31).map(tuple),
)


@given(st.lists(states, max_size=3))
def test_vdi_states(table: list[VdiState]) -> None:
    data = b"".join(structures.pack_vdi_state(state) for state in table)
    assert len(data) == 1428 * len(table)
    assert structures.unpack_vdi_states(data) == table


def test_vdi_state_offsets() -> None:
    other = NodeId(LOOPBACK, 7001)
    state = VdiState(0xF348BA, 3, 1, 0, 0x22, 22, 0xF348B9, 3, NODE.id, ((1, NODE.id), (3, other)))
    data = structures.pack_vdi_state(state)
    assert data[:20] == bytes.fromhex("ba48f300 03 01 00 22 16 000000 b948f300 03000000")
    node_id = structures.pack_node(NODE)[24:64]
    assert data[20:60] == node_id
    assert data[60:72] == bytes.fromhex("02000000 01000000 03000000")
    assert data[188:228] == node_id
    assert data[228 + 16 : 228 + 18] == (7001).to_bytes(2, "little")


def test_small_structures() -> None:
    assert structures.RECOVERY_STATE.pack(structures.RecoveryState(1, 2, 3, 4)) == bytes.fromhex(
        "01000000 02000000 0300000000000000 0400000000000000"
    )
    throttle = bytes.fromhex("05000000 deadbeef e803000000000000 01 00000000000000")  # its padding may be rubbish
    assert structures.RECOVERY_THROTTLE.unpack(throttle) == (5, 1000, 1)
    assert structures.STATISTICS.size == 120
    statistics = structures.STATISTICS.unpack(bytes(8) * 11 + (9).to_bytes(8, "little") + bytes(24))
    assert statistics.gateway_flush == 9


def test_disks() -> None:
    disks = [DiskInfo(0, 5, 6, b"/a"), DiskInfo(1, 7, 8, b"/b/obj")]
    data = structures.pack_disks(disks)
    assert len(data) == 263_688
    assert data[4120:4150] == bytes.fromhex("01000000 00000000 0700000000000000 0800000000000000") + b"/b/obj"
    assert data[263_680:] == bytes.fromhex("02000000 00000000")
    assert structures.unpack_disks(data) == disks
    many = [DiskInfo(number, 0, 0, b"/") for number in range(70)]
    assert structures.unpack_disks(structures.pack_disks(many)) == many[:64]


@settings(deadline=None)  # fills 2 MiB each time
@given(st.sets(st.integers(0, 2**24 - 1), max_size=20))
def test_bitmaps(vids: set[int]) -> None:
    bitmap = bytearray(structures.BITMAP_SIZE)
    for vid in vids:
        bitmap[vid // 8] |= 1 << vid % 8
    assert structures.vids_in(bitmap) == sorted(vids)
    assert all(structures.in_bitmap(bitmap, vid) for vid in vids)
    assert sum(structures.in_bitmap(bitmap, vid) for vid in range(64)) == len([vid for vid in vids if vid < 64])


def test_names() -> None:
    assert structures.pack_names(b"qtest") == of("13.1")[2].payload
    assert structures.pack_names(b"qtest", b"") == of("13.2")[0].payload


UNPACKERS: list[Callable[[bytes], Any]] = [
    structures.unpack_nodes,
    lambda data: structures.unpack_epochs(data, 1),
    structures.unpack_vdi_states,
    structures.unpack_disks,
    structures.unpack_cluster_info,
]


@given(st.binary(max_size=1500), st.sampled_from(UNPACKERS))
def test_any_bytes_are_understood_or_refused(data: bytes, unpack: Callable[[bytes], Any]) -> None:
    try:
        unpack(data)
    except PeerError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("unpack", "size"),
    [
        (lambda data: structures.unpack_epochs(data, 1), 128),
        (structures.unpack_vdi_states, 1428),
        (structures.unpack_disks, 263_688),
        (structures.unpack_cluster_info, 491_568),
    ],
)
def test_counts_beyond_their_room_are_refused(unpack: Callable[[bytes], Any], size: int) -> None:
    with pytest.raises(PeerError):
        unpack(b"\xff" * size)
