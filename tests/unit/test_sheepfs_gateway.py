"""The way of sheepfs to its cluster, when a node holds connections and answers nothing."""

from __future__ import annotations

import asyncio
import errno

import pytest
from tests.support.fake_sheep import FakeSheep
from tests.unit.test_client_roaming import twin_of

from sheepdog.frontends.sheepfs.gateway import GatewayCluster

MIB = 1 << 20
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepdog.frontends.sheepfs.gateway.REPORT_LIMIT_S", 0.3)


def test_another_node_is_asked() -> None:
    async def body(sheep: FakeSheep, twin: FakeSheep) -> None:
        cluster = GatewayCluster(sheep.address)
        await cluster.catalog()  # and learns the nodes
        sheep.delay_s = 60.0
        async with asyncio.timeout(LIMIT_S):
            volume = await cluster.open("v", 0, False)
        assert volume.size == MIB
        await volume.close()

    with FakeSheep() as sheep, FakeSheep() as twin:
        sheep.create("v", MIB, shift=20)
        twin_of(sheep, twin)
        sheep.members = twin.members
        asyncio.run(body(sheep, twin))


def test_without_another_node_it_fails_in_bounded_time() -> None:
    async def body(sheep: FakeSheep) -> None:
        cluster = GatewayCluster(sheep.address)
        sheep.delay_s = 60.0
        for request in (cluster.open("v", 0, False), cluster.catalog(), cluster.space()):
            with pytest.raises(OSError, match="no answer from 127") as caught:
                async with asyncio.timeout(LIMIT_S):
                    await request
            assert caught.value.errno == errno.EIO

    with FakeSheep() as sheep:
        sheep.create("v", MIB, shift=20)
        asyncio.run(body(sheep))
