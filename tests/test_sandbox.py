"""Hostile programs: each scores 0, in time, and nothing outside changes."""

import json
import os
import socket
import threading
import time

import pytest

from dmrl import sandbox, tasks
from dmrl.tasks import humaneval, mbpp, programs

TESTS = sandbox.Tests(
    "def check(f):\n    assert f(2) == 4\n    assert f([1, 2]) == {1: (2, 3)}",
    {"candidate": "f"},
    ["check(candidate)"],
)
QUICK = sandbox.Limits(seconds=15.0)
HURRIED = sandbox.Limits(seconds=0.7)

needs_namespaces = pytest.mark.skipif(
    not sandbox.namespaces(), reason="this system grants no user namespaces"
)
CONFINEMENTS = [pytest.param("namespaces", marks=needs_namespaces), "rlimits"]

RIGHT = "def f(x):\n    return 4 if x == 2 else {1: (2, 3)}\n"

HOSTILE = {
    "an infinite loop": "while True: pass",
    "an infinite call": "def f(x):\n    while True: pass",
    "sleep": "import time\ndef f(x): time.sleep(100)",
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads without end": (
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(100,)).start()"
    ),
    "10 GB": "held = bytearray(10 * 2**30)\n" + RIGHT,
    "10 GB bit by bit": "held = []\nwhile True: held.append(bytearray(2**20))",
    "exit 0": "import os\nos._exit(0)",
    "exit 0 when called": "import os\ndef f(x): os._exit(0)",
    "a fake success": "print('passed')\nprint('1')\nimport os\nos.write(1, b'1\\n')\nos._exit(0)",
    "a fake success on every pipe": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'1\\n')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "fake answers": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[true]\\n' * 9)\n"
        "    except OSError: pass\n"
        "def f(x): return True"
    ),
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "deep data": (
        "def f(x):\n    held = []\n    for _ in range(10**5): held = [held]\n    return held"
    ),
    "signal handlers": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(x): return Any()"
    ),
    "an int that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def f(x): return Any()"
    ),
    "the checker patched": (
        "import sys, builtins, json\nbuiltins.exec = lambda *a: None\n"
        "builtins.AssertionError = type('A', (BaseException,), {})\n"
        "json.dumps = lambda *a: '[1]'\n"
        "for m in list(sys.modules.values()):\n    m.check = m.main = lambda *a: True\n"
        "def f(x): return 1"
    ),
    "a walk up the stack": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_locals.update(passed=99)\n        frame = frame.f_back\n    return 1"
    ),
    "an output flood": "while True: print('x' * 10**6)",
    "an answer without end": "def f(x): return 'x' * 10**8",
    "no syntax": "def f(x) return 4",
    "no function": "g = 1",
    "a null byte": "def f(x): return 4\0",
    "killing what there is": (
        "import os, signal\nos.setsid() if os.getpid() != os.getsid(0) else None\n"
        "for pid in (-1, 1, os.getppid()):\n    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass"
    ),
    "a child that outlives": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
        "def f(x): return 1"
    ),
}


@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_a_right_program_passes(confinement):
    limits = sandbox.Limits(confinement=confinement)
    assert sandbox.run(RIGHT, TESTS, limits) == sandbox.Verdict(1, 1, "")
    other = "def f(x):\n    print('noise')\n    return 4 if x == 2 else {1: [2, 3]}\n"
    assert sandbox.run(other, TESTS, limits) == sandbox.Verdict(0, 1, "")


def processes():
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def ours():
    """Processes of the sandbox's program that are alive."""
    found = set()
    for pid in processes():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"confined.py" in file.read():
                    found.add(pid)
        except OSError:
            pass
    return found


@needs_namespaces
@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_programs_score_nothing_and_leave_nothing(code):
    before, start = ours(), time.monotonic()
    verdict = sandbox.run(code, TESTS, HURRIED)
    assert verdict.passed == 0
    assert time.monotonic() - start < HURRIED.seconds + 3.0
    deadline = time.monotonic() + 2.0
    while ours() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ours() - before


def answer(expression, limits=QUICK):
    """Whether `f` of a program finds what it looks for (it returns 4 if so)."""
    code = f"def f(x):\n    import os, socket, subprocess, pathlib\n    return {expression}\n"
    tests = sandbox.Tests("", {"candidate": "f"}, ["assert candidate(2) == 4"])
    return sandbox.run(code, tests, limits).passed


@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_a_secret_file_cannot_be_read(tmp_path, confinement):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    limits = sandbox.Limits(seconds=15.0, confinement=confinement)
    assert answer("4", limits)
    assert not answer(f"4 * (open({str(secret)!r}).read() == 'hidden')", limits)
    assert not answer("4 * bool(open('/etc/passwd').read())", limits)
    assert not answer("4 * bool(os.listdir('/proc'))", limits)
    assert not answer(f"4 * (subprocess.run(['cat', {str(secret)!r}]).returncode == 0)", limits)


@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_the_environment_is_empty(monkeypatch, confinement):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "hidden")
    limits = sandbox.Limits(seconds=15.0, confinement=confinement)
    assert not answer("4 * ('SECRET_OF_THE_TEST' in os.environ)", limits)
    names = "set(os.environ) - {'LC_CTYPE'}"  # which Python sets itself
    assert answer(f"4 * (not {names})", limits)


@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_nothing_outside_can_be_written(tmp_path, confinement):
    limits = sandbox.Limits(seconds=15.0, confinement=confinement)
    inside = "4 * bool(pathlib.Path('mine.txt').write_text('x'))"
    outside = tmp_path / "written.txt"
    assert answer(inside, limits)
    assert not answer(f"4 * bool(pathlib.Path({str(outside)!r}).write_text('x'))", limits)
    library = os.path.dirname(os.__file__)
    assert not answer(f"4 * bool(open({library!r} + '/x.py', 'w').write('x'))", limits)
    assert not outside.exists()
    assert not os.path.exists("mine.txt")
    assert not os.path.exists(f"{library}/x.py")


@pytest.mark.parametrize("confinement", CONFINEMENTS)
def test_no_socket_leads_anywhere(confinement):
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60.0)

        def listen():
            try:
                server.accept()[0].close()
                reached.set()
            except OSError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        port = server.getsockname()[1]
        limits = sandbox.Limits(seconds=15.0, confinement=confinement)
        code = f"4 * bool(socket.create_connection(('127.0.0.1', {port}), 1))"
        assert not answer(code, limits)
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()
    assert reached.is_set()  # by this test itself: the server did listen


@needs_namespaces
def test_files_are_limited_in_size():
    flood = "sum(open(f'{n}', 'wb').write(b'x' * 2**20) for n in range(100)) and 4"
    assert not answer(flood)


@needs_namespaces
def test_there_is_no_privilege_to_regain():
    tried = "4 * (__import__('ctypes').CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None) == 0)"
    assert not answer(tried)
    assert answer("4 * (os.getuid() != 0 or os.geteuid() == os.getuid())")


def test_a_system_without_namespaces_is_told_so(monkeypatch):
    monkeypatch.setattr(sandbox, "namespaces", lambda: False)
    with pytest.raises(RuntimeError, match=r"grants no user namespaces.*confinement='rlimits'"):
        sandbox.run(RIGHT, TESTS)
    with pytest.raises(ValueError, match="confinement='none' is not one of"):
        sandbox.run(RIGHT, TESTS, sandbox.Limits(confinement="none"))


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_runs_only_where_it_was_allowed(name):
    with pytest.raises(ValueError, match="set allow_code=True"):
        tasks.load(name)


ADD = mbpp._example(
    {
        "text": "Add two numbers.",
        "code": "def add(a, b):\n    return a + b",
        "test_list": [
            "assert add(1, 2) == 3",
            "assert add(2, 2) == 4",
            "assert set([add(0, 0)]) == {0}",
        ],
    }
)


@needs_namespaces
def test_reward_is_the_fraction_of_tests_and_the_format():
    task = mbpp.Task(allow_code=True)
    assert ADD.entry == "add"
    assert task.score(ADD, task.answer(ADD)) == {
        "reward": 1.5,
        "answered": 1.0,
        "passed": 1.0,
        "solved": 1.0,
        "ended": 1.0,
    }
    half = "```python\ndef add(a, b):\n    return 4 if a else 0\n```"
    score = task.score(ADD, half)
    assert score["reward"] == score["passed"] == pytest.approx(2 / 3)
    assert task.score(ADD, "no program")["reward"] == 0.0
    assert task.score(ADD, "```python\n\ud800\n```")["reward"] == 0.0
    assert "assert add(1, 2) == 3" in task.prompt(ADD)
    assert "assert add(2, 2) == 4" not in task.prompt(ADD)


@pytest.mark.parametrize("style", ["published", "compact"])
def test_worked_programs_come_before_the_question(style, tmp_path):
    row = {"text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": ["add(1, 2)"]}
    lines = [json.dumps({**row, "text": f"Add, {i}."}) for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    options = {"allow_code": True, "style": style, "held_out_size": 1}
    task = mbpp.Task(source=f"jsonl:{tmp_path}", shots=2, **options)
    asked = task.prompt(ADD)
    assert asked.endswith("Add two numbers.\n\nYour program must pass:\nassert add(1, 2) == 3\n")
    train = {e.question for e in task.examples("train")}
    assert sum(question in asked for question in train) == 2
    assert asked.count("```python\ndef add(a, b):\n    return a + b\n```") == 2


@needs_namespaces
def test_rows_of_test_functions_count_each():
    test = "from solution import twice\n\ndef test_a():\n    assert twice(1) == 2\n\n"
    test += "def test_b():\n    assert twice('a') == 'aa'\n"
    row = mbpp._example(
        {"question": "Double it.", "solution": "def twice(x):\n    return 2 * x", "test": test}
    )
    task = mbpp.Task(allow_code=True)
    assert task.score(row, task.answer(row))["passed"] == 1.0
    assert (
        task.score(row, "```python\ndef twice(x):\n    return x + x if x == 1 else x\n```")[
            "passed"
        ]
        == 0.5
    )


def test_programs_are_found():
    fenced = "text\n```python\nprint(1)\n```\nmore"
    assert programs.found(fenced) == ("print(1)\n", False)
    assert programs.found(f"<answer>{fenced}</answer>") == ("print(1)\n", True)
    assert programs.found("    return 1") == ("    return 1", False)
    assert programs.found("just words") is None
    assert programs.found("```python\nprint(1)") is None


@needs_namespaces
def test_published_solutions_pass(data_dir):
    task = humaneval.Task(allow_code=True, data_dir=str(data_dir), seconds=20.0)
    found = task.examples("test")
    assert len(found) == 164
    for example in (found[0], found[32], found[50]):  # two use helpers of the opening
        assert task.score(example, task.answer(example))["reward"] == 1.5
        body = example.opening + "    return None\n"
        assert task.score(example, programs.answer("published", body))["solved"] == 0.0
    compact = humaneval.Task(allow_code=True, style="compact", seconds=20.0)
    assert compact.score(found[0], found[0].solution)["solved"] == 1.0
