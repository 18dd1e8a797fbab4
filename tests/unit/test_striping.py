"""Where the bytes of coded objects are, and that every kind of write leaves the parity that encoding would."""

from __future__ import annotations

import itertools
import random
import zlib
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core import strip_undo
from sheepdog.cluster.core.erasure import PlainCoder, Policy, xor
from sheepdog.cluster.core.ids import Version, Vid, data_oid, strip_of
from sheepdog.cluster.core.ports import NodeState
from sheepdog.cluster.core.strip_undo import Undo, UndoLog, decode, encode
from sheepdog.cluster.core.striping import (
    UNIT,
    Change,
    cut,
    encode_creation,
    encode_part,
    encode_stripes,
    gather,
    pieces,
    rows_to_range,
    spans,
    strip_size,
    stripe_size,
)
from sheepdog.cluster.host.coders import best_coder

CODER = best_coder(lambda level, text: None)
POLICIES = [Policy(2, 1), Policy(4, 2), Policy(16, 3)]
SIZE = 1 << 20


def apply(strips: list[bytearray], changes: list[Change]) -> None:
    for strip, change in zip(strips, changes, strict=True):
        data = b"".join(bytes(part) for part in change.data)
        end = change.offset + len(data)
        strip[change.offset : end] = xor(strip[change.offset : end], data) if change.delta else data


def whole_code(policy: Policy, data: bytes) -> list[bytes]:
    """The strips of an object, straight from the definition."""
    strips = [bytearray() for _ in range(policy.strips)]
    for start in range(0, len(data), stripe_size(policy)):
        units = [data[at : at + UNIT] for at in range(start, start + stripe_size(policy), UNIT)]
        for strip, unit in zip(strips, [*units, *CODER.encode(policy, units)], strict=True):
            strip += unit
    return [bytes(strip) for strip in strips]


ranges = st.tuples(st.sampled_from(POLICIES), st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda drawn: (drawn[0], drawn[1], min(drawn[2], SIZE - drawn[1]))
)


@given(ranges)
def test_pieces_cover_a_range_once(drawn: tuple[Policy, int, int]) -> None:
    policy, offset, length = drawn
    parts = pieces(policy, offset, length)
    assert sum(part.length for part in parts) == length
    position = 0
    for part in parts:
        assert part.start == position
        stripe, rest = divmod(offset + position, stripe_size(policy))
        assert part.strip == rest // UNIT
        assert part.offset == stripe * UNIT + rest % UNIT
        assert part.offset // UNIT == (part.offset + part.length - 1) // UNIT
        position += part.length
    for strip, span in spans(parts).items():
        mine = [part for part in parts if part.strip == strip]
        for before, after in itertools.pairwise(mine):
            assert before.offset + before.length == after.offset
        assert span == (mine[0].offset, sum(part.length for part in mine))
        assert span.offset + span.length <= strip_size(policy, SIZE)


@given(ranges)
def test_cut_gives_what_can_be_coded_at_once(drawn: tuple[Policy, int, int]) -> None:
    policy, offset, length = drawn
    parts = cut(policy, offset, length)
    position, stripe = offset, stripe_size(policy)
    for start, part in parts:
        assert start == position
        assert part > 0
        assert (start % stripe == 0 and part % stripe == 0) or start // stripe == (start + part - 1) // stripe
        position += part
    assert position == offset + length
    assert len(parts) <= 3


def test_an_empty_range_stays_one_write() -> None:
    assert cut(Policy(4, 2), 4096, 0) == [(4096, 0)]
    assert cut(Policy(4, 2), 0, 0) == [(0, 0)]


@given(ranges, st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_gather_puts_a_range_together(drawn: tuple[Policy, int, int], seed: int) -> None:
    policy, offset, length = drawn
    data = random.Random(seed).randbytes(SIZE)
    strips = whole_code(policy, data)
    parts = pieces(policy, offset, length)
    found = {strip: (at, strips[strip][at : at + size]) for strip, (at, size) in spans(parts).items()}
    assert bytes(gather(parts, dict(found), length)) == data[offset : offset + length]
    low, size = rows_to_range(policy, parts[0].offset, parts[0].length)
    assert low <= offset < low + size


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_any_sequence_of_writes_leaves_the_parity_of_the_data(policy: Policy) -> None:
    source = random.Random(7)
    data = bytearray(SIZE)
    first = source.randbytes(100_000)
    data[300_000:400_000] = first
    strips = [bytearray(strip_size(policy, SIZE)) for _ in range(policy.strips)]
    apply(strips, encode_creation(CODER, policy, 300_000, first))
    assert strips == whole_code(policy, bytes(data))
    for _ in range(40):
        offset = source.randrange(SIZE)
        length = min(source.choice([1, 512, 4096, 5000, UNIT, 3 * UNIT, SIZE]), SIZE - offset)
        fresh = source.randbytes(length)
        for start, part in cut(policy, offset, length):
            piece = fresh[start - offset : start - offset + part]
            if start % stripe_size(policy) == 0 and part % stripe_size(policy) == 0:
                apply(strips, encode_stripes(CODER, policy, start, piece))
            else:
                parts = pieces(policy, start, part)
                old = [bytes(strips[p.strip][p.offset : p.offset + p.length]) for p in parts]
                apply(strips, encode_part(CODER, policy, parts, piece, old))
        data[offset : offset + length] = fresh
    assert strips == whole_code(policy, bytes(data))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 4096), (5000, 7), (60_000, 10_000), (0, SIZE), (1, SIZE - 2)]
)
def test_creations(policy: Policy, offset: int, length: int) -> None:
    data = random.Random(3).randbytes(length)
    strips = [bytearray(strip_size(policy, SIZE)) for _ in range(policy.strips)]
    apply(strips, encode_creation(CODER, policy, offset, data))
    assert strips == whole_code(policy, bytes(offset) + data + bytes(SIZE - offset - length))


def test_a_creation_of_zeros_stores_nothing() -> None:
    changes = encode_creation(PlainCoder(), Policy(4, 2), 0, bytes(SIZE))
    assert all(not change.data for change in changes)


def test_undo_goes_back_step_by_step_and_forgets_from_below() -> None:
    log, strip = UndoLog(), strip_of(data_oid(Vid(1), 0), 2)
    versions = [Version(1, 1, number) for number in range(5)]
    for before, after in itertools.pairwise(versions):
        log.keep(strip, Undo(before, after, 0, b"x", 0b110100))
    assert [step.before for step in log.steps(strip, versions[4])] == versions[3::-1]
    assert log.steps(strip, versions[2]) == []
    steps = log.back_to(strip, versions[2], versions[4])
    assert steps is not None
    assert [step.before for step in steps] == [versions[3], versions[2]]
    assert log.back_to(strip, versions[4], versions[4]) == []
    assert log.back_to(strip, Version(9, 9, 9), versions[4]) is None
    log.settle(strip, versions[2])
    assert [step.back for step in log.steps(strip, versions[4])] == [True, True, False, False]
    assert log.back_to(strip, versions[1], versions[4]) is None
    log.level(strip, versions[2])
    assert [step.before for step in log.steps(strip, versions[4])] == [versions[3], versions[2]]
    log.level(strip, versions[4])
    assert log.strips() == []


def test_a_write_of_all_strips_that_is_everywhere_leaves_nothing_to_remember() -> None:
    """Large writes are never brought level: else each would cost memory, and time at every change of members."""
    log, strip = UndoLog(), strip_of(data_oid(Vid(1), 0), 2)
    versions = [Version(1, 1, number) for number in range(4)]
    for (before, after), touched in zip(itertools.pairwise(versions), (0b110100, 0b111111, 0b110100), strict=True):
        log.keep(strip, Undo(before, after, 0, b"x", touched))
    log.settle(strip, versions[1])
    assert len(log.steps(strip, versions[3])) == 3
    log.settle(strip, versions[3])
    assert [step.before for step in log.steps(strip, versions[3])] == [versions[2]]
    log.keep(strip, Undo(versions[3], Version(1, 1, 9), 0, b"x", 0b111111))
    log.settle(strip, Version(1, 1, 9))
    assert log.strips() == []


def test_a_step_that_was_gone_back_is_no_part_of_the_way() -> None:
    state, log, strip = _State(), UndoLog(), strip_of(data_oid(Vid(1), 0), 4)
    log.load(cast("NodeState", state), lambda _: None)
    v1, v2, undone, again = (Version(1, 1, number) for number in range(1, 5))
    log.keep(strip, Undo(v1, v2, 0, b"1", 0b10001))
    log.keep(strip, Undo(v2, undone, 0, b"2", 0b10010))
    log.keep(strip, Undo(v2, again, 0, b"", 0b110000))
    expected = [(v2, 0b110000), (v1, 0b10001)]
    assert [(step.before, step.touched) for step in log.steps(strip, again)] == expected
    later = UndoLog()
    later.load(cast("NodeState", state), lambda _: again)
    assert [(step.before, step.touched) for step in later.steps(strip, again)] == expected


class _State:
    """As much of a node's state as an undo log uses."""

    def __init__(self) -> None:
        self.data = b""
        self.replaced = 0

    def append_undo(self, record: bytes) -> None:
        self.data += record

    def replace_undo(self, records: bytes) -> None:
        self.data = records
        self.replaced += 1

    def load_undo(self) -> list[bytes]:
        return [self.data]


def test_undo_survives_the_process() -> None:
    state, strip = _State(), strip_of(data_oid(Vid(1), 0), 2)
    versions = [Version(1, 1, number) for number in range(4)]
    log = UndoLog()
    log.load(cast("NodeState", state), lambda _: None)
    for number, (before, after) in enumerate(itertools.pairwise(versions)):
        log.keep(strip, Undo(before, after, number * 4096, bytes([number]) * 100))
    for torn in (0, 1, 50):
        later, left = UndoLog(), _State()
        left.data = state.data[: len(state.data) - torn]
        now = versions[3] if not torn else versions[2]
        later.load(cast("NodeState", left), lambda _, now=now: now)  # type: ignore[misc]
        expected = [version for version in versions[::-1] if version < now]
        assert [step.before for step in later.steps(strip, now)] == expected
    killed = UndoLog()
    killed.load(cast("NodeState", state), lambda _: versions[2])  # the last record came, its write did not
    steps = killed.back_to(strip, versions[1], versions[2])
    assert steps is not None
    assert [bytes(step.old or b"") for step in steps] == [b"\x01" * 100]
    log.clear()
    assert state.data == b""


def test_records_that_an_older_version_has_sealed_are_read() -> None:
    strip, undo = strip_of(data_oid(Vid(1), 0), 5), Undo(Version(1, 1, 1), Version(1, 1, 2), 4096, b"old")
    body = encode(strip, undo)[4:]
    older = zlib.crc32(body).to_bytes(4, "little") + body
    found = decode(older + encode(strip, undo))
    assert [encode(strip, one) for one in found[strip]] == [encode(strip, undo)] * 2
    assert decode(older[:-1] + b"?") == {}


def test_what_is_added_behind_a_torn_end_is_found() -> None:
    state, strip = _State(), strip_of(data_oid(Vid(1), 0), 5)
    v1, v2, v3 = (Version(1, 1, number) for number in range(1, 4))
    first = UndoLog()
    first.load(cast("NodeState", state), lambda _: None)
    first.keep(strip, Undo(v1, v2, 0, b"1"))
    state.data += b"torn"
    second = UndoLog()
    second.load(cast("NodeState", state), lambda _: v2)
    second.keep(strip, Undo(v2, v3, 0, b"2"))
    third = UndoLog()
    third.load(cast("NodeState", state), lambda _: v3)
    assert [step.before for step in third.steps(strip, v3)] == [v2, v1]


def test_what_is_all_needed_is_not_written_anew_with_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strip_undo, "UNDO_FILE_BYTES", 1000)
    state, strip = _State(), strip_of(data_oid(Vid(1), 0), 5)
    log = UndoLog()
    log.load(cast("NodeState", state), lambda _: None)
    versions = [Version(1, 1, number) for number in range(101)]
    for before, after in itertools.pairwise(versions):
        log.keep(strip, Undo(before, after, 0, bytes(100)))
    assert 1 < state.replaced < 10
    log.level(strip, versions[-1])
    for number in range(100, 300):
        log.keep(strip, Undo(Version(1, 1, number), Version(1, 1, number + 1), 0, bytes(100)))
        log.level(strip, Version(1, 1, number + 1))
    assert len(state.data) < 2000, "what is not needed any more has gone"
