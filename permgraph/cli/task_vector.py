"""A fine-tuning of one base, brought to another: the task vector, moved to the other's coordinates and added."""

from __future__ import annotations

from pathlib import Path

import torch

from permgraph.cli.checkpoints import in_parts, moved_by, require_finite, tensor_of
from permgraph.cli.matching_run import MatchingRun
from permgraph.cli.mean import require_same_names
from permgraph.cli.options import Data, Matching, Subject, Writing
from permgraph.cli.outcome import in_words
from permgraph.cli.screen import Screen
from permgraph.io import Staging, write_checkpoint


def task_vector(
    paths: list[Path],
    writing: Writing,
    strength: float,
    subject: Subject,
    matching: Matching,
    data: Data,
    screen: Screen,
    rows: str = "meaning",
) -> None:
    """Align BASE_A to BASE_B, and add what TUNED_A has beyond BASE_A, moved along, to BASE_B.

    Args:
        paths: BASE_A, TUNED_A and BASE_B.
        writing: where to write, in the layout and types of BASE_B.
        strength: how much of the difference is added.
        subject, matching, data: as of ``permgraph align``.
        screen: where to say what is going on.
        rows: which rows are the same where the three have other tokens or classes. Those that all have are tuned;
            others of BASE_B stay as they are.

    Raises:
        MismatchError: the three are not of one model.
    """
    base_a, tuned_a, base_b = paths
    run = MatchingRun.prepare(
        (base_b, base_a, tuned_a), subject, matching, data, screen, output=writing.output, rows=rows
    )
    require_same_names(run.weights, run.spec)
    of_b, of_a, of_tuned = map(run.whole, range(3))
    names = {key: name for name, key in of_b.keys_of.items()}
    with Staging(writing.output, run.job("transport", strength=strength), overwrite=writing.overwrite) as staging:
        if staging.complete:
            write_checkpoint(run.checkpoints[0], staging, lambda key, tensor: tensor)
            screen.result({"output": str(writing.output)}, f"an earlier run had finished {writing.output}")
            return
        if staging.resumed:
            screen.note("going on where an earlier run stopped")
        element, report = run.match(staging, 1)
        report = {**report, "check": run.prove(1, element), "strength": strength}
        parts = [in_parts(run.own(number, element)) for number in (1, 2)]

        def tuned(key: str, tensor: torch.Tensor) -> torch.Tensor:
            require_finite(key, tensor, base_b)
            if key not in names or not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            name, sizes = names[key], []
            for number, weights, path in ((2, of_tuned, tuned_a), (1, of_a, base_a)):
                own = tensor_of(weights, name, run.spec)
                require_finite(name, own, path)
                moved = _in_double(moved_by(parts[number - 1], name, _in_double(own), weights))
                sizes.append(moved if run.rows is None else run.rows.pick(number, name, moved))
            new, difference = _in_double(tensor), strength * (sizes[0] - sizes[1])
            table = None if run.rows is None else run.rows.tables.get(run.spec.aliases.get(name, name))
            new = new + difference if table is None else new.index_add(table.dim, table.common(0), difference)
            return (new.clamp(min=0) if name.endswith("running_var") else new).to(tensor.dtype)

        with screen.stage("writing", run.checkpoints[0].nbytes) as update:
            write_checkpoint(run.checkpoints[0], staging, tuned, progress=lambda done, whole: update(done))
    if run.rows is not None:
        screen.note(f"rows that one of the three has not are those of {base_b} as they were")
    if any(name.endswith("running_var") for name in run.spec.axes):
        screen.note("the model has BatchNorm: measure its statistics anew on data of the task")
    text = f"{base_a} to {base_b}: {in_words(report)}\nwritten to {writing.output}"
    screen.result({"output": str(writing.output), **report}, text)


def _in_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
