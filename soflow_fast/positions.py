"""The fixed table of positions of a transformer's tokens, which is a function of their grid alone."""

import torch
from torch import Tensor

# Tables of two grids differ by sin 1 somewhere; one that was stored in bfloat16, by 2^-9 from itself.
_SAME = 0.05


def position_table(hidden_size: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sin-cos embedding, (1, rows·columns, D): half the width per axis, the column first, ``[sin, cos]``."""
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

    def axis(n: int) -> Tensor:
        phase = torch.arange(n, dtype=torch.float64)[:, None] * omega
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    column, row = axis(columns).expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, hidden_size).float()


def are_of_one_grid(table: Tensor, other: Tensor) -> bool:
    """Whether two tables of positions, of whatever kind, can stand for one another.

    They cannot where their shapes differ, or where both are :func:`position_table` of different grids that have as many
    tokens, such as 4×4 and 2×8.
    """
    if table.shape != other.shape:
        return False
    if table.is_meta or table.dim() != 3 or len(table) != 1 or table.shape[2] % 4:
        return True
    table, other = (z.detach().float().cpu() for z in (table, other))
    if torch.allclose(table, other, rtol=0, atol=_SAME):
        return True
    return None in (_grid_of(table), _grid_of(other))


def _grid_of(table: Tensor) -> tuple[int, int] | None:
    """The rows and columns of a :func:`position_table`; None of another."""
    _, n, width = table.shape
    for rows in range(1, n + 1):
        if n % rows == 0 and torch.allclose(table, position_table(width, rows, n // rows), rtol=0, atol=_SAME):
            return rows, n // rows
    return None
