"""Keeping the zookeeper driver's log short, and going over gaps in it. What others have put beside it is left alone."""

from __future__ import annotations

import contextlib
import json

from sheepdog.cluster.drivers.zookeeper_client import BadVersionError, Client, NodeExistsError, NoNodeError
from sheepdog.cluster.drivers.zookeeper_log import Roster, distance


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
        ahead = [steps for steps in (distance(name, position) for name in names) if steps is not None and steps >= 0]
        if not ahead:
            self._seen = stat.pzxid
            return None
        return position + min(ahead) if min(ahead) else None
