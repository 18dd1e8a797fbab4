"""A daemon's birth and end as its surroundings see them: detaching, pid file, signals.

startup = lifecycle.detach()            # or lifecycle.Startup() to stay in the foreground
lock = DirectoryLock(options.metadata)
...                                     # mistakes up to here are printed, and the caller's exit status is 1
startup.done(options.metadata)          # from here on the log is the only way to say anything
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from sheepdog.cluster.core.errors import UsageError


class Startup:
    """The part of a start that somebody at a terminal waits for. In the foreground there is nothing to tell."""

    def __init__(self, pipe: int = -1) -> None:
        self._pipe = pipe

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for a daemon's `done`."""
        return self._pipe >= 0

    def tell(self, line: str) -> None:
        """A line for whoever waits at the terminal; nobody does after `done`."""
        if self.awaited:
            print(line, file=sys.stderr)

    def done(self, directory: str) -> None:
        """Lets the foreground process return with status 0; a daemon gives up terminal and working directory."""
        if not self.awaited:
            return
        os.chdir(directory)
        sys.stdout.flush()
        sys.stderr.flush()
        _to_null(1, 2)
        with contextlib.suppress(BrokenPipeError):  # whoever waited was interrupted: the daemon stays
            os.write(self._pipe, b"\0")
        os.close(self._pipe)
        self._pipe = -1


def detach() -> Startup:
    """Goes on in a daemon: forked twice, in a session of its own, standard input on /dev/null.

    The calling process ends in here, with status 0 at `Startup.done` and 1 when the daemon ends before; 130 when it is
    interrupted, which the daemon is not. To be called before threads and event loops exist; standard output and error
    stay open until `done`.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        _wait_for_daemon(child, reader)
    os.close(reader)
    os.setsid()
    if os.fork():  # not a session leader: it can never get a terminal again
        os._exit(0)
    _to_null(0)
    return Startup(writer)


def _wait_for_daemon(child: int, reader: int) -> NoReturn:
    status = 1
    try:
        os.waitpid(child, 0)
        status = 0 if os.read(reader, 1) else 1
    except KeyboardInterrupt:
        os.write(2, b"interrupted: the daemon goes on by itself\n")
        status = 130  # as shells count
    finally:
        os._exit(status)  # what runs at an interpreter's exit is the daemon's business


def _to_null(*fds: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


class PidFile:
    """Holds this process's id and a newline, locked while the process lives."""

    def __init__(self, path: str) -> None:
        """UsageError: the file cannot be written, or another process holds it."""
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot create the pid file {path} ({error.strerror})") from error
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            os.close(self._fd)
            raise UsageError(f"the pid file {path} is in use by another process") from error
        except OSError as error:
            os.close(self._fd)
            raise UsageError(f"cannot write the pid file {path} ({error.strerror})") from error

    def remove(self) -> None:
        """At an orderly end. A file that somebody has replaced meanwhile stays."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                os.unlink(self._path)
        os.close(self._fd)


def handle_signals(
    loop: asyncio.AbstractEventLoop, terminate: Callable[[str], None], reopen_log: Callable[[], None]
) -> None:
    """SIGTERM and SIGINT ask for an orderly end, once; a second SIGINT ends the process. SIGHUP rotates the log.

    `terminate` gets the signal's name. SIGPIPE is ignored: a closed connection is an error of that connection.
    """

    def end(number: signal.Signals) -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        terminate(number.name)

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    loop.add_signal_handler(signal.SIGHUP, reopen_log)
