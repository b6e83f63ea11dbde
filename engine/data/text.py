"""Between text and UTF-8: strict encoding, and decoding token by token (`Detokenizer`).

Python strings may hold lone surrogates, which no UTF-8 has; they are refused here, at the door, for all tokenizers and files.
"""

import codecs
from collections.abc import Callable
from typing import Protocol


def encode_utf8(text: str) -> bytes:
    """The UTF-8 bytes of `text`, or ValueError with the offset of the first lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"text must be valid Unicode, got the lone surrogate U+{code:04X} at character {error.start}"
        ) from None


class Detokenizer(Protocol):
    """Tokens in, text out, as soon as it is certain: the pushed pieces and the flushed rest make `decode(tokens)`."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class ByteDetokenizer:
    """Detokenizer of tokens that are byte strings: holds back the first bytes of an unfinished character."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
