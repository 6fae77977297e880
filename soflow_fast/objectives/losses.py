"""What the loss of a batch is, and what it is the mean of."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossOutput(NamedTuple):
    """One loss over n rows.

    Attributes:
        loss: 0-d, the mean over the rows; carries the gradient.
        mse: (n,) each row's unweighted error, the mean over the sample. weight: (n,) each row's weight of that mean.
            t: (n,) each row's time. No gradients.
    """

    loss: Tensor
    mse: Tensor
    weight: Tensor
    t: Tensor


class TotalLoss(NamedTuple):
    """The loss of a batch and the parts it is the row-weighted mean of, by name; torch.compile takes a new one in place
    of one changed by ``_replace``.

    Attributes:
        loss: 0-d, carries the gradient. parts: ``{"velocity": LossOutput, ...}``, without those that have no rows; what
            an objective adds to the mean is among them, another loss of the same rows or a 0-d tensor.
    """

    loss: Tensor
    parts: dict[str, LossOutput | Tensor]


def combine(parts: dict[str, LossOutput]) -> TotalLoss:
    """The mean over all rows of all parts."""
    total = sum(len(part.t) for part in parts.values())
    return TotalLoss(sum(part.loss * (len(part.t) / total) for part in parts.values()), parts)


def joined(parts: list[dict[str, LossOutput | Tensor]]) -> dict[str, LossOutput | Tensor]:
    """The parts of the losses of all micro-batches as one, without gradient.

    Raises:
        ValueError: for a part that is neither a LossOutput nor 0-d.
    """
    found = {}
    for name, first in parts[0].items():
        if torch.is_tensor(first) and first.dim() == 0:
            found[name] = torch.stack([part[name].detach() for part in parts]).mean()
            continue
        if not isinstance(first, LossOutput):
            what = f"a tensor of shape {tuple(first.shape)}" if torch.is_tensor(first) else f"a {type(first).__name__}"
            raise ValueError(
                f"the part {name!r} of the loss is {what}; report a LossOutput of soflow_fast.objectives.base, or a "
                "0-d tensor, such as the mean of a term"
            )
        losses, *rows = zip(*(part[name] for part in parts), strict=True)
        mean = torch.stack([loss.detach() for loss in losses]).mean()
        found[name] = LossOutput(mean, *(torch.cat(values) for values in rows))
    return found
