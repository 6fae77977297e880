"""Attention backends against the plain formula, and what cannot run here."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton import knobs

from soflow_fast import DiT
from soflow_fast.attention import BACKENDS, attention, resolve_attention

# what runs on a CPU; a GPU has the others as well
CPU_BACKENDS = ("sdpa", "torch_flash", "math")
HEAD_DIMS = (8, 36, 64, 72)


def _qkv(head_dim, dtype=torch.float64, device="cpu", tokens=24):
    generator = torch.Generator().manual_seed(0)
    # heads in the middle, as the fused qkv projection leaves them: the tensors are strided
    qkv = torch.randn(2, tokens, 3, 4, head_dim, generator=generator, dtype=torch.float64)
    return [y.to(device, dtype).requires_grad_() for y in qkv.permute(2, 0, 3, 1, 4)]


def _plain(q, k, v):
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bhmd->bhnd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)


def _outputs_and_gradients(function, qkv):
    out = function(*qkv)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, qkv, weights.to(out))]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backend_and_its_gradients(backend, head_dim):
    expected = _outputs_and_gradients(_plain, _qkv(head_dim))
    wide = _outputs_and_gradients(lambda q, k, v: attention(q, k, v, backend), _qkv(head_dim))
    narrow = _outputs_and_gradients(lambda q, k, v: attention(q, k, v, backend), _qkv(head_dim, torch.float32))
    for truth, value, single in zip(expected, wide, narrow, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-12)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), truth, rtol=0, atol=1e-5)


def _assert_within_bfloat16(ours, expected):
    for truth, value in zip(expected, ours, strict=True):
        assert value.dtype == torch.bfloat16
        error = (value.double().cpu() - truth).norm() / truth.norm()
        assert error < 2e-2


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backend_and_its_gradients_in_bfloat16(backend, head_dim):
    ours = _outputs_and_gradients(lambda q, k, v: attention(q, k, v, backend), _qkv(head_dim, torch.bfloat16))
    _assert_within_bfloat16(ours, _outputs_and_gradients(_plain, _qkv(head_dim)))


def test_half_precision_backends_refuse_others():
    with pytest.raises(ValueError, match=r"attention=.cudnn. takes bfloat16 and float16 and got torch\.float32"):
        attention(*_qkv(64, torch.float32), "cudnn")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half-precision GPU backends need a GPU")
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("backend", ["sdpa", "torch_flash", "torch_efficient", "cudnn"])
def test_gpu_backend_and_its_gradients(backend, head_dim):
    ours = _outputs_and_gradients(lambda q, k, v: attention(q, k, v, backend), _qkv(head_dim, torch.bfloat16, "cuda"))
    _assert_within_bfloat16(ours, _outputs_and_gradients(_plain, _qkv(head_dim)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a bug of cuDNN's on GPUs")
@pytest.mark.parametrize("head_dim", [64, 72])
def test_gradients_of_peaks_far_below_zero_are_finite_on_a_gpu(head_dim):
    """Of 64 tokens whose logits are about −120, which cuDNN's backward was reported to turn into NaN."""
    q, k, v = (0.1 * y.detach() for y in _qkv(head_dim, torch.float32, "cuda", tokens=64))
    q[..., 0], k[..., 0] = 1.0, -120 * head_dim**0.5
    inputs = [y.bfloat16().requires_grad_() for y in (q, k, v)]
    output = attention(*inputs, "sdpa")
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))


def test_cudnn_is_not_chosen_by_itself(monkeypatch):
    seen, enabled = [], torch.backends.cuda.cudnn_sdp_enabled

    def called(*args):
        seen.append((enabled(), torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", called)
    before = enabled()
    attention(*3 * [SimpleNamespace(is_cuda=True)], "sdpa")
    assert seen == [(False, True, True)]
    assert enabled() == before


def test_math_has_a_forward_mode_derivative():
    qkv = [y.detach() for y in _qkv(8)]
    directions = tuple(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double() for y in qkv)
    ours = torch.func.jvp(lambda q, k, v: attention(q, k, v, "math"), tuple(qkv), directions)[1]
    torch.testing.assert_close(ours, torch.func.jvp(_plain, tuple(qkv), directions)[1], rtol=0, atol=1e-12)


def test_names_stand_for_backends():
    assert resolve_attention("auto", 64) == "sdpa"
    for backend in CPU_BACKENDS:
        assert resolve_attention(backend, 36) == backend


def test_the_choice_is_logged_once_when_a_network_is_built(caplog):
    caplog.set_level(logging.INFO, logger="soflow_fast")
    DiT(8, 4, 1, 16, 2, 2, num_classes=3)
    assert [record.getMessage() for record in caplog.records if "attention" in record.getMessage()] == [
        "attention=auto is sdpa"
    ]


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match=r"attention='flash' is not known; choose one of auto, sdpa"):
        resolve_attention("flash", 64)
    assert set(BACKENDS) >= {"auto", *CPU_BACKENDS}


def test_compiled_torch_is_held_to_its_flash_attention():
    """Even where it would take the plain formula."""
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph)

    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, "torch_flash"), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    qkv = _qkv(64)
    with sdpa_kernel(SDPBackend.MATH):
        ours = _outputs_and_gradients(compiled, qkv)
    assert "flash_attention" in graphs[0]
    for truth, value in zip(_outputs_and_gradients(_plain, qkv), ours, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-12)


def test_efficient_attention_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="attention='torch_efficient' needs a CUDA GPU and none is visible"):
        resolve_attention("torch_efficient", 64)


def test_cudnn_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="attention='cudnn' needs a CUDA GPU with cuDNN"):
        resolve_attention("cudnn", 64)


def test_fused_attention_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"attention='triton' needs a CUDA GPU .* choose attention='sdpa'"):
        resolve_attention("triton", 64)


def test_fused_attention_of_wide_heads():
    with pytest.raises(ValueError, match="attention='triton' takes head dims up to 128, and this model has 136"):
        resolve_attention("triton", 136)


def test_fused_attention_needs_the_fused_ops():
    with pytest.raises(ValueError, match="choose impl='triton', or attention='sdpa'"):
        DiT(8, 4, 1, 16, 2, 2, num_classes=3, impl="torch", attention="triton")


def test_fused_attention_of_wide_heads_in_float32():
    """Where the dtype is given, when the network is built; the parameters' can still change."""
    options = {"impl": "triton", "attention": "triton", "num_classes": 3}
    message = "takes head dims up to 80 in torch.float32, and this model has 96; choose attention='sdpa'"
    with pytest.raises(ValueError, match=message):
        DiT(8, 4, 1, 192, 1, 2, compute_dtype=torch.float32, **options)
    for dtype in (torch.bfloat16, None):
        assert DiT(8, 4, 1, 192, 1, 2, compute_dtype=dtype, **options).attention == "triton"
