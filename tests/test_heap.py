"""Freed memory stays with the process where programs run on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from dmrl import heap
kept = heap.keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
found, size = [], int(sys.argv[1]) << 20
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *found)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults(megabytes: int = 200, **environ: str) -> list[int]:
    """Whether pages are kept, and the page faults of three rounds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, str(megabytes)],
        env=clean | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(x) for x in run.stdout.split()]


@glibc
@pytest.mark.parametrize("megabytes", [200, 2100])
def test_a_block_that_was_freed_comes_back_without_page_faults(megabytes):
    kept, first, *later = faults(megabytes, JAX_PLATFORMS="cpu")
    assert kept
    assert first > 100
    assert max(later) < first / 50


@glibc
@pytest.mark.parametrize(
    "environ",
    [
        {"JAX_PLATFORMS": "tpu"},
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "4"},
        {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.arena_max=4"},
    ],
    ids=["tpu", "cuda", "malloc", "tunables"],
)
def test_accelerators_and_a_malloc_that_is_set_are_left_alone(environ):
    kept, *found = faults(**environ)
    assert not kept
    assert min(found) > 100
