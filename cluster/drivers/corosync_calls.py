"""Calls that wait for the corosync daemon, each within a limit: one that is stopped never answers, nor refuses.

They run in threads of their own, which do not keep the process alive. A late result is given to `discard`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sheepdog.cluster.drivers import cpg
from sheepdog.cluster.drivers.cpg import Code, CorosyncError

START_PATIENCE_S = 10.0  # a daemon that is just starting answers "try again" for a second or two
ANSWER_S = START_PATIENCE_S + 1.0  # the last attempt may begin right before the end of the patience
RETRY_S = 0.1
MAX_UNANSWERED = 16  # threads that wait for a stopped daemon; a sheep that tries to join again makes one every 15 s

_T = TypeVar("_T")
_Future = concurrent.futures.Future
_unanswered: list[_Future[Any]] = []


def patiently(call: Callable[[], _T], seconds: float = START_PATIENCE_S) -> _T:
    """Repeats what a busy daemon refuses, for `seconds`. CorosyncError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except CorosyncError as error:
            if error.code != Code.TRY_AGAIN or time.monotonic() >= end:
                raise
        time.sleep(RETRY_S)


def answer_now(call: Callable[[], _T], seconds: float = ANSWER_S, discard: Callable[[_T], None] | None = None) -> _T:
    """The call's result, waited for on this thread. CorosyncError, TIMEOUT among its codes."""
    future = _started(call)
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        _when_late(future, discard)
        raise CorosyncError(Code.TIMEOUT) from None


async def answer(
    call: Callable[[], _T], seconds: float | None = ANSWER_S, discard: Callable[[_T], None] | None = None
) -> _T:
    """As `answer_now`, while the loop goes on; None: without a limit."""
    future = _started(call)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
    except TimeoutError:
        _when_late(future, discard)
        raise CorosyncError(Code.TIMEOUT) from None
    except asyncio.CancelledError:
        _when_late(future, discard)
        raise


def _started(call: Callable[[], _T]) -> _Future[_T]:
    _unanswered[:] = [future for future in _unanswered if not future.done()]
    if len(_unanswered) >= MAX_UNANSWERED:
        raise CorosyncError(Code.TIMEOUT)
    future: _Future[_T] = concurrent.futures.Future()
    _unanswered.append(future)
    future.set_running_or_notify_cancel()  # from now on it has a result, wanted or not

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True, name="corosync").start()
    return future


def _when_late(future: _Future[_T], discard: Callable[[_T], None] | None) -> None:
    if discard is None:
        return

    def came(_: _Future[_T]) -> None:
        if future.exception() is None:
            with contextlib.suppress(CorosyncError):
                discard(future.result())

    future.add_done_callback(came)


def running() -> bool:
    """Whether a corosync daemon lets this process in; CorosyncError for one that does not say so in time."""
    if cpg.missing() is not None:
        return False
    try:
        group = answer_now(lambda: patiently(cpg.Group, START_PATIENCE_S), ANSWER_S, cpg.Group.close)
    except CorosyncError as error:
        if error.code in (Code.TRY_AGAIN, Code.TIMEOUT):
            raise
        return False
    group.close()
    return True


def own_address() -> str | None:
    """The address of this node's first ring. CorosyncError."""

    def ask() -> str | None:
        group = cpg.Group()
        try:
            return cpg.node_address(group.local_node())
        finally:
            group.close()

    return answer_now(lambda: patiently(ask, START_PATIENCE_S), ANSWER_S)
