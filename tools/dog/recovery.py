"""`dog node recovery`, its progress and its throttle (cli.md 2.7)."""

from __future__ import annotations

import sys
import time

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.health import NodeReport
from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import (
    RECOVERY_STATE,
    RECOVERY_THROTTLE,
    RecoveryState,
    RecoveryThrottle,
)
from sheepdog.tools.dog import health
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import request_failed, text, warn

POLL_S = 1
_BAR_WIDTH = 40


def _state(connection: Connection) -> RecoveryState:
    return RECOVERY_STATE.unpack(admin.plain(connection, Opcode.STAT_RECOVERY, limit=RECOVERY_STATE.size))


def info(context: Context) -> None:
    """The nodes in recovery; two lines only mean that there is none."""
    if context.json and context.flag("progress"):
        raise UsageFailure("--json shows what is now: it does not go with -P")
    nodes = context.nodes()
    if context.flag("progress"):
        _follow(context.gateway())
        return
    if not context.raw and not context.json:
        print("Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress")
    found: list[tuple[int, Member, RecoveryState]] = []
    waits: dict[int, NodeReport] = {}  # of those found, by number: recovery gives nodes time to come back
    for number, node in enumerate(nodes):
        try:
            state = _state(context.node(node.id))
        except SheepError as error:
            raise Failure(request_failed(error.result)) from error
        except (OSError, Unreachable):
            continue  # a node that has just died is in nobody's recovery
        if state.in_recovery:
            found.append((number, node, state))
            report = health.ask(context.node(node.id))
            if report.recovery_waits_s:
                waits[number] = report
    if context.json:
        from sheepdog.tools.dog.records import node_record, print_json

        print_json(
            [
                node_record(number, node)
                | {"done": state.finished, "total": state.total}
                | ({"waits_s": waits[number].recovery_waits_s, "for": waits[number].away} if number in waits else {})
                for number, node, state in found
            ]
        )
        return
    for number, node, state in found:
        if context.raw:
            print(f"{number} {node.id} {node.vnodes} {node.zone} {state.finished} {state.total}")
        else:
            print(f"{number:4d}   {node.id!s:<20}{node.vnodes:5d}{node.zone:11d}{_share(state):11.1f}%")
    if waits and not context.raw:
        longest = max(waits.values(), key=lambda report: report.recovery_waits_s)
        print(f"Recovery gives {', '.join(longest.away)} {longest.recovery_waits_s} s more to come back")


def _share(state: RecoveryState) -> float:
    return 100 * state.finished / state.total if state.total else 0.0


def _follow(connection: Connection) -> None:
    """Draws a bar on a terminal, one line per second elsewhere, until the addressed node is done."""
    terminal = sys.stdout.isatty()
    shown = False
    while True:
        try:
            state = _state(connection)
        except SheepError as error:
            raise Failure(request_failed(error.result)) from error
        if not state.in_recovery:
            break
        shown = True
        line = f"{_share(state):5.1f}% ({state.finished} / {state.total})"
        if terminal:
            bar = "=" * int(_share(state) * _BAR_WIDTH / 100)
            print(f"\r[{bar:<{_BAR_WIDTH}}] {line}", end="", flush=True)
        else:
            print(line, flush=True)
        time.sleep(POLL_S)
    if shown and terminal:
        print()


def get_throttle(context: Context) -> None:
    context.nodes()
    try:
        data = admin.plain(context.gateway(), Opcode.GET_RECOVERY, limit=RECOVERY_THROTTLE.size)
    except SheepError as error:
        raise Failure(text(error.result)) from error
    found = RECOVERY_THROTTLE.unpack(data)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json({"max": found.max_exec, "interval_ms": found.interval_ms})
        return
    warn(f"max ({found.max_exec}), interval ({found.interval_ms})")


def set_throttle(context: Context) -> None:
    """At most `max` object recoveries per `interval` milliseconds on the addressed node; 0 0: no limit."""
    first = context.argument(0)
    second = context.optional(1)
    most = _number(first, 1 << 32)
    if most is None:
        raise Failure(f"Invalid max ({first})", USAGE_ERROR)
    interval = None if second is None else _number(second, 1 << 63)
    if second is not None and interval is None:
        raise Failure(f"Invalid interval ({second})", USAGE_ERROR)
    if interval is None or bool(most) != bool(interval):
        shown = "(null)" if second is None else second
        raise Failure(f"Invalid interval max ({most}), interval ({shown})", USAGE_ERROR)
    context.nodes()
    payload = RECOVERY_THROTTLE.pack(RecoveryThrottle(most, interval, int(bool(most))))
    try:
        admin.plain(context.gateway(), Opcode.SET_RECOVERY, payload)
    except SheepError as error:
        raise Failure(text(error.result)) from error


def _number(word: str, bound: int) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and int(word) < bound else None
