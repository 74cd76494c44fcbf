"""What a capture returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from permgraph.capture.counting import Outputs
from permgraph.capture.inputs.registry import ExampleInputs


@dataclass(frozen=True)
class Captured:
    """One forward pass, as a graph of ATen operators.

    `graph` holds placeholders first (parameters, buffers, constants, inputs), then one `call_function` node for each
    operator in the order of execution, then `output`, whose argument is the list of all tensors that the model
    returned. Each node carries `meta["val"]` (a tensor without memory, or a tuple or list of them, or a Python
    number), `meta["module"]` (the path of the innermost module) and `meta["source"]` (`"file.py:12"` or None);
    placeholders carry `meta["kind"]` and `meta["names"]` besides, and constants whose values are known `meta["real"]`;
    parameters and buffers `meta["classes"]`, those of the modules that hold them, outermost first.

    `mode` is `"real"` where the model asked for a tensor's value; the graph then holds for the branch that it took,
    and `fallback_reason` says what it asked. `unused` names the parameters and buffers that no operator read, `opaque`
    the types of returned objects that could not be searched for tensors. The `output` node's `meta["left"]` maps the
    tensors that the pass left on the model to the names of the attributes. `keeps_state` says whether the pass changed
    something on the module, so that a second call may do something else, and `keeps_attributes` whether that is more
    than what its buffers hold. `remarks` are sentences for people about what
    this pass could not make certain. `not_restored` names what the module does not have again when it loads what it
    has saved. `outputs` is what was asked for to count as the result; what became of it stands in the `output` node's
    `meta["returned"]`, a `Returned` for each tensor.
    """

    graph: torch.fx.Graph
    model_class: str
    mode: Literal["fake", "real"]
    fallback_reason: str | None
    inputs: ExampleInputs
    unused: tuple[str, ...]
    opaque: tuple[str, ...] = ()
    keeps_state: bool = False
    keeps_attributes: bool = False
    remarks: tuple[str, ...] = ()
    not_restored: frozenset[str] = frozenset()
    outputs: Outputs = None

    def placeholders(self, kind: str | None = None) -> list[torch.fx.Node]:
        """The placeholder nodes, or those of one kind: `"parameter"`, `"buffer"`, `"constant"` or `"input"`."""
        found = [node for node in self.graph.nodes if node.op == "placeholder"]
        return found if kind is None else [node for node in found if node.meta["kind"] == kind]

    def __repr__(self) -> str:
        return (
            f"Captured({self.model_class}, {len(self.graph.nodes)} nodes, mode={self.mode!r}, "
            f"inputs from {self.inputs.finder!r}, {len(self.unused)} unused)"
        )
