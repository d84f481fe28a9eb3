"""Package metadata, in one place. Tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

CORE = [
    # flax 0.12.8 does not import on jax >= 0.11.1; 0.12.9 does.
    "jax>=0.10.2",
    "flax>=0.12.8; python_version < '3.12'",
    "flax>=0.12.9; python_version >= '3.12'",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "ml_collections>=1.1.0",
    "absl-py>=2.1",
    "numpy>=2.0",
    "tensorstore>=0.1.72",
    "safetensors>=0.6",
    "transformers>=5.0",  # tokenizers only: no modelling code is imported
    "jaxtyping>=0.3.11",
    "rich>=13",
    "jinja2>=3.1",  # chat templates: transformers does not install it
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "hf": ["datasets>=4.0", "huggingface_hub>=1.0"],
    "eval": ["math-verify>=0.9.0", "lm-eval>=0.4.13"],
    "tfds": ["tensorflow-datasets>=4.9.9", "array-record>=0.7"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.20"],
    "bench": ["torch>=2.5"],  # the peer that speed is measured against
    "dev": [
        "pytest>=9.0",
        "hypothesis>=6.100",
        "math-verify>=0.9.0",
        "pytest-xdist>=3.8",
        "scipy>=1.15",
        "beartype>=0.22",
        "ruff>=0.14",
        "mypy>=1.18",
        "matplotlib>=3.9",  # figures of benchmarks and notebooks
        "nbclient>=0.10",  # runs the notebooks
        "ipykernel>=6.29",
    ],
}

setup(
    name="dmrl",
    version=VERSION,
    description="Reinforcement learning for masked diffusion language models, in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dmrl", "dmrl.*", "configs"]),
    package_data={"dmrl": ["*.js", "*.css", "py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
