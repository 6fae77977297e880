"""What soflow_fast.flash calls of the packages of flash attention, with their published signatures, by plain torch."""

import sys
from types import ModuleType

import torch

#: of every call in turn: the backend, and whether its backward had to repeat bitwise
CALLS: list[tuple[str, bool | None]] = []


def _check(*tensors):
    """The demands of the packages' kernels."""
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.dim() == 4
        assert x.stride(-1) == 1
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def _forward(name, q, k, v, scale):
    _check(q, k, v)
    CALLS.append((name, None))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
    o = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float())
    return o.to(q.dtype).contiguous(), scores.logsumexp(-1)


def _backward(name, do, q, k, v, o, lse, dq, dk, dv, scale, deterministic):
    _check(do, q, k, v, o, dq, dk, dv)
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    CALLS.append((name, deterministic))
    do, q, k, v, o = (x.float() for x in (do, q, k, v, o))
    p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - lse[..., None]).exp()
    dp = torch.einsum("bnhd,bmhd->bhnm", do, v) - (do * o).sum(-1).mT[..., None]
    ds = p * dp * scale
    dq.copy_(torch.einsum("bhnm,bmhd->bnhd", ds, k))
    dk.copy_(torch.einsum("bhnm,bnhd->bmhd", ds, q))
    dv.copy_(torch.einsum("bhnm,bnhd->bmhd", p, do))


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, return_softmax) == (0.0, None, False)
    o, lse = _forward("flash_attn", q, k, v, softmax_scale)
    return o, lse, torch.empty(0, dtype=q.dtype), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes) == (0.0, None)
    _backward("flash_attn", dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, deterministic)
    return torch.empty_like(softmax_lse)


def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False):
    assert return_lse
    assert not causal
    return _forward("flash_attn_4", q, k, v, softmax_scale)


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False, dq=None, dk=None, dv=None
):
    assert not causal
    _backward("flash_attn_4", dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, deterministic)
    return dq, dk, dv


# Version 3's operators, with the schema of its flash_api.cpp; its own namespace can be registered once in a process.
_LIBRARY = torch.library.Library("stub_of_flash_attn_3", "DEF")
_LIBRARY.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_3(
    q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_new, used_q, used_k, max_q, max_k, pages, batch, left, cos, sin,
    rotary, q_descale, k_descale, v_descale, scale, causal=False, window_left=-1, window_right=-1, chunk=0, softcap=0.0,
    interleaved=False, metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    """Torch's dispatcher hands over in the order of the schema, defaults at the end left out."""
    assert (out, cu_q, max_q, q_descale, causal, window_left, window_right) == (None, None, None, None, False, -1, -1)
    assert (chunk, softcap, num_splits, pack_gqa, sm_margin) == (0, 0.0, 1, None, 0)
    none = torch.empty(0)
    return *_forward("flash_attn_3", q, k, v, scale), none, none


def _backward_3(
    dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, used_q, used_k, max_q, max_k, scale, causal=False, window_left=-1,
    window_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert (cu_q, max_q, causal, window_left, window_right, softcap) == (None, None, False, -1, -1, 0.0)
    _backward("flash_attn_3", dout, q, k, v, out, lse, dq, dk, dv, scale, deterministic)
    return dq, dk, dv, *(torch.empty(0) for _ in range(5))


_LIBRARY.impl("fwd", _forward_3, "CompositeExplicitAutograd")
_LIBRARY.impl("bwd", _backward_3, "CompositeExplicitAutograd")


def install(monkeypatch) -> None:
    """Makes them importable."""
    for path, functions in (
        ("flash_attn", ()),
        ("flash_attn.flash_attn_interface", (_flash_attn_forward, _flash_attn_backward)),
        ("flash_attn_interface", ()),
        ("flash_attn.cute", ()),
        ("flash_attn.cute.interface", (_flash_attn_fwd, _flash_attn_bwd)),
    ):
        module = ModuleType(path)
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(torch.ops, "flash_attn_3", torch.ops.stub_of_flash_attn_3, raising=False)
    CALLS.clear()
