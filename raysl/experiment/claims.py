"""The claims of two lectures on self-supervised learning, as contrasts of results that `lectures` judges."""

from __future__ import annotations

from raysl.experiment.lectures import Claim, Contrast, Term

PIRL, PREDICT, CLUSTERFIT, UNTRAINED = "pirl-jigsaw", "predict-jigsaw", "clusterfit", "untrained"
TEACHER, STUDENT = "teacher, noise ", "ClusterFit, noise "


def _claim(says: str, figure: str, *contrasts: Contrast) -> Claim:
    return Claim(says, figure, contrasts)


def _more(says: str, better: str, worse: str, measure: str) -> Contrast:
    """Return the contrast of one result of two methods at the pooled layer."""
    return Contrast(says, _difference(better, worse, measure))


def _change(says: str, first: tuple[Term, ...], second: tuple[Term, ...]) -> Contrast:
    """Return the contrast of two differences."""
    return Contrast(says, (*first, *(-term for term in second)))


def _difference(better: str, worse: str, measure: str, layer: str = "pooled") -> tuple[Term, ...]:
    return Term(better, measure, layer), -Term(worse, measure, layer)


CLAIMS = (
    _claim(
        "Networks that predict a transform gain at a middle layer (res2) and lose it at the last layer",
        "PIRL, figure 6",
        _change(
            "gain of predict-jigsaw over the untrained backbone, res2 minus pooled, linear",
            _difference(PREDICT, UNTRAINED, "linear by layer", "res2"),
            _difference(PREDICT, UNTRAINED, "linear by layer"),
        ),
    ),
    _claim(
        "PIRL gains most at the last layer",
        "PIRL, figure 6",
        _change(
            "gain of PIRL over the untrained backbone, pooled minus res2, linear",
            _difference(PIRL, UNTRAINED, "linear by layer"),
            _difference(PIRL, UNTRAINED, "linear by layer", "res2"),
        ),
        _more("PIRL minus predict-jigsaw at the pooled layer, linear", PIRL, PREDICT, "linear by layer"),
    ),
    _claim(
        "Features of PIRL are invariant to the jigsaw; features that predict the jigsaw are not",
        "PIRL, figure 5",
        # Each by the jigsaw that the method learned from.
        _more("PIRL minus untrained, 2 x 2 patches", PIRL, UNTRAINED, "invariance/jigsaw 2x2"),
        _more("untrained minus predict-jigsaw, 3 x 3 patches", UNTRAINED, PREDICT, "invariance/jigsaw"),
    ),
    _claim(
        "From prediction to clustering to PIRL, both invariance and accuracy grow",
        "lecture 10-2",
        _more("ClusterFit minus predict-jigsaw, linear", CLUSTERFIT, PREDICT, "linear"),
        _more("PIRL minus ClusterFit, linear", PIRL, CLUSTERFIT, "linear"),
        _more("ClusterFit minus predict-jigsaw, invariance", CLUSTERFIT, PREDICT, "invariance"),
        _more("PIRL minus ClusterFit, invariance", PIRL, CLUSTERFIT, "invariance 2x2"),
    ),
    _claim(
        "Pretraining helps most with the fewest labels",
        "PIRL, table 3",
        _more("PIRL minus untrained, top-1 with 1 % of the labels", PIRL, UNTRAINED, "top1@1%"),
        _more("PIRL minus predict-jigsaw, top-1 with 1 % of the labels", PIRL, PREDICT, "top1@1%"),
        _change(
            "gain of PIRL with 1 % of the labels minus its gain with 10 %",
            _difference(PIRL, UNTRAINED, "top1@1%"),
            _difference(PIRL, UNTRAINED, "top1@10%"),
        ),
    ),
    _claim(
        "A detector is better from PIRL than from untrained weights",
        "PIRL, table 1",
        _more("PIRL minus untrained, AP75", PIRL, UNTRAINED, "AP75"),
    ),
    _claim(
        "PIRL loses less than prediction when it learns from other images",
        "PIRL, table 4",
        _change(
            "loss of predict-jigsaw minus loss of PIRL, linear",
            _difference(PREDICT, f"uncurated/{PREDICT}", "linear"),
            _difference(PIRL, f"uncurated/{PIRL}", "linear"),
        ),
    ),
    _claim(
        "Two tasks together are better than each alone",
        "Doersch and Zisserman 2017, table 1",
        *(
            _more(
                f"both tasks minus {name} alone, linear",
                "multitask-relative_position,colorization",
                f"predict-{name}",
                "linear by layer",
            )
            for name in ("relative_position", "colorization")
        ),
    ),
    _claim(
        "PIRL gains from more permutations",
        "PIRL, figure 9",
        _more("all permutations minus 1, kNN", "num_permutations=362880", "num_permutations=1", "knn"),
    ),
    _claim(
        "PIRL gains from more negatives",
        "PIRL, figure 10",
        _more("4,096 negatives minus 64, kNN", "num_negatives=4096", "num_negatives=64", "knn"),
    ),
    _claim(
        "The best lambda is in the middle",
        "PIRL, figure 8",
        _more("lambda 0.5 minus 0, kNN", "lambda=0.5", "lambda=0", "knn"),
        _more("lambda 0.5 minus 1, kNN", "lambda=0.5", "lambda=1", "knn"),
    ),
    _claim(
        "ClusterFit, which trains for as long again as its teacher, is better than the teacher",
        "ClusterFit, table 4",
        _more("ClusterFit minus predict-jigsaw, linear", CLUSTERFIT, PREDICT, "linear"),
        _more("ClusterFit minus predict-jigsaw, kNN", CLUSTERFIT, PREDICT, "knn"),
    ),
    _claim(
        "ClusterFit suffers less from wrong labels than its teacher",
        "ClusterFit, figure 3",
        _more(
            "ClusterFit minus teacher with 75 % wrong labels, linear",
            f"{STUDENT}0.75",
            f"{TEACHER}0.75",
            "linear",
        ),
        _change(
            "loss of the teacher minus loss of ClusterFit from 0 to 75 % wrong labels, linear",
            _difference(f"{TEACHER}0", f"{TEACHER}0.75", "linear"),
            _difference(f"{STUDENT}0", f"{STUDENT}0.75", "linear"),
        ),
    ),
    _claim(
        "Jigsaw is a better transform for PIRL than rotation, and both together are best",
        "PIRL, section 5",
        _more("jigsaw minus rotation, kNN", PIRL, "pirl-rotation", "knn"),
        _more("both transforms minus jigsaw, kNN", "pirl-rotation+jigsaw", PIRL, "knn"),
    ),
    _claim(
        "Comparing a transform is better than predicting it",
        "PIRL, table 2",
        _more("jigsaw: PIRL minus prediction, kNN", PIRL, PREDICT, "knn"),
        _more("rotation: PIRL minus prediction, kNN", "pirl-rotation", "predict-rotation", "knn"),
    ),
    _claim(
        "Longer training on the same images still helps",
        "lecture 10-2, open question",
        _more("PIRL minus PIRL with a tenth of the steps, kNN", PIRL, f"short/{PIRL}", "knn"),
    ),
    _claim(
        "A wider network still helps, for as many steps",
        "lecture 10-2, open question; Goyal et al. 2019, figure 2",
        _more(
            "the usual width minus half of it, kNN",
            f"saturation/usual-all/{PIRL}",
            f"saturation/narrow-all/{PIRL}",
            "knn",
        ),
    ),
    _claim(
        "More different images still help, for as many steps",
        "lecture 10-2, open question; Goyal et al. 2019, figure 2",
        _more(
            "all images minus a fifth of them, kNN",
            f"saturation/usual-all/{PIRL}",
            f"saturation/usual-few/{PIRL}",
            "knn",
        ),
    ),
    _claim(
        "SimCLR needs random crops most, then changes of color",
        "lecture 10-2, open question; SimCLR, figure 5",
        _more(
            "without color jitter minus without crops, kNN",
            "transforms/without-jitter/simclr",
            "transforms/without-crops/simclr",
            "knn",
        ),
        _more(
            "all augmentations minus without color jitter, kNN",
            "transforms/all/simclr",
            "transforms/without-jitter/simclr",
            "knn",
        ),
    ),
)
