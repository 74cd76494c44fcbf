"""`agreed_spec`: one spec for several networks, each of which is a model of its own.

Networks of equal keys and shapes need not be of one structure: with 2 heads or 8, with 4 or 8 groups of a norm, their
tensors look the same. What renumbers the units of the one then changes what the other computes. So the symmetries of
each module are found, and must be the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import nn

from permgraph.capture import Captured, capture
from permgraph.capture.counting import AllBut, Outputs
from permgraph.capture.likeness import built_alike, operators_differ
from permgraph.errors import CaptureError, MismatchError
from permgraph.inference.auto_spec import auto_spec
from permgraph.inference.describe import ON_REAL_TENSORS
from permgraph.matching.rows import resized
from permgraph.spec.compare import first_difference
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import Network

log = logging.getLogger(__name__)

Symmetry: TypeAlias = Literal["permutation", "general"]


def agreed_spec(
    networks: Sequence[Network],
    names: Sequence[str],
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PermutationSpec, tuple[str, ...]]:
    """The spec of networks that are to be matched, once it is sure that it is that of each of them.

    Every module's own symmetries are inferred, on the inputs on which the first module runs, unless it is certain that
    it is built as the first is. Of a state dict nothing is known but its shapes.

    Args:
        networks: modules and state dicts.
        names: what to call them.
        spec: of all of them, as the caller says; inferred from the first module if None.
        example_inputs, example_kwargs: for the inference; found if neither is given.

    Returns:
        The spec, and what there is to know of networks that have the same symmetries and compute something else.

    Raises:
        MismatchError: two of them differ in their symmetries; the message names the first parameter and dimension on
            which they do, and both expressions. Or there is no spec, and no module to infer it from.
        CaptureError: no spec was given, and a module cannot be run.
    """
    if isinstance(spec, (str, os.PathLike)):
        raise MismatchError(f"spec is a path: read it first, as PermutationSpec.load({os.fspath(spec)!r})")
    if spec is not None and not isinstance(spec, PermutationSpec):
        raise MismatchError(f"spec must be a PermutationSpec, as auto_spec() returns it, not a {type(spec).__name__}")
    modules = [(name, net) for name, net in zip(names, networks, strict=True) if isinstance(net, nn.Module)]
    if not modules:
        if spec is None:
            raise MismatchError("state dicts do not say what their model computes: a spec must be given with them")
        return spec, ()
    symmetry: Symmetry = "permutation" if spec is None else spec.symmetry
    outputs = None if spec is None else outputs_of(spec)
    whole = spec is not None and bool(spec.stacks)
    first = Structure(*modules[0], example_inputs, example_kwargs, None, symmetry, outputs, modules=whole)
    found = first.spec if spec is None else spec
    notes: list[str] = []
    if spec is not None and not isinstance(networks[0], nn.Module):  # else the spec is taken to be that of the first
        notes += first.must_be(spec)
    for name, module in modules[1:]:
        notes += first.compare(name, module, given=spec is not None)
    for note in notes:
        log.info(note)
    return found, tuple(notes)


class Structure:
    """The structure of a module, found out when it is asked for, and that of others beside it.

    Args:
        name: what to call the module.
        module: which may be on the meta device.
        example_inputs, example_kwargs: for the inference; found if neither is given.
        spec: its symmetries, where they are known.
        symmetry: whether permutations count or all that a spec can say; see `auto_spec`.
        outputs: what of its result counts; see `auto_spec`.
        modules: whether groups of whole modules count; see `auto_spec`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        example_inputs: Sequence[Any] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        spec: PermutationSpec | None = None,
        symmetry: Symmetry = "permutation",
        outputs: Outputs = None,
        modules: bool = False,
    ) -> None:
        self.name, self.module, self.outputs = name, module, outputs
        self.asked: Mapping[str, Any] = {"symmetry": symmetry, "modules": modules}
        self.given = example_inputs, example_kwargs
        self._spec = spec
        self._captured: Captured | None = None

    @property
    def spec(self) -> PermutationSpec:
        """Its symmetries."""
        if self._spec is None:
            self._spec = auto_spec(self.module, *self.given, outputs=self.outputs, **self.asked)
        return self._spec

    @property
    def captured(self) -> Captured:
        """One pass of it."""
        if self._captured is None:
            self._captured = capture(self.module, *self.given)
        return self._captured

    def must_be(self, spec: PermutationSpec) -> tuple[str, ...]:
        """Refuse a given spec that is not its own."""
        try:
            names = ("the spec", self.name)
            difference = first_difference(spec, self.spec, names)
            if difference is not None and not spec.outputs:  # nothing says what counts: then it may be everything
                own = auto_spec(self.module, *self.given, outputs="all", **self.asked)
                difference = first_difference(spec, own, names) and difference
        except CaptureError as error:
            return (_not_compared(self.name, error),)
        if difference is not None:
            raise MismatchError(
                f"{self.name}, as it is built, has other symmetries than the spec that was given: {difference}. Where "
                "the spec is right all the same, pass the state dict in place of the module"
            )
        return ()

    def compare(self, name: str, module: nn.Module, *, given: bool) -> list[str]:
        """Refuse a module of other symmetries; notes on one that computes something else.

        If a spec was `given`, modules that cannot be run are noted, and not refused.
        """
        alike = built_alike(self.module, module)
        if alike and (given or not _rests_on_values(self.spec)):
            return []
        names = (self.name, name)
        try:
            ours, inputs = self.spec, self.captured.inputs
            theirs = _own(module, inputs.args, inputs.kwargs, {**self.asked, "outputs": self.outputs})
        except CaptureError as error:
            if not given:
                raise
            return [_not_compared(name, error)]
        # How many rows there are on which nothing acts, of tokens or classes, is no part of the structure.
        others = resized(theirs, ours.shapes)
        tied = dict(ours.aliases) != dict(theirs.aliases) and ours.general is None and theirs.general is None
        one, other = (_untied(ours), _untied(others)) if tied else (ours, others)
        difference = first_difference(one, other, names)
        if difference is not None and alike:
            raise MismatchError(
                f"{self.name} and {name} are built alike, but their forward passes branch on values, and on their "
                f"weights they took branches of other symmetries: {difference}. check_branches(model).spec holds for "
                "both branches: pass it as spec="
            )
        if difference is not None:
            classes = [type(net).__name__ for net in (self.module, module)]
            tied = " itself in " in difference
            advice = "permgraph.untied(model) makes a copy of the tied one that is not" if tied else "build both alike"
            raise MismatchError(
                f"{self.name} ({classes[0]}) and {name} ({classes[1]}) have tensors of the same shapes, but not the "
                f"same symmetries: {difference}. What renumbers one would change what the other computes: "
                f"{advice}"
            )
        if alike:
            return []
        if others is not theirs:  # whose operators name other sizes
            log.info("%s and %s have other numbers of rows: their operators are not compared", self.name, name)
            return []
        if tied:
            mine, its = (", ".join(map(repr, spec.aliases)) or "nothing" for spec in (ours, theirs))
            return [f"{self.name} ties {mine} and {name} {its} to other parameters: the same permutations act on both"]
        try:
            second = capture(module, inputs.args, inputs.kwargs)
        except CaptureError as error:
            return [_not_compared(name, error)]
        operators = operators_differ(self.captured, second, names)
        if operators is None:
            return []
        return [
            f"{self.name} and {name} have the same symmetries, but compute different functions of their weights: "
            f"{operators}. Each keeps its own function when it is renumbered; a mean of the two is a network of neither"
        ]


def outputs_of(spec: PermutationSpec) -> Outputs:
    """What counts as the result of a model of this spec, for the inference of another; the usual if it does not say."""
    return AllBut(spec.by_products) if spec.outputs else None


def _own(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: Mapping[str, Any]
) -> PermutationSpec:
    """The symmetries of a module on these inputs, or on some of its own where it does not take them."""
    try:
        return auto_spec(module, args, kwargs, **asked)
    except CaptureError as error:
        log.info("%s: %s; trying inputs of its own", type(module).__name__, error)
        return auto_spec(module, **asked)


def _rests_on_values(spec: PermutationSpec) -> bool:
    return any(note.startswith(ON_REAL_TENSORS) for note in spec.notes)


def _untied(spec: PermutationSpec) -> PermutationSpec:
    """The spec of permutations of the same model with a tensor of its own under each name."""
    axes = {**spec.axes, **{alias: spec.axes[name] for alias, name in spec.aliases.items()}}
    return replace(spec, axes=axes, aliases={}, shapes={})


def _not_compared(name: str, error: CaptureError) -> str:
    return (
        f"whether {name} has the symmetries of the spec that was given is not known, since it cannot be run here "
        f"({str(error).splitlines()[0][:200]}): verify(model, example_inputs, permutation=...) would tell"
    )
