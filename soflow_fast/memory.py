"""How much GPU memory a training step is estimated to need, and what ``auto`` settings follow from it."""

import math

import torch
from torch import nn
from torch.utils.data import Dataset

from soflow_fast.config import TrainConfig
from soflow_fast.data import resident_bytes
from soflow_fast.dit import DiT
from soflow_fast.frozen import sizes

# Kept for the backward per token, channel and block of a DiT in bfloat16, by what is recomputed, rounded up from
# benchmarks/counters.json; recomputing whole blocks keeps all of one block at a time, and of the others the two outputs
# of each gated residual and LayerNorm.
_SAVED_BYTES = {"none": 37, "elementwise": 29, "block": 9}

# Per trained weight beside itself: its gradient, two moments and its average in float32; and each further average. Per
# weight in float32 its bfloat16 copy.
_STATE_BYTES, _AVERAGE_BYTES, _COPY_BYTES = 16, 4, 2

# Data that are not worth processes which read them.
_SMALL = 256 << 20

# The rest is for the forward without gradient, the workspaces of libraries and what the allocator cannot use.
_USABLE = 0.85


def choose(
    config: TrainConfig, model: nn.Module, dataset: Dataset, device: torch.device, rows: int, precision: str
) -> tuple[str, int, bool]:
    """What is recomputed, the :func:`step_bytes` with it, and whether the data lie on the device: as configured or as
    they fit.
    """
    sizes = {"rows": rows, "precision": precision, "averages": len(config.ema.posthoc)}
    recompute = getattr(model.network, "recompute", "none")
    if config.model.is_dit and config.model.recompute == "auto":
        recompute = choose_recompute(model, device=device, **sizes)
    needed = step_bytes(model, recompute=recompute, **sizes)
    return recompute, needed, keep_on_device(config.data.on_device, dataset, device, needed)


def step_bytes(model: nn.Module, rows: int, precision: str, recompute: str = "none", averages: int = 0) -> int:
    """Weights, gradients, optimizer, averages, and what a micro-batch keeps for its backward.

    Args:
        model: an objective; of a network that is no DiT only the weights are counted. rows: of a micro-batch.
        precision, recompute: of the step and of the DiT. averages: how many there are beside the EMA.
    """
    net, (trained, _) = model.network, sizes(model)
    state = (_STATE_BYTES + _AVERAGE_BYTES * averages) * trained
    state += sum(p.nbytes + (_COPY_BYTES * p.numel() if p.dtype == torch.float32 else 0) for p in model.parameters())
    if not isinstance(net, DiT):
        return state
    element = rows * math.prod(net.grid) * net.hidden_size * (1 if precision == "bf16" else 2)
    kept = net.depth * _SAVED_BYTES[recompute] + (_SAVED_BYTES["none"] if recompute == "block" else 0)
    return state + element * kept


def choose_recompute(model: nn.Module, rows: int, precision: str, device: torch.device, averages: int = 0) -> str:
    """``elementwise``, or ``block`` where a step would not fit the GPU's memory; ``none`` on a CPU.

    ``elementwise`` moves 8 bytes more per token and channel of a block, under 1 % of an estimated step's time, and
    keeps a fifth less.

    Args:
        model, rows, precision, averages: as in :func:`step_bytes`.
    """
    if device.type != "cuda":
        return "none"
    usable = _USABLE * torch.cuda.mem_get_info(device)[1]
    return "elementwise" if step_bytes(model, rows, precision, "elementwise", averages) <= usable else "block"


def keep_on_device(wanted: bool | str, dataset: Dataset, device: torch.device, needed: int) -> bool:
    """Whether a data set is to lie in the device's memory as a whole.

    ``auto`` is yes for a data set that can be read in pieces and takes at most half of the free memory that a step is
    estimated to leave; on a CPU, at most 256 MiB.

    Args:
        wanted: True, False or ``auto``. needed: of a step, see :func:`step_bytes`.

    Raises:
        ValueError: for True where the data cannot be read in pieces or is larger than the free memory.
    """
    if not wanted:
        return False
    size, on_gpu = resident_bytes(dataset), device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else math.inf
    if wanted == "auto":
        return size is not None and size <= ((free - needed) / 2 if on_gpu else _SMALL)
    if size is None:
        raise ValueError(
            f"data.on_device=true needs data that can be read in pieces, and {type(dataset).__name__} has no "
            "read_range(start, stop); give it one or set data.on_device=auto"
        )
    if size > free:
        raise ValueError(
            f"data.on_device=true needs {size / 2**30:.1f} GiB on {device} and {free / 2**30:.1f} are free; "
            "set data.on_device=auto"
        )
    return True
