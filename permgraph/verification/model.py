"""`verify`: the proof that a spec preserves a model's function, built so that it can fail.

Every parameter and buffer is made random first, because a zero head, or a BatchNorm at its initial ones, makes any
permutation look harmless. The model then runs in float64 before and after a random element of the group with every
group moved; the outputs must agree. As a control, each group is moved on all of its axes but one: now the output must
*change*, or the test above would have shown nothing about that group. A group that stands in one axis alone cannot be
torn apart so; there the weights that it moves are scaled at random instead, to see that they matter.

A detector that finds nothing returns empty tensors, and a decoder token ids; little can be seen on those. Weights of
another scale are tried then, and if no scale helps, what the modules inside return is compared as well. A symmetry only
reorders it, so its mean magnitude and its mean square must stay; a torn one changes them.

One copy of the model is held, in float64. Weights are a function of the seed, so that what a permutation overwrote need
not be kept: it is drawn again.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from permgraph.capture import capture
from permgraph.capture.caches import caches_emptied
from permgraph.capture.control import is_higher_order, run_plainly
from permgraph.capture.environment import calm, make_transparent
from permgraph.capture.module_copy import as_parameter_like, copy_with, make_twin
from permgraph.capture.outputs import returned_tensors, tensor_leaves
from permgraph.capture.state import StateTensor, state_tensors
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError, EvaluationError, MismatchError
from permgraph.inference.auto_spec import auto_spec
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec

log = logging.getLogger(__name__)

SCALES = (1.0, 0.7, 0.5, 0.3, 0.05)
#: Weights that a permutation overwrites are kept up to this many bytes; others are drawn again.
KEEP_BYTES = 2**29
LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Control:
    """What happened when a group was moved on all of its axes but this one: the relative change of the output.

    Of a group with this one axis: what happened when the weights that it moves were scaled at random.
    """

    group: str
    parameter: str
    dim: int
    change: float
    passed: bool


@dataclass(frozen=True)
class GroupReport:
    """One group: the relative error when it is moved, and the controls that were tried on it.

    `error` is that of the common move of all groups, unless that failed: then it is this group's own.
    """

    name: str
    size: int
    error: float
    controls: tuple[Control, ...]
    passed: bool

    @property
    def inert(self) -> tuple[tuple[str, int], ...]:
        """Axes on which leaving the group unmoved changed nothing: they have no influence on the output."""
        return tuple((c.parameter, c.dim) for c in self.controls if not c.passed)

    @property
    def inert_throughout(self) -> bool:
        """Whether controls were tried, and none of them changed anything."""
        return bool(self.controls) and not any(c.passed for c in self.controls)


@dataclass(frozen=True)
class Verification:
    """Whether a spec preserves the model's function, and whether the test could have told.

    `max_error` is relative to the largest magnitude in the outputs; `tolerance` is what it may be. `untried` names the
    groups for which there was no time left to try a control: they were moved with the others, and that is all.
    """

    passed: bool
    max_error: float
    tolerance: float
    groups: Mapping[str, GroupReport] = field(repr=False)
    outputs: int = 0
    note: str = ""
    untried: tuple[str, ...] = ()

    @property
    def controls(self) -> tuple[Control, ...]:
        """All controls of all groups."""
        return tuple(control for group in self.groups.values() for control in group.controls)

    @property
    def failed(self) -> tuple[str, ...]:
        """The groups which do not preserve the function, or on which no control changed anything."""
        return tuple(name for name, group in self.groups.items() if not group.passed)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"verification {verdict}: {len(self.groups)} groups moved, relative error {self.max_error:.1e} "
            f"(at most {self.tolerance:.0e}), {len(self.controls)} controls"
        ]
        if self.note:
            lines.append(self.note)
        if self.untried:
            lines.append(f"no time for controls on {len(self.untried)} groups: {', '.join(self.untried[:6])}")
        for name in self.failed:
            group = self.groups[name]
            why = (
                f"error {group.error:.1e}"
                if group.error > self.tolerance or math.isnan(group.error)
                else f"no control changed the output ({', '.join(f'{p}[{d}]' for p, d in group.inert)})"
            )
            lines.append(f"  {name} ({group.size}): {why}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tolerance: float = 1e-9,
    controls: Literal["one", "all", "none"] = "one",
    max_seconds: float | None = None,
) -> Verification:
    """Check on random weights, in float64, that a spec's group preserves what a model computes.

    Args:
        model: the module; it is not changed, and may be on the meta device.
        spec: the spec to check; inferred if None.
        example_inputs: positional arguments of forward; found if neither these nor keyword arguments are given.
        example_kwargs: keyword arguments of forward.
        seed: for the weights and the permutations.
        tolerance: the largest relative error at which outputs count as equal.
        controls: for each group, try axes until leaving one unmoved changes the output (``"one"``), try every axis
            (``"all"``), or none. A group on which no control changes anything fails.
        max_seconds: begin with the controls of no further group after this many seconds, for models of which one
            forward pass takes minutes. The groups left out are drawn by the seed, and named in ``.untried``.

    Raises:
        CaptureError: the model cannot be run, or its output is not finite whatever the weights' scale.
        MismatchError: the spec is not of this model.
        EvaluationError: `controls` is none of the three.
    """
    if controls not in ("one", "all", "none"):
        raise EvaluationError(f"controls is {controls!r}; it may be 'one', 'all' or 'none'")
    if spec is None:
        spec = auto_spec(model, example_inputs, example_kwargs)
    if not spec.moving:
        return Verification(True, 0.0, tolerance, {}, note="nothing to permute: the spec has no groups")
    started = time.monotonic()
    if example_inputs is None and example_kwargs is None:
        found = capture(model).inputs
        example_inputs, example_kwargs = found.args, found.kwargs
    trial = _Trial(model, spec, example_inputs, example_kwargs, seed)
    everything = spec.random(seed, every_group=True)
    order = [list(spec.moving)[i] for i in torch.randperm(len(spec.moving), generator=_generator(seed)).tolist()]
    max_error, outputs = 0.0, 0
    reports: dict[str, GroupReport] = {}
    untried: set[str] = set()
    says_little = False
    for inside, scale in itertools.product((False, True), SCALES):
        # A group that seems to have no influence is tried again on smaller weights: a softmax or a sigmoid that large
        # ones drive to its limit hides what is before it.
        waiting = [name for name in order if name not in reports or reports[name].inert_throughout]
        if not waiting or (inside and not says_little):
            break
        reference = trial.randomise(scale, inside)
        if reference is None:
            continue  # the model blows up
        if not inside and (any(t.numel() == 0 for t in reference) or not any(map(_is_real, reference))):
            says_little = True  # a detector that finds nothing on these weights, or class numbers
            continue
        last = scale == SCALES[-1] and (inside or not says_little)
        if (reports or not last) and trial.rounding(reference) > tolerance / 100:
            continue  # it is chaotic on these weights: its rounding would pass for an error
        outputs = len(reference)
        max_error = max(max_error, _distance(reference, trial.outputs(everything)))
        ok = max_error <= tolerance
        threshold = max(1e-10, 100 * max_error) if ok else tolerance
        for name in waiting:
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            alone = everything.restricted_to([name])
            error = max_error if ok else _distance(reference, trial.outputs(alone))
            tried = []
            if late and controls != "none":
                untried.add(name)
            elif controls != "none":
                tried = list(_controls(trial, reference, alone, name, threshold, controls))
            passed = error <= tolerance and (controls == "none" or late or any(control.passed for control in tried))
            reports[name] = GroupReport(name, spec.groups[name].size, error, tuple(tried), passed)
        if not ok:
            break
    if not reports:
        raise CaptureError(f"{type(unwrap(model).core).__name__} gives NaN, or nothing finite, on random weights")
    reports = {name: reports[name] for name in spec.moving}
    passed = max_error <= tolerance and all(report.passed for report in reports.values())
    note = "outputs are empty or integers, so what the modules return was compared too" if trial.looks_inside else ""
    left_out = tuple(name for name in spec.moving if name in untried)
    return Verification(passed, max_error, tolerance, reports, outputs, note, left_out)


def _controls(
    trial: _Trial,
    reference: Sequence[Tensor],
    alone: Permutation,
    name: str,
    threshold: float,
    how: Literal["one", "all", "none"],
) -> Iterator[Control]:
    uses = trial.spec.uses(name)
    for parameter, dim in uses:
        if len(uses) > 1:
            torn = trial.outputs(alone, exclude=[(parameter, dim)])
        else:
            torn = trial.outputs_scaled(alone, parameter)
        change = _distance(reference, torn)
        passed = not change <= threshold  # an output that is no longer finite has changed as well
        yield Control(name, parameter, dim, change, passed)
        if passed and how == "one":
            return


class _Trial:
    """A private float64 copy of the model with random weights, to be run under many permutations of them."""

    def __init__(
        self,
        model: nn.Module,
        spec: PermutationSpec,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        seed: int,
    ) -> None:
        subject = unwrap(model)
        self.spec = spec
        state = state_tensors(subject.outer)
        self._twin = make_twin(subject.outer, subject.core, state, self._blank, _in_double)
        make_transparent(self._twin.modules)
        self._floating = {e.names[0]: (e, t) for e, t in self._twin.tensors if _is_weight(e, t)}
        seeds = torch.randint(2**62, (len(self._floating),), generator=_generator(seed)).tolist()
        self._seeds = dict(zip(self._floating, seeds, strict=True))
        originals = {id(t): made for e, made in self._twin.tensors for t in e.objects}
        self._mode = InDoublePrecision(originals)
        self._memory = {name: tensor.data for name, (_, tensor) in self._floating.items()}
        self._constants = [(t, t.detach().clone()) for e, t in self._twin.tensors if not _is_weight(e, t)]
        given = (args,) if isinstance(args, Tensor) else tuple(args or ())
        self._inputs = copy_with((given, dict(kwargs or {})), _in_double, {})
        self._check_names()
        self._users = {group: {name for name, _ in spec.uses(group)} for group in spec.moving}
        self._scale = 1.0
        self._kept: dict[str, Tensor] = {}
        self.looks_inside = False

    def randomise(self, scale: float, inside: bool) -> list[Tensor] | None:
        """Make all weights random, and return the outputs on them; None if these hold NaN, or nothing finite.

        Infinities are left by masks, and must stay in place. From now on, outputs include what the modules return if
        `inside`.
        """
        self._scale, self.looks_inside = scale, inside
        self._restore(self._floating)
        reference = self.outputs(None)
        real = [t for t in reference if _is_real(t) and t.numel()]
        return None if any(bool(t.isnan().any() | t.isinf().all()) for t in real) else reference

    def rounding(self, reference: Sequence[Tensor]) -> float:
        """How far the outputs move when each weight moves by a few units in its last place."""
        nudge = torch.Generator().manual_seed(0)
        units = 4 * torch.finfo(torch.float64).eps
        try:
            for _, tensor in self._floating.values():
                tensor.detach().mul_(1 + units * _normal(tensor.shape, nudge))
            return _distance(reference, self._run())
        finally:
            self._restore(self._floating)

    def outputs(self, permutation: Permutation | None, exclude: Sequence[tuple[str, int]] = ()) -> list[Tensor]:
        """What the model returns when its weights are permuted: all its tensors, detached."""
        counts = {} if permutation is None else permutation.moved()
        moved = {name for group, count in counts.items() if count for name in self._users[group]}
        try:
            for name in moved:
                assert permutation is not None
                still = [dim for parameter, dim in exclude if parameter == name]
                self._write(name, permutation.apply_to(name, self._floating[name][1], exclude=still))
            return self._run()
        finally:
            self._restore(moved)

    def outputs_scaled(self, permutation: Permutation, name: str) -> list[Tensor]:
        """What the model returns when those elements of one weight that the permutation moves are scaled at random."""
        weight = self._floating[name][1]
        places = torch.arange(weight.numel()).reshape(weight.shape)
        moved = permutation.apply_to(name, places) != places
        factors = 0.5 + torch.rand(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            self._write(name, torch.where(moved, weight * factors, weight))
            return self._run()
        finally:
            self._restore([name])

    def _run(self) -> list[Tensor]:
        """All tensors that the copy returns as it stands; if it looks inside, what its modules return besides."""
        inside: list[Tensor] = []
        versions = {name: tensor._version for name, (_, tensor) in self._floating.items()}
        with calm(torch.device("cpu")), _double_by_default(), torch.no_grad():
            for tensor, original in self._constants:
                tensor.copy_(original)
            torch.manual_seed(0)
            args, kwargs = copy_with(self._inputs, Tensor.clone, {})
            try:
                with (
                    caches_emptied(self._twin.modules),
                    self._mode,
                    left_as_found(self._twin.modules),
                    _observed(self._twin.modules if self.looks_inside else (), inside),
                ):
                    result = self._twin.module(*args, **kwargs)
            except Exception as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in tensor_leaves((args, kwargs))) or "none"
                raise CaptureError(
                    f"{type(self._twin.module).__name__} cannot be run on random weights in float64 with tensors of "
                    f"shape {shapes}: {error}; pass example_inputs or example_kwargs that its forward takes"
                ) from error
        outputs = [tensor.detach().clone() for tensor in returned_tensors(result)[0]]
        # A model that writes to its own weights, or gives them other memory, finds them as they were the next time.
        for name, (_, tensor) in self._floating.items():
            if tensor.data_ptr() != self._memory[name].data_ptr():
                tensor.data = self._memory[name]
        self._restore([name for name, (_, t) in self._floating.items() if t._version != versions[name]])
        return [*outputs, *inside]

    @torch.no_grad()
    def _write(self, name: str, values: Tensor) -> None:
        """Overwrite a weight of the copy; what stood there is kept if there is room."""
        tensor = self._floating[name][1]
        held = sum(kept.numel() * kept.element_size() for kept in self._kept.values())
        if held + tensor.numel() * tensor.element_size() <= KEEP_BYTES:
            self._kept[name] = tensor.detach().clone()
        tensor.copy_(values)

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            entry, tensor = self._floating[name]
            tensor.copy_(self._kept.pop(name) if name in self._kept else self._random(entry, tensor))

    def _blank(self, entry: StateTensor) -> Tensor:
        return as_parameter_like(entry.objects[0], _in_double(entry.objects[0]))

    def _random(self, entry: StateTensor, made: Tensor) -> Tensor:
        """Random values of a size that keeps signals alive: by fan-in for weights, around one for scales."""
        shape, name = made.shape, entry.names[0]
        generator = _generator(self._seeds[name])
        if entry.kind == "buffer" and name.endswith("mean"):  # far from zero it would silence half of ReLUs
            return _normal(shape, generator).mul_(0.3 * self._scale)
        if entry.kind == "buffer" or (made.ndim <= 1 and not name.endswith("bias")):
            return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        if made.ndim <= 1:
            return _normal(shape, generator).mul_(0.3 * self._scale)
        fan_in = max(1, made.numel() // max(1, shape[0]))
        return _normal(shape, generator).mul_(self._scale * 1.5 / math.sqrt(fan_in))

    def _check_names(self) -> None:
        known = {name for entry, _ in self._floating.values() for name in entry.names}
        missing = sorted(set(self.spec.axes) - known)
        if missing:
            raise MismatchError(f"the spec has {missing[0]!r}, which {type(self._twin.module).__name__} has not")
        self.spec.check({name: made for entry, made in self._floating.values() for name in entry.names})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal random numbers in float64, drawn in single precision, which takes a fraction of the time."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(torch.float64)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_weight(entry: StateTensor, tensor: Tensor) -> bool:
    return entry.kind in ("parameter", "buffer") and _is_real(tensor)


def _in_double(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float64 (integers as they are); zeros in place of a tensor without data."""
    dtype = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else tensor.dtype
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):  # the latter may hold only a part of it
        return torch.zeros(tensor.shape, dtype=dtype)
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True)


SINGLE_ONLY = (
    torch.ops.aten.fake_quantize_per_channel_affine_cachemask,
    torch.ops.aten._fused_moving_avg_obs_fq_helper,
)
"""Operators that know no float64. Both round to few values, which are the same for float32."""


class InDoublePrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reads every request for a lower precision as one for float64, so that what remains is rounding of that kind.

    `originals` gives the stand-in for each tensor of the caller's model: a function that closes over the model meets
    the latter. Operators that take functions are run step by step.
    """

    supports_higher_order_operators = True

    def __init__(self, originals: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._originals = originals

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW_PRECISION:
            kwargs["dtype"] = torch.float64
        if is_higher_order(func):
            with self:
                return run_plainly(func, args, kwargs)
        args = tuple(self._stand_in(a) for a in args)
        kwargs = {k: self._stand_in(v) for k, v in kwargs.items()}
        if func.overloadpacket in SINGLE_ONLY:
            args, kwargs = _floating_to(torch.float32, (args, kwargs))
            return _floating_to(torch.float64, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._originals.get(id(value), value)
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return [self._stand_in(item) for item in value]
        return value


def _floating_to(dtype: torch.dtype, values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)


@contextmanager
def left_as_found(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Undo what a forward pass keeps on its modules, such as a table computed from weights that are about to change."""
    containers = (dict, list, set)
    before = [{k: copy.copy(v) if isinstance(v, containers) else v for k, v in vars(m).items()} for m in modules]
    try:
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _observed(modules: Sequence[nn.Module], seen: list[Tensor]) -> Iterator[None]:
    """Note of every tensor that a module returns what no reordering changes: its mean magnitude and mean square."""

    def note(module: nn.Module, given: Any, result: Any) -> None:
        for tensor in tensor_leaves(result):
            if tensor.is_floating_point() and tensor.numel():
                finite = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor)).detach()
                seen.extend((finite.abs().mean(), finite.square().mean()))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def in_double_precision() -> Iterator[None]:
    """Run a model whose weights are float64 in that precision throughout, also where it asks for less."""
    with calm(torch.device("cpu")), _double_by_default(), torch.no_grad(), InDoublePrecision({}):
        yield


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to that output's largest magnitude; NaN counts as infinite."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel() == 0:
            continue
        if not _is_real(x):
            worst = max(worst, float((x != y).any()))
            continue
        # infinities that stay in place (masks) are equal
        same = x == y
        difference = torch.where(same, torch.zeros_like(x), x - y).abs().max().item()
        finite = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        magnitude = max(finite.abs().max().item(), 1e-300)
        worst = max(worst, math.inf if math.isnan(difference) else difference / magnitude)
    return worst
