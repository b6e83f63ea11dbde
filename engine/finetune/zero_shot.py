"""Classify and rank without training: whatever the model finds most probable after a template, perhaps after a few examples.

A row is put into a template, and each label or candidate behind it; `Generator.rank` reads what they share once. The score is
the mean log-probability of the tokens, which does not favour short ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ..generation.generator import Generator
from .dataset import read_samples
from .rows import BadRows
from .tasks import Prediction, Report
from .tasks.classify import Classify, LabelledText
from .tasks.rank import Choice, Rank, ranking
from .templates import fields_of, fill

_END = "\n\n"  # of a shot


@dataclass(frozen=True)
class ZeroShot:
    """A model that was not trained for the task."""

    task: Classify | Rank
    generator: Generator
    shots: tuple[LabelledText | Choice, ...] = ()  # with their answers, shown before each row
    prompt: str = "{text}\n"  # classify: the template; rank has its own

    @classmethod
    def create(
        cls,
        task: Literal["classify", "rank"],
        generator: Generator,
        labels: Sequence[str] = (),
        shots: Path | None = None,
        prompt: str | None = None,
    ) -> Self:
        """As the command line has it.

        Raises:
            ValueError: fewer than two labels where they are needed, a bad template, a bad row among the shots.
        """
        if task == "classify" and len(labels) < 2:
            raise ValueError(f"labels must name two or more, got {', '.join(labels) or 'none'}")
        if task == "rank" and labels:
            raise ValueError("rank has candidates in each row: leave out the labels")
        kind: Classify | Rank
        if task == "rank":
            kind = Rank() if prompt is None else Rank(prompt=prompt)
        else:
            kind = Classify(labels=tuple(labels))
        examples = read_samples([shots], kind, BadRows()).samples if shots else []
        template = prompt or cls.prompt
        if task == "classify" and fields_of(template) != ["text"]:
            raise ValueError(f"prompt must have the one field {{text}}, got {template!r}")
        return cls(kind, generator, tuple(examples), template)

    def predict(self, samples: Sequence[Any]) -> list[Prediction]:
        return [self._predict(sample) for sample in samples]

    def report(self, samples: Sequence[Any]) -> Report:
        return self.task.report(samples, self.predict(samples), loss=math.nan)

    def _predict(self, sample: LabelledText | Choice) -> Prediction:
        if isinstance(sample, Choice):
            return ranking(sample.candidates, self._scores(sample, sample.candidates))
        labels = self.task.labels if isinstance(self.task, Classify) else ()
        ranked = ranking(labels, self._scores(sample, labels))
        probabilities = {r["candidate"]: r["probability"] for r in ranked["ranking"]}
        return {
            "label": ranked["best"],
            "probabilities": {label: probabilities[label] for label in labels},
        }

    def _scores(self, sample: LabelledText | Choice, candidates: Sequence[str]) -> list[float]:
        ranked = self.generator.rank(self._context(sample, candidates), candidates)
        return [r.mean_logprob for r in sorted(ranked, key=lambda r: r.index)]

    def _context(self, sample: LabelledText | Choice, candidates: Sequence[str]) -> str:
        """The shots and the row; the first shots are left out where they do not fit."""
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None
        longest = max(len(tokenizer.encode(candidate)) for candidate in candidates)
        room = self.generator.decoder.config.max_seq_len - longest - 1  # 1: begin of text
        shots = [self._filled(shot) + self._answer(shot) + _END for shot in self.shots]
        context = self._filled(sample)
        while shots and len(tokenizer.encode("".join(shots) + context)) > room:
            del shots[0]
        return "".join(shots) + context

    def _filled(self, sample: LabelledText | Choice) -> str:
        if isinstance(sample, Choice):
            return sample.context
        return fill(self.prompt, {"text": sample.text})

    def _answer(self, sample: LabelledText | Choice) -> str:
        return sample.candidates[sample.chosen] if isinstance(sample, Choice) else sample.labels[0]
