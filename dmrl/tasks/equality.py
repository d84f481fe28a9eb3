"""Mathematical equality of two answers by math-verify, kept at arm's length.

math-verify (extra `eval`) parses LaTeX into sympy and asks sympy whether two expressions are
equal. Either may take for ever on a hostile text, so nothing reaches it that is long, deep or
could be huge, and it runs in a process of its own, which is killed when it overruns. What a
text is refused for is decided by the text alone. Only the overrun is a matter of the clock;
verdicts are kept, so that a pair is judged once in a run.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

SECONDS = 5.0
"""A comparison that takes longer is cut off and counts as unequal."""
_START_SECONDS = 60.0
_MEMORY = 2 << 30  # bytes of address space of the process
_LONGEST = 200
_DEEPEST = 6
_ALPHABET = re.compile(r"[\x20-\x7e\u00b0\u00b7\u00d7\u00f7\u03c0\u2212\u221a\u221e]+")
_HUGE = re.compile(
    r"\d{16}|!|\^\s*\{?\s*[-+]?\s*\d{3}|\*\*|\^[^^]{0,12}\^"
    r"|\\(?:sum|prod|int|iint|oint|lim|binom|dbinom|tbinom|gamma|Gamma|zeta)(?![a-zA-Z])"
)
"""What sympy could expand, iterate or integrate without end."""


def available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def admissible(text: str) -> bool:
    """Whether a text is short, shallow and tame enough to be given to math-verify."""
    if not 0 < len(text) <= _LONGEST or not _ALPHABET.fullmatch(text) or _HUGE.search(text):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest <= _DEEPEST and text.count("^") <= 8 and text.count(r"\sqrt") <= 6


@functools.lru_cache(maxsize=1 << 16)
def equal(truth: str, answer: str) -> bool:
    """Whether math-verify holds `answer` equal to `truth`, both in LaTeX without dollars.

    False for an answer that is not admissible or takes more than 5 seconds. Takes some 60 ms
    for a new pair, a second at times; the first one starts the helper, which takes seconds.
    """
    if not (admissible(truth) and admissible(answer)):
        return False
    return _helper.ask(truth, answer)


class _Helper:
    """A child process that answers one question a line."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, truth: str, answer: str) -> bool:
        with self._lock:
            child = self._child or self._start()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps([truth, answer]).encode() + b"\n")
                child.stdin.flush()
            except BrokenPipeError:
                self.stop()
                return False
            line = self._line(child, SECONDS)
            if line is None:
                self.stop()
            return line == b"true\n"

    def _start(self) -> subprocess.Popen[bytes]:
        # As a file and not a module, so that it imports nothing of ours.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._line(self._child, _START_SECONDS) != b"ready\n":
            self.stop()
            raise RuntimeError("math-verify did not start; is the extra 'eval' installed whole?")
        return self._child

    @staticmethod
    def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        assert child.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                return None
            piece = os.read(child.stdout.fileno(), 64)
            if not piece:
                return None
            line += piece
        return line

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            child.wait()


_helper = _Helper()
if hasattr(os, "register_at_fork"):  # a forked process must not share the pipe
    os.register_at_fork(after_in_child=lambda: globals().update(_helper=_Helper()))


def _serve() -> None:
    """The helper: one JSON pair [truth, answer] a line in, true or false a line out."""
    import logging
    import resource

    import math_verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    parse = functools.partial(math_verify.parse, parsing_timeout=None)
    math_verify.verify(parse("$1$"), parse(r"$\frac{1}{1}$"), timeout_seconds=None)  # warm
    print("ready", flush=True)
    for line in sys.stdin:
        truth, answer = json.loads(line)
        try:
            verdict = math_verify.verify(
                parse(f"${truth}$"), parse(f"${answer}$"), timeout_seconds=None
            )
        except Exception:
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    _serve()
