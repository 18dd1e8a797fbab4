"""Values of options: snapshot names, redundancy, indexes, object ids (cli.md 2.6)."""

from __future__ import annotations

from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import MAX_COPIES, MAX_RECOVERY_DELAY_S, MAX_SHIFT, MIN_SHIFT
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure

DATA_STRIPS = (2, 4, 8, 16)
MAX_PARITY = 15


def _decimal(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def snapshot_option(context: Context) -> tuple[bytes, int]:
    """(tag, snapshot id) of -s; (b"", 0) without it."""
    return snapshot_value(context.value("snapshot")) if context.flag("snapshot") else (b"", 0)


def snapshot_value(value: str) -> tuple[bytes, int]:
    """A number is an id, anything else a tag. An empty one is refused: it would mean the volume itself, and a script
    whose variable is not set would delete that, or roll back to it."""
    number = _decimal(value)
    if number is None:
        import os

        if not value:
            raise Failure("The snapshot id or tag is empty")
        return os.fsencode(value), 0
    if not 0 < number < 1 << 32:
        raise Failure("The snapshot id must be larger than zero")
    return b"", number


def parse_redundancy(text: str) -> tuple[int, int]:
    """(copies, policy byte) of `3` or `4:2`; copies are data and parity strips together (protocol.md 11)."""
    first, colon, second = text.partition(":")
    data, parity = _decimal(first), _decimal(second)
    if not colon and data is not None and 0 < data <= MAX_COPIES:
        return data, 0
    if colon and data in DATA_STRIPS and parity is not None and 0 < parity <= MAX_PARITY:
        assert data is not None
        return data + parity, data // 2 << 4 | parity
    raise Failure(
        f"Invalid parameter {text}\n"
        "To create replicated vdi, set -c x\n"
        "  x(1 to 31)   - number of replicated copies\n"
        "To create erasure coded vdi, set -c x:y\n"
        "  x(2,4,8,16)  - number of data strips\n"
        "  y(1 to 15)   - number of parity strips"
    )


def parse_shift(text: str) -> int:
    """log2 of the object size."""
    shift = _decimal(text)
    if shift is None or shift < MIN_SHIFT:
        raise Failure("Object Size is larger than 2^20. Please set shift bit larger than 20")
    if shift > MAX_SHIFT:
        raise Failure("Object Size is limited to 2^31. Please set shift bit lower than 31")
    return shift


def parse_delay(text: str) -> int:
    """Seconds that a node may be away before recovery."""
    delay_s = _decimal(text)
    if delay_s is None or delay_s > MAX_RECOVERY_DELAY_S:
        raise Failure(f"Invalid recovery delay '{text}': must be 0 to {MAX_RECOVERY_DELAY_S} seconds", USAGE_ERROR)
    return delay_s


def parse_index(text: str) -> int:
    """Index of a data object."""
    number = _decimal(text)
    if number is None and text[:2] in ("0x", "0X"):
        number = _hexadecimal(text[2:])
    if number is None:
        raise Failure("The index must be a decimal integer or a hexadecimal integer started with 0x")
    return number


def parse_oid(text: str) -> ObjectId:
    number = _hexadecimal(text.removeprefix("0x"))
    if number is None or number >= 1 << 64:
        raise Failure("object id must be a hex integer")
    return ObjectId(number)


def _hexadecimal(text: str) -> int | None:
    return int(text, 16) if text and all(digit in "0123456789abcdefABCDEF" for digit in text) else None


def positive(context: Context, option: str, words: str, default: int) -> int:
    """Value of an option that must be a positive integer; `words` name it in the (sic) message."""
    if not context.flag(option):
        return default
    number = _decimal(context.value(option))
    if not number:
        raise Failure(f"The {words} must bepositive integer")
    return number
