"""The zookeeper driver's log as a directory of znodes: appending, going over gaps, keeping it short.

What others have put there is left alone. ZooKeeper's counter, not a name, tells how far the log goes: a name far
ahead of it is somebody else's, and is gone over when the log has come so far.
"""

from __future__ import annotations

import contextlib
import json

from sheepdog.cluster.drivers.zookeeper_client import BadVersionError, Client, NodeExistsError, NoNodeError, ZnodeStat
from sheepdog.cluster.drivers.zookeeper_log import Roster, distance

COUNTER_BITS = 31  # of what is told of a znode's counter: it has 32, and comes doubled in a number of 32


async def append(client: Client, base: str, data: bytes) -> None:
    """An entry at the end of the log. Unreachable: it may be there or not."""
    while True:
        try:
            await client.create(f"{base}/queue/e-", data, sequence=True)
            return
        except NodeExistsError:  # somebody else has taken the name that comes next, and would keep it for ever
            with contextlib.suppress(NodeExistsError):
                await client.create(f"{base}/queue/taken", b"")
            await client.delete(f"{base}/queue/taken")  # any creation counts: the name after it is the next one


async def shorten(client: Client, base: str, position: int, data: bytes) -> bool:
    """Moves the checkpoint to `position` (its roster: `data`), then deletes; False: another time. Unreachable."""
    path = f"{base}/checkpoint"
    try:
        old, stat = await client.get(path)
        if Roster.decode(old)[1] < position:
            await client.set(path, data, stat.version)
    except NoNodeError:
        with contextlib.suppress(NodeExistsError):
            await client.create(path, data)
        return False  # the next round finds it
    except BadVersionError:
        return False  # somebody else is at it
    keep = position
    for name in await client.children(f"{base}/members"):
        with contextlib.suppress(NoNodeError):
            member, stat = await client.get(f"{base}/members/{name}")
            if not stat.ephemeralOwner:
                continue  # no session's: somebody else has put it there
            read_up_to = _read_up_to(member)
            if read_up_to is None:  # it is joining, and will begin somewhere below
                return True
            keep = min(keep, read_up_to)
    for name in await client.children(f"{base}/queue"):
        ahead = distance(name, keep)
        if ahead is not None and ahead < 0:
            await client.delete(f"{base}/queue/{name}")
    return True


def _read_up_to(member: bytes) -> int | None:
    """How far the owner of a member's znode has read; None: not known."""
    try:
        position = json.loads(member)["position"]
    except (ValueError, KeyError, TypeError):
        return None
    return position if isinstance(position, int) else None


def _given_out(queue: ZnodeStat, position: int) -> int:
    """How many numbers from `position` on ZooKeeper has given out. It tells `cversion`: 2 * creations - children."""
    created = (queue.cversion + queue.numChildren) % (1 << 32) // 2
    half = 1 << (COUNTER_BITS - 1)
    return int(created - position + half) % (1 << COUNTER_BITS) - half


class Gaps:
    """Numbers that no entry will ever have: whatever is created beside the entries uses one up."""

    def __init__(self, client: Client, base: str) -> None:
        self._client = client
        self._queue = f"{base}/queue"
        self._seen = 0  # transaction of the latest change of the queue after which nothing was ahead

    async def next_after(self, position: int, transaction: int) -> int | None:
        """The position of the next entry if there will never be one at `position`; None: it may still come.

        `transaction` made the entry before. One request, unless something else has changed the queue. NoNodeError.
        """
        stat = await self._client.exists(self._queue)
        if stat is not None and stat.pzxid in (transaction, self._seen):
            return None
        names, stat = await self._client.listing(self._queue)
        limit = _given_out(stat, position)
        steps = (distance(name, position) for name in names)
        ahead = [count for count in steps if count is not None and 0 <= count < limit]
        if not ahead:
            self._seen = stat.pzxid
            return None
        return position + min(ahead) if min(ahead) else None
