"""Lists of requests that succeeded: of this epoch and from a member, or they are not obeyed (core.dispatch)."""

from __future__ import annotations

from tests.sim.test_directed import fresh

from sheepdog.cluster.core.ids import NodeId
from sheepdog.cluster.core.messages import Kind, Message


def test_a_success_of_another_epoch_or_of_a_stranger_is_not_obeyed() -> None:
    cluster, _ = fresh(3, 3)
    node = cluster.machines[0].node
    context, dispatch = node.context, node.dispatch
    peer, answered = cluster.machines[1].id, list[int]()
    message = Message(Kind.PING, context.fence)
    context.peers.request(peer, message, lambda answer: answered.append(answer.result))
    dispatch.on_successes(peer, context.fence - 1, [message.rid])
    dispatch.on_successes(peer, context.fence + 1, [message.rid])
    dispatch.on_successes(NodeId(bytes(16), 1), context.fence, [message.rid])
    assert not answered
    dispatch.on_successes(peer, context.fence, [message.rid])
    assert answered == [0]
