"""Templates: how the fields of a row, or the messages of a conversation, become the text that a model reads.

A prompt template is text with `{field}` in it; `{{` and `}}` are braces, and a written-out `\\n` is a line end. A chat template
is the Jinja program of `leangpt.generation.chat`; a model that has none gets `default_chat_template`.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..data.tokenizer import Tokenizer
from ..generation.chat import ChatTemplate
from .rows import text_of

_FIELD = re.compile(r"\{\{|\}\}|\\n|\{([^{}]*)\}")


def fields_of(template: str) -> list[str]:
    """Names of the fields in a prompt template, in order."""
    return [match[1] for match in _FIELD.finditer(template) if match[1] is not None]


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields replaced; braces within a value stay as they are."""

    def text(match: re.Match[str]) -> str:
        if match[1] is not None:
            return values[match[1]]
        return "\n" if match[0] == r"\n" else match[0][0]

    return _FIELD.sub(text, template)


def field_texts(values: dict[str, Any], *templates: str) -> dict[str, str]:
    """The texts of a row that the templates need.

    Raises:
        ValueError: a field is missing or no text.
    """
    return {name: text_of(values, name) for template in templates for name in fields_of(template)}


def encode_prompt(
    template: str, texts: Mapping[str, str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[int], bool]:
    """Tokens of a filled template, and whether it was cut to `max_tokens`: the longest field loses its end.

    Raises:
        ValueError: the template does not fit even with empty fields.
    """
    tokens = with_bos(tokenizer, tokenizer.encode(fill(template, texts)))
    is_cut = False
    texts = dict(texts)
    while len(tokens) > max_tokens:
        longest = max(fields_of(template), key=lambda name: len(texts[name]), default=None)
        if longest is None or not texts[longest]:
            raise ValueError(
                f"the template alone has more than the {max_tokens} tokens of a prompt"
            )
        kept = len(tokenizer.encode(texts[longest])) - (len(tokens) - max_tokens)
        shorter = tokenizer.decode(tokenizer.encode(texts[longest])[: max(0, kept)])
        # cutting within a character leaves a replacement character
        shorter = shorter.rstrip("\ufffd")
        texts[longest] = shorter if len(shorter) < len(texts[longest]) else texts[longest][:-1]
        tokens = with_bos(tokenizer, tokenizer.encode(fill(template, texts)))
        is_cut = True
    return tokens, is_cut


def with_bos(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """As `Generator` reads a prompt."""
    return tokens if tokenizer.bos_id is None else [tokenizer.bos_id, *tokens]


def default_chat_template(tokenizer: Tokenizer) -> str:
    """A role and a line end before each message, the end of text behind it.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
    """
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no token that ends a text: give a chat template")
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    end = names[tokenizer.eos_id]
    return (
        "{% for message in messages %}{{ message.role }}\n{{ message.content | trim }}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )


def chat_template_of(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template that knows the tokenizer's begin and end of text."""
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return ChatTemplate(source, {name: names[i] for name, i in ids.items() if i in names})
