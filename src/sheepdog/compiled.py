"""The hot path compiled: which of two bodies of the same modules a process runs.

`packaging/compile` makes extension modules of the modules that every request passes (mypyc, from the same sources) and
puts them beside the installed packages as `sheepdog_compiled`, with the state of the sources they were made from. When
these sources have changed since, or nothing was compiled, the plain modules run: they do the same, only slower.
`SHEEPDOG_COMPILED=0` in the environment asks for the plain ones.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec

PACKAGE = "sheepdog_compiled"
VARIABLE = "SHEEPDOG_COMPILED"


def state(path: str) -> tuple[int, int]:
    """What changes when somebody edits a source: its size and time of change."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class Finder:
    """Finds the compiled modules before the plain ones (`importlib.abc.MetaPathFinder`, which takes long to import)."""

    def __init__(self, files: dict[str, str]) -> None:
        """`files`: paths of the extensions by module name."""
        self.files = files

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = self.files.get(fullname)
        if file is None:
            return None
        spec = ModuleSpec(fullname, ExtensionFileLoader(fullname, file), origin=file)
        spec.has_location = True
        return spec


def trained() -> bool:
    """Whether what this process may take was compiled with the counts of a run (packaging/compile)."""
    try:
        import sheepdog_compiled as found  # PACKAGE
    except ImportError:
        return False
    return bool(getattr(found, "TRAINED", False))  # not in what an earlier version compiled


def enable() -> bool:
    """Makes imports from here on take the compiled modules; False (and nothing done) when there are none to take."""
    if os.environ.get(VARIABLE) == "0":
        return False
    try:
        import sheepdog_compiled as found  # PACKAGE

        here, beside = os.path.dirname(__file__), os.path.dirname(str(found.__file__))
        if any(state(os.path.join(here, name)) != tuple(known) for name, known in found.SOURCES.items()):
            return False
        files = {module: os.path.join(beside, name) for module, name in found.EXTENSIONS.items()}
    except (ImportError, OSError, AttributeError):
        return False
    sys.meta_path.insert(0, Finder(files))
    return True
