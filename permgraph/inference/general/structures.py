"""The stage that finds more than permutations: the structure of each group of a spec, and how it acts where it stands.

It comes after all others, over types that are at rest. Each atom of the types is one axis that is permuted alike
wherever it stands; every operator says which matrices on it pass (`permgraph.inference.general.acts`), and what is left
in the end is the group. All of these groups hold every permutation, so that nothing of the spec changes but what is
added.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from permgraph.algebra import Axis
from permgraph.inference.describe import Writer
from permgraph.inference.fibres import Fibres
from permgraph.inference.general.acts import Speaker
from permgraph.inference.general.equations import beyond, independent
from permgraph.inference.general.gains import Gains
from permgraph.inference.general.leaves import Leaves, UnreadableError
from permgraph.inference.general.nulls import null_directions
from permgraph.inference.general.patterns import Patterns
from permgraph.inference.general.statements import ORTHOGONAL, Statements
from permgraph.inference.general.turns import TURN
from permgraph.inference.solution import Solution, is_weight
from permgraph.rules.registry import properties_of
from permgraph.rules.typed_tensor import TypedTensor
from permgraph.spec.binding import Group, Layout, coordinates
from permgraph.spec.general import Action, Gain, General
from permgraph.spec.spec import PermutationSpec
from permgraph.structures import LINEAR, Structure, meet
from permgraph.structures.structure import PAIRED

Place = tuple[str, int, int]
"""A parameter, the number of an occurrence in it, and an unknown there."""

Solved = tuple[Structure, list[Action], str]

FIBRED = "other groups are fibred over it, and what acts on it beside them is a factor for each index"
JOINED = "it is one axis that a view splits, on whose parts something else acts"


def with_structures(spec: PermutationSpec, solution: Solution, fibres: Fibres) -> PermutationSpec:
    """The same spec with the structure of each group, and how it acts on each parameter."""
    writer = Writer(solution, fibres)
    parents = {parent for group in spec.groups.values() for parent in group.parents}
    movable, atoms_of = _movable(spec, writer)
    gains = Gains(solution)
    said = statements(solution, frozenset(movable), gains)
    turned = turned_atoms(solution)
    for tensor in writer.parameters.values():
        if tensor.use_of is not None:
            _link_use(tensor, tensor.use_of, said)
    occurrences = {name: list(_unknowns(spec, name, writer.parameters[name], said, movable)) for name in spec.axes}
    by_atom: dict[Axis, list[Place]] = defaultdict(list)
    for name, found in occurrences.items():
        for number, unknowns in enumerate(found):
            first: dict[Axis, int] = {}
            for x in unknowns:
                atom = said.leaves.atoms[x]
                if atom in first:
                    said.same(first[atom], x, f"{name} holds it as one axis")
                else:
                    first[atom] = x
                    by_atom[atom].append((name, number, x))
    actions = {name: [Action()] * len(found) for name, found in occurrences.items()}
    groups = dict(spec.groups)
    reasons: dict[str, str] = {}
    for name in sorted(atoms_of, key=lambda name: name in parents):  # what a parent has beside its children comes last
        solved = [_solve(atom, by_atom[atom], said, atom in turned, name in parents) for atom in atoms_of[name]]
        structure, of_places, why = solved[0] if len(solved) == 1 else _joined(solved)
        places = [place[:2] for place in by_atom[atoms_of[name][0]]]
        if any([place[:2] for place in by_atom[atom]] != places for atom in atoms_of[name]):
            structure, of_places, why = Structure(), [Action()] * len(places), JOINED
        if name in parents and not structure.is_plain:
            below = [child for child, group in groups.items() if name in group.parents]
            present = {name: _present(spec, writer.parameters[name], name, said) for name in dict(places)}
            structure, of_places = _beside(structure, places, of_places, below, groups, actions, present)
        groups[name] = replace(groups[name], structure=structure)
        for (parameter, number), action in zip(places, of_places, strict=True):
            actions[parameter][number] = action
        if why:
            reasons[name] = why
    of_pairs = {writer.names[own] for atom in turned if (own := writer.fused.get(atom, atom)) in writer.names}
    told = {name: tuple(found) for name, found in actions.items() if any(action != Action() for action in found)}
    paired = {name for name in of_pairs if groups[name].structure.is_paired}
    groups |= {name: replace(groups[name], fixed=True) for name in paired}
    stay = _gains_that_stay(told, by_atom.values(), said, solution, gains)
    general = General(told, reasons, null_directions(solution), gains_that_stay=stay)
    whole = replace(spec, groups=groups, general=general).without(of_pairs - paired)
    return whole.rename(_names_of_pairs(whole, of_pairs))


def _movable(spec: PermutationSpec, writer: Writer) -> tuple[dict[Axis, str], dict[str, list[Axis]]]:
    """The atoms on which something may act, each with its group; and for each group its atoms, in order.

    They are several where a view splits the axis of one group.
    """
    names = {atom: name for atom, name in writer.names.items() if name in spec.moving}
    wholes = set(writer.fused.values())
    movable = {atom: name for atom, name in names.items() if atom not in wholes}
    movable |= {part: names[whole] for part, whole in writer.fused.items() if whole in names}
    atoms_of: dict[str, list[Axis]] = defaultdict(list)
    for atom, name in movable.items():
        atoms_of[name].append(atom)
    return movable, atoms_of


def turned_atoms(solution: Solution) -> set[Axis]:
    """The atoms of axes whose pairs of indices are turned: no permutation of them is a symmetry."""
    return {
        atom
        for call in solution.calls
        if TURN in call.node.meta
        for tensor in (*call.tensors, *call.results)
        for atom in solution.axes.atoms(tensor.dims[-1])
    }


def _names_of_pairs(spec: PermutationSpec, turned: Set[str]) -> dict[str, str]:
    """Names that leave those of all other groups as they are where nothing acts on what is turned."""
    modules = {name.partition("#")[0] for name in turned}
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in spec.groups:
        by_module[name.partition("#")[0]].append(name)
    names = {}
    for module, all_of_it in by_module.items():
        if module not in modules:
            continue
        numbered = sorted(all_of_it, key=lambda name: int(name.partition("#")[2] or 0))
        paired = [name for name in numbered if spec.groups[name].structure.is_paired]
        others = [name for name in numbered if name not in paired]
        for at, name in enumerate(others):
            names[name] = module if len(others) == 1 else f"{module}#{at}"
        for at, name in enumerate(paired):
            names[name] = f"{module}#pairs" + (f"{at}" if len(paired) > 1 else "")
    return names


def statements(solution: Solution, movable: frozenset[Axis], gains: Gains) -> Statements:
    """All that the operators of a graph say of the structure of these atoms."""
    said = Statements(Leaves(solution.axes, movable))
    speaker = Speaker(said, solution.facts, gains, Patterns(solution))
    for call in solution.calls:
        for tensor in call.tensors:
            if tensor.use_of is not None:
                _link_use(tensor, tensor.use_of, said)
        speaker.speak(call, properties_of(str(call.node.target)))
    return said


def _link_use(used: TypedTensor, source: TypedTensor, said: Statements) -> None:
    """One use of a tensor that does not vary along some dimensions is that tensor; along them nothing acts."""
    why = f"{source.name}, which does not vary along it"
    if used.ndim != source.ndim:
        said.keep_plain(said.leaves.movable_in(used), f"{source.name}, whose values number it")
        return
    try:
        # Along what does not vary, the one may be cut where the other is not.
        for index in dict.fromkeys((*said.leaves.elements(source), *said.leaves.elements(used))):
            ours, its = said.leaves.at(used, index), said.leaves.at(source, index)
            for dim in used.uniform:
                said.still((*ours.get(dim, ()), *its.get(dim, ())), why)
            for dim in ours.keys() | its.keys():
                if dim not in used.uniform:
                    for x, y in zip(its[dim], ours[dim], strict=True):
                        said.same(x, y, why)
    except UnreadableError:
        said.keep_plain(said.leaves.movable_in(used, source), f"{source.name} has too many parts")


def _unknowns(
    spec: PermutationSpec, name: str, tensor: TypedTensor, said: Statements, movable: Mapping[Axis, str]
) -> Iterator[list[int]]:
    """For each occurrence in a parameter the unknowns at its leaves."""
    layout = spec.layout(spec.axes[name])
    found: list[dict[int, None]] = [{} for _ in layout.occurrences]
    if said.leaves.concerns(tensor) and name not in spec.unused:
        try:
            there = _Places(spec, layout)
            parts = Counter(movable.values())
            for index in said.leaves.elements(tensor):
                unknowns = said.leaves.at(tensor, index)
                numbers = there.at(index, frozenset(parts))
                for dim in range(tensor.ndim):
                    own = unknowns.get(dim, ())
                    names = [movable[said.leaves.atoms[x]] for x in own]
                    each = [n for n in numbers.get(dim, ()) for _ in range(parts[layout.occurrences[n].group])]
                    if names != [layout.occurrences[n].group for n in each]:
                        raise UnreadableError
                    for n, x in zip(each, own, strict=True):
                        found[n][x] = None
        except UnreadableError:
            said.keep_plain(said.leaves.movable_in(tensor), f"{name}, which has too many parts")
    return (list(unknowns) for unknowns in found)


def _present(spec: PermutationSpec, tensor: TypedTensor, name: str, said: Statements) -> list[list[tuple[int, str]]]:
    """The occurrences at each representative element of a parameter, with their groups."""
    layout = spec.layout(spec.axes[name])
    there, every = _Places(spec, layout), frozenset(spec.groups)
    numbers = (there.at(index, every) for index in said.leaves.elements(tensor))
    return [[(n, layout.occurrences[n].group) for several in found.values() for n in several] for found in numbers]


class _Places:
    """Which occurrences of a parameter are there at one element of it."""

    def __init__(self, spec: PermutationSpec, layout: Layout) -> None:
        self.layout = layout
        self._along = {
            (dim, path, part): coordinates(layout.axes[dim], (*path, part), spec.groups)
            for occurrence in layout.occurrences
            for dim, path, part in occurrence.guards
        }

    def at(self, index: Sequence[int], groups: frozenset[str]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for number, occurrence in enumerate(self.layout.occurrences):
            if occurrence.group in groups and all(self._along[g][index[g[0]]] >= 0 for g in occurrence.guards):
                found[occurrence.dim].append(number)
        return found


def _solve(atom: Axis, places: Sequence[Place], said: Statements, turned: bool, fibred_over: bool) -> Solved:
    """The structure of one atom, its action at each place, and what kept it from being larger.

    On one over which others are fibred no matrix acts, which would mix the members that these have of their own.
    """
    unknowns = [x for _, _, x in places]
    still = [Action()] * len(places)
    if atom in said.plain:
        return Structure(), still, said.plain[atom]
    linear, why = (None, FIBRED) if fibred_over else _matrices(atom, places, said)
    if linear is not None:
        return Structure(linear[0]), linear[1], why
    scales = said.scales.solutions(unknowns)
    signs = said.signs.solutions(unknowns)
    if turned:
        return *_of_pairs(atom, scales, signs, said, len(places)), why
    # A sign that each index has of its own is one that all may have in common, too.
    flips = beyond(said.flips.solutions(unknowns), signs)
    structure = Structure("", len(scales), len(signs), len(flips))
    return structure, _factors(scales, [*signs, *flips], len(places)), why


def _factors(scales: Sequence[Sequence[int]], signs: Sequence[Sequence[int]], number: int) -> list[Action]:
    """The action at each of so many places of factors with these exponents at them."""

    def at(rows: Sequence[Sequence[int]], i: int) -> tuple[int, ...]:
        return tuple(row[i] for row in rows) if any(row[i] for row in rows) else ()

    return [Action(at(scales, i), at(signs, i)) for i in range(number)]


def _joined(solved: Sequence[Solved]) -> Solved:
    """The structure of a group whose axis a view splits, from those of its parts.

    All permutations of the whole pass, and so does what they generate with what acts on one part, alike at all indices
    of the others: of invertible or orthogonal matrices, or of factors, those of the whole. For to swap two indices of
    the whole that differ in that part alone changes what acts on it there, and nowhere else.
    """
    structure, of_places, why = solved[0]
    if any(other[:2] != solved[0][:2] for other in solved) or structure.linear not in ("", "GL", "O"):
        return Structure(), [Action()] * len(of_places), JOINED
    return structure, of_places, why


def _beside(
    structure: Structure,
    places: Sequence[tuple[str, int]],
    of_places: Sequence[Action],
    below: Sequence[str],
    groups: Mapping[str, Group],
    actions: Mapping[str, Sequence[Action]],
    present: Mapping[str, Sequence[Sequence[tuple[int, str]]]],
) -> tuple[Structure, list[Action]]:
    """Of the factors of a group over which others are fibred those that these have not already, at each of its indices.

    Args:
        structure, places, of_places: what was found of the group, where it stands, and how it acts there.
        below: the groups that are fibred over it.
        groups, actions: those of the spec, as far as they are known.
        present: for each parameter the occurrences at each of its representative elements, with their groups.
    """

    def effect(exponents: Mapping[tuple[str, int], int]) -> list[int]:
        """What a factor does to each representative element: its exponents there added up."""
        return [
            sum(exponents.get((name, number), 0) for number, _ in element)
            for name in dict(places)
            for element in present[name]
        ]

    def common(odd: bool) -> Iterator[list[int]]:
        """What the groups below can do to all of their indices alike."""
        for group in below:
            own = groups[group].structure
            there = [
                (n, i)
                for n, each in present.items()
                for i in dict.fromkeys(i for e in each for i, g in e if g == group)
            ]
            if own.linear and (odd or own.linear not in ("O", "O1")):
                yield effect({(n, i): sum(actions[n][i].powers) for n, i in there})
            for row in range(0 if own.linear else own.signs + own.flips if odd else own.scales):
                yield effect({(n, i): _exponent(actions[n][i], row, odd) for n, i in there})

    kept: list[list[list[int]]] = []
    for odd, first, count in (
        (False, 0, structure.scales),
        (True, 0, structure.signs),
        (True, structure.signs, structure.flips),
    ):
        known = [*common(odd), *(effect(dict(zip(places, row, strict=True))) for row in (kept[1] if first else ()))]
        kept.append([])
        for number in range(first, first + count):
            row = [_exponent(action, number, odd) for action in of_places]
            if independent(effect(dict(zip(places, row, strict=True))), known, odd):
                known.append(effect(dict(zip(places, row, strict=True))))
                kept[-1].append(row)
    return Structure("", *map(len, kept)), _factors(kept[0], [*kept[1], *kept[2]], len(places))


def _exponent(action: Action, number: int, odd: bool) -> int:
    exponents = action.signs if odd else action.powers
    return exponents[number] if exponents else 0


def _of_pairs(
    atom: Axis, scales: Sequence[Sequence[int]], signs: Sequence[Sequence[int]], said: Statements, number: int
) -> tuple[Structure, list[Action]]:
    """A factor for each pair of an axis whose pairs are turned, such as between the gains of queries and of keys."""
    kinds = {within for within, _ in said.at_most.get(atom, {}) if within in PAIRED}
    for powers in scales:
        # Of either sign: so the signs must be among what passes, too.
        signed = not beyond([[power % 2 for power in powers]], signs)
        if len(kinds) == 1 and signed and set(powers) <= {-1, 0, 1}:
            structure = Structure(meet(kinds.pop(), "M"))
            return structure, [Action((power,)) if power else Action() for power in powers]
    return Structure(), [Action()] * number


def _matrices(atom: Axis, places: Sequence[Place], said: Statements) -> tuple[tuple[str, list[Action]] | None, str]:
    """The group of matrices on an atom, if one larger than that of monomial matrices acts; and what limits it.

    All that the atom stands in must move with the matrix, but for gains, between which it acts.
    """
    structure, why = "GL", ""
    orders: dict[int, int] = {}  # of each class, in which order its parameters stand
    for _, _, x in places:
        root, acts_there = said.frames.find(x)
        if orders.setdefault(root, acts_there.order) != acts_there.order:
            return None, "its pairs stand in several orders"
    for (within, x), reason in said.at_most.get(atom, {}).items():
        root, acts_there = said.frames.find(x)
        smaller = meet(structure, _in_order(within, acts_there.order - orders.get(root, acts_there.order)))
        structure, why = smaller, reason if smaller != structure else why
    actions = []
    acts = [(parameter, said.frames.action(x), x) for parameter, _, x in places]
    if not any(action is not None for _, action, _ in acts):
        return None, next((_why_inert(said, x) for _, _, x in acts), "")
    for parameter, action, x in acts:
        root, _ = said.frames.find(x)
        if action is None:
            if all(gain.name != parameter for gain in said.absorbed):
                return None, _why_inert(said, x)
            actions.append(Action())
            continue
        if root in said.frames.self_dual:
            smaller = meet(structure, ORTHOGONAL)
            structure, why = smaller, said.frames.self_dual[root] if smaller != structure else why
        actions.append(Action((action.sign,), (), action.gains))
    if structure not in LINEAR:  # what two of them have in common may have no name
        return None, why
    return (structure, actions), why


def _gains_that_stay(
    actions: Mapping[str, Sequence[Action]],
    places_of_atoms: Collection[Sequence[Place]],
    said: Statements,
    solution: Solution,
    gains: Gains,
) -> tuple[str, ...]:
    """The gains between which matrices act, but which something else reads that cannot take up another value of them.

    The matrices act whatever the gain is. To multiply it by a factor for each index, and what stands behind it by the
    inverse, is a symmetry if it solves the equations of scales and of signs; of a number and a parameter, which these
    leave alone, if nothing but what multiplies with them reads the parameter.
    """
    named = {gain for own in actions.values() for action in own for gain, _ in action.gains}
    free = {gain for gain in named if gain.added and _is_read_as_gain_alone(gain, said, solution, gains)}
    for places in places_of_atoms:
        here = {parameter for parameter, _, _ in places}
        plain = [gain for gain in named if gain.name in here and not gain.added]
        unknowns = [x for _, _, x in places] if plain else []
        scales, signs = said.scales.solutions(unknowns), said.signs.solutions(unknowns)
        for gain in plain:
            row = [_power_of_gain(gain, place, actions) for place in places]
            if not independent(row, scales, False) and not independent(row, signs, True):
                free.add(gain)
    return tuple(sorted({gain.name for gain in named - free}))


def _power_of_gain(gain: Gain, place: Place, actions: Mapping[str, Sequence[Action]]) -> int:
    """The power at which a factor of a gain stands at a place where matrices act between gains, or at the gain."""
    parameter, number, _ = place
    if parameter == gain.name:
        return 1
    return dict(actions[parameter][number].gains).get(gain, 0) if parameter in actions else 0


def _is_read_as_gain_alone(gain: Gain, said: Statements, solution: Solution, gains: Gains) -> bool:
    """Whether all that reads a gain's parameter multiplies with this gain, where matrices pass."""
    left = {node for one in solution.nodes for node in one.meta.get("left", ())}
    absorbing = said.absorbed.get(gain, {})
    for node, own in gains.nodes.items():
        if own.name != gain.name:
            continue
        if node in left:
            return False
        for user in node.users:
            derived = gains.nodes.get(user)
            if derived is not None and derived.name == gain.name:
                continue
            if own != gain or user not in absorbing:
                return False
            if any(said.frames.action(out) is None for out in absorbing[user]):
                return False
    weights = [node for node in solution.nodes if is_weight(node) and node.meta["names"][0] == gain.name]
    return all(node in gains.nodes for node in weights)


def _in_order(structure: str, order: int) -> str:
    """A structure as it is before the indices were put from the order of neighbours to that of halves, so often."""
    if structure not in PAIRED or not order:
        return structure
    return {("T", 1): "T2", ("T2", -1): "T"}.get((structure, order), "1")


def _why_inert(said: Statements, x: int) -> str:
    return said.frames.inert.get(said.frames.find(x)[0], "")
