"""`qa`, `translate`, `summarize`: a prompt from a template, and an answer; only the answer is learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ...config import SamplingParams
from ...data.tokenizer import Tokenizer
from ...generation.chat import ChatTemplate
from ..metrics.answers import (
    exact_match,
    mean,
    need_sacrebleu,
    rouge_l,
    rouge_n,
    sacrebleu_scores,
    token_f1,
)
from ..rows import text_of
from ..templates import encode_prompt, field_texts, fields_of
from .base import Example, Prediction, Report
from .language import LanguageTask, perplexity, probability, shifted

if TYPE_CHECKING:
    from ..tuned import Tuned


class Pair(NamedTuple):
    texts: Mapping[str, str]  # fields of the prompt
    answers: tuple[str, ...]  # all that are right; the first is learnt


@dataclass(frozen=True)
class PairTask(LanguageTask[Pair]):
    """What the three have in common."""

    prompt: str = ""  # template, with {fields} of a row
    answer_field: str = "answer"  # a text, or a list of texts that are all right
    max_answer_tokens: int = 64  # kept free behind a prompt

    def __post_init__(self) -> None:
        if not fields_of(self.prompt):
            raise ValueError(f"prompt must name a field, as in {{question}}, got {self.prompt!r}")
        if self.max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens must be positive, got {self.max_answer_tokens}")

    def parse(self, values: dict[str, Any]) -> Pair:
        answers = values.get(self.answer_field)
        if not isinstance(answers, list):
            answers = [text_of(values, self.answer_field)]
        if not answers:
            raise ValueError(f"{self.answer_field!r} must have an answer, got an empty list")
        texts = [text_of({self.answer_field: answer}, self.answer_field) for answer in answers]
        return self.parse_input(values)._replace(answers=tuple(texts))

    def parse_input(self, values: dict[str, Any]) -> Pair:
        return Pair(field_texts(values, self.prompt), ())

    def line_field(self) -> str:
        names = set(fields_of(self.prompt))
        return names.pop() if len(names) == 1 else super().line_field()

    def check_length(self, max_len: int) -> None:
        if self.max_answer_tokens >= max_len:
            raise ValueError(
                f"max_answer_tokens ({self.max_answer_tokens}) must be less than max_len ({max_len})"
            )

    def key(self, sample: Pair) -> tuple[str, ...]:
        return tuple(sample.texts.values())

    def prompt_tokens(
        self, sample: Pair, tokenizer: Tokenizer, max_len: int
    ) -> tuple[list[int], bool]:
        return encode_prompt(self.prompt, sample.texts, tokenizer, max_len - self.max_answer_tokens)

    def encode(self, sample: Pair, tokenizer: Tokenizer, max_len: int) -> Example:
        prompt, is_cut = self.prompt_tokens(sample, tokenizer, max_len)
        answer = tokenizer.encode(sample.answers[0])
        if tokenizer.eos_id is not None:
            answer.append(tokenizer.eos_id)
        is_cut = is_cut or len(answer) > self.max_answer_tokens
        answer = answer[: self.max_answer_tokens]
        is_target = [False] * len(prompt) + [True] * len(answer)
        return shifted([*prompt, *answer], is_target, is_cut)

    def predict(self, tuned: "Tuned", samples: Sequence[Pair]) -> list[Prediction]:
        """The most probable tokens, one after the other."""
        prompts = [
            self.prompt_tokens(sample, tuned.tokenizer, tuned.max_len)[0] for sample in samples
        ]
        params = SamplingParams(max_new_tokens=self.max_answer_tokens, temperature=0, logprobs=0)
        return [
            {"answer": c.text.strip(), "probability": probability(c)}
            for c in tuned.generator.generate(prompts, params)
        ]


@dataclass(frozen=True)
class QA(PairTask):
    """Answers to questions about a text, or to questions alone."""

    name = "qa"

    prompt: str = "{context}\n\n{question}\n\n"

    def report(
        self, samples: Sequence[Pair], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        pairs = list(zip(samples, predictions, strict=True))
        metrics = {
            name: mean([max(score(p["answer"], wanted) for wanted in s.answers) for s, p in pairs])
            for name, score in (("exact_match", exact_match), ("f1", token_f1))
        }
        return Report.of_metrics(metrics | {"perplexity": perplexity(loss)})


@dataclass(frozen=True)
class Translate(PairTask):
    """Translations."""

    name = "translate"

    prompt: str = "{source}\n\n"
    answer_field: str = "target"
    max_answer_tokens: int = 128

    def fit(
        self, samples: Sequence[Pair], tokenizer: Tokenizer, base_template: ChatTemplate | None
    ) -> Self:
        need_sacrebleu()  # told before the training, not after it
        return self

    def report(
        self, samples: Sequence[Pair], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        answers = [p["answer"] for p in predictions]
        metrics = sacrebleu_scores(answers, [sample.answers[0] for sample in samples])
        return Report.of_metrics(metrics | {"perplexity": perplexity(loss)})


@dataclass(frozen=True)
class Summarize(PairTask):
    """Summaries."""

    name = "summarize"

    prompt: str = "{document}\n\n"
    answer_field: str = "summary"
    max_answer_tokens: int = 128

    def report(
        self, samples: Sequence[Pair], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        pairs = [(p["answer"], s.answers[0]) for s, p in zip(samples, predictions, strict=True)]
        metrics = {
            "rouge1": mean([rouge_n(answer, wanted, 1) for answer, wanted in pairs]),
            "rouge2": mean([rouge_n(answer, wanted, 2) for answer, wanted in pairs]),
            "rougeL": mean([rouge_l(answer, wanted) for answer, wanted in pairs]),
        }
        return Report.of_metrics(metrics | {"perplexity": perplexity(loss)})
