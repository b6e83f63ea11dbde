"""`chat`: conversations; only what the assistant says is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ...config import SamplingParams
from ...data.text import encode_utf8
from ...data.tokenizer import Tokenizer
from ...generation.chat import ROLES, ChatTemplate, Message, trim_history
from ..rows import list_of
from ..templates import chat_template_of, default_chat_template
from .base import Example, Prediction, Report
from .language import LanguageTask, perplexity, probability, shifted

if TYPE_CHECKING:
    from ..tuned import Tuned

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Chat(LanguageTask[Conversation]):
    """Messages with roles. Of a conversation that is too long, the system prompt and the latest turns stay."""

    name = "chat"

    messages_field: str = "messages"
    template: str | None = None  # Jinja; None: the base model's, else a plain one
    max_answer_tokens: int = 256  # of an answer that is generated

    def parse(self, values: dict[str, Any]) -> Conversation:
        conversation = self.parse_input(values)
        if not any(message["role"] == "assistant" for message in conversation):
            raise ValueError("no message of the assistant, there is nothing to learn")
        return conversation

    def parse_input(self, values: dict[str, Any]) -> Conversation:
        messages = list_of(values, self.messages_field)
        if isinstance(messages, str):  # a line of plain text, or a cell of a table
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"{self.messages_field!r} must be a list of messages, got {messages!r:.80}"
            )
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(
                    f"message {i} must have a role of {', '.join(ROLES)}, got {message!r:.80}"
                )
            content = message.get("content")
            if not isinstance(content, str) or not content.strip():
                raise ValueError(
                    f"message {i} must have a content that is text, got {content!r:.80}"
                )
            encode_utf8(content)
        return tuple(messages)

    def line_field(self) -> str:
        return self.messages_field

    def key(self, sample: Conversation) -> tuple[tuple[str, str], ...]:
        return tuple((message["role"], message["content"]) for message in sample)

    def fit(
        self,
        samples: Sequence[Conversation],
        tokenizer: Tokenizer,
        base_template: ChatTemplate | None,
    ) -> Self:
        source = self.template or (base_template and base_template.source)
        return replace(self, template=source or default_chat_template(tokenizer))

    def chat_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        assert self.template is not None, "the task is fitted first"
        return chat_template_of(self.template, tokenizer)

    def encode(self, sample: Conversation, tokenizer: Tokenizer, max_len: int) -> Example:
        template = self.chat_template(tokenizer)
        last = max(i for i, message in enumerate(sample) if message["role"] == "assistant")
        messages = trim_history(
            sample[: last + 1], template, tokenizer, max_len + 1, add_generation_prompt=False
        )
        tokens = template.encode(messages, tokenizer, add_generation_prompt=False)
        is_target = [False] * len(tokens)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = template.encode(messages[:i], tokenizer) if i else []
                answered = template.encode(
                    messages[: i + 1], tokenizer, add_generation_prompt=False
                )
                if tokens[: len(answered)] != answered or answered[: len(prompt)] != prompt:
                    raise ValueError(
                        f"the chat template does not keep message {i} apart: a conversation up to it must be the beginning "
                        "of the whole one, token for token"
                    )
                is_target[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
        too_many = len(tokens) - (max_len + 1)
        if too_many > 0:  # one turn alone is too long: what comes last is what is answered
            tokens, is_target = tokens[too_many:], is_target[too_many:]
        return shifted(tokens, is_target, is_cut=len(messages) <= last or too_many > 0)

    def predict(self, tuned: "Tuned", samples: Sequence[Conversation]) -> list[Prediction]:
        """The answer to each conversation, greedily; what the assistant says last is left out first."""
        template = self.chat_template(tuned.tokenizer)
        num_new = min(self.max_answer_tokens, tuned.max_len // 2)
        prompts = []
        for sample in samples:
            asked = sample[:-1] if sample[-1]["role"] == "assistant" else sample
            messages = trim_history(asked, template, tuned.tokenizer, tuned.max_len - num_new)
            prompts.append(template.encode(messages, tuned.tokenizer))
        params = SamplingParams(max_new_tokens=num_new, temperature=0, logprobs=0)
        completions = tuned.generator.generate(prompts, params, overflow="truncate")
        return [{"answer": c.text, "probability": probability(c)} for c in completions]

    def report(
        self, samples: Sequence[Conversation], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        return Report.of_metrics({"perplexity": perplexity(loss)})
