"""A stand-in for the published ``models.py``: its interface, and its losses written out once more.

Linear path, Euler parameterization, guidance with a mix below 1: what a row of the benchmark uses.
"""

import torch
from torch import nn

from soflow_fast import DiT

SIZES = {"small": {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 1}}


class _Network(DiT):
    def forward(self, x, t, s, labels, augment_labels=None):
        return super().forward(x, t.flatten(), s.flatten(), labels)


class Soflow(nn.Module):
    def __init__(self, data_channels, data_size, num_classes, cfg_drop_rate, model_type):
        super().__init__()
        self.num_classes = num_classes
        sizes = SIZES.get(model_type, {})  # the published code, too, has a size for every name it does not know
        self.network = _Network(
            data_size,
            in_channels=data_channels,
            num_classes=num_classes,
            class_dropout_prob=cfg_drop_rate,
            impl="torch",
            **sizes,
        )

    def forward(self, get_velocity_loss, **given):
        return self._velocity(**given) if get_velocity_loss else self._consistency(**given)

    def _guided(self, x_t, v_t, t, predicted, cfg_mask, cfg_scale, cfg_decay_time, mix_ratio):
        with torch.no_grad():
            q = ((1 - t) / (1 - cfg_decay_time)).clamp(0, 1 - 1e-6)
            decay = torch.where(t <= cfg_decay_time, 1.0, 1 - torch.exp(-0.025 * q / (1 - q)))
            unconditional = self.network(x_t, t, t, None)
            guided = v_t + decay * (cfg_scale - 1) * (v_t - unconditional)
            guided = mix_ratio * guided + (1 - mix_ratio) * predicted
            return torch.where(cfg_mask.view(-1, 1, 1, 1), v_t, guided)

    def _velocity(self, samples, t, labels, cfg_mask, p, eps, augment_labels, **guidance):
        noise = torch.randn_like(samples)
        x_t, v_t = (1 - t) * samples + t * noise, noise - samples
        predicted = self.network(x_t, t, t, torch.where(cfg_mask, self.num_classes, labels))
        error = (predicted - self._guided(x_t, v_t, t, predicted, cfg_mask, **guidance)).square().mean((1, 2, 3))
        weight = (error.detach() + eps) ** -p
        return (weight * error).mean(), error.mean(), weight.mean()

    def _consistency(self, samples, t, l, s, labels, cfg_mask, p, eps, augment_labels, **guidance):
        noise = torch.randn_like(samples)
        x_t, v_t = (1 - t) * samples + t * noise, noise - samples
        with torch.no_grad():
            predicted = self.network(x_t, t, t, labels)
        v = self._guided(x_t, v_t, t, predicted, cfg_mask, **guidance)
        labels = torch.where(cfg_mask, self.num_classes, labels)
        at_t = self.network(x_t, t, s, labels)
        with torch.no_grad():
            x_l = x_t + v * (l - t)
            f_l = x_l + (s - l) * self.network(x_l, l, s, labels)
            quotient = (x_t + (s - t) * at_t - f_l) / (t - l)
            weight = (quotient.square().mean((1, 2, 3), keepdim=True) + eps) ** -p
        loss = -(at_t * quotient * weight).mean()
        return loss, quotient.square().mean(), weight.mean()
