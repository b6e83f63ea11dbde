"""Byte-level BPE in Hugging Face's format, tokenizer.json: training it, and writing a tokenizer so that `transformers` reads it.

There a token is spelt with one printable character for each of its bytes, and a merge names its two halves.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..files import atomic_write, write_json

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTER_OF_BYTE = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(_OTHERS)
}
_BYTE_OF_LETTER = {letter: byte for byte, letter in _LETTER_OF_BYTE.items()}


def _spell(token: bytes) -> str:
    return "".join(_LETTER_OF_BYTE[byte] for byte in token)


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, letters])


def train_bpe(documents: Iterable[str], pattern: str, num_tokens: int) -> list[bytes]:
    """Learn at most `num_tokens` tokens, in the order of their ids: the 256 bytes, then merges, the most frequent first."""
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        initial_alphabet=list(_BYTE_OF_LETTER),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split_then_bytes(pattern)
    tokenizer.train_from_iterator(documents, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merged = [bytes(_BYTE_OF_LETTER[letter] for letter in left + right) for left, right in merges]
    return [*(bytes([byte]) for byte in range(256)), *merged]


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that makes `token`: apply all the earlier ones, the lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[i : i + 2] = [pairs[i]]
    return parts[0], parts[1]


def serialize_bpe(tokens: Sequence[bytes], pattern: str, end_of_text: str) -> str:
    """The content of tokenizer.json for byte-level tokens whose ids are their places; `end_of_text` is the last id."""
    ranks = {token: i for i, token in enumerate(tokens)}
    halves = [_halves(token, ranks) for token in tokens if len(token) > 1]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={_spell(token): i for i, token in enumerate(tokens)},
            merges=[(_spell(left), _spell(right)) for left, right in halves],
        )
    )
    tokenizer.pre_tokenizer = _split_then_bytes(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


def write(folder: Path, content: str, end_of_text: str) -> None:
    """Write tokenizer.json and the tokenizer_config.json by which `transformers` loads it."""
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(content.encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
