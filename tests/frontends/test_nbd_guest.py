"""Volumes as disks of virtual machines: one boots from a volume, one attaches a volume to its own kernel."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.nbd import NbdServer
from tests.support.processes import BIN, run

GUEST_RUN = Path(__file__).resolve().parents[1] / "support" / "guest-run"
GUEST_MEMORY = "320M"  # a third of it is left when all daemons run
GUEST_SECONDS = 900  # emulated, on a loaded machine; 90 s on a quiet one
BOOTED, FAILED = 0x10, 0x20

# Reads the sector behind itself, writes what it read to the next one, says so on the serial port, and leaves.
BOOT_SECTOR = (
    bytes.fromhex(
        "31c0 8ed8 8ec0 8ed0 bc007c"  # segments and stack
        "b80102 b90200 b600 bb0080 cd13 7223"  # int 13h: read sector 2 to 8000h, or fail
        "b80103 b90300 b600 bb0080 cd13 7214"  # int 13h: write sector 3 from there, or fail
        "be467c ac 84c0 7406 baf803 ee ebf5"  # the message to COM1
        "b010 baf400 ee"  # leave with BOOTED
        "b020 baf400 ee f4 ebfd"  # leave with FAILED
    )
    + b"booted from a volume\r\n\0"
)

IN_GUEST = r"""
set -eu
mkfs.ext4 -q /dev/vda; mkdir -p /srv/n /run/m; mount /dev/vda /srv/n; cd /srv/n
for i in 0 1 2; do sheep /srv/n/s$i -c local:/srv/n/shm -z $i -p 700$i; done
for n in $(seq 200); do [ "$(dog node list -r 2>/dev/null | wc -l)" = 3 ] && break; sleep 0.3; done
dog cluster format >/dev/null; dog vdi create v 1G
dog nbd serve v --socket /run/n.sock --swap &
for n in $(seq 200); do [ -S /run/n.sock ] && break; sleep 0.3; done
eval "$(dog nbd uri v --socket /run/n.sock --json | sed 's/.*"nbd_client": "\([^"]*\)".*/\1/')"
cd /sys/block/nbd0/queue; echo queue $(cat write_cache) fua $(cat fua) block $(cat logical_block_size)
[ "$(cat discard_max_bytes)" != 0 ]
mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /run/m
cp -r /usr/share/doc/bash /usr/share/doc/coreutils /run/m/
(cd /run/m; find . -type f | sort | xargs md5sum) > /run/sums
available=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) >> 10)); heavy=$((available + 8))
timeout 400 dd if=/dev/urandom of=/run/m/heavy bs=1M count=$heavy conv=fsync 2>/dev/null
echo available $available written $heavy
grep oom_kill /proc/vmstat; echo score $(cat /proc/$(pidof nbdkit)/oom_score_adj)
# A new process reads directories over 9p: the guest's kernel wants contiguous memory for each, at once.
used() { echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory; dog vdi list -r v | cut -d' ' -f5; }
full=$(used); [ -n "$full" ]; rm /run/m/heavy; sync; fstrim /run/m; echo freed $((full - $(used)))
umount /run/m; e2fsck -fn /dev/nbd0 >/dev/null 2>&1 && echo clean
mount -o ro /dev/nbd0 /run/m; (cd /run/m; md5sum -c --quiet /run/sums) && echo same; umount /run/m
nbd-client -d /dev/nbd0 >/dev/null; kill %1; wait %1; echo end
"""


@pytest.fixture
def serve(teardown: ExitStack, directory: Path) -> Callable[..., NbdServer]:
    def start(cluster: Cluster, *words: str) -> NbdServer:
        server = NbdServer(cluster, directory, *words)
        teardown.callback(server.close)
        return server

    return start


@pytest.mark.parametrize("way", ("qemu_drive", "qemu_blockdev"))
def test_a_machine_boots_from_a_volume(cluster3: Cluster, serve: Callable[..., NbdServer], way: str) -> None:
    """With the words that `dog nbd uri` prints."""
    needs.program("nbdkit", "qemu-system-x86_64")
    cluster3.dog("vdi", "create", "v", "8M")
    sector = b"what the machine read and wrote".ljust(512, b".")
    image = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + sector
    cluster3.dog("vdi", "write", "v", "0", str(len(image)), stdin=image)
    server = serve(cluster3, "v")
    words = json.loads(cluster3.dog("nbd", "uri", "v", "--socket", str(server.socket), "--json"))
    disk = shlex.split(words[way])
    if way == "qemu_blockdev":
        disk += ["-device", "virtio-blk-pci,drive=disk0"]
    done = run(
        [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-display", "none", "-nodefaults", "-no-reboot",
            "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", *disk,
        ],
        check=False,
    )  # fmt: skip
    assert done.returncode == BOOTED << 1 | 1, (done.stdout, done.stderr)
    assert b"booted from a volume" in done.stdout
    assert cluster3.try_dog("vdi", "read", "v", "1024", "512", node=2, check=True).stdout == sector


@pytest.mark.timeout(GUEST_SECONDS + 60)
def test_the_kernel_uses_a_volume_of_its_own_host() -> None:
    """mkfs, files, fstrim and fsck on /dev/nbd0, and more written than there is memory left, while the sheep that
    store it, on their disk, and the server live in the same small memory: writing back must not wait for itself."""
    needs.root()
    needs.program("nbdkit", "qemu-system-x86_64", "busybox", "nbd-client", "mkfs.ext4", "fstrim")
    if not list(Path("/boot").glob("vmlinuz-*")):
        pytest.skip("needs a kernel in /boot (packaging/install-packages test)")
    done = run(
        [
            GUEST_RUN, "--mem", GUEST_MEMORY, "--disk", "3G", "--timeout", str(GUEST_SECONDS), "--hung-task", "300",
            "--env", f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "--", "/bin/bash", "-c", IN_GUEST,
        ],
        check=False,
        seconds=GUEST_SECONDS + 30,
    )  # fmt: skip
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, output + done.stderr.decode(errors="replace")
    lines = output.splitlines()
    assert "queue write back fua 1 block 4096" in lines, output
    available, written = (int(number) for number in found(r"available (\d+) written (\d+)", output))
    assert written > available > 0, output
    assert {"oom_kill 0", "score -1000"} <= set(lines), output
    (freed,) = (int(number) for number in found(r"freed (\d+)", output))
    assert freed >= (written << 20) * 4 // 5, "fstrim gave no objects back"
    assert lines[-3:] == ["clean", "same", "end"], output


def found(pattern: str, output: str) -> tuple[str, ...]:
    """What the one line of a guest's output says."""
    match = re.search(f"^{pattern}$", output, re.MULTILINE)
    assert match, output
    return match.groups()
