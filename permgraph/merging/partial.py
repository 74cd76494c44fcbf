"""`partial_merge`: two networks in one of up to twice the width, where only units that correspond are merged.

Networks of different tasks have units that the other lacks. To average these with whatever was left over harms both:
so of each group only the pairs that are most alike are merged, and the others of both networks are kept side by side.
Stoica et al. (2024), "ZipIt! Merging Models from Different Tasks without Training", sections 4.2 and 4.3; Nasery et al.
(2025), "PLeaS: Merging Models with Permutations and Least Squares", section 4.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from permgraph.capture import Captured, ExampleInputs, capture
from permgraph.capture.outputs import tensor_leaves
from permgraph.conventions.displayed import Displayed
from permgraph.conventions.waiting import waits
from permgraph.errors import MismatchError
from permgraph.matching.alignment import Alignment, align
from permgraph.matching.matcher import Progress, SupportsMatch
from permgraph.merging.correlation import channel_correlations
from permgraph.merging.least_squares import fit_layers
from permgraph.merging.places import Places, combined, indices_of, may_widen, places_of, widened
from permgraph.merging.roles import dimensions_read
from permgraph.networks.batches import Loader, evaluating, undisturbed
from permgraph.networks.widened import module_of_widths
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.combine import shares_of
from permgraph.weights.identity import SameTensor
from permgraph.weights.state_dict import Weights, as_state_dict, is_continuous

log = logging.getLogger(__name__)

Widths = float | Mapping[str, float]

#: How far a network that is merged with itself may be from itself, relative to its outputs, to count as the same.
SAME = 1e-3


@dataclass(frozen=True, repr=False)
class PartialMerge(Displayed):
    """Two networks in one that is wider.

    Attributes:
        state_dict: of the wider network, in the first network's dtypes, on its devices.
        spec: its symmetries.
        merged: for each group that became wider a mask (size in A,): which of A's units are merged with their partners.
        alignment: how B was brought to A.
        notes: what to know of the result.
    """

    state_dict: dict[str, Tensor]
    spec: PermutationSpec
    merged: Mapping[str, Tensor]
    alignment: Alignment = field(repr=False)
    notes: tuple[str, ...] = ()
    _module: nn.Module | None = None
    _places: Mapping[str, tuple[Places, ...]] = field(default_factory=dict)
    _parents: tuple[nn.Module, nn.Module] | None = None
    _shares: tuple[float, float] = (0.5, 0.5)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """For each group that became wider its size in A and here."""
        return _sizes_of(self.merged)

    def model(self) -> nn.Module:
        """A module with these weights, of A's class, in A's mode.

        Raises:
            MismatchError: the module cannot be copied.
        """
        assert self._module is not None
        return module_of_widths(self._module, self.state_dict, dict(self.sizes.values()))

    def least_squares(self, loader: Loader, **options: Any) -> nn.Module:
        """The module with layers fitted to what both networks compute on some data, see `permgraph.least_squares`.

        Args:
            loader: batches of both networks' tasks; targets are ignored.
            options: those of `permgraph.least_squares`.
        """
        assert self._parents is not None
        return fit_layers(self.model(), loader, self._parents, self._places, self._shares, **options)


@waits("merging")
def partial_merge(
    model_a: nn.Module,
    model_b: nn.Module,
    matcher: SupportsMatch | None = None,
    *,
    width: Widths = 1.5,
    loader: Loader | None = None,
    spec: PermutationSpec | None = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PartialMerge:
    """Merge two networks into one of 1 to 2 times the width, keeping apart the units that do not correspond.

    B is aligned to A. Then the pairs of each group that are most alike are merged, as many as the width leaves, and the
    others are kept. A merged unit is the mean of both; a unit of one network alone reads what it read there, merged
    units in the place of its own. At width 1 the result is the average of A and the aligned B. At width 2, where all
    groups can be wider, what the last layer gives is the mean of what both networks' last layers give.

    Groups over which a norm, a mean or another function of all of them runs would not compute what they did beside the
    other network's: such groups, and those whose size the model's code knows by number, are found by merging A with
    itself, and keep A's width; a note names them. Neither model is modified.

    Args:
        model_a, model_b: two modules of one class and the same shapes.
        matcher: how to choose partners, `WeightMatching()` by default.
        width: how many times A's width, from 1 to 2; or by patterns of the names of groups, of which the first that
            fits counts, as in ``{"layer4*": 2, "*": 1.25}``. Groups that no pattern fits keep their width.
        loader: batches on which to compare the partners' activations; by default their weights are compared.
        spec: the symmetries, inferred from A if not given; B is aligned over all of a general one, whose permutations
            say what can be wider.
        example_inputs, example_kwargs: arguments of forward to infer the symmetries on; found if neither is given.
        weights: how much A and B count in a mean; alike by default.
        seed, progress: as in `align`.

    Raises:
        MismatchError: the models differ, a width is not between 1 and 2, or a pattern fits no group.
        CaptureError: A cannot be run.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in "ab")
        >>> whole = partial_merge(a, b, width=2).model()
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(whole(x), (a(x) + b(x)) / 2, atol=1e-6)), whole[0].out_features
        (True, 16)
    """
    for name, model in (("A", model_a), ("B", model_b)):
        if not isinstance(model, nn.Module):
            raise MismatchError(f"partial_merge() runs {name}, and so takes a module, not a {type(model).__name__}")
    shares = shares_of(weights, 2)
    fit = align(
        model_a, model_b, matcher, spec=spec, example_inputs=example_inputs, example_kwargs=example_kwargs,
        seed=seed, progress=progress,
    )  # fmt: skip
    assert isinstance(fit.permutation.spec, PermutationSpec)
    found = fit.permutation.spec.modules_in_place()  # units are kept apart, and not whole modules
    captured = capture(model_a, example_inputs, example_kwargs)
    a, b = as_state_dict(model_a), as_state_dict(fit.state_dict)
    aligned = fit.model()
    wanted = _sizes(found, width)
    alike = _likeness(found, a, b, list(wanted), None if loader is None else (model_a, aligned, loader))
    merged = {name: _most_alike(alike[name], 2 * found.groups[name].size - size) for name, size in wanted.items()}
    read = dimensions_read(captured)
    merged, notes = _that_hold(model_a, captured, found, merged, read)
    state, places = _zipped(found, a, b, merged, read, (shares[0], shares[1]))
    groups = {name: Places.of_group(mask) for name, mask in merged.items()}
    return PartialMerge(
        Weights(state), widened(found, groups), merged, fit, (*fit.notes, *notes), model_a, places, (model_a, aligned),
        (shares[0], shares[1]),
    )  # fmt: skip


def _sizes(spec: PermutationSpec, width: Widths) -> dict[str, int]:
    """The size that each group is to have, of those that can have another one and are to."""
    patterns = width if isinstance(width, Mapping) else {"*": width}
    for pattern, factor in patterns.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor <= 2:
            raise MismatchError(f"a width is a number from 1 to 2, not {factor!r}")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in spec.groups):
            raise MismatchError(f"no group is named like {pattern!r}; there are {', '.join(spec.groups) or 'none'}")
    found: dict[str, int] = {}
    for name in may_widen(spec):
        factor = next((f for pattern, f in patterns.items() if fnmatch.fnmatchcase(name, pattern)), 1)
        size = round(factor * spec.groups[name].size)
        if size > spec.groups[name].size:
            found[name] = size
    return found


def _sizes_of(merged: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """For each group its size in A and in the wider network."""
    return {name: (len(mask), 2 * len(mask) - int(mask.sum())) for name, mask in merged.items()}


def _most_alike(alike: Tensor, many: int) -> Tensor:
    """A mask of as many as are most alike; of equal ones the first."""
    mask = torch.zeros(len(alike), dtype=torch.bool)
    mask[torch.argsort(alike, descending=True, stable=True)[:many]] = True
    return mask


def _likeness(
    spec: PermutationSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    groups: Sequence[str],
    run: tuple[nn.Module, nn.Module, Loader] | None,
) -> dict[str, Tensor]:
    """For each group how alike the partners are, (size,): cosines of their weights, or correlations on data."""
    correlations = {} if run is None else channel_correlations(*run)
    found: dict[str, Tensor] = {}
    for group in groups:
        size = spec.groups[group].size
        sums = torch.zeros(3, size, dtype=torch.float64)
        measured = torch.zeros(2, size, dtype=torch.float64)
        for name, dim in spec.uses(group):
            if not is_continuous(a[name]):
                continue
            at = indices_of(spec.axes[name][dim], spec, group)
            x, y = (t.detach().to("cpu", torch.float64).movedim(dim, 0) for t in (a[name], b[name]))
            x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
            products = torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)])
            sums.index_add_(1, at[at >= 0], products[:, at >= 0])
            layer, _, what = name.rpartition(".")
            if what == "weight" and layer in correlations and len(correlations[layer]) == len(at) and dim == 0:
                seen = torch.stack([correlations[layer], torch.ones_like(correlations[layer])])
                measured.index_add_(1, at[at >= 0], seen[:, at >= 0])
        cosines = sums[0] / (sums[1] * sums[2]).sqrt().clamp(min=1e-300)
        found[group] = torch.where(measured[1] > 0, measured[0] / measured[1].clamp(min=1), cosines)
    return found


def _zipped(
    spec: PermutationSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    read: Mapping[str, frozenset[int]],
    shares: tuple[float, float],
) -> tuple[dict[str, Tensor], dict[str, tuple[Places, ...]]]:
    """The wider network's state dict, and the places of each dimension of each of its tensors."""
    groups = {name: Places.of_group(mask) for name, mask in merged.items()}
    state: dict[str, Tensor] = {}
    places: dict[str, tuple[Places, ...]] = {}
    same = SameTensor()
    for key, tensor in a.items():
        name = spec.aliases.get(key, key)
        first = same.first_name(key, tensor) if isinstance(tensor, Tensor) else key
        if first != key:
            state[key], places[key] = state[first], places.get(first, ())
        elif name not in spec.axes or not is_continuous(tensor):
            state[key] = tensor
        else:
            own = tuple(places_of(axis, spec, groups) for axis in spec.axes[name])
            working = torch.promote_types(tensor.dtype, torch.float32)
            x, y = tensor.detach().to(working), b[key].detach().to(tensor.device, working)
            state[key] = combined(x, y, own, read.get(name, frozenset()), shares).to(tensor.dtype)
            places[key] = own
    return state, places


def _that_hold(
    model: nn.Module,
    captured: Captured,
    spec: PermutationSpec,
    merged: Mapping[str, Tensor],
    read: Mapping[str, frozenset[int]],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The groups in which A beside itself computes what A does, and what is said of the others.

    All are tried at once; if they do not hold, one by one, and once more together.
    """

    def difference(some: Mapping[str, Tensor]) -> float:
        """How far A merged with itself is from A: as asked, and where half of each group is merged.

        Where every unit stands beside a copy of itself, a mean over all of them is what it was, and tells nothing.
        """
        halves = {name: torch.arange(len(mask)) < len(mask) // 2 for name, mask in some.items()}
        return max(_beside_itself(model, captured.inputs, spec, masks, read) for masks in (some, halves))

    with evaluating(model):
        if not merged or difference(merged) <= SAME:
            return dict(merged), ()
        held = {name: mask for name, mask in merged.items() if difference({name: mask}) <= SAME}
        if held and difference(held) > SAME:
            raise MismatchError(
                f"no wider {type(model).__name__} computes what it does, though each of {', '.join(held)} can be "
                "wider alone: name those that are to be in width="
            )
    left = [name for name in merged if name not in held]
    return held, (f"{', '.join(left)} keep their width: beside other units they would not compute what they do",)


def _beside_itself(
    model: nn.Module,
    inputs: ExampleInputs,
    spec: PermutationSpec,
    merged: Mapping[str, Tensor],
    read: Mapping[str, frozenset[int]],
) -> float:
    """How far a module merged with itself is from itself, relative to its outputs; infinitely if it does not run."""
    state = as_state_dict(model)
    zipped, _ = _zipped(spec, state, state, merged, read, (0.5, 0.5))
    try:
        wider = module_of_widths(model, zipped, dict(_sizes_of(merged).values())).eval()
        with undisturbed():
            pairs = zip(_run(model, inputs), _run(wider, inputs), strict=True)
            return max((_relative(x, y) for x, y in pairs), default=0.0)
    except Exception as error:  # the model's own: its code knows the size by number
        log.debug("merged with itself, %s does not run: %s", type(model).__name__, error)
        return float("inf")


def _run(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    first = next(iter(model.parameters()), None)
    device = None if first is None else first.device

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        typed = value.to(first.dtype) if first is not None and value.is_floating_point() else value
        return typed.to(device)

    args = [moved(value) for value in inputs.args]
    kwargs = {name: moved(value) for name, value in inputs.kwargs.items()}
    return [t for t in tensor_leaves(model(*args, **kwargs)) if t.is_floating_point()]


def _relative(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    largest = float(x.abs().max()) if x.numel() else 0.0
    gap = float((x - y).abs().max()) if x.numel() else 0.0
    return gap / largest if largest else gap
