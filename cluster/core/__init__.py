"""Decisions. Nothing here touches a socket, a file, a clock or randomness: it acts through `ports`."""
