"""Does the actions of a plan with rtslib-fb, one by one. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import rtslib_fb
from rtslib_fb.node import CFSNode

from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.iscsi import plan as do
from sheepdog.frontends.iscsi.configfs import ROOT, disk_directory
from sheepdog.frontends.iscsi.model import LUN, Acl, Credentials

TAG = 1  # of the one portal group


class Lio:
    """The target of this kernel; it must be there already (`kernel.prepare`)."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        CFSNode.configfs_dir = str(root)

    def perform(self, actions: Iterable[do.Action]) -> int:
        """All of them, in their order; how many. UsageError naming the one that failed, those before it stay done."""
        count = 0
        for action in actions:
            try:
                self._perform(action)
            except (rtslib_fb.RTSLibError, OSError) as error:
                # Of an action with secrets the representation has none.
                raise UsageError(f"the kernel's iSCSI target refuses {action}: {error}") from error
            count += 1
        return count

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.CreateDisk(label, disk):
                rtslib_fb.FileIOStorageObject(label, disk.path, disk.size, disk.serial, disk.cached)
            case do.ResizeDisk(label, size):
                # A regular file's size is what the kernel was told. It takes a new one while the disk is in use.
                place = disk_directory(label, self._root)
                if place is not None:
                    (place / "control").write_text(f"fd_dev_size={size}")
            case do.SetDiskAttribute(label, attribute, value):
                place = disk_directory(label, self._root)
                # Older kernels lack the newest attributes, and the features behind them.
                if place is not None and (place / "attrib" / attribute).exists():
                    (place / "attrib" / attribute).write_text(str(value))
            case do.DeleteDisk(label):
                rtslib_fb.FileIOStorageObject(label).delete()
            case do.CreateTarget(iqn, label, disk):
                group = rtslib_fb.TPG(rtslib_fb.Target(self._fabric(), iqn, "create"), TAG, "create")
                group.set_parameter("TargetAlias", label)
                rtslib_fb.LUN(group, LUN, rtslib_fb.FileIOStorageObject(disk))
            case do.DeleteTarget(iqn):
                rtslib_fb.Target(self._fabric(), iqn, "lookup").delete()
            case do.SetDiscovery(credentials):
                self._discovery(credentials)
            case _:
                self._change_group(action)

    def _change_group(self, action: do.Action) -> None:
        assert not isinstance(
            action,
            do.CreateDisk | do.ResizeDisk | do.SetDiskAttribute | do.DeleteDisk | do.SetDiscovery,
        )
        target = rtslib_fb.Target(self._fabric(), action.target, "lookup")
        group = rtslib_fb.TPG(target, TAG, "lookup")
        match action:
            case do.SetTargetAttribute(_, attribute, value):
                group.set_attribute(attribute, value)
            case do.SetAcl(_, initiator, acl):
                _set_acl(group, initiator, acl)
            case do.RemoveAcl(_, initiator):
                rtslib_fb.NodeACL(group, initiator, "lookup").delete()
            case do.AddPortal(_, portal):
                rtslib_fb.NetworkPortal(group, *portal.rsplit(":", 1), "create")
            case do.RemovePortal(_, portal):
                rtslib_fb.NetworkPortal(group, *portal.rsplit(":", 1), "lookup").delete()
            case do.Enable():
                group.enable = True

    def _fabric(self) -> rtslib_fb.FabricModule:
        return rtslib_fb.FabricModule("iscsi")

    def _discovery(self, credentials: Credentials) -> None:
        fabric = self._fabric()
        if not credentials.user:
            fabric.clear_discovery_auth_settings()
            return
        fabric.discovery_userid = credentials.user
        fabric.discovery_password = credentials.secret
        fabric.discovery_mutual_userid = credentials.mutual_user
        fabric.discovery_mutual_password = credentials.mutual_secret
        fabric.discovery_enable_auth = True


def _set_acl(group: rtslib_fb.TPG, initiator: str, acl: Acl) -> None:
    """The secrets first: an entry without them would let anybody in who knows its name."""
    entry = rtslib_fb.NodeACL(group, initiator, "any")
    credentials = acl.credentials
    entry.chap_userid = credentials.user
    entry.chap_password = credentials.secret
    entry.chap_mutual_userid = credentials.mutual_user
    entry.chap_mutual_password = credentials.mutual_secret
    mapped = {unit.mapped_lun: unit for unit in entry.mapped_luns}
    if LUN not in mapped:
        rtslib_fb.MappedLUN(entry, LUN, LUN, bool(acl.read_only))
    elif mapped[LUN].write_protect != bool(acl.read_only):
        mapped[LUN].write_protect = bool(acl.read_only)
