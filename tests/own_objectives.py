"""Objectives of a user's own, as a configuration names them by their import path."""

import torch
from foreign_networks import Function
from torch import nn
from torch.nn.functional import avg_pool2d

from soflow_fast import DiT, SoFlow
from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.base import TotalLoss
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.paths import clean_sample


def small_dit(**changes) -> DiT:
    """Of the digits, with an output that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DiT(8, 4, 1, 16, 1, 2, num_classes=10, impl="torch", **changes)
        nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    return net


class Aligned(SoFlow):
    """SoFlow that also brings a projection of what the network says of data near a frozen encoder's features."""

    def __init__(self, net, weight=0.5, **keywords):
        super().__init__(net, **keywords)
        self.weight, self.scales = weight, (1.0, weight)
        self.projection = nn.Linear(1, 3)
        self.add_companion("encoder", nn.Sequential(nn.Conv2d(1, 3, 4, stride=4), nn.Dropout()))

    def loss_of_rows(self, x0, labels, rows, *arguments, **keywords):
        total = super().loss_of_rows(x0, labels, rows, *arguments, **keywords)
        t = torch.zeros_like(rows, dtype=torch.float32)
        said = avg_pool2d(self.call_network(x0, t, t, labels).float(), 4)
        wanted = self.encoder(x0)
        distance = (self.projection(said.movedim(1, -1)) - wanted.movedim(1, -1)).square().mean()
        return TotalLoss(total.loss + self.weight * distance, {**total.parts, "alignment": distance})


class Distilled(SoFlow):
    """SoFlow of a teacher's velocity."""

    def __init__(self, net, **keywords):
        super().__init__(net, **keywords)
        self.add_companion("teacher", FlowMatching(small_dit()))

    def data_velocity(self, x_t, v_t, t, labels):
        return self.teacher.velocity(x_t, t, labels)


class Given(SoFlow):
    """With points that are overridden by functions given as attributes."""

    def __init__(self, net, ratio=None, velocity=None, weight=None, **keywords):
        super().__init__(net, **keywords)
        self.functions = {"gap_ratio": ratio, "data_velocity": velocity, "row_weight": weight}

    def gap_ratio(self, *arguments):
        return (self.functions["gap_ratio"] or super().gap_ratio)(*arguments)

    def data_velocity(self, *arguments):
        return (self.functions["data_velocity"] or super().data_velocity)(*arguments)

    def row_weight(self, *arguments):
        return (self.functions["row_weight"] or super().row_weight)(*arguments)


class Pulled(SoFlow):
    """SoFlow that also pulls what the network expects of the data towards it, as an encoder sees both, with noise."""

    def __init__(self, net, weight=0.5, **keywords):
        super().__init__(net, **keywords)
        self.weight = weight
        self.add_companion("encoder", nn.Conv2d(1, 3, 4, stride=4))

    def further_terms(self, batch):
        noise = self.ops.normal(batch.rows, 1, seed=batch.seed, step=batch.step, stream=Stream.USER)
        data = clean_sample(batch.x_t, batch.F.float(), batch.t, self.path)
        error = (self.encoder(data) - self.encoder(batch.x0)).square().flatten(1).mean(1)
        return {"pull": self.weight * (1 + batch.progress) * (noise[:, 0].square() * error).mean()}


def network_alone(net) -> nn.Module:
    """No objective."""
    return Function(lambda x, t: x)
