"""Lets a training process on a CPU keep the memory that it frees, in whole pieces. No torch."""

import ctypes
import os
import sys
from collections.abc import Mapping

from parallel.gpus import visible_gpus

TUNABLES = "GLIBC_TUNABLES"
_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = 1, -1, -3, -4  # malloc.h
_NEVER = -1
_LARGEST_KEPT = 1 << 30
_NO_CACHE, _HUGE_PAGES = "glibc.malloc.tcache_count=0", "glibc.malloc.hugetlb=1"
_OURS = (_NO_CACHE, _HUGE_PAGES)


def heap_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for processes that train on this machine's CPUs: their malloc keeps no cache of small blocks, and asks for
    huge pages.

    torch asks for aligned blocks. glibc cuts them out of larger ones, and a small block soon takes the rest. While it is in
    the cache, it keeps the large block, once that is freed, from becoming whole, and the next tensor of the same size does
    not fit there (glibc's bug 14581; measured with 2.36): a step of the reference shape needed a fifth more memory
    (`benchmarks/README.md`). Huge pages (glibc 2.35 and later; Linux gives them where its setting is "madvise") save lookups
    of addresses, which cost most on a virtual machine. malloc reads this variable when a process starts, so only a parent
    process can set it.

    Nothing where there are GPUs, or where the user has set malloc.
    """
    environ = os.environ if environ is None else environ
    if not sys.platform.startswith("linux") or _users_own(environ) or visible_gpus(environ):
        return {}
    before = [part for part in environ.get(TUNABLES, "").split(":") if part and part not in _OURS]
    return {TUNABLES: ":".join([*before, *_OURS])}


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed blocks below 1 GiB for the next allocation. Returns whether it does.

    Otherwise it returns large blocks to the system, and every step fetches them again, page by page: 40,000 to 100,000
    page faults in a step of the reference shape, which take up to a sixth of it on a virtual machine
    (`benchmarks/README.md`). The most memory that a process has does not change, because a step needs it again.

    A setting of the user (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`, `GLIBC_TUNABLES`) is left
    as it is, and so is an allocator that is not glibc's.
    """
    if not sys.platform.startswith("linux") or _users_own(os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    libc.mallopt(_M_MXFAST, 0)  # these small blocks, too, would keep large ones apart
    # An older glibc takes no threshold above 32 MiB, but it can do without mmap, for blocks of every size.
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) or libc.mallopt(_M_MMAP_MAX, 0)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _users_own(environ: Mapping[str, str]) -> bool:
    if any(name in environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")):
        return True
    parts = environ.get(TUNABLES, "").split(":")
    return any(part.startswith("glibc.malloc.") and part not in _OURS for part in parts)
