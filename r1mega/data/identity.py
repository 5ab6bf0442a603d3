"""What a run has been trained on, as fingerprints that stay the same when the files move: ``data.json`` of a run.

A step's samples follow from the tokens, their weights, the seed and the sequence length. The last two are settings;
this says whether the tokens are the same. Imports no torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, DataConfig
from r1mega.data.demonstrations import SUFFIX
from r1mega.data.index import parse_blend
from r1mega.data.tokenizer import Tokenizer, fingerprint

_ENDS = 1 << 20  # bytes of a .bin file that are looked at, at either end


def data_identity(data: DataConfig) -> dict[str, Any]:
    """The files of ``data.train`` with weights and fingerprints, and the tokenizer's; fit for JSON.

    Raises :class:`ConfigError` where a file cannot be read.
    """
    files = []
    for prefix, weight in parse_blend(data.train, "data.train"):
        try:
            files.append({"path": prefix, "weight": weight, "sha256": _file_fingerprint(prefix)})
        except OSError as error:
            raise ConfigError(f"data.train={prefix}: {error.filename} cannot be read: {error.strerror}") from error
    found = None if data.tokenizer is None else fingerprint(Tokenizer.load(data.tokenizer))
    return {"train": files, "tokenizer": {"path": data.tokenizer, "fingerprint": found}}


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """How the data of a run differ from those that it shall go on with, ``name=value: must be ...``; None if not."""
    old, new = there["train"], here["train"]
    for field, what in (("sha256", "hold what {} held"), ("weight", "be weighted as in {}")):
        if [file[field] for file in old] != [file[field] for file in new]:
            return f"data.train={_blend(new)}: must {what.format(_blend(old))}"
    fingerprints = [side["tokenizer"]["fingerprint"] for side in (there, here)]
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        return f"data.tokenizer={here['tokenizer']['path']}: must encode as {there['tokenizer']['path']} does"
    return None


def _blend(files: list[dict[str, Any]]) -> str:
    weighted = ([file["path"]] if file["weight"] is None else [f"{file['weight']:g}", file["path"]] for file in files)
    return f"[{', '.join(word for words in weighted for word in words)}]"


def _file_fingerprint(prefix: str) -> str:
    """sha256 over a file of demonstrations; over the ``.idx`` file, and size and ends of the ``.bin`` file, else."""
    digest = hashlib.sha256()
    with open(prefix if prefix.endswith(SUFFIX) else f"{prefix}.idx", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    if not prefix.endswith(SUFFIX):
        size = Path(f"{prefix}.bin").stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(f"{prefix}.bin", "rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
