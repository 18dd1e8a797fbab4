"""`dog upgrade`: conversion of files of older formats (cli.md 2.10). Of our own there is only the present one."""

from __future__ import annotations

from pathlib import Path

from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.values import parse_oid

VERSIONS = ("v0.7", "v0.8")
_NOTHING = (
    "{path}: there is no older format to convert from, this is the first one. The files of Sheepdog 0.7 to 1.0 are not "
    "taken over:\nread the images out with the sheep that wrote them, then use `dog vdi import`"
)


def convert_inode(context: Context) -> None:
    _check_version(context)
    _convert(context, "please specify the file path of the old inode", "please specify the file path of the new inode")


def convert_epoch(context: Context) -> None:
    _check_version(context)
    _convert(context, "please specify the file path of the old epoch", "please specify the file path of the new epoch")


def convert_config(context: Context) -> None:
    _convert(
        context, "please specify the file path of the old config", "please specify the file path of the new config"
    )


def object_location(context: Context) -> None:
    _check_version(context)
    context.argument(0, "please specify the file path of the epoch log")
    parse_oid(context.argument(1, "please specify the object id"))
    _convert(context, "", "")


def _check_version(context: Context) -> None:
    version = context.value("orig", VERSIONS[-1])
    if version not in VERSIONS:
        raise Failure(f"unknown original version: {version}\nvalid versions are v0.7 or v0.8")


def _convert(context: Context, no_old: str, no_new: str) -> None:
    path = Path(context.argument(0, no_old))
    context.argument(1, no_new)
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise Failure(f"failed to read {path}: {error.strerror}", 2) from error
    raise Failure(_NOTHING.format(path=path))
