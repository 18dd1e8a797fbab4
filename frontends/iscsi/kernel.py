"""Whether this kernel can be an iSCSI target, and what to do if not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.iscsi.configfs import ROOT

MODULES = ("configfs", "target_core_mod", "target_core_file", "iscsi_target_mod")
LOAD_SECONDS = 30.0  # a module loads in less than one; a hung modprobe must not hang the command
OTHERWISE = "or use the target in user space: dog iscsi tgt-config NAME"


def prepare(root: Path = ROOT) -> None:
    """The kernel's iSCSI target is loaded and its configuration reachable. UsageError, in one line, if it cannot be."""
    if os.geteuid() != 0:
        raise UsageError("changing the kernel's iSCSI target needs root")
    if importlib.util.find_spec("rtslib_fb") is None:
        raise UsageError("needs the library rtslib-fb: pip install 'pysheepdog[iscsi]'")
    load()
    if not root.parent.is_mount():
        subprocess.run(["mount", "-t", "configfs", "configfs", str(root.parent)], check=False, capture_output=True)
    try:
        (root / "iscsi").mkdir(exist_ok=True)  # as every tool does it: this makes the fabric appear
        # Where the kernel keeps what must outlive a restart; tools expect it.
        Path("/etc/target").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the kernel's iSCSI target cannot be configured at {root}: {error.strerror}") from error


def load(there: Callable[[str], bool] | None = None) -> None:
    """Loads what is not there; UsageError naming the first module that the kernel lacks."""
    there = there or is_there
    for module in MODULES:
        if there(module):
            continue
        program = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is not None:
            try:
                subprocess.run([program, module], check=False, capture_output=True, timeout=LOAD_SECONDS)
            except subprocess.TimeoutExpired:
                raise UsageError(f"modprobe {module} does not end within {LOAD_SECONDS:g} s (see dmesg)") from None
        if not there(module):
            raise UsageError(
                f"this kernel ({os.uname().release}) has no iSCSI target: the module {module} is missing. "
                f"Boot a kernel that has it (Debian: linux-image-amd64, not the cloud kernel), {OTHERWISE}"
            )


def is_there(module: str) -> bool:
    """Loaded or built in."""
    if module == "configfs":
        with open("/proc/filesystems") as known:
            return any(line.split()[-1] == "configfs" for line in known)
    return Path("/sys/module", module).is_dir()
