"""A trained policy from disk: a run's folder, its `weights`, or converted weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dmrl import models, parallel
from dmrl.models import weights


class Policy(NamedTuple):
    """What `Programs` needs to sample."""

    model: models.Config
    trainable: Any
    frozen: Any
    """The base weights under an adapter; None without one."""


def folder(checkpoint: str) -> str:
    """The weights of `checkpoint`, which is their folder or that of a run.

    Raises:
      FileNotFoundError: neither is there.
    """
    if "://" in checkpoint:
        return checkpoint
    for place in (Path(checkpoint) / "weights", Path(checkpoint)):
        if (place / weights.MODEL_FILE).is_file():
            return str(place)
    raise FileNotFoundError(
        f"{checkpoint}: no {weights.MODEL_FILE} there or in its folder weights; a "
        "run writes weights when it ends, launch/convert.py makes them from a Hugging Face folder"
    )


def config(checkpoint: str) -> dict[str, Any] | None:
    """The resolved config of the run that `checkpoint` belongs to; None if it is none."""
    for place in (Path(checkpoint), Path(checkpoint).parent):
        if (place / "config.json").is_file():
            found = json.loads((place / "config.json").read_text()).get("config")
            if isinstance(found, Mapping):
                return dict(found)
    return None


def load(checkpoint: str, base: Any, mesh: Any) -> Policy:
    """The policy in `checkpoint`, laid out over the mesh.

    Args:
      base: under an adapter: the folder of the weights it was trained on, or the tree itself.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: an adapter without its base, or one of another model.
    """
    place = folder(checkpoint)
    kind = weights.collection_in(place)
    model = weights.open_weights(place, kind)[0]
    layout = parallel.shardings(mesh, jax.eval_shape(lambda: models.init(model, jax.random.key(0))))
    own = weights.load_weights(place, layout[kind], kind)[1]
    if kind == "params":
        return Policy(model, {"params": own}, None)
    if not base:
        raise ValueError(
            f"{checkpoint} is an adapter: name the weights it was trained on "
            "(--config.model.init_from=DIR of launch/evaluate.py, --base=DIR of generate.py)"
        )
    if isinstance(base, str):
        other = weights.leaves(weights.open_weights(base)[0])
        if {k: v.shape for k, v in other.items()} != {
            k: v.shape for k, v in weights.leaves(model).items()
        }:
            raise ValueError(f"{base} holds a model of other shapes than {checkpoint}")
        base = weights.load_base(base, layout["params"], model)
    return Policy(model, {"lora": own}, base)
