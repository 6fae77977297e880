"""Sampling in one or a few network calls, for every objective with a solution function."""

import torch
from torch import Tensor

from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.paths import path_coefficients


@torch.no_grad()
def sample(
    model,
    noise: Tensor,
    labels: Tensor | None = None,
    steps: int = 1,
    *,
    generator: torch.Generator | None = None,
    seed: int = 0,
    first_row: int = 0,
) -> Tensor:
    """Samples from noise: jump to time 0, re-noise to the next time, jump again.

    The times are ``1 − i/steps``. The noise of the later steps is drawn from (seed, i, global row), so samples do not
    depend on how rows are split into batches.

    Args:
        model: has ``solution(x, t, s, labels)`` and ``path``. noise: (B, C, H, W) standard normal. labels: (B,) int64
            or None. steps: network calls, at least 1. generator: draws the seed, for interactive use.
        seed: of the re-noising. first_row: global row of noise[0].

    Returns:
        (B, C, H, W), dtype of noise.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not a number of sampling steps; it must be at least 1")
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    rows = torch.arange(first_row, first_row + noise.shape[0], device=noise.device)
    time_dtype = torch.promote_types(noise.dtype, torch.float32)
    x = noise
    for i in range(steps):
        t = torch.full((noise.shape[0],), 1 - i / steps, device=noise.device, dtype=time_dtype)
        if i > 0:
            alpha, beta, _, _ = (c.view(-1, 1, 1, 1).to(noise.dtype) for c in path_coefficients(t, model.path))
            fresh = normal(rows, noise[0].numel(), seed=seed, step=i, stream=Stream.RENOISE).view(noise.shape)
            x = alpha * x + beta * fresh.to(noise.dtype)
        x = model.solution(x, t, torch.zeros_like(t), labels)
    return x
