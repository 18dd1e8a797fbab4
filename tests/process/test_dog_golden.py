"""Transcripts: what `dog` says to the letter against a real cluster, and `sheepfs` without one.

`REWRITE=1` writes what they say now.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.cluster import Cluster, started
from tests.support.processes import BIN, run

GOLDEN = Path(__file__).parent / "golden"
MASKS = (
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "YYYY-MM-DD HH:MM:SS"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d", "YYYY-MM-DD HH:MM"),
    (r"\b[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}", "CTIME"),
    (r"\b1[6-9]\d{8}\b", "TIME"),
    (r"\d+\.\d{3} seconds", "N.NNN seconds"),
    (r"(?m)\b[0-9a-f]{16}(?=( \*)?$)", "HASH"),
)


PORTLESS = re.compile(r"--port|^dog upgrade|^dog (trace|nfs|help|vm$)")


class Step(NamedTuple):
    """One command of a transcript."""

    stdin: str
    command: str
    output: list[str]


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    stdin = ""
    for line in text.splitlines():
        if line.startswith("#") or (not line and not found):
            continue
        if line.startswith("0> "):
            stdin += line[3:] + "\n"
        elif line.startswith("$ "):
            found.append(Step(stdin, line[2:], []))
            stdin = ""
        else:
            found[-1].output.append(line)
    return found


def said(cluster: Cluster | None, directory: Path, step: Step) -> list[str]:
    """Output of a command in the form of a transcript."""
    program, *words = shlex.split(step.command.replace("DIR", str(directory)))
    if cluster is not None and len(words) > 1 and not PORTLESS.search(step.command):
        words[2:2] = ["-p", str(cluster.port(0))]
    done = run([BIN / program, *words], stdin=step.stdin.encode(), check=False)
    out = mask(cluster, directory, done.stdout.decode())
    if out.startswith("Usage: dog "):
        out = "USAGE " + re.split(r" [\[<{]", out.removeprefix("Usage: "))[0] + "\n"
    lines = out.splitlines() + [f"2> {line}" for line in mask(cluster, directory, done.stderr.decode()).splitlines()]
    return lines + ([f"[rc={done.returncode}]"] if done.returncode else [])


def mask(cluster: Cluster | None, directory: Path, text: str) -> str:
    if cluster is not None:
        for node in range(cluster.count):
            text = text.replace(f":{cluster.port(node)}", f":{7000 + node}")
    text = text.replace(str(directory), "DIR")
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return text


def matches(expected: list[str], found: list[str]) -> bool:
    """`...` stands for any lines."""
    if "..." in expected:
        place = expected.index("...")
        tail = expected[place + 1 :]
        return found[:place] == expected[:place] and found[len(found) - len(tail) :] == tail
    return expected == found


@pytest.mark.parametrize("name", ["dog.txt", "dog_beside.txt"])
def test_dog_says_what_it_always_said(name: str, new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3))
    compare(GOLDEN / name, cluster, cluster.directory)


def test_sheepfs_says_what_it_always_said(tmp_path: Path) -> None:
    compare(GOLDEN / "sheepfs.txt", None, tmp_path)


def compare(golden: Path, cluster: Cluster | None, directory: Path) -> None:
    """Types every command of a transcript."""
    text = golden.read_text()
    wrong, lines = [], [line for line in text.splitlines() if line.startswith("#")] + [""]
    for step in steps(text):
        found = said(cluster, directory, step)
        good = matches(step.output, found)
        if not good:
            expected = "\n".join(step.output)
            wrong.append(f"$ {step.command}\nexpected:\n{expected}\nsaid:\n" + "\n".join(found))
        lines += [f"0> {line}" for line in step.stdin.splitlines()]
        lines += [f"$ {step.command}", *(step.output if good else found)]
    if os.environ.get("REWRITE"):
        golden.write_text("\n".join(lines) + "\n")
    assert not wrong, "\n\n".join(wrong)
