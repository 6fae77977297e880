"""The DiT against a plain implementation written here, its weights' names and sizes, and its initialisation."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import DiT, SoFlow, layers
from soflow_fast.dit import PRESETS
from soflow_fast.kernels import reference
from soflow_fast.size import height_and_width

SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}


def _randomize(net):
    """Non-zero everywhere, the zero-initialised modulation included; activations stay of order one."""
    generator = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if p.requires_grad:
            scale = 0.2 if p.dim() < 2 or "embedding_table" in name else p[0].numel() ** -0.5
            p.data = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return net


def _net(**overrides):
    return _randomize(DiT(**{**SMALL, "num_classes": 5, **overrides}).double())


def _inputs(b=4, size=8, channels=3, classes=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, channels, *height_and_width(size), generator=generator, dtype=torch.float64)
    t = torch.rand(b, generator=generator, dtype=torch.float64)
    return x, t, t * torch.rand(b, generator=generator, dtype=torch.float64), torch.arange(b) % (classes + 1)


# ---------------------------------------------------------------------------------- a plain DiT, one layer at a time


def plain_dit(w, x, t, s, labels, *, patch, heads, depth):
    """F(x,t,s,y) from a state_dict ``w``, written as the paper describes it."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    def embed_time(tau, name):
        phase = torch.stack([tau / 10000 ** (i / 128) for i in range(128)], 1)
        u = linear(torch.cat([phase.cos(), phase.sin()], 1), f"{name}.mlp.0")
        return linear(u * torch.sigmoid(u), f"{name}.mlp.2")

    c = embed_time(t, "t_embedder") + embed_time(t - s, "s_embedder") + w["y_embedder.embedding_table.weight"][labels]
    c = c * torch.sigmoid(c)
    h = nn.functional.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    b, d, rows, columns = h.shape
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    for i in range(depth):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{block}.adaLN_modulation.1")[:, None].chunk(6, 2)
        qkv = linear(layer_norm(h) * (1 + scale1) + shift1, f"{block}.attn.qkv")
        q, k, v = qkv.view(b, rows * columns, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // heads), 3) @ v
        h = h + gate1 * linear(mixed.transpose(1, 2).reshape(b, -1, d), f"{block}.attn.proj")
        u = linear(layer_norm(h) * (1 + scale2) + shift2, f"{block}.mlp.fc1")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + gate2 * linear(u, f"{block}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1")[:, None].chunk(2, 2)
    tokens = linear(layer_norm(h) * (1 + scale) + shift, "final_layer.linear")
    image = torch.zeros_like(x)
    for row in range(rows):
        for column in range(columns):
            pixels = tokens[:, row * columns + column].view(b, patch, patch, -1).permute(0, 3, 1, 2)
            image[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = pixels
    return image


@pytest.mark.parametrize(
    ("sizes", "inputs"),
    [
        ({}, {}),
        ({"patch_size": 4, "hidden_size": 72, "num_heads": 1, "mlp_ratio": 2.0}, {}),
        ({"input_size": 6, "in_channels": 1, "depth": 3, "num_heads": 6}, {"size": 6, "channels": 1}),
        ({"input_size": (4, 10)}, {"size": (4, 10)}),
        ({"input_size": [16, 4], "patch_size": 4}, {"size": (16, 4)}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_output_and_every_gradient_equal_the_plain_dit(sizes, inputs, attention):
    net, arguments = _net(**sizes, attention=attention), _inputs(**inputs)
    weights = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(2)).double()
    plain = {k: p.detach().clone().requires_grad_() for k, p in net.state_dict().items()}
    expected = plain_dit(plain, *arguments, patch=net.patch_size, heads=net.num_heads, depth=net.depth)
    ours = net(*arguments)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, p in net.named_parameters():
        if name == "pos_embed":
            assert not p.requires_grad
        else:
            torch.testing.assert_close(p.grad, plain[name].grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("impl_dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_and_its_gradients_are_float32(impl_dtype):
    x, t, s, labels = _inputs()
    truth = _net()(x, t, s, labels)
    net = _net(compute_dtype=impl_dtype).float()
    ours = net(x.float(), t.float(), s.float(), labels)
    assert ours.dtype == torch.float32
    assert ((ours - truth).norm() / truth.norm()) < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[impl_dtype]
    ours.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


def test_a_float32_residual_stream_is_more_exact_than_a_bfloat16_one():
    x, t, s, labels = _inputs(32)
    truth = _net(depth=6)(x, t, s, labels)
    errors = []
    for residual in (torch.float32, torch.bfloat16):
        net = _net(depth=6, compute_dtype=torch.bfloat16, residual_dtype=residual).float()
        errors.append(((net(x.float(), t.float(), s.float(), labels) - truth).norm() / truth.norm()).item())
    assert errors[0] < 0.8 * errors[1]


def test_no_labels_are_the_null_label():
    net, (x, t, s, _) = _net(), _inputs()
    assert net.null_label == 5
    assert torch.equal(net(x, t, s), net(x, t, s, torch.full((4,), 5)))
    unconditional = _net(num_classes=0)
    assert torch.equal(unconditional(x, t, s), unconditional(x, t, s, torch.zeros(4, dtype=torch.int64)))


def test_without_label_dropping_there_is_no_null_label():
    net, (x, t, s, _) = _net(class_dropout_prob=0), _inputs()
    assert net.y_embedder.embedding_table.num_embeddings == 5
    net(x, t, s, torch.arange(4))
    with pytest.raises(ValueError, match="no row for 'no label'"):
        net(x, t, s)


# --------------------------------------------------------------------------------------------- names and sizes

KEYS = [
    "pos_embed",
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "s_embedder.mlp.0.weight",
    "s_embedder.mlp.0.bias",
    "s_embedder.mlp.2.weight",
    "s_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight",
    "blocks.0.attn.proj.bias",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc1.bias",
    "blocks.0.mlp.fc2.weight",
    "blocks.0.mlp.fc2.bias",
    "blocks.0.adaLN_modulation.1.weight",
    "blocks.0.adaLN_modulation.1.bias",
    "blocks.1.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
    "blocks.1.attn.proj.weight",
    "blocks.1.attn.proj.bias",
    "blocks.1.mlp.fc1.weight",
    "blocks.1.mlp.fc1.bias",
    "blocks.1.mlp.fc2.weight",
    "blocks.1.mlp.fc2.bias",
    "blocks.1.adaLN_modulation.1.weight",
    "blocks.1.adaLN_modulation.1.bias",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
]


def test_state_dict_has_the_keys_of_the_public_checkpoints():
    net = DiT(**SMALL, num_classes=5)
    assert sorted(net.state_dict()) == sorted(KEYS)
    assert sorted(SoFlow(net).state_dict()) == sorted(f"network.{key}" for key in KEYS)
    shapes = {key: tuple(p.shape) for key, p in net.state_dict().items()}
    assert shapes["x_embedder.proj.weight"] == (24, 3, 2, 2)
    assert shapes["pos_embed"] == (1, 16, 24)
    assert shapes["y_embedder.embedding_table.weight"] == (6, 24)
    assert shapes["blocks.1.adaLN_modulation.1.weight"] == (144, 24)
    assert shapes["final_layer.linear.weight"] == (12, 24)


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("DiT-B/4", (4, 768, 12, 12), 131),
        ("DiT-B/2", (2, 768, 12, 12), 131),
        ("DiT-M/2", (2, 1024, 16, 16), None),
        ("DiT-L/2", (2, 1024, 24, 16), None),
        ("DiT-XL/2", (2, 1152, 28, 16), 676),
    ],
)
def test_preset_sizes(name, sizes, millions):
    patch, d, depth, _ = sizes
    with torch.device("meta"):
        net = DiT.from_preset(name)
    assert (net.patch_size, net.hidden_size, net.depth, net.num_heads) == sizes
    assert (net.input_size, net.in_channels, net.num_classes, net.mlp_ratio) == (32, 4, 1000, 4.0)
    per_block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    embedders = 2 * (256 * d + d + d * d + d) + 1001 * d + (4 * patch**2 * d + d)
    final = (4 * patch**2 * d + 4 * patch**2) + (2 * d * d + 2 * d)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert count == depth * per_block + embedders + final
    assert millions is None or round(count / 1e6) == millions


def test_preset_names():
    with torch.device("meta"):
        assert DiT.from_preset("DiT-XL-2", num_classes=10, depth=1).hidden_size == 1152
        with pytest.raises(ValueError, match=r"no preset is called 'DiT-H/2'; choose one of DiT-\{S,B,M,L,XL\}/\{1,2"):
            DiT.from_preset("DiT-H/2")
    assert all(head_dim % 8 == 0 for head_dim in (width // heads for _, width, _, heads in PRESETS.values()))


def test_position_embedding():
    d = 16
    for rows, columns in ((3, 3), (2, 5)):
        net = DiT(input_size=(2 * rows, 2 * columns), patch_size=2, hidden_size=d, depth=1, num_heads=2)
        assert net.pos_embed.shape == (1, rows * columns, d)
        for row, column in itertools.product(range(rows), range(columns)):
            omega = [10000 ** (-i / (d // 4)) for i in range(d // 4)]
            expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(
                net.pos_embed[0, row * columns + column], torch.tensor(expected), rtol=0, atol=1e-7
            )


def test_initialisation():
    torch.manual_seed(0)
    net = DiT(input_size=16, patch_size=4, hidden_size=192, depth=2, num_heads=3, num_classes=1000)
    zero = [net.final_layer.linear, *(m.adaLN_modulation[1] for m in (*net.blocks, net.final_layer))]
    assert not any(layer.weight.any() for layer in zero)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    for p in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight, net.y_embedder.embedding_table.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.03)
        assert p.abs().max() > 0.06  # normal, not uniform of that deviation
    uniform = [net.s_embedder.mlp[0], net.s_embedder.mlp[2], net.blocks[1].attn.qkv, net.blocks[0].mlp.fc2]
    for p in (*(layer.weight for layer in uniform), net.x_embedder.proj.weight):
        bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
        assert 0.98 * bound < p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    x = torch.randn(2, 4, 16, 16)
    assert not net(x, torch.rand(2), torch.zeros(2)).any()


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"patch_size": 3}, "patch_size=3 does not divide input_size=8"),
        ({"patch_size": 0}, "patch_size=0 does not divide input_size=8"),
        ({"input_size": (8, 7)}, r"patch_size=2 does not divide input_size=\[8, 7\]; choose a patch_size"),
        ({"input_size": (8, 0)}, r"input_size=\[8, 0\] is not possible; it must be at least 1"),
        ({"input_size": (8, 8, 8)}, r"input_size=\[8, 8, 8\] is not a size; give a whole number, or"),
        ({"input_size": 8.0}, r"input_size=8\.0 is not a size"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=24"),
        ({"hidden_size": 18}, "hidden_size=18 is not a multiple of 4"),
        ({"impl": "cuda"}, "impl='cuda' is not known; choose one of auto, torch, triton"),
        ({"attention": "fast"}, "attention='fast' is not known"),
    ],
)
def test_impossible_settings(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiT(**{**SMALL, **sizes})


def test_samples_of_another_grid_with_as_many_tokens():
    x, t, s, labels = _inputs(size=(4, 16))
    with pytest.raises(ValueError, match=r"x of shape \(4, 3, 4, 16\) does not fit a DiT of input_size=8; give x of"):
        _net()(x, t, s, labels)


# --------------------------------------------------------------------------------------------------- compilation


def test_forward_compiles_in_one_graph():
    net, (x, t, s, labels) = _net(depth=1).float(), _inputs()
    arguments = (x.float(), t.float(), s.float(), labels)
    torch.compiler.reset()
    outputs = []
    for function in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        out = function(*arguments)
        out.square().sum().backward()
        outputs.append([out.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


class _Cosines(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.numbers += out.numel() if operator is torch.ops.aten.cos.default else 0
        return out


def test_numbers_beside_the_label_have_the_features_of_times():
    numbers = torch.rand(5, 3)
    assert torch.equal(layers.sinusoids(numbers), reference.time_sinusoids(numbers, numbers, width=256)[0])
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, condition_dim=3, impl="torch")
    with _Cosines() as cosines:
        net(torch.zeros(5, 1, 8, 8), torch.ones(5), torch.zeros(5), torch.cat([torch.zeros(5, 1), numbers], 1))
    assert cosines.numbers == 128 * 5 * (2 + 3)
