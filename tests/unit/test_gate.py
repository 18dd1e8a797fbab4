"""The gate: which answers leave, which are held, and when they go."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.gate import Gate
from sheepdog.cluster.core.ports import Buffer, Clock, Timer


class StillClock(Clock):
    """Time stands still unless a test moves it."""

    now = 1000

    def now_ns(self) -> int:
        return self.now

    def wall_ns(self) -> int:
        raise AssertionError("the gate has no use for it")

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        raise AssertionError("the gate has no use for it")


class Case:
    def __init__(self) -> None:
        self.clock = StillClock()
        self.renewals = 0
        self.gate = Gate(self.clock, self._renew)
        self.answers: list[tuple[int, bytes]] = []

    def _renew(self) -> None:
        self.renewals += 1

    def answer(self, data: bytes = b"") -> None:
        self.gate.answer(self._done, 0, data)

    def _done(self, result: int, data: Buffer) -> None:
        self.answers.append((result, bytes(data)))


def test_without_leases_everything_passes() -> None:
    case = Case()
    assert not case.gate.guarded
    case.answer(b"1")
    assert case.answers == [(0, b"1")]
    assert case.renewals == 0


def test_suspended_answers_wait_in_their_order() -> None:
    case = Case()
    case.gate.suspend(True)
    case.answer(b"1")
    case.answer(b"2")
    assert case.answers == []
    case.gate.suspend(False)
    assert case.answers == [(0, b"1"), (0, b"2")]


def test_a_lease_is_asked_for_when_half_of_it_is_over() -> None:
    case = Case()
    case.gate.leased(2000)
    case.clock.now = 1499
    case.answer(b"1")
    assert case.renewals == 0
    case.clock.now = 1500
    case.answer(b"2")
    case.answer(b"3")
    assert (case.renewals, len(case.answers)) == (1, 3)


def test_without_a_valid_lease_nothing_leaves() -> None:
    case = Case()
    case.gate.leased(2000)
    case.clock.now = 2000
    case.answer(b"1")
    case.answer(b"2")
    assert (case.answers, case.renewals) == ([], 1)
    case.gate.leased(1990)  # it was over before it came: another one is asked for
    assert (case.answers, case.renewals) == ([], 2)
    case.gate.leased(2100)
    assert case.answers == [(0, b"1"), (0, b"2")]


def test_a_lease_does_not_end_a_suspension() -> None:
    case = Case()
    case.gate.suspend(True)
    case.gate.leased(5000)
    case.answer(b"1")
    assert case.answers == []
    case.gate.suspend(False)
    assert case.answers == [(0, b"1")]


def test_an_answer_may_lead_to_another_one() -> None:
    case = Case()
    case.gate.suspend(True)
    case.gate.answer(lambda result, data: case.answer(b"later"), 0, b"")
    case.answer(b"first")
    case.gate.suspend(False)
    assert case.answers == [(0, b"later"), (0, b"first")]


def test_the_end_of_the_incarnation() -> None:
    case = Case()
    case.gate.leased(2000)
    case.clock.now = 3000
    case.answer(b"must not leave")
    case.gate.fail(3)
    assert case.answers == [(3, b"")]
    case.answer(b"nobody listens any more")
    assert len(case.answers) == 2, "what ends now is told at once, to closed connections"


def test_a_format_does_not_end_the_need_for_leases() -> None:
    """What is held gets an error; later answers need a lease as before."""
    case = Case()
    case.gate.leased(2000)
    case.clock.now = 3000
    case.answer(b"1")
    case.gate.drop(2)
    assert case.answers == [(2, b"")]
    case.answer(b"2")
    assert case.answers == [(2, b"")]
    case.gate.leased(4000)
    assert case.answers == [(2, b""), (0, b"2")]
