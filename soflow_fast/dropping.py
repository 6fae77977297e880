"""Which rows of a batch are trained without their label, and which rows therefore need no guidance.

A share p = m/q of the rows drops its label. The rows that train the velocity and those that do not are, each in the
order of their global index, cut into groups of q, and of each group exactly m rows drop: an evenly spread pattern that
a draw of the group moves round. So each row drops with probability p, however a batch is split into processes and
micro-batches, and of n rows that follow each other it is known, before anything is drawn, how many drop at least. The
target of those is the data's velocity, so the network need not predict a guided one for them.
"""

import torch
from torch import Tensor

from soflow_fast.paths import as_fraction


def groups(rows: Tensor, velocity_share: float, share: float) -> tuple[Tensor, Tensor]:
    """The group of each row, and its place in it.

    Args:
        rows: (B,) int64 global row indices. velocity_share: of the rows that train the velocity, see
            :func:`soflow_fast.paths.row_order`. share: p in [0, 1], of the rows that drop their label.

    Returns:
        ``(group, place)``, each (B,) int64: a number that no other group has, and a number below q.
    """
    rest, q = 1 - as_fraction(velocity_share), as_fraction(share).denominator
    before, after = ((g * rest.numerator) // rest.denominator for g in (rows, rows + 1))
    is_velocity = after == before
    index = torch.where(is_velocity, rows - before, before)
    return 2 * (index // q) + is_velocity, index % q


def dropped(place: Tensor, draw: Tensor, share: float) -> Tensor:
    """(B,) bool, whether a row drops its label.

    Args:
        place: (B,) as of :func:`groups`. draw: (B,) in [0, 1], the same for all rows of a group. share: p.
    """
    p = as_fraction(share)
    m, q = p.numerator, p.denominator
    moved = (place + (draw * q).long().clamp(max=q - 1)) % q
    return ((moved + 1) * m) // q > (moved * m) // q


def fewest(n: int, share: float) -> int:
    """How many of n rows of one kind that follow each other drop their label at least, wherever a group begins."""
    p = as_fraction(share)
    return max(0, (n - p.denominator + 1) // p.denominator) * p.numerator


def to_guide(drop: Tensor, share: float) -> Tensor:
    """(k,) int64 indices of the rows of one kind that may need guidance: all that do not drop, and k known beforehand.

    Args:
        drop: (n,) bool of rows that follow each other, which may be more than are drawn. share: p.
    """
    n = len(drop)
    return drop.to(torch.uint8).argsort(stable=True)[: n - min(fewest(n, share), max(n - 1, 0))]
