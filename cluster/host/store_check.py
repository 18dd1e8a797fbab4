"""Verifies a bare store, no daemon running: the node's own files, and every block of every copy.

Nothing is changed on the disks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sheepdog.cluster.core.errors import Corrupt
from sheepdog.cluster.core.ids import ObjectId, oid_name
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.strip_undo import decode, encode
from sheepdog.cluster.host.bare_store import BareStore, Say, ranges
from sheepdog.cluster.host.directory import read_file
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.undo_file import read_undo

_SEALED = ("config", "settled", "stale", "disks", "scrub")  # the superblock and .disk are read anyway


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file. `oid` is None for what is no object; `blocks` are those that do not match their hashes."""

    path: str
    problem: str
    oid: ObjectId | None = None
    blocks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"

    @property
    def object_name(self) -> str | None:
        return None if self.oid is None else oid_name(self.oid)


@dataclass(slots=True)
class Summary:
    """What a check found."""

    objects: int = 0
    blocks: int = 0
    unfinished: int = 0  # copies that a restore did not complete: another node has them
    damaged: list[Damage] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.damaged


def check(path: str, say: Say, journal_directory: str | None = None) -> Summary:
    """Verifies a node's store (META[,DISK...]); `say` gets one line for each thing found. UsageError, OSError."""
    summary = Summary()
    notes: list[str] = []
    store = BareStore(path, notes.append, journal_directory)
    try:
        for note in notes:
            if note not in store.failures:
                say(note)
        found = _own_files(store)
        for oid in sorted(store.copies.by_oid):
            copy = store.copies.by_oid[oid]
            damage = _check_copy(store, copy, summary)
            store.release(copy)
            if damage is not None:
                found.append(damage)
        for damage in found:
            summary.damaged.append(damage)
            say(str(damage))
    finally:
        store.close()
    return summary


def _own_files(store: BareStore) -> list[Damage]:
    """Superblock, journal, configuration and epochs."""
    objects = {copy.path for copy in store.copies.by_oid.values()}
    found = [
        Damage(path, problem or "damaged")
        for path, _, problem in (text.partition(": ") for text in store.failures)
        if path not in objects  # those are looked at one by one
    ]
    epochs = f"{store.metadata}/epoch"
    names = [f"{epochs}/{name}" for name in sorted(os.listdir(epochs))] if os.path.isdir(epochs) else []
    for path in [*(f"{store.metadata}/{name}" for name in _SEALED), *names]:
        if not path.endswith(".new"):
            try:
                read_file(store.disk, path)
            except Corrupt as error:
                found.append(Damage(path, str(error)))
    return found + _undo(store)


def _undo(store: BareStore) -> list[Damage]:
    """What strips need to go back: after an orderly end, not a byte of what was added last may be torn."""
    path = f"{store.metadata}/undo"
    data = read_undo(store.disk, path)
    read_undo(store.disk, f"{path}.old")
    good = sum(len(encode(strip, undo)) for strip, steps in decode(data).items() for undo in steps)
    return [Damage(path, f"damaged behind {good} bytes of records")] if store.orderly and good < len(data) else []


def _check_copy(store: BareStore, copy: Copy, summary: Summary) -> Damage | None:
    summary.objects += 1
    problem = store.opened(copy)
    if problem is not None:
        return Damage(copy.path, problem, copy.oid)
    if copy.restoring:
        summary.unfinished += 1
        return None
    bad: list[int] = []
    for _, data, found in store.chunks(copy):
        summary.blocks += len(data) // BLOCK_SIZE
        bad += found
    if not bad:
        return None
    return Damage(copy.path, f"blocks {ranges(bad)} do not match their hashes", copy.oid, tuple(bad))
