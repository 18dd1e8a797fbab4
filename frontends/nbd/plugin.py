"""The script that nbdkit's python plugin loads: NBD requests become calls of an open volume.

    PYTHONPATH=.../src nbdkit -f -U /run/web.sock python .../frontends/nbd/plugin.py address=127.0.0.1:7000 volume=web

Runs inside nbdkit, in the Python that nbdkit was built with: everything imported here is pure Python. One
module is used compiled where it is compiled for that Python (`client.channel.use_native`). `serve` starts it well; the
words after the script are those of `parameters`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import nbdkit  # type: ignore[import-not-found]  # exists inside nbdkit only

from sheepdog.cluster.client.blocking import EXTENT_OBJECTS
from sheepdog.cluster.client.channel import use_native
from sheepdog.cluster.client.memory import lock_memory, write_back_for_the_kernel
from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.frontends.nbd.exports import Exports, Handle, complaint, describe
from sheepdog.frontends.nbd.parameters import Parameters
from sheepdog.frontends.nbd.placement import Placement
from sheepdog.frontends.nbd.sockets import widen_accepted
from sheepdog.frontends.nbd.threads import ThreadStates

API_VERSION = 2
LEAVING_S = 0.3  # for requests under way and clients about to leave, when the server is stopped
CLOSING_LIMIT_S = 5.0  # for the last flush: what is not flushed by then stays, not durable, with the nodes that have it
MINIMUM_BLOCK = 512  # what every client can live with; a volume of an odd size has no smallest block
PREFERRED_BLOCK = 4096  # the unit of the store's hashes: smaller writes read the rest first

# What the protocol has words for. nbdkit would turn anything else into EINVAL, which blames the client.
_KNOWN = frozenset(
    (errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.EOPNOTSUPP)
)
_SPOKEN_AS = {errno.EROFS: errno.EPERM, errno.EFBIG: errno.ENOSPC, errno.EDQUOT: errno.ENOSPC}

_parameters = Parameters()
_exports: Exports | None = None
_states = ThreadStates()
_finishing = threading.Lock()

_Result = TypeVar("_Result")


def _told(call: Callable[..., _Result]) -> Callable[..., _Result]:
    """Failures of `call` reach the client with their errno, and the log in one line."""

    def guarded(*arguments: Any) -> _Result:
        try:
            return call(*arguments)
        except OSError as error:
            number = error.errno or errno.EIO
            number = _SPOKEN_AS.get(number, number)
            nbdkit.set_error(number if number in _KNOWN else errno.EIO)
            raise
        except PeerError:
            nbdkit.set_error(errno.EIO)
            raise

    return guarded


def _brief(kind: Any, error: BaseException, trace: Any = None, *more: Any, **others: Any) -> list[str]:
    """Stands in for `traceback.format_exception`, by which nbdkit logs: an OSError is no bug of ours."""
    if isinstance(error, (OSError, PeerError, UsageError)):
        return [getattr(error, "strerror", None) or str(error)]
    return _format_exception(kind, error, trace, *more, **others)


_format_exception = traceback.format_exception
traceback.format_exception = _brief  # type: ignore[assignment]


# -- the server


def config(key: str, value: str) -> None:
    _parameters.set(key, value)


def config_complete() -> None:
    global _exports
    _exports = Exports(_parameters)


def after_fork() -> None:
    """Everything that has to be done before there are threads.

    nbdkit waits for its clients to leave before it ends, idle ones too. We do not: see `_end`.
    """
    if _parameters.swap:
        lock_memory()
        write_back_for_the_kernel(_complain)
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in all threads: they are yet to be made
    use_native()
    if not _parameters.spread:
        Placement().start()
    threading.Thread(target=_end, args=(ends,), daemon=True).start()


def _end(signals: Iterable[int]) -> None:
    """Waits for a signal, then stops."""
    signal.sigwait(signals)
    nbdkit.shutdown()  # no new connection, no new request
    time.sleep(LEAVING_S)
    _finish()


def cleanup() -> None:
    """nbdkit would end now: its last client has left while it stops. Of such clients it does not call `close`."""
    _finish()


def _finish() -> None:
    """Volumes are flushed and unlocked, connections that are left are cut. Does not return."""
    _finishing.acquire()  # a second caller waits for the end that the first one makes
    status = 1
    try:
        complaints = _door().close_all(CLOSING_LIMIT_S)
        for line in complaints:
            _complain(line)
        status = 1 if complaints else 0
    finally:
        os._exit(status)


def _complain(line: str) -> None:
    """To the server's log: nobody waits for an answer any more, and it must be seen without `-v`."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def _door() -> Exports:
    assert _exports is not None
    return _exports


@_told
def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return _door().listing()


@_told
def default_export(readonly: bool, is_tls: bool) -> str:
    return _door().default()


# -- connections


@_told
def open(readonly: bool) -> Handle:
    widen_accepted()
    return _door().open(nbdkit.export_name(), readonly)


def close(h: Handle) -> None:
    try:
        _door().close(h)
    except (OSError, PeerError) as error:
        _complain(complaint(h.export, error))
    finally:
        _states.end(h)


def export_description(h: Handle) -> str:
    return describe(h.volume.inode)


def get_size(h: Handle) -> int:
    return h.volume.size


def block_size(h: Handle) -> tuple[int, int, int]:
    minimum = 1 if h.volume.size % MINIMUM_BLOCK else MINIMUM_BLOCK
    return minimum, PREFERRED_BLOCK, h.volume.object_size


def is_rotational(h: Handle) -> bool:
    return False


def can_write(h: Handle) -> bool:
    return h.writable


def can_flush(h: Handle) -> bool:
    return True


def can_fua(h: Handle) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_trim(h: Handle) -> bool:
    return h.writable


def can_zero(h: Handle) -> bool:
    return h.writable


def can_fast_zero(h: Handle) -> bool:
    return h.writable


def can_extents(h: Handle) -> bool:
    return True


def can_multi_conn(h: Handle) -> bool:
    """A flush covers the whole volume, whichever connection has written; all connections share its map."""
    return not _door().exclusive


def can_cache(h: Handle) -> int:
    """nbdkit reads the range and forgets it: the sheep's page cache has it then."""
    return int(nbdkit.CACHE_EMULATE)


# -- requests


@_told
def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    _states.keep(h)
    h.volume.read_into(offset, buf)


@_told
def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    _states.keep(h)
    h.volume.write(offset, buf, bool(flags & nbdkit.FLAG_FUA))


@_told
def flush(h: Handle, flags: int) -> None:
    h.volume.flush()


@_told
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    h.volume.trim(offset, count)
    if flags & nbdkit.FLAG_FUA:
        h.volume.flush()


@_told
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    durable = bool(flags & nbdkit.FLAG_FUA)
    if not flags & nbdkit.FLAG_MAY_TRIM:
        if flags & nbdkit.FLAG_FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "zeros that keep their space are written like data")
        h.fill(offset, count, durable)
    elif flags & nbdkit.FLAG_FAST_ZERO and not h.volume.zero_is_fast(offset, count):
        raise OSError(errno.EOPNOTSUPP, "parts of objects that are shared or coded are written like data")
    else:
        h.volume.zero(offset, count, durable)


@_told
def extents(h: Handle, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    objects = 1 if flags & nbdkit.FLAG_REQ_ONE else EXTENT_OBJECTS
    found = h.volume.block_extents(offset, count, objects)
    return [(extent.offset, extent.length, 0 if extent.allocated else hole) for extent in found]
