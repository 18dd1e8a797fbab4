"""Keeping the zookeeper driver's log short: a checkpoint of the roster, and no entries below it that all have read."""

from __future__ import annotations

import contextlib
import json

from sheepdog.cluster.drivers.zookeeper_client import BadVersionError, Client, NodeExistsError, NoNodeError
from sheepdog.cluster.drivers.zookeeper_log import Roster


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
            member, _ = await client.get(f"{base}/members/{name}")
            read_up_to = json.loads(member)["position"]
            if read_up_to is None:  # it is joining, and will begin somewhere below
                return True
            keep = min(keep, read_up_to)
    for name in await client.children(f"{base}/queue"):
        if (int(name.removeprefix("e-")) - keep) % (1 << 32) >= 1 << 31:  # the counter has 32 bits
            await client.delete(f"{base}/queue/{name}")
    return True
