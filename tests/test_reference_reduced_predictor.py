"""The reduced predictor of the reference against its matrix form, closed forms and finite differences."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from test_reference import ATOL, numeric
from transducer_loss import reference

F8 = npt.NDArray[np.float64]

both = pytest.mark.parametrize("last", [False, True])


def batch(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `reduced_predictor`: few labels, so that they come again, and nonsense past the last."""
    V, E, B, U = (int(rng.integers(1, n + 1)) for n in (4, 5, 4, 6))
    heads, N = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    lengths = rng.integers(0, U + 1, B)
    targets = rng.integers(0, V, (B, U))
    targets[np.arange(U) >= lengths[:, None]] = rng.choice([-1, 99])
    embedding, positions = rng.normal(0.0, 1.0, (V, E)), rng.normal(0.0, 1.0, (heads, N, E))
    return {"embedding": embedding, "positions": positions, "targets": targets, "target_lengths": lengths}


def rows(of: dict[str, Any], full: F8, last: bool) -> F8:
    """Of an array with all rows, those that are asked for."""
    return full[np.arange(len(full)), of["target_lengths"]] if last else full


def matrix_form(of: dict[str, Any]) -> F8:
    """All rows at once, from the embeddings of labels that are moved on by one, two, ..."""
    lengths, N = of["target_lengths"], of["positions"].shape[1]
    real = np.arange(of["targets"].shape[1]) < lengths[:, None]
    said = of["embedding"][np.where(real, of["targets"], 0)] * real[..., None]
    rows = said.shape[1] + 1
    moved = np.stack([np.pad(said, ((0, 0), (n + 1, 0), (0, 0)))[:, :rows] for n in range(N)], axis=2)
    scores = np.einsum("bune,hne->bunh", moved, of["positions"])
    out = np.einsum("bune,bunh->bue", moved, scores) / scores[0, 0].size
    return np.asarray(np.where((np.arange(rows) <= lengths[:, None])[..., None], out, 0.0))


@both
def test_it_is_its_matrix_form(last: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        of = batch(rng)
        np.testing.assert_allclose(reference.reduced_predictor(**of, last=last), rows(of, matrix_form(of), last), rtol=1e-12, atol=1e-13)


@both
def test_gradients_by_finite_differences(last: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(25):
        of = batch(rng)
        upstream = rng.normal(0.0, 1.0, reference.reduced_predictor(**of, last=last).shape)
        grads = reference.reduced_predictor_backward(upstream, **of, last=last)
        for name, grad in zip(("embedding", "positions"), grads, strict=True):

            def value(x: F8, name: str = name, of: dict[str, Any] = of, upstream: F8 = upstream) -> float:
                return float((upstream * reference.reduced_predictor(**{**of, name: x}, last=last)).sum())

            np.testing.assert_allclose(grad, numeric(value, of[name]), rtol=0, atol=ATOL)


def test_one_label_alone() -> None:
    rng = np.random.default_rng(2)
    x, P, g = rng.normal(0.0, 1.0, (3, 5))
    of: dict[str, Any] = {"embedding": x[None], "positions": P[None, None], "targets": [[0]], "target_lengths": [1]}
    np.testing.assert_allclose(reference.reduced_predictor(**of), [[np.zeros(5), (x @ P) * x]], rtol=1e-14)
    dx, dP = reference.reduced_predictor_backward([[np.full(5, 9.0), g]], **of)
    np.testing.assert_allclose(dx, [(x @ P) * g + (g @ x) * P], rtol=1e-13)
    np.testing.assert_allclose(dP, [[(g @ x) * x]], rtol=1e-13)


def test_labels_that_are_told_apart_by_one_feature_each() -> None:
    # Of embeddings with a single 1, row u holds what the position vectors say of each of its labels at its place.
    P = np.random.default_rng(3).normal(0.0, 1.0, (2, 3, 5))
    targets = [4, 0, 3, 1]
    out = reference.reduced_predictor(np.eye(5), P, [targets], [4])[0]
    for u in range(5):
        expected = np.zeros(5)
        for n, label in enumerate(reversed(targets[max(u - 3, 0) : u])):
            expected[label] = P[:, n, label].sum() / 6
        np.testing.assert_allclose(out[u], expected, rtol=1e-14)
    by_embedding, _ = reference.reduced_predictor_backward(np.ones((1, 5, 5)), np.eye(6, 5), P, [targets], [4])
    np.testing.assert_array_equal(by_embedding[[2, 5]], 0.0)  # nobody says them
    assert by_embedding[[0, 1, 3, 4]].all()


@both
def test_gradients_of_what_is_linear_and_quadratic(last: bool) -> None:
    # Euler: x . df/dx is f for each time that x is a factor of it.
    rng = np.random.default_rng(4)
    for _ in range(30):
        of = batch(rng)
        out = reference.reduced_predictor(**of, last=last)
        upstream = rng.normal(0.0, 1.0, out.shape)
        by_embedding, by_positions = reference.reduced_predictor_backward(upstream, **of, last=last)
        total = float((upstream * out).sum())
        assert float((by_positions * of["positions"]).sum()) == pytest.approx(total, rel=1e-11, abs=1e-12)
        assert float((by_embedding * of["embedding"]).sum()) == pytest.approx(2 * total, rel=1e-11, abs=1e-12)
        # Heads act through their sum alone.
        np.testing.assert_array_equal(by_positions, np.broadcast_to(by_positions[:1], by_positions.shape))


def test_the_last_row_of_a_prefix_is_a_row_of_the_whole() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        of = batch(rng)
        whole = reference.reduced_predictor(**of)
        for u in range(whole.shape[1]):
            of_prefix = {**of, "target_lengths": np.minimum(u, of["target_lengths"])}
            found = reference.reduced_predictor(**of_prefix, last=True)
            np.testing.assert_array_equal(found, rows(of_prefix, whole, True))
            # Labels further back than N are nobody's business.
            N = of["positions"].shape[1]
            recent = of["targets"][:, max(u - N, 0) : u]
            reached = of["target_lengths"] >= u
            again = reference.reduced_predictor(of["embedding"], of["positions"], recent[reached], [min(u, N)] * reached.sum(), last=True)
            np.testing.assert_array_equal(again, whole[reached, u])


@both
def test_padding_is_never_read(last: bool) -> None:
    rng = np.random.default_rng(6)
    for _ in range(30):
        of = batch(rng)
        out = reference.reduced_predictor(**of, last=last)
        upstream = rng.normal(0.0, 1.0, out.shape)
        grads = reference.reduced_predictor_backward(upstream, **of, last=last)
        if not last:
            padding = np.arange(out.shape[1]) > of["target_lengths"][:, None]
            assert not out[padding].any()
            assert not out[:, 0].any()
            upstream[padding] = math.nan
        of["targets"] = np.where(np.arange(of["targets"].shape[1]) < of["target_lengths"][:, None], of["targets"], -7)
        np.testing.assert_array_equal(reference.reduced_predictor(**of, last=last), out)
        for dirty, clean in zip(reference.reduced_predictor_backward(upstream, **of, last=last), grads, strict=True):
            np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize(("change", "message"), [
    ({"target_lengths": [3, 1]}, "target_lengths: .* 3 for utterance 0"),
    ({"target_lengths": [2, -1]}, "target_lengths: .* -1 for utterance 1"),
    ({"targets": [[1, 4], [0, 0]]}, "targets: utterance 0"),
    ({"targets": [[1, 1], [-1, 0]]}, "targets: utterance 1"),
])
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    of = {"embedding": np.ones((4, 2)), "positions": np.ones((1, 2, 2)), "targets": [[1, 1], [0, 0]], "target_lengths": [2, 1]}
    with pytest.raises(ValueError, match=message):
        reference.reduced_predictor(**{**of, **change})
    with pytest.raises(ValueError, match=message):
        reference.reduced_predictor_backward(np.ones((2, 3, 2)), **{**of, **change})
