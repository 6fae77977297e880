"""GELU and SiLU, their slopes and their differences, in few instructions: with 7 a byte memory has to wait for them.

Both are ``g(u) = uσ(b)`` with ``σ(b) = 1/(1 + 2^(−b))``: for SiLU ``b = u log₂e``, for the tanh GELU
``b = 2√(2/π)(u + κu³) log₂e``, κ = 0.044715. With ``B = 2^(−b)``, ``W = 2^w`` and ``w = b(u') − b(u)``:

    slope        σ + u·b'(u)·ln 2·σ(1−σ)
    difference   g(u') − g(u) = (B·(u'W − u) + du·W) / ((1 + B)(B + W))

where ``u'W − u = du + u'(W − 1)``, by a series of W − 1 where w is small. Everything is float32. A division and
``tl.exp`` guard against what cannot occur here, with three or four instructions each; ``tl.rsqrt`` and ``tl.exp2`` do
not.
"""

import triton
import triton.language as tl

# of −b, and of b's slope times ln 2
_SILU = tl.constexpr(-1.4426950408889634)
_GELU, _GELU_CUBIC = tl.constexpr(-2.302208198144325), tl.constexpr(-0.1029432395800235)
_SLOPE, _SLOPE_CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.21406644881780076)

#: where σ is 0 or 1, next to what it is added to; the product of three powers of it and of u' up to 1e11 is finite
_FAR = tl.constexpr(30.0)


@triton.jit
def _reciprocal(x):
    """``1/x`` of a positive normal x."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _minus_b(u, GELU: tl.constexpr):
    return u * (u * u * _GELU_CUBIC + _GELU) if GELU else u * _SILU


@triton.jit
def _decay(u, GELU: tl.constexpr):
    return tl.exp2(tl.minimum(_minus_b(u, GELU), 100.0))


@triton.jit
def gelu(u):
    """The tanh GELU."""
    return u * _reciprocal(1 + _decay(u, True))


@triton.jit
def value_and_slope(u, GELU: tl.constexpr):
    """``(g, g')``."""
    decay = _decay(u, GELU)
    sigmoid = _reciprocal(1 + decay)
    g = u * sigmoid
    change = g * (decay * sigmoid)
    if GELU:
        change = change * (u * u * _SLOPE_CUBIC + _SLOPE)
    return g, change + sigmoid


@triton.jit
def _near(b):
    return tl.minimum(tl.maximum(b, -_FAR), _FAR)


@triton.jit
def difference(u, du, GELU: tl.constexpr, TANGENT: tl.constexpr, EXACT: tl.constexpr):
    """``g(u + du) − g(u)`` or ``g'(u)·du``, for float32 results if EXACT, else for those in half precision.

    The error in float32 is at most 7e-7 of du, exp2 and rsqrt being within 2^-22.5 and 2^-22.9 as on a GPU.
    """
    if TANGENT:
        return du * value_and_slope(u, GELU)[1]
    moved = u + du
    minus_b = _minus_b(u, GELU)
    w = du * ((u * u + moved * (u + moved)) * -_GELU_CUBIC - _GELU if GELU else -_SILU)
    near, moved_near = _near(minus_b), _near(minus_b - w)
    w = tl.where((near == minus_b) & (moved_near == minus_b - w), w, near - moved_near)
    decay, power = tl.exp2(near), tl.exp2(w)
    # 2^w − 1 to 4e-8, or to 1e-5 for half precision
    if EXACT:
        series = 0.009618129107628477 + w * (0.0013333558146428441 + w * 0.00015403530393381606)
        series = w * (0.6931471805599453 + w * (0.2402265069591007 + w * (0.055504108664821576 + w * series)))
        small = tl.abs(w) < 0.35
    else:
        series = w * (0.6931471805599453 + w * (0.2402265069591007 + w * 0.055504108664821576))
        small = tl.abs(w) < 0.09
    change = tl.where(small, du + moved * series, moved * power - u)
    return (decay * change + du * power) * _reciprocal((1 + decay) * (decay + power))
