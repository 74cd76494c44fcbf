"""Which axes may be permuted differently at each index of which others.

Axis d may depend on axis h exactly when every tensor that has d has h too, and every operator pairs them alike. The
solver's ledger holds what is needed: each link lists its tensors by label (those inside an operator included), so the
question is answered link by link:

- in a tensor, an occurrence of d goes with the h that is a factor of the same product, or else the only h in another
  dimension; where there are several, none;
- in a link, all tensors that bear d's label must bear the label of the h that d goes with. Values that number d, and
  that the operator only moves, have a label too, as one more dimension of the index has.

Example: attention with q and k of shape (b, h, s, d). The scores are a link

    (q, "b h s d"), (k, "b h t d"), (scores, "b h s t")

Both tensors with d have h, and under the same label. So at each head the channels may be permuted in another way, and
the group of d is fibred over h: h! (d!)^h. In a matrix of all heads against all,

    (q, "b h s d"), (k, "b g s d"), (out, "b h g")

the labels h and g stand for one axis, and both tensors with d have that axis; but q's channels go with the label h and
k's with g. Head 0 of q meets every head of k, so that one permutation of d serves all: h! d!.

What was looked up by an index still has the axis that was looked up: row t of ``w[index]`` is row ``index[t]`` of w, so
the expert whose hidden units a routed token has follows from the token. Dimensions that the index runs over stand for
the axis that its values number, as long as what was looked up by one index does not meet what another looked up.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from permgraph.algebra import Axis, Index, Kind
from permgraph.inference.solution import Solution
from permgraph.rules.ledger import Labelled, Rearrangement, Relation
from permgraph.rules.typed_tensor import VALUE, TypedTensor

Choice = Mapping[Index, int]  # the part that was taken of each sum on the way to an occurrence
IndexSource = frozenset[str]  # the labels that together tell which index of a parent an occurrence stands at
SAME_PRODUCT: IndexSource = frozenset()  # a factor of the same product tells
CARRIED = "carried values"  # the label of values that an operator moves about, but does not look up by


@dataclass(frozen=True)
class Fibres:
    """Which axes are permuted differently at each index of which others.

    Attributes:
        moving: the unpinned atoms of parameters that are read, in the order in which they are met.
        parents: for each of them that has any, the atoms (pinned ones among them) over which it is fibred, outermost
            first.
        mutual: pairs of which each might depend on the other; `parents` has one of the two ways.
    """

    moving: tuple[Axis, ...]
    parents: Mapping[Axis, tuple[Axis, ...]]
    mutual: Set[tuple[Axis, Axis]]


def find_fibres(solution: Solution) -> Fibres:
    """The stage between types and their description: what may depend on what."""
    found: dict[Axis, None] = {}
    for name in solution.order:
        for axis in solution.parameters[name].dims:
            found.update(dict.fromkeys(a for a in solution.axes.atoms(axis) if a.pinned is None))
    dependence = _Dependence(solution)
    parents = dependence.parents(list(found))
    return Fibres(tuple(found), parents, dependence.mutual)


class _Dependence:
    """Decides the parents of axes over a solution."""

    def __init__(self, solution: Solution) -> None:
        self.axes = solution.axes
        self._known_atoms: dict[Axis, tuple[Axis, ...]] = {}
        self._relations: dict[Axis, list[Relation]] = defaultdict(list)
        ledger = solution.ledger()
        self._links = [_prepared(relation) for relation in ledger.relations]
        for relation in self._links:
            axes = (axis for labelled in relation.tensors for axis in labelled.axes.values())
            for atom in dict.fromkeys(atom for axis in axes for atom in self._atoms(axis)):
                self._relations[atom].append(relation)
        self._lookups = self._find_lookups()
        self.mutual: set[tuple[Axis, Axis]] = set()  # pairs of which each may depend on the other, both ways round
        self._tensors: dict[Axis, list[tuple[TypedTensor, frozenset[Axis]]]] = defaultdict(list)
        self._rank: dict[Axis, int] = {}  # in the order in which atoms are met, so that results do not depend on chance
        self._written = {id(tensor) for tensor in solution.parameters.values()}
        observed = self._observed(solution)
        for tensor in solution.tensors():
            seen = self._all_atoms(tensor)
            atoms = self._with_lookups(frozenset(seen))
            for atom in seen:
                self._rank.setdefault(atom, len(self._rank))
                if 0 not in tensor.shape or id(tensor) in self._written or atom not in observed:
                    self._tensors[atom].append((tensor, atoms))
        self._rearranged = {id(t) for moved in ledger.rearrangements for t in moved.tensors}
        self._rearrangements: dict[Axis, list[Rearrangement]] = defaultdict(list)
        for moved in ledger.rearrangements if self._lookups else ():
            for atom in dict.fromkeys(atom for tensor in moved.tensors for atom in self._all_atoms(tensor)):
                self._rearrangements[atom].append(moved)

    def _observed(self, solution: Solution) -> set[Axis]:
        """The atoms that some operator met in tensors with elements, others than one that moves elements about.

        Of all others, such as the hidden units of an expert to which no token went, tensors without elements are all
        that tells what they depend on.
        """
        found: set[Axis] = set()
        for relation in self._links:
            if solution.facts.operators.of(solution.nodes[relation.node]).acts == "moved":
                continue
            seen = Counter(
                atom
                for labelled in relation.tensors
                for atom in {a for axis in labelled.axes.values() for a in self._atoms(axis)}
            )
            found.update(atom for atom, count in seen.items() if count > 1)
        return found

    def _atoms(self, axis: Axis) -> tuple[Axis, ...]:
        """The atoms in an axis, looked up once: nothing is refined any more."""
        axis = self.axes.resolve(axis)
        if axis not in self._known_atoms:
            self._known_atoms[axis] = tuple(self.axes.atoms(axis))
        return self._known_atoms[axis]

    def parents(self, moving: Sequence[Axis]) -> dict[Axis, tuple[Axis, ...]]:
        """For each atom in `moving`, the atoms (pinned ones among them) over which it is fibred, outermost first."""
        found = {d: [h for h in self._candidates(d) if self._is_fibred_over(d, h)] for d in moving}
        found = {d: parents for d, parents in found.items() if parents}
        self.mutual = {(d, h) for d, parents in found.items() for h in parents if d in found.get(h, ())}
        self._break_cycles(found)
        self._close(found)
        return {d: tuple(sorted(p, key=lambda h: len(found.get(h, ())))) for d, p in found.items() if p}

    # -- lookups -------------------------------------------------------------------------------------------------------

    def _find_lookups(self) -> dict[Axis, dict[frozenset[Axis], set[TypedTensor]]]:
        """For each axis that is looked up, the axes that indices run over, and those indices."""
        found: dict[Axis, dict[frozenset[Axis], set[TypedTensor]]] = defaultdict(lambda: defaultdict(set))
        for relation in self._links:
            for labelled in relation.tensors:
                value = self._value_label(labelled)
                if value is None or labelled.tensor is None:
                    continue
                over = Counter(a for label, t in labelled.axes.items() if label != value for a in self._atoms(t))
                for axis in self._numbered(labelled.axes[value]):
                    if over and max(over.values()) == 1 and axis not in over:
                        found[axis][frozenset(over)].add(labelled.tensor.origin)
        return found

    def _numbered(self, value: Axis) -> Sequence[Axis]:
        """The atoms whose indices an index gives: of the axis of its values, or of each factor of that."""
        factors = self.axes.factors(value)
        plain = all(factor.kind is Kind.ATOM for factor in factors) and len(set(factors)) == len(factors)
        return factors if plain else []

    @staticmethod
    def _value_label(labelled: Labelled) -> str | None:
        return next((label for label, d in labelled.where.items() if d == VALUE and label != CARRIED), None)

    def _with_lookups(self, atoms: frozenset[Axis]) -> frozenset[Axis]:
        """These atoms, and those that they stand for."""
        hidden = [axis for axis, ways in self._lookups.items() if any(over <= atoms for over in ways)]
        return atoms | frozenset(hidden) if hidden else atoms

    # -- candidates ----------------------------------------------------------------------------------------------------

    def _candidates(self, d: Axis) -> list[Axis]:
        """The axes that every tensor with d has."""
        common: set[Axis] | None = None
        for _, atoms in self._tensors[d]:
            common = set(atoms) if common is None else common & atoms
            if len(common) == 1:
                return []
        for relation in self._relations[d]:
            for labelled in relation.tensors:
                seen = frozenset(a for axis in labelled.axes.values() for a in self._atoms(axis))
                if d in seen:
                    atoms = self._with_lookups(seen)
                    common = set(atoms) if common is None else common & atoms
        return [] if common is None else sorted(common - {d}, key=self._rank.__getitem__)

    # -- the test ------------------------------------------------------------------------------------------------------

    def _is_fibred_over(self, d: Axis, h: Axis) -> bool:
        for tensor, _ in self._tensors[d]:
            if self._bound_in_tensor(tensor, d, h, strict=id(tensor) in self._written) is None:
                return False
            if id(tensor) in self._rearranged and self._count(tensor.dims, h, {})[1] > 1:
                return False
        return all(self._coherent(relation, d, h) for relation in self._relations[d]) and self._has_one_index_each(d, h)

    def _has_one_index_each(self, d: Axis, h: Axis) -> bool:
        """Whether all tensors that have d, and h through a lookup, are known to have it through one and the same index.

        Two indices may run over the same axis, as those of the first and the second expert of each token: what was
        looked up by one says nothing of what was looked up by the other. So tensors that an operator pairs must come
        from one index; and none may be part of one for which an index runs over other axes, as where rows are shifted.
        """
        lookups = self._lookups.get(h)
        if not lookups:
            return True
        import networkx as nx  # half a second that models without lookups should not take

        paired = nx.Graph()
        over: dict[TypedTensor, list[frozenset[Axis]] | None] = {}  # None: it has h itself
        for tensors, indices in self._pairings(d, h):
            for tensor in tensors:
                atoms = self._atoms_of(tensor)
                over[tensor] = None if self._has(tensor, d, h) else [run for run in lookups if run <= atoms]
            runs = [over[tensor] for tensor in tensors]
            if any(run == [] or run != runs[0] for run in runs):
                return False
            if runs and runs[0]:
                nx.add_path(paired, [*tensors, *indices])
        for component in nx.connected_components(paired):
            followers = [tensor for tensor in component if over.get(tensor)]
            possible = set[TypedTensor]().union(*(lookups[run] for run in over[followers[0]] or ()))
            known = component.difference(followers) or possible
            if len(known) != 1 or not known <= possible:
                return False
        return True

    def _pairings(self, d: Axis, h: Axis) -> Iterator[tuple[list[TypedTensor], list[TypedTensor]]]:
        """The tensors with d that each operator pairs, and the indices into h by which it looks up.

        Of an operator that is a link those with h itself are left out: it may look up in one of them.
        """
        for relation in self._relations[d]:
            tensors, indices = [], []
            for labelled in relation.tensors:
                value = self._value_label(labelled)
                if labelled.tensor is None:
                    continue
                if any(d in self._atoms(axis) for axis in labelled.axes.values()):
                    tensors += [labelled.tensor] if not self._has(labelled.tensor, d, h) else []
                if value is not None and h in self._numbered(labelled.axes[value]):
                    indices.append(labelled.tensor.origin)
            yield tensors, indices
        for moved in self._rearrangements[d]:
            yield [tensor for tensor in moved.tensors if d in self._all_atoms(tensor)], []

    def _has(self, tensor: TypedTensor, d: Axis, h: Axis) -> bool:
        """Whether h itself stands in a tensor with d, so that no lookup is needed.

        Values that number (h d) tell both, as a dimension (h d) of their one-hot code does. Where d is a dimension and
        the values number h they do not: that code has a single one along h, at which nothing along d may differ.
        """
        atoms = self._atoms_of(tensor)
        return h in atoms or (tensor.value is not None and d not in atoms and {d, h} <= {*self._numbered(tensor.value)})

    def _all_atoms(self, tensor: TypedTensor) -> dict[Axis, None]:
        """The atoms of a tensor's dimensions, and of what its values number."""
        axes = [*tensor.dims, tensor.value] if tensor.value is not None else tensor.dims
        return dict.fromkeys(atom for axis in axes for atom in self._atoms(axis))

    def _atoms_of(self, tensor: TypedTensor) -> set[Axis]:
        return {atom for axis in tensor.dims for atom in self._atoms(axis)}

    def _bound_in_tensor(self, tensor: TypedTensor, d: Axis, h: Axis, strict: bool) -> list[IndexSource] | None:
        named = {str(i): axis for i, axis in enumerate(tensor.dims)}
        where = {str(i): i for i in range(tensor.ndim)}
        if tensor.value is not None:
            named["value"], where["value"] = tensor.value, VALUE
        return self._bindings(named, where, d, h, strict=strict)

    def _coherent(self, relation: Relation, d: Axis, h: Axis) -> bool:
        bound_by: dict[str, set[IndexSource]] = defaultdict(set)
        for labelled in relation.tensors:
            for label, axis in labelled.axes.items():
                if d in self._atoms(axis):
                    bound = self._bindings(self._with_unlabelled(labelled), labelled.where, d, h, only=label)
                    if bound is None:
                        return False
                    bound_by[label].update(bound)
        same = self._index_labels(relation, h)
        for label, sources in bound_by.items():
            if len(sources) != 1 and not sources <= same:
                return False
            allowed = same if sources <= same else sources
            if SAME_PRODUCT not in sources:
                for labelled in relation.tensors:
                    if label in labelled.axes and not any(source <= labelled.axes.keys() for source in allowed):
                        return False
        return True

    def _index_labels(self, relation: Relation, h: Axis) -> set[IndexSource]:
        """The labels that mean h in a lookup: that of its own dimension, and those over which the index runs."""
        for labelled in relation.tensors:
            value = self._value_label(labelled)
            if value is not None and len(labelled.axes) > 1 and h in self._numbered(labelled.axes[value]):
                over = labelled.axes.keys() - {value}
                runs_over_itself = any(h in self._atoms(labelled.axes[label]) for label in over)  # and means another h,
                counts = labelled.tensor is not None and labelled.tensor.origin.counts  # unless its values count
                if counts or not runs_over_itself:
                    return {frozenset({value}), frozenset(over)}
        return set()

    def _with_unlabelled(self, labelled: Labelled) -> Mapping[str, Axis]:
        if labelled.tensor is None:
            return labelled.axes
        missing = set(range(labelled.tensor.ndim)) - set(labelled.where.values())
        return {**labelled.axes, **{f"_{d}": labelled.tensor.dims[d] for d in missing}}

    def _bindings(
        self,
        named: Mapping[str, Axis],
        where: Mapping[str, int],
        d: Axis,
        h: Axis,
        only: str | None = None,
        strict: bool = False,
    ) -> list[IndexSource] | None:
        """For each occurrence of d (under the label `only`, if given) the labels that bear the h it goes with, or None.

        If `strict`, as the spec's expressions can say it: with an h that is there as such, and at one place, not at
        another in each part of a sum.
        """
        found: list[IndexSource] = []
        for label, axis in named.items():
            if only is not None and label != only:
                continue
            for choice, siblings in self._occurrences(axis, d):
                low, high = self._count(siblings, h, choice, strict)
                if high:
                    if (low, high) != (1, 1):
                        return None
                    found.append(SAME_PRODUCT)
                    continue
                sources = {m: self._count([other], h, choice, strict) for m, other in named.items() if m != label}
                sources = {m: count for m, count in sources.items() if count[1]}
                near = {m: c for m, c in sources.items() if where.get(m, m) == where.get(label, label)}
                chosen = near or sources
                if not chosen and not strict:
                    looked_up = self._via_lookup(named, label, siblings, h, choice)
                    if len(looked_up) != 1:
                        return None
                    found.extend(looked_up)
                elif len(chosen) != 1 or next(iter(chosen.values())) != (1, 1):
                    return None
                else:
                    found.append(frozenset(chosen))
        return found

    def _via_lookup(
        self, named: Mapping[str, Axis], label: str, siblings: Sequence[Axis], h: Axis, choice: Choice
    ) -> set[IndexSource]:
        """The labels whose axes are those that an index into h runs over; each way in which they are."""
        found = set()
        for over in self._lookups.get(h, {}):
            bearing = []
            for atom in over:
                counts = {"": self._count(siblings, atom, choice)}
                if not counts[""][1]:
                    counts = {m: self._count([axis], atom, choice) for m, axis in named.items() if m != label}
                bearing.append({m: count for m, count in counts.items() if count[1]})
            if all(list(labels.values()) == [(1, 1)] for labels in bearing):
                found.add(frozenset(m for labels in bearing for m in labels if m))
        return found

    def _occurrences(self, axis: Axis, d: Axis) -> Iterator[tuple[Choice, list[Axis]]]:
        """Each place of d in an axis: the parts chosen on the way to it, and the other factors of its products."""
        axis = self.axes.resolve(axis)
        if axis is d:
            yield {}, []
        elif axis.kind is Kind.PRODUCT:
            factors = self.axes.factors(axis)
            for i, factor in enumerate(factors):
                for choice, siblings in self._occurrences(factor, d):
                    yield choice, [*siblings, *factors[:i], *factors[i + 1 :]]
        elif axis.kind is not Kind.ATOM:
            assert axis.index is not None
            for i, child in enumerate(axis.children):
                for choice, siblings in self._occurrences(child, d):
                    yield {axis.index.find(): i, **choice}, siblings

    def _count(self, axes: Sequence[Axis], h: Axis, choice: Choice, strict: bool = False) -> tuple[int, int]:
        """The fewest and the most times that h stands in a product of these axes, over the parts not yet chosen.

        If `strict`, once in each of several parts is not once: it is at several places.
        """
        low = high = 0
        for axis in axes:
            axis = self.axes.resolve(axis)
            if axis is h:
                low, high = low + 1, high + 1
            elif axis.kind is Kind.PRODUCT:
                a, b = self._count(axis.children, h, choice, strict)
                low, high = low + a, high + b
            elif axis.kind is not Kind.ATOM:
                assert axis.index is not None
                part = choice.get(axis.index.find())
                chosen = axis.children if part is None else axis.children[part : part + 1]
                counts = [self._count([child], h, choice, strict) for child in chosen]
                low += 0 if strict and len(counts) > 1 else min(a for a, _ in counts)
                high += max(b for _, b in counts)
        return low, high

    # -- making it an order --------------------------------------------------------------------------------------------

    @staticmethod
    def _break_cycles(found: dict[Axis, list[Axis]]) -> None:
        """Of two axes that may each depend on the other keep the direction with the larger group."""
        for d in list(found):
            for h in list(found[d]):
                if h.pinned is None and d in found.get(h, ()) and h in found[d]:
                    under_h = math.lgamma(h.size + 1) + h.size * math.lgamma(d.size + 1)
                    under_d = math.lgamma(d.size + 1) + d.size * math.lgamma(h.size + 1)
                    if under_h >= under_d:
                        found[h].remove(d)
                    else:
                        found[d].remove(h)

    @staticmethod
    def _close(found: dict[Axis, list[Axis]]) -> None:
        """Drop parents whose own parents are not parents too: the result would not be closed under composition."""
        changed = True
        while changed:
            changed = False
            for d, parents in found.items():
                for h in list(parents):
                    if d in found.get(h, ()) or any(p not in parents for p in found.get(h, ())):
                        parents.remove(h)
                        changed = True


def _prepared(relation: Relation) -> Relation:
    """What a link says of the tensors that have elements (one without any tells nothing of its axes) and of values."""
    return replace(relation, tensors=tuple(_with_carried(t) for t in relation.tensors if not _is_empty(t)))


def _with_carried(labelled: Labelled) -> Labelled:
    """What a link says of a tensor; of an index by which it does not look up, that the values go along."""
    if labelled.tensor is None or labelled.tensor.value is None or VALUE in labelled.where.values():
        return labelled
    axes = {**labelled.axes, CARRIED: labelled.tensor.value}
    return replace(labelled, axes=axes, where={**labelled.where, CARRIED: VALUE})


def _is_empty(labelled: Labelled) -> bool:
    shape = (axis.size for axis in labelled.axes.values()) if labelled.tensor is None else labelled.tensor.shape
    return 0 in shape
