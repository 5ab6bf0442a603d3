"""What a reward looks at, and what comes out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt.

    Args:
        prompt: what the model was given, template included.
        completion: what the model wrote, without its end-of-text token.
        reference: the right answer, as text; None where there is none.
        data: the other keys of the prompt's line (tests, a task's entry), and what the trainer knows of the completion:
            ``num_tokens``. Everything in it can be written as JSON.
    """

    prompt: str
    completion: str
    reference: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line. Raises :class:`ValueError` where a field cannot be written as JSON."""
        for name in ("prompt", "completion"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"sample.{name}={getattr(self, name)!r:.80}: must be text")
        if self.reference is not None and not isinstance(self.reference, str):
            raise ValueError(f"sample.reference={self.reference!r:.80}: must be text, or None")
        try:
            return json.dumps(asdict(self))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sample.data: {error}; must hold text, numbers, lists and dictionaries") from error


@dataclass(frozen=True)
class Scores:
    """The rewards of a sample.

    Attributes:
        total: sum of weight times value.
        by_name: each reward's value, without its weight; 0 where it failed.
        failures: why a reward failed, by its name; empty where none did. ``what happened: details``, the part before
            the colon being what failures are counted by.
    """

    total: float
    by_name: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)
