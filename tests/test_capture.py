"""What is compiled and captured, and that what cannot be says so."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fast_step_runs import make_model, make_step, training_batch

from soflow_fast import capture
from soflow_fast.capture import Captured, compiled, on_side_stream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (True, {"mode": "default"}),
        ("max-autotune", {"mode": "max-autotune-no-cudagraphs"}),
        ("aot_eager", {"backend": "aot_eager"}),
    ],
)
def test_one_graph_of_fixed_shapes_by_the_compiler_asked_for(monkeypatch, how, options):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: calls.append((function, given)) or function)
    assert compiled(len, how)("abc") == 3
    assert calls == [(len, {"fullgraph": True, "dynamic": False, **options})]


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (True, {"options": {"epilogue_fusion": False}}),
        (
            "max-autotune",
            {"options": {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}},
        ),
        ("aot_eager", {"backend": "aot_eager"}),
    ],
)
def test_inductor_is_told_the_options_that_it_has(monkeypatch, how, options):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: calls.append(given) or function)
    compiled(len, how, {"of_another_version": 1, "epilogue_fusion": False})
    assert calls == [{"fullgraph": True, "dynamic": False, **options}]


def test_not_compiled_is_the_function_itself():
    assert compiled(len, False) is len


def _broken(graph, inputs):
    raise ArithmeticError("planted")


def test_a_step_that_cannot_be_compiled_raises_the_cause():
    torch.compiler.reset()
    with pytest.raises(Exception, match="planted"):
        make_step(make_model(torch.float32), compile=_broken)[0](*training_batch(0, torch.float32))


def test_a_step_with_a_graph_break_raises(monkeypatch):
    torch.compiler.reset()
    model = make_model(torch.float32)
    monkeypatch.setattr(model, "input_labels", lambda labels, drop, x: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        make_step(model, compile="eager")[0](*training_batch(0, torch.float32))


@needs_gpu
def test_a_captured_function_reads_new_inputs_and_refuses_other_shapes():
    x, y = torch.arange(3.0, device="cuda"), torch.ones(3, device="cuda")
    stream = torch.cuda.Stream()
    on_side_stream(stream, torch.add, x, y)
    graph = Captured("the sum", stream, torch.add, x, y)
    assert graph(x + 5, y).tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match=r"the sum is captured for inputs of shape \(3,\) and got \(2,\)"):
        graph(x[:2], y)


def _reads(x):
    return (x + x.item()).sum()


def _raises(x):
    raise ArithmeticError("planted")


@needs_gpu
@pytest.mark.parametrize("function", [_reads, _raises])
def test_a_capture_that_fails_says_why_and_leaves_the_next_one_possible(function):
    """CUDA cannot end the capture of a function that reads on the host; one that only raises it can."""
    x, before = torch.ones((), device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"reading cannot be captured as a CUDA graph .* set cuda_graph=False"):
        Captured("reading", torch.cuda.Stream(), function, x)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert torch.rand((), device="cuda") < 1  # torch's generator takes no capture to be underway
    stream = torch.cuda.Stream()
    on_side_stream(stream, torch.sin, x)
    assert Captured("the sine", stream, torch.sin, x)(x + 1).item() == pytest.approx(math.sin(2))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("underway", [True, False])
def test_a_pool_is_ended_and_released_once(monkeypatch, underway):
    """Only where the capture could not be ended; else the graph releases its pool by itself."""
    calls = []

    def end(device, pool):
        calls.append(("end", device, pool))
        if not underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: calls.append(("release", *given)), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "another graph")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: calls.append(("capture", graph)) or nullcontext())
    monkeypatch.setattr(capture, "_BROKEN", [])
    capture._forget("the graph", SimpleNamespace(device="cpu"), (0, 7))
    expected = [("end", 3, (0, 7)), ("release", 3, (0, 7)), ("capture", "another graph")]
    assert calls == (expected if underway else expected[:1])
