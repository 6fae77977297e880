"""The size of a sample: one number, or a height and a width."""

from numbers import Integral

#: S for S×S, or (H, W).
Size = int | tuple[int, int]


def height_and_width(size: Size, setting: str = "input_size=") -> tuple[int, int]:
    """(H, W) of a size.

    Args:
        setting: what the user writes before it.

    Raises:
        ValueError: for what is neither a number nor two, and sides below 1.
    """
    sides = (size, size) if isinstance(size, Integral) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides):
        raise ValueError(f"{setting}{format_size(size)} is not a size; give a whole number, or [height, width]")
    if min(sides) < 1:
        raise ValueError(f"{setting}{format_size(size)} is not possible; it must be at least 1")
    return sides


def as_size(height: int, width: int) -> Size:
    """One number for a square, so that every size is written in one way."""
    return height if height == width else (height, width)


def format_size(size: Size) -> str:
    """A size as it stands in a YAML file."""
    return str(list(size) if isinstance(size, tuple) else size)


def parse_size(text: str, setting: str) -> Size:
    """The size that a command line has as ``256``, or as ``256,384`` or ``[256, 384]`` with the height first.

    Raises:
        ValueError: for another text, and sides below 1.
    """
    try:
        sides = tuple(int(side) for side in text.strip("[]").split(","))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2):
        raise ValueError(f"{setting}{text} is not a size; give a whole number, or height,width such as 256,384")
    return as_size(*height_and_width(sides if len(sides) == 2 else sides[0], setting))
