"""`FinetuneConfig`: the options of one fine-tuning, besides those of its task and its method."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from tyro.conf import OmitArgPrefixes

from ..config import Precision, TrainConfig
from . import methods
from .tasks import Task, task_from_dict

_UNMERGED = ("prefix", "adapter")  # methods that are more than other weights


TaskType = TypeVar("TaskType", bound=Task)
MethodType = TypeVar("MethodType", bound=methods.Method)


@dataclass(frozen=True)
class FinetuneConfig(Generic[TaskType, MethodType]):
    """Fine-tune a model for a task. A step is one optimizer update over `batch_size` rows."""

    task: OmitArgPrefixes[TaskType]
    method: OmitArgPrefixes[MethodType]
    model: str = "runs/demo"  # hub id, model folder or run
    data: tuple[Path, ...] = ()  # one file at least: .jsonl, .csv, .tsv, .conll or text
    out: Path = Path("runs/finetune")  # the folder of the tuned model
    overwrite: bool = False  # replace the tuned model in `out`, or the checkpoint beside it
    resume: bool = False  # go on from the checkpoint beside `out`, with the options that it has
    checkpoint_every: int = 100  # steps; the checkpoint is deleted once the tuned model is written

    val_data: tuple[Path, ...] = ()  # none: `val_fraction` of the rows of `data`
    val_fraction: float = 0.1
    skip_bad_rows: bool = False  # and count them, instead of stopping with an error
    replay: str | None = None  # FILE:SHARE, earlier rows that make up that share of each batch
    max_len: int | None = None  # tokens of an example; None: the model's max_seq_len

    epochs: float = 3.0
    max_steps: int | None = None  # instead of epochs
    batch_size: int = 16  # rows a step, over all processes
    micro_batch_size: int | None = None  # rows a forward pass; None: all that this process has
    learning_rate: float | None = None  # the highest; None: the method's own
    warmup_fraction: float = 0.1  # of the steps, in which the rate rises from zero
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    recompute: bool = False  # activations of the blocks in backward: less memory, more time
    merge: bool = False  # save a plain model, where the method has one
    seed: int = 1337
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Precision = "auto"  # of matrix products; auto: bfloat16 where the hardware multiplies it
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "max_len", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume goes on with a training, overwrite starts a new one: choose one"
            )
        if self.merge and self.method.name in _UNMERGED:
            raise ValueError(f"{self.method.name} has no merged form: leave out merge")
        self.replay_source()
        self.train_config(num_steps=1, width=1)

    def replay_source(self) -> tuple[Path, float] | None:
        """File and share of `replay`."""
        if self.replay is None:
            return None
        name, _, share = self.replay.rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not name or not 0 < value < 1:
            raise ValueError(
                f"replay must be FILE:SHARE with a share between 0 and 1, got {self.replay!r}"
            )
        return Path(name), value

    def train_config(self, num_steps: int, width: int) -> TrainConfig:
        """What the parts of the training loop read, for a model of `width` channels."""
        rate = self.learning_rate
        if rate is None:
            rate = self.method.default_learning_rate(width)
        return TrainConfig(
            out=self.out,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            max_steps=num_steps,
            schedule="cosine",
            warmup_steps=round(self.warmup_fraction * num_steps),
            optimizer="adamw",
            learning_rate=rate,
            weight_decay=self.weight_decay,
            beta2=0.999,
            grad_clip=self.grad_clip,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            progress=self.progress,
        )

    def num_steps(self, num_examples: int) -> int:
        """Steps of the training on so many examples, without those that are replayed."""
        if self.max_steps is not None:
            return self.max_steps
        source = self.replay_source()
        own = self.batch_size * (1 - source[1]) if source else self.batch_size
        return max(1, math.ceil(self.epochs * num_examples / own))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "task": self.task.to_dict(),
            "method": {"name": self.method.name, **dataclasses.asdict(self.method)},
            "data": [str(path) for path in self.data],
            "val_data": [str(path) for path in self.val_data],
            "out": str(self.out),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown keys are an error."""
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown option of fine-tuning: {', '.join(sorted(unknown))}")
        paths = {name: tuple(map(Path, values[name])) for name in ("data", "val_data")}
        parts = {
            "task": task_from_dict(values["task"]),
            "method": methods.from_dict(values["method"]),
            "out": Path(values["out"]),
        }
        return cls(**values | paths | parts)
