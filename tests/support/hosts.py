"""Machines on which a test types what an administrator types: network, processes and directories of their own.

Each is a set of namespaces. What commands write outside their own directories (/etc, /run, /var/lib, /usr/local/bin
and more) is the machine's: nothing of it is seen outside, and all of it ends with the machine. There is no systemd;
tests.support.systemctl stands in its place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.netns import LET_GO_OF_OTHERS, NetworkNamespace
from tests.support.processes import END_SECONDS, environment, run, send_signal

ROOT = Path(__file__).resolve().parents[2]
LIFE_SECONDS = 900  # the machine ends by itself, whatever becomes of the test
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A machine with this much may run beside three others on a small host; the administrator's files say nothing of it.
JAVA = "-Xmx128m -XX:+UseSerialGC -XX:TieredStopAtLevel=1"

_SETUP = """set -e
{let_go}
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind {own}/etc /etc
mount --bind /var/lib/dpkg {own}/lib/dpkg
mount --rbind {own}/lib /var/lib
mount --bind {own}/log /var/log
mount --bind {own}/mnt /mnt
mkdir /run/.upper /run/.work
mount -t overlay -o lowerdir=/usr/local/bin,upperdir=/run/.upper,workdir=/run/.work overlay /usr/local/bin
mount -t tmpfs tmpfs /opt
mkdir /opt/sheepdog
mount --bind {environment} /opt/sheepdog
install {own}/systemctl /usr/local/bin/systemctl
echo ready
sleep {life} &
wait $!
"""


class Host:
    """In a network namespace, with /opt/sheepdog installed and the engines' packages as Debian leaves them."""

    def __init__(self, namespace: NetworkNamespace, directory: Path) -> None:
        """`directory` does not exist yet; it becomes the machine's disk."""
        self.directory = directory
        for name in ("lib/dpkg", "lib/zookeeper", "lib/corosync", "log/zookeeper", "log/corosync", "mnt"):
            (directory / name).mkdir(parents=True)
        run(["cp", "-a", "/etc", directory / "etc"])
        (directory / "lib/zookeeper/myid").symlink_to("/etc/zookeeper/conf/myid")
        script = (ROOT / "tests/support/systemctl.py").read_text()
        (directory / "systemctl").write_text(f"#!{sys.executable}\n{script}")
        (directory / "systemctl").chmod(0o755)
        self._holder = subprocess.Popen(
            [
                *namespace.enter, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
                _SETUP.format(own=directory, environment=Path(sys.prefix), life=LIFE_SECONDS, let_go=LET_GO_OF_OTHERS),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment(),
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self._holder.kill()
            raise AssertionError("no machine could be made of namespaces")
        spaces = f"/proc/{self._holder.pid}/ns"
        # A volume's filesystem must not be unmounted by the death of the sheepfs behind it, the last process in here.
        self._mounts = os.open(f"{spaces}/mnt", os.O_RDONLY)
        self._enter = [
            *("nsenter", f"--net={spaces}/net", f"--mount={spaces}/mnt", f"--pid={spaces}/pid_for_children", "--"),
            *("env", "-i", f"PATH={PATH}", "HOME=/root", "LC_ALL=C", f"JVMFLAGS={JAVA}"),
        ]

    def type(self, line: str, *, check: bool = True, seconds: float = 120.0) -> str:
        """Types a line in a shell, in the source directory; both outputs. CommandFailed on any status but 0."""
        done = run([*self._enter, "sh", "-c", f"cd {ROOT}; {line}"], check=check, seconds=seconds)
        return (done.stdout + done.stderr).decode(errors="replace")

    def read(self, path: str) -> str:
        return self.type(f"cat {path}")

    def write(self, path: str, text: str) -> None:
        run([*self._enter, "sh", "-c", f"cat > {path}"], stdin=text.encode())

    def power_off(self) -> None:
        """Everything on it ends at once, without a word; nothing happens to one that is off."""
        if self._holder.poll() is not None:
            return
        pid = self._holder.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            send_signal(int(child), signal.SIGKILL)  # process 1 of the machine: returns when all others have ended
        self._holder.wait(END_SECONDS)
        os.close(self._mounts)
