"""libvirt runs a machine whose disk is what `dog nbd uri` has printed for it. No daemon of libvirt's is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from tests.frontends.test_nbd_guest import BOOT_SECTOR
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.nbd import NbdServer
from tests.support.processes import environment, run, wait_until

NOBODY = 65534  # whoever is root needs an account of libvirt's to run machines
SECONDS = 120.0

DOMAIN = """\
<domain type='qemu'>
  <name>machine</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64'>hvm</type><boot dev='hd'/></os>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{serial}'/></serial>
    {disk}
  </devices>
</domain>
"""


@pytest.fixture
def place(directory: Path) -> Path:
    """Where libvirt keeps its state and the machine its output."""
    made = directory / "libvirt"
    (made / "etc").mkdir(parents=True)
    (made / "etc" / "qemu.conf").write_text('stdio_handler = "file"\nsecurity_driver = "none"\n')
    directory.chmod(0o755)
    return made


def domain(place: Path, disk: str) -> Path:
    path = place / "machine.xml"
    path.write_text(DOMAIN.format(serial=escape(str(place / "serial")), disk=disk))
    return path


def stop(machine: subprocess.Popen[bytes]) -> str:
    """Ends it and its libvirt, whatever state it is in; what it has complained of, if it had ended before."""
    running = machine.poll() is None
    machine.send_signal(signal.SIGINT)
    complaint = machine.communicate(timeout=SECONDS)[1].decode()
    return "" if running else complaint


def test_the_disks_are_valid(cluster3: Cluster, place: Path, directory: Path) -> None:
    needs.program("virt-xml-validate", "xmllint")
    for way in (
        ("--socket", "/run/a b&c.sock"),
        ("--listen", "[::1]:10810", "--readonly"),
        ("--listen", "0.0.0.0", "--tls-certificates", str(directory)),
    ):
        cluster3.try_dog("vdi", "create", "web", "8M")
        words = json.loads(cluster3.dog("nbd", "uri", "web", *way, "--json"))
        run(["virt-xml-validate", domain(place, words["libvirt"]), "domain"])


def test_a_machine_of_libvirt_boots_from_a_volume(
    cluster3: Cluster, place: Path, directory: Path, teardown: ExitStack
) -> None:
    needs.root()
    needs.program("virt-qemu-run", "setpriv", "nbdkit", "qemu-system-x86_64")
    cluster3.dog("vdi", "create", "v", "8M")
    sector = b"what the machine read and wrote".ljust(512, b".")
    image = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + sector
    cluster3.dog("vdi", "write", "v", "0", str(len(image)), stdin=image)
    server = NbdServer(cluster3, directory, "v", "--mode", "666")
    teardown.callback(server.close)
    words = json.loads(cluster3.dog("nbd", "uri", "v", "--socket", str(server.socket), "--json"))
    path = domain(place, words["libvirt"])
    for made in (place, place / "etc", path):
        os.chown(made, NOBODY, NOBODY)
    machine = subprocess.Popen(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "virt-qemu-run", "-r", place, path],
        env={**environment(), "HOME": str(place), "XDG_RUNTIME_DIR": str(place)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    teardown.callback(stop, machine)
    serial = place / "serial"
    wait_until(
        lambda: machine.poll() is not None or (serial.exists() and "booted from a volume" in serial.read_text()),
        SECONDS,
        "the machine's word that it has read and written its disk",
    )
    assert stop(machine) == "", "the machine had ended before"
    assert cluster3.try_dog("vdi", "read", "v", "1024", "512", node=2, check=True).stdout == sector
