"""Keywords by their former names: taken for a while, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[T], T]:
    """Decorate a function or a dataclass whose keywords have new names.

    A dataclass has the former names as attributes too; where both names are given, as `dataclasses.replace` does, the
    former is the one that was asked for.

    Args:
        names: former name to new one.

    Example:
        >>> @renamed(start="init")
        ... def begin(init=0):
        ...     return init
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     begin(start=3)
        3
    """

    def decorate(target: T) -> T:
        call: Callable[..., Any] = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

        @functools.wraps(call)
        def translated(*args: Any, **kwargs: Any) -> Any:
            for old in kwargs.keys() & names.keys():
                kwargs[names[old]] = kwargs.pop(old)
                _warn(target.__name__, old, names[old])
            return call(*args, **kwargs)

        if not isinstance(target, type):
            return translated  # type: ignore[return-value]
        target.__init__ = translated  # type: ignore[misc]
        for old, new in names.items():
            setattr(target, old, property(functools.partial(_read, old=old, new=new)))
        target.__former_names__ = dict(names)  # type: ignore[attr-defined]
        return target

    return decorate


def former_names(kind: type) -> dict[str, str]:
    """The former names of a class's settings, each to its present one."""
    return dict(getattr(kind, "__former_names__", {}))


def _read(owner: Any, *, old: str, new: str) -> Any:
    _warn(type(owner).__name__, old, new)
    return getattr(owner, new)


def _warn(where: str, old: str, new: str) -> None:
    warnings.warn(f"{where}: {old!r} is now called {new!r}", DeprecationWarning, stacklevel=3)
