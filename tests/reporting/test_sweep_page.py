"""The report of a sweep: what it says, and that it always says the same."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysl import rng
from raysl.cli.flags import parse_pretraining
from raysl.config import Pretraining, ViewConfig
from raysl.config.command import command, wrapped
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.reporting import ReportConfig, report
from raysl.reporting.page import _breakable
from raysl.reporting.sweep_figures import rank_correlation
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.journal import FORMAT, Journal
from raysl.tuning.results import SweepResults, doubts, lead, render
from raysl.tuning.space import space

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

BASE = Pretraining("data", "-", epochs=9, parts={"pirl": {"dim": 16}})


def written(
    folder: Path, *vary: str, copies: bool = False, header: Mapping[str, Any] | None = None, **changes: Any
) -> str:
    """Write a sweep with made-up scores. Trial 1 has failed; half of the others stop at the first rung with "asha"."""
    config = SweepConfig(str(folder), vary, **changes)
    points = space(BASE, vary, config.searcher == "grid")
    settings = asdict(config)
    names = ("probe", "seeds", "searcher", "scheduler", "rungs", "reduction", "lag", "seed", "samples")
    journal = Journal(Folder(str(folder)))
    journal.add(
        {
            "event": "sweep",
            "format": FORMAT,
            "config": {name: settings[name] for name in names},
            "space": [asdict(d) for d in points.dimensions],
            "base": BASE.to_json(),
            "uris": {"train": "train", "validation": "held out"},
            **(header or {}),
        }
    )
    tried = (
        points.grid() if config.searcher == "grid" else [points.sample(0, n) for n in range(config.samples)]
    )
    for trial, values in enumerate(tried):
        journal.add({"event": "trial", "trial": trial, "rung": 0, "values": values})
        if trial == 1:
            journal.add({"event": "failed", "trial": trial, "reason": "The loss is <nan>"})
            continue
        for rung in range(len(config.shares())):
            for seed in config.seeds:
                journal.add(
                    {**_score(trial, seed, rung, values), "event": "score", "trial": trial, "rung": rung}
                )
            goes_on = config.scheduler != "asha" or trial % 2 == 0
            source = 0 if copies and trial > 5 else None
            decision = {
                "event": "decision",
                "trial": trial,
                "rung": rung,
                "goes_on": goes_on,
                "copies": source,
            }
            if config.scheduler != "none" and rung < len(config.shares()) - 1:
                journal.add(decision)
                if source is not None:
                    changed = {**values, "pirl.lam": 0.123}
                    journal.add({"event": "trial", "trial": trial, "rung": rung + 1, "values": changed})
            if not goes_on:
                break
    return str(folder)


def _score(trial: int, seed: int, rung: int, values: dict[str, Any]) -> dict[str, Any]:
    noise = rng.generator("noise", trial, seed).random()
    score = 0.2 + 0.1 * rung - abs(values["pirl.lam"] - 0.5) / 5 + noise / 50
    return {"seed": seed, "score": score, "loss": 5 - noise, "seconds": 1800.0, "cpus": 2.0, "gpus": 0.0}


def test_the_page_says_it_all_and_the_same_sweep_gives_the_same_bytes(tmp_path: Path) -> None:
    sweep = written(tmp_path / "sweep", "temperature=0.05,0.1,0.2", "lam", scheduler="asha", rungs=2)
    out = report(sweep, ReportConfig(core_hour=2.0))
    names = out.list()
    assert names == [
        "curve-pirl.lam.png",
        "curve-pirl.temperature.png",
        "early-loss.png",
        "early-probe.png",
        "index.html",
        "learning.png",
        "pair-pirl.temperature-pirl.lam.png",
        "parallel.png",
    ]
    page = out.read("index.html").decode()
    assert "The loss is &lt;nan&gt;" in page
    assert "raysl pretrain --data DATA --run RUN" in page
    assert "core-hours" in page
    assert "which cost" in page
    # Nothing is fetched from anywhere.
    assert "http" not in page
    again = report(sweep, ReportConfig(out=str(tmp_path / "again"), core_hour=2.0))
    assert {name: again.read(name) for name in names} == {name: out.read(name) for name in names}


def test_fields_that_are_drawn_or_are_no_numbers_have_figures_too(tmp_path: Path) -> None:
    sweep = written(
        tmp_path / "sweep",
        "temperature=0.03..0.5",
        "lam=0..1",
        "pirl.head",
        searcher="random",
        samples=6,
        seeds=(0,),
    )
    names = report(sweep, ReportConfig()).list()
    assert "curve-pirl.head.png" in names
    assert "pair-pirl.temperature-pirl.lam.png" in names


def test_values_of_a_method_are_on_the_page_and_in_the_command_of_its_best_trial(tmp_path: Path) -> None:
    header = {"method_values": {"pirl-jigsaw": {"jigsaw.grid": 2, "bank.momentum": 0.0}, "pirl-rotation": {}}}
    vary = "method=pirl-jigsaw,pirl-rotation", "lam=0.5"
    page = (
        report(written(tmp_path / "sweep", *vary, header=header), ReportConfig()).read("index.html").decode()
    )
    assert "All trials of pirl-jigsaw have jigsaw.grid=2, bank.momentum=0." in page
    assert "All trials of pirl-rotation" not in page
    assert "--jigsaw.grid 2" in page
    assert "--bank.momentum 0" in page


def test_a_sweep_without_a_score_has_a_page(tmp_path: Path) -> None:
    sweep = written(tmp_path / "sweep", "lam=0,1", seeds=(0,))
    lines = (tmp_path / "sweep" / "sweep.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "sweep" / "sweep.jsonl").write_bytes(lines[0])
    assert report(sweep, ReportConfig()).list() == ["index.html"]


def test_every_beginning_of_a_sweep_has_a_page(tmp_path: Path) -> None:
    sweep = written(
        tmp_path / "sweep", "lam=0,0.5,1", "temperature=0.1,0.2", seeds=(0, 1), scheduler="asha", rungs=2
    )
    journal = tmp_path / "sweep" / "sweep.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for count in range(2, len(lines), 4):
        journal.write_bytes(b"".join(lines[:count]))
        assert "index.html" in report(sweep, ReportConfig()).list()


def test_long_names_may_be_broken_and_are_still_escaped(tmp_path: Path) -> None:
    folder = report(written(tmp_path, "lam=0,0.5,1"), ReportConfig(out=str(tmp_path / "out")))
    assert b"<th>pirl.<wbr>lam</th>" in folder.read("index.html")
    assert _breakable("<b_c>") == "&lt;b_<wbr>c&gt;"


def test_the_command_of_a_configuration_gives_it_back() -> None:
    config = Pretraining(
        "my data",
        "run",
        "pirl-jigsaw",
        epochs=3,
        channels_last=False,
        compile=True,
        view=ViewConfig(image_size=64),
        optim=OptimConfig(lr=0.12, milestones=(0.5, 0.9)),
        parts={"pirl": Pirl(lam=0.25, num_negatives=64), "jigsaw": {"num_permutations": 100}},
    )
    shown = wrapped(command(config))
    assert "\n" in shown
    assert max(map(len, shown.splitlines())) < 100
    words = shlex.split(shown.replace("\\\n", ""))
    assert words == shlex.split(command(config))
    assert words[:2] == ["raysl", "pretrain"]
    assert "--pirl.lam" in words
    assert parse_pretraining(words[2:], "raysl pretrain") == config


def test_a_population_is_shown_with_the_values_that_its_scores_had(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "searcher": "random",
        "scheduler": "pbt",
        "samples": 8,
        "rungs": 2,
        "seeds": (0,),
    }
    sweep = written(tmp_path, "lam=0..1", copies=True, **settings)
    record = SweepResults.open(sweep)
    assert record.trials == list(range(8))
    assert [record.values(n, 1)["pirl.lam"] for n in (6, 7)] == [0.123, 0.123]
    assert record.values(7)["pirl.lam"] != 0.123
    assert "curve-pirl.lam.png" in report(sweep, ReportConfig()).list()


def test_baselines_and_the_test_score_are_on_the_page(tmp_path: Path) -> None:
    sweep = written(tmp_path, "lam=0,0.5,1", seeds=(0,))
    journal = Journal(Folder(sweep))
    facts: dict[str, Any] = {"event": "baseline", "seed": 0, "chosen": None}
    journal.add({**facts, "encoder": "random", "score": 0.1234})
    journal.add({**facts, "encoder": "pixels", "score": 0.2345})
    best = SweepResults.open(sweep).best()
    journal.add({"event": "test", "encoder": "trained", "seed": 0, "score": 0.3456, "chosen": best})
    page = report(sweep, ReportConfig()).read("index.html").decode()
    assert "0.1234</td>" in page
    assert "raw pixels" in page
    answer, caution = (
        page.index("no other was scored, the best trial has 0.3456"),
        page.index("too high by chance"),
    )
    assert page.index("<h2>Best</h2>") < answer < caution < page.index("<h2>Trials</h2>")


def test_a_sweep_of_raysl_0_1_is_read(tmp_path: Path) -> None:
    sweep = written(tmp_path, "lam=0,0.5,1", seeds=(0,))
    journal = tmp_path / "sweep.jsonl"
    old, *rows = map(json.loads, journal.read_text().splitlines())
    old.pop("format")
    for row in (old, *rows):
        row.pop("checksum")  # raysl 0.1 wrote none
    old["uris"] = {"train": "train", "test": "old test"}
    old["space"] = [{**{k: v for k, v in d.items() if k != "mutable"}, "live": True} for d in old["space"]]
    journal.write_text("".join(json.dumps(row) + "\n" for row in (old, *rows)))
    page = report(sweep, ReportConfig()).read("index.html")
    assert b"old test" in page
    assert b"chosen on the test split" in page


def test_the_page_says_how_far_ahead_the_best_of_equal_trials_would_be(tmp_path: Path) -> None:
    page = report(written(tmp_path, "lam=0,0.25,0.5,0.75,1"), ReportConfig()).read("index.html").decode()
    assert "If all 4 finished trials were equal, the best would still be" in page
    assert "chosen on the test split" not in page


@pytest.mark.parametrize(
    ("vary", "seeds", "answer"),
    [
        (
            "lam=0,0.25,0.5,0.75,1",
            (0, 1),
            "of the 4 finished trials; by chance, the best of equal trials would be",
        ),
        (
            "lam=0.498,0.499,0.5,0.501",
            (1, 2),
            "which may be chance: the best of equal trials would be 0.0043",
        ),
        ("lam=0,0.5,1", (0,), "of the 2 finished trials; this may be chance, which trials of one seed"),
        ("lam=0.5,1", (0, 1), "finished"),  # One trial has failed, so none is ahead of another.
    ],
)
def test_the_table_says_on_what_images_and_how_far_the_best_is_ahead(
    vary: str, seeds: tuple[int, ...], answer: str, tmp_path: Path
) -> None:
    results = SweepResults.open(written(tmp_path, vary, seeds=seeds))
    console = Console(width=400, file=io.StringIO())
    console.print(render(results))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "trials by knn on validation images (held out)" in " ".join(printed.split())
    assert answer in printed
    assert ("ahead" in printed) == (len(results.scored(0)) > 1)
    assert "test" not in printed
    uris = {"train": "s3://out/images/learn", "validation": "s3://out/images/validation"}
    results.journal.header.update(uris=uris, sources={"validation": "20 images of shapes:200#train"})
    assert results.validation_description == "held-out validation images (20 images of shapes:200#train)"
    results.journal.header.update(sources={"validation": "shapes:200#test"})
    assert results.validation_description == "test images (shapes:200#test)"


def test_few_images_and_better_baselines_are_told(tmp_path: Path) -> None:
    sweep = written(tmp_path, "lam=0,0.25,0.5,0.75,1", seeds=(0,))
    assert doubts(SweepResults.open(sweep)) == []
    journal = Journal(Folder(sweep))
    for encoder, score in (("random", 0.35), ("pixels", 0.1)):
        journal.add(
            {
                "event": "baseline",
                "seed": 0,
                "chosen": None,
                "images": "x",
                "encoder": encoder,
                "score": score,
            }
        )
    (told,) = doubts(SweepResults.open(sweep))
    assert re.fullmatch(
        r"The best trial \(0\.2\d+\) is not better than the untrained network \(0\.3500\): train .*", told
    )
    results = SweepResults.open(sweep)
    for row in results.scores.values():
        row.update(metric="top1", num_images=50)
    # Two standard errors of the difference of two accuracies of a fifth are 0.16.
    assert doubts(results)[0].startswith("With 50 validation images, a difference of 0.16")
    assert doubts(results)[0].endswith("may be chance: the 3 other finished trials may be as good.")
    for row in results.scores.values():
        row.update(num_images=5_000_000)
    assert doubts(results) == [told]


def test_equal_trials_are_not_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = SweepResults.open(written(tmp_path, "lam=0,0.25,0.5,0.75,1", seeds=(0,)))
    monkeypatch.setattr(SweepResults, "means", lambda *_: [0.5])
    assert lead(results) == "All 4 finished trials have the same score."


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(0)
    assert rank_correlation([1, 1], [1, 2]) == 0
