"""Objects in images: a Faster R-CNN that begins with the pretrained trunk.

Command:  python experiments/detection.py --detection.data VOC --data DATA --runs RUNS --out OUT
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run that is not there yet, many a probe (a GPU is advised). With --local: a few minutes.
Expect:   pretrained trunks ahead of untrained ones, most at AP75.

PIRL (Misra and van der Maaten 2020), table 1; the probe `detection`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raysl.errors import UserError
from raysl.experiment import command
from raysl.lineup import LineupFlags, measured, reported, small, trained
from raysl.probes.detection import Config as Detection


@dataclass(frozen=True)
class DetectionFlags(LineupFlags):
    """Pretrains what is missing and learns detection from each trunk.

    Args:
        detection: protocol of the probe; its `data` is a folder in the layout of PASCAL VOC.
    """

    out: str = "results/detection"
    methods: tuple[str, ...] = ("predict-jigsaw", "pirl-jigsaw", "supervised")
    detection: Detection = field(default_factory=Detection)


def main(flags: DetectionFlags) -> None:
    """Prints the table and writes the report."""
    flags = small(flags)
    config = flags.detection
    if not config.data:
        raise UserError(
            "No boxes are given. Name a folder in the layout of PASCAL VOC with --detection.data."
        )
    if flags.local:
        flags = replace(flags, methods=flags.methods[:1])
        config = replace(config, epochs=1, sides=(64,), width=32)
    runs = trained(flags, ["detection"])
    measured(runs, flags, ["detection"], configs={"detection": config})
    reported(runs, flags, ["detection"])


if __name__ == "__main__":
    command(main, DetectionFlags)
