r"""Answers in LaTeX: the box that holds them, and the string rule of the MATH data set.

The rule is the one that came with MATH (Hendrycks et al., arXiv 2103.03874) and that d1, SPG
and most others use: two answers are equal if they are the same text once spelling is made
uniform. It knows no mathematics: `\frac{14}{3}` equals `14/3`, but `x/2` not `\frac{x}{2}`.
"""

import re

_SPELLINGS = (
    *(("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *((r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")),
)
"""What is replaced by what, in this order, before a unit is taken off."""
_NUMBERS = ((r"\%", ""), (" .", " 0."), ("{.", "{0."))
"""The same, afterwards."""


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` holds, braces balanced; None without one.

    An `\fbox` is returned with its command. `\boxed ` without braces holds what follows, up to
    a dollar sign. The whole text if there is no box at all: so do the authors' scorers.
    """
    _, found, rest = text.rpartition(r"\boxed ")
    if found:
        return rest.partition("$")[0]
    start = text.rfind(r"\boxed")
    start = text.rfind(r"\fbox") if start < 0 else start
    if start < 0:
        return text
    end = _closing(text, start)
    if end is None:
        return None
    box = text[start:end]
    return box[len(r"\boxed{") : -1] if box.startswith(r"\boxed{") else box


def has_box(text: str) -> bool:
    """Whether there is a box to open."""
    return r"\boxed" in text or r"\fbox" in text


def opened(text: str) -> str | None:
    """What the last box holds, stripped; of one left open, the rest of its line.

    The whole text without a box, and None for nothing at all.
    """
    inside = boxed(text)
    if inside is None:
        inside = text.rpartition("box")[2].partition("{")[2].partition("\n")[0]
    return inside.strip() or None


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0 and brace.group() == "}":
            return start + brace.end()
    return None


def same(a: str, b: str) -> bool:
    """Whether two answers are equal by the string rule.

    Where the rule breaks down on either (a fraction without an end, two units, a slash between
    what are no numbers), the texts themselves are compared, as by the published code.
    """
    try:
        return uniform(a) == uniform(b)
    except ValueError:
        return a == b


def uniform(text: str) -> str:
    """An answer in uniform spelling.

    Raises:
      ValueError: the rule has no result, see `same`.
    """
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    text = _without_unit(text)
    for old, new in _NUMBERS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    name, *values = text.split("=")
    if len(values) == 1 and len(name) <= 2:
        text = values[0]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _slash(r"\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    number, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("more than one unit")
    return number


def _braced_roots(text: str) -> str:
    first, *rest = text.split(r"\sqrt")
    for piece in rest:
        if not piece:
            raise ValueError("a root of nothing")
        first += r"\sqrt" + (piece if piece[0] == "{" else f"{{{piece[0]}}}{piece[1:]}")
    return first


def _braced_fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{2}` with both braces; unchanged where one lacks its second half."""
    first, *rest = text.split(r"\frac")
    for piece in rest:
        if not piece:
            raise ValueError("a fraction of nothing")
        if piece[0] != "{":
            if len(piece) < 2:
                return text
            below = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            piece = f"{{{piece[0]}}}{below}"
        first += r"\frac" + piece
    return first


def _slash(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)  # a ValueError for anything else, which `same` expects
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
