"""The inode object: recorded bytes, offsets, map arithmetic, B-trees, and any bytes at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.cluster.core import ids, inode
from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.cluster.core.ids import ObjectId, Vid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import INODE_SIZE

RECORDED = {
    0x000: "71636c6f6e65",
    0x200: "6838a80773fe016b 0000000000000000",
    0x210: "0000000000000000 0000000100000000",
    0x220: "0000000000000000 0000021602000000",
    0x230: "52290e0051290e00 0000000000000000",
    0x1238: "52290e00d86e4f00",
}
"""Inode of a clone after one snapshot and one write (protocol.md 13.24)."""


def recorded() -> bytes:
    data = bytearray(0x1240)
    for offset, text in RECORDED.items():
        run = bytes.fromhex(text)
        data[offset : offset + len(run)] = run
    return bytes(data)


def test_recorded_inode() -> None:
    header = InodeHeader.unpack(recorded())
    assert header == InodeHeader(
        name=b"qclone",
        create_time=0x6B01FE7307A83868,
        vdi_size=16 << 20,
        nr_copies=2,
        block_size_shift=22,
        snap_id=2,
        vdi_id=0xE2952,
        parent_vdi_id=0xE2951,
    )
    assert header.pack() == recorded()[: inode.HEADER_SIZE]
    assert (header.object_count, header.object_size) == (4, 4 << 20)
    assert not header.is_snapshot
    assert not header.is_deleted
    entries = inode.unpack_map(recorded()[inode.map_offset(0) :])
    assert list(entries) == [0xE2952, 0x4F6ED8]


def test_offsets() -> None:
    """Every field alone, at its place in protocol.md 7.1."""
    places = {
        "name": 0,
        "tag": 0x100,
        "create_time": 0x200,
        "snap_ctime": 0x208,
        "vm_clock_nsec": 0x210,
        "vdi_size": 0x218,
        "vm_state_size": 0x220,
        "copy_policy": 0x228,
        "store_policy": 0x229,
        "nr_copies": 0x22A,
        "block_size_shift": 0x22B,
        "snap_id": 0x22C,
        "vdi_id": 0x230,
        "parent_vdi_id": 0x234,
        "btree_counter": 0x238,
    }
    for name, place in places.items():
        header = InodeHeader(nr_copies=0, block_size_shift=0, snap_id=0)
        setattr(header, name, b"\x01" if name in ("name", "tag") else 1)
        data = header.pack()
        assert [i for i, byte in enumerate(data) if byte] == [place], name
    assert len(InodeHeader().pack()) == inode.MAP_OFFSET == 4664
    assert inode.MAP_END == 4_198_968
    assert places["btree_counter"] == inode.BTREE_COUNTER_OFFSET
    assert places["tag"] == inode.TAG_OFFSET
    assert inode.MAP_END + (8 << 20) == INODE_SIZE


names = st.binary(max_size=256).filter(lambda name: b"\0" not in name)
u64 = st.integers(0, 2**64 - 1)
u8 = st.integers(0, 255)
vids = st.integers(0, 2**24 - 1)
headers = st.builds(
    InodeHeader,
    name=names,
    tag=names,
    create_time=u64,
    snap_ctime=u64,
    vm_clock_nsec=u64,
    vdi_size=u64,
    vm_state_size=u64,
    copy_policy=u8,
    store_policy=u8,
    nr_copies=st.integers(1, 255),
    block_size_shift=st.integers(20, 31),
    snap_id=st.integers(0, 2**32 - 1),
    vdi_id=vids,
    parent_vdi_id=vids,
    btree_counter=st.integers(0, 2**32 - 1),
)


@given(headers)
def test_round_trip(header: InodeHeader) -> None:
    assert InodeHeader.unpack(header.pack()) == header
    assert InodeHeader.unpack(memoryview(header.pack() + b"rest")) == header


@given(headers, st.lists(st.tuples(st.integers(0, 0x240), u8), max_size=12))
def test_any_header_is_understood_or_refused(header: InodeHeader, damage: list[tuple[int, int]]) -> None:
    data = bytearray(header.pack())
    for place, byte in damage:
        data[place] = byte
    try:
        told = InodeHeader.unpack(data)
    except PeerError:
        return
    assert InodeHeader.unpack(told.pack()) == told
    assert told.object_count << told.block_size_shift >= told.vdi_size


@pytest.mark.parametrize("data", [b"", bytes(4663), bytes(4664), b"\xff" * 4664])
def test_what_is_no_inode(data: bytes) -> None:
    with pytest.raises(PeerError):
        InodeHeader.unpack(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nr_copies": 0},
        {"block_size_shift": 19},
        {"block_size_shift": 32},
        {"vdi_id": 1 << 24},
        {"parent_vdi_id": 1 << 24},
    ],
    ids=str,
)
def test_one_impossible_field_is_enough(wrong: dict[str, Any]) -> None:
    good = InodeHeader(name=b"a", vdi_id=(1 << 24) - 1, parent_vdi_id=(1 << 24) - 1)
    assert InodeHeader.unpack(good.pack()) == good
    with pytest.raises(PeerError):
        InodeHeader.unpack(replace(good, **wrong).pack())


def test_names_that_do_not_fit() -> None:
    for name in (b"a" * 257, b"a\0b"):
        with pytest.raises(UsageError):
            InodeHeader(name=name).pack()


@pytest.mark.parametrize(
    ("size", "shift", "objects"),
    [(0, 22, 0), (1, 22, 1), (4 << 20, 22, 1), ((4 << 20) + 1, 22, 2), (4 << 40, 22, 1 << 20), (16 << 20, 20, 16)],
)
def test_objects_of(size: int, shift: int, objects: int) -> None:
    assert inode.objects_of(size, shift) == objects


def test_nominal_sizes() -> None:
    vid = Vid(0xF348BA)
    assert inode.nominal_size(ids.data_oid(vid, 3), 24) == 1 << 24
    assert inode.nominal_size(ids.vmstate_oid(vid, 3), 24) == 1 << 24
    assert inode.nominal_size(ids.inode_oid(vid), 24) == 12_587_576
    assert inode.nominal_size(ids.attribute_oid(vid, 3), 24) == 66_320
    assert inode.nominal_size(ids.btree_oid(vid, 3), 24) == 4 << 20
    assert inode.nominal_size(ObjectId(0x08F348BA00000001), 24) == 4 << 20


@pytest.mark.parametrize(
    ("offset", "length", "entries"),
    [
        (4664, 4, range(1)),
        (0x123C, 4, range(1, 2)),  # QEMU's map entry 1
        (4664, 4 << 20, range(1 << 20)),
        (4664 + 6, 4, range(1, 3)),  # parts of two entries
        (4664 + 4, 1, range(1, 2)),
        (4664, 0, range(0)),
        (4663, 5, range(0)),  # begins in the header: a header write
        (0, 4664, range(0)),
        (4_198_968 - 4, 4, range((1 << 20) - 1, 1 << 20)),
        (4_198_968 - 4, 8, range(0)),  # ends in the references
        (4_198_968, 8, range(0)),
    ],
)
def test_entries_written(offset: int, length: int, entries: range) -> None:
    assert inode.entries_written(offset, length) == entries


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_map_round_trip(entries: list[int]) -> None:
    data = b"".join(entry.to_bytes(4, "little") for entry in entries)
    assert list(inode.unpack_map(data)) == entries
    assert list(inode.unpack_map(memoryview(data))) == entries
    assert inode.pack_map(inode.unpack_map(data)) == data


def test_a_part_of_an_entry_is_refused() -> None:
    with pytest.raises(PeerError):
        inode.unpack_map(bytes(6))


def test_btree_root_as_recorded() -> None:
    """`dog vdi write` of one object of a hyper volume ends with this node (4680 bytes, protocol.md 13.18)."""
    assert inode.empty_btree() == bytes.fromhex("7462 0100 00000000")
    assert inode.btree_leaves(inode.empty_btree()) == []
    root = bytes.fromhex("7462 0100 01000000 05000000 595b5b00")
    assert len(root) == 4680 - inode.MAP_OFFSET
    assert inode.btree_used(root) == len(root)
    assert inode.btree_leaves(root + b"rubbish") == [(5, 0x5B5B59)]
    assert inode.btree_children(root) is None


def test_btree_of_two_levels() -> None:
    root = bytes.fromhex("7462 0200 02000000 ff000000 00000000 00000000595b5b10 ff010000 00000000 01000000595b5b10")
    vid = Vid(0x5B5B59)
    assert inode.btree_children(root) == [(0xFF, ids.btree_oid(vid, 0)), (0x1FF, ids.btree_oid(vid, 1))]
    assert inode.btree_leaves(root) is None
    assert inode.btree_used(root) == len(root)


@given(
    st.binary(max_size=64)
    | st.builds(
        lambda depth, count, rest: bytes.fromhex("7462") + bytes([depth, 0]) + count.to_bytes(4, "little") + rest,
        st.integers(0, 3),
        st.integers(0, 6) | st.just(2**32 - 1),
        st.binary(max_size=64),
    )
)
def test_any_bytes_are_a_node_or_refused(data: bytes) -> None:
    try:
        found = (inode.btree_leaves(data), inode.btree_children(data))
    except PeerError:
        return
    leaves, children = found
    assert (leaves is None) != (children is None)
    assert len(data) >= inode.btree_used(data)
