"""Fused adaLN modulation: LayerNorm and modulation, alone and with gate and residual, forward and backward."""

import pytest
import torch
from op_checks import (
    DEVICE,
    check_accuracy,
    check_compiles,
    check_repeatable,
    run,
)

from soflow_fast.kernels import _adaln_backward, _aot, adaln, fused, reference
from soflow_fast.kernels._cases import Inputs
from soflow_fast.kernels._launch import recording

PLAIN, GATED = "modulated_layernorm", "gated_residual_layernorm"
GRADIENTS = {PLAIN: ("x", "shift", "scale"), GATED: ("x", "branch", "gate", "shift", "scale", "bias")}
WITHOUT_BIAS = GRADIENTS[GATED][:-1]
# B, L and XL, a width that is only a multiple of 8, and an odd one; 18 tokens leave part of a chunk empty
SHAPES = ((2, 18, 768), (1, 9, 1024), (2, 5, 1152), (1, 17, 136), (3, 7, 13))
# residual stream and matrix operands
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


def _inputs(name, shape, residual, dtype=None, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    rows, _, width = shape
    x = torch.randn(shape, generator=generator) + offset
    branch = torch.randn(shape, generator=generator)
    # as in the DiT, the modulation are slices of one tensor
    gate, shift, scale = (
        (torch.randn(rows, 8, width, generator=generator) / 2).to(DEVICE, dtype or residual).unbind(1)[2:5]
    )
    arguments = {"x": x.to(DEVICE, residual), "branch": branch.to(DEVICE, dtype or residual)}
    bias = torch.randn(width, generator=generator).to(DEVICE, dtype or residual)
    arguments |= {"gate": gate, "shift": shift, "scale": scale, "bias": bias}
    return {k: v for k, v in arguments.items() if k in GRADIENTS[name]}


def _inputs_without_bias(*arguments, **options):
    return {k: v for k, v in _inputs(GATED, *arguments, **options).items() if k in WITHOUT_BIAS}


@pytest.mark.parametrize(("residual", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_matches_the_reference(name, shape, residual, dtype):
    options = {"dtype": dtype} if name == PLAIN else {}
    check_accuracy(name, _inputs(name, shape, residual, dtype), options, GRADIENTS[name])


@pytest.mark.parametrize(("residual", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 18, 768), (3, 7, 13)])
def test_matches_the_reference_without_bias(shape, residual, dtype):
    check_accuracy(GATED, _inputs_without_bias(shape, residual, dtype), {}, WITHOUT_BIAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_may_have_any_dtype(dtype):
    """Its gradient has the same: of the master a float32 one, rounded once."""
    arguments = _inputs(GATED, (3, 18, 24), torch.float32, torch.bfloat16)
    check_accuracy(GATED, arguments | {"bias": arguments["bias"].to(dtype)}, {}, GRADIENTS[GATED])


def test_a_bias_that_is_not_trained():
    arguments = _inputs(GATED, (2, 5, 24), torch.float32)
    check_accuracy(GATED, arguments, {}, WITHOUT_BIAS)
    check_compiles(GATED, arguments, {}, WITHOUT_BIAS)


def test_a_closed_gate_lets_no_gradient_of_the_bias_through():
    """The gate is zero where training starts; its own gradient then counts the bias like the rest of the branch."""
    arguments = _inputs(GATED, (2, 18, 24), torch.float32)
    arguments["gate"] = torch.zeros_like(arguments["gate"])
    check_accuracy(GATED, arguments, {}, GRADIENTS[GATED])
    assert not run(fused.gated_residual_layernorm, arguments, {}, ("bias",))[-1].any()


@pytest.mark.parametrize("name", GRADIENTS)
def test_options(name):
    check_accuracy(
        name, _inputs(name, (2, 3, 24), torch.float32), {"eps": 0.5, "dtype": torch.float16}, GRADIENTS[name]
    )


@pytest.mark.parametrize("name", GRADIENTS)
def test_mean_far_from_zero(name):
    """A variance taken as mean of squares minus square of the mean would be off by 1e-1 here."""
    arguments = _inputs(name, (1, 4, 384), torch.float32, offset=1000.0)
    ours = getattr(fused, name)(**arguments)
    truth = getattr(reference, name)(**{k: v.double() for k, v in arguments.items()})
    h, truth = (ours, truth) if name == PLAIN else (ours[1], truth[1])
    assert (h - truth).abs().max() < 1e-6 * 1000


def test_a_constant_row_gives_the_shift():
    arguments = _inputs(PLAIN, (2, 3, 384), torch.float32) | {"x": torch.full((2, 3, 384), 2.5, device=DEVICE)}
    h = fused.modulated_layernorm(**arguments)
    assert torch.equal(h, arguments["shift"][:, None].expand(2, 3, 384))


@pytest.mark.parametrize("name", GRADIENTS)
def test_chunks_of_tokens(name, monkeypatch):
    """The gradients of the modulation do not depend on how tokens are dealt out to programs."""
    for tokens in (32, 2):
        monkeypatch.setattr(_adaln_backward, "_TOKENS", (tokens,))
        check_accuracy(name, _inputs(name, (1, 41, 24), torch.float32), {}, GRADIENTS[name])


@pytest.mark.parametrize(
    ("rows", "tokens", "width", "expected"),
    [
        *((256, 256, 1152, 64), (128, 256, 1152, 64), (64, 256, 1152, 32), (32, 256, 1152, 16), (32, 4096, 1152, 64)),
        *((256, 256, 768, 64), (256, 64, 768, 16), (256, 256, 384, 32)),
    ],
)
def test_training_sizes_fill_the_gpu(rows, tokens, width, expected):
    """At least 2048 warps of the backward, about the 16 that fit on each of 132 SMs, in the largest such chunks."""
    x = torch.empty(rows, tokens, width, device="meta", requires_grad=True)
    m = torch.empty(rows, width, device="meta", requires_grad=True)
    with recording() as records:
        fused.modulated_layernorm(x, m, m).sum().backward()
    (backward,) = (record for record in records if record.kernel is _adaln_backward._adaln_backward_kernel)
    assert backward.grid() == (rows, -(-tokens // expected))
    assert rows * -(-tokens // expected) * backward.config.num_warps >= 2048


@pytest.mark.parametrize("name", GRADIENTS)
def test_strided_gradients(name):
    """``.sum().backward()`` sends a gradient of stride 0; a slice sends one with gaps."""
    arguments = _inputs(name, (2, 3, 24), torch.float32)
    outputs = 1 + (name == GATED)
    expanded = [torch.randn((), generator=torch.Generator().manual_seed(i)).expand(2, 3, 24) for i in range(outputs)]
    sliced = [torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(i)).mT[:, ::2] for i in range(outputs)]
    for gradients in (expanded, sliced):
        check_accuracy(name, arguments, {}, GRADIENTS[name], output_gradients=gradients)


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output(used):
    """The last block never uses the residual stream it returns: its gradient is absent, not zero."""
    arguments = {k: v.requires_grad_() for k, v in _inputs(GATED, (2, 5, 24), torch.float32).items()}

    def gradients(op):
        return torch.autograd.grad(op(**arguments)[used].square().sum(), list(arguments.values()), allow_unused=True)

    for ours, truth in zip(
        gradients(fused.gated_residual_layernorm), gradients(reference.gated_residual_layernorm), strict=True
    ):
        truth = torch.zeros_like(ours) if truth is None else truth
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_an_absent_gradient_is_not_read():
    arguments = {k: v.to("meta").requires_grad_() for k, v in _inputs(GATED, (2, 5, 24), torch.float32).items()}
    _, h = fused.gated_residual_layernorm(**arguments)
    with recording() as launches:
        h.sum().backward()
    assert launches[0].args[1] is None


@pytest.mark.parametrize("name", GRADIENTS)
def test_strided_inputs(name):
    arguments = _inputs(name, (2, 3, 24), torch.float32)
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in arguments.items()}
    ours = run(getattr(fused, name), arguments, {}, GRADIENTS[name])
    for a, b in zip(ours, run(getattr(fused, name), strided, {}, GRADIENTS[name]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", GRADIENTS)
def test_op_contract(name):
    arguments = _inputs(name, (2, 5, 24), torch.float32)
    check_compiles(name, arguments, {}, GRADIENTS[name])
    check_repeatable(name, arguments, {}, GRADIENTS[name])


def test_op_contract_without_bias():
    arguments = _inputs_without_bias((2, 5, 24), torch.float32)
    check_compiles(GATED, arguments, {}, WITHOUT_BIAS)
    check_repeatable(GATED, arguments, {}, WITHOUT_BIAS)


def test_raw_ops():
    x, branch, gate, shift, scale, bias = _inputs(GATED, (2, 5, 24), torch.float32).values()
    torch.library.opcheck(adaln._layernorm_fwd_op, (x, shift, scale, 1e-6, torch.bfloat16))
    statistics = torch.zeros(2, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    torch.library.opcheck(adaln._layernorm_bwd_op, (branch, x, scale, *statistics))
    for added in (None, bias):
        torch.library.opcheck(adaln._gated_fwd_op, (x, branch, added, gate, shift, scale, 1e-6, torch.bfloat16))
        for dx_new in (None, x):
            torch.library.opcheck(adaln._gated_bwd_op, (branch, dx_new, x, branch, added, gate, scale, *statistics))


@pytest.mark.parametrize(("suffix", "limit"), [("", 66), (" narrow residual", 46)])
@pytest.mark.parametrize("size", ["B/4", "L/2", "XL/2"])
def test_bytes_of_a_block(size, suffix, limit):
    """Two gated ops, forward and backward, per token and channel; separate reductions need 90 (float32 residual)."""
    (case,) = (c for c in adaln.cases() if (c.op, c.name) == (GATED, size + suffix))
    elements = case.inputs(Inputs("meta"))["x"].numel()
    assert 2 * sum(launch.bytes_moved for launch in _aot.record_case(case)) / elements < limit


def test_nothing_is_saved_twice():
    """Besides its inputs and outputs, the gated op keeps two floats per token for its backward."""
    arguments = {k: v.requires_grad_() for k, v in _inputs(GATED, (2, 5, 24), torch.float32).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        x_new, h = fused.gated_residual_layernorm(**arguments)
    owned = {x.data_ptr() for x in (*arguments.values(), x_new, h)}
    extra = [x for x in saved if x.data_ptr() not in owned]
    assert sorted(x.shape for x in extra) == [(2, 5), (2, 5)]
    assert h.data_ptr() not in {x.data_ptr() for x in saved}


def test_bad_inputs():
    x, branch, gate, shift, scale, bias = _inputs(GATED, (2, 5, 24), torch.float32).values()
    with pytest.raises(ValueError, match=r"shift has shape \(24,\) where \(2, 24\) is needed"):
        fused.modulated_layernorm(x, shift[0], scale)
    with pytest.raises(ValueError, match=r"x has shape \(5, 24\) where \(rows, tokens, width\) is needed"):
        fused.modulated_layernorm(x[0], shift, scale)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        fused.modulated_layernorm(x.double(), shift, scale)
    with pytest.raises(ValueError, match=r"scale has dtype torch\.bfloat16 where torch\.float32 is needed"):
        fused.modulated_layernorm(x, shift, scale.bfloat16())
    with pytest.raises(ValueError, match=r"branch has shape \(2, 4, 24\) where \(2, 5, 24\) is needed"):
        fused.gated_residual_layernorm(x, branch[:, 1:], gate, shift, scale)
    with pytest.raises(ValueError, match=r"bias has shape \(23,\) where \(24,\) is needed"):
        fused.gated_residual_layernorm(x, branch, gate, shift, scale, bias=bias[1:])
    with pytest.raises(ValueError, match=r"bias has dtype torch\.float64"):
        fused.gated_residual_layernorm(x, branch, gate, shift, scale, bias=bias.double())
    with recording() as launches, pytest.raises(ValueError, match="gate has shape"):
        fused.gated_residual_layernorm(x, branch, gate[:1], shift, scale)
    assert not launches
