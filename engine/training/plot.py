"""The loss curve of a run, drawn from its log."""

import io
from pathlib import Path

import matplotlib.figure
import numpy as np

from ..files import atomic_write
from .logs import read_log


def plot_losses(log: Path, picture: Path) -> None:
    """Draw training and validation loss over the steps as a PNG; without any step in the log, draw nothing."""
    events = read_log(log)
    steps = [(e["step"], e["loss"]) for e in events if e["event"] == "step"]
    evaluations = [e for e in events if e["event"] == "eval"]
    if not steps:
        return
    x, loss = np.array(steps, dtype=np.float64).T
    # without pyplot, which looks for a display
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(x, _smoothed(loss), color="tab:blue", linewidth=1.8, label="training (smoothed)")
    if evaluations:
        axes.plot(
            [e["step"] for e in evaluations],
            [float(e["val_loss"]) for e in evaluations],  # a string where it is not finite
            color="tab:orange",
            marker="o",
            markersize=4,
            label="validation",
        )
        last = evaluations[-1]
        bits = float(last["bits_per_byte"])
        axes.set_title(f"validation: {bits:.3f} bits per byte after {last['step']:,} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    with atomic_write(picture) as file:
        file.write(png.getvalue())


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over the neighbours: about a fiftieth of the run; at its start fewer, at its end those before alone."""
    half = len(values) // 100
    sums = np.concatenate(([0.0], values.cumsum()))
    index = np.arange(len(values))
    before = np.minimum(half, index)
    after = np.minimum(before, index[::-1])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
