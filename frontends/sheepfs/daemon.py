"""Going into the background, and where messages go from there."""

from __future__ import annotations

import logging
import os
import sys
import syslog

from sheepdog.frontends.sheepfs.transport import log

IDENT = "sheepfs"
_READY = b"+"


class Readiness:
    """The child's way to tell the waiting command that it serves. In the foreground nobody waits."""

    def __init__(self, pipe: int | None = None) -> None:
        self._pipe = pipe

    def announce(self) -> None:
        if self._pipe is not None:
            os.write(self._pipe, _READY)
            os.close(self._pipe)
            self._pipe = None


def go_into_background() -> Readiness:
    """Fork. The parent never returns: it exits with 0 once the child is ready, with 1 if the child ends before.

    To be called before any thread and any event loop exists.
    """
    theirs, ours = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(ours)
        ready = os.read(theirs, 1) == _READY
        if not ready:
            print("sheepfs: could not start, the system log says why", file=sys.stderr, flush=True)
        os._exit(0 if ready else 1)
    os.close(theirs)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return Readiness(ours)


class SyslogHandler(logging.Handler):
    """Messages to the C library's syslog, which finds the socket by itself and never fails."""

    def __init__(self) -> None:
        super().__init__()
        syslog.openlog(IDENT, syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        syslog.syslog(_PRIORITY.get(record.levelno, syslog.LOG_INFO), self.format(record))


_PRIORITY = {
    logging.DEBUG: syslog.LOG_DEBUG,
    logging.INFO: syslog.LOG_INFO,
    logging.WARNING: syslog.LOG_WARNING,
    logging.ERROR: syslog.LOG_ERR,
    logging.CRITICAL: syslog.LOG_CRIT,
}


def log_to_stderr(debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{IDENT}: %(message)s"))
    _use(handler, debug)


def log_to_syslog() -> None:
    _use(SyslogHandler(), debug=False)


def _use(handler: logging.Handler, debug: bool) -> None:
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False
