"""`dog node log level get|set|list`: its results go to stderr, as they always did (cli.md 2.2)."""

from __future__ import annotations

from sheepdog.cluster.client import admin
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import warn

LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
ALIASES = {"error": "err"}
FAILED = 255


def get(context: Context) -> None:
    data = admin.plain(context.gateway(), Opcode.GET_LOGLEVEL, limit=4)
    level = int.from_bytes(data, "little")
    if level >= len(LEVELS):
        raise Failure(f"unknown loglevel: {level}", FAILED)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json({"level": level, "name": LEVELS[level]})
        return
    warn(f"{LEVELS[level]} ({level})")


def list_levels(context: Context) -> None:
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json([{"level": number, "name": name} for number, name in enumerate(LEVELS)])
        return
    for number, name in enumerate(LEVELS):
        warn(f"{name}\t({number})")


def set_level(context: Context) -> None:
    word = context.argument(0)
    name = ALIASES.get(word, word)
    if name not in LEVELS:
        warn(f"invalid loglevel: {word}\navailable loglevels:")
        list_levels(context)
        raise Failure(code=FAILED)
    admin.plain(context.gateway(), Opcode.SET_LOGLEVEL, LEVELS.index(name).to_bytes(4, "little"))
