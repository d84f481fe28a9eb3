r"""How the authors' evaluation scripts read an answer, slips included (d1's and SPG's).

d1 (arXiv 2504.12216) and SPG train on one reading (a plain answer in the last `<answer>`) and
report another: these. They take the *first* box or answer and read past the end of the turn.
Both families share everything but GSM8K's last resort. Each function agrees with the authors'
code on texts of up to 100,000 characters and takes linear time, which their regular
expressions do not.
"""

import re

from dmrl.tasks.answers import LONGEST
from dmrl.tasks.latex import boxed

_NUMBER = re.compile(r"-?\d+\.?\d*")
_SIDE = "0123456789+-*/() "
_FENCE = re.compile(r"```([\d\s]++)```")
_BEFORE_CLOSING = re.compile(r"(\d{16})\s*+</answer>")
_ALONE = re.compile(r"\b(\d{16})\b")
_ENDS = ("<|eot_id|>", "<|endoftext|>")


def gsm8k(completion: str, family: str) -> float | None:
    """The number that d1 ('d1') or SPG ('spg') reads; None if they find none.

    The first usable number of the first box that has one ("1,035" is 1), else the last number
    of the first closed `<answer>` ("1,035" is 35), else with SPG the last number after the
    last `<answer>`, or of the whole text.
    """
    text = completion[:LONGEST]
    for content in _boxes(text):
        if content.strip("."):
            number = _float(content)
            if number is None:
                found = _NUMBER.search(content)
                number = float(found.group()) if found else None
            if number is not None:
                return number
    number = _last_number(_between(text, "<answer>", ("</answer>",)) or "")
    if number is None and family == "spg":
        number = _last_number(text.split("<answer>")[-1].split("</answer>")[0].strip())
    return number


def _boxes(text: str) -> list[str]:
    r"""The contents of all `\boxed{...}` on one line each, up to the first closing brace."""
    found, start, end, newline = [], 0, 0, 0
    while (start := text.find(r"\boxed{", start)) >= 0:
        start += len(r"\boxed{")
        end = end if end >= start else text.find("}", start)
        newline = newline if newline >= start else _find(text, "\n", start)
        if end < 0:
            break
        if end < newline:
            found.append(text[start:end].strip())
            start = end + 1
    return found


def _find(text: str, wanted: str, start: int) -> int:
    """Where `wanted` comes next; the end of the text if it does not."""
    found = text.find(wanted, start)
    return len(text) if found < 0 else found


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _last_number(text: str) -> float | None:
    if not text:
        return None
    number = _float(text)
    if number is None:
        found = _NUMBER.findall(text)
        number = float(found[-1]) if found else None
    return number


def math(completion: str) -> str | None:
    """The last box; without one the whole text; for an empty or open box the first answer."""
    text = completion[:LONGEST]
    answer = boxed(text)
    inside = None if answer else _between(text, "<answer>", ("</answer>",))
    return answer if inside is None else inside


def countdown(completion: str) -> str:
    """The expression: the last box or the whole text, of it the left side of the first `=`.

    The first `<answer>` counts only where a box is left open: without any box the authors' helper
    returns the whole text, so that a right expression in its tags is missed.
    """
    text = completion[:LONGEST]
    answer = boxed(text)
    if answer is None:
        inside = _between(text, "<answer>", ("</answer>",))
        answer = text if inside is None else inside
    for command, operator in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        answer = answer.replace(command, operator)
    before = 0
    for equals in re.finditer(r"=(?=[0-9. ])", answer):
        left = answer[before : equals.start()]
        expression = left[len(left.rstrip(_SIDE)) :]
        if expression:
            return expression.strip()
        before = equals.end()
    return answer


def sudoku(completion: str) -> str:
    """The cells, white space removed; '' where no pattern of the authors' cascade fits.

    Words and separators are kept and shift the cells.
    """
    text = completion[:LONGEST]
    found = None
    answer = text.find("<answer>")
    if answer >= 0:
        fence = _FENCE.search(text, answer + len("<answer>"))
        found = fence.group(1) if fence else None
    if not _shown(found):
        found = _between(text, "<answer>", (*_ENDS, "</answer>"))
    if not _shown(found):
        found = _between(text, "</answer>", _ENDS, open_end=True)
    for pattern in (_BEFORE_CLOSING, _ALONE):
        if not _shown(found):
            match = pattern.search(text)
            found = match.group(1) if match else None
    return re.sub(r"\s", "", found or "")


def _shown(text: str | None) -> bool:
    return bool(text and text.strip())


def _between(
    text: str, opening: str, closings: tuple[str, ...], open_end: bool = False
) -> str | None:
    """What stands between the first `opening` and the nearest of `closings`, stripped."""
    start = text.find(opening)
    if start < 0:
        return None
    start += len(opening)
    ends = [end for closing in closings if (end := text.find(closing, start)) >= 0]
    if not ends and not open_end:
        return None
    return text[start : min(ends, default=len(text))].strip()
