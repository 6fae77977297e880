"""Run by torchrun: trains on this process's half of every batch in each form; saves losses and parameters of rank 0.
And how a run of own networks begins.

python -m torch.distributed.run --nproc-per-node=2 data_parallel.py FOLDER
"""

import sys
from pathlib import Path

import opaque_draws
import torch
import torch.distributed as dist
from fast_step_runs import BATCH, STEPS, make_model, make_step, training_batch
from foreign_networks import Transformer
from own_objectives import Aligned, small_dit
from runs import tiny_config

from soflow_fast import Trainer, TrainStep, distributed

FORMS = {
    "eager": {"precision": "fp32", "compile": False},
    "compiled": {"precision": "fp32", "compile": "aot_eager"},
    "eager, two micro-batches": {"precision": "fp32", "compile": False, "accumulation": 2},
    "compiled, bf16": {"precision": "bf16", "compile": "aot_eager"},
}


def train(processes: distributed.Processes, options: dict) -> dict:
    rank, world = processes.rank, processes.world_size
    model = make_model(torch.float32, depth=1)
    if rank:  # the first process's count
        torch.nn.utils.vector_to_parameters(torch.zeros(10**6), model.parameters())
    step, ema = make_step(model, rank=rank, world_size=world, **options)
    assert all(torch.equal(ema.averages[name], p) for name, p in model.named_parameters() if p.requires_grad)
    in_backward = options["compile"] and "accumulation" not in options
    assert (step.reduction is not None) == in_backward
    losses = []
    for k in range(STEPS):
        x, labels = training_batch(k, torch.float32)
        rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = step(x[rows], labels[rows]).loss
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
    return {"losses": losses, "parameters": model.state_dict(), "ema": ema.state_dict()}


def beside(rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """The gradients of what an objective has beside its network, compiled in bfloat16."""
    torch.manual_seed(0)
    model = Aligned(small_dit())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"precision": "bf16", "compile": "eager", "rank": rank, "world_size": world}
    x, labels = training_batch(0, torch.float32)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    TrainStep(model, optimizer=optimizer, total_steps=4, **options)(x[rows], labels[rows])
    return [p.grad for p in model.projection.parameters()]


def start(processes: distributed.Processes, folder: Path) -> dict:
    """Of a run whose network each process draws for itself its averages in each, and what other networks are told."""
    torch.manual_seed(processes.rank)
    run = Trainer(tiny_config(folder / "run"), model=Transformer())
    averages = processes.of_all(lambda: run.ema.state_dict())
    try:
        distributed.begin_alike(processes, torch.nn.Linear(3, 2 + processes.rank))
    except ValueError as error:
        return {"averages": averages, "refused": str(error)}
    raise AssertionError("other networks were not noticed")


def main(folder: Path) -> None:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024  # several buckets, as a network of real size has
    processes = distributed.join(torch.device("cpu"))
    torch.set_num_threads(1)
    opaque_draws.install()
    for form, options in FORMS.items():
        result = train(processes, options)
        if processes.is_first:
            torch.save(result, folder / f"{form}.pt")
    result = {**start(processes, folder), "beside": beside(processes.rank, processes.world_size)}
    if processes.is_first:
        torch.save(result, folder / "start.pt")
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
