"""How commands of `dog` are described, and the options that many of them have.

Nothing here imports the code of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from sheepdog.tools.dog.options import Option

Run = Callable[[dict[str, str], list[str]], int]


class Command(NamedTuple):
    """A sub-command. `run` is `module:function` under tools.dog; the function takes a Context and returns the status.

    A command with `nested` ones runs itself only if it is a `default`. Nested commands share the options of the
    command that holds them, but for --json where such a one `changes` something: it has nothing to print.
    """

    name: str
    options: tuple[Option, ...]
    help: str
    run: str = ""
    arguments: str = ""
    nested: tuple[Command, ...] = ()
    default: bool = False
    changes: bool = False


def run_of(command: Command) -> Run:
    """The function behind a command, imported now, taking parsed options and words."""
    from importlib import import_module

    from sheepdog.tools.dog.context import Context

    module, _, function = command.run.partition(":")
    run = cast("Callable[[Context], int | None]", getattr(import_module(f"sheepdog.tools.dog.{module}"), function))
    return lambda values, words: run(Context(values, words)) or 0


ADDRESS = Option("a", "address", "specify the daemon address (default: 127.0.0.1)", True)
PORT = Option("p", "port", "specify the daemon port (default: 7000)", True)
HELP = Option("h", "help", "display this help and exit")
RAW = Option("r", "raw", "raw output mode: omit headers, separate fields with single spaces and print sizes in bytes")
VERBOSE = Option("v", "verbose", "print more information than default")
TIME = Option("T", "time", "show the elapsed time of the command")
JSON = Option("", "json", "print the result as JSON")

COPIES = Option("c", "copies", "specify the level of redundancy: copies, or data:parity strips", True)
SNAPSHOT = Option("s", "snapshot", "specify a snapshot id or tag name", True)
INDEX = Option("i", "index", "specify the index of data objects", True)
OBJECT = Option("o", "oid", "specify the object id of the tracking object in hex", True)
FORCE = Option("f", "force", "do not prompt for confirmation")
BATCH = Option("B", "batched_reclamation", "specify the number of objects reclaimed in a batch", True)
INTERVAL = Option("I", "interval", "specify the seconds between batches of reclaimed objects", True)
SHIFT = Option("z", "block_size_shift", "specify the shift of the object size: objects of 2^shift bytes", True)
NETWORK = (ADDRESS, PORT)
LAST = (HELP, TIME)
