"""Lanes, drawn with matplotlib, which is imported only when a picture is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permgraph.pictures.figures import pyplot
from permgraph.pictures.lanes import Lanes, Row, lay_out
from permgraph.pictures.palette import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from permgraph.spec.spec import PermutationSpec

# In inches, at a type size of 7 points.
_ROW, _COLUMN, _LETTER, _MARGIN = 0.17, 0.16, 0.062, 0.12
_LABEL, _SIZE = 46, 7.0
_KEY = 4.6  # what the line that explains the marks takes


def plot_spec(
    spec: PermutationSpec, *, rows: int = 80, collapse: bool = True, within: str = "", ax: Axes | None = None
) -> Axes:
    """Draw groups as lanes through modules; see `PermutationSpec.plot`."""
    picture = lay_out(spec, rows=rows, collapse=collapse, within=within)
    labels = [_cut(_numbered(row), _LABEL) for row in picture.rows]
    texts = [_beside(at, row, picture, spec) for at, row in enumerate(picture.rows)]
    left = _LETTER * max(map(len, labels), default=0) + _MARGIN
    right = _LETTER * max((sum(len(text) + 3 for text, _ in row) for row in texts), default=0) + _MARGIN
    lanes = _COLUMN * max(1, picture.columns)
    wide = max(left + _MARGIN + lanes + right, _KEY)
    high = _ROW * (len(picture.rows) + 3.4)
    if ax is None:
        figure = pyplot().figure(figsize=(wide, high))
        ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    # Data are inches from the upper left corner, so that letters and lanes keep their proportion.
    ax.set_xlim(0, wide)
    ax.set_ylim(high, 0)

    def x(column: int) -> float:
        return left + _MARGIN + _COLUMN * column

    def y(at: float) -> float:
        return _ROW * (3.2 + at)

    ax.text(_MARGIN, 0.85 * _ROW, _title(spec, within), fontsize=_SIZE + 1, fontweight="bold", va="center")
    _key(ax, _MARGIN, 1.95 * _ROW)
    for at, (row, label, beside) in enumerate(zip(picture.rows, labels, texts, strict=True)):
        style = "italic" if row.modules else "normal"
        ax.text(left, y(at), label, ha="right", va="center", fontsize=_SIZE, fontstyle=style, gid="permgraph-row")
        ax.plot((x(0), x(max(0, picture.columns - 1))), (y(at), y(at)), color="0.88", linewidth=0.5, zorder=0)
        _write(ax, x(picture.columns) + _MARGIN / 2, y(at), beside)
    for lane in picture.lanes:
        colour, dash = colour_of(lane.column), DASHES[lane.column // len(COLOURS) % len(DASHES)]
        place, ends = x(lane.column), (y(lane.start), y(lane.stop))
        ax.plot((place, place), ends, color=colour, linestyle=dash, linewidth=2, gid="permgraph-lane")
        for at in range(lane.start, lane.stop + 1):
            row = picture.rows[at]
            if lane.group in row.first:
                ax.plot(place, y(at), marker="s", markersize=5, color=colour)
            if lane.group in row.later:
                dot = 2 if lane.group in row.first else 5
                ax.plot(place, y(at), marker="o", markersize=dot, color=colour, markerfacecolor="white")
    return ax


def _write(ax: Axes, x: float, y: float, pieces: list[tuple[str, str | None]]) -> None:
    """Texts one after the other, each behind a square of its colour if it has one."""
    before: Annotation | None = None

    def hang(text: str, colour: str) -> Annotation:
        # Each piece hangs on the one before, whose width only the renderer knows.
        if before is None:
            return ax.annotate(text, (x, y), va="center", fontsize=_SIZE, color=colour)
        return ax.annotate(text, (1, 0.5), xycoords=before, va="center", fontsize=_SIZE, color=colour)

    for text, colour in pieces:
        gap = "" if before is None else "  "
        if colour is None:
            before = hang(gap + text, "0.25")
        else:
            before = hang(f"{gap}■ ", colour)
            before = hang(text, "0.25")


def colour_of(column: int) -> str:
    """The colour of the lanes in a column, one that the colour-blind can tell from its neighbours."""
    return COLOURS[column % len(COLOURS)]


def _key(ax: Axes, x: float, y: float) -> None:
    for marker, face, text in (("s", "0.3", "in a first dimension"), ("o", "white", "in a later one")):
        ax.plot(x + 0.04, y, marker=marker, markersize=5, color="0.3", markerfacecolor=face)
        ax.text(x + 0.12, y, text, fontsize=_SIZE, color="0.3", va="center")
        x += 0.2 + _LETTER * len(text)
    ax.text(x + 0.04, y, "right: groups that begin, with sizes", fontsize=_SIZE, color="0.3", va="center")


def _title(spec: PermutationSpec, within: str) -> str:
    count = len(spec.moving)
    name = ".".join(filter(None, (spec.model_class, within))) or "A spec"
    return f"{name}: {count} {'group' if count == 1 else 'groups'}"


def _numbered(row: Row) -> str:
    if row.modules == 0:
        return row.label
    return f"{row.label} ({row.modules} alike)" if row.modules > 1 else f"{row.label} (alike)"


def _beside(at: int, row: Row, picture: Lanes, spec: PermutationSpec) -> list[tuple[str, str | None]]:
    """What to write right of a row: each group whose lane begins there with its colour, and what stands in no other."""

    def said(group: str) -> str:
        parents = spec.groups[group].parents
        per = f" per {_cut(_last(parents[-1]), 20)}" if parents else ""
        alone = sum(_last(lane.group) == _last(group) for lane in picture.lanes) == 1
        own = _last(group) if alone and group.startswith(row.module) else picture.names[group]
        return f"{_cut(own, 30)} {spec.groups[group].size}{per}"

    begun: list[tuple[str, str | None]] = [
        (said(lane.group), colour_of(lane.column)) for lane in picture.lanes if lane.start == at
    ]
    if row.inner:
        each = f", in each of {row.modules}" if row.modules > 1 else ""
        sizes = [str(spec.groups[group].size) for group in row.inner]
        shown = ", ".join(sizes[:8]) + (f" and {len(sizes) - 8} more" if len(sizes) > 8 else "")
        begun.append((f"inside only: {shown}{each}", None))
    return begun


def _last(name: str) -> str:
    """The end of a dotted name, from the last part that is not a number."""
    parts = name.split(".")
    start = next((at for at in reversed(range(len(parts))) if not parts[at].partition("#")[0].isdecimal()), 0)
    return ".".join(parts[start:])


def _cut(text: str, length: int) -> str:
    """``text``, of which the middle is left out where it is longer than ``length``; one line that shows as it is."""
    # A dollar sign would begin a formula.
    text = "".join(letter if letter.isprintable() else "�" for letter in text).replace("$", r"\$")
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
