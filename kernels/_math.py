"""Scalar functions for the kernels, float32, accurate relative to their value near zero without libdevice."""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """``exp(x) − 1``: its Taylor polynomial of degree 7 up to |x| = 1/4 (next term 2e-9 of x), the plain form above."""
    series = 1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(1.4426950408889634 * x) - 1)  # tl.exp also guards denormals


@triton.jit
def sin_cos(x):
    """``(sin x, cos x)`` for |x| up to 1e4, the sine accurate relative to its value near zero (the hardware's is not).

    The nearest multiple of π/2, in three parts, is taken off; then the Taylor polynomials up to |r| = π/4 (next terms
    2e-9 and 2e-9).
    """
    quarters = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - quarters * 1.5703125) - quarters * 4.837512969970703e-4) - quarters * 7.549789954891882e-8
    square = r * r
    sine = r + r * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    cosine = -1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square * (1 / 3628800))))
    cosine = 1 + square * cosine
    quadrant = quarters.to(tl.int32)
    swap = quadrant % 2 != 0
    sin = tl.where(swap, cosine, sine)
    cos = tl.where(swap, sine, cosine)
    return tl.where(quadrant & 2 != 0, -sin, sin), tl.where((quadrant + 1) & 2 != 0, -cos, cos)


@triton.jit
def log(x):
    """``ln x`` of a normal x > 0, accurate relative to its value near 1 too (the hardware's is not).

    ``x = 2^e m`` with m in [√½, √2), and ``ln m = 2 artanh((m−1)/(m+1))`` by its series (next term 2e-9).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of √½
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (m - 1) / (m + 1)
    square = s * s
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    return exponent.to(tl.float32) * 0.6931471805599453 + 2 * s * series
