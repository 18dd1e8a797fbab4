"""Object ids, versions, addresses (protocol.md 6.1, cli.md 2.4)."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sheepdog.cluster.core import ids
from sheepdog.cluster.core.ids import NodeId, ObjectId, Version, Vid

VID = Vid(0xF348BA)
MAKERS = {
    "data": ids.data_oid(VID, 5),
    "inode": ids.inode_oid(VID),
    "vmstate": ids.vmstate_oid(VID, 5),
    "attribute": ids.attribute_oid(VID, 5),
    "btree": ids.btree_oid(VID, 5),
    "ledger": ObjectId(0x08F348BA00000005),
}
TESTS = {
    "data": ids.is_data,
    "inode": ids.is_inode,
    "vmstate": ids.is_vmstate,
    "attribute": ids.is_attribute,
    "btree": ids.is_btree,
    "ledger": ids.is_ledger,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_is_itself_only(kind: str) -> None:
    oid = MAKERS[kind]
    assert [name for name, test in TESTS.items() if test(oid)] == [kind]
    assert ids.vid_of(oid) == VID
    assert ids.index_of(oid) == (0 if kind == "inode" else 5)


def test_oids_as_the_protocol_writes_them() -> None:
    assert MAKERS["data"] == 0x00F348BA00000005
    assert MAKERS["inode"] == 0x80F348BA00000000
    assert MAKERS["vmstate"] == 0x40F348BA00000005
    assert MAKERS["attribute"] == 0x20F348BA00000005
    assert MAKERS["btree"] == 0x10F348BA00000005


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**32 - 1))
def test_parts_of_an_oid(vid: int, index: int) -> None:
    for make in (ids.data_oid, ids.vmstate_oid, ids.attribute_oid, ids.btree_oid):
        oid = make(Vid(vid), index)
        assert (ids.vid_of(oid), ids.index_of(oid)) == (vid, index)
        assert oid < 2**63


def test_versions_are_ordered_by_epoch_then_term_then_counter() -> None:
    ordered = [Version(0, 0, 0), Version(0, 0, 9), Version(0, 1, 0), Version(1, 0, 0), Version(1, 0, 1)]
    assert all(one < next_one for one, next_one in pairwise(ordered))
    assert ordered[0] == ids.NO_VERSION


def test_nodes_sort_by_address_then_port() -> None:
    low, high = bytes(15) + b"\1", bytes(15) + b"\2"
    nodes = [NodeId(low, 7000), NodeId(low, 7001), NodeId(high, 80)]
    assert all(one < next_one for one, next_one in pairwise(nodes))


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (bytes(12) + bytes([127, 0, 0, 1]), "127.0.0.1:7000"),
        (bytes.fromhex("fe800000000000000000000000000001"), "fe80::1:7000"),
        (bytes(16), ":::7000"),
    ],
)
def test_text_of_a_node(address: bytes, text: str) -> None:
    assert str(NodeId(address, 7000)) == text


@given(st.binary(min_size=16, max_size=16) | st.lists(st.sampled_from([0, 1]), min_size=16, max_size=16).map(bytes))
@example(bytes(15) + b"\1")  # no IPv4 address begins with 0
@example(bytes(12) + b"\1\0\0\0")
def test_addresses_read_back(address: bytes) -> None:
    told = ipaddress.ip_address(ids.format_address(address))
    if isinstance(told, ipaddress.IPv4Address):
        assert address == bytes(12) + told.packed
    else:
        assert address == told.packed
        assert not (address[:12] == bytes(12) and address[12])
        assert "." in str(told) or ids.format_address(address) == str(told)
