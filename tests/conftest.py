"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Real gloo processes: ``pool.run(function, world_size, *args)``."""
    workers = WorkerPool()
    yield workers
    workers.close()
