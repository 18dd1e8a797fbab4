"""sheepfs, its sheep and a file system on a volume on one host that has less memory than is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import needs
from tests.support.processes import BIN, CommandFailed, run

GUEST_RUN = Path(__file__).resolve().parents[1] / "support/guest-run"
GUEST_MEMORY = "384M"
WRITTEN_MIB = 450
GUEST_SECONDS = 1500  # the guest's processor is emulated

SCRIPT = """
set -ex
disk=$(ls /dev/vd? | tail -1)
mkfs.ext4 -q $disk
mkdir /run/store /run/dir /run/mnt
mount $disk /run/store
ip link set lo up || true
BIN/sheep /run/store/sheep -j size=64M -c local:/run/membership -z 0 -p 7000
for turn in $(seq 20); do BIN/dog node list -r | grep -q 7000 && break; sleep 1; done
BIN/dog cluster format -c 1
BIN/dog vdi create big 2G
BIN/sheepfs /run/dir
echo big > /run/dir/vdi/mount
mkfs.ext4 -q /run/dir/volume/big
device=$(/usr/sbin/losetup --find --show --direct-io=on /run/dir/volume/big)
mount $device /run/mnt
BIN/python -c '
import hashlib, os
written = hashlib.blake2b()
noise = os.urandom(1 << 20)
with open("/run/mnt/file", "wb") as file:
    for number in range(MIB):
        data = number.to_bytes(8, "big") + noise[8:]
        written.update(data)
        file.write(data)
    file.flush()
    os.fsync(file.fileno())
found = hashlib.blake2b()
with open("/run/mnt/file", "rb") as file:
    while data := file.read(1 << 20):
        found.update(data)
assert found.digest() == written.digest()
'
umount /run/mnt
/usr/sbin/losetup -d $device
sleep 2
e2fsck -fn /run/dir/volume/big
umount /run/dir
echo survived
"""


@pytest.mark.soak
@pytest.mark.timeout(GUEST_SECONDS + 60)
def test_writing_more_than_the_memory_through_a_loop_mount() -> None:
    needs.root()
    needs.program("qemu-system-x86_64", "busybox", "mkfs.ext4")
    script = SCRIPT.replace("BIN", str(BIN)).replace("MIB", str(WRITTEN_MIB))
    command: list[str | Path] = [
        GUEST_RUN,
        "--mem",
        GUEST_MEMORY,
        "--disk",
        "2G",
        "--timeout",
        str(GUEST_SECONDS),
        "--",
        "sh",
        "-c",
        script,
    ]
    done = run(command, check=False, seconds=GUEST_SECONDS + 30)
    if done.returncode == 125:
        pytest.skip(f"no guest on this machine: {done.stderr.decode(errors='replace')[-300:]}")
    if done.returncode:
        raise CommandFailed(done.stderr.decode(errors="replace")[-4000:])
    assert done.stdout.decode().splitlines()[-1] == "survived"
