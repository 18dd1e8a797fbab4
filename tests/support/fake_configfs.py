"""A directory that behaves like configfs with LIO in it, as far as rtslib-fb and this project use it.

Making a directory makes the kernel's files in it, removing one that is in use is refused, settings are
checked when they are written. Only calls of pathlib and os.symlink are followed: both sides use nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

AUTH = dict.fromkeys(("userid", "password", "userid_mutual", "password_mutual"), "")
DISK_ATTRIBUTES = {
    "emulate_write_cache": "0", "emulate_fua_write": "1", "emulate_tpu": "0", "emulate_tpws": "0", "emulate_caw": "1",
    "emulate_3pc": "1", "is_nonrot": "0", "unmap_zeroes_data": "0", "max_unmap_lba_count": "8192",
    "max_write_same_len": "4096", "unmap_granularity": "1", "block_size": "512",
}  # fmt: skip  # emulate_pr is newer
GROUP_ATTRIBUTES = {
    "authentication": "-1", "generate_node_acls": "0", "cache_dynamic_acls": "0", "demo_mode_write_protect": "1",
    "demo_mode_discovery": "1",
}  # fmt: skip
EXPORTED_FIRST = ("unmap_zeroes_data", "block_size")  # cannot be changed under a logical unit


class FakeConfigfs:
    """The tree below `root`. `writes` lists everything that was changed."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import rtslib_fb.root
        import rtslib_fb.tcm

        self.root = root
        self.writes: list[str] = []
        self.refuse = ""  # a change of anything with this in its name fails
        self._made: set[Path] = set()  # by users, not by the kernel
        for place in ("core", "iscsi/discovery_auth"):
            (root / place).mkdir(parents=True)
        for name, value in {**AUTH, "enforce_discovery_auth": "0", "authenticate_target": "0"}.items():
            (root / "iscsi/discovery_auth" / name).write_text(f"{value}\n")
        self._patch(monkeypatch, Path, "mkdir", self._mkdir)
        self._patch(monkeypatch, Path, "rmdir", self._rmdir)
        self._patch(monkeypatch, Path, "write_text", self._write)
        self._patch(monkeypatch, os, "symlink", self._symlink)
        monkeypatch.setattr(rtslib_fb.root, "mount_configfs", lambda: None)
        monkeypatch.setattr(rtslib_fb.tcm, "lock_file", str(root.parent / "rtslib.lock"))
        rtslib_fb.tcm.bs_cache.clear()

    def _patch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def call(path: Any, *arguments: Any, **settings: Any) -> Any:
            place = Path(arguments[0]) if name == "symlink" else Path(path)
            if not place.is_relative_to(self.root):
                return real(path, *arguments, **settings)
            return ours(real, path, *arguments)

        monkeypatch.setattr(owner, name, call)

    def _change(self, what: str, place: Path) -> None:
        if self.refuse and self.refuse in str(place):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(place))
        self.writes.append(f"{what} {place.relative_to(self.root)}")

    def _mkdir(self, real: Callable[..., None], place: Path, *_: Any) -> None:
        self._change("mkdir", place)
        real(place)
        self._made.add(place)
        relative = str(place.relative_to(self.root))
        for pattern, directories, files in _CONTENT:
            if re.fullmatch(pattern, relative):
                for directory in directories:
                    os.makedirs(place / directory)
                for name, value in files.items():
                    with open(place / name, "w") as file:
                        file.write(f"{value}\n")

    def _rmdir(self, real: Callable[..., None], place: Path) -> None:
        del real
        self._change("rmdir", place)
        inside = [made for made in self._made if made != place and made.is_relative_to(place)]
        links = [link for link in self.root.rglob("*") if link.is_symlink()]
        if inside or any(link.parent == place or Path(os.readlink(link)) == place for link in links):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(place))
        shutil.rmtree(place)
        self._made.discard(place)

    def _symlink(self, real: Callable[..., None], source: str, target: str) -> None:
        self._change("symlink", Path(target))
        real(source, target)

    def _write(self, real: Callable[..., int], place: Path, text: str) -> int:
        self._change("write", place)
        if not place.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        value = text.strip()
        disk = place.parents[0 if place.name in ("control", "enable") else 1]
        if place.name == "control":
            self._control(disk, value)
        elif place.name == "vpd_unit_serial":
            value = f"T10 VPD Unit Serial Number: {value}"
        elif place.name in EXPORTED_FIRST and any(
            Path(os.readlink(link)) == disk for link in self.root.glob("iscsi/*/*/lun/*/*") if link.is_symlink()
        ):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(place))
        elif place.parent.name in ("auth", "discovery_auth") and value == "NULL":
            value = ""
        with open(place, "w") as file:
            return file.write(f"{value}\n")

    def _control(self, disk: Path, value: str) -> None:
        settings = dict(part.split("=", 1) for part in value.split(","))
        info = (disk / "info").read_text()
        known = dict(re.findall(r"\b(File|Size|Mode): (\S+)", info))
        path, size = settings.get("fd_dev_name", known.get("File")), settings.get("fd_dev_size", known.get("Size"))
        mode = "Buffered-WCE" if settings.get("fd_buffered_io") == "1" else known.get("Mode", "O_DSYNC")
        with open(disk / "info", "w") as file:
            file.write("Status: ACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 16384\n")
            file.write(f"        TCM FILEIO ID: 0        File: {path}  ")
            file.write(f"Size: {size}  Mode: {mode} Async: 0\n")

    def foreign(self, iqn: str, label: str = "LIO Target") -> None:
        """A target and a disk that somebody else has made."""
        for place in ("core/fileio_77", "core/fileio_77/theirs", f"iscsi/{iqn}", f"iscsi/{iqn}/tpgt_1"):
            (self.root / place).mkdir()
        (self.root / f"iscsi/{iqn}/tpgt_1/param/TargetAlias").write_text(label)
        self.writes.clear()

    def snapshot(self) -> dict[str, str]:
        """Every file and link with its content; the random names of links left out."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_symlink():
                found[str(path.parent.relative_to(self.root))] = os.readlink(path)
            elif path.is_file():
                found[str(path.relative_to(self.root))] = path.read_text()
        return found


_GROUP = r"iscsi/[^/]+/tpgt_\d+"
_CONTENT: list[tuple[str, tuple[str, ...], Mapping[str, str]]] = [
    (
        r"core/fileio_\d+/[^/]+",
        ("attrib", "wwn", "alua"),
        {
            "control": "", "info": "", "enable": "0", "udev_path": "", "wwn/vpd_unit_serial": "T10:",
            **{f"attrib/{name}": value for name, value in DISK_ATTRIBUTES.items()},
        },
    ),
    (
        _GROUP,
        ("attrib", "param", "auth", "lun", "np", "acls"),
        {
            "enable": "0", "param/TargetAlias": "LIO Target",
            **{f"attrib/{name}": value for name, value in GROUP_ATTRIBUTES.items()},
        },
    ),
    (
        rf"{_GROUP}/acls/[^/]+",
        ("auth", "attrib", "param"),
        {"info": "No active iSCSI Session", **{f"auth/{name}": value for name, value in AUTH.items()}},
    ),
    (rf"{_GROUP}/acls/[^/]+/lun_\d+", (), {"write_protect": "0"}),
    (rf"{_GROUP}/np/[^/]+", (), {"iser": "0"}),
]  # fmt: skip
