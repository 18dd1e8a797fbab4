"""Vectors of protocol.md 10: whoever computes other hashes places objects elsewhere than dog expects."""

from __future__ import annotations

import pytest

from sheepdog.cluster.core import hashing
from sheepdog.cluster.core.ids import NodeId, ObjectId


def ipv4(text: str) -> bytes:
    return bytes(12) + bytes(int(part) for part in text.split("."))


def test_check_values() -> None:
    assert hashing.fnv1a(b"abc") == 0xE71FA2190541574B
    assert hashing.ring_hash(b"abc") == 0xFB9512E53041E82A
    assert hashing.ring_hash(b"") == 0xF4ED18EBF16AA5CC


def test_basis_continues_a_hash() -> None:
    assert hashing.fnv1a(b"c", hashing.fnv1a(b"ab")) == hashing.fnv1a(b"abc")


NODES = """
127.0.0.1 7000 9cb3d6dd0a4c0f9f 3af2cba6e538cdf3 fd38432fd111924b 2ad2bef8f506e35d 68bc322b2d4a3177
127.0.0.1 7001 23fa0bfdea07a6d0 afd60ff78e7a685c 65c5ac1e06684dfd 4b82b98774087315 663d57b5b98d8aea
127.0.0.1 7002 a2d35cce28716cea 10b2e1a27dedf74a 96a37557d5eef4e0 8f329d343011e1d4 cfe3c1e79d2d16a4
127.0.0.1 17800 7cbcb6a60d977acc 872bab8ad947f5de 97880ea4416b3672 8b767705f8a3b5fd 22f6294bab3ed781
127.0.0.1 17801 e773afc676144c0a 0344ea285db93a2b ccec707017ec6fc7 ee52dcd2b6580cb4 15027d2cfb763be5
127.0.0.1 17802 8ba918db76d0073c 545b598557aa3bc8 fa77f7562273af1b f1f67b3cb4edcfbe cf51ffe286810758
10.0.0.1 7000 b8377782bf26e51c b98e9468e29018b8 0cb78409b872bc27 e7893b1c661d7f30 a5e81f2eb6992fe8
192.168.1.250 7000 c7d80425c9570772 2ffb643960fe0fd9 dcddfba9fb218f98 a826e354600c6bbc 3eff3ba54644bec7
172.16.254.3 65535 fac2b7e9b02a341b 6b470d74df0a129a ecfc466ac20c61b8 46d74338406f2419 843da4149713571e
"""


@pytest.mark.parametrize("row", NODES.split("\n")[1:-1])
def test_nodes(row: str) -> None:
    address, port, node, *expected = row.split()
    value = hashing.node_hash(NodeId(ipv4(address), int(port)))
    assert f"{value:016x}" == node
    points = []
    for _ in range(128):
        value = hashing.next_hash(value)
        points.append(f"{value:016x}")
    assert [*points[:3], points[127]] == expected


def test_ipv6_node() -> None:
    value = hashing.node_hash(NodeId(bytes.fromhex("fe80000000000000 0000000000000001"), 7000))
    points = [value]
    for _ in range(3):
        points.append(hashing.next_hash(points[-1]))
    assert points == [0x38B27F4794C1CF8B, 0xC76187BE58F063A4, 0xABF9CAF6E449A996, 0x73B461C1056B3E1A]


@pytest.mark.parametrize(
    ("oid", "expected"),
    [
        (0x0000000000000000, 0xCB720BF58A2C29EC),
        (0x0000000000000001, 0x695A27070A16E038),
        (0x00F348BA00000000, 0x03A1FE4B853061D2),
        (0x00F348BA00000001, 0x13C56D2429ADCB71),
        (0x80F348BA00000000, 0x030C38C7E985C00E),
        (0x40F348BA00000000, 0x9D4843B13BC5E41A),
        (0x20F348BAAAC2381B, 0x83C33BB283512A9D),
        (0x08F348BA00000001, 0x4A37607B80877437),
        (0x007C2B2500000FFF, 0x62EADEB70A5A9AF6),
        (0x10F348BA00000000, 0x5595A32C7B8EC0DD),
        (0xFFFFFFFFFFFFFFFF, 0xD971DF0E40567443),
    ],
)
def test_objects(oid: int, expected: int) -> None:
    assert hashing.object_hash(ObjectId(oid)) == expected


@pytest.mark.parametrize(
    ("name", "plain", "vid"),
    [
        ("", 0xCBF29CE484222325, 0x222325),
        ("a", 0xAF63DC4C8601EC8C, 0x01EC8C),
        ("test", 0xF9E6E6EF197C2B25, 0x7C2B25),
        ("testvdi", 0x00734CB79DF348BA, 0xF348BA),
        ("myclone", 0x2572B8D3DB9D9AC8, 0x9D9AC8),
        ("vdi1", 0x6EE8C7010685BC31, 0x85BC31),
        ("vdi2", 0x6EE8C4010685B718, 0x85B718),
        ("debian.img", 0xDCA6534ED7713A71, 0x713A71),
        ("alice/disk 0", 0x135590CC2304358D, 0x04358D),
        ("羊", 0x275A671B6CBB7A26, 0xBB7A26),
        ("ecvdi", 0x844799608F44E416, 0x44E416),
        ("hyper", 0xDF60F127D55B5B59, 0x5B5B59),
    ],
)
def test_names(name: str, plain: int, vid: int) -> None:
    assert hashing.fnv1a(name.encode()) == plain
    assert hashing.vid_of_name(name.encode()) == vid
