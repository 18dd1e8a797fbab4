"""Which disks a node has had in service: META/disks (docs/format.md).

What lies on a disk that went out of service is not current any more when it comes back, and a node that starts without
a disk that it had does not have all it should have. Both must be known after a restart; also after one that comes
before META/settled says that copies were lost (*untold*).
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
_ENTRY = Struct("<16sQ")  # disk id, sum of the following
_OUT: Final = 1  # out of service
_UNTOLD: Final = 2  # it went out of service, and META/settled may still prove what was on it
_IN_JOURNAL: Final = 4  # it went out of service, and the journal may still have records of what was on it
_MAGIC: Final = b"SHEEPDKS"
_FORMAT: Final = 1


class KnownDisks:
    """What is noted of each disk id."""

    def __init__(self, disk: Disk, metadata: str, log: Log) -> None:
        self._disk = disk
        self._metadata = metadata
        self._log = log
        self._notes: dict[bytes, int] = {}

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
        self._notes = dict(_ENTRY.iter_unpack(data[_HEAD.size :]))

    def is_out(self, identity: bytes) -> bool:
        return bool(self._notes.get(identity, 0) & _OUT)

    def missing(self, present: Iterable[bytes]) -> list[bytes]:
        """Disks that were in service last time and are not among the present ones."""
        here = set(present)
        return [identity for identity, note in self._notes.items() if not note & _OUT and identity not in here]

    def untold(self) -> list[bytes]:
        """Disks of which META/settled may not know that they went."""
        return [identity for identity, note in self._notes.items() if note & _UNTOLD]

    def in_journal(self) -> bool:
        """The journal may have records of what was on a disk that went."""
        return any(note & _IN_JOURNAL for note in self._notes.values())

    def went(self, identities: Iterable[bytes]) -> None:
        """Out of service, untold. Durably, as all changes; OSError."""
        self._change(dict.fromkeys(identities, _OUT | _UNTOLD | _IN_JOURNAL))

    def came(self, identities: Iterable[bytes]) -> None:
        """In service."""
        self._change({identity: self._notes.get(identity, 0) & ~_OUT for identity in identities})

    def told(self, identities: Iterable[bytes]) -> None:
        """META/settled does not count on what they held."""
        self._change({identity: self._notes[identity] & ~_UNTOLD for identity in identities})

    def replayed(self) -> None:
        """The journal is empty, and META/settled does not count on what is not here."""
        self._change({identity: note & _OUT for identity, note in self._notes.items()})

    def _change(self, notes: dict[bytes, int]) -> None:
        if notes.items() <= self._notes.items():
            return
        self._notes.update(notes)
        entries = b"".join(_ENTRY.pack(identity, note) for identity, note in self._notes.items())
        write_file(self._disk, self._metadata, "disks", _HEAD.pack(_MAGIC, _FORMAT, len(self._notes)) + entries)
