"""A tokenizer of Hugging Face's tokenizer.json, run by the `tokenizers` library.

It does what its file says: text that the file normalises does not come back letter for letter. Added tokens that the file does
not call special (such as <think>) are part of the ordinary vocabulary.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from ..files import atomic_write, read_json
from .text import Detokenizer, encode_utf8
from .tokenizer_file import FILE_NAME, fingerprint, read_state, write_state

# What `save` carries along; the configurations hold the names of special tokens and the chat template.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class HuggingFaceTokenizer:
    kind = "huggingface"

    def __init__(
        self, files: dict[str, bytes], bos_id: int | None, eos_ids: tuple[int, ...]
    ) -> None:
        """`files`: content by name, tokenizer.json at least. Most callers want `load`."""
        self._files = files
        self._plain = _parse(files["tokenizer.json"])
        self._plain.encode_special_tokens = True  # as the text that they are
        added = self._plain.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.eos_id = eos_ids[0] if eos_ids else None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read tokenizer.json, and from the configurations beside it which tokens begin and end a text.

        Raises:
            ValueError: a file that is damaged, or names a token that tokenizer.json does not have.
        """
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).exists()}
        try:
            if (folder / FILE_NAME).exists():
                state = read_state(folder)
                return cls(files, state["bos_id"], tuple(state["eos_ids"]))
            tokenizer = _parse(files["tokenizer.json"])
            return cls(files, _find_bos(folder, tokenizer), _find_eos(folder, tokenizer))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return _parse(self._files["tokenizer.json"])

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        encode_utf8(text)
        tokenizer = self._with_special if allow_special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encode_utf8(text)
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: Sequence[int]) -> str:
        return self._plain.decode(
            [self._checked(token) for token in tokens], skip_special_tokens=False
        )

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token must be in [0, {self.vocab_size}), got {token}")
        return int(token)

    def detokenizer(self) -> Detokenizer:
        return HuggingFaceDetokenizer(self)

    def is_byte(self, token: int) -> bool:
        """Whether this is one of the byte tokens of SentencePiece, whose text depends on the byte tokens after it."""
        name = self._plain.id_to_token(self._checked(token))
        return name is not None and re.fullmatch(r"<0x[0-9A-F]{2}>", name) is not None

    def _state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bos_id": self.bos_id,
            "eos_ids": list(self.eos_ids),
            "tokenizer_json": hashlib.sha256(self._files["tokenizer.json"]).hexdigest(),
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._state())

    def save(self, folder: Path) -> None:
        for name, content in self._files.items():
            with atomic_write(folder / name) as file:
                file.write(content)
        write_state(folder, self._state())


class HuggingFaceDetokenizer:
    """Decodes a window of the last tokens: how a token reads may depend on its neighbours, not on those far away."""

    _CONTEXT = 8

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._tokenizer.decode(self._window)
        certain = text.removesuffix("\ufffd")  # perhaps the first bytes of a character
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if certain == text and len(self._window) > 2 * self._CONTEXT:
            context = self._window[-self._CONTEXT :]
            shown = len(self._tokenizer.decode(context))
            if shown:  # else the next token would be decoded as the first of a text
                self._window, self._shown = context, shown
        return piece

    def flush(self) -> str:
        piece = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return piece


def _parse(content: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"tokenizer.json cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}


def _id_of(tokenizer: tokenizers.Tokenizer, token: str | dict[str, Any]) -> int:
    """Id of a token as configurations name it: its text, or a record with its text."""
    text = token["content"] if isinstance(token, dict) else token
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise ValueError(f"the configuration names the token {text!r}, which tokenizer.json lacks")
    return token_id


def _find_bos(folder: Path, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The token that is put before every text: as `add_bos_token` says, else what the file's own template does."""
    config = _read(folder, "tokenizer_config.json")
    adds_bos = config.get("add_bos_token")
    bos_token = config.get("bos_token") or _read(folder, "special_tokens_map.json").get("bos_token")
    if adds_bos is not None:
        return _id_of(tokenizer, bos_token) if adds_bos and bos_token else None
    template = tokenizer.encode("").ids
    return template[0] if template else None


def _find_eos(folder: Path, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The token that ends a text, then those at which generation stops too."""
    config = _read(folder, "tokenizer_config.json")
    eos_token = config.get("eos_token") or _read(folder, "special_tokens_map.json").get("eos_token")
    found = [_id_of(tokenizer, eos_token)] if eos_token else []
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder, name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    # small models with the defaults of a large one name ids that they do not have
    return tuple(dict.fromkeys(i for i in found if tokenizer.id_to_token(i) is not None))
