"""The native CPU engine under test: matrices and models in its formats, and what they stand for."""

from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from leangpt import GPT, GPTConfig
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.packed import _empty_matrix, _matrix_shapes, _row_of
from leangpt.decoding.weight_format import WeightFormat
from leangpt.kernels import decode, use_backend

_INTEGERS = ("int8", "int8_g32", "int8_g64", "int8_g128", "int4", "int4_g64", "int4_g128")
_ASYMMETRIC = ("int4_asym", "int4_asym_g64", "int4_asym_g128")
WEIGHT_ONLY = ("fp32", "bf16", *_INTEGERS, *_ASYMMETRIC)
DYNAMIC = tuple(f"{name}_dynamic" for name in (*_INTEGERS, *_ASYMMETRIC))
FORMATS = (*WEIGHT_ONLY, *DYNAMIC)

LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False}


class PackedMatrix:
    """A matrix in a format, and the memory that it points to."""

    def __init__(self, format: str, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        self.format = WeightFormat.parse(format)
        n, k = weight.shape
        self.matrix = _empty_matrix(self.format, n, k)
        sizes = dict(
            zip(("data", "scales", "minimums"), decode.packed_bytes(self.matrix), strict=True)
        )
        if not self.format.is_asymmetric:
            sizes["minimums"] = 0
        self.parts = {name: np.zeros(size, np.uint8) for name, size in sizes.items() if size}
        num_padded = -(-n // decode.PANEL) * decode.PANEL
        if bias is not None:
            padded = np.zeros(num_padded, np.float32)
            padded[:n] = bias
            self.parts["bias"] = padded
        for name, part in self.parts.items():
            setattr(self.matrix, name, decode.address(part))
        row_of = np.full(num_padded, -1)
        row_of[:n] = np.arange(n)
        decode.pack(self.matrix, weight, row_of)

    def unpacked(self) -> np.ndarray:
        return decode.unpack(self.matrix)

    def linear(self, x: np.ndarray) -> np.ndarray:
        return decode.linear(self.matrix, x)

    def by_group(self, part: str) -> np.ndarray:
        """Scales or minimums, `(n, groups)` float64; of int8 with one scale an output, `(n, 1)`."""
        if part not in self.parts:
            return np.zeros(1)
        dtype = np.float16 if self.format.group else np.float32
        values = self.parts[part].view(dtype).astype(np.float64)
        values = values.reshape(-(-self.matrix.n // decode.PANEL), -1, decode.PANEL)
        return values.swapaxes(1, 2).reshape(-1, values.shape[1])[: self.matrix.n]


def multiplies_bf16() -> bool:
    return decode.cpu_isa() in ("amx", "avx512_bf16")


def make_model(std: float = 0.3, **config) -> GPT:
    """Far from the initial one, in which attention is uniform."""
    model = GPT(GPTConfig(**{"vocab_size": 53, "max_seq_len": 64, "n_layer": 2} | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, std)
    return model.requires_grad_(False)


def dequantized(decoder: NativeDecoder) -> GPT:
    """The float32 torch model of a decoder's weights, as its products see them."""
    packed = decoder.packed
    config = packed.config
    model = GPT(config).requires_grad_(False)
    sources = {"wte": "embedding", "wpe": "positions"}
    for name, parameter in model.named_parameters():
        owner, _, part = name.rpartition(".")
        owner = sources.get(owner, owner)
        last = owner.rpartition(".")[2]
        shapes = _matrix_shapes(config)
        if part == "weight" and last in shapes:
            values = decode.unpack(packed.matrix(owner))
        else:
            tensor = packed.tensor(owner if owner == "positions" else name)
            assert tensor is not None
            values = tensor.view(np.float32)
        if last in shapes:
            row_of = _row_of(last, shapes[last][0], config)[: len(values)]
            ordered = np.empty((row_of.max() + 1, *values.shape[1:]), np.float32)
            ordered[row_of[row_of >= 0]] = values[row_of >= 0]
            values = ordered
        elif owner == "positions":
            values = values.reshape(config.max_seq_len, -1)[:, : config.n_embd]
        else:
            values = values[: len(parameter)]
        parameter.copy_(torch.from_numpy(values.copy()))
    return model


def text_of(length: int, seed: int = 0, vocab_size: int = 53) -> list[int]:
    return np.random.default_rng(seed).integers(vocab_size, size=length).tolist()


def append(decoder, *pieces: tuple[int, int, list[int]], rows=None, **kwargs) -> np.ndarray:
    """Append (sequence, start, tokens) in one step; the output of every row, or of those asked for."""
    tokens = [token for _, _, piece in pieces for token in piece]
    sequences = [sequence for sequence, _, piece in pieces for _ in piece]
    positions = [start + i for _, start, piece in pieces for i in range(len(piece))]
    rows = range(len(tokens)) if rows is None else rows
    return decoder.forward(tokens, sequences, positions, rows, **kwargs)


def whole(decoder, text: list[int], **kwargs) -> np.ndarray:
    """The output of every token of a text, read at once by a sequence that is dropped again."""
    sequence = decoder.add_sequence()
    try:
        return append(decoder, (sequence, 0, text), **kwargs)
    finally:
        decoder.drop(sequence)


def one_by_one(decoder, text: list[int], **kwargs) -> np.ndarray:
    """The output of every token of a text, read token by token."""
    sequence = decoder.add_sequence()
    steps = [append(decoder, (sequence, i, [token]), **kwargs) for i, token in enumerate(text)]
    decoder.drop(sequence)
    return np.concatenate(steps)


def logits_of(model: GPT, text: list[int]) -> Tensor:
    """By PyTorch's ops."""
    with torch.no_grad(), use_backend("reference"):
        return model(torch.tensor([text]))[0]


def have_same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def draw_from(logits: np.ndarray, settings: decode.DrawSettings) -> decode.Drawn:
    drawn = decode.Drawn()
    lib = decode.library()
    decode.check(
        lib.leangpt_draw(decode.address(logits), len(logits), byref(settings), byref(drawn))
    )
    return drawn
