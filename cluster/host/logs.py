"""The daemon's log: sheep.log, syslog or standard output, in three formats; levels as in syslog.

Everything that uses Python's `logging` ends here too; core gets `Logs.write` as its `ports.Log`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import syslog
import time

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host.options import LOG_LEVELS, LogOptions

FILE_NAME = "sheep.log"
SYSLOG_IDENT = "sheep"

_COMPILED = "compiled"  # stands for functions that the interpreter has no frames of
_CALLERS = frozenset(  # module and function of what calls anything
    {
        ("asyncio.events", "_run"),
        ("sheepdog.cluster.host.loop", "select"),
        ("sheepdog.cluster.host.workers", "job"),
        ("sheepdog.cluster.host.workers", "_finish"),
    }
)
_LOGGING_LEVELS = (60, 55, logging.CRITICAL, logging.ERROR, logging.WARNING, 25, logging.INFO, logging.DEBUG)
_NAMES = ("EMERG", "ALERT", "CRIT", "ERROR", "WARN", "NOTICE", "INFO", "DEBUG")


def _syslog_level(level: int) -> int:
    """Number of the syslog level that a logging level belongs to."""
    return next((number for number, least in enumerate(_LOGGING_LEVELS) if level >= least), len(_NAMES) - 1)


class _Format(logging.Formatter):
    """`server`: `Mon DD HH:MM:SS  LEVEL [thread] function(line) message`; `default` is without the time."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self._shape = style

    def format(self, record: logging.LogRecord) -> str:
        level = _NAMES[_syslog_level(record.levelno)]
        thread = "main" if record.threadName == "MainThread" else record.threadName
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._shape == "json":
            return json.dumps(
                {
                    "time": round(record.created, 6),
                    "level": level.lower(),
                    "thread": thread,
                    "function": record.funcName,
                    "line": record.lineno,
                    "message": message,
                }
            )
        line = f"{level:>6} [{thread}] {record.funcName}({record.lineno}) {message}"
        if self._shape == "default":
            return line
        return time.strftime("%b %d %H:%M:%S ", time.localtime(record.created)) + line


class _Output(logging.Handler):
    """Appends lines to a descriptor. A full disk or a closed pipe loses lines, nothing else."""

    def __init__(self, path: str | None) -> None:
        """None: standard output. OSError."""
        super().__init__()
        self._path = path
        self._fd = 1 if path is None else _open(path)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, (self.format(record) + "\n").encode(errors="backslashreplace"))

    def reopen(self) -> None:
        """OSError: the old file stays in use."""
        if self._path is not None:
            fd = _open(self._path)
            os.close(self._fd)
            self._fd = fd

    def close(self) -> None:
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


class _Syslog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        syslog.openlog(SYSLOG_IDENT, syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        syslog.syslog(_syslog_level(record.levelno), self.format(record).strip().replace("\0", " "))


class Logs:
    """The log of this process; there is one at a time."""

    def __init__(self, options: LogOptions, metadata: str) -> None:
        """Opens it (the file in `metadata` unless the options say otherwise). UsageError."""
        self._logger = logging.getLogger("sheepdog")
        self._root = logging.getLogger()
        self._output: _Output | None = None
        handler: logging.Handler
        self.place = "the system log"  # as people are told where to look
        if options.destination == "syslog":
            handler = _Syslog()
            style = "default" if options.format == "server" else options.format  # syslog has the time already
        else:
            path = None if options.destination == "stdout" else os.path.join(options.directory or metadata, FILE_NAME)
            try:
                handler = self._output = _Output(path)
                self.place = path or "standard output"
            except OSError as error:
                raise UsageError(f"cannot open the log file {path} ({error.strerror})") from error
            style = options.format
        handler.setFormatter(_Format(style))
        self._handler = handler
        self._root.addHandler(handler)
        self.level = options.level

    @property
    def level(self) -> int:
        """0 (emerg) to 7 (debug): what is logged at most; may be changed at any time."""
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        self._level = level
        self._root.setLevel(_LOGGING_LEVELS[level])

    @property
    def level_name(self) -> str:
        return LOG_LEVELS[self._level]

    def write(self, level: int, text: str) -> None:
        """`ports.Log`; the line names the function that called this, or the plain one that called compiled ones."""
        number = _LOGGING_LEVELS[level]
        if not self._logger.isEnabledFor(number):
            return
        caller = sys._getframe(1)
        name, line = caller.f_code.co_name, caller.f_lineno
        if (caller.f_globals.get("__name__"), name) in _CALLERS:
            name, line = _COMPILED, 0
        self._logger.handle(self._logger.makeRecord(self._logger.name, number, "", line, text, (), None, name))

    def reopen(self) -> None:
        """After rotation: goes on in a new file of the same name."""
        if self._output is not None:
            try:
                self._output.reopen()
            except OSError as error:
                self.write(LOG_LEVELS.index("err"), f"cannot reopen the log file ({error.strerror})")

    def close(self) -> None:
        self._root.removeHandler(self._handler)
        self._handler.close()


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
