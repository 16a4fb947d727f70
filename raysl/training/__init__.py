"""Train a run: the loop of a worker, and the messages between the workers and their driver."""
