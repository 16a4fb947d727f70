"""Tensors between workers, and from the host to a GPU."""
