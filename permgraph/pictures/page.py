"""The report: one HTML file that needs no network, in which a spec can be clicked through.

Nothing that comes from a checkpoint can become markup or code: what Python writes is escaped, the data are JSON without
angle brackets, the script writes text only, and the page's own policy lets no script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.io.files import write_atomically
from permgraph.pictures.charts import line_chart, similarity_rows
from permgraph.pictures.content import content
from permgraph.pictures.similarity import layer_similarity
from permgraph.pictures.tables import as_lines, table, text
from permgraph.spec.expressions import Fixed
from permgraph.spec.spec import PermutationSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from permgraph.pictures.shown import ShownLine, ShownMatch
    from permgraph.spec.permutation import Permutation
    from permgraph.spec.transformation import Transformation


@dataclass(frozen=True)
class Report:
    """A page about a spec; in a notebook it shows itself.

    Attributes:
        html: the whole file.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to ``path``; the file is replaced in one step."""
        write_atomically(path, self.html.encode())

    def __repr__(self) -> str:
        return f"Report({len(self.html.encode()) / 1024:.0f} KiB of HTML; save(path) writes it)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="permgraph report" sandbox="allow-scripts" srcdoc="{text(self.html)}" '
            'style="width:100%;height:44rem;border:1px solid #8888;border-radius:6px"></iframe>'
        )


@waits("writing the report")
def report(
    spec: PermutationSpec,
    path: str | os.PathLike[str] | None = None,
    *,
    alignment: ShownMatch | None = None,
    models: tuple[nn.Module | Mapping[str, torch.Tensor], nn.Module | Mapping[str, torch.Tensor]] | None = None,
    barrier: ShownLine | Mapping[str, ShownLine] | None = None,
    title: str | None = None,
    about: Mapping[str, str] | None = None,
) -> Report:
    """Make a page in which a spec can be clicked through: one file, which needs no network.

    It shows the modules with each parameter's axes in the colour of their group; for each axis all that is tied to it,
    and by which operators in which lines; what stays put, and why; and operators without a rule.

    Args:
        spec: what to show.
        path: where to write the page, if anywhere.
        alignment: shows the objective sweep by sweep too.
        models: A and B as they were before the alignment, modules or state dicts, to compare layer by layer: the cosine
            similarity of the weights, before and after.
        barrier: what was measured on the line between two networks, or several such by title.
        title: a heading; by default the model's class.
        about: further facts to show under the heading, by name.

    Raises:
        MismatchError: the alignment is of another spec, or the models do not fit the spec.

    Example:
        >>> spec = pg.PermutationSpec.parse("fc.weight 3x2 hidden . \\ngroups: hidden 3")
        >>> "hidden" in report(spec).html
        True
    """
    if not isinstance(spec, PermutationSpec):
        raise MismatchError(f"report() takes a spec, such as auto_spec(model), not a {type(spec).__name__}")
    element = None if alignment is None else alignment.element
    own = (spec.fingerprint, spec.permutations().fingerprint)  # a matcher may know permutations alone
    if element is not None and element.spec.fingerprint not in own:
        raise MismatchError(
            "the alignment is of another spec than the one to report: give the spec that it was made with"
        )
    panels = {"structure": "Structure", "groups": "Groups", "still": "Stays put"}
    made: dict[str, str] = {}
    if alignment is not None or models is not None:
        panels["alignment"] = "Alignment"
        made["alignment"] = _alignment_panel(alignment) + _similarity_panel(spec, models, element)
    if barrier is not None:
        panels["line"] = "Line"
        made["line"] = _line_panel(as_lines(barrier))
    name = title or spec.model_class or "Permutation symmetries"
    html = _assemble(name, _facts(spec), about or {}, _notes(spec), panels, made, content(spec))
    result = Report(html)
    if path is not None:
        result.save(path)
    return result


def _notes(spec: PermutationSpec) -> tuple[str, ...]:
    """The notes of a spec, and how what the model returns beside its result moves."""
    moving = [f"{name} {' '.join(map(str, axes))}" for name, axes in spec.moving_outputs.items()]
    more = [f"and {len(moving) - 8} more"] if len(moving) > 8 else []
    return (*spec.notes, f"by-products: {' · '.join((*moving[:8], *more))}") if moving else spec.notes


def _facts(spec: PermutationSpec) -> list[tuple[str, str]]:
    whole = sum(isinstance(axis, Fixed) and axis.size > 1 for axes in spec.axes.values() for axis in axes)
    parts = len(spec.pins) - whole
    still = f"{whole:,}" + (f", and {parts:,} in part" if parts > 0 else "")
    order = spec.log_order()
    ran = [run for run in spec.passes if run.outcome in ("solved", "alike")]
    return [
        *([("runs of forward looked at", "; ".join(run.name for run in ran))] if ran else []),
        ("parameters and buffers", f"{len(spec.tensors):,}"),
        *(
            [("stacks of modules that change places", f"{len(spec.stacks):,}, of {len(spec.in_stack):,} tensors")]
            if spec.stacks
            else []
        ),
        ("groups", f"{len(spec.moving):,}"),
        ("ln of the number of permutations", f"{order:,.0f}" if order >= 1000 else f"{order:.4g}"),
        ("axes that stay put", still),
        ("operators without a rule", f"{len(spec.unknown_ops):,}"),
    ]


def _alignment_panel(alignment: ShownMatch | None) -> str:
    if alignment is None:
        return ""
    facts = _list_of_facts(
        [
            ("outcome", alignment.outcome),
            ("sweeps", str(alignment.sweeps)),
            ("objective", f"{alignment.objective_before:.6g} → {alignment.objective:.6g}"),
            ("seed", str(alignment.seed)),
            ("seconds", f"{alignment.seconds:.3g}"),
        ]
    )
    notes = "".join(f"<p>{text(note)}</p>" for note in alignment.notes)
    if not alignment.history:
        return f"{facts}{notes}"
    # A matcher that goes on where an earlier one stopped begins elsewhere than at the identity.
    begins = [] if alignment.history[0].number != 1 else [(0.0, alignment.objective_before)]
    points = [*begins, *((float(sweep.number), sweep.objective) for sweep in alignment.history)]
    chart = line_chart({"objective": points}, name="objective, sweep by sweep", across="sweep", whole=True)
    rows = [
        [str(sweep.number), f"{sweep.objective:.8g}", f"{sum(sweep.moved.values()):,}", f"{sweep.seconds:.3g}"]
        for sweep in alignment.history
    ]
    figures = table(("sweep", "objective", "indices moved", "seconds since the start"), rows)
    return (
        f"{facts}{notes}<h2>Objective, sweep by sweep</h2>{chart}"
        f'<details><summary>The same as a table</summary><div class="wide">{figures}</div></details>'
    )


def _similarity_panel(
    spec: PermutationSpec,
    models: tuple[nn.Module | Mapping[str, torch.Tensor], nn.Module | Mapping[str, torch.Tensor]] | None,
    element: Permutation | Transformation | None,
) -> str:
    if models is None:
        return ""
    a, b = (model if isinstance(model, Mapping) else model.state_dict() for model in models)
    rows = similarity_rows(layer_similarity(spec, a, b, element))
    return (
        "<h2>Similarity, layer by layer</h2><p>The cosine of the angle between the weights of a layer in A and in B: "
        '<span class="ring sign"></span> as given, <span class="dot sign"></span> after the alignment.</p>' + rows
    )


def _line_panel(lines: Mapping[str, ShownLine]) -> str:
    metrics = list(dict.fromkeys(metric for line in lines.values() for metric in line.curves))
    charts = []
    for metric in metrics:
        curves = {
            title: list(zip(line.alphas, line.curves[metric], strict=True))
            for title, line in lines.items()
            if metric in line.curves
        }
        shown = line_chart(curves, name=f"{metric} along the line", across="from A (0) to B (1)")
        charts.append(f"<h2>{text(metric)}</h2>{shown}")
    rows = [
        [
            text(title),
            *(f"{line.height(metric):.4g}" if metric in line.curves else "—" for metric in metrics),
            f"{line.position():.3g}",
        ]
        for title, line in lines.items()
    ]
    highest = f"highest in {next(iter(lines.values())).metric} at" if len(metrics) > 1 else "highest at"
    head = ("B", *(f"barrier in {metric}" for metric in metrics), highest)
    notes = "".join(f"<p>{text(note)}</p>" for note in dict.fromkeys(n for line in lines.values() for n in line.notes))
    return f'<div class="wide">{table(head, rows)}</div>{notes}{"".join(charts)}'


def _list_of_facts(facts: list[tuple[str, str]]) -> str:
    return f'<dl class="facts">{"".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts)}</dl>'


def _assemble(
    title: str,
    facts: list[tuple[str, str]],
    about: Mapping[str, str],
    notes: tuple[str, ...],
    panels: Mapping[str, str],
    made: Mapping[str, str],
    data: object,
) -> str:
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    tabs = "".join(
        f'<button type="button" role="tab" id="tab-{key}" aria-controls="{key}" aria-selected="{str(at == 0).lower()}" '
        f'tabindex="{0 if at == 0 else -1}">{label}</button>'
        for at, (key, label) in enumerate(panels.items())
    )
    sections = "".join(
        f'<section role="tabpanel" id="{key}" aria-labelledby="tab-{key}"{"" if at == 0 else " hidden"}>'
        f"{made.get(key, '')}</section>"
        for at, key in enumerate(panels)
    )
    told = "".join(f"<p class=about>{text(name)}: <code>{text(value)}</code></p>" for name, value in about.items())
    told += "".join(f"<p class=note>{text(note)}</p>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{text(title)}</title>'
        f"<style>{style}</style></head><body>"
        f'<header><div class="heading"><h1>{text(title)}</h1>'
        '<button type="button" id="theme" aria-label="Theme: as the system">Theme: system</button></div>'
        f"{told}{_list_of_facts(facts)}</header>"
        "<noscript><p>This page needs scripts to be clicked through; all of them are in this file.</p></noscript>"
        f'<div role="tablist" aria-label="What to show">{tabs}</div>'
        f'<div class="body"><main>{sections}</main>'
        '<aside id="detail" aria-label="The axis chosen" tabindex="-1"></aside></div>'
        f'<script type="application/json" id="data">{_as_json(data)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _as_json(data: object) -> str:
    """JSON in which no tag can begin or end."""
    written = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("permgraph.pictures").joinpath(name).read_text(encoding="utf-8")
