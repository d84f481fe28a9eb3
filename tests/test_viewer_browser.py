"""The viewer of traces in a real browser (see `browser.py` for where to get one)."""

import math
from typing import Any

import pytest
from browser import HOSTILE, Browser

from dmrl import viewer

RIGHT, LEFT, DOWN, END, HOME = "\ue014", "\ue012", "\ue015", "\ue010", "\ue011"
FILLED = "return document.querySelectorAll('.panel > div > div > .board .filled').length"


TOKENS = ["1", "2", "3", "4"] * 4
REVEAL = [-1, -1, 0, 1, -1, -1, 1, 2, -1, -1, 2, 3, -1, -1, 3, 3]


def trace(**changes: Any) -> dict[str, Any]:
    """A board of eight free cells: 1, 2, 2 and 3 a step; half of them right."""
    return {
        "setting": "greedy_4",
        "id": "1",
        "when": "before",
        "prompt": "",
        "tokens": TOKENS,
        "reveal_step": REVEAL,
        "log_prob": [math.log(0.5)] * 16,
        "entropy": [0.25] * 16,
        "steps": 4,
        "length": None,
        "changes": None,
        "answer": [None, None, "3", "1"] * 4,
        "grid": [4, 4],
        "box": [2, 2],
        "violation": None,
        "reward": 0.5,
        "metrics": {"solved": 0.0},
        **changes,
    }


def text(**changes: Any) -> dict[str, Any]:
    """A completion that stops at its fourth token."""
    written = {"grid": None, "box": None, "answer": None, "length": 4, "metrics": {}}
    tokens = ["To be", "\n", HOSTILE, ""] + ["x"] * 12
    steps = [0, 1, 2, 3] + [4] * 12
    return trace(
        **{**written, "tokens": tokens, "reveal_step": steps, "prompt": HOSTILE, **changes}
    )


def shown(browser: Browser, tmp_path: Any, *traces: dict[str, Any]) -> Browser:
    """The page of these traces, opened."""
    browser.console()
    browser.open(viewer.write(tmp_path / "trace.html", "a run", traces))
    return browser


@pytest.fixture
def page(browser: Browser, tmp_path: Any) -> Browser:
    return shown(browser, tmp_path, trace(), trace(when="after"))


def move(page: Browser, step: int) -> None:
    page.run(
        f"const b = document.querySelector('#scrub'); b.value = {step};"
        "b.dispatchEvent(new Event('input'))"
    )


def choose(page: Browser, number: int, option: int) -> None:
    page.run(
        f"const s = document.querySelectorAll('select')[{number}]; s.selectedIndex = {option};"
        "s.dispatchEvent(new Event('change'))"
    )


def of(page: Browser, selector: str, what: str = "textContent") -> list[Any]:
    return page.run(f"return [...document.querySelectorAll('{selector}')].map(n => n.{what})")


def test_renders_in_silence_and_asks_for_nothing(browser, tmp_path):
    browser.requests()
    page = shown(browser, tmp_path, trace(), trace(when="after"), text(id="2", setting="text"))
    for setting in (0, 1):
        choose(page, 0, setting)
        move(page, 2)
    assert page.console() == []
    assert browser.requests() == [(tmp_path / "trace.html").as_uri()]
    assert of(page, "h1") == ["a run"]


def test_scrubbing_fills_the_boards(page):
    seen = []
    for step in range(5):
        move(page, step)
        seen.append(page.run(FILLED))
    assert seen == [0, 2, 6, 10, 16]
    move(page, 1)
    assert of(page, ".status") == ["1 of 8 filled · 1 right, 0 wrong"] * 2
    assert of(page, "output") == ["after step 1 of 4"]
    assert len(of(page, ".panel .fresh")) == 2
    move(page, 4)
    assert of(page, ".panel .cell.right", "dataset.i") == ["2", "6", "10", "14"] * 2
    assert of(page, ".panel .cell.wrong", "dataset.i") == ["3", "7", "11", "15"] * 2
    signs = "getComputedStyle(n, '::after').content"
    assert page.run(f"const n = document.querySelector('.cell.wrong'); return {signs}") == '"✗"'


def test_the_mouse_drags_the_scrub_bar(page):
    box = page.run("return document.querySelector('#scrub').getBoundingClientRect()")
    middle = {
        "x": round(box["left"] + box["width"] / 2),
        "y": round(box["top"] + box["height"] / 2),
    }
    down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
    steps = [{"type": "pointerMove", "duration": 0, **middle}, down, up]
    page.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "m", "actions": steps}]})
    assert page.run("return document.querySelector('#scrub').value") == "2"
    assert page.run(FILLED) == 6


def test_keys_of_a_real_keyboard(page):
    page.press(HOME)
    assert page.run(FILLED) == 0
    page.press(RIGHT)
    assert page.run(FILLED) == 2
    page.press(LEFT)
    page.press(LEFT)
    assert page.run("return document.querySelector('#scrub').value") == "0"
    page.press(" ")
    page.wait("return document.querySelector('#scrub').value === '4'")
    page.wait("return document.querySelector('#play').textContent === 'Play'")
    assert page.run(FILLED) == 16
    for key in (RIGHT, RIGHT, DOWN):  # to the first token, to its right, a row down
        page.press(key, shift=True)
    assert of(page, ".panel .cursor", "dataset.i") == ["5", "5"]
    assert "row 2, column 2: 2 · given by the template" in of(page, ".reading p")[0]


def test_everything_can_be_reached_by_tab_and_is_seen_there(page):
    reached = []
    for _ in range(10):
        page.press("\ue004")
        reached.append(
            page.run(
                "const n = document.activeElement;"
                "return [n.id || n.className || n.tagName, getComputedStyle(n).outlineStyle]"
            )
        )
    names = [name for name, _ in reached]
    assert {"theme", "SELECT", "SUMMARY", "dock", "play", "scrub"} <= set(names)
    assert all(style != "none" for name, style in reached if name != "BODY")
    unnamed = page.run(
        "return [...document.querySelectorAll('select, input')].filter(n => !n.labels.length)"
    )
    assert unnamed == []


def test_a_token_tells_step_probability_and_entropy(page):
    hover = "dispatchEvent(new PointerEvent('pointermove', {bubbles: true, pointerType: 'mouse'}))"
    page.run(f"document.querySelectorAll('.board .cell')[3].{hover}")
    told = "row 1, column 4: 4 ✗ wrong · filled at step 2 · probability 0.5 · entropy 0.25 nats"
    assert of(page, ".reading p") == [f"Before training {told}", f"After training {told}"]
    page.run("document.querySelector('.panels').dispatchEvent(new PointerEvent('pointerleave'))")
    assert "Point at a token" in of(page, ".reading p")[0]
    page.run("document.querySelectorAll('.board .cell')[2].click()")  # a tap stays
    assert "row 1, column 3: 3 ✓ right" in of(page, ".reading p")[0]
    move(page, 0)
    assert of(page, ".reading p")[0] == "Before training row 1, column 3: masked"


def test_tokens_that_are_masked_again_and_edited(browser, tmp_path):
    changes = [[0, 2, "9"], [0, 3, "4"], [1, 2, None], [1, 6, "3"], [2, 3, "8"], [3, 2, "3"]]
    reveal = [-1, -1, 3, 2, -1, -1, 1, 4, -1, -1, 4, 4, -1, -1, 4, 4]
    page = shown(browser, tmp_path, trace(changes=changes, reveal_step=reveal))
    cell = "const c = document.querySelector('.cell[data-i=\"%d\"]');"
    kinds = (
        "return ['filled', 'remasked', 'edited', 'unknown'].filter(k => c.classList.contains(k))"
    )
    history = []
    for step in range(5):
        move(page, step)
        history.append([page.run(cell % i + kinds) for i in (2, 3)])
    assert history == [
        [[], []],
        [["filled"], ["filled"]],
        [["remasked"], ["filled"]],
        [["remasked"], ["filled", "edited"]],
        [["filled", "edited"], ["filled", "edited"]],
    ]
    assert len(of(page, ".marks .revision")) == 2
    page.run((cell % 2) + "c.click()")
    [told] = of(page, ".reading p")
    order = [told.index(s) for s in ("with 9 at step 1", "again at step 2", "with 3 at step 4")]
    assert order == sorted(order)
    choose(page, 1, 1)  # by probability: that of a token taken back is not known
    move(page, 1)
    assert page.run(cell % 2 + kinds) == ["filled", "unknown"]


def test_colours_mean_order_or_probability_or_entropy(browser, tmp_path):
    sure = [math.log(p) for p in (0.25, 1.0)] * 8
    page = shown(browser, tmp_path, trace(log_prob=sure, entropy=[0.5, 2.0] * 8))
    share = of(page, ".panel .filled", 'style.getPropertyValue("--t")')
    assert (
        share
        == ["0", "0.3333333333333333", "0.3333333333333333"]
        + ["0.6666666666666666"] * 2
        + ["1"] * 3
    )
    choose(page, 1, 1)
    share = of(page, ".panel .filled", 'style.getPropertyValue("--t")')
    assert [float(value) for value in share[:2]] == pytest.approx([0.25, 1.0], abs=1e-5)
    assert of(page, ".scale") == ["01"]
    choose(page, 1, 2)
    assert of(page, ".panel .filled", 'style.getPropertyValue("--t")')[:2] == ["0.25", "1"]
    assert of(page, ".scale") == ["02 nats"]
    colours = set(
        of(page, ".panel .filled", 'computedStyleMap().get("background-color").toString()')
    )
    assert len(colours) == 2


def test_the_first_violation_is_marked_and_reached(browser, tmp_path):
    page = shown(browser, tmp_path, trace(violation={"step": 1, "position": 3, "against": [0, 12]}))
    move(page, 1)
    assert of(page, ".cell.violation:not(.sample)") == []
    page.run("document.querySelector('.jump.violation').click()")
    assert of(page, "output") == ["after step 2 of 4"]
    assert of(page, ".cell.violation:not(.sample)", "dataset.i") == ["3"]
    [told] = of(page, ".jump.violation")
    assert "at step 2: row 1, column 4, the same as row 1, column 1; row 4, column 1" in told
    assert "first wrong token at step 2: row 1, column 4" in of(page, ".jump.wrong")[0]


def test_branches_show_state_fillings_rewards_and_advantages(browser, tmp_path):
    state = [None if step >= 2 else t for t, step in zip(TOKENS, REVEAL, strict=True)]
    branch = {
        "step": 2,
        "state": state,
        "fills": [["1"] * 5, ["2"] * 5],
        "lengths": None,
        "reward": [0.25, 1.0],
        "advantage": [-0.375, 0.375],
    }
    page = shown(browser, tmp_path, trace(branches=[branch]))
    assert of(page, ".filling figcaption") == [
        "state",
        "reward 1advantage +0.375",
        "reward 0.25advantage −0.375",
    ]
    drawn = ".filling:nth-child({}) .cell.drawn"
    assert of(page, drawn.format(1)) == []
    assert of(page, drawn.format(2)) == ["2"] * 5
    assert of(page, drawn.format(3)) == ["1"] * 5
    page.run("document.querySelector('.branch .jump').click()")
    masked = page.run(
        "return [...document.querySelectorAll('.panel > div > div > .board .cell')]"
        ".flatMap((n, i) => n.classList.contains('revealed') ? [] : [i])"
    )
    assert masked == [i for i, text in enumerate(state) if text is None]


def test_two_ways_of_decoding_side_by_side(browser, tmp_path):
    other = trace(setting="random_4", reveal_step=[-1, -1, 3, 3] * 4)
    page = shown(browser, tmp_path, trace(), other, trace(split="test", when="elsewhere"))
    choose(page, 0, 1)
    move(page, 3)
    assert of(page, ".panel h3") == ["Before training", "Before training, greedy_4"]
    assert [s.split(" ")[0] for s in of(page, ".status")] == ["0", "5"]


def test_the_bar_ends_with_the_last_change(browser, tmp_path):
    """An adaptive schedule needs few of its T steps."""
    page = shown(browser, tmp_path, trace(steps=16), trace(steps=16, when="after"))
    assert page.run("return document.querySelector('#scrub').max") == "4"
    assert of(page, ".status") == ["8 of 8 filled · 4 right, 4 wrong"] * 2


def test_theme_follows_the_system_and_toggles(page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = page.run(colour)
    page.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    light = page.run(colour)
    assert dark != light
    page.run("document.querySelector('#theme').click()")
    assert page.run(colour) == dark
    page.run("document.querySelector('#theme').click()")
    assert page.run(colour) == light


def test_hostile_text_is_shown_and_inert(browser, tmp_path):
    page = shown(browser, tmp_path, text(when=HOSTILE, setting=HOSTILE, id=HOSTILE))
    for node in ("details", "details.asked"):
        page.run(f"document.querySelectorAll('{node}').forEach(d => {{ d.open = true }})")
    page.wait("return document.querySelectorAll('.positions tr').length === 17")
    seen = "</script><!--<script>⟨2028⟩⟨d800⟩⟨202e⟩<img src=x onerror=window.hacked=1>"
    assert of(page, ".panel .cell")[2] == seen
    assert seen in page.run("return document.querySelector('.positions').innerText")
    assert page.run("return [document.images.length, typeof window.hacked]") == [0, "undefined"]
    assert page.console() == []


def test_a_text_ends_where_it_was_filled(browser, tmp_path):
    page = shown(browser, tmp_path, text())
    assert of(page, ".panel .cell")[:2] == ["To be", "↵"]
    assert len(of(page, ".panel .cell")) == 4
    assert of(page, ".beyond") == [" … 12 after the end"]
    assert of(page, ".status") == ["4 of 4 filled"]


def test_phone_does_not_scroll_sideways(browser, tmp_path):
    nine = trace(
        setting="nine",
        tokens=list("123456789") * 9,
        reveal_step=[-1] * 81,
        log_prob=[0.0] * 81,
        entropy=[0.0] * 81,
        answer=None,
        grid=[9, 9],
        box=[3, 3],
    )
    traces = [trace(), trace(when="after"), text(setting="text" * 9), nine, {**nine, "when": "b"}]
    page = shown(browser, tmp_path, *traces)
    page.emulate(
        "setDeviceMetricsOverride", width=360, height=780, deviceScaleFactor=2, mobile=True
    )
    try:
        for setting in range(3):
            choose(page, 0, setting)
            assert page.run("return document.documentElement.scrollWidth") == 360
            sizes = of(page, "button:not(.jump), select, input", "getBoundingClientRect().height")
            assert min(sizes) >= 34
        assert len(of(page, ".box-left")) == 2 * 27
    finally:
        page.emulate("clearDeviceMetricsOverride")


def test_many_long_traces_stay_quick(browser, tmp_path):
    """64 prompts, two policies, 256 tokens in 128 steps: counted, as clocks of test machines lie.

    What is not shown is not drawn, and a step touches no more than what it changes.
    """
    rows = [
        text(
            id=str(i),
            when=when,
            tokens=[" word"] * 256,
            reveal_step=[p // 2 for p in range(256)],
            log_prob=[-0.5] * 256,
            entropy=[0.5] * 256,
            steps=128,
            length=256,
        )
        for i in range(64)
        for when in ("a", "b")
    ]
    page = shown(browser, tmp_path, *rows)
    assert page.run("return document.querySelectorAll('*').length") < 3 * 2 * 256
    counts = page.run(
        "const seen = new MutationObserver(() => {}), counts = [];"
        "seen.observe(document.querySelector('.panels'),"
        " {subtree: true, childList: true, attributes: true, characterData: true});"
        "const b = document.querySelector('#scrub');"
        "for (let i = 0; i <= 128; i++) { b.value = i; b.dispatchEvent(new Event('input'));"
        " counts.push(seen.takeRecords().length); }"
        "return counts"
    )
    assert 2 * 2 < max(counts[2:]) < 200  # two new tokens and two that are no longer, twice
    assert of(page, ".status") == ["256 of 256 filled"] * 2
