"""Real files to copy into a volume, and the sums by which they are known again."""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from pathlib import Path


def sums(tree: Path) -> dict[str, str]:
    """SHA-256 of every regular file below `tree`, by its relative name."""
    found: dict[str, str] = {}
    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(tree))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy_of_python(target: Path, limit_bytes: int) -> int:
    """Copies the standard library, a tree that every machine with these tests has, up to a size; bytes copied."""
    source = Path(sysconfig.get_path("stdlib"))
    copied = 0
    for directory, subdirectories, names in os.walk(source):
        subdirectories[:] = sorted(set(subdirectories) - {"__pycache__", "site-packages", "dist-packages"})
        place = target / Path(directory).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_symlink() or not path.is_file():
                continue
            copied += path.stat().st_size
            if copied > limit_bytes:
                return copied
            shutil.copyfile(path, place / name)
    return copied


def pattern(seed: int, length: int) -> bytes:
    """Bytes that repeat nowhere within `length`, the same for the same seed."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(length)
