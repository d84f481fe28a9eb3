"""How far a run's model drifts when its layers' weights are rounded to a byte each.

    python benchmarks/rounding.py --checkpoint=RUN [--size=256]

Greedy decoding of the test split with the weights as they are and with rounded ones, and at every
position of every state of the former: the change of the log-probability of the token that was
revealed, KL(as they are || rounded), and whether both predict the same token.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataclasses  # noqa: E402
import json  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402

from dmrl import data, decoding, evaluate, models, optim, recipe  # noqa: E402
from dmrl.diffusion.divergence import categorical_kl  # noqa: E402
from dmrl.diffusion.likelihood import completion_hidden  # noqa: E402
from dmrl.diffusion.probe import state_at  # noqa: E402
from dmrl.models import int8  # noqa: E402
from dmrl.programs import Programs  # noqa: E402
from dmrl.types import Denoiser, Rollout  # noqa: E402

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder", required=True)
SPLIT = flags.DEFINE_string("split", "test", "Held-out split")
SIZE = flags.DEFINE_integer("size", 0, "Examples, the first of the split; 0: all")
BATCH = flags.DEFINE_integer("batch", 256, "Rows at a time")


def drift(exact: Denoiser, rounded: Denoiser, rollout: Rollout, steps: int) -> dict[str, Any]:
    """Means over the masked positions of all states of a decoding."""

    def at(number: jax.Array) -> tuple[jax.Array, ...]:
        state = state_at(rollout, jnp.full((rollout.tokens.shape[0], 1), number), exact.mask_id)
        state = state[:, 0]
        both = [
            jax.nn.log_softmax(
                model.logits(completion_hidden(model, rollout.prompt, rollout.prompt_valid, state))
            )
            for model in (exact, rounded)
        ]
        masked = state == exact.mask_id
        label = rollout.tokens[..., None]
        one, other = (jnp.take_along_axis(x, label, axis=-1)[..., 0] for x in both)
        same = jnp.argmax(both[0], axis=-1) == jnp.argmax(both[1], axis=-1)
        found = (jnp.abs(one - other), categorical_kl(*both), same)
        return tuple(jnp.sum(jnp.where(masked, x, 0)) for x in (*found, jnp.ones_like(one)))

    change, kl, same, count = (jnp.sum(x) for x in jax.lax.map(at, jnp.arange(steps)))
    return {"|log p change|": change / count, "kl": kl / count, "same token": same / count}


def main(argv: list[str]) -> None:
    """Decodes with both and prints one JSON line each."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    run = decoding.opened(CHECKPOINT.value)
    made = recipe.build(json.loads((Path(CHECKPOINT.value) / "config.json").read_text())["config"])
    prompts: data.Prompts = data.tokenize(
        made.task,
        made.tokenizer,
        SPLIT.value,
        made.max_prompt_length,
        made.sampling.length,
        made.model.mask_token_id,
    )
    prompts = prompts.first(SIZE.value) if SIZE.value else prompts
    model = run.policy.model
    whole = run.policy.trainable if run.policy.frozen is None else {"params": run.policy.frozen}
    rounded = {**whole, "params": int8.quantized(whole["params"])}
    if run.policy.frozen is not None:
        whole, rounded = ({**tree, **run.policy.trainable} for tree in (whole, rounded))
    greedy = made.sampling.greedy
    if made.sampling.blocks == 1:
        greedy = dataclasses.replace(greedy, steps=max(made.evaluation.steps or (greedy.steps,)))
    programs = Programs(model, (), greedy, optim.make(optim.Optimizer(), 1), run.mesh)
    first = None
    for name, tree in (("as they are", whole), ("rounded", rounded)):
        args = (prompts, made.task, made.tokenizer, BATCH.value, jax.random.key(0))
        decoded = evaluate.decode(programs, tree, None, *args)
        first = first or decoded
        line = {"weights": name, "n": len(decoded.texts), **dict(evaluate.metrics(decoded))}
        agree = sum(a == b for a, b in zip(decoded.texts, first.texts, strict=True))
        print(json.dumps(line | {"same completion": agree / len(decoded.texts)}))
    some = jax.tree.map(lambda x: jnp.asarray(x[: BATCH.value]), first.rollout)
    both = (models.bind(model, tree) for tree in (whole, rounded))
    found = jax.jit(lambda r: drift(*both, r, greedy.steps))(some)
    print(json.dumps({name: float(value) for name, value in found.items()}))


if __name__ == "__main__":
    app.run(main)
