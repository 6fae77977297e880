"""Fused difference attention."""

import pytest
import torch
import triton
import triton.language as tl
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast.kernels import attention_difference, fused, reference
from soflow_fast.kernels._attention import rounded
from soflow_fast.kernels._launch import recording

NAME = "attention_difference"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = ((torch.float32, 1e-6), (torch.float16, 7e-4), (torch.bfloat16, 6e-3))
# (rows, heads, tokens, head dim): B/4, L/2, XL/2; a tail of keys and of columns; few tokens; one key block and a bit
SHAPES = (
    (1, 2, 64, 64),
    (1, 1, 256, 64),
    (1, 1, 256, 72),
    (2, 1, 100, 72),
    (1, 2, 16, 32),
    (2, 1, 33, 40),
    (1, 1, 7, 80),
)


def _inputs(shape, dtype=torch.float32, step=1e-3, k=0.0, dk=0.0, v=0.0, dv=0.0):
    """Views of one projection of the values and one of the differences; k, dk, v, dv: size of a part all keys share."""
    b, heads, n, h = shape
    generator = torch.Generator().manual_seed(0)

    def projection(scale, common_k, common_v):
        qkv = torch.randn(b, n, 3, heads, h, generator=generator)
        qkv[:, :, 1] += common_k * torch.randn(1, 1, heads, h, generator=generator)
        qkv[:, :, 2] += common_v * torch.randn(1, 1, heads, h, generator=generator)
        return (scale * qkv).to(DEVICE, dtype).permute(2, 0, 3, 1, 4).unbind(0)

    q, k, v = projection(1.0, k, v)
    dq, dk, dv = projection(step, dk, dv)
    o = _attention(*(x.double() for x in (q, k, v))).to(dtype)
    return {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv, "o": o}


def _attention(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def _truth(arguments, tangent):
    """From two attentions in float64, or their forward derivative."""
    q, k, v, dq, dk, dv, _ = (x.double() for x in arguments.values())
    if tangent:
        return torch.func.jvp(_attention, (q, k, v), (dq, dk, dv))[1]
    return _attention(q + dq, k + dk, v + dv) - _attention(q, k, v)


def _relative_error(arguments, tangent=False):
    truth = _truth(arguments, tangent)
    return ((fused.attention_difference(**arguments, tangent=tangent) - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype, tangent):
    check_accuracy(NAME, _inputs(shape, dtype), {"tangent": tangent})


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_head_dim_128(dtype):
    check_accuracy(NAME, _inputs((1, 1, 130, 128), dtype), {})


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("step", [1.0, 0.1, 1e-3, 1e-6])
def test_error_is_relative_to_the_difference_at_every_step(step, tangent):
    """At 1e-6 the difference of two float32 attentions is off by a quarter of it."""
    assert _relative_error(_inputs((1, 2, 70, 72), step=step), tangent) < 1e-6


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize("common", [{"k": 10.0}, {"dk": 100.0}, {"k": 10.0, "dk": 10.0}], ids=str)
def test_what_all_keys_share_costs_no_accuracy(common, dtype, limit, tangent):
    """Softmax does not see it; uncentred, a dk 100 times its spread would cost two digits."""
    assert _relative_error(_inputs((1, 2, 100, 64), dtype, 1e-2, **common), tangent) < limit


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
def test_what_all_values_share_costs_no_accuracy(dtype, limit):
    """``Z·O`` and ``D/ℓ`` cancel, and with one block of keys Z vanishes."""
    assert _relative_error(_inputs((2, 2, 16, 64), dtype, 1e-3, v=10.0)) < limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_token_passes_dv_on(dtype):
    arguments = _inputs((2, 3, 1, 64), dtype)
    assert torch.equal(fused.attention_difference(**arguments), arguments["dv"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_difference_gives_exactly_none(dtype):
    arguments = _inputs((1, 1, 40, 72), dtype)
    zero = {name: torch.zeros_like(arguments[name]) for name in ("dq", "dk", "dv")}
    assert (fused.attention_difference(**{**arguments, **zero}) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_attention_stays_finite(dtype):
    """Scores in the hundreds underflow all keys but one; there only v of that key moves."""
    arguments = _inputs((1, 1, 40, 64), dtype, step=1e-2)
    arguments["q"], arguments["k"] = 12 * arguments["q"], 12 * arguments["k"]
    arguments["o"] = _attention(*(arguments[x].double() for x in "qkv")).float()  # Z·O is all that is left
    check_accuracy(NAME, arguments, {})


FULL_STEP_LIMITS = ((torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2))


@pytest.mark.parametrize(("dtype", "limit"), FULL_STEP_LIMITS)
@pytest.mark.parametrize(
    ("shape", "peak"), [*(((1, 1, 100, 64), peak) for peak in (1.0, 3.0, 6.0, 20.0)), ((1, 1, 136, 72), 3.0)]
)
def test_steps_from_one_peaked_attention_to_another(shape, peak, dtype, limit):
    """Scores change by up to hundreds: E overflows, and 1+Z is nearly 0 for queries that leave the first keys."""
    arguments = _inputs(shape, dtype, step=1.0)
    for name in ("q", "k", "dq", "dk"):
        arguments[name] = peak**0.5 * arguments[name]
    arguments["o"] = _attention(*(arguments[x].double() for x in "qkv")).to(dtype)
    assert _relative_error(arguments) < limit
    reference_error = reference.attention_difference(**arguments) - _truth(arguments, tangent=False)
    assert reference_error.norm() < limit * _truth(arguments, tangent=False).norm()


@pytest.mark.parametrize(("dtype", "limit"), FULL_STEP_LIMITS[:2])
def test_the_second_kernel_is_left_what_the_mean_of_the_first_keys_tells_too_little_of(dtype, limit):
    arguments = _inputs((1, 1, 64, 64), dtype, step=0.1)
    for name in ("q", "k", "dq", "dk"):
        arguments[name] = 2.4 * arguments[name]
    q, k, v, dq, dk, _, _ = (x.double() for x in arguments.values())
    arguments["o"] = _attention(q, k, v).to(dtype)
    with recording() as records:
        fused.attention_difference(**arguments)
        keys = records[0].config.keys
        p, change = torch.softmax(q @ k.mT / 8, -1), (dq @ (k + dk).mT + q @ dk.mT) / 8
        first = (p * change)[..., :keys].sum(-1) / p[..., :keys].sum(-1)
        z = (p * torch.expm1(change - first[..., None])).sum(-1)
        records[0].run()
    do = records[0].args[7].transpose(1, 2)
    near = ((z + 0.8).abs() < 0.01) | ((z - 7).abs() < 0.1)
    assert torch.equal(do[..., 0].isnan()[~near], ~((z > -0.8) & (z < 7))[~near])
    kept, truth = (z > -0.79) & (z < -0.5), _truth(arguments, tangent=False)
    assert kept.sum() > 1
    assert (do - truth)[kept].norm() < limit * truth[kept].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_with_small_changes_are_as_without_the_others(dtype):
    arguments = _inputs((1, 1, 136, 64), dtype, step=1e-3)
    alone = fused.attention_difference(**arguments)
    far = torch.zeros(136, dtype=torch.bool, device=DEVICE)
    far[3::16] = True
    arguments["dq"] = torch.where(far[:, None], 1e4 * arguments["dq"], arguments["dq"])
    both = fused.attention_difference(**arguments)
    assert torch.equal(both[:, :, ~far], alone[:, :, ~far])
    truth = _truth(arguments, tangent=False)[:, :, far]
    assert (both[:, :, far] - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["q", "dq", "dk", "dv"])
def test_what_is_not_a_number_stays_so(name, dtype, tangent):
    arguments = _inputs((1, 1, 40, 64), dtype)
    arguments[name] = torch.where(torch.arange(64, device=DEVICE) == 5, float("nan"), arguments[name])
    assert fused.attention_difference(**arguments, tangent=tangent).isnan().any()


@triton.jit
def _rounded_kernel(x_ptr, out_ptr, N: tl.constexpr, DTYPE: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, rounded(tl.load(x_ptr + offsets), DTYPE))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)])
def test_rounding(dtype, name):
    """To the nearest; and no NaN is lost: a GPU makes 0x7fffffff, of which integer rounding would make -0."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty_like(x)
    _rounded_kernel[(1,)](x, out, N=1024, DTYPE=name)
    assert torch.equal(out, out.to(dtype).float())
    assert ((out - x).abs() <= (x.to(dtype).float() - x).abs()).all()
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, 0x7F800000], dtype=torch.int32, device=DEVICE)
    x = patterns.view(torch.float32).repeat(205)[:1024].contiguous()
    _rounded_kernel[(1,)](x, out, N=1024, DTYPE=name)
    assert not out.isfinite().any()


def test_any_strides():
    """Views of a projection are read in place, others are packed first: the same result."""
    arguments = _inputs((2, 2, 20, 24), torch.float16)
    packed = fused.attention_difference(**{name: x.contiguous() for name, x in arguments.items()})
    assert torch.equal(fused.attention_difference(**arguments), packed)
    holes = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in arguments.items()}
    assert holes["q"].stride(-1) == 2
    assert torch.equal(fused.attention_difference(**holes), packed)
    rows = {name: torch.cat([x, x])[2:] for name, x in arguments.items()}
    assert torch.equal(fused.attention_difference(**rows), packed)


@pytest.mark.parametrize(("token_stride", "packed"), [(2**27, False), (2**28, True)])
def test_tokens_too_far_apart_for_offsets_of_32_bits_are_packed(token_stride, packed):
    """Between tokens may lie anything, such as all rows and layers of a tensor with tokens in front."""
    x = torch.empty_strided((2, 2, 8, 16), (32, 16, token_stride, 1), device="meta", dtype=torch.float16)
    with recording() as records:
        fused.attention_difference(x, x, x, x, x, x, x)
    assert all((x.stride(2) == 16) == packed for x in records[0].args[:7])


def test_result_is_stored_as_the_next_projection_reads_it():
    do = fused.attention_difference(**_inputs((2, 3, 8, 16)))
    assert do.shape == (2, 3, 8, 16)
    assert do.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("tangent", [False, True])
def test_op_contract(tangent):
    arguments = _inputs((2, 2, 20, 24))
    torch.library.opcheck(attention_difference._op, (*arguments.values(), tangent))
    check_compiles(NAME, arguments, {"tangent": tangent})
    check_repeatable(NAME, arguments, {"tangent": tangent})


def test_no_gradient_flows():
    arguments = {k: v.detach().requires_grad_() for k, v in _inputs((1, 1, 4, 16)).items()}
    assert not fused.attention_difference(**arguments).requires_grad


@pytest.mark.parametrize("tangent", [False, True])
def test_flops_are_those_of_the_reference(tangent):
    shape = (2, 3, 20, 24)
    counts = []
    for ops in (reference, fused):
        with FlopCounterMode(display=False) as counter:
            ops.attention_difference(**_inputs(shape), tangent=tangent)
        counts.append(counter.get_total_flops())
    o_flops = 2 * 2 * 2 * 3 * 20 * 20 * 24  # of _inputs itself
    assert counts[0] - o_flops == counts[1] - o_flops == 5 * 2 * 2 * 3 * 20 * 20 * 24


def test_bad_inputs():
    arguments = _inputs((1, 2, 8, 16))
    op = fused.attention_difference
    with pytest.raises(ValueError, match=r"q has shape \(8, 16\) where \(rows, heads, tokens, head dim\) is needed"):
        op(**{**arguments, "q": arguments["q"][0, 0]})
    with pytest.raises(ValueError, match=r"dk has shape \(1, 2, 7, 16\) where \(1, 2, 8, 16\) is needed"):
        op(**{**arguments, "dk": arguments["dk"][:, :, :7]})
    with pytest.raises(ValueError, match=r"dq has dtype torch.float16 and q has torch.float32; convert"):
        op(**{**arguments, "dq": arguments["dq"].half()})
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64"):
        op(**{name: x.double() for name, x in arguments.items()})
    with pytest.raises(ValueError, match=r"head dim 96 in torch.float32 does not fit .* \(at most 80\)"):
        op(**_inputs((1, 1, 2, 96)))
    with pytest.raises(ValueError, match=r"head dim 136 in torch.float16 does not fit .* \(at most 128\)"):
        op(**_inputs((1, 1, 2, 136), torch.float16))
