"""A spec as JSON: everything that it holds, with its axes in text form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from permgraph.errors import SpecError
from permgraph.spec.binding import Group
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, parse_axis
from permgraph.spec.general import General
from permgraph.spec.provenance import Constraints, Pass, Pin, Refusal, SlotPin, Tie, UnknownOp, Unread
from permgraph.spec.stacks import Names
from permgraph.structures import Structure

FORMAT = "permgraph.spec"
VERSION = 1

T = TypeVar("T")


def to_json(spec: SpecData) -> dict[str, Any]:
    """``spec`` as plain lists and dictionaries; records without names are lists, in the order of their fields."""
    constraints = spec.constraints
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model_class": spec.model_class,
        "groups": {
            name: {"size": group.size, "parents": list(group.parents), "fixed": group.fixed}
            | ({"of": group.of} if group.of == "modules" else {})
            for name, group in spec.groups.items()
        },
        "parameters": {
            name: {"shape": list(spec.shapes[name]), "axes": list(map(str, axes))} for name, axes in spec.axes.items()
        },
        "aliases": dict(spec.aliases),
        **({"stacks": dict(spec.stacks)} if spec.stacks else {}),
        **({"refusals": [[one.reason, *one.parameters] for one in spec.refusals]} if spec.refusals else {}),
        "pins": list(map(_record, spec.pins)),
        "unknown_ops": list(map(_record, spec.unknown_ops)),
        "unused": list(spec.unused),
        "unread": [[*_record(entry)[:-1], list(entry.groups)] for entry in spec.unread],
        "outputs": {name: list(map(str, axes)) for name, axes in spec.outputs.items()},
        "by_products": list(spec.by_products),
        "notes": list(spec.notes),
        "passes": list(map(_record, spec.passes)),
        "constraints": None
        if constraints is None
        else {"ties": list(map(_record, constraints.ties)), "pins": list(map(_record, constraints.pins))},
    }
    if spec.general is not None:
        structures = {name: str(group.structure) for name, group in spec.groups.items()}
        content["general"] = {"structures": structures, **spec.general.as_json()}
    return content


def _record(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in fields(value)]


def write_json(content: dict[str, Any]) -> str:
    """``content`` as JSON with a line for each group, parameter, pin or tie, so that files compare line by line."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def block(value: Any, indent: str) -> str:
        if not value or not isinstance(value, dict | list):
            return dump(value)
        inner = f"{indent} "
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"{inner}{dump(item)}" for item in value) + f"\n{indent}]"
        # Of the constraints, each kind is a block of its own; any other entry fits on a line.
        nested = all(isinstance(item, list) for item in value.values())
        show = block if nested else lambda item, _: dump(item)
        lines = (f"{inner}{dump(key)}: {show(item, inner)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    return "{\n" + ",\n".join(f" {dump(key)}: {block(value, ' ')}" for key, value in content.items()) + "\n}\n"


def from_json(content: Any) -> dict[str, Any]:
    """The fields of the spec that `to_json` described.

    Raises SpecError, naming the place, if the content is malformed, or of another format or version.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SpecError(f"not a spec: the field 'format' should be {FORMAT!r}")
    if content.get("version") != VERSION:
        raise SpecError(
            f"version {content.get('version')!r} of the format; this permgraph reads version {VERSION}: "
            f"infer the spec again, or use the release that wrote it"
        )

    groups = {}
    more = content.get("general")
    structures = {} if more is None else _get(more, "structures", dict, "general")
    for name, entry in _get(content, "groups", dict).items():
        with _at(f"groups.{name}"):
            size, parents, fixed = _get(entry, "size", int), _names(entry, "parents"), _get(entry, "fixed", bool)
            groups[name] = Group(name, size, parents, fixed, Structure.parse(structures.get(name, "S")))
    axes, shapes = {}, {}
    for name, entry in _get(content, "parameters", dict).items():
        where = f"parameters.{name}"
        texts = _get(entry, "axes", list, where)
        shape = _get(entry, "shape", list, where)
        if not all(isinstance(size, int) for size in shape) or not all(isinstance(text, str) for text in texts):
            raise SpecError(f"{where}: 'shape' should be a list of integers and 'axes' a list of texts")
        with _at(f"{where}.axes"):
            axes[name] = tuple(map(parse_axis, texts))
        shapes[name] = tuple(shape)
    aliases = _get(content, "aliases", dict)
    if not all(isinstance(canonical, str) for canonical in aliases.values()):
        raise SpecError("aliases: should be names to names")
    constraints = content.get("constraints")
    return dict(
        groups=groups,
        axes=axes,
        shapes=shapes,
        aliases=aliases,
        stacks=_stacks(content),
        refusals=_refusals(content),
        pins=_records(content, "pins", Pin, (str, int, int, str)),
        unknown_ops=_records(content, "unknown_ops", UnknownOp, (str, int)),
        unused=_names(content, "unused"),
        unread=_unread(content),
        model_class=_get(content, "model_class", str),
        notes=_names(content, "notes"),
        passes=_records(content, "passes", Pass, (str, int, str, str, str, str, int)) if "passes" in content else (),
        constraints=None
        if constraints is None
        else Constraints(
            _records(constraints, "ties", Tie, (str, str), "constraints"),
            _records(constraints, "pins", SlotPin, (str, str), "constraints"),
        ),
        general=None if more is None else General.from_json(more),
        outputs=_outputs(content),
        by_products=_names(content, "by_products") if "by_products" in content else (),
    )


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say where in the file an error was found."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _get(content: Any, key: str, kind: type[T], where: str = "") -> T:
    place = f"{where}.{key}" if where else key
    if not isinstance(content, Mapping) or key not in content:
        raise SpecError(f"{place}: missing")
    value = content[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SpecError(f"{place}: should be of type {kind.__name__}, found {value!r}")
    return value


def _names(content: Any, key: str) -> tuple[str, ...]:
    values: list[Any] = _get(content, key, list)
    if not all(isinstance(value, str) for value in values):
        raise SpecError(f"{key}: should be a list of texts")
    return tuple(values)


def _stacks(content: Any) -> dict[str, Names]:
    """The names of tensors of modules that change places; none in files from before they were kept."""
    found = _get(content, "stacks", dict) if "stacks" in content else {}

    def names(value: Any, stack: str) -> Names:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise SpecError(f"stacks.{stack}: should be a list of names, or of such lists, found {value!r}")
        return tuple(names(one, stack) for one in value)

    return {stack: names(value, stack) for stack, value in found.items()}


def _refusals(content: Any) -> tuple[Refusal, ...]:
    """Why modules that look alike do not change places; none in files from before that was kept."""
    found = []
    for at, row in enumerate(_get(content, "refusals", list) if "refusals" in content else ()):
        if not isinstance(row, list) or len(row) < 2 or not all(isinstance(text, str) for text in row):
            raise SpecError(f"refusals[{at}]: should be [reason, parameter, ...], found {row!r}")
        found.append(Refusal(row[0], tuple(row[1:])))
    return tuple(found)


def _outputs(content: Any) -> dict[str, tuple[Axis, ...]]:
    """The axes of the outputs; none in files from before they were kept."""
    found = {}
    for name, texts in _get(content, "outputs", dict).items() if "outputs" in content else ():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise SpecError(f"outputs.{name}: should be a list of texts")
        with _at(f"outputs.{name}"):
            found[name] = tuple(map(parse_axis, texts))
    return found


def _unread(content: Any) -> tuple[Unread, ...]:
    """The axes that no pass read; none in files from before they were kept."""
    found = []
    for at, row in enumerate(_get(content, "unread", list) if "unread" in content else ()):
        match row:
            case [str(name), int(dim), int(size), [*groups]] if all(isinstance(group, str) for group in groups):
                found.append(Unread(name, dim, size, tuple(groups)))
            case _:
                raise SpecError(f"unread[{at}]: should be [parameter, dim, size, [groups]], found {row!r}")
    return tuple(found)


def _records(content: Any, key: str, record: type[T], required: tuple[type, ...], where: str = "") -> tuple[T, ...]:
    """The records under ``key``: first the required fields, of these types, then texts or nulls."""
    place = f"{where}.{key}" if where else key
    rows: list[Any] = _get(content, key, list, where)
    optional = len(fields(record)) - len(required)  # type: ignore[arg-type]
    for at, row in enumerate(rows):
        if (
            not isinstance(row, list)
            or len(row) != len(required) + optional
            or not all(isinstance(value, kind) for value, kind in zip(row, required, strict=False))
            or not all(value is None or isinstance(value, str) for value in row[len(required) :])
        ):
            names = ", ".join(field.name for field in fields(record))  # type: ignore[arg-type]
            raise SpecError(f"{place}[{at}]: should be [{names}], found {row!r}")
    return tuple(record(*row) for row in rows)
