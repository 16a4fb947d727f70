"""Several real processes give what one gives: losses, gradients, weights and the memory bank."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from raysl import pretext
from raysl.backbone.network import BackboneConfig, build
from raysl.communication import collective
from raysl.config import methods
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import Rows
from raysl.objectives import AfterStep, Alternates, Setup
from raysl.pretext import Geometry, jigsaw
from raysl.stream.reader import Batch
from tests.objectives.setups import given

N, D, K, BATCH, STEPS = 64, 16, 12, 8, 3
WORLDS = (4, 2)
Results = dict[str, dict[str, Any]]

# The global batches. Index 3 comes twice in the second, where two epochs meet, and there on different workers.
INDICES = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [3, 60, 61, 62, 63, 8, 9, 3], [10, 3, 12, 20, 14, 15, 16, 17]])
EPOCHS = np.array([[0] * 8, [0] * 5 + [1] * 3, [1] * 8])


@dataclass(frozen=True)
class Case:
    """A method, its hyperparameters, and a bank."""

    method: str
    hyperparameters: tuple[tuple[str, Any], ...] = ()
    placement: Any = "replicated"
    dtype: Any = "float32"

    def __str__(self) -> str:
        return "-".join(
            [self.method, *(str(value) for _, value in self.hyperparameters), self.placement, self.dtype]
        )


MEMORY = (("num_negatives", K), ("dim", D), ("temperature", 0.2))
CASES = [
    Case("predict-rotation"),
    Case("supervised"),
    Case("clusterfit"),
    Case("distill"),
    Case("multitask-rotation,identity+rotation"),
    Case("simclr"),
    Case("simclr-jigsaw", (("norm", "layer"),)),
    *(Case(f"moco{t}", (("dim", D), ("queue", 12), ("momentum", 0.9))) for t in ("", "-jigsaw")),
    Case("npid", MEMORY),
    Case("pirl-jigsaw", (*MEMORY, ("loss", "nce"))),
    *(
        Case("pirl-jigsaw", (*MEMORY, ("negatives", mode)), *options)
        for mode, *options in itertools.product(
            ("shared", "own"), ("replicated", "sharded"), ("float32", "float16")
        )
    ),
]


def _network(case: Case) -> tuple[nn.Module, Any]:
    method = methods.parse(case.method)
    config_type, objective_type = methods.load_objective(method.objective)
    geometry = Geometry(image_size=16, predicted=objective_type.predicts)
    parts = {"jigsaw": jigsaw.Config(grid=2, patch_size=6)}
    tasks = {spec: pretext.build(spec, parts, geometry) for spec in method.tasks}
    transform = tasks.get(method.pretext)
    torch.manual_seed(0)
    backbone = build(BackboneConfig(norm="group"))
    setup = Setup(
        transform, pretext.build("identity", {}, geometry), backbone.width, N, 4, 0, backbone, tasks
    )
    return backbone, objective_type(
        config_type(**given(method.objective, N), **dict(case.hyperparameters)), setup
    )


class _Model(nn.Module):
    def __init__(self, backbone: nn.Module, objective: Any) -> None:
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.objective(self.backbone, views)  # type: ignore[no-any-return]


def _batch(objective: Any, step: int, rank: int, world: int) -> Batch:
    """One worker's part of a global batch that all worlds share."""
    generator = torch.Generator().manual_seed(step)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views = {}
    for name in objective.schedule()(step) if isinstance(objective, Alternates) else objective.views:
        transform = objective.views[name]
        side = 6 if transform.num_crops > 1 else 16
        shape = (BATCH, transform.num_crops, 3, side, side)
        views[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)[part]
    labels_b = (torch.arange(BATCH) % 4)[part]
    rows = Rows(INDICES[step, part], EPOCHS[step, part])
    return Batch(step, rows, labels_b, views, dict.fromkeys(views, labels_b))


def _train(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Some steps as the training loop takes them."""
    backbone, objective = _network(case)
    model: nn.Module = _Model(backbone, objective)
    if world > 1:
        # Without finding them, every parameter must take part.
        model = DistributedDataParallel(model, find_unused_parameters=isinstance(objective, Alternates))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    bank = None
    if objective.bank_dim:
        bank = MemoryBank(N, D, BankConfig(0.5, case.placement, case.dtype), seed=0)
    found: dict[str, Any] = {"losses": [], "grads": []}
    for step in range(STEPS):
        batch = _batch(objective, step, rank, world)
        loss = objective.loss(model(batch.views), batch, bank)
        optimizer.zero_grad()
        loss.loss.backward()
        found["losses"].append(collective.mean(loss.loss))
        found["grads"].append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        if isinstance(objective, AfterStep):
            objective.after_step(backbone, 0)
        if bank is not None:
            assert loss.bank_update_bd is not None
            bank.update(batch.indices_b, loss.bank_update_bd)
    found["state"] = objective.state_dict()
    found["bank"] = bank.state() if bank is not None else None
    return found


def _updates(placement: Any, rank: int, world: int) -> dict[str, Any]:
    """The bank after updates with embeddings that are given, and rows that were looked up in it."""
    bank = MemoryBank(N, D, BankConfig(0.5, placement, "float16"), seed=0)
    generator = torch.Generator().manual_seed(0)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        embeddings_bd = nn.functional.normalize(torch.randn(BATCH, D, generator=generator), dim=1)
        bank.update(torch.from_numpy(INDICES[step, part]), embeddings_bd[part])
    own = bank.lookup(torch.from_numpy(INDICES[1, part]))
    return {"bank": bank.state(), "own": own, "shared": bank.lookup(torch.tensor([63, 0, 31]), shared=True)}


def _keys(rank: int, world: int) -> dict[str, Any]:
    """MoCo's keys, computed here and dealt out among the workers."""
    _, objective = _network(Case("moco", (("dim", D), ("queue", 12))))
    view = _batch(objective, 0, rank, world).views["key"]
    with torch.no_grad():
        return {"here": objective._key(view), "dealt": objective._shuffled(view)}


def _everything(rank: int, world: int) -> Results:
    torch.set_num_threads(1)
    results = {str(case): _train(case, rank, world) for case in CASES}
    for placement in ("replicated", "sharded"):
        results[placement] = _updates(placement, rank, world)
    results["keys"] = _keys(rank, world)
    ranks = torch.tensor([float(rank), 10.0 * rank])
    results["collectives"] = {
        "rank": (collective.rank(), collective.world()),
        "mean": collective.mean(ranks),
        "total": collective.total(ranks),
        "gather": collective.gather(torch.tensor([[rank], [-rank]])),
        "untouched": ranks,
    }
    return results


def _process(rank: int, folder: str) -> None:
    """One of four processes, of which the first two go on as a world of two."""
    tempfile.tempdir = folder  # such processes do not clean up behind them
    for world in WORLDS:
        if rank < world:
            meet = f"file://{folder}/meet-{world}"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
            torch.save(_everything(rank, world), f"{folder}/{rank}-of-{world}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each worker of each world found."""
    folder = tmp_path_factory.mktemp("worlds")
    # The server imports once what each process would else import for itself, which takes longer than all its work.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        start_processes(_process, (str(folder),), max(WORLDS), start_method="forkserver")  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def workers(request: pytest.FixtureRequest, folder: Path) -> list[Results]:
    """What the workers of one world found, in the order of their ranks."""
    return [torch.load(folder / f"{rank}-of-{request.param}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> Results:
    threads = torch.get_num_threads()
    results = _everything(0, 1)
    torch.set_num_threads(threads)
    return results


def _whole_bank(name: str, workers: list[Results]) -> Tensor:
    """All rows of the bank; every worker's copy where it is replicated."""
    parts = [worker[name]["bank"] for worker in workers]
    if parts[0]["last"] - parts[0]["first"] == N:
        assert all(torch.equal(part["rows_nd"], parts[0]["rows_nd"]) for part in parts)
        return parts[0]["rows_nd"]  # type: ignore[no-any-return]
    assert [part["first"] for part in parts] == [rank * N // len(parts) for rank in range(len(parts))]
    return torch.cat([part["rows_nd"] for part in parts])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_gradients_and_bank_do_not_depend_on_the_number_of_workers(
    workers: list[Results], alone: Results, case: Case
) -> None:
    one = alone[str(case)]
    # A row in half precision may round to the other side; what it does to later steps is larger than 1e-5.
    later = 1e-5 if case.dtype == "float32" else 1e-3
    for worker in workers:
        found = worker[str(case)]
        for step in range(STEPS):
            atol = later if step else 1e-5
            torch.testing.assert_close(found["losses"][step], one["losses"][step], atol=atol, rtol=0)
            assert len(found["grads"][step]) == len(one["grads"][step])
            for a, b in zip(found["grads"][step], one["grads"][step], strict=True):
                torch.testing.assert_close(a, b, atol=atol, rtol=0)
        # The heads, a momentum encoder and its queue: the same on every worker, and as on one.
        torch.testing.assert_close(
            found["state"], workers[0][str(case)]["state"], atol=0, rtol=0, equal_nan=True
        )
        torch.testing.assert_close(found["state"], one["state"], atol=later, rtol=0, equal_nan=True)
    if one["bank"] is not None:
        rows_nd = _whole_bank(str(case), workers)
        torch.testing.assert_close(rows_nd, one["bank"]["rows_nd"], atol=later, rtol=0)
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[torch.from_numpy(INDICES.ravel())] = False
        assert torch.equal(rows_nd[untouched], one["bank"]["rows_nd"][untouched])


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_the_same_embeddings_make_the_same_bank_bit_for_bit(
    workers: list[Results], alone: Results, placement: str
) -> None:
    assert torch.equal(_whole_bank(placement, workers), alone["replicated"]["bank"]["rows_nd"])
    assert torch.equal(
        torch.cat([worker[placement]["own"] for worker in workers]), alone["replicated"]["own"]
    )
    for worker in workers:
        assert torch.equal(worker[placement]["shared"], alone["replicated"]["shared"])


def test_collectives(workers: list[Results], alone: Results) -> None:
    world = len(workers)
    total = sum(range(world))
    for rank, worker in enumerate(workers):
        found = worker["collectives"]
        assert found["rank"] == (rank, world)
        assert found["total"].tolist() == [total, 10 * total]
        assert found["mean"].tolist() == [total / world, 10 * total / world]
        assert found["gather"].flatten().tolist() == [sign * r for r in range(world) for sign in (1, -1)]
        assert found["untouched"].tolist() == [rank, 10 * rank]
    assert alone["collectives"]["rank"] == (0, 1)
    assert alone["collectives"]["gather"].tolist() == [[0], [0]]


def test_keys_that_other_workers_computed_come_back_in_order(workers: list[Results], alone: Results) -> None:
    for found in (*workers, alone):
        keys = found["keys"]
        torch.testing.assert_close(keys["dealt"], keys["here"], atol=1e-6, rtol=0)
        assert keys["here"].unique(dim=0).shape == keys["here"].shape


def test_nothing_that_is_collected_has_a_gradient() -> None:
    value = torch.ones(2, 2, requires_grad=True)
    for collect in (collective.mean, collective.total, collective.gather):
        assert not collect(value).requires_grad
