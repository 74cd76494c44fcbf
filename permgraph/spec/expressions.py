"""Axis expressions: where groups act on one dimension of a tensor.

An expression is an immutable value without tensors. It is written as text and read back unchanged::

    >>> str(parse_axis("(s:[1 + 1 + 1] head {qk | qk | v}@s)"))
    '(s:[1 + 1 + 1] head {qk | qk | v}@s)'

============================  ==========================================================  ========================
node                          meaning                                                     text
============================  ==========================================================  ========================
``Fixed(size)``               that many indices which stay put                            ``7``
``Ref(group)``                an axis on which the group acts                             ``layer1.conv1``
``Product(factors)``          row-major flattening                                        ``(a b 7)``
``Sum(parts)``                concatenation                                               ``[a + b + 3]``
``Label(name, expr)``         names an axis so that a family can point at it              ``s:[a + 1 + 1]``
``Family(on, members)``       ``members[i]`` at part i of the axis labelled ``on``        ``{a | b | b}@s``
============================  ==========================================================  ========================

A label may stand anywhere in the same tensor; what it names must be a sum with one part for each member.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from permgraph.errors import SpecError


class Sized(Protocol):
    """Whatever has a size: all that an expression needs to know of a group."""

    @property
    def size(self) -> int:
        """The number of indices."""
        ...


Path: TypeAlias = tuple[int, ...]
"""The way from the root of an expression to a node in it: which child to take at each step."""

PUNCTUATION = '()[]{}|+@:="·'
"""The characters that the text form needs for itself, so that no group or label may use them."""

_WORD = re.compile(r"[^\s()\[\]{}|+@:=\"·]+")


def is_name(text: str) -> bool:
    """Whether ``text`` can name a group or a label: one word, which is not a number and not a lone dot."""
    return _WORD.fullmatch(text) is not None and text != "." and not text.isdecimal()


def require_name(text: str, what: str) -> None:
    """Raise SpecError unless ``text`` can name a group or a label; ``what`` says which, for the message."""
    if not isinstance(text, str) or not is_name(text):
        raise SpecError(
            f"{text!r} cannot name {what}: a name is one word that is not a number and not '.', "
            f"without any of {' '.join(PUNCTUATION)}"
        )


@dataclass(frozen=True, slots=True)
class Fixed:
    """``size`` indices which stay put."""

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 0:
            raise SpecError(f"Fixed(size={self.size!r}): a size is an integer, zero or more")

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True, slots=True)
class Ref:
    """An axis on which the group named ``group`` acts."""

    group: str

    def __post_init__(self) -> None:
        require_name(self.group, "a group")

    def __str__(self) -> str:
        return self.group


@dataclass(frozen=True, slots=True)
class Product:
    """The row-major flattening of its factors: the last factor varies fastest."""

    factors: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.factors))})"


@dataclass(frozen=True, slots=True)
class Sum:
    """The concatenation of its parts."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"[{' + '.join(map(str, self.parts))}]"


@dataclass(frozen=True, slots=True)
class Label:
    """``expr`` under a name, so that a `Family` can be chosen by the part of it."""

    name: str
    expr: Axis

    def __post_init__(self) -> None:
        require_name(self.name, "a labelled axis")

    def __str__(self) -> str:
        return f"{self.name}:{self.expr}"


@dataclass(frozen=True, slots=True)
class Family:
    """``members[i]`` wherever the axis labelled ``on`` is at its part i."""

    on: str
    members: tuple[Axis, ...]

    def __post_init__(self) -> None:
        require_name(self.on, "a labelled axis")
        if not self.members:
            raise SpecError(f"a family on {self.on!r} has no members: give one for each part of that axis")

    def __str__(self) -> str:
        return f"{{{' | '.join(map(str, self.members))}}}@{self.on}"


Axis: TypeAlias = Fixed | Ref | Product | Sum | Label | Family


def children(axis: Axis) -> tuple[Axis, ...]:
    """The expressions directly inside ``axis``, in order; a `Path` counts along them."""
    match axis:
        case Product(inner) | Sum(inner) | Family(members=inner):
            return inner
        case Label(expr=expr):
            return (expr,)
        case _:
            return ()


def walk(axis: Axis, path: Path = ()) -> Iterator[tuple[Path, Axis]]:
    """Every node of ``axis`` with its path, each before its children."""
    yield path, axis
    for position, child in enumerate(children(axis)):
        yield from walk(child, (*path, position))


def refs(axis: Axis) -> tuple[str, ...]:
    """The group of each `Ref` in ``axis``, in the order of the text, repeats included."""
    return tuple(node.group for _, node in walk(axis) if isinstance(node, Ref))


def size_of(axis: Axis, groups: Mapping[str, Sized]) -> int:
    """The number of indices of ``axis``.

    Raises SpecError where a group is unknown, or where the members of a family differ in size.
    """
    match axis:
        case Fixed(size):
            return size
        case Ref(group):
            if group not in groups:
                raise SpecError(f"axis {axis}: there is no group named {group!r}")
            return groups[group].size
        case Product(factors):
            return math.prod(size_of(factor, groups) for factor in factors)
        case Sum(parts):
            return sum(size_of(part, groups) for part in parts)
        case Label(expr=expr):
            return size_of(expr, groups)
        case Family(members=members):
            sizes = [size_of(member, groups) for member in members]
            if len(set(sizes)) != 1:
                raise SpecError(f"the members of the family {axis} differ in size: {sizes}")
            return sizes[0]


def rename(axis: Axis, group: Callable[[str], str]) -> Axis:
    """``axis`` with each group's name replaced by ``group(name)``."""
    return substitute(axis, lambda name: Ref(group(name)))


def substitute(axis: Axis, new: Callable[[str], Axis]) -> Axis:
    """``axis`` with ``new(name)`` in the place of each group."""
    match axis:
        case Fixed():
            return axis
        case Ref(name):
            return new(name)
        case Product(factors):
            return Product(tuple(substitute(factor, new) for factor in factors))
        case Sum(parts):
            return Sum(tuple(substitute(part, new) for part in parts))
        case Label(name, expr):
            return Label(name, substitute(expr, new))
        case Family(on, members):
            return Family(on, tuple(substitute(member, new) for member in members))


def normalise(axis: Axis) -> Axis:
    """The normal form of ``axis``, which acts in the same way.

    Products inside products and sums inside sums are flattened, neighbours in them that are fixed are one, factors of
    size 1 are dropped, and a product or sum of one is what it holds. The parts of a labelled sum are counted by
    families, so they stay as they are.
    """
    match axis:
        case Product(factors):
            nested = (f.factors if isinstance(f, Product) else (f,) for f in map(normalise, factors))
            flat = _merged((f for f in itertools.chain.from_iterable(nested) if f != Fixed(1)), operator.mul)
            return flat[0] if len(flat) == 1 else Product(flat) if flat else Fixed(1)
        case Sum(parts):
            within = (p.parts if isinstance(p, Sum) else (p,) for p in map(normalise, parts))
            joined = _merged(itertools.chain.from_iterable(within), operator.add)
            return joined[0] if len(joined) == 1 else Sum(joined) if joined else Fixed(0)
        case Label(name, Sum(parts)):
            return Label(name, Sum(tuple(map(normalise, parts))))
        case Label(name, expr):
            return Label(name, normalise(expr))
        case Family(on, members):
            return Family(on, tuple(map(normalise, members)))
        case _:
            return axis


def _merged(axes: Iterable[Axis], combine: Callable[[int, int], int]) -> tuple[Axis, ...]:
    """Axes with neighbours that are fixed combined."""
    merged: list[Axis] = []
    for axis in axes:
        last = merged[-1] if merged else None
        if isinstance(axis, Fixed) and isinstance(last, Fixed):
            merged[-1] = Fixed(combine(last.size, axis.size))
        else:
            merged.append(axis)
    return tuple(merged)


def product(*factors: Axis) -> Axis:
    """The normal form of the product of ``factors``."""
    return normalise(Product(factors))


def concatenation(*parts: Axis) -> Axis:
    """The normal form of the sum of ``parts``."""
    return normalise(Sum(parts))


# --- text -----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*(?:([()\[\]{}|+@:])|([^\s()\[\]{}|+@:=\"·]+))")


class _Reader:
    """The tokens of one line and how far they have been read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        self.at = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            found = _TOKEN.match(text, position)
            if found is None:
                column = position + len(text[position:]) - len(text[position:].lstrip())
                raise SpecError(f"cannot read {text[column]!r} at column {column + 1} of {text!r}")
            self.tokens.append((found[1] or found[2], found.start(1) if found[1] else found.start(2)))
            position = found.end()

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.peek() != token:
            raise self.error(f"expected {token!r}")
        self.at += 1

    def error(self, what: str) -> SpecError:
        if self.at < len(self.tokens):
            token, column = self.tokens[self.at]
            return SpecError(f"{what}, but found {token!r} at column {column + 1} of {self.text!r}")
        return SpecError(f"{what}, but {self.text!r} ends there")

    def axis(self, whole: int | None = None) -> Axis:
        token = self.peek()
        if token == ".":
            if whole is None:
                raise self.error("'.' stands for a whole dimension only; inside an expression write its size")
            self.at += 1
            return Fixed(whole)
        if token == "(":
            self.at += 1
            factors: list[Axis] = []
            while self.peek() != ")":
                factors.append(self.axis())
            self.at += 1
            return Product(tuple(factors))
        if token == "[":
            return Sum(self.between("[", "+", "]"))
        if token == "{":
            members = self.between("{", "|", "}")
            self.expect("@")
            return Family(self.word(), members)
        if token.isdecimal():
            self.at += 1
            return Fixed(int(token))
        name = self.word()
        if self.peek() == ":":
            self.at += 1
            return Label(name, self.axis())
        return Ref(name)

    def between(self, opening: str, separator: str, closing: str) -> tuple[Axis, ...]:
        self.expect(opening)
        found: list[Axis] = []
        if self.peek() != closing:
            found.append(self.axis())
            while self.peek() == separator:
                self.at += 1
                found.append(self.axis())
        self.expect(closing)
        return tuple(found)

    def word(self) -> str:
        if not is_name(self.peek()):
            raise self.error("expected an axis or a name")
        return self.next()


def parse_axis(text: str, size: int | None = None) -> Axis:
    """Read one axis expression; ``size`` is what a lone ``.`` stands for.

    Reading what `str` wrote gives an equal expression. Raises SpecError with the column at fault.

    Example:
        >>> parse_axis("(a 7)")
        Product(factors=(Ref(group='a'), Fixed(size=7)))
    """
    reader = _Reader(text)
    axis = reader.axis(size)
    if reader.peek():
        raise reader.error("expected the end of the axis")
    return axis


def parse_axes(text: str, shape: tuple[int, ...] | None = None) -> tuple[Axis, ...]:
    """Read one expression for each dimension; ``shape`` says what each lone ``.`` stands for.

    Raises SpecError with the column at fault, or if ``shape`` has another number of dimensions.
    """
    reader = _Reader(text)
    axes: list[Axis] = []
    while reader.peek():
        if shape is not None and len(axes) == len(shape):
            raise reader.error(f"shape {shape} has {len(shape)} dimensions, no more axes are due")
        axes.append(reader.axis(None if shape is None else shape[len(axes)]))
    if shape is not None and len(axes) != len(shape):
        raise SpecError(f"{text!r} gives {len(axes)} axes for the {len(shape)} dimensions of shape {shape}")
    return tuple(axes)
