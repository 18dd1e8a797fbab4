"""What a request leaves behind is freed at once: the daemon's garbage collector runs once in five seconds under load.

A function nested in another that names itself, directly or by way of its neighbours, is a cycle that holds everything
the outer one knew: the bytes of a write, say. In compiled modules one neighbour naming another is enough, because there
they share one environment; so is one that nests a function itself, or that names a function of a module which the outer
one names as well: mypyc takes that for a neighbour. Such functions are methods, or `partial`s of them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/sheepdog"
SLOW = {  # once for an epoch, a checkpoint, an operation on a VDI, a plug, a repair by order: nothing piles up
    ("cluster/core/cache_volumes.py", "let_go"),
    ("cluster/core/node.py", "_record"),
    ("cluster/core/operations.py", "_once_loaded"),
    ("cluster/core/repair_order.py", "_bounded"),
    ("cluster/host/checkpoint.py", "_settle_all"),
    ("cluster/host/disk_control.py", "plug"),
    ("cluster/core/home_requests.py", "done_before"),  # a write cut by the end of an epoch
    ("cluster/core/recovery.py", "_learn"),
    ("cluster/host/object_store.py", "close"),
    ("cluster/core/strip_home.py", "_read_decoded"),  # of a degraded one
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def names_in(tree: ast.AST, wanted: set[str]) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in wanted}


def nested_in(outer: ast.AST) -> Iterator[Function | ast.Lambda]:
    """Functions whose definitions are right in this one's body."""
    for node in ast.iter_child_nodes(outer):
        if isinstance(node, (Function, ast.Lambda)):
            yield node
        else:
            yield from nested_in(node)


def functions_of(module: ast.Module) -> set[str]:
    """Names of functions that the module defines or imports; those of classes and constants have capitals."""
    found = {node.name for node in module.body if isinstance(node, Function)}
    imports = (name for node in ast.walk(module) if isinstance(node, ast.ImportFrom) for name in node.names)
    return found | {name.asname or name.name for name in imports if name.name.strip("_")[:1].islower()}


def without_nested(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (Function, ast.Lambda)):
            yield node
            yield from without_nested(node)


def has_cycle(outer: Function, compiled: bool, functions: set[str]) -> bool:
    nested = {node.name: node for node in ast.walk(outer) if isinstance(node, Function) and node is not outer}
    named = {name: names_in(node, set(nested)) for name, node in nested.items()}
    if compiled:
        direct = {node.name for node in nested_in(outer) if isinstance(node, Function)}
        if not direct:
            return False
        own = {name for node in without_nested(outer) for name in ([node.id] if isinstance(node, ast.Name) else [])}
        direct |= own & functions
        return any(names_in(node, direct) for node in nested_in(outer)) or any(
            any(nested_in(node)) for node in nested_in(outer) if isinstance(node, Function)
        )
    for name in named:
        reached: set[str] = set()
        ahead = [name]
        while ahead:
            new = named[ahead.pop()] - reached
            reached |= new
            ahead += new
        if name in reached:
            return True
    return False


def cycles(path: Path, compiled: bool) -> Iterator[str]:
    module = ast.parse(path.read_text())
    functions = functions_of(module)
    for node in ast.walk(module):
        if isinstance(node, Function) and has_cycle(node, compiled, functions):
            yield node.name


def test_no_request_leaves_a_cycle() -> None:
    command = [sys.executable, str(SOURCE.parents[1] / "packaging/compile"), "--sources"]
    compiled = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    compiled = [name.removeprefix("src/sheepdog/") for name in compiled]
    plain = [
        str(path.relative_to(SOURCE)) for room in ("core", "host") for path in (SOURCE / "cluster" / room).glob("*.py")
    ]
    names = dict.fromkeys(compiled + plain)
    found = {(name, function) for name in names for function in cycles(SOURCE / name, name in compiled)}
    assert found == SLOW
