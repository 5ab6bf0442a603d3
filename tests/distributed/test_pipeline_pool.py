"""The pool of gloo processes that the distributed tests share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import PoolError, WorkerPool


def add_up(rank: int, world_size: int, number: float) -> torch.Tensor:
    total = torch.tensor([number * (rank + 1)])
    dist.all_reduce(total)
    return total


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("broken on purpose")
    dist.barrier()


def hang_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(600)


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def connect_late_on_rank_0(rank: int, world_size: int, mark: Path) -> None:
    """In the next job."""
    connect = dist.init_process_group

    def late(*arguments: Any, **options: Any) -> None:
        dist.init_process_group = connect
        connect(*arguments, **options)
        time.sleep(0.5)
        mark.touch()

    if rank == 0:
        dist.init_process_group = late


def is_there(rank: int, world_size: int, mark: Path) -> bool:
    return mark.exists()


@pytest.mark.parametrize("world_size", [1, 2, 4, 2])
def test_each_rank_answers_from_a_group_of_the_asked_size(pool: WorkerPool, world_size: int) -> None:
    results = pool.run(add_up, world_size, 2.0)
    assert [r.item() for r in results] == [2.0 * sum(range(1, world_size + 1))] * world_size


def test_a_failure_names_the_rank_and_its_traceback_and_the_pool_goes_on(pool: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"(?s)--- rank 1 of 2: Traceback.*broken on purpose"):
        pool.run(fail_on_rank_1, 2)
    assert pool.run(add_up, 2, 1.0)[1].item() == 3.0


def test_no_rank_begins_before_all_have_connected(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(connect_late_on_rank_0, 2, tmp_path / "mark")
    assert pool.run(is_there, 2, tmp_path / "mark") == [True, True]


def test_a_rank_that_hangs_or_dies_is_named_and_replaced() -> None:
    own = WorkerPool(max_workers=2)
    try:
        with pytest.raises(PoolError, match=r"(?s)failed on ranks \[0\].*rank 0 of 2: no answer \(limit 6 s\)"):
            own.run(hang_on_rank_0, 2, timeout=6.0)
        with pytest.raises(PoolError, match="rank 1 of 2: the process died with exit code 7"):
            own.run(die_on_rank_1, 2)
        assert own.run(add_up, 1, 1.0)[0].item() == 1.0
    finally:
        own.close()
