"""Headless Chromium, driven through chromedriver's own protocol: no package is needed.

Debian and Ubuntu have both as `chromium` and `chromium-driver`; elsewhere put the two of Chrome for
Testing on PATH under the names chromium and chromedriver. Without them these tests are skipped.
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
HOSTILE = "</script><!--<script>\u2028\ud800\u202e<img src=x onerror=window.hacked=1>"
"""What a model may write: it must arrive as text."""
LOGS = {"browser": "ALL", "performance": "ALL"}
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


class Browser:
    """One WebDriver session."""

    def __init__(self, port: str, profile: Path):
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": LOGS}
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
        return self._log("browser")

    def _log(self, kind: str) -> Any:
        return self.call("POST", "/se/log", {"type": kind})

    def press(self, key: str, shift: bool = False) -> None:
        """A real key, heard by whatever has the focus; `key` as WebDriver writes it."""
        kinds = [("keyDown", "\ue008")] * shift + [("keyDown", key), ("keyUp", key)]
        kinds += [("keyUp", "\ue008")] * shift
        keys = {"type": "key", "id": "k", "actions": [{"type": t, "value": v} for t, v in kinds]}
        self.call("POST", "/actions", {"actions": [keys]})

    def requests(self) -> list[str]:
        """What pages asked for since the last call, their own file among it, in addresses.

        Without what the browser shows of its own, and what an address itself holds.
        """
        events = [json.loads(e["message"])["message"] for e in self._log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in asked]
        return [url for url in urls if not url.startswith(("chrome", "data:"))]

    def emulate(self, command: str, **parameters: Any) -> None:
        body = {"cmd": f"Emulation.{command}", "params": parameters}
        self.call("POST", "/goog/cdp/execute", body)

    def wait(self, script: str) -> None:
        """Until the script returns something true, at most ten seconds."""
        deadline = time.monotonic() + 10
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)


def started(profile: Path) -> Iterator[Browser]:
    """One browser; skips the test where there is none."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver on PATH (Debian: chromium chromium-driver)")
    with subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            session = Browser(next(port[1] for port in ports if port), profile)
            yield session
            session.call("DELETE", "")
        finally:
            driver.terminate()
