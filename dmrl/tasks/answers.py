"""What the published prompts and answers of d1's tasks have in common.

Source: d1 (arXiv 2504.12216), whose prompts and rewards SPG, wd1, EOSER and DTM share.
"""

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

TEXT = "\n" + "".join(map(chr, range(32, 127)))
"""Printable ASCII: what a character tokenizer needs for the published prompts."""

_LONGEST = 100_000
"""Longer answers are cut here, so that hostile text is scored in milliseconds."""


def last_answer(completion: str) -> str | None:
    """What stands between the last `<answer>` and its `</answer>`; None without such a pair.

    An unclosed tag is no answer, and tags do not nest: of several opening tags before one
    closing tag the first counts. Takes linear time on any text, and cuts an answer after
    100,000 characters.
    """
    for piece in reversed(completion.split("</answer>")[:-1]):
        _, tag, answer = piece.partition("<answer>")
        if tag:
            return answer[:_LONGEST]
    return None
