"""Pages on paper: what they embed, what they refuse, what nothing written by a model can do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTILE

from dmrl import page, viewer

NASTY = [
    HOSTILE,
    "\x00\x1f\x7f",
    "<!--",
    "]]>",
    "\u2029",
    "\udfff",
    "&lt;",
    "\\u003c/script>",
    "'\"",
]


def trace(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "1",
        "setting": "greedy_2",
        "when": "a",
        "tokens": NASTY,
        "reveal_step": [0] * len(NASTY),
        "log_prob": [0.0] * len(NASTY),
        "entropy": [0.0] * len(NASTY),
        "steps": 2,
    }
    return row | changes


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1], parse_constant=pytest.fail)


def test_every_character_arrives_and_none_is_markup(tmp_path):
    name = "".join(NASTY)
    target = viewer.write(tmp_path / "out.html", name, [trace(prompt=name, log_prob=[-1e-9] * 9)])
    text = target.read_text(encoding="utf-8")
    assert embedded(text)["traces"][0]["tokens"] == NASTY
    assert embedded(text)["traces"][0]["prompt"] == embedded(text)["name"] == name
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert data.isascii()
    assert not re.search(r"[<>&\x00-\x1f\x7f]", data)
    assert text.lower().count("<script") == text.lower().count("</script") == 2
    assert "<img" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_page_fetches_nothing_and_runs_no_other_script(tmp_path):
    text = viewer.write(tmp_path / "out.html", "t", [trace(tokens=["x"] * 9)]).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert re.findall(r'\s(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "default-src 'none'" in text
    assert "unsafe" not in text


def test_scripts_set_no_markup():
    scripts = sorted(Path(page.__file__).parent.glob("*.js"))
    assert {"page.js", "viewer.js", "report.js"} <= {script.name for script in scripts}
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_what_is_not_finite_is_missing(tmp_path):
    row = trace(reward=float("nan"), entropy=[float("inf")] + [1 / 3] * 8)
    [shown] = embedded(viewer.write(tmp_path / "o.html", "t", [row]).read_text())["traces"]
    assert shown["reward"] is None
    assert shown["entropy"] == [None] + [0.333333] * 8


def test_a_page_without_a_trace_is_refused_and_a_page_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no trace to show in .*out\.html"):
        viewer.write(tmp_path / "out.html", "t", [])
    with pytest.raises(TypeError):
        page.write(tmp_path / "out.html", "t", {"x": object()}, (), ())
    with pytest.raises(FileNotFoundError):
        viewer.write(tmp_path / "no" / "out.html", "t", [trace()])
    assert list(tmp_path.iterdir()) == []


def test_rows_are_chosen_by_prompt_and_malformed_ones_counted():
    rows = [trace(when=w, id=i) for w in ("before", "after") for i in range(viewer.MAX_IDS + 2)]
    rows += [trace(when="after", id=0, steps=3), trace(answer=["x"]), trace(steps=None), {}]
    kept, left_out, malformed = viewer.choose(rows)
    assert (len(kept), left_out, malformed) == (2 * viewer.MAX_IDS, 2, 3)
    assert [r["steps"] for r in kept if (r["when"], r["id"]) == ("after", "0")] == [3]


@pytest.mark.parametrize("theme", [0, 1])
def test_the_colour_scale_reads_without_hues(theme):
    """Luminance falls along it, and the text on it keeps the contrast that WCAG asks for."""
    style = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")

    def luminance(name: str) -> float:
        found = re.search(rf"--{name}: light-dark\((#\w{{6}}), (#\w{{6}})\)", style)
        assert found is not None
        colour = found[1 + theme]
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    early, middle, late, ink = map(luminance, ("early", "middle", "late", "ink"))
    assert early > 1.2 * middle > 1.44 * late
    for back in (early, middle, late):
        assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) > 4.5
    for sign in map(luminance, ("right", "wrong")):  # the marks beside it: 3, as for graphics
        for back in (early, middle, late):
            assert (max(back, sign) + 0.05) / (min(back, sign) + 0.05) > 3
