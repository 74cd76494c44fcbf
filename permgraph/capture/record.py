"""The dispatch mode that writes each ATen call down as a node."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from permgraph.capture.control import is_composite, is_higher_order, run_plainly, show_higher_order
from permgraph.capture.environment import mkldnn
from permgraph.capture.frames import locate
from permgraph.capture.known import KnownValues
from permgraph.capture.schema import operator_name, signature
from permgraph.capture.state import strided_like, tensor_key
from permgraph.capture.untracked import SAME_MEMORY, VALUES_LEAVE_TORCH
from permgraph.errors import CaptureError

_DEVICE = torch.ops.prim.device.default
_RESIZE = torch.ops.aten.resize_.default
_EMPTY = torch.ops.aten.empty.memory_format


def _given_for_results(func: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that an operator is given to write its results to, by name; it gives them these results' shapes."""
    known = signature(func) if kwargs and func._schema.is_mutable else None
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)} if known else {}
    written = {argument.name for argument in known.arguments if argument.writes} if known and tensors else ()
    return {name: tensor for name, tensor in tensors.items() if name in written}


def otherwise(value: float, how: str) -> float:
    """Another answer than this: the opposite of a truth value, the `"next"` number, one far `"above"` or `"below"`."""
    if isinstance(value, bool):
        return not value
    if how == "next":
        return value + 1
    far = 10 * abs(value) + 10
    return value + far if how == "above" else value - far


@dataclass(frozen=True)
class Limits:
    """Where a capture gives up: operators in one pass, and seconds from `started`, however many passes it takes."""

    max_nodes: int
    max_seconds: float | None
    started: float

    def over(self) -> bool:
        """Whether the time is up."""
        return self.max_seconds is not None and time.monotonic() - self.started > self.max_seconds

    def check(self, count: int) -> None:
        """Raises `CaptureError` if this many operators, or the time by now, is too much."""
        if count > self.max_nodes:
            raise CaptureError(
                f"the forward pass has more than max_nodes={self.max_nodes} operators: shorten the inputs "
                "(a recurrent loop writes down each step), or raise max_nodes"
            )
        if self.over():
            raise CaptureError(
                f"capturing took longer than max_seconds={self.max_seconds}; this pass was at operator {count}: "
                "pass smaller inputs, or raise max_seconds"
            )


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends each operator to a graph, and knows which node every tensor that Python holds came from.

    A tensor is known by the identity of its Python object. All of them are kept alive until the recorder goes, so
    that no `id` is used twice; an in-place operator returns the object that it was given, and moves it to the new node.

    `adopt` is asked about a tensor that nobody has seen; it returns its names and the tensor to compute with in its
    place (which may be the tensor itself). `known` keeps values beside fake tensors. `answers` says which of the values
    that Python asks for, by their number, it is told otherwise, and how.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would wrap `__torch_dispatch__` to keep a compiler out, which costs every operator its share.

        Nothing is compiled during a pass.
        """
        return False

    def __init__(
        self,
        *,
        device: torch.device,
        paths: Mapping[int, str],
        stop: CodeType,
        adopt: Callable[[Tensor], tuple[tuple[str, ...], Tensor]],
        limits: Limits,
        known: KnownValues | None = None,
        kernels: bool = True,
        answers: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        show_higher_order(type(self))
        self.graph = fx.Graph()
        self._device = device
        self._paths = paths
        self._stop = stop
        self._adopt = adopt
        self._limits = limits
        self._known = known
        self._kernels = kernels
        self._answers = answers or {}
        self._reads = 0
        self._count = 0
        self._inside = 0
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._originals: dict[int, Tensor] = {}
        self._replaced: dict[int, Tensor] = {}
        self._last_placeholder: fx.Node | None = None
        self._memory: list[torch.UntypedStorage] = []  # so that no memory lies where another's was
        self._keys: dict[int, Hashable] = {}  # where the memory of each tensor lay when its node was made
        self._state: set[int] = set()
        self._by_memory: dict[Hashable, Tensor] = {}
        self._indexed = 0

    # -- placeholders ------------------------------------------------------------------------------------------

    def placeholder(
        self,
        kind: str,
        names: tuple[str, ...],
        tensor: Tensor,
        aliases: Iterable[Tensor] = (),
        real: Tensor | None = None,
    ) -> fx.Node:
        """Adds a placeholder for `tensor`, to which `aliases` belong as well."""
        last = self._last_placeholder
        anchor = self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(None)
        with anchor:
            node = self.graph.placeholder(re.sub(r"\W", "_", names[0] if names else kind))
        node.meta.update(val=self._val(tensor), module="", source=None, kind=kind, names=names)
        if real is not None and real.layout == torch.strided and not real.is_quantized:
            node.meta["real"] = real
            if self._known is not None:
                self._known.remember(tensor, real)
        self._last_placeholder = node
        self._bind(tensor, node)
        for alias in aliases:
            self._bind(alias, node)
            self._originals[id(alias)] = tensor
        self._state.add(id(tensor))
        return node

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The newest node of a tensor; one that was never seen becomes a constant."""
        if id(tensor) in self._originals:  # a closure holds the caller's own tensor, which is not to be computed with
            self._replaced[id(tensor)] = self._originals[id(tensor)]
        node = self._nodes.get(id(tensor))
        moved = node is not None and self._keys[id(tensor)] != tensor_key(tensor)
        if moved and id(tensor) in self._state:
            node = None  # `parameter.data = ...` gave this object another tensor's memory
        if (moved or node is None) and (seen := self._same_memory(tensor)) is not None:
            node = self._nodes[id(seen)]
            self._bind(tensor, node)
            self._state.discard(id(tensor))
        if node is None:
            self._refuse_computed(tensor)
            names, stand_in = self._adopt(tensor)
            real = None if tensor.is_meta or isinstance(tensor, FakeTensor) else tensor
            node = self.placeholder("constant", names, stand_in, aliases=(tensor,), real=real)
            self._replaced[id(tensor)] = stand_in
        return node

    def _refuse_computed(self, tensor: Tensor) -> None:
        """Raises `CaptureError` for a tensor that was made of known ones without an operator that was seen."""
        waiting, seen = [tensor.grad_fn], set()
        while waiting:
            step = waiting.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            waiting.extend(before for before, _ in step.next_functions)
            if id(getattr(step, "variable", None)) in self._nodes:
                raise CaptureError(
                    f"a tensor of shape {tuple(tensor.shape)} was computed where operators cannot be observed, such as "
                    "another thread: run the whole forward pass in the thread that calls it"
                )

    def _same_memory(self, tensor: Tensor) -> Tensor | None:
        """A tensor seen before that is the same memory: `a.data = b` shares it without any operator."""
        for seen in self._alive[self._indexed :]:
            self._by_memory[tensor_key(seen)] = seen
        self._indexed = len(self._alive)
        found = self._by_memory.get(tensor_key(tensor))
        return found if found is not tensor else None

    # -- operators ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_higher_order(func):
            self._inside += 1
            try:
                with self:
                    return run_plainly(func, args, kwargs)
            finally:
                self._inside -= 1
        if func.namespace == "prim":  # mostly the device of a fake tensor: a question, not a computation
            if func is _DEVICE and isinstance(args[0], FakeTensor):
                return args[0].fake_device  # C++ asks as often as it computes; this spares the fake mode's detour
            return func(*args, **kwargs)
        if self._inside and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        self._count += 1
        self._limits.check(self._count)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._device}
        node_args = tuple([self._argument(a) for a in args])
        node_kwargs = {k: self._argument(v) for k, v in kwargs.items()}
        if self._replaced:
            args = tuple([self._substitute(a) for a in args])
            kwargs = {k: self._substitute(v) for k, v in kwargs.items()}
        outs = _given_for_results(func, kwargs)
        if torch.Tag.inplace_view in func.tags:
            self._keep_shape(args[0], self._snapshot(args[0]))
            if func is _RESIZE and not args[0].numel():
                outs["self"] = args[0]
        before = {name: self._snapshot(tensor) for name, tensor in outs.items()}

        result = self._execute(func, args, kwargs)

        module, source = locate(self._paths, self._stop)
        for name, kept in before.items():
            if outs[name].shape != kept.shape:
                self._keep_shape(outs[name], kept)
                node_kwargs[name] = self._fresh(outs[name], module, source)
        if "self" in node_kwargs and func is _RESIZE:
            return result
        name = operator_name(func)
        node = self.graph.create_node("call_function", func, node_args, node_kwargs, name=name)
        node.meta.update(val=self._val(result), module=module, source=source)
        if torch.Tag.data_dependent_output in func.tags and isinstance(result, (bool, int, float)):
            node.meta["read"] = self._reads
            if self._reads in self._answers:
                result = otherwise(result, self._answers[self._reads])
            self._reads += 1
        self._bind_result(result, node, module, source)
        return result

    def untracked_read(self, tensor: Tensor) -> None:
        """Notes that a tensor's values were read by something that is not torch."""
        module, source = locate(self._paths, self._stop)
        node = self.graph.create_node("call_function", VALUES_LEAVE_TORCH, (self.node_of(tensor),))
        node.meta.update(val=None, module=module, source=source)

    def same_memory(self, tensor: Tensor, alias: Tensor, dims: Sequence[int]) -> None:
        """Notes that a tensor of the state is another one with its dimensions in another order."""
        arguments = (self.node_of(tensor), self.node_of(alias), list(dims))
        node = self.graph.create_node("call_function", SAME_MEMORY, arguments)
        node.meta.update(val=None, module="", source=None)

    def replaced(self, before: Tensor | None, after: Tensor) -> None:
        """Notes that where the model held a tensor which the pass read, it now holds another for the next pass."""
        if before is None or before is after or before.shape != after.shape or id(after) not in self._nodes:
            return
        read = self._nodes.get(id(before))
        if read is not None and read.users:
            self.same_memory(before, after, range(after.ndim))

    def finish(self, outputs: list[Tensor], left: Sequence[tuple[str, Tensor]]) -> fx.Graph:
        """Adds the output node, with those tensors that the pass left on the model, and checks the graph."""
        nodes = [self.node_of(tensor) for tensor in outputs]
        kept = {self._nodes[id(tensor)]: name for name, tensor in left if id(tensor) in self._nodes}
        output = self.graph.output(nodes)
        output.meta.update(val=[node.meta["val"] for node in nodes], left=kept, module="", source=None)
        self.graph.lint()
        return self.graph

    def _execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._known is None:
            with mkldnn(self._kernels):  # the choice of operators is made by now, and real convolutions are to be fast
                return func(*args, **kwargs)
        known, real = self._known.before(func, args, kwargs)
        if not known:
            return func(*args, **kwargs)
        answered, result = self._known.answer(func, real)
        if not answered:
            result = func(*args, **kwargs)
        self._known.after(result, real)
        return result

    def _fresh(self, tensor: Tensor, module: str, source: str | None) -> fx.Node:
        """A node for memory of which nothing was written yet, in place of that which a tensor had in another shape."""
        shape = list(tensor.shape)
        node = self.graph.create_node("call_function", _EMPTY, (shape,), {"dtype": tensor.dtype}, name="empty")
        node.meta.update(val=self._snapshot(tensor), module=module, source=source)
        self._bind(tensor, node)
        return node

    def _keep_shape(self, tensor: Tensor, kept: Tensor) -> None:
        """An operator changes this object's shape: the nodes behind keep the old one, as that of another object."""
        node: Any = self._nodes[id(tensor)]
        while isinstance(node, fx.Node) and node.meta["val"] is tensor:
            node.meta["val"] = kept
            node = node.args[0] if node.args else None  # an in-place chain holds one object many times

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        if isinstance(value, torch.Generator):
            return None
        return value

    def _substitute(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replaced.get(id(value), value)
        if isinstance(value, (list, tuple)):
            return [self._substitute(item) for item in value]
        return value

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        if id(tensor) not in self._nodes:
            self._alive.append(tensor)
        self._nodes[id(tensor)] = node
        key = tensor_key(tensor)
        if self._keys.get(id(tensor)) != key:
            self._keys[id(tensor)] = key
            if isinstance(key, tuple):
                with torch._C.DisableTorchFunction():
                    self._memory.append(tensor.untyped_storage())

    def _bind_result(self, result: Any, node: fx.Node, module: str, source: str | None) -> None:
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, (list, tuple)):
            for index, item in enumerate(result):
                if not isinstance(item, (Tensor, list, tuple)):
                    continue
                part = self.graph.create_node("call_function", operator.getitem, (node, index), name="getitem")
                part.meta.update(val=node.meta["val"][index], module=module, source=source)
                self._bind_result(item, part, module, source)

    def _val(self, result: Any) -> Any:
        """A result as the graph keeps it: without memory."""
        if isinstance(result, FakeTensor):
            return result
        if isinstance(result, Tensor):
            return self._snapshot(result)
        if isinstance(result, (list, tuple)):
            return [self._val(item) for item in result] if isinstance(result, list) else tuple(map(self._val, result))
        return result

    def _snapshot(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return strided_like(tensor, self._device)
        with no_dispatch():
            whole = tensor.layout == torch.strided or tensor.is_nested
            return strided_like(tensor, "meta") if whole else tensor.to("meta")
