"""All completions of a run, kept in files that can be read back: compressed JSON lines, one file a step and replica."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from r1mega.files import write_whole

FOLDER = "completions"


def write_completions(folder: Path, step: int, replica: int, lines: Iterable[Mapping[str, object]]) -> None:
    """Write what one model replica has generated for ``step``; whole or not at all.

    Args:
        folder: the run's output folder.
        step: the optimizer step that the completions were made for, the first of its rollout.
        replica: data-parallel rank.
        lines: one JSON object a completion.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / FOLDER).mkdir(exist_ok=True)
    # no time stamp: the same completions are the same bytes
    write_whole(folder / FOLDER / _name(step, replica), gzip.compress(text.encode(), mtime=0))


def read_completions(folder: str | Path) -> Iterator[dict]:
    """The completions of the run in ``folder``, step by step, prompt by prompt."""
    files = sorted((Path(folder) / FOLDER).glob("step_*.jsonl.gz"))
    steps = sorted({_step(path) for path in files})
    for step in steps:
        lines: list[dict] = []
        for path in files:
            if _step(path) == step:
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    lines += map(json.loads, file)
        yield from sorted(lines, key=lambda line: (line["prompt_index"], line["sample"]))


def drop_after(folder: Path, step: int) -> None:
    """Remove the completions of steps after ``step``, which a run that goes on from there makes again."""
    for path in (folder / FOLDER).glob(".step_*.tmp"):  # of a process that was killed
        path.unlink()
    for path in (folder / FOLDER).glob("step_*.jsonl.gz"):
        if _step(path) > step:
            path.unlink()


def _name(step: int, replica: int) -> str:
    return f"step_{step:08d}.{replica:05d}.jsonl.gz"


def _step(path: Path) -> int:
    found = re.match(r"step_(\d+)\.", path.name)
    return int(found[1]) if found else 0
