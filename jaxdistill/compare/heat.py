"""Heat maps as inline SVG: every cell with its number where there is room, thousands of cells as a picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.image import imsave

from jaxdistill.compare.figures import LETTER, short
from jaxdistill.report import COLOURS

MOST_DIGITS = 16  # columns
MOST_CELLS = 600  # beyond this an element for every cell would make the page slow and large


def _mixed(share: float) -> tuple[str, bool]:
    """Colour of a cell at 0..1 of the scale, pale to the palette's blue to nearly black; whether digits on it are white."""
    stops = [(0.0, "#f3f7fb"), (0.65, COLOURS[0]), (1.0, "#00304d")]
    share = min(max(share, 0.0), 1.0)
    for (low, one), (high, other) in pairwise(stops):
        if share <= high:
            part = (share - low) / (high - low)
            mixed = [round(int(one[i : i + 2], 16) * (1 - part) + int(other[i : i + 2], 16) * part) for i in (1, 3, 5)]
            return "#" + "".join(f"{each:02x}" for each in mixed), _luminance(mixed) <= 0.18
    raise AssertionError("a share is at most 1")


def _luminance(colour: Sequence[int]) -> float:
    """Of WCAG; above 0.18 black stands out more than white."""
    linear = [each / 255 / 12.92 if each <= 10 else ((each / 255 + 0.055) / 1.055) ** 2.4 for each in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def heat_map(content: Mapping[str, Any], *, digits: int = 2) -> str:
    """A matrix of numbers as colours, with its labels, titles and scale; a cell without a number is left open.

    Args:
      content: `title`, `rows_title`, `columns_title`, `rows`, `columns`, `values` and, where the scale is not the values' own,
        `low` and `high`, as in section `lost` of a file of results.
    """
    rows, columns, values = ([*map(str, content["rows"])], [*map(str, content["columns"])], content["values"])
    finite = [value for row in values for value in row if isinstance(value, (int, float)) and math.isfinite(value)]
    low, high = content.get("low"), content.get("high")
    low, high = min(finite, default=0.0) if low is None else low, max(finite, default=1.0) if high is None else high
    if len(rows) != len(values) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"{len(rows)} x {len(columns)} labels do not fit the values")
    said, many = len(columns) <= MOST_DIGITS, len(rows) * len(columns) > MOST_CELLS
    wide, tall = (max(5, min(46, 720 // len(columns))), max(2, 560 // len(rows))) if many else (46, 28) if said else (20, 18)
    left = 40 + LETTER * max((len(short(row)) for row in rows), default=1)
    longest = max((len(short(column)) for column in columns), default=1)
    turned = longest * LETTER > wide - 4
    top = 34 + (0.75 * LETTER * longest + 8 if turned else 18)
    slant = 0.75 * LETTER * longest if turned else 0
    width, height = max(left + wide * len(columns) + slant + 12, left + 190), top + tall * len(rows) + 44
    parts = [f'<text class="title" x="{left:.0f}" y="14">{escape(str(content.get("columns_title", "")))}</text>']
    middle = top + tall * len(rows) / 2
    rows_title = escape(str(content.get("rows_title", "")))
    parts.append(f'<text class="title" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{rows_title}</text>')
    for j, column in enumerate(columns):
        if j % math.ceil(LETTER * 2.2 / wide):  # as many labels as there is room for
            continue
        x = left + wide * (j + 0.5)
        at = f'transform="translate({x - 2:.0f} {top - 8:.0f}) rotate(-48)"' if turned else f'x="{x:.0f}" y="{top - 8:.0f}"'
        anchor = "start" if turned else "middle"
        parts.append(f'<text class="tick" {at} text-anchor="{anchor}">{escape(short(column))}</text>')
    for i, row in enumerate(rows):
        if i % math.ceil(14 / tall) == 0:
            y = top + tall * (i + 0.5) + 4
            parts.append(f'<text class="tick" x="{left - 8:.0f}" y="{y:.0f}" text-anchor="end">{escape(short(row))}</text>')
    size = (left, top, wide, tall)
    parts.append(_picture(values, low, high, size) if many else _cells(rows, columns, values, low, high, size, digits if said else None))
    parts.append(_scale_bar(left, top + tall * len(rows) + 16, low, high))
    return (
        f'<svg class="heat" viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px" role="img" '
        f'aria-label="{escape(str(content["title"]))}">{"".join(parts)}</svg>'
    )


def _cells(rows, columns, values, low: float, high: float, size: tuple[float, float, int, int], digits: int | None) -> str:
    left, top, wide, tall = size
    parts = []
    for i, (row, numbers) in enumerate(zip(rows, values, strict=True)):
        squares = [
            _square(value, low, high, (left + wide * j, wide, tall), f"{row}, {column}", digits)
            for j, (value, column) in enumerate(zip(numbers, columns, strict=True))
        ]
        paths, texts = ("".join(each) for each in zip(*squares, strict=True))
        y = top + tall * i
        parts.append(f'<g transform="translate(0 {y:.0f})">{paths}</g>')
        parts.append(f'<g class="v" transform="translate(0 {y + tall / 2 + 4:.0f})">{texts}</g>')
    return "".join(parts)


def _picture(values: Sequence[Sequence[Any]], low: float, high: float, size: tuple[float, float, int, int]) -> str:
    """A pixel for every cell, inside the page; a cell without a number is transparent."""
    left, top, wide, tall = size
    pixels = np.zeros((len(values), len(values[0]), 4), np.uint8)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if isinstance(value, (int, float)) and math.isfinite(value):
                colour, _ = _mixed((value - low) / (high - low) if high > low else 0.5)
                pixels[i, j] = (*bytes.fromhex(colour[1:]), 255)
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    code = base64.b64encode(file.getvalue()).decode()
    place = f'x="{left:.0f}" y="{top:.0f}" width="{wide * len(values[0])}" height="{tall * len(values)}"'
    return f'<image {place} preserveAspectRatio="none" style="image-rendering:pixelated" href="data:image/png;base64,{code}"/>'


def _square(value: Any, low: float, high: float, place: tuple[float, int, int], name: str, digits: int | None) -> tuple[str, str]:
    """One cell at (x, width, height) and the digits on it. Few bytes: a page may hold ten thousand."""
    x, wide, tall = place
    square = f'd="M{x + 1:.0f} 1h{wide - 2}v{tall - 2}h{2 - wide}z"'
    middle = f'x="{x + wide / 2:.0f}"'
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return f'<path class="open" {square}><title>{escape(name)}: no value</title></path>', f'<text class="open" {middle}>&#8211;</text>'
    fill, is_dark = _mixed((value - low) / (high - low) if high > low else 0.5)
    if digits is None:
        return f'<path fill="{fill}" {square}><title>{escape(name)}: {value:.3g}</title></path>', ""
    white = 'class="w" ' if is_dark else ""
    return f'<path fill="{fill}" {square}/>', f"<text {white}{middle}>{value:.{digits}f}</text>"


def _scale_bar(x: float, y: float, low: float, high: float) -> str:
    steps = "".join(f'<rect x="{x + 40 + 5 * i:.0f}" y="{y}" width="5" height="10" fill="{_mixed(i / 19)[0]}"/>' for i in range(20))
    return (
        f'<text class="tick" x="{x + 34:.0f}" y="{y + 9}" text-anchor="end">{low:.3g}</text>{steps}'
        f'<text class="tick" x="{x + 146:.0f}" y="{y + 9}">{high:.3g}</text>'
    )
