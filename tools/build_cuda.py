"""Builds r1mega/_cuda.so, the CUDA kernels of csrc/cuda. It needs nvcc, and no GPU.

    python tools/build_cuda.py                      # sm_80, sm_90a, sm_100a, and PTX for later ones
    python tools/build_cuda.py --archs 90a          # one kind of GPU, in a third of the time
    python tools/build_cuda.py --print_limits       # also the registers and memory that each kernel takes

`make setup` and `pip install` do the same where they find nvcc: in $CUDA_HOME/bin, in PATH, or in /usr/local/cuda/bin.
R1MEGA_CUDA=0 leaves it out, R1MEGA_CUDA_ARCHS="90a;100a" chooses. The library has plain C functions, so neither
Python's nor torch's headers are needed, and one build serves every version of both.

Exit status: 0 built, 1 nvcc failed, 2 there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc/cuda"
LIBRARY = ROOT / "r1mega/_cuda.so"
DEFAULT_ARCHS = "80;90a;100a"


class BuildFailed(Exception):
    """nvcc failed; the message has what it printed."""


def find_nvcc() -> str | None:
    """The path of nvcc; None where there is none or ``R1MEGA_CUDA`` is 0."""
    if os.environ.get("R1MEGA_CUDA") == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home, "bin") for home in homes if home]
    for path in (*(folder / "nvcc" for folder in folders), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return str(path)
    return None


def architectures() -> list[str]:
    """What to build for, without ``sm_``."""
    return [arch for arch in os.environ.get("R1MEGA_CUDA_ARCHS", DEFAULT_ARCHS).split(";") if arch]


def command(nvcc: str, archs: list[str], output: Path, *flags: str) -> list[str]:
    """The one command that makes the library. PTX of the first architecture serves those that are not named."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = archs[0].rstrip("af")
    return [
        nvcc, "-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0",
        *codes, f"-gencode=arch=compute_{ptx},code=compute_{ptx}", *flags, str(SOURCES / "kernels.cu"),
        "-o", str(output),
    ]  # fmt: skip


def build(nvcc: str, archs: list[str], output: Path = LIBRARY, *flags: str) -> str:
    """Make ``output``, whole or not at all. Returns what nvcc printed. Raises :class:`BuildFailed`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build_cuda_") as folder:
        made = Path(folder, output.name)
        run = subprocess.run(command(nvcc, archs, made, *flags), capture_output=True, text=True)
        if run.returncode:
            raise BuildFailed((run.stderr + run.stdout).strip() or f"nvcc ended with status {run.returncode}")
        os.replace(made, output)
        return run.stderr + run.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", help=f"such as 90a, or several with ; between; default {DEFAULT_ARCHS}")
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--print_limits", action="store_true", help="print ptxas' report of each kernel")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: set CUDA_HOME or put it into PATH (and R1MEGA_CUDA=0 switches it off)", file=sys.stderr)
        return 2
    archs = arguments.archs.split(";") if arguments.archs else architectures()
    try:
        printed = build(nvcc, archs, arguments.output, *["-Xptxas=-v"] * arguments.print_limits)
    except BuildFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{printed}built {arguments.output} for {', '.join(archs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
