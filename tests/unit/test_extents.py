"""The object cache's sets of blocks, against plain sets of numbers."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.extents import (
    CachedObject,
    Fill,
    blocks_of,
    covered,
    groups_of,
    overhead,
    runs,
    span,
    touched,
)
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_GROUP_BLOCKS

SIZE = 4 << 20
BLOCKS = SIZE // BLOCK_SIZE
ROUNDS = 300


def numbers(bits: int) -> set[int]:
    return {number for number in range(bits.bit_length()) if bits >> number & 1}


def ranges(random: Random) -> tuple[int, int]:
    """Offset and length within an object; half of them on block borders."""
    offset = random.randrange(SIZE - 1)
    length = random.randrange(1, min(SIZE - offset, random.choice((100, 5000, 100_000, SIZE))) + 1)
    if random.random() < 0.5:
        offset -= offset % BLOCK_SIZE
        length = max(length - length % BLOCK_SIZE, BLOCK_SIZE)
    return offset, length


@pytest.mark.parametrize("seed", range(3))
def test_touched_and_covered_blocks(seed: int) -> None:
    random = Random(seed)
    for _ in range(ROUNDS):
        offset, length = ranges(random)
        by_block: dict[int, int] = {}  # bytes of the range in each block
        position = offset
        while position < offset + length:
            part = min(BLOCK_SIZE - position % BLOCK_SIZE, offset + length - position)
            by_block[position // BLOCK_SIZE] = part
            position += part
        assert numbers(touched(offset, length)) == set(by_block)
        assert numbers(covered(offset, length)) == {block for block, n in by_block.items() if n == BLOCK_SIZE}


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_the_set_in_the_fewest_pieces(seed: int) -> None:
    random = Random(seed)
    for _ in range(ROUNDS):
        wanted = {random.randrange(BLOCKS) for _ in range(random.randrange(200))}
        bits = sum(1 << number for number in wanted)
        found = list(runs(bits))
        assert {number for first, count in found for number in range(first, first + count)} == wanted
        assert all(a + n < b for (a, n), (b, _) in pairwise(found)), "ascending, never touching"
        assert sum(span(first, count) for first, count in found) == bits


@pytest.mark.parametrize("seed", range(3))
def test_groups_hold_their_blocks(seed: int) -> None:
    random = Random(seed)
    for _ in range(ROUNDS):
        wanted = {random.randrange(BLOCKS) for _ in range(random.randrange(60))}
        bits = sum(1 << number for number in wanted)
        groups = groups_of(bits)
        assert numbers(groups) == {number // CACHE_GROUP_BLOCKS for number in wanted}
        assert numbers(blocks_of(groups)) == {
            number for number in range(BLOCKS) if number // CACHE_GROUP_BLOCKS in numbers(groups)
        }


def test_a_change_is_newer_than_what_is_on_its_way() -> None:
    entry = CachedObject(CachedVolume(Vid(7)), data_oid(Vid(7), 0), SIZE)
    entry.fills = [Fill(span(0, 10)), Fill(span(8, 4))]
    entry.change(span(8, 2))
    assert [numbers(fill.bits) for fill in entry.fills] == [set(range(8)), {10, 11}]
    entry.change(-1)
    assert not any(fill.bits for fill in entry.fills)


def is_idle(entry: CachedObject) -> bool:
    return entry.idle


def test_what_an_object_takes_and_when_nobody_uses_it() -> None:
    entry = CachedObject(CachedVolume(Vid(7)), data_oid(Vid(7), 0), SIZE)
    assert is_idle(entry) and entry.blocks() == 0
    entry.stored, entry.present = True, span(3, 5)
    assert entry.blocks() == 5 + overhead(SIZE)
    assert overhead(SIZE) * BLOCK_SIZE >= BLOCK_SIZE + 512 + 8 * (BLOCKS + 1), "marks, header and a hash for each block"
    for name in ("users", "pushing", "through"):
        setattr(entry, name, 1)
        assert not is_idle(entry)
        setattr(entry, name, 0)
    entry.fills.append(Fill(0))
    assert not is_idle(entry)
    entry.forget()
    assert (entry.present, entry.blocks()) == (0, 0)
