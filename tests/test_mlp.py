"""Fused MLP: the backward of its GELU, with the sums for the first bias, in one pass."""

import pytest
import torch
from op_checks import DEVICE, OperatorNames, check_accuracy, check_autocast, check_compiles, check_repeatable, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast.kernels import fused, mlp, reference
from soflow_fast.kernels._launch import recording

NAME, GRADIENTS = "mlp", ("h", "w1", "b1", "w2")
# rows, width, hidden units: parts of the XL's columns and several chunks of rows, the last with one row; a width that
# is only a multiple of 8; odd sizes; a single row, and a vector
SHAPES = (((2, 65), 48, 520), ((3, 22), 24, 96), ((3, 7), 13, 51), ((1,), 8, 16), ((), 8, 16))


def _inputs(rows, width, hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(*rows, width, generator=generator)
    w1 = torch.randn(hidden, width, generator=generator) * width**-0.5
    w2 = torch.randn(width + 3, hidden, generator=generator) * hidden**-0.5
    values = {"h": h, "w1": w1, "b1": torch.randn(hidden, generator=generator), "w2": w2}
    return {name: x.to(DEVICE, dtype) for name, x in values.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype, recompute):
    check_accuracy(NAME, _inputs(*shape, dtype), {"recompute": recompute, "hidden": True}, GRADIENTS)


def test_float16():
    check_accuracy(NAME, _inputs((3, 7), 13, 51, torch.float16), {"recompute": True}, GRADIENTS)


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_units_far_from_zero(recompute):
    """From −1000 to 1000 the GELU and its slope are 0 or 1 beyond a few units, and nothing overflows."""
    arguments = _inputs((3, 7), 13, 51)
    arguments["b1"] = torch.linspace(-1000, 1000, 51, device=DEVICE)
    check_accuracy(NAME, arguments, {"recompute": recompute}, GRADIENTS)


@pytest.mark.parametrize("recompute", [False, True])
def test_strided_gradients(recompute):
    """``.sum().backward()`` sends a gradient of stride 0; a slice sends one with gaps."""
    arguments, options = _inputs((2, 5), 13, 51), {"recompute": recompute}
    expanded = torch.randn((), generator=torch.Generator().manual_seed(0)).expand(2, 5, 16)
    sliced = torch.randn(2, 16, 10, generator=torch.Generator().manual_seed(0)).mT[:, ::2]
    for gradient in (expanded, sliced):
        check_accuracy(NAME, arguments, options, GRADIENTS, output_gradients=(gradient,))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("needed", GRADIENTS)
def test_one_gradient_alone(needed, recompute):
    """And no product beyond those that it needs."""
    arguments, options = _inputs((3, 7), 13, 51), {"recompute": recompute}
    check_accuracy(NAME, arguments, options, (needed,))
    work = []
    for op in (fused.mlp, reference.mlp):
        with FlopCounterMode(display=False) as counter:
            run(op, arguments, options, (needed,))
        work.append(counter.get_total_flops())
    # where only w2 needs one and g was not saved, the kernel that makes g again is given the other's gradient too
    assert work[0] - work[1] == (2 * 21 * 51 * 16 if recompute and needed == "w2" else 0)


def test_what_is_saved():
    """Recomputed, one tensor of the hidden units' size; otherwise two."""
    arguments = {name: x.requires_grad_() for name, x in _inputs((3, 7), 13, 51).items()}
    for recompute, expected in ((True, 1), (False, 2)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            fused.mlp(**arguments, recompute=recompute)
        assert sizes.count(21 * 51) == expected


@pytest.mark.parametrize(("most", "fewest"), [(3, 4), (2, 30)])
def test_chunks_of_rows(most, fewest, monkeypatch):
    """The gradients do not depend on how the rows are dealt out to programs."""
    monkeypatch.setattr(mlp, "_MOST_CHUNKS", most)
    monkeypatch.setattr(mlp, "_FEWEST_ROWS", fewest)
    check_accuracy(NAME, _inputs((2, 43), 13, 51), {"recompute": True}, GRADIENTS)


def test_programs_side_by_side_have_a_row_side_by_side():
    """And the grid's second axis, which ends at 65535, does not grow with the rows."""
    u = torch.empty(1 << 26, 520, device="meta", dtype=torch.bfloat16)
    with recording() as records:
        mlp._gelu_bwd(u, u, False)
    assert [record.grid() for record in records] == [(3, 256)]


def test_a_broken_row_does_not_spread():
    arguments = _inputs((5,), 13, 51)
    arguments["h"][2] = float("nan")
    out, dh = run(fused.mlp, arguments, {"recompute": True}, ("h",))
    for result in (out, dh):
        assert result.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_hidden_units_have_no_gradient():
    arguments = {name: x.requires_grad_() for name, x in _inputs((3, 7), 13, 51).items()}
    for op in (fused.mlp, reference.mlp):
        out, u = op(**arguments, hidden=True)
        assert out.requires_grad
        assert not u.requires_grad
        assert op(**arguments)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "gradient"), [(False, False), (True, False), (False, True)])
def test_the_gelu_is_part_of_the_product_where_nothing_else_needs_its_input(hidden, gradient, dtype):
    """Not in float32, where objectives subtract outputs with and without gradient: these are bitwise equal."""
    arguments = _inputs((3, 7), 13, 51, dtype)
    arguments["h"].requires_grad_(gradient)
    with OperatorNames() as seen:
        out, _ = fused.mlp(**arguments, hidden=hidden)
    in_the_product = not hidden and not gradient and dtype != torch.float32
    assert ("linear_gelu" in seen.names) == in_the_product
    assert ("gelu" in seen.names) != in_the_product
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(out, fused.mlp(**arguments)[0])


def test_on_a_gpu_it_is_the_epilogue_of_the_product():
    with FakeTensorMode(), OperatorNames() as seen:
        mlp._linear_gelu(*(torch.empty(shape, device="cuda") for shape in ((5, 16), (64, 16), (64,))))
    assert seen.names[-1] == "_addmm_activation"
    assert "gelu" not in seen.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradient(dtype):
    arguments = _inputs((2, 65), 48, 520, dtype)
    with torch.no_grad():
        check_accuracy(NAME, arguments, {})


@pytest.mark.parametrize("gradients", [(), GRADIENTS])
def test_autocast(gradients):
    check_autocast(NAME, _inputs((3, 7), 13, 51), {}, gradients, tolerance=2**-5)


def test_op_contract():
    generator = torch.Generator().manual_seed(0)
    u, dg = torch.randn(2, 9, 24, generator=generator).to(DEVICE)
    torch.library.opcheck(mlp._gelu_op, (u,))
    for with_g in (False, True):
        torch.library.opcheck(mlp._gelu_bwd_op, (u, dg, with_g))
    torch.library.opcheck(mlp._linear_gelu_op, (u, dg[:4], u[0, :4]))
    for recompute in (False, True):
        options = {"recompute": recompute, "hidden": True}
        check_compiles(NAME, _inputs((3, 7), 13, 51), options, GRADIENTS)
        check_repeatable(NAME, _inputs((2, 65), 48, 520), options, GRADIENTS)


def test_forward_mode_raises():
    """A tangent of zero without a word would be worse."""
    arguments = _inputs((3, 7), 13, 51)
    h = arguments.pop("h")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda h: fused.mlp(h, **arguments)[0], (h,), (h,))


def test_a_second_derivative_raises():
    arguments = {name: x.requires_grad_() for name, x in _inputs((3, 7), 13, 51).items()}
    out, _ = fused.mlp(**arguments)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), arguments["h"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad .* use torch\.autograd\.grad for a first one"):
        torch.func.grad(lambda h: fused.mlp(**{**arguments, "h": h})[0].sum())(arguments["h"])


def test_bad_inputs():
    arguments = _inputs((3, 7), 13, 51)
    with pytest.raises(ValueError, match=r"w1 has shape \(51, 12\) where \(51, 13\) is needed"):
        fused.mlp(**{**arguments, "w1": arguments["w1"][:, :12]})
    with pytest.raises(ValueError, match=r"b1 has shape \(50,\) where \(51,\) is needed"):
        fused.mlp(**{**arguments, "b1": arguments["b1"][:50]})
    with pytest.raises(ValueError, match=r"w2 has shape \(16, 50\) where \(16, 51\) is needed"):
        fused.mlp(**{**arguments, "w2": arguments["w2"][:, :50]})
    with pytest.raises(ValueError, match=r"w2 has dtype torch\.bfloat16 where that of h, torch\.float32, is needed"):
        fused.mlp(**{**arguments, "w2": arguments["w2"].bfloat16()})
    with pytest.raises(ValueError, match=r"h has dtype torch\.float64"):
        fused.mlp(**{name: x.double() for name, x in arguments.items()})
