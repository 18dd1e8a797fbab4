"""The standard streams and signals of a command, whatever it was started with: a closed stream, a full disk, a reader
that has had enough, somebody who ends it."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

from sheepdog.streams import open_streams

if TYPE_CHECKING:  # every command pays for what is imported here
    from types import FrameType

    from sheepdog.cluster.core.messages import Buffer


class OutputLost(Exception):
    """stdout takes nothing more. No OSError: commands take that for a failure of the cluster."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.reader_left = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    def write(self, data: Buffer, /) -> int:  # type: ignore[override]  # what typeshed calls ReadableBuffer
        try:
            return super().write(data) or 0
        except OSError as error:
            raise OutputLost(error) from error


def prepare() -> None:
    """For a process of its own: once, before anything is printed or opened."""
    sys.set_int_max_str_digits(0)  # no number is too long to be refused in a line
    open_streams()
    out = io.BufferedWriter(_Output(1, "w", closefd=False))  # type: ignore[type-var]  # typeshed knows files by their own methods only
    sys.stdout = io.TextIOWrapper(
        out, encoding=sys.stdout.encoding, errors="surrogateescape", line_buffering=os.isatty(1)
    )
    for stream in (sys.stdin, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names are bytes
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """As an interruption: what a command has begun and must undo, it undoes."""
    raise SystemExit(128 + number)


def give_up_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter can end in peace."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
