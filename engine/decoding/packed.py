"""A model packed for the native decode engine: in memory, or in a file that is mapped back and shared by processes.

The file: 8 bytes of magic, the length of the header (uint64) and its sha256, the header as JSON (version, format, config, and
where each tensor lies), then from a multiple of 4096 bytes on the tensors, each from a multiple of 64 on. One file serves every
instruction set. It needs neither torch nor a copy to run from.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import struct
from ctypes import POINTER, cast
from pathlib import Path
from typing import Any

import numpy as np

from leangpt.kernels import decode
from leangpt.kernels.decode import LANES, PANEL, Layer, Matrix, Model, ModelConfig

from ..config import GPTConfig
from ..files import atomic_write
from .weight_format import WeightFormat

MAGIC = b"LEANGPT\0"
VERSION = 1
SUFFIX = ".leangpt"
PACKED_FILE = f"model{SUFFIX}"  # in a folder with its tokenizer
_PREFIX = struct.Struct("<8sQ32s")
_PAGE = 4096
_MAX_HEADER_BYTES = 16 << 20

_SCREEN_FORMAT = WeightFormat("int8")
# of a block
_MATRICES = ("qkv", "attn_out", "mlp_in", "mlp_out")


def _round_up(n: int, multiple: int = LANES) -> int:
    return -(-n // multiple) * multiple


def _matrix_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) as the engine sees them: both halves of a gated MLP are padded to 16."""
    H, H_kv, D, C = config.n_head, config.kv_heads, config.head_size, config.n_embd
    F = config.inner_size
    return {
        "qkv": ((H + 2 * H_kv) * D, C),
        "attn_out": (C, H * D),
        "mlp_in": (2 * _round_up(F) if config.is_gated else F, C),
        "mlp_out": (C, F),
        "embedding": (config.vocab_size, C),
        "head": (config.vocab_size, C),
        "screen": (config.vocab_size, C),
    }


def _row_of(name: str, rows: int, config: GPTConfig) -> np.ndarray:
    """For each row of a packed matrix the row of the model's, -1 for padding."""
    row_of = np.full(_round_up(rows, PANEL), -1)
    if name == "mlp_in" and config.is_gated:  # 16 of gate, 16 of up, and so on
        gate = np.full(rows // 2, -1)
        gate[: config.inner_size] = np.arange(config.inner_size)
        up = np.where(gate < 0, -1, gate + config.inner_size)
        row_of[:rows] = np.stack((gate, up)).reshape(2, -1, LANES).swapaxes(0, 1).reshape(-1)
    else:
        row_of[:rows] = np.arange(rows)
    return row_of


class PackedModel:
    """A config, a format, and named pieces of one block of memory."""

    def __init__(
        self,
        config: GPTConfig,
        weight_format: WeightFormat,
        rope_magnitude: float,
        tensors: dict[str, tuple[int, int]],  # name: first byte, number of bytes
        memory: np.ndarray,
    ) -> None:
        self.config = config
        self.format = weight_format
        self.rope_magnitude = rope_magnitude
        self.tensors = tensors
        self.memory = memory

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes

    def tensor(self, name: str) -> np.ndarray | None:
        if name not in self.tensors:
            return None
        start, size = self.tensors[name]
        return self.memory[start : start + size]

    def address(self, name: str) -> int | None:
        return decode.address(self.tensor(name))

    def matrix(self, name: str) -> Matrix:
        """The engine's view of a matrix such as "blocks.0.qkv", "embedding" or "head"."""
        n, k = _matrix_shapes(self.config)[name.rpartition(".")[2]]
        matrix = _empty_matrix(_SCREEN_FORMAT if name == "screen" else self.format, n, k)
        if name == "head" and "head.data" not in self.tensors:
            name = "embedding"
        for part in ("data", "scales", "minimums", "bias"):
            setattr(matrix, part, self.address(f"{name}.{part}"))
        return matrix

    def model(self) -> Model:
        """The engine's view of it all; it points into `memory`, which must live as long."""
        config = self.config
        layers = (Layer * config.n_layer)()
        for i, layer in enumerate(layers):
            prefix = f"blocks.{i}."
            for norm in ("norm_1", "norm_2"):
                for part in ("weight", "bias"):
                    setattr(layer, f"{norm}_{part}", self.address(f"{prefix}{norm}.{part}"))
            layer.q_norm = self.address(f"{prefix}q_norm.weight")
            layer.k_norm = self.address(f"{prefix}k_norm.weight")
            for name in _MATRICES:
                setattr(layer, name, self.matrix(prefix + name))
        shape = ModelConfig(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=config.head_size,
            n_embd=config.n_embd,
            n_inner=config.inner_size,
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            is_rms_norm=config.norm == "rms_norm",
            sliding_window=config.sliding_window or 0,
            activation=decode.ACTIVATIONS[config.activation],
            norm_eps=config.norm_eps,
            value_residual=config.value_residual,
        )
        return Model(
            config=shape,
            layers=cast(layers, POINTER(Layer)),
            norm_f_weight=self.address("norm_f.weight"),
            norm_f_bias=self.address("norm_f.bias"),
            positions=self.address("positions"),
            frequencies=self.address("frequencies"),
            rope_magnitude=self.rope_magnitude,
            embedding=self.matrix("embedding"),
            head=self.matrix("head"),
            screen=self.matrix("screen"),
            screen_errors=self.address("screen.errors"),
        )

    def save(self, path: Path) -> None:
        """Write the file, aside and then renamed."""
        header = {
            "version": VERSION,
            "format": str(self.format),
            "config": dataclasses.asdict(self.config),
            "rope_magnitude": self.rope_magnitude,
            "tensors": self.tensors,
            "data_bytes": self.num_bytes,
            "data_sha256": hashlib.sha256(self.memory.data).hexdigest(),
        }
        text = json.dumps(header).encode()
        with atomic_write(path) as file:
            file.write(_PREFIX.pack(MAGIC, len(text), hashlib.sha256(text).digest()))
            file.write(text)
            file.write(bytes(_round_up(file.tell(), _PAGE) - file.tell()))
            file.write(self.memory.data)

    @classmethod
    def load(cls, path: Path, *, verify: bool = False) -> "PackedModel":
        """Map the file; its pages are read when they are first used. `verify` reads it all and checks its hash.

        Raises:
            ValueError: not a packed model, damaged, cut short, or of another version.
        """
        header, start = _read_header(path)
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        memory = np.frombuffer(mapping, dtype=np.uint8)[start:]
        if verify and hashlib.sha256(memory.data).hexdigest() != header["data_sha256"]:
            raise ValueError(
                f"{path}: damaged: the weights do not have the hash that the header tells"
            )
        try:
            packed = cls(
                GPTConfig.from_dict(header["config"]),
                WeightFormat.parse(header["format"]),
                float(header["rope_magnitude"]),
                {name: (first, size) for name, (first, size) in header["tensors"].items()},
                memory,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: damaged: its header is not that of a packed model ({error!r})"
            ) from error
        expected = _plan(packed.config, packed.format)
        if packed.tensors != expected[0] or header["data_bytes"] != expected[1]:
            raise ValueError(f"{path}: damaged: its tensors are not those of its config")
        return packed


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise ValueError(
                f"{path}: not a packed leangpt model (`leangpt export --format packed` writes one)"
            )
        _, length, digest = _PREFIX.unpack(prefix)
        if length > min(size, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: damaged: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise ValueError(f"{path}: damaged: its header does not have the hash that it should")
    header = json.loads(text)
    version = header.get("version")
    if version != VERSION:
        raise ValueError(
            f"{path}: packed by another version of leangpt (file format {version}, expected {VERSION}): "
            "pack the model again"
        )
    start = _round_up(_PREFIX.size + length, _PAGE)
    data_bytes = size - start
    if data_bytes != header.get("data_bytes"):
        raise ValueError(
            f"{path}: cut short or overlong: {data_bytes} bytes of weights, expected {header.get('data_bytes')}"
        )
    return header, start


def _empty_matrix(weight_format: WeightFormat, n: int, k: int) -> Matrix:
    kind = {"fp32": decode.FP32, "bf16": decode.BF16, "int8": decode.INT8, "int4": decode.INT4}
    return Matrix(
        kind=kind[weight_format.kind],
        n=n,
        k=k,
        group=weight_format.group,
        digits=weight_format.digits,
    )


def _present_tensors(config: GPTConfig, has_screen: bool) -> list[str]:
    """Names of the vectors and matrices of a model, as its parameters are called (see model.py)."""
    norms = ["weight", "bias"] if config.norm == "layer_norm" and config.bias else ["weight"]
    names = ["embedding"]
    if config.position == "learned":
        names.append("positions")
    else:
        names.append("frequencies")
    for i in range(config.n_layer):
        prefix = f"blocks.{i}."
        names += [f"{prefix}norm_1.{part}" for part in norms]
        names.append(f"{prefix}qkv")
        names += [f"{prefix}qkv.bias"] * config.has_qkv_bias
        names += [f"{prefix}q_norm.weight", f"{prefix}k_norm.weight"] * config.qk_norm
        names.append(f"{prefix}attn_out")
        names += [f"{prefix}attn_out.bias"] * config.bias
        names += [f"{prefix}norm_2.{part}" for part in norms]
        for name in ("mlp_in", "mlp_out"):
            names.append(prefix + name)
            names += [f"{prefix}{name}.bias"] * config.bias
    names += [f"norm_f.{part}" for part in norms]
    names += ["head"] * (not config.tie_embeddings)
    names += ["screen", "screen.errors"] * has_screen
    return names


def _vector_bytes(name: str, config: GPTConfig) -> int:
    """Bytes of a tensor that is no matrix: float32, each row padded."""
    owner, _, part = name.rpartition(".")
    last = owner.rpartition(".")[2]
    if name == "positions":
        return config.max_seq_len * _round_up(config.n_embd) * 4
    if name == "frequencies":
        return config.head_size // 2 * 4
    if name == "screen.errors":
        return _round_up(config.vocab_size, PANEL) * 4
    if last in ("q_norm", "k_norm"):
        return _round_up(config.head_size) * 4
    if part == "bias" and last in _MATRICES:
        return _round_up(_matrix_shapes(config)[last][0], PANEL) * 4
    return _round_up(config.n_embd) * 4


def _plan(config: GPTConfig, weight_format: WeightFormat) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each tensor lies, and the size of it all."""
    sizes: dict[str, int] = {}
    shapes = _matrix_shapes(config)
    for name in _present_tensors(config, weight_format.has_screen):
        last = name.rpartition(".")[2]
        if last in shapes:
            format_of = _SCREEN_FORMAT if name == "screen" else weight_format
            parts = decode.packed_bytes(_empty_matrix(format_of, *shapes[last]))
            sizes[f"{name}.data"] = parts[0]
            if parts[1]:
                sizes[f"{name}.scales"] = parts[1]
            if parts[2] and format_of.is_asymmetric:
                sizes[f"{name}.minimums"] = parts[2]
        else:
            sizes[name] = _vector_bytes(name, config)
    tensors, end = {}, 0
    for name, size in sizes.items():
        tensors[name] = (end, size)
        end = _round_up(end + size, 64)
    # products read ahead of the weights that they use
    return tensors, _round_up(end, _PAGE)


def pack(
    config: GPTConfig,
    weights: dict[str, np.ndarray],
    frequencies: np.ndarray | None,
    rope_magnitude: float,
    weight_format: WeightFormat,
) -> PackedModel:
    """Pack a model's parameters: by their names in model.py, float32 or the bits of bfloat16 as uint16."""
    names = _present_tensors(config, weight_format.has_screen)
    tensors, size = _plan(config, weight_format)
    packed = PackedModel(config, weight_format, rope_magnitude, tensors, _allocate(size))
    shapes = _matrix_shapes(config)
    head = "wte.weight" if config.tie_embeddings else "head.weight"
    sources = {"embedding": "wte.weight", "head": head, "screen": head}
    for name in names:
        last = name.rpartition(".")[2]
        if last in shapes:
            source = weights[sources.get(name, f"{name}.weight")]
            decode.pack(packed.matrix(name), source, _row_of(last, shapes[last][0], config))
            continue
        target = packed.tensor(name)
        assert target is not None
        values = target.view(np.float32)
        if name == "frequencies":
            assert frequencies is not None
            values[:] = frequencies
        elif name == "screen.errors":
            decode.screen_errors(packed.matrix("head"), packed.matrix("screen"), values)
        elif name == "positions":
            table = _as_float32(weights["wpe.weight"])
            values.reshape(config.max_seq_len, -1)[:, : config.n_embd] = table
        else:
            owner = name.split(".")[-2]
            vector = _as_float32(weights[name])
            if owner in shapes:  # a bias goes where its output goes
                row_of = _row_of(owner, shapes[owner][0], config)
                values[row_of >= 0] = vector[row_of[row_of >= 0]]
            else:
                values[: len(vector)] = vector
    return packed


def _as_float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _allocate(size: int) -> np.ndarray:
    """Zeros, in huge pages where the system has them: fewer look-ups of addresses while weights stream by."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages by default
    memory = mmap.mmap(-1, max(size, _PAGE), flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:size]
