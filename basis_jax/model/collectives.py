"""What travels between devices in a compiled program, read from its text.

Bytes are those that one device sends, in a ring of n devices: an all-gather of S bytes or a
reduce-scatter from S bytes sends S (n - 1) / n, an all-reduce twice that.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}
SHAPE = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
LOOP = re.compile(r" while\(.*body=%?([\w.\-]+)")
TRIPS = re.compile(r'known_trip_count":\s*\{"n":"(\d+)"')
NAME = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Collective:
    kind: str
    sent: float  # bytes that one device sends, each time
    times: int  # how often a call of the program runs it, loops of unknown length once
    looped: bool  # inside a loop of unknown length


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program's text, with loops multiplied out; of a conditional,
    all branches."""
    bodies = _computations(text)
    return list(_walk(bodies, bodies[""], times=1, looped=False))


def sent_bytes(found: list[Collective], *, looped: bool) -> dict[str, float]:
    """Bytes by kind, of those inside or outside loops of unknown length."""
    total: Counter[str] = Counter()
    for x in found:
        if x.looped == looped:
            total[x.kind] += x.sent * x.times  # type: ignore[assignment]  # a Counter of floats
    return dict(total)


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of every computation by name; the entry's under the empty name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if started := NAME.match(line):
            lines = found.setdefault("" if started.group(1) else started.group(2), [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _walk(
    bodies: Mapping[str, list[str]], lines: list[str], *, times: int, looped: bool
) -> Iterator[Collective]:
    for line in lines:
        if match := COLLECTIVE.search(line):
            sent = _sent(match.group(2), match.group(1), line, started=bool(match.group(3)))
            yield Collective(match.group(2), sent, times, looped)
            continue
        if loop := LOOP.search(line):
            trips = TRIPS.search(line)
            count = int(trips.group(1)) if trips else 1
            inside = {"times": times * count, "looped": looped or trips is None}
            yield from _walk(bodies, bodies[loop.group(1)], **inside)  # type: ignore[arg-type]
            continue
        called = CALLED.findall(line)
        for branches in BRANCHES.findall(line):
            called += [name.strip(" %") for name in branches.split(",")]
        for name in called:
            yield from _walk(bodies, bodies.get(name, []), times=times, looped=looped)


def _sent(kind: str, result: str, line: str, *, started: bool) -> float:
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * BITS[dtype] / 8
        for dtype, dims in SHAPE.findall(result)
    ]
    if started and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # operands stand before results
    if started and kind == "collective-permute":
        sizes = sizes[:1]
    n = _group_size(line)
    size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
    if kind == "collective-permute":
        return size
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(line: str) -> int:
    """Devices that take part together: ``{{0,1},{2,3}}`` or ``[2,2]<=[4]`` (groups, size)."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed.group(1).split(","))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=", line):
        return math.prod(int(n) for n in tiled.group(1).split(",")[1:])
    return 2
