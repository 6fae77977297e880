"""Sampling in one or a few network calls, for every objective with a solution function.

Shapes: B rows of a call, n samples in all, C channels, H height and W width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from soflow_fast.capture import Captured, compiled, on_side_stream
from soflow_fast.conditions import ItemConditions, told
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.paths import path_coefficients
from soflow_fast.precision import ComputeCopy, follows_parameters, tensor_cores

SAMPLE_PRECISIONS = ("bf16", "fp32")

Decoder = Callable[[Tensor], Tensor]

# How many latents are decoded at a time.
_DECODED_ROWS = 32


@torch.no_grad()
def sample(
    model,
    noise: Tensor,
    labels: Tensor | None = None,
    steps: int = 1,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    first_row: int | Tensor = 0,
) -> Tensor:
    """Samples from noise in ``steps`` jumps, which begin at the times ``1 − i/steps``.

    A model that ``renoises`` jumps to time 0, adds noise for the next time and jumps again. Its noise is drawn from
    (seed, i, global row), so samples do not depend on how rows are split into batches. Other models jump to the next
    time.

    Args:
        model: an objective. noise: (B, C, H, W) standard normal. labels: (B,) int64, (B, 1+k) floating point,
            (B, ...) conditions, or None for no class or condition.
        steps: jumps, at least 1, each of one network call (of flow matching ``ode_steps``).
        generator: draws the seed if none is given; None means torch's own. seed: of the noise that is added.
        first_row: global row of noise[0]; a 0-d int64 tensor is not read on the host.

    Returns:
        (B, C, H, W), dtype of noise.

    Raises:
        ValueError: for fewer than one step, and another number of labels than of samples.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not a number of sampling steps; it must be at least 1")
    if labels is not None and not isinstance(labels, Tensor):
        raise ValueError(f"labels={labels!r} is no tensor; give (B,) int64, one for each sample of noise")
    if labels is not None and labels.shape[0] != noise.shape[0]:
        raise ValueError(f"there are {len(labels)} labels for {len(noise)} samples of noise; give one for each")
    if seed is None and steps > 1 and model.renoises:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator and generator.device))
    labels = told(getattr(model, "network", None), labels, noise)
    rows = first_row + torch.arange(noise.shape[0], device=noise.device)
    time_dtype = torch.promote_types(noise.dtype, torch.float32)
    ones = torch.ones(noise.shape[0], device=noise.device, dtype=time_dtype)
    times = [ones * (1 - i / steps) for i in range(steps + 1)]
    x = noise
    for i, t in enumerate(times[:-1]):
        if not model.renoises:
            x = model.solution(x, t, times[i + 1], labels)
            continue
        if i > 0:
            alpha, beta, _, _ = (c.view(-1, 1, 1, 1).to(noise.dtype) for c in path_coefficients(t, model.path))
            fresh = normal(rows, noise[0].numel(), seed=seed, step=i, stream=Stream.RENOISE).view(noise.shape)
            x = alpha * x + beta * fresh.to(noise.dtype)
        x = model.solution(x, t, times[-1], labels)
    return x.to(noise.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside it every module is in evaluation mode, without dropout; after it in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Batch(nn.Module):
    """Noise and samples of B rows; a module, so that compute copies can take the parameters' place."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], steps: int, seed: int, batch: int):
        super().__init__()
        self.model, self.shape, self.steps, self.batch = model, shape, steps, batch
        seed = torch.tensor(seed, device=next(model.parameters()).device)
        self.register_buffer("seed", seed, persistent=False)  # a number would be a constant of the compiled code

    def forward(self, labels: Tensor | None, first_row: Tensor) -> Tensor:
        rows = first_row + torch.arange(self.batch, device=first_row.device)
        noise = normal(rows, math.prod(self.shape), seed=self.seed, step=0, stream=Stream.RENOISE)
        return sample(self.model, noise.view(-1, *self.shape), labels, self.steps, seed=self.seed, first_row=first_row)


class Sampler:
    """Samples of one model, without its dropout, in batches of one size; sample i depends on (seed, i) and its label.

    Args:
        model: an objective, on its device. shape: (C, H, W). steps: as in :func:`sample`. seed: of the noise.
        batch: B, samples at a time.
        precision: ``bf16`` computes on bfloat16 copies of the network's parameters (networks other than DiT under
            autocast), ``fp32`` on the parameters as they are. By default bf16 on a GPU, else fp32.
        compile: whether a batch is compiled, by default on a GPU; see :func:`~soflow_fast.capture.compiled`.
        cuda_graph: whether a batch is one CUDA graph; by default where it is compiled for a GPU.

    Raises:
        ValueError: for a precision that is not known, a seed outside [0, 2^63) and a CUDA graph without a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        *,
        steps: int = 1,
        seed: int = 0,
        batch: int = 125,
        precision: str | None = None,
        compile: bool | str | Callable | None = None,
        cuda_graph: bool | None = None,
    ):
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.precision = precision or ("bf16" if on_gpu else "fp32")
        if self.precision not in SAMPLE_PRECISIONS:
            raise ValueError(f"precision={precision!r} is not known; choose one of {', '.join(SAMPLE_PRECISIONS)}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed} is outside [0, 2^63); choose another")
        self.compile = on_gpu if compile is None else compile
        self.cuda_graph = on_gpu and bool(self.compile) if cuda_graph is None else cuda_graph
        if self.cuda_graph and not on_gpu:
            raise ValueError(f"cuda_graph=True needs the model on a CUDA GPU; it is on {self.device}")
        self.batch = batch
        self._batch = _Batch(model, tuple(shape), steps, seed, batch)
        low, on_copies = self.precision == "bf16", follows_parameters(model.network)
        self._copy = ComputeCopy(self._batch, model.network) if low and on_copies else None
        self._autocast = low and not on_copies
        self._run = compiled(_draw, self.compile)  # a method of this object would keep it in a cycle
        self._graph: Captured | None = None
        self._first_row = torch.zeros((), dtype=torch.int64, device=self.device)

    def draw(
        self, labels: Tensor | ItemConditions | None, n: int, decode: Decoder | None = None, rows: range | None = None
    ) -> Iterator[Tensor]:
        """Samples 0 to n-1, in batches, or those of them in ``rows``.

        Args:
            labels: (n,) int64; (n, 1+k) floating point, the label and what else the network is told of a sample;
                (n, ...) conditions; or None for "no label". decode: from latents to images, see
                :func:`soflow_fast.autoencoder.vae_decoder`. rows: by default all; from a multiple of B on they are
                bitwise those of all.

        Yields:
            (at most B, C, H, W) float32, or what decode makes of them, on the CPU.

        Raises:
            ValueError: for fewer labels than samples; a batch raises what :meth:`__call__` does.
        """
        if labels is not None and len(labels) < n:
            raise ValueError(f"there are {len(labels)} labels for {n} samples; give one for each")
        if self._copy is not None:
            self._copy.write()  # also after weights were exchanged by their .data, which counts as no new version
        rows = range(n) if rows is None else rows
        for first in range(rows.start, rows.stop, self.batch):
            some = None if labels is None else labels[first : first + self.batch].to(self.device)
            samples = self(some, first)[: rows.stop - first]
            if decode is not None:  # a few at a time: an image takes 100 times the memory of its latent, and more
                samples = torch.cat([decode(part) for part in samples.split(_DECODED_ROWS)])
            yield samples.float().cpu()

    def __call__(self, labels: Tensor | None, first_row: int = 0) -> Tensor:
        """The batch whose first sample has the given number; the first call compiles and captures.

        Args:
            labels: as in :meth:`draw`, at most B; the rows beyond are drawn with zeros.

        Returns:
            (B, C, H, W) float32 on the device; with a CUDA graph, the next call overwrites it.

        Raises:
            ValueError: for more labels than a batch has samples, for fewer than one step, and with a CUDA graph for
                labels of another shape than at first.
            RuntimeError: for a batch that cannot be captured as a CUDA graph, with the cause.
        """
        if self._copy is not None:
            self._copy.refresh()
        if labels is not None:
            if len(labels) > self.batch:
                raise ValueError(f"{len(labels)} labels are more than the {self.batch} samples of a batch; use draw()")
            labels = nn.functional.pad(labels, (*(0, 0) * (labels.dim() - 1), 0, self.batch - len(labels)))
        inputs = labels, self._first_row.fill_(first_row)  # a new one would be copied from the host, and waited for
        if self._graph is not None:
            return self._graph(*inputs)
        with evaluating(self._batch), tensor_cores(self.precision):
            if not self.cuda_graph:
                return self._run_on_copies(*inputs)
            stream = torch.cuda.Stream(self.device)
            on_side_stream(stream, self._run_on_copies, *inputs)
            self._graph = Captured("sampling", stream, self._run_on_copies, *inputs)
        return self._graph(*inputs)

    @torch.no_grad()
    def _run_on_copies(self, labels: Tensor | None, first_row: Tensor) -> Tensor:
        copies = None if self._copy is None else self._copy.copies
        return self._run(self._batch, copies, self._autocast, labels, first_row)


def _draw(
    batch: _Batch, parameters: dict[str, Tensor] | None, autocast: bool, labels: Tensor | None, first_row: Tensor
) -> Tensor:
    with torch.autocast(first_row.device.type, torch.bfloat16, enabled=autocast):
        if parameters is None:
            return batch(labels, first_row)
        return functional_call(batch, parameters, (labels, first_row))
