"""A checkpoint as a model of EleutherAI's lm-eval harness (extra `eval`; launch/harness.py).

Generation is LLaDA's: `length` tokens in blocks, then cut where the task says. Likelihoods are
Monte-Carlo estimates of the ELBO, LLaDA's own (`dmrl.diffusion.likelihood.stratified_elbo`): lower
bounds in expectation, so perplexities and choices compare among diffusion models only.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dmrl import decoding, loglikelihood, tokenizer
from dmrl.diffusion.sampling import Sampling
from dmrl.loglikelihood import Pair

LENGTH, BLOCK = 256, 32
BUCKETS = tuple(1 << n for n in range(5, 14))
"""Lengths to which a batch of contexts is padded."""
TURN_ENDS = ("<|eot_id|>",)
"""Special tokens that end a text beside EOS: LLaDA's end of turn."""


@register_model("dmrl")
class Checkpoint(LM):
    """`--model dmrl --model_args checkpoint=DIR,...`.

    Args:
      checkpoint: a run, its weights, or converted weights.
      tokenizer: its folder; default the run's.
      base: of an adapter, the weights it was trained on; default those of the run.
      length: tokens of a completion; default what the task asks for (`max_gen_toks`), else 256.
        Rounded up to whole blocks.
      steps: denoising steps; default half the length.
      block: block length; default 32, or the length where that is less.
      mc_num: maskings of a likelihood; 1 is exact for continuations of one token.
      check_greedy: whether to find out if a continuation is what greedy decoding gives, a token a
        step: as many more forwards as it has tokens. False, where a task's metrics do not look
        (multiple choice), then says of none that it is.
      long_prompts: 'refuse', or 'cut' to the last tokens that fit.
      batch_size: requests at a time; changes no result.
      seed: of sampled completions and maskings.
      rules: further fields of `dmrl.diffusion.sampling.Sampling`: order, schedule, remask, cache,
        cfg_scale.

    Raises:
      ValueError: no tokenizer, an adapter without its base, or an option that cannot work.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str = "",
        base: str = "",
        length: int = 0,
        steps: int = 0,
        block: int = 0,
        mc_num: int = 128,
        check_greedy: bool = True,
        long_prompts: str = "refuse",
        batch_size: int | str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
        **rules: Any,
    ) -> None:
        super().__init__()
        del max_batch_size, device  # the harness names both; devices are those that JAX sees
        if long_prompts not in ("refuse", "cut"):
            raise ValueError(f"long_prompts={long_prompts!r}: choose one of refuse, cut")
        if mc_num < 1:
            raise ValueError(f"mc_num={mc_num}: give at least 1")
        known_rules = ("order", "schedule", "remask", "cache", "cfg_scale")
        for name in rules:
            if name not in known_rules:
                raise ValueError(f"no option {name!r}; of the sampler there are {known_rules}")
        self.rules = rules
        self.length, self.steps, self.block, self.seed = length, steps, block, seed
        self.mc_num, self.check_greedy, self.cuts = mc_num, check_greedy, long_prompts == "cut"
        self.batch = int(batch_size or 16)
        self.ready = decoding.opened(checkpoint, tokenizer, base)
        self.tok = self.ready.tokenizer
        self.name = tokenizer or checkpoint
        known = self.tok.get_vocab()
        self.ends = [
            self.ready.policy.model.eos_token_id,
            *(known[t] for t in TURN_ENDS if t in known),
        ]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's own; "" without one."""
        del chat_template
        return self.tok.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as text; the last one stays open where no answer is to follow.

        Raises:
          ValueError: the tokenizer has no template.
        """
        if self.tok.chat_template is None:
            raise ValueError("--apply_chat_template: the tokenizer has no chat template")
        return str(
            self.tok.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions of (context, options), in the order of the requests.

        Each ends before the first of `until` in its text. Requests of one length and temperature
        are decoded together, shorter contexts first.

        Raises:
          ValueError: an option that this sampler does not have, or a context that does not fit.
        """
        del disable_tqdm
        groups: dict[Sampling, list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[self._sampling(request.args[1])].append(i)
        contexts = [tokenizer.encode(self.tok, request.args[0]) for request in requests]
        texts = [""] * len(requests)
        for sampling, members in groups.items():
            room = self.ready.policy.model.max_sequence_length - sampling.length
            members.sort(key=lambda i: len(contexts[i]))
            done = self._decoded([self._fitted(contexts[i], room) for i in members], sampling)
            for i, tokens in zip(members, done, strict=True):
                texts[i] = self._text(tokens, _until(requests[i].args[1]))
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(estimate of log p(continuation | context) in nats, whether it is greedy) of each."""
        del disable_tqdm
        pairs = [self._pair(*request.args) for request in requests]
        values = self._estimates(pairs)
        greedy = self._greedy(pairs) if self.check_greedy else [False] * len(pairs)
        found = [(float(value), same) for value, same in zip(values, greedy, strict=True)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Estimates of log p(text) in nats. A text longer than the model can see is scored in
        pieces of half of that, each given as much before it as fits."""
        del disable_tqdm
        most = self.ready.policy.model.max_sequence_length
        pairs: list[Pair] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            ids = tokenizer.encode(self.tok, request.args[0])
            width = most if len(ids) <= most else most // 2
            for start in range(0, len(ids), width):
                piece = ids[start : start + width]
                pairs.append(Pair(ids[max(start + len(piece) - most, 0) : start], piece))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, value in zip(owner, self._estimates(pairs), strict=True):
            totals[i] += float(value)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _estimates(self, pairs: Sequence[Pair]) -> Any:
        return loglikelihood.estimate(self.ready, pairs, self.mc_num, self.batch, self.seed)

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        wanted = self.length or int(options.get("max_gen_toks") or LENGTH)
        block = self.block or min(BLOCK, wanted)
        length = -(-wanted // block) * block
        blocks = length // block
        steps = self.steps or max(block // 2, 1) * blocks
        return Sampling(length, steps, block, **_drawn(options), **self.rules)

    def _decoded(self, contexts: list[list[int]], sampling: Sampling) -> Any:
        """Tokens [N, length] of the completions."""
        size = (1, self.batch, self.seed)
        done = decoding.rollouts(self.ready, contexts, None, sampling, *size, BUCKETS)
        return np.concatenate([rollout.tokens for _, rollout in done])

    def _text(self, tokens: Any, until: Sequence[str]) -> str:
        ids = tokens.tolist()
        ids = ids[: min((ids.index(end) for end in self.ends if end in ids), default=len(ids))]
        text = str(self.tok.decode(ids, skip_special_tokens=True))
        return text[: min((text.index(u) for u in until if u in text), default=len(text))]

    def _fitted(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room and not self.cuts:
            raise ValueError(
                f"a context of {len(ids)} tokens, but there is room for {room}: give a smaller "
                "length, fewer shots, or long_prompts=cut"
            )
        return ids[max(len(ids) - room, 0) :]

    def _pair(self, context: str, continuation: str) -> Pair:
        """As the harness splits: spaces at the end of the context belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = tokenizer.encode(self.tok, context + continuation)
        given = tokenizer.encode(self.tok, context)
        scored = whole[len(given) :]
        if not scored:
            raise ValueError(f"continuation {continuation!r} has no token to score")
        return Pair(
            self._fitted(
                whole[: len(given)], self.ready.policy.model.max_sequence_length - len(scored)
            ),
            scored,
        )

    def _greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether decoding greedily, the surest token at each step, gives the continuation."""
        found = [False] * len(pairs)
        groups: dict[int, list[int]] = collections.defaultdict(list)
        for i, pair in enumerate(pairs):
            groups[len(pair.continuation)].append(i)
        for length, members in groups.items():
            members.sort(key=lambda i: len(pairs[i].context))
            one_by_one = Sampling(length, length, length)
            done = self._decoded([list(pairs[i].context) for i in members], one_by_one)
            for i, tokens in zip(members, done, strict=True):
                found[i] = tokens.tolist() == list(pairs[i].continuation)
        return found


def _until(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [u for u in ([until] if isinstance(until, str) else until) if u]


def _drawn(options: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature and nucleus of a request, greedy unless it says `do_sample`.

    Raises ValueError for a way of sampling that is not there.
    """
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample") or not temperature:
        return {"temperature": 0.0}
    for name, neutral in (("top_k", (None, 0, -1)), ("num_beams", (None, 1))):
        if options.get(name) not in neutral:
            raise ValueError(f"gen_kwargs {name}={options[name]}: this sampler has none")
    return {"temperature": temperature, "top_p": float(options.get("top_p") or 1.0)}
