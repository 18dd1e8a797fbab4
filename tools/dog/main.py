"""The `dog` command: finds the sub-command in the table of `commands`, parses its options, runs it.

Only what the sub-command needs is imported: `dog node list` has 150 ms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.tools.dog.commands import COMMANDS
from sheepdog.tools.dog.options import TRY_HELP, USAGE_ERROR, Failure, Option, UsageFailure, parse
from sheepdog.tools.dog.standard import OutputLost, give_up_output, prepare
from sheepdog.tools.dog.table import JSON, Command, run_of

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as in cli.md 2.1. Without `arguments` this is the process of the command that was typed."""
    if arguments is None:
        prepare()
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except OutputLost as error:
        give_up_output()
        code = 1 if error.reader_left else _complain(f"dog: cannot write the output: {error}", 2)
    except KeyboardInterrupt:
        code = INTERRUPTED
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("help", "-h", "--help"):
        print(overview(), end="")
        return 0
    if os.environ.get("SHEEPDOG_DOG_LOG") is not None:
        from sheepdog.tools.dog.audit import record

        record(words)
    noun = words[0]
    available = COMMANDS.get(noun)
    if available is None:
        return _complain(f"Invalid command '{noun}'\n{TRY_HELP}", USAGE_ERROR)
    if [command.name for command in available] == [noun]:  # a word that stands alone
        return _run([], available[0], words[1:])
    name = words[1] if len(words) > 1 else ""
    command = next((command for command in available if command.name == name), None)
    if command is None:
        unknown = f"Invalid command '{noun} {name}'\n" if name else ""
        listing = "\n".join(f"  {noun} {command.name}" for command in available)
        return _complain(f"{unknown}Available {noun} commands:\n{listing}", USAGE_ERROR)
    return _run([noun], command, words[2:])


def _run(path: list[str], command: Command, words: list[str]) -> int:
    """Runs a sub-command; `path` is what stands before it."""
    path = [*path, command.name]
    options = command.options
    try:
        values, others = parse(words, options)
    except Failure as failure:
        return _complain(failure.text, failure.code)
    while command.nested and others:
        nested = next((nested for nested in command.nested if nested.name == others[0]), None)
        if nested is None:
            print(usage(path, command, options), end="")
            return 0 if "help" in values else 1
        others.pop(0)
        path.append(nested.name)
        command = nested
    if command.changes:
        options = tuple(option for option in options if option is not JSON)
        if JSON.long in values:
            return _complain(f"dog: unrecognized option '--{JSON.long}'\n{TRY_HELP}", USAGE_ERROR)
    if "help" in values:
        print(usage(path, command, options), end="")
        return 0
    if command.nested and not command.default:
        print(usage(path, command, options), end="")
        return USAGE_ERROR
    started = _clock()
    try:
        code = run_of(command)(values, others)
    except UsageFailure as failure:
        print(usage(path, command, options), end="", flush=True)
        code = _complain(failure.text, failure.code)
    except Failure as failure:
        code = _complain(failure.text, failure.code)
    except (OSError, PeerError, UsageError) as error:
        code = _unexpected(error)
    if "time" in values:
        out = sys.stderr if JSON.long in values else sys.stdout  # JSON is one value
        print(f"\nElapsed time: {_clock() - started:.3f} seconds", file=out)
    return code


def _unexpected(error: Exception) -> int:
    """A failure that the command has no words of its own for."""
    from sheepdog.cluster.client.errors import SheepError
    from sheepdog.tools.dog.output import reason

    if isinstance(error, SheepError):
        return _complain(reason(error), 1)
    return _complain(f"dog: {reason(error)}", 1 if isinstance(error, UsageError) else 2)


def _clock() -> float:
    import time

    return time.monotonic()


def _complain(text: str, code: int) -> int:
    if text:
        sys.stdout.flush()  # what was printed before stays before, also where both go to one place
        print(text, file=sys.stderr)
    return code


def usage(path: Sequence[str], command: Command, options: Sequence[Option]) -> str:
    """The usage text of a command; ends with a newline."""
    parts = ["Usage: dog", *path]
    if len(command.nested) == 1:
        parts.append(command.nested[0].name)
    elif command.nested:
        parts.append("{" + "|".join(nested.name for nested in command.nested) + "}")
    for option in options:
        if option is JSON:
            continue  # newer than the texts that people compare with
        name = f"-{option.letter}" if option.letter else f"--{option.long}"
        parts.append(f"[{name} {option.long}]" if option.value else f"[{name}]")
    if command.arguments:
        parts.append(command.arguments)
    lines = [" ".join(parts)]
    if command.nested:
        lines.append("Available subcommands:")
        lines += [f"  {nested.name:<24}{nested.help}" for nested in command.nested]
    lines.append("Options:")
    for option in options:
        name = f"-{option.letter}, --{option.long}" if option.letter else f"--{option.long}"
        lines.append(f"  {name:<23} {option.help}")
    return "\n".join(lines) + "\n"


def overview() -> str:
    """All commands; ends with a newline."""
    lines = ["Sheepdog administrator utility", "Usage: dog <command> <subcommand> [options]", "", "Available commands:"]
    for noun, available in COMMANDS.items():
        for command in available:
            words = noun if command.name == noun else f"{noun} {command.name}"
            lines.append(f"  {words:<24}{command.help}")
    lines += ["", 'For more information, type "dog <command> <subcommand> --help".']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
