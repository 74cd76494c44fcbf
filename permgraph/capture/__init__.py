"""Running a module once and writing down what it did: `nn.Module` to an annotated `torch.fx.Graph`."""

from __future__ import annotations

from permgraph.capture.captured import Captured
from permgraph.capture.inputs import ExampleInputs, find_inputs, input_finder
from permgraph.capture.run import capture
from permgraph.capture.untied import untied, untied_config

__all__ = ["Captured", "ExampleInputs", "capture", "find_inputs", "input_finder", "untied", "untied_config"]
