"""What a notebook shows for a spec, an alignment or a barrier: small tables, without scripts.

Everything is escaped, since names come from checkpoints. Colours are the notebook's own, so that its dark theme works.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from permgraph.conventions.displayed import summary
from permgraph.pictures.palette import COLOURS
from permgraph.spec.expressions import Fixed

if TYPE_CHECKING:
    from permgraph.pictures.shown import ShownLine, ShownMatch
    from permgraph.spec.spec import PermutationSpec

_GROUPS = 24
_CELL = "text-align:left;padding:.15em .8em .15em 0"


def spec_table(spec: PermutationSpec) -> str:
    """The groups of a spec: sizes, parents, and where each stands."""
    rows = []
    for at, (name, group) in enumerate(list(spec.moving.items())[:_GROUPS]):
        uses = spec.uses(name)
        first = ", ".join(f"{parameter}[{dim}]" for parameter, dim in uses[:2])
        rest = f" and {len(uses) - 2} more" if len(uses) > 2 else ""
        swatch = f'<span style="color:{COLOURS[at % len(COLOURS)]}">&#9632;</span> '
        rows.append([swatch + text(name), str(group.size), text(", ".join(group.parents) or "—"), text(first + rest)])
    still = sum(isinstance(axis, Fixed) and axis.size > 1 for axes in spec.axes.values() for axis in axes)
    said = [
        f"{len(spec.tensors)} parameters and buffers in "
        f"{len({name.rpartition('.')[0] for name in spec.tensors})} modules",
        f"{len(spec.moving)} groups",
        f"ln of the number of permutations {spec.log_order():.6g}",
        f"{still} axes stay put",
    ]
    if spec.stacks:
        said.insert(1, f"{len(spec.in_stack)} of them in {len(spec.stacks)} stacks, of modules that change places")
    if spec.unknown_ops:
        said.append(f"{len(spec.unknown_ops)} operators without a rule")
    more = f"<p>and {len(spec.moving) - _GROUPS} more groups</p>" if len(spec.moving) > _GROUPS else ""
    head = ("group", "size", "one at each index of", "stands in")
    top = caption(spec.model_class or "PermutationSpec", said)
    return f"<div>{top}{table(head, rows)}{more}{_notes(spec.notes)}</div>"


def alignment_table(result: ShownMatch) -> str:
    """How a matcher fared: the objective, sweep by sweep."""
    said = [
        f"{result.outcome} after {result.sweeps} {'sweep' if result.sweeps == 1 else 'sweeps'}",
        f"{result.seconds:.3g} s",
        f"objective {result.objective_before:.6g} → {result.objective:.6g}",
    ]
    shown = result.history if len(result.history) <= 12 else (*result.history[:6], *result.history[-6:])
    rows = [
        [str(sweep.number), f"{sweep.objective:.6g}", str(sum(sweep.moved.values())), f"{sweep.seconds:.3g}"]
        for sweep in shown
    ]
    head = ("sweep", "objective", "indices moved", "seconds since the start")
    body = table(head, rows) if rows else ""
    return f"<div>{caption(type(result).__name__, said)}{body}{_notes(result.notes)}</div>"


def barrier_table(line: ShownLine) -> str:
    """The barrier in each metric, with the ends and the highest place."""
    rows = [
        [
            text(metric),
            f"{values[0]:.6g}",
            f"{values[-1]:.6g}",
            f"{line.height(metric):.6g}",
            f"{line.position(metric):.3g}",
        ]
        for metric, values in line.curves.items()
    ]
    said = [f"{len(line.alphas)} points on the line", f"{line.seconds:.3g} s"]
    if line.nonfinite:
        said.append(f"{len(line.nonfinite)} values are not finite")
    body = table(("metric", "at a", "at b", "barrier", "highest at"), rows)
    return f"<div>{caption('Barrier', said)}{body}{_notes(line.notes)}</div>"


def result_table(result: object) -> str:
    """Any result: its fields in a few words each, and its notes."""
    rows = [(text(name), text(said)) for name, said in summary(result) if name != "notes"]
    notes = _notes(getattr(result, "notes", ()))
    return f"<div>{caption(type(result).__name__, ())}{table(('field', 'value'), rows)}{notes}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the head is text, the cells are HTML already."""
    columns = "".join(f'<th scope="col" style="{_CELL}">{text(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def caption(title: str, said: Iterable[str]) -> str:
    """A bold title and facts about it, as a paragraph of HTML."""
    facts = text(" · ".join(said))
    return f"<p><strong>{text(title)}</strong>{facts and ': '}{facts}</p>"


def text(raw: object) -> str:
    """Anything as HTML that shows it and does nothing."""
    return html.escape(str(raw), quote=True)


def as_lines(line: ShownLine | Mapping[str, ShownLine]) -> Mapping[str, ShownLine]:
    """One barrier, or several by title."""
    return line if isinstance(line, Mapping) else {"the line": line}


def _cell(content: str) -> str:
    return f'<td style="{_CELL}">{content}</td>'


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"<p>{text(note)}</p>" for note in notes)
