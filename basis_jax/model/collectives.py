"""Bytes sent between devices by a compiled program, read from its text.

Bytes are counted per sending device, in a ring of n devices. An all-gather of S bytes or a
reduce-scatter of S bytes sends S (n - 1) / n, and an all-reduce twice that.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "suf" for n in (8, 16, 32, 64)}
SHAPE = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
TRIPS = re.compile(r'known_trip_count":\s*\{"n":"(\d+)"')
LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
CHANNEL = re.compile(r"channel_id=(\d+)")
NAME = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Collective:
    kind: str
    sent: float  # bytes that one device sends each time
    times: int  # runs per call of the program; a loop of unknown length counts as one run
    looped: bool  # whether it is inside a loop of unknown length


def collectives(text: str) -> list[Collective]:
    """Every collective in a compiled program's text, with the number of times that loops run it.

    All branches of a conditional are counted. A TPU program may split a collective into pieces that
    overlap with computation. The pieces share a channel, and count once per run of a loop's body.
    """
    bodies = _computations(text)
    return list(_walk(bodies, bodies[""], set(), times=1, looped=False))


def sent_bytes(found: list[Collective], *, looped: bool) -> dict[str, float]:
    """Bytes by kind, of the collectives inside (or outside) loops of unknown length."""
    total: dict[str, float] = {}
    for x in found:
        if x.looped == looped:
            total[x.kind] = total.get(x.kind, 0.0) + x.sent * x.times
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of every computation by name. The entry computation has the empty name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if started := NAME.match(line):
            lines = found.setdefault("" if started.group(1) else started.group(2), [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _walk(
    bodies: Mapping[str, list[str]],
    lines: list[str],
    channels: set[str],
    *,
    times: int,
    looped: bool,
) -> Iterator[Collective]:
    """Collectives in ``lines`` and in what they call, except those of ``channels`` seen before."""
    for line in lines:
        if match := COLLECTIVE.search(line):
            channel = CHANNEL.search(line)
            if channel and channel.group(1) in channels:
                continue
            channels.update(channel.groups() if channel else ())
            result, kind, started = match.groups()
            yield Collective(kind, _sent(kind, result, line, started=bool(started)), times, looped)
        elif loop := LOOP.search(line):
            condition, body = (bodies[name] for name in loop.groups())
            trips = _trips(line, condition)
            inside = {"times": times * (trips or 1), "looped": looped or trips is None}
            yield from _walk(bodies, body, set(), **inside)  # type: ignore[arg-type]
        else:
            called = CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                called += [name.strip(" %") for name in branches.split(",")]
            for name in called:
                yield from _walk(bodies, bodies.get(name, []), channels, times=times, looped=looped)


def _trips(line: str, condition: list[str]) -> int | None:
    """How often a loop runs, or None if it is not known.

    It is the compiler's own count, or the limit of a counter from 0 (TPU programs have no count).
    """
    if known := TRIPS.search(line):
        return int(known.group(1))
    limits = [int(found) for each in condition for found in LIMIT.findall(each)]
    counted = " compare(" in condition[-1] and "direction=LT" in condition[-1]
    return limits[0] if counted and len(limits) == 1 else None


def _sent(kind: str, result: str, line: str, *, started: bool) -> float:
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * BITS[dtype] / 8
        for dtype, dims in SHAPE.findall(result)
    ]
    if started and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # operands come before results
    if started and kind == "collective-permute":
        sizes = sizes[:1]
    n = _group_size(line)
    size = sum(sizes) * (n if kind == "reduce-scatter" else 1)
    if kind == "collective-permute":
        return size
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(line: str) -> int:
    """Number of devices in a group, read from ``{{0,1},{2,3}}``, from ``[2,2]<=[4]`` (groups, size)
    or from axes of a mesh, ``mesh['a'=2,'b'=2] {'b'}``."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed.group(1).split(","))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=", line):
        return math.prod(int(n) for n in tiled.group(1).split(",")[1:])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(axis.split("=") for axis in named.group(1).split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in named.group(2).split(","))
    return 2
