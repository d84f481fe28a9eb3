"""A run's learned order: fresh, warm-started by imitation, on disk, beside another denoiser."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmrl import data, models, optim, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.held import Evaluated, Held
from dmrl.models import weights
from dmrl.objective import make_term, needs
from dmrl.policy import Policy
from dmrl.programs import Programs, TrainState
from dmrl.recipe import Recipe
from dmrl.stages import StepResult, check_shared

FOLDER = "order"
"""Of a run, beside `weights`."""


def is_trained(recipe: Recipe) -> bool:
    """Whether a run trains an order and leaves its denoiser alone."""
    return "order" in needs(recipe.terms)


def fresh(recipe: Recipe) -> Any:
    """What such a run trains, from its seed: {'order': ...}."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), 21)
    return {"order": models.unmasking.init(recipe.model, key)}


def fresh_on(recipe: Recipe, mesh: Any) -> Any:
    """The same, every device making its own part."""
    layout = parallel.shardings(mesh, jax.eval_shape(lambda: fresh(recipe)))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: fresh(recipe), out_shardings=layout)()


def load(place: str, model: models.Config, mesh: Any) -> Any:
    """The order in `place` (its folder or that of a run), for a denoiser of the shape `model`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was trained beside a denoiser of another shape.
    """
    inner = Path(place) / FOLDER
    if "://" not in place and (inner / weights.MODEL_FILE).is_file():
        place = str(inner)
    theirs = weights.open_weights(place, FOLDER)[0]
    for name, value in dataclasses.asdict(model).items():
        other = getattr(theirs, name)
        if name in SHAPE and other != value:
            raise ValueError(
                f"the order in {place} was trained beside a denoiser with {name}={other}, "
                f"this one has {value}"
            )
    shapes = jax.eval_shape(lambda: models.unmasking.init(model, jax.random.key(0)))
    return weights.load_weights(
        place, parallel.shardings(mesh, {"order": shapes})["order"], FOLDER
    )[1]


def beside(
    policy: Policy, places: Sequence[str], decoders: Iterable[Sampling], mesh: Any
) -> Policy:
    """`policy` with the order of the first of `places` that has one, if a decoder asks for it.

    Raises ValueError, or as `load` does, where there is none that fits.
    """
    if not any(decoder.learned for decoder in decoders):
        return policy
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            own = load(place, policy.model, mesh)
            return policy._replace(trainable={**policy.trainable, FOLDER: own})
    raise ValueError(
        f"no trained order in {' or '.join(places)}: name a run that trained one "
        "(--order_from=DIR), or another --order"
    )


SHAPE = ("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", "rope_theta", "mask_token_id")
"""Fields of the model's Config in which an order and its denoiser must agree."""


class Imitation:
    """The stage before reinforcement: the order of max-confidence, state by state.

    The denoiser decodes training prompts greedily by max-confidence, a position a step.
    """

    name = "imitation"

    def __init__(self, recipe: Recipe, mesh: Any, held: Held) -> None:
        """Raises ValueError for sizes that the stage cannot work with."""
        self.recipe, self.held = recipe, held
        settings, own = recipe.imitation, recipe.sampling
        self.steps = settings.steps
        self.train = held.prompts["train"]
        seed = data.stream_seed(recipe.seed, self.name)
        self.batches = data.batches(len(self.train.examples), settings.batch, seed)
        options = {"steps": own.steps, "block_length": own.block_length}
        self.programs = Programs(
            recipe.model,
            (make_term("imitation", 1.0, options),),
            held.unlearned,
            optim.make(recipe.imitation_optimizer, self.steps),
            mesh,
        )
        check_shared("imitation.batch", settings.batch, mesh)
        self._validation: Any = None

    def init(self, trainable: Any) -> TrainState:
        """From the fresh order."""
        return self.programs.init_state(trainable)

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """Decode, then one update on every state gone through."""
        del number
        start = time.perf_counter()
        rollout = self._decode(state.trainable, self.train, index, key)
        state, metrics = self.programs.update(state, self.held.frozen, [rollout], [(None,)], key)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        return StepResult(state, values | {"step_time": time.perf_counter() - start}, [])

    def evaluate(self, state: TrainState, number: int) -> Evaluated | None:
        """Agreement on validation states every so often; done when it reaches the target."""
        settings = self.recipe.imitation
        if not number or (number % settings.evaluate_every and number < self.steps):
            return None
        if self._validation is None:  # the denoiser stays, and with it what it decodes
            prompts, key = self.held.prompts["validation"], self.held.key
            batches = data.in_order(len(prompts.examples), settings.batch)
            index = next(batches)[0]
            self._validation = self._decode(state.trainable, prompts, index, key)
        found = self.programs.measure(
            state.trainable, self.held.frozen, self._validation, self.held.key
        )
        agreement = float(found["order/agreement"])
        return Evaluated({"eval/agreement": agreement}, [], done=agreement >= settings.target)

    def _decode(self, trainable: Any, prompts: data.Prompts, index: Any, key: jax.Array) -> Any:
        rows = prompts.rows(index)
        return self.programs.rollout(trainable, self.held.frozen, rows, 0, key)[0]
