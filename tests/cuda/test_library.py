"""`exact=False`: the library's products in long steps, by the error rule; the bits of short ones as ever.

The library is called on a GPU alone. In the emulator its place is taken by PyTorch's product on the CPU, which reads and writes the
memory that the engine names, so that all but the call itself is run.
"""

import ctypes

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate
from native_helpers import LLAMA, dequantized, have_same_bits, logits_of, make_model, text_of, whole

from leangpt.decoding.choice import decoder_of, load_decoder
from leangpt.decoding.cuda_decoder import CudaDecoder
from leangpt.decoding.native_decoder import NativeDecoder, pack_model
from leangpt.kernels import decode, decode_library

pytestmark = pytest.mark.usefixtures("native_engine")

CONFIGS = {"gpt2": {"n_embd": 34, "activation": "gelu"}, "llama": {"n_embd": 32, **LLAMA}}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind


@pytest.fixture(autouse=True)
def _engine(request):
    if decode.cuda_obstacle() is not None:
        request.getfixturevalue("emulated")


@pytest.fixture
def calls(cuda, monkeypatch) -> list[tuple[int, int, int]]:
    """The sizes of the library's products; in the emulator they are made here."""
    made: list[tuple[int, int, int]] = []
    of_library = decode_library.LibraryProducts.multiply

    def multiply(self, weight, rows, row_stride, products, stride, num_rows, stream):
        made.append((num_rows, *weight.shape))
        if torch.cuda.is_available():
            of_library(self, weight, rows, row_stride, products, stride, num_rows, stream)
            return
        n, k = weight.shape
        x = torch.empty(num_rows, k, dtype=torch.bfloat16)
        runtime = cuda.runtime()
        assert runtime.cudaStreamSynchronize(ctypes.c_void_p(stream)) == 0
        copy(x, 2 * k, rows, 2 * row_stride, 2 * k, TO_HOST)
        out = x.float() @ weight.float().t()
        copy(products, 4 * stride, out, 4 * n, 4 * n, TO_DEVICE)

    def copy(to, to_pitch, source, pitch, width, kind):
        addresses = [p.data_ptr() if isinstance(p, torch.Tensor) else p for p in (to, source)]
        height = len(to if isinstance(to, torch.Tensor) else source)
        (to, source), sizes = map(ctypes.c_void_p, addresses), (to_pitch, pitch, width, height)
        to_pitch, pitch, width, height = map(ctypes.c_size_t, sizes)
        assert cuda.runtime().cudaMemcpy2D(to, to_pitch, source, pitch, width, height, kind) == 0

    monkeypatch.setattr(decode_library.LibraryProducts, "multiply", multiply)
    if not torch.cuda.is_available():
        monkeypatch.setattr(decode_library.LibraryProducts, "upload", lambda self, weight: weight)
    return made


def make(name: str = "llama", **options) -> CudaDecoder:
    torch.manual_seed(1)
    model = make_model(n_head=2, max_seq_len=320, **CONFIGS[name])
    return CudaDecoder(pack_model(model, "bf16"), num_blocks=50, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_prompt(name, calls):
    decoder, exact = make(name, exact=False), make(name)
    text = text_of(257)
    out = whole(decoder, text)
    config = decoder.config
    widths = [
        (96 if name == "llama" else 102, config.n_embd),
        (config.n_embd, config.n_embd),
        (config.inner_size * (1 + config.is_gated), config.n_embd),
        (config.n_embd, config.inner_size),
    ]
    assert [(n, k) for _, n, k in calls] == 2 * widths
    assert {rows for rows, _, _ in calls} == {257}
    model = dequantized(decoder)
    truth = logits_of(model.double(), text)
    baseline = logits_of(model.bfloat16(), text).float()
    assert_as_accurate(torch.from_numpy(out), truth, baseline)
    assert np.abs(out - whole(exact, text)).max() < 0.1 * np.abs(out).max()
    assert len(calls) == 8  # none for the exact decoder
    assert have_same_bits(whole(decoder, text[:256]), whole(exact, text[:256]))
    assert len(calls) == 8  # none for a shorter step


@pytest.mark.usefixtures("calls")
def test_its_failure_is_told(monkeypatch):
    decoder = make(exact=False)

    def multiply(*_):
        raise MemoryError("no workspace")

    monkeypatch.setattr(decode_library.LibraryProducts, "multiply", multiply)
    with pytest.raises(RuntimeError, match="the library could not multiply: no workspace") as info:
        whole(decoder, text_of(257))
    assert isinstance(info.value.__cause__, MemoryError)
    with pytest.raises(ValueError, match="token ids must be in"):
        whole(decoder, [99])


def test_what_it_is_not_for(tmp_path):
    model = make_model(n_head=2, **CONFIGS["llama"])
    with pytest.raises(ValueError, match="exact=False needs bf16 weights, got int8"):
        CudaDecoder(pack_model(model, "int8"), 3, exact=False)
    for format in (None, "bf16"):
        with pytest.raises(ValueError, match="exact=False is for decoding on CUDA"):
            decoder_of(model, format=format, exact=False)
    with pytest.raises(ValueError, match="exact=False needs the native decoder, but .* not fp32"):
        decoder_of(model, device="cuda", exact=False)
    NativeDecoder.from_model(model, "bf16").save(tmp_path / "model.leangpt")
    with pytest.raises(ValueError, match="exact=False is for decoding on CUDA"):
        load_decoder(str(tmp_path), exact=False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="exact=False needs a PyTorch with CUDA"):
            load_decoder(str(tmp_path), device="cuda", exact=False)
