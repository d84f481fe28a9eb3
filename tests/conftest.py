"""What every test shares: CPU, strict shapes, run-time checked annotations, data folders."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.update(compiling.QUICKLY)

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
# Before any test imports dmrl: every annotation of ours is then checked at every call.
jaxtyping.install_import_hook(["dmrl"], "beartype.beartype")

import browser as chromium  # noqa: E402
import goldens  # noqa: E402


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers recorded from the authors' code: a small set here, all of it in $DMRL_GOLDEN."""
    return Path(os.environ.get("DMRL_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def recorded(golden_dir: Path) -> tuple:
    """(tensors, cases, Config, parameters) of the losses d1, wd1, SPG, coupled- and CJ-GRPO."""
    return goldens.load(golden_dir, "losses")


@pytest.fixture(scope="session")
def recorded_more(golden_dir: Path) -> tuple:
    """The same of EGSPO, DTM and UPO."""
    return goldens.load(golden_dir, "losses_more")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public data sets and published completions, which the repository does not hold."""
    if "DMRL_DATA" not in os.environ:
        pytest.skip("set DMRL_DATA to the folder of public data sets to run this test")
    return Path(os.environ["DMRL_DATA"])


MAPS = Path("/proc/self/maps")
MOST_MAPS = 45_000
"""Linux gives a process 65,530 memory maps, and every compiled program takes some: past the end
the next compilation dies."""


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs of earlier modules, once they are many."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """For modules that look at compiled programs or run one for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of one shape share their compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    """Headless Chromium, one for all pages."""
    yield from chromium.started(tmp_path_factory.mktemp("profile"))
