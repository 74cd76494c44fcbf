"""`MatchingRun`: checkpoints that are opened, checked and matched; matching that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import permgraph
from permgraph.cli.checkpoints import (
    fitted,
    identity_of,
    note_what_is_left_behind,
    open_all,
    require_alike,
    require_finite,
    whole_state,
)
from permgraph.cli.data import class_dim_of, identity_of_data, load_data
from permgraph.cli.distributed import DistributedRun
from permgraph.cli.extra_keys import require_matched
from permgraph.cli.folders import model_of, named_inside
from permgraph.cli.kept import keep_json, load_element, resumed, save
from permgraph.cli.matchers import describe, machine_memory, matcher_of
from permgraph.cli.models import build, parse_inputs, require_one_structure, spec_of_subject, with_kind
from permgraph.cli.options import FORMS, Data, Init, Matching, Split, Subject
from permgraph.cli.rows import CommonRows, digest_of, matched_rows, with_own_ties
from permgraph.cli.screen import Screen
from permgraph.errors import CaptureError, CheckpointError, EvaluationError, MismatchError, NonFiniteError, in_one_line
from permgraph.io import Checkpoint, Renamed, Staging
from permgraph.io.write import check_target
from permgraph.matching import MatchResult, SupportsMatch, Sweep, WeightMatching
from permgraph.matching.matcher import runs_networks
from permgraph.matching.rows import Rows, on_spec
from permgraph.matching.streamed import StreamedWeightMatching
from permgraph.merging import Models
from permgraph.merging.compared import Compared
from permgraph.spec.elements import AnyElement
from permgraph.spec.spec import PermutationSpec
from permgraph.verification import verify

#: Bytes for each weight while a network is checked: as it is, in float64, and what a permutation makes of it.
CHECK_BYTES = 24


@dataclass(frozen=True)
class MatchingRun:
    """Checkpoints of one model, and how they are to be matched.

    Attributes:
        checkpoints: as they were opened, with the model's tensors in the place of those that they are made of.
        weights: the same by the spec's names.
        spec: the symmetries of their model.
        model: the model as it is named on the command line; empty if only its spec is known.
        matcher: how to match two of them.
        loader: the batches of ``--data``, if that was given.
        data: the options about data.
        seed: of all random choices.
        leave: patterns of keys that the spec need not know.
        from_barycentre: whether the barycentre was asked for, and is not just where a matcher begins by itself.
        inputs: shapes of example inputs, as they are written on the command line.
        check: whether networks are to be checked after they were renumbered; if None, where memory is enough.
        screen: where to say what is going on.
        others: the processes that match together with this one.
        rows: which rows mean the same, where the checkpoints have other tokens or classes; `weights` then have the rows
            in common alone, of which `spec` is.
        specs: for each checkpoint its own spec, with all of its rows and its own ties.
    """

    checkpoints: tuple[Checkpoint, ...]
    weights: tuple[Renamed, ...]
    spec: PermutationSpec
    model: str
    matcher: SupportsMatch
    loader: Iterable[Any] | None
    data: Data
    seed: int
    leave: tuple[str, ...]
    from_barycentre: bool
    inputs: tuple[str, ...]
    check: bool | None
    screen: Screen
    others: DistributedRun | None = None
    rows: Rows | None = None
    specs: tuple[PermutationSpec, ...] = ()

    @classmethod
    def prepare(
        cls,
        paths: Sequence[Path],
        subject: Subject,
        asked: Matching,
        data: Data,
        screen: Screen,
        *,
        output: Path | None = None,
        like: int = 0,
        split: Split = Split.train,
        others: DistributedRun | None = None,
        rows: str | None = None,
    ) -> MatchingRun:
        """Open the checkpoints, and make sure of all that can be known before anything is computed.

        Args:
            paths: of the checkpoints; the first may say what model it is of.
            subject, asked, data: the options.
            screen: where to say what is going on.
            output: where a checkpoint is to be written, if one is.
            like: the number of the checkpoint whose layout that has.
            split: of data that have two, unless the options say.
            others: the processes that match together with this one.
            rows: how rows are matched where checkpoints have other tokens or classes; they may not if None.

        Raises:
            CheckpointError, MismatchError: a checkpoint cannot be read, does not fit the model or the output's name.
            EvaluationError: so for the data.
        """
        opened = open_all(paths, subject.entry, screen, tuple(subject.components or ()))
        if output is not None:
            check_target(opened[like], output)
            for checkpoint in opened:
                if output.resolve() == checkpoint.path.resolve():
                    raise CheckpointError(f"{output} is one of the inputs, which are only read: choose another place")
            note_what_is_left_behind(opened[like], screen)
        own = model_of(opened[0]) or named_inside(opened[0])
        loader = (
            load_data(data, opened[0].home if own.startswith("hf:") else None, split=split)
            if data.data is not None
            else None
        )
        general = subject.symmetry == "general"
        matcher = matcher_of(asked, opened[0], loader, class_dim_of(data, loader), general=general)
        model = with_kind(subject.model or "") or ("" if subject.spec_file else own)
        missing = f"{opened[0].path} does not say what it holds the weights of"
        spec = spec_of_subject(model, subject, subject.symmetry, missing, screen)
        if spec.general is not None and others is not None:
            raise MismatchError("several processes match over permutations alone: leave out --symmetry general")
        with screen.stage("comparing structures"):
            require_one_structure(opened, model, spec, subject.inputs, screen)
        if runs_networks(matcher) and not model:
            raise MismatchError(f"--matcher {asked.matcher.value} runs the networks: say --model {FORMS}")
        if others is not None and not isinstance(matcher, StreamedWeightMatching):
            raise MismatchError("several processes match together where tensors are streamed: say --stream")
        leave = tuple(subject.leave or ())
        require_matched(leave, opened)
        layout = model or own
        weights = tuple(
            fitted(checkpoint, spec, screen, leave, layout, other_rows=rows is not None and number > 0)
            for number, checkpoint in enumerate(opened)
        )
        opened = tuple(each.checkpoint for each in weights)
        found = None if rows is None else matched_rows(spec, weights, rows, layout, screen)
        specs = [spec] * len(weights) if found is None else list(found.specs)
        specs = [specs[0], *(with_own_ties(own, each) for own, each in zip(specs[1:], weights[1:], strict=True))]
        if found is not None:
            if runs_networks(matcher):
                raise MismatchError(
                    f"--matcher {asked.matcher.value} runs the networks, whose rows differ: take weight"
                )
            weights = tuple(CommonRows(each.checkpoint, each.keys_of, n, found) for n, each in enumerate(weights))
            spec = found.spec
        for other in weights[1:]:
            require_alike(weights[0], other)
        barycentre = asked.init is Init.barycentre
        inputs = tuple(subject.inputs or ())
        return cls(
            opened, weights, spec, model, matcher, loader, data, asked.seed, leave, barycentre, inputs, asked.check,
            screen, others, found, tuple(specs),
        )  # fmt: skip

    def job(self, command: str, **more: Any) -> dict[str, Any]:
        """What the bytes of the output depend on."""
        return {
            "command": command,
            "permgraph": permgraph.__version__,
            "torch": torch.__version__,
            "spec": self.spec.fingerprint,
            "inputs": [identity_of(checkpoint) for checkpoint in self.checkpoints],
            "matcher": describe(self.matcher),
            "data": None if self.loader is None else identity_of_data(self.data),
            "seed": self.seed,
            "leave": self.leave,
            **({"rows": digest_of(self.rows)} if self.rows is not None else {}),
            **more,
        }

    def module(self, number: int) -> nn.Module:
        """The network of a checkpoint, as its own configuration says if it has one, in evaluation mode."""
        module = build(self.model_of(number), device=None)
        module.load_state_dict(whole_state(self.whole(number), self.spec_of(number), module))
        return module

    def whole(self, number: int) -> Renamed:
        """A checkpoint by the spec's names, with all of its rows."""
        weights = self.weights[number]
        return weights if self.rows is None else Renamed(weights.checkpoint, weights.keys_of)

    def spec_of(self, number: int) -> PermutationSpec:
        """The spec of a checkpoint with all of its rows and its own ties."""
        return self.specs[number] if self.specs else self.spec

    def own(self, number: int, element: AnyElement) -> AnyElement:
        """An element of the spec's group, as one that is applied to a checkpoint with all of its rows."""
        return element if self.spec_of(number) is self.spec else on_spec(element, self.spec_of(number))

    def model_of(self, number: int) -> str:
        """The model that a checkpoint holds the weights of, as it is named on the command line; empty if not known."""
        own = model_of(self.checkpoints[number])
        return own if own and (not self.model or self.model.startswith("hf:")) else self.model

    def prove(self, number: int, permutation: AnyElement | None) -> dict[str, Any]:
        """Check on a network itself that it computes the same after it was renumbered; what was found, as plain data.

        Where that cannot be done, a note says so.

        Raises MismatchError if it does not compute the same.
        """
        path, model = self.checkpoints[number].path, self.model_of(number)
        if self.check is False or permutation is None or permutation.is_identity:
            return {}
        need = CHECK_BYTES * sum(math.prod(form.shape) for form in self.checkpoints[number].formats.values())
        if not model:
            self.screen.note(f"{path}: not checked: --spec does not say what the network computes")
            return {}
        if self.check is None and need > 0.5 * machine_memory():
            self.screen.note(
                f"{path}: not checked: that takes some {need / 2**30:,.1f} GiB of memory; --check does it all the same"
            )
            return {}
        started = time.perf_counter()
        args, kwargs = parse_inputs(list(self.inputs))
        if self.rows is not None and model == self.model and number:  # its rows are those of the first
            self.screen.note(f"{path}: not checked: {model} has not its numbers of rows")
            return {}
        permutation = self.own(number, permutation)
        with self.screen.stage(f"checking {path.name}"):
            try:
                proof = verify(
                    self.module(number), None, args or None, kwargs or None, permutation=permutation, controls="none"
                )
            except (CaptureError, EvaluationError) as error:
                self.screen.note(f"{path}: not checked: {in_one_line(error, 300)}")
                return {}
        seconds = time.perf_counter() - started
        if proof.own_precision is not None:
            self.screen.note(f"{path}: {proof.own_precision}")
        if not proof.passed:
            raise MismatchError(
                f"{path} does not compute the same after renumbering, so nothing is written: "
                f"{' '.join(str(proof).split())}. Its network is not what the symmetries were found for, or they are "
                "wrong; --no-check leaves this check out"
            )
        self.screen.note(
            f"{path}: computes the same after renumbering: relative error {proof.max_error:.1e} on "
            f"{', '.join(run.name for run in proof.runs if run.error is not None)}; checked in {seconds:.1f} s"
        )
        return {
            "checkpoint": str(path),
            "max_error": proof.max_error,
            "runs": [dataclasses.asdict(run) for run in proof.runs],
            "own_precision": None if proof.own_precision is None else proof.own_precision._asdict(),
            "seconds": seconds,
        }

    def match(self, staging: Staging, number: int, reference: int = 0) -> tuple[AnyElement, dict[str, Any]]:
        """Match one checkpoint to another, unless an earlier run has, and keep the outcome with the staging."""
        kept, told = f".permutation-{number}.safetensors", f".report-{number}.json"
        if kept not in staging.finished or told not in staging.finished:
            result = self.find(number, reference, staging)
            save(staging, kept, result.element)
            keep_json(staging, told, self.report(result))
        return load_element(staging.path(kept), self.spec), json.loads(staging.path(told).read_bytes())

    def find(self, number: int, reference: int = 0, staging: Staging | None = None) -> MatchResult:
        """Match one checkpoint to another; a streamed run keeps each sweep with the staging, and goes on after it."""
        matcher = self.matcher
        a: Mapping[str, torch.Tensor] = self.weights[reference]
        b: Mapping[str, torch.Tensor] = self.weights[number]
        if not self.spec.acting:
            self.screen.note("nothing to permute: the spec has no groups")
        # Weight matching looks at what it compares; a model with NaN elsewhere is none to align to either.
        weight = isinstance(matcher, (WeightMatching, StreamedWeightMatching))
        over = Models((a,), self.spec).stacked()
        compared = Compared.of(over.spec, over.states[0]).names if weight else ()
        looked_at = {own for name in compared for own in self.spec.tensors_of(name)}
        for name in a:
            if name not in looked_at:
                require_finite(self.weights[reference].keys_of[name], a[name], self.checkpoints[reference].path)
        with self.screen.stage(f"matching {self.checkpoints[number].path.name}") as stage:
            if isinstance(matcher, StreamedWeightMatching):
                matcher = dataclasses.replace(matcher, watch=stage.step)
                if staging is not None:
                    matcher = resumed(matcher, staging, f".matching-{number}-", self.spec)
            if runs_networks(matcher):
                modules = self.module(reference), self.module(number)
                matcher, (a, b) = matcher.with_models(*modules), (module.state_dict() for module in modules)
            try:
                if self.others is not None:
                    assert isinstance(matcher, StreamedWeightMatching)
                    result = self.others.match(matcher, a, b, self.spec, self.seed, self.sweeps(stage))
                else:
                    result = matcher.match(a, b, self.spec, self.seed, self.sweeps(stage))
            except NonFiniteError:
                self._name_what_is_not_finite(reference, number)
                raise
        if result.outcome == "interrupted":
            raise KeyboardInterrupt
        for note in result.notes:
            self.screen.note(note)
        return result

    def _name_what_is_not_finite(self, *numbers: int) -> None:
        """Raise NonFiniteError that names the file and its key, where a matcher knows only of A and B."""
        for number in numbers:
            for name, tensor in self.weights[number].items():
                require_finite(self.weights[number].keys_of[name], tensor, self.checkpoints[number].path)

    def follow(self, number: int, reference: int = 0) -> None:
        """Help the first process with matching one checkpoint to another."""
        assert self.others is not None and isinstance(self.matcher, StreamedWeightMatching)
        self.others.follow(self.matcher, self.weights[reference], self.weights[number], self.spec, self.seed)

    def sweeps(self, update: Callable[[float], None]) -> Callable[[Sweep], None]:
        """What a matcher calls after each sweep."""

        def progress(sweep: Sweep) -> None:
            update(sweep.number)
            if self.screen.debug:
                self.screen.note(f"sweep {sweep.number}: objective {sweep.objective:.8g}")

        return progress

    def report(self, result: MatchResult) -> dict[str, Any]:
        """The outcome of matching two checkpoints, as plain data."""
        return {
            "outcome": result.outcome,
            "objective_before": result.objective_before,
            "objective": result.objective,
            "sweeps": result.history[-1].number if result.history else 0,
            "seed": self.seed,
            "groups": len(self.spec.acting),
            "moved": sum(result.element.moved().values()),
            "of": sum(self.spec.multiplicity(name) * group.size for name, group in self.spec.acting.items()),
            "seconds": result.seconds,
            "history": [
                {
                    "sweep": sweep.number,
                    "objective": sweep.objective,
                    "moved": sum(sweep.moved.values()),
                    "seconds": sweep.seconds,
                }
                for sweep in result.history
            ],
        }
