"""Fused random draws, interpolation and noisy samples."""

import pytest
import torch
import triton
import triton.language as tl
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable
from torch._dynamo.testing import CompileCounterWithBackend

from soflow_fast.kernels import fused, noise, reference
from soflow_fast.kernels._launch import Launch, launch
from soflow_fast.kernels.reference import Stream

# one Philox block, latents, an image whose size is no multiple of 4, one of several programs
SHAPES = ((1, 2, 2), (4, 32, 32), (3, 5, 7), (3, 64, 64))
SEED = 0x1234_5678_9ABC_DEF0


def _rows(n):
    return torch.arange(n, device=DEVICE) * 3_000_000_019  # beyond 2^32 from the third on


def _counter(value):
    return torch.tensor(value, device=DEVICE)


def _sample(shape, dtype=torch.float32, rows=3, channels=1):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(rows, channels * shape[0], *shape[1:], generator=generator).to(DEVICE, dtype)
    t = torch.rand(rows, generator=generator).to(DEVICE)
    return {"data": data, "t": t, "rows": _rows(rows), "step": _counter(2**35 + 17)}


def _pair(shape, dtype=torch.float32, rows=3):
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, rows, *shape, generator=generator).to(DEVICE, dtype)
    return {"x0": x0, "noise": epsilon, "t": torch.rand(rows, generator=generator).to(DEVICE)}


# ------------------------------------------------------------------------------------------------------ draws


@triton.jit
def _words_kernel(block_ptr, counter_ptr, words_ptr, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, step, seed = tl.load(counter_ptr), tl.load(counter_ptr + 1), tl.load(counter_ptr + 2)
    words = noise.philox(tl.load(block_ptr + index), row, step, STREAM, seed)
    for i in tl.static_range(4):
        tl.store(words_ptr + 4 * index + i, words[i].to(tl.int64))


def _words(blocks, row, step, stream, seed, size=4):
    """(len(blocks), 4) int64, made by programs of ``size`` blocks."""
    words = torch.zeros(len(blocks), 4, dtype=torch.int64, device=DEVICE)
    counter = torch.tensor([row, step, seed], device=DEVICE)
    grid = (len(blocks) // size,)
    launch(_words_kernel, lambda: grid, blocks, counter, words, STREAM=stream, BLOCK=size, config=Launch(1))
    return words


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_by_the_published_answers(counter, seed, words):
    """Random123's known answers for Philox4x32-10; its key is (seed mod 2^32, seed div 2^32)."""
    block, row, step, stream = counter
    blocks = torch.full((4,), block, device=DEVICE)
    assert _words(blocks, row, step, stream, seed).tolist() == [list(words)] * 4


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("row", "step", "seed"), [(0, 0, 0), (5, 7, SEED), (2**40 + 3, 2**33 + 1, 2**63 - 1)])
def test_words_are_those_of_the_reference(row, step, seed, size):
    """Bit by bit, for any size of the programs."""
    rows = torch.tensor([row], device=DEVICE)
    expected = reference.philox(rows, 256, seed=seed, step=step, stream=3).view(64, 4)
    assert torch.equal(_words(torch.arange(64, device=DEVICE), row, step, 3, seed, size), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 105, 1024, 5000])
def test_draws_match_the_reference(n):
    arguments = {"seed": SEED, "step": _counter(2**35 + 17), "stream": Stream.TIMES}
    assert torch.equal(fused.uniform(_rows(3), n, **arguments), reference.uniform(_rows(3), n, **arguments))
    z, expected = fused.normal(_rows(3), n, **arguments), reference.normal(_rows(3), n, **arguments)
    assert z.dtype == torch.float32
    assert ((z - expected).abs() / expected.abs().clamp(min=1)).max() <= 1e-6


@triton.jit
def _normals_kernel(words_ptr, normals_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    word_r, word_angle = tl.load(words_ptr + index).to(tl.uint32), tl.load(words_ptr + BLOCK + index).to(tl.uint32)
    z0, z1 = noise._normal_pair(word_r, word_angle)
    tl.store(normals_ptr + index, z0)
    tl.store(normals_ptr + BLOCK + index, z1)


def test_normals_of_extreme_words():
    """Box–Muller in float64 from the same uniforms: the error is relative to the radius, also where that vanishes."""
    word = torch.cat(
        [
            torch.arange(16),
            2**32 - 1 - 300 * torch.arange(16),
            2 ** torch.arange(32),
            torch.tensor(0xFACADE) * torch.arange(64),
        ]
    )
    words = torch.stack([word.repeat_interleave(128), word.repeat(128)]).to(DEVICE)
    normals = torch.empty(2, 128 * 128, device=DEVICE)
    launch(_normals_kernel, lambda: (1,), words, normals, BLOCK=128 * 128, config=Launch(4))
    u = words.float() * 2.0**-32 + 2.0**-33
    radius, angle = (-2 * u[0].double().log()).sqrt(), (2 * torch.pi * u[1]).double()
    expected = radius * torch.stack([angle.cos(), angle.sin()])
    assert radius.min() == 0
    assert radius.max() > 6.7
    assert ((normals - expected).abs() <= 3e-7 * radius).all()


def test_a_draw_depends_on_its_row_alone():
    rows = _rows(6)
    arguments = {"seed": 3, "step": 4, "stream": Stream.NOISE}
    whole = fused.normal(rows, 2000, **arguments)
    assert torch.equal(fused.normal(rows[[4, 1]], 2000, **arguments), whole[[4, 1]])
    assert torch.equal(fused.normal(rows, 9, **arguments), whole[:, :9])
    data = torch.zeros(6, 2000, device=DEVICE)
    t = torch.ones(6, device=DEVICE)
    x_t, _ = fused.noisy_sample(data, t, rows, seed=3, step=4, path="linear")
    assert torch.equal(x_t, whole)


def test_ints_and_tensors_are_the_same_counter():
    one = fused.uniform(_rows(2), 8, seed=SEED, step=5, stream=1)
    assert torch.equal(fused.uniform(_rows(2), 8, seed=_counter(SEED), step=_counter(5), stream=1), one)
    assert not torch.equal(fused.uniform(_rows(2), 8, seed=SEED, step=6, stream=1), one)


def test_a_new_step_does_not_recompile():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    draw = torch.compile(
        lambda rows, step: fused.normal(rows, 8, seed=1, step=step, stream=1), fullgraph=True, backend=counter
    )
    draws = [draw(_rows(2), _counter(step)) for step in (0, 1, 16, 2**31)]
    assert counter.frame_count == 1
    assert len({z[0, 0].item() for z in draws}) == 4


# --------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("path", ["linear", "trig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpolation_matches_the_reference(shape, dtype, path):
    check_accuracy("interpolate", _pair(shape, dtype), {"path": path})


@pytest.mark.parametrize("path", ["linear", "trig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_noisy_samples_match_the_reference(shape, dtype, path):
    check_accuracy("noisy_sample", _sample(shape, dtype), {"path": path, "seed": SEED})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_noisy_latents_match_the_reference(shape, dtype):
    arguments = _sample(shape, dtype, channels=2)
    check_accuracy("noisy_sample", arguments, {"path": "linear", "seed": SEED, "latent_scale": 0.18215})


def test_ends_of_the_path():
    """At t=0 the sample itself, at t=1 the noise itself."""
    arguments = _sample((4, 8, 8), rows=2)
    arguments["t"] = torch.tensor([0.0, 1.0], device=DEVICE)
    epsilon = fused.normal(arguments["rows"], 256, seed=1, step=arguments["step"], stream=Stream.NOISE).view(2, 4, 8, 8)
    x_t, v_t = fused.noisy_sample(**arguments, seed=1, path="linear")
    assert torch.equal(x_t[0], arguments["data"][0])
    assert torch.equal(x_t[1], epsilon[1])
    # where it is compiled, the last product of the draw and the difference are rounded once
    torch.testing.assert_close(v_t, epsilon - arguments["data"], rtol=3e-7, atol=5e-7)


def test_strided_inputs():
    wide = _pair((4, 8, 8), rows=6)
    strided = {name: x[::2] for name, x in wide.items()}
    strided["x0"] = strided["x0"].transpose(1, 3)
    packed = {name: x.contiguous() for name, x in strided.items()}
    strided["noise"] = packed["noise"] = packed["noise"].view(3, 8, 8, 4)
    for ours, expected in zip(
        fused.interpolate(**strided, path="trig"), fused.interpolate(**packed, path="trig"), strict=True
    ):
        assert torch.equal(ours, expected)


# -------------------------------------------------------------------------------------------------- contract


def test_raw_ops():
    sample, pair = _sample((3, 5, 7)), _pair((3, 5, 7))
    rows, seed, step = sample["rows"], _counter(SEED), sample["step"]
    torch.library.opcheck(noise._draw_op, (rows, seed, step, 7, 1, True))
    torch.library.opcheck(noise._interpolate_op, (*pair.values(), "trig"))
    torch.library.opcheck(noise._noisy_sample_op, (sample["data"], sample["t"], rows, seed, step, "linear", None))
    latents = _sample((3, 5, 7), channels=2)["data"]
    torch.library.opcheck(noise._noisy_sample_op, (latents, sample["t"], rows, seed, step, "linear", 0.5))


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("uniform", {"rows": _rows(3), "step": _counter(5)}, {"n": 1, "seed": 7, "stream": Stream.DROP}),
        ("normal", {"rows": _rows(3), "step": _counter(5)}, {"n": 105, "seed": 7, "stream": Stream.TIMES}),
        ("interpolate", _pair((3, 5, 7)), {"path": "trig"}),
        ("noisy_sample", _sample((3, 5, 7)), {"seed": 7, "path": "linear"}),
        ("noisy_sample", _sample((3, 5, 7), channels=2), {"seed": 7, "path": "trig", "latent_scale": 0.5}),
    ],
)
def test_compiles_and_repeats(name, arguments, options):
    check_compiles(name, arguments, options)
    check_repeatable(name, arguments, options)


def test_inputs_that_need_a_gradient_are_refused():
    """A silent stop of the gradient would train garbage."""
    pair = _pair((3, 5, 7))
    pair["x0"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for x0; detach it or use impl='torch'"):
        fused.interpolate(**pair, path="linear")
    with torch.no_grad():
        assert not fused.interpolate(**pair, path="linear")[0].requires_grad
    sample = _sample((3, 5, 7))
    sample["data"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for data"):
        fused.noisy_sample(**sample, seed=1, path="linear")


def test_bad_inputs():
    pair, sample = _pair((3, 5, 7)), _sample((3, 5, 7))
    with pytest.raises(ValueError, match="path='cubic' is not known; choose one of linear, trig"):
        fused.interpolate(**pair, path="cubic")
    with pytest.raises(ValueError, match=r"noise has shape \(2, 3, 5, 7\) where \(3, 3, 5, 7\) is needed"):
        fused.interpolate(**{**pair, "noise": pair["noise"][:2]}, path="linear")
    with pytest.raises(ValueError, match=r"t has shape \(1,\) where \(3,\) is needed"):
        fused.interpolate(**{**pair, "t": pair["t"][:1]}, path="linear")
    with pytest.raises(ValueError, match=r"data has dtype torch\.float64"):
        fused.noisy_sample(**{**sample, "data": sample["data"].double()}, seed=1, path="linear")
    with pytest.raises(ValueError, match=r"data has shape \(3, 3, 5, 7\) where \(B, 2C, ...\), mean and std, is"):
        fused.noisy_sample(**sample, seed=1, path="linear", latent_scale=1.0)
    with pytest.raises(ValueError, match=r"rows must be \(B,\) int64 global row indices, not \(3,\) torch\.int32"):
        fused.noisy_sample(**{**sample, "rows": sample["rows"].int()}, seed=1, path="linear")
    with pytest.raises(ValueError, match=r"step must be an int or a 0-d int64 tensor on .*, not \(\) torch\.float32"):
        fused.uniform(sample["rows"], 1, seed=1, step=torch.tensor(1.0, device=DEVICE), stream=0)
    with pytest.raises(ValueError, match="n=0 is not a number of values per row"):
        fused.uniform(sample["rows"], 0, seed=1, step=1, stream=0)
