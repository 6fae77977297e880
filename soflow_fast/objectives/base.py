"""What every objective returns, so that the trainer and the logs need not know which one it is."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """One loss over n rows.

    Attributes:
        loss: 0-d, the mean over the rows; carries the gradient.
        mse: (n,) each row's unweighted error. weight: (n,) each row's weight. t: (n,) each row's time. No gradients.
    """

    loss: Tensor
    mse: Tensor
    weight: Tensor
    t: Tensor


class TotalLoss(NamedTuple):
    """The loss of a batch and the parts it is the row-weighted mean of, by name.

    Attributes:
        loss: 0-d, carries the gradient. parts: ``{"velocity": LossOutput, ...}``, without those that have no rows.
    """

    loss: Tensor
    parts: dict[str, LossOutput]
