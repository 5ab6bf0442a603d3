"""A source distribution has all that its build needs, and asks another stack for no exact version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("csrc/*.cpp", "csrc/*.h", "csrc/cuda/*", "requirements/*.txt", "tools/build_cuda.py", "r1mega/**/*.py")
OTHERS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "r1mega/rl/presets/r1_zero.yaml")


def run_setup(folder: Path, *arguments: str) -> None:
    # As from pip: nothing of the checkout can be imported instead of what is in the folder.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in a source distribution."""
    folder = tmp_path_factory.mktemp("distribution")
    run_setup(ROOT, "egg_info", "--egg-base", str(folder), "sdist", "--formats", "tar", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.stem


def test_a_source_distribution_has_every_file_that_its_build_reads(unpacked: Path) -> None:
    wanted = {path.relative_to(ROOT) for pattern in BUILT_FROM for path in ROOT.glob(pattern)} | set(map(Path, OTHERS))
    assert len(wanted) > 200
    assert not sorted(str(path) for path in wanted if not (unpacked / path).is_file())
    assert not list(unpacked.rglob("*.so"))


def test_setup_runs_in_it_and_asks_for_ranges_that_hold_the_pinned_versions(unpacked: Path, tmp_path: Path) -> None:
    run_setup(unpacked, "egg_info", "--egg-base", str(tmp_path))
    lines = (tmp_path / "r1mega.egg-info/requires.txt").read_text().split("\n[")[0].split()
    asked = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    pinned = "\n".join((ROOT / f"requirements/{name}.txt").read_text() for name in ("torch", "runtime"))
    versions = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", pinned, re.MULTILINE))
    assert set(asked) == set(versions) and "torch" in asked and "jsonargparse[signatures]>=" in "\n".join(lines)
    for name, specifier in asked.items():
        assert [each.operator for each in specifier] == [">="] and versions[name] in specifier, name
    assert "2.11.0" in asked["torch"]
