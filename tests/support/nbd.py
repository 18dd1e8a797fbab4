"""An NBD server in front of a test's cluster, and the clients that tests use: programs, and libnbd as a script."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.processes import BIN, end, environment, run, shown

START_SECONDS = 30.0
SYSTEM_PYTHON = "/usr/bin/python3"  # Debian's: it has libnbd's module
NBDKIT_PLUGIN = Path(__file__).resolve().parents[2] / "src/sheepdog/frontends/nbd/plugin.py"


# Strict mode off: libnbd would itself refuse what the server shall refuse, or may well do.
CONNECT = """
def connect(uri):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    return h
"""


def _outside() -> dict[str, str]:
    """For nbdkit: its Python would take on the virtual environment that comes first in PATH, with all its packages."""
    found = environment()
    return {**found, "PATH": found["PATH"].removeprefix(f"{BIN}:")}


def for_plugins() -> dict[str, str]:
    """For nbdkit that is started by hand: its plugins import ours."""
    return {**_outside(), "PYTHONPATH": str(NBDKIT_PLUGIN.parents[3])}


class NbdServer:
    """`dog nbd serve WORDS...` against a node of the cluster, at a unix socket unless `listen` is given."""

    def __init__(
        self, cluster: Cluster, directory: Path, *words: str, node: int = 0, listen: str = "", name: str = "nbd"
    ) -> None:
        self.socket = directory / f"{name}.sock"
        self.log = directory / f"{name}.log"
        self.listen = listen
        place = ["--listen", listen] if listen else ["--socket", str(self.socket)]
        command = [str(BIN / "dog"), "nbd", "serve", "-p", str(cluster.port(node)), *place, *words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*cluster.prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_outside(),
            )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().decode().strip()
        if not self.first_line:
            self.process.wait(START_SECONDS)
            raise AssertionError(f"{' '.join(command)}: {self.text()}")

    def uri(self, export: str) -> str:
        if self.listen:
            return f"nbd://{self.listen}/{export}"
        return f"nbd+unix:///{export}?socket={self.socket}"

    def text(self) -> str:
        """What the server has written to stderr."""
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(START_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            end([self.process.pid])
        self.process.wait(START_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()


def nbdsh(
    uri: str | None, *lines: str, check: bool = True, seconds: float = 120.0
) -> subprocess.CompletedProcess[bytes]:
    """Runs lines of libnbd's Python with `h`, connected to `uri`; output of print() in stdout."""
    script = ["import nbd, errno, os", CONNECT]
    if uri is not None:
        script.append(f"h = connect({uri!r})")
    return run([SYSTEM_PYTHON, "-c", "\n".join([*script, *lines])], check=check, seconds=seconds)


def nbd_map(uri: str) -> list[tuple[int, int, str]]:
    """(offset, length, description) as `nbdinfo --map` has it, neighbours merged."""
    found: list[tuple[int, int, str]] = []
    for entry in json.loads(run(["nbdinfo", "--map", "--json", uri]).stdout):
        offset, length, kind = entry["offset"], entry["length"], entry["description"]
        if found and found[-1][2] == kind and found[-1][0] + found[-1][1] == offset:
            found[-1] = (found[-1][0], found[-1][1] + length, kind)
        else:
            found.append((offset, length, kind))
    return found


def export_info(uri: str) -> dict[str, object]:
    loaded = json.loads(run(["nbdinfo", "--json", uri]).stdout)
    (export,) = loaded["exports"]
    assert isinstance(export, dict)
    return export


def captive(cluster: Cluster, words: Sequence[str], parameters: Sequence[str], command: str) -> None:
    """nbdkit by hand, as docs/nbd.md shows it: `command` runs with $unixsocket set, and must succeed."""
    argv = [
        "nbdkit", "-f", "-U", "-", *words, "python", str(NBDKIT_PLUGIN),
        f"address={cluster.socket(0)}", *parameters, "--run", command,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, timeout=120, env=for_plugins(), check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {shown(done.stdout)}\n{shown(done.stderr)}")


def holding(uri: str, *lines: str) -> subprocess.Popen[bytes]:
    """A client that connects, runs the lines and stays connected for a minute; it is connected when this returns."""
    script = [
        "import nbd, time, os",
        CONNECT,
        f"h = connect({uri!r})",
        *lines,
        "print('held', flush=True)",
        "time.sleep(60)",
    ]
    process = subprocess.Popen([SYSTEM_PYTHON, "-c", "\n".join(script)], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    if process.stdout.readline() != b"held\n":
        release(process)
        raise AssertionError(f"a client could not hold {uri}")
    return process


def release(process: subprocess.Popen[bytes]) -> None:
    """Ends such a client the hard way."""
    process.kill()
    process.wait(START_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


def keys(directory: Path, user: str = "alice") -> Path:
    """A file of TLS keys, named as QEMU wants it."""
    path = directory / "keys.psk"
    path.write_text(f"{user}:{os.urandom(32).hex()}\n")
    path.chmod(0o600)
    return path


def certificates(directory: Path) -> Path:
    """A directory with an authority of its own, a server's and a client's certificate for localhost."""
    place = directory / "pki"
    place.mkdir()

    def tool(*words: str) -> None:
        run(["certtool", *words], cwd=place)

    (place / "ca.info").write_text("cn = Test\nca\ncert_signing_key\n")
    (place / "server.info").write_text(
        "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nencryption_key\nsigning_key\n"
    )
    (place / "client.info").write_text("cn = client\ntls_www_client\nencryption_key\nsigning_key\n")
    for name in ("ca", "server", "client"):
        tool("--generate-privkey", "--key-type=ecdsa", "--outfile", f"{name}-key.pem")
    tool("--generate-self-signed", "--load-privkey", "ca-key.pem", "--template", "ca.info", "--outfile", "ca-cert.pem")
    for name in ("server", "client"):
        tool(
            "--generate-certificate", "--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem",
            "--load-privkey", f"{name}-key.pem", "--template", f"{name}.info", "--outfile", f"{name}-cert.pem",
        )  # fmt: skip
    return place
