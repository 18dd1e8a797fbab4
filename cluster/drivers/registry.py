"""Names of membership drivers. A driver's module is imported only when the driver is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from sheepdog.cluster.core.errors import UsageError

if TYPE_CHECKING:  # a command line is parsed before anything large is imported
    from sheepdog.cluster.drivers.base import Driver

_CLASSES = {
    "corosync": "sheepdog.cluster.drivers.corosync:CorosyncDriver",
    "local": "sheepdog.cluster.drivers.local:LocalDriver",
    "zookeeper": "sheepdog.cluster.drivers.zookeeper:ZooKeeperDriver",
}


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """A driver as named by `-c NAME[:ARGUMENT]`."""

    name: str
    argument: str


@cache
def absent() -> dict[str, str]:
    """Drivers that cannot be used on this system, each with what it needs."""
    reasons = {}
    if find_spec("kazoo") is None:
        reasons["zookeeper"] = "it needs the Python package kazoo"
    from sheepdog.cluster.drivers import cpg

    library = cpg.missing()
    if library is not None:
        reasons["corosync"] = f"it needs {library} (Debian: libcpg4 libquorum5 libcfg7 libvotequorum8)"
    return reasons


def available() -> tuple[str, ...]:
    """Names of the drivers that this system can use, sorted."""
    return tuple(name for name in sorted(_CLASSES) if name not in absent())


def default() -> str:
    """Without -c: corosync where its daemon lets us in, else local (cli.md 1.4).

    UsageError for a daemon that is there and does not say: this host may belong to a cluster, so it is not guessed.
    """
    if "corosync" in available():
        from sheepdog.cluster.drivers import corosync_calls, cpg

        try:
            return "corosync" if corosync_calls.running() else "local"
        except cpg.CorosyncError as error:
            raise UsageError(f"corosync driver: {error}; with -c local it is not asked") from error
    return "local"


def parse(text: str) -> DriverSpec:
    """`local`, `local:FILE` ...: the name ends at the first colon. UsageError for a driver that is not available."""
    name, _, argument = text.partition(":")
    if name not in _CLASSES:
        raise UsageError(f"Invalid cluster driver '{text}'")
    if name in absent():
        raise UsageError(f"Invalid cluster driver '{text}': {absent()[name]}")
    return DriverSpec(name, argument)


def create(text: str) -> Driver:
    """The driver that `-c` names, not opened yet. UsageError for a name or argument that is refused."""
    spec = parse(text)
    module, _, attribute = _CLASSES[spec.name].partition(":")
    return cast("Driver", getattr(import_module(module), attribute)(spec.argument))
