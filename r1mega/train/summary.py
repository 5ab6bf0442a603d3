"""What a run says at its end."""

from __future__ import annotations

from pathlib import Path

from r1mega.train.checkpoint_files import newest_checkpoint
from r1mega.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, human, read_metrics
from r1mega.train.progress import duration
from r1mega.train.run_folder import CHECKPOINT_FOLDER, LOAD_PICTURE, LOSS_PICTURE


def summary(folder: Path, prompt: str | None = None, text: str | None = None) -> str:
    """The lines printed at the end of the run in ``folder``.

    Args:
        folder: the run's output folder.
        prompt: what the model was asked to continue.
        text: the continuation.
    """
    metrics = read_metrics(folder / METRICS_FILE)
    rows = []
    if metrics:
        seconds = sum(line["step_seconds"] for line in metrics)
        rows += _numbers(metrics, seconds)
        steps = f"{len(metrics)} step{'s' * (len(metrics) > 1)}"
        title = f"done: {steps}, {human(metrics[-1]['tokens'])} tokens in {duration(seconds)}"
    else:
        title = "done: no step was taken"
    if text is not None:
        rows.append(("sample", f"{prompt}|{text}".replace("\n", "\n" + " " * 20)))
    rows.append(("checkpoint", str(newest_checkpoint(folder / CHECKPOINT_FOLDER) or "none")))
    for label, name in (("loss curve", LOSS_PICTURE), ("expert load", LOAD_PICTURE), ("metrics", METRICS_FILE)):
        if (folder / name).exists():
            rows.append((label, str(folder / name)))
    rows.append(("TensorBoard", f"tensorboard --logdir {folder / TENSORBOARD_FOLDER}"))
    return "\n".join([title, *(f"  {label:<18}{value}" for label, value in rows)])


def _numbers(metrics: list[dict], seconds: float) -> list[tuple[str, str]]:
    first, last = metrics[0], metrics[-1]
    rows = [("loss", f"{first['loss']:.4f} -> {last['loss']:.4f} ({last['loss'] / first['loss']:.0%} of the first)")]
    if valid := [line["valid_loss"] for line in metrics if "valid_loss" in line]:
        rows.append(("validation loss", f"{valid[-1]:.4f}"))
    rows.append(("speed", f"{human(last['tokens'] / max(seconds, 1e-9))} tokens/s"))
    if "expert_load_max_over_mean" in last:
        ratio = last["expert_load_max_over_mean"]
        rows.append(("expert balance", f"the busiest expert of a layer has {ratio:.2f} x the mean load"))
    return rows
