"""Runs a module as on a machine that has only the standard library, torch with what it needs, and Triton.

    python -m tests.unit.bare_machine tools.plain_tests tests/gpu/test_triton.py

NumPy is there for Triton's interpreter alone, which is made of it.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

OF_TORCH = {
    "torch", "torchgen", "functorch", "triton", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "filelock", "fsspec", "setuptools",
}  # fmt: skip
OF_INTERPRETER = {"numpy"} if os.environ.get("TRITON_INTERPRET") == "1" else set()
OURS = {"r1mega", "benchmarks", "tests", "tools"}


class BareFinder(PathFinder):
    """Finds nothing of other packages, though they are installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        package = name.partition(".")[0]
        of_python = package in sys.stdlib_module_names or package.startswith("_sysconfigdata")
        there = of_python or package in OF_TORCH | OF_INTERPRETER | OURS
        return super().find_spec(name, path, target) if there else None


if __name__ == "__main__":
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, BareFinder]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
