"""Build of r1mega. Linters' and pytest's settings are in pyproject.toml; pinned versions in requirements/."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(*names: str) -> list[str]:
    """The lines of ``requirements/<name>.txt``, without comments."""
    lines = [line.split("#")[0].strip() for name in names for line in (ROOT / f"requirements/{name}.txt").open()]
    return [line for line in lines if line]


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "r1mega/__init__.py").read_text(), re.MULTILINE)
    assert found, "r1mega/__init__.py has no __version__"
    return found[1]


def extensions() -> dict:
    """The C++ extension, once there are sources in csrc/. It needs torch, hence pip's --no-build-isolation."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    if not sources:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension("r1mega._C", sources, extra_compile_args=["-O3", "-std=c++20"])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="r1mega",
    version=version(),
    description="Training of R1-scale mixture-of-experts models on PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["r1mega", "r1mega.*"]),
    install_requires=requirements("torch", "runtime"),
    extras_require={"dev": requirements("dev")},
    entry_points={"console_scripts": ["r1mega = r1mega.cli:main"]},
    **extensions(),
)
