"""What goes with the weights: optimizer states, averages, masks, adapters and differences, moved as the weights are."""

from permgraph.transporting.transport import transport

__all__ = ["transport"]
