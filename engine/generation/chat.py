"""Chat templates: from a list of messages to the tokens that a chat model was trained on.

A template is a Jinja program that comes with a model (`chat_template` in tokenizer_config.json, or chat_template.jinja). It
runs in Jinja's sandbox. Special tokens come from the template alone: in a message, "<|im_end|>" is just these ten characters.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..data.tokenizer import Tokenizer
from ..files import read_json

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_FILE_NAME = "chat_template.jinja"
_PRIVATE_USE = range(0xF0000, 0x110000)  # characters without a meaning


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """The template of one model.

    Args:
        source: the Jinja program.
        tokens: the text of special tokens by the name that the program calls them, such as `bos_token`.

    Raises:
        ValueError: the program has a syntax error.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.tokens = dict(tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the template of a Hugging Face folder; None where it has none."""
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        source = config.get("chat_template")
        if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
            by_name = {entry.get("name"): entry.get("template") for entry in source}
            if "default" not in by_name:
                raise ValueError(
                    f"{path}: one chat template must be named 'default', got {', '.join(map(str, by_name))}"
                )
            source = by_name["default"]
        if (folder / _FILE_NAME).exists():
            source = (folder / _FILE_NAME).read_text(encoding="utf-8")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{path}: chat_template must be text, got {source!r:.80}")
        tokens = {}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):  # add_bos_token is a bool
                tokens[name] = text
        try:
            return cls(source, tokens)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation as text, up to where the assistant's next message begins.

        Args:
            messages: each with a "role" (see `ROLES`) and a "content", both strings; more keys as the template knows them.
            variables: for the template, such as `enable_thinking=False`, or `add_generation_prompt=False`.

        Raises:
            ValueError: a message is malformed, or the template refuses the conversation.
        """
        _check(messages)
        given = {"add_generation_prompt": True, **self.tokens, **variables}
        try:
            return self._template.render(messages=[dict(m) for m in messages], **given)
        except (jinja2.TemplateError, TypeError, OverflowError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, **variables: Any
    ) -> list[int]:
        """The tokens of `render`, in which special tokens come from the template alone."""
        _check(messages)
        specials = sorted(tokenizer.special_tokens, key=len, reverse=True)
        any_special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")  # (?!): nothing
        given = {"messages": list(messages), **variables}
        texts = list(_strings(given))
        injected = {special for text in texts for special in any_special.findall(text)}
        if not injected:
            return tokenizer.encode(self.render(messages, **variables), allow_special=True)
        # each gets a stand-in while the template runs: the special tokens in the result are then the template's own
        used = set().union(*texts)
        unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        stand_ins = dict(zip(sorted(injected), unused, strict=False))
        hidden = _map_strings(given, lambda t: any_special.sub(lambda m: stand_ins[m[0]], t))
        restore = str.maketrans({stand_in: special for special, stand_in in stand_ins.items()})
        tokens: list[int] = []
        for piece in re.split(f"({any_special.pattern})", self.render(**hidden)):
            if piece in tokenizer.special_tokens:
                tokens.append(tokenizer.special_tokens[piece])
            else:
                tokens += tokenizer.encode(piece.translate(restore))
        return tokens


def trim_history(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    max_tokens: int,
    **variables: Any,
) -> list[Message]:
    """Leave out the oldest turns of a conversation until it has at most `max_tokens`.

    The system prompt and the last turn always stay. A turn is what a user says and all that follows it.

    Args:
        variables: for the template, as in `ChatTemplate.render`.
    """
    has_system = messages[0]["role"] in ("system", "developer")
    system, rest = list(messages[:has_system]), list(messages[has_system:])
    while len(template.encode([*system, *rest], tokenizer, **variables)) > max_tokens:
        starts = [i for i, message in enumerate(rest) if message["role"] == "user" and i > 0]
        if not starts:
            break
        rest = rest[starts[0] :]
    return [*system, *rest]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dictionary, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"messages[{i}]: role must be one of {ROLES}, got {message.get('role')!r}"
            )
        if not isinstance(message.get("content"), str):
            raise TypeError(f"messages[{i}]: content must be text, got {message.get('content')!r}")


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested dictionaries and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """A copy of nested dictionaries and lists with `function` applied to all strings."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, function): _map_strings(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function) for item in value]
    return value
