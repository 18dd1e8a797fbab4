"""What a sheep's options change in its store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.stores import StoreDriver

from sheepdog.cluster.core.ids import Version, Vid, data_oid
from sheepdog.cluster.host.store_options import StoreOptions

SIZE = 1 << 20
OID = data_oid(Vid(1), 0)
JOURNAL_BYTES = 1 << 20


def v(counter: int) -> Version:
    return Version(1, 1, counter << 16)


def opened(path: Path, skip: bool = False) -> StoreDriver:
    return StoreDriver(str(path), options=StoreOptions(journal_bytes=JOURNAL_BYTES, journal_skip=skip))


@pytest.mark.parametrize("skip", [False, True])
def test_a_skipped_journal_is_named_in_the_log_and_its_writes_are_gone(tmp_path: Path, skip: bool) -> None:
    first = opened(tmp_path)
    first.create(OID, SIZE, 0, b"a" * SIZE, v(1), durable=True)
    first.close()
    second = opened(tmp_path)
    second.write(OID, 0, b"b" * 4096, v(2))  # only the journal has it
    second.crash()
    third = opened(tmp_path, skip)
    skipped = "1 records of the journal are skipped, as -j skip asks"
    assert (skipped in third.logged) == skip
    assert third.read(OID, 0, 4096) == (b"a" if skip else b"b") * 4096
    third.close()
