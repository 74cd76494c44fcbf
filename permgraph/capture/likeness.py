"""Whether two modules are built alike, so that what was captured of the one holds for the other; and where they differ.

`built_alike` looks at what the modules hold; it says yes only where it is certain. `operators_differ` compares what
their forward passes did.
"""

from __future__ import annotations

import enum
import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from permgraph.capture.captured import Captured
from permgraph.capture.python_state import attributes_of
from permgraph.capture.state import state_tensors

#: What configurations hold of where they came from; no forward pass depends on it.
OF_NO_ACCOUNT = frozenset(("_name_or_path", "name_or_path", "_commit_hash", "transformers_version"))
_VALUES = (str, bytes, int, complex, range, slice, enum.Enum, torch.dtype, torch.device, torch.layout)  # fmt: skip
_BY_IDENTITY = (type, types.BuiltinFunctionType, types.ModuleType, type(None), types.EllipsisType)
_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was written in Python


def built_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are certain to do the same but for the values of their weights.

    They have the same classes at the same places, no hooks, the same ties, and equal attributes; buffers that are not
    weights hold equal values. What cannot be compared counts as different.
    """
    return _Likeness(a, b).holds()


class _Likeness:
    """One comparison of two modules."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        self.places = [dict(net.named_modules(remove_duplicate=False)) for net in (a, b)]
        self.pairs = {id(m): self.places[1].get(path) for path, m in self.places[0].items()}
        self.seen: set[tuple[int, int]] = set()
        self.networks = a, b

    def holds(self) -> bool:
        """Whether the two are alike."""
        ours, theirs = self.places
        if self.networks[0] is self.networks[1]:
            return True
        if list(ours) != list(theirs):
            return False
        if any(self.pairs[id(module)] is not theirs[path] for path, module in ours.items()):
            return False
        if len({id(module) for module in theirs.values()}) != len({id(module) for module in ours.values()}):
            return False
        if not all(self._modules(module, theirs[path]) for path, module in ours.items()):
            return False
        ties = [[entry.names for entry in state_tensors(network)] for network in self.networks]
        return ties[0] == ties[1]

    def _modules(self, a: nn.Module, b: nn.Module) -> bool:
        if type(a) is not type(b) or any(vars(net).get(name) for net in (a, b) for name in _HOOKS):
            return False
        if list(a._modules) != list(b._modules) or a._non_persistent_buffers_set != b._non_persistent_buffers_set:
            return False
        for ours, theirs in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
            if list(ours) != list(theirs):
                return False
            for name, tensor in ours.items():
                other = theirs[name]
                if tensor is None or other is None:
                    if tensor is not other:
                        return False
                    continue
                weight = tensor.is_floating_point() or tensor.is_complex()
                if not self._tensors(tensor, other, values=not weight or name in a._non_persistent_buffers_set):
                    return False
        own = _HOOKS | {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
        own |= {"training"}  # the mode is chosen by the capture
        return self._mappings(*({k: v for k, v in vars(net).items() if k not in own} for net in (a, b)))

    def _mappings(self, a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
        left, right = ({k: v for k, v in each.items() if k not in OF_NO_ACCOUNT} for each in (a, b))
        return left.keys() == right.keys() and all(self._same(value, right[key]) for key, value in left.items())

    def _sequences(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(map(self._same, a, b))

    def _tensors(self, a: Tensor, b: Tensor, *, values: bool = True) -> bool:
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
            return False
        return not values or a.is_meta or bool(torch.equal(a.detach().cpu(), b.detach().cpu()))

    def _same(self, a: Any, b: Any) -> bool:
        """Whether two values are the same to whoever reads them."""
        if a is b and not isinstance(a, Tensor):
            return True
        if type(a) is not type(b) or isinstance(a, _BY_IDENTITY):
            return False
        if isinstance(a, nn.Module):
            return self.pairs.get(id(a)) is b
        if isinstance(a, Tensor):
            return self._tensors(a, b)
        if isinstance(a, float):
            return bool(a == b) or (math.isnan(a) and math.isnan(b))
        if isinstance(a, _VALUES):
            return bool(a == b)
        if (id(a), id(b)) in self.seen:
            return True  # met on the way, and compared there
        self.seen.add((id(a), id(b)))
        if isinstance(a, Mapping):
            return list(a) == list(b) and self._mappings(a, b)
        if isinstance(a, (list, tuple)):
            return self._sequences(a, b)
        if isinstance(a, (set, frozenset)):
            return all(isinstance(item, (*_VALUES, type)) for item in a) and bool(a == b)
        if isinstance(a, types.FunctionType):
            return a.__code__ is b.__code__ and self._sequences(*(list(_bound_in(function)) for function in (a, b)))
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self._same(a.__self__, b.__self__)
        if isinstance(a, functools.partial):
            return self._sequences((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        attributes, others = attributes_of(a), attributes_of(b)
        written_in_python = all(cls is object or cls.__flags__ & _HEAP_TYPE for cls in type(a).__mro__)
        if attributes is None or others is None or not written_in_python:
            return False
        return not any("__slots__" in vars(cls) for cls in type(a).__mro__) and self._mappings(attributes, others)


def _bound_in(function: types.FunctionType) -> Iterator[Any]:
    """What a function holds beside its code."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # still empty
            yield None


# -- what their passes did --------------------------------------------------------------------------------------------


def operators_differ(a: Captured, b: Captured, names: tuple[str, str] = ("A", "B")) -> str | None:
    """The first operator, or constant, in which two passes on the same inputs differ, in words; None if in none."""
    constants = [{tuple(n.meta["names"]): n for n in one.placeholders("constant") if n.meta["names"]} for one in (a, b)]
    for key, node in constants[0].items():
        other = constants[1].get(key)
        ours, theirs = node.meta.get("real"), None if other is None else other.meta.get("real")
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and not _equal(ours, theirs):
            return f"the constant {key[0]!r} has other values in {names[1]}"
    calls = [[node for node in one.graph.nodes if node.op == "call_function"] for one in (a, b)]
    numbers = [{node: at for at, node in enumerate(nodes)} for nodes in calls]

    def operands(node: fx.Node, number: Mapping[fx.Node, int]) -> Any:
        def shown(value: fx.Node) -> Any:
            return ("operator", number[value]) if value in number else ("held", _place(value))

        return repr(fx.node.map_arg((node.args, dict(node.kwargs)), shown))

    for one, other in zip(*calls, strict=False):
        if one.target != other.target or operands(one, numbers[0]) != operands(other, numbers[1]):
            return f"{names[0]} computes {_call(one)}, and {names[1]} {_call(other)}"
    if len(calls[0]) != len(calls[1]):
        longer, whose, others = (calls[0], *names) if len(calls[0]) > len(calls[1]) else (calls[1], *reversed(names))
        return f"{whose} computes {_call(longer[min(map(len, calls))])}, and {others} nothing more"
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.detach().cpu(), b.detach().cpu()))


def _place(placeholder: fx.Node) -> tuple[str, ...]:
    return (placeholder.meta["kind"], *placeholder.meta["names"])


def _call(node: fx.Node) -> str:
    """An operator with those of its arguments that are no tensors, and where it was called."""
    plain = [
        repr(value) for value in (*node.args, *node.kwargs.values()) if not isinstance(value, (fx.Node, list, tuple))
    ]
    where = node.meta.get("source") or node.meta.get("module")
    return f"{node.target}({', '.join(plain)})" + (f" at {where}" if where else "")
