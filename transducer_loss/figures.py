"""What the pictures of `transducer_loss.plot` share: figures, colours, ticks, legends."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

from transducer_loss.checks import finite
from transducer_loss.planner import readable

# From the Okabe-Ito palette, which colour-blind readers tell apart.
BLUE, VERMILION, GREEN, ORANGE, SKY_BLUE, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#000000"


def axes_for(ax: Any, size: tuple[float, float]) -> Any:
    """The axes to draw into, made where none are given."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('transducer_loss.plot: matplotlib is missing: pip install "transducer_loss[plot]"') from error
    if ax is None:
        figure: Any = Figure(figsize=size, layout="constrained")
        ax = figure.add_subplot()
        # What notebooks ask a value for; they show figures by themselves only once pyplot was imported, and axes never.
        ax._repr_png_ = figure._repr_png_ = functools.partial(_png, figure)
    elif not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib's Axes, got {type(ax).__name__}")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def checked_period(frame_period: Any) -> float | None:
    """Milliseconds of a frame, or None for frames."""
    if frame_period is not None and finite(frame_period, "frame_period") <= 0:
        raise ValueError(f"frame_period: expected more than 0 milliseconds, got {frame_period}")
    return None if frame_period is None else float(frame_period)


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Ticks with names: all of them, or as many as there is room for."""
    room = points_high(ax) / 1.15
    size = min(9.0, max(6.0, room / len(names)))
    every = math.ceil(size * len(names) / room)
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize=size, parse_math=False)


def points_high(ax: Any) -> float:
    """Height of axes, about: a layout may yet change it."""
    return float(ax.get_window_extent().height * 72 / ax.figure.dpi)


def note(ax: Any, text: str) -> None:
    """Words in the place of what there is nothing of."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")


def legend_beside(ax: Any) -> None:
    """A legend where no line or bar is."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def bytes_tick(value: float, _: float) -> str:
    """Format a tick; by a function with a name, without which no figure could be pickled."""
    return readable(int(value))
