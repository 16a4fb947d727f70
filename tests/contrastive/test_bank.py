"""The memory bank: what it starts with, what a step changes, and that it moves between any numbers of workers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysl.communication import collective
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.errors import UserError

N, D = 10_000, 8  # more than two blocks of 4096 rows, and not a multiple

Placement = Literal["replicated", "sharded"]


def as_worker(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Makes this process look like one of several; for what needs no communication."""
    monkeypatch.setattr(collective, "rank", lambda: rank)
    monkeypatch.setattr(collective, "world", lambda: world)


def shards(
    monkeypatch: pytest.MonkeyPatch, world: int, num_images: int = N, seed: int = 0
) -> list[MemoryBank]:
    banks = []
    for rank in range(world):
        as_worker(monkeypatch, rank, world)
        banks.append(MemoryBank(num_images, D, BankConfig(placement="sharded"), seed))
    return banks


def test_rows_start_as_unit_vectors_that_depend_on_the_seed_alone() -> None:
    bank = MemoryBank(N, D, BankConfig(), seed=1)
    torch.testing.assert_close(bank.rows_nd.norm(dim=1), torch.ones(N))
    assert len(np.unique(bank.rows_nd.numpy(), axis=0)) == N
    assert torch.equal(bank.rows_nd, MemoryBank(N, D, BankConfig(), seed=1).rows_nd)
    assert not torch.equal(bank.rows_nd, MemoryBank(N, D, BankConfig(), seed=2).rows_nd)
    assert torch.equal(bank.rows_nd[:100], MemoryBank(100, D, BankConfig(), seed=1).rows_nd)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shards_start_with_the_rows_that_one_worker_has(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    whole = MemoryBank(N, D, BankConfig(), seed=0).rows_nd
    banks = shards(monkeypatch, world)
    assert torch.equal(torch.cat([bank.rows_nd for bank in banks]), whole)
    assert max(len(bank.rows_nd) for bank in banks) <= -(-N // world)


def test_more_workers_than_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(len(bank.rows_nd) for bank in shards(monkeypatch, 4, num_images=3)) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_an_update_mixes_the_touched_rows_and_leaves_the_others(momentum: float) -> None:
    bank = MemoryBank(N, D, BankConfig(momentum), seed=0)
    before = bank.rows_nd.clone()
    indices = torch.tensor([9_999, 0, 5_000])
    fresh = F.normalize(torch.randn(3, D, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    bank.update(indices, fresh)
    mixed = momentum * before[indices].numpy() + (1 - momentum) * fresh.detach().numpy()
    expected = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    np.testing.assert_allclose(bank.rows_nd[indices], expected, atol=1e-6)
    others = torch.ones(N, dtype=torch.bool)
    others[indices] = False
    assert torch.equal(bank.rows_nd[others], before[others])
    assert not bank.rows_nd.requires_grad
    torch.testing.assert_close(bank.rows_nd.norm(dim=1), torch.ones(N))


def test_an_index_that_occurs_twice_takes_its_last_embedding() -> None:
    bank = MemoryBank(64, D, BankConfig(momentum=0.0), seed=0)
    embeddings = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(0)), dim=1)
    bank.update(torch.tensor([5, 7, 5, 9]), embeddings)
    torch.testing.assert_close(bank.rows_nd[[5, 7, 9]], embeddings[[2, 1, 3]])


def test_half_precision_rows_are_looked_up_as_float32() -> None:
    bank = MemoryBank(64, D, BankConfig(dtype="float16"), seed=0)
    assert bank.rows_nd.dtype == torch.float16
    bank.update(torch.tensor([3]), torch.ones(1, D))
    rows = bank.lookup(torch.tensor([3, 4]))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (2, 3), (1, 4), (3, 2)])
def test_saved_parts_keep_every_row_on_another_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, saved_by: int, loaded_by: int
) -> None:
    parts = [bank.state() for bank in shards(monkeypatch, saved_by, seed=1)]
    banks = shards(monkeypatch, loaded_by, seed=2)
    for bank in banks:
        bank.load(iter(parts))
    assert torch.equal(torch.cat([bank.rows_nd for bank in banks]), torch.cat([p["rows_nd"] for p in parts]))


def test_parts_of_another_bank_or_with_rows_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[dict[str, Any]] = [bank.state() for bank in shards(monkeypatch, 2)]
    as_worker(monkeypatch, 0, 1)
    with pytest.raises(UserError, match="lacks 5,000 rows"):
        MemoryBank(N, D, BankConfig(), seed=0).load(parts[:1])
    with pytest.raises(UserError, match=r"10,000 rows of 8.*needs 9,999"):
        MemoryBank(N - 1, D, BankConfig(), seed=0).load(parts)
