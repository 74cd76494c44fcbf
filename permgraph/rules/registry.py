"""The table of rules: which function says what an operator ties together.

A rule is a function of one `Call`, registered under an operator's name: ``"aten.addmm"`` for all of its overloads,
``"aten.add.Tensor"`` for one. An in-place operator (``aten.add_``) is read by the rule of its twin without the
underscore unless it has one of its own. Of two rules registered under one name, the later one counts.

Installed packages may bring rules for their own operators: the entry points of the group ``permgraph.rules`` are loaded
when a rule is first looked up. In the package's ``pyproject.toml``::

    [project.entry-points."permgraph.rules"]
    mylib = "mylib.permgraph_rules"
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from permgraph.rules.properties import UNDECLARED, Acts, Properties, Values

if TYPE_CHECKING:
    from permgraph.rules.call import Call

Rule = Callable[["Call"], None]
F = TypeVar("F", bound=Rule)
ENTRY_POINTS = "permgraph.rules"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegisteredRule:
    """A row of the table of rules.

    Args:
        name: the operator, ``"aten.addmm"`` for all of its overloads.
        function: the rule.
        properties: what its registration declares of the operator's values.
    """

    name: str
    function: Rule
    properties: Properties

    @property
    def place(self) -> str:
        """File and line of the rule, ``"…/permgraph/rules/linear.py:12"``."""
        code = inspect.unwrap(self.function).__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def __str__(self) -> str:
        return self.name


_rules: dict[str, RegisteredRule] = {}


def rule(
    *operators: str,
    values: Values = "unknown",
    repeats_if_zero: tuple[str, ...] = (),
    compares: bool = False,
    zeros: Literal["all", "any"] | None = None,
    factors: tuple[tuple[str, int], tuple[str, int]] | None = None,
    bias: tuple[str, int] | None = None,
    reads_values: bool = True,
    acts: Acts = "unknown",
) -> Callable[[F], F]:
    """Register a function as the rule of these operators, and declare what is known of the values of their results.

    The function gets a `Call`: the operator's arguments by the names of its schema (``call["weight"]``, or
    ``call.get("bias")`` where one may be missing), and its results (``call.out``, ``call.results``). It says which
    dimensions are permuted alike by giving them the same label; see the head of `permgraph.rules.pattern` for all that
    labels can say. It must be sound: what it does not tie may be permuted freely. `check_rule` tells whether it is.

    Args:
        operators: names such as ``"mylib.scale_channels"``, for all overloads, or ``"aten.add.Tensor"`` for one.
        values: where the values of the results come from, see `permgraph.rules.properties.Values`. If nothing is said,
            elements may be equal, so that what ranks them pins them.
        repeats_if_zero: arguments that flatten the function if they are the number zero.
        compares: the result is a mask that tells large elements from small ones.
        zeros: the result is zero throughout where ``"all"`` tensors among the arguments are, or where ``"any"`` is.
        factors: the two factors of a product, each with the dimension over which the product sums.
        bias: the argument that is added to a product, and the dimension of the result along which it varies.
        reads_values: whether any element of the arguments is read, rather than their shape alone.
        acts: how the operator acts on scalings, rotations and other matrices along its axes, see
            `permgraph.rules.properties.Acts`. If nothing is said, only permutations pass.

    Raises:
        ValueError: `values`, `acts` or `zeros` is none of the words above.

    >>> @rule("mylib.scale_channels")
    ... def scale_channels(call):
    ...     call.link((call["x"], "n c ..."), (call["scale"], "c"), (call.out, "n c ..."))
    """

    properties = Properties(values, repeats_if_zero, compares, zeros, factors, bias, reads_values, acts)

    def register(function: F) -> F:
        for operator in operators:
            _rules[operator] = RegisteredRule(operator, function, properties)
        return function

    return register


def aten(names: str) -> tuple[str, ...]:
    """``"add mul"`` as the names of torch's own operators: ``("aten.add", "aten.mul")``."""
    return tuple(f"aten.{name}" for name in names.split())


def find_rule(operator: str) -> Rule | None:
    """The rule of an operator such as ``"aten.add_.Tensor"``: of the overload, of all overloads, of its twin."""
    key = rule_name(operator)
    return None if key is None else _rules[key].function


def properties_of(operator: str) -> Properties:
    """What is declared of an operator, looked up as `find_rule` does; the strictest answers if it has no rule."""
    key = rule_name(operator)
    return UNDECLARED if key is None else _rules[key].properties


def rule_name(operator: str) -> str | None:
    """The name under which the rule of an operator is registered, or None if it has none."""
    load_entry_points()
    namespace, _, rest = operator.partition(".")
    name, _, overload = rest.partition(".")
    names = [name, name[:-1]] if name.endswith("_") and not name.endswith("__") else [name]
    for candidate in names:
        for key in (f"{namespace}.{candidate}.{overload}", f"{namespace}.{candidate}"):
            if key in _rules:
                return key
    return None


def registered() -> dict[str, Rule]:
    """A copy of the table."""
    load_entry_points()
    return {name: entry.function for name, entry in _rules.items()}


def list_rules(filter: str | None = None) -> list[RegisteredRule]:
    """The rules that are registered, those of installed packages included, by name.

    Args:
        filter: a name, in which ``*`` stands for anything; without a ``*`` it may be any part of the name.

    Returns:
        For each rule its `name`, `function`, `place` (file and line) and declared `properties`.

    >>> [str(entry) for entry in list_rules("aten.*addmm")]
    ['aten._sparse_addmm', 'aten.addmm']
    """
    load_entry_points()
    pattern = "*" if filter is None else filter if "*" in filter else f"*{filter}*"
    return [_rules[name] for name in sorted(_rules) if fnmatch.fnmatchcase(name, pattern)]


@functools.cache
def load_entry_points() -> None:
    """Load the rules that installed packages bring, once. One that fails is left out, with a warning in the log."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            log.warning("the rules of %s (%s) could not be loaded: %s", entry.name, entry.value, error)
