"""`dog store check|salvage`: the directories of sheep that do not run. Nothing in them is changed."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from sheepdog.cluster.core.errors import UsageError
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import reason, size_text, warn
from sheepdog.tools.dog.standard import OutputLost

if TYPE_CHECKING:
    from sheepdog.cluster.core.inode import InodeHeader
    from sheepdog.cluster.host.salvage import Salvage

DAMAGED = 1  # something does not match its hash, or is lost
FAILED = 2  # a store could not be looked at
_ZEROS_BYTES = 1 << 20


def check(context: Context) -> int:
    """Verifies every block of the stores; one line for each damaged file."""
    from sheepdog.cluster.host.store_check import Summary
    from sheepdog.cluster.host.store_check import check as check_store

    paths, journals = _stores(context)
    found: list[tuple[str, Summary]] = []
    for path, journal in zip(paths, journals, strict=True):
        try:
            found.append((path, check_store(path, _quiet if context.json else print, journal)))
        except (UsageError, OSError) as error:
            raise Failure(reason(error), FAILED) from error
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(
            [
                {
                    "store": path,
                    "objects": summary.objects,
                    "blocks": summary.blocks,
                    "unfinished": summary.unfinished,
                    "damaged": [
                        {"path": one.path, "object": one.object_name, "problem": one.problem, "blocks": one.blocks}
                        for one in summary.damaged
                    ],
                }
                for path, summary in found
            ]
        )
    else:
        for path, summary in found:
            rest = f", {summary.unfinished} not restored to the end" if summary.unfinished else ""
            print(
                f"{path}: {summary.objects} objects with {summary.blocks} blocks, {len(summary.damaged)} damaged{rest}"
            )
    return 0 if all(summary.clean for _, summary in found) else DAMAGED


def salvage(context: Context) -> int:
    """Writes a volume to stdout; without a name, lists what there is."""
    from sheepdog.cluster.host.salvage import Salvage

    paths, journals = _stores(context)
    if not context.flag("vdi") and context.flag("snapshot"):
        raise UsageFailure("please specify the volume with --vdi")
    try:
        rescue = Salvage(paths, warn, journals)
    except (UsageError, OSError) as error:
        raise Failure(reason(error), FAILED) from error
    try:
        if not context.flag("vdi"):
            _list(context, [header for header in rescue.volumes() if header.name])
            return 0
        return _write(rescue, context.value("vdi"), context.value("snapshot"))
    finally:
        rescue.close()


def _write(rescue: Salvage, name: str, snapshot: str) -> int:
    if sys.stdout.isatty():
        raise Failure("the image goes to stdout: send it to a file or another program", USAGE_ERROR)
    try:
        header = rescue.find(os.fsencode(name), snapshot)
        image = StreamImage(sys.stdout.fileno())
        complete = rescue.write_volume(header, image)
    except UsageError as error:
        raise Failure(str(error), FAILED) from error
    image.finish(header.vdi_size)
    if not complete:
        warn(f"{name}: parts of {len(rescue.lost)} objects are lost; they are zeros in the image")
    return 0 if complete else DAMAGED


def _list(context: Context, headers: list[InodeHeader]) -> None:
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(
            [
                {
                    "name": os.fsdecode(header.name),
                    "vdi_id": f"{header.vdi_id:x}",
                    "size": header.vdi_size,
                    "snapshot": header.snap_id if header.is_snapshot else 0,
                    "tag": os.fsdecode(header.tag) if header.is_snapshot else "",
                }
                for header in headers
            ]
        )
        return
    if not context.raw:
        print("  Name        Id    Size    VDI id  Tag")
    for header in headers:
        number = header.snap_id if header.is_snapshot else 0
        tag = os.fsdecode(header.tag) if header.is_snapshot else ""
        name, size = os.fsdecode(header.name), size_text(header.vdi_size, context.raw)
        if context.raw:
            print(name, number, size, f"{header.vdi_id:x}", tag)
        else:
            print(f"{'s' if number else ' '} {name:<8} {number:>5} {size:>7} {header.vdi_id:>9x}  {tag}")


def _stores(context: Context) -> tuple[list[str], list[str | None]]:
    """The directories, and where their journals are if not in them."""
    paths = [context.argument(0, "please specify the directories of a sheep"), *context.rest(1)]
    journals: list[str | None] = list(context.value("journal").split(",")) if context.flag("journal") else []
    if len(journals) > len(paths):
        raise UsageFailure("more journals than stores")
    return paths, [journal or None for journal in [*journals, *[None] * (len(paths) - len(journals))]]


def _quiet(text: str) -> None:
    """The result says it."""


class StreamImage:
    """`salvage.Image` on a descriptor: with holes in an empty file, else zeros are written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        info = os.fstat(fd)
        self._sparse = stat.S_ISREG(info.st_mode) and info.st_size == 0
        self._position = 0

    def put(self, offset: int, data: bytes) -> None:
        self._skip_to(offset)
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._fd, view)
            except OSError as error:
                raise OutputLost(error) from error
            view = view[count:]
            self._position += count

    def _skip_to(self, offset: int) -> None:
        if self._sparse:
            os.lseek(self._fd, offset, os.SEEK_SET)
            self._position = offset
        while self._position < offset:
            self._write(bytes(min(_ZEROS_BYTES, offset - self._position)))

    def finish(self, size: int) -> None:
        """The image has `size` bytes."""
        if self._sparse:
            os.ftruncate(self._fd, size)
        else:
            self._skip_to(size)
