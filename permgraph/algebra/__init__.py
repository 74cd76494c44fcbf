"""The axis algebra: what is known of a dimension, as a type that unification refines.

An axis is one of

- an *atom* of n indices that nothing distinguishes so far; pinned, with a reason, once something does;
- a *product*, the row-major flattening of its factors: ``(head channel)``, ``(C 7 7)``;
- a *sum*, the concatenation of its parts: what `cat`, `chunk` and slices make and see;
- a *family* over a sum: the axis is ``members[i]`` wherever the index into that sum lies in part i.

Unifying two axes says that every permutation of one must be made on the other. Atoms are union-find nodes, so a
refinement found at the last layer is seen at the first. Every operation is *monotone*: it only ever makes axes one,
cuts them or pins them. Hence the order of constraints does not matter to what a type comes to stand for.

**A family is an axis for each part of another axis.** Let S be a sum with parts P1 and P2, and D1 and D2 two axes of d
indices each. A tensor with dimensions (S, {D1 | D2}) has the index set P1 x D1 + P2 x D2: where the first index lies
in P1 the second is an index of D1, and is permuted as D1 is; where it lies in P2, as D2 is. A family by itself, in a
tensor that has no dimension S, would say nothing, for no index tells the member: it collapses, D1 and D2 becoming one
axis.

**From a view to a wreath product.** Attention of 4 heads of 5 channels, with query, key and value in one projection::

    qkv = linear(x).view(b, t, 3, 4, 5)          # 60 = (3 4 5)
    q, k, v = qkv.unbind(2)                      # each (b, t, 4, 5)

The view writes the atom of 60 as a product of three atoms. Taking index 0 of the 3 cuts that atom into [1 + 1 + 1],
and q's heads and channels are what the atoms of 4 and 5 are at part 0; but these were made when nothing was known of
the cut. So the run ends with one axis of 5 for all three, and with the knowledge that the factor known as "the first
that node 2 makes of 60" is cut at 1 and 2 (`Factors.cuts_seen`). The next run makes it as s = [1 + 1 + 1] from the
start, and beside it the families {h0 | h1 | h2} over s and {d0 | d1 | d2} over s. `unbind` now restricts them: q is
(b, t, h0, d0), k is (b, t, h1, d1), v is (b, t, h2, d2). The scores q k^T make h0 one with h1, and d0 with d1; the
product with v makes h0 one with h2. What the projection's weight has in the end is ``(s {h | h | h} {d0 | d0 | d2})``,
the first family being h by its normal form: as a sum, ``[(h d0) + (h d0) + (h d2)]``. That d0 and d2 may be permuted
differently at each of the 4 indices of h is not said by types; `permgraph.inference.fibres` reads it off the
constraints, and the group is 4! (5!)^4 (5!)^4."""

from permgraph.algebra.axis import Axis, FactorKey, Index, Kind, Pinned, TooIntricateError, show
from permgraph.algebra.factors import Cuts
from permgraph.algebra.store import Axes

__all__ = ["Axes", "Axis", "Cuts", "FactorKey", "Index", "Kind", "Pinned", "TooIntricateError", "show"]
