"""A copy of a model in float64, with random weights or its own, to be run under many permutations of them."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from permgraph.capture.environment import WithoutDropout, make_transparent, reference_kernels, train
from permgraph.capture.module_copy import ModuleCopy, as_parameter_like, copy_inputs, copy_module, copy_with
from permgraph.capture.outputs import returned_tensors, tensor_leaves
from permgraph.capture.passes import Variation
from permgraph.capture.python_state import MAX_LENGTH, OF_MODULES, python_state_restored
from permgraph.capture.state import StateTensor, state_tensors
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError, MismatchError
from permgraph.spec.data import SpecData
from permgraph.spec.elements import AnyElement
from permgraph.spec.expressions import Axis
from permgraph.spec.stacks import places, stacked, together, unstacked
from permgraph.spec.transformation import Transformation
from permgraph.verification.compared import ComparedOutputs
from permgraph.verification.double_precision import InDoublePrecision, double_by_default, has_values, in_double

#: Weights that a permutation overwrites are kept up to this many bytes; others are drawn again.
KEEP_BYTES = 2**29


class Trial:
    """A private float64 copy of the model, to be run under many permutations of its weights.

    Args:
        model: the module; it is not changed.
        spec: what permutations move.
        variation: what the copy is run on, until `vary` says otherwise.
        seed: for the random weights.
        own_weights: compute with the model's own weights, not with random ones.
        whole: the spec that says how outputs move, if another than `spec`.

    Attributes:
        looks_inside: whether outputs include what the modules return.
        run_seconds: that the last run took.
        keeps_state: whether a run in evaluation mode has changed something on the model, so that a second call may do
            something else.
        compared: which outputs are compared, and how.
        rankings: of each operator that ranked values: how many it ranked, and in how many rows.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SpecData,
        variation: Variation,
        seed: int,
        *,
        own_weights: bool = False,
        whole: SpecData | None = None,
    ) -> None:
        subject = unwrap(model)
        self.spec = spec
        self.compared = ComparedOutputs(whole or spec)
        self._axes: list[tuple[Axis, ...] | None] = []  # of the outputs of the last run, those that move
        state = state_tensors(subject.outer)
        self._copy = copy_module(subject.outer, subject.core, state, self._blank, in_double)
        make_transparent(self._copy.modules)
        self._floating = {e.names[0]: (e, t) for e, t in self._copy.tensors if _is_weight(e, t)}
        self._own_weights = own_weights
        if own_weights:
            self._require_values()
        seeds = torch.randint(2**62, (len(self._floating),), generator=seeded_generator(seed)).tolist()
        self._seeds = dict(zip(self._floating, seeds, strict=True))
        originals = {id(t): made for e, made in self._copy.tensors for t in e.objects}
        self._mode = InDoublePrecision(originals)
        self._memory = {name: tensor.data for name, (_, tensor) in self._floating.items()}
        weights = {id(tensor) for _, tensor in self._floating.values()}
        others = {id(t): t for t in _held(self._copy)}
        self._constants = [(t, t.detach().clone()) for at, t in others.items() if at not in weights]
        self._check_names()
        self._users = {group: {name for name, _ in spec.uses(group)} for group in spec.moving}
        self._scale = 1.0
        self._drawn: float | None = None  # the scale of the weights as they stand
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self.looks_inside = False
        self.keeps_state = False
        self.run_seconds = 0.0
        self.vary(variation)

    @property
    def rankings(self) -> set[tuple[int, int]]:
        """Of each operator that ranked values in any run: how many it ranked, and in how many rows."""
        return self._mode.rankings

    def vary(self, variation: Variation) -> None:
        """From now on, run on these inputs, in this mode, and so many times one after the other."""
        self._variation = variation
        given = (variation.inputs.args, dict(variation.inputs.kwargs))
        self._inputs = copy_inputs(given, in_double, self._copy)

    def randomise(self, scale: float, inside: bool) -> list[Tensor] | None:
        """Make all weights random, or the model's own, and return the outputs; None if NaN, or nothing finite.

        Infinities are left by masks, and must stay in place. From now on, outputs include what the modules return if
        `inside`.
        """
        self._scale, self.looks_inside = scale, inside
        if self._drawn != scale:
            self._kept.clear()
            self._kept_bytes = 0
            self._restore(self._floating)
            self._drawn = scale
        reference = self.outputs(None)
        real = [t for t in reference if is_floating(t) and t.numel()]
        return None if any(bool(t.isnan().any() | t.isinf().all()) for t in real) else reference

    def rounding(self, reference: Sequence[Tensor]) -> float:
        """How far the outputs move when each weight moves by a few units in its last place."""
        nudge = torch.Generator().manual_seed(0)
        units = 4 * torch.finfo(torch.float64).eps
        try:
            for _, tensor in self._floating.values():
                if tensor.layout is torch.strided:
                    tensor.detach().mul_(1 + units * _normal(tensor.shape, nudge))
            return distance(reference, self._run())
        finally:
            self._restore(self._floating)

    def outputs(self, permutation: AnyElement | None, exclude: Sequence[tuple[str, int]] = ()) -> list[Tensor]:
        """What the model returns when its weights are permuted, or transformed: all its tensors, detached.

        By-products that move with the weights are moved back.
        """
        if isinstance(permutation, Transformation):
            weights = self.weights()
            found = self.outputs_with(
                {
                    name: permutation.apply_to(
                        name, weights[name], weights, exclude=[dim for other, dim in exclude if other == name]
                    )
                    for name in permutation.spec.axes
                    if name in weights
                }
            )
            return self.compared.moved_back(found, self._axes, permutation)
        counts = {} if permutation is None else permutation.moved()
        stacks = self.spec.stacks
        parts = {
            name: dict(places(stacks[name])) if name in stacks else {(): name}
            for name in {name for group, count in counts.items() if count for name in self._users[group]}
        }
        moved = {own for names in parts.values() for own in names.values()}
        try:
            for name, names in parts.items():
                assert permutation is not None
                still = [dim for parameter, dim in exclude if parameter == name]
                values = {own: self._floating[own][1] for own in names.values()}
                given = together(name, stacks[name], values) if name in stacks else values[name]
                made = permutation.apply_to(name, given, exclude=still)
                for place, own in names.items():
                    self._write(own, made[place])
            found = self._run()
            return found if permutation is None else self.compared.moved_back(found, self._axes, permutation)
        finally:
            self._restore(moved)

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are now, by their canonical names, those of modules that change places stacked."""
        weights = {name: tensor.detach() for name, (_, tensor) in self._floating.items()}
        return dict(stacked(self.spec.stacks, weights))

    def outputs_with(self, weights: Mapping[str, Tensor], *, under: AnyElement | None = None) -> list[Tensor]:
        """What the model returns with these weights in the place of its own; by-products moved back from `under`."""
        weights = unstacked(self.spec.stacks, weights)
        try:
            for name, values in weights.items():
                self._write(name, values)
            found = self._run()
            return found if under is None else self.compared.moved_back(found, self._axes, under)
        finally:
            self._restore(weights)

    def outputs_scaled(self, permutation: AnyElement, name: str) -> list[Tensor]:
        """What the model returns when those elements of one weight that the permutation moves are scaled at random."""
        weights = self.weights()
        weight = weights[name]
        if isinstance(permutation, Transformation):
            moved = permutation.apply_to(name, weight, weights) != weight
        else:
            places = torch.arange(weight.numel()).reshape(weight.shape)
            moved = permutation.apply_to(name, places) != places
        factors = 0.5 + torch.rand(weight.shape, generator=seeded_generator(0), dtype=torch.float64)
        return self.outputs_with({name: torch.where(moved, weight * factors, weight)})

    def draws(self, reference: Sequence[Tensor]) -> bool:
        """Whether the outputs depend on numbers that the model draws at random."""
        return distance(reference, self._run(seed=1)) > 0

    def _run(self, seed: int = 0) -> list[Tensor]:
        """All tensors that the copy returns as it stands; if it looks inside, what its modules return besides."""
        inside: list[Tensor] = []
        versions = {name: tensor._version for name, (_, tensor) in self._floating.items()}
        training = self._variation.training
        began = time.monotonic()
        with reference_kernels(torch.device("cpu")), double_by_default(), torch.no_grad():
            for tensor, original in self._constants:
                tensor.copy_(original)
            constants = [tensor._version for tensor, _ in self._constants]
            _seed_everything(seed)
            args, kwargs = copy_with(self._inputs, Tensor.clone, {})
            try:
                with (
                    python_state_restored(self._copy.modules, self._copy.memo),
                    self._mode,
                    self._copy.state_restored(),
                    WithoutDropout() if training else contextlib.nullcontext(),
                    _observed(self._copy.modules if self.looks_inside else (), inside),
                ):
                    if training:
                        train(self._copy.modules)
                    if self._copy.loading is not None:
                        self._copy.loading.run()
                    before = _attributes(self._copy.modules)
                    results = [self._copy.module(*args, **kwargs) for _ in range(self._variation.calls)]
                    self.keeps_state |= not training and _changed(self._copy.modules, before)
            except Exception as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in tensor_leaves((args, kwargs))) or "none"
                raise CaptureError(
                    f"{type(self._copy.module).__name__} cannot be run in float64 with tensors of "
                    f"shape {shapes}: {error}; pass example_inputs or example_kwargs that its forward takes"
                ) from error
            returned_tensors(results)  # which refuses what can be read only once
            compared = self.compared.among(results)
            outputs = [tensor.detach().clone() for tensor, _ in compared]
        self.run_seconds = time.monotonic() - began
        if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in outputs):
            raise CaptureError(
                f"{type(self._copy.module).__name__} returns a tensor without values, which a pass without data has "
                "left where its forward finds it: make the model anew, or clear what it keeps between calls"
            )
        self.keeps_state |= not training and constants != [tensor._version for tensor, _ in self._constants]
        # A model that writes to its own weights, or gives them other memory, finds them as they were the next time.
        for name, (_, tensor) in self._floating.items():
            if tensor.layout is torch.strided and tensor.data_ptr() != self._memory[name].data_ptr():
                tensor.data = self._memory[name]
        written = [name for name, (_, t) in self._floating.items() if t._version != versions[name]]
        self.keeps_state |= bool(written) and not training
        self._restore(written)
        if self.spec.stacks:  # modules that change places return what others did
            inside = sorted(inside, key=float)
        self._axes = [*(axes for _, axes in compared), *[None] * len(inside)]
        return [*outputs, *inside]

    @torch.no_grad()
    def _write(self, name: str, values: Tensor) -> None:
        """Overwrite a weight of the copy; what stood there is kept if there is room."""
        tensor = self._floating[name][1]
        if name not in self._kept and self._kept_bytes + tensor.nbytes <= KEEP_BYTES:
            self._kept[name] = tensor.detach().clone()
            self._kept_bytes += tensor.nbytes
        tensor.copy_(values)

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            entry, tensor = self._floating[name]
            if tensor.layout is not torch.strided:  # a sparse matrix keeps its values
                continue
            kept = self._kept.pop(name, None)
            self._kept_bytes -= 0 if kept is None else kept.nbytes
            if kept is None:
                kept = in_double(entry.objects[0]) if self._own_weights else self._random(entry, tensor)
            tensor.copy_(kept)

    def _blank(self, entry: StateTensor) -> Tensor:
        return as_parameter_like(entry.objects[0], in_double(entry.objects[0]))

    def _random(self, entry: StateTensor, made: Tensor) -> Tensor:
        """Random values of a size that keeps signals alive: by fan-in for weights, around one for scales."""
        shape, name = made.shape, entry.names[0]
        generator = seeded_generator(self._seeds[name])
        if entry.kind == "buffer" and name.endswith("mean"):  # far from zero it would silence half of ReLUs
            return _normal(shape, generator).mul_(0.3 * self._scale)
        if entry.kind == "buffer" or (made.ndim <= 1 and not name.endswith("bias")):
            return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        if made.ndim <= 1:
            return _normal(shape, generator).mul_(0.3 * self._scale)
        fan_in = max(1, made.numel() // max(1, shape[0]))
        return _normal(shape, generator).mul_(self._scale * 1.5 / math.sqrt(fan_in))

    def _require_values(self) -> None:
        for name, (entry, _) in self._floating.items():
            if not has_values(entry.objects[0]):
                raise MismatchError(
                    f"{name!r} has no values here, being on the meta device, offloaded or in parts: what a permutation "
                    "does to a model's own weights shows where these are whole"
                )

    def _check_names(self) -> None:
        known = {name for entry, _ in self._floating.values() for name in entry.names}
        missing = sorted(set(self.spec.tensors) - known)
        if missing:
            raise MismatchError(f"the spec has {missing[0]!r}, which {type(self._copy.module).__name__} has not")
        self.spec.check({name: made for entry, made in self._floating.values() for name in entry.names})


def seeded_generator(seed: int) -> torch.Generator:
    """A generator of random numbers that the seed determines."""
    return torch.Generator().manual_seed(seed)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal random numbers in float64, drawn in single precision, which takes a fraction of the time."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(torch.float64)


def is_floating(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, not integers or truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_weight(entry: StateTensor, tensor: Tensor) -> bool:
    return entry.kind in ("parameter", "buffer") and is_floating(tensor)


def _seed_everything(seed: int) -> None:
    """Let whatever draws random numbers draw the same; the generators are restored by whoever called."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed)


def _held(copied: ModuleCopy) -> Iterator[Tensor]:
    """The tensors of a copy's state, and those that its modules hold as plain attributes or in containers."""
    yield from (tensor for _, tensor in copied.tensors)
    for module in copied.modules:
        for name, value in vars(module).items():
            inside = isinstance(value, _CONTAINERS) and name not in OF_MODULES and len(value) <= MAX_LENGTH
            for item in (value.values() if isinstance(value, dict) else value) if inside else (value,):
                if isinstance(item, Tensor) and item.layout == torch.strided and not item.is_quantized:
                    yield item


_CONTAINERS = (dict, list, set, tuple)
Attributes = list[dict[str, Any]]


def _attributes(modules: Sequence[nn.Module]) -> Attributes:
    """What modules hold, for the comparison with what they hold later."""
    containers = (dict, list, set)
    return [{k: copy.copy(v) if isinstance(v, containers) else v for k, v in vars(m).items()} for m in modules]


def _changed(modules: Sequence[nn.Module], before: Attributes) -> bool:
    """Whether modules hold anything else than before."""

    def same(now: Any, then: Any) -> bool:
        if now is then:
            return True
        if type(now) is not type(then):
            return False
        if not isinstance(now, _CONTAINERS):
            return isinstance(now, (int, float, str)) and bool(now == then)
        items, others = (list(v.items()) if isinstance(v, dict) else [*enumerate(v)] for v in (now, then))
        return len(items) == len(others) and all(
            a[0] == b[0] and a[1] is b[1] for a, b in zip(items, others, strict=True)
        )

    return any(
        vars(module).keys() != held.keys() or not all(same(vars(module)[name], value) for name, value in held.items())
        for module, held in zip(modules, before, strict=True)
    )


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


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to that output's largest magnitude; NaN counts as infinite."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel() == 0:
            continue
        if not is_floating(x):
            worst = max(worst, float((x != y).any()))
            continue
        # infinities that stay in place (masks) are equal
        same = x == y
        difference = torch.where(same, torch.zeros_like(x), x - y).abs().max().item()
        finite = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        magnitude = max(finite.abs().max().item(), 1e-300)
        worst = max(worst, math.inf if math.isnan(difference) else difference / magnitude)
    return worst
