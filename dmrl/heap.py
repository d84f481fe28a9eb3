"""The process's heap: a CPU's programs get the same pages again, instead of new ones a call."""

import ctypes
import importlib.metadata
import importlib.util
import os

MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8
"""glibc's names of options, from malloc.h."""


def keep_pages() -> bool:
    """Has glibc keep what is freed; call before anything asks JAX for devices. True: it does.

    XLA's CPU programs allocate their temporaries anew at every call. glibc hands large ones back
    to the system at once, and each page is then faulted in again: a third of an update of a small
    model (measured, docs/performance.md). The process keeps the most it ever held. Does nothing
    where an accelerator may be used (its plugin is installed, and JAX_PLATFORMS does not say cpu),
    where the environment already sets malloc, or without glibc; a malloc that is preloaded,
    which may do better (jemalloc), takes no notice.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in os.environ) or not _cpu_only():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # other C libraries
        return False
    # One arena: those of further threads hold no block of more than 64 MB.
    options = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1}  # -1: never
    taken = [mallopt(name, value) for name, value in options.items()]
    return all(taken)


def _cpu_only() -> bool:
    if wanted := os.environ.get("JAX_PLATFORMS"):
        return wanted == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    named = (importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not plugins and not any(named)
