"""Every op on Triton exports: the program has one node for it, and none of its parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leangpt.kernels import ops, triton_ops, use_backend

B, T, C, H, D, V = 2, 5, 32, 2, 16, 7
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "position")


def example(op: str, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """A call of an op, and the tensors that it gets."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    def of(*values: float, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    x, row, heads, angles = randn(B, T, C), randn(C), randn(B, T, H, D), randn(1, T, D // 2).float()
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    weights = randn(3 * C, C), randn(3 * C), randn(C, 3 * C), randn(C)
    fractions = [of(x, dtype=torch.float32) for x in (1.0, 0.9, 0.1)]
    examples: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "activate": (lambda h: ops.activate(h, "gelu"), [x]),
        "adamw_step": (
            lambda p, g, m, v: ops.adamw_step(
                [p], [g], [m], [v], step=3, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1
            ),
            [row.float() for _ in range(4)],
        ),
        "add_layer_norm": (ops.add_layer_norm, [x, x, row, row]),
        "add_rms_norm": (ops.add_rms_norm, [x, x, row]),
        "attention": (ops.attention, [heads] * 3),
        "attention_varlen": (
            lambda q, k, v, ends: ops.attention_varlen(q, k, v, ends, T),
            [*[heads.flatten(0, 1)] * 3, of(0, T, B * T, dtype=torch.int32)],
        ),
        "embedding": (ops.embedding, [tokens, randn(V, C)]),
        "layer_norm": (ops.layer_norm, [x, row, row]),
        "linear": (ops.linear, [x, weights[0]]),
        "linear_cross_entropy": (ops.linear_cross_entropy, [x, randn(V, C), tokens]),
        "mlp": (lambda *t: ops.mlp(*t, "gelu"), [x, *weights]),
        "rms_norm": (ops.rms_norm, [x, row]),
        "rotary": (ops.rotary, [heads, angles, angles]),
        "rotary_qkv": (lambda *t: ops.rotary_qkv(*t, 1), [randn(B, T, H + 2, D), angles, angles]),
        "sample": (
            lambda logits, *values: ops.sample(logits, **dict(zip(SETTINGS, values, strict=True))),
            [randn(1, V), fractions[0], of(5), *fractions[1:], *[of(3)] * 3],
        ),
    }
    return examples[op]


@pytest.mark.parametrize("op", triton_ops.__all__)
def test_exports(op, device):
    call, tensors = example(op, device)

    class Module(nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return call(*tensors)

    with use_backend("triton"), torch.no_grad():
        program = torch.export.export(Module(), tuple(tensors))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    name = "attention" if op == "attention_varlen" else op
    assert f"leangpt_triton.{name}.default" in targets
