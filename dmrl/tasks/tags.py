"""d1's rewards for keeping the format, with and without the slips of the published code.

The rules come from W. Brown's GRPO demonstration; d1 (arXiv 2504.12216) and SPG use them for
GSM8K. Every function takes linear time on any text.
"""

import re

_SEAM = "\n</reasoning>\n<answer>\n"
_SOFT_SEAM = re.compile(r"</reasoning>\s*+<answer>")


def xml_count(text: str, protocol: str) -> float:
    """0.125 for each of the four tags that stands exactly once on lines of its own.

    Takes 0.001 off for every character after the end, twice. 'spg' measures one of the two
    from the opening tag of the answer, as its code does, so that long answers cost. Both
    authors' versions may be negative; 'paper' is at least 0.
    """
    count = 0.125 * (text.count("<reasoning>\n") == 1)
    count += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        mark = "\n<answer>\n" if protocol == "spg" else "\n</answer>\n"
        count += 0.125
        count -= len(_after(text, mark, protocol)) * 0.001
    if text.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(_after(text, "\n</answer>", protocol)) - 1) * 0.001
    return max(0.0, min(0.5, count)) if protocol == "paper" else count


def _after(text: str, mark: str, protocol: str) -> str:
    """The text behind the last `mark`; without one, all of it to the authors, else nothing."""
    before, found, after = text.rpartition(mark)
    return after if found or protocol != "paper" else before


def soft(text: str, multiline: bool) -> bool:
    """Whether the text begins with a reasoning and an answer in their tags.

    Args:
      multiline: whether either may hold line breaks. In the authors' code they may not, for
        want of a regex flag (d1 added it after the paper's runs).
    """
    opening = "<reasoning>"
    if not text.startswith(opening):
        return False
    end = len(text) if multiline else _line_end(text, len(opening))
    searched = -1  # no closing tag follows in this line
    for seam in _SOFT_SEAM.finditer(text, len(opening)):
        if seam.start() > end:
            return False
        if seam.end() > searched:
            searched = len(text) if multiline else _line_end(text, seam.end())
            if text.find("</answer>", seam.end(), searched) >= 0:
                return True
    return False


def _line_end(text: str, start: int) -> int:
    found = text.find("\n", start)
    return len(text) if found < 0 else found


def strict(text: str, multiline: bool) -> bool:
    """Whether the whole text is a reasoning and an answer, each tag on a line of its own.

    Args:
      multiline: as in `soft`; then the line break after the last tag may be missing too,
        which the authors demand of completions that end with a token.
    """
    endings = ("\n</answer>\n\n", "\n</answer>\n", "\n</answer>")
    ending = next((e for e in endings[: 3 if multiline else 2] if text.endswith(e)), None)
    if ending is None or not text.startswith("<reasoning>\n"):
        return False
    inner = text.removeprefix("<reasoning>\n").removesuffix(ending)
    reasoning, seam, answer = inner.partition(_SEAM)
    return bool(seam) and (multiline or "\n" not in reasoning + answer)
