"""What tests do to each other: nothing."""

from __future__ import annotations

from pathlib import Path

from tests.support import needs
from tests.support.mounts import mounted
from tests.support.netns import LET_GO_OF_OTHERS
from tests.support.processes import run


def test_a_machine_of_a_test_keeps_no_filesystem_of_another_one(directory: Path) -> None:
    needs.root()
    needs.program("unshare")
    place = directory / "with a space"
    place.mkdir()
    run(["mount", "-t", "tmpfs", "tmpfs", place])
    try:
        inside = run(["unshare", "--mount", "sh", "-c", f"set -e; {LET_GO_OF_OTHERS} cat /proc/self/mountinfo"])
        assert inside.stdout and str(directory) not in inside.stdout.decode()
        assert mounted(place)
    finally:
        run(["umount", place])
