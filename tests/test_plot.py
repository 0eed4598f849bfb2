"""`transducer_loss.plot`: what is drawn is what the arrays say, nothing is cut off, and no state is left behind."""

import gc
import io
import itertools
import math
import pickle
import sys
import warnings
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import torch

import transducer_loss as tl
from helpers import Array, random_batch, run_python
from transducer_loss import plot

matplotlib = pytest.importorskip("matplotlib", reason="the pictures are drawn by it")

from matplotlib._pylab_helpers import Gcf  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

FRAMEWORKS = {
    "numpy": np.asarray,
    "strided": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "torch": torch.from_numpy,
    "jax": jnp.asarray,
    "tensorflow": tf.constant,
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No figure of pyplot's, no changed setting, no warning."""
    settings = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not Gcf.figs
    assert dict(matplotlib.rcParams) == settings


def image_of(ax: Any) -> Array:
    """Probabilities (T, U+1) that a lattice shows; 0 where it is white."""
    shown: Array = ax.images[0].get_array().T.filled(0.0)
    return shown


def corners_of(ax: Any) -> list[tuple[float, float]]:
    """Corners of the path that a lattice shows."""
    (line,) = ax.lines
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def legend_of(ax: Any) -> list[str]:
    """Words of a legend."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def expect_all_inside(figure: Any) -> None:
    """Raise if something that was drawn lies beyond the figure's edges."""
    figure.savefig(io.BytesIO(), format="png")
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.02, drawn


def peaky(T: int, U: int, batch: int = 1) -> tuple[Array, Array, list[int], list[int]]:
    """Arguments of `rnnt_loss` whose labels are mostly emitted in frames of their own, as a trained model's."""
    rng = np.random.default_rng(T + U)
    logits = rng.normal(size=(batch, T, U + 1, 6)).astype("f")
    logits[..., 0] += 3
    targets = rng.integers(1, 6, (batch, U))
    for b, u in np.ndindex(batch, U):
        logits[b, (u + 1) * T // (U + 1), u, targets[b, u]] += 9
    return logits, targets, [T] * batch, [U] * batch


# Lattice


def test_cells_are_the_probabilities_of_passing() -> None:
    """Of uniform logits all paths are as probable, so that counting them is the oracle."""
    T, U = 4, 2
    occupancy = tl.occupancy(np.zeros((1, T, U + 1, 5)), [[1, 2]], [T], [U])
    expected = [
        [math.comb(t + u, u) * math.comb(T - 1 - t + U - u, U - u) / math.comb(T - 1 + U, U) for u in range(U + 1)]
        for t in range(T)
    ]
    np.testing.assert_allclose(image_of(plot.lattice(occupancy)), expected, rtol=1e-12)


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_each_utterance_of_a_ragged_batch(topology: str, dtype: str) -> None:
    """Its own cells alone, of whatever lengths; and its path passes cells that have a probability."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        batch = random_batch(rng, dtype, topology, impossible=0)
        options = {"topology": topology, "blank": batch.blank}
        occupancy, alignment = tl.occupancy(*batch.arguments, **options), tl.align(*batch.arguments, **options)
        for b, (T, U) in enumerate(zip(batch.frames, batch.labels, strict=True)):
            ax = plot.lattice(
                occupancy, batch.frames, batch.labels, utterance=b, alignment=alignment, topology=topology, floor=1e-30
            )
            expected = (occupancy.blank + occupancy.label)[b, :T, : U + 1]
            shown = image_of(ax)
            np.testing.assert_allclose(shown, expected, rtol=1e-6)
            assert ax.get_title().startswith(f"Utterance {b}: T={T}, U={U}, loss {occupancy.loss[b]:.4g}")
            if np.isfinite(occupancy.loss[b]):
                # Corners in the middle of cells, but for both ends and what leaves the lattice.
                inside = [(x, y) for x, y in corners_of(ax)[1:-1] if x < T]
                assert all(shown[int(x), int(y)] > 0 for x, y in inside)
                assert len(inside) + (topology != "regular" and U > 0 and alignment.frames[b, U - 1] == T - 1) == 2 * U
            else:
                assert not ax.lines
                assert [text.get_text() for text in ax.texts] == ["no path to show"]


def test_a_path_by_hand() -> None:
    occupancy = tl.occupancy(np.zeros((1, 5, 3, 4)), [[1, 2]], [5], [2])
    regular = plot.lattice(occupancy, alignment=[[1, 3]])
    assert corners_of(regular) == [(0, 0), (1.5, 0), (1.5, 1), (3.5, 1), (3.5, 2), (5, 2)]
    modified = plot.lattice(occupancy, alignment=[[1, 3]], topology="modified")
    assert corners_of(modified) == [(0, 0), (1.5, 0), (2.5, 1), (3.5, 1), (4.5, 2), (5, 2)]
    seconds = plot.lattice(occupancy, alignment=[[1, 1]], frame_period=500)
    assert corners_of(seconds) == [(0, 0), (0.75, 0), (0.75, 1), (0.75, 1), (0.75, 2), (2.5, 2)]
    assert seconds.get_xlim() == (0, 2.5)
    assert seconds.get_xlabel() == "time (s)"


def test_what_lies_under_the_floor_is_white() -> None:
    arguments = peaky(20, 4)
    occupancy = tl.occupancy(*arguments)
    cells = occupancy.blank[0].astype(np.float64) + occupancy.label[0]
    for floor in (1e-3, 0.5):
        ax = plot.lattice(occupancy, floor=floor)
        np.testing.assert_array_equal(image_of(ax), np.where(cells >= floor, cells, 0))
        assert ax.images[0].norm.vmin == floor
    assert 0 < (cells < 1e-3).sum() < cells.size


def outline_of(ax: Any) -> tuple[Array, Array]:
    """First and end of the band's rows, as drawn."""
    (patch,) = ax.patches
    data = patch.get_data()
    return data.baseline + 0.5, data.values + 0.5


def test_a_band_over_its_lattice_and_by_its_own_cells() -> None:
    logits, targets, _, _ = peaky(12, 6, batch=2)
    lengths = [12, 9], [6, 4]
    full = tl.occupancy(logits, targets, *lengths)
    band = tl.prune(full, *lengths, s_range=3)
    within = np.take_along_axis(logits, np.minimum(band.to_ranges(), 6)[..., None], axis=2)
    narrow = tl.occupancy(within, targets, *lengths, band=band)
    assert narrow.blank.shape == (2, 12, 3)
    for b, (T, U) in enumerate(zip(*lengths, strict=True)):
        over, of = plot.lattice(full, band=band, utterance=b), plot.lattice(narrow, band=band, utterance=b)
        assert image_of(over).shape == image_of(of).shape == (T, U + 1)
        expected = np.zeros((T, U + 1))
        for t in range(T):
            for u in range(band.first[b, t], band.end[b, t]):
                column = u - band.first[b, t]
                expected[t, u] = float(narrow.blank[b, t, column]) + float(narrow.label[b, t, column])
        np.testing.assert_array_equal(image_of(of), np.where(expected >= 1e-6, expected, 0))
        for ax in (over, of):
            first, end = outline_of(ax)
            np.testing.assert_array_equal(first, band.first[b, :T])
            np.testing.assert_array_equal(end, band.end[b, :T])
            assert legend_of(ax) == ["band"]


def test_a_band_as_wide_as_the_lattice() -> None:
    """It may skip labels all the same: then whose cells they are has to be said."""
    arguments = peaky(6, 2)
    occupancy = tl.occupancy(*arguments)
    band = tl.Band.from_alignment([[1, 3]], [6], [2], left=2, right=1)
    assert band.width == 3
    assert band.first.any()
    with pytest.raises(ValueError, match=r"^banded: expected True or False, as band and lattice both have 3 columns"):
        plot.lattice(occupancy, band=band)
    np.testing.assert_array_equal(image_of(plot.lattice(occupancy, band=band, banded=False)), image_of(plot.lattice(occupancy)))
    expected = np.zeros((6, 3))
    for t in range(6):
        first, end = band.first[0, t], band.end[0, t]
        expected[t, first:end] = (occupancy.blank[0].astype(np.float64) + occupancy.label[0])[t, : end - first]
    moved = image_of(plot.lattice(occupancy, band=band, banded=True))
    np.testing.assert_array_equal(moved, np.where(expected >= 1e-6, expected, 0))
    whole = tl.Band.from_ranges([[[0, 1, 2]] * 6], [6], [2])
    np.testing.assert_array_equal(image_of(plot.lattice(occupancy, band=whole)), image_of(plot.lattice(occupancy)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_lattices_of_any_framework(framework: str) -> None:
    arguments = peaky(12, 5, batch=2)
    occupancy, alignment = tl.occupancy(*arguments), tl.align(*arguments)
    band = tl.prune(occupancy, *arguments[2:], s_range=3)
    of = FRAMEWORKS[framework]
    blank, label, loss, frames, first, end = map(of, (*vars(occupancy).values(), alignment.frames, band.first, band.end))
    theirs = tl.Band(first, end, band.width, band.frames, band.labels, band.s_range)
    ax = plot.lattice(tl.Occupancy(blank, label, loss), *map(of, map(np.array, arguments[2:])), band=theirs, alignment=frames)
    expected = plot.lattice(occupancy, band=band, alignment=alignment)
    np.testing.assert_array_equal(image_of(ax), image_of(expected))
    np.testing.assert_array_equal(outline_of(ax), outline_of(expected))
    assert corners_of(ax) == corners_of(expected)
    assert ax.get_title() == expected.get_title()


def test_occupancies_of_the_adapters() -> None:
    from transducer_loss.adapters.jax import simple_rnnt_loss as of_jax
    from transducer_loss.adapters.tensorflow import simple_rnnt_loss as of_tensorflow
    from transducer_loss.adapters.torch import simple_rnnt_loss as of_torch

    rng = np.random.default_rng(0)
    am, lm = (rng.normal(size=shape).astype("f") for shape in ((1, 7, 5), (1, 4, 5)))
    targets, lengths = np.array([[1, 2, 3]]), ([7], [3])
    expected = image_of(plot.lattice(tl.simple_rnnt_loss(am, lm, targets, *lengths)[2]))
    for simple, of in ((of_torch, torch.tensor), (of_tensorflow, tf.constant), (of_jax, jnp.asarray)):
        found = simple(of(am), of(lm), of(targets), *lengths)[1]
        np.testing.assert_array_equal(image_of(plot.lattice(found)), expected)


def test_of_a_device_only_what_is_drawn_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    class OnDevice:
        """As much of `cupy.ndarray` as is asked for."""

        def __init__(self, array: Array) -> None:
            self.array, self.shape, self.ndim, self.dtype = array, array.shape, array.ndim, array.dtype

        def __getitem__(self, key: Any) -> "OnDevice":
            return OnDevice(self.array[key])

        def get(self) -> Array:
            copied.append(self.array.size)
            return self.array

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=OnDevice))
    arguments = peaky(10, 3, batch=4)
    occupancy, alignment = tl.occupancy(*arguments), tl.align(*arguments)
    band = tl.prune(occupancy, *arguments[2:], s_range=2)
    ax = plot.lattice(
        tl.Occupancy(*map(OnDevice, vars(occupancy).values())), [10] * 4, [3] * 4, utterance=2, alignment=OnDevice(alignment.frames),
        band=tl.Band(OnDevice(band.first), OnDevice(band.end), 2, band.frames, band.labels, 2),
    )  # fmt: skip
    assert sorted(copied) == sorted([10 * 4, 10 * 4, 10, 10, 4 * 3, 1])
    expected = plot.lattice(occupancy, utterance=2, alignment=alignment, band=band)
    np.testing.assert_array_equal(image_of(ax), image_of(expected))


SIZES = [(1, 0), (5, 0), (1, 3), (5, 3), (60, 30), (1000, 200)]


@pytest.mark.parametrize(("T", "U"), SIZES)
@pytest.mark.parametrize("named", [False, True])
def test_lattices_are_readable(T: int, U: int, named: bool) -> None:
    arguments = peaky(T, U)
    occupancy = tl.occupancy(*arguments)
    band = tl.prune(occupancy, *arguments[2:], s_range=5)
    symbols = [f"▁piece{u}" if u % 3 else "e" for u in range(U)] if named else None
    ax = plot.lattice(
        occupancy, alignment=tl.align(*arguments), band=band, symbols=symbols, frame_period=40 if named else None
    )
    expect_all_inside(ax.figure)
    ticks = [label for label in ax.get_yticklabels() if ax.get_ylim()[0] <= label.get_position()[1] <= ax.get_ylim()[1]]
    assert ticks
    boxes = [tick.get_window_extent() for tick in ticks]
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    if named:
        assert ticks[0].get_text() == "start"
    else:
        assert all(float(place) % 1 == 0 for axis in (ax.xaxis, ax.yaxis) for place in axis.get_majorticklocs())
    legend, title = ax.get_legend().get_window_extent(), ax.title.get_window_extent()
    assert ax.bbox.y1 <= legend.y0 + 3
    assert legend.y1 <= title.y0 + 3
    assert legend_of(ax) == ["band", "best path"]


def test_symbols_stand_at_their_rows() -> None:
    occupancy = tl.occupancy(np.zeros((1, 5, 4, 4)), [[1, 2, 3]], [5], [3])
    ax = plot.lattice(occupancy, symbols=["a", "$\\sqrt$", "c"])
    named = [(label.get_position()[1], label.get_text()) for label in ax.get_yticklabels()]
    assert named == [(0, "start"), (1, "a"), (2, "$\\sqrt$"), (3, "c")]
    ax.figure.savefig(io.BytesIO(), format="png")  # no formula


def test_into_axes_of_a_figure_without_a_color_bar() -> None:
    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    occupancy = tl.occupancy(*peaky(9, 3))
    assert plot.lattice(occupancy, ax=left, colorbar=False) is left
    assert len(left.figure.axes) == 2
    assert plot.lattice(occupancy, ax=right) is right
    assert len(left.figure.axes) == 3
    expect_all_inside(left.figure)


OCCUPANCY = tl.Occupancy(np.full((2, 5, 4), 0.5), np.full((2, 5, 4), 0.5), None)
BAND = tl.Band.from_ranges([[[0, 1]] * 5] * 2, [5, 4], [3, 3])
LATTICE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"occupancy": 3}, TypeError, "occupancy: expected an Occupancy, got int"),
    ({"occupancy": tl.Occupancy([1.0], [1.0], None)}, TypeError, r"occupancy\.blank: expected an array"),
    ({"occupancy": tl.Occupancy(np.ones(3), np.ones(3), None)}, ValueError, r"occupancy: expected floats \(B, T, U\+1\), got float64 of shape \(3,\)"),
    ({"occupancy": tl.Occupancy(np.ones((1, 2, 3)), np.ones((1, 2, 4)), None)}, ValueError, r"occupancy\.label: expected shape"),
    ({"occupancy": tl.Occupancy(np.ones((1, 2, 3), int), np.ones((1, 2, 3), int), None)}, ValueError, "occupancy: expected floats"),
    ({"encoder_lengths": [5, 6]}, ValueError, r"encoder_lengths: expected lengths in \[1, T = 5\], got 6 at index 1"),
    ({"target_lengths": [3]}, ValueError, "target_lengths: expected shape"),
    ({"target_lengths": [3, 4]}, ValueError, r"target_lengths: expected lengths in \[0, U = 3\], got 4"),
    ({"utterance": 2}, ValueError, "utterance: expected one of the batch's B = 2, got 2"),
    ({"utterance": -1}, ValueError, "utterance: expected 0 or more"),
    ({"utterance": 0.0}, TypeError, "utterance: expected an int"),
    ({"topology": "odd"}, ValueError, "topology: expected one of"),
    ({"floor": 0}, ValueError, r"floor: expected a probability in \(0, 1\), got 0"),
    ({"floor": math.nan}, ValueError, "floor: expected a finite number"),
    ({"frame_period": 0}, ValueError, "frame_period: expected more than 0 milliseconds, got 0"),
    ({"symbols": ["a"]}, ValueError, "symbols: expected U_b = 3 of them, got 1"),
    ({"ax": 3}, TypeError, "ax: expected matplotlib's Axes, got int"),
    ({"banded": True}, ValueError, "banded: expected a band with banded=True, got none"),
    ({"band": 3}, TypeError, "band: expected a Band, got int"),
    ({"band": BAND, "banded": True}, ValueError, "occupancy: expected the S = 2 columns of the band, got 4"),
    ({"band": BAND, "encoder_lengths": [5, 5]}, ValueError, r"band: expected the band of this batch, of encoder_lengths \[5, 5\], got \[5, 4\]"),
    ({"band": tl.Band.from_ranges([[[0, 1]] * 5], [5], [3])}, ValueError, "encoder_lengths: expected shape"),
    ({"band": tl.Band.from_ranges([[[0, 1]] * 5] * 2, [5, 4], [9, 9])}, ValueError, r"occupancy: expected at least the U\+1 = 10 columns of the lattice, or the S = 2 columns of the band, got 4"),
    ({"alignment": [[0, 1, 2]]}, ValueError, r"alignment: expected shape \(B, U\) = \(2, 3\), got \(1, 3\)"),
    ({"alignment": [[0, 1], [0, 1]]}, ValueError, r"alignment: expected shape \(B, U\) = \(2, 3\), got \(2, 2\)"),
    ({"alignment": [[0, 1, 5]] * 2}, ValueError, r"alignment: expected frames in \[0, T_b = 5\) that never fall, got \[0.0, 1.0, 5.0\]"),
    ({"alignment": [[0, 2, 1]] * 2}, ValueError, "alignment: .* that never fall"),
    ({"alignment": [[0.0, math.nan, 1]] * 2}, ValueError, "alignment: .* that never fall"),
    ({"alignment": [[0, 1, 1]] * 2, "topology": "modified"}, ValueError, "alignment: .* that rise"),
    ({"alignment": [[0], [1, 2]]}, ValueError, "alignment: expected numbers .* in rows of one length"),
    ({"alignment": np.array([["a"]])}, ValueError, "alignment: expected an Alignment or numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), LATTICE_ERRORS, ids=[str(each[2])[:40] for each in LATTICE_ERRORS])
def test_lattice_errors(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        plot.lattice(**{"occupancy": OCCUPANCY, **wrong})


# Emission delays


def bars_of(ax: Any) -> dict[float, float]:
    """Percent of the labels by the middle of each bar."""
    return {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in ax.patches if bar.get_height()}


def test_delays_by_hand() -> None:
    ax = plot.emission_delays([[3, 7, -1], [2, 5, 9]], [[1, 6, 0], [2, 3, 8]])
    assert bars_of(ax) == pytest.approx({0: 20, 1: 40, 2: 40})
    assert legend_of(ax) == ["5 labels", "mean 1.2 frames", "50 % within 1 frames", "90 % within 2 frames"]
    assert [line.get_xdata()[0] for line in ax.lines] == [1.2, 1, 2]
    assert ax.get_xlabel() == "emission delay (frames)"
    assert ax.get_ylabel() == "labels (%), in bars of 1 frame"


def test_delays_in_milliseconds_and_percentiles() -> None:
    rng = np.random.default_rng(0)
    frames, times = rng.integers(50, 70, (7, 20)), rng.uniform(40, 60, (7, 20))
    ax = plot.emission_delays(frames, times, frame_period=12.5, percentiles=(0, 25, 99.9, 100))
    delays = 12.5 * (frames - times)
    expected = [delays.mean(), *np.percentile(delays, (0, 25, 99.9, 100))]
    np.testing.assert_allclose([line.get_xdata()[0] for line in ax.lines], expected)
    assert legend_of(ax)[-1] == f"100 % within {delays.max():.1f} ms"
    assert sum(bars_of(ax).values()) == pytest.approx(100)
    counts, _ = np.histogram(frames - times, np.arange(-11.5, 31))
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose([h for h in heights if h], 100 * counts[counts > 0] / delays.size)
    assert ax.get_ylabel() == "labels (%), in bars of 12.5 ms"


def test_only_labels_with_both_numbers_count() -> None:
    frames = np.array([[4, 5, -1, 99], [-1, -1, -1, 99], [6, 7, 8, 99]])
    times = np.array([[4, np.nan, 3, 0], [1, 2, 3, 0], [5, -1, 5, 0]])
    ax = plot.emission_delays(frames, times, [3, 2, 3])
    assert bars_of(ax) == pytest.approx({0: 100 / 3, 1: 100 / 3, 3: 100 / 3})
    assert legend_of(ax)[0] == "3 labels\n(5 without a frame left out)"
    without = plot.emission_delays(frames[:, :3], times[:, :3])
    assert bars_of(without) == bars_of(ax)
    assert legend_of(without)[0] == "3 labels"


def test_delays_of_alignments() -> None:
    logits, targets, frames, labels = peaky(30, 6, batch=3)
    alignment, reference = tl.align(logits, targets, frames, labels), tl.align(logits, targets, frames, labels, delay_penalty=0.5)
    ax = plot.emission_delays(alignment, reference, labels)
    assert ax.lines[0].get_xdata()[0] == (alignment.frames - reference.frames).mean()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_delays_of_any_framework(framework: str) -> None:
    of = FRAMEWORKS[framework]
    frames, times = np.array([[3, 4, 9], [5, 5, -1]]), np.array([[1.5, 2.5, 3.0], [np.nan, 5.0, 0.0]], np.float32)
    expected = plot.emission_delays(frames, times, [3, 2])
    ax = plot.emission_delays(of(frames), of(times), of(np.array([3, 2])))
    assert bars_of(ax) == bars_of(expected)
    assert legend_of(ax) == legend_of(expected)


def test_delays_of_half_types() -> None:
    times = np.array([[1.5, 2.5, 3.0]])
    expected = bars_of(plot.emission_delays([[3, 4, 9]], times))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32):
        given = torch.tensor(times).to(dtype)
        if dtype is not torch.int32:
            assert bars_of(plot.emission_delays([[3, 4, 9]], given)) == expected
        assert len(bars_of(plot.emission_delays(given, given))) == 1


def test_one_far_delay_does_not_flatten_all_others() -> None:
    delays = np.tile([0, 1, 2, 3], 500)
    delays[7] = 100_000
    ax = plot.emission_delays(delays[None], np.zeros((1, 2000)))
    assert ax.get_xlim()[1] < 100
    assert legend_of(ax)[0] == "2,000 labels\n(0.05 % beyond these bars)"
    assert sum(bars_of(ax).values()) == pytest.approx(100 - 0.05)
    assert legend_of(ax)[1] == f"mean {delays.mean():.1f} frames"
    # No more bars than fit.
    wide = plot.emission_delays(np.arange(5000)[None], np.zeros((1, 5000)), percentiles=(100,))
    assert len(wide.patches) <= 60
    assert sum(bars_of(wide).values()) == pytest.approx(100)
    assert np.ptp(list(bars_of(wide).values())[:-1]) < 1e-9


def test_two_models_in_one_picture() -> None:
    ax = plot.emission_delays([[3, 4]], [[1, 1]], label="plain")
    assert plot.emission_delays([[2, 2]], [[1, 1]], label="FastEmit", color=plot.VERMILION, ax=ax) is ax
    names = ["labels", "mean", "50 % within", "90 % within"]
    assert [text.split(": ")[0] for text in legend_of(ax)] == ["plain"] * 4 + ["FastEmit"] * 4
    assert all(name in text for name, text in zip(names * 2, legend_of(ax), strict=True))
    assert len({bar.get_facecolor() for bar in ax.patches}) == 2
    expect_all_inside(ax.figure)


@pytest.mark.parametrize("shape", [(2, 0), (1, 1), (8, 200)])
def test_delays_are_readable(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ax = plot.emission_delays(rng.integers(10, 900, shape), rng.integers(0, 10, shape), frame_period=40)
    expect_all_inside(ax.figure)
    assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1


@pytest.mark.parametrize("frames", [np.zeros((2, 0), int), [[], []], [[-1, -1]], np.full((3, 2), -1)])
def test_no_delays(frames: Any) -> None:
    shape = np.shape(frames)
    ax = plot.emission_delays(frames, np.zeros(shape))
    assert [text.get_text() for text in ax.texts] == ["no delays to show"]
    assert legend_of(ax) == ["0 labels"]
    after = plot.emission_delays(frames, np.zeros(shape), ax=plot.emission_delays([[1]], [[0]]))
    assert not after.texts


DELAY_ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([[1]], [[1, 2]]), {}, ValueError, r"reference: expected shape \(B, U\) of alignment = \(1, 1\), got \(1, 2\)"),
    (([1], [1]), {}, ValueError, r"alignment: expected an Alignment or numbers \(B, U\), got float64 of shape \(1,\)"),
    ((np.ones((1, 1), bool), [[1]]), {}, ValueError, "alignment: expected .* got bool"),
    (([[1]], [[1], [2, 3]]), {}, ValueError, "reference: expected numbers"),
    ((3, [[1]]), {}, TypeError, "alignment: expected an array"),
    (([[1]], [[math.inf]]), {}, ValueError, "reference: expected finite frames"),
    (([[1]], [[1]], [2]), {}, ValueError, r"target_lengths: expected lengths in \[0, U = 1\], got 2"),
    (([[1]], [[1]]), {"frame_period": -1}, ValueError, "frame_period: expected more than 0 milliseconds"),
    (([[1]], [[1]]), {"frame_period": "40"}, TypeError, "frame_period: expected a number"),
    (([[1]], [[1]]), {"percentiles": (50, 101)}, ValueError, r"percentiles: expected numbers in \[0, 100\], got 101"),
    (([[1]], [[1]]), {"ax": "here"}, TypeError, "ax: expected matplotlib's Axes, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "kind", "message"), DELAY_ERRORS, ids=[each[3][:40] for each in DELAY_ERRORS])
def test_delay_errors(given: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        plot.emission_delays(*given, **options)


# Memory

SHAPE = {"T": 400, "U": 60, "V": 2000, "H": 256}


def lines_of(ax: Any) -> dict[str, Array]:
    """Bytes by strategy."""
    return {line.get_label(): line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 0 and "memory" not in line.get_label()}


@pytest.mark.parametrize("options", [{}, {"device_memory": "2GiB"}, {"device": "cpu", "threads": 2, "s_range": 9, "num_samples": 50}])
def test_memory_is_that_of_the_plans(options: dict[str, Any]) -> None:
    sizes = [64, 1, 8, 8]
    ax = plot.memory(sizes, **SHAPE, dtype="float16", **options)
    found = lines_of(ax)
    expected = {
        (f"{strategy.name}{'' if strategy.exact else ' (approximate)'}", i): strategy.bytes
        for i, size in enumerate([1, 8, 64])
        for strategy in tl.plan(size, **SHAPE, dtype="float16", **options).strategies
    }
    drawn = {(name, i): value for name, values in found.items() for i, value in enumerate(values) if not np.isnan(value)}
    assert drawn == expected
    assert all(line.get_xdata().tolist() == [1, 8, 64] for line in ax.lines[: len(found)])
    # Sampling ends where all classes would be drawn.
    assert np.isnan(found["sampled (approximate)"][2])
    assert np.isfinite(found["sampled (approximate)"][0])


def test_the_device_ends() -> None:
    without, within = plot.memory([1, 8], **SHAPE), plot.memory([1, 8], **SHAPE, device_memory=3 << 28)
    assert not any("memory" in text for text in legend_of(without))
    assert legend_of(within)[-1] == "memory of the device: 768 MiB"
    assert within.lines[-1].get_ydata()[0] == 3 << 28
    low, high = within.get_ylim()
    assert low < 3 << 28 < high


def test_lines_can_be_told_apart() -> None:
    ax = plot.memory([1, 8, 64, 512], T=400, U=60, V=50_000, H=256, device_memory="40GiB", num_samples=100)
    lines = ax.lines[:-1]
    assert len(lines) >= 7
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)
    by_colour: dict[Any, set[Any]] = {}
    for line in lines:
        by_colour.setdefault(line.get_color(), set()).add(line.get_marker())
    assert all(len(markers) == 1 for markers in by_colour.values())
    # The legend as the lines end, from the top.
    ends = [line.get_ydata()[-1] for line in lines if not np.isnan(line.get_ydata()[-1])]
    assert ends == sorted(ends, reverse=True)
    assert legend_of(ax)[:-1] == [line.get_label() for line in lines]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([1], {"T": 1, "U": 0, "V": 1, "H": 1}),
        ([3], {"T": 5, "U": 0, "V": 9, "H": 4, "device_memory": 10}),
        ([2**i for i in range(11)], {"T": 1000, "U": 200, "V": 4096, "H": 640, "dtype": "bfloat16", "device_memory": "80GiB"}),
        (range(1, 40), {**SHAPE, "device": "cpu", "device_memory": 1 << 60}),
    ],
)
def test_memory_is_readable(sizes: Any, shape: dict[str, Any]) -> None:
    ax = plot.memory(sizes, **shape)
    expect_all_inside(ax.figure)
    assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1
    low, high = ax.get_ylim()
    ticks = [tick.get_text() for place, tick in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low <= place <= high]
    assert 2 <= len(ticks) == len(set(ticks)) <= 12
    assert all(text.endswith("B") for text in ticks)
    assert all(low <= value <= high for line in ax.lines for value in line.get_ydata() if not np.isnan(value))


@pytest.mark.parametrize(
    ("sizes", "options", "kind", "message"),
    [
        ([], {}, ValueError, "batch_sizes: expected at least one, got none"),
        ([0], {}, ValueError, "batch_sizes: expected 1 or more, got 0"),
        ([1.5], {}, TypeError, "batch_sizes: expected an int, got float"),
        ([1], {"device": "tpu"}, ValueError, "device: expected one of"),
        ([1], {"colour": "red"}, TypeError, "plan.. got an unexpected keyword argument"),
        ([1], {"ax": 1}, TypeError, "ax: expected matplotlib's Axes"),
    ],
)
def test_memory_errors(sizes: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        plot.memory(sizes, **SHAPE, **options)


# matplotlib

CALLS = """
    import numpy as np, transducer_loss as tl
    from transducer_loss import plot
    occupancy = tl.Occupancy(np.ones((1, 2, 3)), np.ones((1, 2, 3)), None)
    calls = {
        "lattice": lambda: plot.lattice(occupancy), "emission_delays": lambda: plot.emission_delays([[1]], [[0]]),
        "memory": lambda: plot.memory([1], 2, 2, 2, 2),
    }
"""


def test_the_import_needs_no_matplotlib() -> None:
    found = run_python(f"""
    import json, sys
    import transducer_loss.plot
    before = "matplotlib" in sys.modules
    {CALLS}
    sys.modules["matplotlib"] = None
    errors = {{}}
    for name, call in calls.items():
        try:
            call()
        except ImportError as error:
            errors[name] = str(error)
    print(json.dumps([before, errors]))
    """)
    message = 'transducer_loss.plot: matplotlib is missing: pip install "transducer_loss[plot]"'
    assert found == [False, dict.fromkeys(("lattice", "emission_delays", "memory"), message)]


def test_a_call_imports_matplotlib_without_pyplot() -> None:
    found = run_python(f"""
    import json, sys
    {CALLS}
    before = "matplotlib" in sys.modules
    for call in calls.values():
        call().figure.savefig("/dev/null", format="png")
    print(json.dumps([before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules]))
    """)
    assert found == [False, True, False]


def every_picture() -> Iterator[Any]:
    """Axes of each function."""
    yield plot.lattice(OCCUPANCY)
    yield plot.emission_delays([[1, 2]], [[0, 0]])
    yield plot.memory([1, 2], **SHAPE)


def test_a_notebook_shows_axes_and_figure() -> None:
    for ax in every_picture():
        assert ax._repr_png_().startswith(b"\x89PNG")
        assert ax._repr_png_() == ax.figure._repr_png_()


def test_figures_can_be_pickled_and_are_freed() -> None:
    for ax in every_picture():
        again = pickle.loads(pickle.dumps(ax.figure))
        assert again.axes[0].get_xlabel() == ax.get_xlabel()
        assert again._repr_png_().startswith(b"\x89PNG")
    gone = weakref.ref(ax.figure)
    del ax
    gc.collect()
    assert gone() is None
