"""The table of rules: which function says what an operator ties together.

A rule is a function of one `Call`, registered under an operator's name: ``"aten.addmm"`` for all of its overloads,
``"aten.add.Tensor"`` for one. An in-place operator (``aten.add_``) is read by the rule of its twin without the
underscore unless it has one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from permgraph.rules.call import Call

Rule = Callable[["Call"], None]
F = TypeVar("F", bound=Rule)
_rules: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[F], F]:
    """Register a function as the rule of these operators.

    >>> @rule("mylib.scale_channels")                        # doctest: +SKIP
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
    namespace, _, rest = operator.partition(".")
    name, _, overload = rest.partition(".")
    names = [name, name[:-1]] if name.endswith("_") and not name.endswith("__") else [name]
    for candidate in names:
        for key in (f"{namespace}.{candidate}.{overload}", f"{namespace}.{candidate}"):
            if key in _rules:
                return _rules[key]
    return None


def registered() -> dict[str, Rule]:
    """A copy of the table."""
    return dict(_rules)
