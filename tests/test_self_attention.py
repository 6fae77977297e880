"""Fused self-attention: projection and attention, whose backward writes the gradient of the projection at once."""

import pytest
import torch
from op_checks import DEVICE, check_accuracy, check_autocast, check_compiles, check_repeatable, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast.kernels import fused, reference, self_attention
from soflow_fast.kernels._launch import recording

NAME, GRADIENTS = "self_attention", ("h", "weight", "bias")
# rows, tokens, heads, head dim: heads of B, L and XL, blocks of tokens and a part of one, odd sizes, and one token
SHAPES = (
    *((2, 64, 2, 64), (2, 49, 1, 72), (1, 128, 2, 64), (1, 130, 1, 72), (1, 96, 2, 80)),
    *((2, 7, 3, 13), (1, 33, 2, 8), (3, 1, 2, 16)),
)


def _inputs(rows, tokens, heads, head_dim, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    width = heads * head_dim
    values = {
        "h": torch.randn(rows, tokens, width, generator=generator),
        "weight": scale * torch.randn(3 * width, width, generator=generator) * width**-0.5,
        "bias": torch.randn(3 * width, generator=generator),
    }
    return {name: x.to(DEVICE, dtype) for name, x in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype):
    check_accuracy(NAME, _inputs(*shape, dtype), {"heads": shape[2]}, GRADIENTS)


@pytest.mark.parametrize("shape", [(1, 20, 1, 128), (1, 70, 1, 96), (1, 128, 1, 128)])
def test_wide_heads(shape):
    check_accuracy(NAME, _inputs(*shape, torch.bfloat16), {"heads": shape[2]}, GRADIENTS)


def test_peaked_attention():
    """Scores of hundreds: the softmax is 0 or 1 and nothing overflows."""
    check_accuracy(NAME, _inputs(2, 40, 2, 16, scale=15.0), {"heads": 2}, GRADIENTS)


def test_more_tokens_than_a_block_in_each_kernel():
    check_accuracy(NAME, _inputs(1, 200, 1, 32, torch.bfloat16), {"heads": 1}, GRADIENTS)


@pytest.mark.parametrize("needed", GRADIENTS)
def test_one_gradient_alone(needed):
    check_accuracy(NAME, _inputs(2, 7, 3, 13), {"heads": 3}, (needed,))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 7, 3, 13), torch.float32), ((2, 33, 2, 8), torch.float32), ((2, 70, 1, 72), torch.bfloat16)],
)
def test_biases_of_keys_and_values(shape, dtype):
    """Of the keys' the gradient is exactly 0, as it changes no output; of the values' it is what arrives, summed."""
    arguments = _inputs(*shape, dtype)
    o, *_ = fused.self_attention(**{**arguments, "bias": arguments["bias"].requires_grad_()}, heads=shape[2])
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o)
    of_queries, of_keys, of_values = torch.autograd.grad(o, arguments["bias"], do)[0].chunk(3)
    assert of_queries.all()
    assert not of_keys.any()
    torch.testing.assert_close(of_values, do.double().sum((0, 2)).flatten().to(dtype))


def test_strided_gradients():
    """``.sum().backward()`` sends a gradient of stride 0; a slice sends one with gaps."""
    arguments, generator = _inputs(2, 5, 2, 8), torch.Generator().manual_seed(0)
    expanded = torch.randn((), generator=generator).expand(2, 2, 5, 8)
    sliced = torch.randn(2, 2, 5, 16, generator=generator)[..., ::2]
    for gradient in (expanded, sliced):
        check_accuracy(NAME, arguments, {"heads": 2}, GRADIENTS, output_gradients=(gradient,))


def test_queries_keys_and_values_are_views_without_gradient():
    arguments = {name: x.requires_grad_() for name, x in _inputs(2, 9, 2, 16).items()}
    o, *qkv = fused.self_attention(**arguments, heads=2)
    expected = reference.project_heads(**arguments, heads=2)
    assert o.requires_grad
    assert o.transpose(1, 2).is_contiguous()
    for ours, theirs in zip(qkv, expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs.detach())
    assert len({x.untyped_storage().data_ptr() for x in qkv}) == 1


@pytest.mark.parametrize("gradients", [(), GRADIENTS])
def test_autocast(gradients):
    check_autocast(NAME, _inputs(2, 7, 3, 13), {"heads": 3}, gradients, tolerance=2**-5)


def test_flops_are_those_of_flash_attention():
    """Three products of the projection, two of attention, and five of its backward."""
    with FlopCounterMode(display=False) as counter:
        run(fused.self_attention, _inputs(2, 16, 2, 24), {"heads": 2}, GRADIENTS)
    assert counter.get_total_flops() == 3 * 2 * (2 * 16) * 48 * 144 + (2 + 5) * 2 * (2 * 2) * 16 * 16 * 24


@pytest.mark.parametrize(("tokens", "launches"), [(64, 2), (65, 3)])
def test_one_block_of_tokens_takes_one_kernel_backward(tokens, launches):
    with recording() as records:
        h, w, b = (
            torch.empty(*shape, device="meta", dtype=torch.bfloat16) for shape in ((2, tokens, 48), (144, 48), (144,))
        )
        fused.self_attention(h.requires_grad_(), w, b, heads=2)[0].sum().backward()
    assert len(records) == launches


def test_op_contract():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 9, 3, 2, 16, generator=generator).to(DEVICE)
    torch.library.opcheck(self_attention._forward_op, (y,))
    o, lse = self_attention._forward_op(y)
    torch.library.opcheck(self_attention._backward_op, (y, o, o, lse))
    check_compiles(NAME, _inputs(2, 7, 3, 13), {"heads": 3}, GRADIENTS)
    check_repeatable(NAME, _inputs(2, 70, 2, 16), {"heads": 2}, GRADIENTS)


def test_forward_mode_raises():
    arguments = _inputs(2, 7, 3, 13)
    h = arguments.pop("h")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda h: fused.self_attention(h, **arguments, heads=3)[0], (h,), (h,))


def test_a_second_derivative_raises():
    arguments = {name: x.requires_grad_() for name, x in _inputs(2, 7, 3, 13).items()}
    o, *_ = fused.self_attention(**arguments, heads=3)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(o.sum(), arguments["h"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad .* use torch\.autograd\.grad for a first one"):
        torch.func.grad(lambda h: fused.self_attention(**{**arguments, "h": h}, heads=3)[0].sum())(arguments["h"])


def test_bad_inputs():
    with pytest.raises(ValueError, match="heads=4 does not divide the width 39"):
        fused.self_attention(**_inputs(1, 7, 3, 13), heads=4)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        fused.self_attention(**{**_inputs(1, 7, 3, 13), "bias": torch.zeros(3, device=DEVICE)}, heads=3)
    with FakeTensorMode(), pytest.raises(ValueError, match=r"head dim 96 in torch.float32 does not fit"):
        fused.self_attention(torch.empty(1, 8, 96), torch.empty(288, 96), torch.empty(288), heads=1)
    h, weight, bias = (torch.empty(shape, device="meta") for shape in ((1, 2**20, 1024), (3072, 1024), (3072,)))
    with pytest.raises(ValueError, match=r"of 1048576 tokens of width 1024 are 2\^31 numbers or more; use fewer"):
        fused.self_attention(h, weight, bias, heads=16)
