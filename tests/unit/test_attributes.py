"""Attributes: vectors of protocol.md 10.6 and the structure of section 9."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import attribute_oid


@pytest.mark.parametrize(
    ("name", "tag", "snap_id", "key", "number", "oid"),
    [
        ("testvdi", "", 0, "color", 0xAAC2381B, 0x20F348BAAAC2381B),
        ("test", "", 0, "k", 0x594A8B4E, 0x207C2B25594A8B4E),
        ("test", "snap1", 0, "k", 0xAA0F9FF7, 0x207C2B25AA0F9FF7),
        ("test", "", 1, "k", 0xB40C92FF, 0x207C2B25B40C92FF),
        ("test", "", 2, "k", 0x12077C2C, 0x207C2B2512077C2C),
        ("vdi1", "", 0, "owner", 0xD0A17128, 0x2085BC31D0A17128),
        ("vdi1", "", 0, "lock-host", 0x73AB33B1, 0x2085BC3173AB33B1),
        ("debian.img", "v1", 3, "description", 0x88A952E1, 0x20713A7188A952E1),
        ("羊", "", 0, "name", 0x0AEA2309, 0x20BB7A260AEA2309),
    ],
)
def test_ids(name: str, tag: str, snap_id: int, key: str, number: int, oid: int) -> None:
    attribute = Attribute(name.encode(), key.encode(), tag.encode(), snap_id, value=b"does not matter", ctime=5)
    assert attribute.id() == number
    assert attribute_oid(vid_of_name(name.encode()), number) == oid


names = st.binary(max_size=256).filter(lambda name: b"\0" not in name)
attributes = st.builds(
    Attribute,
    name=names,
    key=names,
    tag=names,
    snap_id=st.integers(0, 2**32 - 1),
    ctime=st.integers(0, 2**64 - 1),
    value=st.binary(max_size=300),
)


@given(attributes)
def test_round_trip(attribute: Attribute) -> None:
    data = attribute.pack()
    assert len(data) == 66_320
    assert Attribute.unpack(memoryview(data)) == attribute


def test_offsets() -> None:
    data = Attribute(b"n", b"k", b"t", 0x0A0B0C0D, 0x0102030405060708, b"\xffvalue").pack()
    assert data[0:2] == b"n\0"
    assert data[256:258] == b"t\0"
    assert data[512:528] == bytes.fromhex("0807060504030201 0d0c0b0a 06000000")
    assert data[528:530] == b"k\0"
    assert data[784:791] == b"\xffvalue\0"


def test_longest_value() -> None:
    longest = Attribute(b"n", b"k", value=b"v" * 65_536)
    assert Attribute.unpack(longest.pack()) == longest
    with pytest.raises(UsageError):
        Attribute(b"n", b"k", value=b"v" * 65_537).pack()


def test_what_is_no_attribute() -> None:
    good = Attribute(b"n", b"k").pack()
    too_long = good[:524] + (65_537).to_bytes(4, "little") + good[528:]
    for data in (b"", good[:-1], good + b"\0", too_long):
        with pytest.raises(PeerError):
            Attribute.unpack(data)


@given(attributes, attributes)
def test_same_place(one: Attribute, other: Attribute) -> None:
    twin = Attribute(one.name, one.key, one.tag, one.snap_id, other.ctime, other.value)
    assert one.same_place(twin)
    assert one.same_place(other) == (one.id() == other.id())
