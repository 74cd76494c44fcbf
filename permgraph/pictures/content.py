"""A spec as the plain data that the page works on.

Whatever repeats is written once and referred to by number, so that the constraints of a model with hundreds of layers
take a megabyte or two. The page finds the paths through them itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from permgraph.pictures.lanes import lay_out
from permgraph.pictures.palette import COLOURS, STYLES
from permgraph.pictures.tree import Module, Repeated, module_tree, short_names
from permgraph.spec.expressions import Axis, Family, Fixed, Label, Product, Ref, Sum

if TYPE_CHECKING:
    from permgraph.spec import PermutationSpec, Pin
    from permgraph.spec.binding import Group
    from permgraph.spec.provenance import SlotPin, Tie


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=[.#]|$)")  # of a module in a list

_REASONS = {"constant": "a constant, as of the code or a buffer: no checkpoint holds it, so nothing can renumber it"}
"""What a short reason says in full."""


def content(spec: PermutationSpec) -> dict[str, Any]:
    """Everything that the page shows of ``spec``, ready for JSON; `page.js` says what each field is for."""
    return _Writer(spec).content()


class _Writer:
    def __init__(self, spec: PermutationSpec) -> None:
        self.spec = spec
        self.group_at = {name: at for at, name in enumerate(spec.groups)}
        self.parameter_at = {name: at for at, name in enumerate(spec.axes)}
        self.strings: dict[str, int] = {}
        self.steps: dict[tuple[int, int, int], int] = {}
        # The axes of parameters come first, in their order, so that their numbers need not be written.
        self.slots: dict[str, int] = {}
        for name, axes in spec.axes.items():
            first = spec.tensors_of(name)[0]  # of a stack, the constraints know the tensors in it: the first shows all
            depth = len(axes) - len(spec.tensors[first])
            for dim in range(len(axes)):
                self.slots[f"{first}[{dim - depth}]" if dim >= depth else f"{name}[{dim}]"] = len(self.slots)

    def content(self) -> dict[str, Any]:
        spec = self.spec
        constraints = spec.constraints
        short, colours = short_names(spec.groups), self.colours()
        others: dict[str, list[str]] = {}
        for alias, canonical in spec.aliases.items():
            others.setdefault(canonical, []).append(alias)
        others |= {name: list(spec.tensors_of(name)) for name in spec.stacks}
        data: dict[str, Any] = {
            "groups": [self.group(group, short[name], colours.get(name, 0)) for name, group in spec.groups.items()],
            "parameters": [
                [name, list(spec.shapes[name]), list(map(self.expression, axes)), others.get(name, [])]
                for name, axes in spec.axes.items()
            ],
            "stacks": [self.parameter_at[name] for name in spec.stacks],
            "modules": [self.group_at[name] for name in spec.groups if name in spec.groups_of_modules],
            "tree": self.module(module_tree(spec)),
            "pins": [
                [self.parameter_at[p.parameter], p.dim, p.size, *self.because(p)]
                for p in spec.pins
                if p.parameter in self.parameter_at
            ],
            "unknown": [[op.operator, op.count, op.module, op.source] for op in spec.unknown_ops],
            "unused": list(spec.unused),
            "unread": [
                [self.parameter_at[u.parameter], u.dim, [self.group_at[group] for group in u.groups]]
                for u in spec.unread
                if u.parameter in self.parameter_at
            ],
            "kept": constraints is not None,
            "ties": [n for tie in constraints.ties for n in (self.slot(tie.a), self.slot(tie.b), self.step(tie))]
            if constraints
            else [],
            "rests": [n for pin in constraints.pins for n in (self.slot(pin.slot), *self.because(pin))]
            if constraints
            else [],
        }
        return {**data, "steps": [list(step) for step in self.steps], "strings": list(self.strings)}

    def group(self, group: Group, short: str, colour: int) -> list[Any]:
        parents = [self.group_at[parent] for parent in group.parents]
        moving = group.name in self.spec.moving
        return [group.name, short, group.size, parents, int(group.fixed), int(moving), colour]

    def colours(self) -> dict[str, int]:
        """A colour with a border for each moving group, by number: of those in one row, and in one block, no two alike.

        Groups that have the same name but for the numbers of modules, as in blocks alike, have the same where they can.
        """
        picture = lay_out(self.spec, rows=len(self.spec.axes) + 1, collapse=False)
        every = range(len(COLOURS) * STYLES)
        last_used = dict.fromkeys(every, -1)
        of_role: dict[str, int] = {}
        found: dict[str, int] = {}
        for at, row in enumerate(picture.rows):
            begin = [lane.group for lane in picture.lanes if lane.start == at]
            live = {lane.group for lane in picture.lanes if lane.start <= at <= lane.stop}
            for group in (*begin, *row.inner):
                taken = {found[other] for other in (*live, *row.inner) if other in found}
                role = _NUMBER.sub("*", group)
                if role not in of_role or of_role[role] in taken:
                    of_role[role] = min(every, key=lambda number: (number in taken, last_used[number], number))
                found[group] = of_role[role]
                last_used[found[group]] = at
        return found

    def expression(self, axis: Axis) -> Any:
        """A number for what stays put, a negative one for a group, else a list: the kind, and what is inside."""
        match axis:
            case Fixed(size):
                return size
            case Ref(group):
                return -1 - self.group_at[group]
            case Product(factors):
                return ["*", *map(self.expression, factors)]
            case Sum(parts):
                return ["+", *map(self.expression, parts)]
            case Label(name, inner):
                return [":", name, self.expression(inner)]
            case Family(on, members):
                return ["@", on, *map(self.expression, members)]

    def module(self, module: Module | Repeated) -> Any:
        """``[path, parameters, children]``, or ``[path of the one, those like it]``."""
        if isinstance(module, Repeated):
            return [module.like, list(map(self.module, module.modules))]
        parameters = [self.parameter_at[name] for name in module.parameters]
        return [module.path, parameters, list(map(self.module, module.children))]

    def string(self, text: str | None) -> int:
        return -1 if text is None else self.strings.setdefault(text, len(self.strings))

    def step(self, made: Tie | SlotPin | Pin) -> int:
        key = (self.string(made.operator), self.string(made.module), self.string(made.source))
        return self.steps.setdefault(key, len(self.steps))

    def slot(self, slot: str) -> int:
        return self.slots.setdefault(slot, len(self.slots))

    def because(self, pin: SlotPin | Pin) -> tuple[int, int]:
        return self.string(_REASONS.get(pin.reason, pin.reason)), self.step(pin)
