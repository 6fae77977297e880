"""The rows of the throughput benchmark: ways to train, each from its objective, network, optimizer and step.

All rows of one table share the DiT, the batch, the draws, the guidance and the work of the update: gradient norm,
AdamW, EMA. The learning rate is 0: every row keeps the same random weights, so that it can be checked at any step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from _baselines import (
    AllRowsMeanFlow,
    DerivedSoFlow,
    EagerSixCalls,
    EagerSoFlow,
    Fp32PairMeanFlow,
    Fp32PairSoFlow,
    JvpFlashDiT,
    LoopEMA,
    PlainDiT,
    PublishedMeanFlow,
    ScaledAdamW,
    ScaledLossSoFlow,
    SixCalls,
    StrongMeanFlow,
)
from torch import Tensor, nn

from soflow_fast import DiT, SoFlow
from soflow_fast.attention import OF_A_GPU
from soflow_fast.ema import EMA
from soflow_fast.flash_packages import PACKAGES
from soflow_fast.objectives.base import Objective
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.optim import AdamW
from soflow_fast.step import TrainStep

SEED = 0
INPUT_SIZE, CHANNELS, CLASSES = 32, 4, 1000
#: For a machine without a GPU: the tokens of B/4, in a network that a CPU trains at a few steps a second and compiles
#: in minutes.
SMALL = {"patch_size": 4, "hidden_size": 192, "depth": 3, "num_heads": 3}

#: ω, κ and the interval of the published MeanFlow for each size; the others train as B/2 does.
_MEANFLOW_GUIDANCE = {
    "DiT-B/4": (3.0, 0.0, (0.0, 1.0)),
    "DiT-L/2": (0.2, 0.92, (0.0, 0.8)),
    "DiT-XL/2": (0.2, 0.92, (0.0, 0.8)),
}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        what: in words. objective: class and, in ``settings``, what differs from the published recipe.
        tolerance: largest relative error of loss and gradient against the plain float64 objective; where two outputs
            are subtracted it grows with the depth, to 0.17 of 28 blocks with operands cut off to TensorFloat-32.
        dit: class of the network and, in ``network``, its options. impl: of ops and network.
        precision: of the step. optimizer: ``published`` (torch's AdamW, a Python loop for the EMA), ``torch`` (torch's
            fused AdamW, foreach EMA) or ``one-pass``. compile, cuda_graph: of the step.
        no_cpu: why the row is not run on a CPU, if it is not.
    """

    what: str
    objective: type[Objective]
    tolerance: float
    settings: Mapping = field(default_factory=dict)
    dit: type[DiT] = PlainDiT
    network: Mapping = field(default_factory=dict)
    impl: str = "torch"
    precision: str = "bf16"
    optimizer: str = "one-pass"
    compile: bool = True
    cuda_graph: bool = True
    no_cpu: str = ""


@dataclass(frozen=True)
class Workload:
    """What every row is run on.

    Attributes:
        model: ``small`` or a preset of the DiT. batch: a multiple of 4. device: ``cuda`` or ``cpu``. attention: backend
            of the rows that are not bound to one. compile: how the compiled rows are. fused: whether there are fused
            kernels, for the rows that have them. half: whether rows keep their low precision; else all is float32.
    """

    model: str
    batch: int
    device: str
    attention: str = "sdpa"
    compile: bool | str = True
    fused: bool = False
    half: bool = False

    def __post_init__(self):
        if self.batch < 4 or self.batch % 4:
            raise ValueError(f"batch={self.batch} is not a multiple of 4, of which 3 rows train the velocity")

    def network(self, dit: type[DiT], **options) -> DiT:
        """The network with weights at which the times and the labels matter, the same for every row."""
        with torch.device(self.device):
            torch.manual_seed(SEED)
            options = {"input_size": INPUT_SIZE, "in_channels": CHANNELS, "num_classes": CLASSES, **options}
            net = dit(**SMALL, **options) if self.model == "small" else dit.from_preset(self.model, **options)
            generator = torch.Generator(self.device).manual_seed(SEED)
            for p in net.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.02, generator=generator)
            nn.init.normal_(net.y_embedder.embedding_table.weight, generator=generator)
        return net

    def data(self) -> tuple[Tensor, Tensor]:
        """A batch of samples and labels."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = (self.batch, CHANNELS, INPUT_SIZE, INPUT_SIZE)
        x0 = torch.randn(shape, generator=generator, device=self.device)
        return x0, torch.randint(CLASSES, (self.batch,), generator=generator, device=self.device)

    def recipe(self, objective: type[Objective]) -> dict:
        """The published settings of an objective, where they are not its defaults."""
        if issubclass(objective, MeanFlow):
            scale, mix, interval = _MEANFLOW_GUIDANCE.get(self.model, (1.0, 0.5, (0.0, 1.0)))
            return {"guidance_scale": scale, "guidance_mix": mix, "guidance_interval": interval}
        return {}


_HALF = "half precision is for GPUs; in float32 this row is soflow/public-tf32-compile"
_KERNELS = "its kernels are for GPUs; in plain torch this row is soflow/merged-compile"
_TWO = {"quotient": "two_forwards"}
_FP32_STREAM = {"residual_dtype": torch.float32}
_PUBLISHED = {"optimizer": "published", "compile": False, "cuda_graph": False}

ROWS = {
    "soflow/public": Row(
        "as published: eager, TF32, six network calls, torch's AdamW, EMA in a Python loop",
        EagerSixCalls, 0.20, _TWO, precision="tf32", **_PUBLISHED,
    ),
    "soflow/public-tf32-compile": Row(
        "two forwards in TF32, three network calls, compiled, CUDA graph, one-pass update",
        SoFlow, 0.20, _TWO, precision="tf32",
    ),
    "soflow/public-fp16-compile": Row(
        "two forwards in float16 with a loss scale, three network calls, compiled, CUDA graph, one-pass update",
        ScaledLossSoFlow, 0.15, _TWO, network={"compute_dtype": torch.float16, **_FP32_STREAM}, precision="tf32",
        no_cpu=_HALF,
    ),
    "soflow/public-bf16-fp32pair-compile": Row(
        "bfloat16 but for the consistency pair in TF32, four network calls, compiled, CUDA graph, one-pass update",
        Fp32PairSoFlow, 0.20, _TWO, network={"compute_dtype": torch.bfloat16}, precision="tf32", no_cpu=_HALF,
    ),
    "soflow/public-bf16-r02-compile": Row(
        "two forwards in bfloat16 with the gap enlarged to 0.02, three network calls, compiled, CUDA graph, "
        "one-pass update",
        SoFlow, 0.20, {**_TWO, "gap_end": 0.02}, network=_FP32_STREAM, no_cpu=_HALF,
    ),
    "soflow/merged-compile": Row(
        "difference forward in plain torch, two network calls, bfloat16, compiled, CUDA graph, one-pass update",
        SoFlow, 0.03,
    ),
    "soflow/fast": Row(
        "difference forward and the rest of the step by fused kernels, two network calls, bfloat16, compiled, "
        "CUDA graph, one-pass update",
        SoFlow, 0.03, dit=DiT, impl="triton", no_cpu=_KERNELS,
    ),
    "soflow/derived": Row(
        "difference forward derived from the operators of a network in plain torch, bfloat16 by autocast, compiled, "
        "CUDA graph, one-pass update",
        DerivedSoFlow, 0.03,
    ),
    "meanflow/published": Row(
        "as published: eager, bfloat16, JVP with gradient on all rows through math attention, a conditional and an "
        "unconditional forward of all rows, torch's AdamW, EMA in a Python loop",
        PublishedMeanFlow, 0.05, {"derivative": "jvp"}, network={**_FP32_STREAM, "attention": "math"}, **_PUBLISHED,
    ),
    "meanflow/compiled": Row(
        "JVP without gradient on all rows, math attention, bfloat16, compiled, CUDA graph, one-pass update",
        AllRowsMeanFlow, 0.05, {"derivative": "jvp"}, network={"attention": "math"},
    ),
    "meanflow/jvp-flash": Row(
        "JVP without gradient on the rows with r < t through jvp-flash-attention, flash attention in the gradient "
        "pass, bfloat16, compiled, CUDA graph, one-pass update",
        MeanFlow, 0.05, {"derivative": "jvp"}, dit=JvpFlashDiT,
        no_cpu="jvp-flash-attention needs a GPU",
    ),
    "meanflow/strong": Row(
        "JVP on the rows with r < t only, its primal trained, nothing kept of its tangents; flash attention in the "
        "gradient pass of the others, bfloat16, compiled, CUDA graph, one-pass update",
        StrongMeanFlow, 0.05, {"derivative": "jvp"},
    ),
    "meanflow/strong-apart": Row(
        "JVP without gradient on the rows with r < t only, flash attention in the gradient pass of all rows, bfloat16, "
        "compiled, CUDA graph, one-pass update",
        MeanFlow, 0.05, {"derivative": "jvp"},
    ),
    "meanflow/tangent": Row(
        "tangent forward by fused kernels (plain torch without a GPU), two network calls, bfloat16, compiled, CUDA "
        "graph, one-pass update",
        MeanFlow, 0.05, {"derivative": "tangent"}, dit=DiT, impl="triton",
    ),
    "meanflow/finite-difference": Row(
        "finite difference of two forwards in TF32, the rest in bfloat16, compiled, CUDA graph, one-pass update",
        Fp32PairMeanFlow, 0.15, {"derivative": "finite_difference", "difference_step": 5e-3},
        network={"compute_dtype": torch.bfloat16}, precision="tf32",
    ),
    "flow-matching": Row(
        "flow matching without guidance, one network call, by fused kernels (plain torch without a GPU), bfloat16, "
        "compiled, CUDA graph, one-pass update: the lower bound",
        FlowMatching, 0.03, dit=DiT, impl="triton",
    ),
}  # fmt: skip

_FAST = ROWS["soflow/fast"]

#: The fast step with one thing changed.
ABLATIONS = {
    "soflow/fast-no-graph": replace(_FAST, what="without the CUDA graph", cuda_graph=False),
    "soflow/fast-no-compile": replace(_FAST, what="without torch.compile", compile=False),
    "soflow/fast-six-calls": replace(_FAST, what="six network calls", objective=SixCalls),
    "soflow/fast-torch-optimizer": replace(_FAST, what="torch's fused AdamW, foreach EMA", optimizer="torch"),
    "soflow/fast-fp32-residual": replace(_FAST, what="residual streams in float32", network=_FP32_STREAM),
    "soflow/fast-own-attention": replace(
        _FAST, what="projection and attention by the library's kernels", network={"attention": "triton"}
    ),
    **{
        f"soflow/fast-{name.replace('_', '-')}": replace(
            _FAST, what=f"projection and attention by {package.name}", network={"attention": name}
        )
        for name, package in PACKAGES.items()
    },
    "soflow/fast-float8-guidance": replace(
        _FAST, what="products of the guidance on operands in float8", network={"float8_guidance": True}
    ),
    "soflow/fast-recompute-elementwise": replace(
        _FAST, what="the GELU computed again in the backward", network={"recompute": "elementwise"}
    ),
    "soflow/fast-recompute-block": replace(
        _FAST, what="whole blocks computed again in the backward", network={"recompute": "block"}
    ),
}

_EAGER = replace(
    ROWS["soflow/public"], what="and bfloat16, by the difference forward", tolerance=0.03, settings={}, precision="bf16"
)
_MERGED = replace(_EAGER, what="and two network calls", objective=EagerSoFlow)
_COMPILED = replace(_MERGED, what="and torch.compile", objective=SoFlow, compile=True)
_FUSED = replace(_COMPILED, what="and the fused kernels", dit=DiT, impl="triton", no_cpu=_KERNELS)

#: From ``soflow/public`` to ``soflow/fast``, each with one thing more than the one before.
LADDER = {
    "soflow/public": ROWS["soflow/public"],
    "ladder/bf16": _EAGER,
    "ladder/merged": _MERGED,
    "ladder/compile": _COMPILED,
    "ladder/kernels": _FUSED,
    "ladder/cuda-graph": replace(_FUSED, what="and the CUDA graph", cuda_graph=True),
    "soflow/fast": replace(_FAST, what="and the one-pass update"),
}

SETS = {"table": ROWS, "ladder": LADDER, "ablations": {"soflow/fast": _FAST, **ABLATIONS}}


def selected(names: Iterable[str]) -> dict[str, Row]:
    """The rows of ids and names of sets, in order.

    Raises:
        ValueError: for a name that is neither.
    """
    known = {**ROWS, **ABLATIONS, **LADDER, **ROWS}
    rows = {}
    for name in names:
        if name not in SETS and name not in known:
            raise ValueError(f"no row is called {name!r}; choose from {', '.join([*SETS, *known])}")
        rows |= SETS[name] if name in SETS else {name: known[name]}
    return rows


def build(row: Row, workload: Workload) -> TrainStep:
    """The row's step; without CUDA graph on a CPU, and with what the workload says of compiling, kernels, precision."""
    network, precision = dict(row.network), row.precision
    if not workload.half:
        precision = "fp32"
        network = {name: value for name, value in network.items() if not isinstance(value, torch.dtype)}
    impl = row.impl
    if not workload.fused:  # plain torch in place of every kernel
        impl, network = "torch", {name: value for name, value in network.items() if value not in OF_A_GPU}
    net = workload.network(row.dit, **{"impl": impl, "attention": workload.attention, **network})
    model = row.objective(net, **workload.recipe(row.objective), **row.settings)
    graph = row.cuda_graph and workload.device == "cuda"
    optimizer, ema = _update(row, model, graph, workload.fused)
    return TrainStep(
        model,
        optimizer=optimizer,
        ema=ema,
        total_steps=1,  # from its second step on, the gap of the quotient is at its end, where it is hardest
        seed=SEED,
        precision=precision,
        compile=row.compile and workload.compile,
        cuda_graph=graph,
    )


def _update(row: Row, model: Objective, graph: bool, fused: bool) -> tuple[torch.optim.Optimizer, EMA]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if row.optimizer == "published":
        lr = torch.tensor(0.0, device=parameters[0].device) if graph else 0.0  # a graph would keep a number
        adamw = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, capturable=graph)
        return adamw, LoopEMA(model)
    keywords = {"lr": 0.0, "impl": "triton" if fused and row.optimizer == "one-pass" else "torch"}
    if isinstance(model, ScaledLossSoFlow):
        return ScaledAdamW(parameters, objective=model, **keywords), EMA(model)
    return AdamW(parameters, **keywords), EMA(model)
