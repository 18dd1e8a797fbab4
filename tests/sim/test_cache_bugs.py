"""The simulator finds bugs that are planted in the object cache, each within its budget of seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.sim.test_cache import cached
from tests.sim.test_planted_bugs import Bug

from sheepdog.cluster.core.cache_entries import CacheEntries
from sheepdog.cluster.core.cache_push import Pusher
from sheepdog.cluster.core.cache_reads import CacheReads
from sheepdog.cluster.core.cache_space import CacheSpace
from sheepdog.cluster.core.cache_start import Leftovers
from sheepdog.cluster.core.claims import Claims
from sheepdog.cluster.core.extents import CachedObject, runs
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.sim.world import MILLISECOND

CALM = cached("cache")
KILLS = cached("cache, kills", kill=1.0)
BUSY = replace(
    cached("cache, busy", link=2.0, mean_ns=100 * MILLISECOND),
    clients=8,
    objects=1,
    blocks=(0, 1),
    think_ns=MILLISECOND // 4,
)
ALONE = replace(BUSY, name="cache, one gateway", doors=1, roam_chance=0.001)
ALONE_KILLS = replace(ALONE, name="cache, one gateway, kills", faults=KILLS.faults)


def another_gateways_claim_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claims, "held", lambda *_: False)


def a_claim_is_taken_before_all_know(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: Any, vid: Any, answer: Any, done: Any) -> None:
        done(answer[0] if isinstance(answer, tuple) else answer)

    patch.setattr(Claims, "_until_known", hasty)


def let_go_without_a_push(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheEntries, "push_all", lambda self, volume, done: done(0))


def dirty_marks_are_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CacheSpace, "mark", lambda self, entry, done: done(None))


def a_start_forgets_what_was_dirty(patch: pytest.MonkeyPatch) -> None:
    take = Leftovers.take

    def clean(self: Leftovers) -> Any:
        found = take(self)
        for entries in found.values():
            for entry in entries:
                entry.marked = 0
        return found

    patch.setattr(Leftovers, "take", clean)


def nobody_is_told_of_dirty_data(patch: pytest.MonkeyPatch) -> None:
    """So that the claim of a gateway that dies counts as one without any."""
    take = Claims.take
    patch.setattr(Claims, "take", lambda self, vid, dirty, done: take(self, vid, False, done))
    patch.setattr(Claims, "set_dirty", lambda self, vid, dirty, done: done(0))


def what_is_fetched_replaces_what_was_written(patch: pytest.MonkeyPatch) -> None:
    def careless(self: CacheReads) -> None:
        answered, self._answered = self._answered, []
        for entry, fill, offset, data in answered:
            entry.fills.remove(fill)
            if fill.bits and not entry.volume.over:
                first, count = next(runs(fill.bits))
                start = first * BLOCK_SIZE - offset
                self._entries.keep(entry, first * BLOCK_SIZE, data[start : start + count * BLOCK_SIZE])
            self._entries.leave(entry)

    patch.setattr(CacheReads, "_keep", careless)
    patch.setattr(CachedObject, "change", lambda *_: None)


def written_again_while_pushed_counts_as_clean(patch: pytest.MonkeyPatch) -> None:
    ended = Pusher.ended

    def forgetful(self: Pusher, push: Any, result: int) -> None:
        if not result:
            push.entry.volume.dirty_blocks -= (push.entry.dirty & push.bits).bit_count()
            push.entry.dirty &= ~push.bits
        ended(self, push, result)

    patch.setattr(Pusher, "ended", forgetful)


BUGS = [
    Bug(another_gateways_claim_is_ignored, CALM, 20),
    Bug(a_claim_is_taken_before_all_know, BUSY, 40),
    Bug(let_go_without_a_push, CALM, 20),
    Bug(dirty_marks_are_not_written, KILLS, 20),
    Bug(a_start_forgets_what_was_dirty, KILLS, 20),
    Bug(nobody_is_told_of_dirty_data, KILLS, 20),
    Bug(what_is_fetched_replaces_what_was_written, ALONE_KILLS, 20),
    Bug(written_again_while_pushed_counts_as_clean, CALM, 20),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.must_be_found(monkeypatch)
