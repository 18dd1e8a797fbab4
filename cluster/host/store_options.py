"""How a store is run (cli.md 1.1, 1.3), and how large its journal is when nobody says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

JOURNAL_PART: Final = 16  # without -j the journal takes 1/16 of the free space ...
JOURNAL_MIN_BYTES: Final = 8 << 20  # ... but at least this: two segments that hold some hundred writes each
JOURNAL_MAX_BYTES: Final = 512 << 20  # ... and no more than this: replay stays below a second or two


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """`journal_bytes` 0: chosen by the free space."""

    nosync: bool = False
    journal_bytes: int = 0
    journal_directory: str | None = None  # None: META
    journal_skip: bool = False
    direct_io: bool = False  # object files leave the page cache at once


DEFAULT_OPTIONS: Final = StoreOptions()


def default_journal_bytes(free: int) -> int:
    return max(JOURNAL_MIN_BYTES, min(JOURNAL_MAX_BYTES, free // JOURNAL_PART))
