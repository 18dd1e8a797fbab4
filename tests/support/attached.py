"""A zookeeper driver in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sheepdog.cluster.core.ports import Delivery, Event, Peer, View
from sheepdog.cluster.drivers.zookeeper import ZooKeeperDriver


class Attached:
    """A driver in this process, with what it delivered."""

    def __init__(self, place: str, name: str) -> None:
        self.driver = ZooKeeperDriver(place)
        self.peer = Peer(name.encode(), 0, b"")
        self.events: list[Event] = []

    async def open(self) -> Attached:
        await self.driver.open(self.peer, self.events.append)
        await until(lambda: bool(self.events))
        return self

    def members(self) -> list[bytes]:
        views = [event for event in self.events if isinstance(event, View)]
        return [peer.id for peer in views[-1].members]

    def texts(self) -> list[bytes]:
        return [event.data for event in self.events if isinstance(event, Delivery)]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def said_to_both(a: Attached, b: Attached, number: int) -> None:
    """One of them broadcasts its number, as the message after as many others; both hear it."""
    (a, b)[number % 2].driver.broadcast(b"%d" % number)
    await until(lambda: len(a.texts()) == len(b.texts()) == number + 1)
