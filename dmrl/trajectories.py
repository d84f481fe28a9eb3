"""The rows of trajectories.jsonl: traces of held-out completions and of training rollouts."""

from collections.abc import Iterator, Mapping
from typing import Any

from dmrl import data, evaluate, parallel, trace
from dmrl.diffusion.sampler import Sampling
from dmrl.recipe import Recipe
from dmrl.scoring import Scored
from dmrl.tasks import Task
from dmrl.types import Rollout


def reader(recipe: Recipe) -> trace.Reader:
    """How the tokens of a run read."""
    cfg = recipe.model
    return trace.Reader(recipe.tokenizer, cfg.mask_token_id, cfg.eos_token_id)


def of_split(
    decoded: evaluate.Decoded,
    prompts: data.Prompts,
    task: Task,
    read: trace.Reader,
    setting: Sampling,
    split: str,
    when: str,
    count: int,
) -> Iterator[Mapping[str, Any]]:
    """The first `count` completions as the report shows them: one JSON-able row each."""
    unique = not split.endswith("_multi")
    for i in range(min(count, len(decoded.texts))):
        scores = {name: float(values[i]) for name, values in decoded.scores.items()}
        row = _row(
            decoded.rollout, i, prompts.examples[i], task, read, scores, setting.steps, unique
        )
        names = {"split": split, "setting": f"{split} {evaluate.setting_name(setting)}", "id": i}
        yield {"when": when, **names, **row}


def of_step(recipe: Recipe, step: int, scored: Scored) -> list[dict[str, Any]]:
    """The completions of a training step's first prompt, with the states that they were branched
    at where a term asks for several fillings of a state; as many as the report shows of a split.

    All processes call this together.
    """
    task, rollout, host = recipe.task, scored.rollout, scored.host
    read, shown = reader(recipe), trace.layout(recipe.task, recipe.sampling.length)
    if rollout.states is not None:
        host = host._replace(states=parallel.gather(rollout.states))
    branched = [
        (parallel.gather(probe)._replace(reward=reward), getattr(term.hyper, "baseline", "mean"))
        for term, probe, reward in zip(
            recipe.terms, scored.probes, scored.step_rewards, strict=True
        )
        if probe is not None and reward is not None and reward.shape[-1] > 1
    ]
    names = {"split": "train", "setting": "training rollouts", "id": f"step {step}"}
    rows = []
    for i in range(min(recipe.loop.num_generations, recipe.evaluation.trajectories)):
        scores = {name: float(values[i]) for name, values in scored.parts.items()}
        steps = recipe.sampling.steps
        row = _row(host, i, scored.examples[i], task, read, scores, steps, unique=True)
        branches = [b for p, how in branched for b in trace.branches(p, i, read, shown, how)]
        rows.append({"when": f"completion {i + 1}", **names, **row, "branches": branches})
    return rows


def _row(
    rollout: Rollout,
    i: int,
    example: Any,
    task: Task,
    read: trace.Reader,
    scores: Mapping[str, float],
    steps: int,
    unique: bool,
) -> dict[str, Any]:
    """Row `i` with its example, scores and trace.

    A position of a template is right if the completion is a solution, or if it agrees with the
    reference answer; unknown where a puzzle has several answers (not `unique`) and none was found.
    """
    shown = trace.layout(task, rollout.tokens.shape[1])
    template, answer = task.template(example), task.answer(example)
    wanted: list[str] | None = None
    if template is not None and scores.get("solved") == 1.0:
        wanted = trace.texts(read.tok, rollout.tokens[i][shown.positions])
    elif template is not None and answer is not None and unique:
        wanted = [answer[c] for c in shown.positions]
    return {
        "prompt": task.prompt(example),
        "template": "".join(template[c] for c in shown.positions) if template else "",
        "reward": scores["reward"],
        "metrics": dict(scores),
        **trace.make(rollout, i, steps, read, shown, wanted),
    }
