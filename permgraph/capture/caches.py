"""Function caches, such as `functools.lru_cache` puts around a table of positions: emptied around a forward pass.

A cache outlives the pass that filled it. One that met fake tensors would hand them to the next real pass, whose inputs
are of the same sizes, and so break the caller's own model; one that met another pass's weights would hide them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from permgraph.capture.python_state import Remains, defining_modules


@contextlib.contextmanager
def caches_emptied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forgets, before and after, what is cached by the functions of the Python modules that define these modules.

    What the pass keeps in these modules by other means is taken away again, see `permgraph.capture.python_state`.
    """
    modules = list(modules)
    found = list(function_caches(modules))
    for cache in found:
        cache.cache_clear()
    remains = Remains(modules)
    try:
        yield
    finally:
        remains.put_back()
        for cache in found:
            cache.cache_clear()


def function_caches(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The caches around functions and methods where the classes of these modules, and those they derive from, stand."""
    seen: set[int] = set()
    for name in defining_modules(modules):
        for value in list(vars(sys.modules.get(name, object)).values()):
            inner = list(vars(value).values()) if isinstance(value, type) and value.__module__ == name else [value]
            for function in inner:
                for cache in _around(function):
                    if id(cache) not in seen:
                        seen.add(id(cache))
                        yield cache


def _around(function: Any) -> Iterator[Any]:
    """The caches that a function is, or that it calls as the wrapper of another."""
    function = getattr(function, "__func__", getattr(function, "fget", function))
    if isinstance(function, functools._lru_cache_wrapper):
        yield function
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                yield cell.cell_contents
