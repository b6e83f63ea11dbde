"""The kernels of a decode step as torch ops: the code of csrc/bindings_cuda.cpp on CPU tensors, with its launches in the emulator."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator import cuda as emulated_cuda
from helpers import assert_as_accurate
from native_helpers import PackedMatrix, draw_from
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leangpt.decoding.native_decoder import _fill
from leangpt.decoding.sampling import RowSampling
from leangpt.kernels import decode, decode_ops, native

CSRC = Path(__file__).parents[2] / "csrc"
OPS = ("linear_decode", "append_kv", "attention_decode", "sample_decode", "log_probs")
PAGE = 16
OTHER_CACHES = ("float16", "int8", "float8_e4m3")
LARGEST = {"int8": 127, "float8_e4m3": 448}  # number of 8 bits


@pytest.fixture(scope="module")
def _cpu_tensors(_nvcc: None, in_ci: bool) -> Iterator[None]:
    """A call with CPU tensors runs the CUDA implementation."""
    if native.unavailable_reason:
        assert not in_ci, native.unavailable_reason
        pytest.skip(native.unavailable_reason)
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    emulated_cuda.load_ops("bindings", kernels, [CSRC / "bindings_cuda.cpp"])
    library = torch.library.Library("leangpt", "IMPL")
    for name in OPS:
        library.impl(name, _redirected(getattr(torch.ops.leangpt, name)), "CPU")
    yield
    library._destroy()


def _redirected(op: Any) -> Callable[..., Tensor]:
    return lambda *args: emulated_cuda.call_op(op, *args)


@pytest.fixture(autouse=True)
def _device_memory(_cpu_tensors: None, cuda: Any) -> Iterator[None]:
    with cuda.tensors_as_device_memory():
        yield


def on_device(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).clone()


class Packed:
    """A random matrix as the op takes it, and its weights in float64."""

    def __init__(self, format: str, n: int, k: int) -> None:
        rng = np.random.default_rng(0)
        packed = PackedMatrix(format, rng.standard_normal((n, k)).astype(np.float32) / k**0.5)
        self.num_outputs, self.group = n, packed.format.group
        self.weight = on_device(packed.parts["data"])
        dtype = np.float16 if self.group else np.float32
        self.scales, self.minimums = (
            on_device(packed.parts[name].view(dtype)) if name in packed.parts else None
            for name in ("scales", "minimums")
        )
        self.exact = on_device(packed.unpacked()).double()

    def arguments(self, x: Tensor, bias: Tensor | None = None, activation: str = "none") -> tuple:
        of_weights = self.weight, self.scales, self.minimums, bias
        return (x, *of_weights, self.num_outputs, self.group, activation)


class TestLinear:
    @pytest.mark.parametrize("format", ["bf16", "int8", "int8_g64", "int4", "int4_asym_g128"])
    @pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 32), (3, 70, 50), (17, 96, 130)], ids=str)
    def test_products(self, format, rows, n, k):
        packed = Packed(format, n, k)
        x, bias = torch.randn(rows, k).bfloat16(), torch.randn(n)
        out = torch.ops.leangpt.linear_decode(*packed.arguments(x, bias))
        baseline = F.linear(x, packed.exact.bfloat16(), bias.bfloat16())
        assert_as_accurate(out, F.linear(x.double(), packed.exact, bias.double()), baseline)

    @pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu2", "swiglu"])
    def test_activations(self, activation):
        packed = Packed("bf16", 64, 32)
        x = torch.randn(4, 32).bfloat16()

        def activated(y: Tensor) -> Tensor:
            match activation:
                case "gelu_tanh":
                    return F.gelu(y, approximate="tanh")
                case "gelu":
                    return F.gelu(y)
                case "relu2":
                    return y.relu().square()
                case _:
                    gate, up = y.unflatten(1, (-1, 2, 16)).unbind(2)
                    return (F.silu(gate) * up).flatten(1)

        out = decode_ops.linear_decode(x, packed.weight, 64, activation=activation)
        baseline = activated(F.linear(x, packed.exact.bfloat16()))
        assert_as_accurate(out, activated(F.linear(x.double(), packed.exact)), baseline)


class TestAttention:
    H, H_kv, D = 4, 2, 24

    def qkv(self, rows: int) -> Tensor:
        return torch.randn(rows, (self.H + 2 * self.H_kv) * self.D)

    def cache(self, num_pages: int, kv_dtype: str = "bfloat16") -> Tensor:
        padded, has_scales = -(-self.D // 16) * 16, kv_dtype in ("int8", "float8_e4m3")
        of_a_head = PAGE * padded * 2 * (1 if has_scales else 2) + 2 * PAGE * 4 * has_scales
        return torch.zeros(num_pages, self.H_kv * of_a_head, dtype=torch.uint8)

    @pytest.mark.parametrize(
        ("window", "kv_dtype"),
        [(None, "bfloat16"), (7, "bfloat16"), *((None, kv) for kv in OTHER_CACHES)],
    )
    def test_a_sequence_in_pieces(self, window, kv_dtype):
        T = 37
        qkv = self.qkv(T)
        kv_cache = self.cache(5, kv_dtype)
        table = torch.tensor([[4, 0, 2]], dtype=torch.int32)
        outputs = []
        for start, end in ((0, 1), (1, 20), (20, 37)):
            positions = torch.arange(start, end, dtype=torch.int32)
            tables = table.expand(len(positions), -1).contiguous()
            new = qkv[start:end].clone()
            q = decode_ops.append_kv(
                new, kv_cache, positions, tables, self.H, self.H_kv, kv_dtype=kv_dtype
            )
            options = {"sliding_window": window, "kv_dtype": kv_dtype}
            outputs.append(
                decode_ops.attention_decode(
                    q, kv_cache, positions, tables, self.H_kv, end, **options
                )
            )
        out = torch.cat(outputs)
        truth = self.reference(qkv.double(), window)
        cached = self.as_cached(qkv, kv_dtype)
        assert_as_accurate(out, truth, self.reference(cached.bfloat16(), window))

    def as_cached(self, qkv: Tensor, kv_dtype: str) -> Tensor:
        """Keys and values as the cache holds them."""
        if kv_dtype not in LARGEST:
            return qkv
        heads = qkv.unflatten(1, (-1, self.D))
        scale = heads.abs().amax(-1, keepdim=True) / LARGEST[kv_dtype]
        numbers = heads / scale
        rounded = numbers.round() if kv_dtype == "int8" else numbers.to(torch.float8_e4m3fn).float()
        is_query = (torch.arange(heads.shape[1]) < self.H)[:, None]
        return torch.where(is_query, heads, rounded * scale).flatten(1)

    def reference(self, qkv: Tensor, window: int | None) -> Tensor:
        heads = qkv.unflatten(1, (-1, self.D)).transpose(0, 1)
        q, k, v = heads.split((self.H, self.H_kv, self.H_kv))
        T = len(qkv)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        mask = (distance >= 0) & (distance < (window or T))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(
            0, 1
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.float32}, "q must be contiguous BFloat16"),
            ({"positions": torch.int64}, "positions must be contiguous Int"),
            ({"max_keys": 33}, r"max_keys must be in \[1, 32\]"),
            ({"n_kv_head": 3}, "multiple of n_kv_head, got 4 and 3"),
            ({"kv_dtype": "int8"}, "kv_cache must be contiguous Byte"),
            ({"kv_dtype": "float16"}, "q must be contiguous Half"),
            ({"kv_dtype": "int4"}, "kv_dtype must be bfloat16, .* float8_e4m3, got int4"),
        ],
        ids=str,
    )
    def test_refuses(self, change, message):
        arguments = {
            "q": torch.randn(2, self.H, self.D).bfloat16(),
            "kv_cache": self.cache(3),
            "positions": torch.tensor([5, 7], dtype=torch.int32),
            "block_tables": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
            "n_kv_head": self.H_kv,
            "max_keys": 8,
        }
        for name, value in change.items():
            before = arguments.get(name)
            arguments[name] = before.to(value) if isinstance(before, Tensor) else value
        with pytest.raises(ValueError, match=message):
            decode_ops.attention_decode(**arguments)


class TestDraws:
    def test_the_tokens_that_the_cpu_engine_draws(self):
        logits = torch.randn(6, 301) * 3
        drawn = decode_ops.sample_decode(logits, 0.8, 50, 0.95, seed=11, position=4)
        for i, row in enumerate(logits.numpy()):
            setting = decode.DrawSettings()
            _fill(
                setting, RowSampling(0.8, 50, 0.95, 0.0, 11, i, 4, 1.0, 0.0, (), (), 301, None), 301
            )
            assert drawn[i] == draw_from(row.copy(), setting).token

    def test_log_probs(self):
        logits, targets = torch.randn(5, 100), torch.tensor([0, 99, 3, 3, 50])
        out = decode_ops.log_probs(logits, targets)

        def expected(x: Tensor) -> Tensor:
            return x.log_softmax(-1).gather(1, targets[:, None])[:, 0]

        assert_as_accurate(out, expected(logits.double()), expected(logits))


class TestCompilation:
    """torch sees each op as one, with shapes that it knows without running it."""

    def calls(self) -> dict[str, tuple[Any, ...]]:
        attention = TestAttention()
        H, H_kv, D = attention.H, attention.H_kv, attention.D
        positions = torch.tensor([3, 0], dtype=torch.int32)
        tables = torch.tensor([[1], [2]], dtype=torch.int32)
        cached = attention.cache(3), positions, tables
        return {
            "linear_decode": Packed("int4", 70, 40).arguments(torch.randn(2, 40).bfloat16()),
            "append_kv": (
                *(attention.qkv(2), *cached, torch.rand(D), torch.rand(D), torch.rand(D // 2)),
                *(H, H_kv, 1e-5, 1.0, "bfloat16"),
            ),
            "attention_decode": (torch.randn(2, H, D).bfloat16(), *cached, H_kv, 4, 0, "bfloat16"),
            "sample_decode": (torch.randn(2, 50), 1.0, 0, 1.0, 0.0, 1, 2),
            "log_probs": (torch.randn(2, 50), torch.tensor([1, 2])),
        }

    @pytest.mark.parametrize("name", OPS)
    def test_opcheck(self, name):
        torch.library.opcheck(getattr(torch.ops.leangpt, name).default, self.calls()[name])

    @pytest.mark.parametrize("name", OPS)
    def test_fake_tensors_on_cuda(self, name):
        """As torch.compile traces them on a machine with a GPU; here there is none."""
        real = self.calls()[name]
        expected = getattr(torch.ops.leangpt, name)(*real)
        with FakeTensorMode():
            fakes = [
                torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in real
            ]
            out = getattr(torch.ops.leangpt, name)(*fakes)
        assert out.device.type == "cuda"
        assert (out.shape, out.dtype, out.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )

    def step(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Some of a layer, and what it is called with."""
        qkv, kv_cache, positions, tables, *_ = self.calls()["append_kv"]
        packed = Packed("int8", 64, 96)

        def step(qkv: Tensor, kv_cache: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
            q = decode_ops.append_kv(qkv, kv_cache, positions, tables, 4, 2)
            y = decode_ops.attention_decode(q, kv_cache, positions, tables, 2, 16)
            scales = packed.scales
            return decode_ops.linear_decode(y.flatten(1), packed.weight, 64, scales=scales) * 2

        return step, (qkv, kv_cache, positions, tables)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_whole(self, backend):
        step, arguments = self.step()
        eager_cache, compiled_cache = arguments[1].clone(), arguments[1].clone()
        expected = step(arguments[0], eager_cache, *arguments[2:])
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        out = compiled(arguments[0], compiled_cache, *arguments[2:])
        assert torch.equal(out, expected) and torch.equal(compiled_cache, eager_cache)
        assert eager_cache.any()

    def test_exports(self):
        step, arguments = self.step()

        class Module(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return step(*inputs)

        program = torch.export.export(Module(), arguments)
        targets = {str(node.target) for node in program.graph.nodes}
        assert {f"leangpt.{name}.default" for name in OPS[:3]} <= targets
