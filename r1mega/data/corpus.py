"""Where documents come from: text files, JSONL files, folders of them, and the default corpus of maths and code."""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from r1mega.config import ConfigError

SUFFIXES = (".txt", ".md", ".jsonl")


class Corpus(Protocol):
    """Documents that can be read again and again, always the same.

    Attributes:
        num_bytes: size, for the progress display.
        bytes_read: how far the present reading is.
    """

    num_bytes: int
    bytes_read: int

    def __iter__(self) -> Iterator[str]: ...

    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another one; fit for JSON."""
        ...


class FileCorpus:
    """Documents of files: a line of a ``.jsonl`` file each, any other file whole; folders recursively, in sorted order.

    Args:
        inputs: files and folders.
        json_key: where the text is in a line of JSONL.
        suffixes: which files of a folder are taken.

    Raises :class:`ConfigError` where an input is missing or nothing is found; reading raises it too, for what is
    not UTF-8 or not JSON, with the file and the place.
    """

    def __init__(self, inputs: list[str], json_key: str = "text", suffixes: tuple[str, ...] = SUFFIXES) -> None:
        self.json_key = json_key
        self.paths = [path for name in inputs for path in _find(Path(name), suffixes)]
        self.num_bytes = sum(path.stat().st_size for path in self.paths)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        self.bytes_read = 0
        for path in self.paths:
            yield from self._lines(path) if path.suffix == ".jsonl" else self._whole(path)

    def identity(self) -> dict[str, Any]:
        stats = [(path, path.stat()) for path in self.paths]
        return {
            "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "json_key": self.json_key,
        }

    def _whole(self, path: Path) -> Iterator[str]:
        content = path.read_bytes()
        self.bytes_read += len(content)
        yield _decode(content, path, 0)

    def _lines(self, path: Path) -> Iterator[str]:
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = _decode(line, path, offset)
                offset += len(line)
                self.bytes_read += len(line)
                if text.strip():
                    yield self._document(text, f"{path}:{number}")

    def _document(self, line: str, where: str) -> str:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from error
        text = entry.get(self.json_key) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"{where}: has no text under the key {self.json_key!r}; name another with --json_key")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{where}: half of a surrogate pair, which no UTF-8 text can hold")
        return text


def _find(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"input={path}: there is no such file or folder")
    found = sorted((p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()), key=lambda p: p.as_posix())
    if not found:
        raise ConfigError(f"input={path}: no files that end in {', '.join(suffixes)}; choose others with --suffixes")
    return found


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = content[error.start]
        place = offset + error.start
        raise ConfigError(f"{path}: not UTF-8 at byte {place} (0x{bad:02x}); convert it first") from error


# Checked: each gives the same problems in every process (whatever PYTHONHASHSEED and today's date are), has an answer
# for every problem, and takes under 3 ms for one.
GENERATORS = (
    "aiw",
    "base_conversion",
    "basic_arithmetic",
    "bitwise_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "coin_flip",
    "complex_arithmetic",
    "count_bits",
    "count_primes",
    "decimal_arithmetic",
    "decimal_chain_sum",
    "dice",
    "fraction_simplification",
    "gcd",
    "gsm_symbolic",
    "knights_knaves",
    "lcm",
    "leg_counting",
    "letter_counting",
    "number_filtering",
    "number_format",
    "prime_factorization",
    "products",
    "self_reference",
    "simple_equations",
    "spell_backward",
    "syllogism",
)
_VERSIONS = {"sympy": "1.14.0", "reasoning-gym": "0.1.25"}
_SKIPPED_FOLDERS = {"tests", "benchmarks", "_antlr"}


class DefaultCorpus:
    """Maths and code from packages that are installed anyway: sympy's sources and solved reasoning-gym problems.

    The same bytes on every machine, so that checksums and loss curves can be compared: versions are checked, order
    and seeds are fixed. About 23 MB.

    Args:
        num_problems: problems of each of :data:`GENERATORS`.
        seed: of the problems and of the order of the documents.
        report: takes lines of progress.
    """

    def __init__(
        self, num_problems: int = 1500, seed: int = 1234, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self._settings = {"num_problems": num_problems, "seed": seed}
        for package, version in _VERSIONS.items():
            _require_version(package, version)
        self._report = report
        self._documents: list[str] | None = None
        self.num_bytes = self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        if self._documents is None:
            self._documents = sympy_sources()
            for number, texts in enumerate(solved_problems(**self._settings), start=1):
                self._documents += texts
                if number % 7 == 0:
                    self._report(f"making problems: {number} of {len(GENERATORS)} kinds")
            random.Random(self._settings["seed"]).shuffle(self._documents)
            self.num_bytes = sum(len(text) for text in self._documents)
        self.bytes_read = 0
        for text in self._documents:
            self.bytes_read += len(text)
            yield text

    def identity(self) -> dict[str, Any]:
        return {"default": {**_VERSIONS, **self._settings, "generators": list(GENERATORS)}}


def _require_version(package: str, version: str) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "no"
    if found != version:
        raise ConfigError(
            f"default corpus: needs {package} {version}, found {found} version; pip install {package}=={version}"
        )


def sympy_sources() -> list[str]:
    """sympy's own ``.py`` files, as its package lists them, without tests, benchmarks and generated parsers."""
    files = importlib.metadata.distribution("sympy").files or []
    chosen = [f for f in files if f.suffix == ".py" and f.parts[0] == "sympy" and not _SKIPPED_FOLDERS & set(f.parts)]
    return [Path(f.locate()).read_text(encoding="utf-8") for f in sorted(chosen, key=lambda f: f.as_posix())]


def solved_problems(num_problems: int, seed: int) -> Iterator[list[str]]:
    """For each generator, ``num_problems`` texts ``Question: …`` and ``Answer: …``."""
    import reasoning_gym

    for number, name in enumerate(GENERATORS):
        entries = reasoning_gym.create_dataset(name, size=num_problems, seed=seed + number)
        pairs = [(entries[i]["question"], entries[i]["answer"]) for i in range(num_problems)]
        yield [f"Question: {question.strip()}\nAnswer: {answer.strip()}\n" for question, answer in pairs]
