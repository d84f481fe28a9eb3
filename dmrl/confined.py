"""What runs in the sandbox: confines itself, then serves a program or checks one.

Run as a file by `dmrl.sandbox`, never imported: standard library only. A job of two such
processes keeps them apart. The *solution* process runs the untrusted program and answers calls
of its functions; the *checker* runs the tests, in which each function of the program is a
proxy that sends the call over a pipe and gets plain data back. So a program can neither see
the tests nor change what they compare.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

_NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
"""User, mount, network, process, IPC and host name."""
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_NO_NEW_PRIVS, _DEATH_SIGNAL = 38, 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LONGEST = 1 << 20  # characters of a call or a reply
_OUTSIDE = 231_072
"""A user that owns nothing, into which root turns: root itself is exempt from limits."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    named = kind and os.fsencode(kind)
    _call("mount", os.fsencode(source), os.fsencode(target), named, flags, os.fsencode(data))


def enter(visible: Sequence[str], megabytes: int) -> None:
    """Moves this process into new namespaces; returns in their first process, and never twice.

    The caller's process stays outside and waits. Inside there is a small file system in
    memory, the directories `visible` read-only, no network, and no privilege.
    """
    ready, mapped = os.pipe(), os.pipe()
    uid, gid = os.geteuid(), os.getegid()
    outside = os.fork()
    if outside:  # the parent maps the users, which root may do only from out here
        os.close(ready[1])
        if not os.read(ready[0], 1):
            os._exit(_wait(outside))
        root = uid == 0
        if not root:
            _write(f"/proc/{outside}/setgroups", "deny")
        extra = f"\n1000 {_OUTSIDE} 1" if root else ""
        _write(f"/proc/{outside}/uid_map", f"0 {uid} 1{extra}")
        _write(f"/proc/{outside}/gid_map", f"0 {gid} 1{extra}")
        os.write(mapped[1], b".")
        os._exit(_wait(outside))
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL)
    _call("unshare", _NAMESPACES)
    os.write(ready[1], b".")
    os.read(mapped[0], 1)
    first = os.fork()
    if first:
        os._exit(_wait(first))
    for end in (*ready, *mapped):
        os.close(end)
    _new_root(visible, megabytes)
    if uid == 0:
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL)
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    program = os.fork()
    if program:  # the first process of the namespace: when it ends, all others are killed
        os._exit(_wait(program))


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _new_root(visible: Sequence[str], megabytes: int) -> None:
    root = "/tmp"
    _mount("none", "/", None, _REC | _PRIVATE)
    held = [(path, os.open(path, os.O_PATH)) for path in visible if os.path.isdir(path)]
    _mount("none", root, "tmpfs", _NOSUID | _NODEV, f"size={megabytes}m,mode=755")
    for path, place in held:
        target = root + path
        os.makedirs(target, exist_ok=True)
        _mount(f"/proc/self/fd/{place}", target, None, _BIND | _REC)
        _mount("none", target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
        os.close(place)
    os.makedirs(f"{root}/work", mode=0o777)
    os.chmod(f"{root}/work", 0o777)
    os.chdir(root)
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    _call("umount2", b".", _DETACH)
    os.chdir("/work")


def _drop_capabilities() -> None:
    """Empties all sets of this process; with no_new_privs nothing brings them back."""
    for capability in range(64):
        _libc.prctl(24, capability, 0, 0, 0)  # the bounding set
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def limit(seconds: int, memory: int, megabytes: int, processes: int) -> None:
    """Limits on time, memory, files and processes that nothing in here can raise again."""
    size = megabytes << 20
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def refuse(visible: Sequence[str]) -> None:
    """Without namespaces: an audit hook that refuses what Python reports of the outside.

    It stops a program that means no harm, and not one that does: code in C is not seen.
    """
    inside = (os.getcwd(), *visible)
    banned: tuple[str, ...] = (
        "socket.",
        "subprocess.",
        "ctypes.",
        "os.fork",
        "os.exec",
        "os.posix_spawn",
    )
    banned += ("os.system", "os.spawn", "os.kill", "os.putenv", "pty.", "signal.", "shutil.")
    changes: tuple[str, ...] = (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.link",
        "os.sym",
    )
    changes += ("os.truncate", "os.utime", "os.chown", "os.chdir")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(banned):
            raise PermissionError(f"{event} is refused in the sandbox")
        looks = event in ("os.listdir", "os.scandir")
        if event == "open" or looks or event.startswith(changes):
            path = arguments[0] if arguments else ""
            if isinstance(path, int):
                return
            place = os.path.realpath(os.fsdecode(path or "."))
            writes = (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) & (
                arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
            )
            allowed = inside if looks or (event == "open" and not writes) else inside[:1]
            if not f"{place}/".startswith(tuple(f"{folder}/" for folder in allowed)):
                raise PermissionError(f"{event} of {place} is refused in the sandbox")

    sys.addaudithook(hook)


def packed(value: Any) -> Any:
    """Plain data as JSON-able data; TypeError for anything else."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    for kind, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return {name: [packed(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[packed(k), packed(v)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"a {type(value).__name__} is no plain data")


def unpacked(value: Any) -> Any:
    """The inverse of `packed`."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {unpacked(k): unpacked(v) for k, v in held}
    if kind == "complex":
        return complex(*held)
    if kind == "bytes":
        return bytes.fromhex(held)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](unpacked(v) for v in held)


def serve(code: str, calls: IO[str], replies: IO[str]) -> None:
    """The solution: runs the program, then answers calls of its functions, a line each."""
    space: dict[str, Any] = {"__name__": "solution"}
    exec(compile(code, "solution", "exec"), space)
    for line in calls:
        try:
            name, arguments, named = json.loads(line)
            held = [unpacked(a) for a in arguments]
            reply = [packed(space[name](*held, **{k: unpacked(v) for k, v in named.items()}))]
        except Exception as error:
            reply = [type(error).__name__, str(error)[:200]]
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def check(job: Mapping[str, Any], calls: IO[str], replies: IO[str], verdict: IO[str]) -> None:
    """The checker: runs every check on proxies of the program's functions; counts passes."""

    def proxy(name: str) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            packed_named = {k: packed(v) for k, v in named.items()}
            calls.write(json.dumps([name, [packed(a) for a in arguments], packed_named]) + "\n")
            calls.flush()
            line = replies.readline(_LONGEST)
            if not line.endswith("\n"):
                raise RuntimeError("the program has ended, or its answer is too long")
            reply = json.loads(line)
            if len(reply) == 1:
                return unpacked(reply[0])
            kind = getattr(__import__("builtins"), reply[0], RuntimeError)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if known else RuntimeError)(reply[1])

        return function

    solution = types.ModuleType("solution")
    solution.__dict__["__getattr__"] = proxy
    sys.modules["solution"] = solution
    space: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["setup"], "setup", "exec"), space)
    space |= {alias: proxy(name) for alias, name in job["functions"].items()}
    passed = 0
    for text in job["checks"]:
        try:
            exec(compile(text, "check", "exec"), space)
            passed += 1
        except (Exception, SystemExit):
            pass
    verdict.write(f"{passed}\n")
    verdict.flush()


def main() -> None:
    job = json.load(sys.stdin)
    if job["namespaces"]:
        enter(job["visible"], job["megabytes"])
    elif job["role"] == "solution":
        refuse(job["visible"])
    limit(job["seconds"], job["memory"], job["megabytes"], job["processes"])
    opened = [os.fdopen(fd, mode) for fd, mode in zip(job["fds"], job["modes"], strict=True)]
    if job["role"] == "solution":
        serve(job["code"], *opened)
    elif job["role"] == "checker":
        check(job, *opened)
    else:
        print("confined", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
