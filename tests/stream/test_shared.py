"""A stream that several runs share: each gets what one of its own would bring, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysl.augment import recipe
from raysl.dataset import DataSet
from raysl.pretext import Geometry, build
from raysl.pretext.jigsaw import Config as Jigsaw
from raysl.stream import shared
from raysl.stream.plan import Plan
from raysl.stream.reader import Stream, StreamConfig
from raysl.stream.shared import StreamActor, Subscriber, batches, merge_streams, view_keys
from raysl.stream.views import View
from tests.data import make_dataset
from tests.stream.test_reader import BATCH, SHARE, InTurn, fingerprints

Prints = list[list[tuple[int, int, str]]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 150)


def stream(dataset: DataSet, jigsaw: Jigsaw = Jigsaw(), colors: str = "pirl", place: str = "data") -> Stream:  # noqa: B008
    geometry = Geometry(image_size=32)
    views = {
        "transformed": View(build("jigsaw", {"jigsaw": jigsaw}, geometry), recipe(colors)),
        "image": View(build("identity", {}, geometry), recipe(colors)),
    }
    plan = replace(Plan.of(dataset, BATCH, seed=3, epochs=2), groups_per_window=2, steps_per_block=2)
    return Stream(dataset, plan, views, StreamConfig("trainer" if place == "trainer" else "data"), SHARE)


def opened(streams: list[Stream], start: int = 0, timeout_s: float = 60) -> tuple[Any, list[Subscriber]]:
    """An actor that holds six batches, and a subscriber for each of the streams."""
    import ray

    one = merge_streams(streams)
    actor = ray.remote(num_cpus=0, max_concurrency=16)(StreamActor).remote(
        one, start, one.plan.num_steps, 1, timeout_s
    )
    subscribers = [Subscriber(str(i), (actor,), view_keys(each)) for i, each in enumerate(streams)]
    assert all(ray.get([actor.expect.remote(subscriber.run, start) for subscriber in subscribers]))
    return actor, subscribers


def alone(one: Stream) -> Prints:
    return [fingerprints(batch) for batch in one.batches()]


@pytest.fixture(scope="module")
def expected(dataset: DataSet, ray_session: None) -> Prints:
    """What a run without other views gets."""
    return alone(stream(dataset))


def test_equal_views_are_made_once_and_equal_crops_cut_once(dataset: DataSet) -> None:
    few, all_orders, gray = Jigsaw(num_permutations=100), Jigsaw(), "gray"
    streams = [
        stream(dataset, few),
        stream(dataset, few),
        stream(dataset, all_orders),
        stream(dataset, few, gray),
    ]
    assert (
        sorted(name.partition("@")[0] for name in merge_streams(streams).views)
        == ["image"] * 2 + ["transformed"] * 3
    )
    # Where trainers make the views, only crops are sent, and these are equal.
    crops = [replace(one, config=StreamConfig("trainer")) for one in streams]
    assert sorted(name.partition("@")[0] for name in merge_streams(crops).views) == ["image", "transformed"]


@pytest.mark.ray
@pytest.mark.parametrize("place", ["data", "trainer"])
def test_runs_in_lock_step_get_what_they_would_alone(dataset: DataSet, ray_session: None, place: str) -> None:
    few, coarse = Jigsaw(num_permutations=100), Jigsaw(grid=2, min_scale=0.3)
    streams = [stream(dataset, few, place=place), stream(dataset, coarse, "gray", place)]
    streams[1] = replace(streams[1], schedule=InTurn())
    _, subscribers = opened(streams)
    together = [batches(one, subscriber) for one, subscriber in zip(streams, subscribers, strict=True)]
    pairs = [tuple(map(fingerprints, pair)) for pair in zip(*together, strict=True)]
    assert [first for first, _ in pairs] == alone(stream(dataset, few))
    assert [second for _, second in pairs] == alone(replace(streams[1], config=StreamConfig("data")))


@pytest.mark.ray
def test_a_run_that_falls_silent_keeps_nobody_waiting_and_can_go_on(
    dataset: DataSet, expected: Prints
) -> None:
    one = stream(dataset)
    _, subscribers = opened([one, one, one], timeout_s=0.2)
    slow, quick = (batches(one, subscriber) for subscriber in subscribers[:2])  # the third never comes
    seen = [fingerprints(next(slow)) for _ in range(3)]
    assert [fingerprints(batch) for batch in quick] == expected
    assert seen + [fingerprints(batch) for batch in slow] == expected


@pytest.mark.ray
def test_the_window_is_bounded_and_nobody_is_more_than_that_ahead(
    dataset: DataSet, ray_session: None
) -> None:
    one = merge_streams([stream(dataset)])
    actor = StreamActor(one, 0, one.plan.num_steps, window_bytes=1, timeout_s=60)
    names = ["", *one.views]
    assert actor.expect("slow", 0)
    assert actor.expect("quick", 0)
    assert all(actor.take("quick", step, names) for step in range(6))
    assert actor.take("slow", 0, names) is not None
    assert actor.take("quick", 6, names) is not None  # there is room since the slow one has come
    assert not actor.expect("late", 0)
    assert actor.take("late", 0, names) is None
    assert actor.take("far", 12, names) is None


@pytest.mark.ray
def test_a_run_from_another_step_reads_on_its_own(dataset: DataSet, expected: Prints) -> None:
    one = stream(dataset)
    actor, (subscriber,) = opened([one])
    assert [fingerprints(batch) for batch in batches(one, subscriber, 9)] == expected[9:]
    del actor


@pytest.mark.ray
def test_an_actor_that_dies_is_not_missed(dataset: DataSet, expected: Prints) -> None:
    import ray

    def read() -> Iterator[list[tuple[int, int, str]]]:
        for batch in batches(one, subscriber):
            yield fingerprints(batch)
            if batch.step == 4:
                ray.kill(actor)

    one = stream(dataset)
    actor, (subscriber,) = opened([one])
    assert list(read()) == expected


@pytest.mark.ray
def test_damaged_shard_is_told_by_the_own_stream(tmp_path: Path, ray_session: None) -> None:
    from raysl.dataset import SHARDS
    from raysl.errors import UserError

    one = stream(make_dataset(tmp_path / "set", 64))
    (tmp_path / "set" / SHARDS / "00001.parquet").write_bytes(b"no longer a shard")
    _, (subscriber,) = opened([one])
    with pytest.raises(UserError, match="damaged"):
        list(batches(one, subscriber))


@pytest.mark.ray
def test_a_subscriber_of_another_number_of_workers_is_not_taken(dataset: DataSet, ray_session: None) -> None:
    half = replace(stream(dataset), world=2)
    subscriber = Subscriber("run", (None,), view_keys(half))
    expected = fingerprints(next(half.batches()))
    assert fingerprints(next(shared.batches(half, subscriber))) == expected
