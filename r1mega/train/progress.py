"""Progress for people: one line in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from r1mega.train.metrics import human

SECONDS_BETWEEN_LINES = 5.0
FIELDS = (("loss", "loss", 4), ("grad", "grad_norm", 3))


class ProgressPrinter:
    """Prints ``step 50/300  loss 3.214  grad 0.87  18.2k tokens/s  2:31 left``.

    What stands between step and speed are the ``fields``: a label and a metric each, with its number of digits.

    On a terminal the line is updated in place. Elsewhere a line appears for the first and the last step, and at most
    every ``seconds_between_lines`` between them.

    Args:
        num_steps: the last step.
        stream: where to print.
        seconds_between_lines: see above.
        fields: label, name of the metric and digits after the point, of each number to show where it is there.
        steps_per_line: steps that one call of :meth:`step` reports.
    """

    def __init__(
        self,
        num_steps: int,
        stream: TextIO | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        fields: Sequence[tuple[str, str, int]] = FIELDS,
        steps_per_line: int = 1,
    ) -> None:
        self._num_steps, self._fields, self._steps_per_line = num_steps, fields, steps_per_line
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._pause = 0.1 if self._in_place else seconds_between_lines
        self._last_printed = float("-inf")
        self._seconds_per_step: float | None = None
        self._width = 0

    def step(self, metrics: Mapping[str, int | float]) -> None:
        """Report a step; needs ``step``, ``tokens_per_second`` and ``step_seconds``."""
        seconds = metrics["step_seconds"]
        # A moving average: the first steps are slower, and a glance at it should not jump.
        before = seconds if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = average = 0.9 * before + 0.1 * seconds
        now, is_last = time.monotonic(), metrics["step"] >= self._num_steps
        if is_last or now - self._last_printed >= self._pause:
            self._last_printed = now
            self._print(self._line(metrics, average), end_line=is_last)

    def message(self, text: str) -> None:
        """Print a line of its own, above the line in place."""
        self._print(text, end_line=True)

    def _line(self, metrics: Mapping[str, int | float], seconds_per_step: float) -> str:
        step, left = metrics["step"], (self._num_steps - metrics["step"]) / self._steps_per_line * seconds_per_step
        parts = [f"step {step:{len(str(self._num_steps))}d}/{self._num_steps}"]
        parts += [f"{label} {metrics[name]:.{digits}f}" for label, name, digits in self._fields if name in metrics]
        return "  ".join([*parts, f"{human(metrics['tokens_per_second'])} tokens/s", f"{duration(left)} left"])

    def _print(self, text: str, end_line: bool) -> None:
        if self._in_place:
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if end_line else ""))
            self._width = 0 if end_line else len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """``3725.2`` as ``1:02:05``, ``125`` as ``2:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
