"""The random draws against an independent Philox, and every reference op against formulas in float64."""

import math

import pytest
import torch

from soflow_fast.kernels import reference as ops
from soflow_fast.kernels.reference import Stream, normal, philox, uniform

DRAW = {"seed": 3, "step": 5, "stream": Stream.NOISE}


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- random draws


def philox_block(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in Python integers, from the equations of Salmon et al. 2011."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


# counter, key and output words, from the known-answer file of Random123
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_python_philox_gives_the_published_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox_block(counter, key) == words


def test_philox_gives_the_published_answer_of_counter_and_key_zero():
    words = philox(torch.tensor([0]), 4, seed=0, step=0, stream=0)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 7, 2**32 - 1])
def test_philox_equals_the_python_philox(seed, step):
    rows = [0, 1, 2**31, 0x85A308D3, 2**32 - 1]
    for stream in Stream:
        words = philox(torch.tensor(rows), 9, seed=seed, step=step, stream=stream)
        key = (seed % 2**32, seed // 2**32)
        expected = [[philox_block((i // 4, row, step, int(stream)), key)[i % 4] for i in range(9)] for row in rows]
        assert words.tolist() == expected
        assert words.dtype == torch.int64


@pytest.mark.parametrize("draw", [philox, uniform, normal])
def test_draws_depend_only_on_seed_step_row_and_stream(draw):
    rows = torch.arange(6)
    whole = draw(rows, 8, **DRAW)
    assert torch.equal(draw(rows, 5, **DRAW), whole[:, :5])
    assert torch.equal(torch.cat([draw(rows[:2], 8, **DRAW), draw(rows[2:], 8, **DRAW)]), whole)
    tensors = {"seed": torch.tensor(3), "step": torch.tensor(5), "stream": Stream.NOISE}
    assert torch.equal(draw(rows, 8, **tensors), whole)


def test_every_row_step_stream_and_seed_has_draws_of_its_own():
    rows = torch.arange(16)
    draws = [
        philox(rows, 4, seed=seed, step=step, stream=stream)
        for seed in (0, 1, 2**32)
        for step in range(3)
        for stream in Stream
    ]
    words = torch.cat(draws).flatten().tolist()
    # 4032 words of 32 bits would coincide by chance once in 500 choices of the seeds; these do not
    assert len(set(words)) == len(words)


def _kolmogorov_distance(levels):
    """Largest distance between the empirical distribution of values in (0, 1] and the uniform one."""
    levels = levels.double().flatten().sort().values
    index = torch.arange(1, len(levels) + 1, dtype=torch.float64) / len(levels)
    return max((index - levels).max().item(), (levels - index + 1 / len(levels)).max().item())


def test_uniform_draws_are_uniform_on_the_half_open_interval():
    u = uniform(torch.arange(4096), 64, **DRAW)
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() <= 1
    # 1.95/√n is exceeded by one sample in a thousand; these draws are fixed
    assert _kolmogorov_distance(u) < 1.95 / math.sqrt(u.numel())
    for d in (u.double().mean() - 1 / 2, u.double().var() - 1 / 12):
        assert abs(d) < 5 * math.sqrt(1 / 12 / u.numel())


def test_normal_draws_are_standard_normal_and_uncorrelated():
    z = normal(torch.arange(4096), 64, **DRAW).double()
    n = z.numel()
    assert _kolmogorov_distance(torch.special.ndtr(z)) < 1.95 / math.sqrt(n)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / n)
    for a, b in ((z[:, ::2], z[:, 1::2]), (z[:-1], z[1:]), (z[:, :-4], z[:, 4:])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_normal_draws_are_box_muller_of_the_words():
    rows = torch.arange(2048)
    u = (philox(rows, 10, **DRAW).double() + 0.5) / 2**32
    radius, angle = (-2 * u[:, ::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)
    # the word is rounded to float32 before its logarithm: near u = 1, where the radius is small, that is 2^-24 in u
    torch.testing.assert_close(normal(rows, 10, **DRAW).double(), expected, rtol=0, atol=4e-6)
    assert torch.equal(normal(rows, 9, **DRAW), normal(rows, 10, **DRAW)[:, :9])


# ---------------------------------------------------------------------------------------------- paths and latents


def _linear_path(t):
    return 1 - t, t, -1.0, 1.0


def _trig_path(t):
    angle = math.pi / 2 * t
    return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)


PATHS = {"linear": _linear_path, "trig": _trig_path}


@pytest.mark.parametrize("path", PATHS)
def test_interpolate(path):
    x0, noise, t = _randn(5, 2, 3, 3), _randn(5, 2, 3, 3, seed=1), torch.tensor([0, 0.2, 0.5, 0.9, 1]).double()
    x_t, v_t = ops.interpolate(x0, noise, t, path=path)
    for i, time in enumerate(t.tolist()):
        alpha, beta, dalpha, dbeta = PATHS[path](time)
        torch.testing.assert_close(x_t[i], alpha * x0[i] + beta * noise[i], rtol=0, atol=1e-14)
        torch.testing.assert_close(v_t[i], dalpha * x0[i] + dbeta * noise[i], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noisy_sample_draws_the_noise_of_its_rows(dtype):
    data, t, rows = _randn(4, 2, 3, 3).to(dtype), _rand(4), torch.tensor([7, 2, 100, 3])
    x_t, v_t = ops.noisy_sample(data, t, rows, seed=3, step=5, path="linear")
    noise = normal(rows, 18, seed=3, step=5, stream=Stream.NOISE).view(4, 2, 3, 3).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert x_t.dtype == v_t.dtype == wide
    time, x0 = t.view(4, 1, 1, 1), data.double()
    tolerance = {"rtol": 0, "atol": 1e-12 if wide == torch.float64 else 2e-6}
    torch.testing.assert_close(x_t.double(), (1 - time) * x0 + time * noise, **tolerance)
    torch.testing.assert_close(v_t.double(), noise - x0, **tolerance)


def test_noisy_sample_of_latent_moments_draws_the_latent_too():
    mean, std, t, rows = _randn(3, 4, 2, 2), _rand(3, 4, 2, 2), _rand(3), torch.tensor([5, 6, 9])
    x_t, v_t = ops.noisy_sample(torch.cat([mean, std], 1), t, rows, seed=1, step=2, path="trig", latent_scale=0.18215)
    fresh, noise = (normal(rows, 16, seed=1, step=2, stream=s).view(mean.shape).double() for s in (3, 0))
    x0 = (mean + std * fresh) * 0.18215
    for i, time in enumerate(t.tolist()):
        alpha, beta, dalpha, dbeta = _trig_path(time)
        torch.testing.assert_close(x_t[i], alpha * x0[i] + beta * noise[i], rtol=0, atol=1e-13)
        torch.testing.assert_close(v_t[i], dalpha * x0[i] + dbeta * noise[i], rtol=0, atol=1e-13)


# -------------------------------------------------------------------------------------- conditioning and adaLN


def test_time_sinusoids():
    t, s = torch.tensor([0.9, 0.5, 1.0]).double(), torch.tensor([0.1, 0.5, 0.0]).double()
    features = ops.time_sinusoids(t, s, width=256)
    assert features.shape == (2, 3, 256)
    for which, times in enumerate((t, t - s)):
        for row, tau in enumerate(times.tolist()):
            phases = [tau * 10000 ** (-i / 128) for i in range(128)]
            expected = [math.cos(p) for p in phases] + [math.sin(p) for p in phases]
            torch.testing.assert_close(
                features[which, row], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14
            )
    assert ops.time_sinusoids(t.float(), s.float(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_condition_sums_the_embeddings_and_its_sum_carries_no_gradient():
    t, s, table = (_randn(3, 8, seed=i).requires_grad_() for i in range(3))
    labels = torch.tensor([2, 0, 2])
    c, active = ops.condition(t, s, table, labels)
    total = t.detach() + s.detach() + table.detach()[labels]
    torch.testing.assert_close(c, total, rtol=0, atol=1e-15)
    torch.testing.assert_close(active.detach(), total / (1 + torch.exp(-total)), rtol=0, atol=1e-14)
    assert not c.requires_grad
    weights = _randn(3, 8, seed=9)
    active.backward(weights)
    sigmoid = 1 / (1 + torch.exp(-total))
    expected = weights * sigmoid * (1 + total * (1 - sigmoid))
    torch.testing.assert_close(t.grad, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(s.grad, expected, rtol=0, atol=1e-14)
    rows = [torch.zeros(8).double() + expected[1], torch.zeros(8).double(), expected[0] + expected[2]]
    torch.testing.assert_close(table.grad, torch.stack(rows), rtol=0, atol=1e-14)


def _layer_norm(x, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()


def test_modulated_layernorm():
    x, shift, scale = 3 + _randn(2, 5, 12), _randn(2, 12, seed=1), _randn(2, 12, seed=2)
    expected = torch.stack([_layer_norm(x[b], 1e-3) * (1 + scale[b]) + shift[b] for b in range(2)])
    torch.testing.assert_close(ops.modulated_layernorm(x, shift, scale, eps=1e-3), expected, rtol=0, atol=1e-13)
    assert ops.modulated_layernorm(x.float(), shift, scale, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gated_residual_layernorm():
    x, branch = _randn(2, 5, 12), _randn(2, 5, 12, seed=1)
    gate, shift, scale = (_randn(2, 12, seed=i) for i in (2, 3, 4))
    x_new, h = ops.gated_residual_layernorm(x, branch, gate, shift, scale)
    expected = torch.stack([x[b] + gate[b] * branch[b] for b in range(2)])
    torch.testing.assert_close(x_new, expected, rtol=0, atol=1e-14)
    normed = torch.stack([_layer_norm(expected[b], 1e-6) * (1 + scale[b]) + shift[b] for b in range(2)])
    torch.testing.assert_close(h, normed, rtol=0, atol=1e-13)


def test_the_bias_of_a_branch_is_added_before_the_gate():
    x, branch, bias = _randn(2, 5, 12).float(), _randn(2, 5, 12, seed=1).bfloat16(), _randn(12, seed=5).half()
    gate, shift, scale = (_randn(2, 12, seed=i).bfloat16() for i in (2, 3, 4))
    x_new, h = ops.gated_residual_layernorm(x, branch, gate, shift, scale, bias=bias)
    assert (x_new.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(x_new, x + gate.float()[:, None] * (branch.float() + bias.float()))
    wide = [y.double() for y in (x, branch, gate, shift, scale)]
    moved = wide[1] + bias.double()
    for ours, expected in zip(
        ops.gated_residual_layernorm(*wide, bias=bias.double()),
        ops.gated_residual_layernorm(wide[0], moved, *wide[2:]),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_gated_residual_layernorm_normalises_the_stored_stream():
    x, branch = _randn(2, 5, 12).bfloat16(), _randn(2, 5, 12, seed=1).half()
    gate, shift, scale = (_randn(2, 12, seed=i).half() for i in (2, 3, 4))
    x_new, h = ops.gated_residual_layernorm(x, branch, gate, shift, scale)
    assert (x_new.dtype, h.dtype) == (torch.bfloat16, torch.float16)
    normed = _layer_norm(x_new.double(), 1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    torch.testing.assert_close(h.double(), normed, rtol=2**-10, atol=2**-10)


# ----------------------------------------------------------------------------------------------------- losses

SLOPE = {"euler": 1.0, "trig": math.pi / 2}


def _decay(t, tau):
    if t <= tau:
        return 1.0
    q = min(max((1 - t) / (1 - tau), 0), 1 - 1e-6)
    return 1 - math.exp(-0.025 * q / (1 - q))


@pytest.mark.parametrize("parameterization", SLOPE)
@pytest.mark.parametrize("guided", [True, False])
def test_velocity_loss_and_its_gradient(parameterization, guided):
    F, v, F_null = _randn(4, 3, 2).requires_grad_(), _randn(4, 3, 2, seed=1), _randn(4, 3, 2, seed=2)
    t, drop = torch.tensor([0.3, 0.81, 0.95, 0.7]).double(), torch.tensor([False, False, False, True])
    guidance = {"parameterization": parameterization, "guidance_scale": 2.5, "guidance_mix": 0.3, "decay_time": 0.8}
    loss, mse, weight = ops.velocity_loss(F, v, F_null if guided else None, t, drop, **guidance, p=0.7, eps=0.05)
    gradient = torch.autograd.grad(loss.sum(), F)[0]
    slope = SLOPE[parameterization]
    for i in range(4):
        target = v[i]
        if guided and not drop[i]:
            target = 0.3 * (v[i] + _decay(t[i].item(), 0.8) * 1.5 * (v[i] - slope * F_null[i])) + 0.7 * slope * F[i]
        error = (slope * F[i] - target).detach()
        e = error.square().mean().item()
        w = 1 / (slope * (e + 0.05) ** 0.7)
        assert mse[i].item() == pytest.approx(e, rel=1e-12)
        assert weight[i].item() == pytest.approx(w, rel=1e-12)
        assert loss[i].item() == pytest.approx(w * e, rel=1e-12)
        torch.testing.assert_close(gradient[i], w * 2 * slope * error / 6, rtol=1e-12, atol=1e-14)
    assert not mse.requires_grad
    assert not weight.requires_grad


@pytest.mark.parametrize("parameterization", SLOPE)
def test_consistency_loss_and_its_gradient(parameterization):
    F, dF, v, x_t = (_randn(3, 4, seed=i) for i in range(4))
    F.requires_grad_()
    t, gap, s = (torch.tensor(y).double() for y in ([0.9, 0.5, 1.0], [0.1, 0.02, 0.5], [0.2, 0.1, 0.5]))
    loss, mse, weight = ops.consistency_loss(
        F, dF, v, x_t, t, gap, s, parameterization=parameterization, p=0.7, eps=0.05
    )
    gradient = torch.autograd.grad(loss.sum(), F)[0]
    for i in range(3):
        time, g, end = t[i].item(), gap[i].item(), s[i].item()
        l = time - g
        solution = {
            "euler": lambda x, f, tau, end: x + (end - tau) * f,
            "trig": lambda x, f, tau, end: (
                math.cos(math.pi / 2 * (end - tau)) * x + math.sin(math.pi / 2 * (end - tau)) * f
            ),
        }[parameterization]
        before, after = solution(x_t[i], F[i], time, end), solution(x_t[i] - g * v[i], F[i] + dF[i], l, end)
        quotient = ((before - after) / g).detach()
        e = quotient.square().mean().item()
        w = (e + 0.05) ** -0.7
        assert mse[i].item() == pytest.approx(e, rel=1e-11)
        assert weight[i].item() == pytest.approx(w, rel=1e-11)
        # b(t,s) is negative for s < t in both parameterizations
        assert loss[i].item() == pytest.approx(-w * (F[i] * quotient).mean().item(), rel=1e-11)
        torch.testing.assert_close(gradient[i], -w * quotient / 4, rtol=1e-10, atol=1e-12)


def test_losses_of_low_precision_inputs_are_reduced_in_float32():
    F, v, x_t = (_randn(2, 4096, seed=i).bfloat16() for i in range(3))
    t, drop = torch.tensor([0.5, 0.9]), torch.zeros(2, dtype=torch.bool)
    guidance = {"parameterization": "euler", "guidance_scale": 1.0, "guidance_mix": 1.0, "decay_time": 1.0}
    loss, mse, _ = ops.velocity_loss(F, v, None, t, drop, **guidance, p=1.0, eps=0.01)
    assert loss.dtype == mse.dtype == torch.float32
    torch.testing.assert_close(mse.double(), (F.double() - v.double()).square().mean(1), rtol=1e-6, atol=0)
    loss, mse, _ = ops.consistency_loss(F, 0 * F, v, x_t, t, t / 4, t / 2, parameterization="euler", p=1.0, eps=0.01)
    assert loss.dtype == mse.dtype == torch.float32
    torch.testing.assert_close(mse.double(), (v.double() - F.double()).square().mean(1), rtol=1e-6, atol=0)
