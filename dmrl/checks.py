"""What cannot work together in a recipe, said before anything is computed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmrl import models
from dmrl.diffusion.sampling import Sampling
from dmrl.models import weights
from dmrl.objective import Term, needs
from dmrl.rescue import Rescue


def sampler(terms: Sequence[Term], sampling: Sampling) -> None:
    """Raises ValueError where a term reads from a rollout what this sampler does not tell, or
    probes another law than the sampler draws from."""
    probing = [t.name for t in terms if hasattr(t.algorithm, "probes")]
    for name, plain in (("cfg_scale", 0), ("top_p", 1)):
        value = getattr(sampling, name)
        if probing and value != plain:
            raise ValueError(
                f"sampling.{name}={value} changes what the sampler draws but not the probes of "
                f"{', '.join(probing)}: set it to {plain}, or drop the term"
            )
    per_step = [t.name for t in terms if getattr(t.algorithm, "READS_REVEAL_STEP", False)]
    if sampling.remasks and per_step:
        raise ValueError(
            f"sampling.remask={sampling.remask!r} changes revealed tokens, but "
            f"{', '.join(per_step)} scores what each step revealed: set it to 'none'"
        )
    drafting = [t.name for t in terms if "drafts" in needs([t])]
    for name in ("schedule", "cache"):
        unfit = sampling.adaptive if name == "schedule" else sampling.approximate
        if drafting and unfit:
            raise ValueError(
                f"sampling.{name}={getattr(sampling, name)!r} gives no drafts of whole completions "
                f"step by step, which {', '.join(drafting)} needs: take the default"
            )


def probes(terms: Sequence[Term], rescue: Rescue, reward_text: str) -> None:
    """Raises ValueError where what a term probes would be replaced, or rewarded for more than the
    term counts."""
    probing = ", ".join(t.name for t in terms if hasattr(t.algorithm, "probes"))
    if probing and rescue.fraction:
        raise ValueError(
            f"rescue.fraction={rescue.fraction} replaces completions whose states "
            f"{probing} has probed: set it to 0, or drop the term"
        )
    if probing and reward_text == "full":
        raise ValueError(
            f"reward_text={reward_text!r} rewards fillings for what follows their EOS, which "
            f"{probing} leaves out: set it to 'upto_eos', or drop the term"
        )


def order(terms: Sequence[Term], sampling: Sampling, model: models.Config) -> None:
    """Raises ValueError where an order and a denoiser would both be trained, or neither."""
    orders = [t for t in terms if "order" in needs([t])]
    others = ", ".join(t.name for t in terms if t not in orders)
    names = ", ".join(t.name for t in orders)
    if not orders:
        if sampling.learned:
            raise ValueError(f"sampling.order={sampling.order!r}, but no term trains an order")
        if not model.lora_rank and model.param_dtype != "float32":
            raise ValueError(
                "without an adapter all weights are trained and need "
                f"model.param_dtype='float32', not {model.param_dtype!r} (compute may stay "
                "model.dtype='bfloat16')"
            )
        return
    if others:
        raise ValueError(
            f"{names} trains an order and keeps the denoiser, {others} trains the denoiser: make "
            "it two runs, after which either decodes with the other"
        )
    if model.lora_rank:
        raise ValueError(
            f"model.lora_rank={model.lora_rank}, but {names} trains no adapter: set it to 0 "
            "(launch/convert.py adds a trained one to its base)"
        )
    seen = (sampling.schedule, sampling.remask, sampling.top_p)
    if not sampling.learned or seen != ("uniform", "none", 1.0):
        raise ValueError(
            f"{names} trains the order of a sampler with order='learned:T', schedule='uniform', "
            f"remask='none' and top_p=1, not {sampling.order!r}, {sampling.schedule!r}, "
            f"{sampling.remask!r} and {sampling.top_p}"
        )
    for term in orders:
        wanted = getattr(term.hyper, "top_k", 0)
        if wanted != sampling.order_rule.top_k:
            raise ValueError(
                f"terms.{term.name}.top_k={wanted}, but sampling.order={sampling.order!r}: give "
                f"it the same K, 'learned:{sampling.order_rule.temperature},{wanted}'"
            )


def preferences(config: Mapping[str, Any], terms: Sequence[Term], rescue: Rescue) -> None:
    """Raises ValueError where something needs rollouts, which pairs of a file do not have."""
    if config["num_generations"] != 2:
        raise ValueError(
            f"num_generations={config['num_generations']}, but preferences come in pairs: set it "
            "to 2 (and group_size of the term)"
        )
    sampled = [t.name for t in terms if hasattr(t.algorithm, "probes") or "drafts" in needs([t])]
    if sampled or rescue.fraction or config["phase_steps"]:
        who = ", ".join([*sampled, *["rescue"][: bool(rescue.fraction)]]) or "phase_steps"
        raise ValueError(f"preferences are not sampled, but {who} needs rollouts: drop one of them")


SAME = {
    "group_size": ("num_generations",),
    "block_length": ("sampling", "block_length"),
    "steps": ("sampling", "steps"),
}
"""Options of terms that repeat a value which the loop or the sampler owns."""


def agree(terms: Sequence[Term], config: Mapping[str, Any]) -> None:
    """Raises ValueError where an option of a term repeats another value than its owner has."""
    for term in terms:
        for name, path in SAME.items():
            owned = functools.reduce(lambda tree, key: tree[key], path, config)
            value = getattr(term.hyper, name, owned)
            used = name != "block_length" or getattr(term.hyper, "masking", "") in (
                "",
                "block_random",
            )
            if used and value != owned:
                raise ValueError(
                    f"terms.{term.name}.{name}={value}, but {'.'.join(path)}={owned}: "
                    "they must be the same"
                )


OWN_FIELDS = (
    *("dtype", "param_dtype", "remat", "attention"),
    *("lora_rank", "lora_alpha", "int8"),
)
"""Fields of the model's Config that a run may choose whatever its initial weights say."""


def fits(init_from: str, model: models.Config) -> None:
    """Raises ValueError where stored weights belong to another architecture."""
    if "://" not in init_from and not Path(init_from).exists():
        raise ValueError(f"model.init_from={init_from!r} does not exist")
    stored = dataclasses.asdict(weights.open_weights(init_from)[0])
    for name, value in dataclasses.asdict(model).items():
        if name not in OWN_FIELDS and value != stored[name]:
            raise ValueError(
                f"model.{name}={value}, but the weights in {init_from} have {stored[name]}"
            )
