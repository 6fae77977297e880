"""Parameters that a run does not train, such as those of a pretrained network that is trained by adapters.

With ``output.save_frozen: false`` its checkpoints leave them out: the network brings them itself, and the checkpoint
has a hash of each, by which others are refused.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from soflow_fast.ema import EMA


class Frozen:
    """What of a model's state its checkpoints hold.

    Args:
        model: whose parameters without gradient are not trained. saved: whether its checkpoints hold these too.
    """

    def __init__(self, model: nn.Module, saved: bool):
        self._model, self._saved = model, saved
        self._hashes: dict[str, str] | None = None

    @property
    def is_much(self) -> bool:
        """Whether more is frozen than trained."""
        trained, of = sizes(self._model)
        return 2 * trained < of

    def __str__(self) -> str:
        trained, of = sizes(self._model)
        where = "every checkpoint, see output.save_frozen" if self._saved else "no checkpoint"
        return f"{trained:,} trained of {of:,}; the others are in {where}"

    def hashes(self) -> dict[str, str]:
        """Of what checkpoints leave out, by name; computed once, as it stays as it is."""
        if self._hashes is None:
            named = () if self._saved else self._model.named_parameters(remove_duplicate=False)
            self._hashes = hashes_of(self._model, [name for name, p in named if not p.requires_grad])
        return self._hashes

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of the model without what is left out."""
        return {name: value for name, value in self._model.state_dict().items() if name not in self.hashes()}

    def averages(self, ema: EMA) -> dict[str, Tensor]:
        """The state_dict of the averages; where parameters are left out, of the averages alone."""
        return ema.state_dict() if self._saved else ema.named_averages()

    def others(self, left_out: Mapping[str, str]) -> list[str]:
        """The names of those weights that the model lacks or has others of than a checkpoint that left them out."""
        known = self._hashes or {}
        found = known | hashes_of(self._model, [name for name in left_out if name not in known])
        return [name for name, value in left_out.items() if found.get(name) != value]

    @contextmanager
    def as_it_is(self, path: str) -> Iterator[None]:
        """ValueError for weights at ``path``, loaded within it, that change what is left out: the next start of the run
        would not have them.
        """
        before, self._hashes = self.hashes(), None
        yield
        other = [name for name, value in self.hashes().items() if value != before[name]]
        if other:
            raise ValueError(
                f"initial_weights={path!r} changes {first_of(other)}, which is not trained, and output.save_frozen="
                "False keeps that out of the checkpoints; have the network load it by itself, or save it too"
            )


def hashes_of(model: nn.Module, names: list[str]) -> dict[str, str]:
    """The SHA-256 of the shape, dtype and values of weights, by name, without those that the model lacks."""
    state = model.state_dict() if names else {}
    return {name: _hash(state[name].detach()) for name in names if name in state}


def first_of(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def sizes(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many the parameters have in all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _hash(weight: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
