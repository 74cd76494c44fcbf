"""Line charts as SVG, and rows of dots, for a page that runs no code to draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from permgraph.pictures.similarity import Similarity
from permgraph.pictures.tables import text

Points: TypeAlias = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 260, 70, 14, 12, 44
_STYLES = (("var(--g0)", "circle"), ("var(--g1)", "square"), ("var(--g2)", "circle"), ("var(--g3)", "square"))
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def line_chart(series: Mapping[str, Points], *, name: str, across: str, whole: bool = False) -> str:
    """A chart of some curves, with a key and grid; values that are not finite leave gaps.

    Args:
        series: title to the points of a curve.
        name: what is measured, for the label and for readers of the screen.
        across: what runs from left to right.
        whole: mark only whole numbers on that axis.
    """
    finite = [point for points in series.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return f"<p>No value of {text(name)} is finite.</p>"
    start, stop = min(x for x, _ in finite), max(x for x, _ in finite)
    start, stop = (start, stop) if stop > start else (start - 0.5, stop + 0.5)
    marks = _ticks(min(y for _, y in finite), max(y for _, y in finite))
    low, high = marks[0], marks[-1]

    def across_at(x: float) -> float:
        return _LEFT + (x - start) / (stop - start) * (_WIDTH - _LEFT - _RIGHT)

    def up_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    drawn = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up_at(y):.1f}" y2="{up_at(y):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{up_at(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>'
        for y in marks
    ]
    ticks = [x for x in _ticks(start, stop) if start <= x <= stop and (not whole or x == round(x))]
    drawn += [
        f'<text x="{across_at(x):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{x:.6g}</text>' for x in ticks
    ]
    drawn.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{text(across)}</text>'
    )
    key = []
    for at, (title, points) in enumerate(series.items()):
        colour, mark = _STYLES[at % len(_STYLES)]
        dash = _DASHES[at // len(_STYLES) % len(_DASHES)]
        for run in _finite_runs(points):
            path = " ".join(f"{across_at(x):.1f},{up_at(y):.1f}" for x, y in run)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')
            drawn += [
                _mark(mark, across_at(x), up_at(y), colour, f"{title}, {across} {x:.4g}: {y:.6g}") for x, y in run
            ]
        missing = sum(not math.isfinite(y) for _, y in points)
        gone = f" ({missing} not finite)" if missing else ""
        sign = "&#9679;" if mark == "circle" else "&#9632;"
        key.append(f'<span><span style="color:{colour}" aria-hidden="true">{sign}</span> {text(title + gone)}</span>')
    return (
        f'<figure class="chart"><figcaption>{"".join(key)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(name)}">{"".join(drawn)}</svg></figure>'
    )


def similarity_rows(layers: Sequence[Similarity]) -> str:
    """A row for each layer: its similarity before as a ring, after as a dot, and both as numbers."""
    values = [value for layer in layers for value in (layer.before, layer.after) if value is not None]
    low = min(0.0, *(value for value in values if math.isfinite(value)), 0.0)

    def place(value: float | None, kind: str) -> str:
        if value is None or not math.isfinite(value):
            return ""
        return f'<i class="{kind}" style="left:{(value - low) / (1 - low) * 100:.2f}%"></i>'

    def number(value: float | None) -> str:
        return "" if value is None else "zero" if math.isnan(value) else f"{value:.3f}"

    rows = "".join(
        f'<tr><th scope="row"><code>{text(layer.layer)}</code></th><td>{number(layer.before)}</td>'
        f"<td>{number(layer.after)}</td>"
        f'<td class="track"><span>{place(layer.before, "ring")}{place(layer.after, "dot")}</span></td></tr>'
        for layer in layers
    )
    axis = f"{low:.2g} to 1"
    return (
        '<div class="wide tall" tabindex="0" role="region" aria-label="Similarity layer by layer">'
        '<table class="similar"><thead><tr><th scope="col">layer</th><th scope="col">before</th>'
        f'<th scope="col">after</th><th scope="col">{axis}</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _mark(kind: str, x: float, y: float, colour: str, title: str) -> str:
    inside = f'fill="{colour}"><title>{text(title)}</title>'
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" {inside}</circle>'
    return f'<rect x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="5" height="5" {inside}</rect>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to eight of them, from at or below ``low`` to at or above ``high``."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _finite_runs(points: Points) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
