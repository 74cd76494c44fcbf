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

SMALL = 1 << 27
"""Weights of so many elements are compared in float64; larger ones in float32."""


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
        self.spec = spec
        self.state_a, self.state_b = _canonical(spec, a), _canonical(spec, b)
        names = evidence(spec, ignore)
        if dtype is None:
            dtype = torch.float64 if sum(self.state_a[name].numel() for name in names) <= SMALL else torch.float32
        theirs: list[dict[str, Tensor]] = []
        for model, state in (("A", self.state_a), ("B", self.state_b)):
            tensors = {}
            for name in names:
                tensor = comparable(state[name], name, model).to(self.state_a[name].device, dtype)
                require_finite(tensor, name, model, "; repair it, or name it in ignore=")
                tensors[name] = tensor
            theirs.append(tensors)
        for name in names:
            if theirs[0][name].ndim != theirs[1][name].ndim:
                raise MismatchError(f"{name!r} is complex in one of the models only")
        self.acting = Acting(spec, theirs[0])
        self.gains = self._gains()
        folded = [
            {name: self.acting.folded(name, tensor, state) for name, tensor in tensors.items()}
            for tensors, state in zip(theirs, (self.state_a, self.state_b), strict=True)
        ]
        self.of_a, self.a = balance(self.acting, folded[0])
        self.of_b, self.b = balance(self.acting, folded[1])
        some = next(iter(self.a.values()), torch.zeros((), dtype=dtype))
        self.device, self.dtype = some.device, some.dtype

    def _gains(self) -> dict[str, np.ndarray]:
        """For each gain that can be changed, A's over B's."""
        found = {}
        for name, gain in self.spec.general_gains.items():
            values = []
            for model, state in (("A", self.state_a), ("B", self.state_b)):
                own = state[name].detach().to("cpu", torch.float64).flatten() + gain.added
                if not bool(torch.isfinite(own).all()) or bool((own == 0).any()):
                    what = "a zero" if bool((own == 0).any()) else "a value that is not finite"
                    raise MismatchError(
                        f"the gain {gain} of {model} has {what}: what reads that axis cannot take it up and give it "
                        f"back; take spec.permutations() for these networks"
                    )
                values.append(own.numpy())
            found[name] = values[0] / values[1]
        return found

    def transformation(self, element: Element) -> Transformation:
        """What brings B's state dict to A's: B's gauge, then an element found there, then out of A's gauge."""
        into, out = self.of_b.transformation(self.spec), self.of_a.transformation(self.spec).inverse()
        found = out @ element.transformation(self.spec) @ into
        return Transformation(self.spec, found.permutation, found.matrices, found.scales, found.signs, self.gains)

    def element(self, transformation: Transformation) -> Element:
        """The compact part of a transformation of B's state dict, as an element in this gauge.

        Scales are left out, and of matrices the nearest rotation is taken.
        """
        inside = self.of_a.transformation(self.spec) @ transformation @ self.of_b.transformation(self.spec).inverse()
        element = Element.of(inside, self.device, self.dtype)
        element.scales = {}
        for group, matrices in element.matrices.items():
            structure = self.acting.structure(group)
            if structure.linear in ("T", "T2"):
                size = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True)
                element.matrices[group] = matrices / size
            else:
                element.matrices[group] = polar(matrices)
        return element


def evidence(spec: PermutationSpec, ignore: Iterable[str]) -> list[str]:
    """The parameters that count: some group acts on them, and they are no gains that others take up."""
    patterns = tuple(ignore)
    return [
        name
        for name in spec.axes
        if any(occurrence.group in spec.acting for occurrence in spec.occurrences(name))
        and name not in spec.general_gains
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _canonical(spec: PermutationSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**{spec.aliases[key]: value for key, value in state.items() if key in spec.aliases}, **state}
