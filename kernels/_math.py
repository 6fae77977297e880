"""Scalar functions for the kernels, float32, accurate relative to their value near zero without libdevice."""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """``exp(x) − 1``: its Taylor polynomial of degree 7 up to |x| = 1/4 (next term 2e-9 of x), the plain form above."""
    series = 1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(1.4426950408889634 * x) - 1)  # tl.exp also guards denormals


@triton.jit
def tanh(x):
    """``tanh(x)``: its odd series up to |x| = 1/5 (next term 6e-8 of x), exponentials above; never overflows."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    decay = tl.exp(-2 * tl.abs(x))
    plain = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -plain, plain))


@triton.jit
def tanh_difference(tanh_a, tanh_b, difference):
    """``tanh a − tanh b`` from ``difference = a − b``: ``tanh(a−b)(1 − tanh a·tanh b)``."""
    return tanh(difference) * (1 - tanh_a * tanh_b)
