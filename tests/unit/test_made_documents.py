"""Manual pages and shell completions are what packaging/make-docs makes of the present options, and they work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from tests.support import needs

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


DOG = r"""#!/bin/sh
[ "$*" = "vdi list -r" ] || [ "$*" = "vdi list -r -p 7001" ] || exit 1
echo 's web 1 10485760 0 0 1795292679 1ec8c 3 ta g 22'
echo '= web 0 10485760 0 0 1795292679 1ec8d 3  22'
echo '= we\\ b 0 10485760 0 0 1795292679 1ec8e 3  22'
echo '= back\\\\slash 0 10485760 0 0 1795292679 1ec8f 3  22'
echo 'c cost$ 0 10485760 0 0 1795292679 1ec90 3  22'
"""

COMPLETIONS = [
    ("dog v", ["vdi", "vm"]),
    ("dog vdi cl", ["clone"]),
    ("dog cluster snapshot l", ["list", "load"]),
    ("dog vdi clone --n", ["--no_share"]),
    ("dog node list --j", ["--json"]),
    ("dog simulate --no", ["--nodes"]),
    ("dog vdi delete we", ["web", r"we\ b"]),
    (r"dog vdi delete we\ ", [r"we\ b"]),
    ("dog vdi delete -p 7001 b", [r"back\\slash"]),
    ("dog vdi delete -p 7002 b", []),
    ("dog vdi object location c", [r"cost\$"]),
    ("dog vdi object -i 0 location --js", ["--json"]),
    ("dog vdi lock unlock web", ["web"]),
    ("dog vdi clone -s t we", ["web", r"we\ b"]),
    ("dog node md info --al", ["--all"]),
]


def quoted(line: str) -> list[str]:
    """The words of a line as a shell sees them while they are typed: backslashes stay."""
    words, rest = [""], iter(line)
    for letter in rest:
        if letter == " ":
            words.append("")
        else:
            words[-1] += letter + (next(rest) if letter == "\\" else "")
    return words


@pytest.fixture
def with_dog(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds a dog with some volumes."""
    program = tmp_path / "dog"
    program.write_text(DOG)
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb"}


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS)
def test_bash_completes(line: str, expected: list[str], with_dog: dict[str, str]) -> None:
    words = quoted(line)
    script = (
        f"source {ROOT}/packaging/completions/dog.bash\n"
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _dog; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60, env=with_dog)
    assert (sorted(done.stdout.splitlines()), done.stderr) == (sorted(expected) or [""], "")


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS)
def test_zsh_completes(line: str, expected: list[str], with_dog: dict[str, str]) -> None:
    """What is offered; zsh itself takes what fits and quotes it."""
    needs.program("zsh")
    words = [re.sub(r"\\(.)", r"\1", word) for word in quoted(line)]
    script = (
        "compadd() { shift; print -rl -- $@ }; _files() { : }\n"
        f"words=({shlex.join(words)}); CURRENT={len(words)}; PREFIX={shlex.quote(words[-1])}\n"
        f"source {ROOT}/packaging/completions/_dog"
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", script], capture_output=True, text=True, check=True, timeout=60, env=with_dog
    )
    fitting = [offer for offer in done.stdout.splitlines() if words[-1] and offer.startswith(words[-1])]
    wanted = [re.sub(r"\\(.)", r"\1", word) for word in expected]
    assert (sorted(fitting), done.stderr) == (sorted(wanted), "")
