"""Two models in one gauge: their gains taken up, balanced, side by side; and the way back to state dicts.

A network whose norms have gains, whose units have scales and whose heads have invertible maps can be written in many
ways. `Gauge` writes A and B in one of them, in which only rotations, signs and permutations are left to be found; what
is found there becomes an element that brings B's state dict to A's, in A's own gauge: A stays as it is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from permgraph.errors import MismatchError
from permgraph.matching.general.acting import Acting, Element
from permgraph.matching.general.balancing import balance
from permgraph.matching.general.polar import polar
from permgraph.matching.problem.objective import comparable
from permgraph.spec.spec import PermutationSpec
from permgraph.spec.transformation import Transformation
from permgraph.weights.state_dict import STATISTICS, StateDict, require_finite

SMALL = 1 << 24
"""Weights of so many elements are compared in float64; larger ones in float32."""


class Written:
    """One model without gains and balanced, which leaves rotations, signs and permutations between it and others.

    Args:
        spec: a spec with general symmetries.
        state: a state dict that fits it.
        model: what messages call the model.
        ignore: patterns of names that are no evidence.
        dtype: in which to compute; by default float64 unless the weights are many.
        like: the tensors whose devices to compute on; by default the model's own.

    Attributes:
        state: the model by canonical names, as it was given.
        acting: how the groups act on the parameters that count.
        into: the element that balances it, once the gains are taken up.
        tensors: the parameters that count, after that.
        gains: for each gain that can be changed its factors, float64.

    Raises:
        MismatchError: a tensor is not floating point or has no data, or a gain has a zero.
        NonFiniteError: a tensor holds NaN or infinity.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        state: StateDict,
        model: str,
        *,
        ignore: Iterable[str] = STATISTICS,
        dtype: torch.dtype | None = None,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.spec, self.state = spec, _canonical(spec, state)
        names = evidence(spec, ignore)
        if dtype is None:
            dtype = torch.float64 if sum(self.state[name].numel() for name in names) <= SMALL else torch.float32
        tensors = {}
        for name in names:
            device = (self.state if like is None else like)[name].device
            tensors[name] = comparable(self.state[name], name, model).to(device, dtype)
            require_finite(tensors[name], name, model, "; repair it, or name it in ignore=")
        self.acting = Acting(spec, tensors)
        self.gains = {
            name: gain.values(self.state[name], model).cpu().numpy() for name, gain in spec.general_gains.items()
        }
        self.into, self.tensors = balance(
            self.acting, {name: self.acting.folded(name, tensor, self.state) for name, tensor in tensors.items()}
        )
        some = next(iter(self.tensors.values()), torch.zeros((), dtype=dtype))
        self.device, self.dtype = some.device, some.dtype

    def image(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another model's parameters in this one's gauge: without its gains, and balanced as this one is."""
        state = _canonical(self.spec, state)
        seen = {}
        for name, own in self.tensors.items():
            tensor = comparable(state[name], name, "a model").to(own.device, own.dtype)
            seen[name] = self.acting.act(name, self.acting.folded(name, tensor, state), self.into)
        return seen

    def transformation(self, element: Transformation, other: Written) -> Transformation:
        """What brings another model's state dict to this one's: into its gauge, the element, and out of this gauge."""
        return between((other.into, other.gains), element, (self.into, self.gains))


def between(
    start: tuple[Element, Mapping[str, np.ndarray]],
    element: Transformation,
    end: tuple[Element, Mapping[str, np.ndarray]],
) -> Transformation:
    """What brings one model's state dict to another's, in whose gauge they were compared.

    Args:
        start: what balances the one, and its gains.
        element: what was found between the two as they are then.
        end: what balances the other, and its gains.
    """
    spec = element.spec
    found = end[0].transformation(spec).inverse() @ element @ start[0].transformation(spec)
    gains = {name: own / start[1][name] for name, own in end[1].items()}
    return Transformation(spec, found.permutation, found.matrices, found.scales, found.signs, gains)


class Gauge:
    """A and B written so that what is left between them is compact.

    Args:
        spec: a spec with general symmetries.
        a, b: state dicts that fit it.
        ignore: patterns of names that are no evidence.
        dtype: in which to compute.

    Attributes:
        acting: how the groups act on the parameters that count.
        a, b: these parameters, without gains and balanced.

    Raises:
        MismatchError: a tensor is not floating point or has no data, or a gain has a zero.
        NonFiniteError: a tensor holds NaN or infinity.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        a: StateDict,
        b: StateDict,
        *,
        ignore: Iterable[str] = STATISTICS,
        dtype: torch.dtype | None = None,
    ) -> None:
        ignore = tuple(ignore)
        self.spec, self.of = spec, Written(spec, a, "A", ignore=ignore, dtype=dtype)
        ours = self.of
        self.other = Written(spec, b, "B", ignore=ignore, dtype=ours.dtype, like=ours.tensors)
        require_both_real(ours, self.other)
        self.state_a, self.of_a, self.a = ours.state, ours.into, ours.tensors
        self.state_b, self.of_b, self.b = self.other.state, self.other.into, self.other.tensors
        self.acting, self.device, self.dtype = ours.acting, ours.device, ours.dtype

    def transformation(self, element: Element) -> Transformation:
        """What brings B's state dict to A's: B's gauge, then an element found there, then out of A's gauge."""
        return self.of.transformation(element.transformation(self.spec), self.other)

    def element(self, transformation: Transformation) -> Element:
        """The compact part of a transformation of B's state dict, as an element in this gauge.

        Scales are left out, and of matrices the nearest rotation is taken.
        """
        inside = self.of_a.transformation(self.spec) @ transformation @ self.of_b.transformation(self.spec).inverse()
        return compact_part(self.acting, Element.of(inside, self.device, self.dtype))


def compact_part(acting: Acting, element: Element) -> Element:
    """An element without its scales, and with the nearest rotations in the place of its matrices."""
    matrices = {}
    for group, own in element.matrices.items():
        if acting.structure(group).is_paired:
            matrices[group] = own / torch.linalg.vector_norm(own, dim=-1, keepdim=True)
        else:
            matrices[group] = polar(own)
    return Element(element.arrays, matrices, {}, element.signs)


def require_both_real(one: Written, other: Written) -> None:
    """Raise MismatchError where a parameter is complex in one of two models only."""
    for name, tensor in one.tensors.items():
        if tensor.ndim != other.tensors[name].ndim:
            raise MismatchError(f"{name!r} is complex in one of the models only")


def evidence(spec: PermutationSpec, ignore: Iterable[str]) -> list[str]:
    """The parameters that count: some group acts on them, and they are no gains that others take up."""
    patterns = tuple(ignore)
    return [
        name
        for name in spec.axes
        if any(occurrence.group in spec.acting for occurrence in spec.occurrences(name))
        and name not in spec.general_gains
        and name not in spec.gains_that_stay
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def notes_on_gains(spec: PermutationSpec) -> list[str]:
    """What to know of gains that B keeps, whatever A's are."""
    names = sorted(spec.gains_that_stay)
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"B keeps its own gains {', '.join(names[:3])}{more}, since more reads them than what could take up A's"]


def _canonical(spec: PermutationSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**{spec.aliases[key]: value for key, value in state.items() if key in spec.aliases}, **state}
