"""The vocabulary of shapes: what flows between samplers, probes, losses and the trainer.

Axes, everywhere:
  B  rows (one completion each)     P  prompt length        L  completion length
  S  = P + L                        V  vocabulary           D  model width
  T  denoising steps                K  states per rollout   Z  fillings per state
  N  items of a Batch (whatever must be seen together: a completion, a state, a pair)
  W  positions of a window          F  features of a position for a learned order
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

Tokens = Int[Array, "*batch length"]
Valid = Bool[Array, "*batch length"]
PRNGKey = Key[Array, ""]
RowKeys = Key[Array, " b"]
"""One key a row."""
Metrics = dict[str, Float[Array, ""]]

TEMPLATE = -1
"""`reveal_step` of a position that the prompt's template fixed: never sampled, never trained."""

HINT = -2
"""`reveal_step` of a position that was injected from outside (inpainting)."""

FLAGS, TOP = 2, 8
"""What a learned order reads of a position beside hidden states: flags, highest probabilities."""


class Cached(NamedTuple):
    """Forwards that keep, and forwards that use, the keys and values of every layer.

    The store is theirs alone. What `extend` gives differs from `encode` by what the other
    positions would have answered to the tokens that changed since `prefill`.
    """

    prefill: Callable[..., tuple[Float[Array, "batch width d"], Any]]
    """(tokens [B,S], valid [B,S], start, width) -> what `Denoiser.window` gives, and the store."""
    extend: Callable[..., Float[Array, "batch width d"]]
    """(tokens, valid, store, start, width) -> hidden of the window, whose own keys and values are
    fresh while all others come from the store."""


class Denoiser(NamedTuple):
    """A masked diffusion model as pure functions with the parameters closed over.

    Made by `dmrl.models.bind`. Never passed through `jit` or `grad`: differentiate
    `lambda params: loss(bind(module, params), batch)` instead.
    """

    encode: Callable[..., Float[Array, "batch seq width"]]
    """(tokens [B,S], valid [B,S]) -> hidden [B,S,D]; `hidden[:, i]` predicts token i. A third
    argument, which may be ignored, says that only so many of the last positions will be read:
    the others may be left out, and who gave it reads from the end."""
    logits: Callable[..., Float[Array, "*lead vocab"]]
    """hidden [...,D] -> float32 [...,V]; the mask token's logit is -inf."""
    log_prob: Callable[..., Float[Array, "*lead labels"]]
    """(hidden [...,D], labels [...,Z], needed [...] or None) -> float32 log p [...,Z]; never
    materialises V. Rows that are not `needed` may be left out: they give 0 or the truth."""
    mask_id: int
    eos_id: int
    heads: Mapping[str, Callable[..., Array]] = MappingProxyType({})
    """Further outputs with parameters of their own, by name (see `dmrl.models.heads`)."""
    window: Callable[..., Float[Array, "batch width d"]] | None = None
    """(tokens, valid, start, width) -> hidden of positions start .. start + width [B,W,D], what
    `encode` gives there for less work and not for differentiation; `start` of all rows or of each
    its own [B]. None: there is no such way."""
    order: Callable[..., tuple[Array, Callable[[Array], Array]]] | None = None
    """(tokens, valid, start, width) -> (what `window` gives, score): a learned order. `score` maps
    features [B,W,F] of these positions (`dmrl.diffusion.decisions`) to scores [B,W], and is
    differentiated by the order's own parameters alone; None: the model has none."""
    score: Callable[..., Float[Array, "batch labels length"]] | None = None
    """`likelihood.state_log_prob` of (prompt, prompt_valid, state, labels, needed), without the
    rows of which no position is needed: these give 0. None: there is no such way."""
    cached: Cached | None = None
    """For samplers that reuse keys and values; None: there is no such way."""


class Models(NamedTuple):
    """The three readings of one architecture that a loss may use."""

    policy: Denoiser
    behaviour: Denoiser | None
    """theta_old, which drew the rollout; the frozen teacher of methods that have phases. None
    where it is the policy itself (one inner update, no phases): the ratio is then 1 at the point
    of differentiation and needs no second forward."""
    reference: Denoiser | None
    """Frozen reference, or None when no term needs one."""


class Rollout(NamedTuple):
    """Finished trajectories: integers and floats, no gradient.

    For samplers that never change a revealed token, every intermediate state is rebuilt
    exactly from `tokens` and `reveal_step` (see `dmrl.diffusion.probe.state_at`).
    """

    prompt: Int[Array, "b p"]
    prompt_valid: Bool[Array, "b p"]
    tokens: Int[Array, "b l"]
    reveal_step: Int[Array, "b l"]
    """Step at which the position was revealed, 0..T-1; TEMPLATE, HINT, or T if never."""
    log_prob: Float[Array, "b l"]
    """Behaviour log-probability of the token at the moment of its reveal (temperature 1)."""
    entropy: Float[Array, "b l"]
    """Entropy in nats of the position's distribution at the moment of its reveal."""
    row: Int[Array, " b"]
    """Index of the row in the whole rollout batch; noise is keyed by it."""
    group: Int[Array, " b"]
    """Completions of one prompt share a group, numbered 0.. within the rollout batch."""
    length: Int[Array, " b"]
    """Tokens up to and including the first EOS."""
    reward: Float[Array, " b"] | None = None
    """Filled by the host between the rollout and the update."""
    states: Int[Array, "b t l"] | None = None
    """Stored states [B,T+1,L], only where a revealed token may change."""
    drafts: Int[Array, "b t l"] | None = None
    """The sampler's own full predictions [B,T,L], only where a term needs them: at step t the
    visible tokens, and at every mask the token proposed there."""
    order_log_prob: Float[Array, "b l"] | None = None
    """log g(i | x) at the moment of a position's reveal (temperature 1), of a learned order."""


class ProbePlan(NamedTuple):
    """What an algorithm wants to know: fill these intermediate states in one shot."""

    step: Int[Array, "b k"]
    fillings: int
    temperature: float
    own: bool = False
    """Take the sampler's own draft at each state (`Rollout.drafts`, one filling) instead of
    fresh draws: a fresh draw has the same marginal but earns no credit for what came later."""


class Inner(NamedTuple):
    """Which of the inner updates on one rollout a batch is for."""

    number: Int[Array, ""]
    """0 .. total - 1."""
    total: int
    """mu."""
    key: PRNGKey
    """The same for all inner updates of a rollout, unlike the key that `prepare` gets."""


class Probe(NamedTuple):
    """One-shot completions of rebuilt states and, once scored, their rewards."""

    step: Int[Array, "b k"]
    state: Int[Array, "b k l"]
    fills: Int[Array, "b k z l"]
    """Equal to `state` wherever it is not masked."""
    reward: Float[Array, "b k z"] | None = None
