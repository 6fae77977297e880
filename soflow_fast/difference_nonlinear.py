"""The differences of nonlinear operators: functions of every number alone, norms, softmax and attention."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soflow_fast.difference_rules import RULES, Rule, aten, bilinear, like, refuse, rule_for, without_half
from soflow_fast.kernels import reference_difference as reference
from soflow_fast.kernels.reference_difference import LARGE_CHANGE, softmax_difference

# The largest head dim that the fused kernel of attention's difference takes in every dtype.
_FUSED_HEAD_DIM = 80

# ----------------------------------------------------------------------------- functions of every number alone


def _of_a_number(rule: Callable[[Tensor, Tensor, bool], Tensor]) -> Rule:
    """A rule from ``f(x+d) − f(x)`` as a function of x, d and tangent."""

    def apply(operator, out, arguments, differences, tangent, **keywords):
        return like(rule(*without_half(arguments[0], differences[0]), tangent), out)

    return apply


def _quotient(change: Tensor, by: Tensor) -> Tensor:
    """0 where nothing changes, also by 0."""
    return torch.where(change == 0, 0, change / by)


def _root_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    root = torch.sqrt(x)
    return _quotient(d, 2 * root if tangent else root + torch.sqrt(x + d))


def _rsqrt_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    root, moved = torch.sqrt(x), torch.sqrt(x if tangent else x + d)
    return _quotient(-d, root * moved * (root + moved))


def _sigmoid_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    """``−expm1(−d) σ(x+d) σ(−x)``; of changes so large that this overflows, the subtraction."""
    if tangent:
        return d * torch.sigmoid(x) * torch.sigmoid(-x)
    moved = torch.sigmoid(x + d)
    change = -reference.expm1(-d.clamp(min=-LARGE_CHANGE)) * moved * torch.sigmoid(-x)
    return torch.where(d < -LARGE_CHANGE, moved - torch.sigmoid(x), change)


def _exp_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    """``e^x expm1(d)``; of changes so large that this overflows, the subtraction."""
    if tangent:
        return torch.exp(x) * d
    change = torch.exp(x) * reference.expm1(d.clamp(max=LARGE_CHANGE))
    return torch.where(d > LARGE_CHANGE, torch.exp(x + d) - torch.exp(x), change)


def _sin_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return torch.cos(x) * d if tangent else 2 * torch.cos(x + d / 2) * torch.sin(d / 2)


def _cos_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return -torch.sin(x) * d if tangent else -2 * torch.sin(x + d / 2) * torch.sin(d / 2)


def _tanh_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    tanh = torch.tanh(x)
    if tangent:
        return d * (1 - tanh * tanh)
    return reference.tanh_difference(torch.tanh(x + d), tanh, d)


def _square_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return d * (2 * x if tangent else 2 * x + d)


RULES |= {
    aten.sqrt: _of_a_number(_root_difference),
    aten.rsqrt: _of_a_number(_rsqrt_difference),
    aten.sin: _of_a_number(_sin_difference),
    aten.cos: _of_a_number(_cos_difference),
    aten.tanh: _of_a_number(_tanh_difference),
    aten.sigmoid: _of_a_number(_sigmoid_difference),
    aten.exp: _of_a_number(_exp_difference),
    aten.log: _of_a_number(lambda x, d, tangent: d / x if tangent else torch.log1p(d / x)),
    aten.silu: _of_a_number(lambda x, d, tangent: reference.silu_difference(x, d, tangent=tangent)),
    aten.square: _of_a_number(_square_difference),
}


@rule_for(
    *(aten.relu6, aten.elu, aten.celu, aten.selu, aten.softplus, aten.mish, aten.hardswish, aten.hardtanh),
    *(aten.hardsigmoid, aten.log_sigmoid, aten.threshold, aten.nan_to_num, aten.clamp, aten.clamp_min, aten.clamp_max),
    *(aten.erf, aten.erfc, aten.polar, aten.log1p, aten.log2, aten.log10, aten.exp2, aten.expm1, aten.tan, aten.atan),
    *(aten.sinh, aten.cosh, aten.asinh, aten.floor, aten.ceil, aten.round, aten.sign, aten.prelu, aten.atan2),
    *(aten.logaddexp, aten.maximum, aten.minimum, aten.amax, aten.amin, aten.max, aten.min, aten.sort, aten.topk),
    *(aten.prod, aten.cumprod, aten.logsumexp),
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.adaptive_max_pool2d),
)
def _in_float64(operator, out, arguments, differences, tangent, **keywords):
    """Of what has no form of its own: float64 has the digits that a subtraction loses.

    Where the output is values and their indices, only the values have a difference.
    """
    if not isinstance(out, Tensor):

        def values(*arguments, **keywords):
            return operator(*arguments, **keywords)[0]

        return _in_float64(values, out[0], arguments, differences, tangent, **keywords), None
    keywords.pop("dtype", None)  # in which the values would be rounded before they are subtracted
    values = [_double(x) if isinstance(x, Tensor) else x for x in arguments]
    moving = [i for i, d in enumerate(differences) if d is not None]

    def function(*moved):
        full = list(values)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        return operator(*full, **keywords)

    x, d = (tuple(_double(y[i]) for i in moving) for y in (arguments, differences))
    if tangent:
        return torch.func.jvp(function, x, d)[1].to(out.dtype)
    return (function(*map(torch.add, x, d)) - function(*x)).to(out.dtype)


def _double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


@rule_for(aten.relu, aten.leaky_relu, aten.abs)
def _bent_at_zero(operator, out, arguments, differences, tangent):
    """``s'd + (s'−s)x`` of slopes s: what is subtracted is no larger than d, so that float32 is enough."""
    packet, (x, d) = operator.overloadpacket, without_half(arguments[0], differences[0])
    if x.is_complex():
        return _in_float64(operator, out, arguments, differences, tangent)
    below = 0 if packet is aten.relu else (*arguments, 0.01)[1]

    def slope(x: Tensor) -> Tensor:
        return x.sign() if packet is aten.abs else torch.where(x > 0, torch.ones_like(x), below)

    here, moved = slope(x), slope(x if tangent else x + d)
    return like(torch.where(moved == here, moved * d, moved * d + (moved - here) * x), out)  # x may be infinite


@rule_for(aten.pow)
def _pow(operator, out, arguments, differences, tangent):
    (x, exponent), d = arguments, differences[0]
    if isinstance(exponent, (int, float)) and exponent in (2, 0.5, -0.5):
        rule = {2: _square_difference, 0.5: _root_difference, -0.5: _rsqrt_difference}[exponent]
        return like(rule(*without_half(x, d), tangent), out)
    return _in_float64(operator, out, arguments, differences, tangent)


@rule_for(aten.gelu)
def _gelu(operator, out, arguments, differences, tangent, approximate="none"):
    if approximate == "tanh":
        return like(reference.gelu_difference(*without_half(arguments[0], differences[0]), tangent=tangent), out)
    return _in_float64(operator, out, arguments, differences, tangent)


# ------------------------------------------------------------------------------- norms, softmax and attention


def norm_difference(
    x: Tensor,
    d: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    centred: bool,
    tangent: bool,
    shape: Sequence[int] | None = None,
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
) -> Tensor:
    """The difference of LayerNorm, or without centring of RMSNorm, over the last axis; float32 or wider.

    Args:
        x, d: (..., D); None for a d of zero. shape: given to the normalized x, by default its own.
        weight, d_weight, d_bias: that broadcast with the shape, or None.
    """
    x, d = without_half(x, torch.zeros_like(x) if d is None else d)
    if centred:
        x, d = (y - y.mean(-1, keepdim=True) for y in (x, d))
    n, dn = reference.normalized_difference(x, d, eps=eps, tangent=tangent)
    shape = x.shape if shape is None else shape
    return _affine(n.view(shape), dn.view(shape), weight, d_weight, d_bias, tangent)


def _affine(n: Tensor, dn: Tensor, weight, d_weight, d_bias, tangent: bool) -> Tensor:
    """``dn(w+dw) + n dw + db``, the difference of ``n w + b``; any but n and dn may be None."""
    change = dn if weight is None else bilinear(torch.mul, n, weight, dn, d_weight, tangent)
    return change if d_bias is None else change + d_bias


def _over(axes: int, out: Tensor, x: Tensor, weight: Tensor | None, differences: Sequence, **options) -> Tensor:
    """:func:`norm_difference` over that many of the last axes; differences of x, weight and bias."""
    d, d_weight, d_bias = (*differences, None, None)[:3]
    x, d = (None if y is None else y.flatten(-axes) for y in (x, d))
    options = {**options, "shape": out.shape, "d_weight": d_weight, "d_bias": d_bias}
    return like(norm_difference(x, d, weight, **options), out)


def rms_eps(x: Tensor) -> float:
    """The eps of :func:`torch.rms_norm` where none is given."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


@rule_for(aten.layer_norm)
def _layer_norm(operator, out, arguments, differences, tangent):
    x, shape, weight, _, eps, *_ = (*arguments, None, None, 1e-5)[:5]
    moving = (differences[0], *differences[2:4])
    return _over(len(shape), out, x, weight, moving, eps=eps, centred=True, tangent=tangent)


@rule_for(aten.rms_norm)
def _rms_norm(operator, out, arguments, differences, tangent):
    x, shape, weight, eps = (*arguments, None, None)[:4]
    eps = rms_eps(x) if eps is None else eps
    moving = (differences[0], *differences[2:3])
    return _over(len(shape), out, x, weight, moving, eps=eps, centred=False, tangent=tangent)


@rule_for(aten.group_norm)
def _group_norm(operator, out, arguments, differences, tangent):
    x, groups, weight, _, eps = (*arguments, None, None, 1e-5)[:5]
    d, d_weight, d_bias = (differences[0], *differences[2:4], None, None)[:3]
    grouped = (None if y is None else y.unflatten(1, (groups, -1)).flatten(2) for y in (x, d))
    weight, d_weight, d_bias = (_of_channels(y, out) for y in (weight, d_weight, d_bias))
    options = {"eps": eps, "shape": out.shape, "d_weight": d_weight, "d_bias": d_bias}
    return like(norm_difference(*grouped, weight, centred=True, tangent=tangent, **options), out)


def _of_channels(y: Tensor | None, out: Tensor) -> Tensor | None:
    return None if y is None else y.view(-1, *[1] * (out.ndim - 2))


@rule_for(aten.instance_norm)
def _instance_norm(operator, out, arguments, differences, tangent):
    x, weight, bias, _, _, of_the_sample, _, eps, _ = arguments
    if not of_the_sample:
        refuse(operator, "has no rule for statistics of other samples")
    d, d_weight, d_bias = differences[:3]
    return _group_norm(operator, out, (x, x.shape[1], weight, bias, eps), (d, None, d_weight, d_bias), tangent)


@rule_for(aten._native_batch_norm_legit_no_training)
def _batch_norm(operator, out, arguments, differences, tangent):
    """Of an evaluation: the statistics stay."""
    if any(d is not None for d in differences[3:]):
        refuse(operator, "has no rule for statistics that change")
    (x, weight, _, mean, variance, _, eps), (d, *moving) = arguments, differences[:3]
    x, d = without_half(x, torch.zeros_like(x) if d is None else d)
    mean, scale, weight, *moving = (_of_channels(y, x) for y in (mean, torch.rsqrt(variance + eps), weight, *moving))
    return like(_affine((x - mean) * scale, d * scale, weight, *moving, tangent), out[0]), None, None


@rule_for(aten.var, aten.var_mean, aten.std, aten.std_mean)
def _variance(operator, out, arguments, differences, tangent, **keywords):
    """A variance is quadratic, ``v(x+d) − v(x) = v'(x) d + v(d)``; of its root see the square root."""
    packet = operator.overloadpacket
    x, d = without_half(arguments[0], differences[0])
    variance = getattr(aten.var, operator._overloadname)

    def of(x: Tensor) -> Tensor:
        return variance(x, *arguments[1:], **keywords)

    change = torch.func.jvp(of, (x,), (d,))[1]
    if not tangent:
        change = change + of(d)
    if packet in (aten.std, aten.std_mean):
        root = of(x).sqrt()
        change = _quotient(change, root + (root if tangent else of(x + d).sqrt()))
    if isinstance(out, Tensor):
        return like(change, out)
    return like(change, out[0]), operator(differences[0], *arguments[1:], **keywords)[1]


@rule_for(aten.linalg_vector_norm)
def _norm(operator, out, arguments, differences, tangent, **keywords):
    """``(Σ 2 Re(x̄d) + |d|²)/(|x+d| + |x|)`` of the Euclidean norm."""
    order, dims, keep = (*arguments[1:], *(2, None, False)[len(arguments) - 1 :])
    if order != 2:
        return _in_float64(operator, out, arguments, differences, tangent, **keywords)
    x, d = without_half(arguments[0], differences[0])
    dims = tuple(range(x.ndim)) if dims is None else dims
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=keep)
    moved = norm if tangent else torch.linalg.vector_norm(x + d, dim=dims, keepdim=keep)
    change = (x.conj() * d).real * 2 + (0 if tangent else d.abs().square())
    return like(_quotient(change.sum(dims, keep), norm + moved), out)


@rule_for(aten.softmax, aten._safe_softmax)
def _softmax(operator, out, arguments, differences, tangent, **keywords):
    x, d = without_half(arguments[0], differences[0])
    dim = arguments[1]
    return like(softmax_difference(aten._safe_softmax(x, dim), x, d, dim=dim, tangent=tangent), out)


@rule_for(aten.log_softmax)
def _log_softmax(operator, out, arguments, differences, tangent, **keywords):
    """``d − c − log(1+Z)``, c and Z as in :func:`softmax_difference`; of large changes, the subtraction."""
    x, d = without_half(arguments[0], differences[0])
    dim = arguments[1]
    p = torch.softmax(x, dim)
    centred = d - (p * d).sum(dim, keepdim=True)
    if tangent:
        return like(centred, out)
    z = (p * reference.expm1(centred.clamp(max=LARGE_CHANGE))).sum(dim, keepdim=True)
    large = centred.amax(dim, keepdim=True) > LARGE_CHANGE
    subtracted = torch.log_softmax(x + d, dim) - torch.log_softmax(x, dim)
    return like(torch.where(large, subtracted, centred - torch.log1p(z)), out)


@rule_for(aten.scaled_dot_product_attention)
def _attention(operator, out, arguments, differences, tangent, ops=reference, scale=None, enable_gqa=False, **options):
    names = ("attn_mask", "dropout_p", "is_causal")
    options = {**dict(zip(names, arguments[3:], strict=False)), **options}
    d_mask = (*differences, None)[3]
    q, k, v = (x.to(out.dtype) for x in arguments[:3])
    pairs = zip((q, k, v), differences[:3], strict=True)
    dq, dk, dv = (torch.zeros_like(x) if d is None else d.to(out.dtype) for x, d in pairs)
    if enable_gqa:
        k, v, dk, dv = (_for_every_head(x, q) for x in (k, v, dk, dv))
    h = q.shape[-1]
    if scale is not None:  # in place of the 1/√h of the ops
        q, dq = (x * (scale * math.sqrt(h)) for x in (q, dq))
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    if mask is not None or causal:
        return like(_masked_attention(*without_half(q, k, v, dq, dk, dv, mask, d_mask), causal, tangent), out)
    if out.ndim != 4 or h > _FUSED_HEAD_DIM or not q.shape == k.shape == v.shape:
        ops = reference
    return ops.attention_difference(q, k, v, dq, dk, dv, out, tangent=tangent).to(out.dtype)


def _for_every_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of groups of heads, one of each group for all of it."""
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _masked_attention(
    q, k, v, dq, dk, dv, mask: Tensor | None, d_mask: Tensor | None, causal: bool, tangent: bool
) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    scores = _scores(q, k, mask, causal, scale)
    p = aten._safe_softmax(scores, -1)  # 0 where all is masked
    change = bilinear(torch.matmul, q, k.mT, dq, dk.mT, tangent) * scale
    change = change if d_mask is None else change + d_mask
    dp = softmax_difference(p, scores, change, tangent=tangent)
    return bilinear(torch.matmul, p, v, dp, dv, tangent)


def attention_with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention by simpler operators, where a difference needs the mask that is drawn inside it.

    Without dropout it is NotImplemented, by which torch keeps its own.
    """
    if not dropout_p:
        return NotImplemented
    if enable_gqa:
        k, v = (_for_every_head(x, q) for x in (k, v))
    scores = _scores(q, k, attn_mask, is_causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return torch.dropout(aten._safe_softmax(scores, -1), dropout_p, True) @ v
