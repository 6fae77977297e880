"""Deterministic counters of a training step by DiT preset: what a regression shows in without a clock or a GPU.

    python benchmarks/counters.py [--preset DiT-B/4 ...] [--write benchmarks/counters.json | --check]

The step runs on fake tensors, which have shapes but no data, at full size: batch 256, bfloat16, fused ops. A read of a
value on the host would raise. Less is better for every counter:

    flops_per_sample      of a step, by torch's FlopCounterMode with math attention: all products, forward and backward
    forwards              the same in forwards of the network
    network_calls         per step
    saved_bytes_per_element_block
                          kept for the backward per token, channel and block, (3 blocks - 1 block)/2: what the min-cut
                          partitioner hands from the compiled forward to the backward, tensors that share memory counted
                          once, parameters not at all; ``_elementwise`` and ``_block`` with that recomputation,
                          ``_fp32_residual`` with the residual streams in float32
    hidden_tensors        kept by an autograd function outside of its saved tensors
    operators_per_block   dispatched forward and backward, not compiled
    launches_per_block    of the step, recomputing elementwise, as Inductor writes it for an H200: of its kernels and
                          this package's, and calls of libraries
    bytes_moved_per_element_block
                          by those, the operands of products included; a slice counts as the whole tensor
    parameters            trained and fixed
    optimizer_bytes_per_parameter
                          loaded and stored by the one-pass update with average and bfloat16 copy, by its code
    graph_breaks, compilations
                          of the loss, while the step, the progress and the learning rate change

Must run without Triton's interpreter.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _inductor import Compiled, backend
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import DiT, SoFlow
from soflow_fast.ema import EMA
from soflow_fast.kernels import _aot, fused, optimizer  # noqa: F401  (fused registers what its ops count as FLOPs)
from soflow_fast.kernels._launch import recording
from soflow_fast.optim import AdamW
from soflow_fast.paths import row_order
from soflow_fast.step import TrainStep

COUNTERS = Path(__file__).parent / "counters.json"
PRESETS = ("DiT-S/4", "DiT-B/4", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
BATCH = 256
#: The saved bytes that are counted, by the suffix of their name, with what the network then is.
SAVED = {
    "": {},
    "_elementwise": {"recompute": "elementwise"},
    "_block": {"recompute": "block"},
    "_fp32_residual": {"residual_dtype": torch.float32},
    "_fp32_residual_elementwise": {"residual_dtype": torch.float32, "recompute": "elementwise"},
}


def fake_step(
    preset: str,
    *,
    impl="triton",
    attention="sdpa",
    quotient="difference",
    step=TrainStep,
    objective=SoFlow,
    compile=False,
    **network,
) -> TrainStep:
    """A preset's step in bfloat16; to be built and run under one FakeTensorMode.

    Args:
        impl: of the ops. attention: its backend. quotient: of SoFlow. step, objective: classes. compile: of the step.
            network: of the DiT.
    """
    net = DiT.from_preset(preset, impl="torch", **network)
    model = objective(net, quotient=quotient)
    net.impl = model.impl = impl  # not asked for by name: fused ops on fake tensors need no GPU
    net.attention = attention
    adamw = AdamW((p for p in net.parameters() if p.requires_grad), impl="torch")
    return step(model, optimizer=adamw, ema=EMA(model), total_steps=4, precision="bf16", compile=compile)


def fake_batch(net: DiT) -> tuple[Tensor, Tensor]:
    """Samples and labels."""
    x0 = torch.empty(BATCH, net.in_channels, net.input_size, net.input_size)
    return x0, torch.empty(BATCH, dtype=torch.int64)


def fake_loss(step: TrainStep) -> Tensor:
    """The loss of a batch by the step's objective, not compiled."""
    x0, labels = fake_batch(step.model.network)
    order, n_velocity = row_order(BATCH, step.model.velocity_share, 0)
    progress = torch.zeros(())
    return step.model.loss_of_rows(x0, labels, torch.tensor(order), n_velocity, progress, 0, step.step).loss


def work(preset: str, **options) -> dict[str, float]:
    """FLOPs and network calls of a step; options as in :func:`fake_step`."""
    with FakeTensorMode():
        step, calls = fake_step(preset, attention="math", **options), []
        net = step.model.network
        net.x_embedder.register_forward_hook(lambda *_: calls.append(1))  # once in every call of the network
        x0, labels = fake_batch(net)
        with FlopCounterMode(display=False) as of_step:
            step(x0, labels)
        network_calls, t = len(calls), torch.empty(BATCH)
        with FlopCounterMode(display=False) as of_forward, torch.no_grad():
            net(x0, t, t, labels)
    flops = of_step.get_total_flops()
    return {
        "flops_per_sample": flops // BATCH,
        "forwards": round(flops / of_forward.get_total_flops(), 4),
        "network_calls": network_calls,
    }


def saved_bytes_per_element_block(preset: str, **options) -> float:
    """What a block of the compiled step keeps for the backward; options as in :func:`fake_step`."""
    (saved,) = _per_block(_saved_bytes_per_element, preset, **options)
    return saved


def operators_per_block(preset: str, **options) -> float:
    """What a block dispatches; options as in :func:`fake_step`."""
    (operators,) = _per_block(_operators, preset, **options)
    return operators


def compiled_block(preset: str, **options) -> dict[str, float]:
    """What a block of the compiled step launches and moves on a GPU; options as in :func:`fake_step`.

    Must run without Triton's interpreter.
    """
    launches, moved = _per_block(_launches_and_bytes, preset, recompute="elementwise", **options)
    return {"launches_per_block": launches, "bytes_moved_per_element_block": moved}


def compiled_step(preset: str, **options) -> tuple[Compiled, int]:
    """What Inductor writes of a step for a GPU, and the (token · channel) elements of its batch; options as in
    :func:`fake_step`."""
    compiled = Compiled([])
    return compiled, _run_compiled(preset, backend(compiled), **options)


def _per_block(measure: Callable[..., tuple[float, ...]], preset: str, **options) -> list[float]:
    """Of each value."""
    two, one = (measure(preset, depth=depth, **options) for depth in (2, 1))
    return [round(more - less, 3) for more, less in zip(two, one, strict=True)]


def _run_compiled(preset: str, how: Callable, **options) -> int:
    """A step on fake tensors, its loss compiled by that backend; the (token · channel) elements of its batch."""
    torch._dynamo.reset()
    with FakeTensorMode():
        step = fake_step(preset, compile=how, **options)
        net = step.model.network
        step(*fake_batch(net))
    return BATCH * net.pos_embed.numel()


def _saved_bytes_per_element(preset: str, **options) -> tuple[float]:
    saved = {}

    def partition(joint, inputs, *, num_fwd_outputs, **keywords):
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, **keywords
        )
        given = {_memory(x) for x in _values(node for node in forward.graph.nodes if node.op == "placeholder")}
        for x in _values(forward.graph.output_node().args[0][num_fwd_outputs:]):
            size = x.untyped_storage().nbytes()
            if _memory(x) not in given and isinstance(size, int):  # symbolic is that of a random state: 5 kB
                saved[_memory(x)] = size
        return forward, backward

    def as_it_is(graph, inputs):
        return make_boxed_func(graph.forward)

    keep = aot_autograd(
        fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=partition, decompositions=select_decomp_table()
    )
    elements = _run_compiled(preset, keep, **options)
    return (sum(saved.values()) / elements,)


def _launches_and_bytes(preset: str, **options) -> tuple[float, float]:
    compiled, elements = compiled_step(preset, **options)
    return compiled.launches, compiled.bytes_moved / elements


def _values(nodes) -> list[Tensor]:
    values = [node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node)]
    return [x for x in values if isinstance(x, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Dispatched(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.count += 1
        return operator(*arguments, **(keywords or {}))


def _operators(preset: str, **options) -> tuple[int]:
    with FakeTensorMode():
        step = fake_step(preset, **options)
        with _Dispatched() as dispatched:
            fake_loss(step).backward()
    return (dispatched.count,)


def hidden_tensors(preset: str, **options) -> int:
    """Tensors in the attributes of autograd functions of the loss, where no partitioner and no offloading sees them."""
    with FakeTensorMode():
        loss = fake_loss(fake_step(preset, depth=1, **options))  # keeps the graph alive
    waiting, seen, hidden = [loss.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            hidden += sum(isinstance(x, Tensor) for x in tree_leaves(getattr(node, "__dict__", {})))
            waiting += [following for following, _ in node.next_functions]
    return hidden


def parameters(preset: str) -> int:
    """Of the network."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT.from_preset(preset, impl="torch").parameters())


def _small(objective) -> SoFlow:
    return objective(DiT(8, 2, 1, 32, 2, 2, num_classes=10, impl="torch"))


def graph_breaks(objective=SoFlow) -> int:
    """Of the loss, in a small network."""
    model = _small(objective)
    order, n_velocity = row_order(8, model.velocity_share, 0)
    batch = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.tensor(order), n_velocity
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = torch.compile(model.loss_of_rows, backend="eager", dynamic=False)
    loss(*batch, torch.zeros(()), 0, torch.tensor(0))
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def compilations(step=TrainStep) -> int:
    """Of a small network's loss in 4 steps, in which the step, the progress and the learning rate change."""
    graphs, model = [], _small(SoFlow)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    adamw = AdamW((p for p in model.parameters() if p.requires_grad), impl="torch")
    run = step(model, optimizer=adamw, ema=EMA(model), total_steps=4, precision="fp32", compile=backend)
    torch._dynamo.reset()
    for k in range(4):
        adamw.param_groups[0]["lr"] = 1e-3 / (k + 1)
        run(torch.full((8, 1, 8, 8), float(k)), torch.full((8,), k))
    return len(graphs)


def optimizer_bytes_per_parameter() -> float:
    """Loaded and stored for each parameter by the kernels of the update, from their compiled code."""
    with recording() as records:
        optimizer.passes()["bf16 copy, average"]()
    total = 0
    for record in records:
        code = _aot.compile_launch(record, 90).asm["ttir"]
        total += sum(
            int(bits) / 8 for bits in re.findall(r"tt\.(?:load|store) .*tensor<\d+x!tt\.ptr<\w+?(\d+)>>", code)
        )
    return total / 2  # each access is there twice: with a mask for the last block of a tensor, and without


def count(preset: str) -> dict[str, float]:
    """All counters of a preset."""
    counters = work(preset)
    for suffix, network in SAVED.items():
        counters["saved_bytes_per_element_block" + suffix] = saved_bytes_per_element_block(preset, **network)
    return counters | {
        "hidden_tensors": hidden_tensors(preset),
        "operators_per_block": operators_per_block(preset),
        **compiled_block(preset),
        "parameters": parameters(preset),
        "optimizer_bytes_per_parameter": optimizer_bytes_per_parameter(),
        "graph_breaks": graph_breaks(),
        "compilations": compilations(),
    }


def worse(preset: str, counters: dict[str, float]) -> list[str]:
    """Which of a preset's counters are larger than the committed ones, in words."""
    committed = json.loads(COUNTERS.read_text())[preset]
    return [
        f"{preset}: {name} is {value:g}, committed {committed[name]:g}"
        for name, value in counters.items()
        if value > committed[name]
    ]


def main() -> int:
    """Prints the counters as JSON; 1 if some are to be checked and are worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="by default all")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="OUT.json", help="save the counters here")
    action.add_argument("--check", action="store_true", help="exit with 1 if a counter is worse than the committed one")
    arguments = parser.parse_args()
    table = {preset: count(preset) for preset in arguments.preset or PRESETS}
    text = json.dumps(table, indent=1)
    print(text)
    if arguments.write:
        arguments.write.write_text(text + "\n")
    found = [line for preset, counters in table.items() for line in worse(preset, counters)] if arguments.check else []
    print(*found, sep="\n", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
