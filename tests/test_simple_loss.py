"""`simple_rnnt_loss` against the reference: every topology, dtype, smoothing and layout, and what it promises beside."""

import dataclasses
import math
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import (
    FLOATS,
    TOPOLOGIES,
    Array,
    Counting,
    epsilon,
    error,
    expect_close,
    naive_occupancies,
    numpy_dtype,
    path_noise,
    random_lengths,
    random_targets,
)
from test_joint_loss import strided
from transducer_loss import reference, simple_loss
from transducer_loss.arrays import COMPUTE

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

# lm_only_scale and am_only_scale; the last three leave nothing to the sum of both.
SCALES = [(0.0, 0.0), (0.25, 0.0), (0.0, 0.3), (0.2, 0.5), (0.4, 0.6), (1.0, 0.0), (0.0, 1.0)]
every_scale = pytest.mark.parametrize("scales", SCALES, ids=str)
some_scales = pytest.mark.parametrize("scales", [(0.0, 0.0), (0.2, 0.1), (0.3, 0.7)], ids=str)


def smoothing(scales: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("lm_only_scale", "am_only_scale"), scales, strict=True))


@dataclasses.dataclass
class Inputs:
    """Positional arguments of `simple_rnnt_loss`."""

    am: Array
    lm: Array
    targets: Array
    frames: Array
    labels: Array

    @property
    def all(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def real(self) -> tuple[Array, Array]:
        """Which rows of am and of lm are not padding."""
        return (np.arange(self.am.shape[1]) < self.frames[:, None], np.arange(self.lm.shape[1]) <= self.labels[:, None])


def inputs(
    rng: np.random.Generator, frames: Any, labels: Any, V: int, dtype: str = "float32", *, scale: float = 1.5,
    padding: float = math.nan, impossible: float = 0.0,
) -> Inputs:  # fmt: skip
    """Random ones; some logits are -inf."""
    frames, labels = np.asarray(frames), np.asarray(labels)
    B, T, U = len(frames), int(frames.max()), int(labels.max())
    am, lm = (rng.normal(0, scale, size) for size in ((B, T + int(rng.integers(0, 2)), V), (B, U + 1 + int(rng.integers(0, 2)), V)))
    if V > 2:
        for array in (am, lm):
            array[..., 1:][rng.random((*array.shape[:2], V - 1)) < impossible] = -np.inf
    of = Inputs(am.astype(numpy_dtype(dtype)), lm.astype(numpy_dtype(dtype)), random_targets(rng, labels, U + 1, V), frames, labels)
    for array, real in zip((of.am, of.lm), of.real, strict=True):
        array[~real] = padding
    return of


def largest_of(array: Array) -> float:
    values = np.abs(array.astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def parts(result: Any) -> dict[str, Array]:
    """All arrays that came."""
    loss, grads, occupancy = result
    np.testing.assert_array_equal(occupancy.loss, loss)
    found = {"loss": loss, "blank": occupancy.blank, "label": occupancy.label}
    return found if grads is None else {**found, "am": grads.am, "lm": grads.lm}


def expect_same(result: Any, of: Inputs, **options: Any) -> None:
    """Raise unless loss, gradients and occupancies are the reference's, but for what rounding does to them."""
    loss, by, pair = reference.simple_rnnt_loss(*of.all, **options)
    dtype, got = of.am.dtype.name, parts(result)
    assert got["loss"].dtype == got["blank"].dtype == got["label"].dtype == COMPUTE[dtype]
    assert got["am"].dtype == got["lm"].dtype == of.am.dtype
    steps = int((of.frames + of.labels).max())
    # A log-probability is a difference of sums of two logits, and of the log of a sum over the classes.
    largest = largest_of(of.am) + largest_of(of.lm) + abs(options.get("delay_penalty", 0.0)) * of.frames.max()
    relative = path_noise(dtype, steps, largest + np.sqrt(of.am.shape[2]))
    expect_close(got["loss"], loss, relative * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))
    for name, exact in zip(("blank", "label"), pair, strict=True):
        expect_close(got[name], exact, relative)
    # An entry of a gradient is a sum over up to T + U cells.
    upstream = np.abs(options.get("weights", np.ones(1))).max() * (1 + options.get("fastemit_lambda", 0.0))
    for name, exact, real in zip(("am", "lm"), by, of.real, strict=True):
        expect_close(got[name], exact, relative * steps * upstream)
        assert not got[name][~real].any()


def expect_bits(one: Any, other: Any) -> None:
    first, second = parts(one), parts(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.shape == second[name].shape, name
        assert array.tobytes() == second[name].tobytes(), name


VARIANTS: dict[str, Any] = {
    "plain": lambda rng, batch: {},
    "fastemit": lambda rng, batch: {"fastemit_lambda": float(rng.choice([0.01, 0.5, 3.0]))},
    "delay": lambda rng, batch: {"delay_penalty": float(rng.choice([0.3, -0.7, 2.0]))},
    "weights": lambda rng, batch: {"weights": rng.choice([0.0, -1.5, 0.25, 3.0], batch), "fastemit_lambda": 0.1},
}


@every_scale
@every_topology
@every_dtype
def test_random_batches(dtype: str, topology: str, scales: tuple[float, float]) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), SCALES.index(scales)])
    finite = []
    for variant in VARIANTS:
        for impossible in (0.0, 0.0, 0.1):
            B, T, U, V = (int(rng.integers(1, n + 1)) for n in (4, 6, 4, 9))
            of = inputs(rng, *random_lengths(rng, B, T, U, topology), V, dtype, impossible=impossible)
            options = {"topology": topology, "blank": int(rng.integers(-V, V)), **smoothing(scales), **VARIANTS[variant](rng, B)}
            got = tl.simple_rnnt_loss(*of.all, **options)
            expect_same(got, of, **options)
            finite += np.isfinite(got[0]).tolist()
    assert np.mean(finite) > 0.5


@pytest.mark.parametrize("V", [*range(1, 20), 31, 32, 33, 63, 64, 65, 511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_of_classes(dtype: str, V: int) -> None:
    # Vector loops have a body and a tail: every length of tail; and more classes than a thread sums at a time.
    of = inputs(np.random.default_rng(V), [4, 2], [2, 3], V, dtype)
    expect_same(tl.simple_rnnt_loss(*of.all, **smoothing((0.25, 0.25))), of, **smoothing((0.25, 0.25)))


@every_topology
def test_labels_that_repeat_and_blank_among_them(topology: str) -> None:
    rng = np.random.default_rng(0)
    for blank in (0, 1, -1):
        of = inputs(rng, [9, 9, 9], [7, 7, 5], 4, "float64")
        of.targets = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 2, 0, 0], [3, 1, 3, 1, 3, -1, -1]])
        options = {"topology": topology, "blank": blank, "weights": np.array([1.0, -2.0, 0.5]), **smoothing((0.2, 0.3))}
        expect_same(tl.simple_rnnt_loss(*of.all, **options), of, **options)


def test_wider_than_the_shared_memory() -> None:
    of = inputs(np.random.default_rng(1), [3, 2], [1100, 1023], 3)
    options = smoothing((0.1, 0.2))
    expect_same(tl.simple_rnnt_loss(*of.all, **options), of, **options)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 3, 0], [0]])
@every_topology
def test_transcripts_without_labels_and_lone_frames(topology: str, labels: list[int]) -> None:
    for frames in ([1] * len(labels), [4, 3, 1][: len(labels)]):
        of = inputs(np.random.default_rng(2), frames, labels, 5)
        of.targets = of.targets[:, : max(labels)]
        for scales in SCALES:
            options = {"topology": topology, "blank": -1, **smoothing(scales)}
            expect_same(tl.simple_rnnt_loss(*of.all, **options), of, **options)


@every_topology
def test_a_lone_class_is_certain(topology: str) -> None:
    of = inputs(np.random.default_rng(3), [5, 4], [3, 0], 1)
    for scales in SCALES:
        loss, grads, _ = tl.simple_rnnt_loss(*of.all, topology=topology, **smoothing(scales))
        count = math.comb(5 + 3 - (topology == "regular"), 3) if topology == "regular" else math.comb(5, 3)
        np.testing.assert_allclose(loss, [-math.log(count), 0.0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(grads.am, 0.0, rtol=0, atol=1e-5)
        np.testing.assert_allclose(grads.lm, 0.0, rtol=0, atol=1e-5)


# ---- how the arguments come


@pytest.mark.parametrize("how", ["features apart", "reversed", "columns first", "inside"])
@every_dtype
def test_strides(dtype: str, how: str) -> None:
    of = inputs(np.random.default_rng(4), [7, 4], [3, 2], 6, dtype)
    options = {"weights": [1.0, -0.5], **smoothing((0.2, 0.3))}
    views = strided(of.am, how), strided(of.lm, how)
    assert any(view.strides != array.strides for view, array in zip(views, (of.am, of.lm), strict=True))
    expect_bits(tl.simple_rnnt_loss(*views, *of.all[2:], **options), tl.simple_rnnt_loss(*of.all, **options))


def test_broadcast_inputs() -> None:
    rng = np.random.default_rng(5)
    for am_shape, lm_shape in (((1, 5, 6), (2, 1, 6)), ((2, 1, 6), (1, 3, 6)), ((2, 5, 1), (2, 3, 6)), ((1, 1, 6), (2, 3, 1))):
        am, lm = np.broadcast_to(rng.normal(size=am_shape), (2, 5, 6)), np.broadcast_to(rng.normal(size=lm_shape), (2, 3, 6))
        of = Inputs(am, lm, rng.integers(0, 6, (2, 2)), np.array([5, 4]), np.array([2, 1]))
        expect_same(tl.simple_rnnt_loss(*of.all, **smoothing((0.2, 0.3))), of, **smoothing((0.2, 0.3)))


def test_types_of_integers() -> None:
    of = inputs(np.random.default_rng(6), [7, 4, 6], [3, 2, 0], 6)
    expected = tl.simple_rnnt_loss(*of.all)
    for kind in (np.int32, np.int64, np.int16, list):
        others = [value.tolist() if kind is list else value.astype(kind) for value in of.all[2:]]
        expect_bits(tl.simple_rnnt_loss(of.am, of.lm, *others), expected)
    for kind in (np.int32, np.int64):
        apart = np.repeat(of.targets.astype(kind), 3, axis=1)[:, ::3]
        expect_bits(tl.simple_rnnt_loss(of.am, of.lm, apart, *of.all[3:]), expected)


def test_inputs_stay_as_they_are() -> None:
    of = inputs(np.random.default_rng(7), [7, 4], [3, 2], 6)
    before = [array.tobytes() for array in of.all]
    for array in of.all:
        array.flags.writeable = False
    first = tl.simple_rnnt_loss(*of.all, **smoothing((0.2, 0.3)))
    expect_bits(tl.simple_rnnt_loss(*of.all, **smoothing((0.2, 0.3))), first)
    assert [array.tobytes() for array in of.all] == before


GOOD: dict[str, Any] = {
    "am": np.zeros((2, 5, 7), "f"), "lm": np.zeros((2, 4, 7), "f"), "targets": [[1, 2, 3], [4, 5, -1]],
    "am_lengths": [5, 4], "target_lengths": [3, 2],
}  # fmt: skip
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("am", np.zeros((2, 5, 7), int), TypeError, "expected dtype float16, bfloat16, float32, float64, got int64"),
    ("am", np.zeros((5, 7), "f"), ValueError, r"expected 3 dimensions \(B, T, V\), got shape \(5, 7\)"),
    ("am", np.zeros((0, 5, 7), "f"), ValueError, r"expected at least one of each of \(B, T, V\), got shape \(0, 5, 7\)"),
    ("am", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("lm", np.zeros((2, 4, 7)), TypeError, "expected dtype float32 as am, got float64"),
    ("lm", np.zeros((3, 4, 7), "f"), ValueError, r"expected shape \(B, U\+1, V\) = \(2, 4, 7\), got \(3, 4, 7\)"),
    ("lm", np.zeros((2, 4, 8), "f"), ValueError, r"expected shape \(B, U\+1, V\) = \(2, 4, 7\), got \(2, 4, 8\)"),
    ("lm", np.zeros((2, 4), "f"), ValueError, r"expected 3 dimensions \(B, U\+1, V\), got shape \(2, 4\)"),
    ("targets", [[1, 2, 7], [1, 2, 3]], ValueError, r"expected labels in \[0, V = 7\), got 7 at index \(0, 2\)"),
    ("targets", [[1, 2], [3, 4]], ValueError, r"expected shape \(B, U\) = \(2, 3\), got \(2, 2\)"),
    ("targets", [[1.0] * 3] * 2, TypeError, "expected integers, got dtype float64"),
    ("am_lengths", [5, 6], ValueError, r"expected lengths in \[1, T = 5\], got 6 at index 1"),
    ("am_lengths", [0, 5], ValueError, r"expected lengths in \[1, T = 5\], got 0 at index 0"),
    ("am_lengths", [5], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("target_lengths", [4, 1], ValueError, r"expected lengths in \[0, U = 3\], got 4 at index 0"),
    ("target_lengths", [3, -1], ValueError, r"expected lengths in \[0, U = 3\], got -1 at index 1"),
    ("lm_only_scale", -0.1, ValueError, r"expected a share in \[0, 1\], got -0.1"),
    ("lm_only_scale", 1.5, ValueError, r"expected a share in \[0, 1\], got 1.5"),
    ("lm_only_scale", math.nan, ValueError, "expected a finite number, got nan"),
    ("lm_only_scale", None, TypeError, "expected a number, got NoneType"),
    ("am_only_scale", math.inf, ValueError, "expected a finite number, got inf"),
    ("am_only_scale", True, TypeError, "expected a number, got bool"),
    ("am_only_scale", -1, ValueError, r"expected a share in \[0, 1\], got -1"),
    ("blank", 7, ValueError, r"expected a class in \[-7, 7\), got 7"),
    ("topology", "straight", ValueError, "expected one of 'regular', 'modified', 'constrained', got 'straight'"),
    ("infeasible", None, ValueError, "expected one of 'inf', 'zero', 'raise', got None"),
    ("fastemit_lambda", -1.0, ValueError, "expected 0 or more, got -1.0"),
    ("delay_penalty", math.nan, ValueError, "expected a finite number, got nan"),
    ("weights", [1.0], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad[0]}={type(bad[1]).__name__}-{bad[3][:30]}")
def test_bad_inputs(bad: tuple[str, Any, type[Exception], str]) -> None:
    name, value, kind, message = bad
    arguments = {**GOOD, name: value}
    positional = [arguments.pop(key) for key in GOOD]
    with pytest.raises(kind, match=f"^{name}: {message}"):
        tl.simple_rnnt_loss(*positional, **arguments)


def test_scales_that_sum_to_more_than_one() -> None:
    with pytest.raises(ValueError, match=r"^am_only_scale: expected at most 1 - lm_only_scale = 0.25, got 0.5"):
        tl.simple_rnnt_loss(*GOOD.values(), lm_only_scale=0.75, am_only_scale=0.5)
    assert np.isfinite(tl.simple_rnnt_loss(*GOOD.values(), lm_only_scale=0.25, am_only_scale=0.75)[0]).all()


# ---- accuracy


def naive(of: Inputs, topology: str, scales: tuple[float, float]) -> tuple[Array, Array, Array]:
    """Loss and gradients by all cells' log-probabilities and log-space recursions, each operation in the inputs' dtype."""
    kind = of.am.dtype.type

    def log_softmax(x: Array) -> Array:
        top = x.max(-1, keepdims=True)
        return x - (top + np.log(np.exp(x - top).sum(-1, keepdims=True, dtype=kind)))

    def through(by: Array, logp: Array) -> Array:
        return by - np.exp(logp) * by.sum(-1, keepdims=True, dtype=kind)

    by_lm_alone, by_am_alone = (kind(scale) for scale in scales)
    by_both = kind(1) - by_lm_alone - by_am_alone
    loss, by_am, by_lm = np.zeros(len(of.am), kind), np.zeros_like(of.am), np.zeros_like(of.lm)
    for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True)):
        x, y, labels = of.am[b, :T], of.lm[b, : U + 1], of.targets[b, :U]
        both, alone = log_softmax(x[:, None] + y), log_softmax(y)
        unigram = np.log(np.exp(alone).mean(0, dtype=kind))
        frames = log_softmax(x + unigram)
        logp = by_both * both + by_lm_alone * alone + by_am_alone * frames[:, None]
        lb, le = logp[..., 0].copy(), np.take_along_axis(logp, np.append(labels, 0)[None, :, None], -1)[..., 0]
        loss[b], gb, ge = naive_occupancies(lb, le, topology)
        by = np.zeros_like(logp)
        by[..., 0] -= gb
        for u in range(U):
            by[:, u, labels[u]] -= ge[:, u]
        of_both = by_both * through(by, both)
        of_frames = by_am_alone * through(by.sum(1, dtype=kind), frames)
        of_alone = by_lm_alone * through(by.sum(0, dtype=kind), alone)
        shares = np.exp(alone - unigram) / kind(U + 1) * of_frames.sum(0, dtype=kind)
        by_am[b, :T] = of_both.sum(1, dtype=kind) + of_frames
        by_lm[b, : U + 1] = of_both.sum(0, dtype=kind) + of_alone + through(shares, alone)
    return loss, by_am, by_lm


@some_scales
@every_topology
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_that_of_a_naive_run_in_the_same_type(dtype: str, topology: str, scales: tuple[float, float]) -> None:
    of = inputs(np.random.default_rng(8), [40, 25], [10, 6], 20, dtype, padding=0.0)
    loss, exact, _ = reference.simple_rnnt_loss(*of.all, topology=topology, **smoothing(scales))
    rival = naive(of, topology, scales)
    got_loss, got, _ = tl.simple_rnnt_loss(*of.all, topology=topology, **smoothing(scales))
    assert error(got_loss, loss) <= max(error(rival[0], loss), epsilon("float32"))
    for actual, of_rival, expected in zip((got.am, got.lm), rival[1:], exact, strict=True):
        of_naive = error(of_rival, expected)
        assert epsilon(dtype) / 4 < of_naive < 3000 * epsilon(dtype)  # it is a rival, not a mistake
        assert error(actual, expected) <= of_naive


def underflows(of: Inputs) -> Array:
    """Cells whose product of exponentials, each row's shifted by its largest, is too small for float32, (B, T, U+1)."""
    am, lm = (np.nan_to_num(array.astype(np.float64), nan=-1e3) for array in (of.am, of.lm))
    sums = np.einsum("btv,buv->btu", np.exp(am - am.max(-1, keepdims=True)), np.exp(lm - lm.max(-1, keepdims=True)))
    return (sums < 1e-26) & of.real[0][:, :, None] & of.real[1][:, None]


@some_scales
@every_topology
def test_logits_far_apart(topology: str, scales: tuple[float, float]) -> None:
    """At scale 100, in all utterances or in some, and in some rows of one; k2's float32 loss is silently wrong there."""
    rng = np.random.default_rng(9)
    sizes: tuple[Any, ...] = ([14, 12, 14, 9, 11], [5, 4, 5, 0, 3], 30)
    everywhere = inputs(rng, *sizes, scale=100.0)
    single, mixed = inputs(rng, *sizes), inputs(rng, *sizes)
    single.am[2, :14], single.lm[2, :6] = everywhere.am[2, :14], everywhere.lm[2, :6]
    mixed.am[:, ::2] *= 60
    mixed.lm[:, 1::2] *= 60
    found = []
    for of in (everywhere, single, mixed):
        options = {"topology": topology, "fastemit_lambda": 0.1, "weights": np.array([1.0, -1.0, 0.5, 2.0, 1.0])}
        result = tl.simple_rnnt_loss(*of.all, **options, **smoothing(scales))
        loss, by, _ = reference.simple_rnnt_loss(*of.all, **options, **smoothing(scales))
        assert np.isfinite(loss).all()
        np.testing.assert_allclose(result[0], loss, rtol=1e-5)
        # Logits of some hundreds are off by some 1e-5 in float32, whatever is made of them.
        assert error(result[1].am, by[0]) < 2e-4
        assert error(result[1].lm, by[1]) < 2e-4
        expect_same(result, of, **options, **smoothing(scales))
        found.append(underflows(of))
    assert found[0].any(axis=(1, 2)).all()
    assert found[1].any(axis=(1, 2)).tolist() == [False, False, True, False, False]
    # Within one row of cells there are those that are summed directly, and others.
    count, every = found[2].sum(-1), of.labels[:, None] + 1
    assert ((count > 0) & (count < every)).any()


def test_far_apart_in_float64() -> None:
    of = inputs(np.random.default_rng(10), [6, 5], [3, 2], 12, "float64", scale=600.0)
    for scales in SCALES:
        expect_same(tl.simple_rnnt_loss(*of.all, **smoothing(scales)), of, **smoothing(scales))


def test_scales_do_not_change_what_is_certain() -> None:
    # Adding a constant to a row of am or of lm adds it to all classes of a cell.
    of = inputs(np.random.default_rng(11), [6, 5], [3, 2], 8, "float64")
    shifted = dataclasses.replace(of, am=of.am + np.array([3e3, -1e4])[:, None, None], lm=of.lm - 5e3)
    one, other = (parts(tl.simple_rnnt_loss(*each.all, **smoothing((0.2, 0.3)))) for each in (of, shifted))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-9, atol=1e-10)


# ---- what is not finite


@every_scale
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["am", "lm"])
def test_what_is_not_finite_spoils_its_utterance_alone(where: str, value: float, scales: tuple[float, float]) -> None:
    of = inputs(np.random.default_rng(12), [6, 5, 4], [2, 3, 1], 7)
    clean = parts(tl.simple_rnnt_loss(*of.all, **smoothing(scales)))
    for t, v in ((0, 0), (2, 6), (3, 3)):
        spoilt = dataclasses.replace(of, **{where: getattr(of, where).copy()})
        getattr(spoilt, where)[1, t, v] = value
        for weights in (None, [1.0, 0.0, 1.0]):
            got = parts(tl.simple_rnnt_loss(*spoilt.all, weights=weights, **smoothing(scales)))
            assert np.isnan(got["loss"][1])
            for name, array in got.items():
                np.testing.assert_array_equal(array[[0, 2]], clean[name][[0, 2]])
                if name != "loss":
                    assert not array[1].any(), name


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 3e38])
@some_scales
def test_padding_never_leaks(padding: float, scales: tuple[float, float]) -> None:
    for V in (1, 9):
        zero, other = (inputs(np.random.default_rng(13), [6, 1, 4], [2, 3, 0], V, padding=value) for value in (0.0, padding))
        results = (tl.simple_rnnt_loss(*of.all, **smoothing(scales)) for of in (zero, other))
        expect_bits(*results)


@every_scale
@every_topology
def test_classes_that_are_impossible(topology: str, scales: tuple[float, float]) -> None:
    rng = np.random.default_rng(14)
    options = {"topology": topology, **smoothing(scales)}
    for array, rows in (("am", 0), ("lm", 0), ("lm", slice(None)), ("am", slice(None))):
        of = inputs(rng, [5, 4], [3, 2], 6, "float64")
        of.targets = np.array([[1, 2, 1], [2, 1, -1]])
        getattr(of, array)[:, rows, 4] = -np.inf  # a class that no arc takes
        got = tl.simple_rnnt_loss(*of.all, **options)
        assert np.isfinite(got[0]).all()
        expect_same(got, of, **options)


@pytest.mark.parametrize(("scales", "where"), [((1.0, 0.0), "am"), ((0.0, 1.0), None), ((0.0, 0.0), None)], ids=str)
def test_terms_without_a_share_may_be_impossible(scales: tuple[float, float], where: str | None) -> None:
    # Where lm alone counts, frames may rule out all classes; nothing of theirs may come as 0 times infinity.
    of = inputs(np.random.default_rng(15), [5, 4], [3, 2], 6)
    if where is not None:
        getattr(of, where)[0, 2] = -np.inf
    else:  # no class is possible for both
        of.am[0, :, :3], of.lm[0, :, 3:] = -np.inf, -np.inf
    got = tl.simple_rnnt_loss(*of.all, **smoothing(scales))
    assert np.isfinite(got[0][1])
    assert np.isfinite(got[0][0]) == (where is not None)
    expect_same(got, of, **smoothing(scales))


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path(topology: str) -> None:
    of = inputs(np.random.default_rng(16), [2, 5, 4], [3, 3, 0], 6, "float64")
    for infeasible, value in (("inf", math.inf), ("zero", 0.0)):
        options = {"topology": topology, "infeasible": infeasible, **smoothing((0.2, 0.3))}
        got = tl.simple_rnnt_loss(*of.all, **options)
        expect_same(got, of, **options)
        assert got[0][0] == value
        assert not any(array[0].any() for name, array in parts(got).items() if name != "loss")
    with pytest.raises(ValueError, match=r"^targets: expected a path for every utterance, got none for utterances \[0\]"):
        tl.simple_rnnt_loss(*of.all, topology=topology, infeasible="raise")


# ---- the same bits


def large() -> Inputs:
    """Large enough for several threads."""
    return inputs(np.random.default_rng(17), [70, 7, 61, 50, 66], [30, 2, 0, 17, 25], 260)


LARGE_OPTIONS = {"fastemit_lambda": 0.1, "weights": [1.0, -1.0, 0.5, 2.0, 0.0]}


@some_scales
def test_number_of_threads_changes_no_bit(scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    of, results = large(), []
    of.am[3] *= 60  # some cells are summed directly
    of.lm[3] *= 60
    for threads in ("1", "2", "4", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        results.append(tl.simple_rnnt_loss(*of.all, **LARGE_OPTIONS, **smoothing(scales)))
    assert np.isfinite(results[0][0]).all()
    for other in results[1:]:
        expect_bits(results[0], other)


@some_scales
@every_dtype
def test_without_gradient(dtype: str, scales: tuple[float, float]) -> None:
    for of in (inputs(np.random.default_rng(18), [9, 4], [4, 2], 30, dtype), large()):
        loss, grads, occupancy = tl.simple_rnnt_loss(*of.all, gradient=False, **smoothing(scales))
        assert grads is None
        with_gradient = tl.simple_rnnt_loss(*of.all, **smoothing(scales))
        expect_bits((loss, None, occupancy), (with_gradient[0], None, with_gradient[2]))


@some_scales
@every_topology
def test_batch_mates_and_padding_change_no_bit(topology: str, scales: tuple[float, float]) -> None:
    of = large()
    options = {"topology": topology, "fastemit_lambda": 0.1, **smoothing(scales)}
    whole = parts(tl.simple_rnnt_loss(*of.all, **options))
    for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True)):
        one = slice(b, b + 1)
        alone = parts(tl.simple_rnnt_loss(of.am[one, :T], of.lm[one, : U + 1], of.targets[one, :U], [T], [U], **options))
        extent = {"loss": (), "blank": (T, U + 1), "label": (T, U + 1), "am": (T,), "lm": (U + 1,)}
        for name, array in alone.items():
            part = whole[name][b][tuple(slice(0, size) for size in extent[name])]
            np.testing.assert_array_equal(array[0], part, err_msg=name)


# ---- memory


@pytest.mark.parametrize("topology", ["regular", "constrained"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_temporary_memory_is_as_documented(dtype: str, topology: str) -> None:
    rng = np.random.default_rng(19)
    T, U, V, size = 40, 24, 50, 8 if dtype == "float64" else 4
    documented = re.search(r"memory: (\d+) bytes a cell \((\d+) with `constrained` .*; twice that for float64", tl.simple_rnnt_loss.__doc__ or "")
    assert documented is not None
    of = Inputs(
        rng.normal(size=(3, T, V)).astype(numpy_dtype(dtype)), rng.normal(size=(3, U + 1, V)).astype(numpy_dtype(dtype)),
        rng.integers(0, V, (3, U)), np.array([T, 30, 20]), np.array([U, 11, 3]),
    )  # fmt: skip
    for gradient in (True, False):
        counting = Counting()
        problem = simple_loss.problem(
            *of.all, threads=2, allocate=counting, blank=0, topology=topology, fastemit_lambda=0.0, delay_penalty=0.0,
            infeasible="inf", lm_only_scale=0.25, am_only_scale=0.25,
        )  # fmt: skip
        done = simple_loss.forward(problem, gradient=gradient)
        outputs = sum(array.nbytes for array in (done.loss, *done.occupancy, *(done.gradients or ())))
        cells = int(documented[2 if topology == "constrained" else 1]) * size // 4 * 3 * T * (U + 1)
        threads = 2 * (T + U + 1) * V * size
        per_row = 16 * 3 * (T + U + 1) * size + 2 * 3 * V * size
        assert counting.most - outputs <= cells + threads + per_row
        del problem, done
    assert counting.now == 0


def test_no_array_of_all_logits_is_made() -> None:
    rng = np.random.default_rng(20)
    B, T, U, V = 4, 300, 60, 2000
    am, lm = rng.normal(size=(B, T, V)).astype("f"), rng.normal(size=(B, U + 1, V)).astype("f")
    arguments = am, lm, rng.integers(1, V, (B, U)), [T, T - 9, T // 2, 20], [U, U, 9, 0]
    tl.simple_rnnt_loss(am[:1, :9], lm[:1, :9], [[1]], [9], [1])  # what is imported and made once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        result = tl.simple_rnnt_loss(*arguments, **smoothing((0.25, 0.25)))
        beyond = tracemalloc.get_traced_memory()[1] - before - sum(array.nbytes for array in parts(result).values())
    finally:
        tracemalloc.stop()
    # The logits of all cells would take 586 MB; this is 40 bytes a cell, and (T + U + 1) V numbers for each of the threads.
    assert np.isfinite(result[0]).all()
    assert beyond < 40 * B * T * (U + 1) + 2 * (T + U + 1) * V * 4 + 2_000_000
