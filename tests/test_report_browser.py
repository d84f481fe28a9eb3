"""The report in a real browser: headless Chromium, driven through chromedriver's own protocol."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmrl import report

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
HOSTILE = "</script><img src=x onerror=window.hacked=1>"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="needs chromium and chromedriver on PATH (Debian: chromium chromium-driver)",
)


class Browser:
    """One WebDriver session."""

    def __init__(self, port: str, profile: Path):
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += (
            "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        with self.opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.call("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def console(self) -> list[dict[str, Any]]:
        return self.call("POST", "/se/log", {"type": "browser"})

    def emulate(self, command: str, **parameters: Any) -> None:
        body = {"cmd": f"Emulation.{command}", "params": parameters}
        self.call("POST", "/goog/cdp/execute", body)

    def wait(self, script: str) -> None:
        """Until the script returns something true, at most ten seconds."""
        deadline = time.monotonic() + 10
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    assert CHROMEDRIVER is not None
    with subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            session = Browser(
                next(port[1] for port in ports if port), tmp_path_factory.mktemp("profile")
            )
            yield session
            session.call("DELETE", "")
        finally:
            driver.terminate()


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


def boards() -> list[dict[str, Any]]:
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
        "correct": [None, None, True, False] * 4,
        "grid": [4, 4],
    }
    text = grid | {"setting": "text", "grid": None, "tokens": [HOSTILE, "a\n"] * 8}
    return [row | {"when": when, "id": 0} for row in (grid, text) for when in ("before", "after")]


@pytest.fixture
def page(browser, tmp_path) -> Browser:
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {"task": HOSTILE}, "git": None, "packages": {}, "device": "cpu x1"})
    )
    for name, rows in (("metrics", run_lines()), ("trajectories", boards())):
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
        "const s = document.querySelector('#boards select'); s.selectedIndex = 1;"
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


def test_scrubbing_fills_the_boards(page):
    seen = []
    for step in range(5):
        move(page, step)
        seen.append(page.run(FILLED))
    assert seen == [0, 2, 6, 10, 16]  # two boards of eight cells: 1, 2, 2 and 3 a step
    move(page, 1)
    status = page.run("return document.querySelector('.status').textContent")
    assert status == "1 of 8 filled · 1 right, 0 wrong"
    move(page, 4)
    marks = "return [...document.querySelectorAll('.board .mark')].map(m => m.textContent).join('')"
    assert page.run(marks) == "✓✗" * 8


def test_arrow_keys_and_play(page):
    press = (
        "document.querySelector('.panels').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    )
    page.run(press % "Home")
    assert page.run(FILLED) == 0
    page.run(press % "ArrowRight")
    assert page.run(FILLED) == 2
    page.run(press % "ArrowLeft")
    page.run("document.querySelector('#play').click()")
    page.wait("return document.querySelector('#scrub').value === '4'")
    page.wait("return document.querySelector('#play').textContent === 'Play'")
    assert page.run(FILLED) == 16


def test_tooltip_tells_step_probability_and_entropy(page):
    hover = "dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))"
    page.run(f"document.querySelectorAll('.board .cell')[3].{hover}")
    tip = page.run("return document.querySelector('.tip').innerText")
    assert tip.split("\n") == [
        "row 1, column 4: 4 wrong",
        "filled at step 2 of 4",
        "probability 0.5",
        "entropy 0.25 nats",
    ]


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


def test_hostile_text_is_shown_and_inert(page):
    choose_text(page)
    move(page, 4)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert HOSTILE in page.run("return document.querySelector('.board').innerText")
    assert HOSTILE in page.run("return document.querySelector('.facts').innerText")
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
