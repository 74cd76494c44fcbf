"""An example call of an operator with the axes that its rule should give, for `check_rule` to be tried on.

Sizes that have nothing to do with each other are different primes. In the axes a letter is a free axis, a dot stays
put, ``;`` comes before the axis that an index tensor's values number, ``where a per b`` says which axes may be permuted
differently where. Names of letters do not matter. After ``~`` stands why a rule denies a symmetry that is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from permgraph.rules.registry import rule_name
from permgraph.verification.rule import RuleReport, check_rule
from permgraph.verification.trial_of_rule import attempt

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """A tensor that each case makes anew, from a generator of its own."""

    kind: str
    shape: tuple[int, ...]
    high: int = 2

    def make(self, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "float":
            return torch.rand(self.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        if self.kind == "normal":
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "complex":
            return torch.randn(self.shape, generator=generator, dtype=torch.complex128)
        if self.kind == "distinct":
            return torch.randperm(self.high, generator=generator)[: self.shape[0]]
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < 0.5
        count = math.prod(self.shape)  # as many different ones as there can be
        return (torch.randperm(count, generator=generator) % self.high).reshape(self.shape)


def F(*shape: int) -> Made:
    """Between 0.1 and 0.9, where every function is defined."""
    return Made("float", shape)


def N(*shape: int) -> Made:
    """Standard normal."""
    return Made("normal", shape)


def C(*shape: int) -> Made:
    """Complex."""
    return Made("complex", shape)


def Z(high: int, *shape: int) -> Made:
    """Integers from zero to below `high`, all of them if there is room."""
    return Made("int", shape, high)


def D(high: int, count: int) -> Made:
    """Distinct integers from zero to below `high`."""
    return Made("distinct", (count,), high)


def B(*shape: int) -> Made:
    """True or false."""
    return Made("bool", shape)


@dataclass(frozen=True)
class Example:
    """One row of the table.

    Args:
        name: the operator, or a title.
        op: an operator, or a function of tensors.
        args: its arguments, with a `Made` for each tensor; a dictionary at the end is keywords.
        axes: the axes that the rule should give, as `RuleReport.axes` has them.
        strict: why the rule denies some symmetry, where it knowingly does.
    """

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    axes: str
    strict: str = ""

    def check(self) -> RuleReport:
        """What `check_rule` says of this call."""
        args, kwargs = self._arguments()
        return check_rule(self.op, *args, **kwargs)

    def problem(self, report: RuleReport) -> str | None:
        """What is not as it should be in the report of this example, or None."""
        if report.verdict in ("incorrect", "no rule"):
            return f"{report.verdict}: {'; '.join(report.problems)}"
        if not report.matches(self.axes):
            return f"the axes are {report.axes}, not {self.axes}"
        if (report.verdict == "too strict") != bool(self.strict):
            return f"{report.verdict}: {'; '.join(report.problems) or f'and yet {self.strict}'}"
        return None

    def calls(self, operator: str) -> bool:
        """Whether this runs an operator, by the name of its rule: ``"aten.add"``."""
        if isinstance(self.op, OpOverload):
            return rule_name(str(self.op)) == operator
        word = operator.split(".")[1]
        return word in _words(self.op.__code__) and operator in map(rule_name, self.operators())

    def operators(self) -> tuple[str, ...]:
        """The operators that run."""
        return attempt(self.op, *self._arguments()).operators

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        args = tree_map(lambda leaf: leaf.make(generator) if isinstance(leaf, Made) else leaf, self.args)
        kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
        return args[:-1] if kwargs else args, kwargs


def _words(code: CodeType) -> set[str]:
    """The names in a function, and in those inside it."""
    inner = [_words(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _operator(name: str) -> Any:
    """``"add.Tensor"``, or ``"mm"`` for the default overload; None if this torch has none of that name."""
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base, None), overload or "default", None)


def rows(*table: Sequence[Any]) -> list[Example]:
    """Examples from rows: operators' names (or a title and a function), arguments, and the axes."""
    examples = []
    for names, *args, axes in table:
        expected, _, strict = axes.partition(" ~ ")
        if args and callable(args[0]) and not isinstance(args[0], Made):
            examples.append(Example(names, args[0], tuple(args[1:]), expected, strict))
            continue
        operators = {name: _operator(name) for name in names.split()}
        examples += [Example(name, op, tuple(args), expected, strict) for name, op in operators.items() if op]
    return examples
