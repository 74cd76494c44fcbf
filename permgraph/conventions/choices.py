"""Settings that are one of a few words."""

from __future__ import annotations

from permgraph.errors import PermgraphError


def require_choice(
    setting: str, value: object, *choices: str, or_a: str = "", error: type[PermgraphError] = PermgraphError
) -> None:
    """Raise unless a setting is one of these words, or no word at all where ``or_a`` names what else it may be.

    Example:
        >>> require_choice("order", "given", "informed", "random", "given")
        >>> require_choice("order", "any", "informed", "random", "given")
        Traceback (most recent call last):
        permgraph.errors.PermgraphError: unknown order 'any'; choose 'informed', 'random' or 'given'
    """
    if value not in choices and (isinstance(value, str) or not or_a):
        *first, last = [*map(repr, choices), *([f"a {or_a}"] if or_a else [])]
        raise error(f"unknown {setting} {value!r}; choose {', '.join(first)} or {last}")
