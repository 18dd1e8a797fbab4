"""docs/json.md: every reading command prints what it says, key by key; and no reading command is left out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster
from tests.support.door import Door, vdi
from tests.support.processes import BIN, run

from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.tools.dog.commands import COMMANDS
from sheepdog.tools.dog.table import JSON, Command

DOCUMENT = Path(__file__).parents[2] / "docs" / "json.md"
OFFLINE = "dog store "
MIB = 1 << 20
MENTIONED = {"vdi graph", "node log level list", "iscsi list", "node recovery info"}  # as another one, or empty


def examples() -> dict[str, Any]:
    """What is printed, by command line."""
    found = re.findall(
        r"^## (dog .*?)\n(?:(?!^## ).)*?```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE
    )
    return {line: json.loads(value) for line, value in found}


def reading(path: list[str], command: Command, inherited: bool = False) -> Iterator[str]:
    takes = inherited or JSON in command.options
    for nested in command.nested:
        yield from reading([*path, nested.name], nested, takes)
    if takes and not command.nested and not command.changes:
        yield " ".join(path)


def differences(example: Any, found: Any, place: str = "") -> list[str]:
    """Where two values have other keys or types. An empty list and null may stand for anything."""
    if example is None or found is None:
        return []
    if isinstance(example, dict) and isinstance(found, dict):
        if example and all(key[0].isdigit() for key in example):  # numbers or addresses are the keys
            [[_, kind], *_] = example.items()
            return [text for key, value in found.items() if value for text in differences(kind, value, f"{place}.*")]
        if example.keys() != found.keys():
            return [f"{place}: {sorted(example.keys() ^ found.keys())}"]
        return [text for key in example for text in differences(example[key], found[key], f"{place}.{key}")]
    if isinstance(example, list) and isinstance(found, list):
        return [text for one in found for text in differences(example[0], one, f"{place}[]")] if example else []
    kinds = {type(example), type(found)}
    return [] if len(kinds) == 1 or kinds == {int, float} else [f"{place}: {found!r} instead of {example!r}"]


@pytest.fixture
def filled(new_cluster: Callable[..., Cluster]) -> Cluster:
    """The cluster that the document speaks of."""
    cluster = new_cluster(3)
    cluster.start(extra={0: ("-w", "size=64M")})
    cluster.wait_members(3)
    cluster.format("-c", "2", "-l")
    cluster.dog("vdi", "create", "web", str(20 * MIB))
    cluster.dog("vdi", "write", "-w", "web", "0", str(5 * MIB), stdin=bytes(range(256)) * (5 * MIB // 256))
    cluster.dog("vdi", "snapshot", "-s", "monday", "web")
    cluster.dog("vdi", "clone", "-s", "monday", "web", "copy")
    cluster.dog("vdi", "write", "-w", "web", "0", "512", stdin=bytes(512))
    cluster.dog("vdi", "setattr", "web", "owner", "alice")
    cluster.dog("cluster", "snapshot", "save", "first", str(cluster.directory / "saved"))
    vid = int(cluster.dog("vdi", "list", "-r", "web").splitlines()[-1].split()[7], 16)
    holder = next(node for node in range(3) if f"80{vid:06x}00000000" in cluster.objects(node))
    shutil.copy(cluster.objects(holder)[f"80{vid:06x}00000000"], cluster.directory / "inode")
    with Door(cluster.port(1)) as door:
        assert door.ask(vdi(Opcode.LOCK_VDI, [b"web", b""])).result == 0
    return cluster


def test_the_document_shows_what_is_printed(filled: Cluster) -> None:
    wrong = []
    every = examples()
    online = {line: value for line, value in every.items() if not line.startswith(OFFLINE)}

    def check(line: str, port: list[str]) -> None:
        words = shlex.split(line.replace("DIR", str(filled.directory)))[1:]
        place = 1 if words[0] == "simulate" else 2
        done = run([BIN / "dog", *words[:place], *port, *words[place:], "--json"], check=False)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            wrong.append(f"{line}: {done.stdout!r} {done.stderr!r}")
        else:
            wrong.extend(f"{line}: {text}" for text in differences(every[line], found))
            if not found and line not in ("dog node recovery",):
                wrong.append(f"{line}: prints nothing that could be compared")

    for line in online:
        check(line, ["-p", str(filled.port(0))])
    for node in filled.running_nodes():
        filled.kill(node, signal.SIGTERM)
    for line in every.keys() - online.keys():
        check(line, [])
    assert not wrong, "\n".join(wrong)


def test_the_document_has_every_command() -> None:
    shown = list(examples())
    commands = [
        path
        for noun, available in COMMANDS.items()
        for command in available
        for path in reading([noun] if command.name == noun else [noun, command.name], command)
    ]
    assert commands
    missing = [path for path in commands if not any(f"{line} ".startswith(f"dog {path} ") for line in shown)]
    assert set(missing) == MENTIONED
    text = DOCUMENT.read_text()
    for path in MENTIONED - {"node recovery info"}:
        assert f"`dog {path} --json`" in text
