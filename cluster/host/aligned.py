"""Memory from which the kernel writes to a disk without a copy in the page cache: whole pages, at a known address."""

from __future__ import annotations

import ctypes
import mmap


class AlignedMemory:
    """Zeros at first. What is being written from here must not change."""

    def __init__(self, size: int) -> None:
        self.pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
