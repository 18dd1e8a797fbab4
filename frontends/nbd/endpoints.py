"""Where an NBD server is to be found, and the words by which clients are told: URIs, QEMU, libvirt, nbd-client."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.nbd.parameters import DEFAULT_HOST, parse_address

NBD_PORT = 10809  # assigned to NBD
QEMU_PSK_NAME = "keys.psk"  # QEMU takes a directory and expects this name in it
SERVER_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")  # nbdkit-tls(1)
CLIENT_FILES = ("client-cert.pem", "client-key.pem")
USER_BYTES = 256  # of a file of keys: a longer name is none
CONNECTIONS = 4  # of the kernel's client: as many as keep a node busy
# The kernel gives a connection of several up after 30 s without an answer, and fails I/O when it has none left; a
# cluster that waits for its quorum or a member answers late, and then rightly.
KERNEL_TIMEOUT_S = 3600


class Tls(NamedTuple):
    """How a server is recognised and who may connect: a directory of X.509 certificates, or a file of keys.

    `hostname` is the one in the server's certificate, where its address does not say it.
    """

    certificates: str = ""
    keys: str = ""
    verify_peer: bool = False
    hostname: str = ""

    def __bool__(self) -> bool:
        return bool(self.certificates or self.keys)

    @property
    def user(self) -> str:
        """The first user that has a key."""
        try:
            return self._first_user() or "USER"
        except OSError:
            return "USER"

    def _first_user(self) -> str:
        """Empty if the file is none of keys."""
        with Path(self.keys).open(encoding="utf-8", errors="replace") as file:
            name, colon, _ = file.readline(USER_BYTES).partition(":")
        return name.strip() if colon and name.isprintable() else ""

    def check_server(self) -> None:
        """UsageError or OSError for what nbdkit would refuse, before anybody is told that there is a server."""
        if self.keys and not self._first_user():
            raise UsageError(f"{self.keys}: no keys (lines of user:key; see psktool)")
        for name in SERVER_FILES if self.certificates else ():
            if not Path(self.certificates, name).is_file():
                raise UsageError(f"{self.certificates}: there is no {name} (see nbdkit-tls(1))")

    def client_lacks(self) -> str:
        """What some clients will miss on this host; empty if nothing."""
        if self.keys and not Path(self.keys).is_file():
            return f"{self.keys} is not on this host: put the name of one of its users for USER"
        if self.keys and os.path.basename(self.keys) != QEMU_PSK_NAME:
            return f"QEMU takes keys from a file named {QEMU_PSK_NAME} only"
        if self.certificates and not Path(self.certificates, SERVER_FILES[0]).is_file():
            return f"{self.certificates}: there is no {SERVER_FILES[0]} on this host"
        return ""


class Endpoint(NamedTuple):
    """An address of a server, and what it takes to talk to it."""

    address: Address
    tls: Tls = Tls()

    @property
    def is_unix(self) -> bool:
        return isinstance(self.address, str)

    def uri(self, export: str) -> str:
        """As libnbd and nbdkit read it; QEMU does without TLS."""
        scheme = "nbds" if self.tls else "nbd"
        parameters = []
        if isinstance(self.address, str):
            scheme += "+unix"
            place = ""
            parameters.append("socket=" + quote(os.path.abspath(self.address)))
        else:
            host, port = self._reachable()
            place = f"[{host}]" if ":" in host else host
            if port != NBD_PORT:
                place += f":{port}"
        if self.tls.certificates:
            parameters.append("tls-certificates=" + quote(os.path.abspath(self.tls.certificates)))
        if self.tls.keys:
            place = f"{quote(self.tls.user, safe='')}@{place}"
            parameters.append("tls-psk-file=" + quote(os.path.abspath(self.tls.keys)))
        query = "?" + "&".join(parameters) if parameters else ""
        return f"{scheme}://{place}/{quote(export, safe='@')}{query}"

    def blockdev(self, export: str, read_only: bool = False, node: str = "disk0") -> list[str]:
        """QEMU's `-object` and `-blockdev` words; `read_only` must be said of what nobody may write."""
        kind = "read-only=on" if read_only else "discard=unmap"
        fields = [f"driver=nbd,node-name={node},{kind}", *self._qemu(export, "")]
        return [*self._qemu_credentials(), "-blockdev", ",".join(fields)]

    def drive(self, export: str, read_only: bool = False) -> list[str]:
        """QEMU's `-object` and `-drive` words; raw, or it would guess the format from the volume's first bytes."""
        kind = "readonly=on" if read_only else "discard=unmap"
        fields = [f"if=virtio,format=raw,{kind},file.driver=nbd", *self._qemu(export, "file.")]
        return [*self._qemu_credentials(), "-drive", ",".join(fields)]

    def libvirt(self, export: str, read_only: bool = False) -> str:
        """The disk element of a domain; ends with a newline. Empty for TLS with keys, which libvirt does not know."""
        if self.tls.keys:
            return ""
        if isinstance(self.address, str):
            host = f"<host transport='unix' socket={quoteattr(os.path.abspath(self.address))}/>"
        else:
            name, port = self._reachable()
            host = f"<host name={quoteattr(name)} port='{port}'/>"
        tls = " tls='yes'" if self.tls else ""
        if self._tls_hostname:
            tls += f" tlsHostname={quoteattr(self._tls_hostname)}"
        discard, kind = ("", "  <readonly/>\n") if read_only else (" discard='unmap'", "")
        return (
            "<disk type='network' device='disk'>\n"
            f"  <driver name='qemu' type='raw'{discard}/>\n"
            f"  <source protocol='nbd' name={quoteattr(export)}{tls}>\n"
            f"    {host}\n"
            "  </source>\n"
            "  <target dev='vda' bus='virtio'/>\n"
            f"{kind}"
            "</disk>\n"
        )

    def kernel(self, export: str, device: str = "/dev/nbd0") -> list[str]:
        """What attaches the volume to the kernel; empty for TLS with keys, which nbd-client does not know."""
        if self.tls.keys:
            return []
        words = ["nbd-client"]
        if isinstance(self.address, str):
            words += ["-unix", os.path.abspath(self.address)]
        else:
            host, port = self._reachable()
            words += [host, str(port)]
        words += [device, "-name", export, "-connections", str(CONNECTIONS), "-block-size", "4096"]
        words += ["-timeout", str(KERNEL_TIMEOUT_S)]
        if self.tls.certificates:
            place = Path(os.path.abspath(self.tls.certificates))
            words += ["-cacertfile", str(place / SERVER_FILES[0])]
            certificate, key = (place / name for name in CLIENT_FILES)
            if certificate.is_file() or not place.is_dir():  # the directory may be another host's
                words += ["-certfile", str(certificate), "-keyfile", str(key)]
        return words

    @property
    def _tls_hostname(self) -> str:
        """What QEMU compares with the server's certificate, where it is not the host that it connects to: a socket has
        none."""
        if not self.tls.certificates:
            return ""
        return self.tls.hostname or ("localhost" if self.is_unix else "")

    def _reachable(self) -> tuple[str, int]:
        """Host and port for clients: a server that listens everywhere is reached by this host's name."""
        assert not isinstance(self.address, str)
        host, port = self.address
        return (socket.gethostname() if host in ("", "0.0.0.0", "::") else host), port

    def _qemu_credentials(self) -> list[str]:
        if self.tls.certificates:
            place = _comma(os.path.abspath(self.tls.certificates))
            return ["-object", f"tls-creds-x509,id=tls0,endpoint=client,dir={place}"]
        if self.tls.keys:
            place = _comma(os.path.dirname(os.path.abspath(self.tls.keys)))
            return ["-object", f"tls-creds-psk,id=tls0,endpoint=client,username={_comma(self.tls.user)},dir={place}"]
        return []

    def _qemu(self, export: str, prefix: str) -> list[str]:
        if isinstance(self.address, str):
            server = [("server.type", "unix"), ("server.path", os.path.abspath(self.address))]
        else:
            host, port = self._reachable()
            server = [("server.type", "inet"), ("server.host", host), ("server.port", str(port))]
        fields = [*server, ("export", export), *([("tls-creds", "tls0")] if self.tls else [])]
        if self._tls_hostname:
            fields.append(("tls-hostname", self._tls_hostname))
        return [f"{prefix}{name}={_comma(value)}" for name, value in fields]

    def __str__(self) -> str:
        return describe(self.address)


def endpoint_of(
    path: str, listen: str, certificates: str, keys: str, verify_peer: bool, hostname: str = ""
) -> Endpoint:
    """The endpoint at the socket `path`, or at `listen` (`HOST[:PORT]`, by default this host only); UsageError."""
    if "/" in listen:
        raise UsageError(f"{listen} is no address to listen at: HOST:PORT")
    address = path or parse_address(listen or DEFAULT_HOST, NBD_PORT)
    return Endpoint(address, Tls(certificates, keys, verify_peer, hostname))


def _comma(text: str) -> str:
    """QEMU's options separate fields by commas; one that belongs to a value is doubled."""
    return text.replace(",", ",,")
