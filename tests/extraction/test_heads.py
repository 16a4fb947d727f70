"""The heads of a run come from its checkpoint, and only methods that compare views have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.extraction import RandomBackbone, Trained, heads
from raysl.model import Model
from raysl.run import Run
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run, saved, views

CPU = torch.device("cpu")


def test_heads_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, network = make_run(dataset, tmp_path / "run")
    before = torch.get_rng_state()
    found = heads(Trained(run, run.newest()), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert found is not None
    assert found.transform == "jigsaw"
    assert (found.image.num_crops, found.transformed.num_crops) == (1, 9)
    image_bpchw = views(dataset)[:5, None]
    patches_bpchw = torch.randint(0, 256, (5, 9, 3, 5, 5), dtype=torch.uint8)
    with torch.inference_mode():
        image_bd, patches_bd = found.embed(image_bpchw, patches_bpchw)
        network.eval()
        v_bd = network.backbone(image_bpchw[:, 0])
        f_bd = network.objective.image_head(v_bd)  # type: ignore[attr-defined]
        g_bd = network.objective.transformed_head(  # type: ignore[attr-defined]
            network.backbone(patches_bpchw.flatten(0, 1)).view(5, 9, -1)
        )
    for embedding_bd, head_bd in ((image_bd, f_bd), (patches_bd, g_bd)):
        expected = head_bd.numpy() / np.linalg.norm(head_bd.numpy(), axis=1, keepdims=True)
        np.testing.assert_allclose(embedding_bd, expected, atol=1e-5)


def test_other_methods_and_encoders_have_no_heads(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    config = Pretraining(
        str(dataset.folder), str(tmp_path / "run"), "predict-rotation", batch_size=16, view=ViewConfig(16)
    )
    run = Run.begin(config, dataset, {})
    saved(run, Model.of(config, dataset))
    assert heads(Trained(run, run.newest()), CPU) is None
    assert heads(RandomBackbone(BackboneConfig(), 0), CPU) is None
