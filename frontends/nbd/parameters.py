"""What the plugin is told on nbdkit's command line: `serve` writes it, the plugin reads it.

address    HOST:PORT of a sheep, or the path of its unix socket
volume     an export; may be repeated (default: every volume and snapshot)
default    the export of clients that name none (default: the only `volume`)
exclusive  1: while a connection to a volume is there, another is refused
patience   seconds that requests wait for a sheep that is gone before they fail
spread     1: threads run where the kernel puts them, rather than together (`placement`)
swap       1: the kernel of this host uses a volume that is served here: stay in memory, never wait for its writes
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.client.connection import PATIENCE_S
from sheepdog.cluster.core.errors import UsageError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000


@dataclass(slots=True)
class Parameters:
    """Of one server."""

    address: Address = (DEFAULT_HOST, DEFAULT_PORT)
    volumes: list[str] = field(default_factory=list)
    default: str = ""
    exclusive: bool = False
    patience_s: float = PATIENCE_S
    spread: bool = False
    swap: bool = False

    def set(self, key: str, value: str) -> None:
        """Takes one `key=value`; UsageError for what makes no sense."""
        match key:
            case "address":
                self.address = parse_address(value)
            case "volume":
                self.volumes.append(value)
            case "default":
                self.default = value
            case "exclusive":
                self.exclusive = _switch(key, value)
            case "spread":
                self.spread = _switch(key, value)
            case "swap":
                self.swap = _switch(key, value)
            case "patience":
                try:
                    self.patience_s = max(float(value), 0.0)
                except ValueError:
                    raise UsageError(f"patience is a number of seconds, not {value}") from None
            case _:
                raise UsageError(f"unknown parameter {key}")

    def words(self) -> list[str]:
        """`key=value` of everything that is not the default, for a command line."""
        found = [f"address={address_text(self.address)}"]
        found += [f"volume={name}" for name in self.volumes]
        if self.default:
            found.append(f"default={self.default}")
        if self.exclusive:
            found.append("exclusive=1")
        if self.patience_s != PATIENCE_S:
            found.append(f"patience={self.patience_s:g}")
        if self.spread:
            found.append("spread=1")
        if self.swap:
            found.append("swap=1")
        return found


def _switch(key: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise UsageError(f"{key} is 0 or 1, not {value}")
    return value == "1"


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """`HOST`, `HOST:PORT`, `[HOST]:PORT` or the path of a socket (with a slash in it)."""
    if "/" in text:
        return text
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.startswith("[")):  # without a port, perhaps IPv6
        return text.strip("[]"), default_port
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(f"{text} is no address: HOST:PORT, or the path of a socket")
    return host.strip("[]"), int(port)


def address_text(address: Address) -> str:
    """What `parse_address` reads."""
    if isinstance(address, str):
        return os.path.abspath(address)
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
