"""The claims of two lectures on self-supervised learning, as contrasts of results that `lectures` judges."""

from __future__ import annotations

from raysl.experiment.lectures import Claim, Contrast, Term


def _more(says: str, better: Term, worse: Term) -> Contrast:
    return Contrast(says, (better, -worse))


def _gain(label: str, layer: str) -> tuple[Term, Term]:
    """Return the terms of the gain over the untrained backbone at a layer."""
    return Term(label, "linear by layer", layer), -Term("untrained", "linear by layer", layer)


PIRL, PREDICT = "pirl-jigsaw", "predict-jigsaw"
CLAIMS = (
    Claim(
        "layers, prediction",
        "What predicts a transform loses at the last layer what it gained before",
        "PIRL, figure 6",
        (
            Contrast(
                "gain of predict-jigsaw over the untrained backbone, res2 less pooled, linear",
                (*_gain(PREDICT, "res2"), *(-term for term in _gain(PREDICT, "pooled"))),
            ),
        ),
    ),
    Claim(
        "layers, PIRL",
        "PIRL gains most at the last layer",
        "PIRL, figure 6",
        (
            Contrast(
                "gain of PIRL over the untrained backbone, pooled less res2, linear",
                (*_gain(PIRL, "pooled"), *(-term for term in _gain(PIRL, "res2"))),
            ),
            _more(
                "PIRL less predict-jigsaw at the pooled layer, linear",
                Term(PIRL, "linear by layer"),
                Term(PREDICT, "linear by layer"),
            ),
        ),
    ),
    Claim(
        "invariance",
        "Features of PIRL are invariant to the jigsaw, those that predict it are not",
        "PIRL, figure 5",
        (
            _more(
                "PIRL less untrained", Term(PIRL, "invariance/jigsaw"), Term("untrained", "invariance/jigsaw")
            ),
            _more(
                "untrained less predict-jigsaw",
                Term("untrained", "invariance/jigsaw"),
                Term(PREDICT, "invariance/jigsaw"),
            ),
        ),
    ),
    Claim(
        "invariance and accuracy",
        "Prediction, clustering, PIRL: more invariance goes with more accuracy",
        "lecture 10-2",
        (
            _more(
                "ClusterFit less predict-jigsaw, linear",
                Term("clusterfit", "linear"),
                Term(PREDICT, "linear"),
            ),
            _more("PIRL less ClusterFit, linear", Term(PIRL, "linear"), Term("clusterfit", "linear")),
            _more(
                "ClusterFit less predict-jigsaw, invariance",
                Term("clusterfit", "invariance"),
                Term(PREDICT, "invariance"),
            ),
            _more(
                "PIRL less ClusterFit, invariance", Term(PIRL, "invariance"), Term("clusterfit", "invariance")
            ),
        ),
    ),
    Claim(
        "few labels",
        "Pretraining helps most with the fewest labels",
        "PIRL, table 3",
        (
            _more(
                "PIRL less untrained, top-1 with 1 % of the labels",
                Term(PIRL, "top1@1%"),
                Term("untrained", "top1@1%"),
            ),
            _more(
                "PIRL less predict-jigsaw, top-1 with 1 % of the labels",
                Term(PIRL, "top1@1%"),
                Term(PREDICT, "top1@1%"),
            ),
            Contrast(
                "gain of PIRL with 1 % less that with 10 % of the labels",
                (
                    Term(PIRL, "top1@1%"),
                    -Term("untrained", "top1@1%"),
                    -Term(PIRL, "top1@10%"),
                    Term("untrained", "top1@10%"),
                ),
            ),
        ),
    ),
    Claim(
        "detection",
        "A detector is better from PIRL than from untrained weights",
        "PIRL, table 1",
        (_more("PIRL less untrained, AP75", Term(PIRL, "AP75"), Term("untrained", "AP75")),),
    ),
    Claim(
        "uncurated",
        "PIRL loses less than prediction when it learns from other images",
        "PIRL, table 4",
        (
            Contrast(
                "loss of predict-jigsaw less that of PIRL, linear",
                (
                    Term(PREDICT, "linear"),
                    -Term(f"uncurated/{PREDICT}", "linear"),
                    -Term(PIRL, "linear"),
                    Term(f"uncurated/{PIRL}", "linear"),
                ),
            ),
        ),
    ),
    Claim(
        "two tasks",
        "Two tasks together are better than each alone",
        "Doersch and Zisserman 2017, table 1",
        tuple(
            _more(
                f"both less {name}, linear",
                Term("multitask-relative_position,colorization", "linear by layer"),
                Term(f"predict-{name}", "linear by layer"),
            )
            for name in ("relative_position", "colorization")
        ),
    ),
    Claim(
        "permutations",
        "PIRL gains from more permutations",
        "PIRL, figure 9",
        (
            _more(
                "all less 1, kNN", Term("num_permutations=362880", "knn"), Term("num_permutations=1", "knn")
            ),
        ),
    ),
    Claim(
        "negatives",
        "PIRL gains from more negatives",
        "PIRL, figure 10",
        (_more("4,096 less 64, kNN", Term("num_negatives=4096", "knn"), Term("num_negatives=64", "knn")),),
    ),
    Claim(
        "lambda",
        "The best lambda is in the middle",
        "PIRL, figure 8",
        (
            _more("0.5 less 0, kNN", Term("lambda=0.5", "knn"), Term("lambda=0", "knn")),
            _more("0.5 less 1, kNN", Term("lambda=0.5", "knn"), Term("lambda=1", "knn")),
        ),
    ),
    Claim(
        "ClusterFit",
        "ClusterFit is better than its teacher",
        "ClusterFit, table 4",
        (
            _more(
                "ClusterFit less predict-jigsaw, linear",
                Term("clusterfit", "linear"),
                Term(PREDICT, "linear"),
            ),
            _more("ClusterFit less predict-jigsaw, kNN", Term("clusterfit", "knn"), Term(PREDICT, "knn")),
        ),
    ),
    Claim(
        "label noise",
        "ClusterFit suffers less from wrong labels than its teacher",
        "ClusterFit, figure 3",
        (
            _more(
                "ClusterFit less teacher with 75 % wrong labels, linear",
                Term("ClusterFit, noise 0.75", "linear"),
                Term("teacher, noise 0.75", "linear"),
            ),
            Contrast(
                "loss of the teacher less that of ClusterFit from 0 to 75 % wrong labels, linear",
                (
                    Term("teacher, noise 0", "linear"),
                    -Term("teacher, noise 0.75", "linear"),
                    -Term("ClusterFit, noise 0", "linear"),
                    Term("ClusterFit, noise 0.75", "linear"),
                ),
            ),
        ),
    ),
    Claim(
        "which transform",
        "Jigsaw is a better transform for PIRL than rotation, and both together are best",
        "PIRL, section 5",
        (
            _more("jigsaw less rotation, kNN", Term(PIRL, "knn"), Term("pirl-rotation", "knn")),
            _more("both less jigsaw, kNN", Term("pirl-rotation+jigsaw", "knn"), Term(PIRL, "knn")),
        ),
    ),
    Claim(
        "PIRL and prediction",
        "Comparing a transform is better than predicting it",
        "PIRL, table 2",
        (
            _more("jigsaw: PIRL less prediction, kNN", Term(PIRL, "knn"), Term(PREDICT, "knn")),
            _more(
                "rotation: PIRL less prediction, kNN",
                Term("pirl-rotation", "knn"),
                Term("predict-rotation", "knn"),
            ),
        ),
    ),
    Claim(
        "saturation",
        "Longer training on the same images still helps",
        "lecture 10-2, open question",
        (
            _more(
                "PIRL less PIRL with a tenth of the steps, kNN",
                Term(PIRL, "knn"),
                Term(f"short/{PIRL}", "knn"),
            ),
        ),
    ),
    Claim(
        "width and data",
        "A wider network and more different images still help, for as many steps",
        "lecture 10-2, open question; Goyal et al. 2019, figure 2",
        (
            _more(
                "twice the width less the usual, kNN",
                Term(f"saturation/wide-all/{PIRL}", "knn"),
                Term(f"saturation/usual-all/{PIRL}", "knn"),
            ),
            _more(
                "all images less a fifth of them, kNN",
                Term(f"saturation/usual-all/{PIRL}", "knn"),
                Term(f"saturation/usual-few/{PIRL}", "knn"),
            ),
        ),
    ),
    Claim(
        "which transforms",
        "SimCLR needs random crops most, then changes of color",
        "lecture 10-2, open question; SimCLR, figure 5",
        (
            _more(
                "without color jitter less without crops, kNN",
                Term("transforms/without-jitter/simclr", "knn"),
                Term("transforms/without-crops/simclr", "knn"),
            ),
            _more(
                "all less without color jitter, kNN",
                Term("transforms/all/simclr", "knn"),
                Term("transforms/without-jitter/simclr", "knn"),
            ),
        ),
    ),
)
