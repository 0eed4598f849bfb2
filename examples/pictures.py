"""The pictures of the examples: how training went, what a loss saw in one utterance, what cheaper encoders cost and do."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window, so that a machine without a screen will do
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from transducer_loss import Alignment, Band, Occupancy, plot
from transducer_loss.plot import BLUE, VERMILION

STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}


def learning_curve(
    path: Path, losses: list[float], evaluated_steps: list[int], error_rates: list[float], target: float
) -> None:
    """Draw the training loss of every step and the held-out character error rate, both on log scales."""
    with plt.rc_context(STYLE):
        figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
        right = left.twinx()
        steps = np.arange(1, len(losses) + 1)
        left.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1, label="loss of each step")
        left.plot(steps, _moving_mean(losses, 20), color=BLUE, linewidth=2, label="loss, mean of 20 steps")
        right.plot(
            evaluated_steps, [100 * rate for rate in error_rates], "o-", color=VERMILION, linewidth=2, label="error rate"
        )
        right.axhline(100 * target, color=VERMILION, linestyle=":", linewidth=1.5)
        right.annotate(f"{100 * target:g} %", (0, 100 * target), (3, 3), textcoords="offset points", color=VERMILION)
        left.set(xlabel="training step", ylabel="training loss (nats per utterance)", yscale="log", xlim=(0, len(losses)))
        right.set(ylabel="held-out character error rate (%)", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_major_formatter("{x:g}")
        for axes, colour, side in ((left, BLUE, "left"), (right, VERMILION, "right")):
            axes.yaxis.label.set_color(colour)
            axes.tick_params(axis="y", colors=colour)
            right.spines[side].set(color=colour, visible=True)
        figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=left.transAxes, frameon=False)
        left.set_title("Spoken numbers: training loss, and errors on speakers never heard in training")
        _save(figure, path)


def lattice(
    path: Path,
    text: str,
    features: np.ndarray,
    feature_period: float,
    word_starts: np.ndarray,
    occupancy: Occupancy,
    frame_period: float,
    alignment: Alignment,
    band: Band | None = None,
) -> None:
    """Draw an utterance over the lattice of its loss.

    Parameters
    ----------
    path : Path
    text : str
        U characters.
    features : ndarray (frames, mel bins)
    feature_period : float
        Seconds.
    word_starts : ndarray
        Seconds.
    occupancy : Occupancy
        Of a batch of this utterance alone, as are `alignment` and `band`.
    frame_period : float
        Seconds of the T frames.
    alignment : Alignment
    band : Band, optional
        Of a pruned loss.
    """
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 9), height_ratios=(1, 3), layout="constrained")
        _speech(above, text, features, feature_period, word_starts)
        figure.suptitle("What the loss saw: where each character may be, and where it is most likely")

        symbols = text.replace(" ", "␣")
        plot.lattice(
            occupancy, alignment=alignment, band=band, symbols=symbols, frame_period=1000 * frame_period, ax=below
        )
        below.set(title="", ylabel="last character emitted")
        below.set_xlim(right=max(below.get_xlim()[1], len(features) * feature_period))
        below.legend(loc="upper left", frameon=False)
        _save(figure, path)


def trade_off(path: Path, curves: dict[str, list[tuple[float, float, str]]], most_cost: float, most_error: float) -> None:
    """Draw error rates over costs.

    Parameters
    ----------
    path : Path
    curves : dict
        By name: cost, error rate and label of every point, in the order of the line; two lines, and to each one lone point.
    most_cost, most_error : float
        Corner of the goal.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        # Lines first: a lone point takes the colour of its line.
        ordered = sorted(curves.items(), key=lambda curve: len(curve[1]) == 1)
        for (name, points), colour, marker in zip(ordered, (BLUE, VERMILION) * 2, "osDv", strict=False):
            costs, errors, _ = zip(*points, strict=True)
            axes.plot([100 * c for c in costs], [100 * e for e in errors], marker + "-", color=colour, linewidth=2, label=name)
            for cost, error, label in points:
                # Left of the leftmost, where no other is.
                place, align = ((-7, -3), "right") if cost == costs[0] else ((4, 5), "left")
                axes.annotate(
                    label, (100 * cost, 100 * error), place, textcoords="offset points", ha=align, color=colour, fontsize=9
                )
        axes.set(xlabel="average cost of an encoder frame (% of the dense one)", xlim=(0, 108), ylim=(0, None))
        axes.set_ylabel("held-out character error rate (%)")
        axes.fill_between([0, 100 * most_cost], 0, 100 * most_error, color="0.92", zorder=0)
        axes.annotate("the goal", (1, 100 * most_error), (2, -12), textcoords="offset points", color="0.4")
        axes.legend(title="cheap branch", frameon=False)
        axes.set_title("Errors over cost; the numbers are lambda, the price of cost")
        _save(figure, path)


def switching(
    path: Path,
    text: str,
    features: np.ndarray,
    feature_period: float,
    word_starts: np.ndarray,
    gates: dict[str, np.ndarray],
    frame_period: float,
) -> None:
    """Draw which frames of an utterance took the dense branch; the first arguments are as of `lattice`.

    Parameters
    ----------
    gates : dict of ndarrays (T,)
        By name of the encoder: 1 in dense frames, 0 in cheap ones.
    frame_period : float
        Seconds of the T frames.
    """
    rows = np.stack(list(gates.values()))
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 5.5), height_ratios=(1, 1), layout="constrained")
        _speech(above, text, features, feature_period, word_starts)
        figure.suptitle("Which frames took the dense branch (dark)")
        edges = np.arange(rows.shape[1] + 1) * frame_period
        below.pcolormesh(edges, np.arange(len(rows) + 1), rows, cmap=ListedColormap(["0.9", BLUE]), vmin=0, vmax=1)
        below.hlines(np.arange(1, len(rows)), 0, edges[-1], color="white", linewidth=3)
        below.set_yticks(np.arange(len(rows)) + 0.5, list(gates))
        below.invert_yaxis()
        below.set(xlabel="time (s)", xlim=(0, edges[-1]))
        _save(figure, path)


def mended(path: Path, error_rates: dict[str, dict[str, float]], risks: dict[str, list[float]]) -> None:
    """Draw what fine-tuning mended.

    Parameters
    ----------
    path : Path
    error_rates : dict of dicts
        By name of the model, then by how it was trained.
    risks : dict of lists
        By name of the model: wrong characters that each step expects in an utterance.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
        stages = list(next(iter(error_rates.values())))
        for place, (name, colour) in enumerate(zip(error_rates, (BLUE, VERMILION), strict=True)):
            places = np.arange(len(stages)) + 0.4 * place
            bars = left.bar(places, [100 * rate for rate in error_rates[name].values()], 0.38, color=colour, label=name)
            left.bar_label(bars, fmt="{:.1f}")
            steps = np.arange(1, len(risks[name]) + 1)
            right.plot(steps, risks[name], color=colour, alpha=0.25, linewidth=1)
            right.plot(steps, _moving_mean(risks[name], 10), color=colour, linewidth=2, label=f"{name}, mean of 10 steps")
        left.set_xticks(np.arange(len(stages)) + 0.2, stages)
        left.set(ylabel="held-out character error rate (%)", title="By how the recognisers were trained")
        right.set(xlabel="step of EMBR", ylabel="expected wrong characters of an utterance", ylim=(0, None))
        right.set_title("What EMBR makes less of")
        for axes in (left, right):
            axes.legend(frameon=False)
        _save(figure, path)


def _speech(axes: Axes, text: str, features: np.ndarray, feature_period: float, word_starts: np.ndarray) -> None:
    """Draw features, and where the words begin in them."""
    # Floored, or digital silence would take most of the colours.
    axes.imshow(
        np.maximum(features, np.percentile(features, 5)).T, origin="lower", aspect="auto", cmap="Greys",
        extent=(0, len(features) * feature_period, 0, features.shape[1]),
    )  # fmt: skip
    for word, start in zip(text.split(), word_starts, strict=True):
        axes.axvline(start, color=VERMILION, linewidth=1)
        axes.annotate(
            word, (start, 1), (2, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            rotation=35, color=VERMILION, fontsize=10,
        )  # fmt: skip
    axes.set_ylabel("mel bin")


def _moving_mean(values: list[float], width: int) -> np.ndarray:
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
