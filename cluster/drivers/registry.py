"""Names of membership drivers. A driver's module is imported only when the driver is made."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from sheepdog.cluster.core.errors import UsageError

if TYPE_CHECKING:  # a command line is parsed before anything large is imported
    from sheepdog.cluster.drivers.base import Driver

_CLASSES = {
    "local": "sheepdog.cluster.drivers.local:LocalDriver",
    "zookeeper": "sheepdog.cluster.drivers.zookeeper:ZooKeeperDriver",
}


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """A driver as named by `-c NAME[:ARGUMENT]`."""

    name: str
    argument: str


def available() -> tuple[str, ...]:
    """Names of the drivers of this build, sorted."""
    return tuple(sorted(_CLASSES))


def parse(text: str) -> DriverSpec:
    """`local`, `local:FILE` ...: the name ends at the first colon. UsageError for a driver that is not available."""
    name, _, argument = text.partition(":")
    if name not in _CLASSES:
        raise UsageError(f"Invalid cluster driver '{text}'")
    return DriverSpec(name, argument)


def create(text: str) -> Driver:
    """The driver that `-c` names, not opened yet. UsageError for a name or argument that is refused."""
    spec = parse(text)
    module, _, attribute = _CLASSES[spec.name].partition(":")
    return cast("Driver", getattr(import_module(module), attribute)(spec.argument))
