"""What a test needs of the machine: one call per need, each ends the test with a plain reason when it is missing.

A skip in CI (CI=true) is a failure: there everything is installed (tests/conftest.py sees to it).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.nbd import SYSTEM_PYTHON
from tests.support.processes import run, which

from sheepdog.cluster.client import channel

QEMU52 = Path(os.environ.get("QEMU52") or Path.home() / ".cache/qemu-5.2-sheepdog")


def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


def program(*names: str) -> None:
    """`names` must be in PATH or in the directories where Debian keeps administrators' programs."""
    for name in names:
        if which(name) is None:
            pytest.skip(f"needs {name}, which is not installed (packaging/install-packages test)")


def libnbd() -> None:
    """Its module for the system's Python."""
    if run([SYSTEM_PYTHON, "-c", "import nbd"], check=False).returncode:
        pytest.skip("needs libnbd's Python module (packaging/install-packages test)")


def fuse() -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    if os.geteuid() != 0:
        program("fusermount3")


def loop_devices() -> None:
    root()
    program("losetup", "mkfs.ext4", "e2fsck")
    if not Path("/dev/loop-control").exists():
        pytest.skip("needs loop devices")


def network_namespaces() -> None:
    root()
    program("unshare", "nsenter", "ip")


def qemu52(tool: str) -> str:
    """The path of one of QEMU 5.2's tools, built with the driver of the native protocol."""
    path = QEMU52 / "bin" / tool
    if not path.exists():
        pytest.skip(f"needs {path} (make qemu52 builds it)")
    return str(path)


def native_exchange() -> None:
    """From here on channels use it."""
    if not channel.use_native():
        pytest.skip("needs the compiled exchange (make compile)")
