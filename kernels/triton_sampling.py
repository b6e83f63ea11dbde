# pyright: reportArgumentType=false
"""Drawing tokens in Triton: filters and draw of a row in one program, without a sort; the token is the reference's.

A logit becomes an integer of the same order, its key. What a filter keeps begins at a key:
- top_k: the largest key that at least k tokens reach, found two bits a pass: tokens that reach three candidates are counted;
- top_p: in the same way, with probabilities for counts, among the tokens that top_k keeps;
- min_p: from the largest logit, without a pass.
The draw is the argmax of `logits / temperature - log(noise)` over the tokens that reach all three. The row is read from memory
once: later passes find it in the caches.

The outcome is that of float64, but little is computed in it. Sums and draws are float32, and done again in float64 where
that leaves the outcome open: for candidates whose probability is within `MASS_MARGIN` of top_p, and for chunks of the row
with a token within `DRAW_MARGIN` of the best one before them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_KEY = tl.constexpr(-(2**31))
GREATEST_KEY = tl.constexpr(2**31 - 1)
# many times the errors of float32: at most 1e-5 of a sum of probabilities, 2e-5 of a draw
MASS_MARGIN = tl.constexpr(1e-4)
DRAW_MARGIN = tl.constexpr(1e-3)
# leading bits of a key in which two logits can differ; as float32, float16 has 10 bits behind sign and exponent
KEY_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 20}


@triton.jit
def _key_of(x):
    """The same for 0 and -0; NaN comes last, as torch orders it."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), GREATEST_KEY)


@triton.jit
def _logit_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, tokens, vocab_size):
    """Logits and keys; beyond the row -inf and a key below all others."""
    mask = tokens < vocab_size
    x = tl.load(row_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
    return x, tl.where(mask, _key_of(x), LEAST_KEY)


@triton.jit
def _find_best(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """The largest key, and the first token that has it."""
    best_keys = tl.full((BLOCK,), LEAST_KEY, tl.int32)
    best_tokens = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        _, keys = _load(row_ptr, tokens, vocab_size)
        best_tokens = tl.where(keys > best_keys, tokens, best_tokens)
        best_keys = tl.maximum(keys, best_keys)
    key = tl.max(best_keys)
    return key, tl.min(tl.where(best_keys == key, best_tokens, vocab_size))


@triton.jit
def _sums(
    row_ptr, vocab_size, floor, key, step, best, temperature,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens that reach `floor` weigh, and those that also reach one, two or three steps above `key`.

    A token weighs 1 for an integer DTYPE, else exp((logit - best) / temperature).
    """
    total = tl.zeros((BLOCK,), DTYPE)
    above1 = tl.zeros((BLOCK,), DTYPE)
    above2 = tl.zeros((BLOCK,), DTYPE)
    above3 = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, vocab_size, BLOCK):
        x, keys = _load(row_ptr, start + tl.arange(0, BLOCK), vocab_size)
        if DTYPE.is_floating():
            weights = tl.exp((x.to(DTYPE) - best.to(DTYPE)) / temperature.to(DTYPE))
        else:
            weights = tl.full((BLOCK,), 1, DTYPE)
        weights = tl.where(keys >= floor, weights, 0)
        total += weights
        above1 += tl.where(keys >= key + step, weights, 0)
        above2 += tl.where(keys >= key + 2 * step, weights, 0)
        above3 += tl.where(keys >= key + 3 * step, weights, 0)
    return tl.sum(total), tl.sum(above1), tl.sum(above2), tl.sum(above3)


@triton.jit
def _num_reaching(above1, above2, above3, needed):
    return (above1 >= needed).to(tl.int32) + (above2 >= needed) + (above3 >= needed)


@triton.jit
def _find_top_k(row_ptr, vocab_size, top_k, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that at least k tokens reach."""
    key = tl.full((), LEAST_KEY, tl.int32)
    for i in range(KEY_BITS // 2):
        step = tl.full((), 1, tl.int32) << (30 - 2 * i)
        _, above1, above2, above3 = _sums(
            row_ptr, vocab_size, LEAST_KEY, key, step, 0.0, 1.0, tl.int32, BLOCK
        )
        key += step * _num_reaching(above1, above2, above3, top_k)
    return key


@triton.jit
def _find_top_p(
    row_ptr, vocab_size, floor, best, temperature, top_p,
    KEY_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key such that what reaches it has at least p of the probability of all that reaches `floor`."""
    key = tl.full((), LEAST_KEY, tl.int32)
    for i in range(KEY_BITS // 2):
        step = tl.full((), 1, tl.int32) << (30 - 2 * i)
        total, above1, above2, above3 = _sums(
            row_ptr, vocab_size, floor, key, step, best, temperature, tl.float32, BLOCK
        )
        needed = top_p * total
        closest = tl.minimum(tl.abs(above1 - needed), tl.abs(above2 - needed))
        closest = tl.minimum(closest, tl.abs(above3 - needed))
        if closest > MASS_MARGIN * total:
            num_reaching = _num_reaching(above1, above2, above3, needed)
        else:
            exact_total, exact1, exact2, exact3 = _sums(
                row_ptr, vocab_size, floor, key, step, best, temperature, tl.float64, BLOCK
            )
            num_reaching = _num_reaching(exact1, exact2, exact3, top_p * exact_total)
        key += step * num_reaching
    return key


@triton.jit
def _find_min_p(best, temperature, min_p):
    """The least key of a logit with `logit / temperature >= best / temperature + log(min_p)`, as float64 rounds it."""
    least = best.to(tl.float64) / temperature + tl.log(min_p)
    # the product is rounded otherwise than the quotient: the key is one of those around it
    keys = _key_of((least * temperature).to(tl.float32)) - 4 + tl.arange(0, 8)
    is_kept = _logit_of(keys).to(tl.float64) / temperature >= least
    return tl.min(tl.where(is_kept, keys, GREATEST_KEY))


@triton.jit
def _random_words(start, seed, sample_index, position, BLOCK: tl.constexpr):
    """Word v % 4 of Philox4x32-10 at counter (v // 4, position, sample_index, 0) for the tokens v from `start` on."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = tl.philox(
        seed, counter, position.to(tl.uint32), sample_index.to(tl.uint32), tl.zeros((), tl.uint32)
    )
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def _log_noise(words):
    """log(-log(1 - u)) with u = (word + 1/2) / 2^32, float32."""
    u = (words.to(tl.float32) + 0.5) * 2.0**-32
    complement = ((~words).to(tl.float32) + 0.5) * 2.0**-32
    series = u + u * u * (0.5 + u * (1 / 3))  # a logarithm near 1 is absolute in its error
    return tl.log(tl.where(u < 1 / 64, series, -tl.log(complement)))


@triton.jit
def _log_noise_float64(words):
    complement = ((~words).to(tl.float64) + 0.5) * 2.0**-32  # 1 - u without rounding
    return tl.log(-tl.log(complement))


@triton.jit
def _draw(
    row_ptr, vocab_size, least_key, best, temperature, seed, sample_index, position,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The argmax, the first of equals, of `logit / temperature - log(noise)` over the tokens that reach `least_key`."""
    # quotients so large that float64 rounds the noise away tie, and are told apart by none of it
    margin = DRAW_MARGIN + 1e-15 * tl.abs(best.to(tl.float64) / temperature)
    highest = float("-inf")
    highest_float64 = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x, keys = _load(row_ptr, tokens, vocab_size)
        is_kept = keys >= least_key
        if tl.max(keys) >= least_key:
            words = _random_words(start, seed, sample_index, position, BLOCK)
            drawn = (x - best) / temperature.to(tl.float32) - _log_noise(words)
            highest_here = tl.max(tl.where(is_kept, drawn, float("-inf")))
            if highest_here >= highest - margin:
                highest = tl.maximum(highest, highest_here)
                drawn_float64 = x.to(tl.float64) / temperature - _log_noise_float64(words)
                drawn_float64 = tl.where(is_kept, drawn_float64, float("-inf"))
                highest_float64_here = tl.max(drawn_float64)
                if highest_float64_here > highest_float64:
                    highest_float64 = highest_float64_here
                    is_highest = drawn_float64 == highest_float64_here
                    token = tl.min(tl.where(is_highest, tokens, vocab_size))
    return token


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sample_index_ptr, position_ptr, out_ptr,
    stride_logits, vocab_size, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    best_key, token = _find_best(row_ptr, vocab_size, BLOCK)
    best = _logit_of(best_key)
    if (temperature > 0) & (tl.abs(best) < float("inf")):
        temperature = tl.maximum(temperature, 1e-30)  # which float32 can divide by
        least_key = tl.full((), LEAST_KEY, tl.int32)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < vocab_size):
            least_key = _find_top_k(row_ptr, vocab_size, top_k, KEY_BITS, BLOCK)
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        if top_p < 1:
            top_p_key = _find_top_p(
                row_ptr, vocab_size, least_key, best, temperature, top_p, KEY_BITS, BLOCK
            )
            least_key = tl.maximum(least_key, top_p_key)
        min_p = tl.load(min_p_ptr + row).to(tl.float64)
        if min_p > 0:
            least_key = tl.maximum(least_key, _find_min_p(best, temperature, min_p))
        least_key = tl.minimum(least_key, best_key)  # the best is kept, however a filter is rounded
        seed = tl.load(seed_ptr + row)
        sample_index = tl.load(sample_index_ptr + row)
        position = tl.load(position_ptr + row)
        token = _draw(
            row_ptr, vocab_size, least_key, best, temperature, seed, sample_index, position, BLOCK
        )
    tl.store(out_ptr + row, token.to(tl.int64))


@torch.library.custom_op("leangpt_triton::sample", mutates_args=())
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    position: Tensor,
) -> Tensor:
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    settings = (temperature, top_k, top_p, min_p, seed, sample_index, position)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    vocab_size = logits.shape[1]
    block = 1024 if vocab_size <= 1024 else 2048
    if len(logits):  # 8 logits a thread: 16-byte loads, where 16 divides the vocabulary
        _sample_kernel[(len(logits),)](
            logits, *(s.contiguous() for s in settings), tokens, logits.stride(0), vocab_size,
            KEY_BITS[logits.dtype], block, num_warps=block // 256,
        )  # fmt: skip
    return tokens


@sample.register_fake
def _(logits: Tensor, *settings: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)
