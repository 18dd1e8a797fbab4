"""Who may import whom. The arrows point one way, so that the core can be run, read and tested without the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sheepdog"

# The system, time and chance reach these rooms through ports only.
PURE = ("cluster.core", "cluster.wire")
SYSTEM = frozenset(
    (
        *("asyncio", "os", "socket", "ssl", "time", "random", "threading", "pathlib", "logging"),
        *("select", "selectors", "subprocess", "signal", "multiprocessing", "secrets", "tempfile", "shutil"),
    )
)

CORE, WIRE, CLIENT = "cluster.core", "cluster.wire", "cluster.client"
# Room -> what of this project its modules may import, besides the room itself. The longest matching room counts.
ARROWS: dict[str, tuple[str, ...]] = {
    "cluster.core": (),
    "cluster.wire": (CORE,),
    "cluster.client": (WIRE, CORE),
    "cluster.host": (WIRE, CORE),
    "cluster.drivers": (WIRE, CORE),
    "cluster.sim": (WIRE, CORE),
    "frontends.qemu": (WIRE, CORE),
    "frontends.sheepfs": (CLIENT, WIRE, CORE),
    "frontends.nbd": (CLIENT, WIRE, CORE),
    "frontends.iscsi": (CLIENT, WIRE, CORE),
    "tools": (CLIENT, WIRE, CORE),
}
# The one module that puts the parts together. It is itself imported only inside a function.
COMPOSER, PARTS = "cluster.host.daemon", ("cluster.drivers", "frontends.qemu")
# Module -> what it alone may import besides, inside a function.
LATE: dict[str, tuple[str, ...]] = {
    "cluster.host.main": ("cluster.drivers",),  # which drivers there are, for the command line
    "tools.dog.store": ("cluster.host",),
    "tools.dog.simulate": ("cluster.sim",),
    "tools.dog.nbd": ("frontends.nbd",),
    "tools.dog.iscsi": ("frontends.iscsi",),
}


class Import(NamedTuple):
    line: int
    target: str  # full name of what is imported
    late: bool  # inside a function


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every import of a module. Those for type checking only count too, as late ones."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, late = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, late)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}", late)
        inner = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            stack.extend((child, True) for child in node.body)  # never executed
            stack.extend((child, inner) for child in node.orelse)
        else:
            stack.extend((child, inner) for child in ast.iter_child_nodes(node))


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(module: str) -> str | None:
    return max((room for room in ARROWS if inside(module, room)), key=len, default=None)


def faults(module: str, source: str) -> list[str]:
    """What a module (named without the package's name) imports against the rules, one line each."""
    room = room_of(module)
    found = []
    for line, target, late in imports(ast.parse(source)):
        top, _, rest = target.partition(".")
        if top == "":
            found.append(f"{module}:{line}: relative import")
        elif top == PACKAGE and inside(module, "cluster.core") and not inside(rest, CORE):
            found.append(f"{module}:{line}: {rest}: core imports only itself")
        elif top == PACKAGE and rest.partition(".")[0] in ("cluster", "frontends", "tools"):
            allowed = (room, *ARROWS[room]) if room else ()
            if module == COMPOSER:
                allowed += PARTS
            exceptions = (*LATE.get(module, ()), *((COMPOSER,) if room == "cluster.host" else ()))
            if any(inside(rest, exception) for exception in exceptions):
                if not late:
                    found.append(f"{module}:{line}: {rest}: allowed only inside a function")
            elif not any(inside(rest, arrow) for arrow in allowed):
                found.append(f"{module}:{line}: {rest}: no arrow from {room or module}")
        elif top in ("cluster", "frontends", "tools", "src", "tests"):
            found.append(f"{module}:{line}: {target}: imported under a name that no installation has")
        elif top in SYSTEM and any(inside(module, pure) for pure in PURE):
            found.append(f"{module}:{line}: {target}: the outside world, which {room} reaches through ports only")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the project, named without the package's name."""
    found = []
    for top in ("cluster", "frontends", "tools"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


def test_every_import_follows_an_arrow() -> None:
    found = modules()
    assert len(found) > 20, "the rooms were not found"
    assert [fault for name, path in found for fault in faults(name, path.read_text())] == []


def test_every_module_is_in_a_room() -> None:
    folders = {"cluster", "frontends"}  # they hold rooms, and nothing but an empty __init__
    assert [name for name, _ in modules() if room_of(name) is None and name not in folders] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cluster.core.ring", "import asyncio"),
        ("cluster.core.ring", "from os import path"),
        ("cluster.core.ring", "def f():\n    import time"),
        ("cluster.wire.header", "from pathlib import Path"),
        ("cluster.core.ring", "from sheepdog.cluster.wire import header"),
        ("cluster.core.ring", "from sheepdog.cluster import wire"),
        ("cluster.core.ring", "import sheepdog.cluster.host.loop"),
        ("cluster.wire.header", "from sheepdog.cluster.client.session import Session"),
        ("cluster.client.session", "from sheepdog.cluster.host import links"),
        ("cluster.host.loop", "from sheepdog.cluster.drivers import local"),
        ("cluster.host.loop", "from sheepdog.cluster import client"),
        ("cluster.host.main", "from sheepdog.cluster.drivers import registry"),
        ("cluster.host.main", "from sheepdog.cluster.host import daemon"),
        ("cluster.host.main", "if TYPE_CHECKING:\n    pass\nelse:\n    from sheepdog.cluster.drivers import registry"),
        ("cluster.host.loop", "if TYPE_CHECKING:\n    from sheepdog.cluster.drivers import local"),
        ("cluster.host.daemon", "def f():\n    from sheepdog.cluster.client import session"),
        ("cluster.sim.world", "from sheepdog.cluster.host import disk"),
        ("frontends.qemu.server", "from sheepdog.cluster.client import session"),
        ("frontends.sheepfs.tree", "from sheepdog.frontends.qemu import server"),
        ("frontends.sheepfs.tree", "from sheepdog.tools.dog import output"),
        ("tools.dog.vdi", "def f():\n    from sheepdog.cluster.host import object_store"),
        ("tools.dog.vdi", "def f():\n    from sheepdog.cluster.host import daemon"),
        ("tools.dog.vdi", "from . import output"),
        ("tools.dog.vdi", "from tools.dog import output"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cluster.core.ring", "from sheepdog.cluster.core.ids import ObjectId\nimport struct"),
        ("cluster.wire.header", "from sheepdog.cluster.core import ids"),
        ("cluster.host.daemon", "from sheepdog.frontends.qemu.server import Server"),
        ("cluster.host.main", "def f():\n    from sheepdog.cluster.host import daemon"),
        ("tools.dog.nbd", "if TYPE_CHECKING:\n    from sheepdog.frontends.nbd import endpoints"),
        ("tools.dog.vdi", "from sheepdog.cluster.wire import opcodes\nimport os"),
        ("frontends.sheepfs.tree", "from sheepdog.cluster.client.volume import Volume"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert faults(module, source) == []
