"""`dog` against a sheep that is a dictionary, in this process; and what crashes in this process leaves nothing open."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.tools.dog.main import main

Dog: TypeAlias = Callable[..., tuple[int, str, str]]


def _open_below(place: str) -> set[int]:
    """Descriptors of this process for files in a directory, also for those that are removed."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listed them
            if os.readlink(f"/proc/self/fd/{name}").startswith(place):
                found.add(int(name))
    return found


@pytest.fixture(autouse=True)
def _nothing_left_open(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A store that a test lets crash is just forgotten: no process ends, which would close its files."""
    place = str(tmp_path_factory.getbasetemp())
    before = _open_below(place)
    yield
    for left in _open_below(place) - before:
        os.close(left)


@pytest.fixture
def sheep() -> Iterator[FakeSheep]:
    with FakeSheep() as sheep:
        yield sheep


@pytest.fixture
def dog(sheep: FakeSheep, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dog:
    """Runs a command against the fake sheep: (status, stdout, stderr)."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setenv("SHEEPDOG_DOG_PORT", str(sheep.address[1]))

    def run(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main(words)
        out, err = capfd.readouterr()
        return status, out, err

    return run
