"""`make demo`: the main job on this machine, step by step, with every command as one would type it.

Needs nothing but the installed programs. With root: sheepfs, a filesystem on the volume and a loop mount. Without: what
fusermount3 allows, or only `dog`. Cleans up behind itself; KEEP=1 leaves the cluster running and says how to use it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree

from tests.support import trees
from tests.support.cluster import RUNNING, Cluster
from tests.support.mounts import LoopMount, SheepFs
from tests.support.ports import PortBlock
from tests.support.processes import BIN, run, which

NODES, COPIES, VICTIM = 6, 3, 3
FIRST_PORT = 7000  # what every client takes when it is told nothing else
TREE_BYTES = 32 << 20
BALLAST_BYTES = 192 << 20  # so that healing takes long enough to be watched
CHANGED_BYTES = 8 << 20
SHOWN_LINES = 12
UNMOUNT = "umount" if os.geteuid() == 0 else "fusermount3 -u"
KEEP = os.environ.get("KEEP", "") not in ("", "0")


def say(text: str = "") -> None:
    print(text, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    say(f"\n== {title}")
    start = time.monotonic()
    yield
    say(f"   ({time.monotonic() - start:.1f} s)")


class Demo:
    """One run; each method is one chapter. What it opens goes to `stack`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.stack = stack
        self.cluster = Cluster(NODES, directory, ports=PortBlock(FIRST_PORT))
        stack.callback(self.cluster.close)
        self.sheepfs = os.path.exists("/dev/fuse") and os.access(BIN / "sheepfs", os.X_OK)
        self.sheepfs = self.sheepfs and (os.geteuid() == 0 or which("fusermount3") is not None)
        self.loop = self.sheepfs and os.geteuid() == 0 and os.path.exists("/dev/loop-control")
        self.loop = self.loop and which("mkfs.ext4") is not None
        self.tree: SheepFs | None = None
        self.files: LoopMount | None = None
        self.change: Callable[[], None] = lambda: None
        self.check: Callable[[], None] = lambda: None

    def typed(self, text: str) -> None:
        """Shows a command, with the demo's directory as $D."""
        say(f"   $ {text.replace(str(self.directory), '$D')}")

    def show(self, *command: str | Path) -> None:
        """Runs a command, shows it as one would type it, and its output."""
        words = [str(word) for word in command]
        self.typed(" ".join([Path(words[0]).name, *words[1:]]))
        lines = run(words).stdout.decode().rstrip("\n").splitlines()
        for line in lines[:SHOWN_LINES]:
            say(f"     {line.replace(str(self.directory), '$D')}")
        if len(lines) > SHOWN_LINES:
            say(f"     ... {len(lines) - SHOWN_LINES} more lines")

    def dog(self, *words: str) -> None:
        port = [] if self.cluster.port(0) == FIRST_PORT else ["-p", str(self.cluster.port(0))]
        self.show(BIN / "dog", *words, *port)

    def make(self) -> None:
        with step("Six nodes on this machine, each a failure zone of its own"):
            for node in range(NODES):
                self.show(*self.cluster.command(node))
            seconds = self.cluster.wait_members(NODES, range(NODES))
            say(f"   All six see each other {seconds:.2f} s after the last was started.")
            self.dog("node", "list")
        with step("A cluster that keeps three copies of everything"):
            self.dog("cluster", "format", "-c", str(COPIES))
            self.cluster.wait_status(RUNNING)
            self.dog("cluster", "info")
        with step("A volume of 20 GB, which takes no space until it is written"):
            self.dog("vdi", "create", "-c", str(COPIES), "replica", "20G")
            self.dog("vdi", "list")

    def fill(self) -> None:
        """Puts data on the volume by the best way this machine allows; sets how to `check` and how to `change` it."""
        if self.sheepfs:
            with step("The volume as a file, through sheepfs"):
                self.tree = self.open_sheepfs(0)
        if self.loop:
            with step("A filesystem on it, with real files"):
                self.fill_filesystem()
        else:
            self.fill_bytes()

    def open_sheepfs(self, node: int) -> SheepFs:
        place = self.directory / "dir"
        self.typed(f"sheepfs -p {self.cluster.port(node)} {place}")
        tree = SheepFs(self.cluster, place, node)
        self.stack.callback(tree.close)
        self.typed(f"echo replica > {place}/vdi/mount")
        self.show("ls", "-lh", tree.volume("replica"))
        return tree

    def fill_filesystem(self) -> None:
        assert self.tree is not None
        volume = self.tree.place / "vdi" / "volume" / "replica"
        self.show("mkfs.ext4", "-q", volume)
        self.files = self.mount_files(volume)
        copied = trees.copy_of_python(self.files.place / "tree", TREE_BYTES)
        with open(self.files.place / "tree" / "ballast", "wb") as ballast:
            for part in range(BALLAST_BYTES >> 20):
                ballast.write(trees.pattern(part, 1 << 20))
        run(["sync", "-f", self.files.place])
        sums = trees.sums(self.files.place / "tree")
        megabytes = (copied + BALLAST_BYTES) >> 20
        say(f"   Copied {len(sums)} files, {megabytes} MB: Python's own library and one large file.")
        self.show("df", "-h", self.files.place)

        def check() -> None:
            assert self.files is not None
            run(["sync", "-f", self.files.place])
            Path("/proc/sys/vm/drop_caches").write_text("3")
            assert trees.sums(self.files.place / "tree") == sums, "A FILE HAS CHANGED"
            say(f"   Read again, past the page cache: all {len(sums)} files have the sums they had.")

        def change() -> None:
            assert self.files is not None
            place = self.files.place / "tree" / "later"
            place.write_bytes(trees.pattern(1 << 32, CHANGED_BYTES))
            run(["sync", "-f", place])
            sums.update(trees.sums(self.files.place / "tree"))

        self.check, self.change = check, change

    def mount_files(self, volume: Path) -> LoopMount:
        place = self.directory / "mnt"
        self.typed(f"mount -o loop {volume} {place}")
        files = LoopMount(volume, place)
        self.stack.callback(files.close)
        return files

    def fill_bytes(self) -> None:
        data = bytearray(b"".join(trees.pattern(part, 1 << 20) for part in range(BALLAST_BYTES >> 20)))
        title = "Data on it. (No loop mount without root, so no filesystem: the file itself is written.)"
        if self.tree is None:
            title = "Data on it. (No sheepfs without /dev/fuse and fusermount3: `dog` writes the volume.)"
        with step(title):
            self.write_bytes(0, data)
            say(f"   Wrote {len(data) >> 20} MB.")

        def change() -> None:
            data[:CHANGED_BYTES] = trees.pattern(1 << 32, CHANGED_BYTES)
            self.write_bytes(0, data[:CHANGED_BYTES])

        def check() -> None:
            words = ("vdi", "read", "replica", "0", str(len(data)))
            read = self.cluster.try_dog(*words, node=self.cluster.any_node(), check=True).stdout
            assert read == data, "A BYTE HAS CHANGED"
            say(f"   Read again: all {len(data) >> 20} MB are as they were written.")

        self.check, self.change = check, change

    def write_bytes(self, offset: int, data: bytes | bytearray) -> None:
        if self.tree is None:
            self.typed(f"dog vdi write replica {offset} {len(data)} < data")
            self.cluster.dog("vdi", "write", "replica", str(offset), str(len(data)), stdin=bytes(data))
            return
        with open(self.tree.place / "vdi" / "volume" / "replica", "r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def lose_a_node(self) -> None:
        with step(f"Node {VICTIM} dies (kill -9), the others heal what it held"):
            pids = self.cluster.pids(VICTIM)
            self.typed(f"kill -9 {' '.join(map(str, pids))}")
            self.cluster.kill(VICTIM)
            survivors = [node for node in range(NODES) if node != VICTIM]
            seconds = self.cluster.wait_members(NODES - 1, survivors)
            say(f"   The others noticed after {seconds:.2f} s and serve on, in a new epoch.")
            self.dog("node", "recovery")
            seconds = self.cluster.wait_recovered()
            say(f"   Healed after {seconds:.1f} s: nobody recovers any more, everything has three copies again.")
            self.dog("node", "recovery")
            self.check()

    def take_it_back(self) -> None:
        with step(f"Node {VICTIM} comes back, with the objects it still has on its disk"):
            had = sum(path.stat().st_blocks * 512 for path in self.cluster.objects(VICTIM).values())
            self.change()
            say(f"   Before, while it is away, {CHANGED_BYTES >> 20} MB more are written.")
            self.show(*self.cluster.command(VICTIM))
            self.cluster.wait_members(NODES, range(NODES))
            self.cluster.wait_recovered()
            for pid in self.cluster.pids(VICTIM):
                counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
                written = int(counters["wchar"])
                say(f"   It had {had >> 20} MB of objects, and wrote {written >> 20} MB to be current again.")
            self.dog("cluster", "info")
            self.check()

    def stop_and_start(self) -> None:
        with step("Everything is unmounted, the whole cluster stops and starts in another order"):
            if self.files is not None:
                self.typed(f"umount {self.files.place}")
                self.files.unmount()
                self.show("e2fsck", "-fn", self.files.file)
            if self.tree is not None:
                self.typed(f"echo replica > {self.tree.place}/vdi/unmount")
                self.typed(f"{UNMOUNT} {self.tree.place}")
                self.tree.release("replica")
                self.tree.unmount()
            self.dog("cluster", "shutdown")
            self.cluster.wait_stopped()
            for node in (5, 2, 4, 0, 3, 1):
                self.show(*self.cluster.command(node))
            self.cluster.wait_members(NODES, range(NODES))
            self.cluster.wait_status(RUNNING)
            say("   Running again: all members of the last epoch are back.")
            if self.tree is not None:
                self.tree = self.open_sheepfs(4)
            if self.files is not None:
                self.files = self.mount_files(self.files.file)
            self.check()

    def how_to_go_on(self) -> None:
        port = f" -p {self.cluster.port(0)}" if self.cluster.port(0) != FIRST_PORT else ""
        say("\nThe cluster is left running (KEEP=1). To use it:")
        say(f"   {BIN}/dog vdi list{port}")
        if self.files is not None:
            say(f"   ls {self.files.place}")
        say("To stop it and remove everything:")
        if self.files is not None:
            say(f"   umount {self.files.place}")
        if self.tree is not None:
            say(f"   {UNMOUNT} {self.tree.place}")
        say(f"   {BIN}/dog cluster shutdown{port}")
        say(f"   rm -r {self.directory}")


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="sheepdog-demo-"))
    with ExitStack() as stack:
        stack.callback(rmtree, directory, ignore_errors=True)
        demo = Demo(directory, stack)
        say(f"Sheepdog: {NODES} nodes on this machine, ports from {demo.cluster.port(0)}.")
        say(f"Everything lies in D={directory}")
        if not demo.loop:
            say("(Not all of it here: a filesystem on the volume takes root, /dev/fuse and loop devices.)")
        try:
            for chapter in (demo.make, demo.fill, demo.lose_a_node, demo.take_it_back, demo.stop_and_start):
                chapter()
        except (AssertionError, OSError) as error:
            say(f"\nThe demo failed: {error}\n\n{demo.cluster.logs()}")
            return 1
        say("\nEverything held: no byte was lost, and no step needed a hand.")
        if KEEP:
            demo.how_to_go_on()
            stack.pop_all()
        else:
            say("Stopping the cluster and removing its files.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
