"""What a compiled program sends between devices and multiplies, read from its HLO text.

Loops are followed: what is in a body counts as often as the loop runs, where the text says how
often. Bytes are those of the larger side of an operation on one device: what an all-gather
returns, what a reduce-scatter takes in.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OP = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
_LINE = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_NAMED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations)=(?:\{([^}]*)\}|(%[\w.-]+))"
)
_DOT = re.compile(r"\sdot\(([^,)]*),.*?lhs_contracting_dims=\{([\d,]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Sent(NamedTuple):
    """Collectives of one kind, loops unrolled."""

    times: int
    bytes: float


class Traffic(NamedTuple):
    """All collectives of a program on one device."""

    kinds: dict[str, Sent]
    unknown_loops: int
    """Loops with collectives whose number of runs the text does not give, counted once."""

    @property
    def bytes(self) -> float:
        """Sum over all kinds; an all-reduce is a reduce-scatter and an all-gather."""
        return sum(s.bytes * (2 if k == "all-reduce" else 1) for k, s in self.kinds.items())


def traffic(text: str) -> Traffic:
    """The collectives of a compiled module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _parsed(text)
    shapes = {name: rest for lines in computations.values() for name, rest in _defined(lines)}
    kinds: dict[str, Sent] = {}
    unknown: set[str] = set()

    def visit(computation: str, times: int) -> bool:
        """Whether anything is sent in there."""
        sends = False
        for _, rest in _defined(computations[computation]):
            if op := _OP.search(rest):
                sends = True
                # XLA's TPU backend writes a reduce-scatter as a fused all-reduce and slice.
                fused = computation.startswith("%all-reduce-scatter")
                kind = "reduce-scatter" if fused else op[1]
                size = max(_bytes(rest[: op.start()], bool(op[2])), _operands(op[3], shapes))
                old = kinds.get(kind, Sent(0, 0.0))
                kinds[kind] = Sent(old.times + times, old.bytes + times * size)
            loop = " while(" in rest
            trips = _trip_count(rest, computations) if loop else 1
            for callee in _callees(rest):
                inside = visit(callee, times * (trips or 1))
                if inside and trips is None:
                    unknown.add(callee)
                sends |= inside
        return sends

    visit(entry, 1)
    return Traffic(kinds, len(unknown))


def products(text: str) -> float:
    """FLOPs of the matrix products of one device, the dearest branch of every conditional.

    Of operations that are written as `dot`, as the CPU compiler's are. A loop of which the text
    does not say how often it runs counts once.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _parsed(text)
    shapes = {name: rest for lines in computations.values() for name, rest in _defined(lines)}

    def visit(computation: str) -> float:
        total = 0.0
        for _, rest in _defined(computations[computation]):
            if found := _DOT.search(rest):
                left = _dims(shapes[found[1].split()[-1]])
                inner = [left[int(i)] for i in found[2].split(",") if i]
                total += 2.0 * math.prod(_dims(rest)) * math.prod(inner)
            inside = [visit(callee) for callee in _callees(rest)]
            if " conditional(" in rest:
                total += max(inside)
            else:
                trips = _trip_count(rest, computations) if " while(" in rest else 1
                total += (trips or 1) * sum(inside)
        return total

    return visit(entry)


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _parsed(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines by computation, name of the entry)."""
    entry = re.search(r"^ENTRY (%[\w.-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled module")
    return dict(_computations(text)), entry[1]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.endswith("{") and (start := re.match(r"(?:ENTRY )?(%[\w.-]+) ", line)):
            name, lines = start[1], []
        elif line == "}" and name:
            yield name, lines
            name = ""
        else:
            lines.append(line)


def _defined(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if found := _LINE.match(line):
            yield found[1], found[2]


def _callees(rest: str) -> list[str]:
    found = (many or one for many, one in _NAMED.findall(rest))
    return [name.strip() for names in found for name in names.split(",")]


def _trip_count(rest: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop that counts up from 0 runs; None where that cannot be read."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    called = dict(re.findall(r"(condition|body)=(%[\w.-]+)", rest))
    condition = _unfused(dict(_defined(computations[called["condition"]])), computations)
    for value in condition.values():
        if test := re.search(r" compare\((%[\w.-]+), (%[\w.-]+)\), direction=LT", value):
            index = re.search(r"index=(\d+)", condition.get(test[1], ""))
            bound = re.search(r"([su])32\[\]\S* constant\((\d+)\)", condition.get(test[2], ""))
            if index and bound:
                step = _step(dict(_defined(computations[called["body"]])), index[1])
                # JAX's own loops count in s32 by one, XLA's (u32) over ring steps may not.
                step = step or (1 if bound[1] == "s" else None)
                return step and -(-int(bound[2]) // step)
    return None


def _unfused(lines: dict[str, str], computations: dict[str, list[str]]) -> dict[str, str]:
    """`lines` with what their fusions compute, of the fusions' own operands."""
    found = dict(lines)
    for rest in lines.values():
        fused = re.search(r" fusion\(([^)]*)\).*calls=(%[\w.-]+)", rest)
        if not fused:
            continue
        given = [name.split()[-1] for name in fused[1].split(",")]
        inside = dict(_defined(computations[fused[2]]))
        for name, value in inside.items():
            place = re.search(r" parameter\((\d+)\)", value)
            found[name] = lines.get(given[int(place[1])], "") if place else value
    return found


def _step(body: dict[str, str], index: str) -> int | None:
    """What the body adds to element `index` of what it carries."""
    added = re.search(r"32\[\]\S* add\((%[\w.-]+), (%[\w.-]+)\)", _element(body, index) or "")
    if not added:
        return None
    counter = body.get(added[1], "")
    while copied := re.search(r" copy\((%[\w.-]+)\)", counter):
        counter = body.get(copied[1], "")
    by = re.search(r" constant\((\d+)\)", body.get(added[2], ""))
    return int(by[1]) if by and re.search(rf"\bindex={index}\b", counter) else None


def _element(body: dict[str, str], index: str) -> str | None:
    """Definition of element `index` of the body's result, its last instruction."""
    result = re.search(r" tuple\(([^)]*)\)", list(body.values())[-1])
    if not result:
        return None
    names = [name.split()[-1] for name in result[1].split(",")]
    return body.get(names[int(index)]) if int(index) < len(names) else None


def _operands(names: str, shapes: dict[str, str]) -> float:
    known = (shapes.get(name.split()[-1]) for name in names.split(",") if name.strip())
    # The result type ends where the operation's name and bracket begin.
    return sum(_bytes(re.split(r"\s[\w-]+\(", rest)[0], False) for rest in known if rest)


def _bytes(shape: str, start: bool) -> float:
    """Of an array or a tuple; the start of an asynchronous operation returns input and output."""
    sizes = [_size(kind, dims) for kind, dims in _ARRAY.findall(shape)] or [0.0]
    return max(sizes) if start else sum(sizes)


def _size(kind: str, dims: str) -> float:
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    count = 1
    for n in filter(None, dims.split(",")):
        count *= int(n)
    return count * bits / 8
