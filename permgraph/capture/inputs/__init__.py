"""Example inputs: what a module is run on when the caller gives none. One file for each kind of model that is known."""

from __future__ import annotations

# Importing a file registers its finders; the newest is asked first.
from permgraph.capture.inputs import denoisers, graphs, layers, media, other, search  # noqa: F401
from permgraph.capture.inputs.registry import ExampleInputs, find_inputs, input_finder

__all__ = ["ExampleInputs", "find_inputs", "input_finder"]
