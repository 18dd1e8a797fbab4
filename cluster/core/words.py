"""Unsigned numbers in bytes, little-endian; librt has signed ones.

Compiled code reads and writes these without making an object of each number (but from 2^62 on), as `struct` does.
"""

from __future__ import annotations

from typing import Final

from librt.strings import BytesWriter, read_i32_le, read_i64_le, write_i32_le, write_i64_le

_U32: Final = 1 << 32
_U64: Final = 1 << 64
_SIGN_32: Final = 1 << 31
_SIGN_64: Final = 1 << 63


def write_u32(writer: BytesWriter, value: int) -> None:
    """Four bytes; ValueError or OverflowError for a number out of range."""
    write_i32_le(writer, (value ^ _SIGN_32) - _SIGN_32)


def write_u64(writer: BytesWriter, value: int) -> None:
    """Eight bytes; ValueError or OverflowError for a number out of range."""
    write_i64_le(writer, (value ^ _SIGN_64) - _SIGN_64 if value >> 63 else value)


def read_u32(data: bytes, start: int) -> int:
    """Of the four bytes from `start` on."""
    value: int = read_i32_le(data, start)
    return value + _U32 if value < 0 else value


def read_u64(data: bytes, start: int) -> int:
    """Of the eight bytes from `start` on."""
    value: int = read_i64_le(data, start)
    return value + _U64 if value < 0 else value
