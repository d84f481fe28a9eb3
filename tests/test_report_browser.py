"""The report in a real browser: headless Chromium (see `browser.py` for where to get one)."""

import json
import math
import re
from typing import Any

import pytest
from browser import HOSTILE, Browser

from dmrl import report


def run_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"step": step, "stage": "rl", "reward": step / 40, "kl": 0.01 * step, "loss": float("nan")}
        for step in range(1, 41)
    ]
    solved = "eval/validation/greedy_4/solved"
    return [
        {"step": 0, "stage": "rl", solved: 0.25},
        *lines,
        {"step": 40, "stage": "rl", solved: 0.75},
    ]


def traces() -> list[dict[str, Any]]:
    grid = {
        "setting": "greedy_4",
        "prompt": HOSTILE,
        "template": "12__" * 4,
        "tokens": ["1", "2", "3", "4"] * 4,
        "reveal_step": [-1, -1, 0, 1, -1, -1, 1, 2, -1, -1, 2, 3, -1, -1, 3, 3],
        "log_prob": [math.log(0.5)] * 16,
        "entropy": [0.25] * 16,
        "steps": 4,
        "reward": 1.0,
        "metrics": {"solved": 1.0, "cells": 1.0},
        "answer": [None, None, "3", "0"] * 4,
        "grid": [4, 4],
    }
    text = grid | {"setting": "text", "grid": None, "tokens": [HOSTILE, "a\n"] * 8}
    return [row | {"when": when, "id": 0} for row in (grid, text) for when in ("before", "after")]


@pytest.fixture
def page(browser, tmp_path) -> Browser:
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"task": HOSTILE}, "git": None, "packages": {}, "device": "cpu x1"})
    )
    for name, rows in (("metrics", run_lines()), ("trajectories", traces())):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    browser.console()
    browser.open(report.write(tmp_path))
    return browser


FILLED = "return document.querySelectorAll('.board .filled').length"


def move(page: Browser, step: int) -> None:
    page.run(
        f"const b = document.querySelector('#scrub'); b.value = {step};"
        "b.dispatchEvent(new Event('input'))"
    )


def choose_text(page: Browser) -> None:
    page.run(
        "const s = document.querySelector('#traces select'); s.selectedIndex = 1;"
        "s.dispatchEvent(new Event('change'))"
    )


def test_renders_without_a_console_message(page):
    page.wait("return document.querySelectorAll('.plot path').length >= 3")
    assert page.console() == []
    rows = page.run(
        "return [...document.querySelectorAll('.changes tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) == 1
    assert re.sub(r"\s+", " ", rows[0]).strip() == "greedy_4/solved 0.250 0.750 +0.500"


def test_empty_run_renders(browser, tmp_path):
    browser.console()
    browser.open(report.write(tmp_path))
    assert browser.run("return document.querySelector('h1').textContent") == tmp_path.name
    assert browser.run("return document.querySelectorAll('section').length") >= 3
    assert browser.console() == []


def test_chart_cursor_reads_exact_values(page):
    page.wait("return document.querySelectorAll('.plot path').length >= 3")
    reading = page.run(
        "const f = [...document.querySelectorAll('.chart')].find("
        "  f => f.querySelector('.title').textContent === 'KL to the reference');"
        "const plot = f.querySelector('.plot');"
        "plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));"
        "return [f.querySelector('.at').textContent, f.querySelector('.legend b').textContent,"
        "  f.querySelectorAll('.cursor circle').length]"
    )
    assert reading == ["step 39", "0.39", 1]


def test_hostile_text_is_shown_and_inert(page):
    choose_text(page)
    move(page, 4)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert "</script><!--<script>" in page.run("return document.querySelector('.board').innerText")
    assert page.run("return document.querySelector('.facts').innerText.includes('onerror=')")
    assert page.run("return [document.images.length, typeof window.hacked]") == [0, "undefined"]
    assert page.console() == []


def test_phone_does_not_scroll_sideways(page):
    page.emulate(
        "setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True
    )
    try:
        for _ in range(2):
            width = page.run("return document.documentElement.scrollWidth")
            assert width <= 390
            choose_text(page)
    finally:
        page.emulate("clearDeviceMetricsOverride")
