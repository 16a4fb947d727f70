"""ClusterFit: cluster the features of a teacher, and train a new network to predict the clusters.

Yan et al., "ClusterFit: Improving Generalization of Visual Representations", arXiv 1912.03330. In the run's folder:

    round-1/features/       features of all images by the teacher
    round-1/clusters/       their clusters, centroids and quality summary
    round-1/run/            the student, an ordinary run of the method "clusterfit"
    round-2/...             the same, with that student as the teacher
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Annotated

from raysl.backbone.network import BackboneConfig
from raysl.clustering import lloyd
from raysl.clustering.options import Init, KMeansConfig, check_faiss
from raysl.config import Pretraining, run_folder
from raysl.errors import UserError
from raysl.extraction import encoders
from raysl.extraction.features import MAX_COMPONENTS, FeaturesConfig, compute_features
from raysl.fields import Bounds, check
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.launch import pretrain

_log = logging.getLogger("raysl.clustering")


@dataclass(frozen=True)
class ClusterfitConfig:
    """Train a new network on the clusters of another network's features. Takes the flags of `raysl pretrain` for the
    student too, except --method.

    Args:
        teacher: folder of a run, RUN/checkpoints/step-NNN, a weights file, or "random".
        k: number of clusters, at least 2.
        rounds: number of rounds, 1 to 100. The student of a round is the teacher of the next.
        layer: layer of the teacher to cluster.
        l2: divide rows by their norm before clustering, as in VISSL.
        pca: number of principal components to cluster; 0 for whole rows.
        iterations: maximum number of iterations of k-means.
        init: initial centroids of k-means.
        spherical: keep centroids at norm 1.
        teacher_backbone: backbone of a weights file, or of "random".
    """

    teacher: str
    k: Annotated[int, Bounds(2, 2**31 - 1, hint="one cluster tells no images apart")]
    rounds: Annotated[int, Bounds(1, 100)] = 1
    layer: str = "pooled"
    l2: bool = True
    pca: Annotated[int, Bounds(0, MAX_COMPONENTS)] = 0
    iterations: Annotated[int, Bounds(1, 10**6)] = 50
    init: Init = "rows"
    spherical: bool = False
    teacher_backbone: BackboneConfig = field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        check(self)
        if not self.teacher.strip():
            raise UserError("--teacher is empty. Give the folder of a run, a weights file, or random.")


def check_before_data(config: ClusterfitConfig) -> None:
    """Raise UserError if the package of k-means is missing, or the teacher cannot be loaded or lacks the layer."""
    check_faiss()
    teacher = encoders.encoder_by_name(config.teacher, config.teacher_backbone)
    encoders.check_encoder(teacher, (config.layer,))


def round_folder(run: str, number: int) -> Folder:
    """Return the folder of a round, counted from 1, in which "run" is the student."""
    return Folder(run) / f"round-{number}"


def clusterfit(config: ClusterfitConfig, student: Pretraining, *, local: bool = False) -> Run:
    """Do all rounds. Finished steps are skipped, and interrupted ones resume.

    Args:
        config: configuration of the teacher and of the clusters.
        student: configuration of the student. Its run is the folder of all files, its data are clustered and learned
            from, and its seed is also that of the clustering. Its method and parts are ignored.
        local: train the students in this process; see `pretrain`.

    Returns:
        The run of the last student. Its metadata names teacher, K, objective and fingerprint.

    Raises:
        UserError: see `extraction.compute_features`, `lloyd.fit` and `pretrain`.
    """
    run_folder.check_free(student.run)
    kmeans = KMeansConfig(
        config.k, config.iterations, init=config.init, spherical=config.spherical, seed=student.seed
    )
    teacher, backbone = config.teacher, config.teacher_backbone
    for number in range(1, config.rounds + 1):
        folder = round_folder(student.run, number)
        _log.info("Round %d of %d: features of %s.", number, config.rounds, teacher)
        features_config = FeaturesConfig(
            data=student.data,
            out=str(folder / "features"),
            layer=config.layer,
            l2=config.l2,
            pca=config.pca,
            backbone=backbone,
        )
        store = compute_features(teacher, features_config)
        clusters = lloyd.fit(str(store.folder), kmeans, str(folder / "clusters"))
        student_config = replace(
            student,
            run=str(folder / "run"),
            method="clusterfit",
            parts={"clusterfit": {"labels": clusters.assignments}},
        )
        run = pretrain(student_config, local=local or None)
        teacher = str(run.folder)
    return run
