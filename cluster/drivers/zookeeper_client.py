"""kazoo for asyncio: requests as coroutines, watches and changes of the connection as calls on the loop's thread.

kazoo works in threads of its own; everything they tell crosses over by `call_soon_threadsafe`. A client lives as
long as one session: after `Connection.LOST` every request fails, where kazoo would go on with a new session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import (
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    KazooException,
    NodeExistsError,
    NoNodeError,
    OperationTimeoutError,
    SessionExpiredError,
    SessionMovedError,
)
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.protocol.serialization import Connect
from kazoo.protocol.states import KazooState, ZnodeStat
from kazoo.retry import KazooRetry

from sheepdog.cluster.core.errors import PeerError

RETRY_FIRST_S, RETRY_MAX_S = 0.05, 1.0  # between rounds over all servers: an election takes about a second
CONNECT_PART = 8  # of a session, for one server: three may be silent in a row, and the session is not over
RETRY_PART = 4  # of a session: several rounds must fit, since servers that come back all at once count it from then on
UNSIGNED = (1 << 64) - 1  # sessions are numbers with a sign in Java

__all__ = [
    "BadVersionError",
    "Client",
    "Connection",
    "NoNodeError",
    "NodeExistsError",
    "SessionLost",
    "Unreachable",
    "ZnodeStat",
    "current_task",
    "reason_of",
    "session_begins",
]


class Unreachable(Exception):
    """No server answered: the request may have been executed or not. The session may go on."""


class SessionLost(Exception):
    """The session is over, and everything that depended on it."""


class Connection(Enum):
    UP = "up"
    DOWN = "down"
    LOST = "lost"


_quiet = logging.getLogger(f"{__name__}.kazoo")  # what it says is told by `on_change`, once and in our words
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]
    """kazoo's threads. By itself it waits for a server that is cut off for as long as a session lasts."""

    def __init__(self, connect_s: float) -> None:
        super().__init__()
        self._connect_s = connect_s

    def create_connection(self, *arguments: Any, timeout: float, **options: Any) -> Any:
        return super().create_connection(*arguments, timeout=min(timeout, self._connect_s), **options)


class Client:
    """One session. `on_change` is called on the loop's thread; no call comes after LOST."""

    def __init__(self, servers: str, timeout_s: float, on_change: Callable[[Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self._lost = False  # set by kazoo's thread, before it may begin another session
        self._kazoo = KazooClient(
            servers,
            timeout=timeout_s,
            handler=_Handler(timeout_s / CONNECT_PART),
            connection_retry=KazooRetry(
                max_tries=-1, delay=RETRY_FIRST_S, max_delay=min(RETRY_MAX_S, timeout_s / RETRY_PART), backoff=2
            ),
            logger=_quiet,
        )
        self._kazoo.add_listener(self._changed)
        self._timeout_ms = int(timeout_s * 1000)
        self._invoke = self._kazoo._connection._invoke
        self._kazoo._connection._invoke = self._connecting
        self._watches: dict[Callable[[], None], Callable[[Any], None]] = {}  # kazoo tells equal ones apart otherwise

    def start(self) -> None:
        """Begins to connect; `on_change` tells when it has."""
        self._kazoo.start_async()

    @property
    def session(self) -> int:
        """The number of the session; unique for as long as the servers' clocks do not go back."""
        identity = self._kazoo.client_id
        if identity is None:
            raise SessionLost("the session is over")
        return int(identity[0]) & UNSIGNED

    @property
    def timeout_ms(self) -> int:
        """Of the session, as the servers grant it: they have limits of their own. Before that, what was asked for."""
        return self._timeout_ms

    async def stop(self) -> None:
        """Ends the session at once, if a server can be told; frees the threads. May be repeated."""
        self._lost = True
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        with contextlib.suppress(Exception):  # kazoo's own clean-up; there is nobody to tell
            self._kazoo.stop()
        with contextlib.suppress(Exception):
            self._kazoo.close()

    # From kazoo's threads

    def _connecting(self, timeout_s: float, request: Any, xid: int | None = None) -> Any:
        """kazoo's own exchange at the beginning of a connection; it only logs what timeout the servers grant."""
        answer = self._invoke(timeout_s, request, xid)
        if isinstance(request, Connect) and answer[0].time_out > 0:
            self._timeout_ms = answer[0].time_out
        return answer

    def _changed(self, state: str) -> None:
        if self._lost:
            return
        if state == KazooState.LOST:
            self._lost = True
            self._call(self._on_change, Connection.LOST)
        else:
            self._call(self._on_change, Connection.UP if state == KazooState.CONNECTED else Connection.DOWN)

    def _call(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(call, *arguments)

    def _watch(self, call: Callable[[], None]) -> Callable[[Any], None]:
        def fired(_: Any) -> None:
            self._call(call)

        return self._watches.setdefault(call, fired)

    # Requests

    async def _request(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self._lost:
            raise SessionLost("the session is over")
        future: asyncio.Future[Any] = self._loop.create_future()

        def finish(result: Any) -> None:
            if future.done():
                return
            if result.exception is not None:
                future.set_exception(result.exception)
            else:
                future.set_result(result.value)

        method(*arguments, **options).rawlink(lambda result: self._call(finish, result))
        try:
            return await future
        except SessionExpiredError as error:
            raise SessionLost("the session has expired") from error
        except (ConnectionLoss, ConnectionClosedError, OperationTimeoutError, SessionMovedError) as error:
            if self._lost:
                raise SessionLost("the session is over") from error
            raise Unreachable("the connection was lost") from error

    async def create(self, path: str, data: bytes, *, ephemeral: bool = False, sequence: bool = False) -> None:
        """NodeExistsError; with `sequence` the name is completed by the parent's counter."""
        await self._request(self._kazoo.create_async, path, data, ephemeral=ephemeral, sequence=sequence)

    async def ensure(self, path: str) -> None:
        """The path exists afterwards, with all its parents."""
        await self._request(self._kazoo.ensure_path_async, path)

    async def get(self, path: str) -> tuple[bytes, ZnodeStat]:
        """What is in a znode: nothing at all, as others may create it, is b"". NoNodeError."""
        data, stat = await self._request(self._kazoo.get_async, path)
        return data or b"", stat

    async def get_many(self, paths: Sequence[str]) -> list[tuple[bytes, ZnodeStat] | BaseException]:
        """In one round trip; errors in the place of what they concern."""
        return await asyncio.gather(*(self.get(path) for path in paths), return_exceptions=True)

    async def set(self, path: str, data: bytes, version: int = -1) -> int:
        """The transaction that did it. NoNodeError, BadVersionError. Executed only while the session is valid."""
        stat: ZnodeStat = await self._request(self._kazoo.set_async, path, data, version)
        return int(stat.mzxid)

    async def exists(self, path: str, watch: Callable[[], None] | None = None) -> ZnodeStat | None:
        """`watch` is called once: when it comes, changes or goes, or when the connection is lost."""
        return await self._request(self._kazoo.exists_async, path, watch and self._watch(watch))

    async def listing(self, path: str) -> tuple[list[str], ZnodeStat]:
        """Names of the children, and what the znode itself was then. NoNodeError."""
        names, stat = await self._request(self._kazoo.get_children_async, path, None, True)
        return names, stat

    async def children(self, path: str, watch: Callable[[], None] | None = None) -> list[str]:
        """Names, in no order. NoNodeError."""
        names: list[str] = await self._request(self._kazoo.get_children_async, path, watch and self._watch(watch))
        return names

    async def delete(self, path: str) -> None:
        """What is not there is deleted already."""
        with contextlib.suppress(NoNodeError):
            await self._request(self._kazoo.delete_async, path)


async def session_begins(servers: str, timeout_s: float, patience_s: float) -> bool:
    """Whether a quorum of the servers begins a session within `patience_s`; it is ended at once."""
    up = asyncio.Event()
    client = Client(servers, timeout_s, lambda state: up.set() if state is Connection.UP else None)
    try:
        client.start()
        await asyncio.wait_for(up.wait(), patience_s)
        return True
    except TimeoutError:
        return False
    finally:
        await client.stop()


def current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # called from outside any task
        return None


def reason_of(error: Exception) -> str | None:
    """Why a member cannot go on after this error, in words; None for one that should not have come up to it."""
    if isinstance(error, (SessionLost, PeerError)):
        return str(error)
    if isinstance(error, NoNodeError):
        return "what belongs to this member was deleted from ZooKeeper"
    if isinstance(error, KazooException):
        return f"ZooKeeper refused a request: {str(error) or type(error).__name__}"
    return None
