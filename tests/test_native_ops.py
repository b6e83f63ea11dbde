"""The CPU kernels of training against float64, by the error rule, with gradients; fakes, autograd and torch.compile."""

import functools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import check_op

from leangpt import GPT, GPTConfig
from leangpt.kernels import decode, native, ops, use_backend

DTYPES = [torch.float32, torch.bfloat16]
# rows, inputs, outputs: of no tile, of whole ones, beyond one block of inputs, and fewer than a vector
# of a single output few terms: the baseline of one long sum may be exact by luck
SHAPES = [
    (3, 1, 1),
    (35, 17, 5),
    (96, 64, 128),
    (70, 700, 77),
    (130, 48, 200),
    (230, 40, 70),
    (150, 600, 40),
    (35, 300, 2000),
]


@pytest.fixture(autouse=True)
def _extension(in_ci):
    if native.unavailable_reason:
        assert not in_ci, f"CI must test the extension: {native.unavailable_reason}"
        pytest.skip(native.unavailable_reason)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Else what an op does not write may hold the result of the same op by PyTorch."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids="threads={}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def randn(*shape, dtype=torch.float32, std=1.0):
    return (torch.randn(*shape) * std).to(dtype)


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, shape, dtype):
        M, K, N = shape
        tensors = [randn(M, K, dtype=dtype), randn(N, K, dtype=dtype), randn(N, dtype=dtype)]
        check_op(ops.linear, tensors, "native")

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_large_and_small_numbers(self, scale):
        tensors = [randn(40, 30, std=scale), randn(20, 30, std=scale), randn(20, std=scale * scale)]
        check_op(ops.linear, tensors, "native")

    def test_what_is_not_finite_stays_in_its_row(self):
        x, weight = randn(40, 30), randn(20, 30)
        broken = x.clone()
        broken[[3, 7], [5, 0]] = torch.tensor([torch.inf, torch.nan])
        with use_backend("native"):
            expected, out = ops.linear(x, weight), ops.linear(broken, weight)
        assert not out[[3, 7]].isfinite().any()
        expected[[3, 7]] = out[[3, 7]]
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)

    def test_without_bias_of_any_strides(self):
        x, weight = randn(3, 40, 24).transpose(1, 2), randn(40, 30).t()
        check_op(ops.linear, [x, weight], "native")

    def test_the_gradient_of_an_expanded_tensor(self):
        x, weight = randn(40, 8).requires_grad_(), randn(5, 8).requires_grad_()
        with use_backend("native"):
            ops.linear(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(40, 8))


class TestEmbedding:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [1, 16, 70, 128])
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, width, dtype):
        """Tokens that are not there, and one that is often."""
        tokens = torch.randint(5, 150, (3, 40))
        tokens[1, ::2] = 7
        positions = torch.arange(40)[None]
        tables = [randn(200, width, dtype=dtype), randn(50, width, dtype=dtype)]
        check_op(functools.partial(ops.embedding, tokens), tables[:1], "native")
        check_op(lambda w, p: ops.embedding(tokens, w, positions, p), tables, "native")

    def test_any_strides_and_a_frozen_table(self):
        tokens, positions = torch.randint(30, (40, 2)).t(), torch.arange(80).view(2, 40)
        table, frozen = randn(24, 30).t(), randn(80, 24)
        check_op(lambda w: ops.embedding(tokens, w, positions, frozen.to(w)), [table], "native")
        check_op(lambda p: ops.embedding(tokens, table.to(p), positions, p), [frozen], "native")

    @pytest.mark.parametrize("value", [-1, 30])
    def test_what_is_out_of_range_is_an_index_error(self, value):
        good, wrong = torch.tensor([[0, 1]]), torch.tensor([[0, value]])
        table = randn(30, 4)
        with use_backend("native"):
            with pytest.raises(IndexError, match=f"token {value} is out of range"):
                ops.embedding(wrong, table)
            with pytest.raises(IndexError, match=f"position {value} is out of range"):
                ops.embedding(good, table, wrong, table)


def angles(*shape):
    angle = torch.rand(*shape) * 6.3
    return angle.cos(), angle.sin()


class TestRotaryQkv:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tables", [1, 3], ids="tables={}".format)
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
    @pytest.mark.parametrize("head_dim", [2, 24, 64, 70])
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, head_dim, heads, tables, dtype):
        H, H_kv = heads
        cos, sin = angles(tables, 11, head_dim // 2)
        qkv = randn(3, 11, H + 2 * H_kv, head_dim, dtype=dtype)
        weights = [randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)]
        check_op(lambda x: ops.rotary_qkv(x, cos, sin, H_kv), [qkv], "native")
        check_op(lambda x, q, k: ops.rotary_qkv(x, cos, sin, H_kv, q, k), [qkv, *weights], "native")

    def test_any_strides_and_frozen_weights(self):
        qkv, weight = randn(8, 5, 2, 12).permute(2, 1, 0, 3), randn(12)
        tables = [t.permute(2, 1, 0) for t in angles(6, 5, 1)]

        def call(x):
            return ops.rotary_qkv(x, *tables, 2, weight.to(x), weight.to(x))

        check_op(call, [qkv], "native")

    def test_a_gradient_of_the_values_alone(self):
        qkv = randn(1, 6, 3, 8).requires_grad_()
        with use_backend("native"):
            _, _, v = ops.rotary_qkv(qkv, *angles(1, 6, 4), 1)
        v.square().sum().backward()
        assert torch.equal(qkv.grad[:, :, 2], 2 * qkv[:, :, 2])
        assert qkv.grad[:, :, :2].eq(0).all()


class TestMlp:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu2", "swiglu"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_as_accurate_as_torch(self, shape, activation, dtype):
        M, C, F = shape
        x, residual = randn(M, C, dtype=dtype), randn(M, C, dtype=dtype)
        inner = 2 * F if activation == "swiglu" else F
        w_in, b_in = randn(inner, C, dtype=dtype, std=C**-0.5), randn(inner, dtype=dtype)
        w_out, b_out = randn(C, F, dtype=dtype, std=F**-0.5), randn(C, dtype=dtype)

        def call(x, w_in, b_in, w_out, b_out, residual):
            return ops.mlp(x, w_in, b_in, w_out, b_out, activation, residual=residual)

        check_op(call, [x, w_in, b_in, w_out, b_out, residual], "native")

    @pytest.mark.usefixtures("threads")
    def test_without_biases_and_residual(self):
        def call(x, w_in, w_out):
            return ops.mlp(x, w_in, None, w_out, None, "gelu_tanh")

        check_op(call, [randn(50, 24), randn(100, 24), randn(24, 100)], "native")

    def test_dropout_before_the_residual(self):
        x, identity, residual = randn(50, 64).abs(), torch.eye(64), randn(50, 64)
        with use_backend("native"):
            out = ops.mlp(
                x.sqrt(), identity, None, identity, None, "relu2", residual=residual, dropout_p=0.3
            )
        kept = out != residual
        torch.testing.assert_close(out, residual + torch.where(kept, x / 0.7, 0.0))
        assert 0.65 < kept.float().mean() < 0.75


class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("window", [None, 1, 20], ids="window={}".format)
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 33, 33, 2, 2, 8),
            (1, 130, 130, 4, 2, 40),
            (2, 50, 77, 3, 1, 65),
            (2, 250, 266, 2, 1, 8),
        ],
        ids=str,
    )
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, shape, window, dtype):
        B, T, S, H, H_kv, D = shape
        tensors = [
            randn(B, T, H, D, dtype=dtype),
            randn(B, S, H_kv, D, dtype=dtype),
            randn(B, S, H_kv, D, dtype=dtype),
        ]
        check_op(functools.partial(ops.attention, sliding_window=window), tensors, "native")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_straight_from_packed_qkv(self, dtype):
        def call(qkv):
            return ops.attention(*qkv.split((4, 2, 2), dim=2), softmax_scale=0.3)

        check_op(call, [randn(2, 64, 8, 16, dtype=dtype)], "native")

    def test_scores_far_apart(self):
        tensors = [randn(1, 100, 2, 16) * 20, randn(1, 100, 2, 16) * 20, randn(1, 100, 2, 16)]
        check_op(ops.attention, tensors, "native")


class TestNorms:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 35, 64), (70, 129)], ids=str)
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, shape, dtype):
        x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        weight, bias = randn(shape[-1], dtype=dtype), randn(shape[-1], dtype=dtype)
        check_op(ops.layer_norm, [x, weight, bias], "native")
        check_op(ops.layer_norm, [x, weight], "native")
        check_op(ops.rms_norm, [x, weight], "native")
        check_op(ops.add_layer_norm, [x, residual, weight, bias], "native")
        check_op(ops.add_rms_norm, [x, residual, weight], "native")

    @pytest.mark.parametrize("branch", DTYPES, ids=str)
    def test_autocast(self, branch):
        """What products read has its dtype, the sum that of the stream."""
        x, residual = randn(70, 129, dtype=branch), randn(70, 129)
        weight, bias = randn(129), randn(129)
        with torch.autocast("cpu", torch.bfloat16):
            check_op(ops.layer_norm, [residual, weight, bias], "native")
            check_op(ops.rms_norm, [residual, weight], "native")
            check_op(ops.add_layer_norm, [x, residual, weight, bias], "native")
            check_op(ops.add_rms_norm, [x, residual, weight], "native")
            for backend in ("native", "reference"):
                with use_backend(backend):
                    y, total = ops.add_rms_norm(x, residual, weight)
                    assert y.dtype == ops.layer_norm(residual, weight).dtype == torch.bfloat16
                    assert total.dtype == torch.float32

    def test_offset_rows(self):
        check_op(ops.layer_norm, [randn(40, 300) + 1000, randn(300), randn(300)], "native")

    def test_a_gradient_of_one_output_alone(self):
        tensors = [randn(40, 24), randn(40, 24), randn(24), randn(24)]
        for output in (0, 1):
            grads = []
            for backend in ("native", "reference"):
                leaves = [t.clone().requires_grad_() for t in tensors]
                with use_backend(backend):
                    ops.add_layer_norm(*leaves)[output].square().sum().backward()
                grads.append([leaf.grad for leaf in leaves])
            for native_grad, grad in zip(*grads, strict=True):
                assert (native_grad is None) == (grad is None)
                if grad is not None:
                    torch.testing.assert_close(native_grad, grad)


NORMS = {
    "layer": lambda x, weight, bias: [ops.layer_norm(x, weight, bias)],
    "add layer": lambda x, weight, bias: ops.add_layer_norm(x, x.detach(), weight, bias),
    "add rms": lambda x, weight, _: ops.add_rms_norm(x, x.detach(), weight),
}
PRODUCTS = {
    "linear": lambda y, w_in, _: ops.linear(y, w_in),
    "mlp": lambda y, w_in, w_out: ops.mlp(y, w_in, None, w_out, None, "gelu_tanh"),
}


class TestProductsOfNorms:
    """For backward they keep no large float32 y of a norm: it is computed again."""

    @staticmethod
    def leaves():
        """x, 2 MB of it, weight and bias of the norm, w_in, w_out."""
        tensors = randn(2048, 256), randn(256), randn(256), randn(64, 256), randn(256, 64)
        return [t.requires_grad_() for t in tensors]

    @pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
    @pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_same_bits_as_if_it_were_kept(self, norm, product, dtype):
        leaves = self.leaves()

        def gradients():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y, *_total = norm(*leaves[:3])
                out = product(y, *leaves[3:])
            alive = weakref.ref(y)
            del y
            is_kept = alive() is not None
            return is_kept, torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)

        is_kept, computed = gradients()
        assert is_kept == (dtype == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            is_kept, expected = gradients()
        assert is_kept
        for gradient, other in zip(computed, expected, strict=True):
            assert gradient is other is None or torch.equal(gradient, other)

    def test_after_the_backward_of_the_norm(self):
        x, weight, bias, w, _ = self.leaves()
        y = ops.layer_norm(x, weight, bias)
        y.sum().backward()
        [gradient] = torch.autograd.grad(ops.linear(y, w).sum(), w)
        torch.testing.assert_close(
            gradient, y.detach().sum(0).expand(64, 256), atol=1e-3, rtol=1e-5
        )

    def test_a_norm_whose_input_is_gone(self):
        x, weight, bias, w, _ = self.leaves()
        y = ops.layer_norm(x * 2, weight, bias)
        y.sum().backward()  # lets go of x * 2
        [gradient] = torch.autograd.grad(ops.linear(y, w).sum(), w)
        torch.testing.assert_close(
            gradient, y.detach().sum(0).expand(64, 256), atol=1e-3, rtol=1e-5
        )

    def test_the_gradient_of_a_frozen_weight_or_of_x_alone(self):
        x, weight, bias, w, _ = self.leaves()
        gradients = []
        for is_frozen in (True, False):
            y = ops.layer_norm(x, weight, bias)
            gradients += torch.autograd.grad(
                ops.linear(y, w.requires_grad_(not is_frozen)).sum(), x
            )
        assert torch.equal(*gradients)

    def test_a_changed_weight_of_the_norm_is_an_error(self):
        x, weight, bias, w, _ = self.leaves()
        out = ops.linear(ops.layer_norm(x, weight, bias), w)
        with torch.no_grad():
            bias += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_compiles_whole(self):
        leaves = self.leaves()

        def loss(x, weight, bias, w_in, w_out):
            y = ops.layer_norm(x, weight, bias)
            return ops.mlp(y, w_in, None, w_out, None, "gelu_tanh").square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for gradient, expected in zip(
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.autograd.grad(loss(*leaves), leaves),
            strict=True,
        ):
            torch.testing.assert_close(gradient, expected)


class TestLinearCrossEntropy:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("options", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.01)], ids=str)
    @pytest.mark.parametrize("shape", [(1, 7, 5), (35, 24, 50), (70, 64, 1000)], ids=str)
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, shape, options, reduction, dtype):
        N, C, V = shape
        targets = torch.randint(V, (N,))
        targets[1::3] = -100
        smoothing, z_loss = options

        def call(hidden, weight):
            return ops.linear_cross_entropy(
                hidden,
                weight,
                targets,
                reduction=reduction,
                label_smoothing=smoothing,
                z_loss=z_loss,
            )

        tensors = [randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, std=C**-0.5)]
        check_op(call, tensors, "native")

    @pytest.mark.parametrize(("N", "V"), [(27, 2**20), (600, 3000)], ids=str)
    def test_more_rows_than_a_chunk_of_logits(self, N, V):
        hidden, weight, targets = randn(N, 4), randn(V, 4), torch.randint(V, (N,))
        check_op(lambda h, w: ops.linear_cross_entropy(h, w, targets), [hidden, weight], "native")

    def test_a_frozen_weight(self):
        hidden, weight, targets = randn(40, 9), randn(30, 9), torch.randint(30, (40,))
        check_op(lambda h: ops.linear_cross_entropy(h, weight.to(h), targets), [hidden], "native")
        check_op(lambda w: ops.linear_cross_entropy(hidden.to(w), w, targets), [weight], "native")

    def test_backward_twice_adds_the_gradients_twice(self):
        hidden, weight, targets = randn(40, 9), randn(30, 9), torch.randint(30, (40,))
        for factor in (1.0, 0.5):
            tensors = [t.clone().requires_grad_() for t in (hidden, weight)]
            with use_backend("native"):
                loss = ops.linear_cross_entropy(*tensors, targets) * factor
            loss.backward(retain_graph=True)
            once = [t.grad.clone() for t in tensors]
            loss.backward()
            for tensor, gradient in zip(tensors, once, strict=True):
                assert tensor.grad.equal(2 * gradient)

    def test_losses_of_rows(self):
        hidden, weight, targets = randn(2, 30, 16), randn(90, 16), torch.randint(90, (2, 30))
        targets[0, :5] = 7

        def call(h, w):
            return ops.linear_cross_entropy(h, w, targets, reduction="none", ignore_index=7)

        check_op(call, [hidden, weight], "native", with_gradients=False)
        check_op(call, [hidden, weight], "native")

    def test_a_target_out_of_range_is_an_index_error(self):
        for target in (-1, 90):
            with use_backend("native"), pytest.raises(IndexError, match=f"target {target} is out"):
                ops.linear_cross_entropy(randn(1, 4), randn(90, 4), torch.tensor([target]))

    def test_no_target_that_counts(self):
        hidden = randn(2, 4).requires_grad_()
        targets = torch.full((2,), -100)
        with use_backend("native"):
            assert ops.linear_cross_entropy(hidden, randn(9, 4), targets).isnan()
            loss = ops.linear_cross_entropy(hidden, randn(9, 4), targets, reduction="sum")
        loss.backward()
        assert loss == 0 and hidden.grad.eq(0).all()


OPS = torch.ops.leangpt
# the arguments of each op, in float32 products and bf16 ones
ARGUMENTS = {
    "linear": lambda x, w, dtype: (x, w, randn(24), dtype),
    "mlp": lambda x, w, dtype: (x, w, randn(24), randn(16, 24), None, x, "gelu_tanh", dtype),
    "gated mlp": lambda x, w, dtype: (x, w, None, randn(16, 12), None, None, "swiglu", dtype),
    "embedding": lambda x, w, dtype: (torch.randint(24, (2, 20)), w, torch.arange(20), w),
    "rotary_qkv": lambda x, w, dtype: (
        *(x.view(2, 20, 4, 4).to(dtype), *angles(1, 20, 2), 1, w[0, :4], w[1, :4], 1e-6),
    ),
    "normalize": lambda x, w, dtype: (x.to(dtype), x, w[0], w[1], 1e-5, False, dtype),
    "attention": lambda x, w, dtype: (*(x.view(2, 20, 2, 8).to(dtype) for _ in range(3)), 9, 0.3),
    "linear_cross_entropy": lambda x, w, dtype: (
        *(x, w, torch.randint(24, (2, 20)), -100, "mean", 0.1, 0.0, dtype, [True, True]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, dtype):
    """The schema tells the truth, fakes have the shapes and dtypes of results, gradients go through torch.compile."""
    x, w = randn(2, 20, 16).requires_grad_(), randn(24, 16).requires_grad_()
    torch.library.opcheck(getattr(OPS, name.split()[-1]).default, ARGUMENTS[name](x, w, dtype))


def test_doubles_and_half_precision_are_left_to_the_reference():
    for dtype in (torch.float64, torch.float16):
        x, weight = randn(40, 8, dtype=dtype), randn(8, 8, dtype=dtype)
        with use_backend("native"), pytest.raises(RuntimeError, match=f"not in {dtype}"):
            ops.linear(x, weight)
        assert ops.linear(x, weight).dtype == dtype


def make_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 71, "max_seq_len": 48, "n_layer": 2, "n_head": 4, "n_embd": 64}
    return GPT(GPTConfig(**sizes | options))


LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False}


def train(model, steps, dtype=torch.float32, run=None):
    """The losses of some steps on the same few texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(71, (3, 4, 49), generator=generator)
    losses = []
    for step in range(steps):
        text = texts[step % 3]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (run or model)(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class TestModel:
    @pytest.mark.parametrize("options", [{}, LLAMA | {"n_kv_head": 2, "qk_norm": True}], ids=len)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_learns_as_on_the_reference(self, options, dtype):
        losses = train(make_model(**options), 60, dtype)
        with use_backend("reference"):
            expected = train(make_model(**options), 60, dtype)
        limit = 2e-3 if dtype == torch.float32 else 0.1
        assert expected[-1] < 0.5 * expected[0]
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < limit

    def test_gradients_are_those_of_doubles(self):
        model = make_model()
        tokens = torch.randint(71, (2, 49))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        doubles = make_model().double()
        doubles(tokens[:, :-1], tokens[:, 1:]).backward()
        for (name, p), q in zip(model.named_parameters(), doubles.parameters(), strict=True):
            error = (p.grad.double() - q.grad).abs().max()
            assert error <= 1e-5 * max(1.0, q.grad.abs().max().item()), name

    def test_the_same_bits_at_any_number_of_threads_and_again(self):
        before = torch.get_num_threads()
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            model = make_model()
            tokens = torch.randint(71, (8, 49), generator=torch.Generator().manual_seed(1))
            hidden = model.hidden(tokens[:, :-1])
            hidden.square().sum().backward()
            runs.append([p.grad for p in model.blocks.parameters()])
        torch.set_num_threads(before)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))

    def test_compiles_whole(self):
        model = make_model()
        compiled = torch.compile(make_model(), fullgraph=True, backend="aot_eager")
        losses = train(compiled, 3)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(train(model, 3)))


OTHER_ISAS = [
    isa for isa in ("portable", "avx2", "avx512", "avx512_bf16") if isa != decode.cpu_isa()
]


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa):
    """What holds for the best one holds for the others."""
    tests = "not isa and not instruction and not opcheck and (Linear or Mlp or Attention or Norms or Embedding or Rotary)"
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            "-k",
            tests,
            __file__,
        ],
        env=os.environ | {"LEANGPT_CPU_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported by this CPU" in process.stdout + process.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout
