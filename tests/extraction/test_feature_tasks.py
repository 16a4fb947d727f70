"""Features equal the output of the network, are computed once, and survive interruptions."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import SHARDS, DataSet
from raysl.errors import UserError
from raysl.extraction import (
    Encode,
    Encoder,
    FeatureForm,
    FeatureProtocol,
    FeatureStore,
    Pixels,
    RandomBackbone,
    Trained,
    Weights,
    actor_resources,
    encoders,
    extract_all,
    feature_tasks,
    untrained,
)
from raysl.extraction.feature_tasks import describe
from raysl.model import Model
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster import placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.storage.feature_files import FINISHED, part_file
from raysl.stream.decode import evaluation_views
from tests.data import make_dataset

SEEN = FeatureProtocol(image_size=16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 100)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_tasks, "_PART_IMAGES", 40)


def make_run(dataset: DataSet, folder: Path, **other: Any) -> tuple[Run, Model]:
    """Return a run with a checkpoint that differs from its initial weights and batch statistics."""
    config = Pretraining(
        data=str(dataset.folder),
        run=str(folder),
        batch_size=16,
        view=ViewConfig(image_size=16),
        **({"parts": {"pirl": Pirl(num_negatives=32, dim=16)}} | other),
    )
    network = Model.of(config, dataset)
    run = Run.begin(config, dataset, network.describe())
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.mul_(1.1) if tensor.is_floating_point() else None
    saved(run, network)
    return run, network


def saved(run: Run, network: Model) -> None:
    """Save a checkpoint of step 5 with these weights."""
    saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
    saver.save(5, {"network": network.state_dict()}, None)
    saver.wait()


def one(
    source: Encoder, dataset: DataSet, protocol: FeatureProtocol, cache: Folder, in_process: bool = True
) -> FeatureStore:
    """Return the features of the only layer."""
    (table,) = extract(source, dataset, protocol, cache, in_process).values()
    return table


def extract(
    source: Encoder, dataset: DataSet, protocol: FeatureProtocol, cache: Folder, in_process: bool = True
) -> dict[str, FeatureStore]:
    return extract_all([(source, dataset, protocol)], cache, in_process=in_process)[0]


def parts_of(store: FeatureStore) -> list[tuple[int, int]]:
    return [(group.start, group.start + group.num_rows) for group in store.groups]


def views(dataset: DataSet) -> torch.Tensor:
    images = dataset.read(np.arange(dataset.num_images), ("image",)).column("image").to_pylist()
    return evaluation_views(images, 16)


def direct(network: Model, dataset: DataSet) -> Any:
    with torch.inference_mode():
        return network.backbone.eval()(views(dataset)).numpy()


@pytest.mark.ray
def test_equal_to_a_direct_call_of_the_network(ray_session: None, dataset: DataSet, tmp_path: Path) -> None:
    run, network = make_run(dataset, tmp_path / "run")
    encoders = (Trained(run, run.newest()), untrained(run), Pixels())
    made = extract_all([(one, dataset, SEEN) for one in encoders], Folder(str(tmp_path / "cache")))
    trained, random, pixels = (layers["pooled"] for layers in made)
    assert len(trained.groups) > 2
    np.testing.assert_allclose(trained.load(), direct(network, dataset), rtol=1e-4, atol=1e-5)
    begun = Model.of(run.config(), dataset)
    np.testing.assert_allclose(random.load(), direct(begun, dataset), rtol=1e-4, atol=1e-5)
    expected = views(dataset).flatten(1).float() / 255 - 0.5
    np.testing.assert_allclose(pixels.load(), expected.numpy(), atol=1e-6)


def test_large_views_are_shrunk_before_their_pixels_are_compared() -> None:
    made = Pixels().load(torch.device("cpu"), ("pooled",))(
        torch.full((2, 3, 224, 224), 255, dtype=torch.uint8)
    )
    assert made["pooled"].shape == (2, 3 * 32 * 32)
    assert torch.allclose(made["pooled"], torch.tensor(0.5))


@dataclass(frozen=True)
class Stub:
    """Returns the mean of each image, and fails if the file `trap` exists."""

    trap: str
    crash: bool = False
    name: str = "stub"
    layers: tuple[str, ...] = ("pooled",)

    def identity(self) -> dict[str, Any]:
        return {"encoder": "stub"}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        return self.encode

    def encode(self, images_bchw: torch.Tensor) -> dict[str, torch.Tensor]:
        if Path(self.trap).exists():
            if not self.crash:
                raise UserError("The trap was sprung.")
            os.unlink(self.trap)
            os._exit(1)
        return {"pooled": images_bchw.float().mean((2, 3))}


def means(dataset: DataSet) -> Any:
    return views(dataset).float().mean((2, 3)).numpy()


@pytest.mark.ray
def test_existing_features_are_not_computed_again(
    ray_session: None, dataset: DataSet, tmp_path: Path
) -> None:
    stub, cache = Stub(str(tmp_path / "trap")), Folder(str(tmp_path / "cache"))
    table = one(stub, dataset, SEEN, cache)
    (tmp_path / "trap").touch()
    np.testing.assert_array_equal(one(stub, dataset, SEEN, cache).load(), table.load())
    # As after an interruption: the record and one part are missing, and the encoder fails on that part.
    table.folder.delete(FINISHED)
    lost = part_file(parts_of(table)[1])
    table.folder.delete(lost)
    kept = sorted(set(table.folder.list()))
    with pytest.raises(UserError, match="trap"):
        one(stub, dataset, SEEN, cache, in_process=False)
    assert table.folder.list() == kept
    (tmp_path / "trap").unlink()
    before = {name: table.folder.read(name) for name in kept}
    np.testing.assert_allclose(
        one(stub, dataset, SEEN, cache, in_process=False).load(), means(dataset), rtol=1e-5
    )
    assert {name: table.folder.read(name) for name in kept} == before
    assert {lost, FINISHED} <= set(table.folder.list())


def test_the_same_images_in_other_row_groups_have_the_same_features(dataset: DataSet, tmp_path: Path) -> None:
    other, cache = make_dataset(tmp_path / "other", 100, rows_per_group=7), Folder(str(tmp_path / "cache"))
    assert feature_tasks._parts(other) != feature_tasks._parts(dataset)
    both = extract_all([(Pixels(), dataset, SEEN), (Pixels(), other, SEEN)], cache, in_process=True)
    later = extract(Pixels(), other, SEEN, cache)
    assert both[0] == both[1] == later
    assert later["pooled"].load().shape == (100, 768)


@pytest.mark.ray
def test_an_actor_that_dies_costs_its_part_only(ray_session: None, dataset: DataSet, tmp_path: Path) -> None:
    (tmp_path / "trap").touch()
    table = one(
        Stub(str(tmp_path / "trap"), crash=True),
        dataset,
        SEEN,
        Folder(str(tmp_path / "cache")),
        in_process=False,
    )
    assert not (tmp_path / "trap").exists()
    np.testing.assert_allclose(table.load(), means(dataset), rtol=1e-5)


def test_other_images_weights_or_views_have_other_features(dataset: DataSet, tmp_path: Path) -> None:
    cache, other = Folder(str(tmp_path / "cache")), make_dataset(tmp_path / "other", 30, seed=1)
    run, _ = make_run(dataset, tmp_path / "run")
    tables = [
        one(Pixels(), other, SEEN, cache),
        one(Pixels(), other, FeatureProtocol(8), cache),
        one(untrained(run), other, SEEN, cache),
        one(Trained(run, run.newest()), other, SEEN, cache),
        one(Pixels(), make_dataset(tmp_path / "third", 30, seed=2), SEEN, cache),
    ]
    assert len({str(table.folder) for table in tables}) == len(tables)


def test_a_damaged_checkpoint_or_shard_is_named(dataset: DataSet, tmp_path: Path) -> None:
    run, _ = make_run(dataset, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-000000005" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    cache = Folder(str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"state\.pt"):
        one(Trained(run, run.newest()), dataset, SEEN, cache)
    broken = make_dataset(tmp_path / "broken", 30)
    (tmp_path / "broken" / SHARDS / "00001.parquet").write_bytes(b"gone")
    with pytest.raises(UserError, match="00001"):
        one(Pixels(), broken, SEEN, cache)


def test_a_damaged_part_is_named(dataset: DataSet, tmp_path: Path) -> None:
    table = one(Pixels(), dataset, SEEN, Folder(str(tmp_path)))
    name = next(name for name in table.folder.list() if name.endswith(".parquet"))
    table.folder.write(name, table.folder.read(name)[:-7])
    with pytest.raises(UserError, match="damaged"):
        table.load()


def test_layers_of_one_call_are_those_of_calls_alone_and_are_shared(dataset: DataSet, tmp_path: Path) -> None:
    run, _ = make_run(dataset, tmp_path / "run")
    trained, cache = Trained(run, run.newest()), Folder(str(tmp_path / "cache"))
    layers = ("res3", "res3:768", "conv1", "pooled")
    tables = extract(trained, dataset, FeatureProtocol(16, layers), cache)
    assert {layer: table.load().shape[1] for layer, table in tables.items()} == {
        "res3": 96,
        "res3:768": 96 * 2 * 2,
        "conv1": 24,
        "pooled": 192,
    }
    grid_ncp = tables["res3:768"].load().reshape(100, 96, 4)
    np.testing.assert_allclose(grid_ncp.mean(2), tables["res3"].load(), rtol=2e-3, atol=1e-3)
    before = sorted(cache.list())
    assert one(trained, dataset, SEEN, cache).folder == tables["pooled"].folder
    assert sorted(cache.list()) == before
    alone = one(trained, dataset, FeatureProtocol(16, ("res3",)), Folder(str(tmp_path / "other")))
    np.testing.assert_array_equal(alone.load(), tables["res3"].load())


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm", "pillow", "simplejpeg"])
def test_features_depend_on_package_versions(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    before, version = describe(Pixels(), dataset, SEEN), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == package else version(name))
    assert describe(Pixels(), dataset, SEEN) != before


@pytest.mark.parametrize("module", ["small", "norm", "reestimated"])
def test_features_depend_on_the_code_that_makes_them(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    before, source = describe(Pixels(), dataset, SEEN), inspect.getsource
    edited = getattr(feature_tasks, module)
    monkeypatch.setattr(inspect, "getsource", lambda one: "" if one is edited else source(one))
    assert describe(Pixels(), dataset, SEEN) != before


def test_features_depend_on_their_format(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(Pixels(), dataset, SEEN)
    monkeypatch.setattr(feature_tasks, "_FORMS", (FeatureForm("float16"),) * 2)
    assert describe(Pixels(), dataset, SEEN) != before


def test_an_unknown_layer_answers_with_the_nearest(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pooled"):
        one(Pixels(), dataset, FeatureProtocol(16, ("poled",)), Folder(str(tmp_path)))
    with pytest.raises(UserError, match="pooled:many"):
        one(Pixels(), dataset, FeatureProtocol(16, ("pooled:many",)), Folder(str(tmp_path)))


@pytest.mark.parametrize(
    "encoder",
    [RandomBackbone(BackboneConfig("vit_b_16"), 0), Weights("vit_b_16.pth", BackboneConfig("vit_b_16"))],
)
def test_an_image_size_that_the_backbone_does_not_take_is_refused(dataset: DataSet, encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"'vit_b_16' does not take images of 32 pixels .* --image-size 224"):
        describe(encoder, dataset, FeatureProtocol(32))


def test_a_backbone_of_timm_names_its_image_size() -> None:
    pytest.importorskip("timm")
    encoder = RandomBackbone(BackboneConfig("timm/vit_tiny_patch16_384"), 0)
    with pytest.raises(UserError, match=r"Give --image-size 32 or 384,"):
        encoders.check_size(encoder, 30)  # Not a multiple of its patches.
    encoders.check_size(encoder, 384)


def test_parts_are_whole_row_groups_and_hold_every_image_once(dataset: DataSet) -> None:
    parts = feature_tasks._parts(dataset)
    assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == dataset.num_images
    assert {edge for part in parts for edge in part} <= set(dataset.row_group_starts.tolist())
    assert max(end - first for first, end in parts) <= 40


def test_actors_with_a_gpu_decode_on_their_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "assigned_cpus", lambda: 3)
    assert feature_tasks._Actor(()).threads._max_workers == 3


def test_actors_leave_half_of_the_cpus() -> None:
    assert actor_resources({"CPU": 2}) == (2, {"num_cpus": 0.5})
    assert actor_resources({"CPU": 1}) == (1, {"num_cpus": 0.5})
    assert actor_resources({"CPU": 16, "GPU": 2}) == (2, {"num_cpus": 4.0, "num_gpus": 1})
