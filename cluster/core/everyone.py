"""Asks all members of the epoch for the same thing, and again those of a new epoch, until all have answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, ObjectId
from sheepdog.cluster.core.messages import Buffer, Kind, Message

AllDone = Callable[[int, dict[NodeId, Buffer]], None]
Local = Callable[[Callable[[int, Buffer], None]], None]


class _Question:
    __slots__ = ("answers", "body", "done", "fence", "kind", "local", "oid", "result", "waiting")

    def __init__(self, kind: Kind, oid: ObjectId, body: Buffer, local: Local, done: AllDone) -> None:
        self.kind = kind
        self.oid = oid
        self.body = body
        self.local = local
        self.done = done
        self.fence = 0
        self.waiting: dict[NodeId, None] = {}
        self.answers: dict[NodeId, Buffer] = {}
        self.result = int(Result.SUCCESS)


class Everyone:
    """Questions that are not answered by all yet."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[_Question, None] = {}

    def ask(self, kind: Kind, oid: ObjectId, body: Buffer, local: Local, done: AllDone) -> None:
        """`local` does it on this node; `done` gets the first error (or SUCCESS) and the answers by node."""
        question = _Question(kind, oid, body, local, done)
        self._open[question] = None
        self._send(question)

    def begin(self) -> None:
        """A new epoch: members that joined are asked too, those that left do not count."""
        for question in list(self._open):
            self._send(question)

    def _send(self, question: _Question) -> None:
        context = self._context
        question.fence = context.fence
        question.result = Result.SUCCESS
        question.answers = {}
        question.waiting = dict.fromkeys(context.placement.nodes)
        for node in list(question.waiting):
            answered = self._answered(question, node)
            if node == context.me:
                question.local(answered)
            else:
                message = Message(question.kind, context.fence, oid=question.oid, body=question.body)
                context.peers.request(node, message, partial(_told, answered))

    def _answered(self, question: _Question, node: NodeId) -> Callable[[int, Buffer], None]:
        fence = question.fence

        def answered(result: int, body: Buffer) -> None:
            if question.fence != fence or question not in self._open:
                return
            question.waiting.pop(node, None)
            question.answers[node] = body
            if result and not question.result:
                question.result = result
            if not question.waiting:
                del self._open[question]
                question.done(question.result, question.answers)

        return answered


def _told(answered: Callable[[int, Buffer], None], message: Message) -> None:
    answered(message.result, message.payload())
