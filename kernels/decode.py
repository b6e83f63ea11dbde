"""The decode engines, for CPUs (csrc/engine.cpp) and for CUDA (csrc/engine_cuda.cpp), behind ctypes and numpy: no torch is needed.

The structures are the twins of those in csrc/matrix.h, model.h, batch.h and draw.h. Calls release the GIL. Both libraries have the
functions of csrc/engine-inl.h; packing is the CPU engine's.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

LANES = 16  # vectors are padded to a multiple of it
PANEL = 64  # outputs of a panel: the rows of a matrix and its bias are padded to a multiple of it

FP32, BF16, INT8, INT4 = range(4)  # kinds of weights
ACTIVATIONS = {"gelu_tanh": 1, "gelu": 2, "relu2": 3, "swiglu": 4}


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("minimums", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("digits", c_int32),
    ]


class ModelConfig(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd")),
        *((name, c_int32) for name in ("n_inner", "vocab_size", "max_seq_len", "is_rms_norm")),
        ("sliding_window", c_int32),
        ("activation", c_int32),
        ("norm_eps", c_float),
        ("value_residual", c_int32),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm_1_weight", "norm_1_bias")),
        *((name, c_void_p) for name in ("norm_2_weight", "norm_2_bias", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "attn_out", "mlp_in", "mlp_out")),
    ]


class Model(Structure):
    _fields_ = [
        ("config", ModelConfig),
        ("layers", POINTER(Layer)),
        *((name, c_void_p) for name in ("norm_f_weight", "norm_f_bias")),
        *((name, c_void_p) for name in ("positions", "frequencies")),
        ("rope_magnitude", c_float),
        ("embedding", Matrix),
        ("head", Matrix),
        ("screen", Matrix),
        ("screen_errors", c_void_p),
    ]


class Delta(Structure):
    _fields_ = [("down", Matrix), ("up", Matrix), ("is_bottleneck", c_int32)]


class LayerDeltas(Structure):
    _fields_ = [(name, Delta) for name in ("qkv", "attn_out", "mlp_in", "mlp_out")]


class Batch(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "sequences", "positions")),
        ("num_tokens", c_int64),
        ("output_rows", c_void_p),
        ("num_outputs", c_int64),
    ]


class DrawSettings(Structure):
    _fields_ = [
        *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        *((name, c_double) for name in ("repetition_penalty", "presence_penalty")),
        ("seed", ctypes.c_uint64),
        *((name, c_int64) for name in ("sample_index", "position", "top_k", "vocab_limit")),
        ("context", c_void_p),
        ("context_length", c_int64),
        ("text", c_void_p),
        ("text_length", c_int64),
        ("num_logprobs", c_int64),
        *((name, c_void_p) for name in ("top_tokens", "top_logprobs")),
    ]


class Drawn(Structure):
    _fields_ = [("token", c_int64), ("logprob", c_double)]


class CacheFullError(RuntimeError):
    """The key/value cache has no page left for what was asked; nothing was changed."""


_PATH = Path(__file__).with_name("_engine.so")
_CUDA_PATH = Path(__file__).with_name("_engine_cuda.so")
unavailable_reason = (
    None
    if _PATH.exists()
    else "not built: install a C++ compiler, then run `make build` or reinstall leangpt"
)


@cache
def library() -> ctypes.CDLL:
    """The loaded engine.

    Raises:
        RuntimeError: it was not built, or $LEANGPT_CPU_ISA asks for what this CPU lacks.
        ValueError: $LEANGPT_THREADS is not a positive number.
    """
    if unavailable_reason:
        raise RuntimeError(f"the native decode engine is {unavailable_reason}")
    lib = ctypes.CDLL(str(_PATH))
    _declare_decoder(lib)
    lib.leangpt_packed_bytes.restype = None
    lib.leangpt_read_memory.argtypes = [c_void_p, c_int64]
    lib.leangpt_multiply_registers.argtypes = [c_int, c_int64]
    lib.leangpt_multiply_registers.restype = c_double
    lib.leangpt_pack.argtypes = [POINTER(Matrix), c_void_p, c_int, c_void_p]
    lib.leangpt_screen_errors.argtypes = [POINTER(Matrix), POINTER(Matrix), c_void_p]
    lib.leangpt_unpack_row.argtypes = [POINTER(Matrix), c_int, c_void_p]
    lib.leangpt_linear.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_void_p]
    lib.leangpt_decoder_new.argtypes = [POINTER(Model), c_int, c_int32, POINTER(c_void_p)]
    lib.leangpt_draw.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    check(lib.leangpt_isa(byref(ctypes.c_char_p())), lib)
    threads = os.environ.get("LEANGPT_THREADS")
    if threads is not None:
        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(f"LEANGPT_THREADS must be a positive number, got {threads!r}")
        check(lib.leangpt_set_threads(int(threads)), lib)
    return lib


def _declare_decoder(lib: ctypes.CDLL) -> None:
    """The functions of csrc/engine-inl.h."""
    lib.leangpt_error.restype = ctypes.c_char_p
    lib.leangpt_add_sequence.restype = c_int64
    lib.leangpt_free_blocks.restype = c_int32
    for name in ("leangpt_add_sequence", "leangpt_free_blocks", "leangpt_decoder_delete"):
        getattr(lib, name).argtypes = [c_void_p]
    lib.leangpt_add_adapter.argtypes = [c_void_p, c_void_p, POINTER(c_int32)]
    lib.leangpt_add_adapted_sequence.argtypes = [
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int32),
        POINTER(c_int64),
    ]
    lib.leangpt_fork.argtypes = [c_void_p, c_int64, POINTER(c_int64)]
    lib.leangpt_truncate.argtypes = [c_void_p, c_int64, c_int64]
    lib.leangpt_drop.argtypes = [c_void_p, c_int64]
    for name in ("leangpt_hidden", "leangpt_logits"):
        getattr(lib, name).argtypes = [c_void_p, POINTER(Batch), c_void_p]
    for name in ("leangpt_logprobs", "leangpt_sample"):
        getattr(lib, name).argtypes = [c_void_p, POINTER(Batch), c_void_p, c_void_p]


@cache
def cuda_library() -> ctypes.CDLL:
    """The loaded CUDA engine; that there is a GPU is another question, see `cuda_obstacle`.

    Raises:
        RuntimeError: it was not built.
    """
    if not _CUDA_PATH.exists():
        raise RuntimeError(
            "the CUDA decode engine is not built: install the CUDA toolkit (nvcc 12.8 or later), then run `LEANGPT_CUDA=1 make "
            "build` or reinstall leangpt"
        )
    lib = ctypes.CDLL(str(_CUDA_PATH))
    declare_cuda(lib)
    return lib


# matrix, rows, row stride, number of rows, products, stride, stream: as LibraryProduct of csrc/cuda/decoder.h
LIBRARY_PRODUCT = ctypes.CFUNCTYPE(
    *(c_int, c_int, c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p)
)


def declare_cuda(lib: ctypes.CDLL) -> None:
    """The functions of csrc/engine_cuda.cpp."""
    _declare_decoder(lib)
    lib.leangpt_check_device.argtypes = [c_int]
    lib.leangpt_num_graphs.argtypes = [c_void_p]
    lib.leangpt_start_sample.argtypes = [c_void_p, POINTER(Batch), c_void_p]
    lib.leangpt_take_draws.argtypes = [c_void_p, c_void_p, c_void_p]
    lib.leangpt_use_library.argtypes = [c_void_p, LIBRARY_PRODUCT]
    lib.leangpt_use_library.restype = None
    lib.leangpt_cache_memory.argtypes = [
        *(POINTER(ModelConfig), c_int, c_int),
        *(POINTER(c_int64), POINTER(c_int64)),
    ]
    lib.leangpt_decoder_new.argtypes = [
        *(POINTER(Model), c_int, c_int32, c_int, c_int),
        POINTER(c_void_p),
    ]


def cuda_obstacle(device: int = 0) -> str | None:
    """Why the CUDA engine does not run on the GPU of that number, or None where it does."""
    try:
        lib = cuda_library()
        check(lib.leangpt_check_device(device), lib)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def check(status: int, lib: ctypes.CDLL | None = None) -> None:
    """Raise the error that a call to an engine (None: that of the CPU) reported, if it did."""
    if status:
        kind = {1: ValueError, 2: CacheFullError}.get(status, RuntimeError)
        raise kind((lib or library()).leangpt_error().decode())


def cpu_isa() -> str | None:
    """The vector instructions of the kernels: "amx", "avx512_bf16", "avx512", "avx2" or "portable"; None without the engine."""
    if unavailable_reason:
        return None
    name = ctypes.c_char_p()
    check(library().leangpt_isa(byref(name)))
    assert name.value is not None
    return name.value.decode()


def num_threads() -> int:
    return library().leangpt_num_threads()


def set_num_threads(count: int) -> None:
    """Threads of the engine, the caller among them, for the whole process; not while it is running."""
    check(library().leangpt_set_threads(count))


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def packed_bytes(matrix: Matrix) -> tuple[int, int, int]:
    """Bytes of data, scales and minimums of a matrix whose kind, n, k and group are set."""
    sizes = (c_int64 * 3)()
    library().leangpt_packed_bytes(byref(matrix), sizes)
    return sizes[0], sizes[1], sizes[2]


def pack(matrix: Matrix, source: np.ndarray, row_of: np.ndarray) -> None:
    """Pack `source`, `(rows, k)` float32 or the bits of bfloat16 as uint16, into the memory that the matrix points to.

    Row i of the matrix is `source[row_of[i]]`, or zero where that is negative; `row_of` has a multiple of 64 entries.
    """
    source = np.ascontiguousarray(source)
    row_of = np.ascontiguousarray(row_of, dtype=np.int64)
    assert source.dtype in (np.float32, np.uint16)
    assert source.shape[1] == matrix.k
    assert len(row_of) == -(-matrix.n // PANEL) * PANEL
    is_bf16 = int(source.dtype == np.uint16)
    check(library().leangpt_pack(byref(matrix), address(source), is_bf16, address(row_of)))


def screen_errors(head: Matrix, screen: Matrix, errors: np.ndarray) -> None:
    """Write what bounds the error of each screened logit, for a hidden state of length 1; `errors` is `(n,)` float32 or longer."""
    check(library().leangpt_screen_errors(byref(head), byref(screen), address(errors)))


def unpack(matrix: Matrix) -> np.ndarray:
    """The weights that products see, `(n, k)` float32."""
    width = -(-matrix.k // LANES) * LANES
    out = np.empty((matrix.n, width), dtype=np.float32)
    for row in range(matrix.n):
        library().leangpt_unpack_row(byref(matrix), row, address(out[row]))
    return out[:, : matrix.k]


def linear(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """`x w^T + bias` for `x` `(rows, k)` float32: `(rows, n)` float32."""
    padded = np.zeros((len(x), -(-matrix.k // LANES) * LANES), dtype=np.float32)
    padded[:, : matrix.k] = x
    out = np.empty((len(x), matrix.n), dtype=np.float32)
    check(library().leangpt_linear(byref(matrix), address(padded), len(x), address(out)))
    return out


def read_bandwidth(megabytes: int = 1024, seconds: float = 0.5) -> float:
    """Bytes per second that the engine's threads read from memory: the best of some passes over a block."""
    block = np.ones(megabytes << 20, dtype=np.uint8)
    lib = library()
    return max(
        block.nbytes / _seconds(lambda: lib.leangpt_read_memory(address(block), block.nbytes))
        for _ in _passes(seconds)
    )


def multiply_rate(kind: int, seconds: float = 0.3) -> float:
    """Operations per second that the engine's threads do in registers, with products of FP32, BF16 or INT8."""
    lib, rounds = library(), 200_000
    operations = lib.leangpt_multiply_registers(kind, rounds)
    return max(
        operations / _seconds(lambda: lib.leangpt_multiply_registers(kind, rounds))
        for _ in _passes(seconds)
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _passes(seconds: float) -> Iterator[None]:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield
