"""The tensors inside two networks: which of them carry groups, and their values, side by side.

The forward pass is captured once, and the rules say which group acts on which dimension of every tensor in it. The same
operators are then run on real batches, for A's weights and for B's in step, so that any tensor of the one can be
compared with the same of the other, and none is kept longer than it is needed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from permgraph.capture import Captured, capture
from permgraph.errors import MismatchError, SpecError
from permgraph.inference.tensors import computed_tensors
from permgraph.networks.batches import fitting
from permgraph.spec.expressions import Axis, Label, Product, Ref, normalise, refs, size_of, walk
from permgraph.spec.spec import PermutationSpec
from permgraph.weights.state_dict import StateDict


@dataclass(frozen=True)
class Site:
    """A tensor of the forward pass whose units groups move.

    Attributes:
        name: what to call it, with its operator and module.
        axis: the groups that act on its units.
        sizes: of the factors of the tensor's dimensions, in order: some dimensions are a batch and heads in one.
        units: which of the factors, flattened in this order, are the units; the others are samples.
        groups: the moving groups in `axis`.
    """

    name: str
    axis: Axis
    sizes: tuple[int, ...]
    units: tuple[int, ...]
    groups: frozenset[str]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as (units, samples)."""
        factors = tensor.detach().reshape(self.sizes).movedim(self.units, tuple(range(len(self.units))))
        return factors.reshape(math.prod(factors.shape[: len(self.units)]), -1)


class Replay:
    """The forward pass of two networks of one architecture, operator by operator.

    Args:
        models: A's and B's module; neither is run itself.
        states: their state dicts.
        spec: the one that inference gives for them.
        batch: positional and keyword arguments, to capture with.

    Raises:
        CaptureError: the module does not run on the batch.
        MismatchError: the forward pass depends on values, or the spec is not the one that it implies.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        states: tuple[StateDict, StateDict],
        spec: PermutationSpec,
        batch: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.models = models
        self.spec = spec
        self.device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
        # Copies, since a forward pass may write into its buffers; all as A's are, since the operators are A's.
        self.states = tuple(
            {
                name: tensor.detach().to(self.device, states[0].get(name, tensor).dtype, copy=True)
                for name, tensor in {**dict(model.named_buffers()), **state}.items()
            }
            for model, state in zip(models, states, strict=True)
        )
        captured = self._capture(batch)
        self.sites: dict[int, Site] = dict(self._find_sites(captured))
        self.passes = {_signature(batch): (captured.graph, self.sites)}

    def _capture(self, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> Captured:
        captured = capture(self.models[0], *batch)
        if captured.mode == "real":
            raise MismatchError(
                f"the path through {captured.model_class} depends on values ({captured.fallback_reason}), so that A "
                f"and B may take different ones"
            )
        return captured

    def _find_sites(self, captured: Captured) -> Iterator[tuple[int, Site]]:
        for index, node, axes in computed_tensors(captured, self.spec):
            site = self._site(node, axes)
            if site is not None:
                yield index, site

    def _site(self, node: fx.Node, axes: tuple[Axis, ...]) -> Site | None:
        factors = [factor for axis in axes for factor in (axis.factors if isinstance(axis, Product) else (axis,))]
        units = [k for k, factor in enumerate(factors) if any(isinstance(x, (Ref, Label)) for _, x in walk(factor))]
        axis = normalise(Product(tuple(factors[k] for k in units)))
        groups = frozenset(refs(axis)) & frozenset(self.spec.moving)
        if not groups:
            return None
        try:
            self.spec.layout((axis,))
        except SpecError:  # fibred over something that this tensor does not show
            return None
        target = node.args[0].target if node.target is operator.getitem else node.target  # type: ignore[union-attr]
        where = f" in {node.meta['module']}" if node.meta.get("module") else ""
        sizes = tuple(size_of(factor, self.spec.groups) for factor in factors)
        return Site(f"{node.name} ({target}{where})", axis, sizes, tuple(units), groups)

    def run(
        self,
        batch: tuple[tuple[Any, ...], dict[str, Any]],
        number: int,
        wanted: Mapping[int, Site],
        see: Callable[[Site, torch.Tensor, torch.Tensor], object],
    ) -> None:
        """Run both networks on a batch, and show each wanted tensor of A with that of B, as (units, samples).

        Raises:
            MismatchError: the batch takes another path through the network than the first.
        EvaluationError: it cannot be run.
        """
        signature = _signature(batch)
        if signature not in self.passes:
            # The last batch of a loader is often smaller, and sizes are written into the graph.
            captured = self._capture(batch)
            self.passes[signature] = captured.graph, dict(self._find_sites(captured))
        graph, sites = self.passes[signature]
        for index, site in wanted.items():
            if index not in sites or (sites[index].name, sites[index].axis) != (site.name, site.axis):
                raise MismatchError(
                    f"batch {number} of the loader takes another path through the network than the first: "
                    f"{site.name} is not there"
                )
        given = dict(_named_tensors(batch))
        runs = [_Values(state, given, self.device) for state in self.states]
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        dying: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            dying.setdefault(node, []).append(source)
        for index, node in enumerate(graph.nodes):
            if node.op == "output":
                break
            where = f"{node.target} in module {node.meta.get('module', '')!r}"
            with fitting(*batch, what=f"{where} cannot run on batch {number} of the loader,"):
                for run in runs:
                    run.compute(node)
            if index in wanted:
                x, y = (run.values[node] for run in runs)
                see(sites[index], sites[index].view(x), sites[index].view(y))
            for source in (*dying.get(node, ()), *(() if node in last else (node,))):
                for run in runs:
                    run.values.pop(source, None)


class _Values:
    """One network's tensors during a pass."""

    def __init__(
        self, state: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self.state, self.given, self.device = state, given, device
        self.values: dict[fx.Node, Any] = {}

    def compute(self, node: fx.Node) -> None:
        """The value of one node."""
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.target is operator.getitem or getattr(node.target, "namespace", "") != "permgraph":
            args = fx.map_arg(node.args, self.values.__getitem__)
            kwargs = dict(fx.map_arg(dict(node.kwargs), self.values.__getitem__))
            if kwargs.get("device") is not None:
                kwargs["device"] = self.device
            assert callable(node.target)
            self.values[node] = node.target(*args, **kwargs)

    def _placeholder(self, node: fx.Node) -> torch.Tensor:
        names: Sequence[str] = node.meta["names"]
        if node.meta["kind"] == "input":
            if names[0] not in self.given:
                raise MismatchError(f"the batch has no tensor at {names[0]}, which the network read in the first batch")
            return self.given[names[0]].to(self.device, copy=True)
        for name in names:
            if name in self.state:
                return self.state[name]
        real: torch.Tensor | None = node.meta.get("real")
        if real is None:
            raise MismatchError(f"the constant {node.name} has no value that could be used again")
        return real.detach().to(self.device)


def _named_tensors(batch: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for root, value in zip(("args", "kwargs"), batch, strict=True):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                yield root + pytree.keystr(path), leaf


def _signature(batch: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(batch)
    return str(structure), tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else str(x) for x in leaves)
