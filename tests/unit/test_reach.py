"""Who keeps a node from joining again: those that it does not reach, as long as others say that they are members."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.cluster.host import reach
from sheepdog.cluster.wire.header import HEADER_SIZE, NODE_RESPONSE, NodeResponse
from sheepdog.cluster.wire.structures import pack_nodes

LOOPBACK = bytes(12) + socket.inet_aton("127.0.0.1")


def nobody() -> NodeId:
    """Nothing listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return NodeId(LOOPBACK, server.getsockname()[1])


async def member(says: Sequence[NodeId] | None) -> tuple[NodeId, asyncio.Server]:
    """A sheep that tells who the members are; None: it takes connections and tells nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(HEADER_SIZE)
        if request and says is not None:
            nodes = pack_nodes([Member(node, 0, 64, 0) for node in says])
            writer.write(NODE_RESPONSE.pack(NodeResponse(data_length=len(nodes), nr_nodes=len(says))) + nodes)
        else:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return NodeId(LOOPBACK, server.sockets[0].getsockname()[1]), server


def unreached(silent: NodeId | None, *says: Sequence[NodeId] | None) -> list[NodeId]:
    async def body() -> list[NodeId]:
        there = [await member(one) for one in says]
        found = await reach.unreached([*([silent] if silent else []), *(node for node, _ in there)])
        for _, server in there:
            server.close()
        return found

    return asyncio.run(body())


def test_a_member_that_others_know_and_that_does_not_answer() -> None:
    silent = nobody()
    assert unreached(silent, [silent]) == [silent]
    assert unreached(silent, [], [silent]) == [silent], "one of them knows"


def test_one_that_is_no_member_any_more() -> None:
    assert unreached(nobody(), [], []) == []


def test_all_answer_or_nobody_does() -> None:
    assert unreached(None, [], []) == []
    silent = nobody()
    assert unreached(silent) == [silent]
    assert unreached(None) == []


def test_one_whom_nobody_answers_waits_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(reach, "ALONE_S", 0.1)
    told: list[str] = []
    silent = nobody()
    asyncio.run(reach.until_reached([silent], told.append))
    assert told == [f"not joining again yet: {silent} and this node do not reach each other"]


def test_one_that_others_reach_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(reach, "ALONE_S", 0.0)

    async def body() -> None:
        silent = nobody()
        there, server = await member([silent])
        told: list[str] = []
        waiting = asyncio.ensure_future(reach.until_reached([silent, there], told.append))
        await asyncio.sleep(0.2)
        assert told
        assert not waiting.done()
        back = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", silent.port)
        await waiting
        back.close()
        server.close()

    asyncio.run(body())


def test_those_that_answer_have_lost_the_cluster_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ANSWER_S", 0.1)
    assert unreached(nobody(), None) == []
