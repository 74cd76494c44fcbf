"""`SpecData`: the groups of a model, and where they act on its parameters, as checked, immutable data."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch.nn.parameter import is_lazy

from permgraph.errors import MismatchError, SpecError
from permgraph.spec.binding import Group, Layout, Occurrence, bind, check_groups
from permgraph.spec.expressions import Axis, Fixed, Ref, normalise, rename, size_of, substitute
from permgraph.spec.general import Action, Gain, General, NullDirection
from permgraph.spec.provenance import Constraints, Pass, Pin, Refusal, UnknownOp, Unread
from permgraph.spec.stacks import Names, dimensions, places, stacked, unstacked
from permgraph.structures import Structure

if TYPE_CHECKING:
    import networkx as nx
    from typing_extensions import Self


@dataclass(frozen=True)
class SpecData:
    """The data of a specification, without permutations, explanations, pictures or files; see `PermutationSpec`."""

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()
    unknown_ops: tuple[UnknownOp, ...] = ()
    unused: tuple[str, ...] = ()
    model_class: str = ""
    notes: tuple[str, ...] = ()
    constraints: Constraints | None = field(default=None, repr=False)
    passes: tuple[Pass, ...] = field(default=(), repr=False)
    unread: tuple[Unread, ...] = ()
    general: General | None = field(default=None, repr=False)
    outputs: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict, repr=False)
    by_products: tuple[str, ...] = ()
    stacks: Mapping[str, Names] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = field(default=(), repr=False)
    _layouts: dict[tuple[Axis, ...], Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, given_map in (("groups", self.groups), ("axes", self.axes)):
            if not isinstance(given_map, Mapping):
                raise SpecError(f"{what} must be a mapping from names, not a {type(given_map).__name__}")
        check_groups(self.groups)
        axes: dict[str, tuple[Axis, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, given in self.axes.items():
            where = f"parameter {name!r}"
            if not name:
                raise SpecError("a parameter has no name")
            if not isinstance(given, tuple):
                raise SpecError(f"{where}: its axes must be a tuple of expressions, not {type(given).__name__}")
            axes[name] = tuple(map(normalise, given))
            shapes[name] = self._shape(name, axes[name])
            self.layout(axes[name], where)
        for name in self.shapes:
            if name not in axes:
                raise SpecError(f"there is a shape for {name!r}, but there are no axes for it")
        for alias, canonical in self.aliases.items():
            if alias in axes:
                raise SpecError(f"{alias!r} is an alias of {canonical!r}, so it cannot have axes of its own")
            if canonical not in axes:
                raise SpecError(f"{alias!r} is an alias of {canonical!r}, for which there are no axes")
        self._check_stacks(axes, shapes)
        outputs = {name: tuple(map(normalise, given)) for name, given in self.outputs.items()}
        for name, given in outputs.items():
            self.layout(given, f"output {name!r}")
        freeze = functools.partial(object.__setattr__, self)
        freeze("axes", MappingProxyType(axes))
        freeze("shapes", MappingProxyType(shapes))
        freeze("aliases", MappingProxyType(dict(self.aliases)))
        freeze("outputs", MappingProxyType(outputs))
        freeze("stacks", MappingProxyType(dict(self.stacks)))
        of_modules = self.groups_of_modules
        groups = {n: replace(g, of="modules" if n in of_modules else "indices") for n, g in self.groups.items()}
        freeze("groups", MappingProxyType(groups))
        if self.general is not None:
            self.general.check(self.groups, {name: self.layout(axes[name]) for name in axes}, self.shapes)
        elif any(not group.structure.is_plain for group in self.groups.values()):
            raise SpecError("a group has a structure beyond permutations, but nothing says how it acts")

    def _check_stacks(self, axes: Mapping[str, tuple[Axis, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise SpecError unless each stack has axes, a group along each dimension of modules, and own names."""
        seen: dict[str, str] = {}
        for stack, names in self.stacks.items():
            if stack not in axes:
                raise SpecError(f"there is a stack {stack!r}, but there are no axes for it")
            sizes = dimensions(names)
            if not sizes or sizes != shapes[stack][: len(sizes)]:
                raise SpecError(f"the stack {stack!r} holds {sizes} modules, but its shape is {shapes[stack]}")
            if not all(isinstance(axis, Ref) for axis in axes[stack][: len(sizes)]):
                raise SpecError(f"the stack {stack!r} has no group along a dimension of modules: {axes[stack]}")
            for _, name in places(names):
                if name in seen or name in axes or name in self.aliases:
                    raise SpecError(
                        f"{name!r} is in the stack {stack!r}, and {seen.get(name, 'a parameter of its own')}"
                    )
                seen[name] = f"in the stack {stack!r}"

    def _shape(self, name: str, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        try:
            sizes = tuple(size_of(axis, self.groups) for axis in axes)
        except SpecError as error:
            raise SpecError(f"parameter {name!r}: {error}") from None
        shape = tuple(self.shapes.get(name, sizes))
        if len(shape) != len(axes):
            raise SpecError(
                f"parameter {name!r} has shape {shape}, of {len(shape)} dimensions, but {len(axes)} axes: "
                f"{' '.join(map(str, axes))}"
            )
        for dim, (size, expected) in enumerate(zip(sizes, shape, strict=True)):
            if size != expected:
                raise SpecError(
                    f"parameter {name!r}, dimension {dim}: the axis {axes[dim]} has size {size}, "
                    f"but the shape is {shape}, so {expected} is due"
                )
        return shape

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies cannot be pickled or deep-copied; plain dictionaries can.
        values = [getattr(self, f.name) for f in fields(self) if f.init]
        return type(self), tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in values)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the groups, with their names, and of the axes in their normal form.

        Two specs share it when they call the same permutations by the same names; what was pinned why, notes and
        shapes of what no group acts on do not count. Renaming a group or a parameter changes it.
        """
        content: dict[str, Any] = {
            "groups": {name: [g.size, list(g.parents), g.fixed] for name, g in self.groups.items()},
            "axes": {name: list(map(str, axes)) for name, axes in self.axes.items()},
        }
        if self.general is not None:
            content["structures"] = {name: str(group.structure) for name, group in self.groups.items()}
            content["actions"] = self.general.as_json()["actions"]
        if self.stacks:
            content["stacks"] = dict(self.stacks)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # --- groups and where they stand ----------------------------------------------------------------------------------

    @functools.cached_property
    def moving(self) -> Mapping[str, Group]:
        """The groups that really move something: not fixed, of more than one index, and standing in a parameter.

        A parameter without elements, such as the weights of no extra tokens, holds nothing to move.
        """
        held = [axes for name, axes in self.axes.items() if 0 not in self.shapes[name]]
        standing = {o.group for axes in held for o in self.layout(axes).occurrences}
        return MappingProxyType(
            {name: g for name, g in self.groups.items() if not g.fixed and g.size > 1 and name in standing}
        )

    @functools.cached_property
    def acting(self) -> Mapping[str, Group]:
        """The groups that act: those that move something, and those of pairs that no permutation moves."""
        paired = {name: g for name, g in self.groups.items() if g.structure.is_paired and self.uses(name)}
        return MappingProxyType({name: g for name, g in self.groups.items() if name in self.moving or name in paired})

    @functools.cached_property
    def in_stack(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """For each name in a stack, that stack and its place there."""
        return MappingProxyType(
            {name: (stack, place) for stack, names in self.stacks.items() for place, name in places(names)}
        )

    @functools.cached_property
    def groups_of_modules(self) -> frozenset[str]:
        """The groups that exchange whole modules: those along the first dimensions of stacks."""
        leading = (axis for stack, names in self.stacks.items() for axis in self.axes[stack][: len(dimensions(names))])
        return frozenset(axis.group for axis in leading if isinstance(axis, Ref))

    @functools.cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor of a state dict that has axes, by its canonical name.

        Those of `shapes`, but for stacks: in the place of one stand the tensors in it, under their own names.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            if name in self.stacks:
                found |= {own: shape[len(place) :] for place, own in places(self.stacks[name])}
            else:
                found[name] = shape
        return MappingProxyType(found)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The names that a state dict has for what stands in `axes`: those in a stack, or the name itself."""
        return tuple(own for _, own in places(self.stacks[name])) if name in self.stacks else (name,)

    def over_stacks(self) -> Self:
        """The spec of state dicts whose stacks are single tensors, see `stacked`; itself if there are none."""
        return replace(self, stacks={}, refusals=()) if self.stacks else self

    def modules_in_place(self) -> Self:
        """The same spec where each module stays where it is, and its tensors stand under their own names.

        Raises SpecError where that cannot be written.
        """
        from permgraph.spec.in_place import with_modules_in_place

        return replace(self, **with_modules_in_place(self)) if self.stacks else self

    def stacked(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict with the tensors of modules that change places stacked, as the axes name them.

        Of a mapping that is no dictionary, and may load tensors on access, stacks are made on access as well.

        Raises MismatchError where one of them is missing, or unlike the others.
        """
        return stacked(self.stacks, state_dict)

    def unstacked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What `stacked` undoes: each stack as tensors under their own names."""
        return unstacked(self.stacks, state_dict)

    def canonical(self, name: str) -> str:
        """The canonical name of a parameter or buffer.

        Raises SpecError if the spec does not know it.
        """
        name = self.aliases.get(name, name)
        if name in self.in_stack:
            stack, _ = self.in_stack[name]
            raise SpecError(f"{name!r} changes places with others: its axes are those of the stack {stack!r}")
        if name not in self.axes:
            near = difflib.get_close_matches(name, [*self.axes, *self.aliases], n=3)
            raise SpecError(f"no parameter {name!r} in this spec" + (f"; near: {', '.join(near)}" if near else ""))
        return name

    def occurrences(self, name: str) -> tuple[Occurrence, ...]:
        """Where groups act on the parameter ``name``, in the order of its text, and which parents each one obeys."""
        return self.layout(self.axes[self.canonical(name)]).occurrences

    def layout(self, axes: tuple[Axis, ...], where: str = "this tensor") -> Layout:
        """Where groups act on any tensor whose dimensions are ``axes``; worked out once and kept.

        Raises SpecError, naming ``where``, if the axes do not make sense in this spec.
        """
        if axes not in self._layouts:
            self._layouts[axes] = bind(axes, self.groups, where)
        return self._layouts[axes]

    def uses(self, group: str) -> tuple[tuple[str, int], ...]:
        """Each parameter and dimension where ``group`` stands, in the order of the parameters, without repeats.

        Raises SpecError if the spec does not know the group.
        """
        if group not in self.groups:
            raise SpecError(f"no group {group!r} in this spec; it has {', '.join(self.groups) or 'none'}")
        return self.uses_of_groups[group]

    @functools.cached_property
    def uses_of_groups(self) -> Mapping[str, tuple[tuple[str, int], ...]]:
        """For each group, what `uses` says of it; all are worked out in one walk over the parameters."""
        found: dict[str, dict[tuple[str, int], None]] = {name: {} for name in self.groups}
        for name, axes in self.axes.items():
            for occurrence in self.layout(axes).occurrences:
                found[occurrence.group][name, occurrence.dim] = None
        return MappingProxyType({group: tuple(places) for group, places in found.items()})

    def multiplicity(self, group: str) -> int:
        """The number of independent permutations that ``group`` has: the product of its parents' sizes."""
        return math.prod(self.groups[parent].size for parent in self.groups[group].parents)

    @functools.cached_property
    def moving_outputs(self) -> Mapping[str, tuple[Axis, ...]]:
        """The by-products that move, each with its axes: those of `outputs` on which a group acts."""
        return MappingProxyType(
            {
                name: axes
                for name, axes in self.outputs.items()
                if name in self.by_products and any(o.group in self.acting for o in self.layout(axes).occurrences)
            }
        )

    @property
    def null_directions(self) -> tuple[NullDirection, ...]:
        """What can be added to parameters without effect; only a spec with general symmetries knows."""
        return () if self.general is None else self.general.null_directions

    @functools.cached_property
    def general_gains(self) -> Mapping[str, Gain]:
        """The gains between which matrices act, and that can be changed, by the parameter's name."""
        found = {name: ways for name, ways in self._ways_of_gains.items() if name not in self.gains_that_stay}
        return MappingProxyType({name: next(iter(ways)) for name, ways in found.items()})

    @functools.cached_property
    def gains_that_stay(self) -> frozenset[str]:
        """The gains between which matrices act, but which are read in two ways, or by something else."""
        ways = self._ways_of_gains
        told = () if self.general is None else self.general.gains_that_stay
        return frozenset(name for name in ways if len(ways[name]) > 1 or name in told)

    @functools.cached_property
    def _ways_of_gains(self) -> Mapping[str, Collection[Gain]]:
        """For each parameter between which matrices act the ways in which it is a gain."""
        found: dict[str, dict[Gain, None]] = {}
        for actions in {} if self.general is None else self.general.actions.values():
            for action in actions:
                for gain, _ in action.gains:
                    found.setdefault(gain.name, {})[gain] = None
        return found

    @property
    def symmetry(self) -> Literal["permutation", "general"]:
        """``"general"`` if groups may have structures beyond permutations, else ``"permutation"``."""
        return "permutation" if self.general is None else "general"

    def dimension(self) -> int:
        """The dimension of the continuous part of the group: how many real numbers an element near the identity has."""
        return sum(
            self.multiplicity(name) * group.structure.dimension(group.size) for name, group in self.acting.items()
        )

    def permutations(self) -> Self:
        """The same spec with permutations alone; itself if there is nothing more."""
        if self.general is None:
            return self
        plain = {name: replace(group, structure=Structure()) for name, group in self.groups.items()}
        paired = [name for name, group in self.groups.items() if group.structure.is_paired]
        return replace(self, groups=plain, general=None).without(paired)

    def without(self, names: Collection[str]) -> Self:
        """The same spec where nothing acts on these groups: their indices stay put.

        One over which others are fibred goes on naming its axis, and so does one of modules. Raises SpecError if a
        group is unknown.
        """
        for name in names:
            self.uses(name)
        named = {parent for group in self.groups.values() for parent in group.parents} | self.groups_of_modules
        gone = frozenset(names) - named
        still = {
            name: replace(group, fixed=True, structure=Structure()) if name in names else group
            for name, group in self.groups.items()
            if name not in gone
        }

        def new(name: str) -> Axis:
            return Fixed(self.groups[name].size) if name in gone else Ref(name)

        general = self.general
        if general is not None:
            actions = {}
            for name, own in general.actions.items():
                standing = zip(own, self.occurrences(name), strict=True)
                actions[name] = tuple(Action() if o.group in names else a for a, o in standing if o.group not in gone)
            reasons = {name: why for name, why in general.reasons.items() if name not in names}
            general = replace(general, actions=actions, reasons=reasons)
        return replace(
            self,
            groups=still,
            axes={name: tuple(substitute(axis, new) for axis in axes) for name, axes in self.axes.items()},
            outputs={name: tuple(substitute(axis, new) for axis in axes) for name, axes in self.outputs.items()},
            unread=tuple(replace(e, groups=tuple(n for n in e.groups if n not in names)) for e in self.unread),
            general=general,
        )

    def log_order(self) -> float:
        """The natural logarithm of the number of permutations; groups that stand in no parameter do not count."""
        return math.fsum(self.multiplicity(name) * math.lgamma(group.size + 1) for name, group in self.moving.items())

    def coupling(self) -> nx.Graph:
        """Which groups share a parameter: an undirected graph of the moving groups.

        Each edge has ``parameters``, the names shared, and ``meeting``, those of them in which some element lies on
        both groups; two parts of a concatenation share a parameter without meeting. A group that stands more than
        once in a parameter has an edge to itself. Where no parameter is in ``meeting``, the matching objective is
        linear in the one while the other moves.
        """
        shared: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
        for name, axes in self.axes.items():
            standing = [o for o in self.layout(axes).occurrences if o.group in self.moving]
            pairs: dict[tuple[str, str], bool] = {}
            for one, other in itertools.combinations(standing, 2):
                key = (one.group, other.group) if one.group <= other.group else (other.group, one.group)
                pairs[key] = pairs.get(key, False) or one.meets(other)
            for key, meet in pairs.items():
                parameters, meeting = shared.setdefault(key, ([], []))
                parameters.append(name)
                if meet:
                    meeting.append(name)
        import networkx as nx

        graph = nx.Graph()
        graph.add_nodes_from(self.moving)
        for (one_name, other_name), (parameters, meeting) in shared.items():
            graph.add_edge(one_name, other_name, parameters=tuple(parameters), meeting=tuple(meeting))
        return graph

    # --- fit ----------------------------------------------------------------------------------------------------------

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raise MismatchError, naming the first key at fault and both shapes, unless ``state_dict`` fits this spec.

        Of tied names one is enough. Keys that the spec does not know are let pass if they are not floating point (a
        step counter, say), or are among `unused`.
        """
        hint = self._prefix_hint(state_dict)
        others: dict[str, list[str]] = {}
        for alias, canonical in self.aliases.items():
            others.setdefault(canonical, []).append(alias)
        for name, due in self.tensors.items():
            if name not in state_dict and not any(alias in state_dict for alias in others.get(name, ())):
                if name in self.in_stack:
                    stack, _ = self.in_stack[name]
                    raise MismatchError(
                        f"the state dict has no {name!r}, which changes places with others of {stack!r}{hint}"
                    )
                raise MismatchError(
                    f"the state dict has no {name!r}, of shape {due}; it has {len(state_dict)} "
                    f"keys, the spec {len(self.tensors)}{hint}"
                )
        for key, value in state_dict.items():
            self.check_entry(key, value, hint)

    def check_entry(self, key: str, value: Any, hint: str = "") -> None:
        """Raise MismatchError unless one entry of a state dict fits this spec."""
        name = self.aliases.get(key, key)
        if is_lazy(value):
            raise MismatchError(f"{key!r} is not initialised yet: run the model once")
        shape = getattr(value, "shape", None)
        due = self.tensors.get(name, self.shapes.get(name))
        if due is not None:
            if shape is None or tuple(shape) != due:
                got = f"is a {type(value).__name__}" if shape is None else f"has shape {tuple(shape)}"
                raise MismatchError(f"{key!r} {got}, but the spec says {due}")
        elif key not in self.unused and shape is not None and (value.is_floating_point() or value.is_complex()):
            raise MismatchError(
                f"the state dict has {key!r}, of shape {tuple(shape)}, which the spec does not know{hint}"
            )

    def _prefix_hint(self, state_dict: Mapping[str, Any]) -> str:
        mine, its = set(self.tensors), set(state_dict)
        if not mine or not its or mine & its:
            return ""
        name, key = next(iter(mine)), next(iter(state_dict))
        for longer in its:
            prefix = longer.removesuffix(name)
            if longer.endswith(f".{name}") and {prefix + other for other in mine} <= its:
                return f"; its keys are the spec's with the prefix {prefix!r}: strip that"
        for longer in mine:
            prefix = longer.removesuffix(key)
            if longer.endswith(f".{key}") and mine <= {prefix + other for other in its}:
                return f"; its keys are the spec's without the prefix {prefix!r}: add that"
        return ""

    def diff(self, other: SpecData) -> tuple[str, ...]:
        """How ``other`` differs from this spec, one sentence each: groups first, then axes, shapes and aliases.

        Empty where the groups, axes, shapes and aliases are the same.
        """
        lines: list[str] = []

        def compare(kind: str, mine: Mapping[str, Any], its: Mapping[str, Any], show: Any) -> None:
            for name in dict.fromkeys([*mine, *its]):
                if name not in its:
                    lines.append(f"{kind} {name}: {show(mine[name])}, only in the first")
                elif name not in mine:
                    lines.append(f"{kind} {name}: {show(its[name])}, only in the second")
                elif mine[name] != its[name]:
                    lines.append(f"{kind} {name}: {show(mine[name])} in the first, {show(its[name])} in the second")

        def show_group(group: Group) -> str:
            over = f" over {' '.join(group.parents)}" if group.parents else ""
            structure = "" if group.structure.is_plain else f" {group.structure}"
            return f"{group.size}{structure}{' fixed' if group.fixed else ''}{over}"

        compare("group", self.groups, other.groups, show_group)
        compare("axes of", self.axes, other.axes, lambda axes: " ".join(map(str, axes)) or "scalar")
        same = [name for name in self.axes if name in other.axes]
        compare("shape of", {n: self.shapes[n] for n in same}, {n: other.shapes[n] for n in same}, str)
        compare("alias", self.aliases, other.aliases, str)
        compare("stack", self.stacks, other.stacks, str)
        return tuple(lines)

    def rename(self, names: Mapping[str, str]) -> Self:
        """The same spec with groups named by ``names``; a group not in it keeps its name.

        Raises SpecError if a group is unknown, or if two would have one name.
        """
        for name in names:
            if name not in self.groups:
                raise SpecError(f"cannot rename {name!r}: no such group in this spec")

        def new(name: str) -> str:
            return names.get(name, name)

        clashes = [name for name, count in Counter(map(new, self.groups)).items() if count > 1]
        if clashes:
            raise SpecError(f"cannot rename: more than one group would be named {clashes[0]!r}")
        return replace(
            self,
            groups={
                new(n): replace(g, name=new(n), parents=tuple(map(new, g.parents))) for n, g in self.groups.items()
            },
            axes={name: tuple(rename(axis, new) for axis in axes) for name, axes in self.axes.items()},
            outputs={name: tuple(rename(axis, new) for axis in axes) for name, axes in self.outputs.items()},
            unread=tuple(replace(entry, groups=tuple(map(new, entry.groups))) for entry in self.unread),
            general=self.general
            and replace(self.general, reasons={new(name): why for name, why in self.general.reasons.items()}),
        )

    def __repr__(self) -> str:
        of = f" of {self.model_class}" if self.model_class else ""
        return f"<PermutationSpec{of}: {len(self.moving)} groups on {len(self.tensors)} parameters and buffers>"
