"""Whether the members of a cluster and this node reach each other: asked before one that was expelled joins again.

A member that one of the others cannot talk to is no use to anybody: all wait for what it and that one cannot tell each
other. Once it was expelled for that it stays away for as long as it is so, and the others serve.

One whom nobody answers may be alone because the others are gone: it waits for ALONE_S, and then leaves it to the
membership engine who goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import NodeId, format_address
from sheepdog.cluster.host.link import DIAL_TIMEOUT_S
from sheepdog.cluster.wire.header import HEADER_SIZE, REQUEST, RESPONSE, Request
from sheepdog.cluster.wire.opcodes import Opcode, protocol_version
from sheepdog.cluster.wire.structures import NODE_LIST_SIZE, unpack_nodes

ASKED = 5  # members for the others' names: one would do, and some may have lost the cluster too
ANSWER_S = 2.0  # a member tells the others' names at once; one that has lost the cluster itself does not
ASK_AGAIN_S = 5.0
ALONE_S = 300.0  # several times what the others wait before they expel it once more, if it is its own link that broke


async def until_reached(others: Sequence[NodeId], tell: Callable[[str], None]) -> None:
    """Returns when the members and this node reach each other. `tell` gets a line when whom it waits for changes."""
    loop = asyncio.get_running_loop()
    until, complaint = loop.time() + ALONE_S, ""
    while silent := await unreached(others):
        if len(silent) == len(others) and loop.time() >= until:
            return
        names = ", ".join(map(str, silent))
        if names != complaint:
            complaint = names
            tell(f"not joining again yet: {names} and this node do not reach each other")
        await asyncio.sleep(ASK_AGAIN_S)


async def unreached(others: Sequence[NodeId]) -> list[NodeId]:
    """Those of `others` that do not answer and still are members, as some of the rest say; all, if none answers."""
    answers = await asyncio.gather(*map(_answers, others))
    there = [node for node, answer in zip(others, answers, strict=True) if answer]
    silent = [node for node in others if node not in there]
    if not silent or not there:
        return silent
    lists = await asyncio.gather(*map(_members, there[:ASKED]))
    members = dict.fromkeys(node for found in lists for node in found)
    return [node for node in silent if node in members]


async def _answers(node: NodeId) -> bool:
    """A TCP connection takes packets in both directions, whichever of them are lost."""
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(format_address(node.address), node.port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True


async def _members(node: NodeId) -> list[NodeId]:
    """The members, as this one says; none if it does not."""
    opcode = Opcode.GET_NODE_LIST
    request = Request(protocol_version(opcode), opcode, data_length=NODE_LIST_SIZE)
    with contextlib.suppress(OSError, EOFError, PeerError):
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(format_address(node.address), node.port)
            with contextlib.closing(writer):
                writer.write(REQUEST.pack(request))
                answer = RESPONSE.unpack(await reader.readexactly(HEADER_SIZE))
                size = min(answer.data_length, NODE_LIST_SIZE)
                return [member.id for member in unpack_nodes(await reader.readexactly(size))]
    return []
