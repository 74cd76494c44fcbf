"""A copy of a model in float64 with random weights, to be run under many permutations of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture.environment import make_transparent, reference_kernels
from permgraph.capture.module_copy import as_parameter_like, copy_module, copy_with
from permgraph.capture.outputs import returned_tensors, tensor_leaves
from permgraph.capture.python_state import python_state_restored
from permgraph.capture.state import StateTensor, state_tensors
from permgraph.capture.subject import unwrap
from permgraph.errors import CaptureError, MismatchError
from permgraph.spec.permutation import Permutation
from permgraph.spec.spec import PermutationSpec
from permgraph.verification.double_precision import InDoublePrecision, double_by_default, in_double

#: Weights that a permutation overwrites are kept up to this many bytes; others are drawn again.
KEEP_BYTES = 2**29


class Trial:
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
        self._copy = copy_module(subject.outer, subject.core, state, self._blank, in_double)
        make_transparent(self._copy.modules)
        self._floating = {e.names[0]: (e, t) for e, t in self._copy.tensors if _is_weight(e, t)}
        seeds = torch.randint(2**62, (len(self._floating),), generator=seeded_generator(seed)).tolist()
        self._seeds = dict(zip(self._floating, seeds, strict=True))
        originals = {id(t): made for e, made in self._copy.tensors for t in e.objects}
        self._mode = InDoublePrecision(originals)
        self._memory = {name: tensor.data for name, (_, tensor) in self._floating.items()}
        self._constants = [(t, t.detach().clone()) for e, t in self._copy.tensors if not _is_weight(e, t)]
        given = (args,) if isinstance(args, Tensor) else tuple(args or ())
        self._inputs = copy_with((given, dict(kwargs or {})), in_double, {})
        self._check_names()
        self._users = {group: {name for name, _ in spec.uses(group)} for group in spec.moving}
        self._scale = 1.0
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self.looks_inside = False

    def randomise(self, scale: float, inside: bool) -> list[Tensor] | None:
        """Make all weights random, and return the outputs on them; None if these hold NaN, or nothing finite.

        Infinities are left by masks, and must stay in place. From now on, outputs include what the modules return if
        `inside`.
        """
        self._scale, self.looks_inside = scale, inside
        self._restore(self._floating)
        reference = self.outputs(None)
        real = [t for t in reference if is_floating(t) and t.numel()]
        return None if any(bool(t.isnan().any() | t.isinf().all()) for t in real) else reference

    def rounding(self, reference: Sequence[Tensor]) -> float:
        """How far the outputs move when each weight moves by a few units in its last place."""
        nudge = torch.Generator().manual_seed(0)
        units = 4 * torch.finfo(torch.float64).eps
        try:
            for _, tensor in self._floating.values():
                tensor.detach().mul_(1 + units * _normal(tensor.shape, nudge))
            return distance(reference, self._run())
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

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are now, by their canonical names."""
        return {name: tensor.detach() for name, (_, tensor) in self._floating.items()}

    def outputs_with(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model returns with these weights in the place of its own."""
        try:
            for name, values in weights.items():
                self._write(name, values)
            return self._run()
        finally:
            self._restore(weights)

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
        with reference_kernels(torch.device("cpu")), double_by_default(), torch.no_grad():
            for tensor, original in self._constants:
                tensor.copy_(original)
            torch.manual_seed(0)
            args, kwargs = copy_with(self._inputs, Tensor.clone, {})
            try:
                with (
                    python_state_restored(self._copy.modules),
                    self._mode,
                    attributes_restored(self._copy.modules),
                    _observed(self._copy.modules if self.looks_inside else (), inside),
                ):
                    result = self._copy.module(*args, **kwargs)
            except Exception as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in tensor_leaves((args, kwargs))) or "none"
                raise CaptureError(
                    f"{type(self._copy.module).__name__} cannot be run on random weights in float64 with tensors of "
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
        if name not in self._kept and self._kept_bytes + tensor.nbytes <= KEEP_BYTES:
            self._kept[name] = tensor.detach().clone()
            self._kept_bytes += tensor.nbytes
        tensor.copy_(values)

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            entry, tensor = self._floating[name]
            kept = self._kept.pop(name, None)
            self._kept_bytes -= 0 if kept is None else kept.nbytes
            tensor.copy_(self._random(entry, tensor) if kept is None else kept)

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

    def _check_names(self) -> None:
        known = {name for entry, _ in self._floating.values() for name in entry.names}
        missing = sorted(set(self.spec.axes) - known)
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


@contextmanager
def attributes_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
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
