"""Cost, backlog and gates against the reference, finite differences and what chance should do."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import transducer_loss as tl
from helpers import FLOATS, Array, epsilon, expect_close, numpy_dtype
from transducer_loss import amortized, reference
from transducer_loss.arrays import COMPUTE

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_statistic = pytest.mark.parametrize("statistic", ["mean", "last"])

STRIDES: dict[str, Any] = {
    "contiguous": lambda x: x,
    "branches first": lambda x: np.moveaxis(np.moveaxis(x, -1, 0).copy(), 0, -1),
    "frames first": lambda x: x.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "inside": lambda x: np.pad(x, 2, constant_values=1)[2:-2, 2:-2, 2:-2],
}
every_layout = pytest.mark.parametrize("how", STRIDES)


def ragged(rng: np.random.Generator, dtype: str, make: Callable[[tuple[int, ...]], Array], branches: int = 0) -> tuple[Array, Array]:
    """(B, T, K) numbers with NaN in the padding, and lengths."""
    B, T, K = int(rng.integers(1, 6)), int(rng.integers(1, 14)), branches or int(rng.integers(1, 7))
    lengths = rng.integers(1, T + 1, B)
    x = make((B, T, K)).astype(numpy_dtype(dtype))
    x[np.arange(T) >= lengths[:, None]] = math.nan
    return x, lengths


def shares(rng: np.random.Generator) -> Callable[[tuple[int, ...]], Array]:
    return lambda shape: rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def numeric(value: Callable[[Array], float], x: Array, real: Array) -> Array:
    """Gradient by central differences, of what is not padding."""
    grad = np.zeros_like(x)
    for i in zip(*np.nonzero(np.broadcast_to(real[..., None], x.shape)), strict=True):
        up, down = x.copy(), x.copy()
        up[i] += 1e-5
        down[i] -= 1e-5
        grad[i] = (value(up) - value(down)) / 2e-5
    return grad


# ---- cost and backlog


@every_layout
@every_dtype
def test_cost(dtype: str, how: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), list(STRIDES).index(how)])
    for i in range(25):
        gates, lengths = ragged(rng, dtype, shares(rng))
        costs = rng.normal(0.0, 5.0, gates.shape[2])
        given = (costs, costs.tolist(), costs.astype("f"))[i % 3]
        weights = None if i % 2 else rng.choice([0.0, -1.5, 0.25, 3.0], len(gates))
        cost, grad = tl.amortized_cost(STRIDES[how](gates), given, lengths.tolist() if i % 4 else lengths, weights=weights)
        expected, slope = reference.amortized_cost(gates.astype(float), np.asarray(given, float), lengths)
        assert (cost.dtype, grad.dtype) == (COMPUTE[dtype], gates.dtype)
        # Sums of float64, weighted and rounded once.
        noise = 1e-15 * gates.size * np.abs(costs).max()
        expect_close(cost, expected, noise)
        w = np.ones(len(gates)) if weights is None else weights
        expect_close(grad, slope * w[:, None, None], noise)
        assert not np.asarray(grad, float)[np.arange(gates.shape[1]) >= lengths[:, None]].any()
        alone, none = tl.amortized_cost(STRIDES[how](gates), given, lengths, weights=weights, gradient=False)
        np.testing.assert_array_equal(alone, cost)
        assert none is None


@every_statistic
@every_layout
@every_dtype
def test_backlog(dtype: str, how: str, statistic: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), list(STRIDES).index(how), statistic == "last"])
    idle = waiting = 0
    for i in range(25):
        gates, lengths = ragged(rng, dtype, shares(rng))
        durations, period = rng.uniform(-0.5, 3.0, gates.shape[2]), float(rng.choice([0.0, 0.6, 1.0, 1.3]))
        given = (durations, durations.tolist(), durations.astype("f"))[i % 3]
        weights = None if i % 2 else rng.choice([0.0, -1.5, 0.25, 3.0], len(gates))
        options: dict[str, Any] = {"frame_period": period, "statistic": statistic}
        backlog, grad = tl.amortized_backlog(STRIDES[how](gates), given, lengths, weights=weights, **options)
        expected, slope = reference.amortized_backlog(gates.astype(float), np.asarray(given, float), lengths, **options)
        assert (backlog.dtype, grad.dtype) == (COMPUTE[dtype], gates.dtype)
        noise = 1e-15 * gates.shape[1] ** 2 * 4
        expect_close(backlog, expected, noise)
        w = np.ones(len(gates)) if weights is None else weights
        expect_close(grad, slope * w[:, None, None], 3 * noise)
        assert not np.asarray(grad, float)[np.arange(gates.shape[1]) >= lengths[:, None]].any()
        alone, none = tl.amortized_backlog(STRIDES[how](gates), given, lengths, weights=weights, gradient=False, **options)
        np.testing.assert_array_equal(alone, backlog)
        assert none is None
        idle += int((expected == 0.0).sum())
        waiting += int((slope != 0.0).any(axis=(1, 2)).sum())
    assert min(idle, waiting) >= 3


@every_statistic
def test_gradients_by_finite_differences(statistic: str) -> None:
    rng = np.random.default_rng(1)
    tried = 0
    for _ in range(30):
        gates, lengths = ragged(rng, "float64", shares(rng))
        B, T, K = gates.shape
        each, weights, real = rng.uniform(0.2, 3.0, K), rng.normal(0.0, 1.0, B), np.arange(T) < lengths[:, None]
        _, grad = tl.amortized_cost(gates, each, lengths, weights=weights)

        def cost(x: Array, each: Array = each, lengths: Array = lengths, weights: Array = weights) -> float:
            return float(weights @ tl.amortized_cost(x, each, lengths, gradient=False)[0])

        np.testing.assert_allclose(grad, numeric(cost, gates, real), rtol=0, atol=3e-9)
        moves = np.where(real, gates @ each, 0.0) - 1.2
        q, near = np.zeros(B), math.inf
        for t in range(T):
            near = min(near, float(np.abs((q + moves[:, t])[real[:, t]]).min(initial=math.inf)))
            q = np.maximum(q + moves[:, t], 0.0)
        if near < 1e-3:
            continue  # a kink within reach of the step
        tried += 1
        _, grad = tl.amortized_backlog(gates, each, lengths, frame_period=1.2, statistic=statistic, weights=weights)

        def backlog(x: Array, each: Array = each, lengths: Array = lengths, weights: Array = weights) -> float:
            found, _ = tl.amortized_backlog(x, each, lengths, frame_period=1.2, statistic=statistic, gradient=False)
            return float(weights @ found)

        np.testing.assert_allclose(grad, numeric(backlog, gates, real), rtol=0, atol=3e-9)
    assert tried >= 20


@every_statistic
def test_at_the_kink_the_slope_is_that_from_below(statistic: str) -> None:
    # Sixteenths, so that nothing is rounded: some frames leave exactly nothing.
    rng = np.random.default_rng(2)
    kinks = 0
    for _ in range(60):
        moves = rng.choice([0.0, 1.0, 2.0, 3.0], (3, 9, 1))
        lengths = rng.integers(1, 10, 3)
        for dtype in FLOATS:
            backlog, grad = tl.amortized_backlog(moves.astype(numpy_dtype(dtype)), [0.5], lengths, frame_period=0.75, statistic=statistic)
            expected, slope = reference.amortized_backlog(moves, [0.5], lengths, frame_period=0.75, statistic=statistic)
            expect_close(backlog, expected, 1e-15)
            expect_close(grad, slope, 1e-15)
        q = np.zeros(3)
        for t in range(9):
            x = q + 0.5 * moves[:, t, 0] - 0.75
            kinks += int(((x == 0.0) & (q > 0.0)).sum())
            q = np.maximum(x, 0.0)
    assert kinks > 30


@every_statistic
def test_long_utterances(statistic: str) -> None:
    rng = np.random.default_rng(3)
    gates, lengths = rng.dirichlet(np.ones(2), (2, 20_000)), np.array([20_000, 19_999])
    durations = [1.9, 0.1]
    backlog, grad = tl.amortized_backlog(gates.astype("f"), durations, lengths, statistic=statistic)
    sums = np.cumsum(gates.astype("f").astype(float) @ durations - 1.0, axis=1)
    q = sums - np.minimum(np.minimum.accumulate(sums, axis=1), 0.0)
    assert 0.3 < (q > 0).mean() < 1.0
    for b, T in enumerate(lengths):
        # A frame's own slope is that of all frames after it until nothing is left.
        share = np.zeros(20_000)
        share[:T] = np.arange(T) == T - 1 if statistic == "last" else 1 / T
        assert backlog[b] == pytest.approx(share @ q[b], rel=1e-6)
        ends = np.flatnonzero(np.append(q[b, :T], 0.0) <= 1e-12)
        until = ends[np.searchsorted(ends, np.arange(T))]
        through = np.append(0.0, np.cumsum(share))
        by_q = np.where(q[b, :T] > 1e-12, through[until] - through[np.arange(T)], 0.0)
        np.testing.assert_allclose(grad[b, :T], by_q[:, None] * durations, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_a_gate_that_is_not_finite_spoils_its_own_utterance(dtype: str, bad: float) -> None:
    rng = np.random.default_rng(4)
    gates = shares(rng)((3, 5, 3)).astype(numpy_dtype(dtype))
    for function in (tl.amortized_cost, tl.amortized_backlog):
        value, grad = function(gates, [2.0, 1.0, 0.0], [5, 5, 4])
        for branch in range(3):  # the last of which takes nothing
            spoilt = gates.copy()
            spoilt[1, 3, branch], spoilt[2, 4, branch] = bad, bad  # the second in padding
            found, zero = function(spoilt, [2.0, 1.0, 0.0], [5, 5, 4], weights=[1.0, 2.0, 1.0])
            np.testing.assert_array_equal(found, [value[0], math.nan, value[2]])
            np.testing.assert_array_equal(zero[[0, 2]], grad[[0, 2]])
            assert not np.asarray(zero[1], float).any()


# ---- gates


def relative(dtype: str, logits: Array, temperature: float, noise: bool) -> float:
    """Relative error of a gate: its exponent is rounded to the type it is computed in, on either side of a difference."""
    x = np.abs(logits.astype(float))
    return epsilon(COMPUTE[dtype]) * (8 + 2 * (float(x[np.isfinite(x)].max(initial=0.0)) + 23.0 * noise) / temperature)


@pytest.mark.parametrize("noise", [False, True])
@every_layout
@every_dtype
def test_gates(dtype: str, how: str, noise: bool) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), list(STRIDES).index(how), noise])
    for i in range(12):
        logits, lengths = ragged(rng, dtype, lambda shape: rng.normal(0.0, 2.0, shape), branches=int(rng.choice([1, 2, 3, 4, 5, 9])))
        options: dict[str, Any] = {
            "temperature": float(rng.choice([0.3, 1.0, 5.0])), "noise": noise,
            "seed": int(rng.choice([0, 1, 12345, 2**31, 2**32, 2**40 + 3, 2**62])),
        }  # fmt: skip
        expected, hard = (reference.gumbel_gate(logits.astype(float), lengths, hard=hard, **options) for hard in (False, True))
        gates = tl.gumbel_gate(STRIDES[how](logits), lengths.tolist() if i % 2 else lengths, **options)
        assert gates.dtype == logits.dtype
        off = relative(dtype, logits, options["temperature"], noise)
        expect_close(gates, expected, off * expected + 1e-37)
        np.testing.assert_array_equal(np.asarray(tl.gumbel_gate(STRIDES[how](logits), lengths, hard=True, **options), float), hard)
        upstream = rng.normal(0.0, 1.0, logits.shape).astype(logits.dtype)
        upstream[np.isnan(logits)] = math.nan
        grad = tl.gumbel_gate_backward(STRIDES[how](upstream), STRIDES[how](logits), lengths, **options)
        assert grad.dtype == logits.dtype
        slope = reference.gumbel_gate_backward(upstream.astype(float), logits.astype(float), lengths, **options)
        expect_close(grad, slope, 6 * off * (expected + 1e-37) * np.nanmax(np.abs(upstream.astype(float))) * 2 / options["temperature"])
        padding = np.arange(logits.shape[1]) >= lengths[:, None]
        assert not np.asarray(gates, float)[padding].any()
        assert not np.asarray(grad, float)[padding].any()


def test_gradient_of_gates_by_finite_differences() -> None:
    rng = np.random.default_rng(5)
    for noise in (False, True):
        logits, lengths = ragged(rng, "float64", lambda shape: rng.normal(0.0, 2.0, shape), branches=5)
        upstream, real = rng.normal(0.0, 1.0, logits.shape), np.arange(logits.shape[1]) < lengths[:, None]
        options: dict[str, Any] = {"temperature": 0.7, "noise": noise, "seed": 9}

        def value(x: Array, upstream: Array = upstream, lengths: Array = lengths, options: dict[str, Any] = options) -> float:
            return float((upstream * tl.gumbel_gate(x, lengths, **options)).sum())

        grad = tl.gumbel_gate_backward(upstream, logits, lengths, **options)
        np.testing.assert_allclose(grad, numeric(value, logits, real), rtol=0, atol=3e-9)


@pytest.mark.parametrize("branches", [2, 3, 6])
def test_branches_are_drawn_as_often_as_their_softmax_says(branches: int) -> None:
    frames = 200_000
    x = np.random.default_rng(branches).normal(0.0, 1.0, branches)
    p = np.exp(x) / np.exp(x).sum()
    logits = np.broadcast_to(x.astype("f"), (100, frames // 100, branches))
    counts = np.zeros((2, branches))
    for i, temperature in enumerate((0.4, 6.0)):
        drawn = tl.gumbel_gate(logits, temperature=temperature, hard=True, seed=branches)
        np.testing.assert_array_equal(drawn.sum(axis=-1), 1.0)
        counts[i] = drawn.reshape(-1, branches).sum(axis=0)
    np.testing.assert_array_equal(counts[0], counts[1])  # the same noise, which no temperature turns round
    assert (np.square(counts[0] - frames * p) / (frames * p)).sum() < branches - 1 + 4 * math.sqrt(2 * (branches - 1))
    # Frames and utterances next to each other know nothing of each other.
    first = drawn[..., 0]
    for a, b in ((first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        joint = (a * b).mean()
        assert abs(joint - p[0] ** 2) < 5 * p[0] / math.sqrt(frames)


def test_noise_belongs_to_a_frame_and_a_branch() -> None:
    x = np.zeros((4, 6, 10))
    gates = tl.gumbel_gate(x, seed=3)
    noise = np.log(gates) - np.log(gates[..., :1])
    for B, T, K in ((1, 6, 10), (4, 2, 10), (4, 6, 3), (2, 3, 5)):
        part = np.log(tl.gumbel_gate(x[:B, :T, :K], seed=3))
        np.testing.assert_allclose(part - part[..., :1], noise[:B, :T, :K], rtol=0, atol=1e-12)
    assert len(np.unique(gates)) == gates.size
    assert not np.isin(tl.gumbel_gate(x, seed=4), gates).any()


@pytest.mark.parametrize(("seed", "same"), [(-1, 2**64 - 1), (2**64 + 7, 7), (-(2**63), 2**63), (np.int64(5), 5), (2**100, 0)])
def test_seeds_are_numbers_modulo_64_bits(seed: int, same: int) -> None:
    x = np.zeros((2, 3, 4))
    np.testing.assert_array_equal(tl.gumbel_gate(x, seed=seed), tl.gumbel_gate(x, seed=same))
    np.testing.assert_allclose(tl.gumbel_gate(x, seed=seed), reference.gumbel_gate(x, seed=int(seed)), rtol=1e-13)
    np.testing.assert_array_equal(tl.gumbel_gate_backward(x + 1, x, seed=seed), tl.gumbel_gate_backward(x + 1, x, seed=same))


@every_dtype
def test_frames_without_a_softmax(dtype: str) -> None:
    x = np.zeros((1, 6, 3), numpy_dtype(dtype))
    x[0, 0, 1], x[0, 1, 2], x[0, 2], x[0, 3, 0], x[0, 3, 2] = math.nan, math.inf, -math.inf, math.inf, -math.inf
    x[0, 4, 1] = -math.inf  # of probability 0
    upstream = np.ones_like(x) * np.array([1, 2, 4], x.dtype)
    for noise in (False, True):
        for hard in (False, True):
            found = np.asarray(tl.gumbel_gate(x, hard=hard, noise=noise), float)
            assert np.isnan(found[0, :4]).all()
            assert np.isfinite(found[0, 4:]).all()
            assert found[0, 4, 1] == 0.0
        grad = np.asarray(tl.gumbel_gate_backward(upstream, x, noise=noise), float)
        assert not grad[0, :4].any()
        assert grad[0, 4:].any(axis=1).all()
        assert grad[0, 4, 1] == 0.0
    upstream[0, 5, 0] = math.nan  # what comes from above is not hidden
    assert np.isnan(np.asarray(tl.gumbel_gate_backward(upstream, x), float)[0, 5]).all()


@every_dtype
def test_of_equals_the_first_is_taken(dtype: str) -> None:
    x = np.array([[[1.0, 2.0, 2.0, 2.0], [3.0] * 4, [-1.0, -2.0, -1.0, -5.0], [0.0, -math.inf, 0.0, -0.0]]], numpy_dtype(dtype))
    found = tl.gumbel_gate(x, hard=True, noise=False, temperature=0.9)
    np.testing.assert_array_equal(np.asarray(found, float).argmax(axis=-1), [[1, 0, 0, 0]])
    np.testing.assert_array_equal(np.asarray(found, float).sum(axis=-1), 1.0)


def test_the_gates_of_large_logits() -> None:
    x = np.array([[[3e4, 3e4 - 1, -3e4], [-6e4, -6e4, -6e4 + 2], [0.0, 1e-3, 200.0]]])
    for dtype in ("float16", "float32", "float64"):
        gates = tl.gumbel_gate(x.astype(dtype), noise=False, temperature=2.0)
        expected = reference.gumbel_gate(x.astype(dtype).astype(float), noise=False, temperature=2.0)
        expect_close(gates, expected, relative(dtype, x, 2.0, False) * expected + 1e-37)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(0.0, 1.0, (9, 700, 3)).astype("f")
    lengths = rng.integers(1, 701, 9)
    gates = tl.gumbel_gate(x, lengths)
    common: dict[str, Any] = {"validate": False, "temperature": 1.0, "noise": True, "seed": 0}
    calls: list[Callable[[int], Any]] = [
        lambda n: amortized.gated(x, lengths, hard=False, **common, threads=n),
        lambda n: amortized.gated_backward(x, x, lengths, **common, threads=n),
        lambda n: amortized.mean_cost(gates, [1, 2, 3], lengths, weights=None, gradient=True, validate=False, threads=n),
        lambda n: amortized.waiting(gates, [0.5, 1, 2], lengths, frame_period=1.0, statistic="mean", weights=None, gradient=True,
                                    validate=False, threads=n),
    ]  # fmt: skip
    for call in calls:
        one = call(1)
        for array in one if isinstance(one, tuple) else (one,):
            assert array.flags.c_contiguous
            assert array.ctypes.data % 64 == 0
        for threads in (2, 3, 16):
            np.testing.assert_equal(call(threads), one)


# ---- arguments


def test_lengths_that_nobody_has_checked() -> None:
    # As those on a device: nothing outside of the arrays is touched, and no number looks like a result.
    x, lengths = np.ones((5, 3, 2)), np.array([3, 0, -1, 4, 2**62])
    right = np.arange(5) == 0
    for call in (
        lambda: amortized.mean_cost(x, [1, 2], lengths, weights=None, gradient=True, validate=None),
        lambda: amortized.waiting(x, [1, 2], lengths, frame_period=1.0, statistic="last", weights=None, gradient=True, validate=None),
    ):
        value, grad = call()
        np.testing.assert_array_equal(np.isnan(value), ~right)
        np.testing.assert_array_equal(grad.any(axis=(1, 2)), right)
    options: dict[str, Any] = {"temperature": 1.0, "noise": False, "seed": 0, "validate": None}
    gates = amortized.gated(x, lengths, hard=False, **options)
    np.testing.assert_array_equal(np.isnan(gates).all(axis=(1, 2)), ~right)
    np.testing.assert_array_equal(gates[0], 0.5)
    grad = amortized.gated_backward(x * [1.0, 2.0], x, lengths, **options)
    np.testing.assert_array_equal(grad.any(axis=(1, 2)), right)


def test_inputs_are_not_modified_and_may_be_read_only() -> None:
    x = np.random.default_rng(7).normal(0.0, 1.0, (2, 4, 3))
    before = x.copy()
    x.flags.writeable = False
    tl.amortized_cost(x, [1.0, 2.0, 3.0], [4, 2])
    tl.amortized_backlog(x, [1.0, 2.0, 3.0], [4, 2])
    tl.gumbel_gate_backward(x, x, [4, 2])
    np.testing.assert_array_equal(x, before)


X = np.ones((2, 4, 3), np.float32)
CALLS: dict[str, Callable[..., Any]] = {
    "cost": lambda **given: tl.amortized_cost(**{"gates": X, "costs": [1, 2, 3], "lengths": [4, 2], **given}),
    "backlog": lambda **given: tl.amortized_backlog(**{"gates": X, "durations": [1, 2, 3], "lengths": [4, 2], **given}),
    "gate": lambda **given: tl.gumbel_gate(**{"logits": X, "lengths": [4, 2], **given}),
    "backward": lambda **given: tl.gumbel_gate_backward(**{"gradient": X, "logits": X, "lengths": [4, 2], **given}),
}
LENGTHS: list[tuple[npt.ArrayLike, type[Exception], str]] = [
    ([4, 0], ValueError, "lengths: expected lengths in [1, T = 4], got 0 at index 1"),
    ([5, 1], ValueError, "lengths: expected lengths in [1, T = 4], got 5 at index 0"),
    ([4], ValueError, "lengths: expected shape (B,) = (2,), got (1,)"),
    (np.ones(2), TypeError, "lengths: expected integers, got dtype float64"),
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("lengths", "error", "message"), LENGTHS)
def test_lengths_out_of_range(name: str, lengths: npt.ArrayLike, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        CALLS[name](lengths=lengths)


@pytest.mark.parametrize(("name", "change", "error", "message"), [
    ("cost", {"gates": np.ones((2, 4, 3), int)}, TypeError, "gates: expected dtype float16, bfloat16, float32, float64, got int64"),
    ("cost", {"gates": X[0]}, ValueError, "gates: expected 3 dimensions (B, T, K), got shape (4, 3)"),
    ("cost", {"gates": X[:, :0]}, ValueError, "gates: expected at least one of each of (B, T, K), got shape (2, 0, 3)"),
    ("cost", {"costs": [1, 2]}, ValueError, "costs: expected shape (K,) = (3,), got (2,)"),
    ("cost", {"costs": [1, 2, "x"]}, ValueError, "costs: expected numbers, got [1, 2, 'x']"),
    ("cost", {"weights": [1.0]}, ValueError, "weights: expected shape (B,) = (2,), got (1,)"),
    ("backlog", {"durations": np.ones((3, 1))}, ValueError, "durations: expected shape (K,) = (3,), got (3, 1)"),
    ("backlog", {"frame_period": -1.0}, ValueError, "frame_period: expected 0 or more, got -1.0"),
    ("backlog", {"frame_period": math.nan}, ValueError, "frame_period: expected a finite number, got nan"),
    ("backlog", {"statistic": "max"}, ValueError, "statistic: expected one of 'mean', 'last', got 'max'"),
    ("backlog", {"weights": np.ones(2, int)}, TypeError, "weights: expected dtype float16, bfloat16, float32, float64, got int64"),
    ("gate", {"logits": X[0]}, ValueError, "logits: expected 3 dimensions (B, T, K), got shape (4, 3)"),
    ("gate", {"temperature": 0}, ValueError, "temperature: expected more than 0, got 0"),
    ("gate", {"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
    ("gate", {"seed": 1.0}, TypeError, "seed: expected an int, got float"),
    ("backward", {"gradient": X[:, :3]}, ValueError, "gradient: expected shape (B, T, K) = (2, 4, 3), got (2, 3, 3)"),
    ("backward", {"gradient": X.astype(float)}, TypeError, "gradient: expected dtype float32 as logits, got float64"),
    ("backward", {"temperature": -1.0}, ValueError, "temperature: expected more than 0, got -1.0"),
])
def test_errors(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        CALLS[name](**change)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_costs_that_are_not_finite_make_no_plausible_number(bad: float) -> None:
    for name, argument in (("cost", "costs"), ("backlog", "durations")):
        try:
            value, grad = CALLS[name](**{argument: [1.0, bad, 2.0]})
        except ValueError as error:
            assert str(error).startswith(f"{argument}: ")
        else:
            assert np.isnan(value).all()
            assert not grad.any()
