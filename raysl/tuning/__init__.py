"""Sweeps: many runs that differ in a few fields, judged by a probe at equal epochs. See `driver.sweep`."""
