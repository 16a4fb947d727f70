"""The report of a sweep: one HTML page that holds all it needs, and its figures as pictures."""
