"""How many steps of a run may be left out or have a loss that is not finite, and what is said when there are more."""

from contextlib import suppress
from pathlib import Path

from torch.utils.data import Dataset

from soflow_fast import checkpoint, run_folder
from soflow_fast.config import TrainConfig
from soflow_fast.data.checks import first_not_finite
from soflow_fast.data.order import batch_indices
from soflow_fast.logs import Meter


def require_few(meter: Meter, allowed: int, config: TrainConfig, dataset: Dataset, can_leave_out: bool) -> int:
    """How many such steps a run had; all its processes call it alike.

    Args:
        meter: counts them. dataset: that is trained on. can_leave_out: whether the optimizer can leave a step out.

    Raises:
        FloatingPointError: where they are more than allowed; it says at which step and, if so, of which item.
    """
    skipped, first = meter.skipped()
    if skipped <= allowed:
        return skipped
    found = checkpoint.committed(Path(config.run_dir) / checkpoint.CHECKPOINTS)
    read = batch_indices(len(dataset), config.batch_size, first - 1, config.seed) if first else []
    index = None
    with suppress(Exception):  # which would hide the error
        index = first_not_finite(dataset, read)
    remedy = "lower optimizer.learning_rate or set optimizer.grad_clip"
    if index is not None:
        remedy = f"item {index} of the data, which it read, is not finite either; mend it, or leave it out,"
    raise FloatingPointError(
        f"the loss or the gradient norm was not finite at step {first} ({skipped} such steps "
        f"so far, max_skipped_steps={config.max_skipped_steps}); the last good checkpoint is "
        f"{found[-1] if found else 'the start'}: {remedy} and go on with {run_folder.ACCEPT}"
        f"{', or raise max_skipped_steps' if can_leave_out else ''}"
    )
