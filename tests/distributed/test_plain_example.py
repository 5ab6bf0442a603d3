"""``examples/plain_pipeline.py`` under torchrun, as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.pipeline.schedules import make_table

ROOT = Path(__file__).parents[2]


def run(*arguments: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [*launcher, str(ROOT / "examples/plain_pipeline.py"), "--num_steps", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_copy_of_the_model_may_have_no_microbatch() -> None:
    done = run("--schedule", "dualpipe", "--microbatches", "1")
    assert done.returncode == 0, done.stderr
    found = re.search(r"4 stages on 2 ranks; the gradients differ from those of one process by (\S+)", done.stdout)
    assert found is not None and float(found[1]) < 1e-5
    assert "step   2  loss" in done.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0F0,0B0,0F1,0B1,0R\n1F0,1F1,1B0,1B1,1R\n", "rank 0, action 0B0: deadlock: rank 0 waits in 0B0 for"),
        (make_table("1f1b", 3, 2).to_csv(), "is for 3 ranks, torchrun started 2"),
    ],
)
def test_a_table_that_cannot_run_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    done = run("--table", str(path))
    assert done.returncode != 0
    own = done.stderr[: done.stderr.index("torch/distributed")].splitlines()  # torchrun has a report of its own
    assert own[0].startswith(f"r1mega: error: table={path}: ") and reason in own[0]
    assert sum(line.startswith("r1mega: error: ") for line in done.stderr.splitlines()) == 1
    assert not any(line.startswith("Traceback") for line in own)


def test_without_torchrun_it_says_how_to_start_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "examples/plain_pipeline.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.startswith("r1mega: error: torchrun")
    assert done.stderr.count("\n") == 1
