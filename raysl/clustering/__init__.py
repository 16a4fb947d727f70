"""k-means over Ray actors: exact, resumable, and the same result on any number of actors.

`driver.fit` is the way in. Nothing is imported here, since actors pass through this file and must stay free of torch.
"""
