"""Unsigned numbers in bytes: as `int.to_bytes` has them, at both ends of the range; nothing beyond it."""

from __future__ import annotations

import pytest
from librt.strings import BytesWriter

from sheepdog.cluster.core.words import read_u32, read_u64, write_u32, write_u64


@pytest.mark.parametrize(("size", "write", "read"), [(4, write_u32, read_u32), (8, write_u64, read_u64)])
def test_the_whole_range(size: int, write: object, read: object) -> None:
    assert callable(write)
    assert callable(read)
    top = 1 << 8 * size
    for value in (0, 1, top // 4, top // 2 - 1, top // 2, top - 1):
        writer = BytesWriter()
        writer.append(7)
        write(writer, value)
        data = writer.getvalue()
        assert data == b"\x07" + value.to_bytes(size, "little")
        assert read(data, 1) == value
    for value in (-1, top):
        with pytest.raises((ValueError, OverflowError)):
            write(BytesWriter(), value)
