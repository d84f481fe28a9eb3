"""How tests compile: for programs that run once, compiling is most of the time."""

from importlib import metadata

_NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
"""XLA's fusion emitters take 3.5 times as long for small programs (measured: 495 programs of a
test file in 49 against 14 s). Later versions have no such switch, and XLA dies of unknown ones."""

FLAGS = _NO_EMITTERS if metadata.version("jaxlib").startswith("0.10.") else ""
"""For `XLA_FLAGS`, beside others."""

QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": FLAGS}
"""The environment of a process that compiles quickly."""
