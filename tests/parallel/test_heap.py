"""What becomes of memory that a process frees."""

import os
import platform
import subprocess
import sys

import pytest

from parallel.heap import heap_environment

BLOCK = 256 << 20
# Compared with before: a process that has imported torch may be as large as the block.
HELD = f"""
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
before = resident()
block = bytearray({BLOCK})
del block
print(resident() - before > {BLOCK} // 2)
"""
# Blocks as torch asks for them, and small ones between, all of them freed: MiB of the process after 1 round and after 33.
ALIGNED = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = ctypes.c_void_p()
for turn in range(33):
    held = []
    for _ in range(8):
        libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(16 << 20))
        held.append(block.value)
    for one in held:
        libc.free(one)
    for one in [libc.malloc(size) for size in range(24, 1024, 8)]:
        libc.free(one)
    if turn in (0, 32):
        print(int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) // 1024)
"""
KEEP = "from parallel.heap import keep_freed_memory\nprint(keep_freed_memory())"
START = "from parallel.process import process_info, start\nstart(process_info())\nprint(True)"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's on Linux only")


def said(code: str, then: str = HELD, **environ: str) -> list[str]:
    """The lines that a new process with ``environ`` prints."""
    plain = {key: value for key, value in os.environ.items() if "MALLOC" not in key.upper() and key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", f"{code}\n{then}"]
    return subprocess.run(command, env=plain | environ, check=True, capture_output=True, text=True).stdout.split()


def test_a_training_process_on_a_cpu_keeps_what_it_frees() -> None:
    assert said(START, CUDA_VISIBLE_DEVICES="") == ["True", "True"]


def test_a_large_block_is_returned_otherwise() -> None:
    assert said("print(True)") == ["True", "False"]


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "100000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}]
)
def test_the_users_own_setting_stays(setting: dict[str, str]) -> None:
    assert said(KEEP, **setting) == ["False", "False"]


def test_blocks_that_were_freed_are_whole_again() -> None:
    """Fails where `heap_environment` or `keep_freed_memory` leaves small blocks in a cache."""
    kept, first, last = said(KEEP, ALIGNED, **heap_environment({"CUDA_VISIBLE_DEVICES": ""}))
    assert kept == "True" and int(last) <= int(first) + 1


def test_the_environment_of_the_heap() -> None:
    without_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    own = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"}
    assert heap_environment(without_gpu) == own == heap_environment(without_gpu | own)
    other = {"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"}
    assert heap_environment(without_gpu | other) == {
        "GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off:glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"
    }
    assert heap_environment(without_gpu | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=9"}) == {}
    assert heap_environment(without_gpu | {"MALLOC_TRIM_THRESHOLD_": "1"}) == {}
