"""Real file systems with real work on them, on a loop device over sheepfs, while nodes are killed."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.mounts import LoopMount, SheepFs
from tests.support.processes import run

REPOSITORY = Path(__file__).resolve().parents[2]
TRANSACTIONS = 150
PARTS = 16  # of the program that is built
MAKEFILE = """\
program: $(patsubst %.c,%.o,$(wildcard *.c))
\t$(CC) -o $@ $^
"""

CHECKS = {
    "ext4": (["mkfs.ext4", "-q"], [["e2fsck", "-fn"]]),
    "xfs": (["mkfs.xfs", "-q"], [["xfs_repair", "-n"]]),
    "btrfs": (["mkfs.btrfs", "-q"], [["btrfs", "check"]]),
}


class Database:
    """A thread that commits one row after the other; `committed` is what the database has promised to keep."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.committed = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            base = sqlite3.connect(self.file)
            base.execute("create table rows (number integer primary key, text text)")
            for number in range(TRANSACTIONS):
                with base:
                    base.execute("insert into rows values (?, ?)", (number, "x" * (number * 37 % 3000)))
                self.committed = number + 1
            base.close()
        except Exception as error:
            self.error = error

    def end(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the database hangs"
        assert self.error is None, self.error


def database_is_whole(file: Path) -> None:
    base = sqlite3.connect(file)
    assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
    rows = base.execute("select number, length(text) from rows order by number").fetchall()
    assert rows == [(number, number * 37 % 3000) for number in range(TRANSACTIONS)]
    base.close()


def unpack_and_build(place: Path) -> None:
    """This repository's files out of an archive, and a program of many parts."""
    place.mkdir()
    run(["git", "-C", REPOSITORY, "archive", "--prefix=files/", "-o", place / "archive.tar", "HEAD"])
    run(["tar", "-xf", "archive.tar"], cwd=place)
    calls = " + ".join(f"part{number}()" for number in range(PARTS))
    declarations = " ".join(f"int part{number}(void);" for number in range(PARTS))
    for number in range(PARTS):
        (place / f"part{number}.c").write_text(f"int part{number}(void) {{ return {number}; }}\n")
    (place / "main.c").write_text(
        f'#include <stdio.h>\n{declarations}\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (place / "Makefile").write_text(MAKEFILE)
    run(["make", "-s", "-j2"], cwd=place)


def unpacked_and_built(place: Path) -> None:
    run(["tar", "-df", "archive.tar"], cwd=place)  # compares
    assert run([place / "program"]).stdout == b"%d\n" % sum(range(PARTS))


@pytest.mark.parametrize("kind", list(CHECKS))
def test_work_on_a_filesystem_while_nodes_die(
    kind: str, cluster3: Cluster, mount_sheepfs: Callable[..., SheepFs], mount_loop: Callable[..., LoopMount]
) -> None:
    needs.loop_devices()
    make, checks = CHECKS[kind]
    needs.program(make[0], checks[0][0], "git", "tar", "make", "cc")
    cluster3.dog("vdi", "create", "disk", "1G")
    sheepfs = mount_sheepfs(cluster3)
    volume = sheepfs.volume("disk")
    run([*make, volume])
    loop = mount_loop(volume)
    database = Database(loop.place / "database")
    for turn, victim in enumerate((1, 0)):  # the second is the one that sheepfs talks to
        clone = loop.place / f"clone{turn}"
        cluster3.kill(victim)
        run(["git", "clone", "-q", "--no-hardlinks", REPOSITORY, clone])
        run(["git", "-C", clone, "fsck", "--strict", "--no-progress"])
        unpack_and_build(loop.place / f"build{turn}")
        cluster3.start(victim)
        cluster3.wait_members(3)
        cluster3.wait_recovered()
    database.end()
    loop.unmount()
    for check in checks:
        run([*check, volume])

    again = mount_loop(volume)
    database_is_whole(again.place / "database")
    for turn in range(2):
        run(["git", "-C", again.place / f"clone{turn}", "fsck", "--strict", "--no-progress"])
        unpacked_and_built(again.place / f"build{turn}")
    if kind == "btrfs":
        assert b"no errors found" in run(["btrfs", "scrub", "start", "-B", again.place]).stdout
    again.unmount()
