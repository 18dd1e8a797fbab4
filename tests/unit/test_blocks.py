"""The map of an object's blocks against the plainest reading of the same rule."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from sheepdog.cluster.core.blocks import block_map, map_size, runs


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 9))
def test_a_table_becomes_a_map_becomes_runs(blocks: list[bool], beyond: int) -> None:
    table = b"".join(
        ((0x0100_0000_0000_0000 + place) * data).to_bytes(8, "little") for place, data in enumerate(blocks)
    )
    found = block_map(table)
    assert len(found) == -(-len(blocks) // 8)
    assert [bool(found[place // 8] >> place % 8 & 1) for place in range(len(blocks))] == blocks
    expected, first = [], 0
    for data, group in groupby(blocks + [False] * beyond):
        count = len(list(group))
        expected.append((first, count, data))
        first += count
    assert runs(found, len(blocks) + beyond) == expected


def test_sizes() -> None:
    assert map_size(4 << 20) == 128 == len(block_map(bytes(8 * 1024)))
    assert [map_size(size) for size in (0, 1, 4096, 32768, 32769)] == [0, 1, 1, 1, 2]
    assert runs(b"\xff" * 128, 1024) == [(0, 1024, True)]
    assert runs(b"", 5) == [(0, 5, False)]
