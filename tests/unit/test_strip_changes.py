"""Which blocks of a strip changed since when: what a strip that comes back old need not be given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import STRIP_SHIFT, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE, CHANGED_STRIPS, CHANGES_KEPT
from sheepdog.cluster.core.strip_changes import (
    ALL_BLOCKS,
    StripChanges,
    decode_changes,
    encode_changes,
    in_common,
)

STRIP = ObjectId(1 << STRIP_SHIFT | 7)


def at(counter: int) -> Version:
    return Version(1, 0, counter)


def changes(*steps: tuple[int, int, int, int]) -> StripChanges:
    """Of steps (before, after, first block, blocks)."""
    made = StripChanges()
    for before, after, block, count in steps:
        made.note(STRIP, at(before), at(after), block * BLOCK_SIZE, count * BLOCK_SIZE)
    return made


def test_blocks_since_each_version_that_is_kept() -> None:
    made = changes((1, 2, 0, 1))
    made.mark(STRIP, at(2))
    made.note(STRIP, at(2), at(3), 5 * BLOCK_SIZE + 4095, 2)  # of two blocks
    assert made.since(STRIP, at(3)) == {at(3): 0, at(2): 0b1100000, at(1): 0b1100001}
    for counter in range(3, 3 + CHANGES_KEPT):
        made.mark(STRIP, at(counter))
        made.note(STRIP, at(counter), at(counter + 1), 0, 1)
    assert at(2) not in made.since(STRIP, at(3 + CHANGES_KEPT))


def test_what_was_taken_back_has_changed() -> None:
    made = changes((1, 2, 3, 1), (2, 1, 3, 1), (1, 4, 0, 0))
    assert made.since(STRIP, at(4)) == {at(4): 0, at(1): 0b1000}


def test_a_strip_that_got_elsewhere_meanwhile_has_no_history() -> None:
    made = changes((1, 2, 0, 1), (5, 6, 1, 1))
    assert made.since(STRIP, at(6)) == {at(6): 0, at(5): 0b10}
    assert made.since(STRIP, at(9)) == {at(9): 0}
    made.drop(STRIP)
    assert made.since(STRIP, at(6)) == {at(6): 0}


def test_a_strip_in_doubt_tells_nothing_until_it_is_made_anew() -> None:
    made = changes((1, 2, 0, 1))
    made.distrust(STRIP)
    assert made.since(STRIP, at(2)) == {}
    made.trust(STRIP)
    assert at(1) in made.since(STRIP, at(2))


def test_what_nobody_knows_is_everything() -> None:
    made = StripChanges()
    made.note(STRIP, at(1), at(2), 0, -1)
    assert made.since(STRIP, at(2))[at(1)] == ALL_BLOCKS
    assert decode_changes(encode_changes(made.since(STRIP, at(2)), 12), 12)[0][at(1)] & 0xFFF == 0xFFF


def test_the_oldest_strips_are_forgotten() -> None:
    made = changes((1, 2, 0, 1))
    for number in range(CHANGED_STRIPS):
        made.note(ObjectId(STRIP + 1 + number), at(1), at(2), 0, 1)
    assert made.since(STRIP, at(2)) == {at(2): 0}


def test_the_latest_version_that_all_had_counts() -> None:
    one = {at(9): 0, at(5): 0b1, at(3): 0b11}
    assert in_common([one, {at(8): 0, at(5): 0b100, at(3): 0b110}]) == 0b101
    assert in_common([one, {at(8): 0, at(3): 0b100}, {at(3): 0b1000}]) == 0b1111
    assert in_common([one, {at(8): 0}]) == ALL_BLOCKS
    assert in_common([{}, one]) == ALL_BLOCKS


@given(st.dictionaries(st.builds(at, st.integers(0, 1 << 60)), st.integers(0, (1 << 20) - 1), max_size=4), st.binary())
def test_lists_survive_the_wire(found: dict[Version, int], behind: bytes) -> None:
    data = encode_changes(found, 20)
    assert decode_changes(data + behind, 20) == (found, len(data))
    for end in range(len(data)):
        with pytest.raises(PeerError):
            decode_changes(data[:end], 20)
