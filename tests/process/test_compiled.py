"""The compiled hot path: what daemons run where it was built, and never of other sources than the present ones."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sheepdog import compiled
from sheepdog.cluster.core import errors

ROOT = Path(__file__).parents[2]
ASK = "import sheepdog, sheepdog.cluster.core.home as home; print(sheepdog.COMPILED, home.__file__)"


def ask(environment: dict[str, str] | None = None) -> list[str]:
    """Whether a new process takes the compiled modules, and the file of one of them."""
    command = [sys.executable, "-c", ASK]
    return subprocess.run(
        command, env={**os.environ, **(environment or {})}, check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()


@pytest.fixture
def built() -> None:
    if importlib.util.find_spec(compiled.PACKAGE) is None:
        pytest.skip("nothing is compiled here: make compile")


def test_new_processes_take_what_was_compiled_of_these_sources(built: None) -> None:
    sources = importlib.import_module(compiled.PACKAGE).SOURCES
    here = ROOT / "src/sheepdog"
    current = all(compiled.state(str(here / name)) == known for name, known in sources.items())
    taken, file = ask()
    assert taken == str(current)
    assert file.endswith(".so" if current else ".py")


def test_a_sheep_needs_no_library_for_coding(built: None) -> None:
    """On a host without ISA-L and zfec the compiled one ended at its start."""
    script = (
        "import cffi, sys; sys.modules['zfec'] = None; cffi.FFI.dlopen = lambda *_: open('/no/library'); "
        "from sheepdog.cluster.host import coders; "
        "print(coders.best_coder(lambda _, text: print(text, file=sys.stderr)).name, coders.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, file = done.stdout.split()
    assert name == "plain" and file.endswith(".so" if ask()[0] == "True" else ".py")
    assert done.stderr.count("erasure coding without ") == 2


@pytest.mark.skipif("CI" not in os.environ, reason="who changes sources may compile them quickly")
def test_setup_compiles_with_the_counts_of_a_run(built: None) -> None:
    assert compiled.trained()


def test_nothing_on_the_way_of_a_request_is_interpreted(built: None) -> None:
    """Calls that the interpreter sees: of compiled functions none. A module that was split loses what it gave away."""
    if ask()[0] == "False":
        pytest.skip("what is compiled here is of other sources: make compile")
    script = "from tests.sim.test_call_counts import costs; print(*(each for pair in costs() for each in pair))"
    counted = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, compiled.VARIABLE: "1"}, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60,
    ).stdout.split()  # fmt: skip
    assert len(counted) == 6
    assert max(map(float, counted)) < 1


def test_the_environment_asks_for_the_plain_modules(built: None) -> None:
    taken, file = ask({compiled.VARIABLE: "0"})
    assert taken == "False"
    assert file.endswith("home.py")


def test_changed_sources_are_never_hidden_by_what_was_compiled_before(
    tmp_path: Path,
) -> None:
    package = tmp_path / compiled.PACKAGE
    package.mkdir()
    changed = {"cluster/core/home.py": (1, 1)}
    (package / "__init__.py").write_text(f"SOURCES = {changed!r}\nEXTENSIONS = {{'x': 'x.so'}}\n")
    assert ask({"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"})[0] == "False"


def test_the_list_names_existing_modules() -> None:
    assert all((ROOT / path).exists() for path in sources())


def test_errors_of_compiled_modules_override_nothing() -> None:
    """mypyc makes an attribute of each instance of it, which nothing sets in an exception."""
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ClassDef) and issubclass(getattr(errors, base_of(node), object), Exception):
                assert not [line for line in node.body if isinstance(line, ast.Assign)], f"{path}: {node.name}"


def base_of(node: ast.ClassDef) -> str:
    """Name of the first base class."""
    return node.bases[0].id if node.bases and isinstance(node.bases[0], ast.Name) else ""


def sources() -> list[str]:
    """Paths of what is compiled."""
    listed = subprocess.run(
        [sys.executable, ROOT / "packaging/compile", "--sources"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.split()
    assert listed
    return listed


@pytest.mark.parametrize("script", ["compile", "compile-native"])
def test_an_option_that_it_does_not_know_compiles_nothing(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "packaging" / script, "--none"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --none" in done.stderr
