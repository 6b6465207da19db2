"""What the pictures of all benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises `UserError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install 'shoal[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def require_picture(path: Path) -> None:
    """Raises `UserError` where no picture could be written there; to be asked before what it shows is measured."""
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise UserError(f"the picture {path} has no format that can be drawn: let its name end in .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"the picture {path} cannot be written: there is no folder {path.parent}")


def save(figure: Figure, path: Path) -> None:
    """Write the picture. Raises `UserError` where that cannot be done."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} cannot be written: {error}") from None


def count_on_log_axis(axes: Axes) -> None:
    """Figures at 1, 2, 5, 10, 20, ... on a logarithmic x axis that spans little more than a power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
