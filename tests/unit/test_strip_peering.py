"""Which state a coded object is brought to, from what its holders tell (core.strip_peering), with 2:2 on four nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.ids import NO_VERSION, Version, Vid, data_oid, strip_of
from sheepdog.cluster.core.strip_peering import Held, StripDecision, decide
from sheepdog.cluster.core.strip_undo import ALL_STRIPS, NO_STRIPS, Step

OID, POLICY = data_oid(Vid(1), 0), Policy(2, 2)
REPLICAS = (0, 1, 2, 3)
FIRST, SECOND = 0b1101, 0b1110  # writes of the first and of the second data strip
V = [Version(1, 1, number << 16) for number in range(9)]
N = Version(3, 1, 1 << 16)


class Nothing:
    """Facts of an object whose nodes were always the same; some of them are other processes than they were.

    `unseen`: an epoch in which it may have been written by nodes that are away.
    """

    def __init__(self, *others: int, unseen: int = 0) -> None:
        self._others = others
        self._unseen = unseen

    def deleted(self, oid: int, as_of: int, holders: set[int]) -> bool:
        return False

    def known(self, oid: int, held: Sequence[Held]) -> int:
        return max(entry.as_of for entry in held)

    def superseded(self, oid: int, as_of: int, least: int) -> bool:
        return as_of < self._unseen

    def was_replica(self, oid: int, member: int, epoch: int) -> bool:
        return True

    def restarted(self, member: int, epoch: int) -> bool:
        return member in self._others

    def never_stored(self, oid: int, epoch: int, holders: set[int]) -> bool:
        return False


def held(
    strip: int, version: Version, *steps: tuple[Version, int], as_of: int = 1, back: bool = True, member: int = -1
) -> Held:
    """`steps`: (where it began, strips touched), the last first."""
    return Held(
        strip if member < 0 else member,
        strip,
        version,
        as_of,
        [Step(before, touched, back) for before, touched in steps],
    )


def decided(*strips: Held, restarted: Sequence[int] = ()) -> StripDecision:
    decision = decide(OID, POLICY, strips, REPLICAS, Nothing(*restarted))
    assert decision is not None
    return decision


def states(decision: StripDecision) -> dict[int, Version]:
    return {strip: state for strip, _, state in decision.agree}


def test_equal_strips_in_place_need_nothing() -> None:
    assert decide(OID, POLICY, [held(strip, V[1]) for strip in range(4)], REPLICAS, Nothing()) is None


@pytest.mark.parametrize(("unseen", "is_lost"), [(0, False), (2, True)])
def test_an_equal_version_proves_nothing_if_writes_may_have_passed_by(unseen: int, is_lost: bool) -> None:
    """The first data strip is current and was not touched; the other one may lack what those that are away have."""
    strips = (held(0, V[1], as_of=2), held(1, V[1], as_of=1))
    decision = decide(OID, POLICY, strips, REPLICAS, Nothing(unseen=unseen))
    assert decision is not None
    assert decision.is_lost == is_lost


def test_a_write_that_an_agreement_had_undone_is_not_contained_where_the_agreement_did_not_get() -> None:
    """Only the parity came to the common version, so that is undone: the strip that has the write is made anew."""
    decision = decided(
        held(0, V[2], (V[1], FIRST)),
        held(1, V[3], (V[1], SECOND)),
        held(2, N, (V[2], ALL_STRIPS), (V[1], FIRST), as_of=3),
    )
    assert (states(decision), decision.cut) == ({0: V[2], 2: V[2]}, N)
    assert [decision.contains(V[number]) for number in (2, 3)] == [True, False]


@pytest.mark.parametrize(("restarted", "cut"), [((), V[2]), ((0,), None), ((0, 1, 2, 3), V[2])])
def test_what_lost_its_power_is_no_witness_against_a_write(restarted: tuple[int, ...], cut: Version | None) -> None:
    """As long as the others make up the object."""
    decision = decided(
        held(0, V[1]),
        held(1, V[1]),
        held(2, V[2], (V[1], FIRST)),
        held(3, V[2], (V[1], FIRST)),
        restarted=restarted,
    )
    assert decision.cut == cut
    if cut is None:
        assert (states(decision), decision.missing) == ({1: V[1], 2: V[2], 3: V[2]}, (0,))
    else:
        assert states(decision) == dict.fromkeys(range(4), V[1])


def test_a_strip_that_a_write_left_alone_is_no_worse() -> None:
    decision = decided(
        held(0, V[2], (V[1], FIRST)),
        held(1, V[1]),
        held(2, V[2], (V[1], FIRST), back=False),
        held(3, V[2], (V[1], FIRST)),
    )
    assert (decision.cut, decision.missing) == (None, ())
    assert states(decision) == {0: V[2], 1: V[1], 2: V[2], 3: V[2]}


@pytest.mark.parametrize("lacking", [0, 2, 3])
def test_a_write_that_some_strip_lacks_is_undone_with_all_behind_it(lacking: int) -> None:
    strips = [
        held(0, V[2], (V[1], FIRST)),
        held(1, V[3], (V[1], SECOND)),
        held(2, V[3], (V[2], SECOND), (V[1], FIRST)),
        held(3, V[3], (V[2], SECOND), (V[1], FIRST)),
    ]
    strips[lacking] = held(lacking, V[1])
    decision = decided(*strips)
    assert decision.cut == V[2]
    assert states(decision) == dict.fromkeys(range(4), V[1])


def test_a_strip_that_lacks_a_write_and_cannot_be_met_is_rebuilt() -> None:
    """The others cannot go back any more."""
    firm: Sequence[Held] = [
        held(0, V[2], (V[1], FIRST), back=False),
        held(2, V[2], (V[1], FIRST), back=False),
        held(3, V[2], (V[1], FIRST), back=False),
    ]
    decision = decided(*firm, held(1, V[1]))
    assert decision.missing == ()
    decision = decided(held(0, V[1]), held(1, V[1]), *firm[1:])
    assert (decision.missing, states(decision)) == ((0,), {1: V[1], 2: V[2], 3: V[2]})


def test_what_a_dead_node_alone_knew_comes_back_too_late() -> None:
    """Strip 1 has a write that the others undid, and have written since: it must not pass for untouched."""
    decision = decided(
        held(0, V[5], (V[1], FIRST), as_of=2),
        held(1, V[3], (V[1], SECOND), as_of=1),
        held(2, V[5], (V[1], FIRST), as_of=2),
        held(3, V[5], (V[1], FIRST), as_of=2),
    )
    assert decision.missing == (1,)


def test_an_agreement_that_was_interrupted_is_not_taken_for_writes_that_others_lack() -> None:
    """Strip 1 is old: it was on a node that was away. Found by the simulator."""
    decision = decided(
        held(0, V[4], (V[1], FIRST), as_of=2),
        held(1, V[1], as_of=1),
        held(2, V[6], (V[5], SECOND), (V[4], SECOND), (V[1], FIRST), as_of=2),
        held(3, N, (V[6], ALL_STRIPS), (V[5], SECOND), (V[4], SECOND), (V[1], FIRST), as_of=3),
    )
    assert (decision.cut, decision.missing) == (N, (1,))
    assert states(decision) == {0: V[4], 2: V[6], 3: V[6]}


def test_without_parity_the_data_strips_stand_for_themselves() -> None:
    decision = decided(held(0, V[2], (V[1], FIRST)), held(1, V[1]))
    assert (decision.missing, states(decision)) == ((2, 3), {0: V[2], 1: V[1]})


def test_of_data_strips_that_stand_for_themselves_some_may_lack_a_write() -> None:
    """It cannot be taken back, so it is there in part: nobody may be told that it is done."""
    both = FIRST | SECOND
    decision = decided(held(0, V[2], (V[1], both), back=False), held(1, V[3], (V[2], both), (V[1], both), back=False))
    assert states(decision) == {0: V[2], 1: V[3]}
    assert [decision.contains(version) for version in (V[2], V[3])] == [True, False]


def test_strips_that_were_brought_level_on_the_way() -> None:
    decision = decided(
        held(0, V[2], (V[1], FIRST)),
        held(1, V[2], (V[1], NO_STRIPS)),
        held(2, V[3], (V[2], SECOND), (V[1], FIRST)),
        held(3, V[2], (V[1], FIRST)),
    )
    assert decision.cut == V[3]
    assert states(decision) == {0: V[2], 1: V[2], 2: V[2], 3: V[2]}


def test_a_strip_that_an_agreement_was_to_rebuild_does_not_stand_for_itself() -> None:
    """Strip 0 lacks writes: it was to be decoded from 1 and 2, and 2 went away. Found by the simulator."""
    agreed = held(1, N, (V[1], ALL_STRIPS), as_of=3)
    decision = decided(agreed, held(0, V[2], (V[1], FIRST)), held(0, NO_VERSION, as_of=3))
    assert decision.is_lost
    interrupted = decided(agreed, held(0, V[2], (V[1], FIRST)))  # its turn to agree may not have come
    assert states(interrupted) == {0: V[2], 1: N}


def test_a_strip_that_others_are_made_from_counts_until_they_are_though_it_is_to_go() -> None:
    """Replica 3 shall have what member 9 still has; else two good strips would be left, should the epoch end."""
    decision = decided(held(0, V[1]), held(1, V[1]), held(3, V[1], member=9))
    assert (decision.missing, decision.undecided(), decision.unequal()) == ((2, 3), [(9, strip_of(OID, 3))], [])
    two_of_it = decided(held(0, V[1]), held(1, V[1]), held(3, V[1]), held(3, V[1], member=9))
    assert (two_of_it.surplus, two_of_it.undecided()) == (((9, strip_of(OID, 3)),), [])


def test_a_strip_that_is_known_to_lack_a_write_is_as_good_as_lost() -> None:
    """Others may have read what it lacks. While those that have it are away, nobody reads what was there before."""
    noted = [held(0, V[1]), held(0, NO_VERSION), held(1, V[2], (V[1], NO_STRIPS))]
    assert decided(*noted).is_lost
    decision = decided(*noted, held(2, V[2], (V[1], FIRST)))
    assert (decision.holders, decision.missing) == (((1, 1), (2, 2)), (0, 3))
    assert states(decided(noted[0], noted[2])) == {0: V[1], 1: V[2]}  # nobody has read what it lacks


@pytest.mark.parametrize("away", [False, True], ids=["witnesses are here", "they are away"])
def test_an_agreement_that_came_to_one_strip_only_is_undone(away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip 3 comes back from a node that was away then; strip 0 was to be made anew. Found by the simulator."""
    monkeypatch.setattr(Nothing, "was_replica", lambda self, oid, member, epoch: member != 3)
    monkeypatch.setattr(Nothing, "superseded", lambda self, oid, as_of, least: away and as_of < N.epoch)
    decision = decided(
        held(0, V[1], as_of=1),
        held(0, NO_VERSION, as_of=3),
        held(2, N, (V[3], ALL_STRIPS), (V[2], SECOND), as_of=3),
        held(3, V[3], (V[2], SECOND), as_of=2),
    )
    assert decision.is_lost == away
    assert states(decision) == ({} if away else {2: V[3], 3: V[3]})


def test_an_agreement_is_not_undone_together_with_a_write_that_it_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who else came to it is away, and it may have been read; strip 3 comes back without it. Found by the simulator."""
    monkeypatch.setattr(Nothing, "was_replica", lambda self, oid, member, epoch: member != 3)
    decision = decided(
        held(1, NO_VERSION, as_of=3),
        held(2, N, (V[3], ALL_STRIPS), (V[2], SECOND), as_of=3),
        held(3, V[2], as_of=2),
    )
    assert decision.is_lost


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_what_a_strip_knows_by_its_version_alone_hides_no_write(order: tuple[int, ...]) -> None:
    """Strip 0 was brought level with a write of strip 1, which has lost it with its power; strip 3 is of no use."""
    able = [held(0, V[2], (V[1], NO_STRIPS)), held(1, V[1]), held(2, V[2], (V[1], SECOND))]
    decision = decided(*(able[place] for place in order), held(3, NO_VERSION), restarted=(0, 1, 2, 3))
    assert decision.cut == V[2]
    assert not decision.is_lost


@pytest.mark.parametrize("without", [3, 2], ids=["three of four have it", "two have it"])
def test_a_write_that_an_agreement_had_undone_is_undone_with_it_where_the_agreement_did_not_get(without: int) -> None:
    """Else the one strip that still has it would make it count again, and the others be made anew from it."""
    undid = [held(strip, N, (V[1], ALL_STRIPS)) for strip in range(without)]
    decision = decided(*undid, *(held(strip, V[2], (V[1], FIRST)) for strip in range(without, 4)))
    assert decision.cut == V[2]
    assert states(decision) == dict.fromkeys(range(4), V[1])
    assert not decision.contains(V[2])


def made_anew_alone(*, second: Version) -> list[Held]:
    """Strip 0 was made anew at V[3], which all had; the parity has lost that. Its last write is V[2]."""
    return [
        held(0, V[3]),
        held(1, second),
        held(2, V[2], (V[1], FIRST)),
        held(3, V[2], (V[1], FIRST)),
    ]


def test_a_strip_made_anew_that_alone_kept_its_version_is_made_anew_again() -> None:
    """No durable write was behind what the parity tells: that would be on the parity, too."""
    strips = made_anew_alone(second=V[1])
    decision = decided(*strips, restarted=(0, 1, 2, 3))
    assert (states(decision), decision.missing, decision.cut) == ({1: V[1], 2: V[2], 3: V[2]}, (0,), None)
    decision = decided(strips[0], held(1, NO_VERSION), *strips[2:], restarted=(0, 1, 2, 3))
    assert (decision.holders, decision.missing) == (((2, 2), (3, 3)), (0, 1))


@pytest.mark.parametrize("restarted", [(2, 3), (0, 1, 2, 3)])
def test_it_counts_where_enough_have_its_version(restarted: tuple[int, ...]) -> None:
    """So were both data strips: what was written to them before is kept."""
    decision = decided(*made_anew_alone(second=V[3]), restarted=restarted)
    assert (decision.holders, decision.missing) == (((0, 0), (1, 1)), (2, 3))


def test_a_write_that_is_known_is_not_passed_over_but_undone() -> None:
    """So the strip that has it counts; that the parity was current then follows from the write alone."""
    decision = decided(
        held(0, V[3], (V[2], FIRST)),
        held(1, NO_VERSION),
        held(2, V[2], (V[1], FIRST), as_of=0),
        held(3, V[2], (V[1], FIRST), as_of=0),
    )
    assert (states(decision), decision.cut) == ({0: V[2], 2: V[2], 3: V[2]}, V[3])
