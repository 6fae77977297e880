"""Augmentation: its draws, its geometry, and what the network is told of it."""

import math

import pytest
import torch
from _baselines import SixCalls
from foreign_networks import UNet
from runs import tiny_config
from torch import nn

from soflow_fast import SoFlow, Trainer
from soflow_fast.augment import AUGMENT_DIM, Augment
from soflow_fast.config import DataConfig
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.base import LossOutput, Objective, TotalLoss
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.step import TrainStep

SIZE = 32


def _ramp(n, height, width):
    """Rows of ``2 + 3u − 5v`` at the pixels' centres, u to the right and v down from the middle of the image; u, v."""
    u, v = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in (width, height))
    return (2 + 3 * u[None, :] - 5 * v[:, None]).expand(n, 3, height, width), u, v


def _rotation(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def _sources(told, height, width):
    """Where in the image the pixels (u, v) of the result come from, (2, 2) and (2,), by what was told of a row.

    A stretching and its inverse across are told alike, so there are two candidates.
    """
    scale, cos, sin, along, across, *shift = told.tolist()[2:]
    rotation = _rotation(math.atan2(sin, cos + 1))
    for sign in (1, -1):
        stretch = sign * math.hypot(along, across)
        direction = math.atan2(sign * across, sign * along) if stretch else 0.0
        axes = torch.tensor([2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)], dtype=torch.float64).diag()
        source = 2 ** (-0.2 * scale) * rotation @ _rotation(-direction) @ axes @ _rotation(direction)
        yield source, -source @ (torch.tensor(shift, dtype=torch.float64) * 0.125 * torch.tensor([width, height]))


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (24, 64), (48, 20)])
def test_pixels_come_from_where_the_labels_say(height, width):
    """Of a ramp, away from the border: torch's bicubic interpolation is exact to a tenth of a pixel."""
    n = 64
    x, across, down = _ramp(n, height, width)
    moved, labels = Augment(0.7, 0)(x, None, torch.arange(n), 3, 4)
    result = torch.stack(torch.meshgrid(across, down, indexing="xy")).flatten(1)  # (2, H·W) of (u, v)
    checked = 0
    for image, told in zip(moved, labels[:, 1:], strict=True):
        errors = []
        for source, origin in _sources(told, height, width):
            u, v = source @ result + origin[:, None]
            inside = (u.abs() < width / 2 - 2) & (v.abs() < height / 2 - 2)
            u, v = (1 - 2 * told[0]) * u, (1 - 2 * told[1]) * v  # the image was mirrored before it was moved
            wanted = (2 + 3 * u - 5 * v)[inside]
            errors.append((image[0].flatten()[inside] - wanted).abs().max().item() if len(wanted) else 0.0)
            checked += len(wanted)
        assert min(errors) < 0.1 * (3 + 5)
    assert checked > 20 * height * width


def test_rows_that_are_only_mirrored_keep_their_pixels():
    x = torch.rand(400, 3, SIZE, SIZE)
    moved, labels = Augment(0.12, 7)(x, None, torch.arange(400), 1, 2)
    told = labels[:, 1:]
    still = (told[:, 2:] == 0).all(1)
    assert 0.5 < still.double().mean() < 0.7  # 0.88^4 is 0.6
    for image, before, (mirrored, upside_down) in zip(moved[still], x[still], told[still, :2].tolist(), strict=True):
        before = before.flip(2) if mirrored else before
        assert torch.equal(image, before.flip(1) if upside_down else before)
    assert not torch.isclose(moved[~still], x[~still]).flatten(1).all(1).any()
    assert (labels[:, 0] == 7).all()  # without classes the label is "no label"


def test_draws_have_their_probabilities_and_sizes():
    n, p = 40_000, 0.3
    told = Augment(p, 0)(torch.zeros(n, 1, 2, 2), None, torch.arange(n), 0, 0)[1][:, 1:].double()
    assert told.shape == (n, AUGMENT_DIM)
    shares = (told != 0).double().mean(0)
    wanted = torch.tensor([0.5, p / 2, p, p, p, p, p / 2, p, p], dtype=torch.float64)
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.012)
    scale, shift = told[:, 2], told[:, 7:]
    for normal in (scale[scale != 0], shift[shift != 0], told[:, 5:7].norm(dim=1)[told[:, 5] != 0]):
        assert normal.square().mean() == pytest.approx(1, abs=0.05)
    angle = torch.atan2(told[:, 4], told[:, 3] + 1)[told[:, 4] != 0]
    assert angle.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    gates = (told[:, [2, 4, 5, 7]] != 0).double()
    assert torch.corrcoef(gates.T).fill_diagonal_(0).abs().max() < 0.03


def test_a_rows_augmentation_is_its_own():
    """Whatever batch, process or micro-batch it is in; another step is another."""
    x, labels, rows = torch.rand(8, 1, 8, 8), torch.arange(8), torch.arange(8)
    augment = Augment(0.5, 10)
    whole = augment(x, labels, rows, 5, 6)
    part = augment(x[3:], labels[3:], rows[3:], torch.tensor(5), torch.tensor(6))
    assert all(torch.equal(a[3:], b) for a, b in zip(whole, part, strict=True))
    assert torch.equal(whole[1][:, 0], labels.float())
    assert not torch.equal(augment(x, labels, rows, 5, 7)[1], whole[1])
    low = augment(x.bfloat16(), labels + 992, rows, 5, 6)
    assert low[0].dtype == torch.float32
    assert torch.equal(low[1][:, 0], labels + 992.0)  # which bfloat16 would round


@pytest.mark.parametrize("objective", [SoFlow, MeanFlow, AlphaFlow])
def test_rows_without_label_have_no_guidance(objective):
    """As without labels at all: a network with classes is then told of the augmentation alone."""
    torch.manual_seed(0)
    model = objective(_Told().double(), guidance_scale=2.0, guidance_mix=0.5, label_drop=0.5, p=0)
    x0, rows = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8)
    null = torch.full((8,), 10)
    beside = Augment(0.0, 10).conditions(x0, None)
    plain = objective(_Told().double(), guidance_scale=1.0, guidance_mix=0.0, label_drop=0.5, p=0)
    plain.load_state_dict(model.state_dict())
    wanted = plain.loss_of_rows(x0, null, rows, 4, 0.5, 0, 0).loss
    for labels in (null, beside):
        torch.testing.assert_close(model.loss_of_rows(x0, labels, rows, 4, 0.5, 0, 0).loss, wanted, rtol=1e-12, atol=0)


def test_autocast_does_not_round_it():
    x, rows = torch.rand(8, 1, 8, 8), torch.arange(8)

    class Seen(Objective):
        needs_float32 = False

        def forward(self, x0, *_, **__):
            self.x0 = x0
            return TotalLoss(x0.mean() * self.network.label.weight.sum(), {"all": LossOutput(*x0.new_zeros(4, 1))})

    model = Seen(_Told(), velocity_share=0.5, impl="torch")
    step = TrainStep(
        model, optimizer=torch.optim.SGD(model.network.parameters()), total_steps=1, augment=Augment(0.9, 10)
    )
    with torch.autocast("cpu", torch.bfloat16):
        step(x, rows)
    order = step._row_orders(8)[0][0]
    assert torch.equal(model.x0, Augment(0.9, 10)(x[order], None, rows[order], 0, 0)[0])


def test_no_augmentation_is_told_as_zeros():
    x = torch.rand(4, 1, 8, 8)
    moved, labels = Augment(0.0, 10)(x, torch.arange(4), torch.arange(4), 0, 0)
    assert torch.equal(labels[:, 2:], torch.zeros(4, 8))
    assert torch.equal(moved, torch.where(labels[:, 1].view(-1, 1, 1, 1) > 0, x.flip(3), x))


class _Told(nn.Module):
    """Its output depends on each label and each number beside it."""

    num_classes, augment_dim = 10, AUGMENT_DIM

    def __init__(self):
        super().__init__()
        self.label, self.beside = nn.Embedding(11, 4), nn.Linear(AUGMENT_DIM, 4, bias=False)
        self.conv = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t, s, labels):
        beside = labels[:, 1:] if labels.dim() == 2 else x.new_zeros(len(x), AUGMENT_DIM)
        e = self.label(labels.long() if labels.dim() == 1 else labels[:, 0].long()) + self.beside(beside)
        return self.conv(x * (e + (t + s)[:, None])[:, :, None, None].sin())


@pytest.mark.parametrize(
    "objective",
    [SoFlow, SixCalls, MeanFlow, AlphaFlow, SCM, FlowMatching],
    ids=lambda objective: objective.__name__.lower(),
)
def test_objectives_pass_on_what_the_network_is_told(objective):
    """Zeros beside the label change nothing; anything else reaches every call, guidance and dropped labels included."""
    torch.manual_seed(0)
    net = _Told().double()
    options, n_velocity = {"guidance_scale": 2.0, "guidance_mix": 0.5}, 4
    if objective is SCM:  # all of whose rows carry the tangent otherwise, where hooks are not called
        options, n_velocity = {"derivative": "finite_difference"}, 0
    model = objective(net, label_drop=0.5, p=0, **options)
    g = torch.Generator().manual_seed(1)
    x0, told = (torch.randn(8, *shape, generator=g, dtype=torch.float64) for shape in ((1, 8, 8), (AUGMENT_DIM,)))
    labels, rows = torch.arange(8), torch.arange(8)

    def loss(labels):
        return model.loss_of_rows(x0, labels, rows, n_velocity, 0.5, 0, 0).loss

    plain = loss(labels)
    zeros = loss(torch.cat([labels[:, None].double(), torch.zeros_like(told)], 1))
    torch.testing.assert_close(zeros, plain, rtol=1e-12, atol=0)
    beside = loss(torch.cat([labels[:, None].double(), told], 1))
    seen = []

    def told_of(module, args):
        seen.append(args[3])

    with net.register_forward_pre_hook(told_of):
        for _ in range(2):  # first the network with its hook is captured, of zeros
            seen.clear()
            again = loss(torch.cat([labels[:, None].double(), told], 1))
    assert torch.equal(again, beside)
    assert not torch.isclose(beside, plain, rtol=1e-6)
    assert all(any(torch.equal(row, t) for t in told) for given in seen for row in given[:, 1:])
    assert any((given[:, 0] == 10).any() for given in seen)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (None, "augmentation needs a network with augment_dim=9.*this DiT has none"),
        (UNet(channels=1), "this UNet has none; choose model.preset=UNet, or set data.augment=0"),
    ],
)
def test_a_network_that_cannot_be_told(tmp_path, network, words):
    with pytest.raises(ValueError, match=words):
        Trainer(tiny_config(tmp_path, data=DataConfig(kind="digits", workers=0, augment=0.1)), model=network)


def test_a_probability_is_one():
    with pytest.raises(ValueError, match=r"probability=-0\.1 of augmentation is outside \[0, 1\]; choose"):
        Augment(-0.1, 0)
    with pytest.raises(ValueError, match=r"data\.augment=1\.5 must be in \[0, 1\]"):
        DataConfig(augment=1.5)
