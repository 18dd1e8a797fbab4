"""`dog cluster health` and `dog node may-stop`: every node is asked what it sees, `core.health` judges."""

from __future__ import annotations

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.health import NodeReport, Reports, costs_of_stopping, findings, level_of
from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import USAGE_ERROR, Failure


def reports(context: Context, nodes: list[Member]) -> Reports:
    """What every node says of itself; None of those that do not answer."""
    found: dict[NodeId, NodeReport | None] = {}
    for node in nodes:
        try:
            found[node.id] = ask(context.node(node.id))
        except (OSError, PeerError, Unreachable):
            found[node.id] = None
    return found


def ask(connection: Connection) -> NodeReport:
    return NodeReport.from_json(admin.node_details(connection))


def health(context: Context) -> int:
    """One word, then every reason in a line; the exit status is the word's."""
    nodes = context.nodes()
    found = findings(nodes, reports(context, nodes))
    level = level_of(found)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        reasons = [{"level": one.level.name, "text": one.text} for one in found]
        print_json({"health": level.name, "nodes": len(nodes), "reasons": reasons})
    else:
        print(level.name)
        for one in found:
            print(f"  {one.text}" if one.level == level else f"  {one.level.name.lower()}: {one.text}")
    return int(level)


def may_stop(context: Context) -> int:
    """Status 0: nothing is lost and everything stays available without the node; 1: not so, and why."""
    nodes = context.nodes()
    word = context.argument(0, "please specify a node id")
    number = int(word) if word.isascii() and word.isdigit() else len(nodes)
    if number >= len(nodes):
        raise Failure(f"Invalid node id '{word}'", USAGE_ERROR)
    target = nodes[number]
    found = reports(context, nodes)
    costs = costs_of_stopping(target, nodes, found)
    mine = found[target.id]
    clients = max(mine.clients - 1, 0) if mine is not None else 0  # one is this command's
    if context.json:
        from sheepdog.tools.dog.records import print_json

        reasons = [{"costs": cost.kind, "text": cost.text} for cost in costs]
        print_json({"node": str(target.id), "may_stop": not costs, "reasons": reasons, "clients": clients})
        return int(bool(costs))
    if costs:
        print(f"No: stopping node {number} ({target.id}) now would cost")
        for cost in costs:
            print(f"  {cost.kind}: {cost.text}")
    else:
        print(f"Yes: node {number} ({target.id}) may stop; the others have everything that it has")
    if clients:
        print(f"  {clients} client connection{'s' if clients > 1 else ''} to it would end")
    return int(bool(costs))
