"""Headers against every recorded exchange, and round trips of every overlay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.exchanges import MESSAGES, RESPONSES, Recorded

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire import header
from sheepdog.cluster.wire.layout import Layout
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.response import response

FLAG_NAMES = {bit: name for name, bit in vars(Flags).items() if isinstance(bit, int)}
DECIMAL = {"data_length", "copies", "block_size_shift", "version", "epoch", "id", "snap_id"}
DECIMAL |= {"nr_nodes", "nodes_nr", "lock_type", "tgt_epoch"}


def describe(fields: Any) -> str:
    """The fields of a header that are not zero, as exchanges.txt writes them."""
    words = [type(fields).__name__]
    for name, value in zip(fields._fields, fields, strict=True):
        if not value:
            continue
        if name == "opcode":
            text = Opcode(value).name
        elif name == "flags":
            text = "|".join(flag for bit, flag in FLAG_NAMES.items() if value & bit)
        elif name == "result":
            text = Result(value).name
        elif isinstance(value, bytes):
            text = value.hex()
        else:
            text = str(value) if name in DECIMAL else hex(value)
        words.append(f"{name}={text}")
    return " ".join(words)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m.conversation}{'<>'[m.is_request]}{m.header[1]:02x}")
def test_recorded_headers(message: Recorded) -> None:
    fields = message.layout.unpack(message.header)
    assert describe(fields) == message.fields
    assert message.layout.pack(fields) == message.header


def test_all_conversations_are_there() -> None:
    numbers = {int(message.conversation.removeprefix("13.")) for message in MESSAGES}
    assert numbers == set(range(1, 29)) - {24}  # 13.24 is an inode: see test_inode


def test_plain_responses_are_built_alike() -> None:
    plain = [message for message in RESPONSES if message.layout is header.RESPONSE]
    assert len(plain) > 20
    for message in plain:
        told = header.RESPONSE.unpack(message.header)
        assert response(told.opcode, told.id, told.epoch, told.result, told.data_length) == message.header


LAYOUTS = [layout for layout in vars(header).values() if isinstance(layout, Layout)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.make.__self__.__name__)
def test_every_overlay_is_48_bytes_and_keeps_its_fields(layout: Layout[Any]) -> None:
    assert layout.size == header.HEADER_SIZE
    fields = layout.unpack(bytes(range(48)), 0)
    assert layout.unpack(b"xyz" + layout.pack(fields), 3) == fields


@given(st.binary(min_size=48, max_size=48), st.sampled_from(LAYOUTS))
def test_any_48_bytes_are_a_header(data: bytes, layout: Layout[Any]) -> None:
    fields = layout.unpack(data)
    assert layout.unpack(layout.pack(fields)) == fields


def offsets(layout: Layout[Any], **values: Any) -> dict[str, int]:
    """Where the first byte of each given field lies."""
    blank = layout.make.__self__()  # type: ignore[attr-defined]
    found = {}
    for name, value in values.items():
        data = layout.pack(blank._replace(**{name: value}))
        found[name] = next(i for i, byte in enumerate(data) if byte)
    return found


def test_offsets_of_overlays_that_were_not_recorded() -> None:
    address = bytes([9] * 16)
    assert offsets(header.VDI_STATE_REQUEST, old_vid=1, new_vid=1, copies=1, set_bitmap=1, copy_policy=1) == {
        "old_vid": 16,
        "new_vid": 20,
        "copies": 24,
        "set_bitmap": 25,
        "copy_policy": 26,
    }
    assert offsets(header.VDI_STATE_REQUEST, block_size_shift=1) == {"block_size_shift": 27}
    assert offsets(header.REPAIR_REQUEST, oid=1, address=address, port=1) == {"oid": 16, "address": 24, "port": 40}
    assert offsets(header.OBJECT_REQUEST, copy_policy=1, ec_index=1) == {"copy_policy": 33, "ec_index": 34}
    assert offsets(header.VDI_REQUEST, copy_policy=1, store_policy=1) == {"copy_policy": 29, "store_policy": 30}
    assert offsets(header.CLUSTER_REQUEST, copy_policy=1, block_size_shift=1) == {
        "copy_policy": 33,
        "block_size_shift": 44,
    }
    assert offsets(header.CLUSTER_DEFAULT_RESPONSE, copy_policy=1) == {"copy_policy": 21}
