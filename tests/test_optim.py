"""Learning rates as the papers have them, and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raysl import optim
from raysl.backbone import network as networks
from raysl.optim import OptimConfig


def test_the_rates_of_pirl() -> None:
    config = OptimConfig(lr=0.03)
    assert config.lr_at(0, 10_000, batch_size=1024) == pytest.approx(0.12)
    assert config.lr_at(5_000, 10_000, batch_size=1024) == pytest.approx((0.12 + 1.2e-4) / 2)
    assert config.lr_at(9_999, 10_000, batch_size=1024) == pytest.approx(1.2e-4, rel=1e-3)


def test_the_rate_is_linear_in_the_batch() -> None:
    assert OptimConfig().lr_at(3, 10, 512) == pytest.approx(8 * OptimConfig().lr_at(3, 10, 64))


def test_cosine_only_falls() -> None:
    rates = [OptimConfig().lr_at(step, 50, 256) for step in range(50)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_warmup_rises_linearly_to_the_peak(schedule: Any) -> None:
    config = OptimConfig(lr=0.1, schedule=schedule, warmup=0.1)
    rates = [config.lr_at(step, 100, 256) for step in range(11)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.1)


def test_warmup_rises_from_where_it_is_told() -> None:
    config = OptimConfig(lr=0.1, schedule="step", warmup=0.1, warmup_start=0.25)
    rates = [config.lr_at(step, 100, 256) for step in range(11)]
    assert rates[:10] == pytest.approx([0.025 + 0.0075 * (i + 1) for i in range(10)])


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_short_runs_have_a_rate_at_every_step(num_steps: int) -> None:
    for warmup in (0.0, 0.5, 0.99):
        for step in range(num_steps):
            assert 0 < OptimConfig(lr=0.1, warmup=warmup).lr_at(step, num_steps, 256) <= 0.1 + 1e-9


def test_steps_divide_by_ten_at_the_milestones() -> None:
    config = OptimConfig(lr=1.0, schedule="step", milestones=(0.5, 0.8))
    assert [config.lr_at(step, 10, 256) for step in range(10)] == pytest.approx(
        [1.0] * 5 + [0.1] * 3 + [0.01] * 2
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.Sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (optim.AdamW, torch.optim.AdamW, {"lr": 0.1}),
        (optim.Lbfgs, torch.optim.LBFGS, {"max_iter": 3}),
    ],
)
def test_optimizers_take_the_steps_of_torch(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """Also after their state was saved and loaded."""
    ends = []
    for kind in (ours, theirs):
        weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        optimizer = kind([weight], **options)
        for step in range(4):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss: torch.Tensor = (weight - 2).pow(4).sum()  # noqa: B023
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)
            if step == 1:
                state, optimizer = optimizer.state_dict(), kind([weight], **options)
                optimizer.load_state_dict(state)
        ends.append(weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.arange(6.0).view(2, 3))


def test_biases_and_normalization_do_not_decay() -> None:
    network = nn.Sequential(networks.build(networks.BackboneConfig()), nn.Linear(192, 8))
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = optim.build(OptimConfig(weight_decay=0.1), network).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {names[id(p)] for p in plain["params"]} == {
        n for n in names.values() if ".bn" in n or n.endswith("bias")
    } | {n for n in names.values() if "downsample.1" in n}


@pytest.mark.parametrize(("name", "kind"), [("sgd", optim.Sgd), ("lars", optim.Lars), ("adamw", optim.AdamW)])
def test_optimizers_by_name(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    assert type(optim.build(OptimConfig(name=name, momentum=0.8), nn.Linear(2, 2))) is kind


def test_lars_moves_a_weight_that_is_zero() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    optimizer = optim.build(OptimConfig("lars"), layer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (layer.weight != 0).all()


def test_lars_is_its_equation() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = optim.build(OptimConfig("lars", momentum=0.9, weight_decay=0.1), layer)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    momentum_w, momentum_b = torch.zeros(2, 3), torch.zeros(2)
    for scale in (1.0, 5.0):
        layer(scale * torch.arange(6.0).view(2, 3)).square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        g_w, g_b = layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
        optimizer.step()
        optimizer.zero_grad()
        trust = 0.001 * weight.norm() / (g_w.norm() + 0.1 * weight.norm())
        momentum_w, momentum_b = 0.9 * momentum_w + trust * (g_w + 0.1 * weight), 0.9 * momentum_b + g_b
        weight, bias = weight - 0.5 * momentum_w, bias - 0.5 * momentum_b
        torch.testing.assert_close(layer.weight.detach(), weight)
        torch.testing.assert_close(layer.bias.detach(), bias)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def _one_weight_at_a_time(optimizer: torch.optim.SGD) -> None:
    """Scale the gradients of LARS as its equation says, in a loop over the weights."""
    for group in optimizer.param_groups:
        decay = group["weight_decay"]
        for weight in group["params"]:
            if weight.ndim > 1 and weight.grad is not None:
                length = weight.norm()
                scale = 0.001 * length / (weight.grad.norm() + decay * length).clamp(min=1e-12)
                scale = torch.where(length > 0, scale, torch.ones_like(scale))
                weight.grad.add_(weight, alpha=decay).mul_(scale)
                group["weight_decay"] = 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
def test_lars_takes_all_weights_at_once_and_has_the_numbers_of_a_loop(weight_decay: float) -> None:
    weights = []
    for looped in (True, False):
        torch.manual_seed(0)
        network = networks.build(networks.BackboneConfig()).to(memory_format=torch.channels_last)
        with torch.no_grad():
            next(network.parameters()).zero_()  # A weight of norm 0 takes an ordinary step.
        config = OptimConfig("lars", lr=0.3, momentum=0.9, weight_decay=weight_decay)
        optimizer = optim.build(config, network)
        assert isinstance(optimizer, torch.optim.SGD)
        for step in range(3):
            torch.manual_seed(step + 1)
            network(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)).square().mean().backward()
            if step == 2:
                next(network.parameters()).grad = None
            if looped:
                _one_weight_at_a_time(optimizer)
                torch.optim.SGD.step(optimizer)
                optimizer.param_groups[0]["weight_decay"] = weight_decay
            else:
                optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
