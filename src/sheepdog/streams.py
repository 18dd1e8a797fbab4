"""The standard streams of a program, whatever it was started with. All programs import it: it imports none of ours."""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Once, before anything else is opened: closed ones lead nowhere, or the next file would be taken for one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (they last as long as the process)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def show(program: str, text: str) -> int:
    """Prints what was asked for; the exit status: 1, and a line on stderr, if it cannot be written."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        if not isinstance(error, BrokenPipeError):  # `sheep --help | head`
            print(f"{program}: cannot write the output: {error.strerror}", file=sys.stderr)
            return 1
    return 0
