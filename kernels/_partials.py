"""The second stage of a sum over tokens: the float32 rows that the programs of the first wrote, added in a fixed order.

Shapes: B rows (samples), each of some chunks of tokens, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch

# One warp adds 8 chunks of 128 columns at a time: few bytes each, so that many programs share them.
_SUM = Launch(num_warps=1, max_registers=64)
_CHUNKS = 8
_COLUMNS = 128


@triton.jit(do_not_specialize=["chunks"])
def _sum_partials_kernel(
    partial_ptr,  # (B, chunks, C)
    first_ptr,  # (B, F)
    rest_ptr,  # (B, C − F), or None where F = C
    chunks: tl.int64,
    C,
    F,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((CHUNKS, COLUMNS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & (columns < C)[None, :]
        total += tl.load(partial_ptr + (sample * chunks + chunk)[:, None] * C + columns[None, :], mask=mask, other=0.0)
    row = tl.sum(total, 0)
    tl.store(first_ptr + sample * F + columns, row.to(first_ptr.dtype.element_ty), mask=columns < F)
    if rest_ptr is not None:
        rest = (columns >= F) & (columns < C)
        tl.store(rest_ptr + sample * (C - F) + columns - F, row.to(rest_ptr.dtype.element_ty), mask=rest)


def sum_chunks(partials: Tensor, first: Tensor, rest: Tensor | None = None) -> None:
    """Adds up the partial sums of each sample in a fixed order, each result rounded once to its output's dtype.

    Args:
        partials: (B, chunks, sums, D), float32. first: (B, its sums, D), filled with the first of the sums.
        rest: (B, D), filled with the last one where first does not hold it.
    """
    B, chunks, sums, D = partials.shape
    launch(
        _sum_partials_kernel,
        lambda: (B, triton.cdiv(sums * D, _COLUMNS)),
        *(partials, first, rest),
        *(chunks, sums * D, first.shape[1] * D),
        CHUNKS=_CHUNKS,
        COLUMNS=_COLUMNS,
        config=_SUM,
    )
