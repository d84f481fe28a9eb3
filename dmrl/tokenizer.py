"""Text <-> token ids, always behind the Hugging Face fast-tokenizer interface."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmrl.tasks import BLANK

MASK, EOS = "<|mask|>", "<|endoftext|>"


def characters(alphabet: str) -> Any:
    """A tokenizer with one token a character, for models trained from scratch.

    Ids: the mask token 0, EOS (also padding) 1, then the sorted alphabet. Returns a
    `transformers.PreTrainedTokenizerFast`: it saves, loads and decodes like any other.

    BLANK gets no token, as it marks masked positions in a template and in a decoded text.

    Raises:
      ValueError: the alphabet is empty.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import tokenizers
    import transformers

    letters = sorted(set(alphabet) - {BLANK})
    if not letters:
        raise ValueError(f"alphabet {alphabet!r} has no character to make a token of")
    vocab = {t: i for i, t in enumerate([MASK, EOS, *letters])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=None))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(?m)."), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, mask_token=MASK, eos_token=EOS, pad_token=EOS
    )


def load(path: str) -> Any:
    """The fast tokenizer saved in `path` (or named `path` on a hub that can be reached).

    Raises:
      ValueError: nothing loadable is there, or it has no EOS token.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer at {path!r}: give a local folder with tokenizer.json ({error})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {path!r} has no EOS token: completions could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, no special tokens added.

    Raises:
      ValueError: the tokenizer cannot represent a character.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # the Rust core raises bare Exceptions
        known = tokenizer.get_vocab()
        missing = sorted({c for c in text if c not in known})
        raise ValueError(f"cannot tokenize {text!r}: no token for {missing}") from error
    return [int(i) for i in ids]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user turn, through the chat template if the tokenizer has one."""
    if not text:
        return []
    if tokenizer.chat_template is None:
        return encode(tokenizer, text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return encode(tokenizer, rendered)


def encode_template(tokenizer: Any, template: str | None, length: int, mask_id: int) -> list[int]:
    """`length` ids with the mask at every BLANK; all masked if `template` is None.

    EOS follows a shorter one: not every board of a size has as many tokens in every tokenizer.

    Raises:
      ValueError: the template is longer than `length` tokens.
    """
    if template is None:
        return [mask_id] * length
    ids: list[int] = []
    for piece in _split_blanks(template):
        ids += [mask_id] * len(piece) if piece[0] == BLANK else encode(tokenizer, piece)
    if len(ids) > length:
        raise ValueError(f"template {template!r} is {len(ids)} tokens, the completion {length}")
    return ids + [tokenizer.eos_token_id] * (length - len(ids))


def _split_blanks(template: str) -> list[str]:
    pieces: list[str] = []
    for character in template:
        if pieces and (pieces[-1][0] == BLANK) == (character == BLANK):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Any, Any]:
    """Rows padded on the left to [B, length], and which tokens are real.

    Raises:
      ValueError: a row is longer than `length`.
    """
    longest = max((len(row) for row in rows), default=0)
    if longest > length:
        count = sum(len(row) > length for row in rows)
        raise ValueError(
            f"{count} of {len(rows)} prompts are longer than max_prompt_length={length} "
            f"(longest {longest}): raise it, shorten the prompts, or set long_prompts=cut to keep "
            "their last tokens, as d1 does"
        )
    tokens = np.full((len(rows), length), pad_id, np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        valid[i, length - len(row) :] = True
    return tokens, valid


def decode(
    tokenizer: Any, tokens: np.ndarray, mask_id: int, eos_id: int, whole: bool = False
) -> list[str]:
    """Texts of completions [B, L]; a position still masked is BLANK.

    Cut at the first EOS or, `whole`, with all that follows it but special tokens.
    """
    texts = []
    for row in np.asarray(tokens):
        ends = np.flatnonzero(row == eos_id)
        row = row[: ends[0]] if len(ends) and not whole else row
        texts.append(_decode_row(tokenizer, row, mask_id))
    return texts


def _decode_row(tokenizer: Any, row: np.ndarray, mask_id: int) -> str:
    masked = row == mask_id
    if not masked.any():
        return str(tokenizer.decode(row.tolist(), skip_special_tokens=True))
    edges = np.flatnonzero(np.diff(masked)) + 1
    pieces = np.split(row, edges)
    return "".join(
        BLANK * len(p) if p[0] == mask_id else _decode_row(tokenizer, p, mask_id) for p in pieces
    )
