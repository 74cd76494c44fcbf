"""Running networks on data: batches, losses, descent, BatchNorm statistics and REPAIR."""
