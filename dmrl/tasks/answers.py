"""What the published prompts and answers of d1's tasks have in common.

Source: d1 (arXiv 2504.12216), whose prompts and rewards SPG, wd1, EOSER and DTM share.
"""

import re

FORMAT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
"""The format block with which d1 opens every user turn."""

BOXED_FORMAT = r"""Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\boxed{...}
</answer>"""
"""The block of d1's evaluation prompts for mathematics, which differ from those of training."""

TEXT = "\n" + "".join(map(chr, range(32, 127)))
"""Printable ASCII: what a character tokenizer needs for the published prompts."""


class FreeText:
    """What all tasks share whose completions are text and no board."""

    @property
    def alphabet(self) -> str:
        """Printable ASCII."""
        return TEXT

    @property
    def grid(self) -> list[list[int]] | None:
        """None: no board."""
        return None


PROTOCOLS = ("paper", "d1", "spg")
"""How completions are read: by the papers' rules, or exactly as by the code of one family."""

LONGEST = 100_000
"""Longer texts are cut here, so that hostile ones are scored in milliseconds."""

_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")


def finished(completion: str) -> str:
    """What stands before the first end-of-turn marker of LLaDA; at most 100,000 characters."""
    return _END.split(completion[:LONGEST], maxsplit=1)[0]


def last_answer(completion: str) -> str | None:
    """What stands between the last `<answer>` and its `</answer>`; None without such a pair.

    An unclosed tag is no answer, and tags do not nest: of several opening tags before one
    closing tag the first counts. Takes linear time on any text, and cuts an answer after
    100,000 characters.
    """
    for piece in reversed(completion.split("</answer>")[:-1]):
        _, tag, answer = piece.partition("<answer>")
        if tag:
            return answer[:LONGEST]
    return None


def open_answer(completion: str) -> str | None:
    """What follows the last `<answer>`, up to a `</answer>` if there is one; None without."""
    _, tag, answer = completion.rpartition("<answer>")
    return answer.partition("</answer>")[0].strip() if tag else None


def answer_or_box(completion: str) -> str | None:
    r"""The last `<answer>`, closed or not; where it is empty or missing, the text if it has a
    `\boxed`. None without either."""
    return open_answer(completion) or (completion if r"\boxed" in completion else None)


def rendered(style: str, instruction: str, question: str, shots: list[tuple[str, str]]) -> str:
    """A user turn about `question`, after worked examples (question, answer).

    Args:
      style: 'compact', the bare question; 'published', d1's training prompt; 'evaluation',
        d1's evaluation prompt, which asks for a box within the answer.
      instruction: what the published prompts say before the question, '' for nothing.
    """
    if shots:
        turns = [*shots, (question, "")]
        question = "\n\n".join(
            f"Question: {asked}\nAnswer:\n{told.rstrip()}" for asked, told in turns
        )
    if style == "compact":
        return f"{question}\n"
    if style == "published":
        return "\n\n".join(filter(None, [FORMAT, instruction, question]))
    return f"{instruction}\n{BOXED_FORMAT}\n\n{question}"
