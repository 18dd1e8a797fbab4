"""Manual pages and shell completions are what packaging/make-docs makes of the present options, and they work."""

from __future__ import annotations

import shutil
import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("dog", "sheep", "sheepfs")


def maker() -> ModuleType:
    loader = SourceFileLoader("make_docs", str(ROOT / "packaging" / "make-docs"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_they_are_up_to_date() -> None:
    for path, text in maker().results().items():
        assert path.read_text() == text, f"{path.name} is old: run packaging/make-docs"


@pytest.mark.parametrize("program", PAGES)
def test_pages_are_sound(program: str) -> None:
    page = ROOT / "packaging" / "man" / f"{program}.8"
    if shutil.which("groff") is None:
        assert page.read_text().startswith(".TH")
        return
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", str(page)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    assert program in done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dog v", "vdi vm"),
        ("dog vdi cl", "clone"),
        ("dog cluster snapshot l", "list load"),
        ("dog vdi clone --n", "--no_share"),
        ("dog node list --j", "--json"),
    ],
)
def test_bash_completes(line: str, expected: str) -> None:
    words = line.split(" ")
    script = (
        f"source {ROOT}/packaging/completions/dog.bash; dog() {{ :; }}\n"
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _dog; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (expected, "")
