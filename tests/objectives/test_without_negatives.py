"""BYOL, Barlow Twins, VICReg, SwAV, DINO and MAE: their losses from the papers' equations in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raysl import pretext
from raysl.backbone.network import BackboneConfig, build
from raysl.errors import UserError
from raysl.experimental import barlow_twins, dino, mae, swav
from raysl.objectives import byol, vicreg
from raysl.objectives._heads import rising_momentum
from raysl.pretext import Geometry
from tests.objectives.setups import batch, setup

GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return GENERATOR.normal(size=shape).astype(np.float32)


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_of(objective: Any, **outputs: Any) -> float:
    found = objective.loss({name: torch.from_numpy(x) for name, x in outputs.items()}, None, None)
    return float(found.loss)


def test_byol_is_equation_2_of_both_views() -> None:
    q, z = unit(normal(6, 2, 8)), unit(normal(6, 2, 8))
    wanted = [((q[i, 0] - z[i, 1]) ** 2).sum() + ((q[i, 1] - z[i, 0]) ** 2).sum() for i in range(6)]
    found = loss_of(byol.Byol(byol.Config(), setup()[1]), predictions=q, targets=z)
    assert found == pytest.approx(np.mean(wanted), rel=1e-5)


def test_the_target_of_byol_follows_with_rising_momentum() -> None:
    backbone, given = setup()
    objective: Any = byol.Byol(byol.Config(momentum=0.9), replace(given, num_steps=10))
    before = objective.target_projector[0].weight.clone()
    online = objective.projector[0].weight
    with torch.no_grad():
        online.add_(1)
    objective.after_step(backbone, 5)
    momentum = 1 - 0.1 * (np.cos(np.pi * 0.5) + 1) / 2
    moved = objective.target_projector[0].weight
    torch.testing.assert_close(moved, momentum * before + (1 - momentum) * online)
    assert rising_momentum(0.9, 10, 10) == 1


def test_barlow_twins_is_equation_1() -> None:
    a, b = normal(16, 5), normal(16, 5)
    standard = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (a, b)]
    c = standard[0].T @ standard[1] / 16
    wanted = ((1 - np.diag(c)) ** 2).sum() + 0.02 * (c[~np.eye(5, dtype=bool)] ** 2).sum()
    objective = barlow_twins.BarlowTwins(barlow_twins.Config(lam=0.02), setup()[1])
    assert loss_of(objective, a=a, b=b) == pytest.approx(wanted, rel=1e-4)


def test_vicreg_is_equation_6() -> None:
    a, b = normal(16, 5), normal(16, 5) * 0.5

    def v(x: Any) -> Any:
        return np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean()

    def c(x: Any) -> Any:
        return (np.cov(x.T)[~np.eye(5, dtype=bool)] ** 2).sum() / 5

    wanted = 10 * ((a - b) ** 2).mean() + 20 * (v(a) + v(b)) / 2 + 3 * (c(a) + c(b))
    objective = vicreg.Vicreg(vicreg.Config(invariance=10, variance=20, covariance=3), setup()[1])
    assert loss_of(objective, a=a, b=b) == pytest.approx(wanted, rel=1e-4)


def test_swav_swaps_the_codes_of_two_views() -> None:
    scores = (normal(12, 3, 6) * 0.3).clip(-1, 1)

    def codes(s: Any) -> Any:
        q = np.exp(s / 0.05).T.astype(np.float64)
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdims=True) * 6
            q /= q.sum(0, keepdims=True) * 12
        return (q * 12).T

    log_p = np.log(softmax(scores / 0.1))
    pairs = [(s, t) for s in (1, 2) for t in range(3) if s != t]
    wanted = np.mean([-(codes(scores[:, s]) * log_p[:, t]).sum(1).mean() for s, t in pairs])
    objective = swav.Swav(swav.Config(prototypes=6), setup()[1])
    assert loss_of(objective, scores=scores) == pytest.approx(wanted, rel=1e-4)


def test_codes_use_all_prototypes_alike() -> None:
    codes = swav.sinkhorn(torch.from_numpy(normal(40, 8)), 0.5, 50)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((8,), 5.0), rtol=1e-3, atol=1e-3)


def test_dino_is_equation_3_and_then_moves_its_center() -> None:
    student, teacher, center = normal(6, 3, 7), normal(6, 2, 7), normal(7)
    _, given = setup()
    objective = dino.Dino(dino.Config(outputs=7), replace(given, num_steps=100))
    objective.center_k = torch.from_numpy(center)
    p_t, log_p_s = softmax((teacher - center) / 0.04), np.log(softmax(student / 0.1))
    pairs = [(0, 0), (0, 2), (1, 0), (1, 1)]
    wanted = np.mean([-(p_t[:, i] * log_p_s[:, t]).sum(1).mean() for i, t in pairs])
    assert loss_of(objective, student=student, teacher=teacher) == pytest.approx(wanted, rel=1e-4)
    moved = 0.9 * center + 0.1 * teacher.mean((0, 1))
    np.testing.assert_allclose(objective.center_k.numpy(), moved, rtol=1e-5, atol=1e-6)


def test_the_temperature_of_the_teacher_rises() -> None:
    backbone, given = setup()
    config = dino.Config(teacher_temperature=0.08, warmup=0.5)
    objective = dino.Dino(config, replace(given, num_steps=100))
    assert objective.temperature.item() == pytest.approx(0.04)
    for step, wanted in ((24, 0.06), (49, 0.08), (80, 0.08)):
        objective.after_step(backbone, step)
        assert objective.temperature.item() == pytest.approx(wanted)


@pytest.mark.parametrize("kind", [dino, swav])
def test_multi_crop_adds_small_views(kind: Any) -> None:
    backbone, given = setup("multi_crop")
    make = kind.Dino if kind is dino else kind.Swav
    objective = make(kind.Config(crops=2), given)
    assert list(objective.views) == ["small_0", "small_1", "b", "a"]
    assert objective.views["small_0"].source.max_scale == 0.4
    of = batch(objective)
    assert objective.loss(objective(backbone, of.views), of, None).loss.isfinite()


def vit(**hyperparameters: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    backbone = build(BackboneConfig("timm/vit_tiny_patch16_224", patch_size=4))
    _, given = setup()
    return backbone, mae.Mae(mae.Config(**hyperparameters), replace(given, width=192, backbone=backbone))


def test_mae_sees_a_quarter_and_is_judged_on_the_rest() -> None:
    backbone, objective = vit()
    of = batch(objective)
    outputs = objective(backbone, of.views)
    mask = outputs["mask"].numpy()
    assert mask.sum(1).tolist() == [12] * 4
    x = backbone.normalized(of.views["image"][:, 0]).numpy()
    patches = x.reshape(4, 3, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(4, 16, 48)
    targets = (patches - patches.mean(2, keepdims=True)) / np.sqrt(
        patches.var(2, keepdims=True, ddof=1) + 1e-6
    )
    error = ((outputs["predictions"].detach().numpy() - targets) ** 2).mean(2)
    found = objective.loss(outputs, of, None).loss.item()
    assert found == pytest.approx((error * mask).sum() / mask.sum(), rel=1e-4)


def test_masked_patches_do_not_reach_the_backbone() -> None:
    backbone, objective = vit()
    of = batch(objective)
    torch.manual_seed(1)
    before = objective(backbone, of.views)
    hidden = before["mask"].view(4, 1, 1, 4, 1, 4, 1).expand(4, 1, 3, 4, 4, 4, 4).reshape(4, 1, 3, 16, 16)
    changed = torch.where(hidden == 1, 255 - of.views["image"], of.views["image"])
    torch.manual_seed(1)
    assert torch.equal(objective(backbone, {"image": changed})["predictions"], before["predictions"])


def test_mae_needs_a_vision_transformer() -> None:
    with pytest.raises(UserError, match=r"needs a vision transformer of timm.*--backbone\.name"):
        mae.Mae(mae.Config(), setup()[1])


def test_a_small_crop_is_cut_from_the_image_itself() -> None:
    made = pretext.build("multi_crop", {}, Geometry(224))
    assert (made.source.size, made.source.min_scale, made.source.max_scale) == (96, 0.05, 0.4)
