"""What people and scripts read: sizes, times, redundancy, prompts (cli.md 2.3, 2.9)."""

from __future__ import annotations

import sys
import time

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, format_address
from sheepdog.cluster.wire.results import text_of
from sheepdog.tools.dog.options import Failure

CACHED_AWAY = "acknowledged writes are in the cache of a node that is away, or has lost it (dog cluster health)"
_UNITS = ("MB", "GB", "TB", "PB", "EB", "ZB", "YB")
_SUFFIXES = "BKMGTP"
_MIB = 1 << 20

_DRAWING = ("    __", "   ()'`;", "   /\\|`", "  /  |   ", "(/_)_|_  ")


def human_size(size: int) -> str:
    """`0.0 MB`, `9.9 GB`, `10 GB`: never a unit below MB, one decimal below ten."""
    value = size / _MIB
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if value >= 10 else f"{value:.1f} {_UNITS[unit]}"


def size_text(size: int, raw: bool) -> str:
    return str(size) if raw else human_size(size)


def parse_size(text: str) -> int:
    """Bytes of `10`, `1.5G`, `20m`; Failure with the original's words for anything else."""
    number, shift = text, 0
    if text and text[-1].upper() in _SUFFIXES:
        number, shift = text[:-1], 10 * _SUFFIXES.index(text[-1].upper())
    whole, _, fraction = number.partition(".")
    digits = whole + fraction
    # Exact arithmetic: the largest sizes do not fit a float's 53 bits.
    if digits.isascii() and digits.isdigit() and (whole or fraction):
        size: int = (int(digits) << shift) // 10 ** len(fraction)
        return size
    raise Failure(
        f"Invalid size '{text}'\nYou may use B, K, M, G, T or P suffixes for "
        "bytes, kilobytes, megabytes, gigabytes, terabytes and petabytes."
    )


def data_strips(policy: int) -> int:
    return (policy >> 4) * 2


def redundancy(copies: int, policy: int) -> str:
    """`3`, or `4:2` for an erasure code (protocol.md 11)."""
    return f"{data_strips(policy)}:{policy & 0xF}" if policy else str(copies)


def minute(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def full_time(seconds: int) -> str:
    """`Sat Nov 21 20:24:15 2026`, as ctime writes it."""
    return time.asctime(time.localtime(seconds))


def long_address(node: NodeId) -> str:
    """`IPv4 ip:127.0.0.1 port:7000`."""
    address = format_address(node.address)
    return f"{'IPv6' if ':' in address else 'IPv4'} ip:{address} port:{node.port}"


def percent(used: int, size: int) -> str:
    """`%3d%%`, truncated."""
    return f"{used * 100 // size if size else 0:3d}%"


def warn(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def text(result: int) -> str:
    return text_of(result)


def reason(error: Exception) -> str:
    """What went wrong, and with which file."""
    if isinstance(error, SheepError):
        return text_of(error.result)
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def refusal(result: int) -> str:
    """Why something cannot be done to a volume that the command itself does not lock: then it is its cache."""
    away = f": {CACHED_AWAY}" if result == Result.VDI_LOCKED else ""
    return f"{text_of(result)}{away}"


def request_failed(result: int) -> str:
    """What the original says of requests without payload."""
    return f"Response's result: {text_of(result)}"


def confirm(question: str) -> None:
    """Asks on stdout; anything but an answer that begins with `yes` ends the command with status 0."""
    print(question, end="", flush=True)
    if not sys.stdin.readline().lower().startswith("yes"):
        raise Failure(code=0)


def caution(*lines: str) -> None:
    """The drawing with one or two lines of caution, and the question."""
    rows = list(_DRAWING)
    question = "Are you sure you want to continue? [yes/no]: "
    if len(lines) == 2:
        rows[2] += "  " + lines[0]
    rows[3] += lines[-1]
    rows[4] += question
    confirm("\n".join(rows))
