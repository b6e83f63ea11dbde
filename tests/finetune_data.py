"""Small models to fine-tune in tests; the data is that of examples/finetune/make_data.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from make_data import Row

from leangpt import GPT, GPTConfig
from leangpt.data.tokenizer import Tokenizer, train_tokenizer
from leangpt.pretrained import save_pretrained


def texts_in(value: Any) -> Iterator[str]:
    """All strings in rows."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def make_base(
    folder: Path, rows: Sequence[Row], kind: str, vocab_size: int, **options: Any
) -> Tokenizer:
    """A new model, small enough to learn something in seconds, with a tokenizer of these rows."""
    tokenizer = train_tokenizer(kind, list(texts_in(list(rows))), vocab_size)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "max_seq_len": 96}
    shape |= {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **shape | options)
    save_pretrained(GPT(config), folder, tokenizer)
    return tokenizer
