"""Command lines as GNU getopt_long reads them, with its messages: permuted, bundled, long options abbreviated.

Not `getopt` of the standard library: its messages differ, it does not name the candidates of an ambiguous
abbreviation, and it looks at all options before the first one can be judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sheepdog.cluster.core.errors import UsageError


class OptionError(UsageError):
    """A malformed option. `missing` is the letter of an option that lacks its argument, else empty."""

    def __init__(self, text: str, missing: str = "") -> None:
        super().__init__(text)
        self.missing = missing


def read(
    program: str,
    arguments: Sequence[str],
    short: str,
    long: Mapping[str, str],
    operands: list[str],
) -> Iterator[tuple[str, str]]:
    """Yields (letter, argument or "") in the order given; what is no option is added to `operands`.

    `short` is as for getopt ("ab:c"), `long` maps names to letters. OptionError when its turn comes.
    """
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            return
        if word.startswith("--"):
            yield _long(program, word[2:], rest, short, long)
        elif word.startswith("-") and word != "-":
            yield from _bundle(program, word[1:], rest, short)
        else:
            operands.append(word)


def _takes_argument(letter: str, short: str) -> bool:
    at = short.index(letter)
    return short[at + 1 : at + 2] == ":"


def _bundle(program: str, letters: str, rest: list[str], short: str) -> Iterator[tuple[str, str]]:
    """One word of short options: flags, and perhaps a last one with the argument behind it or in the next word."""
    for i, letter in enumerate(letters):
        if letter == ":" or letter not in short:
            raise OptionError(f"{program}: invalid option -- '{letter}'")
        if not _takes_argument(letter, short):
            yield letter, ""
            continue
        argument = letters[i + 1 :]
        if not argument and not rest:
            raise OptionError(f"{program}: option requires an argument -- '{letter}'", letter)
        yield letter, argument or rest.pop(0)
        return


def _long(program: str, word: str, rest: list[str], short: str, long: Mapping[str, str]) -> tuple[str, str]:
    name, equals, argument = word.partition("=")
    found = [name] if name in long else [known for known in long if known.startswith(name)]
    if not found:
        raise OptionError(f"{program}: unrecognized option '--{word}'")
    if len({long[candidate] for candidate in found}) > 1:
        candidates = " ".join(f"'--{candidate}'" for candidate in found)
        raise OptionError(f"{program}: option '--{word}' is ambiguous; possibilities: {candidates}")
    name = found[0]
    letter = long[name]
    if not _takes_argument(letter, short):
        if equals:
            raise OptionError(f"{program}: option '--{name}' doesn't allow an argument")
        return letter, ""
    if equals:
        return letter, argument
    if not rest:
        raise OptionError(f"{program}: option '--{name}' requires an argument", letter)
    return letter, rest.pop(0)
