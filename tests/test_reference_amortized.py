"""Costs, backlogs and gates of the reference against finite differences, closed forms, and what chance should do."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from test_reference import ATOL, numeric
from test_reference_sampling import philox
from transducer_loss import reference
from transducer_loss.reference.amortized import gumbel

F8 = npt.NDArray[np.float64]

LENGTHS = np.array([7, 1, 4])
STATISTICS = ("mean", "last")


def gates(seed: int = 0, branches: int = 3) -> F8:
    """Shares that sum to 1, NaN in the padding."""
    z = np.random.default_rng(seed).dirichlet(np.ones(branches), (3, 7))
    z[np.arange(7) >= LENGTHS[:, None]] = math.nan
    return np.asarray(z)


def zeroed(z: F8) -> F8:
    """Without the NaN of the padding, which finite differences would step into."""
    return np.nan_to_num(z)


# ---- cost


def test_cost_is_linear_in_the_gates() -> None:
    z, c = gates(), np.array([4.0, 1.0, 0.25])
    cost, grad = reference.amortized_cost(z, c, LENGTHS)
    for b, T in enumerate(LENGTHS):
        assert cost[b] == pytest.approx(float((z[b, :T] @ c).mean()), rel=1e-14)
        np.testing.assert_allclose(grad[b, :T], np.tile(c / T, (T, 1)), rtol=1e-15)
        np.testing.assert_array_equal(grad[b, T:], 0.0)
    np.testing.assert_allclose(
        grad, numeric(lambda x: float(reference.amortized_cost(x, c, LENGTHS)[0].sum()), zeroed(z)), rtol=0, atol=ATOL)
    always = np.zeros((3, 7, 3))
    always[..., 1] = 1.0
    np.testing.assert_allclose(reference.amortized_cost(always, c, LENGTHS)[0], c[1], rtol=1e-15)


# ---- backlog


def reflected(moves: F8) -> F8:
    """A walk that never falls below 0: its sum so far, less the lowest that this has been, which is 0 at the start."""
    sums = np.cumsum(moves)
    return np.asarray(sums - np.minimum(np.minimum.accumulate(sums), 0.0))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_backlog_is_a_reflected_walk(statistic: str) -> None:
    idle = waiting = 0
    for seed in range(40):
        z, d = gates(seed), np.array([2.5, 1.0, 0.1])
        backlog, _ = reference.amortized_backlog(z, d, LENGTHS, frame_period=1.2, statistic=statistic)
        for b, T in enumerate(LENGTHS):
            q = reflected(z[b, :T] @ d - 1.2)
            assert backlog[b] == pytest.approx(q[-1] if statistic == "last" else q.mean(), rel=1e-12, abs=1e-13)
            idle += int((q == 0.0).sum())
            waiting += int((q > 0.0).sum())
    assert min(idle, waiting) > 100


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("period", [0.3, 1.2, 5.0])
def test_gradient_of_the_backlog_by_finite_differences(period: float, statistic: str) -> None:
    d, tried, moving = np.array([2.5, 1.0, -0.1]), 0, 0
    for seed in range(30):
        z = zeroed(gates(seed))
        walks = [reflected(z[b, :T] @ d - period) for b, T in enumerate(LENGTHS)]
        # How near to 0 the backlog comes from either side, before it is kept from falling below.
        before = np.concatenate([np.append(0.0, q[:-1]) + z[b, :len(q)] @ d - period for b, q in enumerate(walks)])
        if np.abs(before).min() < 1e-3:
            continue  # a kink within reach of the step
        tried += 1
        weights = np.array([0.7, -1.3, 2.0])

        def value(x: F8, weights: F8 = weights) -> float:
            return float(weights @ reference.amortized_backlog(x, d, LENGTHS, frame_period=period, statistic=statistic)[0])

        _, grad = reference.amortized_backlog(z, d, LENGTHS, frame_period=period, statistic=statistic)
        np.testing.assert_allclose(weights[:, None, None] * grad, numeric(value, z), rtol=0, atol=ATOL)
        moving += bool(grad.any())
    assert tried >= 20
    assert moving == 0 if period == 5.0 else moving >= 15


def test_closed_forms_of_backlogs() -> None:
    # Each frame takes two periods: one more is left after each.
    z, d = np.ones((1, 6, 1)), [2.0]
    backlog, grad = reference.amortized_backlog(z, d, [6])
    assert backlog[0] == pytest.approx(3.5, rel=1e-14)
    np.testing.assert_allclose(grad[0, :, 0], 2.0 * np.arange(6, 0, -1) / 6, rtol=1e-14)
    backlog, grad = reference.amortized_backlog(z, d, [4], statistic="last")
    assert backlog[0] == 4.0
    np.testing.assert_array_equal(grad[0, :, 0], [2.0] * 4 + [0.0] * 2)
    # An idle frame forgets what came before it: nothing earlier matters to what comes later.
    z = np.array([[[3.0], [0.0], [0.0], [0.0], [2.5], [1.0]]])  # q = 2, 1, 0, 0, 1.5, 1.5
    backlog, grad = reference.amortized_backlog(z, [1.0], [6], statistic="last")
    assert backlog[0] == 1.5
    np.testing.assert_array_equal(grad[0, :, 0], [0.0] * 4 + [1.0] * 2)
    backlog, grad = reference.amortized_backlog(z, [1.0], [6])
    assert backlog[0] == pytest.approx(1.0, rel=1e-14)
    np.testing.assert_allclose(6 * grad[0, :, 0], [2.0, 1.0, 0.0, 0.0, 2.0, 1.0], rtol=1e-14)
    # At the kink, where a frame takes just its period, the slope is that from below.
    backlog, grad = reference.amortized_backlog(np.ones((1, 3, 1)), [1.0], [3])
    assert backlog[0] == 0.0
    assert not grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gate_that_is_not_finite_spoils_its_own_utterance(bad: float) -> None:
    d = np.array([2.0, 1.0, 0.0])
    for function in (reference.amortized_cost, reference.amortized_backlog):
        z = gates()
        value, grad = function(z, d, LENGTHS)
        z[2, 3, 2] = bad  # of a branch that takes nothing
        spoilt, zero = function(z, d, LENGTHS)
        np.testing.assert_array_equal(spoilt, [*value[:2], math.nan])
        np.testing.assert_array_equal(zero[:2], grad[:2])
        np.testing.assert_array_equal(zero[2], 0.0)


# ---- gates


def softmax(x: F8) -> F8:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def test_noise_is_gumbel() -> None:
    drawn = np.array([gumbel(5, b, t, k) for b in range(4) for t in range(500) for k in range(7)])
    assert len(set(drawn.tolist())) == drawn.size
    error = math.pi / math.sqrt(6 * drawn.size)
    assert abs(drawn.mean() - np.euler_gamma) < 4 * error
    assert abs(drawn.var() - math.pi**2 / 6) < 4 * math.sqrt(4.4 / drawn.size) * math.pi**2 / 6  # of kurtosis 5.4
    for at in (-1.0, 0.0, 1.0, 3.0):
        share = math.exp(-math.exp(-at))
        assert abs((drawn <= at).mean() - share) < 4 * math.sqrt(share * (1 - share) / drawn.size)
    # Words of one counter belong to four branches next to each other; a seed has 64 bits, a negative one too.
    for seed, key in ((3, 3), (2**40 + 1, 2**40 + 1), (-1, 2**64 - 1), (2**64 + 3, 3)):
        for k in range(9):
            word = philox(key, (k // 4, 6, 2, 0))[k % 4]
            assert gumbel(seed, 2, 6, k) == -math.log(-math.log((word + 0.5) / 2**32))
    assert math.isfinite(-math.log(-math.log((2**32 - 0.5) / 2**32))) and math.isfinite(-math.log(-math.log(0.5 / 2**32)))


@pytest.mark.parametrize("branches", [2, 5])
def test_branches_are_drawn_as_often_as_their_softmax_says(branches: int) -> None:
    frames = 8000
    x = np.random.default_rng(branches).normal(0.0, 1.0, branches)
    for temperature in (0.5, 3.0):  # which changes how sharp gates are, not what they prefer
        drawn = reference.gumbel_gate(np.tile(x, (2, frames // 2, 1)), temperature=temperature, hard=True, seed=7)
        assert set(np.unique(drawn)) == {0.0, 1.0}
        np.testing.assert_array_equal(drawn.sum(axis=-1), 1.0)
        p, often = softmax(x), drawn.reshape(-1, branches).mean(axis=0)
        assert (np.abs(often - p) < 4 * np.sqrt(p * (1 - p) / frames)).all()


def test_gates_without_noise_are_a_softmax() -> None:
    x = np.random.default_rng(0).normal(0.0, 3.0, (2, 5, 4))
    for temperature in (0.2, 1.0, 7.0):
        soft = reference.gumbel_gate(x, temperature=temperature, noise=False)
        np.testing.assert_allclose(soft, softmax(x / temperature), rtol=1e-12)
        hard = reference.gumbel_gate(x, temperature=temperature, noise=False, hard=True)
        np.testing.assert_array_equal(hard, np.eye(4)[x.argmax(axis=-1)])
    np.testing.assert_array_equal(reference.gumbel_gate([[[1.0, 2.0, 2.0, 2.0]]], noise=False, hard=True), [[[0, 1, 0, 0]]])
    np.testing.assert_array_equal(reference.gumbel_gate([[[-5.0]]], seed=3), 1.0)


def test_hard_gates_are_the_largest_of_the_soft_ones() -> None:
    x = np.random.default_rng(1).normal(0.0, 1.0, (3, 20, 6))
    for seed in range(5):
        soft = reference.gumbel_gate(x, seed=seed)
        hard = reference.gumbel_gate(x, seed=seed, hard=True)
        np.testing.assert_allclose(soft.sum(axis=-1), 1.0, rtol=1e-14)
        np.testing.assert_array_equal(hard, np.eye(6)[soft.argmax(axis=-1)])
        # Of a temperature near 0 they are the same; noise does not depend on it.
        cold = reference.gumbel_gate(x, temperature=1e-4, seed=seed)
        assert np.isclose(cold, hard, rtol=0, atol=1e-6).mean() > 0.99
    assert len({reference.gumbel_gate(x, seed=seed).tobytes() for seed in range(5)}) == 5
    np.testing.assert_array_equal(reference.gumbel_gate(x, seed=2), reference.gumbel_gate(x, seed=2))
    assert len(np.unique(reference.gumbel_gate(np.zeros((3, 20, 6)), seed=2))) == 3 * 20 * 6  # no two frames are alike


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_of_gates_by_finite_differences(temperature: float, noise: bool) -> None:
    rng = np.random.default_rng(2)
    x, upstream = rng.normal(0.0, 2.0, (2, 3, 7, 5))
    options: dict[str, Any] = {"temperature": temperature, "noise": noise, "seed": 11}
    found = reference.gumbel_gate_backward(upstream, x, LENGTHS, **options)
    expected = numeric(lambda y: float((upstream * reference.gumbel_gate(y, LENGTHS, **options)).sum()), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
    np.testing.assert_allclose(found.sum(axis=-1), 0.0, rtol=0, atol=1e-14)
    assert found.any(axis=(1, 2)).all()


def test_padding_of_gates_is_never_read() -> None:
    rng = np.random.default_rng(3)
    x, upstream = rng.normal(0.0, 2.0, (2, 3, 7, 5))
    padding = np.arange(7) >= LENGTHS[:, None]
    whole = reference.gumbel_gate(x, seed=1)
    by_whole = reference.gumbel_gate_backward(upstream, x, seed=1)
    x[padding] = upstream[padding] = math.nan
    for found, expected in (
        (reference.gumbel_gate(x, LENGTHS, seed=1), whole),
        (reference.gumbel_gate_backward(upstream, x, LENGTHS, seed=1), by_whole),
    ):
        np.testing.assert_array_equal(found[~padding], expected[~padding])
        np.testing.assert_array_equal(found[padding], 0.0)


def test_frames_without_a_softmax() -> None:
    x = np.zeros((1, 4, 3))
    x[0, 0, 1], x[0, 1, 2], x[0, 2] = math.nan, math.inf, -math.inf
    for hard in (False, True):
        found = reference.gumbel_gate(x, hard=hard)
        assert np.isnan(found[0, :3]).all()
        assert np.isfinite(found[0, 3]).all()
    grad = reference.gumbel_gate_backward(np.arange(12.0).reshape(1, 4, 3), x)
    assert not grad[0, :3].any()
    assert grad[0, 3].any()
    x = np.array([[[1.0, -math.inf, 0.0]]])  # of probability 0
    found = reference.gumbel_gate(x, seed=4)
    assert found[0, 0, 1] == 0.0 < found[0, 0, 0]
    assert reference.gumbel_gate_backward(np.ones((1, 1, 3)) * [1, 5, 2], x)[0, 0, 1] == 0.0


# ---- arguments


@pytest.mark.parametrize("lengths", [[7, 0, 4], [7, 8, 4], [7, 1]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    x = np.ones((3, 7, 2))
    for call in (
        lambda: reference.amortized_cost(x, [1.0, 2.0], lengths), lambda: reference.amortized_backlog(x, [1.0, 2.0], lengths),
        lambda: reference.gumbel_gate(x, lengths), lambda: reference.gumbel_gate_backward(x, x, lengths),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="lengths: "):
            call()


def test_words_and_numbers_out_of_range_are_refused() -> None:
    x = np.ones((3, 7, 2))
    with pytest.raises(ValueError, match="statistic: "):
        reference.amortized_backlog(x, [1.0, 2.0], LENGTHS, statistic="most")
    for temperature in (0.0, -1.0, math.nan, math.inf):
        for call in (reference.gumbel_gate, lambda y, **options: reference.gumbel_gate_backward(y, y, **options)):
            with pytest.raises(ValueError, match="temperature: "):
                call(x, temperature=temperature)
    for branches in ([1.0], [1.0, 2.0, 3.0]):
        for function in (reference.amortized_cost, reference.amortized_backlog):
            with pytest.raises(ValueError, match="zip"):
                function(x, branches, LENGTHS)
