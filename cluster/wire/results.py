"""Result codes and the words dog has for them (cli.md 2.5)."""

from __future__ import annotations

from typing import Final

from sheepdog.cluster.core.errors import Result

__all__ = ["FIRST_INTERNAL", "TEXTS", "Result", "text_of"]

FIRST_INTERNAL: Final = 0x80  # QEMU and tgt know no code from here on and must not be sent one

TEXTS: Final[dict[int, str]] = {
    Result.SUCCESS: "Success",
    Result.UNKNOWN: "Unknown error",
    Result.NO_OBJ: "No object found",
    Result.EIO: "I/O error",
    Result.VDI_EXIST: "VDI exists already",
    Result.INVALID_PARMS: "Invalid parameters",
    Result.SYSTEM_ERROR: "System error",
    Result.VDI_LOCKED: "VDI is already locked",
    Result.NO_VDI: "No VDI found",
    Result.NO_BASE_VDI: "No base VDI found",
    Result.VDI_READ: "Failed to read from requested VDI",
    Result.VDI_WRITE: "Failed to write to requested VDI",
    Result.BASE_VDI_READ: "Failed to read from base VDI",
    Result.BASE_VDI_WRITE: "Failed to write to base VDI",
    Result.NO_TAG: "Failed to find requested tag",
    Result.STARTUP: "System is still booting",
    Result.VDI_NOT_LOCKED: "VDI is not locked",
    Result.SHUTDOWN: "System is shutting down",
    Result.NO_MEM: "Out of memory on server",
    Result.FULL_VDI: "Maximum number of VDIs reached",
    Result.VER_MISMATCH: "Protocol version mismatch",
    Result.NO_SPACE: "Server has no space for new objects",
    Result.WAIT_FOR_FORMAT: "Waiting for cluster to be formatted",
    Result.WAIT_FOR_JOIN: "Waiting for other nodes to join cluster",
    Result.JOIN_FAILED: "Node has failed to join cluster",
    Result.HALT: "IO has halted as there are not enough living nodes",
    Result.READONLY: "Object is read-only",
    Result.INODE_INVALIDATED: "Inode object is invalidated",
    Result.OLD_NODE_VER: "Request has an old epoch",
    Result.NEW_NODE_VER: "Request has a new epoch",
    Result.NOT_FORMATTED: "Cluster has not been formatted",
    Result.INVALID_CTIME: "Creation times differ",
    Result.INVALID_EPOCH: "Invalid epoch",
    Result.NETWORK_ERROR: "Network error between sheep",
    Result.NO_CACHE: "No cache object found",
    Result.BUFFER_SMALL: "The buffer is too small",
    Result.FORCE_RECOVER: "Cluster is running/halted and cannot be force recovered",
    Result.NO_STORE: "Targeted backend store is not found",
    Result.NO_SUPPORT: "Operation is not supported",
    Result.NODE_IN_RECOVERY: "Targeted node is in recovery",
    Result.KILLED: "Node is killed",
    Result.OID_EXIST: "Object ID exists already",
    Result.AGAIN: "Ask to try again",
    Result.STALE_OBJ: "Object may be stale",
    Result.CLUSTER_ERROR: "Cluster driver error",
    Result.GATEWAY_MODE: "Targeted node is gateway mode",
    Result.INVALID_VNODES_STRATEGY: "Invalid cluster vnodes strategy",
}


def text_of(code: int) -> str:
    """What dog prints for a result code."""
    return TEXTS.get(code) or f"Invalid error code {code:x}"
