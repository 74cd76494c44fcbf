"""Dimensions along which elements of a tensor may be equal by more than chance.

A ReLU gives many zeros, a comparison ones and zeros, padding the same value again. Where the largest of such elements
is looked for, the first of several wins, so that their places matter. Elements that weights have mixed are taken to
differ, unless what was mixed has equal slices, such as rows of zeros (of padding, as a mask leaves it), or is a few
elements that may all be zero; and so are those that a mask has left, unless the mask tells large ones from small.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from permgraph.inference.constancy import CREATED, NONE, Memory, Uniform, contracted_with
from permgraph.rules.pointwise import ARITHMETIC, COPIES

FLAT = """
    relu relu6 clamp clamp_min clamp_max clip hardtanh hardsigmoid hardswish hardshrink softshrink threshold sign sgn
    round floor ceil trunc heaviside floor_divide nan_to_num fake_quantize_per_tensor_affine logit zero fill
    constant_pad_nd eye tril triu diag_embed repeat repeat_interleave
"""  # the same for a whole range of values, or the same several times over
SCALING = "mul multiply div divide true_divide addcmul"  # nothing is left where one operand is zero
LIMITS = "maximum minimum fmax fmin"  # the same wherever one operand is the larger
COMPARISONS = "lt le gt ge less less_equal greater greater_equal"
PLACED = """
    permute transpose t unsqueeze squeeze expand sum mean amax amin max min median prod logsumexp cumsum
"""  # equal elements stay equal, and what is uniform is so still
MOVED = """
    softmax _softmax log_softmax _log_softmax _safe_softmax view _unsafe_view reshape _reshape_alias flatten unflatten
    slice select split split_with_sizes chunk unbind narrow flip roll sort topk gather index index_select embedding cat
    stack scatter scatter_add scatter_reduce index_put index_add index_copy index_fill slice_scatter select_scatter
    masked_scatter copy native_layer_norm native_group_norm _fused_rms_norm native_batch_norm
    _native_batch_norm_legit
"""  # equal elements stay equal, and those that are uniform meet others
HOLLOW = "constant_pad_nd tril triu diag_embed eye repeat repeat_interleave"  # slices of the same number throughout
JOINED = "cat stack scatter scatter_add scatter_reduce index_put index_add index_copy slice_scatter select_scatter"
MIXED = "mm bmm mv addmm baddbmm addmv linear convolution"  # equal slices give equal slices

VIEWS = "view _unsafe_view reshape flatten unflatten slice select split chunk unbind"
ZEROING = "relu relu6 clamp clamp_min hardtanh hardsigmoid hardswish hardshrink softshrink threshold sign heaviside"
FEW = 8  # so many elements of which each may be zero are all zero more often than by chance

_FLAT, _SCALING, _LIMITS, _MOVED = (frozenset(names.split()) for names in (FLAT, SCALING, LIMITS, MOVED))
_COMPARISONS, _PLACED = frozenset(COMPARISONS.split()), frozenset(PLACED.split())
_HOLLOW, _JOINED, _MIXED = frozenset(HOLLOW.split()), frozenset(JOINED.split()), frozenset(MIXED.split())
_BY_ELEMENT = frozenset([*ARITHMETIC.split(), *COPIES.split(), "where", "masked_fill"])
_ZEROING = frozenset(ZEROING.split())
AS_IT_WAS = frozenset([*COPIES.split(), *PLACED.split(), *VIEWS.split()])
_COPIED = frozenset(COPIES.split())
_LOOKUPS = frozenset(["gather", "index", "index_select", "embedding"])


def tied_dims(
    nodes: Sequence[fx.Node], written: Collection[fx.Node], uniform: Mapping[fx.Node, Uniform]
) -> dict[fx.Node, Uniform]:
    """For each node the dimensions along which its elements may be equal; those along which all are, left out."""
    search = _Search(nodes, written, uniform)
    while search.grew:
        search.grew = False
        for node in nodes:
            search.visit(node)
    return search.found


class _Search:
    """What was found so far; memory that is written to is one with all that sees it."""

    def __init__(
        self, nodes: Sequence[fx.Node], written: Collection[fx.Node], uniform: Mapping[fx.Node, Uniform]
    ) -> None:
        self.found: dict[fx.Node, Uniform] = {}
        self.grew = True
        self._uniform = uniform
        self._written = written
        self._memory = Memory(nodes)
        self._stained: set[fx.Node] = set()  # the owners of written memory that has equal elements somewhere
        self._hollow: set[fx.Node] = set()  # what has equal slices (of written memory, its owner)
        self._tells: set[fx.Node] = set()  # masks that tell large elements from small
        self._zeroed: set[fx.Node] = set()  # what may be zero where a mask, or a ReLU, says so

    def visit(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if node.op == "call_function" and self._is_telling(node):
            self._tells.add(node)
        if self._is_zeroed(node, val):
            self._zeroed.add(node)
        ndim = _widest(val)
        if node.op == "call_function" and self._is_hollow(node):
            self.grew |= self._home(node) not in self._hollow
            self._hollow.add(self._home(node))
        owner = self._memory.owner(node) if node in self._written else None
        dims = frozenset(range(ndim)) if owner in self._stained else self._dims(node, val, ndim)
        if dims - self.found.get(node, NONE):
            self.found[node] = dims | self.found.get(node, NONE)
            self.grew = True
            if owner is not None and owner not in self._stained:
                self._stained.add(owner)

    def _dims(self, node: fx.Node, val: object, ndim: int) -> Uniform:
        every = frozenset(range(ndim))
        if isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
            return every
        if node.op != "call_function":
            return NONE
        name = _name(node)
        sources = [n for n in node.all_input_nodes if _is_real(n)]
        if name in _FLAT or (name in CREATED and node in self._written) or node.kwargs.get("rounding_mode") is not None:
            return every
        if name in _LOOKUPS and not self._equal_in(sources[:1]):
            return _looked_up(node, name, ndim)
        if name in _MOVED or node.target is operator.getitem:
            return every if self._equal_in(sources) or any(s in self._uniform for s in sources) else NONE
        if name in _PLACED:
            if name == "expand" and not self._equal_in(sources):  # of memory that is written to, else it is uniform
                return _repeated(sources[0].meta["val"], val) if node in self._written else NONE
            return every if self._equal_in(sources) else NONE
        if name in _BY_ELEMENT:
            return self._by_element(node, name, [n for n in node.all_input_nodes if _widest(n.meta.get("val"))], every)
        if name in _MIXED and self._home(node) in self._hollow:
            return every - {1 if name == "convolution" else ndim - 1} if _has_bias(node, name) else every
        return NONE

    def _home(self, node: fx.Node) -> fx.Node:
        return self._memory.owner(node) if node in self._written else node

    def _is_hollow(self, node: fx.Node) -> bool:
        name = _name(node)
        if name in _HOLLOW or (name in CREATED and node in self._written):
            return True
        sources = [n for n in node.all_input_nodes if _is_real(n)]
        if name in _JOINED and any(self._is_one_number(source) for source in sources):
            return True
        if self._is_switched(node, name, sources):
            return True
        hollow = [source for source in sources if self._home(source) in self._hollow or source in self._uniform]
        if name in _BY_ELEMENT and name not in _SCALING:
            varying = [s for s in sources if any(self._varies(s, d) for d in range(-s.meta["val"].ndim, 0))]
            return bool(hollow) and all(source in hollow for source in varying)
        passing = name in _MOVED or name in _PLACED or name in _SCALING or name in _MIXED
        return bool(hollow) and (passing or node.target is operator.getitem)

    def _is_switched(self, node: fx.Node, name: str, sources: Sequence[fx.Node]) -> bool:
        """Whether slices may be one number throughout: switched off by a mask, or mixed from a few zeros alone."""
        if name in _MIXED:
            product = contracted_with(node)
            if product is None or _has_bias(node, name):
                return False
            factors = ((product[0], product[1]), (product[2], product[3]))
            return any(source in self._zeroed and source.meta["val"].shape[d] <= FEW for source, d in factors)
        if name in _SCALING:
            switches, switched = [n for n in node.all_input_nodes if n in self._zeroed], sources
        elif name in ("where", "masked_fill"):
            given = [a for a in node.args if isinstance(a, fx.Node)]
            switches, switched = [n for n in given if n.meta["val"].dtype is torch.bool], sources
            if len([s for s in switched if any(self._varies(s, d) for d in range(-s.meta["val"].ndim, 0))]) > 1:
                return False
        else:
            return False
        dims = range(-_widest(node.meta["val"]), 0)
        return any(not self._varies(s, d) and any(self._varies(o, d) for o in switched) for s in switches for d in dims)

    def _is_zeroed(self, node: fx.Node, val: object) -> bool:
        if isinstance(val, torch.Tensor) and (val.dtype is torch.bool or (node.op == "placeholder" and _is_whole(val))):
            return True
        name = _name(node)
        if name in _ZEROING:
            return True
        passing = name in AS_IT_WAS or name in _SCALING or node.target is operator.getitem
        return passing and any(source in self._zeroed for source in node.all_input_nodes)

    def _is_one_number(self, source: fx.Node) -> bool:
        same = self._uniform.get(source, NONE)
        return all(size == 1 or d in same for d, size in enumerate(source.meta["val"].shape))

    def _equal_in(self, sources: Sequence[fx.Node]) -> bool:
        return any(source in self.found for source in sources)

    def _by_element(self, node: fx.Node, name: str, sources: Sequence[fx.Node], every: Uniform) -> Uniform:
        if name in ("where", "masked_fill") and any(n in self._tells for n in node.all_input_nodes):
            return every
        if name in _SCALING and self._equal_in(sources):
            return every
        terms: Counter[fx.Node] = Counter()
        self._add_terms(node, 1, terms)
        if any(count == 0 for count in terms.values()) and all(n in self.found for n in terms if terms[n]):
            return every
        found = set()
        for d in every:
            varying = [s for s in sources if self._varies(s, d - len(every))]
            if varying and (
                all(d - len(every) + s.meta["val"].ndim in self.found.get(s, NONE) for s in varying)
                or (name in _LIMITS and len(varying) < len(node.all_input_nodes))
            ):
                found.add(d)
        return frozenset(found)

    def _add_terms(self, node: fx.Node, sign: int, terms: Counter[fx.Node], depth: int = 4) -> None:
        """Count what is added up in a sum: of ``x + (x.round() - x).detach()`` only the rounded x is left."""
        while node.op == "call_function" and _name(node) in _COPIED and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        given = [argument for argument in node.args if isinstance(argument, fx.Node)]
        sums = _name(node) in ("add", "sub") and len(given) == 2 and not node.kwargs and node not in self._written
        if sums and depth:
            self._add_terms(given[0], sign, terms, depth - 1)
            self._add_terms(given[1], sign if _name(node) == "add" else -sign, terms, depth - 1)
        else:
            terms[node] += sign

    def _varies(self, source: fx.Node, d: int) -> bool:
        """Whether an operand varies along a dimension, counted from the last."""
        val = source.meta["val"]
        return val.ndim >= -d and val.shape[d] > 1 and val.ndim + d not in self._uniform.get(source, NONE)

    def _is_telling(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.dtype.is_floating_point:
            return False
        if _name(node) in _COMPARISONS:
            return any(_is_real(source) for source in node.all_input_nodes)
        return any(source in self._tells for source in node.all_input_nodes)


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", "")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _repeated(x: torch.Tensor, out: object) -> Uniform:
    """The dimensions along which an expansion repeats a tensor."""
    assert isinstance(out, torch.Tensor)
    lead = out.ndim - x.ndim
    return frozenset(d for d, size in enumerate(out.shape) if d < lead or x.shape[d - lead] != size)


def _has_bias(node: fx.Node, name: str) -> bool:
    return name.startswith("add") or name == "baddbmm" or (len(node.args) > 2 and node.args[2] is not None)


def _is_real(node: fx.Node) -> bool:
    val = node.meta.get("val")
    val = val[0] if isinstance(val, (list, tuple)) and val else val
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())


def _is_whole(val: torch.Tensor) -> bool:
    return not (val.is_floating_point() or val.is_complex())


def _widest(val: object) -> int:
    if isinstance(val, (list, tuple)):
        return max((_widest(item) for item in val), default=0)
    return val.ndim if isinstance(val, torch.Tensor) else 0


def _looked_up(node: fx.Node, name: str, ndim: int) -> Uniform:
    """The dimensions of a lookup's result that the index runs over."""
    given: Any = node.args[1]
    if name == "embedding":
        return frozenset(range(given.meta["val"].ndim))
    if name in ("gather", "index_select"):
        return frozenset([given % max(ndim, 1)])
    indices = {d: i.meta["val"] for d, i in enumerate(given) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices.values()):
        return NONE
    first = min(indices) if max(indices) - min(indices) < len(indices) else 0
    return frozenset(range(first, min(ndim, first + max(i.ndim for i in indices.values()))))
