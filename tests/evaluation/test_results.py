"""Results of probes are stored safely, checked when they are read, and printed as tables."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysl import probes
from raysl.errors import UserError
from raysl.evaluation import results
from raysl.evaluation.results import (
    KEY,
    ROWS,
    add_rows,
    describe_images,
    format_row_value,
    margin,
    rows_of,
    tables,
    verdicts,
)
from raysl.run import Run, jsonl
from raysl.storage import Folder
from tests.data import make_dataset


def row(**changes: Any) -> dict[str, Any]:
    base = dict.fromkeys(KEY, "x") | {"encoder": "trained", "step": 5, "seed": 0, "name": "top1"}
    return {**base, "value": 0.5, "primary": True, "weights": 1, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder(str(tmp_path)))


def add_rows_one_by_one(run: Run, process: int, count: int) -> None:
    for number in range(count):
        add_rows(run, [row(layer=f"{process}-{number}")])


def printed(*rows: dict[str, Any]) -> str:
    out = io.StringIO()
    for table in tables(rows):
        Console(file=out, width=200).print(table)
    return out.getvalue()


def test_rows_of_several_processes_are_all_kept(run: Run) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows_one_by_one, args=(run, number, 20)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(rows_of(run)) == 80


def test_a_row_replaces_an_earlier_row_of_the_same_key_in_any_file(run: Run) -> None:
    context = multiprocessing.get_context("fork")
    add_rows(run, [row(), row(layer="y")])
    process = context.Process(target=add_rows, args=(run, [row(value=0.7)]))
    process.start()
    process.join(60)
    assert {one["layer"]: one["value"] for one in rows_of(run)} == {"x": 0.7, "y": 0.5}
    add_rows(run, [row(value=0.8)])
    assert {one["layer"]: one["value"] for one in rows_of(run)} == {"x": 0.8, "y": 0.5}
    assert len((run.folder / ROWS).list()) == 2


def test_rows_of_the_old_format_are_refused(run: Run) -> None:
    run.folder.write("probes/rows.jsonl", jsonl([row()]))
    with pytest.raises(UserError, match=r"written by raysl 0\.1.* Delete that file"):
        rows_of(run)


@pytest.mark.parametrize("damage", ["empty", "cut", "cut at a line", "flipped", "not text"])
def test_a_damaged_file_is_named(run: Run, damage: str) -> None:
    add_rows(run, [row(), row(layer="y")])
    folder, (name,) = run.folder / ROWS, (run.folder / ROWS).list()
    data = folder.read(name)
    at = data.index(b"0.5") + 1
    spoiled = {
        "empty": b"",
        "cut": data[:-20],
        "cut at a line": data[: data.rindex(b"\n", 0, -1) + 1],
        "flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "not text": b"\xff\xfe\x00" + data,
    }
    folder.write(name, spoiled[damage])
    with pytest.raises(UserError, match=r"are damaged: .* Delete that file"):
        rows_of(run)


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe": "/../../x"},
        {"protocol": "../x"},
        {"train": "../../"},
        {"value": "high"},
        {"value": float("nan")},
        {"step": None},
        {"layer": 3},
        {"num_test": "9"},
    ],
)
def test_rows_that_no_probe_writes_are_refused(run: Run, wrong: dict[str, Any]) -> None:
    add_rows(run, [row(**wrong)])
    with pytest.raises(UserError, match="damaged"):
        rows_of(run)


def test_markup_in_names_is_printed_as_it_is() -> None:
    text = printed(
        row(name="[old]", layer="[/old]", train="[red]"), row(name="y", layer="[/old]", train="[red]")
    )
    assert "[old]" in text
    assert "[/old]" in text
    assert "[red]" in text


def test_shares_are_printed_in_per_cent() -> None:
    text = {
        name: format_row_value(row(name=name, value=0.12345))
        for name in ("top1@1%", "top1/k=20,T=0.07", "spread")
    }
    assert text == {"top1@1%": "12.3 %", "top1/k=20,T=0.07": "12.3 %", "spread": "0.1235"}
    assert format_row_value(row(name="AP50", value=0.5)) == "50.0 %"
    assert format_row_value(row(name="alpha_req", value=1.25)) == "1.25"
    assert "50.0 %" in printed(row())


def test_a_sentence_says_if_the_run_has_learned_something() -> None:
    def sentence(trained: float, num_test: int = 0) -> str:
        ours = row(value=trained, num_test=num_test)
        rows = [ours, row(encoder="random", value=0.3), row(encoder="pixels", value=0.4)]
        (found,) = verdicts([*rows, row(encoder="pixels", primary=False, value=1.0, name="top5")])
        return found

    assert "(46.2 %) is better than the untrained network (30.0 %) and raw pixels (40.0 %)" in sentence(0.462)
    assert "has learned something useful" in sentence(0.462)
    assert "better than the untrained network (30.0 %) and worse than raw pixels" in sentence(0.35)
    assert "is worse than the untrained network (30.0 %) and raw pixels (40.0 %): the" in sentence(0.2)
    assert "has not learned anything" in sentence(0.2)
    assert "not clearly better than the untrained network (30.0 %) and worse than raw" in sentence(0.3, 1000)
    assert sentence(0.462, 10_000) == sentence(0.462)
    assert "with 33 test images, a difference of 24.3 percentage points may be chance" in sentence(0.462, 33)
    assert "has not learned anything" in sentence(0.2, 10_000)
    assert "and not clearly better than raw pixels (40.0 %)" in sentence(0.41, 1000)
    assert "with 33 test images" in verdicts([row(num_test=33), row(encoder="random", value=0.48)])[0]
    assert verdicts([row(encoder="weights")]) == []


def test_a_measure_that_is_no_score_gives_no_verdict_of_learning() -> None:
    def values(encoder: str, rank: float, constant: float = 0.0) -> list[dict[str, Any]]:
        found = {
            "effective_rank": rank,
            "effective_rank_share": rank / 192,
            "spread": 0.5,
            "constant": constant,
        }
        of = {"probe": "collapse", "layer": "pooled", "encoder": encoder}
        return [
            row(**of, name=name, value=value, primary=name == "effective_rank")
            for name, value in found.items()
        ]

    others = [*values("random", 153.5), *values("pixels", 222.6)]
    assert verdicts([*values("trained", 122.4), *others]) == [
        "The pooled features have not collapsed: effective rank 122 of 192 and no constant features. "
        "Only a probe with labels tells if the features are useful.",
    ]
    (said,) = verdicts([*values("trained", 1.5, 0.8), *others])
    assert said.startswith(
        "The pooled features have collapsed: effective rank 1.5 of 192 and 80 % constant features."
    )
    for probe, name in (("invariance", "closer"), ("lidar", "lidar")):
        rows = [row(probe=probe, name=name), row(probe=probe, name=name, encoder="random", value=0.9)]
        (said,) = verdicts(rows)
        assert said.startswith(f"The probe {probe} gives no score")


@pytest.mark.parametrize("name", probes.names())
def test_every_primary_metric_is_a_share_or_is_known_to_be_no_score(name: str) -> None:
    config_type, probe_type = probes.load(name)
    metric = probe_type(config_type()).primary_metric
    assert not probes.is_score(name) or format_row_value(row(name=metric)).endswith("%")


def test_equal_measures_without_a_margin_are_not_called_chance() -> None:
    rows = [row(name="mAP", num_test=100), row(name="mAP", encoder="random")]
    assert verdicts(rows) == [
        "By x, the trained network (50.0 %) is not clearly better than the untrained network (50.0 %)."
    ]


def test_the_margin_is_two_standard_errors_of_accuracies_only() -> None:
    assert margin("top1", (0.5, 0.1), 100) == pytest.approx(2 * ((0.25 + 0.09) / 100) ** 0.5)
    assert margin("mAP", (0.5, 0.1), 100) == margin("top1", (0.5, 0.1), 0) == 0


def test_one_set_for_train_and_test_is_told() -> None:
    assert (
        describe_images("ab", "ab", {"ab": " (9 images)"}) == "same images for train and test: ab (9 images)"
    )
    assert describe_images("ab", "cd") == "train ab, test cd"


def test_protocols_and_data_never_share_a_table() -> None:
    rows = [row(), row(protocol="y"), row(test="y"), row(train="y"), row(probe="y")]
    assert len(tables(rows)) == len(rows)


def test_a_caption_tells_how_large_the_sets_are(tmp_path: Path) -> None:
    images = make_dataset(tmp_path / "images", 8)
    (table,) = tables([row(train="0" * 9, test=images.manifest.fingerprint)], [images])
    test = images.manifest.fingerprint[:8]
    assert str(table.caption) == f"protocol x, train {'0' * 8}, test {test} (8 images, 4 classes)"


def test_a_table_has_a_column_for_each_encoder() -> None:
    rows = [row(), row(encoder="pixels", step=0), row(encoder="random", step=0), row(step=9)]
    (table,) = tables([*rows, row(encoder="from elsewhere", step=0)])
    headers = ["", "trained, step 5", "trained, step 9", "untrained", "raw pixels", "from elsewhere"]
    assert [column.header for column in table.columns] == headers
    (table,) = tables([row(), row(seed=1)])
    assert [column.header for column in table.columns][1:] == [
        "trained, step 5, seed 0",
        "trained, step 5, seed 1",
    ]


def test_layers_share_a_table_of_primary_metrics() -> None:
    rows = [
        row(layer=layer, name=name, primary=name == "top1") for layer in "ab" for name in ("top1", "top5")
    ]
    (table,) = tables(rows)
    assert list(table.columns[0].cells) == ["a top1", "b top1"]


def test_a_folder_that_cannot_be_written_is_refused_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out FOLDER"):
        results.check_writable(Folder(str(tmp_path / "file" / "run")), "probe")


def test_files_of_rows_are_lines_of_json(run: Run) -> None:
    add_rows(run, [row()])
    (name,) = (run.folder / ROWS).list()
    header, *lines = (run.folder / ROWS).read(name).splitlines()
    assert json.loads(header)["rows"] == len(lines) == 1
    assert json.loads(lines[0])["value"] == 0.5


def test_a_verdict_counts_the_images_that_the_probe_has_scored() -> None:
    rows = [row(value=0.52, num_test=1000), row(value=0.50, encoder="random", num_test=1000)]
    assert "not clearly better" in " ".join(verdicts(rows))
