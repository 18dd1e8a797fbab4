"""Who is let in (protocol.md 2.8, 3.1)."""

from __future__ import annotations

import pytest
from tests.wire.exchanges import REQUESTS

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire import opcodes
from sheepdog.cluster.wire.header import REQUEST
from sheepdog.cluster.wire.opcodes import Opcode, admit, protocol_version
from sheepdog.cluster.wire.results import TEXTS, text_of

QEMU = (0x01, 0x02, 0x03, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18)
TGT = (0x01, 0x02, 0x03, 0x12, 0x13, 0x16)


@pytest.mark.parametrize("opcode", QEMU + TGT)
def test_versions_of_qemu_tgt_and_dog(opcode: int) -> None:
    assert [admit(opcode, version) for version in range(4)] == [Result.SUCCESS] * 3 + [Result.VER_MISMATCH]


@pytest.mark.parametrize("version", range(256))
def test_administration_takes_one_version_only(version: int) -> None:
    expected = Result.SUCCESS if version == 0x0A else Result.VER_MISMATCH
    assert admit(Opcode.GET_NODE_LIST, version) is expected


def test_version_is_checked_before_the_opcode() -> None:
    for opcode in range(256):
        if opcode not in list(Opcode):
            assert admit(opcode, protocol_version(opcode)) is Result.INVALID_PARMS
        assert admit(opcode, 3) is Result.VER_MISMATCH


def test_recorded_requests_are_let_in() -> None:
    for message in REQUESTS:
        request = REQUEST.unpack(message.header)
        expected = Result.VER_MISMATCH if message.conversation == "13.22" else Result.SUCCESS
        assert admit(request.opcode, request.version) is expected


def test_our_own_requests_are_let_in() -> None:
    for opcode in Opcode:
        refused = opcode in opcodes.INTERNAL
        assert admit(opcode, protocol_version(opcode)) is (Result.INVALID_PARMS if refused else Result.SUCCESS)


def test_sets_as_in_the_table() -> None:
    """Column F and "int" of protocol.md 3.1, transcribed by hand, and from e0 on our own."""
    waiting = "15 18 82 84 85 87 8a 90 94 95 96 99 9a 9b 9c ab ac af b9 ba bd be c6 c9 ca cb e0"
    assert sorted(opcodes.SERVED_WHILE_WAITING) == [int(word, 16) for word in waiting.split()]
    internal = "04 94 99 a1 a2 a5 a6 ac c1 c2 c7 c8 cd"
    assert sorted(opcodes.INTERNAL) == [int(word, 16) for word in internal.split()]


def test_texts() -> None:
    assert text_of(0) == "Success"
    assert text_of(0x1A) == "Object is read-only"
    assert text_of(0x98) == "Invalid cluster vnodes strategy"
    assert text_of(0x93) == "Invalid error code 93"
    assert text_of(0xABC) == "Invalid error code abc"
    assert len(set(TEXTS.values())) == len(TEXTS)
