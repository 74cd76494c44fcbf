"""A page with the curves of barriers: one file, which needs no network and no script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from permgraph.connectivity import Barrier

COLOURS = ("var(--first)", "var(--second)", "var(--third)")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 64, 36

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c22; --faint: #767680; --grid: #e2e2e8;
  --first: #c2410c; --second: #1d4ed8; --third: #047857; }
@media (prefers-color-scheme: dark) { :root { --paper: #16161a; --ink: #ececf1; --faint: #9a9aa6; --grid: #33333b;
  --first: #fb923c; --second: #7da2ff; --third: #34d399; } }
body { margin: 0 auto; max-width: 44rem; padding: 1.5rem 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 13px; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .3rem .6rem; text-align: right;
  border-bottom: 1px solid var(--grid); } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } code { overflow-wrap: anywhere; }
"""


def barrier_page(lines: Mapping[str, Barrier], about: Mapping[str, Any]) -> str:
    """HTML with one chart for each metric and the figures in a table."""
    metrics = list(next(iter(lines.values())).curves)
    parts = [_chart(metric, lines) for metric in metrics]
    rows = "".join(
        f"<tr><td>{html.escape(title)}</td>"
        + "".join(f"<td>{line.height(metric):.4g}</td>" for metric in metrics)
        + f"<td>{line.position():.3g}</td></tr>"
        for title, line in lines.items()
    )
    head = "".join(f'<th scope="col">barrier in {html.escape(metric)}</th>' for metric in metrics)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Barrier</title>'
        f"<style>{STYLE}</style></head><body><h1>The line between two networks</h1>"
        f"<p>From <code>{html.escape(str(about['a']))}</code> (0) to <code>{html.escape(str(about['b']))}</code> (1), "
        f"weights of <code>{html.escape(str(about['model']))}</code>.</p>"
        f'<div class="wide"><table><thead><tr><th scope="col">B</th>{head}<th scope="col">highest at</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{''.join(parts)}</body></html>\n"
    )


def _chart(metric: str, lines: Mapping[str, Barrier]) -> str:
    values = [value for line in lines.values() for value in line.curves[metric] if math.isfinite(value)]
    if not values:
        return f"<h2>{html.escape(metric)}</h2><p>No value is finite.</p>"
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5

    def x(t: float) -> float:
        return LEFT + t * (WIDTH - LEFT - 16)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - 16)

    grid = []
    for step in range(5):
        value = low + (high - low) * step / 4
        grid.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--grid)"/>'
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            f'<text x="{x(step / 4):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step / 4:g}</text>'
        )
    curves, key = [], []
    for colour, (title, line) in zip(COLOURS, lines.items(), strict=False):
        for run in _finite_runs(line.alphas, line.curves[metric]):
            points = " ".join(f"{x(t):.1f},{y(value):.1f}" for t, value in run)
            curves.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
            curves += [
                f'<circle cx="{x(t):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}">'
                f"<title>{html.escape(title)}, {t:.3g}: {value:.4g}</title></circle>"
                for t, value in run
            ]
        key.append(f'<span style="color:{colour}">&#9679;</span> {html.escape(title)}')
    name = html.escape(metric)
    return (
        f'<h2>{name}</h2><p>{" &#160; ".join(key)}</p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name} along the line">{"".join(grid)}{"".join(curves)}</svg>'
    )


def _finite_runs(alphas: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for t, value in zip(alphas, values, strict=True):
        if math.isfinite(value):
            runs[-1].append((t, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
