"""Hypothesis strategies: any expression at all, and tensors whose axes make sense together."""

from __future__ import annotations

import math

from hypothesis import assume
from hypothesis import strategies as st

from permgraph.errors import SpecError
from permgraph.spec import Group, PermutationSpec
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum, parse_axis, size_of

names = st.text(alphabet="abcxyz0189._-/#é", min_size=1, max_size=8).filter(
    lambda name: name != "." and not name.isdecimal()
)


def _inside(inner: st.SearchStrategy[Axis]) -> st.SearchStrategy[Axis]:
    several = st.lists(inner, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Product, several),
        st.builds(Sum, several),
        st.builds(Label, names, inner),
        st.builds(Family, names, st.lists(inner, min_size=1, max_size=3).map(tuple)),
    )


expressions = st.recursive(st.builds(Fixed, st.integers(0, 12)) | st.builds(Ref, names), _inside, max_leaves=8)
"""Any expression, whether or not it makes sense, in normal form or not."""

GROUPS = {
    group.name: group
    for group in [
        Group("a", 2),
        Group("b", 3),
        Group("c", 3),
        Group("h", 2),
        Group("d", 3, ("h",)),
        Group("e", 3, ("h",)),
        Group("k", 2),
        Group("q", 2, ("k",)),
        Group("r", 3, ("k", "q")),
        Group("u", 2),
        Group("v", 2),
        Group("w", 3, ("u", "v")),
        Group("f", 2, fixed=True),
        Group("z", 3, ("f",)),
    ]
}

# Each kit lists axes that need each other; taken together they make sense in any order and any nesting of products.
KITS = [
    ["a"],
    ["b"],
    ["(a b)", "b"],
    ["[a + b + 2]"],
    ["[b + 1 + b]", "b"],
    ["h", "d"],
    ["(h d)", "e"],
    ["(h d)", "(h d)"],
    ["[(h d) + 2 + (h e)]"],
    ["(h 2 d e)"],
    ["k", "q", "r"],
    ["(k q)", "(r 2)"],
    ["(k q r)", "(q k)"],
    ["u", "v", "w"],
    ["(u w)", "v"],
    ["f", "z"],
    ["(f z)"],
    ["s:[1 + 1]", "{b | c}@s"],
    ["s:[a + 1 + b]", "{b | c | 3}@s"],
    ["(s:[1 + 1 + 1] h {d | d | e}@s)"],
    ["(s:[2 + a] {[b + 1] | [1 + c]}@s)"],
    ["t:[1 + 1]", "{(h d) | (b a)}@t"],
    ["t:[h + 1]", "{d | b}@t"],
    ["(t:[1 + 1] s:[1 + 1] {{b | c}@s | 3}@t)"],
    ["{h | a}@t", "t:[1 + 1]", "{d | c}@t"],
    ["({a | k}@g b)", "g:[1 + 1]"],
]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[PermutationSpec, tuple[Axis, ...]]:
    """A spec, and the axes of a tensor in which its groups stand."""
    dims = [parse_axis(text) for kit in draw(st.lists(st.sampled_from(KITS), min_size=1, max_size=2)) for text in kit]
    dims = list(draw(st.permutations(dims)))
    for at in range(len(dims)):
        wrap = draw(st.sampled_from(["", "", "", "sum", "scale"]))
        if wrap == "sum":
            dims[at] = Sum((Fixed(1), dims[at]))
        elif wrap == "scale":
            dims[at] = Product((dims[at], Fixed(2)))
    while len(dims) > 1 and draw(st.integers(0, 3)) == 0:
        dims[:2] = [Product((dims[0], dims[1]))]
    axes = tuple(dims)
    assume(math.prod(size_of(axis, GROUPS) for axis in axes) <= 1500)
    try:
        spec = PermutationSpec(GROUPS, {"t": axes})
    except SpecError:
        # Two kits may use one group in ways that leave a parent ambiguous: refused, and tested elsewhere.
        assume(False)
        raise
    return spec, spec.axes["t"]
