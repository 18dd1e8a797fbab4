"""Volumes as iSCSI targets of this host's kernel (LIO), as the cluster says they should be."""
