"""A plugin of pytest: `-p tests.support.probed --probed FILE` writes which rare paths of core the tests took."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheepdog.cluster.core.context import Context

_taken: dict[str, None] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--probed", type=Path, help="gets the names, one a line")


def pytest_configure(config: pytest.Config) -> None:
    probe = Context.probe

    def noted(self: Context, name: str) -> None:
        _taken[name] = None
        probe(self, name)

    pytest.MonkeyPatch().setattr(Context, "probe", noted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.getoption("probed").write_text("".join(f"{name}\n" for name in _taken))
