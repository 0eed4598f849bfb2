"""The reference against what needs no recursion: enumerated paths, closed forms, finite differences."""

import ast
import doctest
import importlib
import itertools
import math
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from transducer_loss import reference

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]
Path = list[tuple[str, int, int]]  # ("blank" or "label", t, u) of each arc

TOPOLOGIES = ("regular", "modified", "constrained")
ACTIVATIONS = ("tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity")

# Central differences in steps of 1e-5 of losses near 10: 1e-10 of truncation, 1e-10 of rounding.
STEP, ATOL = 1e-5, 3e-9


def paths(T: int, U: int, topology: str) -> list[Path]:
    """Every path of the full lattice, arc by arc."""

    def walk(t: int, u: int) -> Iterator[Path]:
        if (t, u) == (T, U):
            yield []
        if t == T:
            return
        for rest in walk(t + 1, u):
            yield [("blank", t, u), *rest]
        if u < U:
            for rest in walk(t if topology == "regular" else t + 1, u + 1):
                yield [("label", t, u), *rest]

    return list(walk(0, 0))


def path_weight(path: Path, lb: F8, le: F8, topology: str, first: I8, delay: float) -> float:
    """Weight of a path by the definition, -inf for one that leaves the band; lb, le are rows of the band."""
    T, W = lb.shape
    total = 0.0
    for kind, t, u in path:
        s = u - first[t]
        if not 0 <= s < W:
            return -math.inf
        if kind == "blank":
            total += lb[t, s]
            continue
        total += le[t, s] + delay * ((T - 1) / 2 - t)
        if topology == "constrained":
            if s + 1 >= W:
                return -math.inf
            total += lb[t, s + 1]
    return total


def enumerate_loss(lb: F8, le: F8, U: int, topology: str, first: I8, delay: float) -> tuple[float, F8, F8]:
    """Loss and posteriors by the sum over all paths."""
    T = len(lb)
    every = paths(T, U, topology)
    weights = np.exp([path_weight(p, lb, le, topology, first, delay) for p in every])
    gb, ge = np.zeros_like(lb), np.zeros_like(le)
    total = math.fsum(weights)
    if total == 0.0:
        return math.inf, gb, ge
    for path, weight in zip(every, weights, strict=True):
        for kind, t, u in path:
            if weight > 0.0:
                (gb if kind == "blank" else ge)[t, u - first[t]] += weight / total
    return -math.log(total), gb, ge


def random_band(rng: np.random.Generator, T: int, U: int) -> tuple[I8, int]:
    """First label of each row and the width: half of them anything, half of them as `prune` makes them."""
    W = int(rng.integers(1, U + 2))
    if rng.random() < 0.5:
        return rng.integers(-1, U + 2, T), W
    steps = np.sort(rng.integers(0, max(U - W + 1, 0) + 1, T))
    steps[0], steps[-1] = 0, max(U - W + 1, 0)
    return steps, W


def random_lattice(rng: np.random.Generator, banded: bool) -> tuple[F8, F8, int, I8]:
    """Weights, a tenth of them -inf, with NaN wherever there is no arc."""
    T, U = int(rng.integers(1, 7)), int(rng.integers(0, 4))
    first, W = random_band(rng, T, U) if banded else (np.zeros(T, np.int64), U + 1)
    lb, le = rng.normal(-1.0, 2.0, (2, T, W))
    lb[rng.random(lb.shape) < 0.1] = -math.inf
    le[rng.random(le.shape) < 0.1] = -math.inf
    u = first[:, None] + np.arange(W)
    lb[(u < 0) | (u > U)] = math.nan
    le[(u < 0) | (u >= U)] = math.nan
    return lb, le, U, first


def numeric(loss: Callable[[F8], float], x: F8) -> F8:
    """Gradient of `loss` at x by central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += STEP
        down[i] -= STEP
        grad[i] = (loss(up) - loss(down)) / (2 * STEP)
    return grad


LENGTHS: dict[str, Any] = {"logit_lengths": [4, 3], "target_lengths": [3, 2]}
BAND = np.array([[0, 0, 1, 1], [0, 1, 1, 7]])  # three wide; the last row of the second utterance is padding
TARGETS = np.array([[2, 3, 2], [1, 3, -1]])


def batch(banded: bool, seed: int = 0) -> dict[str, Any]:
    """Two utterances of unlike lengths, four classes: arguments of `rnnt_loss`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 1.5, (2, 4, 3 if banded else 4, 4))
    return {"logits": logits, "targets": TARGETS, **LENGTHS, "first": BAND if banded else None}


def padding(banded: bool) -> npt.NDArray[np.bool_]:
    """Where the cells of `batch` are padding."""
    first = BAND if banded else np.zeros_like(BAND)
    u = first[:, :, None] + np.arange(3 if banded else 4)
    t = np.arange(4)[None, :, None]
    lengths = [np.array(v)[:, None, None] for v in LENGTHS.values()]
    return np.asarray((t >= lengths[0]) | (u > lengths[1]))


# ---- the lattice


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lattice_is_the_sum_over_all_paths(topology: str, banded: bool) -> None:
    rng = np.random.default_rng(1)
    finite = 0
    for _ in range(200):
        lb, le, U, first = random_lattice(rng, banded)
        delay = float(rng.choice([0.0, 0.3, -0.7]))
        loss, gb, ge = reference.lattice_loss(lb, le, U, topology=topology, delay_penalty=delay,
                                              first=first if banded else None)
        expected, expected_gb, expected_ge = enumerate_loss(lb, le, U, topology, first, delay)
        np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gb, expected_gb, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ge, expected_ge, rtol=0, atol=1e-12)
        finite += math.isfinite(loss)
    assert 30 <= finite < 200  # both kinds were met


@pytest.mark.parametrize(("T", "U", "V"), [(1, 0, 3), (1, 1, 3), (5, 0, 4), (4, 3, 5), (7, 7, 2), (30, 9, 8)])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_uniform_logits_have_a_closed_form(topology: str, T: int, U: int, V: int) -> None:
    logits = np.full((1, T, U + 1, V), 0.7)
    loss, _ = reference.rnnt_loss(logits, np.ones((1, U), int), [T], [U], topology=topology)
    # Every arc of a path is one factor 1/V, and two for a constrained label.
    if topology == "regular":
        expected = (T + U) * math.log(V) - math.log(math.comb(T - 1 + U, U))
    elif topology == "modified":
        expected = T * math.log(V) - math.log(math.comb(T, U))
    else:
        expected = (T + U) * math.log(V) - math.log(math.comb(T, U))
    np.testing.assert_allclose(loss, [expected], rtol=1e-13)


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_occupancies_over_any_cut_sum_to_one(topology: str, banded: bool) -> None:
    rng = np.random.default_rng(2)
    T, U, W = 9, 6, 4 if banded else 7
    first = np.array([0, 0, 1, 1, 2, 3, 3, 3, 3]) if banded else np.zeros(T, np.int64)
    lb, le = rng.normal(-2.0, 3.0, (2, T, W))
    loss, gb, ge = reference.lattice_loss(lb, le, U, topology=topology, first=first)
    assert math.isfinite(loss)
    step = 0 if topology == "regular" else 1
    cuts = 0
    for a, b in [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), *rng.random((60, 2))]:
        for level in np.linspace(0.2, a * T + b * U - 0.1, 7):
            # a t + b u never falls along an arc, so {a t + b u < level} is left exactly once.
            crossed = 0.0
            for t, s in np.ndindex(T, W):
                u = first[t] + s
                before = a * t + b * u < level
                crossed += gb[t, s] * (before and a * (t + 1) + b * u >= level)
                crossed += ge[t, s] * (before and a * (t + step) + b * (u + 1) >= level)
            assert crossed == pytest.approx(1.0, abs=1e-12)
            cuts += 1
    assert cuts > 400


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_invalid_weight_of_any_arc_makes_the_loss_nan(topology: str, bad: float) -> None:
    clean = np.full((2, 3, 3), -1.0)
    for which, t, u in np.ndindex(2, 3, 3):
        arcs = clean.copy()
        arcs[which, t, u] = bad
        loss, gb, ge = reference.lattice_loss(arcs[0], arcs[1], 2, topology=topology)
        no_arc = which == 1 and u == 2
        assert math.isnan(loss) != no_arc
        assert np.any(gb) == no_arc
        assert np.any(ge) == no_arc


def test_weight_of_minus_infinity_is_probability_zero() -> None:
    lb, le = np.full((2, 2, 2), math.log(0.5))
    lb[0, 0] = -math.inf  # of the two paths only the one that emits at t = 0 is left
    loss, gb, ge = reference.lattice_loss(lb, le, 1)
    assert loss == pytest.approx(3 * math.log(2.0))
    np.testing.assert_array_equal(gb, [[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(ge, [[1.0, 0.0], [0.0, 0.0]])


def test_effective_occupancy_of_constrained_adds_raw_labels_to_the_next_blank() -> None:
    gb, ge = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), np.array([[0.7, 0.8, 0.0], [0.05, 0.15, 0.0]])
    for topology in ("regular", "modified"):
        blank, label = reference.effective_occupancy(gb, ge, topology=topology, fastemit_lambda=0.5)
        np.testing.assert_array_equal(blank, gb)
        np.testing.assert_array_equal(label, 1.5 * ge)
    blank, label = reference.effective_occupancy(gb, ge, topology="constrained", fastemit_lambda=0.5)
    np.testing.assert_allclose(blank, [[0.1, 0.9, 1.1], [0.4, 0.55, 0.75]], rtol=1e-15)
    np.testing.assert_array_equal(label, 1.5 * ge)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_effective_occupancy_is_the_derivative_by_the_weights(topology: str) -> None:
    rng = np.random.default_rng(3)
    arcs = rng.normal(-1.0, 1.0, (2, 4, 3))
    first = np.array([0, 0, 1, 1])

    def loss(x: F8) -> float:
        return reference.lattice_loss(x[0], x[1], 3, topology=topology, first=first)[0]

    _, gb, ge = reference.lattice_loss(arcs[0], arcs[1], 3, topology=topology, first=first)
    effective = reference.effective_occupancy(gb, ge, topology=topology)
    np.testing.assert_allclose(-np.stack(effective), numeric(loss, arcs), rtol=0, atol=ATOL)


def test_long_utterance_stays_exact() -> None:
    rng = np.random.default_rng(4)
    T, U, V = 300, 40, 64
    logits, targets = rng.normal(0, 2, (1, T, U + 1, V)), rng.integers(0, V, (1, U))
    loss, gb, ge = reference.occupancy(logits, targets, [T], [U])
    assert 500 < loss[0] < 3000
    np.testing.assert_allclose(gb[0].sum(axis=1), 1.0, rtol=0, atol=1e-10)  # frame t is left once
    np.testing.assert_allclose(ge[0].sum(axis=0), [1.0] * U + [0.0], rtol=0, atol=1e-10)  # a label comes once


# ---- cell weights


@pytest.mark.parametrize("blank", [0, 2, -1])
def test_log_probs_are_the_plain_formulas(blank: int) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 2, (3, 3, 4)), np.array([1, 1])
    e = np.exp(x)
    for u in range(3):
        lb, le = reference.log_probs(x, y, blank=blank)
        np.testing.assert_allclose(np.exp(lb), e[:, :, blank] / e.sum(axis=2), rtol=1e-13)
        sigmoid = 1.0 / (1.0 + np.exp(-x[:, :, blank]))
        hat_lb, hat_le = reference.log_probs(x, y, blank=blank, hat=True)
        np.testing.assert_allclose(np.exp(hat_lb), sigmoid, rtol=1e-13)
        raw_lb, raw_le = reference.log_probs(x, y, blank=blank, normalized=True)
        np.testing.assert_array_equal(raw_lb, x[:, :, blank])
        if u < 2:
            np.testing.assert_allclose(np.exp(le[:, u]), e[:, u, y[u]] / e[:, u].sum(axis=1), rtol=1e-13)
            q = e[:, u, y[u]] / (e[:, u].sum(axis=1) - e[:, u, blank])
            np.testing.assert_allclose(np.exp(hat_le[:, u]), q * (1.0 - sigmoid[:, u]), rtol=1e-12)
            np.testing.assert_array_equal(raw_le[:, u], x[:, u, y[u]])


def test_log_probs_far_out_do_not_overflow() -> None:
    x = [[[1e4, 0.0], [0.0, 0.0]], [[-1e4, 0.0], [0.0, 0.0]]]
    for hat in (False, True):
        lb, le = reference.log_probs(x, [1], hat=hat)
        np.testing.assert_allclose([lb[:, 0], le[:, 0]], [[0.0, -1e4], [-1e4, 0.0]])


@pytest.mark.parametrize("hat", [False, True])
def test_infinite_and_nan_logits(hat: bool) -> None:
    x = np.zeros((1, 1, 4))
    x[0, 0, 3] = -math.inf
    three = 1.0 / 3.0 if not hat else 0.5
    np.testing.assert_allclose(np.exp(reference.log_probs(x, [], hat=hat)[0]), [[three]])
    for v, bad in itertools.product(range(4), [math.nan, math.inf]):
        x = np.zeros((1, 1, 4))
        x[0, 0, v] = bad
        assert np.isnan(reference.log_probs(x, [], hat=hat)).all()
    assert np.isnan(reference.log_probs(np.full((1, 1, 4), -math.inf), [], hat=hat)).all()


def test_hat_without_any_label_class() -> None:
    loss, grad = reference.rnnt_loss([[[[0.3]], [[-2.0]]]], np.zeros((1, 0), int), [2], [0], hat=True)
    np.testing.assert_allclose(loss, [math.log1p(math.exp(-0.3)) + math.log1p(math.exp(2.0))])
    np.testing.assert_allclose(grad.ravel(), [-1.0 / (1.0 + math.exp(0.3)), -1.0 / (1.0 + math.exp(-2.0))])


# ---- loss and gradient by the logits


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("mode", ["softmax", "normalized", "hat"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradient_by_finite_differences(topology: str, mode: str, banded: bool) -> None:
    arguments = batch(banded)
    weights = np.array([0.7, -1.3])
    options: dict[str, Any] = {"topology": topology, "delay_penalty": 0.2, "weights": weights,
                               "normalized": mode == "normalized", "hat": mode == "hat"}

    def loss(x: F8) -> float:
        return float(weights @ reference.rnnt_loss(**{**arguments, "logits": x}, **options)[0])

    losses, grad = reference.rnnt_loss(**arguments, **options)
    assert np.isfinite(losses).all()
    assert np.abs(grad).max() > 0.1
    np.testing.assert_allclose(grad, numeric(loss, arguments["logits"]), rtol=0, atol=ATOL)
    np.testing.assert_array_equal(grad[padding(banded)], 0.0)


@pytest.mark.parametrize("mode", ["softmax", "normalized", "hat"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_fastemit_is_the_gradient_of_a_surrogate(topology: str, mode: str) -> None:
    """Each label weight l becomes (1 + lambda) l - lambda l', l' its value held fixed; the blanks stay."""
    rng = np.random.default_rng(6)
    lam, delay = 0.4, -0.3
    x, y = rng.normal(0.0, 1.5, (4, 3, 4)), np.array([2, 1])
    modes: dict[str, Any] = {"normalized": mode == "normalized", "hat": mode == "hat"}
    held = reference.log_probs(x, y, **modes)[1]

    def surrogate(z: F8) -> float:
        lb, le = reference.log_probs(z, y, **modes)
        return reference.lattice_loss(lb, (1 + lam) * le - lam * held, 2, topology=topology,
                                      delay_penalty=delay)[0]

    plain, grad = (reference.rnnt_loss(x[None], y[None], [4], [2], topology=topology, delay_penalty=delay,
                                       fastemit_lambda=value, **modes) for value in (0.0, lam))
    np.testing.assert_allclose(grad[1][0], numeric(surrogate, x), rtol=0, atol=ATOL)
    np.testing.assert_array_equal(grad[0], plain[0])  # the loss stays the likelihood
    assert np.abs(grad[1] - plain[1]).max() > 0.01


def test_fastemit_of_regular_is_the_published_formula() -> None:
    """FastEmit's gradient is the plain one plus lambda times that of the label arcs alone."""
    arguments = batch(False)
    arguments["logits"] -= np.logaddexp.reduce(arguments["logits"], axis=3, keepdims=True)
    _, plain = reference.rnnt_loss(**arguments, normalized=True)
    _, fast = reference.rnnt_loss(**arguments, normalized=True, fastemit_lambda=0.25)
    expected = plain * np.array([1.0, 1.25, 1.25, 1.25])
    np.testing.assert_allclose(fast, expected, rtol=1e-14)


@pytest.mark.parametrize("banded", [False, True])
def test_padding_is_never_read(banded: bool) -> None:
    arguments = batch(banded)
    loss, grad = reference.rnnt_loss(**arguments)
    frames, score = reference.align(**arguments)
    arguments["logits"][padding(banded)] = math.nan
    dirty_loss, dirty_grad = reference.rnnt_loss(**arguments)
    np.testing.assert_array_equal(dirty_loss, loss)
    np.testing.assert_array_equal(dirty_grad, grad)
    np.testing.assert_array_equal(dirty_grad[padding(banded)], 0.0)
    dirty_frames, dirty_score = reference.align(**arguments)
    np.testing.assert_array_equal(dirty_frames, frames)
    np.testing.assert_array_equal(dirty_score, score)
    assert frames[1, 2] == -1
    for labels in (-1, 99):
        arguments["targets"] = np.where(TARGETS == -1, labels, TARGETS)
        np.testing.assert_array_equal(reference.rnnt_loss(**arguments)[0], loss)


def test_utterances_of_a_batch_do_not_mix() -> None:
    arguments = batch(False)
    loss, grad = reference.rnnt_loss(**arguments)
    for b, (T, U) in enumerate(zip(*LENGTHS.values(), strict=True)):
        x, y = arguments["logits"][b:b + 1, :T, :U + 1], TARGETS[b:b + 1, :U]
        alone_loss, alone_grad = reference.rnnt_loss(x, y, [T], [U])
        np.testing.assert_array_equal(alone_loss, loss[b:b + 1])
        np.testing.assert_array_equal(alone_grad[0], grad[b, :T, :U + 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["softmax", "hat"])
def test_an_invalid_utterance_has_loss_nan_and_gradient_zero(mode: str, bad: float) -> None:
    arguments = batch(False)
    clean_loss, clean_grad = reference.rnnt_loss(**arguments, hat=mode == "hat")
    arguments["logits"][1, 2, 0, 3] = bad
    loss, grad = reference.rnnt_loss(**arguments, hat=mode == "hat", weights=[1.0, -2.0])
    np.testing.assert_array_equal(loss, [clean_loss[0], math.nan])
    np.testing.assert_array_equal(grad[0], clean_grad[0])
    np.testing.assert_array_equal(grad[1], 0.0)
    frames, score = reference.align(**arguments, hat=mode == "hat")
    assert math.isnan(score[1])
    np.testing.assert_array_equal(frames[1], -1)
    assert (frames[0] >= 0).all()


def test_normalized_reads_only_blank_and_label() -> None:
    arguments = batch(False)
    loss, grad = reference.rnnt_loss(**arguments, normalized=True)
    read = np.zeros((2, 4, 4, 4), bool)
    read[..., 0] = True
    for b, u in np.ndindex(2, 3):
        read[b, :, u, TARGETS[b, u]] = True
    arguments["logits"][~read] = math.nan
    dirty_loss, dirty_grad = reference.rnnt_loss(**arguments, normalized=True)
    np.testing.assert_array_equal(dirty_loss, loss)
    np.testing.assert_array_equal(dirty_grad, grad)
    arguments["logits"][0, 1, 1, 3] = math.nan
    assert math.isnan(reference.rnnt_loss(**arguments, normalized=True)[0][0])


def test_class_of_probability_zero() -> None:
    arguments = batch(False)
    arguments["logits"][..., 1] = -math.inf  # a label of the second utterance, used by none in the first
    loss, grad = reference.rnnt_loss(**arguments)
    without = reference.rnnt_loss(np.delete(arguments["logits"], 1, axis=3)[:1], TARGETS[:1] - 1, [4], [3])
    np.testing.assert_allclose(loss, [without[0][0], math.inf], rtol=1e-14)
    np.testing.assert_array_equal(grad[0, :, :, 1], 0.0)
    np.testing.assert_allclose(np.delete(grad[:1], 1, axis=3), without[1], rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(grad[1], 0.0)


def test_weights_scale_the_gradient_and_not_the_loss() -> None:
    arguments = batch(False)
    loss, grad = reference.rnnt_loss(**arguments)
    for weights in ([1.0, 1.0], [0.0, -2.5], [3.0, 0.0]):
        weighted_loss, weighted = reference.rnnt_loss(**arguments, weights=weights)
        np.testing.assert_array_equal(weighted_loss, loss)
        np.testing.assert_allclose(weighted, grad * np.reshape(weights, (2, 1, 1, 1)), rtol=1e-15)


def test_blank_may_count_from_the_end() -> None:
    arguments = batch(False)
    y = np.array([[0, 1, 2], [2, 2, -1]])
    moved = np.roll(arguments["logits"], 1, axis=3)  # blank from the last place to the first
    for hat in (False, True):
        loss, grad = reference.rnnt_loss(**{**arguments, "targets": y}, blank=-1, hat=hat)
        same_loss, same_grad = reference.rnnt_loss(**{**arguments, "targets": y}, blank=3, hat=hat)
        np.testing.assert_array_equal(loss, same_loss)
        np.testing.assert_array_equal(grad, same_grad)
        moved_loss, moved_grad = reference.rnnt_loss(moved, np.where(y < 0, y, y + 1), **LENGTHS, hat=hat)
        np.testing.assert_allclose(loss, moved_loss, rtol=1e-14)
        np.testing.assert_allclose(grad, np.roll(moved_grad, -1, axis=3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_target_may_equal_blank(topology: str, normalized: bool) -> None:
    x = np.random.default_rng(7).normal(0.0, 1.0, (1, 4, 4, 3))
    y = np.array([[0, 2, 0]])

    def loss(z: F8) -> float:
        return float(reference.rnnt_loss(z, y, [4], [3], topology=topology, normalized=normalized)[0][0])

    logp = x[0] if normalized else x[0] - np.logaddexp.reduce(x[0], axis=2, keepdims=True)
    le = np.stack([logp[:, u, [0, 2, 0, 0][u]] for u in range(4)], axis=1)
    expected = enumerate_loss(logp[:, :, 0], le, 3, topology, np.zeros(4, np.int64), 0.0)[0]
    assert loss(x) == pytest.approx(expected, rel=1e-13)
    _, grad = reference.rnnt_loss(x, y, [4], [3], topology=topology, normalized=normalized)
    np.testing.assert_allclose(grad, numeric(loss, x), rtol=0, atol=ATOL)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_labels(topology: str) -> None:
    x = np.random.default_rng(8).normal(0.0, 1.0, (1, 3, 1, 4))
    p = np.exp(x) / np.exp(x).sum(axis=3, keepdims=True)
    loss, grad = reference.rnnt_loss(x, np.zeros((1, 0), int), [3], [0], topology=topology)
    np.testing.assert_allclose(loss, [-np.log(p[..., 0]).sum()], rtol=1e-14)
    np.testing.assert_allclose(grad, p - np.array([1.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-14)
    frames, score = reference.align(x, np.zeros((1, 0), int), [3], [0], topology=topology)
    assert frames.shape == (1, 0)
    np.testing.assert_allclose(score, -loss)


def test_one_frame() -> None:
    x = np.random.default_rng(9).normal(0.0, 1.0, (1, 1, 3, 4))
    p = np.exp(x[0, 0]) / np.exp(x[0, 0]).sum(axis=1, keepdims=True)
    y = np.array([[3, 1]])
    loss, grad = reference.rnnt_loss(x, y, [1], [2])  # one path: both labels, then the blank
    np.testing.assert_allclose(loss, [-math.log(p[0, 3] * p[1, 1] * p[2, 0])], rtol=1e-14)
    np.testing.assert_allclose(grad[0, 0], p - np.eye(4)[[3, 1, 0]], rtol=0, atol=1e-14)
    for topology, factor in (("modified", 1.0), ("constrained", p[1, 0])):
        loss, _ = reference.rnnt_loss(x[:, :, :2], y[:, :1], [1], [1], topology=topology)
        np.testing.assert_allclose(loss, [-math.log(p[0, 3] * factor)], rtol=1e-14)
        loss, grad = reference.rnnt_loss(x, y, [1], [2], topology=topology)  # a frame emits one label at most
        assert loss[0] == math.inf
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("bands", [False, True])
def test_utterances_without_a_path(bands: bool) -> None:
    x = np.zeros((3, 2, 3, 4))
    y = np.ones((3, 2), int)
    if bands:  # three wide, from two on: the start of the last two utterances is outside
        arguments: dict[str, Any] = {"first": np.array([[0, 0], [2, 2], [1, 0]]), "target_lengths": [2, 2, 2]}
    else:
        arguments = {"topology": "modified", "target_lengths": [2, 2, 2], "logit_lengths": [2, 1, 1]}
    arguments = {"logits": x, "targets": y, "logit_lengths": [2, 2, 2], **arguments}
    loss, grad = reference.rnnt_loss(**arguments)
    np.testing.assert_array_equal(np.isposinf(loss), [False, True, True])
    zero_loss, zero_grad = reference.rnnt_loss(**arguments, infeasible="zero")
    np.testing.assert_array_equal(zero_loss, [loss[0], 0.0, 0.0])
    for g in (grad, zero_grad):
        assert np.any(g[0])
        np.testing.assert_array_equal(g[1:], 0.0)
    frames, score = reference.align(**arguments)
    np.testing.assert_array_equal(np.isneginf(score), [False, True, True])
    assert (frames[0] >= 0).all() and (frames[1:] == -1).all()
    for function in (reference.rnnt_loss, reference.occupancy, reference.align):
        with pytest.raises(ValueError, match=r"no path for utterances \[1, 2\]"):
            function(**arguments, infeasible="raise")


def test_band_as_wide_as_the_lattice_is_the_full_lattice() -> None:
    arguments = batch(False)
    for topology in TOPOLOGIES:
        full, band = (reference.rnnt_loss(**{**arguments, "first": first}, topology=topology)
                      for first in (None, np.zeros((2, 4), int)))
        np.testing.assert_array_equal(band[0], full[0])
        np.testing.assert_array_equal(band[1], full[1])


def test_occupancy_is_raw_and_padded() -> None:
    for banded, topology in itertools.product([False, True], TOPOLOGIES):
        arguments = batch(banded)
        options: dict[str, Any] = {"topology": topology, "delay_penalty": 0.1}
        loss, gb, ge = reference.occupancy(**arguments, **options, fastemit_lambda=3.0)
        np.testing.assert_array_equal(loss, reference.rnnt_loss(**arguments, **options)[0])
        for b, (T, U) in enumerate(zip(*LENGTHS.values(), strict=True)):
            first = BAND[b, :T] if banded else np.zeros(T, np.int64)
            x = arguments["logits"][b, :T, :3 if banded else U + 1]
            logp = x - np.logaddexp.reduce(x, axis=2, keepdims=True)
            u = np.minimum(first[:, None] + np.arange(x.shape[1]), U)
            le = np.take_along_axis(logp, np.append(TARGETS[b, :U], 0)[u][..., None], axis=2)[..., 0]
            expected = enumerate_loss(logp[:, :, 0], le, U, topology, first, 0.1)
            assert loss[b] == pytest.approx(expected[0], rel=1e-13)
            for actual, wanted in zip((gb, ge), expected[1:], strict=True):
                assert actual.shape == arguments["logits"].shape[:3]
                np.testing.assert_allclose(actual[b, :T, :x.shape[1]], wanted, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(gb[padding(banded)], 0.0)
        np.testing.assert_array_equal(ge[padding(banded)], 0.0)


# ---- alignment


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_align_is_the_best_path_with_the_earliest_labels(topology: str, banded: bool) -> None:
    rng = np.random.default_rng(10)
    ties = infeasible = 0
    for _ in range(300):
        lb, le, U, first = random_lattice(rng, banded)
        lb, le = np.ceil(lb / 3.0), np.ceil(le / 3.0)  # few values, exact sums: ties in plenty
        delay = float(rng.choice([0.0, 1.0, -1.0]))
        T, W = lb.shape
        logits = np.full((1, T, W, U + 1), math.nan)
        logits[0, :, :, 0] = lb
        for t, s in np.ndindex(T, W):
            if 0 <= first[t] + s < U:
                logits[0, t, s, first[t] + s + 1] = le[t, s]
        frames, score = reference.align(logits, np.arange(1, U + 1)[None], [T], [U], topology=topology,
                                        normalized=True, delay_penalty=delay,
                                        first=first[None] if banded else None)
        every = paths(T, U, topology)
        weights = [path_weight(p, lb, le, topology, first, delay) for p in every]
        best = max(weights, default=-math.inf)
        assert score[0] == best
        if best == -math.inf:
            infeasible += 1
            np.testing.assert_array_equal(frames, -1)
            continue
        tied = np.array([[t for kind, t, _ in p if kind == "label"]
                         for p, weight in zip(every, weights, strict=True) if weight == best])
        ties += len(tied) > 1
        np.testing.assert_array_equal(frames[0], tied.min(axis=0))
        assert frames[0].tolist() in tied.tolist()
    assert ties >= 5
    assert infeasible >= 5


def test_delay_penalty_moves_the_alignment() -> None:
    x = np.zeros((1, 5, 3, 3))
    for penalty, expected in ((1.0, [0, 0]), (0.0, [0, 0]), (-1.0, [4, 4])):
        frames, score = reference.align(x, [[1, 2]], [5], [2], delay_penalty=penalty)
        np.testing.assert_array_equal(frames, [expected])
        assert score[0] == pytest.approx(-7 * math.log(3.0) + abs(penalty) * 4.0)


# ---- the joint network


def joint_batch(activation: str, banded: bool = False, seed: int = 11) -> dict[str, Any]:
    """Arguments of `joint_rnnt_loss`, of the sizes of `batch`, with a dropout mask."""
    rng = np.random.default_rng(seed)
    width = 3 if banded else 4
    return {"encoder": rng.normal(0, 1, (2, 4, 3)), "predictor": rng.normal(0, 1, (2, 4, 3)),
            "weight": rng.normal(0, 1, (4, 3)), "bias": rng.normal(0, 1, 4), "targets": TARGETS,
            "encoder_lengths": [4, 3], "target_lengths": [3, 2], "activation": activation,
            "mask": (rng.random((2, 4, width, 3)) < 0.75) / 0.75,
            **({"first": BAND, "width": 3} if banded else {})}


def check_joint_gradients(arguments: dict[str, Any], weights: F8, **options: Any) -> None:
    losses, grads = reference.joint_rnnt_loss(**arguments, weights=weights, **options)
    assert np.isfinite(losses).all()
    for name, grad in zip(("encoder", "predictor", "weight", "bias"), grads, strict=True):
        if arguments[name] is None:
            assert grad is None
            continue

        def loss(x: F8, name: str = name) -> float:
            return float(weights @ reference.joint_rnnt_loss(**{**arguments, name: x}, **options)[0])

        assert grad is not None and np.abs(grad).max() > 1e-3
        np.testing.assert_allclose(grad, numeric(loss, arguments[name]), rtol=0, atol=2 * ATOL, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_joint_gradient_by_finite_differences(activation: str) -> None:
    check_joint_gradients(joint_batch(activation), np.array([1.0, 0.6]))


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_joint_gradient_with_options(topology: str, banded: bool) -> None:
    arguments = {**joint_batch("tanh", banded), "bias": None, "mask": None}
    check_joint_gradients(arguments, np.array([-0.8, 1.1]), topology=topology, hat=True, delay_penalty=-0.2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_joint_is_the_loss_of_its_logits(activation: str) -> None:
    def act(z: float) -> float:
        if activation.startswith("gelu"):
            root = math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)
            return z / 2 * (1 + (math.erf(z / math.sqrt(2.0)) if activation == "gelu" else math.tanh(root)))
        return {"tanh": math.tanh(z), "relu": max(z, 0.0), "leaky_relu": z if z > 0 else z / 100,
                "sigmoid": 1 / (1 + math.exp(-z)), "silu": z / (1 + math.exp(-z)), "identity": z}[activation]

    arguments = joint_batch(activation)
    hidden = np.vectorize(act)(arguments["encoder"][:, :, None] + arguments["predictor"][:, None])
    logits = np.einsum("btuh,vh->btuv", hidden * arguments["mask"], arguments["weight"]) + arguments["bias"]
    choices: list[dict[str, Any]] = [{}, {"fastemit_lambda": 0.5, "topology": "constrained", "blank": -4}]
    for options in choices:
        loss, grads = reference.joint_rnnt_loss(**arguments, **options)
        expected, grad = reference.rnnt_loss(logits, TARGETS, **LENGTHS, **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-13)
        assert grads[3] is not None
        np.testing.assert_allclose(grads[3], grad.sum(axis=(0, 1, 2)), rtol=0, atol=1e-13)
        np.testing.assert_allclose(grads[2], np.einsum("btuv,btuh->vh", grad, hidden * arguments["mask"]),
                                   rtol=0, atol=1e-13)


def test_joint_of_a_band_is_the_loss_of_its_rows() -> None:
    arguments = {**joint_batch("tanh", banded=True), "mask": None}
    u = np.minimum(BAND[:, :, None] + np.arange(3), 3)  # beyond U there is nothing; any row will do
    rows = np.stack([arguments["predictor"][b][u[b]] for b in range(2)])
    logits = np.tanh(arguments["encoder"][:, :, None] + rows) @ arguments["weight"].T + arguments["bias"]
    loss, _ = reference.joint_rnnt_loss(**arguments)
    expected, _ = reference.rnnt_loss(logits, TARGETS, **LENGTHS, first=BAND)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)


@pytest.mark.parametrize("banded", [False, True])
def test_joint_padding_is_never_read(banded: bool) -> None:
    arguments = joint_batch("gelu", banded)
    loss, grads = reference.joint_rnnt_loss(**arguments)
    arguments["encoder"][1, 3:] = math.nan
    arguments["predictor"][1, 3:] = math.nan
    arguments["mask"][padding(banded)] = math.nan
    dirty_loss, dirty_grads = reference.joint_rnnt_loss(**arguments)
    np.testing.assert_array_equal(dirty_loss, loss)
    for dirty, clean in zip(dirty_grads, grads, strict=True):
        assert dirty is not None and clean is not None
        np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(dirty_grads[0][1, 3:], 0.0)
    np.testing.assert_array_equal(dirty_grads[1][1, 3:], 0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["encoder", "predictor"])
def test_an_invalid_utterance_adds_nothing_to_any_gradient(where: str, activation: str) -> None:
    arguments = joint_batch(activation)
    arguments[where][1, 1, 2] = math.nan
    arguments["mask"][1] = 1.0
    loss, grads = reference.joint_rnnt_loss(**arguments)
    shared = ("weight", "bias", "activation")
    alone = {name: value if name in shared else value[:1] for name, value in arguments.items()}
    alone_loss, alone_grads = reference.joint_rnnt_loss(**alone)
    np.testing.assert_array_equal(loss, [alone_loss[0], math.nan])
    for both, one in zip(grads[:2], alone_grads[:2], strict=True):
        np.testing.assert_array_equal(both[0], one[0])
        np.testing.assert_array_equal(both[1], 0.0)
    np.testing.assert_array_equal(grads[2], alone_grads[2])
    assert grads[3] is not None and alone_grads[3] is not None
    np.testing.assert_array_equal(grads[3], alone_grads[3])
    assert np.any(grads[2])


def test_joint_without_path_or_weight_adds_nothing() -> None:
    arguments = joint_batch("tanh")
    _, whole = reference.joint_rnnt_loss(**arguments, weights=[1.0, 0.0])
    arguments["encoder_lengths"] = [4, 1]  # two labels in one frame
    loss, grads = reference.joint_rnnt_loss(**arguments, topology="modified", weights=[0.0, 1.0])
    assert loss[1] == math.inf
    for grad in grads:
        assert grad is not None
        np.testing.assert_array_equal(grad, 0.0)
    assert np.any(whole[0][0]) and not np.any(whole[0][1])


# ---- arguments


@pytest.mark.parametrize(("change", "message"), [
    ({"topology": "straight"}, "topology: "),
    ({"infeasible": "ignore"}, "infeasible: "),
    ({"blank": 4}, "blank: "),
    ({"blank": -5}, "blank: "),
    ({"hat": True, "normalized": True}, "hat, normalized: "),
    ({"hat": True, "blank": 3}, "targets: "),
    ({"hat": True, "blank": -1}, "targets: "),
    ({"targets": [[2, 4, 2], [1, 3, -1]]}, "targets: "),
    ({"targets": [[2, 3, 2], [1, -1, -1]]}, "targets: "),
    ({"logit_lengths": [5, 3]}, "logit_lengths, "),
    ({"logit_lengths": [4, 0]}, "logit_lengths, "),
    ({"target_lengths": [4, 2]}, "logit_lengths, "),
    ({"target_lengths": [3, -1]}, "logit_lengths, "),
])
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    for function in (reference.rnnt_loss, reference.occupancy, reference.align):
        with pytest.raises(ValueError, match=message):
            function(**{**batch(False), **change})


def test_joint_and_lattice_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="activation: "):
        reference.joint_rnnt_loss(**joint_batch("swish"))
    with pytest.raises(ValueError, match="first, width: "):
        reference.joint_rnnt_loss(**joint_batch("tanh"), width=3)
    with pytest.raises(ValueError, match="columns without first"):
        reference.lattice_loss(np.zeros((2, 2)), np.zeros((2, 2)), 2)
    with pytest.raises(ValueError, match="topology: "):
        reference.effective_occupancy(np.zeros((2, 2)), np.zeros((2, 2)), topology="straight")


def test_arguments_are_not_modified() -> None:
    arguments = batch(False)
    before = {name: np.array(value) for name, value in arguments.items() if value is not None}
    reference.rnnt_loss(**arguments, topology="constrained", fastemit_lambda=0.5, delay_penalty=0.3)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


def modules() -> list[types.ModuleType]:
    """The package itself and its files."""
    names = [info.name for info in pkgutil.iter_modules(reference.__path__)]
    return [reference, *(importlib.import_module(f"transducer_loss.reference.{name}") for name in names)]


def test_examples_of_the_docstrings() -> None:
    results = [doctest.testmod(module) for module in modules()]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 7


def test_it_imports_only_numpy_and_the_standard_library() -> None:
    names = set()
    for module in modules():
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    own = {name for name in names if name.startswith("transducer_loss.reference.")}
    assert {name.split(".")[0] for name in names - own} - set(sys.stdlib_module_names) == {"numpy"}
