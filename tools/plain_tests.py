"""Runs tests without pytest, on a machine that has Python and torch and nothing else; ``gpu_check.py`` calls it.

    python -m tools.plain_tests tests/gpu/test_triton.py
    python -m tools.plain_tests --share 0/8 tests/gpu/test_triton.py     # the first of eight processes

A small module stands in for pytest. It has what tests/gpu uses: parametrize, skip and the fixture monkeypatch; other
marks do nothing. A test that wants more fails, so that none is left out unseen.

A line for each test says what became of it. With --results each is a line of JSON, too, after one that names all tests
of this share: those that have no line of their own did not end. Exit status: 1 where a test failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = "RESULT "
SHOWN_ID = 120


class Skipped(Exception):
    """What ``pytest.skip`` raises."""


def skip(reason: str, allow_module_level: bool = False) -> None:
    raise Skipped(reason)


class Marks:
    """``pytest.mark``."""

    def parametrize(self, names: str, values: Any, ids: Any = None) -> Callable:
        split = [name.strip() for name in names.split(",")]

        def mark(function: Callable) -> Callable:
            sets = [dict(zip(split, value if len(split) > 1 else (value,), strict=True)) for value in values]
            function.parameters = [*getattr(function, "parameters", []), sets]  # type: ignore[attr-defined]
            return function

        return mark

    def __getattr__(self, name: str) -> Callable:
        return lambda *arguments: lambda function: function


class MonkeyPatch:
    """The fixture ``monkeypatch``."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self._before.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def undo(self) -> None:
        for target, name, value in reversed(self._before):
            setattr(target, name, value)


def stand_in() -> ModuleType:
    """The module that tests get for ``pytest``."""
    module = ModuleType("pytest")
    vars(module).update(mark=Marks(), skip=skip, MonkeyPatch=MonkeyPatch)
    return module


def cases(function: Callable) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a test, in pytest's order."""
    for chosen in itertools.product(*getattr(function, "parameters", [])):
        yield {name: value for part in chosen for name, value in part.items()}


def run_case(function: Callable, given: dict[str, Any]) -> None:
    wanted = set(inspect.signature(function).parameters) - set(given)
    assert wanted <= {"monkeypatch"}, f"there is no fixture {', '.join(sorted(wanted - {'monkeypatch'}))} here"
    patch = MonkeyPatch()
    try:
        function(**given, **{name: patch for name in wanted})
    finally:
        patch.undo()


def run_test(name: str, function: Callable) -> dict:
    """What became of all cases of a test."""
    started, passed, failed, skipped = time.perf_counter(), 0, [], []
    for given in cases(function):
        case = f"{name}[{', '.join(map(str, given.values()))[:SHOWN_ID]}]" if given else name
        try:
            run_case(function, given)
            passed += 1
        except Skipped as reason:
            skipped.append(f"{case}: {reason}")
        except Exception:
            failed.append({"case": case, "error": traceback.format_exc()})
    seconds = round(time.perf_counter() - started, 2)
    return {"test": name, "passed": passed, "failed": failed, "skipped": skipped, "seconds": seconds}


def load(path: Path) -> dict[str, Callable]:
    """The tests of a file by name. Raises what importing it raises."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = ((name, value) for name, value in vars(module).items() if name.startswith("test_") and callable(value))
    return {f"{path.name}::{name}": value for name, value in found}


def run_files(paths: list[Path], share: tuple[int, int], report: Callable[[dict], None]) -> bool:
    """Run the tests of this share; whether all passed."""
    tests: dict[str, Callable] = {}
    outcomes = []
    for path in paths:
        nothing: dict = {"test": path.name, "passed": 0, "failed": [], "skipped": [], "seconds": 0.0}
        try:
            tests |= load(path)
        except Skipped as reason:
            outcomes.append(nothing | {"skipped": [f"{path.name}: {reason}"]})
        except Exception:
            outcomes.append(nothing | {"failed": [{"case": path.name, "error": traceback.format_exc()}]})
    mine = dict(list(tests.items())[share[0] :: share[1]])
    report({"tests": [*(outcome["test"] for outcome in outcomes), *mine]})
    for outcome in outcomes:
        report(outcome)
    for name, function in mine.items():
        outcomes.append(run_test(name, function))
        report(outcomes[-1])
    return not any(outcome["failed"] for outcome in outcomes)


def line_of(outcome: dict) -> str:
    """For a reader."""
    told = f"{outcome['test']}: {outcome['passed']} passed in {outcome['seconds']} s"
    told += "".join(f"\n  SKIPPED {reason}" for reason in outcome["skipped"])
    return told + "".join(f"\n  FAILED {failure['case']}\n{failure['error']}" for failure in outcome["failed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="the tests of process I, of N processes")
    parser.add_argument("--results", action="store_true", help="each result as a line of JSON, too")
    arguments = parser.parse_args()
    index, number = map(int, arguments.share.split("/"))
    sys.path.insert(0, str(ROOT))
    sys.modules["pytest"] = stand_in()

    def report(outcome: dict) -> None:
        if "test" in outcome:
            print(line_of(outcome), flush=True)
        if arguments.results:
            print(RESULT + json.dumps(outcome), flush=True)

    return 0 if run_files(arguments.files, (index, number), report) else 1


if __name__ == "__main__":
    sys.exit(main())
