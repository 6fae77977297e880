"""Attention from the projection to queries, keys and values on, for any kernels of its forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .float8 import float8_linear
from .reference import split_heads
from .reference_float8 import Float8Rows


def projection_gradients(
    dy: Tensor, partials: Tensor, h: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """``(dh, dweight, dbias)``, those needed, of dy (B, N, 3·D) and partial sums of its columns (chunks, 3·D)."""
    dy = dy.flatten(0, 1)
    dh = (dy @ weight).view(h.shape) if needed[0] else None
    dweight = dy.mT @ h.flatten(0, 1) if needed[1] else None
    return dh, dweight, partials.sum(0).to(weight.dtype) if needed[2] else None


def count_flops(forward, backward) -> None:
    """Tells torch's FlopCounterMode of two operators of y (B, N, 3, H, h): 2 products forward, 5 backward, as flash
    attention's; that kernels may make some twice is their own affair.
    """
    for op, products in ((forward, 2), (backward, 5)):

        @register_flop_formula(op)
        def flops(y_shape, *args, products=products, out_shape=None, **kwargs) -> int:
            B, n, _, heads, h = y_shape
            return products * 2 * B * heads * n * n * h


def attention_of_projection(forward_op: Callable, backward_op: Callable) -> Callable:
    """A function ``(h, weight, bias, heads) -> (o, q, k, v)``, differentiable once, of two raw operators; h in
    float8 has no gradient.

    Args:
        forward_op: of ``y = h Wᵀ + bias`` as (B, N, 3, H, h), gives o (B, N, H, h) and what the backward wants with it.
        backward_op: of y, the gradient of o, o and that, gives dy of the shape of y, and partial sums of its columns in
            float32, (B, chunks, 3·H·h).
    """

    @torch.compiler.allow_in_graph  # else a checkpoint that is compiled keeps what it should recompute
    class SelfAttention(torch.autograd.Function):
        @staticmethod
        def forward(h, weight, bias, heads):
            y = nn.functional.linear(h, weight, bias).unflatten(-1, (3, heads, -1))
            o, lse = forward_op(y)
            return o, y, lse

        @staticmethod
        def setup_context(ctx, inputs, output):
            h, weight, _, _ = inputs
            o, y, lse = output
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(y, lse)
            ctx.save_for_backward(h, weight, o, y, lse)

        @staticmethod
        def backward(ctx, do, *_):
            if do is None:
                return (None,) * 4
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError(
                    "the fused self-attention has no second derivative, which torch.func.grad and vjp want too; use "
                    "torch.autograd.grad for a first one, or impl='torch' and attention='math'"
                )
            h, weight, o, y, lse = ctx.saved_tensors
            dy, sums = backward_op(y, do, o, lse)
            return *projection_gradients(dy.flatten(2), sums.flatten(0, 1), h, weight, ctx.needs_input_grad), None

    def attention(
        h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if isinstance(h, Float8Rows):
            y = float8_linear(h, weight, bias).unflatten(-1, (3, heads, -1))
            o, _ = forward_op(y)
        else:
            o, y, _ = SelfAttention.apply(h, weight, bias, heads)
        return o.transpose(1, 2), *split_heads(y.flatten(2), heads)

    return attention
