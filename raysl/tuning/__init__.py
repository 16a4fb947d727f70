"""Sweeps: runs that differ in a few fields, compared by a probe at equal epochs. Ray Tune runs the trials."""
