"""Simulated machines hold one another, and their disks, in memory: what one test has left is gone before the next."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from tests.support.processes import resident_bytes

GROWTH_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """The collector counts objects, not bytes: it let a process of the tests grow to 2 GB."""
    before = resident_bytes(os.getpid())
    yield
    if resident_bytes(os.getpid()) - before > GROWTH_BYTES:
        gc.collect()
