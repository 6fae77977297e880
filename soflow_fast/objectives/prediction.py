"""What an objective's network was given of a batch and what it made of it, for terms of one's own in the loss."""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """The rows of one loss, those that train the velocity first, and the network's output F for them.

    F is of the network call with gradient. On the first ``n_velocity`` rows, where s = t, it is the model's velocity v,
    but for a SoFlow of ``parameterization="trig"``, where v is π/2 F; the data that the network expects there is
    ``soflow_fast.paths.clean_sample(x_t, v, t, path)``, on the linear path ``x_t − t v``. On the other rows the model's
    sample at time s is ``x_t + (s−t) F``, or ``a x_t + b F`` of :func:`soflow_fast.paths.solution_coefficients`,
    as of SCM.

    Attributes:
        x0: (B, C, H, W) the clean samples, float32 (float64 for float64 data); of latent moments the latents that were
            drawn, scaled as the network sees them. Augmented, where the training augments.
        x_t: (B, C, H, W) the noisy samples, dtype of x0. t, s: (B,) their times and those they are carried to.
        labels: as the network saw them, "no label" in place of what was dropped: (B,) int64, (B, 1+k) or (B, ...)
            conditions, or None.
        F: (B, C, H, W) with gradient, but in an evaluation; under autocast it may be bfloat16.
        n_velocity: how many rows train the velocity, maybe none. rows: (B,) int64 global row indices.
        progress: of the training, in [0, 1], a number or a 0-d tensor. seed, step: of draws such as
            ``self.ops.normal(batch.rows, n, seed=batch.seed, step=batch.step, stream=Stream.USER)``.
    """

    x0: Tensor
    x_t: Tensor
    t: Tensor
    s: Tensor
    labels: Tensor | None
    F: Tensor
    n_velocity: int
    rows: Tensor
    progress: float | Tensor
    seed: int | Tensor
    step: int | Tensor
