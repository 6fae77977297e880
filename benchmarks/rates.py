"""The floor of a training step: its matrix products and attention alone, each timed by itself at its own shape.

    python benchmarks/rates.py [--models DiT-B/4 DiT-XL/2] [--batch 256] [--json OUT.json] [--smoke]

Counts the products of the blocks in a merged SoFlow step: forwards without gradient of 1.25·B rows, less those that
drop their label, one with gradient of B rows, the differences of B/4 rows, and the backward. Each shape is timed from a
cold cache; the sum of count times time, without what an empty CUDA graph takes, is the floor: a step on this card that
does nothing else. A part that fails is named, and the floor is without it. Embeddings, modulation and last layer are
left out, under 2 % of the work. ``--smoke`` takes a tiny model, to try the script; so does a machine without a GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _measure import environment, write_report
from _pieces import gpu_lost
from _timing import Timer, copy_bandwidth, launch_floor_ms
from torch import Tensor

from soflow_fast import flash
from soflow_fast.attention import attention as network_attention
from soflow_fast.dit import PRESETS
from soflow_fast.dropping import fewest
from soflow_fast.flash_packages import PACKAGES, missing_for_flash
from soflow_fast.kernels import mlp, reference, self_attention
from soflow_fast.kernels.reference_float8 import float8_rows, scaled_product

INPUT_SIZE = 32
_LABEL_DROP = 0.1  # as published
_TINY = (8, 64, 2, 2)
_BACKENDS = {"flash": "torch_flash", "cuDNN": "cudnn", "efficient": "torch_efficient"}


@dataclass(frozen=True)
class Part:
    """One operation of a step: ``make`` its inputs' function, ``flops`` of one call, ``count`` per step.

    A count of 0 is of an operation that is timed for comparison only, and may be refused here.
    """

    name: str
    flops: float
    count: int
    make: Callable[[], Callable[[], object]]


def parts(sizes: tuple[int, int, int, int], batch: int, device: str, dtype: torch.dtype) -> list[Part]:
    """The parts of a step of a DiT of (patch size, width, depth, heads)."""
    patch, D, depth, heads = sizes
    N, quarter = (INPUT_SIZE // patch) ** 2, batch // 4
    spared = fewest(batch - quarter, _LABEL_DROP) + 2 * fewest(quarter, _LABEL_DROP)
    rows = {"guidance": batch + quarter - spared, "gradient": batch, "difference": quarter}
    layers = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def product(x: tuple[int, int], y: tuple[int, int], *, x_t: bool = False, y_t: bool = False):
        """A function of the product of two matrices stored with these shapes, transposed where said."""

        def make():
            a, b = normal(*x), normal(*y)
            a, b = a.mT if x_t else a, b.mT if y_t else b
            return lambda: a @ b

        return make

    def hidden_units(m: int, *, one_call: bool):
        def make():
            h, w1, b1 = normal(m, D), normal(4 * D, D), normal(4 * D)
            if one_call:
                return lambda: mlp._linear_gelu(h, w1, b1)
            u = torch.empty(m, 4 * D, dtype=dtype, device=device)
            gelu = mlp._gelu if device == "cuda" else partial(torch.nn.functional.gelu, approximate="tanh")
            return lambda: gelu(torch.addmm(b1, h, w1.mT, out=u))

        return make

    def rounded(m: int, n_in: int, n_out: int):
        def make():
            h, weight = (float8_rows(normal(*shape)) for shape in ((m, n_in), (n_out, n_in)))
            return lambda: scaled_product(h.values, h.scales, weight.values, weight.scales, None, dtype)

        return make

    def attention(b: int, backward: bool, backend: str = "sdpa"):  # as the step's, which leaves cuDNN out
        def make():
            qkv = normal(b, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
            # leaves: a node made outside a CUDA graph cannot receive a gradient inside
            q, k, v = (x.requires_grad_(backward) for x in qkv.unbind(0))
            g = normal(b, N, heads, D // heads).transpose(1, 2)

            def run():
                o = network_attention(q, k, v, backend)
                return torch.autograd.grad(o, (q, k, v), g) if backward else o

            return run

        return make

    def projected_attention(b: int, backward: bool, forward_op: Callable, backward_op: Callable, *options: str):
        def make():
            y, g = normal(b, N, 3, heads, D // heads), normal(b, N, heads, D // heads)

            def run():
                o, lse = forward_op(y, *options)
                return backward_op(y, g, o, lse, *options) if backward else o

            return run

        return make

    def attention_difference():
        q, k, v, dq, dk, dv, o = normal(7, quarter, heads, N, D // heads).unbind(0)
        op = reference.attention_difference
        if device == "cuda":
            from soflow_fast.kernels import fused

            op = fused.attention_difference
        return lambda: op(q, k, v, dq, dk, dv, o)

    listed = []
    for layer, (n_in, n_out) in layers.items():
        for use, b in rows.items():
            m = b * N
            listed.append(
                Part(f"{layer}, {use}", 2.0 * m * n_in * n_out, depth, product((m, n_in), (n_out, n_in), y_t=True))
            )
        m = batch * N
        flops = 2.0 * m * n_in * n_out
        listed.append(Part(f"{layer}, gradient of the input", flops, depth, product((m, n_out), (n_out, n_in))))
        listed.append(Part(f"{layer}, gradient of the weight", flops, depth, product((m, n_out), (m, n_in), x_t=True)))
    # Not in the floor: whether the GELU costs less in the epilogue of its product than after it.
    m, flops = rows["guidance"] * N, 2.0 * rows["guidance"] * N * D * 4 * D
    listed.append(Part("fc1 with GELU, guidance", flops, 0, hidden_units(m, one_call=True)))
    listed.append(Part("fc1, then GELU, guidance", flops, 0, hidden_units(m, one_call=False)))
    # Nor what products of operands in float8 are worth.
    for layer in ("qkv", "fc1", "fc2"):
        n_in, n_out = layers[layer]
        flops = 2.0 * m * n_in * n_out
        listed.append(Part(f"{layer} in float8, guidance", flops, 0, rounded(m, n_in, n_out)))
    two_products = 4.0 * N * N * D
    guidance, gradient = rows["guidance"] * two_products, 3.5 * batch * two_products
    listed += [
        Part("attention, guidance", guidance, depth, attention(rows["guidance"], False)),
        Part("attention, gradient and backward", gradient, depth, attention(batch, True)),
        Part("attention difference", 2.5 * quarter * two_products, depth, attention_difference),
    ]
    # Not in the floor: which backend torch has chosen above, and whether another is faster. Those named first leave the
    # gradient packed, the library's own also summed.
    projected = {}
    if device == "cuda":
        projected["triton"] = (self_attention._forward, self_attention.backward)
        for name in PACKAGES:
            if missing_for_flash(name, D // heads) is None:
                projected[name] = (flash._forward, flash._backward, name)
    for name, ops in projected.items():
        listed += [
            Part(f"attention by {name}, guidance", guidance, 0, projected_attention(rows["guidance"], False, *ops)),
            Part(f"attention by {name}, both ways", gradient, 0, projected_attention(batch, True, *ops)),
        ]
    for name, backend in _BACKENDS.items():
        listed += [
            Part(f"attention by {name}, guidance", guidance, 0, attention(rows["guidance"], False, backend)),
            Part(f"attention by {name}, both ways", gradient, 0, attention(batch, True, backend)),
        ]
    return listed


def measure(name: str, sizes: tuple[int, int, int, int], batch: int, timer: Timer, launch_ms: float) -> Iterator[dict]:
    """After each part the rows of one model, their sum and, ``without``, the counted parts that have no time.

    Args:
        launch_ms: of :func:`launch_floor_ms`, which each time has in it and a part of a captured step has not.

    Raises:
        SystemExit: if a part has cost this process its GPU.
    """
    device = timer.device.type
    listed, rows = parts(sizes, batch, device, torch.bfloat16 if device == "cuda" else torch.float32), {}
    for part in listed:
        row = {"part": part.name, "count": part.count}
        try:
            ms = timer(part.make()).median
        except Exception as error:  # must not cost the other parts
            row |= {"ms": None, "tflops": None, "ms_per_step": 0.0, "refused": f"{type(error).__name__}: {error}"}
        else:
            row |= {"ms": ms, "tflops": part.flops / ms / 1e9, "ms_per_step": part.count * max(0.0, ms - launch_ms)}
        rows[part.name] = row
        timed = [part for part in listed if rows.get(part.name, {}).get("ms") is not None]
        flops, floor = sum(p.flops * p.count for p in timed), sum(row["ms_per_step"] for row in rows.values())
        yield {
            "model": name,
            "batch": batch,
            "floor_ms": floor,
            "tflops": flops / floor / 1e9 if floor else 0.0,
            "without": [part.name for part in listed if part.count and part not in timed],
            "rows": list(rows.values()),
        }
        if "refused" in row and gpu_lost():
            sys.exit(f"{part.name} has cost this process its GPU")


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the JSON after every part, prints the table; 1 if a counted part failed, 2 for bad input."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="rates.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=["DiT-XL/2", "DiT-B/4"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=256, help="a multiple of 4 (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: only tries the script")
    options = parser.parse_args(arguments)
    if options.batch < 4 or options.batch % 4:
        parser.error(f"--batch {options.batch} is not a multiple of 4, of which 3 rows train the velocity")
    timer = Timer("cuda" if on_gpu else "cpu")
    tiny = options.smoke or not on_gpu
    models = {"tiny": _TINY} if tiny else {name: PRESETS[name] for name in options.models}
    report = {"environment": environment(), "smoke": tiny, "copy_gb_per_s": copy_bandwidth(timer)}
    report |= {"launch_floor_ms": launch_floor_ms(timer), "models": []}
    for name, sizes in models.items():
        before = report["models"]
        for model in measure(name, sizes, 4 if tiny else options.batch, timer, report["launch_floor_ms"]):
            report["models"] = [*before, model]
            if options.json:
                write_report(options.json, report, partial=True)
    if options.json:
        write_report(options.json, report)
    for model in report["models"]:
        print(f"\n{model['model']}, batch {model['batch']}{': times mean nothing' if tiny else ''}")
        print(f"{'':36}{'ms':>9}{'count':>7}{'TFLOP/s':>9}{'ms/step':>9}")
        for row in model["rows"]:
            if row["ms"] is None:
                print(f"{row['part']:36}  refused: {row['refused'].splitlines()[0]}")
                continue
            print(f"{row['part']:36}{row['ms']:>9.3f}{row['count']:>7}{row['tflops']:>9.1f}{row['ms_per_step']:>9.2f}")
        print(f"{'floor':52}{model['tflops']:>9.1f}{model['floor_ms']:>9.2f}")
        if model["without"]:
            print(f"the floor is without {', '.join(model['without'])}")
    print(f"copy bandwidth {report['copy_gb_per_s']:.0f} GB/s, empty graph {report['launch_floor_ms']:.4f} ms")
    return int(any(model["without"] for model in report["models"]))


if __name__ == "__main__":
    sys.exit(main())
