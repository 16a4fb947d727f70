"""BatchNorm over all workers and over all views: the statistics differ, and nothing else."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from raysl.backbone import network as networks
from raysl.backbone import norm
from raysl.backbone.network import Backbone, BackboneConfig, encode, encode_views
from raysl.communication import collective
from raysl.errors import UserError

WORLD, BATCH, STEPS = 2, 8, 3


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def built(name: Any, backbone_name: str = "small") -> Backbone:
    torch.manual_seed(0)
    return networks.build(
        BackboneConfig(backbone_name, stem="small" if "resnet" in backbone_name else "standard", norm=name)
    )


# Two views as a jigsaw makes them: patches, and images of another size, more bright.
PATCHES, IMAGES = images(4, 9, 3, 8, 8), images(4, 1, 3, 24, 24) // 2 + 100


def test_joint_and_separate_passes_are_equal_in_eval_mode() -> None:
    separate, joint = built("batch").eval(), built("joint").eval()
    assert separate.state_dict().keys() == joint.state_dict().keys()
    for a, b in zip(
        encode_views(separate, [PATCHES, IMAGES]), encode_views(joint, [PATCHES, IMAGES]), strict=True
    ):
        assert torch.equal(a, b)


def test_separate_passes_go_in_order() -> None:
    one, other = built("batch"), built("batch")
    found = encode_views(one, [PATCHES, IMAGES])
    for a, b in zip(found, (encode(other, PATCHES), encode(other, IMAGES)), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_a_joint_pass_of_views_of_one_size_is_a_pass_of_all_their_images(name: str) -> None:
    joint, other = built("joint", name).double(), built("batch", name).double()
    view = images(4, 2, 3, 24, 24, seed=1)
    features = encode_views(joint, [view, IMAGES])
    whole = other(torch.cat([view.flatten(0, 1), IMAGES.flatten(0, 1)]))
    torch.testing.assert_close(torch.cat([f.flatten(0, 1) for f in features]), whole)
    torch.testing.assert_close(joint.state_dict(), other.state_dict())
    torch.cat([f.flatten(0, 1) for f in features]).square().mean().backward()  # type: ignore[no-untyped-call]
    whole.square().mean().backward()
    for a, b in zip(joint.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_joint_statistics_are_those_of_the_pixels_of_all_views() -> None:
    joint, separate = built("joint"), built("batch")
    seen: list[Tensor] = []
    probe = built("batch")
    body: Any = probe.body
    body.bn1 = nn.Identity()
    body.conv1.register_forward_hook(
        lambda module, given, output: seen.append(output.movedim(1, -1).flatten(0, 2))
    )
    encode_views(probe, [PATCHES, IMAGES])
    encode_views(joint, [PATCHES, IMAGES])
    pixels_nc = torch.cat(seen)
    first: Any = joint.body
    torch.testing.assert_close(first.bn1.running_mean, 0.1 * pixels_nc.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first.bn1.running_var, 0.9 + 0.1 * pixels_nc.var(0), atol=1e-5, rtol=1e-4)
    assert first.bn1.num_batches_tracked == 1
    a, b = encode_views(separate, [PATCHES, IMAGES])[1], encode_views(built("joint"), [PATCHES, IMAGES])[1]
    assert not torch.allclose(a, b, atol=1e-2)


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_decides_as_it_runs_cannot_take_views_together() -> None:
    with pytest.raises(UserError, match=r"_Branching cannot be used with --backbone.norm joint"):
        norm.trace(_Branching())


def _network() -> nn.Module:
    """A backbone and a head with BatchNorm of both kinds."""
    network = built("sync")
    return nn.Sequential(network, nn.BatchNorm1d(network.width, affine=False), nn.Linear(network.width, 4))


def _train(rank: int, world: int) -> dict[str, Any]:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    model = network
    if world > 1:
        norm.synchronize(network, torch.device("cpu"))
        model = DistributedDataParallel(network)
    found: dict[str, Any] = {"losses": [], "grads": []}
    for step in range(STEPS):
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        # Brighter from image to image, so that the statistics of the halves differ.
        bright = torch.arange(BATCH, dtype=torch.uint8).view(-1, 1, 1, 1) * 16
        pictures = images(BATCH, 3, 16, 16, seed=step) // 2 + bright
        loss = nn.functional.cross_entropy(model(pictures[part]), torch.arange(BATCH)[part] % 4)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found["losses"].append(collective.mean(loss))
        found["grads"].append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        optimizer.step()
    return {**found, "state": network.state_dict()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(_train(rank, WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_synchronized_statistics_on_two_workers_are_those_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    start_processes(_process, (str(tmp_path),), WORLD, start_method="forkserver")  # type: ignore[no-untyped-call]
    alone = _train(0, 1)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["state"].keys() == alone["state"].keys()
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-3)


def test_synchronizing_keeps_the_weights_that_an_optimizer_holds() -> None:
    network = _network()
    before, state = list(network.parameters()), copy.deepcopy(network.state_dict())
    norm.synchronize(network, torch.device("cpu"))
    assert [id(p) for p in network.parameters()] == [id(p) for p in before]
    torch.testing.assert_close(network.state_dict(), state, atol=0, rtol=0)
    plain = _network()
    torch.testing.assert_close(network(images(4, 3, 16, 16)), plain(images(4, 3, 16, 16)))


def test_by_batch_a_network_sees_in_evaluation_as_in_training() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)
    )
    images_bchw = 7 + 3 * torch.randn(6, 3, 8, 8)
    trained = network.train()(images_bchw)
    assert not torch.allclose(network.eval()(images_bchw), trained, atol=0.1)
    norm.use_batch_statistics(network)
    torch.testing.assert_close(network(images_bchw), trained)
