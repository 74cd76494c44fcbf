"""The matching problem: what is maximised, over which blocks of which tensors, and which groups move together."""
