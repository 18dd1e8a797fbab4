"""What the product's source keeps to in size: a module or function that outgrows it is cut by responsibility."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "frontends", "tools")
MODULE_LINES, FUNCTION_LINES = 500, 60


def modules() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    assert len(found) > 100
    return found


def long_functions(text: str) -> list[str]:
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]


def test_modules_and_functions_keep_their_size() -> None:
    texts = {str(path.relative_to(REPOSITORY)): path.read_text() for path in modules()}
    assert [
        f"{name}: {lines} lines" for name, text in texts.items() if (lines := text.count("\n")) > MODULE_LINES
    ] == []
    assert [f"{name}: {function}" for name, text in texts.items() for function in long_functions(text)] == []


def test_a_long_function_is_seen() -> None:
    body = "    pass\n" * FUNCTION_LINES
    assert long_functions(f"def short():\n{body[9:]}") == []
    assert long_functions(f"def long():\n{body}") == ["long (61 lines)"]
