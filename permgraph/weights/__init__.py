"""State dicts as values: sharded and offloaded tensors, averages and interpolations."""
