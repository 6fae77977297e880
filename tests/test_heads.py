"""Fused projection to queries, keys and values: a plain product forward, one pass over their gradients backward."""

import pytest
import torch
from functorch.compile import make_boxed_func
from op_checks import DEVICE, check_accuracy, check_autocast, check_compiles, check_repeatable, run
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast.kernels import _aot, fused, heads, reference
from soflow_fast.kernels._cases import Inputs
from soflow_fast.kernels._launch import recording

NAME = "project_heads"
GRADIENTS = ("h", "weight", "bias")
# (rows, tokens, heads, head dim): B, L and XL, a head dim that is only a multiple of 4, and an odd one
SHAPES = ((2, 18, 12, 64), (1, 33, 16, 64), (2, 9, 16, 72), (3, 17, 4, 36), (3, 7, 3, 13))
SMALL = (2, 5, 3, 8)


def _inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rows, tokens, n_heads, head_dim = shape
    D = n_heads * head_dim
    h = torch.randn(rows, tokens, D, generator=generator)
    weight = torch.randn(3 * D, D, generator=generator) / D**0.5
    bias = torch.randn(3 * D, generator=generator)
    return {"h": h.to(DEVICE, dtype), "weight": weight.to(DEVICE, dtype), "bias": bias.to(DEVICE, dtype)}


def _options(shape):
    return {"heads": shape[2]}


def _gradients(shape, form, dtype=torch.float32):
    """dq, dk, dv (B, H, N, h) as attention backwards return them, and as nobody does."""
    rows, tokens, n_heads, head_dim = shape

    def make(part):
        def noise(*shape):
            generator = torch.Generator().manual_seed(part)
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        if form == "packed":
            return noise(rows, n_heads, tokens, head_dim)
        if form == "by token":
            return noise(rows, tokens, n_heads, head_dim).transpose(1, 2)
        if form == "slices of one":
            return noise(rows, tokens, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)[part]
        if form == "with gaps":
            return noise(rows, n_heads, 2 * tokens, head_dim + 3)[:, :, ::2, 1:-2]
        if form == "holes in a head":
            return noise(rows, n_heads, tokens, 2 * head_dim)[..., ::2]
        if form == "one for all rows":
            return noise(1, n_heads, tokens, head_dim).expand(rows, -1, -1, -1)
        return noise().expand(rows, n_heads, tokens, head_dim)

    return [make(part) for part in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype):
    check_accuracy(NAME, _inputs(shape, dtype), _options(shape), GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form", ["packed", "by token", "slices of one", "with gaps", "holes in a head", "one for all rows", "a number"]
)
def test_strided_gradients(form, dtype):
    gradients = _gradients(SMALL, form, dtype)
    assert [g.shape for g in gradients] == [(2, 3, 5, 8)] * 3
    check_accuracy(NAME, _inputs(SMALL, dtype), _options(SMALL), GRADIENTS, output_gradients=gradients)


def test_each_gradient_has_its_own_strides():
    gradients = [_gradients(SMALL, form)[i] for i, form in enumerate(("packed", "by token", "slices of one"))]
    check_accuracy(NAME, _inputs(SMALL), _options(SMALL), GRADIENTS, output_gradients=gradients)


def test_chunks_of_tokens(monkeypatch):
    """The bias's gradient does not depend on how tokens are dealt out to programs."""
    shape = (3, 41, 2, 8)
    monkeypatch.setattr(heads, "_ENOUGH_PROGRAMS", 0)
    for tokens in (256, 32, 20):
        monkeypatch.setattr(heads, "_CHUNKS", (tokens, tokens))
        check_accuracy(NAME, _inputs(shape), _options(shape), GRADIENTS)


@pytest.mark.parametrize(
    ("rows", "width", "expected"), [(65536, 1152, 256), (16384, 768, 256), (4096, 768, 64), (8192, 1152, 256)]
)
def test_training_sizes_fill_the_gpu(rows, width, expected):
    """At least 2 programs for each of 132 SMs, in the largest chunks that allow them."""
    column_blocks = width // 128
    chunk = heads._tokens_per_program(rows, column_blocks)
    assert chunk == expected
    assert rows // chunk * column_blocks >= 264


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_an_unused_output(used):
    arguments = {k: v.requires_grad_() for k, v in _inputs(SMALL).items()}

    def gradients(op):
        outputs = op(**arguments, **_options(SMALL))
        return torch.autograd.grad(sum(outputs[i].square().sum() for i in used), list(arguments.values()))

    for ours, truth in zip(gradients(fused.project_heads), gradients(reference.project_heads), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_an_absent_gradient_is_not_read():
    arguments = {k: v.to("meta").requires_grad_() for k, v in _inputs(SMALL).items()}
    *_, v = fused.project_heads(**arguments, **_options(SMALL))
    with recording() as launches:
        v.sum().backward()
    (launch,) = launches
    assert [x is None for x in launch.args[:3]] == [True, True, False]


@pytest.mark.parametrize("needed", [("h",), ("weight",), ("bias",), ("h", "bias")])
def test_only_what_is_needed_is_computed(needed):
    arguments = _inputs(SMALL)
    every = dict(zip(GRADIENTS, run(fused.project_heads, arguments, _options(SMALL), GRADIENTS)[3:], strict=True))
    with FlopCounterMode(display=False) as flops:
        some = run(fused.project_heads, arguments, _options(SMALL), needed)[3:]
    for name, gradient in zip(needed, some, strict=True):
        assert torch.equal(gradient, every[name]), name
    products = 1 + ("h" in needed) + ("weight" in needed)
    rows, tokens, n_heads, head_dim = SMALL
    assert flops.get_total_flops() == products * 2 * rows * tokens * 3 * (n_heads * head_dim) ** 2


def test_op_contract():
    arguments = _inputs(SMALL)
    check_compiles(NAME, arguments, _options(SMALL), GRADIENTS)
    check_repeatable(NAME, arguments, _options(SMALL), GRADIENTS)


@pytest.mark.parametrize("absent", [(), (0,), (0, 1), (1, 2)])
def test_raw_op(absent):
    gradients = [None if i in absent else g for i, g in enumerate(_gradients(SMALL, "by token"))]
    torch.library.opcheck(heads._op, tuple(gradients))


def test_the_compiled_backward_stacks_nothing():
    """One pass packs and sums; what else reads or writes (B, N, 3D) values are the two products."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def attend(h, weight, bias):
        q, k, v = fused.project_heads(h, weight, bias, heads=3)
        return (q * k.exp() * v).sum()

    torch.compiler.reset()
    arguments = {k: v.requires_grad_() for k, v in _inputs(SMALL).items()}
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(**arguments).backward()
    called = [node.target for node in graphs[1].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.soflow.pack_heads_bwd.default) == 1
    assert called.count(torch.ops.aten.mm.default) == 2
    assert called.count(torch.ops.aten.sum.dim_IntList) == 1
    assert not {torch.ops.aten.cat.default, torch.ops.aten.stack.default, torch.ops.aten.clone.default} & set(called)


def test_the_outputs_are_views_of_one_product():
    arguments = _inputs(SMALL)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            q, k, v = fused.project_heads(**arguments, **_options(SMALL))
        width = SMALL[2] * SMALL[3]
        for part, x in enumerate((q, k, v)):
            assert x.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
            assert (x.storage_offset(), x.stride()) == (part * width, (5 * 3 * width, 8, 3 * width, 1))


def test_nothing_is_saved_twice():
    """The backward keeps h and the weight, and nothing of its own."""
    arguments = {k: v.requires_grad_() for k, v in _inputs(SMALL).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused.project_heads(**arguments, **_options(SMALL))
    assert [x.data_ptr() for x in saved] == [arguments[name].data_ptr() for name in ("h", "weight")]


@pytest.mark.parametrize("case", heads.cases(), ids=lambda case: case.name)
def test_bytes_of_the_backward(case):
    """Per token and column of the packed gradient, bfloat16; stacked and then summed they are 6."""
    h = case.inputs(Inputs("meta"))["h"]
    (launch,) = _aot.record_case(case)
    assert launch.bytes_moved / (3 * h.numel()) < 4.02


def test_autocast():
    check_autocast(NAME, _inputs(SMALL), _options(SMALL), GRADIENTS, tolerance=2**-7)


def test_strided_inputs():
    arguments = _inputs(SMALL)
    strided = {k: v.mT.contiguous().mT for k, v in arguments.items() if k != "bias"}
    check_accuracy(NAME, {**arguments, **strided}, _options(SMALL), GRADIENTS)


def test_bad_inputs():
    h, weight, bias = _inputs(SMALL).values()
    with pytest.raises(ValueError, match=r"h has shape \(5, 24\) where \(rows, tokens, width\) is needed"):
        fused.project_heads(h[0], weight, bias, heads=3)
    with pytest.raises(ValueError, match=r"weight has shape \(24, 24\) where \(72, 24\) is needed"):
        fused.project_heads(h, weight[:24], bias, heads=3)
    with pytest.raises(ValueError, match=r"bias has shape \(24,\) where \(72,\) is needed"):
        fused.project_heads(h, weight, bias[:24], heads=3)
    with pytest.raises(ValueError, match=r"h has dtype torch\.float64"):
        fused.project_heads(h.double(), weight, bias, heads=3)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.bfloat16 and h has torch\.float32; convert"):
        fused.project_heads(h, weight.bfloat16(), bias, heads=3)
    for wrong in (5, 0, -3):
        with pytest.raises(ValueError, match=f"heads={wrong} does not divide the width 24 of h"):
            fused.project_heads(h, weight, bias, heads=wrong)
