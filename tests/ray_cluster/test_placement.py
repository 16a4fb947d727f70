"""Placement: trainers and data tasks always fit at the same time, or it is said that they never can."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysl import ray_cluster
from raysl.errors import UserError
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Machines, Placement
from raysl.ray_cluster.versions import versions
from raysl.stream.reader import DataShare

Node = dict[str, float]


def pack(nodes: list[Node], placement: Placement, workers: int) -> tuple[int, int]:
    """Puts trainers on machines one after the other, filling each as Ray does, then data tasks in what is left.

    Returns:
        How many trainers and how many data tasks found room, in units of a ten-thousandth CPU as Ray counts.
    """
    trainer, task = (round(c * 10_000) for c in (placement.cpus_per_worker, placement.share.cpus_per_task))
    trainers = tasks = 0
    for node in nodes:
        cpus, gpus = round(node["CPU"] * 10_000), int(node.get("GPU", 0))
        here = min(workers - trainers, cpus // trainer)
        if placement.gpus_per_worker:
            here = min(here, gpus)
        trainers += here
        tasks += (cpus - here * trainer) // task
    return trainers, tasks


def check(nodes: list[Node], workers: int) -> None:
    """Holds `place` to its promise, or to a refusal for a reason."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    try:
        placement = cluster_placement.make_placement(workers, Machines(tuple(nodes)))
    except UserError:
        usable = [min(int(4 * n["CPU"]), int(n.get("GPU", 0)) if gpus else workers) for n in nodes]
        assert sum(usable) < workers
        return
    trainers, tasks = pack(nodes, placement, workers)
    assert trainers == workers
    assert tasks >= workers
    share = placement.share
    assert share.cpus >= share.cpus_per_task > 0
    total = workers * (placement.cpus_per_worker + share.cpus)
    assert total <= sum(node["CPU"] for node in nodes) + 1e-6
    for amount in (placement.cpus_per_worker, share.cpus_per_task):
        # Ray takes fractions of one CPU only.
        assert amount < 1 or amount == int(amount)
    assert placement.threads_per_worker >= 1


def test_every_small_machine() -> None:
    for cpus in range(65):
        for workers in range(1, 9):
            check([{"CPU": float(cpus)}], workers)
            check([{"CPU": float(cpus), "GPU": 1.0 + cpus % 8}], workers)


@settings(max_examples=200, deadline=None)
@given(
    nodes=st.lists(
        st.fixed_dictionaries({"CPU": st.integers(0, 64).map(float), "GPU": st.integers(0, 8).map(float)}),
        min_size=1,
        max_size=6,
    ),
    gpus=st.booleans(),
    workers=st.integers(1, 24),
)
def test_any_cluster(nodes: list[Node], gpus: bool, workers: int) -> None:
    if not gpus:
        nodes = [{"CPU": node["CPU"]} for node in nodes]
    check(nodes, workers)


@pytest.mark.parametrize(
    ("nodes", "workers", "trainer", "task", "data"),
    [
        ([{"CPU": 2}], 1, 1, 1, 1),
        ([{"CPU": 2}], 2, 0.5, 0.5, 0.5),
        ([{"CPU": 2}], 4, 0.25, 0.25, 0.25),
        ([{"CPU": 1}], 1, 0.5, 0.5, 0.5),
        ([{"CPU": 16}], 2, 6, 1, 2),
        ([{"CPU": 16, "GPU": 1}], 1, 1, 1, 15),
        ([{"CPU": 2, "GPU": 1}], 1, 1, 1, 1),
        ([{"CPU": 1, "GPU": 1}], 1, 0.5, 0.5, 0.5),
        # A head that schedules no work, and two machines with GPUs.
        ([{"CPU": 0}, {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], 8, 1, 1, 1),
        # 24 CPUs could give 8 to each of three trainers, but no machine has 8.
        ([{"CPU": 4}] * 6, 3, 3, 1, 5),
    ],
)
def test_who_gets_what(nodes: list[Node], workers: int, trainer: float, task: float, data: float) -> None:
    placement = cluster_placement.make_placement(workers, Machines(tuple(nodes)))
    assert (placement.cpus_per_worker, placement.share.cpus_per_task, placement.share.cpus) == (
        trainer,
        task,
        data,
    )
    gpus = 1 if any("GPU" in node for node in nodes) else 0
    assert placement.resources() == ({"CPU": trainer, "GPU": 1} if gpus else {"CPU": trainer})


@pytest.mark.parametrize(
    ("nodes", "workers", "answer"),
    [
        ([{"CPU": 2}], 9, "9 workers .* on the 2 CPUs .* it has room for 8"),
        ([{"CPU": 0}], 1, "on the 0 CPUs .* it has room for 0"),
        ([{"CPU": 8, "GPU": 2}], 4, "4 workers need 4 GPUs and the cluster has 2. Use --workers 2"),
        ([{"CPU": 0, "GPU": 2}, {"CPU": 8}], 2, "it has room for 0"),
    ],
)
def test_what_can_never_run_is_refused(nodes: list[Node], workers: int, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        cluster_placement.make_placement(workers, Machines(tuple(nodes)))


@pytest.mark.parametrize(
    ("gpus", "share", "most"), [(2, 0.6, 2), (2, 0.4, 4), (4, 0.7, 4), (2, 0.5, 4), (4, 2, 2)]
)
def test_a_trainer_has_a_share_of_one_gpu(gpus: int, share: float, most: int) -> None:
    machine = Machines(({"CPU": 64.0, "GPU": float(gpus)},))
    assert cluster_placement.make_placement(most, machine, gpus_per_worker=share).gpus_per_worker == share
    with pytest.raises(UserError, match=f"{most + 1} workers"):
        cluster_placement.make_placement(most + 1, machine, gpus_per_worker=share)


GPU_MACHINE = {"CPU": 4.0, "GPU": 1.0}
HEAD = {"CPU": 0.0}


@pytest.mark.parametrize(
    ("nodes", "later", "workers", "trainer", "gpus", "data"),
    [
        # A head that schedules no work: as if the machines that the trainers need were there, and no more of them.
        ([HEAD], [GPU_MACHINE] * 8, 2, 1, 1, 3),
        ([HEAD], [GPU_MACHINE] * 8, 8, 1, 1, 3),
        # Trainers wait for GPUs even where machines without one are there already.
        ([HEAD, {"CPU": 16.0}], [{"CPU": 16.0}, GPU_MACHINE], 1, 1, 1, 19),
        # What is there is enough: nothing is started.
        ([HEAD, GPU_MACHINE, GPU_MACHINE], [GPU_MACHINE] * 6, 2, 1, 1, 3),
        # Four fit on one small machine, badly; with a second one each has room.
        ([HEAD, {"CPU": 4.0}], [{"CPU": 4.0}] * 3, 4, 1, 0, 1),
        # No machine is roomy, so the fewest that do.
        ([HEAD], [{"CPU": 1.0, "GPU": 1.0}] * 8, 2, 0.5, 1, 0.5),
    ],
)
def test_a_cluster_that_grows_is_divided_as_it_will_be(
    nodes: list[Node], later: list[Node], workers: int, trainer: float, gpus: float, data: float
) -> None:
    placement = cluster_placement.make_placement(workers, Machines(tuple(nodes), tuple(later), 8))
    found = (placement.cpus_per_worker, placement.gpus_per_worker, placement.share.cpus)
    assert found == (trainer, gpus, data)


@pytest.mark.parametrize(
    ("later", "answer"),
    [
        (
            [{"CPU": 2.0}, *[GPU_MACHINE] * 12],
            "9 workers need 9 GPUs and the cluster could have 8. Use --workers 8",
        ),
        ([{"CPU": 2.0}], "9 workers .* on the 2 CPUs that this cluster could have: it has room for 8"),
    ],
)
def test_what_no_capacity_can_take_is_refused(later: list[Node], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        cluster_placement.make_placement(9, Machines((HEAD,), tuple(later), 8))


def test_work_on_an_empty_cluster_is_planned_for_the_machine_that_comes_first() -> None:
    empty = Machines((HEAD,), (GPU_MACHINE, {"CPU": 8.0}), 2)
    assert empty.for_work == (HEAD, {"CPU": 8.0})
    assert empty.totals() == {"CPU": 8, "GPU": 0}
    assert Machines((HEAD, {"CPU": 2.0}, GPU_MACHINE), (GPU_MACHINE,), 1).totals() == {"CPU": 4, "GPU": 1}


def test_the_user_error_inside_an_error_is_found() -> None:
    try:
        try:
            raise UserError("fix this")
        except UserError as inner:
            raise RuntimeError("a worker died") from inner
    except RuntimeError as error:
        found = ray_cluster.user_error(error)
    assert str(found) == "fix this"
    assert ray_cluster.user_error(RuntimeError("else")) is None


def test_the_reason_why_a_process_refused_to_start_is_found_in_what_ray_says() -> None:
    died = RuntimeError(
        "Worker exit detail: Failed.\nraysl.errors.UserError: host runs code 1, not 2. Fix it.\n"
    )
    assert str(ray_cluster.user_error(died)) == "host runs code 1, not 2. Fix it."


def test_what_ray_data_adds_to_an_error_of_a_task_is_left_out() -> None:
    error = UserError("A target is wrong.\nFailed to apply UDF transform after 1/1 attempts.\nTo change ...")
    assert str(ray_cluster.user_error(error)) == "A target is wrong."


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
def test_a_ray_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def fails(**_: object) -> None:
        raise ConnectionError("no answer.")

    monkeypatch.setattr(ray_cluster, "_ENVIRONMENT", {})
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    # `start` would stop the Ray of the other tests.
    monkeypatch.setattr("raysl.ray_cluster.local_ray.start", fails)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"{address or 'on this machine'}.*no answer"):
        ray_cluster.start()


def test_one_gpu_usually_has_one_worker() -> None:
    assert cluster_placement.default_workers(Machines(({"CPU": 2.0},))) == 1
    assert cluster_placement.default_workers(Machines(({"CPU": 16.0},))) == 2
    assert cluster_placement.default_workers(Machines(({"CPU": 2.0},) * 2)) == 2
    assert cluster_placement.default_workers(Machines(({"CPU": 16.0, "GPU": 1.0},))) == 1
    assert cluster_placement.default_workers(Machines(({"CPU": 16.0, "GPU": 8.0},))) == 2
    assert cluster_placement.make_placement(1, Machines(({"CPU": 16.0, "GPU": 1.0},))).gpus_per_worker == 1


def test_a_cluster_that_others_use_is_said_to_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    placement = Placement(0.5, 0.0, DataShare(), 1)
    assert placement.waiting_message(2) == ""
    assert (
        placement.waiting_message(3)
        == "Waiting for 1.5 CPUs: other work uses the cluster, and 1 of its 4 are free."
    )
    on_gpus = Placement(1.0, 1.0, DataShare(), 1)
    assert on_gpus.waiting_message(1).startswith(
        "Waiting for 1 GPUs: the cluster has 0 now and starts machines for the rest"
    )


@pytest.mark.ray
def test_machines_say_what_they_run(ray_session: None) -> None:
    (found,) = ray_cluster.machine_versions().values()
    assert found == json.loads(json.dumps(versions()))
