"""Bytes <-> values, as total functions: any input gives a value or a `PeerError`."""
