"""Starts nbdkit with the plugin: the listening socket, its permissions, TLS, the modules' path.

The socket is made here and handed over (socket activation), so a client can connect as soon as this process has
become nbdkit, and nobody can before the permissions are right.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import sheepdog
from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.nbd.endpoints import Endpoint
from sheepdog.frontends.nbd.parameters import Parameters

DEFAULT_MODE = 0o600
BACKLOG = 128
FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)
MAX_THREADS = 256
SWAP_STACK_BYTES = 512 << 10  # a request of the plugin uses some 30 KiB
PACKAGES = "nbdkit and nbdkit-plugin-python"


@dataclass(slots=True)
class Server:
    """Everything that a server is started with. `threads` requests of one connection are under way at a time."""

    endpoint: Endpoint
    parameters: Parameters = field(default_factory=Parameters)
    read_only: bool = False
    mode: int = DEFAULT_MODE
    group: str = ""
    threads: int = 0

    def command(self, program: str = "nbdkit") -> list[str]:
        """nbdkit's words; it takes the socket from its environment."""
        tls = self.endpoint.tls
        words = [program, "--foreground", "--log=stderr"]
        if self.read_only:
            words.append("--readonly")
        if self.threads:
            words.append(f"--threads={self.threads}")
        if tls:
            words.append("--tls=require")
        if tls.certificates:
            words.append(f"--tls-certificates={os.path.abspath(tls.certificates)}")
        if tls.keys:
            words.append(f"--tls-psk={os.path.abspath(tls.keys)}")
        if tls.verify_peer:
            words.append("--tls-verify-peer")
        return [*words, "python", str(Path(__file__).with_name("plugin.py")), *self.parameters.words()]

    def run(self, listener: socket.socket) -> NoReturn:
        """Becomes nbdkit, which accepts clients from `listener` until SIGTERM or SIGINT."""
        program = shutil.which("nbdkit", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise UsageError(f"nbdkit is not installed (Debian: {PACKAGES})")
        command, variables = self.command(program), environment(os.environ)
        if self.parameters.swap:
            # What is mapped counts as locked, also the stacks: 16 for each connection, 8 MiB by default.
            _, hard = resource.getrlimit(resource.RLIMIT_STACK)
            resource.setrlimit(resource.RLIMIT_STACK, (SWAP_STACK_BYTES, hard))
        if listener.fileno() != FIRST_DESCRIPTOR:
            os.dup2(listener.fileno(), FIRST_DESCRIPTOR)
        os.set_inheritable(FIRST_DESCRIPTOR, True)
        os.execve(program, command, variables)

    def listen(self) -> socket.socket:
        """The socket for `run`; from now on clients can connect. UsageError or OSError if it cannot be had."""
        address = self.endpoint.address
        if isinstance(address, str):
            return self._listen_unix(address)
        host, port = address
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise UsageError(f"cannot listen at {self.endpoint}: {error.strerror}") from None
        family, _, _, _, target = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"cannot listen at {self.endpoint}: {error.strerror}") from error
        listener.listen(BACKLOG)
        return listener

    def _listen_unix(self, path: str) -> socket.socket:
        """A socket that only those whom `mode` and `group` allow have ever been able to connect to."""
        clear_away(path)
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o777)
        try:
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"cannot listen at {path}: {error.strerror or error}") from error
        finally:
            os.umask(before)
        try:
            if self.group:
                shutil.chown(path, group=self.group)
            os.chmod(path, self.mode)
        except (LookupError, OSError) as error:
            listener.close()
            os.unlink(path)
            if isinstance(error, LookupError):
                raise UsageError(f"there is no group {self.group}") from None
            raise
        listener.listen(BACKLOG)
        return listener


def clear_away(path: str) -> None:
    """Removes a socket that a server left behind; OSError EADDRINUSE if one listens, or it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EADDRINUSE, f"{path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, f"a server listens at {path} already")


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """For nbdkit: its own Python must find this project, and it must take the socket that it is given."""
    here = str(Path(next(iter(sheepdog.__path__))).parent)
    rest = variables.get("PYTHONPATH", "")
    return {
        **variables,
        "PYTHONPATH": f"{here}:{rest}" if rest else here,
        "LISTEN_FDS": "1",
        "LISTEN_PID": str(os.getpid()),
    }
