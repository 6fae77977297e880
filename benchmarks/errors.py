"""Errors of each fused op by dtype, against float64.

    python benchmarks/errors.py [--only OP] [--json OUT.json]

Three forms of each op are compared with the reference in float64, on one row of the inputs of its largest training
size: ``fused``; ``reference``, which computes in float32 and rounds once; and ``plain``, the formula as it is usually
written, every intermediate rounded to its inputs' dtype, and a difference as two evaluations subtracted. An error is
the largest absolute error over the largest absolute value. Without a GPU the fused ops run in Triton's interpreter, as
``_interpreter.py`` mends it.
"""

import argparse
import json
import sys
from pathlib import Path

import _interpreter  # noqa: F401
import torch
from _measure import environment, write_whole
from torch import Tensor, nn

from soflow_fast.kernels import _accuracy, coefficients, fused, reference
from soflow_fast.kernels._cases import Case, Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ------------------------------------------------------------------------------------------------- plain forms


def modulated_layernorm(x, shift, scale, *, eps=1e-6, dtype=None):
    n = nn.functional.layer_norm(x, x.shape[-1:], eps=eps).to(dtype or x.dtype)
    return n * (1 + scale[:, None]) + shift[:, None]


def gated_residual_layernorm(x, branch, gate, shift, scale, *, bias=None, eps=1e-6, dtype=None):
    x_new = x + gate[:, None] * (branch if bias is None else branch + bias)
    return x_new, modulated_layernorm(x_new, shift, scale, eps=eps, dtype=dtype or branch.dtype)


def mlp(h, w1, b1, w2, *, recompute=False, hidden=False):
    u = h @ w1.mT + b1
    out = nn.functional.gelu(u, approximate="tanh") @ w2.mT
    return out, u.detach() if hidden else None


def condition(t_embedding, s_embedding, table, labels):
    c = t_embedding + s_embedding + nn.functional.embedding(labels, table).to(t_embedding.dtype)
    return c.detach(), nn.functional.silu(c)


def project_heads(h, weight, bias, *, heads):
    y = (h @ weight.mT + bias).unflatten(-1, (3, heads, -1))
    return tuple(y[:, :, part].transpose(1, 2) for part in range(3))


def time_sinusoids(t, s, *, width=256, dtype=None):
    tau = torch.stack([t, t - s]).to(dtype or t.dtype)
    phase = tau[..., None] * reference.frequencies(width, tau)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def modulated_layernorm_difference(x, d, scale, dshift, dscale, **options):
    moved = modulated_layernorm(x + d, dshift, scale + dscale, **options)
    return moved - modulated_layernorm(x, torch.zeros_like(dshift), scale, **options)


def gated_residual_layernorm_difference(
    x_new, d, branch, d_branch, gate, scale, dgate, dshift, dscale, *, bias=None, dtype=None, **options
):
    branch = branch if bias is None else branch + bias
    options["dtype"] = dtype or d_branch.dtype
    gated = (gate + dgate)[:, None] * (branch + d_branch)
    moved = x_new - gate[:, None] * branch + d + gated
    return moved - x_new, modulated_layernorm_difference(x_new, moved - x_new, scale, dshift, dscale, **options)


def gelu_difference(u, du):
    return nn.functional.gelu(u + du, approximate="tanh") - nn.functional.gelu(u, approximate="tanh")


def silu_difference(u, du):
    return nn.functional.silu(u + du) - nn.functional.silu(u)


def attention_difference(q, k, v, dq, dk, dv, o):
    return nn.functional.scaled_dot_product_attention(q + dq, k + dk, v + dv) - o


def time_sinusoids_difference(t, s, dt, *, width=256, dtype=None):
    moved = time_sinusoids(t + dt, s, width=width, dtype=dtype)
    return moved - time_sinusoids(t, s, width=width, dtype=dtype)


def _per_row(c: Tensor, like: Tensor) -> Tensor:
    return c.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def guided_velocity(v, F_null, F_own, t, drop, *, parameterization, guidance_scale, guidance_mix, decay_time):
    v, slope = v.to(F_null.dtype), coefficients.velocity_scale(parameterization)
    strength = _per_row(coefficients.guidance_decay(t, decay_time) * (guidance_scale - 1), v)
    guided = guidance_mix * (v + strength * (v - slope * F_null)) + (1 - guidance_mix) * slope * F_own
    return torch.where(_per_row(drop, v).bool(), v, guided)


def velocity_loss(F, v, F_null, t, drop, *, p, eps, **guidance):
    slope = coefficients.velocity_scale(guidance["parameterization"])
    target = v.to(F.dtype) if F_null is None else guided_velocity(v, F_null, F.detach(), t, drop, **guidance)
    mse = (slope * F - target).square().flatten(1).mean(1)
    weight = 1 / (slope * (mse.detach() + eps).pow(p))
    return weight * mse, mse.detach(), weight


def consistency_loss(F, dF, v, x_t, t, gap, s, *, parameterization, p, eps):
    c = coefficients.quotient_coefficients(t, gap, s, parameterization)
    terms = zip(c, (x_t, F.detach(), dF, v), strict=True)
    quotient = sum(_per_row(factor, F) * x.to(F.dtype) for factor, x in terms)
    mse = quotient.square().flatten(1).mean(1)
    weight = (mse + eps).pow(-p)
    return -weight * (F * quotient).flatten(1).mean(1), mse, weight


PLAIN = {
    form.__name__: form
    for form in (
        modulated_layernorm,
        gated_residual_layernorm,
        mlp,
        condition,
        project_heads,
        time_sinusoids,
        modulated_layernorm_difference,
        gated_residual_layernorm_difference,
        gelu_difference,
        silu_difference,
        attention_difference,
        time_sinusoids_difference,
        guided_velocity,
        velocity_loss,
        consistency_loss,
    )
}


# ------------------------------------------------------------------------------------------------ measurements


def cases(only: str | None) -> list[Case]:
    """Of each op the cases of XL/2, or all where its size is not that of a model."""
    chosen = [case for case in fused.cases() if not only or only in case.op]
    sized = {case.op for case in chosen if case.name.startswith("XL/2")}
    return [case for case in chosen if case.op not in sized or case.name.startswith("XL/2")]


def measure(case: Case, dtype_name: str) -> list[dict]:
    """One row per output and gradient: relative errors of the three forms, None where there is no plain form."""
    arguments = case.inputs(Inputs(DEVICE, DTYPES[dtype_name], max_rows=1))
    inputs = (arguments, case.options, case.gradients)
    exact = _accuracy.truth(case.op, *inputs)
    ours, upcast = (_accuracy.run(getattr(module, case.op), *inputs) for module in (fused, reference))
    plain = None
    if case.op in PLAIN and not case.options.get("tangent") and arguments.get("dtype") != torch.float8_e4m3fn:
        plain = _accuracy.run(PLAIN[case.op], *inputs)
    rows = []
    for i, error in enumerate(_accuracy.compare(case.op, ours, upcast, exact, case.gradients)):
        row = {"op": case.op, "case": case.name, "inputs": dtype_name, "result": error.name}
        row |= {"dtype": str(error.dtype).removeprefix("torch."), "fused": error.ours / error.scale}
        row |= {"reference": error.plain / error.scale, "within_rule": error.within}
        rows.append({**row, "plain": None if plain is None else _relative(plain[i], exact[i])})
    return rows


def _relative(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).abs().max() / exact.abs().max()).item()


def write(path: Path, head: dict, rows: list[dict], partial: bool) -> None:
    """The JSON, with one row a line; marked while rows are to come."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    start = json.dumps({**head, "partial": True} if partial else head, indent=1)[:-2]
    write_whole(path, f'{start},\n "rows": [\n{lines}\n]\n}}\n')


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| op | case | inputs | result | fused | reference | plain |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        errors = " | ".join("" if row[k] is None else f"{row[k]:.1e}" for k in ("fused", "reference", "plain"))
        lines.append(f"| {row['op']} | {row['case']} | {row['inputs']} | {row['result']} | {errors} |")
    outside = sum(not row["within_rule"] for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} results, {outside} outside the rule of the tests"])


def main() -> int:
    """Prints the table, writes the JSON; 1 if a result is less exact than the tests allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="OP", help="only ops whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here")
    arguments = parser.parse_args()
    head = {"environment": environment(), "device": "GPU" if DEVICE == "cuda" else "CPU, Triton's interpreter"}
    rows, chosen = [], cases(arguments.only)
    for i, case in enumerate(chosen, 1):
        for dtype_name in DTYPES:
            rows += measure(case, dtype_name)
        print(case.op, case.name, file=sys.stderr)
        if arguments.json:
            write(arguments.json, head, rows, partial=i < len(chosen))
    print(table(rows))
    return any(not row["within_rule"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
