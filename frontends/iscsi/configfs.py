"""Reads LIO's configuration from configfs: plain files, no library, so that looking needs nothing installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sheepdog.frontends.iscsi.model import LUN, Acl, Credentials, Disk, Target, Tree, disk_attributes, volume_of

ROOT = Path("/sys/kernel/config/target")
TPG = "tpgt_1"
_NOTHING = "NULL"  # how the kernel writes and takes an empty user or secret
_SIZE = re.compile(r"\bSize: (\d+)")
_FILE = re.compile(r"File: (\S+)")
_CACHED = re.compile(r"Mode: Buffered")
_TARGET_ATTRIBUTES = (
    "authentication",
    "generate_node_acls",
    "cache_dynamic_acls",
    "demo_mode_write_protect",
    "demo_mode_discovery",
)


def read_tree(host: str, root: Path = ROOT) -> Tree:
    """What this project has made for `host`. Without an iSCSI target in the kernel there is nothing."""
    targets: dict[str, Target] = {}
    foreign = set()
    iscsi = root / "iscsi"
    for place in _directories(iscsi):
        if place.name == "discovery_auth":
            continue
        target = _target(place / TPG)
        if target is not None and volume_of(target.label, host) is not None:
            targets[place.name] = target
        else:
            foreign.add(place.name)
    return Tree(_disks(host, root), targets, _credentials(iscsi / "discovery_auth"), frozenset(foreign))


def disk_directory(label: str, root: Path = ROOT) -> Path | None:
    """Where the kernel shows the backstore with this name."""
    return next(iter(sorted((root / "core").glob(f"fileio_*/{label}"))), None)


def _disks(host: str, root: Path) -> dict[str, Disk]:
    found = {}
    for place in sorted((root / "core").glob("fileio_*/*")):
        if place.is_dir() and volume_of(place.name, host) is not None:
            info = _text(place / "info")
            path, size = _FILE.search(info), _SIZE.search(info)
            found[place.name] = Disk(
                path=path.group(1) if path else "",  # never configured: made anew
                size=int(size.group(1)) if size else 0,
                serial=_text(place / "wwn" / "vpd_unit_serial").partition(":")[2].strip(),
                attributes=_numbers(place / "attrib", disk_attributes(0)),
                cached=_CACHED.search(info) is not None,
            )
    return found


def _target(place: Path) -> Target | None:
    if not place.is_dir():
        return None
    disks = [Path(os.readlink(link)).name for link in (place / "lun" / f"lun_{LUN}").glob("*") if link.is_symlink()]
    return Target(
        label=_text(place / "param" / "TargetAlias"),
        disk=disks[0] if disks else "",
        portals=frozenset(portal.name for portal in _directories(place / "np")),
        acls={acl.name: _acl(acl) for acl in _directories(place / "acls")},
        attributes=_numbers(place / "attrib", _TARGET_ATTRIBUTES),
        enabled=_text(place / "enable") == "1",
    )


def _acl(place: Path) -> Acl:
    unit = place / f"lun_{LUN}"
    mapped = unit.is_dir() and any(link.is_symlink() for link in unit.iterdir())
    read_only = _text(unit / "write_protect") == "1" if mapped else None
    return Acl(_credentials(place / "auth"), read_only)


def _credentials(place: Path) -> Credentials:
    names = ("userid", "password", "userid_mutual", "password_mutual")
    return Credentials(*("" if (value := _text(place / name)) == _NOTHING else value for name in names))


def _numbers(place: Path, names: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    """Attributes that this kernel has; newer ones are missing in older kernels."""
    found = {}
    for name in names:
        text = _text(place / name)
        if text.isdigit():
            found[name] = int(text)
    return found


def _directories(place: Path) -> list[Path]:
    try:
        return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []


def _text(path: Path) -> str:
    """A value; empty if there is none: other programs change the tree while we look."""
    try:
        return path.read_text(errors="replace").strip(" \t\r\n\0")
    except OSError:
        return ""


def sessions(label: str, root: Path = ROOT) -> int:
    """Initiators that are logged in to the target with this mark."""
    count = 0
    for group in root.glob(f"iscsi/*/{TPG}"):
        if _text(group / "param" / "TargetAlias") == label:
            count += sum(_text(acl / "info").startswith("InitiatorName") for acl in _directories(group / "acls"))
    return count
