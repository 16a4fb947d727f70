"""Test the report of runs: intervals and ties, rows and tables, and equal bytes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysl import rng
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation.results import MODEL
from raysl.extraction import RandomBackbone
from raysl.objectives.pirl import Config as Pirl
from raysl.probes.invariance import EDGES
from raysl.reporting import ReportConfig, report, retrieval_grid, run_figures
from raysl.reporting.report_runs import LabeledRow, groups, labeled_rows
from raysl.reporting.tables import Estimate, estimates, tables
from raysl.run import METRICS, Run, jsonl
from raysl.storage import Folder
from tests.data import make_dataset, write_rows

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

LAYERS = ("conv1", "res2", "pooled")


def row(value: float, **changes: Any) -> dict[str, Any]:
    base = {"probe": "linear", "name": "top1", "layer": "pooled", "encoder": "trained", "step": 5, "seed": 0}
    rest = {"protocol": "p", "train": "t", "test": "u", "value": value, "primary": True, "weights": value}
    return {**base, **rest, **changes}


def test_students_of_different_clusters_do_not_share_a_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 8)
    places = []
    for k, seed in ((100, 0), (300, 0), (300, 1)):
        parts = {"clusterfit": {"labels": f"elsewhere/{k}-{seed}"}}
        folder = str(tmp_path / f"{k}-{seed}")
        config = Pretraining(str(dataset.folder), folder, "clusterfit", batch_size=4, seed=seed, parts=parts)
        Run.begin(config, dataset, {"num_clusters": k, "labels": {"objective": "predict-jigsaw"}})
        places.append(folder)
    assert [(group.label, len(group.runs)) for group in groups(places)] == [
        ("clusterfit (K=100)", 1),
        ("clusterfit (K=300)", 2),
    ]


def test_networks_of_timm_do_not_share_a_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 8)
    places = [str(tmp_path / name) for name in ("resnet10t", "resnet14t")]
    for place in places:
        backbone = BackboneConfig(f"timm/{Path(place).name}")
        Run.begin(Pretraining(str(dataset.folder), place, batch_size=4, backbone=backbone), dataset, {})
    labels = [group.label for group in groups(places)]
    assert labels == [f"pirl-jigsaw (backbone.name={name})" for name in ("resnet10t", "resnet14t")]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two methods with two seeds each, probed at all layers, with histograms."""
    dataset = make_dataset(tmp_path / "set", 8)
    made = []
    for method, worth in (("pirl-jigsaw", 0.6), ("predict-jigsaw", 0.4)):
        for seed in (0, 1):
            folder = tmp_path / f"{method}-{seed}"
            config = Pretraining(str(dataset.folder), str(folder), method, batch_size=4, seed=seed)
            run = Run.begin(config, dataset, {})
            noise = rng.generator(method, seed)
            rows = [
                row(worth + 0.05 * i + 0.01 * noise.random(), layer=layer, seed=seed, step=step)
                for i, layer in enumerate(LAYERS)
                for step in (2, 5)
            ]
            rows += [
                row(0.3, encoder="random", seed=seed, step=0, weights=None),
                row(0.2, encoder="pixels", seed=seed, step=0, weights=None),
            ]
            rows += [
                row(
                    0.5 + 0.1 * i,
                    probe="invariance",
                    name=f"closer/{t}",
                    layer=layer,
                    primary=False,
                    seed=seed,
                )
                for i, layer in enumerate(LAYERS)
                for t in ("jigsaw", "rotation")
            ]
            write_rows(run.folder, rows)
            counts = {name: noise.integers(0, 30, len(EDGES) - 1).tolist() for name in ("jigsaw", "others")}
            value = {"edges": EDGES.tolist(), "counts": {"pooled": counts}}
            if method == "pirl-jigsaw":
                value["counts"]["heads"] = {"jigsaw": counts["others"], "others": counts["jigsaw"]}
            run.folder.write_json("probes/invariance/trained-5-abcdef01-p/histogram.json", value)
            log = [
                {"step": step, "epoch": step / 2, "loss": 2 / step, "images_per_s": 10.0} for step in (2, 4)
            ]
            run.folder.write(METRICS, jsonl(log))
            made.append(str(folder))
    return made


def test_the_page_has_all_parts_and_equal_runs_give_equal_bytes(tmp_path: Path, runs: list[str]) -> None:
    out = report(runs, ReportConfig(str(tmp_path / "one"), images=1))
    names = out.list()
    kinds = {name.partition("-")[0].partition(".")[0] for name in names}
    assert kinds == {"index", "layers", "invariance", "progress", "training", "views"}
    page = out.read("index.html").decode()
    assert "4 folders in 2 rows" in page
    assert "0.6" in page
    assert "untrained small" not in page
    assert "http" not in page
    again = report(list(reversed(runs)), ReportConfig(str(tmp_path / "two"), images=1))
    assert {name: again.read(name) for name in names} == {name: out.read(name) for name in names}


def test_only_the_newest_retrieval_grid_is_shown(runs: list[str]) -> None:
    grids = Folder(runs[0]) / retrieval_grid.GRIDS
    for step, test in ((2, "b"), (5, "b"), (2, "c")):
        grids.write(retrieval_grid.grid_name(step, "a", test), b"PNG")
    page = report(runs[0], ReportConfig(images=0)).read("index.html").decode()
    shown = [f"step-{step}-train-a-test-{test}" in page for step, test in ((2, "b"), (5, "b"), (2, "c"))]
    assert shown == [False, True, True]


def test_missing_data_only_cost_the_views(tmp_path: Path, runs: list[str]) -> None:
    Folder(str(tmp_path / "set")).delete()
    out = report(runs[0], ReportConfig())
    assert out == Folder(runs[0]) / "report"
    assert "The views of pirl-jigsaw are not drawn" in out.read("index.html").decode()


def test_a_run_whose_code_is_gone_is_shown_without_its_views(tmp_path: Path, runs: list[str]) -> None:
    (code := tmp_path / "own.py").touch()
    config = replace(
        Run.open(runs[0]).config(), run=str(tmp_path / "own"), view=ViewConfig(recipe=f"{code}:noisy")
    )
    own = Run.begin(config, DataSet.open(config.data), {})
    write_rows(own.folder, [row(0.77)])
    code.unlink()
    page = report(str(own.folder), ReportConfig(str(tmp_path / "out"))).read("index.html").decode()
    assert "0.77" in page
    assert re.search("The views of pirl-jigsaw are not drawn: .* there is no such file", page)


def test_external_models_are_compared_with_runs(tmp_path: Path, runs: list[str]) -> None:
    other = Folder(str(tmp_path / "other"))
    other.write_json(MODEL, {"name": "resnet50.pth", "identity": {"encoder": "weights", "weights": "ab"}})
    write_rows(other, [row(0.9, encoder="weights")])
    (table,) = tables(labeled_rows(groups([*runs, str(other)])))
    assert table.lines[0][0] == "resnet50.pth"
    # There is one kind of untrained backbone, so its label needs no name.
    assert [label for label, _ in table.lines].count("untrained") == 1


def test_an_external_untrained_network_is_named_by_its_backbone(tmp_path: Path, runs: list[str]) -> None:
    other = Folder(str(tmp_path / "other"))
    identity = RandomBackbone(BackboneConfig("resnet18"), 0).identity()
    other.write_json(MODEL, {"name": "random (resnet18)", "identity": identity})
    write_rows(other, [row(0.1, encoder="random", step=0, weights=None)])
    (table,) = tables(labeled_rows(groups([*runs, str(other)])))
    assert {"untrained small", "untrained resnet18"} < {label for label, _ in table.lines}


def test_only_seeds_share_a_row(tmp_path: Path, runs: list[str]) -> None:
    dataset = make_dataset(tmp_path / "again", 8)
    place = str(tmp_path / "hot")
    hot = Pretraining(str(dataset.folder), place, batch_size=4, parts={"pirl": Pirl(temperature=0.5)})
    Run.begin(hot, dataset, {})
    labels = [group.label for group in groups([*runs, place])]
    assert labels[2] == "predict-jigsaw"
    assert all("pirl.temperature=" in label for label in labels[:2])
    assert [len(group.runs) for group in groups(runs)] == [2, 2]


def test_a_run_that_was_not_probed_is_named_by_the_step_of_its_newest_checkpoint(
    tmp_path: Path, runs: list[str]
) -> None:
    dataset, place = make_dataset(tmp_path / "again", 8), str(tmp_path / "bare")
    run = Run.begin(Pretraining(str(dataset.folder), place, batch_size=4), dataset, {})
    assert "pirl-jigsaw (step=0)" in [group.label for group in groups([*runs, place])]
    saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
    saver.save(10, {"network": {}}, None)
    saver.wait()
    run.folder.write(METRICS, jsonl([{"step": 10, "epoch": 5, "loss": 0.2, "images_per_s": 10.0}]))
    page = report([*runs, place], ReportConfig(str(tmp_path / "out"), images=0)).read("index.html").decode()
    assert "Not probed yet (use `raysl probe`): pirl-jigsaw (step=10)." in page
    assert "<td>pirl-jigsaw (step=10)</td>" in page
    assert "step=0" not in page


def test_protocols_and_data_never_share_a_table(runs: list[str]) -> None:
    rows = [row(0.1), row(0.2, protocol="q"), row(0.3, test="v"), row(0.4, train="v"), row(0.5, probe="knn")]
    write_rows(Folder(runs[0]), rows)
    assert len(tables(labeled_rows(groups(runs[:1])))) == len(rows)


def test_a_table_shows_only_the_newest_step(runs: list[str]) -> None:
    write_rows(Folder(runs[0]), [row(0.1, step=3), row(0.2, step=5)])
    (table,) = tables(labeled_rows(groups(runs[:1])))
    assert table.lines == (("pirl-jigsaw", (Estimate((0.2,)),)),)


def test_runs_probed_at_different_steps_do_not_share_a_row(runs: list[str]) -> None:
    write_rows(Folder(runs[0]), [row(0.1, step=3), row(0.5, probe="knn", step=5)])
    write_rows(Folder(runs[1]), [row(0.2, step=5, seed=1), row(0.6, probe="knn", step=5, seed=1)])
    by_probe = {table.probe: table for table in tables(labeled_rows(groups(runs[:2])))}
    assert [label for label, _ in by_probe["linear"].lines] == ["pirl-jigsaw, step 5", "pirl-jigsaw, step 3"]
    assert by_probe["knn"].lines == (("pirl-jigsaw", (Estimate((0.5, 0.6)),)),)


def test_a_seed_counts_once(runs: list[str]) -> None:
    # The same run in two folders of a machine that does not repeat itself to the last bit.
    found_rows = [row(0.3, weights="a"), row(0.5, weights="b")]
    cells = estimates([LabeledRow("pirl-jigsaw", one) for one in found_rows])
    assert list(cells.values()) == [Estimate((0.4,))]


def test_best_is_marked_only_with_several_seeds(runs: list[str]) -> None:
    write_rows(Folder(runs[0]), [row(0.1), row(0.3, encoder="random", step=0)])
    assert " best" not in report(runs[0], ReportConfig(images=0)).read("index.html").decode()


def test_a_single_run_is_judged_as_by_the_probe(tmp_path: Path, runs: list[str]) -> None:
    baseline = {"encoder": "random", "step": 0, "num_test": 100}
    write_rows(
        Folder(runs[0]), [row(0.1, step=2, num_test=100), row(0.39, num_test=100), row(0.4, **baseline)]
    )
    page = report(runs[0], ReportConfig(str(tmp_path / "one"), images=0)).read("index.html").decode()
    said = "By linear, the trained network (39.0 %) is not clearly better than the untrained network (40.0 %)"
    assert page.count(f"<p>{said}: with 100 test images") == page.count("By linear") == 1
    page = report(runs, ReportConfig(str(tmp_path / "all"), images=0)).read("index.html").decode()
    assert "By linear" not in page
    twice = [runs[0], os.path.relpath(runs[0])]
    assert said in report(twice, ReportConfig(str(tmp_path / "twice"), images=0)).read("index.html").decode()


def test_a_rank_is_never_best_and_one_set_for_train_and_test_is_told(tmp_path: Path, runs: list[str]) -> None:
    for place in runs:
        seed = int(place[-1])
        value = (30 if "pirl" in place else 10) + seed / 1000
        rank = row(value, probe="collapse", name="effective_rank", seed=seed)
        write_rows(Folder(place), [rank, row(0.5, probe="knn", seed=seed, test="t")])
    page = report(runs, ReportConfig(str(tmp_path / "out"), images=0)).read("index.html").decode()
    assert "30.0005" in page
    assert " best<" not in page
    assert page.count("protocol p, same images for train and test: t<") == 1


def test_a_spread_is_never_best(tmp_path: Path, runs: list[str]) -> None:
    for place in runs:
        seed = int(place[-1])
        value = (0.3 if "pirl" in place else 0.1) + seed / 1000
        mean = row(value, probe="lowshot", name="top1/k=16", seed=seed)
        write_rows(Folder(place), [mean, {**mean, "name": "top1_std/k=16", "primary": False}])
    page = report(runs, ReportConfig(str(tmp_path / "out"), images=0)).read("index.html").decode()
    main, _, others = page.partition("<details>")
    assert " best" in main
    assert "top1_<wbr>std" in others
    assert " best" not in others


def test_histograms_of_other_steps_are_no_seeds_of_one_measurement(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_label: list[Any] = []

    def kept(found: Any, edges: Any) -> tuple[bytes, str]:
        by_label.extend(found)
        return b"", "pooled"

    monkeypatch.setattr(run_figures, "_histogram", kept)
    for place, step in zip(runs[:2], (5, 7), strict=True):
        folder = Folder(place) / "probes/invariance"
        value = (folder / "trained-5-abcdef01-p").read_json("histogram.json")
        folder.write_json(f"trained-{step}-abcdef01-p/histogram.json", value)
    list(run_figures.histograms(groups(runs)))
    assert by_label == ["pirl-jigsaw, step 5", "pirl-jigsaw, step 7", "predict-jigsaw"]


def test_intervals_and_ties_by_their_equations() -> None:
    one = Estimate((0.40, 0.42, 0.44))
    assert one.half_width == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    # Equal spread and number: 4 degrees of freedom, and a difference of 0.0453 is the limit.
    limit = 2.776445 * math.sqrt(2 * 0.02**2 / 3)
    for difference, differs in ((limit - 1e-6, False), (limit + 1e-6, True)):
        assert one.differs(_moved(one.values, difference)) is differs
    assert Estimate((0.4,)).half_width is None
    assert one.differs(Estimate((0.9,))) is None
    assert Estimate((0.5, 0.5)).differs(Estimate((0.5, 0.5))) is False
    assert Estimate((0.5, 0.5)).differs(Estimate((0.6, 0.6))) is None


def _moved(values: Sequence[float], by: float) -> Estimate:
    return Estimate(tuple(value + by for value in values))


def test_a_folder_without_run_or_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Neither a sweep nor a run"):
        report(str(tmp_path), ReportConfig())


def test_runs_from_other_starting_weights_do_not_share_a_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 8)
    for name in ("a", "b"):
        weights = BackboneConfig(weights=f"/elsewhere/{name}.pth")
        config = Pretraining(str(dataset.folder), str(tmp_path / name), batch_size=4, backbone=weights)
        Run.begin(config, dataset, {"starting_weights": name})
    assert len(groups([str(tmp_path / name) for name in ("a", "b")])) == 2


def test_moving_averages_of_different_steps_do_not_share_a_row(runs: list[str]) -> None:
    for place, step in zip(runs[:2], (2, 5), strict=True):
        write_rows(Folder(place), [row(0.5, encoder="momentum", step=step)])
    found = [item.label for item in labeled_rows(groups(runs[:2])) if item.row["encoder"] == "momentum"]
    assert [label.rpartition(", ")[2] for label in found] == ["step 2", "step 5"]
