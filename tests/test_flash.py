"""FlashAttention 2, 3 and 4: called as published, from the projection on; what cannot run says why."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import flash_stubs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import DiT, doctor, flash
from soflow_fast.attention import missing_for, resolve_attention
from soflow_fast.flash_packages import PACKAGES
from soflow_fast.kernels import reference

NAMES = list(PACKAGES)
GRADIENTS = ("h", "weight", "bias")


@pytest.fixture
def packages(monkeypatch):
    flash_stubs.install(monkeypatch)


def _inputs(dtype=torch.bfloat16, rows=2, tokens=24, heads=4, head_dim=72):
    generator = torch.Generator().manual_seed(0)
    width = heads * head_dim
    return {
        "h": torch.randn(rows, tokens, width, generator=generator).to(dtype),
        "weight": (torch.randn(3 * width, width, generator=generator) * width**-0.5).to(dtype),
        "bias": torch.randn(3 * width, generator=generator).to(dtype),
    }


def _results(op, arguments, heads=4, do=None):
    """o, q, k, v and the gradients of h, weight and bias."""
    arguments = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    o, *qkv = op(**arguments, heads=heads)
    if do is None:
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return [o.detach(), *qkv, *torch.autograd.grad(o, list(arguments.values()), do.to(o))]


def _ours(name):
    return lambda **arguments: flash.self_attention(**arguments, backend=name)


def _assert_close(ours, expected, tolerance=2e-2):
    for value, truth in zip(ours, expected, strict=True):
        assert (value.double() - truth.double()).norm() <= tolerance * truth.double().norm()


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(packages, name, head_dim):
    arguments = _inputs(head_dim=head_dim)
    ours = _results(_ours(name), arguments)
    _assert_close(ours, _results(reference.self_attention, {key: x.double() for key, x in arguments.items()}))
    assert [x.dtype for x in ours] == 7 * [torch.bfloat16]
    assert [(name, x) for x in (None, False)] == flash_stubs.CALLS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the packages' kernels need a GPU")
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("name", NAMES)
def test_the_packages_themselves(name, head_dim):
    if reason := missing_for(name, head_dim):
        pytest.skip(reason)
    for tokens in (64, 256, 260):
        arguments = {key: x.cuda() for key, x in _inputs(tokens=tokens, head_dim=head_dim).items()}
        expected = _results(reference.self_attention, {key: x.double() for key, x in arguments.items()})
        _assert_close(_results(_ours(name), arguments), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_strides(packages, name):
    """``.sum().backward()`` sends a gradient of stride 0; a slice sends one with gaps."""
    arguments = _inputs()
    for do in (torch.tensor(0.7).expand(2, 4, 24, 72), torch.randn(2, 4, 24, 144)[..., ::2]):
        expected = _results(reference.self_attention, {key: x.double() for key, x in arguments.items()}, do=do)
        # of the queries' bias nothing but rounding is left where the gradient is the same everywhere
        _assert_close(
            [x[..., -288:] for x in _results(_ours(name), arguments, do=do)], [x[..., -288:] for x in expected]
        )


@pytest.mark.parametrize("name", NAMES)
def test_biases_of_keys_and_values(packages, name):
    """Of the keys' the gradient is exactly 0, as it changes no output; of the values' it is what arrives, summed."""
    do = torch.randn(2, 4, 24, 72).bfloat16()
    of_queries, of_keys, of_values = _results(_ours(name), _inputs(), do=do)[-1].chunk(3)
    assert of_queries.all()
    assert not of_keys.any()
    torch.testing.assert_close(of_values, do.double().sum((0, 2)).flatten().bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_where_torch_is_told_to_be(packages, name):
    torch.use_deterministic_algorithms(True)
    try:
        _results(_ours(name), _inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert [deterministic for _, deterministic in flash_stubs.CALLS] == [None, True]


@pytest.mark.parametrize("name", NAMES)
def test_the_projection_and_its_gradient_are_never_copied(packages, name, monkeypatch):
    """What the package gets are views of one tensor, and it writes into another."""
    seen, backward = [], PACKAGES[name].backward

    def watched(do, q, k, v, o, lse, dq, dk, dv, *options):
        seen.append([{x.untyped_storage().data_ptr() for x in parts} for parts in ((q, k, v), (dq, dk, dv))])
        return backward(do, q, k, v, o, lse, dq, dk, dv, *options)

    monkeypatch.setitem(PACKAGES, name, PACKAGES[name]._replace(backward=watched))
    *_, q, k, v = flash.self_attention(
        **{key: x.requires_grad_() for key, x in _inputs().items()}, heads=4, backend=name
    )
    _results(_ours(name), _inputs())
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v)}) == 1
    assert [len(parts) for parts in seen[0]] == [1, 1]


def test_flops_are_those_of_flash_attention(packages):
    with FlopCounterMode(display=False) as counter:
        _results(_ours("flash_attn_4"), _inputs(tokens=16, heads=2, head_dim=24), heads=2)
    assert counter.get_total_flops() == 3 * 2 * (2 * 16) * 48 * 144 + (2 + 5) * 2 * (2 * 2) * 16 * 16 * 24


@pytest.mark.parametrize("name", NAMES)
def test_op_contract(packages, name):
    y = torch.randn(2, 9, 3, 2, 16).bfloat16()
    torch.library.opcheck(flash._forward_op, (y, name))
    o, lse = flash._forward_op(y, name)
    torch.library.opcheck(flash._backward_op, (y, o, o, lse, name))
    torch.compiler.reset()
    compiled = torch.compile(_ours(name), fullgraph=True, backend="aot_eager")
    for eager, ours in zip(_results(_ours(name), _inputs()), _results(compiled, _inputs()), strict=True):
        assert torch.equal(eager, ours)


def test_what_has_no_derivative_raises(packages):
    arguments = _inputs()
    h = arguments.pop("h")
    op = _ours("flash_attn_3")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda h: op(h=h, **arguments, heads=4)[0], (h,), (h,))
    o, *_ = op(h=h.requires_grad_(), **arguments, heads=4)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(o.sum(), h, create_graph=True)


def test_dtypes(packages):
    with pytest.raises(ValueError, match=r"attention='flash_attn_4' takes bfloat16 and float16 and got torch.float32;"):
        flash.self_attention(**_inputs(torch.float32), heads=4, backend="flash_attn_4")
    with torch.autocast("cpu", torch.bfloat16):
        o, *_ = flash.self_attention(**_inputs(torch.float32), heads=4, backend="flash_attn_4")
    assert o.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_network_and_its_difference(packages, name, monkeypatch):
    """The whole DiT in bfloat16, as with torch's attention; its difference forward goes on from q, k, v and o."""
    monkeypatch.setattr("soflow_fast.attention.missing_for_flash", lambda *args: None)
    results = []
    for attention in (name, "sdpa"):
        torch.manual_seed(0)
        net = DiT(8, 2, 3, 64, 2, 4, num_classes=5, impl="torch", attention=attention, compute_dtype=torch.bfloat16)
        for p in net.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.02)
        x, dx, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4)
        F, dF = net.forward_difference(x, t, t / 2, torch.arange(4), 1e-3 * dx, -1e-3 * t)
        F.square().sum().backward()
        results.append([F.detach(), dF, net.blocks[0].attn.qkv.weight.grad, net.blocks[1].attn.proj.weight.grad])
    assert len(flash_stubs.CALLS) == 4
    _assert_close(results[0], results[1], tolerance=4e-2)


def _machine(monkeypatch, capability=(9, 0), gpu=True, version="4.0.0b36"):
    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "such a card")


@pytest.mark.parametrize(
    ("name", "machine", "head_dim", "words"),
    [
        ("flash_attn", {"version": None}, 64, r"not installed \(pip install 'soflow-fast\[flash\]'\)"),
        ("flash_attn_3", {"version": None}, 64, r"not installed \(PyTorch has wheels of it;"),
        ("flash_attn_4", {"version": None}, 64, r"not installed \(pip install 'soflow-fast\[flash4\]'\)"),
        ("flash_attn", {"version": "2.6.3"}, 64, "of version 2.7 or newer, and here is 2.6.3"),
        ("flash_attn_4", {"version": "4.0.0b35"}, 64, "of version 4.0.0b36 or newer, and here is 4.0.0b35"),
        ("flash_attn", {"gpu": False}, 64, "needs a CUDA GPU and none is visible; choose attention='sdpa'"),
        ("flash_attn", {"capability": (7, 5)}, 64, "no kernels for compute capability 7, which such a card is of"),
        ("flash_attn_3", {"capability": (10, 0)}, 64, "no kernels for compute capability 10"),
        ("flash_attn_4", {"capability": (8, 0)}, 64, "no kernels for compute capability 8"),
        ("flash_attn", {}, 36, "multiples of 8 up to 256, and this model has 36"),
        ("flash_attn_3", {}, 264, "multiples of 8 up to 256, and this model has 264"),
        ("flash_attn_4", {}, 256, "multiples of 8 up to 128, and this model has 256"),
        ("flash_attn_4", {}, 72, "has a wrong gradient for head dim 72 on GPUs of compute capability 9"),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why(packages, monkeypatch, name, machine, head_dim, words):
    _machine(monkeypatch, **machine)
    with pytest.raises(ValueError, match=f"attention='{name}' .*{words}"):
        resolve_attention(name, head_dim)


@pytest.mark.parametrize(
    ("name", "capability", "head_dim"),
    [
        ("flash_attn", (9, 0), 72),
        ("flash_attn_3", (9, 0), 72),
        ("flash_attn_4", (9, 0), 64),
        ("flash_attn_4", (10, 0), 72),
    ],
)
def test_what_runs(packages, monkeypatch, name, capability, head_dim):
    _machine(monkeypatch, capability)
    assert resolve_attention(name, head_dim) == name


@pytest.mark.parametrize(("name", "capability", "head_dim"), [("flash_attn_3", 9, 256), ("flash_attn_4", 12, 64)])
def test_where_a_backward_cannot_repeat_bitwise(packages, monkeypatch, name, capability, head_dim):
    _machine(monkeypatch, (capability, 0))
    assert missing_for(name, head_dim) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert missing_for(name, head_dim).startswith(f"has no deterministic backward for head dim {head_dim} on GPUs of")
    assert missing_for("flash_attn", head_dim) is None


def test_a_package_that_does_not_load(packages, monkeypatch):
    """As where it was built for another version of torch, or where an older one lies in the same folder."""
    _machine(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    assert missing_for("flash_attn", 64).startswith("needs the package flash-attn, which does not load here (ModuleN")
    monkeypatch.setattr(torch.ops, "flash_attn_3", torch.ops.aten)
    assert "does not load here (AttributeError: " in missing_for("flash_attn_3", 64)
    monkeypatch.setattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_bwd", lambda q, k, v: None)
    assert "does not load here (TypeError: got an unexpected keyword argument" in missing_for("flash_attn_4", 64)


def test_commands_do_not_wait_for_inductor():
    """A second of import, which only training and sampling compile with."""
    code = "import sys, soflow_fast.cli, soflow_fast.doctor; sys.exit('torch._inductor.lowering' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(doctor._version("flash-attn-4") is None, reason="flash-attn-4 is not installed")
@pytest.mark.slow
def test_version_4_compiles_for_hopper(tmp_path):
    """The package itself, in a process without Triton's interpreter."""
    script = Path(__file__).with_name("flash4_checks.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
