"""`dog` against a sheep that is a dictionary, in this process."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
from tests.support.fake_sheep import FakeSheep

from sheepdog.tools.dog.main import main

Dog: TypeAlias = Callable[..., tuple[int, str, str]]


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
