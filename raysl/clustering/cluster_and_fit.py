"""ClusterFit: a teacher's features, their clusters, and a new network that predicts them.

Yan et al., "ClusterFit: Improving Generalization of Visual Representations", arXiv 1912.03330. In the run's folder:

    round-1/features/       the teacher's features of all images
    round-1/clusters/       their clusters, centroids and quality card
    round-1/run/            the student, an ordinary run of the method "clusterfit"
    round-2/...             the same with that student as the teacher
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from raysl.backbone.network import BackboneConfig
from raysl.clustering import lloyd as kmeans
from raysl.clustering.options import KMeansConfig
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.extraction import FeaturesConfig, make
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.launch import pretrain


@dataclass(frozen=True)
class ClusterfitConfig:
    """Fits a new network to the clusters of another one's features. Takes the flags of `raysl pretrain` for the student
    too, all but --method.

    Args:
        teacher: folder of a run, RUN/checkpoints/step-NNN, a file of weights, or "random".
        k: number of clusters.
        rounds: each after the first has the student before it as its teacher.
        layer: of the teacher that is clustered.
        l2: rows are divided by their length before they are clustered, as in VISSL.
        pca: principal components to cluster instead of whole rows; 0 for whole rows.
        iterations: most iterations of k-means.
        init: how its centroids start.
        spherical: whether centroids have length 1.
        teacher_backbone: of a file of weights, or of "random".
    """

    teacher: str
    k: int
    rounds: int = 1
    layer: str = "pooled"
    l2: bool = True
    pca: int = 0
    iterations: int = 50
    init: Literal["rows", "k-means++", "k-means||"] = "rows"
    spherical: bool = False
    teacher_backbone: BackboneConfig = field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UserError(f"k is {self.k}; there must be at least 2 clusters to tell apart.")
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}; it must be at least 1.")


def clusterfit(config: ClusterfitConfig, student: Pretraining, say: Callable[[str], None] = print) -> Run:
    """Does all rounds. What is finished is skipped, and what was interrupted goes on.

    Args:
        config: of teacher and clusters.
        student: its run is the folder of everything; its method and parts are not looked at, its seed is that of the
            clustering too. The student learns on the data that are clustered.
        say: takes one line of progress at a time.

    Returns:
        The run of the last student. Its metadata names teacher, K, objective and fingerprint.

    Raises:
        UserError: see `features.make`, `kmeans.fit` and `pretrain`.
    """
    teacher, backbone = config.teacher, config.teacher_backbone
    clustering = KMeansConfig(
        k=config.k,
        iterations=config.iterations,
        init=config.init,
        spherical=config.spherical,
        seed=student.seed,
    )
    for number in range(1, config.rounds + 1):
        place = Folder(student.run) / f"round-{number}"
        say(f"Round {number} of {config.rounds}: features of {teacher}.")
        wanted = FeaturesConfig(
            data=student.data,
            out=str(place / "features"),
            layer=config.layer,
            l2=config.l2,
            pca=config.pca,
            backbone=backbone,
        )
        table = make(teacher, wanted, say)
        clusters = kmeans.fit(str(table.folder), clustering, str(place / "clusters"), say)
        learned = replace(
            student,
            run=str(place / "run"),
            method="clusterfit",
            parts={"clusterfit": {"labels": clusters.assignments}},
        )
        run = pretrain(learned, say)
        teacher = str(run.folder)
    return run
