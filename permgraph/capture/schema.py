"""What an operator's schema says of its arguments, read once: each look at a schema makes new Python objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Argument:
    """One argument of an operator: whether results may share its memory, and whether that is written to."""

    name: str
    default: Any
    shares: bool
    writes: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of an operator in order; `returned` names, for each result, those that it is, once written to."""

    arguments: tuple[Argument, ...]
    returned: tuple[tuple[str, ...], ...]


def operator_name(operator: Any) -> str:
    """The name of an operator overload without its namespace and overload; none for a callable without a schema."""
    name: str = getattr(operator, "_opname", "")
    return name


def is_random(operator: Any) -> bool:
    """Whether an operator overload draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


@cache
def signature(operator: Any) -> Signature | None:
    """The signature of an operator overload; None for a callable without a schema."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return None
    found = schema.arguments
    arguments = tuple(
        Argument(
            a.name,
            a.default_value if a.has_default_value() else None,
            a.alias_info is not None,
            a.alias_info is not None and a.alias_info.is_write,
        )
        for a in found
    )
    returned = []
    for result in schema.returns:
        given = result.alias_info if result.alias_info is not None and result.alias_info.is_write else None
        alike = (a.name for a in found if a.alias_info is not None and given is not None
                 and a.alias_info.before_set == given.before_set)  # fmt: skip
        returned.append(tuple(alike))
    return Signature(arguments, tuple(returned))
