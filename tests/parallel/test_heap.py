"""What becomes of memory that a process frees."""

import os
import platform
import subprocess
import sys

import pytest

BLOCK = 256 << 20
HELD = f"""
block = bytearray({BLOCK})
del block
status = open("/proc/self/status").read()
print(int(status.split("VmRSS:")[1].split()[0]) * 1024 > {BLOCK})
"""
KEEP = "from parallel.heap import keep_freed_memory\nprint(keep_freed_memory())"
START = "from parallel.process import process_info, start\nstart(process_info())\nprint(True)"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's on Linux only")


def said(code: str, **environ: str) -> list[str]:
    """The lines that a new process with ``environ`` prints."""
    plain = {key: value for key, value in os.environ.items() if "MALLOC" not in key.upper()}
    command = [sys.executable, "-c", code + HELD]
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
