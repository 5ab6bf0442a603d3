"""Build of r1mega. Linters' and pytest's settings are in pyproject.toml; pinned versions in requirements/.

There are two ways to install. ``make setup`` installs the pinned versions, with which the whole suite runs, and r1mega
itself with ``--no-deps``. In another stack pip asks for the ranges below, so that nothing there is replaced without
need, its torch above all. What a source distribution has besides the packages is in MANIFEST.in.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools.build_cuda import BuildFailed, architectures, build, find_nvcc  # noqa: E402

# torch is that of the GPU machines for which tools/gpu_check.py is made; setuptools and pybind11 are as in
# pyproject.toml. With the others at these versions, all at once, the tests of what uses them passed, but for the bytes
# of the default corpus, which is drawn with sympy; older versions of jsonargparse and safetensors failed.
LOWEST = {
    "torch": "2.11", "immutabledict": "4.0", "jsonargparse": "4.53", "math-verify": "0.8", "matplotlib": "3.9",
    "megatron-core": "0.14", "numpy": "2.0", "pandas": "2.2.2", "pybind11": "3.0", "PyYAML": "6.0.1",
    "reasoning-gym": "0.1.25", "safetensors": "0.8", "sentencepiece": "0.2", "setuptools": "77", "sympy": "1.13.1",
    "tensorboard": "2.18", "tokenizers": "0.21",
}  # fmt: skip


def requirements(*names: str) -> list[str]:
    """The lines of ``requirements/<name>.txt``, without comments."""
    lines = [line.split("#")[0].strip() for name in names for line in (ROOT / f"requirements/{name}.txt").open()]
    return [line for line in lines if line]


def ranges(*names: str) -> list[str]:
    """The same requirements without their pins: at least the :data:`LOWEST` version."""
    pinned = [line.split("==")[0] for line in requirements(*names)]
    return [f"{name}>={LOWEST[name.partition('[')[0]]}" for name in pinned]


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "r1mega/__init__.py").read_text(), re.MULTILINE)
    assert found, "r1mega/__init__.py has no __version__"
    return found[1]


FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
# Vector code out of plain loops: ``omp simd`` may reorder the sums it names (no OpenMP library is used), and neither
# errno nor floating-point traps are wanted. All else is as the language says: NaN and infinity keep their meaning.
VECTOR_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# csrc/kernels.cpp is compiled once for each level; the best that the machine has is picked at run time.
LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]


CUDA = "r1mega._cuda"


class BuildKernels(build_ext):
    """Compiles the kernels of each level beside the extension's own source, and the CUDA library with nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        # A library with plain C functions: the name has no version of Python.
        if fullname.rpartition(".")[2] == "_cuda":
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        if extension.name == CUDA:
            self.build_cuda()
            return
        extension.extra_objects = []
        try:
            for level, flags in LEVELS.items():
                extension.extra_objects += self.compiler.compile(
                    ["csrc/kernels.cpp"],
                    output_dir=str(Path(self.build_temp, level)),
                    macros=[("R1MEGA_LEVEL", level)],
                    extra_postargs=FLAGS + VECTOR_FLAGS + flags,
                )
            super().build_extension(extension)
        except CCompilerError as error:
            # Not only setuptools' own warning: pip does not show it. ``r1mega kernels`` says what is missing.
            print(f"r1mega: no C++ kernels, PyTorch's operations will be used: {error}")

    def build_cuda(self) -> None:
        nvcc = find_nvcc()
        try:
            assert nvcc, "the extension is listed where there is nvcc"
            build(nvcc, architectures(), Path(self.get_ext_fullpath(CUDA)))
        except (BuildFailed, OSError) as error:
            last = (str(error).strip() or repr(error)).splitlines()[-1]
            print(f"r1mega: no CUDA kernels, python tools/build_cuda.py says more: {last}")


def cpp_extension() -> list[Extension]:
    """The C++ kernels. They need pybind11 and a compiler; without either r1mega is installed without them."""
    try:
        import pybind11
    except ImportError:
        return []
    extension = Extension(
        "r1mega._C",
        ["csrc/bind.cpp", "csrc/buffers.cpp"],
        include_dirs=[pybind11.get_include(), "csrc"],
        define_macros=[("R1MEGA_X86", None)] if len(LEVELS) > 1 else [],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.is_file()),
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )
    return [extension]


def extensions() -> dict:
    """What is compiled on this machine."""
    found = cpp_extension()
    if find_nvcc():
        found.append(Extension(CUDA, [], optional=True))
    return {"ext_modules": found, "cmdclass": {"build_ext": BuildKernels}} if found else {}


setup(
    name="r1mega",
    version=version(),
    description="Training of R1-scale mixture-of-experts models on PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["r1mega", "r1mega.*"]),
    package_data={"r1mega.rl": ["presets/*.yaml"]},
    install_requires=ranges("torch", "runtime"),
    extras_require={"dev": requirements("dev")},
    entry_points={"console_scripts": ["r1mega = r1mega.cli:main"]},
    **extensions(),
)
