"""`dog node scrub`: every block that nodes hold is read from their disks, and repaired where it is bad."""

from __future__ import annotations

import json
from typing import Any

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import USAGE_ERROR, Failure
from sheepdog.tools.dog.output import minute, text, warn

STATUS_SIZE = 1 << 20  # a thousand objects with lost blocks are named
LOST = 1
_MIB = 1 << 20


def start(context: Context) -> int:
    """Begins a pass."""
    return _change(context, {"do": "start"})


def stop(context: Context) -> int:
    """Stops it for now."""
    return _change(context, {"do": "stop"})


def schedule(context: Context) -> int:
    """Hours from pass to pass, MB per second."""
    asked: dict[str, Any] = {"do": "schedule", "hours": _number(context.argument(0, "please specify the hours"))}
    rate = context.optional(1)
    if rate is not None:
        asked["rate"] = _number(rate) * _MIB
    return _change(context, asked)


def _number(word: str) -> int:
    if word.isascii() and word.isdigit():
        return int(word)
    raise Failure(f"Invalid number '{word}'", USAGE_ERROR)


def _places(context: Context) -> list[tuple[str, Connection]]:
    """The addressed node, or all that can be reached and hold objects."""
    if not context.flag("all"):
        return [(f"{context.host}:{context.port}", context.gateway())]
    found = []
    for node in context.nodes():
        if node.vnodes:
            try:
                found.append((str(node.id), context.node(node.id)))
            except (OSError, Unreachable):
                warn(f"{node.id} cannot be reached")
    return found


def _change(context: Context, asked: dict[str, Any]) -> int:
    for name, connection in _places(context):
        try:
            admin.plain(connection, Opcode.SCRUB, json.dumps(asked).encode())
        except SheepError as error:
            code = USAGE_ERROR if error.result == Result.INVALID_PARMS else 1
            raise Failure(f"{name}: {text(error.result)}", code) from error
    return 0


def status(context: Context) -> int:
    """How far each is; status 1 if blocks are lost."""
    found = []
    for name, connection in _places(context):
        try:
            answer = admin.plain(connection, Opcode.SCRUB_STATUS, limit=STATUS_SIZE)
        except SheepError as error:
            raise Failure(f"{name}: {text(error.result)}") from error
        found.append({"node": name, **json.loads(bytes(answer))})
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(found)
    else:
        if not context.raw:
            print("Node\tState\tDone\tBad\tRepaired\tLost\tLast end\tEvery")
        for one in found:
            _print(one)
    return LOST if any(one["lost"] for one in found) else 0


def _print(one: dict[str, Any]) -> None:
    total = one["total"]
    done = 100 if not total else 100 * (total - one["left"]) // total
    lost = sum(len(lost[1]) for lost in one["lost"])
    ended = minute(one["ended"]) if one["passes"] else "-"
    every = f"{one['hours']} h" if one["hours"] else "-"
    print(one["node"], one["state"], f"{done}%", one["found"], one["repaired"], lost, ended, every, sep="\t")
    for name, blocks, *place in one["lost"]:
        print(
            f"  object {name}{''.join(f' in {path}' for path in place)}: blocks {', '.join(map(str, blocks))} are lost"
        )
    if one.get("misfits"):
        print(f"  {one['misfits']} strips did not fit the others of their object and were made anew")
    rot = one["rot"]
    if rot["found"]:
        print(f"  since it was started: {rot['found']} bad, {rot['repaired']} right again, {rot['bad']} still bad")
