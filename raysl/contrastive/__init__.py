"""The parts of contrastive learning: memory bank, negatives and loss equations."""
