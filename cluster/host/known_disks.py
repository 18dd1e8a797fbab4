"""Which disks a node has had in service: META/disks (docs/format.md).

What lies on a disk that went out of service is not current any more when it comes back, and a node that starts without
a disk that it had does not have all it should have. Both must be known after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final

from sheepdog.cluster.core.errors import Corrupt
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.directory import read_file, write_file
from sheepdog.cluster.host.disk import Disk

_HEAD = Struct("<8sII")  # magic, format, count
_ENTRY = Struct("<16sQ")  # disk id, 1: out of service
_MAGIC: Final = b"SHEEPDKS"
_FORMAT: Final = 1


class KnownDisks:
    """`out` by disk id."""

    def __init__(self, disk: Disk, metadata: str, log: Log) -> None:
        self._disk = disk
        self._metadata = metadata
        self._log = log
        self._out: dict[bytes, bool] = {}

    def load(self) -> None:
        path = f"{self._metadata}/disks"
        try:
            data = read_file(self._disk, path)
            if data is None:
                return
            magic, form, count = _HEAD.unpack_from(data)
            if magic != _MAGIC or form != _FORMAT or len(data) != _HEAD.size + count * _ENTRY.size:
                raise Corrupt("not a list of disks that this version reads")
        except Corrupt as error:
            self._log(4, f"{path}: {error}; which disks this node had is not known")
            return
        self._out = {identity: bool(out) for identity, out in _ENTRY.iter_unpack(data[_HEAD.size :])}

    def is_out(self, identity: bytes) -> bool:
        return self._out.get(identity, False)

    def missing(self, present: Iterable[bytes]) -> list[bytes]:
        """Disks that were in service last time and are not among the present ones."""
        here = set(present)
        return [identity for identity, out in self._out.items() if not out and identity not in here]

    def set(self, identities: Iterable[bytes], out: bool) -> None:
        """Durably; OSError."""
        changed = {identity: out for identity in identities if self._out.get(identity) is not out}
        if not changed:
            return
        self._out.update(changed)
        entries = b"".join(_ENTRY.pack(identity, out) for identity, out in self._out.items())
        write_file(self._disk, self._metadata, "disks", _HEAD.pack(_MAGIC, _FORMAT, len(self._out)) + entries)
