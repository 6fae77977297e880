"""What objectives ask of any network: what is refused, and what a network without labels is told."""

import pytest
import torch
from torch import nn

from soflow_fast import SoFlow
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow

SUBTRACTING = [
    (SoFlow, {}),
    (SoFlow, {"quotient": "two_forwards"}),
    (MeanFlow, {"derivative": "finite_difference"}),
    (AlphaFlow, {"derivative": "finite_difference"}),
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
    assert setting or model.forward_difference is model._derived  # and not two forwards


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
