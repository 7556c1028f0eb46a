"""Process-wide settings that a program may choose and a library must not: the benchmarks call this."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory and torch use huge pages; call before torch is imported. True where it took effect.

    By default a large result is mapped afresh and unmapped again at every call, which a benchmark of one operation would time
    instead of the operation. A whole ResNet-20 training step showed no difference on an idle machine, so only the benchmarks
    call this.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(option, value) for option, value in settings)
