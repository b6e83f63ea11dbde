# pyright: reportArgumentType=false
"""The activations of the MLP in Triton, each with its derivative.

gelu_tanh: a = h s         a' = s + a (1 - s) u'      s = sigmoid(u) = (1 + tanh(u / 2)) / 2
                                                      u = sqrt(8 / pi) (h + 0.044715 h^3)
gelu:      a = h cdf(h)    a' = cdf(h) + h pdf(h)     of the standard normal distribution
relu2:     a = r^2         a' = 2 r                   r = max(0, h)
swiglu:    a = h s         a' = s + a (1 - s)         s = sigmoid(h), h is the gate; the factor `up` is the caller's
"""

import triton
import triton.language as tl


@triton.jit
def activation(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h) in float32; the compiler drops the one that is not used."""
    if ACTIVATION == "gelu_tanh":
        scale: tl.constexpr = 1.5957691216057308
        s = tl.sigmoid(scale * (h + 0.044715 * h * h * h))
        a = h * s
        slope = s + a * (1.0 - s) * (scale * (1.0 + 0.134145 * h * h))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(0.7071067811865476 * h))
        a = h * cdf
        slope = cdf + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    elif ACTIVATION == "relu2":
        r = tl.where(h < 0.0, 0.0, h)  # tl.maximum would hide NaN
        a = r * r
        slope = 2.0 * r
    else:
        tl.static_assert(ACTIVATION == "swiglu")
        s = tl.sigmoid(h)
        a = h * s
        slope = s + a * (1.0 - s)
    return a, slope
