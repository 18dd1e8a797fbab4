"""Documents name things that exist, and nothing in the tree names a machine or a package registry."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = (".ci", "cluster", "docs", "frontends", "packaging", "src", "tests", "tools")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")
TEST = re.compile(r"tests/[\w/]+\.py(?:::(\w+))?")
# Written in two parts, so that this file does not name them either.
FOREIGN = [a + b for a, b in (("/work", "/main"), ("deb.debian", ".org"), ("pypi", ".org"), ("npmjs", ".org"))]


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def files() -> list[Path]:
    """Every file of the project that is text."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for top in TOPS:
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and not any(part.startswith("__") and part.endswith("cache__") for part in path.parts):
                found.append(path)
    return found


def test_links_lead_somewhere() -> None:
    broken = [
        f"{path.name}: {link}"
        for path in documents()
        for link in LINK.findall(path.read_text())
        if not (path.parent / link).exists()
    ]
    assert len(documents()) > 6
    assert broken == []


def test_named_tests_exist() -> None:
    named = 0
    for path in documents():
        for match in TEST.finditer(path.read_text()):
            file = ROOT / match.group(0).partition("::")[0]
            assert file.exists(), f"{path.name}: {file} does not exist"
            if match.group(1):
                named += 1
                names = [
                    node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
                ]
                assert match.group(1) in names, f"{path.name}: {match.group(0)} does not exist"
    assert named > 3


def test_no_machine_and_no_registry_is_named() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {name}" for name in FOREIGN if name in text]
    assert found == []
