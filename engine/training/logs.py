"""What a run tells: `log.jsonl`, TensorBoard, Weights & Biases, and the terminal.

`log.jsonl` has an object a line: `event` (step, skip, eval, sample), `step`, and the event's values.
"""

import importlib.util
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..config import TrainConfig
from ..files import atomic_write


class Sink(Protocol):
    def write(self, event: str, step: int, values: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Gives every event to all sinks that the options ask for; disabled, to none."""

    def __init__(self, config: TrainConfig, run_id: str, step: int, enabled: bool = True) -> None:
        """Go on after `step`: what was logged beyond is taken back, so that no line is double."""
        self._sinks: list[Sink] = []
        if enabled:
            self._sinks.append(_JsonLines(config.out / "log.jsonl", step))
        if enabled and config.tensorboard:
            if importlib.util.find_spec("tensorboard"):
                self._sinks.append(_TensorBoard(config.out / "tensorboard", step))
            else:
                warnings.warn("no TensorBoard log: pip install tensorboard", stacklevel=2)
        if enabled and config.wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(config, run_id))

    def write(self, event: str, step: int, **values: Any) -> None:
        for sink in self._sinks:
            sink.write(event, step, values)

    def flush(self) -> None:
        """Return once what was written survives a kill."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class _JsonLines:
    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            truncate_log(path, step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        finite = {  # JSON has no nan and inf
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        line = json.dumps({"event": event, "step": step, **finite}, ensure_ascii=False)
        self._file.write(line + "\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def truncate_log(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`, without the half line that a killed process leaves."""
    with path.open("rb") as old, atomic_write(path) as new:
        for line in old:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                new.write(line)


def read_log(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:  # as bytes: only \n ends a line
        return [json.loads(line) for line in file]


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(f"{event}/{name}", value, step)
            elif value is not None:
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: TrainConfig, run_id: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "wandb_project needs the package wandb: pip install leangpt[wandb]"
            ) from error
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.out.name,
            id=run_id,
            resume="allow",
            dir=str(config.out),
            config=config.to_dict(),
        )

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        self._run.log({f"{event}/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        pass  # it sends in the background

    def close(self) -> None:
        self._run.finish()


class Console:
    """A progress bar on stderr with messages above it; disabled, silence."""

    def __init__(self, step: int, max_steps: int, enabled: bool) -> None:
        self._bar = tqdm(
            desc="train",
            initial=step,
            total=max_steps,
            unit="step",
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # a log file need not hold them all
        )
        self._tokens_per_s = 0.0  # running mean

    def step(
        self, loss: float, tokens_per_s: float, peak_seconds_per_token: float | None = None
    ) -> None:
        """Show the loss, tokens per second, and their share of what the machine's matrix products allow, if that is known."""
        weight = 0.05 if self._tokens_per_s else 1.0
        self._tokens_per_s += weight * (tokens_per_s - self._tokens_per_s)
        text = f"loss {loss:.3f}, {self._tokens_per_s:,.0f} tokens/s"
        if peak_seconds_per_token is not None:
            text += f", {self._tokens_per_s * peak_seconds_per_token:.1%} of peak"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
