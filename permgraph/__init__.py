"""Every permutation symmetry of an arbitrary PyTorch module, and the alignment of trained networks over it.

The public names stand in ``__init__.pyi``, each with the package it comes from, and are imported when they are first
used: ``import permgraph`` by itself imports neither torch nor anything else of weight.
"""

import importlib

import lazy_loader

__version__ = "0.1.0"

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]

_PACKAGES = frozenset(
    ("assignment", "connectivity", "inference", "io", "matching", "merging", "pictures", "rules", "spec", "studies")
)


def __getattr__(name: str) -> object:
    return importlib.import_module(f"{__name__}.{name}") if name in _PACKAGES else _public(name)
