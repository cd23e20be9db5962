"""The C heap of a rank (partita/train/launch/heap.py)."""

import json
import subprocess
import sys

import pytest

from partita.train.launch.heap import HUGE, asks_for_huge_pages

# Takes 64 MB, fills them, gives them back and takes them again; prints where it was
TAKES = """
import ctypes, json
from partita.train.launch.heap import keep_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
def flags(address):
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            word = line.split()[0]
            if "-" in word:
                start, end = (int(x, 16) for x in word.split("-"))
                inside = start <= address < end
            elif inside and word == "VmFlags:":
                return line.split()[1:]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resident()
keep_freed_memory()
kept = resident()
first = libc.malloc(64 << 20)
ctypes.memset(first, 1, 64 << 20)
filled = resident()
libc.free(first)
again = libc.malloc(64 << 20) == first  # before anything small takes a part of it
libc.free(first)
freed = resident()
print(json.dumps({"asked": kept - before, "filled": filled - kept, "freed": freed - filled,
                  "flags": flags(first + (32 << 20)), "again": again}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_stays_in_huge_pages_and_no_more_of_it_is_resident_than_was_written():
    ran = subprocess.run([sys.executable, "-c", TAKES], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found["again"], "what was freed is given again"
    assert found["freed"] >= -(1 << 20), "nothing went back to the kernel"
    assert found["asked"] < 4 * HUGE, "addresses are not memory"
    assert abs(found["filled"] - (64 << 20)) <= 2 * HUGE
    if asks_for_huge_pages():
        assert "hg" in found["flags"]


@pytest.mark.parametrize(
    ("enabled", "size", "asks"),
    [
        ("always [madvise] never", HUGE, True),
        ("[always] madvise never", HUGE, False),
        ("always madvise [never]", HUGE, False),
        ("always [madvise] never", 512 << 20, False),
    ],
)
def test_huge_pages_are_asked_for_where_that_changes_something(tmp_path, enabled, size, asks):
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "hpage_pmd_size").write_text(str(size))
    limits = tmp_path / "overcommit"
    limits.write_text("0")
    assert asks_for_huge_pages(tmp_path, limits, limited=False) is asks
    assert not asks_for_huge_pages(tmp_path, limits, limited=True)
    limits.write_text("2")
    assert not asks_for_huge_pages(tmp_path, limits, limited=False)
