"""Tokenizers: text to token ids and back.

`byte`, `char`, `bpe` and `gpt2` are byte-level: a token is a byte string, every text is encodable, and decoding restores it
exactly. A folder of Hugging Face files gives a `HuggingFaceTokenizer`, which does what its tokenizer.json says. Training a BPE
is the work of the `tokenizers` library, encoding with it that of `tiktoken`.
"""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from . import tokenizer_json
from .huggingface_tokenizer import HuggingFaceTokenizer
from .text import ByteDetokenizer, Detokenizer, encode_utf8
from .tokenizer_file import FILE_NAME, fingerprint, read_state, write_state

END_OF_TEXT = "<|endoftext|>"

# Contractions, words with the sign before them, up to three digits, other signs, line ends with the indentation before them,
# spaces but for the last one, which belongs to the next word. Runs of spaces are bounded: the look-ahead backtracks.
BPE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]{0,8}"
    r"|\s{0,255}[\r\n]{1,255}|\s{1,255}(?!\S)|\s"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s"


class Tokenizer(Protocol):
    kind: str  # "byte", "char", "bpe", "gpt2" or "huggingface"
    vocab_size: int
    eos_id: int | None  # <|endoftext|>; separates documents
    eos_ids: tuple[int, ...]  # every token that ends a text, `eos_id` first
    bos_id: int | None  # put before a prompt, where the model was trained so
    special_tokens: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that encoding depends on: equal tokenizers have equal ones."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Tokens of `text`; special tokens written in it are plain text unless `allow_special`.

        Raises:
            ValueError: a lone surrogate in `text`.
        """
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of `text`, and where each stands: its first character, and the one behind its last.

        A token that is a part of a character has all of that character.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; invalid UTF-8 becomes U+FFFD, special tokens are shown as their text.

        Raises:
            ValueError: a token outside of the vocabulary.
        """
        ...

    def detokenizer(self) -> Detokenizer: ...

    def save(self, folder: Path) -> None:
        """Write the files from which `load_tokenizer` restores it."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 is <|endoftext|>. Base of the other byte-level tokenizers, which add tokens."""

    kind = "byte"
    bos_id: int | None = None

    def __init__(self, tokens: Sequence[bytes] | None = None) -> None:
        """`tokens`: byte string of each id, without <|endoftext|>, which comes last."""
        self.tokens = list(tokens) if tokens else [bytes([i]) for i in range(256)]
        self.eos_id: int | None = len(self.tokens)
        self.eos_ids: tuple[int, ...] = (len(self.tokens),)
        self.special_tokens = {END_OF_TEXT: len(self.tokens)}
        self.vocab_size = len(self.tokens) + 1
        self._all_tokens = [*self.tokens, END_OF_TEXT.encode()]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        encode_utf8(text)
        if not allow_special:
            return self._encode_ordinary(text)
        first, *others = text.split(END_OF_TEXT)
        tokens = self._encode_ordinary(first)
        for part in others:
            tokens += [len(self.tokens), *self._encode_ordinary(part)]
        return tokens

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokens = self.encode(text)
        characters = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]  # of each byte
        ends = list(accumulate(len(self.tokens[token]) for token in tokens))
        offsets = [
            (characters[start], characters[end - 1] + 1)
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return tokens, offsets

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._token_bytes, tokens)).decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        return ByteDetokenizer(self._token_bytes)

    def _token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token must be in [0, {self.vocab_size}), got {token}")
        return self._all_tokens[token]

    def _state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokens": [base64.b64encode(token).decode() for token in self.tokens],
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._state())

    def save(self, folder: Path) -> None:
        write_state(folder, self._state())


class CharTokenizer(ByteTokenizer):
    """A token for each of the given characters; all others, and those of one byte, are their UTF-8 bytes."""

    kind = "char"

    def __init__(self, tokens: Sequence[bytes]) -> None:
        super().__init__(tokens)
        self._ids = {token.decode(): (i,) for i, token in enumerate(self.tokens) if i >= 256}

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "CharTokenizer":
        """The most frequent characters of the documents that need more than one byte, as far as `vocab_size` allows."""
        counts: Counter[str] = Counter()
        for text in documents:
            encode_utf8(text)
            counts.update(text)
        several_bytes = sorted(
            (c for c in counts if not c.isascii()), key=lambda c: (-counts[c], c)
        )
        characters = several_bytes[: vocab_size - 257]
        return cls([*ByteTokenizer().tokens, *(character.encode() for character in characters)])

    def _encode_ordinary(self, text: str) -> list[int]:
        if text.isascii():
            return list(text.encode())
        return list(chain.from_iterable(self._ids.get(c) or c.encode() for c in text))


class BPETokenizer(ByteTokenizer):
    """Byte-pair encoding: `pattern` cuts the text into words, in which the pair with the lowest merged id is merged first."""

    kind = "bpe"

    def __init__(self, tokens: Sequence[bytes], pattern: str = BPE_PATTERN) -> None:
        super().__init__(tokens)
        self.pattern = pattern
        self._encoding = tiktoken.Encoding(
            "leangpt",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(self.tokens)},
            special_tokens={},
        )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Merges learnt from the documents: fewer than `vocab_size` allows where they have no more pairs that recur."""
        checked = (text for text in documents if encode_utf8(text))
        return cls(tokenizer_json.train_bpe(checked, BPE_PATTERN, num_tokens=vocab_size - 1))

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"pattern": self.pattern}

    @cached_property
    def _tokenizer_json(self) -> str:
        return tokenizer_json.serialize_bpe(self.tokens, self.pattern, END_OF_TEXT)

    def save(self, folder: Path) -> None:
        """Write it for `load_tokenizer`, and as tokenizer.json for `tokenizers` and `transformers`."""
        super().save(folder)
        tokenizer_json.write(folder, self._tokenizer_json, END_OF_TEXT)


class GPT2Tokenizer(BPETokenizer):
    """The BPE of GPT-2: 50257 tokens."""

    kind = "gpt2"

    def __init__(self, tokens: Sequence[bytes], pattern: str = GPT2_PATTERN) -> None:
        super().__init__(tokens, pattern)

    @classmethod
    def download(cls) -> "GPT2Tokenizer":
        """Read the vocabulary through tiktoken: from its cache, else from the network."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise RuntimeError(
                "gpt2: its vocabulary is not on this machine and could not be downloaded; connect once, or set "
                f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bpe ({error})"
            ) from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    def _encode_ordinary(self, text: str) -> list[int]:
        encode = super()._encode_ordinary
        return [token for part in _cut_in_spaces(text) for token in encode(part)]


_SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{2,}+")


def _cut_in_spaces(text: str, limit: int = 2**18) -> Iterator[str]:
    """Cut a long text where GPT-2's pattern does: before the last space of a run.

    Without it, tiktoken's regular expressions run out of stack in a run of a million spaces.
    """
    start = 0
    if len(text) > limit:
        for run in _SPACES.finditer(text):
            if run.end() < len(text) and run.end() - 1 - start > limit:
                yield text[start : run.end() - 1]
                start = run.end() - 1
    yield text[start:]


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Make a tokenizer: `bpe` and `char` learn at most `vocab_size` tokens from the documents, `byte` and `gpt2` are fixed."""
    if kind in ("bpe", "char") and vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 (256 bytes, {END_OF_TEXT}), got {vocab_size}"
        )
    match kind:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer.train(documents, vocab_size)
        case "bpe":
            return BPETokenizer.train(documents, vocab_size)
        case "gpt2":
            return GPT2Tokenizer.download()
    raise ValueError(f"tokenizer must be one of byte, char, bpe, gpt2, got {kind!r}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer saved in a folder: this project's file, else Hugging Face's tokenizer.json.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a damaged file, or one of another version.
    """
    folder = Path(folder)
    state = read_state(folder) if (folder / FILE_NAME).exists() else {"kind": "huggingface"}
    if state["kind"] == "huggingface":
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"{folder}: no tokenizer here ({FILE_NAME} or tokenizer.json)")
        return HuggingFaceTokenizer.load(folder)
    tokens = [base64.b64decode(token) for token in state["tokens"]]
    match state["kind"]:
        case "byte":
            return ByteTokenizer(tokens)
        case "char":
            return CharTokenizer(tokens)
        case "bpe":
            return BPETokenizer(tokens, state["pattern"])
        case "gpt2":
            return GPT2Tokenizer(tokens, state["pattern"])
    raise ValueError(f"{folder}: unknown kind of tokenizer {state['kind']!r}")
