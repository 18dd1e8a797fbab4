"""What LIO's configuration is made of, as far as this project sets it: what is, and what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LUN = 0  # the one logical unit of each target
MARK = "sheepdog:"

# Kernel attributes of a disk.
#
# Reservations, COMPARE AND WRITE and XCOPY live in one host's kernel: when the export moves to another host, that one
# knows nothing of what this one has granted. So they are off.
DISK_ATTRIBUTES: Mapping[str, int] = {
    "emulate_write_cache": 1,  # a write is volatile until SYNCHRONIZE CACHE, which becomes fsync
    "emulate_fua_write": 1,
    "emulate_tpu": 1,  # UNMAP becomes a hole
    "emulate_tpws": 1,  # WRITE SAME with UNMAP too
    "is_nonrot": 1,  # nothing is gained by sorting requests
    "unmap_zeroes_data": 1,  # and holes read as zeros
    "emulate_caw": 0,
    "emulate_3pc": 0,
    "emulate_pr": 0,
}
SECTOR = 512
# One WRITE SAME. Below the size of an object none would ever give space back (the kernel's own limit is 2 MiB), and
# the kernel refuses much longer ones that write data.
SAME_LIMIT_BYTES = 4 << 20
UNMAP_LIMIT_BYTES = 512 << 20  # one UNMAP: many objects at once, still answered soon; libiscsi takes more for a mistake

# No demo mode: who has no entry gets nothing and sees nothing.
TARGET_ATTRIBUTES: Mapping[str, int] = {
    "generate_node_acls": 0,
    "cache_dynamic_acls": 0,
    "demo_mode_write_protect": 1,
    "demo_mode_discovery": 0,
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Users and secrets of CHAP in both directions; empty: none."""

    user: str = ""
    secret: str = field(default="", repr=False)
    mutual_user: str = ""
    mutual_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Disk:
    """A fileio backstore. `cached`: buffered, flushed on request; without it flushes would be lost on FUSE."""

    path: str
    size: int
    serial: str
    attributes: Mapping[str, int]
    cached: bool = True


@dataclass(frozen=True, slots=True)
class Acl:
    """What one initiator may: its credentials, and whether its logical unit is read-only (None: it has none)."""

    credentials: Credentials = Credentials()
    read_only: bool | None = False


@dataclass(frozen=True, slots=True)
class Target:
    """A target with one portal group. `disk` is the label of logical unit 0; `label` says whose target it is."""

    label: str
    disk: str
    portals: frozenset[str]
    acls: Mapping[str, Acl]
    attributes: Mapping[str, int]
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Tree:
    """Disks by label and targets by name. Of what others made, only the names of targets are known (`foreign`)."""

    disks: Mapping[str, Disk] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    discovery: Credentials = Credentials()
    foreign: frozenset[str] = frozenset()


def label(host: str, volume: str) -> str:
    """Marks what this project made: a disk's name, a target's alias."""
    return f"{MARK}{host}:{volume}"


def volume_of(label_: str, host: str) -> str | None:
    """The volume of a label of this host; None for anything else."""
    prefix = label(host, "")
    return label_.removeprefix(prefix) if label_.startswith(prefix) else None


def disk_attributes(object_size: int) -> dict[str, int]:
    """With the unit in which the cluster gives space back."""
    return {
        **DISK_ATTRIBUTES,
        "max_unmap_lba_count": UNMAP_LIMIT_BYTES // SECTOR,
        "max_write_same_len": SAME_LIMIT_BYTES // SECTOR,
        "unmap_granularity": object_size // SECTOR,
    }
