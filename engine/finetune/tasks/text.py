"""`text`: go on with pre-training, on documents of one's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.tokenizer import Tokenizer
from ..rows import text_of
from .base import Example, Prediction, Report
from .language import LanguageTask, perplexity, shifted

if TYPE_CHECKING:
    from ..tuned import Tuned


@dataclass(frozen=True)
class Text(LanguageTask[str]):
    """Documents; every token counts. A long one is several examples, nothing is cut off."""

    name = "text"

    text_field: str = "text"

    def parse(self, values: dict[str, Any]) -> str:
        return text_of(values, self.text_field)

    def line_field(self) -> str:
        return self.text_field

    def key(self, sample: str) -> str:
        return sample

    def encode_all(self, sample: str, tokenizer: Tokenizer, max_len: int) -> list[Example]:
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        tokens = tokenizer.encode(sample)
        if start is not None:
            tokens.insert(0, start)
        if tokenizer.eos_id is not None:
            tokens.append(tokenizer.eos_id)
        windows = [tokens[i : i + max_len + 1] for i in range(0, len(tokens) - 1, max_len)]
        return [shifted(window, [True] * len(window), is_cut=False) for window in windows]

    def predict(self, tuned: "Tuned", samples: Sequence[str]) -> list[Prediction]:
        """How probable each document is."""
        parts = [self.encode_all(sample, tuned.tokenizer, tuned.max_len) for sample in samples]
        sums = iter(tuned.losses([example for examples in parts for example in examples]))
        predictions = []
        for sample, examples in zip(samples, parts, strict=True):
            nats = sum(next(sums) for _ in examples)
            num_tokens = sum(example.length for example in examples)
            num_bytes = len(sample.encode())
            predictions.append(
                {
                    "tokens": num_tokens,
                    "perplexity": perplexity(nats / num_tokens),
                    "bits_per_byte": nats / math.log(2) / num_bytes,
                    "logprob": -nats,
                }
            )
        return predictions

    def report(
        self, samples: Sequence[str], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        nats = -sum(p["logprob"] for p in predictions)
        num_bytes = sum(len(sample.encode()) for sample in samples)
        metrics = {
            "perplexity": perplexity(loss),
            "bits_per_byte": nats / math.log(2) / max(1, num_bytes),
        }
        return Report.of_metrics(metrics)
