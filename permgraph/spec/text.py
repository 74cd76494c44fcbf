"""A spec as text: one line a parameter, then the groups, then what stays put.

::

    fc1.weight   64x784  hidden .
    fc1.bias     64      hidden
    fc2.weight   10x64   . hidden
    head.weight = fc2.weight
    experts.*.weight  2x8x64  experts . .
    experts.*.weight = experts.0.weight, experts.1.weight
    groups: hidden 64
    pinned: 3 axes: model input 1 · model output 2

A name that is several, with commas, is a stack: the tensors of modules that change places, whose first dimensions these
modules are. A group that is fibred over others says so, ``d 16 per h``; one that only names an axis is ``fixed``. A
structure beyond permutations, as in ``d 16 GL per h``, is for people: what is read has permutations alone. A scalar
has the shape ``scalar``. A name with spaces or punctuation stands in double quotes, as in JSON. Lines that begin with
``#``, and the lines ``by-products`` (what a model returns beside its result, where it moves), ``pinned``, ``unknown
operators``, ``unused`` and ``note``, are for people: reading skips them.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from permgraph.errors import SpecError
from permgraph.spec.binding import Group
from permgraph.spec.data import SpecData
from permgraph.spec.expressions import Axis, Fixed, is_name, parse_axes
from permgraph.spec.stacks import Names, named, places
from permgraph.structures import Structure

_WIDTH = 118
_NOTHING = "Nothing to permute:"
_SECTION = re.compile(r"(groups|by-products|pinned|unknown operators|unused|note):(?:\s+|$)")
_NAME = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^\s"=]+)')
_SHAPE = re.compile(r"scalar|\d+(?:x\d+)*")


def _quote(name: str) -> str:
    return name if is_name(name) and not name.startswith("#") else json.dumps(name, ensure_ascii=False)


def write_spec(spec: SpecData) -> str:
    """The text form of ``spec``."""
    lines: list[str] = []
    if not spec.moving:
        whose = f"of {spec.model_class} " if spec.model_class else ""
        lines.append(f"{_NOTHING} all {len(spec.axes)} parameters and buffers {whose}stay put.")
    rows = [
        (_quote(name), "x".join(map(str, spec.shapes[name])) or "scalar", " ".join(map(_whole, axes)))
        for name, axes in spec.axes.items()
    ]
    # A few very long names or shapes should not push everything else off the screen.
    name_width = min(48, max((len(name) for name, _, _ in rows), default=0))
    shape_width = min(20, max((len(shape) for _, shape, _ in rows), default=0))
    lines += [f"{name:<{name_width}}  {shape:<{shape_width}}  {axes}".rstrip() for name, shape, axes in rows]
    lines += [f"{_quote(alias)} = {_quote(canonical)}" for alias, canonical in spec.aliases.items()]
    for stack, names in spec.stacks.items():
        lines.append(f"{_quote(stack)} = {', '.join(_quote(name) for _, name in places(names))}")
    if spec.groups:
        lines += _wrapped("groups:", map(_group, spec.groups.values()))
    if spec.moving_outputs:
        lines += _wrapped("by-products:", _by_products(spec))
    lines += _pinned(spec)
    if spec.unknown_ops:
        lines += _wrapped("unknown operators:", (f"{op.operator} {op.count}×" for op in spec.unknown_ops))
    if spec.unused:
        lines += _wrapped("unused:", map(_quote, spec.unused))
    lines += [f"note: {' '.join(note.split())}" for note in spec.notes]
    return "\n".join(lines)


def _whole(axis: Axis) -> str:
    return "." if isinstance(axis, Fixed) else str(axis)


def _by_products(spec: SpecData) -> Iterator[str]:
    shown = list(spec.moving_outputs.items())
    for name, axes in shown[:8]:
        yield f"{_quote(name)} {' '.join(map(_whole, axes))}"
    if len(shown) > 8:
        yield f"and {len(shown) - 8} more"


def _group(group: Group) -> str:
    over = f" per {' '.join(group.parents)}" if group.parents else ""
    structure = "" if group.structure.is_plain else f" {group.structure}"
    return f"{group.name} {group.size}{structure}{' fixed' if group.fixed else ''}{over}"


def _pinned(spec: SpecData) -> list[str]:
    axes = sum(isinstance(axis, Fixed) and axis.size > 1 for axes in spec.axes.values() for axis in axes)
    if not axes:
        return []
    reasons = Counter(pin.reason for pin in spec.pins)
    title = f"pinned: {axes} {'axis' if axes == 1 else 'axes'}"
    if not reasons:
        return [title]
    shown = [f"{' '.join(reason.replace('·', ' ').split())} {count}×" for reason, count in reasons.most_common(8)]
    if len(reasons) > 8:
        shown.append(f"and {len(reasons) - 8} more reasons")
    return _wrapped(f"{title}:", shown)


def _wrapped(title: str, items: Iterable[str]) -> list[str]:
    text = f"{title} {' · '.join(items)}"
    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def read_spec(text: str) -> dict[str, Any]:
    """The fields of the spec that ``text`` describes; see `PermutationSpec.parse`."""
    rows: list[tuple[int, str]] = []
    entries: list[tuple[int, str]] = []
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith(("#", _NOTHING)):
            continue
        if section and line[0].isspace():
            if section == "groups":
                entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
            continue
        header = _SECTION.match(line.lstrip())
        section = header[1] if header else ""
        if section == "groups":
            entries.append((number, line.strip().removeprefix("groups:")))
        elif not section:
            rows.append((number, line))
    groups: dict[str, Group] = {}
    for number, entry in entries:
        for group in _read_groups(number, entry):
            if group.name in groups:
                raise SpecError(f"line {number}: the group {group.name!r} is there twice")
            groups[group.name] = group
    axes: dict[str, tuple[Axis, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for number, line in rows:
        name, rest = _read_name(number, line)
        if (name in axes and not rest.lstrip().startswith("=")) or name in aliases or name in stacks:
            raise SpecError(f"line {number}: {name!r} is there twice")
        if rest.lstrip().startswith("=") and name in axes:
            stacks[name] = list(_read_names(number, rest.lstrip()[1:]))
            continue
        if rest.lstrip().startswith("="):
            aliases[name], after = _read_name(number, rest.lstrip()[1:])
            if after.strip():
                raise SpecError(f"line {number}: {after.strip()!r} after an alias")
            continue
        words = rest.split(maxsplit=1)
        if not words or not _SHAPE.fullmatch(words[0]):
            raise SpecError(
                f"line {number}: after the name {name!r} its shape is due, such as 64x3x7x7, or the word scalar; "
                f"found {words[0] if words else 'nothing'!r}"
            )
        shapes[name] = () if words[0] == "scalar" else tuple(map(int, words[0].split("x")))
        try:
            axes[name] = parse_axes(words[1] if len(words) == 2 else "", shapes[name])
        except SpecError as error:
            raise SpecError(f"line {number}, parameter {name!r}: {error}") from None
    return {
        "groups": groups,
        "axes": axes,
        "shapes": shapes,
        "aliases": aliases,
        "stacks": {stack: _stack(stack, names, shapes[stack]) for stack, names in stacks.items()},
    }


def _read_names(number: int, text: str) -> Iterator[str]:
    """Names with commas between them."""
    while text.strip():
        name, text = _read_name(number, text.lstrip().removeprefix(","))
        yield name.removesuffix(",")


def _stack(stack: str, names: Sequence[str], shape: Sequence[int]) -> Names:
    """The names of a stack, in as many dimensions of its shape as they fill."""
    for depth in range(1, len(shape) + 1):
        if math.prod(shape[:depth]) == len(names):
            return named(names, shape[:depth])
    raise SpecError(f"the stack {stack!r} has {len(names)} names, which fill no dimensions of its shape {tuple(shape)}")


def _read_name(number: int, line: str) -> tuple[str, str]:
    found = _NAME.match(line)
    if found is None:
        raise SpecError(f"line {number}: a parameter's name is due, found {line.strip()!r}")
    try:
        name = json.loads(found[1]) if found[1].startswith('"') else found[1]
    except json.JSONDecodeError as error:
        raise SpecError(f"line {number}: cannot read the quoted name {found[1]}: {error}") from None
    return name, line[found.end() :]


def _read_groups(number: int, text: str) -> Iterator[Group]:
    for entry in text.split("·"):
        match entry.split():
            case []:
                continue
            case [name, size, *rest] if size.isdecimal():
                if rest and rest[0] not in ("fixed", "per"):
                    with contextlib.suppress(SpecError):
                        Structure.parse(rest[0])
                        rest = rest[1:]
                fixed = rest[:1] == ["fixed"]
                parents = rest[1:] if fixed else rest
                if not parents or (parents[0] == "per" and len(parents) > 1):
                    try:
                        yield Group(name, int(size), tuple(parents[1:]), fixed)
                    except SpecError as error:
                        raise SpecError(f"line {number}: {error}") from None
                    continue
        raise SpecError(f"line {number}: cannot read the group {entry.strip()!r}: write 'name size per parent parent'")
