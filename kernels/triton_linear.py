# pyright: reportArgumentType=false
"""Matrix products with epilogues in Triton: `linear`, and both products of `mlp` (triton_mlp.py).

h = x w^T + b        a = act(h)        out = residual + dropout(a)        each part of it optional

A program computes one tile of h, its sums in float32. It steps through K, and Triton loads the tiles of the next steps
while it multiplies (cp.async into shared memory, where the tensor cores of sm_90 read them). What follows works on the
sums in registers: biases, activations, dropout and residuals cost no pass over memory of their own. Programs walk through
the output in groups of GROUP_M rows of tiles, so that they find the group's tiles of x and the latest tile of w in L2.
Strides are arguments: transposed and sliced operands are read where they lie. Loads have 16 bytes where the stride of K is
1, and K, the other stride and the address are multiples of 16.

swiglu: w has the rows of gate before those of up. A tile takes rows of gate for its left half and the same rows of up for
its right half: one wide product, and a program has both factors of its outputs.

The library is the better choice for a product that stands alone: it is tuned for each GPU, and there is nothing to fuse.
So `linear` runs here only where it is asked for, and gradients that are plain products are `torch.mm`:

dx = dy w        dw = dy^T x        db = sum over rows of dy

It is the better choice in float32 as well: without TF32 there are no tensor cores to use, and with it those of sm_90 read
operands with contiguous K only, which backward does not have. `dispatch.select` knows both rules.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .triton_activations import activation
from .triton_dropout import kept_by_dropout


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile of an (M, N) output, both counted in tiles."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def load_tile(ptr, rows, cols, num_rows, num_cols, stride_row, stride_col):
    """Elements (rows, cols) of a matrix (num_rows, num_cols), zeros beyond it."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def product(
    x_ptr, w_ptr, rows, w_rows, M, num_w_rows, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Elements (rows, w_rows) of x w^T in float32."""
    sums = tl.zeros((rows.shape[0], w_rows.shape[0]), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, ks, M, K, stride_xm, stride_xk)
        w = load_tile(w_ptr, ks, w_rows, K, num_w_rows, stride_wk, stride_wn)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def product_by_descriptors(
    x_ptr, w_ptr, row, w_row, M, num_w_rows, K, stride_xm, stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`product` for the tile at (row, w_row), by tensor descriptors; K is contiguous.

    On sm_90 a descriptor's tile is loaded by TMA: one thread asks for it, and hardware computes addresses and fills in
    zeros. For sm_80 Triton makes plain loads of it.
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [num_w_rows, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w = tl.trans(w_desc.load([w_row, k]))
        sums = tl.dot(x_desc.load([row, k]), w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def slices(x):
    """A tile of up to 256 columns in slices of up to 64: epilogues of whole tiles would not fit into registers."""
    if x.shape[1] <= 64:
        return (x,)
    elif x.shape[1] == 128:
        return halves(x)
    else:
        left, right = halves(x)
        return halves(left) + halves(right)


@triton.jit
def _epilogue(
    h, up, bias_ptr, residual_ptr, seed_ptr, h_ptr, out_ptr, row, col, M, N, dropout_p,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """From the sums of the tile at (row, col) to what is stored."""
    rows = row + tl.arange(0, h.shape[0]).to(tl.int64)
    cols = col + tl.arange(0, h.shape[1])
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if up is not None:
            up += tl.load(bias_ptr + N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if h_ptr is not None:
        offsets = rows[:, None] * (2 * N if up is not None else N) + cols[None, :]
        tl.store(h_ptr + offsets, h, mask=mask)
        if up is not None:
            tl.store(h_ptr + N + offsets, up, mask=mask)

    out = h
    if ACTIVATION != "none":
        out, _ = activation(h, ACTIVATION)
    if up is not None:
        out *= up
    if seed_ptr is not None:
        kept = kept_by_dropout(tl.load(seed_ptr), dropout_p, rows, col, h.shape[1])
        out = tl.where(kept, out / (1.0 - dropout_p), 0.0)
    offsets = rows[:, None] * N + cols[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out, mask=mask)


def configurations() -> list[triton.Config]:
    """Small tiles give a small product many programs and fit any dtype; large ones read less for each output."""
    tiles = [
        (64, 64, 32, 4, 4),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 32, 8, 4),
    ]
    return [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=w, num_stages=s
        )
        for m, n, k, w, s in tiles
    ]


def _of_architecture(
    configs: list[triton.Config], _: dict[str, Any], **__: Any
) -> list[triton.Config]:
    """The largest tile with the K that suits the tensor cores.

    Those of sm_90 and sm_100 read operands from shared memory. Others read them from registers, which a K of 64 would exceed.
    """
    reads_shared = 90 <= driver.active.get_current_target().arch < 120
    largest = {"BLOCK_M": 128, "BLOCK_N": 256}
    unfit = largest | {"BLOCK_K": 32 if reads_shared else 64}
    return [config for config in configs if not unfit.items() <= config.kwargs.items()]


def size_class(M: int, N: int) -> int:
    """By which configurations are chosen: large tiles would leave processors idle (0), may do so (1), never do so (2)."""
    tiles = triton.cdiv(M, 128) * triton.cdiv(N, 128)
    return 0 if tiles < 128 else 1 if tiles < 1024 else 2


def dot_precision() -> str:
    """How `tl.dot` multiplies float32: as torch is allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.autotune(
    configs=configurations(),
    key=["size_class", "ACTIVATION"],
    prune_configs_by={"early_config_prune": _of_architecture},
    cache_results=True,
)
@triton.jit(do_not_specialize=["M", "size_class"])
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, seed_ptr, h_ptr, out_ptr,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, dropout_p, size_class,
    ACTIVATION: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    IS_GATED: tl.constexpr = ACTIVATION == "swiglu"
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N  # columns of the output
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, WIDTH, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * WIDTH
    if USE_DESCRIPTORS:
        tl.static_assert(not IS_GATED)
        h = product_by_descriptors(
            x_ptr, w_ptr, row, col, M, N, K, stride_xm, stride_wn,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        w_rows = tl.arange(0, BLOCK_N)
        if IS_GATED:
            w_rows += tl.where(w_rows < WIDTH, 0, N - WIDTH)
        h = product(
            x_ptr, w_ptr, row + tl.arange(0, BLOCK_M), col + w_rows, M, 2 * N if IS_GATED else N, K,
            stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_K,
        )  # fmt: skip

    if IS_GATED:
        h, up = halves(h)
        up_slices = slices(up)
    h_slices = slices(h)
    for i in tl.static_range(len(h_slices)):
        _epilogue(
            h_slices[i], up_slices[i] if IS_GATED else None,
            bias_ptr, residual_ptr, seed_ptr, h_ptr, out_ptr,
            row, col + i * h_slices[i].shape[1], M, N, dropout_p, ACTIVATION,
        )  # fmt: skip


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    h: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    use_descriptors: bool = False,
) -> Tensor:
    """`residual + dropout(act(x weight^T + bias))` of matrices; writes what is activated into `h` if it is given.

    The residual may be wider than the others; then so is the result. There is dropout if there is a seed.

    The variant with descriptors is not used anywhere yet: it waits for a GPU run that shows it faster. It needs K
    contiguous, and addresses and strides of rows that are multiples of 16 bytes.
    """
    M, K = x.shape
    N = weight.shape[0] // (2 if activation == "swiglu" else 1)
    out = x.new_empty(M, N, dtype=torch.result_type(x, x if residual is None else residual))
    if out.numel() == 0:
        return out
    # both have the layout of the output already, but for odd callers
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()

    def grid(config: dict[str, Any]) -> tuple[int]:
        width = config["BLOCK_N"] // (2 if activation == "swiglu" else 1)
        return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, width),)

    if use_descriptors:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device)
        )
    _linear_kernel[grid](
        x, weight, bias, residual, seed, h, out,
        M, N, K, *x.stride(), *weight.stride(), dropout_p, size_class(M, N),
        ACTIVATION=activation, USE_DESCRIPTORS=use_descriptors, PRECISION=dot_precision(),
    )  # fmt: skip
    return out


@torch.library.custom_op("leangpt_triton::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return fused_linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_dx, needs_dw, needs_db = ctx.needs_input_grad
    return (
        dy @ weight if needs_dx else None,
        dy.T @ x if needs_dw else None,
        dy.sum(0) if needs_db else None,
    )


_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
