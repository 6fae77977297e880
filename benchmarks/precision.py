"""Error of the consistency quotient against float64, by how it is computed and by the size of the gap.

    python benchmarks/precision.py [--rows 8] [--weights random|digits] [--json OUT.json]

The quotient divides the difference of two nearly equal network outputs by the gap t−l = r(t−s), and rounding errors
with it. Two forwards lose it as r falls; the difference forward keeps one relative accuracy at every r. ``random`` is a
DiT-B/4 with random weights in every layer, ``digits`` the network of ``soflow demo``, trained here first.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _emulate import RoundedProducts, to_bf16, to_fp8, to_tf32
from _measure import environment
from torch import Tensor, nn

from soflow_fast import DiT
from soflow_fast.paths import logit_normal, quotient_coefficients

RATIOS = (0.1, 0.02, 0.005, 0.002, 0.0003)


@dataclass(frozen=True)
class Method:
    """One way to compute the quotient: which forward, on which dtypes, with which rounding of operands."""

    name: str
    difference: bool
    compute: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32
    rounding: Callable[[Tensor], Tensor] | None = None


METHODS = (
    Method("two forwards, fp32", False),
    Method("two forwards, TF32 operands (emulated)", False, rounding=to_tf32),
    Method("two forwards, bf16", False, torch.bfloat16),
    Method("two forwards, fp16", False, torch.float16),
    Method("two forwards, fp8 operands (emulated)", False, rounding=to_fp8),
    Method("difference, fp32", True),
    Method("difference, bf16 operands, fp32 storage (emulated)", True, rounding=to_bf16),
    Method("difference, bf16, fp32 streams", True, torch.bfloat16),
    Method("difference, bf16, bf16 streams", True, torch.bfloat16, torch.bfloat16),
    Method("difference, fp8 operands (emulated)", True, rounding=to_fp8),
)


def random_network(seed: int = 0) -> DiT:
    """DiT-B/4 whose zero-initialised layers have random weights too."""
    torch.manual_seed(seed)
    net = DiT.from_preset("DiT-B/4", impl="torch", attention="math")
    for p in net.parameters():
        if p.requires_grad and (p == 0).all():
            nn.init.normal_(p, std=0.02)
    return net


def digits_network(seed: int = 0) -> DiT:
    """The demo's network after its training."""
    from soflow_fast.demo import demo_config
    from soflow_fast.trainer import Trainer, load_run

    with TemporaryDirectory() as folder:
        Trainer(demo_config(folder, seed, "cpu")).fit()
        net = load_run(folder, "cpu")[1].network
    net.attention = "math"
    return net


def quotient_errors(net: DiT, rows: int, seed: int = 1) -> dict[str, dict[str, float]]:
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

    exact = deepcopy(net).double()
    errors = {method.name: {} for method in METHODS}
    for ratio in RATIOS:
        gap = ratio * (t - s)
        truth = _quotient(exact, Method("", True, torch.float64, torch.float64), x_t, v, t, gap, s, labels)
        for method in METHODS:
            ours = _quotient(net, method, x_t, v, t, gap, s, labels)
            errors[method.name][str(ratio)] = ((ours - truth).norm() / truth.norm()).item()
    return errors


@torch.no_grad()
def _quotient(net: DiT, method: Method, x_t, v, t, gap, s, labels) -> Tensor:
    net.compute_dtype, net.residual_dtype = method.compute, method.residual
    wide = torch.promote_types(method.compute, torch.float32)
    x_t, v, t, gap, s = (y.to(wide) for y in (x_t, v, t, gap, s))
    step = gap.view(-1, 1, 1, 1)
    with RoundedProducts(method.rounding) if method.rounding else nullcontext():
        if method.difference:
            F, dF = net.forward_difference(x_t, t, s, labels, -step * v, -gap)
        else:
            F = net(x_t, t, s, labels)
            dF = net(x_t - step * v, t - gap, s, labels) - F
    c_x, c_F, c_d, c_v = (c.view(-1, 1, 1, 1) for c in quotient_coefficients(t, gap, s, "euler"))
    return (c_x * x_t + c_F * F + c_d * dF + c_v * v).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows the error is taken over (default 8)")
    parser.add_argument("--weights", choices=("random", "digits"), nargs="+", default=["random", "digits"])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table here")
    arguments = parser.parse_args()
    tables = {}
    for weights in arguments.weights:
        net = random_network() if weights == "random" else digits_network()
        tables[weights] = quotient_errors(net, arguments.rows if weights == "random" else 256)
        print(f"\nrelative error of the quotient, {weights} weights")
        print(f"{'r':52}" + "".join(f"{r:>10g}" for r in RATIOS))
        for name, row in tables[weights].items():
            print(f"{name:52}" + "".join(f"{error:>10.2g}" for error in row.values()))
    if arguments.json:
        result = {"environment": environment(), "rows": arguments.rows, "relative_error": tables}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
