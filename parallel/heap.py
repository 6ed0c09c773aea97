"""Lets a training process on a CPU keep the memory that it frees. No torch."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_NEVER = -1
_LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed blocks below 1 GiB for the next allocation. Returns whether it does.

    Otherwise it returns large blocks to the system, and every step fetches them again, page by page: 40,000 to 100,000
    page faults in a step of the reference shape, which take up to a sixth of it on a virtual machine
    (`benchmarks/README.md`). The most memory that a process has does not change, because a step needs it again.

    A setting of the user (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`, `GLIBC_TUNABLES`) is left
    as it is, and so is an allocator that is not glibc's.
    """
    users = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    if any(name in os.environ for name in users) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    # An older glibc takes no threshold above 32 MiB, but it can do without mmap, for blocks of every size.
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or libc.mallopt(_M_MMAP_MAX, 0)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
