"""`Tuned`: a model with a task. Predictions run in the decode engine, losses in the module that was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..decoding.decoder import Decoder
from ..generation.generator import Generator
from .decoder import decoder_of_tuned
from .methods import Adapted
from .modules import TaskModule
from .tasks.base import Example, Prediction, Report, Task


@dataclass
class Tuned:
    """A model with all that a task needs of it."""

    task: Task
    module: TaskModule
    adapted: Adapted
    tokenizer: Tokenizer
    max_len: int  # tokens of an example
    batch_size: int = 16
    format: str | None = None  # of the weights in the native decoder, such as "int8"

    @cached_property
    def decoder(self) -> Decoder:
        """The model as it is when this is first asked for."""
        return decoder_of_tuned(self.adapted, self.format)

    @cached_property
    def generator(self) -> Generator:
        """A generator of the same."""
        return Generator(self.decoder, self.tokenizer, self.task.chat_template(self.tokenizer))

    def predict(self, samples: Sequence[Any]) -> list[Prediction]:
        return self.task.predict(self, samples)

    def report(self, samples: Sequence[Any]) -> Report:
        """How good the predictions are for samples that have their answers."""
        parts = [self.task.encode_all(s, self.tokenizer, self.max_len) for s in samples]
        loss = self.mean_loss([example for examples in parts for example in examples])
        return self.task.report(samples, self.predict(samples), loss)

    def mean_loss(self, examples: Sequence[Example]) -> float:
        """Mean over all targets, in nats."""
        num_targets = sum(map(self.task.num_targets, examples))
        return sum(self.losses(examples)) / max(1, num_targets)

    @torch.inference_mode()
    def losses(self, examples: Sequence[Example]) -> list[float]:
        """The loss of each example, in nats: the sum over its targets. Examples of similar length run together."""
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        losses: dict[int, float] = {}
        was_training = self.module.training
        self.module.eval()
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.task.collate([examples[i] for i in chosen])
            tokens, targets = (part.to(self.module.model.device) for part in batch)
            losses |= zip(chosen, _sums(self.module(tokens, targets, "none")), strict=True)
        self.module.train(was_training)
        return [losses[i] for i in range(len(examples))]


def _sums(losses: Tensor) -> list[float]:
    """Over all but the first dimension."""
    return losses.double().flatten(1).sum(1).tolist() if losses.ndim > 1 else losses.tolist()
