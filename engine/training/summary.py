"""How a run ended, for the caller, the terminal, and `summary.json` in its folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import read_json, write_json

Reason = Literal["max_steps", "max_minutes", "target_loss", "interrupted", "skipped"]


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    reason: Reason  # what ended it
    steps: int
    skipped_steps: int
    tokens: int
    minutes: float
    tokens_per_s: float  # while stepping
    peak_share: float  # of the machine's matrix products: the model's operations over those of the same time
    val_loss: float | None  # nats per token, at the last evaluation
    bits_per_byte: float | None  # of `val_loss`
    best_val_loss: float | None
    best_checkpoint: Path | None
    last_checkpoint: Path
    loss_curve: Path

    def __str__(self) -> str:
        rows = {
            "stopped by": self.reason,
            "steps": f"{self.steps:,} ({self.skipped_steps} skipped)",
            "tokens": f"{self.tokens:,} in {self.minutes:.1f} minutes",
            "speed": f"{self.tokens_per_s:,.0f} tokens/s, {self.peak_share:.1%} of the matmul peak",
        }
        if self.best_val_loss is not None:
            rows["validation"] = (
                f"{self.val_loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte "
                f"(best: {self.best_val_loss:.4f} nats per token)"
            )
            rows["best checkpoint"] = str(self.best_checkpoint)
        rows |= {"last checkpoint": str(self.last_checkpoint), "loss curve": str(self.loss_curve)}
        return "\n".join(f"{name:16} {value}" for name, value in rows.items())


def write_summary(out: Path, summary: Summary) -> None:
    values = dataclasses.asdict(summary)
    write_json(
        out / "summary.json",
        {name: str(v) if isinstance(v, Path) else v for name, v in values.items()},
    )


def read_summary(out: Path) -> Summary:
    values = read_json(out / "summary.json")
    for name in ("best_checkpoint", "last_checkpoint", "loss_curve"):
        values[name] = None if values[name] is None else Path(values[name])
    return Summary(**values)
