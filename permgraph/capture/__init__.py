"""Running a module once and writing down what it did: `nn.Module` to an annotated `torch.fx.Graph`."""

from __future__ import annotations

from permgraph.capture import finders as _finders  # noqa: F401  (registers the finders)
from permgraph.capture import finders_media as _finders_media  # noqa: F401  (and those asked before them)
from permgraph.capture import finders_more as _finders_more  # noqa: F401
from permgraph.capture.captured import Captured
from permgraph.capture.inputs import ExampleInputs, find_inputs, input_finder
from permgraph.capture.run import capture

__all__ = ["Captured", "ExampleInputs", "capture", "find_inputs", "input_finder"]
