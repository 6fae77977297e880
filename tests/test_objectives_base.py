"""What objectives ask of any network: what is refused, and what a network without labels is told."""

from dataclasses import asdict, fields
from inspect import signature

import pytest
import torch
from _baselines import SixCalls
from conditioned import ByEmbedding
from torch import nn

from soflow_fast import DiT, SoFlow, TrainStep, build
from soflow_fast.config import OBJECTIVE_SECTIONS
from soflow_fast.differencing import ForwardDifference
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.optim import AdamW

SUBTRACTING = [
    (SoFlow, {}),
    (SoFlow, {"quotient": "two_forwards"}),
    (MeanFlow, {"derivative": "finite_difference"}),
    (AlphaFlow, {"derivative": "finite_difference"}),
    (SCM, {"derivative": "finite_difference"}),
]


class Net(nn.Module):
    """README's, with a norm."""

    num_classes = 10

    def __init__(self, norm=nn.Identity, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.condition, self.label = nn.Linear(2, width), nn.Embedding(self.num_classes + 1, width)
        self.inside, self.outside = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.norm = norm(width)

    def forward(self, x, t, s, labels):
        condition = self.condition(torch.stack([t, t - s], 1)) + self.label(labels)
        return self.outside(nn.functional.silu(self.norm(self.inside(x) + condition[:, :, None, None])))


def batch(n=8):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 10


def loss(model, labels=None, step=0):
    x, own = batch()
    return model.loss(x, own if labels is None else labels, 0.5, step=step).loss


@pytest.mark.parametrize(("objective", "setting"), SUBTRACTING)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_statistics_of_a_batch_and_two_forwards(objective, setting, norm):
    """F would have those of all rows, and what is subtracted from it those of the consistency rows."""
    model = objective(Net(norm), **setting)
    with pytest.raises(ValueError, match=f"{norm.__name__} 'norm' takes the statistics of a batch.*use GroupNorm"):
        loss(model)
    model.network.norm.eval()
    assert loss(model).isfinite()
    assert setting or isinstance(model.forward_difference, ForwardDifference)  # and not two forwards


@pytest.mark.parametrize("objective", [SoFlow(Net(nn.BatchNorm2d), quotient="tangent"), MeanFlow(Net(nn.BatchNorm2d))])
def test_two_forwards_are_no_way_out_for_statistics_of_a_batch(objective):
    with pytest.raises(ValueError, match=r"changes 'norm.running_mean' in its forward.*; use GroupNorm, or norms with"):
        loss(objective)


def test_norms_that_two_forwards_may_have():
    two = {"quotient": "two_forwards"}
    assert loss(SoFlow(Net(nn.InstanceNorm2d), **two)).isfinite()
    assert loss(SoFlow(Net(nn.BatchNorm2d), velocity_share=1.0, **two)).isfinite()
    assert loss(FlowMatching(Net(nn.BatchNorm2d))).isfinite()


def test_a_norm_without_running_statistics_is_of_the_batch_in_every_mode():
    model = SoFlow(Net(lambda width: nn.BatchNorm2d(width, track_running_stats=False)), quotient="two_forwards")
    with pytest.raises(ValueError, match="takes the statistics of a batch"):
        loss(model.eval())


def test_every_step_is_asked_for_its_number():
    """A loop that left it out would train on one step's noise for ever."""
    model = SoFlow(Net())
    assert loss(model, step=0) != loss(model, step=1)
    with pytest.raises(TypeError, match="step"):
        model.loss(*batch(), 0.5)


@pytest.mark.parametrize("progress", [1.5, -0.1, 3, float("nan")])
def test_progress_is_a_share_of_the_training(progress):
    model = SoFlow(Net())
    with pytest.raises(ValueError, match=rf"progress={progress} is outside \[0, 1\]; give step / total_steps"):
        model.loss(*batch(), progress, step=0)
    assert model.loss(*batch(), 1, step=0).loss.isfinite()
    assert model.loss(*batch(), torch.tensor(0.5), step=0).loss == loss(model)


OBJECTIVES = [SoFlow, MeanFlow, AlphaFlow, SCM, FlowMatching]


@pytest.mark.parametrize("name", build.OBJECTIVES)
def test_a_class_has_the_defaults_of_its_configuration(name):
    arguments = signature(build.OBJECTIVES[name]).parameters
    section = OBJECTIVE_SECTIONS[name]()
    assert {f.name: arguments[f.name].default for f in fields(section)} == asdict(section)


@pytest.mark.parametrize("objective", [*OBJECTIVES, ImprovedMeanFlow])
def test_weights_are_of_the_mean_square_error(objective):
    """So that what is logged as weighted is the loss; that of SoFlow's consistency has no value of its own."""
    told = objective.condition_dim
    model, (x, labels) = objective(DiT(8, 4, 1, 16, 1, 2, num_classes=10, condition_dim=told, impl="torch")), batch()
    parts = model.loss(x, labels, 0.5, step=0).parts
    assert parts
    if objective is SoFlow:
        del parts["consistency"]
    for part in parts.values():
        assert (part.weight * part.mse).mean().item() == pytest.approx(part.loss.item(), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_labels_are_no_label_of_every_row(objective):
    model, (x, _) = objective(Net()), batch()
    null = torch.full((len(x),), 10)
    assert model.loss(x, None, 0.5, step=0).loss == model.loss(x, null, 0.5, step=0).loss
    assert torch.equal(model.sample(x), model.sample(x, null))
    t, s = torch.rand(2, len(x))
    assert torch.equal(model.solution(x, t, s), model.solution(x, t, s, null))
    if objective is not SCM:  # which has no velocity
        assert torch.equal(model.velocity(x, t), model.velocity(x, t, null))


@pytest.mark.parametrize(
    ("setting", "compile"),
    [({}, False), ({}, "aot_eager"), ({"quotient": "two_forwards"}, False), ({"quotient": "tangent"}, False)],
)
def test_a_step_without_labels(setting, compile):
    def run(labels):
        torch._dynamo.reset()
        model = SoFlow(Net(), **setting)
        step = TrainStep(model, optimizer=AdamW(model.parameters()), total_steps=4, compile=compile)
        return [step(batch()[0], labels).loss.item() for _ in range(2)]

    assert run(None) == pytest.approx(run(torch.full((8,), 10)), rel=1e-6)


@pytest.mark.parametrize("objective", [SixCalls, SoFlow])
def test_no_labels_are_the_null_of_every_row(objective):
    model, (x, _) = objective(ByEmbedding()), batch()
    rows = torch.arange(len(x))
    null = model.network.null_condition.expand(len(x), -1)
    a, b = (model.loss_of_rows(x, labels, rows, 4, 0.5, 0, 0).loss for labels in (None, null))
    assert a == b
    assert torch.equal(model.sample(x), model.sample(x, null))


def test_networks_that_are_told_nothing_get_none():
    seen = []
    net = Net()
    net.num_classes, forward = 0, net.forward
    net.forward = lambda x, t, s, labels: seen.append(labels) or forward(x, t, s, torch.zeros(len(x)).long())
    model, (x, _) = SoFlow(net, quotient="two_forwards"), batch()
    model.loss(x, None, 0.5, step=0)
    model.sample(x)
    assert seen
    assert not any(labels is not None for labels in seen)


def test_a_dit_gets_the_row_that_it_takes_for_no_labels():
    torch.manual_seed(0)
    net, (x, _) = DiT(8, 4, 1, 16, 1, 2, num_classes=10, impl="torch"), batch()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    t, s = torch.rand(2, len(x))
    assert torch.equal(SoFlow(net).solution(x, t, s), x + (s - t).view(-1, 1, 1, 1) * net(x, t, s, None))
    without = DiT(8, 4, 1, 16, 1, 2, num_classes=10, class_dropout_prob=0, impl="torch")
    with pytest.raises(ValueError, match="has no row for 'no label'"):
        SoFlow(without, label_drop=0, guidance_scale=1).loss(x, None, 0.5, step=0)


def test_a_network_takes_four_arguments():
    net = nn.Conv2d(1, 1, 1)
    net.num_classes = 0
    sentence = r"the network Conv2d is called as net\(x, t, s, labels\), and its forward does not take that"
    with pytest.raises(ValueError, match=sentence):
        SoFlow(net, guidance_scale=1, label_drop=0)


@pytest.mark.parametrize(
    ("make", "hooked", "rows"),
    [(lambda: DiT(8, 4, 1, 16, 1, 2, num_classes=10, impl="torch"), "blocks.0", 8), (Net, "inside", 6)],
    ids=["DiT", "derived"],
)
def test_the_inside_of_the_network_in_a_further_term(make, hooked, rows):
    """Forward hooks see all rows of a DiT, and of a network whose difference is derived those that carry none."""

    class Bounded(SoFlow):
        def further_terms(self, batch):
            return {"inside": self.network.kept.square().mean()}

    def keep(module, x, out):
        net.kept = out[0] if isinstance(out, tuple) else out

    net, (x, labels) = make(), batch()
    with net.get_submodule(hooked).register_forward_hook(keep):
        total = Bounded(net).loss(x, labels, 0.5, step=0)
        assert len(net.kept) == rows
        assert net.kept.requires_grad
        torch.testing.assert_close(total.parts["inside"], net.kept.square().mean())
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = Bounded(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        step = TrainStep(model, optimizer=optimizer, total_steps=4, compile="eager")
        first, *_ = [step(x, labels).parts["inside"] for _ in range(3)]
        torch.testing.assert_close(first, total.parts["inside"])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("num_classes", [None, -1, 2.5])
def test_a_network_says_how_many_classes_it_has(objective, num_classes):
    net = nn.Conv2d(1, 1, 1)
    if num_classes is not None:
        net.num_classes = num_classes
    sentence = rf"the network Conv2d has num_classes={num_classes}; set it to the number.*\(0 for none\)"
    with pytest.raises(ValueError, match=sentence):
        objective(net)
