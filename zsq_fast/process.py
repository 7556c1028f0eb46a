"""Process-wide settings that a program may choose and a library must not: the command line and the benchmarks call this."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory and torch use huge pages; call before torch is imported. True where it took effect.

    By default every activation of a megabyte or more is mapped afresh and unmapped again, and the page faults cost more than
    the arithmetic (performance.md 0.9): a ResNet-20 step on two cores runs about twice as fast with this.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(option, value) for option, value in settings)
