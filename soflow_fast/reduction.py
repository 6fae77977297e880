"""Gradients added up over the processes inside of the compiled backward, each part while the rest is computed.

A compiled backward is one node of autograd: DistributedDataParallel sees no gradient before it has all of them, and
its reductions wait for the end. Here the parameters enter the compiled loss through an identity whose backward reduces
them, some modules at a time, and Inductor puts each reduction where its last gradient is ready.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soflow_fast.distributed import broadcast


def early_and_late(nodes: list[Any]) -> list[Any]:
    """Inductor's schedule with each collective as early, and what waits for it as late, as can be."""
    try:
        from torch._inductor.comms import _schedule_for_comm
    except ImportError:  # of a later torch; then nothing overlaps, and all is right
        return nodes
    return _schedule_for_comm(nodes, raise_comms=True, sink_waits=True, reorder_for_overlap=False)


#: What torch.compile needs to be told for the reductions to overlap the rest.
INDUCTOR_OPTIONS = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [early_and_late],
}

# The modules of a block are reduced together until they are as many: smaller calls are all latency.
_LEAST_BYTES = 4 << 20


class _Summed(torch.autograd.Function):
    """Values of parameters; backward, the sum of their gradients over the processes, in the parameters' dtype."""

    @staticmethod
    def forward(ctx, group: str, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of n parameters, and the values that stand for them if they are not their own."""
        ctx.group, ctx.dtype, ctx.others = group, tensors[0].dtype, len(tensors) - n
        return tuple(value.view_as(value) for value in tensors[-n:])

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        wide = [g.to(ctx.dtype) for g in gradients]
        sums = torch.ops._c10d_functional.all_reduce_coalesced(wide, "sum", ctx.group)
        sums = [torch.ops._c10d_functional.wait_tensor(x) for x in sums]
        return None, None, *sums, *[None] * ctx.others


class CompiledReduction:
    """The trained parameters of a module, as a compiled loss of one of several processes takes them.

    All processes begin with the parameters and buffers of the first.

    Args:
        module: on the device of the process group.

    Attributes:
        parameters: by name. world_size: the processes over whose losses gradients are summed.
    """

    def __init__(self, module: nn.Module):
        broadcast([*module.parameters(), *module.buffers()])
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.world_size, self._group = dist.get_world_size(), dist.group.WORLD.group_name
        self._names = _by_module(self.parameters, _LEAST_BYTES)

    def __call__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What takes their place in :func:`torch.func.functional_call`; to be called while that is compiled.

        Args:
            parameters: :attr:`parameters`, as inputs of what is compiled.
            values: that stand for them, such as copies in low precision, and for others; those without are their own.
        """
        entering = dict(values)
        for names in self._names:
            own = [parameters[name] for name in names]
            # given twice, a tensor would lose one of its two gradients
            others = [values[name] if name in values else parameters[name].detach() for name in names] if values else []
            entering.update(zip(names, _Summed.apply(self._group, len(names), *own, *others), strict=True))
        return entering


def _by_module(parameters: Mapping[str, Tensor], least_bytes: int) -> list[list[str]]:
    """The names in groups, those first whose gradients come last: modules of one block, as of ``blocks.3``.

    The modulation of all blocks is one product of a :class:`~soflow_fast.DiT`, before the first of them.
    """
    groups, size, last = [], 0, None
    for name, p in sorted(parameters.items(), key=lambda item: "adaLN_modulation" not in item[0]):
        path = name.removeprefix("network.").split(".")[:-1]
        here = p.dtype, path[:2], path[:3]
        if last is None or here[:2] != last[:2] or (here != last and size >= least_bytes):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += p.nbytes
        last = here
    return groups
