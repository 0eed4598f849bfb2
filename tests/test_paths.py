"""`occupancy` and `align` against the reference, for the arguments of either loss."""

from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Batch, epsilon, expect_close, path_noise, random_batch
from transducer_loss import reference
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.reference.joint import _activate

every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "hat": {"hat": True}, "normalized": {"normalized": True}, "delay": {"delay_penalty": -0.4},
}  # fmt: skip


def expect_occupancy(got: tl.Occupancy, expected: Any, noise: float) -> None:
    loss, *pair = expected
    for array, exact in zip((got.blank, got.label), pair, strict=True):
        expect_close(array, exact, noise)
    expect_close(got.loss, loss, noise * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))


def expect_alignment(got: tl.Alignment, expected: Any, noise: float) -> None:
    frames, score = expected
    assert got.frames.dtype == np.int64
    assert got.score.dtype == np.float64
    np.testing.assert_array_equal(got.frames, frames)
    expect_close(got.score, score, noise * np.maximum(1.0, np.abs(np.where(np.isfinite(score), score, 0.0))))


@pytest.mark.parametrize("option", OPTIONS)
@every_topology
@every_dtype
def test_of_logits(dtype: str, topology: str, option: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(OPTIONS).index(option)])
    emitted = 0
    for _ in range(15):
        batch = random_batch(rng, dtype, topology, hat=option == "hat", normalized=option == "normalized")
        options = {"blank": batch.blank, "topology": topology, **OPTIONS[option]}
        noise = path_noise(dtype, batch.steps, batch.largest + 4)
        got = tl.occupancy(*batch.arguments, fastemit_lambda=0.5, **options)
        expect_occupancy(got, reference.occupancy(*batch.arguments, **options), noise)
        expect_alignment(tl.align(*batch.arguments, **options), reference.align(*batch.arguments, **options), noise)
        emitted += np.isfinite(got.loss).sum()
    assert emitted > 10


@pytest.mark.parametrize("option", ["plain", "hat", "delay"])
@every_topology
@every_dtype
def test_of_the_joint(dtype: str, topology: str, option: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(OPTIONS).index(option)])
    for activation in ACTIVATIONS:
        batch = random_batch(rng, dtype, topology, hat=option == "hat", most=(3, 6, 4, 8))
        (B, T, U1, V), H = batch.logits.shape, 6
        kind = batch.logits.dtype
        sizes = (B, T, H), (B, U1, H), (V, H), (V,)
        encoder, predictor, weight, bias = (rng.normal(size=size).astype(kind) for size in sizes)
        # The reference makes logits of the joint only on its way to the loss: here they are made once more.
        z = encoder[:, :, None].astype(np.float64) + predictor[:, None]
        hidden = _activate(z, activation)[0]
        batch.logits = hidden @ weight.astype(np.float64).T + bias.astype(np.float64)
        arguments = encoder, predictor, weight, bias, *batch.arguments[1:]
        options = {"blank": batch.blank, "topology": topology, **OPTIONS[option]}
        largest = (np.abs(hidden) @ np.abs(weight.astype(np.float64)).T).max()
        noise = path_noise(dtype, batch.steps, largest + 4)
        for workspace in (None, 100_000):
            joint = {**options, "activation": activation, "workspace": workspace}
            expect_occupancy(tl.occupancy(*arguments, **joint), reference.occupancy(*batch.arguments, **options), noise)
            expect_alignment(tl.align(*arguments, **joint), reference.align(*batch.arguments, **options), noise)


def test_packed_logits() -> None:
    batch = random_batch(np.random.default_rng(0), "float64", most=(3, 6, 4, 8))
    T, U = batch.frames.max(), batch.labels.max()
    expected = tl.occupancy(*batch.arguments, blank=batch.blank)
    got = tl.occupancy(batch.logits[batch.real], *batch.arguments[1:], blank=batch.blank)
    np.testing.assert_array_equal(got.blank, expected.blank[:, :T, : U + 1])
    np.testing.assert_array_equal(got.label, expected.label[:, :T, : U + 1])
    one = tl.align(batch.logits[batch.real], *batch.arguments[1:], blank=batch.blank)
    np.testing.assert_array_equal(one.frames, tl.align(*batch.arguments, blank=batch.blank).frames)


@every_topology
def test_ties_take_the_earliest_frames(topology: str) -> None:
    for T, U in ((1, 0), (1, 1), (4, 2), (5, 5), (9, 3)):
        arguments = np.full((1, T, U + 1, 3), -1.0), np.ones((1, U), int), [T], [U]
        got = tl.align(*arguments, topology=topology, normalized=True)
        assert got.score[0] == -(T if topology == "modified" else T + U)
        assert got.frames[0].tolist() == ([0] * U if topology == "regular" else list(range(U)))


@every_topology
def test_integer_log_probabilities_have_many_ties(topology: str) -> None:
    # Small integers add without rounding, so that equal sums are equal to the last bit.
    rng = np.random.default_rng(1)
    for _ in range(60):
        T, U = int(rng.integers(1, 9)), int(rng.integers(0, 6))
        logits = -rng.integers(0, 3, (1, T, U + 1, 3)).astype(np.float32)
        arguments = logits, rng.integers(1, 3, (1, U)), [T], [U]
        options = {"topology": topology, "normalized": True}
        expect_alignment(tl.align(*arguments, **options), reference.align(*arguments, **options), 0.0)


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path(topology: str) -> None:
    logits = np.random.default_rng(2).normal(size=(2, 4, 4, 5))
    arguments = logits, np.ones((2, 3), int), [2, 4], [3, 3]
    for infeasible, loss in (("inf", np.inf), ("zero", 0.0)):
        options = {"topology": topology, "infeasible": infeasible}
        got = tl.occupancy(*arguments, **options)
        assert got.loss[0] == loss
        assert not got.blank[0].any()
        assert not got.label[0].any()
        aligned = tl.align(*arguments, **options)
        assert aligned.score[0] == -np.inf
        assert (aligned.frames[0] == -1).all()
        assert (aligned.frames[1] >= 0).all()
    for function in (tl.occupancy, tl.align):
        with pytest.raises(ValueError, match=r"targets: expected a path .* got none for utterances \[0\]"):
            function(*arguments, topology=topology, infeasible="raise")


def test_logits_that_are_not_finite() -> None:
    logits = np.random.default_rng(3).normal(size=(2, 4, 3, 5))
    logits[1, 2, 1, 3] = np.nan
    arguments = logits, np.ones((2, 2), int), [4, 4], [2, 2]
    got, aligned = tl.occupancy(*arguments), tl.align(*arguments)
    assert np.isnan(got.loss[1])
    assert not got.blank[1].any()
    assert np.isnan(aligned.score[1])
    assert (aligned.frames[1] == -1).all()
    assert np.isfinite(aligned.score[0])


@every_topology
def test_transcripts_without_labels(topology: str) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(2, 4, 1, 5))
    arguments = logits, np.zeros((2, 0), int), np.array([4, 1]), np.array([0, 0])
    got = tl.align(*arguments, topology=topology)
    assert got.frames.shape == (2, 0)
    batch = Batch(*arguments, 0)
    np.testing.assert_allclose(got.score, -tl.rnnt_loss(*arguments, topology=topology)[0], rtol=1e-14)
    raw = tl.occupancy(*arguments, topology=topology)
    np.testing.assert_allclose(raw.blank, batch.real, rtol=0, atol=1e-14)
    assert not raw.label.any()


def test_best_path_of_a_long_sharp_lattice() -> None:
    rng = np.random.default_rng(5)
    T, U = 400, 60
    truth = np.sort(rng.choice(T, U, replace=False))
    targets = rng.integers(1, 20, U)
    logits = rng.normal(size=(1, T, U + 1, 20)).astype(np.float32)
    done = np.searchsorted(truth, np.arange(T))
    for t in range(T):
        logits[0, t, done[t], 0] += 30 * (t not in truth)
        if t in truth:
            logits[0, t, done[t], targets[done[t]]] += 30
            logits[0, t, done[t] + 1, 0] += 30
    got = tl.align(logits, targets[None], [T], [U])
    np.testing.assert_array_equal(got.frames[0], truth)
    loss = tl.rnnt_loss(logits, targets[None], [T], [U], gradient=False)[0]
    assert 0 <= -got.score[0] - loss[0] + epsilon("float32") * (T + U) < 0.1


def test_number_of_arguments() -> None:
    for function in (tl.occupancy, tl.align):
        with pytest.raises(TypeError, match=r"inputs: expected \(logits, .*\) or \(encoder, .*\), got 5 positional arguments"):
            function(*[np.zeros((1, 1, 1, 1))] * 5)
