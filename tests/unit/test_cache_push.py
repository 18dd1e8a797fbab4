"""Pushes of an object that the cluster does not have any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from sheepdog.cluster.core.cache_push import Pusher
from sheepdog.cluster.core.cached_volume import CachedVolume
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.extents import CachedObject
from sheepdog.cluster.core.gateway import Gateway
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, CACHE_PUSH_BYTES, CACHE_PUSHES
from sheepdog.cluster.core.ports import Store

SIZE = 2 * CACHE_PUSHES * CACHE_PUSH_BYTES


def test_nobody_waits_for_the_rest_of_an_object_that_is_gone() -> None:
    """A client freed it while more of it was dirty than leaves at a time: a deletion waited for ever."""
    volume = CachedVolume(Vid(1))
    entry = CachedObject(volume, data_oid(Vid(1), 0), SIZE)
    entry.dirty = entry.present = (1 << SIZE // BLOCK_SIZE) - 1
    volume.dirty_blocks = SIZE // BLOCK_SIZE
    under_way: list[Any] = []

    def gone(entry: CachedObject) -> None:
        volume.dirty_blocks -= entry.dirty.bit_count()
        entry.dirty = entry.present = 0

    pusher = Pusher(
        cast(Context, SimpleNamespace(clock=SimpleNamespace(now_ns=lambda: 0), probe=lambda name: None)),
        cast(Gateway, SimpleNamespace(change=lambda *words: under_way.append(words[-1]))),
        cast(Store, SimpleNamespace(read=lambda oid, offset, length, done: done(bytes(length)))),
        lambda entry: None,
        gone,
    )
    results: list[int] = []
    pusher.push([entry], results.append)
    assert len(under_way) == CACHE_PUSHES
    while under_way:
        under_way.pop(0)(Result.NO_OBJ, b"")
    assert (results, volume.dirty_blocks) == ([Result.SUCCESS], 0)
    later: list[int] = []
    pusher.push([entry], later.append)
    assert later == [Result.SUCCESS]
