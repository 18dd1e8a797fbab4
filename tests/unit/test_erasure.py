"""The erasure code: recorded vectors of the original, all decodings, and that every coder gives the same bytes."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.cluster.core.erasure import (
    DATA_STRIPS,
    MAX_PARITY_STRIPS,
    Coder,
    PlainCoder,
    Policy,
    decoding_rows,
    generator,
    inverse,
    multiply,
    parity_rows,
    policy_of,
    xor,
)
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host import coders

ALL = [Policy(data, parity) for data in DATA_STRIPS for parity in range(1, MAX_PARITY_STRIPS + 1)]
SOME = [Policy(2, 1), Policy(2, 2), Policy(4, 2), Policy(4, 3), Policy(8, 3), Policy(16, 15)]


def available() -> list[Coder]:
    found: list[Coder] = [PlainCoder()]
    for make in (coders.IsaCoder, coders.ZfecCoder):
        try:
            found.append(make())
        except (ImportError, OSError):
            continue
    return found


CODERS = available()


@pytest.fixture(params=CODERS, ids=lambda coder: coder.name)
def coder(request: pytest.FixtureRequest) -> Coder:
    found: Coder = request.param
    return found


def units(policy: Policy, length: int, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(length) for _ in range(policy.data)]


@pytest.mark.parametrize(
    ("byte", "policy"),
    [
        (0x11, (2, 1)), (0x12, (2, 2)), (0x21, (4, 1)), (0x22, (4, 2)), (0x23, (4, 3)), (0x42, (8, 2)),
        (0x43, (8, 3)), (0x87, (16, 7)), (0x8F, (16, 15)),
    ],
)  # fmt: skip
def test_policy_bytes(byte: int, policy: tuple[int, int]) -> None:
    assert policy_of(byte) == Policy(*policy)
    assert Policy(*policy).to_byte() == byte


@pytest.mark.parametrize("byte", [0, 0x02, 0x20, 0x32, 0x71, 0x91, 0xFF])
def test_bytes_that_name_no_policy(byte: int) -> None:
    assert policy_of(byte) is None


def test_field_is_a_field() -> None:
    for a in range(1, 256):
        products = {multiply(a, b) for b in range(256)}
        assert len(products) == 256
    assert multiply(0x80, 2) == 0x1D


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ((2, 2), ["03 02", "05 04"]),
        ((4, 3), ["77 40 38 0e", "c7 a7 0d 6c", "53 02 6f 3f"]),
        ((8, 3), ["89 18 d0 7d 92 a4 f5 fe", "36 f8 d0 ce 25 19 fb 16", "5f cd a3 40 50 48 f6 9e"]),
    ],
)
def test_parity_rows_of_the_original(policy: tuple[int, int], rows: list[str]) -> None:
    assert parity_rows(Policy(*policy)) == tuple(tuple(bytes.fromhex(row)) for row in rows)


@pytest.mark.parametrize(
    ("policy", "first", "last"),
    [
        ((2, 1), "0001020304050607", "0001020304050607"),
        ((2, 2), "0001020304050607", "0001020304050607"),
        ((4, 2), "d4d5d6d7d0d1d2d3", "7d7c7f7e79787b7a"),
        ((8, 3), "8283808186878485", "b9b8bbbabdbcbfbe"),
        ((16, 15), "c5c4c7c6c1c0c3c2", "d2d3d0d1d6d7d4d5"),
    ],
)
def test_stripes_of_the_original(coder: Coder, policy: tuple[int, int], first: str, last: str) -> None:
    shape = Policy(*policy)
    stripe, length = bytes(range(256)) * 2, 512 // shape.data
    parity = coder.encode(shape, [stripe[i * length : (i + 1) * length] for i in range(shape.data)])
    assert len(parity) == shape.parity
    assert bytes(parity[0][:8]).hex() == first
    assert bytes(parity[-1][:8]).hex() == last


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_every_policy_survives_every_kind_of_loss(policy: Policy) -> None:
    """As many losses as there may be: the first strips, the last, and random ones."""
    plain, source = PlainCoder(), random.Random(policy.to_byte())
    data = units(policy, 40)
    whole = dict(enumerate([*data, *plain.encode(policy, data)]))
    gone = min(policy.parity, policy.strips)
    everything = list(range(policy.strips))
    for lost in (everything[:gone], everything[-gone:], *(source.sample(everything, gone) for _ in range(6))):
        left = {strip: unit for strip, unit in whole.items() if strip not in lost}
        found = plain.decode(policy, left, lost)
        assert [bytes(unit) for unit in found] == [bytes(whole[strip]) for strip in lost]


@pytest.mark.parametrize("policy", SOME[:4], ids=str)
def test_all_combinations_decode(coder: Coder, policy: Policy) -> None:
    data = units(policy, 96)
    whole = dict(enumerate([*data, *coder.encode(policy, data)]))
    for kept in itertools.combinations(range(policy.strips), policy.data):
        found = coder.decode(policy, {strip: whole[strip] for strip in kept}, range(policy.strips))
        assert [bytes(unit) for unit in found] == [bytes(whole[strip]) for strip in range(policy.strips)], kept


@pytest.mark.parametrize("policy", SOME, ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 4096, 4097, 65536])
def test_coders_agree(coder: Coder, policy: Policy, length: int) -> None:
    data, plain = units(policy, length), PlainCoder()
    parity = plain.encode(policy, data)
    assert [bytes(unit) for unit in coder.encode(policy, [memoryview(unit) for unit in data])] == parity
    for strip in (0, policy.data - 1):
        made = [bytes(unit) for unit in coder.delta(policy, strip, [bytearray(data[0]), memoryview(data[1])])]
        assert made == plain.delta(policy, strip, [xor(data[0], data[1])])
    assert bytes(coder.xor(data[0], memoryview(data[1]))) == xor(data[0], data[1])


@pytest.mark.parametrize("length", [512, 4096, 8192])
def test_what_was_coded_stays_what_it_is(coder: Coder, length: int) -> None:
    """Memory in which a coder works may be used again, not what it gave."""
    policy = Policy(4, 2)
    first = coder.encode(policy, units(policy, length))
    before = [bytes(unit) for unit in first]
    coder.encode(policy, units(policy, length, 2))
    coder.delta(policy, 0, units(policy, length, 3)[:2])
    assert [bytes(unit) for unit in first] == before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SOME), st.integers(1, 300), st.integers(0, 1 << 30))
def test_delta_equals_encoding_anew(policy: Policy, length: int, seed: int) -> None:
    for body in CODERS:
        data = units(policy, length, seed)
        parity = body.encode(policy, data)
        strip = seed % policy.data
        fresh = random.Random(~seed).randbytes(length)
        change = body.delta(policy, strip, [data[strip], fresh])
        data[strip] = fresh
        assert [xor(a, b) for a, b in zip(parity, change, strict=True)] == [
            bytes(unit) for unit in body.encode(policy, data)
        ]


def test_too_few_strips(coder: Coder) -> None:
    with pytest.raises(UsageError):
        coder.decode(Policy(4, 2), {0: b"a", 1: b"b", 5: b"c"}, [2])


def test_matrices() -> None:
    rows = generator(Policy(4, 2))
    assert rows[:4] == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    assert inverse(inverse(rows[2:])) == rows[2:]
    assert decoding_rows(Policy(4, 2), (0, 1, 2, 3), (4, 5)) == rows[4:]
    with pytest.raises(ZeroDivisionError):
        inverse([(1, 2), (1, 2)])


def test_best_coder_works_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert coders.best_coder(lambda _, text: said.append(text)).name == CODERS[-1 if len(CODERS) == 1 else 1].name

    def missing() -> Coder:
        raise ImportError("not here")

    monkeypatch.setattr(coders, "IsaCoder", missing)
    monkeypatch.setattr(coders, "ZfecCoder", missing)
    assert coders.best_coder(lambda _, text: said.append(text)).name == "plain"
    assert "plain Python" in said[-1]
