"""Options of a command line as GNU getopt_long takes them: permutation, clusters, abbreviations, its error texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

USAGE_ERROR = 64
TRY_HELP = "Try 'dog --help' for more information."


class Option(NamedTuple):
    """One option. `value`: it takes one, and its long name is the placeholder in usage lines. `letter` may be empty."""

    letter: str
    long: str
    help: str
    value: bool = False


class Failure(Exception):
    """Ends the command: the text goes to stderr, the code is the exit status."""

    def __init__(self, text: str = "", code: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class UsageFailure(Failure):
    """A wrong command line: usage on stdout, the text on stderr."""

    def __init__(self, text: str = "", code: int = USAGE_ERROR) -> None:
        super().__init__(text, code)


def parse(words: Sequence[str], options: Sequence[Option]) -> tuple[dict[str, str], list[str]]:
    """(values by long name, "" for flags; the other words). Repeated options: the last. Failure for a wrong one."""
    values: dict[str, str] = {}
    others: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            others.extend(words[position:])
            break
        if word.startswith("--"):
            name, equals, attached = word[2:].partition("=")
            option = _long(name, options)
            if option.value and not equals:
                if position == len(words):
                    raise _wrong(f"option '--{option.long}' requires an argument")
                attached = words[position]
                position += 1
            elif equals and not option.value:
                raise _wrong(f"option '--{option.long}' doesn't allow an argument")
            values[option.long] = attached
        elif word.startswith("-") and word != "-":
            position = _cluster(word[1:], words, position, options, values)
        else:
            others.append(word)
    return values, others


def _cluster(
    letters: str, words: Sequence[str], position: int, options: Sequence[Option], values: dict[str, str]
) -> int:
    """Takes `-abcVALUE`; returns where the next word is."""
    for place, letter in enumerate(letters, 1):
        option = next((option for option in options if option.letter == letter), None)
        if option is None:
            raise _wrong(f"invalid option -- '{letter}'")
        if not option.value:
            values[option.long] = ""
            continue
        if letters[place:]:
            values[option.long] = letters[place:]
            return position
        if position == len(words):
            raise _wrong(f"option requires an argument -- '{letter}'")
        values[option.long] = words[position]
        return position + 1
    return position


def _long(name: str, options: Sequence[Option]) -> Option:
    """The option of this name, or the only one that begins with it."""
    found = [option for option in options if option.long == name] or [
        option for option in options if option.long.startswith(name)
    ]
    if not found:
        raise _wrong(f"unrecognized option '--{name}'")
    if len(found) > 1:
        possible = " ".join(f"'--{option.long}'" for option in found)
        raise _wrong(f"option '--{name}' is ambiguous; possibilities: {possible}")
    return found[0]


def _wrong(text: str) -> Failure:
    return Failure(f"dog: {text}\n{TRY_HELP}", USAGE_ERROR)
