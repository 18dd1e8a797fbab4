"""What a volume's attribute `iscsi` says: which hosts export it, how, and under which serial number.

This is the wanted state. It lives in the cluster, so it outlives every host, and everybody who reaches the cluster can
read it: it names the files with secrets and never holds one.
"""

from __future__ import annotations

import ipaddress
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sheepdog.cluster.core.errors import UsageError

KEY = b"iscsi"
FORMAT = 1
DEFAULT_PORT = 3260  # IANA's for iSCSI
DEFAULT_PORTAL = f"0.0.0.0:{DEFAULT_PORT}"
NAME_LIMIT = 100  # of a volume and of a host: the kernel takes paths of up to 255 bytes
# A name becomes a part of a path in the kernel's comma-separated settings, of a directory in configfs, of a text.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]*")
_IQN = re.compile(r"iqn\.\d{4}-(0[1-9]|1[0-2])\.[a-z0-9-]+\.[a-z0-9.:-]+")  # RFC 3720; the library takes no "_"
_OTHER_NAME = re.compile(r"eui\.[0-9a-f]{16}|naa\.[125c-f][0-9a-f]{15}")
IQN_LIMIT = 223  # RFC 3720, 3.2.6.1


@dataclass(frozen=True, slots=True)
class Login:
    """A CHAP user, and the file on the exporting host that holds the secret."""

    user: str
    secret_file: str


@dataclass(frozen=True, slots=True)
class Export:
    """How one host exports the volume. `chap` proves the initiator, `mutual` the target, `discovery` who may ask."""

    host: str
    iqn: str
    portals: tuple[str, ...]
    initiators: tuple[str, ...]
    chap: Login | None = None
    mutual: Login | None = None
    discovery: Login | None = None
    read_only: bool = False

    def logins(self) -> list[Login]:
        return [login for login in (self.chap, self.mutual, self.discovery) if login is not None]


@dataclass(frozen=True, slots=True)
class Document:
    """The attribute of one volume. The serial number stays when nobody exports it any more: initiators know it."""

    serial: str = field(default_factory=lambda: str(uuid.uuid4()))
    exports: tuple[Export, ...] = ()
    shared: bool = False  # several hosts may export it at a time; none of them roams between gateways

    def of(self, host: str) -> Export | None:
        return next((export for export in self.exports if export.host == host), None)

    def having(self, export: Export) -> Document:
        """With this export in the place of its host's."""
        return replace(self, exports=(*self.without(export.host).exports, export))

    def without(self, host: str) -> Document:
        return replace(self, exports=tuple(export for export in self.exports if export.host != host))

    def pack(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def unpack(cls, value: bytes) -> Document:
        """UsageError for what no version of this project has written."""
        try:
            found = json.loads(value)
            if found["format"] != FORMAT:
                raise UsageError(f"its attribute 'iscsi' has format {found['format']}, this version knows {FORMAT}")
            return cls(
                str(uuid.UUID(found["serial"])),
                tuple(_export(one) for one in found["exports"]),
                bool(found.get("shared")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"its attribute 'iscsi' cannot be understood ({error!r})") from error


def _export(found: Mapping[str, Any]) -> Export:
    """Checked as if a user had typed it: anybody can write attributes, and this reaches the kernel."""
    return Export(
        host=name(found["host"], "host"),
        iqn=iqn(found["iqn"]),
        portals=tuple(portal(one) for one in found["portals"]),
        initiators=tuple(iqn(one) for one in found["initiators"]),
        chap=_login(found["chap"]),
        mutual=_login(found["mutual"]),
        discovery=_login(found["discovery"]),
        read_only=bool(found["read_only"]),
    )


def _login(found: Mapping[str, Any] | None) -> Login | None:
    return None if found is None else login(found["user"], found["secret_file"])


def name(word: str, kind: str = "volume") -> str:
    """A volume or host whose name the kernel's target can carry."""
    if len(word) > NAME_LIMIT or not _NAME.fullmatch(word):
        raise UsageError(
            f"A {kind} named '{word}' cannot be exported: at most {NAME_LIMIT} letters, digits and . _ + @ -, "
            "the first a letter or digit"
        )
    return word


def iqn(word: str) -> str:
    """A name of an initiator or a target; in lower case, as the standard compares them."""
    lower = word.lower()
    if len(lower) <= IQN_LIMIT and (_IQN.fullmatch(lower) or _OTHER_NAME.fullmatch(lower)):
        return lower
    raise UsageError(f"'{word}' is no iSCSI name (such as iqn.2026-01.org.example:host; no underscores)")


def default_iqn(host: str, volume: str) -> str:
    """Another one for each host: what a host offers is a target of its own."""
    return iqn(f"iqn.2003-01.org.linux-iscsi.{_plain(host)}:{_plain(volume)}")


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9.-]", "-", word.lower())


def portal(word: str) -> str:
    """ADDRESS:PORT, as configfs writes it; IPv6 addresses stand in brackets."""
    host, colon, port = word.rpartition(":")
    if not colon or word.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = word, str(DEFAULT_PORT)
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        number = 0
    if not 0 < number < 1 << 16:
        raise UsageError(f"'{word}' is no portal (such as 192.0.2.7, 192.0.2.7:3260 or [2001:db8::7]:3260)")
    return f"[{address}]:{number}" if address.version == 6 else f"{address}:{number}"


def login(user: str, secret_file: str) -> Login:
    if not user or len(user) > 255 or not user.isprintable() or user != user.strip() or user == "NULL":
        raise UsageError(f"'{user}' cannot be a CHAP user")
    if not secret_file.startswith("/"):
        raise UsageError(f"the file with the secret of '{user}' needs an absolute path")
    return Login(user, secret_file)


def words(text: str) -> Sequence[str]:
    """The parts of an option that takes several values."""
    return [part for part in text.split(",") if part]
