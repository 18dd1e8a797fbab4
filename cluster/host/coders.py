"""Faster bodies of `core.erasure.Coder`, chosen at start: ISA-L through cffi, else zfec, else plain Python.

All give the same bytes. Nothing is compiled: cffi loads the shared library as it is (ABI mode).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from sheepdog.cluster.core.erasure import (
    DATA_STRIPS,
    Buffer,
    Coder,
    PlainCoder,
    Policy,
    Row,
    choose,
    decoding_rows,
    parity_rows,
)
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.reading import POOLED_BYTES
from sheepdog.cluster.wire.streams import BufferPool

_LIBRARIES: Final = ("libisal.so.2", "libisal.so")
_SMALL_BYTES: Final = BLOCK_SIZE  # up to here copying a unit takes less time than telling cffi where it is
_SLOTS: Final = max(DATA_STRIPS)  # as many units as a sum has; parity has fewer
_RETAINED_BYTES: Final = 16 << 20  # of results: parity of 32 MB that is on its way
_SUM: Final[tuple[Row, ...]] = ((1, 1),)  # addition is exclusive or
_TABLE_BYTES: Final = 32  # ISA-L's expanded tables: a factor
_DECLARATIONS: Final = """
void ec_init_tables(int k, int rows, unsigned char *a, unsigned char *gftbls);
void ec_encode_data(int len, int k, int rows, unsigned char *gftbls, void **data, void **coding);
"""  # void: a buffer goes into such an array as it is; a cast takes longer than the sum of two blocks


class IsaCoder:
    """ISA-L: 11 us for a stripe of 4:2. OSError or ImportError when library or cffi are missing."""

    name = "isa-l"

    def __init__(self) -> None:
        from cffi import FFI

        self._buffers = BufferPool(_RETAINED_BYTES)
        self._ffi = ffi = FFI()
        ffi.cdef(_DECLARATIONS)
        self._library = _load(ffi)
        self._encode = self._library.ec_encode_data
        self._small = memoryview(bytearray(2 * _SLOTS * _SMALL_BYTES))  # of small units: inputs, then outputs
        place = ffi.from_buffer(self._small)
        self._small_inputs = ffi.new("void *[]", [place + slot * _SMALL_BYTES for slot in range(_SLOTS)])
        self._small_outputs = ffi.new("void *[]", [place + slot * _SMALL_BYTES for slot in range(_SLOTS, 2 * _SLOTS)])
        self._tables = lru_cache(maxsize=1024)(self._make_tables)
        self._pointers = lru_cache(maxsize=64)(self._make_pointers)

    def _make_tables(self, rows: tuple[Row, ...]) -> Any:
        factors = len(rows[0])
        matrix = self._ffi.new("unsigned char[]", bytes(factor for row in rows for factor in row))
        tables = self._ffi.new("unsigned char[]", _TABLE_BYTES * factors * len(rows))
        self._library.ec_init_tables(factors, len(rows), matrix, tables)
        return tables

    def _make_pointers(self, inputs: int, outputs: int) -> tuple[Any, Any]:
        """Arrays of pointers, used again by every call of this shape (one thread)."""
        return self._ffi.new("void *[]", inputs), self._ffi.new("void *[]", outputs)

    def combine(self, rows: tuple[Row, ...], units: Sequence[Buffer]) -> list[Buffer]:
        """Each row's sum of factor times unit."""
        length = len(units[0])
        if length <= _SMALL_BYTES:
            return self._combine_small(rows, units, length)
        view = self._ffi.from_buffer
        inputs, outputs = self._pointers(len(units), len(rows))
        results: list[Buffer]
        if length < POOLED_BYTES:
            results = [bytearray(length) for _ in rows]
        else:
            results = [self._buffers.take(length)[:length] for _ in rows]
        held = [view(unit) for unit in units]
        made = [view(result) for result in results]
        for position, pointer in enumerate(held):
            inputs[position] = pointer
        for position, pointer in enumerate(made):
            outputs[position] = pointer
        self._encode(length, len(units), len(rows), self._tables(rows), inputs, outputs)
        return results

    def _combine_small(self, rows: tuple[Row, ...], units: Sequence[Buffer], length: int) -> list[Buffer]:
        """By way of memory that cffi knows."""
        small, at = self._small, 0
        for unit in units:
            small[at : at + length] = unit
            at += _SMALL_BYTES
        self._encode(length, len(units), len(rows), self._tables(rows), self._small_inputs, self._small_outputs)
        results: list[Buffer] = []
        at = _SLOTS * _SMALL_BYTES
        for _ in rows:
            results.append(small[at : at + length].tobytes())
            at += _SMALL_BYTES
        return results

    def encode(self, policy: Policy, units: Sequence[Buffer]) -> list[Buffer]:
        return self.combine(parity_rows(policy), units)

    def delta(self, policy: Policy, strip: int, changes: Sequence[Buffer]) -> list[Buffer]:
        return self.combine(_column(policy, strip, len(changes)), changes)

    def xor(self, a: Buffer, b: Buffer) -> Buffer:
        return self.combine(_SUM, (a, b))[0]

    def decode(self, policy: Policy, units: Mapping[int, Buffer], wanted: Sequence[int]) -> list[Buffer]:
        sources = choose(policy, units)
        return self.combine(decoding_rows(policy, sources, tuple(wanted)), [units[strip] for strip in sources])


def _load(ffi: Any) -> Any:
    for name in _LIBRARIES[:-1]:
        try:
            return ffi.dlopen(name)
        except OSError:
            continue
    return ffi.dlopen(_LIBRARIES[-1])


@lru_cache(maxsize=512)
def _column(policy: Policy, strip: int, times: int) -> tuple[Row, ...]:
    return tuple((row[strip],) * times for row in parity_rows(policy))


class ZfecCoder(PlainCoder):
    """zfec: 220 us for a stripe of 4:2. It has no delta of a single unit; that is done in Python."""

    name = "zfec"

    def __init__(self) -> None:
        from zfec import Decoder, Encoder

        self._encoder: Callable[[Policy], Any] = lru_cache(maxsize=64)(
            lambda policy: Encoder(policy.data, policy.strips)
        )
        self._decoder: Callable[[Policy], Any] = lru_cache(maxsize=64)(
            lambda policy: Decoder(policy.data, policy.strips)
        )

    def encode(self, policy: Policy, units: Sequence[Buffer]) -> list[Buffer]:
        return list(self._encoder(policy).encode(list(units), list(range(policy.data, policy.strips))))

    def decode(self, policy: Policy, units: Mapping[int, Buffer], wanted: Sequence[int]) -> list[Buffer]:
        sources = choose(policy, units)
        data = self._decoder(policy).decode([units[strip] for strip in sources], list(sources))
        parity = [strip for strip in wanted if strip >= policy.data]
        made = dict(zip(parity, self._encoder(policy).encode(data, parity), strict=True)) if parity else {}
        return [made[strip] if strip in made else data[strip] for strip in wanted]


def best_coder(log: Log) -> Coder:
    """The fastest coder that works here."""
    for make in (IsaCoder, ZfecCoder):
        try:
            coder: Coder = make()
        except (ImportError, OSError) as error:
            log(6, f"erasure coding without {make.__name__}: {error}")
        else:
            return coder
    log(4, "erasure coding in plain Python: install libisal2 and cffi, or zfec")
    return PlainCoder()
