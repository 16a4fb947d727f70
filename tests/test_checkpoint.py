"""Checkpoints: which are kept, what is in them, and that half a one is never taken for a whole one."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysl import checkpoint
from raysl.checkpoint import STATE, SaveConfig, Saver
from raysl.errors import UserError
from raysl.storage import Folder, failure


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "checkpoints"))


def part(rows_nd: torch.Tensor, first: int = 0, num_images: int = 100) -> dict[str, Any]:
    """A part of a bank, as `MemoryBank.state`."""
    return {"first": first, "last": first + len(rows_nd), "num_images": num_images, "rows_nd": rows_nd}


def save(
    folder: Folder,
    *steps: int,
    rank: int = 0,
    world: int = 1,
    config: SaveConfig | None = None,
    value: float = 0.0,
) -> None:
    """What one worker writes at some steps."""
    saver = Saver(folder, config or SaveConfig(keep_last=100), rank, world)
    for step in steps:
        state = {"step": step, "weight": torch.full((3,), value)}
        saver.save(step, state if rank == 0 else None, part(torch.full((2, 2), float(rank))))
        saver.wait()


def steps(folder: Folder) -> list[int]:
    return [found.step for found in checkpoint.complete(folder)]


def newest_step(folder: Folder) -> int | None:
    found = checkpoint.newest_checkpoint(folder)
    return found.step if found else None


def test_a_round_trip_is_exact(folder: Folder) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}
    bank = part(torch.randn(5, 4).half())
    saver = Saver(folder, SaveConfig(), 0, 1)
    saver.save(7, state, bank)
    saver.wait()
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    assert (found.step, found.world) == (7, 1)
    loaded, banks = found.load()
    _assert_equal(loaded, state)
    _assert_equal(list(banks), [bank])
    _assert_equal(found.state(), state)


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        ({"step": 1}, "it holds no network"),
        ({"network": [1, 2]}, "it holds no network"),
        ({"network": {"backbone.weight": 3.0}}, "it holds no network"),
        ({"network": {"backbone.weight": torch.zeros(1)}}, "do not fit the network"),
        ({"network": {"backbone.other": torch.zeros(3, 4)}}, "do not fit the network"),
        ({"network": {"backbone.weight": torch.full((3, 4), float("nan"))}}, "not finite"),
    ],
)
def test_a_network_that_does_not_fit_or_is_not_finite_is_refused(
    folder: Folder, state: dict[str, Any], answer: str
) -> None:
    """A stranger can make the checksums of such a checkpoint fit."""
    saver = Saver(folder, SaveConfig(), 0, 1)
    saver.save(1, state, None)
    saver.wait()
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    with pytest.raises(UserError, match=answer):
        found.fill(nn.Linear(4, 3, bias=False), found.backbone_state())


def _assert_equal(a: Any, b: Any) -> None:
    if isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            _assert_equal(a[key], b[key])
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y)
    else:
        assert a == b


def test_what_is_saved_is_the_state_at_the_call(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.zeros(3), torch.zeros(2, 2)
    saver = Saver(folder, SaveConfig(), 0, 1)
    # The thread starts to write only after the tensors have gone on.
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    monkeypatch.setattr("threading.Thread.join", lambda thread: thread.run())
    saver.save(1, {"nested": [{"weight": weight}]}, part(rows))
    weight += 1
    rows += 1
    saver.wait()
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    state, banks = found.load()
    assert state["nested"][0]["weight"].sum() == 0
    assert next(banks)["rows_nd"].sum() == 0


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [100]),
        (2, 0, [90, 100]),
        (1, 30, [30, 60, 90, 100]),
        (2, 50, [50, 90, 100]),
        (99, 0, [*range(10, 101, 10)]),
    ],
)
def test_which_are_kept(folder: Folder, keep_last: int, keep_every: int, kept: list[int]) -> None:
    save(folder, *range(10, 101, 10), config=SaveConfig(keep_last=keep_last, keep_every=keep_every))
    assert steps(folder) == kept
    assert len(folder.list()) == len(kept)


def test_when_a_save_is_due() -> None:
    now = [100.0]
    saver = Saver(Folder("unused"), SaveConfig(every_steps=4, every_minutes=2), 0, 1, clock=lambda: now[0])
    assert [step for step in range(1, 13) if saver.due(step, 0.0)] == [4, 8, 12]
    assert (saver.due(5, 119.9), saver.due(5, 120.0)) == (False, True)
    now[0] += 30
    assert saver.since_s == 30
    never = Saver(Folder("unused"), SaveConfig(every_steps=0, every_minutes=0), 0, 1)
    assert not any(never.due(step, 1e9) for step in range(1, 13))


def test_the_clock_starts_again_with_each_save(folder: Folder) -> None:
    now = [0.0]
    saver = Saver(folder, SaveConfig(every_minutes=1), 0, 1, clock=lambda: now[0])
    saved = []
    for step in range(1, 11):
        now[0] += 25
        if saver.due(step, saver.since_s):
            saver.save(step, {"step": step}, None)
            saved.append(step)
    saver.wait()
    assert saved == [3, 6, 9]


def test_without_the_manifests_of_all_workers_a_checkpoint_does_not_count(folder: Folder) -> None:
    save(folder, 10, 20, rank=0, world=2)
    save(folder, 10, rank=1, world=2)
    assert steps(folder) == [10]
    assert newest_step(folder) == 10
    save(folder, 20, rank=1, world=2)
    assert steps(folder) == [10, 20]


def test_checkpoints_that_others_still_write_are_not_deleted(folder: Folder) -> None:
    one = SaveConfig(keep_last=1)
    save(folder, 10, rank=1, world=2, config=one)
    save(folder, 10, 20, 30, rank=0, world=2, config=one)
    assert folder.list() == ["step-000000010", "step-000000020", "step-000000030"]
    save(folder, 20, 30, rank=1, world=2, config=one)
    assert folder.list() == ["step-000000030"]


def test_leftovers_of_a_killed_worker_do_no_harm(folder: Folder) -> None:
    save(folder, 10)
    (folder / "step-000000020").write("manifest-0000-of-0001.json.1a2b3c4d.tmp", b"{")
    (folder / "step-000000020").write("state.pt.1a2b3c4d.tmp", b"PK")
    folder.write("step-old/notes.txt", b"")
    assert newest_step(folder) == 10
    save(folder, 30, config=SaveConfig(keep_last=1))
    assert folder.list() == ["step-000000030", "step-old"]


def test_a_manifest_of_a_killed_session_does_not_vouch_for_new_files(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 10, rank=0, world=2, value=1.0)
    save(folder, 10, rank=1, world=2)
    write = Folder.write

    def killed(self: Folder, name: str, data: bytes) -> None:
        write(self, name, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 10, rank=0, world=2, value=2.0)
    assert steps(folder) == []


def test_a_session_of_another_number_of_workers_may_write_the_same_step(folder: Folder) -> None:
    save(folder, 10, rank=0, world=2, value=1.0)
    for rank in (1, 2, 0):
        save(folder, 10, rank=rank, world=3, value=2.0)
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    assert found.world == 3
    state, banks = found.load()
    assert state["weight"].tolist() == [2.0] * 3
    assert [int(part["rows_nd"][0, 0]) for part in banks] == [0, 1, 2]


BANK = "bank-0000-of-0001.rows"
MANIFEST = "manifest-0000-of-0001.json"


@pytest.mark.parametrize("name", [STATE, BANK, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_named_in_the_error(folder: Folder, name: str, damage: str) -> None:
    save(folder, 10, 20)
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    path = Path(str(found.folder)) / name
    data = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match=rf"{name}.*step-000000020.*is damaged.*Delete"):
        _read_all(found)
    found.folder.delete()  # what the error says
    assert newest_step(folder) == 10


def _read_all(found: checkpoint.Checkpoint) -> None:
    _, banks = found.load()
    list(banks)


def test_a_worker_reads_only_its_own_rows_of_the_bank(folder: Folder) -> None:
    # Three chunks, in two parts.
    rows_nd = torch.arange(10_000_000, dtype=torch.float32).reshape(100_000, 100)
    for rank, (first, last) in enumerate([(0, 70_000), (70_000, 100_000)]):
        saver = Saver(folder, SaveConfig(), rank, 2)
        saver.save(1, {"step": 1} if rank == 0 else None, part(rows_nd[first:last], first, len(rows_nd)))
        saver.wait()
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    for first, last in [
        (0, 100_000),
        (41_900, 42_000),
        (60_000, 80_000),
        (99_999, 100_000),
        (70_000, 70_000),
    ]:
        parts = list(found.load(first, last)[1])
        assert torch.equal(torch.cat([one["rows_nd"] for one in parts]), rows_nd[first:last])
    path = Path(str(found.folder)) / "bank-0000-of-0002.rows"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    # Rows of another chunk are as they were.
    assert torch.equal(next(found.load(60_000, 70_000)[1])["rows_nd"], rows_nd[60_000:70_000])
    with pytest.raises(UserError, match=r"bank-0000-of-0002\.rows.*is damaged"):
        list(found.load(0, 10)[1])


def test_the_checksum_of_the_state_follows_its_contents(folder: Folder) -> None:
    save(folder, 10, value=1.0)
    save(folder, 20, value=2.0)
    one, two = checkpoint.complete(folder)
    assert one.crc32() != two.crc32()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A disk that is full while the list holds True."""
    full = [False]
    write = Folder.write

    def maybe(self: Folder, name: str, data: bytes) -> None:
        if full[0]:
            raise failure(f"{self}/{name}", "write", OSError(errno.ENOSPC, "No space left on device"))
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", maybe)
    return full


@pytest.mark.parametrize("at", ["save", "wait"])
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    folder: Folder, full_disk: list[bool], at: str
) -> None:
    saver = Saver(folder, SaveConfig(keep_last=1), 0, 1)
    saver.save(10, {"step": 10}, None)
    saver.wait()
    full_disk[0] = True
    saver.save(20, {"step": 20}, None)
    with pytest.raises(UserError, match=r"No space left to write .*step-000000020"):
        saver.wait() if at == "wait" else saver.save(30, {"step": 30}, None)
    full_disk[0] = False
    assert steps(folder) == [10]
    saver.save(40, {"step": 40}, None)
    saver.wait()
    assert steps(folder) == [40]
