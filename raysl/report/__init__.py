"""Reports: one HTML page that holds all it needs, of a sweep or of runs that stand side by side."""
