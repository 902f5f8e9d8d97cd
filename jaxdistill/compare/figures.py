"""Score against cost with the Pareto front, as inline SVG whose colours follow the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 18, 52
LETTER, LINE = 7.0, 15  # of a label of 12 px
MOST_LABELS = 26
LEADER = 14  # farther from its point than this, a label gets a line

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    error: float | None = None
    published: bool = False
    reference: bool = False


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both: smaller or equal x and higher y, from left to right."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def short(name: str, most: int = 30) -> str:
    """A long name without its middle: what tells students apart is at both ends."""
    return name if len(name) <= most else f"{name[: most * 2 // 3]}…{name[-(most - 1 - most * 2 // 3) :]}"


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        found = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 3, 5)]
        return [tick for tick in found if low <= tick <= high]
    rough = (high - low) / 5
    step = min((m * 10.0 ** math.floor(math.log10(rough)) for m in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.25, high * 1.25
    pad = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def pareto(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Score (up) against cost (to the right); measured points filled, published ones hollow, the front of either drawn."""
    log = max(point.x for point in points) > 4 * min(point.x for point in points) > 0
    xs = _Scale(*_range([point.x for point in points], log), LEFT, WIDTH - RIGHT, log)
    heights = [point.y + sign * (point.error or 0) for point in points for sign in (-1, 1)]
    ys = _Scale(*_range(heights, False), HEIGHT - BOTTOM, TOP)
    parts = [_axes(xs, ys, f"{x_title}{', log scale' if log else ''}", y_title)]
    lines: list[Box] = []
    for published in (True, False):
        front = pareto_front([point for point in points if point.published == published])
        if len(front) > 1:
            corners = [(xs(point.x), ys(point.y)) for point in _steps(front)]
            lines += [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(corners)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            parts.append(f'<polyline class="front{" published" if published else ""}" points="{line}"/>')
    for point in sorted(points, key=lambda point: not point.published):  # ours on top
        parts.append(_dot(point, xs(point.x), ys(point.y), ys))
    parts += _labels(points, xs, ys, lines)
    title = f"{y_title} against {x_title}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _steps(front: Sequence[Point]) -> list[Point]:
    """What can be had at a cost is the best so far: a staircase."""
    found = [front[0]]
    for before, point in pairwise(front):
        found += [Point("", point.x, before.y), point]
    return found


def _axes(xs: _Scale, ys: _Scale, x_title: str, y_title: str) -> str:
    parts = []
    for tick in _ticks(ys.low, ys.high, False):
        y = ys(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in _ticks(xs.low, xs.high, xs.log):
        x = xs(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_title)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    return "".join(parts)


def _dot(point: Point, x: float, y: float, ys: _Scale) -> str:
    kind = "published" if point.published else "reference" if point.reference else "measured"
    spread = f" ± {point.error:.1f}" if point.error is not None else ""
    bar = ""
    if point.error:
        bar = f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{ys(point.y - point.error):.1f}" y2="{ys(point.y + point.error):.1f}"/>'
    title = escape(f"{point.name}: {point.y:.1f}{spread} at {point.x:.4g}")
    return f'<g class="point {kind}">{bar}<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle></g>'


def labelled(points: Sequence[Point]) -> list[Point]:
    """The points that get a label: of many, those measured here and the published front."""
    if len(points) <= MOST_LABELS:
        return list(points)
    front = pareto_front([point for point in points if point.published])
    return ([point for point in points if not point.published] + front)[:MOST_LABELS]


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _labels(points: Sequence[Point], xs: _Scale, ys: _Scale, lines: Sequence[Box]) -> list[str]:
    """Each where it covers no other label and no point, as near to its own as that allows; a line leads to one that is far."""
    dots = [_around((xs(point.x), ys(point.y))) for point in points]
    # What all published rows have in common tells none of them apart.
    ends = {_row_name(point.name, False).rsplit(" ", 1)[-1] for point in points if point.published}
    alike = len(ends) == 1 and ends <= {"monolingual", "multilingual"}
    placed: list[Box] = []
    leaders: list[tuple[float, float]] = []
    parts = []
    for point in sorted(labelled(points), key=lambda point: (point.published, -point.y)):
        at = xs(point.x), ys(point.y)
        name = short(_row_name(point.name, alike) if point.published else point.name)
        places = _places(*at, LETTER * len(name))
        box = min(places, key=lambda box: _cost(box, at, placed, dots, lines, leaders))
        placed.append(box)
        near = _nearest(box, at)
        if math.dist(near, at) > LEADER:
            leaders += _along(at, near)
            parts.append(f'<line class="leader" x1="{at[0]:.1f}" y1="{at[1]:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>')
        kind = "published" if point.published else "measured"
        full = f"<title>{escape(point.name)}</title>" if name != point.name else ""
        middle = f'x="{(box[0] + box[2]) / 2:.1f}" y="{box[3] - 4:.1f}"'
        parts.append(f'<text class="label {kind}" {middle} text-anchor="middle">{escape(name)}{full}</text>')
    return parts


def _row_name(name: str, alike: bool) -> str:
    """Of a published row without its source and, where all have the same, without its setting."""
    bare = re.sub(r" \(\w+\d{4}\)$", "", name)
    return bare.rsplit(" ", 1)[0] if alike else bare


def _places(x: float, y: float, width: float) -> list[Box]:
    found = []
    for far in (9, 18, 30, 44, 60, 80, 104, 132, 170, 220):
        for i in range(16):
            angle = math.pi * i / 8
            across, down = math.cos(angle) * far, math.sin(angle) * far
            # The edge of the box that faces the point stands at the distance, whatever the width.
            left = x + across if across > 1 else x + across - width if across < -1 else x - width / 2
            if LEFT < left and left + width < WIDTH - 2 and TOP - 12 < y + down - LINE / 2 and y + down + LINE / 2 < HEIGHT - BOTTOM:
                found.append((left, y + down - LINE / 2, left + width, y + down + LINE / 2))
    return found or [(LEFT, y - LINE, LEFT + width, y)]


def _nearest(box: Box, at: tuple[float, float]) -> tuple[float, float]:
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


def _around(at: tuple[float, float]) -> Box:
    """The square that a point covers."""
    return at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6


def _along(one: tuple[float, float], other: tuple[float, float]) -> list[tuple[float, float]]:
    return [(one[0] + i / 12 * (other[0] - one[0]), one[1] + i / 12 * (other[1] - one[1])) for i in range(1, 12)]


def _inside(spots: Sequence[tuple[float, float]], box: Box) -> int:
    return sum(box[0] < x < box[2] and box[1] < y < box[3] for x, y in spots)


def _cost(
    box: Box,
    at: tuple[float, float],
    placed: Sequence[Box],
    dots: Sequence[Box],
    lines: Sequence[Box],
    leaders: Sequence[tuple[float, float]],
) -> float:
    """How bad a place is: a covered label or point is worst, then a line through a label, then the distance."""
    near = _nearest(box, at)
    far = math.dist(near, at)
    own = _along(at, near) if far > LEADER else []
    covered = 10 * sum(_overlap(box, other) for other in placed) + 6 * sum(_overlap(box, dot) for dot in dots)
    crossed = 60 * (sum(_inside(own, other) for other in placed) + _inside(leaders, box)) + 12 * sum(_inside(own, dot) for dot in dots)
    return covered + crossed + 0.15 * sum(_overlap(box, line) for line in lines) + far + far * far / 120
