"""Pictures by matplotlib (``pip install "transducer_loss[plot]"``): the lattice, emission delays, memory by batch size.

Every function draws into the axes `ax` and returns them. Without `ax` it makes a `matplotlib.figure.Figure` of its own, not one
of pyplot's: pyplot would hold every figure until it is closed, and choose a window system. The figure is saved by
``ax.figure.savefig("picture.png")`` and freed when nothing refers to it; the axes as the value of a notebook's cell show it.
Text has the sizes and fonts of matplotlib's settings. matplotlib is imported by the calls alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transducer_loss import figures
from transducer_loss.band import Band
from transducer_loss.checks import expect_shape, finite, lengths, whole_number
from transducer_loss.figures import BLACK, BLUE, GREEN, ORANGE, SKY_BLUE, VERMILION
from transducer_loss.lattice_view import View, frames_of, view
from transducer_loss.paths import Occupancy
from transducer_loss.planner import plan, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, Any]

__all__ = ["BLACK", "BLUE", "GREEN", "ORANGE", "SKY_BLUE", "VERMILION", "emission_delays", "lattice", "memory"]

_FAMILIES = {
    "logits": (VERMILION, "s"), "exact joint": (BLUE, "o"), "pruned": (GREEN, "^"), "sampled": (ORANGE, "D"),
    "pruned and sampled": (BLACK, "v"),
}  # fmt: skip
_LINES = ("-", "--", "-.", ":")
# The most bars of a histogram; and percent of the labels that it may leave out on either side, or one far label would make all
# others' bars thin.
_BARS, _FAR = 60, 0.5
# Batch sizes that are all named below their axis.
_FEW = 8


def lattice(
    occupancy: Occupancy,
    encoder_lengths: Any = None,
    target_lengths: Any = None,
    *,
    utterance: int = 0,
    alignment: Any = None,
    band: Band | None = None,
    banded: bool | None = None,
    topology: str = "regular",
    floor: float = 1e-6,
    symbols: Sequence[str] | None = None,
    frame_period: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The lattice of one utterance: how probable it is that a path passes each cell, a band of it, the best path.

    Parameters
    ----------
    occupancy : Occupancy
        Of `occupancy`, or of any framework's `simple_rnnt_loss`: arrays (B, T, U+1), or (B, T, S) if made with a band. The
        utterance's own rows are copied to the host, which synchronises if they are on a device.
    encoder_lengths, target_lengths : (B,) array or list of int, optional
        T_b and U_b. By default those of `band`, and without one T and U.
    utterance : int
        Which one of the batch.
    alignment : Alignment or (B, U) array of int, optional
        Frame of each label, to draw the path.
    band : Band, optional
        To draw its outline.
    banded : bool, optional
        Whether the occupancy was made with `band` and has its cells. By default its columns tell; needed only where the lattice
        and the band have as many.
    topology : {"regular", "modified", "constrained"}
        Of the loss: whether the path of `alignment` stays in its frame as it emits a label, or goes on to the next.
    floor : float
        Probability in (0, 1) below which cells are left white.
    symbols : sequence of str, optional
        What the utterance's U_b labels are called.
    frame_period : float, optional
        Milliseconds of a frame, for an axis in seconds; by default it counts frames.
    colorbar : bool
        Whether to draw the scale of the colours, into room taken from `ax`.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> from transducer_loss import plot
    >>> arguments = np.random.default_rng(0).normal(size=(1, 40, 9, 20)), [[*range(1, 9)]], [40], [8]
    >>> ax = plot.lattice(tl.occupancy(*arguments), alignment=tl.align(*arguments), frame_period=40)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('time (s)', 'labels emitted')
    """
    if not 0 < finite(floor, "floor") < 1:
        raise ValueError(f"floor: expected a probability in (0, 1), got {floor}")
    period = figures.checked_period(frame_period)
    seen = view(occupancy, encoder_lengths, target_lengths, utterance, alignment, band, banded, topology)
    frames, rows = seen.cells.shape
    if symbols is not None and len(symbols) != rows - 1:
        raise ValueError(f"symbols: expected U_b = {rows - 1} of them, got {len(symbols)}")
    ax = figures.axes_for(ax, (8, 5))
    _draw_lattice(ax, seen, floor, 1.0 if period is None else period / 1000, colorbar)
    figures.whole_ticks(ax.yaxis)
    if period is None:
        figures.whole_ticks(ax.xaxis)
    if symbols is not None:
        figures.name_rows(ax, ["start", *symbols])
    ax.set(xlabel="frame" if period is None else "time (s)", ylabel="last label emitted" if symbols else "labels emitted")
    # Over the line that the legend takes.
    loss = "" if seen.loss is None else f", loss {seen.loss:.4g} nats"
    ax.set_title(f"Utterance {utterance}: T={frames}, U={rows - 1}{loss}", pad=24 if ax.get_legend() else None)
    return ax


def _draw_lattice(ax: Any, seen: View, floor: float, period: float, colorbar: bool) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    frames, rows = seen.cells.shape
    shown = np.ma.masked_less(np.ma.masked_invalid(seen.cells), floor)
    image = ax.imshow(
        shown.T, origin="lower", aspect="auto", cmap="viridis", norm=LogNorm(floor, 1),
        extent=(0, frames * period, -0.5, rows - 0.5),
    )  # fmt: skip
    # No wider than the cells of a long utterance, which it would hide.
    wide = min(2.0, max(0.8, 0.5 * figures.points_high(ax) / rows))
    if seen.rows is not None:
        first, end = seen.rows
        ax.stairs(
            end - 0.5, np.arange(frames + 1) * period, baseline=first - 0.5, label="band", color=BLACK,
            linewidth=0.3 + 0.4 * wide, path_effects=[withStroke(linewidth=1.5 * wide, foreground="white")],
        )  # fmt: skip
    if seen.path is not None:
        times, heights = seen.path
        ax.plot(times * period, heights, color=VERMILION, linewidth=wide, label="best path")
    # Lines at the edges would be given margins.
    ax.set(xlim=(0, frames * period), ylim=(-0.5, rows - 0.5))
    if not shown.count():
        figures.note(ax, "no path to show")
    if seen.rows is not None or seen.path is not None:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2, frameon=False)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, pad=0.02, label=f"probability that a path passes the cell\n(white: under {floor:g})")


def emission_delays(
    alignment: Any,
    reference: Any,
    target_lengths: Any = None,
    *,
    frame_period: float | None = None,
    percentiles: Sequence[float] = (50, 90),
    label: str = "",
    color: str = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """How long after its own time each label is emitted: the distribution, its mean and percentiles.

    Parameters
    ----------
    alignment : Alignment or (B, U) array of int
        Frame at which each label is emitted, as of `align`; negative where it is not. It and `reference` are copied to the
        host, which synchronises if they are on a device.
    reference : Alignment or (B, U) array of numbers
        Frame of each label by another alignment, or its known time in frames, fractions included; negative or NaN where it is
        not known. Times in seconds or milliseconds have to be divided by the period of a frame.
    target_lengths : (B,) array or list of int, optional
        U_b: labels beyond are not looked at. By default labels with both numbers count.
    frame_period : float, optional
        Milliseconds of a frame, for delays in milliseconds; by default they are in frames.
    percentiles : sequence of float
        Which to draw, in [0, 100].
    label : str
        Name in the legend, to tell several calls on one `ax` apart.
    color : color
        Another one for each such call.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.
    ImportError
        Without matplotlib.

    Notes
    -----
    Bars are of one frame, or of several where more than 60 would be needed. The axis begins and ends where no more than 0.5 %
    of the labels are beyond; the legend says how many those are. Mean and percentiles are of all.

    Examples
    --------
    >>> from transducer_loss import plot
    >>> ax = plot.emission_delays([[3, 7, -1], [2, 5, 9]], [[1, 6, -1], [2, 3, 4]], frame_period=40)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['5 labels', 'mean 80 ms', '50 % within 80 ms', '90 % within 152 ms']
    """
    period = figures.checked_period(frame_period)
    frames, times = frames_of(alignment, "alignment"), frames_of(reference, "reference")
    expect_shape(times, "reference", "(B, U) of alignment", frames.shape)
    for value in percentiles:
        if not 0 <= finite(value, "percentiles") <= 100:
            raise ValueError(f"percentiles: expected numbers in [0, 100], got {value}")
    known = (frames >= 0) & (times >= 0)
    real = np.ones_like(known)
    if target_lengths is not None:
        counts = lengths(target_lengths, "target_lengths", frames.shape[0], 0, frames.shape[1], "U")
        real = np.arange(frames.shape[1]) < counts[:, None]
    delays = (frames - times)[known & real]
    if not np.isfinite(delays).all():
        raise ValueError("reference: expected finite frames, or NaN or negative ones where not known, got inf")
    left_out = 0 if target_lengths is None else int((real & ~known).sum())

    ax = figures.axes_for(ax, (9, 4.5))
    unit, scale = ("frames", 1.0) if period is None else ("ms", period)
    name = f"{label}: " if label else ""
    counted = f"{name}{delays.size:,} label{'' if delays.size == 1 else 's'}"
    if left_out:
        counted += f"\n({left_out:,} without a frame left out)"
    ax.set(xlabel=f"emission delay ({unit})", ylabel="labels (%)")
    if delays.size:
        marks = {"mean": float(delays.mean())}
        marks |= {f"{value:g} % within": float(np.percentile(delays, value)) for value in percentiles}
        edges = _bins(delays, list(marks.values()))
        beyond = np.mean((delays < edges[0]) | (delays > edges[-1]))
        if beyond:
            counted += f"\n({100 * beyond:.1g} % beyond these bars)"
        shares = np.full(delays.size, 100 / delays.size)
        ax.hist(delays * scale, (edges * scale).tolist(), weights=shares, color=color, alpha=0.35, label=counted)
        for i, (mark, value) in enumerate(marks.items()):
            rounded = round(value * scale, 1) + 0.0  # no minus at a zero
            ax.axvline(value * scale, color=color, linestyle=_LINES[i % 4], label=f"{name}{mark} {rounded:g} {unit}")
        width = (edges[1] - edges[0]) * scale
        ax.set_ylabel(f"labels (%), in bars of {width:g} {'frame' if period is None and width == 1 else unit}")
    else:
        if not ax.has_data():
            figures.note(ax, "no delays to show")
            ax.set(xlim=(-0.5, 0.5), ylim=(0, 100))
        ax.plot([], [], color=color, label=counted)
    figures.legend_beside(ax)
    return ax


def _bins(delays: Array, marks: list[float]) -> Array:
    """Edges of a histogram's bars, of whole frames each, around all that is to be seen."""
    low, high = np.percentile(delays, (_FAR, 100 - _FAR))
    low, high = math.floor(min(low, 0.0, *marks)), math.ceil(max(high, 0.0, *marks))
    width = -(-(high - low + 1) // _BARS)
    # Whole frames in the middle of a bar of one.
    edges: Array = low - 0.5 + width * np.arange(-(-(high - low + 1) // width) + 1)
    return edges


def memory(
    batch_sizes: Sequence[int],
    T: int,
    U: int,
    V: int,
    H: int,
    dtype: str = "float32",
    *,
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """Peak memory of every strategy by the batch size, as `plan` accounts for it, and where the device's memory ends.

    Parameters
    ----------
    batch_sizes : sequence of int
    T, U, V, H, dtype
        As of `plan`.
    ax : matplotlib.axes.Axes, optional
    **options
        Other keywords of `plan`: `device`, `device_memory`, `s_range`, `num_samples`, `threads`. With `device_memory` a line
        shows where it ends, and the strategies choose workspaces that fit.

    Returns
    -------
    matplotlib.axes.Axes
        With a line for each strategy. It has gaps where `plan` does not list the strategy, as where a sample would be of all
        classes.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from transducer_loss import plot
    >>> ax = plot.memory([1, 8, 64, 512], T=1000, U=200, V=1024, H=512, dtype="float16", device_memory="80GiB")
    >>> ax.get_title()
    'T=1000, U=200, V=1024, H=512, float16, cuda'
    """
    sizes = sorted({whole_number(size, "batch_sizes", 1) for size in batch_sizes})
    if not sizes:
        raise ValueError("batch_sizes: expected at least one, got none")
    plans = [plan(size, T, U, V, H, dtype, **options) for size in sizes]
    ax = figures.axes_for(ax, (9, 5))
    lines: dict[str, Array] = {}
    for i, each in enumerate(plans):
        for strategy in each.strategies:
            name = strategy.name if strategy.exact else f"{strategy.name} (approximate)"
            lines.setdefault(name, np.full(len(sizes), np.nan))[i] = strategy.bytes
    # The legend in the order of the lines' ends; those that end early come last.
    for name, values in sorted(lines.items(), key=lambda line: -np.nan_to_num(line[1][-1])):
        family, _, variant = name.removesuffix(" (approximate)").partition(", ")
        colour, marker = _FAMILIES.get(family, (SKY_BLUE, "x"))
        ax.plot(
            sizes, values, color=colour, marker=marker, markersize=4, linestyle="--" if variant else "-", label=name,
            markerfacecolor="white" if variant else colour,
        )  # fmt: skip
    device, memory_bytes = plans[0].device, plans[0].device_memory
    if memory_bytes is not None:
        ax.axhline(memory_bytes, color="0.3", linewidth=1.5, label=f"memory of the device: {readable(memory_bytes)}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    low, high = np.log2(ax.dataLim.intervaly)
    ax.set_ylim(2.0 ** math.floor(low), 2.0 ** math.ceil(high))
    if memory_bytes is not None:
        ax.axhspan(memory_bytes, ax.get_ylim()[1], color="0.93", zorder=0)
    if len(sizes) <= _FEW:
        ax.set_xticks(sizes)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter(figures.bytes_tick)
    ax.set(xlabel="batch size (utterances)", ylabel="peak memory of the loss")
    ax.set_title(f"T={T}, U={U}, V={V}, H={H}, {dtype}, {device}")
    figures.legend_beside(ax)
    return ax
