"""Cluster features by k-means over Ray actors: exact, resumable, and with equal results on any number of actors.

`lloyd.fit` is the entry point. Nothing is imported here, because actors import this file and must stay free of torch.
"""
