"""The schedule of 105 epochs of ImageNet that VISSL uses for pretext tasks (Goyal et al., arXiv 1905.01235)."""

from __future__ import annotations

from raysl.optim import OptimConfig

EPOCHS = 105


def optim(warmup_epochs: int = 0, warmup_start: float = 0.0) -> OptimConfig:
    """Return SGD with a rate of 0.1, divided by ten after 30, 60, 90 and 100 epochs.

    Args:
        warmup_epochs: epochs in which the rate rises.
        warmup_start: first rate as a share of the full rate.
    """
    return OptimConfig(
        "sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=tuple(epoch / EPOCHS for epoch in (30, 60, 90, 100)),
        warmup=warmup_epochs / EPOCHS,
        warmup_start=warmup_start,
    )
