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

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from permgraph.rules.call import Call

Rule = Callable[["Call"], None]
F = TypeVar("F", bound=Rule)
ENTRY_POINTS = "permgraph.rules"
log = logging.getLogger(__name__)
_rules: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[F], F]:
    """Register a function as the rule of these operators.

    The function gets a `Call`: the operator's arguments by the names of its schema (``call["weight"]``, or
    ``call.get("bias")`` where one may be missing), and its results (``call.out``, ``call.results``). It says which
    dimensions are permuted alike by giving them the same label; see the head of `permgraph.rules.call` for all that
    labels can say. It must be sound: what it does not tie may be permuted freely. `check_rule` tells whether it is.

    Args:
        operators: names such as ``"mylib.scale_channels"``, for all overloads, or ``"aten.add.Tensor"`` for one.

    >>> @rule("mylib.scale_channels")
    ... def scale_channels(call):
    ...     call.link((call["x"], "n c ..."), (call["scale"], "c"), (call.out, "n c ..."))
    """

    def register(function: F) -> F:
        for operator in operators:
            _rules[operator] = function
        return function

    return register


def find_rule(operator: str) -> Rule | None:
    """The rule of an operator such as ``"aten.add_.Tensor"``: of the overload, of all overloads, of its twin."""
    key = rule_name(operator)
    return None if key is None else _rules[key]


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
    return dict(_rules)


@functools.cache
def load_entry_points() -> None:
    """Load the rules that installed packages bring, once. One that fails is left out, with a warning in the log."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            log.warning("the rules of %s (%s) could not be loaded: %s", entry.name, entry.value, error)
