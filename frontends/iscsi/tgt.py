"""The target in user space: what to tell Debian's tgtd, which speaks to the sheep by itself (`--bstype sheepdog`)."""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog.cluster.core.errors import UsageError

UNIT = 1  # of tgtd's numbers, 0 is its controller
SERIAL_LENGTH = 16  # of the name in its VPD pages


def commands(
    volume: str, gateway: tuple[str, int], iqn: str, initiators: Sequence[str], serial: str, target_id: int
) -> list[list[str]]:
    """The commands that make a target of the volume, in order. No secret: tgtadm takes one as an argument only.

    The serial number is always set: tgtd makes its own of the numbers of target and unit, so that volumes behind two
    tgtd would look like one disk to who finds paths by them.
    """
    host, port = gateway
    if ":" in host:
        raise UsageError("tgtd takes the address of a sheep as IPv4 or as a name only")
    admin = ["tgtadm", "--lld", "iscsi"]
    target = ["--tid", str(target_id)]
    unit = ["--mode", "logicalunit", *target, "--lun", str(UNIT)]
    number = serial.replace("-", "")[:SERIAL_LENGTH]
    parameters = f"scsi_sn={number},scsi_id={number},vendor_id=SHEEPDOG"
    bind = [*admin, "--op", "bind", "--mode", "target", *target]
    return [
        [*admin, "--op", "new", "--mode", "target", *target, "--targetname", iqn],
        [*admin, "--op", "new", *unit, "--bstype", "sheepdog", "--backing-store", f"tcp:{host}:{port}:{volume}"],
        [*admin, "--op", "update", *unit, "--params", parameters],
        *([*bind, "--initiator-name", initiator] for initiator in initiators),
    ]
