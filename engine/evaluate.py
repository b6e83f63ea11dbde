"""What a weight format costs: perplexity on a text, and how far the predictions are from those of fp32.

All formats read the same windows of a text side by side, each in the native decoder, as generation does.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leangpt.kernels import decode

from .config import GPTConfig
from .data.batches import TokenDataset, evaluation_batches
from .data.shards import MANIFEST
from .data.tokenizer import Tokenizer
from .decoding.native_decoder import NativeDecoder, pack_model
from .decoding.packed import PackedModel
from .decoding.weight_format import WeightFormat
from .model import GPT

REFERENCE = "fp32"
_BATCH_SIZE = 8  # sequences
_LOGITS_AT_ONCE = 2**22  # of each format


@dataclass(frozen=True)
class FormatQuality:
    """How a model predicts in a weight format. Means are over all tokens."""

    format: str
    perplexity: float
    bits_per_byte: float  # of UTF-8: comparable between tokenizers
    kl: float  # from fp32's distribution, in nats
    top_1_agreement: float  # share of tokens for which fp32 has the same favourite
    num_bytes: int  # of the packed model


@dataclass(frozen=True)
class EvaluationText:
    """Windows of a text: every token but the first of a window is predicted from those before it."""

    windows: list[np.ndarray]  # (T + 1,) int64 each
    bytes_per_token: float

    @property
    def num_targets(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def prepared_text(
    folder: Path, tokenizer: Tokenizer, seq_len: int, num_batches: int
) -> EvaluationText:
    """The fixed validation set of prepared data: batches of eight windows, as many as training would evaluate.

    Raises:
        ValueError: the data was prepared with another tokenizer, or has no whole window.
    """
    dataset = TokenDataset(folder, "val")
    expected = dataset.manifest["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != expected:
        raise ValueError(
            f"{folder}: must be prepared with the model's tokenizer ({tokenizer.fingerprint[:12]}…), but was with another "
            f"({expected[:12]}…): run `leangpt prepare --tokenizer FOLDER_OF_THE_MODEL`, or name a text file"
        )
    windows = [
        np.append(tokens[:1], targets)
        for batch in evaluation_batches(dataset, _BATCH_SIZE, seq_len, num_batches)
        for tokens, targets in zip(*(part.numpy() for part in batch), strict=True)
    ]
    return EvaluationText(windows, dataset.bytes_per_token)


def text_of_file(
    path: Path, tokenizer: Tokenizer, seq_len: int, num_batches: int
) -> EvaluationText:
    """The beginning of a text file, in windows one after the other, the last perhaps a shorter one.

    Raises:
        ValueError: the file is not UTF-8, or has fewer than two tokens.
    """
    data = path.read_bytes()
    try:
        tokens = tokenizer.encode(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start} ({error.reason})") from error
    if len(tokens) < 2:
        raise ValueError(f"{path}: a text must have two tokens or more, got {len(tokens)}")
    bytes_per_token = len(data) / len(tokens)
    if tokenizer.bos_id is not None:
        tokens.insert(0, tokenizer.bos_id)
    starts = range(0, len(tokens) - 1, seq_len)[: num_batches * _BATCH_SIZE]
    windows = [np.array(tokens[start : start + seq_len + 1]) for start in starts]
    return EvaluationText(windows, bytes_per_token)


def read_text(data: Path, tokenizer: Tokenizer, seq_len: int, num_batches: int) -> EvaluationText:
    """`prepared_text` of a folder, `text_of_file` of a file.

    Raises:
        FileNotFoundError: nothing is there, or the folder is not one of `leangpt prepare`.
        ValueError: see these.
    """
    for name, value in (("seq_len", seq_len), ("batches", num_batches)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if data.is_file() and data.name != MANIFEST:
        return text_of_file(data, tokenizer, seq_len, num_batches)
    return prepared_text(data, tokenizer, seq_len, num_batches)


def evaluate(
    model: GPT, text: EvaluationText, formats: Sequence[str], *, progress: bool = False
) -> list[FormatQuality]:
    """Compare weight formats of a model on a text.

    The memory it takes is that of the packed models, of one sequence, and of a few million logits.

    Args:
        model: on a CPU, in float32 or bfloat16.
        text: its windows have at most max_seq_len + 1 tokens.
        formats: see `WeightFormat`.
        progress: show on standard error how far it is.

    Returns:
        Each format once, in the order given, after fp32.

    Raises:
        ValueError: a format is unknown, a token or a window does not fit the model, the native engine cannot run it, or its
            logits are NaN.
    """
    names = dict.fromkeys([REFERENCE, *(str(WeightFormat.parse(name)) for name in formats)])
    return compare({name: pack_model(model, name) for name in names}, text, progress=progress)


def compare(
    models: dict[str, PackedModel], text: EvaluationText, *, progress: bool = False
) -> list[FormatQuality]:
    """`evaluate` of models that are packed already, by name; they are compared with the first.

    Raises:
        ValueError: a token or a window does not fit the models, or the logits of the first are NaN.
    """
    _check(next(iter(models.values())).config, text)
    num_blocks = -(-max(map(len, text.windows)) // decode.library().leangpt_kv_block_size())
    decoders = [NativeDecoder(packed, num_blocks) for packed in models.values()]
    totals = torch.zeros(len(models), 3, dtype=torch.float64)  # loss, KL, agreements
    num_targets = text.num_targets
    with tqdm(total=num_targets, unit="token", disable=not progress, leave=False) as bar:
        for window in text.windows:
            for logits, targets in _chunks(decoders, window):
                totals += _sums(logits, targets)
                bar.update(len(targets))
    if totals[0].isnan().any():
        raise ValueError("the model's logits are NaN: its weights are damaged")
    return [
        FormatQuality(
            name,
            perplexity=math.exp(min(loss, 700)),
            bits_per_byte=loss / math.log(2) / text.bytes_per_token,
            kl=kl,
            top_1_agreement=agreement,
            num_bytes=packed.num_bytes,
        )
        for (name, packed), (loss, kl, agreement) in zip(
            models.items(), (totals / num_targets).tolist(), strict=True
        )
    ]


def _check(config: GPTConfig, text: EvaluationText) -> None:
    limit = config.max_seq_len + 1
    longest = max(map(len, text.windows), default=0)
    if not 2 <= longest <= limit:
        raise ValueError(f"windows must have 2 to {limit} tokens, got {longest}")
    largest = max(int(window.max()) for window in text.windows)
    if largest >= config.vocab_size:
        raise ValueError(
            f"tokens must be below the model's vocab_size ({config.vocab_size}), got {largest}"
        )


def _chunks(
    decoders: Sequence[NativeDecoder], window: np.ndarray
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each chunk of a window the logits `(T, V)` of each decoder and the targets `(T,)`."""
    num_inputs = len(window) - 1
    size = max(1, _LOGITS_AT_ONCE // decoders[0].config.vocab_size)
    sequences = [decoder.add_sequence() for decoder in decoders]
    try:
        for start in range(0, num_inputs, size):
            positions = np.arange(start, min(start + size, num_inputs))
            tokens, rows = window[positions], np.arange(len(positions))
            logits = [
                torch.from_numpy(
                    decoder.forward(tokens, np.full_like(rows, sequence), positions, rows)
                )
                for decoder, sequence in zip(decoders, sequences, strict=True)
            ]
            yield logits, torch.from_numpy(window[positions + 1])
    finally:
        for decoder, sequence in zip(decoders, sequences, strict=True):
            decoder.drop(sequence)


def _sums(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Sums over tokens of loss, KL from the first and agreement with it, for each of the logits `(T, V)`: `(N, 3)` float64."""
    reference = logits[0].double().log_softmax(-1)  # (T, V)
    probability, favourite = reference.exp(), reference.argmax(-1)
    sums = []
    for each in logits:
        logprobs = each.double().log_softmax(-1)
        loss = -logprobs.gather(-1, targets[:, None]).sum()
        kl = (probability * (reference - logprobs)).sum()
        agreements = (each.argmax(-1) == favourite).sum()
        sums.append(torch.stack((loss, kl, agreements.double())))
    return torch.stack(sums)
