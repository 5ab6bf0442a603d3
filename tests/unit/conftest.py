"""Fixtures of the unit tests: the implementations of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from r1mega.kernels import native


@pytest.fixture(autouse=True)
def extension_if_needed(request: pytest.FixtureRequest) -> None:
    """Skip tests marked ``needs_extension`` where the C++ kernels were not built."""
    if native.library is None and request.node.get_closest_marker("needs_extension"):
        pytest.skip(native.reason)


@pytest.fixture(params=["PyTorch", pytest.param("C++", marks=pytest.mark.needs_extension)])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with each implementation."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", None)
    return request.param


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs with each set of instructions that this machine has."""
    if native.library is None:
        pytest.skip(native.reason)
    best = native.library.level()
    try:
        native.library.set_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.library.set_level(best)
