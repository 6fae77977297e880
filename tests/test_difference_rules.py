"""The rule of every operator: its difference and tangent against float64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as nnf
from foreign_networks import Function
from image_operators import MOVING, OTHERS, inputs

from soflow_fast.difference_rules import RULES
from soflow_fast.differencing import ForwardDifference

B = 3
_generator = torch.Generator().manual_seed(0)


def _normal(*shape, scale=1.0):
    return scale * torch.randn(*shape, generator=_generator, dtype=torch.float64)


W, TABLE, KERNEL, GAIN = _normal(6, 8), _normal(4, 8), _normal(5, 4, 3, 3), 1 + _normal(8, scale=0.1)
MASK = _normal(8) > 0
HIGH = torch.arange(4)[:, None].expand(4, 4) == 2
FIRST = torch.zeros(B, 1, 4, 4, dtype=torch.int64)


def _heads(x):
    return x.view(B, 2, 4, 8)


def _assignment(x, t):
    y = x.clone()
    y[:, 0] = t[:, None, None] * x[:, 1]
    y[:, 1:3, 2] = 0.5
    y[..., torch.tensor([0, 2])] = (x * x)[..., 1:3]
    y.diagonal(dim1=2, dim2=3).mul_(3)
    return y


def _assignment_of_what_stays(x, t):
    y = x * t[:, None, None, None]
    y[:, 0] = torch.arange(4)
    y[:, 1] = torch.tensor([True, False, True, True])
    y = y.index_put((torch.tensor([0]), torch.tensor([2])), torch.ones(4, 4).to(y))
    return y.scatter_add(1, FIRST, torch.ones(B, 1, 4, 4).to(y)) + torch.ones_like(x).index_add(
        1, FIRST[0, 0, 0, :1], y[:, :1]
    )


# Of x (B, 4, 4, 4), positive and away from the kinks of the functions that have one, and of t (B,).
OPERATORS = {
    "view": lambda x, t: x.view(B, -1),
    "reshape": lambda x, t: x.transpose(1, 2).reshape(B, -1),
    "flatten": lambda x, t: x.flatten(1).unflatten(1, (8, 8)),
    "permute": lambda x, t: x.permute(0, 3, 1, 2),
    "transpose": lambda x, t: x.mT @ x,
    "t": lambda x, t: x.flatten(1).t(),
    "movedim": lambda x, t: x.movedim(1, 3),
    "squeeze": lambda x, t: t.unsqueeze(1).squeeze(1) * x.mean((1, 2, 3)),
    "squeeze_all": lambda x, t: t[None].squeeze() * x.mean((1, 2, 3)),
    "expand": lambda x, t: t.view(B, 1, 1, 1).expand(B, 4, 4, 4) + x,
    "repeat": lambda x, t: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x, t: x.repeat_interleave(2, dim=2),
    "split": lambda x, t: x.split(2, 1)[1],
    "split_with_sizes": lambda x, t: x.split([1, 3], 2)[1],
    "chunk": lambda x, t: x.chunk(2, 3)[0],
    "unbind": lambda x, t: x.unbind(1)[2],
    "slice": lambda x, t: x[:, 1:3, ..., ::2],
    "select": lambda x, t: x[:, 1],
    "narrow": lambda x, t: x.narrow(1, 1, 2),
    "diagonal": lambda x, t: x.diagonal(dim1=2, dim2=3),
    "index": lambda x, t: x[:, torch.tensor([2, 0, 2])],
    "index_select": lambda x, t: x.index_select(1, torch.tensor([3, 1])),
    "gather": lambda x, t: x.gather(1, torch.zeros(B, 2, 4, 4, dtype=torch.int64)),
    "flip": lambda x, t: x.flip(2),
    "roll": lambda x, t: x.roll(1, 3),
    "rot90": lambda x, t: x.rot90(1, (2, 3)),
    "unfold": lambda x, t: x.unfold(2, 2, 2),
    "im2col": lambda x, t: nnf.unfold(x, 2, stride=2),
    "contiguous": lambda x, t: x.permute(0, 2, 3, 1).contiguous(),
    "clone": lambda x, t: x.clone(),
    "detach": lambda x, t: x.detach(),
    "to": lambda x, t: x.double().to(x.dtype),
    "neg": lambda x, t: -x,
    "sum": lambda x, t: x.sum((1, 2)),
    "mean": lambda x, t: x.mean(1, keepdim=True) + x.mean(),
    "cumsum": lambda x, t: x.cumsum(1),
    "tril": lambda x, t: x.tril() + x.triu(1),
    "avg_pool2d": lambda x, t: nnf.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x, t: nnf.adaptive_avg_pool2d(x, 2),
    "upsample_nearest": lambda x, t: nnf.interpolate(x, scale_factor=2.0),
    "upsample_exact": lambda x, t: nnf.interpolate(x, size=6, mode="nearest-exact"),
    "upsample_bilinear": lambda x, t: nnf.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "upsample_bicubic": lambda x, t: nnf.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "pixel_shuffle": lambda x, t: nnf.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x, t: nnf.pixel_unshuffle(x, 2),
    "pad": lambda x, t: nnf.pad(x, (1, 0, 0, 2), value=3.0),
    "pad_reflect": lambda x, t: nnf.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_replicate": lambda x, t: nnf.pad(x, (1, 1, 1, 1), mode="replicate"),
    "masked_fill": lambda x, t: x.view(B, 8, 8).masked_fill(MASK, -2.0),
    "where": lambda x, t: torch.where(MASK, x.view(B, 8, 8), t.view(B, 1, 1)) + torch.where(MASK, 1.0, x.view(B, 8, 8)),
    "cat": lambda x, t: torch.cat([x, torch.ones_like(x), 2 * x], 1),
    "stack": lambda x, t: torch.stack([x, x * x], 2),
    "add": lambda x, t: 1 + torch.add(x, t.view(B, 1, 1, 1), alpha=3) + W[0, 0].to(x),
    "sub": lambda x, t: t.view(B, 1, 1, 1) - x - 0.5,
    "rsub": lambda x, t: 1 - x,
    "add_of_a_constant": lambda x, t: t[:, None] + GAIN.to(x),
    "mul": lambda x, t: x * t.view(B, 1, 1, 1) * 2 * W[0, 0].to(x),
    "in_place": lambda x, t: (2 * x).add_(1).mul_(x),
    "div": lambda x, t: x / 2 + 1 / x + x / (1 + t.view(B, 1, 1, 1)) + t.view(B, 1, 1, 1) / x,
    "reciprocal": lambda x, t: x.reciprocal(),
    "addcmul": lambda x, t: torch.addcmul(t.view(B, 1, 1, 1), x, x * x, value=2).addcmul(x, t[:1]),
    "mm": lambda x, t: x.flatten(1) @ torch.cat([W.mT.to(x)] * 8),
    "mm_itself": lambda x, t: torch.mm(x.view(-1, 8), W.mT.to(x)),
    "bmm": lambda x, t: torch.bmm(x.flatten(1, 2), x.flatten(1, 2).mT),
    "matmul": lambda x, t: x @ (x * x).mT,
    "addmm": lambda x, t: torch.addmm(GAIN.to(x)[:6], x.view(-1, 8), W.mT.to(x), beta=2, alpha=3),
    "addmm_of_moving": lambda x, t: torch.addmm(x.view(-1, 8)[:, :6], x.view(-1, 8), W.mT.to(x)),
    "baddbmm": lambda x, t: torch.baddbmm(t.view(B, 1, 1), x[:, 0], x[:, 1], alpha=0.5),
    "einsum": lambda x, t: torch.einsum("bcij,bdij->bcd", x, x * x),
    "einsum_of_one": lambda x, t: torch.einsum("bcij->bijc", x),
    "linear": lambda x, t: nnf.linear(x.view(B, -1, 8), W.to(x), GAIN.to(x)[:6]),
    "linear_of_moving_weights": lambda x, t: nnf.linear(x[0, 0], x[1, 1]),
    "conv1d": lambda x, t: nnf.conv1d(x.flatten(2), KERNEL[..., 0].to(x), GAIN.to(x)[:5], padding=1),
    "conv2d": lambda x, t: nnf.conv2d(x, KERNEL.to(x), GAIN.to(x)[:5], stride=2, padding=1),
    "conv3d": lambda x, t: nnf.conv3d(x[:, None], KERNEL[:1, :1, :, None].to(x)),
    "conv_transpose1d": lambda x, t: nnf.conv_transpose1d(x.flatten(2), KERNEL[:4, :, 0].to(x), stride=2),
    "conv_transpose2d": lambda x, t: nnf.conv_transpose2d(x, KERNEL[:4].to(x), GAIN.to(x)[:4], stride=2),
    "sqrt": lambda x, t: x.sqrt(),
    "rsqrt": lambda x, t: x.rsqrt(),
    "square": lambda x, t: x.square(),
    "pow": lambda x, t: x**2 + x**0.5 + x**-0.5 + x**3,
    "exp": lambda x, t: torch.exp(-x),
    "log": lambda x, t: x.log(),
    "sin": lambda x, t: torch.sin(9 * t)[:, None] + torch.sin(x).flatten(1),
    "cos": lambda x, t: torch.cos(9 * t)[:, None] + torch.cos(x).flatten(1),
    "tanh": lambda x, t: torch.tanh(x - 1),
    "sigmoid": lambda x, t: torch.sigmoid(x - 1),
    "silu": lambda x, t: nnf.silu(x - 1),
    "gelu": lambda x, t: nnf.gelu(x - 1),
    "gelu_tanh": lambda x, t: nnf.gelu(x - 1, approximate="tanh"),
    "relu": lambda x, t: nnf.relu(x - 2) + nnf.leaky_relu(2 - x) + nnf.relu6(x) + nnf.hardtanh(x / 4),
    "elu": lambda x, t: nnf.elu(x - 2) + nnf.celu(x - 2) + nnf.selu(x - 2),
    "softplus": lambda x, t: nnf.softplus(x) + nnf.mish(x) + nnf.hardswish(x) + nnf.logsigmoid(x),
    "erf": lambda x, t: torch.erf(x) + x.log1p() + x.expm1() + x.atan() + x.log2() + x.exp2(),
    "abs": lambda x, t: (-x).abs() + x.clamp(0.1, 9.0) + x.clamp_min(0.1) + x.clamp_max(9.0),
    "maximum": lambda x, t: torch.maximum(x, -x) + torch.minimum(x, 3 * x) + torch.atan2(x, 2 * x * x),
    "layer_norm": lambda x, t: nnf.layer_norm(x.view(B, -1, 8), (8,), GAIN.to(x), GAIN.to(x), 1e-6),
    "layer_norm_of_two": lambda x, t: nnf.layer_norm(x, (4, 4)),
    "rms_norm": lambda x, t: nnf.rms_norm(x.view(B, -1, 8), (8,), GAIN.to(x), 1e-6),
    "rms_norm_without_weight": lambda x, t: nnf.rms_norm(x, (4,)),
    "group_norm": lambda x, t: nnf.group_norm(x, 2, GAIN.to(x)[:4], GAIN.to(x)[4:]) + nnf.group_norm(x, 4),
    "vector_norm": lambda x, t: nnf.normalize(x) + torch.linalg.vector_norm(x),
    "sigmoid_tails": lambda x, t: 1e6 * torch.sigmoid(x - 20) + 1e9 * nnf.silu(x - 30) + torch.sigmoid(x + 3),
    "safe_softmax": lambda x, t: torch.ops.aten._safe_softmax(x.masked_fill(HIGH, -math.inf), -1),
    "log_softmax": lambda x, t: torch.log_softmax(3 * x, 1),
    "lerp": lambda x, t: torch.lerp(x, x * x, 0.3),
    "masked_fill_of_moving": lambda x, t: x.view(B, 8, 8).masked_fill(MASK, 3 * t.mean()),
    "rsub_scaled": lambda x, t: torch.rsub(x, 1, alpha=3),
    "logaddexp": lambda x, t: torch.logaddexp(x, 2 * x) + nnf.hardsigmoid(x),
    "avg_pool3d": lambda x, t: nnf.avg_pool3d(x, 2),
    "fft": lambda x, t: torch.fft.irfft2(torch.fft.rfft2(x) * GAIN[:3].to(x)) + torch.fft.ifftn(x).imag,
    "fft_1d": lambda x, t: torch.fft.irfft(torch.fft.rfft(x)) + torch.fft.ifft(torch.fft.fft(x) * (1 + 2j)).real,
    "fft_2d": lambda x, t: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(x))).real + torch.fft.ifftshift(x),
    "spectrum": lambda x, t: torch.fft.rfft2(x).abs() + torch.linalg.vector_norm(torch.fft.rfft2(x)),
    "fft_nd": lambda x, t: torch.fft.irfftn(torch.fft.rfftn(x).conj()) + torch.fft.fftn(x).imag,
    "scatter": lambda x, t: x.scatter(1, FIRST, x[:, 1:2]).scatter(1, 1 + FIRST, 2.0),
    "scatter_add": lambda x, t: x.scatter_add(1, FIRST, (x * x)[:, :1]),
    "index_add": lambda x, t: x.index_add(1, torch.tensor([0, 0]), x[:, :2], alpha=2),
    "assignment": _assignment,
    "assignment_of_what_stays": _assignment_of_what_stays,
    "einsum_of_three": lambda x, t: torch.einsum("bcij,bdij,b->bcd", x, x * x, t),
    "hyperbolic": lambda x, t: x.sinh() + x.cosh() + x.asinh() + x.tan() + x.log10(),
    "steps": lambda x, t: x * ((9 * x).floor() + (9 * x).ceil() + (9 * x).round() + (x - 1).sign()),
    "prelu": lambda x, t: nnf.prelu(x - 2, W[0, :4].to(x)),
    "extremes": lambda x, t: x.amax(1) + x.amin(1) + x.max(1)[0] + x.min(1).values + x.max() * x.min(),
    "sort": lambda x, t: x.sort(1, descending=True)[0][:, :2] + x.topk(2, 1)[0],
    "prod": lambda x, t: x.prod(1, dtype=x.dtype) + x.logsumexp(1) + x.cumprod(1)[:, 2],
    "max_pool2d": lambda x, t: nnf.max_pool2d(x, 2) + nnf.adaptive_max_pool2d(x, 2),
    "instance_norm": lambda x, t: nnf.instance_norm(x, weight=GAIN[:4].to(x), bias=GAIN[4:].to(x)),
    "batch_norm": lambda x, t: nnf.batch_norm(x, GAIN[:4].to(x), GAIN[4:].to(x), GAIN[:4].to(x), GAIN[4:].to(x)),
    "variance": lambda x, t: x.var(1) + x.std((1, 2), keepdim=True)[:, 0] + x.var(1, correction=0) + x.var() + x.std(),
    "variance_and_mean": lambda x, t: sum(torch.var_mean(x, 1)) * sum(torch.std_mean(x, 1)),
    "attention_of_groups": lambda x, t: nnf.scaled_dot_product_attention(
        _heads(x), _heads(x)[:, :1], _heads(x * x)[:, :1], enable_gqa=True
    ),
    # by simpler operators: those that have no rule, and that torch defines by others
    "defined_by_others": lambda x, t: (
        nnf.glu(x) * nnf.cosine_similarity(x, x * x)[:, None, :, :2] + nnf.softsign(x[..., :2])
    ),
    "rotary": lambda x, t: torch.view_as_real(
        torch.view_as_complex(x.view(B, 8, 4, 2)) * torch.polar(GAIN[:4], GAIN[4:]).to(torch.complex(x, x).dtype)
    ),
    "pool_1d": lambda x, t: nnf.interpolate(nnf.avg_pool1d(x.flatten(2), 2), scale_factor=2.0, mode="linear"),
    "softmax_of_masked": lambda x, t: torch.softmax((9 * x).view(B, 8, 8).masked_fill(MASK, -math.inf), -1),
    "attention_causal": lambda x, t: nnf.scaled_dot_product_attention(
        _heads(x), _heads(x * x), _heads(x), is_causal=True
    ),
    "attention_masked": lambda x, t: nnf.scaled_dot_product_attention(
        _heads(x), _heads(x * x), _heads(x), attn_mask=torch.ones(4, 4, dtype=torch.bool).triu()
    ),
    "attention_biased": lambda x, t: nnf.scaled_dot_product_attention(
        _heads(x), _heads(x * x), _heads(x)[..., :3], attn_mask=W[:4, :4].to(x), scale=0.5
    ),
    "attention_of_narrow_values": lambda x, t: nnf.scaled_dot_product_attention(
        _heads(x), _heads(x * x), _heads(x)[..., :3], scale=0.5
    ),
    "softmax": lambda x, t: torch.softmax(100 + x, -1),
    "attention": lambda x, t: nnf.scaled_dot_product_attention(_heads(x), _heads(x * x), _heads(x) + 5, scale=0.3),
    "attention_by_hand": lambda x, t: torch.softmax(_heads(x) @ _heads(x).mT / math.sqrt(8), -1) @ _heads(x * x),
    "dropout_of_evaluation": lambda x, t: nnf.dropout(x, 0.5, training=False),
}  # fmt: skip
OPERATORS |= {f"moving_{name}": function for name, function in MOVING.items()} | OTHERS


@functools.cache
def _forward(name):
    return ForwardDifference(Function(OPERATORS[name]))


@pytest.fixture(scope="module", params=OPERATORS)
def name(request):
    """Its tests one after the other, so that what was captured is used again."""
    return request.param


def test_rule(name):
    """As accurate as the arithmetic, however small the step; the value is what the operator computes."""
    function = OPERATORS[name]
    forward = _forward(name)
    for step in (0.1, 1e-3, 1e-5):
        x, t, dx, dt = inputs(step)
        truth = function(x + dx, t + dt) - function(x, t)
        single = [z.float() for z in (x, t, t / 2)]
        value, difference = forward(*single, None, dx.float(), dt.float())
        torch.testing.assert_close(value, function(*single[:2]), rtol=1e-6, atol=1e-6)
        assert difference.dtype == value.dtype
        assert (difference - truth).norm() <= 3e-6 * truth.norm()


@pytest.mark.parametrize("name", [name for name in MOVING if "norm" in name])
def test_norms_with_weights_that_move_by_steps_of_any_size(name):
    for step in (3.0, 1.0, 1e-7):
        x, t, dx, dt = (z.float().double() for z in inputs(step))
        truth = MOVING[name](x + dx, t + dt) - MOVING[name](x, t)
        single = [z.float() for z in (x, t, t / 2)]
        _, difference = _forward(f"moving_{name}")(*single, None, dx.float(), dt.float())
        assert (difference - truth).norm() <= 3e-6 * truth.norm()


def test_tangent(name):
    function = OPERATORS[name]
    x, t, dx, dt = inputs(1.0)
    if name in ("detach", "grid_sample", "grid_sample_3d"):  # linear, and without a derivative of torch's
        truth = function(x + dx, t) - function(x, t)
    else:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            truth = torch.func.jvp(function, (x, t), (dx, dt))[1]
    single = [z.float() for z in (x, t, t / 2)]  # of which there is a capture, which takes most of the time
    tangent = _forward(name)(*single, None, dx.float(), dt.float(), mode="tangent")[1]
    assert (tangent - truth).norm() <= 3e-6 * truth.norm()
    if name in ("layer_norm", "group_norm", "rms_norm", "gelu", "silu", "softmax", "attention", "variance"):
        tangent = _forward(name)(x, t, t / 2, None, dx, dt, mode="tangent")[1]
        assert (tangent - truth).norm() <= 1e-9 * truth.norm()


def test_gradient(name):
    """Of the value, as the network's own."""
    function = OPERATORS[name]
    x, t, dx, dt = (z.float() for z in inputs(0.1))
    gradients = []
    for run in (lambda x, t: _forward(name)(x, t, t / 2, None, dx, dt)[0], function):
        leaves = (x.clone().requires_grad_(), t.clone().requires_grad_())
        y = run(*leaves)
        if y.requires_grad:
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            gradients.append(torch.autograd.grad((weights * y).sum(), leaves, materialize_grads=True))
    if name != "detach":  # of which the network has a gradient of zero, and a difference
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("fft", "spectrum", "scatter", "scatter_add", "index_add", "assignment", "assignment_of_what_stays"),
        *("where", "masked_fill_of_moving", "cat", "stack", "lerp", "addcmul", "addmm_of_moving", "einsum_of_three"),
        *("add_of_a_constant", "attention", "attention_masked", "variance_and_mean", "batch_norm", "extremes", "prod"),
    ],
)
def test_autocast(name):
    """Of a bfloat16 x beside a float32 t, as autocast mixes them where the capture saw float32 alone."""
    function = OPERATORS[name]
    x, t, dx, dt = (z.bfloat16().double() for z in inputs(0.1))
    truth = function(x, t)
    forward = ForwardDifference(Function(lambda x, t: function(x @ torch.eye(4).to(x), t)))
    with torch.autocast("cpu", torch.bfloat16):
        value, difference = forward(x.float(), t.float(), t.float() / 2, None, dx.float(), dt.float())
    assert (value - truth).norm() <= 0.03 * truth.norm()
    change = function(x + dx, t + dt) - truth
    assert (difference - change).norm() <= 0.1 * change.norm()


def _together(functions):
    """What the functions compute, as one network: to capture them one by one takes three times as long."""

    def run(x, t):
        outputs = [function(x, t) for function in functions]
        return torch.cat([(torch.view_as_real(y) if y.is_complex() else y).flatten() for y in outputs])

    return Function(run)


@pytest.mark.slow
def test_every_rule_is_tried():
    called = set()
    functions = list(OPERATORS.values())
    for part in range(16):  # one whole takes twice as long
        forward = ForwardDifference(_together(functions[part::16]))
        forward.prepare(inputs(1.0)[0].float(), None)
        nodes = [node for derived in forward._derived.values() for node in derived.run.graph.nodes]
        called |= {str(getattr(node.meta.get("operator"), "overloadpacket", None)) for node in nodes}
    assert {str(operator) for operator in RULES} - called == {"aten.native_dropout"}  # see test_dropout


@pytest.mark.parametrize("mode", ["difference", "tangent"])
def test_where_nothing_changes_zero_by_zero_is_zero(mode):
    forward = ForwardDifference(Function(lambda x, t: x + nnf.normalize(nnf.relu(x - 9)) + nnf.relu(x - 9).sqrt()))
    x, t, dx, dt = inputs(0.1)
    assert torch.equal(forward(x, t, t / 2, None, dx, dt, mode=mode)[1], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quotient_that_moves_to_where_its_eps_keeps_it_at_zero(dtype):
    """As linear attention's of a query that has no positive part any more; the eps is less than is rounded."""

    def shares(x, t):
        h = nnf.relu(x)
        return x + (h * GAIN[:4].to(x)) / (h @ GAIN[4:, None].to(x) + 1e-15)

    x, t, _, dt = inputs(1.0)
    x, dx = x.to(dtype), (-x - (torch.arange(B) > 0).view(B, 1, 1, 1) / 7).to(dtype)  # to zero, and below it
    _, difference = ForwardDifference(Function(shares))(x, t.to(dtype), t.to(dtype), None, dx, dt.to(dtype))
    truth = shares((x + dx).double(), t) - shares(x.double(), t)
    assert (difference - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


def test_rms_norm_of_small_numbers_in_bfloat16():
    """Its default eps is that of float32 there."""
    x, t, dx, dt = inputs(1e-3)
    low = [z.bfloat16() for z in (x / 100, t, t / 2, dx / 100, dt)]
    forward = ForwardDifference(Function(lambda x, t: nnf.rms_norm(x, (4,))))
    _, difference = forward(*low[:3], None, *low[3:])
    exact, eps = [z.double() for z in low], torch.finfo(torch.float32).eps
    truth = nnf.rms_norm(exact[0] + exact[3], (4,), eps=eps) - nnf.rms_norm(exact[0], (4,), eps=eps)
    assert (difference - truth).norm() <= 0.01 * truth.norm()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: torch.softmax(300 * x, -1),
        lambda x, t: torch.log_softmax(300 * x, -1),
        lambda x, t: torch.sigmoid(900 * x - 900),
        lambda x, t: torch.exp(120 * x - 290),
        lambda x, t: torch.expm1(120 * x - 290) + torch.exp2(120 * x - 290) + torch.sinh(50 * x - 60),
        lambda x, t: nnf.softplus(300 * x - 300) + torch.logaddexp(300 * x, x) + (300 * x).logsumexp(1, True),
        lambda x, t: nnf.elu(300 * x - 300) + nnf.selu(300 * x - 300) + nnf.mish(300 * x - 300) + (300 * x) ** 3,
        lambda x, t: nnf.scaled_dot_product_attention(*(40 * _heads(x),) * 2, _heads(x)),
    ],
)
def test_large_changes_do_not_overflow(function):
    x, t, dx, dt = inputs(0.3)
    single = [z.float() for z in (x, t, t / 2)]
    _, difference = ForwardDifference(Function(function))(*single, None, dx.float(), dt.float())
    truth = function(x + dx, t + dt) - function(x, t)
    assert (difference - truth).norm() <= 1e-4 * truth.norm()


def test_dropout_has_one_mask():
    """The value's mask is the difference's: zeros agree, and what is kept is scaled alike."""
    forward = ForwardDifference(Function(lambda x, t: nnf.dropout(3 * x, 0.5)))
    x, t, dx, dt = inputs(0.1)
    value, difference = forward(x, t, t / 2, None, dx, dt)
    kept = value != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert torch.equal(difference, torch.where(kept, 6 * dx, 0))
    torch.manual_seed(0)
    first, _ = forward(x, t, t / 2, None, dx, dt)
    assert not torch.equal(first == 0, value == 0)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": W[:4, :4], "scale": 0.3}]
)
def test_attention_with_dropout_has_one_mask(options):
    """Of equal draws the difference is that of two values."""

    def attention(x, t):
        k, v = _heads(x + 1), _heads(x * x)
        if "enable_gqa" in options:
            k, v = k[:, :1], v[:, :1]
        return nnf.scaled_dot_product_attention(_heads(x), k, v, dropout_p=0.5, **options)

    forward = ForwardDifference(Function(attention))
    x, t, dx, dt = inputs(0.1)
    forward.prepare(x, None)
    torch.manual_seed(0)
    before, difference = forward(x, t, t / 2, None, dx, dt)
    torch.manual_seed(0)
    after, _ = forward(x + dx, t + dt, t / 2, None, dx, dt)
    assert (difference - (after - before)).norm() <= 1e-12 * difference.norm()
    later, _ = forward(x, t, t / 2, None, dx, dt)
    assert not torch.equal(later, before)
