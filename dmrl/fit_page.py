"""The results of `dmrl.fit` on a terminal, as JSON, and as a Markdown page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dmrl.fit import SPARE, Fit

GB = 1e9
NOTE = (
    "Compiled for the slice, not run on it: this shows that the programs build, what they hold "
    "and what they send, not that they are right or how fast they are."
)
COLUMNS = {
    "program": "",
    "arguments": "GB",
    "outputs": "GB",
    "temporaries": "GB",
    "beside": "GB",
    "peak": "GB",
    "of": "GB",
    "fits": "",
    "compile": "s",
    "sent": "GB",
    "work": "PFLOP",
    "roofline": "s a step, predicted",
}


def rows(fit: Mapping[str, Any]) -> list[str]:
    """The cells of a program's line, in the order of COLUMNS."""
    gigabytes = [fit[k] / GB for k in ("arguments", "outputs", "temporaries", "beside", "peak")]
    sent = fit["collectives"]
    total = sum(n["bytes"] for n in sent.values()) / GB if sent is not None else None
    verdict = {True: "yes", False: "NO", None: "-"}[fit["fits"]]
    return [
        f"{fit['program']} x{fit['runs']}",
        *(f"{g:.2f}" for g in gigabytes),
        "-" if fit["hbm"] is None else f"{fit['hbm'] / GB:.0f}",
        verdict,
        f"{fit['compile_seconds']:.0f}",
        "-" if total is None else f"{total:,.0f}",
        f"{fit['flops'] / 1e15:,.3g}",
        "-" if fit["seconds"] is None else f"{fit['seconds']:.1f}",
    ]


def traffic(fit: Mapping[str, Any]) -> str:
    """One sentence on what is sent."""
    if fit["collectives"] is None:
        return "collectives unknown: this compiler gives no text"
    kinds = [
        f"{k} {n['bytes'] / GB:,.1f} GB in {n['times']:,}" for k, n in fit["collectives"].items()
    ]
    unknown = fit["unknown_loops"]
    more = f"; {unknown} loop(s) of unknown length counted once" if unknown else ""
    return (", ".join(kinds) or "nothing is sent") + more


def plain(fit: Fit) -> dict[str, Any]:
    """A Fit as JSON holds it."""
    sent = fit.collectives
    kinds = None if sent is None else {k: v._asdict() for k, v in sent.items()}
    return {
        **fit._asdict(),
        "collectives": kinds,
        "change": list(fit.change),
        "seconds": fit.seconds,
    }


def show(label: str, fits: Sequence[Fit]) -> None:
    """Prints the programs of one slice."""
    first = fits[0]
    mesh = ", ".join(f"{axis}={size}" for axis, size in first.mesh.items())
    table = Table(title=f"{label} on {first.topology}: {first.devices} devices, {mesh}")
    names, *lines = zip(*(rows(plain(fit)) for fit in fits), strict=True)
    table.add_column("a device")
    for program in names:
        table.add_column(program, justify="right")
    for (quantity, unit), line in zip(list(COLUMNS.items())[1:], lines, strict=True):
        table.add_row(f"{quantity}, {unit}" if unit else quantity, *line)
    console = Console()
    console.print(table)
    for fit in fits:
        console.print(f"{fit.program} sends, a run and device: {traffic(plain(fit))}")
        for text in filter(None, (fit.error, *(f"change: {c}" for c in fit.change))):
            console.print(f"{fit.program} {text}", markup=False)
    console.print(f"Bytes are per device (compiled); seconds are bounds (predicted). {NOTE}")


def save(path: Path, label: str, commit: str | None, fits: Iterable[Fit]) -> None:
    """Adds to the JSON file, replacing what it held for the same program; writes the page."""
    new = [{"label": label, "commit": commit, **plain(f)} for f in fits]
    found = json.loads(path.read_text()) if path.exists() else []
    by_key = {_key(f): f for f in [*found, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(by_key.values()), indent=1) + "\n")
    path.with_suffix(".md").write_text(page(list(by_key.values()), path))


def _key(fit: Mapping[str, Any]) -> tuple[Any, ...]:
    return fit["label"], fit["topology"], fit["program"]


def page(fits: Sequence[Mapping[str, Any]], path: Path) -> str:
    """All results as Markdown, a table a recipe."""
    lines = [
        "# Slices",
        "",
        f"Made by `python launch/compile.py --config=RECIPE --topology=SLICE --out={path}`, with "
        "the recipe and the options of each heading (`make slices` runs all).",
        "",
        NOTE,
        "",
        "Bytes are those of one device, as the compiler accounts for them (compiled): arguments, "
        "outputs, temporaries, what is kept beside them, and the peak, all at once, with donated "
        f"buffers counted once. A program fits if it leaves {SPARE:.0%} of the memory free. `sent` "
        "is the larger side of every collective of one run, loops unrolled. Work is the matrix "
        "products of one run on all devices (analytic), roofline the slower of a step's products "
        "and collectives at published peak rates (predicted): no program reaches it. Nothing on "
        "this page is measured but the time to compile, on a busy machine of 2 cores. What is not "
        "listed has not been compiled.",
        "",
        *overview(fits),
    ]
    for label in dict.fromkeys(f["label"] for f in fits):
        lines += ["", f"## {label}", ""]
        heads = ["slice", *(f"{n}{f', {u}' if u else ''}" for n, u in COLUMNS.items()), "commit"]
        lines += [_line(heads), _line(["---"] * len(heads))]
        mine = [f for f in fits if f["label"] == label]
        lines += [_line([f["topology"], *rows(f), _short(f["commit"])]) for f in mine]
        lines += [""]
        for f in mine:
            where = f"- {f['topology']}, {f['program']}: "
            lines.append(where + traffic(f))
            lines += [f"  - {text}" for text in (f["error"], *f["change"]) if text]
    return "\n".join(lines) + "\n"


def overview(fits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a recipe and slice: the larger peak of its programs, and whether both fit."""
    lines = [_line(["recipe and options", "slice", "peak, GB", "of, GB", "fits"])]
    lines += [_line(["---"] * 5)]
    for label, where in dict.fromkeys((f["label"], f["topology"]) for f in fits):
        mine = [f for f in fits if (f["label"], f["topology"]) == (label, where)]
        size = "-" if mine[0]["hbm"] is None else f"{mine[0]['hbm'] / GB:.0f}"
        known = [f["fits"] for f in mine]
        verdict = "NO" if False in known else "-" if None in known else "yes"
        peak = f"{max(f['peak'] for f in mine) / GB:.1f}"
        lines.append(_line([label, where, peak, size, verdict]))
    return lines


def _short(commit: str | None) -> str:
    """A commit in eight digits, `+` if the tree had other changes."""
    return commit[:8] + "+" * commit.endswith("+") if commit else "?"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
