"""Run by torchrun: trains on this process's half of every batch and saves losses and parameters of rank 0."""

import sys

import torch
import torch.distributed as dist
from fast_step_runs import BATCH, STEPS, make_model, make_step, training_batch

from soflow_fast import distributed


def main(path: str, precision: str, compiled: bool) -> None:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024  # several buckets, as a network of real size has
    processes = distributed.join(torch.device("cpu"))
    rank, world = processes.rank, processes.world_size
    torch.set_num_threads(1)
    model = make_model(torch.float32)
    step, ema = make_step(
        model, rank=rank, world_size=world, precision=precision, compile="aot_eager" if compiled else False
    )
    losses = []
    for k in range(STEPS):
        x, labels = training_batch(k, torch.float32)
        rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = step(x[rows], labels[rows]).loss
        dist.all_reduce(loss)
        losses.append(loss.item() / world)
    if rank == 0:
        torch.save({"losses": losses, "parameters": model.state_dict(), "ema": ema.state_dict()}, path)
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "compiled")
