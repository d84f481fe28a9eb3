"""The yardstick: the standard algorithm, plainly written in PyTorch.

What the released trainers of masked diffusion models compute, on our weights: a LLaMA-style
bidirectional transformer; a sampler that runs all positions through the vocabulary head at every
step, perturbs and normalises whole rows and picks the surest tokens row by row; losses that take
whole-sequence logits and slice them. Written for these benchmarks; needs the `bench` extra.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dmrl.algorithms import diffu_grpo, spg
from dmrl.diffusion.sampler import Sampling
from dmrl.models import Config


def tensor(x: Any) -> Tensor:
    """A copy of a jax or numpy array; integers become int64, as PyTorch indexes."""
    array = np.asarray(x)
    kind = np.int64 if array.dtype == np.int32 else array.dtype
    return torch.from_numpy(array.astype(kind, copy=True))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.eps = cfg.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        d, kv = cfg.d_model, cfg.head_dim * cfg.n_kv_heads
        self.head_dim = cfg.head_dim
        self.attn_norm, self.ff_norm = RMSNorm(cfg), RMSNorm(cfg)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj = nn.Linear(d, cfg.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d, cfg.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(cfg.mlp_hidden_size, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            f(h).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        grouped = q.shape[1] != k.shape[1]
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        x = x + self.attn_out(y.transpose(1, 2).reshape(batch, seq, -1))
        h = self.ff_norm(x)
        return x + self.ff_out(functional.silu(self.ff_proj(h)) * self.up_proj(h))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B,H,S,D], rotate-half, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Transformer(nn.Module):
    """tokens [B,S] without padding -> logits [B,S,V]."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = RMSNorm(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        half = self.cfg.head_dim // 2
        where = {"dtype": torch.float32, "device": tokens.device}
        frequency = self.cfg.rope_theta ** (-torch.arange(half, **where) / half)
        angle = torch.arange(tokens.shape[1], **where)[:, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.ln_f(x))


def model(cfg: Config, params: Mapping[str, Any]) -> Transformer:
    """The transformer with our weights."""
    made = Transformer(cfg)
    with torch.no_grad():
        for name, target in made.named_parameters():
            target.copy_(ours(params, name))
    return made


def ours(params: Mapping[str, Any], name: str) -> Tensor:
    """The leaf of our tree that holds `name`: layers are stacked, linear maps are [in, out]."""
    if name.startswith("blocks."):
        _, layer, *path, _ = name.split(".")
        inside = ["attn"] if path[0] in ("q_proj", "k_proj", "v_proj", "attn_out") else []
        node = params["blocks"]
        for key in [*inside, *path]:
            node = node[key]
        (kind,) = node.keys()
        leaf = tensor(np.asarray(node[kind])[int(layer)])
        return leaf.T if kind == "kernel" else leaf
    if name == "head.weight":
        return tensor(params["head"]).T
    return tensor(params["ln_f"]["scale"] if name == "ln_f.weight" else params["embedding"])


def gumbel(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """exp(logits) / E^T with E ~ Exp(1): its argmax is a Gumbel-max draw at temperature T."""
    if temperature == 0:
        return logits
    uniform = torch.rand_like(logits, dtype=dtype)
    return logits.to(dtype).exp() / (-uniform.log()).pow(temperature)


@torch.inference_mode()
def generate(
    network: Transformer, prompt: Tensor, config: Sampling, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The usual sampler, low-confidence order: completions [B,L].

    `dtype` is that of noise and softmax: the published sampler has float64, trainers the model's.
    """
    mask_id, (rows, start) = network.cfg.mask_token_id, prompt.shape
    blank = torch.full((rows, config.length), mask_id, device=prompt.device)
    x = torch.cat([prompt, blank], dim=1)
    steps, width = config.steps // config.blocks, config.block_length
    base, more = divmod(width, steps)
    for block in range(config.blocks):
        end = start + (block + 1) * width
        for step in range(steps):
            masked = x == mask_id
            logits = network(x)
            proposal = gumbel(logits, config.temperature, dtype).argmax(dim=-1)
            probability = functional.softmax(logits.to(dtype), dim=-1)
            confidence = probability.gather(-1, proposal[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            proposal = torch.where(masked, proposal, x)
            confidence = torch.where(masked, confidence, -torch.inf)
            chosen = torch.zeros_like(masked)
            for row in range(rows):
                best = confidence[row].topk(base + (step < more)).indices
                chosen[row, best] = True
            x[chosen] = proposal[chosen]
    return x[:, start:]


def _completion_logits(network: Transformer, prompt: Tensor, state: Tensor) -> Tensor:
    """Whole-sequence logits, then the completion's."""
    return network(torch.cat([prompt, state], dim=-1))[:, prompt.shape[-1] :]


def _log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return -functional.cross_entropy(rows, labels.reshape(-1), reduction="none").view(labels.shape)


def spg_loss(network: Transformer, batch: Mapping[str, Tensor], hp: spg.Hyper) -> Tensor:
    """SPG with ELBO for gains and the mixture for losses; `batch` is `spg.Batch` as tensors."""
    n, m, length = batch["state"].shape
    prompt, state = batch["prompt"].flatten(0, 1), batch["state"].flatten(0, 1)
    labels = batch["labels"].repeat_interleave(m, dim=0)
    logits = _completion_logits(network, prompt, state)
    log_prob = _log_prob(logits, labels).view(n, m, length)
    probability = functional.softmax(logits, dim=-1).gather(-1, labels[..., None])
    weight, seen = batch["inverse_t"], batch["inverse_t"] > 0
    lower = (log_prob * weight).sum(-1).mean(-1) / batch["length"].clamp(min=1)
    powered = (probability.view(n, m, length).pow(hp.eubo_beta) * weight).mean(1)
    ever = seen.any(1)
    inside = torch.where(ever, powered, 1.0).log() / hp.eubo_beta
    upper = inside.sum(-1) / ever.sum(-1).clamp(min=1)
    mixed = (1 - hp.omega) * lower + hp.omega * upper
    estimate = torch.where(batch["advantage"] > 0, lower, mixed)
    return -(batch["share"] * batch["advantage"] * estimate).sum()


def diffu_grpo_loss(
    network: Transformer, batch: Mapping[str, Tensor], hp: diffu_grpo.Hyper
) -> Tensor:
    """Clipped token ratios and k3; `batch` is `surrogate.Batch` with Z = 1 as tensors."""
    labels, weight = batch["labels"][:, 0], batch["weight"][:, 0]
    logits = _completion_logits(network, batch["prompt"], batch["state"])
    log_prob = _log_prob(logits, labels)
    ratio = (log_prob - batch["old"][:, 0]).exp()
    gain = batch["advantage"]
    assert hp.epsilon is not None
    clipped = ratio.clamp(1 - hp.epsilon, 1 + hp.epsilon)
    terms = -torch.minimum(ratio * gain, clipped * gain)
    gap = batch["reference"][:, 0] - log_prob
    return (weight * (terms + hp.beta * (gap.exp() - gap - 1))).sum()
