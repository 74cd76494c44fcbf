"""Checkpoints on disk: read a tensor at a time, written whole or not at all.

A checkpoint is a safetensors file, a PyTorch file, a folder with one of them, or a folder with an index that shares the
tensors out over several. Nothing is unpickled that could run code.
"""

from permgraph.io.checkpoint import Checkpoint, Renamed, match_names, open_checkpoint
from permgraph.io.safetensors_file import SafetensorsFile
from permgraph.io.staging import Staging
from permgraph.io.tensors import TensorFile, TensorFormat
from permgraph.io.torch_file import TorchFile
from permgraph.io.write import write_checkpoint

__all__ = [
    "Checkpoint",
    "Renamed",
    "SafetensorsFile",
    "Staging",
    "TensorFile",
    "TensorFormat",
    "TorchFile",
    "match_names",
    "open_checkpoint",
    "write_checkpoint",
]
