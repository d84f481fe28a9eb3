"""The options that GSM8K and MATH share."""

from dataclasses import dataclass

from dmrl.tasks.answers import PROTOCOLS, FreeText
from dmrl.tasks.options import at_least, equality_rule, one_of, source_of_rows


@dataclass(frozen=True)
class Mathematics(FreeText):
    """Questions whose answers are compared as mathematics."""

    style: str = "published"
    """'published': d1's training prompt and format. 'evaluation': d1's evaluation prompt,
    which asks for a box within the answer. 'compact': the bare question; the completion is a
    worked solution and the answer, in the data set's own form."""
    protocol: str = "paper"
    """How completions are read and rewarded. 'paper': as the papers describe it; text behind
    the end of the turn does not count, and the slips of the authors' code are mended. 'd1',
    'spg': exactly as by the authors' reward file, and `solved` as by their evaluation script
    (see docs/protocol.md)."""
    reward: str = "published"
    """'published': d1's, for the answer and for the format; in the compact style as 'solved'.
    'solved': 1 for a right answer, else 0, as TraceRL, MDPO and IGPO reward."""
    equality: str = "verify"
    """What makes `solved` under 'paper': 'verify', math-verify (extra `eval`) where spelling is
    not enough, or 'string', spelling alone."""
    shots: int = 0
    """Worked examples in the prompt, from train."""
    split_seed: int = 0
    """Draws validation and the worked examples."""
    held_out_size: int = 512
    """Questions in 'validation'."""
    source: str = "published"
    """'published': the files below `data_dir`. 'easy': generated questions for small models,
    which say nothing about the published ones (`dmrl.tasks.problems`). Or `jsonl:PATH`,
    `hf:NAME[/CONFIG][:SPLIT]`, `tfds:NAME` (see `dmrl.sources`), with the same fields."""
    data_dir: str | None = None
    """Directory holding the task's folder with train.jsonl and test.jsonl; default $DMRL_DATA."""

    def __post_init__(self) -> None:
        one_of("style", self.style, ("published", "evaluation", "compact"))
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("reward", self.reward, ("published", "solved"))
        equality_rule(self.equality, self.protocol)
        source_of_rows(self.source, "published", "easy")
        at_least("shots", self.shots, 0)
        at_least("split_seed", self.split_seed, 0)
        at_least("held_out_size", self.held_out_size, 1)

    def template(self, example: object) -> str | None:
        """None: the model fills every position."""
        return None

    def chosen(self, published: float, solved: float) -> float:
        """The reward that the options ask for."""
        return solved if self.reward == "solved" or self.style == "compact" else published
