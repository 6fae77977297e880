"""Error of the consistency quotient against float64, by how it is computed and by the size of the gap.

    python benchmarks/precision.py [--rows 8] [--weights random|digits] [--device auto] [--json OUT.json]

The quotient divides the difference of two nearly equal network outputs by the gap t−l = r(t−s), and rounding errors
with it. Two forwards lose it as r falls; the difference forward keeps one relative accuracy at every r. ``random`` is a
DiT-B/4 with random weights in every layer, ``digits`` the network of ``soflow demo``, trained here first. On a GPU
TF32 is the card's own, and the fused kernels with flash attention have rows of their own. The other weights' table is
kept in the JSON if it is of the same machine and commit, so the two can be made in two calls. ``--smoke`` takes a tiny
network: its figures mean nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _emulate import RoundedProducts, to_bf16, to_fp8, to_tf32
from _measure import environment, write_report
from torch import Tensor, nn

from soflow_fast import DiT
from soflow_fast.build import resolve_device
from soflow_fast.paths import logit_normal, quotient_coefficients

RATIOS = (0.1, 0.02, 0.005, 0.002, 0.0003)


@dataclass(frozen=True)
class Method:
    """One way to compute the quotient: which forward, on which dtypes, with which rounding of operands, by which ops
    and attention, and whether float32 products are TensorFloat-32, which only a GPU has."""

    name: str
    difference: bool
    compute: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32
    rounding: Callable[[Tensor], Tensor] | None = None
    impl: str = "torch"
    attention: str = "math"
    tf32: bool = False


_TF32_EMULATED = Method("two forwards, TF32 operands (emulated)", False, rounding=to_tf32)
METHODS = (
    Method("two forwards, fp32", False),
    _TF32_EMULATED,
    Method("two forwards, bf16", False, torch.bfloat16),
    Method("two forwards, fp16", False, torch.float16),
    Method("two forwards, fp8 operands (emulated)", False, rounding=to_fp8),
    Method("difference, fp32", True),
    Method("difference, bf16 operands, fp32 storage (emulated)", True, rounding=to_bf16),
    Method("difference, bf16, fp32 streams", True, torch.bfloat16),
    Method("difference, bf16, bf16 streams", True, torch.bfloat16, torch.bfloat16),
    Method("difference, fp8 operands (emulated)", True, rounding=to_fp8),
)

_FUSED = {"impl": "triton", "attention": "sdpa"}
#: As the training step runs them: fused kernels, and the attention that torch chooses for the shape.
FUSED = (
    Method("two forwards, bf16, fused", False, torch.bfloat16, **_FUSED),
    Method("two forwards, fp16, fused", False, torch.float16, **_FUSED),
    Method("difference, fp32, fused", True, **_FUSED),
    Method("difference, bf16, fp32 streams, fused", True, torch.bfloat16, **_FUSED),
    Method("difference, bf16, bf16 streams, fused", True, torch.bfloat16, torch.bfloat16, **_FUSED),
    Method("difference, fp16, fp16 streams, fused", True, torch.float16, torch.float16, **_FUSED),
)


def methods(device: torch.device) -> tuple[Method, ...]:
    """What runs on a device: on a GPU, TF32 as it is instead of emulated, and the fused kernels too."""
    if device.type == "cpu":
        return METHODS
    real = Method("two forwards, TF32", False, tf32=True)
    return tuple(real if method is _TF32_EMULATED else method for method in METHODS) + FUSED


def random_network(device: torch.device, small: bool = False, seed: int = 0) -> DiT:
    """DiT-B/4 whose zero-initialised layers have random weights too; or a small network, of the digits' size."""
    torch.manual_seed(seed)
    options = {"impl": "torch", "attention": "math"}
    net = DiT(8, 2, 1, 96, 3, 4, num_classes=10, **options) if small else DiT.from_preset("DiT-B/4", **options)
    for p in net.parameters():
        if p.requires_grad and (p == 0).all():
            nn.init.normal_(p, std=0.02)
    return net.to(device)


def digits_network(device: torch.device, seed: int = 0) -> DiT:
    """The demo's network after its training."""
    from soflow_fast.demo import demo_config
    from soflow_fast.trainer import Trainer

    with TemporaryDirectory() as folder:
        trainer = Trainer(demo_config(folder, seed, str(device)))
        trainer.fit()
    with trainer.ema.applied():
        return deepcopy(trainer.model.network)


def quotient_errors(net: DiT, rows: int, wanted: tuple[Method, ...], seed: int = 1) -> dict[str, dict[str, float]]:
    """``{method: {r: ‖Δ − Δ₆₄‖/‖Δ₆₄‖}}`` over rows with times drawn as in training."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, net.in_channels, net.input_size, net.input_size)
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    z_t, z_s = torch.randn(2, rows, generator=generator)
    t = logit_normal(z_t, 0.2, 0.8)
    s = torch.minimum(logit_normal(z_s, -1.0, 0.8), t - 1e-2)
    labels = torch.randint(net.num_classes, (rows,), generator=generator)
    per_row = t.view(-1, 1, 1, 1)
    x_t, v = (1 - per_row) * x0 + per_row * noise, noise - x0
    x_t, v, t, s, labels = (y.to(net.pos_embed.device) for y in (x_t, v, t, s, labels))

    exact = deepcopy(net).double()
    errors = {method.name: {} for method in wanted}
    for ratio in RATIOS:
        gap = ratio * (t - s)
        truth = _quotient(exact, Method("", True, torch.float64, torch.float64), x_t, v, t, gap, s, labels)
        for method in wanted:
            ours = _quotient(net, method, x_t, v, t, gap, s, labels)
            errors[method.name][str(ratio)] = ((ours - truth).norm() / truth.norm()).item()
    return errors


@torch.no_grad()
def _quotient(net: DiT, method: Method, x_t, v, t, gap, s, labels) -> Tensor:
    net.compute_dtype, net.residual_dtype = method.compute, method.residual
    net.impl, net.attention = method.impl, method.attention
    wide = torch.promote_types(method.compute, torch.float32)
    x_t, v, t, gap, s = (y.to(wide) for y in (x_t, v, t, gap, s))
    step = gap.view(-1, 1, 1, 1)
    with RoundedProducts(method.rounding) if method.rounding else nullcontext(), _tf32(method.tf32):
        if method.difference:
            F, dF = net.forward_difference(x_t, t, s, labels, -step * v, -gap)
        else:
            F = net(x_t, t, s, labels)
            dF = net(x_t - step * v, t - gap, s, labels) - F
    c_x, c_F, c_d, c_v = (c.view(-1, 1, 1, 1) for c in quotient_coefficients(t, gap, s, "euler"))
    return (c_x * x_t + c_F * F + c_d * dF + c_v * v).double()


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may take TensorFloat-32 for float32 products inside the block."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def run_of(report: dict) -> tuple:
    """What tables of one file share."""
    machine = report["environment"]
    hardware = machine["gpu"] and machine["gpu"]["name"], machine["cpu"]["model"]
    return hardware, machine["versions"], machine["commit"], report["device"], report["smoke"], report["rows"]


def kept(path: Path | None, header: dict) -> dict:
    """The tables by weights in the JSON, where they are of the same run; else none.

    Raises:
        ValueError: where the file is no result of this benchmark.
    """
    if path is None or not path.exists():
        return {}
    try:
        report = json.loads(path.read_text())
        return report["relative_error"] if run_of(report) == run_of(header) else {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this benchmark; delete it or give another --json") from error


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="precision.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=8, help="rows the error is taken over (default 8; digits: 256)")
    add("--weights", choices=("random", "digits"), nargs="+", help="default both; random in a smoke run")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--json", type=Path, metavar="OUT", help="write the table here")
    add("--smoke", action="store_true", help="random weights in a tiny network; the figures mean nothing")
    options = parser.parse_args(arguments)
    options.weights = options.weights or (["random"] if options.smoke else ["random", "digits"])
    if options.rows < 1:
        parser.error(f"--rows {options.rows} is not possible; it must be at least 1")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"the folder of {options.json} does not exist; create it")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0; 2 for bad input."""
    options = parsed(arguments)
    try:
        device = resolve_device(options.device)
        wanted = methods(device)
        result = {"environment": environment(), "device": str(device), "smoke": options.smoke, "rows": options.rows}
        result["methods"] = {m.name: {"impl": m.impl, "attention": m.attention} for m in wanted}
        tables = result["relative_error"] = kept(options.json, result)
    except ValueError as error:
        print(f"precision.py: {error}", file=sys.stderr)
        return 2
    for i, weights in enumerate(options.weights, 1):
        random = weights == "random"
        net = random_network(device, options.smoke) if random else digits_network(device)
        tables[weights] = quotient_errors(net, options.rows if random else 256, wanted)
        if options.json:
            write_report(options.json, result, partial=i < len(options.weights))
        print(f"\nrelative error of the quotient, {weights} weights")
        print(f"{'r':52}" + "".join(f"{r:>10g}" for r in RATIOS))
        for name, row in tables[weights].items():
            print(f"{name:52}" + "".join(f"{error:>10.2g}" for error in row.values()))
    if options.smoke:
        print("a smoke run: these figures mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
