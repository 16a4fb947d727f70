"""Training on the workers of a run: the story of one of them, and what they and the driver tell each other."""
