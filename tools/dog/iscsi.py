"""`dog iscsi`: volumes for iSCSI initiators, through this host's kernel or through tgtd."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result, UsageError
from sheepdog.cluster.core.ids import format_address
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure, UsageFailure
from sheepdog.tools.dog.output import text, warn
from sheepdog.tools.dog.volumes import name_of

if TYPE_CHECKING:
    from sheepdog.frontends.iscsi.exports import Document, Export, Login
    from sheepdog.frontends.iscsi.host import Host, Outcome, Perform

MISSING = 5
NO_NAME = "Please specify the VDI name"


def export(context: Context) -> int:
    """Records that this host exports the volume, and does it."""
    from sheepdog.frontends.iscsi import cluster, kernel
    from sheepdog.frontends.iscsi.exports import Document
    from sheepdog.frontends.iscsi.secrets import read_secret

    volume = _volume(context)
    host = _host_name(context)
    kernel.prepare()
    before = _document(context, volume)
    document = before or Document()
    wanted = _described(context, volume, host, document)
    for login in wanted.logins():
        read_secret(login.secret_file)  # before anything is recorded
    document = _shared_as_wanted(context, volume, host, document)
    cluster.write(context.gateway(), name_of(volume), document.having(wanted), new=before is None)
    if wanted.chap is None:
        warn(f"Warning: whoever calls himself {' or '.join(wanted.initiators)} is let in (see --chap)")
    code = _report(_apply(context, host, [volume]))
    if not code:
        print(f"{wanted.iqn} {','.join(wanted.portals)}")
    return code


def _shared_as_wanted(context: Context, volume: str, host: str, document: Document) -> Document:
    """The document for one host more; Failure where the volume cannot be on several."""
    others = document.without(host).exports
    if document.shared and document.exports:
        if document.of(host) is None and _takes_part(context, volume):
            raise Failure(
                f"{volume}: this sheep serves another one who shares it; every host needs a sheep of its own (-a)"
            )
        return document
    if not context.flag("shared"):
        if others:
            # Each sheepfs keeps the volume's map; one would read what the other has replaced.
            raise Failure(
                f"{volume} is exported by {others[0].host}; without --shared one host at a time can. "
                f"To move it: dog iscsi unexport {volume} there, or here with --host {others[0].host} once that is down"
            )
        return replace(document, shared=False)
    if document.exports:
        raise Failure(f"{volume} is exported by {document.exports[0].host} without --shared: unexport it first")
    info, _ = admin.cluster_info(context.gateway())
    if not info.cluster_flags & ClusterFlag.LOCKS:
        raise Failure("--shared needs a cluster that enforces locks (dog cluster format -l)")
    return replace(document, shared=True)


def _takes_part(context: Context, volume: str) -> bool:
    """The sheep that is asked holds a share of the volume's lock already: it cannot tell two clients apart."""
    from sheepdog.tools.dog.locks import lock_states

    state = lock_states(context.gateway()).get(admin.find(context.gateway(), name_of(volume)).vid)
    nodes = state.participants if state is not None else ()
    own = {address[4][0] for address in socket.getaddrinfo(context.host, None)}
    loopback = any(ipaddress.ip_address(address).is_loopback for address in own)
    return any(node.port == context.port and (loopback or format_address(node.address) in own) for _, node in nodes)


def unexport(context: Context) -> int:
    """This host exports the volume no longer, now and after a restart."""
    from sheepdog.frontends.iscsi import cluster, configfs
    from sheepdog.frontends.iscsi.model import label

    volume = _volume(context)
    host = _host_name(context)
    document = _document(context, volume)
    if document is None or document.of(host) is None:
        raise Failure(f"{volume} is not exported by {host}", MISSING)
    connected = configfs.sessions(label(host, volume))
    if connected and not context.flag("force"):
        raise Failure(f"{volume}: initiators are logged in ({connected}); log them out, or cut them off with --force")
    cluster.write(context.gateway(), name_of(volume), document.without(host), new=False)
    return _report(_apply(context, host, [volume]))


def apply(context: Context) -> int:
    """This host exports what the cluster says, all of it or the volumes that are named, and nothing else."""
    outcome = _apply(context, _host_name(context), context.rest(0) or None)
    print(f"{outcome.changes} change{'s' if outcome.changes > 1 else ''}" if outcome.changes else "nothing to change")
    return _report(outcome)


def clear(context: Context) -> int:
    """Takes down what this host exports; the cluster goes on wanting it."""
    host = _host_name(context)
    if os.geteuid() != 0:
        raise Failure("changing the kernel's iSCSI target needs root")
    return _report(_host(context, host).clear())


def list_exports(context: Context) -> int:
    """Who exports what; on this host also whether it is so."""
    from sheepdog.frontends.iscsi import cluster, configfs
    from sheepdog.frontends.iscsi.model import label

    host = _host_name(context)
    tree = configfs.read_tree(host)
    rows: list[dict[str, object]] = []
    for exported in cluster.documents(context.gateway()):
        if isinstance(exported, cluster.Unreadable):
            warn(exported.problem)
            continue
        for one in exported.document.exports:
            row: dict[str, object] = {
                "volume": exported.volume,
                "host": one.host,
                "iqn": one.iqn,
                "portals": list(one.portals),
                "initiators": list(one.initiators),
                "chap": one.chap.user if one.chap else "",
                "mutual": one.mutual.user if one.mutual else "",
                "discovery": one.discovery.user if one.discovery else "",
                "readonly": one.read_only,
                "shared": exported.document.shared,
                "serial": exported.document.serial,
            }
            if one.host == host:
                target = tree.targets.get(one.iqn)
                row["state"] = "up" if target is not None and target.enabled else "down"
                row["sessions"] = configfs.sessions(label(host, exported.volume))
            rows.append(row)
    if context.json:
        import json

        print(json.dumps(rows))
    else:
        _print_table(rows, context.raw)
    return 0


def tgt_config(context: Context) -> int:
    """Prints the commands that make tgtd export a volume; gives it a serial number if it has none yet."""
    from sheepdog.frontends.iscsi import cluster, exports, tgt

    volume = _volume(context)
    host = _host_name(context)
    document = _document(context, volume)
    one = document.of(host) if document else None
    iqn = context.value("iqn") or (one.iqn if one else exports.default_iqn(host, volume))
    initiators = exports.words(context.value("initiator")) or (one.initiators if one else ())
    if not initiators:
        raise UsageFailure("Please specify --initiator")
    number = context.value("tid", "1")
    if not number.isascii() or not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise UsageFailure(f"Invalid target number '{number}'")
    names = [exports.iqn(initiator) for initiator in initiators]
    lines = tgt.commands(
        volume,
        (context.host, context.port),
        exports.iqn(iqn),
        names,
        (document or cluster.begin(context.gateway(), name_of(volume))).serial,
        int(number),
    )
    if context.json:
        import json

        print(json.dumps(lines))
    else:
        print("\n".join(shlex.join(line) for line in lines))
    return 0


# -- parts


def _volume(context: Context) -> str:
    """The volume's name; it exists and can be exported."""
    from sheepdog.frontends.iscsi.exports import name

    volume = name(context.argument(0, NO_NAME))
    try:
        admin.find(context.gateway(), name_of(volume))
    except SheepError as error:
        code = MISSING if error.result == Result.NO_VDI else 1
        raise Failure(f"Failed to open {volume}: {text(error.result)}", code) from error
    return volume


def _host_name(context: Context) -> str:
    from sheepdog.frontends.iscsi.exports import name

    return name(context.value("host") or os.uname().nodename, "host")


def _document(context: Context, volume: str) -> Document | None:
    from sheepdog.frontends.iscsi import cluster

    try:
        return cluster.read(context.gateway(), name_of(volume))
    except UsageError as error:
        raise Failure(f"{volume}: {error}") from error


def _described(context: Context, volume: str, host: str, document: Document) -> Export:
    """The options; what they do not say is as it was."""
    from sheepdog.frontends.iscsi import exports

    own = document.of(host)
    initiators = exports.words(context.value("initiator")) or (own.initiators if own else ())
    if not initiators:
        raise UsageFailure("Please specify --initiator: nobody is let in who is not named")
    default = own.portals if own else (exports.DEFAULT_PORTAL,)
    chap = _login(context, "chap", "secret-file") or (own.chap if own else None)
    mutual = _login(context, "mutual", "mutual-secret-file") or (own.mutual if own else None)
    if mutual and not chap:
        raise UsageFailure("--mutual needs --chap")
    return exports.Export(
        host=host,
        iqn=exports.iqn(context.value("iqn") or (own.iqn if own else exports.default_iqn(host, volume))),
        portals=tuple(exports.portal(word) for word in exports.words(context.value("portal")) or default),
        initiators=tuple(exports.iqn(word) for word in initiators),
        chap=chap,
        mutual=mutual,
        discovery=_login(context, "discovery", "discovery-secret-file") or (own.discovery if own else None),
        read_only=context.flag("readonly") or (own.read_only if own else False),
    )


def _login(context: Context, user: str, file: str) -> Login | None:
    from sheepdog.frontends.iscsi.exports import login

    if context.flag(user) != context.flag(file):
        raise UsageFailure(f"--{user} and --{file} need each other")
    return login(context.value(user), os.path.abspath(context.value(file))) if context.flag(user) else None


def _apply(context: Context, host: str, volumes: Collection[str] | None) -> Outcome:
    """All volumes or these; what cannot be read stays as it is, and is a problem only where it was asked for."""
    from sheepdog.frontends.iscsi import cluster
    from sheepdog.frontends.iscsi.host import Wanted

    wanted: dict[str, Wanted] = {}
    readable: set[str] = set()
    unreadable: list[cluster.Unreadable] = []
    for exported in cluster.documents(context.gateway()):
        if isinstance(exported, cluster.Unreadable):
            unreadable.append(exported)
            continue
        readable.add(exported.volume)
        document = exported.document
        one = document.of(host)
        if one is not None:
            wanted[exported.volume] = Wanted(one, document.serial, exported.object_size, document.shared)

    names = {one.volume for one in unreadable}

    def unknown(volume: str) -> bool:
        return volume in names or (None in names and volume not in readable)

    outcome = _host(context, host).apply(wanted, volumes, unknown)
    for other in unreadable:
        asked = volumes is None or other.volume in volumes
        (outcome.problems if asked else outcome.remarks).append(other.problem)
    return outcome


def _host(context: Context, host: str) -> Host:
    from sheepdog.frontends.iscsi import kernel
    from sheepdog.frontends.iscsi.files import Files
    from sheepdog.frontends.iscsi.host import Host

    def performer() -> Perform:
        kernel.prepare()
        from sheepdog.frontends.iscsi.lio import Lio  # needs the library

        return Lio().perform

    return Host(host, Files(host, (context.host, context.port)), performer)


def _report(outcome: Outcome) -> int:
    for line in (*outcome.remarks, *outcome.problems):
        warn(line)
    return 1 if outcome.problems else 0


def _print_table(rows: list[dict[str, object]], raw: bool) -> None:
    fields = ("volume", "host", "state", "iqn", "portals", "initiators", "chap")
    lines = [[_cell(row.get(field)) for field in fields] for row in rows]
    if raw:
        print("\n".join(" ".join(line) for line in lines), end="\n" if lines else "")
        return
    lines.insert(0, ["Volume", "Host", "State", "Target", "Portals", "Initiators", "CHAP"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(fields))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return (",".join(value) if isinstance(value, list) else str(value or "")) or "-"
