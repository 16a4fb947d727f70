"""What contrast needs: the memory bank, negatives out of it, and the equations."""
