"""`reduced_predictor` and its gradient against the reference and finite differences."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, Array, Counting, epsilon, expect_close, numpy_dtype
from transducer_loss import reference
from transducer_loss.arrays import COMPUTE
from transducer_loss.reduced_predictor import averaged, averaged_backward

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
rows = pytest.mark.parametrize("last", [False, True], ids=["all", "last"])


@dataclasses.dataclass
class Inputs:
    """Positional arguments of `reduced_predictor`."""

    embedding: Array
    positions: Array
    targets: Array
    lengths: Array

    @property
    def all(self) -> tuple[Any, ...]:
        return self.embedding, self.positions, self.targets, self.lengths

    @property
    def exact(self) -> tuple[Any, ...]:
        """As float64, for the reference."""
        return self.embedding.astype(np.float64), self.positions.astype(np.float64), self.targets, self.lengths

    @property
    def sizes(self) -> tuple[Any, ...]:
        """With the absolute numbers: sums of what is added up, without what cancels."""
        embedding, positions, *labels = self.exact
        return np.abs(embedding), np.abs(positions), *labels

    def upstream(self, rng: np.random.Generator, last: bool) -> Array:
        """Random, NaN in the rows that are padding."""
        B, U = self.targets.shape
        g = rng.normal(0.0, 1.0, (B, self.embedding.shape[1]) if last else (B, U + 1, self.embedding.shape[1]))
        if not last:
            g[np.arange(U + 1) > self.lengths[:, None]] = math.nan
        return g.astype(self.embedding.dtype)


def inputs(
    rng: np.random.Generator, dtype: str, *, V: int = 0, E: int = 0, heads: int = 0, N: int = 0, B: int = 0, U: int = -1
) -> Inputs:
    """Random of small sizes, but for those that are given; -1 past the last label."""
    V, E, heads, N, B = (size or int(rng.integers(1, n)) for size, n in ((V, 7), (E, 9), (heads, 4), (N, 6), (B, 5)))
    U = U if U >= 0 else int(rng.integers(0, 8))
    lengths = rng.integers(0, U + 1, B)
    targets = rng.integers(0, V, (B, U))
    targets[np.arange(U) >= lengths[:, None]] = -1
    embedding, positions = (rng.normal(0.0, 1.0, size).astype(numpy_dtype(dtype)) for size in ((V, E), (heads, N, E)))
    return Inputs(embedding, positions, targets, lengths)


def expect_same(of: Inputs, upstream: Array, last: bool, found: Array, grads: tl.ReducedPredictorGrads) -> None:
    """Raise unless result and gradients are the reference's, but for what rounding does to their sums."""
    heads, N, E = of.positions.shape
    # Products of three numbers, sums over heads, features and positions, and for gradients over labels, too.
    unit = epsilon(COMPUTE[of.embedding.dtype.name]) * (heads + N + E + 8)
    assert found.dtype == of.embedding.dtype
    expected = reference.reduced_predictor(*of.exact, last=last)
    expect_close(found, expected, unit * reference.reduced_predictor(*of.sizes, last=last))
    exact = reference.reduced_predictor_backward(upstream.astype(np.float64), *of.exact, last=last)
    sizes = reference.reduced_predictor_backward(np.abs(upstream.astype(np.float64)), *of.sizes, last=last)
    unit += epsilon(COMPUTE[of.embedding.dtype.name]) * of.targets.size
    for name, expected, size in zip(("embedding", "positions"), exact, sizes, strict=True):
        grad = getattr(grads, name)
        assert grad.dtype == of.embedding.dtype
        expect_close(grad, expected, unit * size)


def run(of: Inputs, upstream: Array, last: bool) -> tuple[Array, tl.ReducedPredictorGrads]:
    return tl.reduced_predictor(*of.all, last=last), tl.reduced_predictor_backward(upstream, *of.all, last=last)


@rows
@every_dtype
def test_random_batches(dtype: str, last: bool) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), last])
    for _ in range(40):
        of = inputs(rng, dtype)
        upstream = of.upstream(rng, last)
        expect_same(of, upstream, last, *run(of, upstream, last))


@pytest.mark.parametrize("sizes", [
    {"E": 511}, {"E": 512}, {"E": 513}, {"E": 1100, "N": 2}, {"N": 40, "U": 12}, {"N": 12, "U": 40}, {"V": 400, "U": 60, "B": 5},
    {"V": 1, "U": 90, "B": 3, "N": 3}, {"heads": 9, "U": 70, "E": 17}, {"U": 0, "B": 3}, {"U": 63, "B": 1}, {"U": 64, "B": 1},
    {"B": 70, "U": 3}, {"E": 1, "N": 1, "heads": 1, "U": 5},
], ids=str)  # fmt: skip
@rows
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sizes(dtype: str, last: bool, sizes: dict[str, int]) -> None:
    rng = np.random.default_rng(sum(sizes.values()))
    of = inputs(rng, dtype, **sizes)
    upstream = of.upstream(rng, last)
    expect_same(of, upstream, last, *run(of, upstream, last))


@rows
def test_gradients_by_finite_differences(last: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        of = inputs(rng, "float64")
        upstream = of.upstream(rng, last)
        grads = tl.reduced_predictor_backward(upstream, *of.all, last=last)
        known = np.nan_to_num(upstream)
        for name in ("embedding", "positions"):
            x = getattr(of, name)
            numeric = np.zeros_like(x)
            for i in np.ndindex(x.shape):
                values = []
                for step in (1e-5, -1e-5):
                    moved = x.copy()
                    moved[i] += step
                    values.append(float((known * tl.reduced_predictor(*dataclasses.replace(of, **{name: moved}).all, last=last)).sum()))
                numeric[i] = (values[0] - values[1]) / 2e-5
            np.testing.assert_allclose(getattr(grads, name), numeric, rtol=0, atol=3e-9)


@every_dtype
def test_a_step_is_a_row_of_the_whole(dtype: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        of = inputs(rng, dtype, N=3, U=9)
        whole = tl.reduced_predictor(*of.all)
        for u in range(10):
            reached = of.lengths >= u
            if not reached.any():
                continue
            recent = of.targets[reached, max(u - 3, 0) : u]
            step = tl.reduced_predictor(of.embedding, of.positions, recent, [min(u, 3)] * int(reached.sum()), last=True)
            np.testing.assert_array_equal(step, whole[reached, u])
            prefix = tl.reduced_predictor(of.embedding, of.positions, of.targets, np.minimum(u, of.lengths), last=True)
            np.testing.assert_array_equal(prefix[reached], whole[reached, u])


@rows
@every_dtype
def test_padding_is_never_read(dtype: str, last: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        of = inputs(rng, dtype)
        upstream = of.upstream(rng, last)
        found, grads = run(of, upstream, last)
        for rubbish in (0, 99, -(2**62)):
            padding = np.arange(of.targets.shape[1]) >= of.lengths[:, None]
            dirty = dataclasses.replace(of, targets=np.where(padding, rubbish, of.targets))
            again, same = run(dirty, np.nan_to_num(upstream, nan=7.0) if rubbish else upstream, last)
            np.testing.assert_array_equal(again, found)
            np.testing.assert_array_equal(same.embedding, grads.embedding)
            np.testing.assert_array_equal(same.positions, grads.positions)
        if not last:
            assert not np.asarray(found, float)[np.arange(found.shape[1]) > of.lengths[:, None]].any()
            assert not np.asarray(found, float)[:, 0].any()


def test_labels_that_nobody_says_have_no_gradient() -> None:
    rng = np.random.default_rng(4)
    of = inputs(rng, "float32", V=50, U=6, B=2, E=5)
    of.embedding[np.setdiff1d(np.arange(50), of.targets[of.targets >= 0])] = math.nan  # nor are they read
    upstream = of.upstream(rng, False)
    found, grads = run(of, upstream, False)
    assert np.isfinite(found).all()
    assert np.isfinite(grads.embedding).all()
    assert np.isfinite(grads.positions).all()
    said = np.isin(np.arange(50), of.targets[of.targets >= 0])
    np.testing.assert_array_equal(grads.embedding.any(axis=1), said)


STRIDES: dict[str, Any] = {
    "features apart": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "columns first": lambda x: np.asfortranarray(x),
    "reversed": lambda x: x[(slice(None, None, -1),) * x.ndim].copy()[(slice(None, None, -1),) * x.ndim],
    "inside": lambda x: np.pad(x, 2, constant_values=1)[(slice(2, -2),) * x.ndim],
}


@pytest.mark.parametrize("how", STRIDES)
@rows
@every_dtype
def test_strides(dtype: str, last: bool, how: str) -> None:
    rng = np.random.default_rng(5)
    for kind in ("int32", "int64", "int16", "uint8"):
        of = inputs(rng, dtype, U=5)
        of.targets = np.where(of.targets < 0, 0, of.targets).astype(kind)
        upstream = of.upstream(rng, last)
        views = Inputs(*(STRIDES[how](array) for array in of.all))
        before = [view.tobytes() for view in views.all]
        strided = STRIDES[how](upstream)
        found, grads = run(views, strided, last)
        expect_same(of, upstream, last, found, grads)
        assert before == [view.tobytes() for view in views.all]
        assert strided.tobytes() == upstream.tobytes()
        for array in (found, grads.embedding, grads.positions):
            assert array.flags.c_contiguous
            assert array.ctypes.data % 64 == 0


def test_broadcast_inputs_and_lists() -> None:
    rng = np.random.default_rng(6)
    of = inputs(rng, "float64", heads=1, B=3, U=4)
    repeated = np.broadcast_to(of.positions, (3, *of.positions.shape[1:]))
    np.testing.assert_allclose(tl.reduced_predictor(of.embedding, repeated, of.targets, of.lengths),
                               tl.reduced_predictor(*of.all), rtol=1e-14, atol=1e-15)  # heads that are alike are one
    found = tl.reduced_predictor(of.embedding, of.positions, of.targets.tolist(), of.lengths.tolist())
    np.testing.assert_array_equal(found, tl.reduced_predictor(*of.all))
    same = np.broadcast_to(of.embedding[:1], of.embedding.shape)
    expect_same(dataclasses.replace(of, embedding=same), (g := of.upstream(rng, False)), False,
                *run(dataclasses.replace(of, embedding=same), g, False))
    empty = tl.reduced_predictor(of.embedding, of.positions, [[], []], [0, 0])
    np.testing.assert_array_equal(empty, np.zeros((2, 1, of.embedding.shape[1])))
    grads = tl.reduced_predictor_backward(empty, of.embedding, of.positions, [[], []], [0, 0])
    assert not grads.embedding.any()
    assert not grads.positions.any()


@rows
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_number_of_threads_gives_the_same_bits(dtype: str, last: bool) -> None:
    rng = np.random.default_rng(7)
    of = inputs(rng, dtype, V=9, E=70, heads=3, N=4, B=11, U=40)
    upstream = of.upstream(rng, last)
    out = [averaged(*of.all, last=last, validate=False, threads=threads) for threads in (1, 2, 3, 16)]
    grads = [averaged_backward(upstream, *of.all, last=last, validate=False, threads=threads) for threads in (1, 2, 3, 16)]
    expect_same(of, upstream, last, out[0], grads[0])
    for other, of_other in zip(out[1:], grads[1:], strict=True):
        np.testing.assert_array_equal(other, out[0])
        np.testing.assert_array_equal(of_other.embedding, grads[0].embedding)
        np.testing.assert_array_equal(of_other.positions, grads[0].positions)


@rows
def test_temporary_memory_does_not_grow_with_rows_times_features(last: bool) -> None:
    # Of the forward pass: no array of embeddings of all labels of all rows.
    counting = Counting()
    of = inputs(np.random.default_rng(8), "float32", V=20, E=256, heads=2, N=8, B=8, U=30)
    found = averaged(*of.all, last=last, validate=False, allocate=counting)
    per_row = (8 if last else 8 * 31) * 8 * 4  # a score for each position
    labels = 8 * 31 * 8 + 8 * 8
    assert counting.most <= found.nbytes + per_row + labels + 2 * of.positions.size * 4 + 1024


# ---- numbers that are none


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_rows_that_see_an_embedding_that_is_not_finite(dtype: str, bad: float) -> None:
    rng = np.random.default_rng(9)
    of = inputs(rng, dtype, V=5, E=4, heads=2, N=2, B=1, U=6)
    of.targets, of.lengths = np.array([[0, 1, 2, 3, 0, 1]]), np.array([6])
    clean = tl.reduced_predictor(*of.all)
    of.embedding[2, 1] = bad
    found = np.asarray(tl.reduced_predictor(*of.all), float)
    see = np.array([False, False, False, True, True, False, False])
    assert np.isnan(found[0, see]).all()
    np.testing.assert_array_equal(found[0, ~see], np.asarray(clean, float)[0, ~see])


@rows
@every_dtype
def test_a_gradient_from_above_that_is_not_finite_is_not_hidden(dtype: str, last: bool) -> None:
    # As loss scaling finds its overflows.
    rng = np.random.default_rng(10)
    of = inputs(rng, dtype, V=5, E=4, heads=2, N=2, B=2, U=3)
    of.targets, of.lengths = np.array([[0, 1, 2], [3, 3, 4]]), np.array([3, 3])
    for bad in (math.nan, math.inf):
        upstream = of.upstream(rng, last)
        upstream[(0, 1) if last else (0, 3, 1)] = bad
        grads = tl.reduced_predictor_backward(upstream, *of.all, last=last)
        by_embedding, by_positions = np.asarray(grads.embedding, float), np.asarray(grads.positions, float)
        np.testing.assert_array_equal(np.isfinite(by_embedding).all(axis=1), [True, False, False, True, True])
        assert not np.isfinite(by_positions).all()


@rows
@every_dtype
def test_labels_and_lengths_that_nobody_has_checked(dtype: str, last: bool) -> None:
    # As those on a device: nothing outside of the arrays is touched, and rows that see them look like no result.
    rng = np.random.default_rng(11)
    of = inputs(rng, dtype, V=5, E=4, heads=2, N=2, B=6, U=4)
    of.targets = rng.integers(0, 5, (6, 4))
    of.lengths = np.array([4, 4, 4, 5, -1, 2**62])
    clean = of.targets.copy()
    of.targets[0, 1], of.targets[1, 3], of.targets[2, 0] = 5, -1, 2**62
    found = np.asarray(averaged(*of.all, last=last, validate=None), float)
    u = np.arange(5)
    bad = np.array([(u == 2) | (u == 3), u == 4, (u == 1) | (u == 2), u >= 0, u >= 0, u >= 0])
    bad_rows = bad[np.arange(6), [4, 4, 4, 4, 4, 4]] if last else bad
    assert np.isnan(found[bad_rows]).all()
    assert np.isfinite(found[~bad_rows]).all()
    good = dataclasses.replace(of, targets=clean, lengths=np.array([4, 4, 4, 0, 0, 0]))
    expected = np.asarray(tl.reduced_predictor(*good.all, last=last), float)
    np.testing.assert_array_equal(found[~bad_rows], expected[~bad_rows])
    # They have no gradient, whatever comes from above.
    upstream = good.upstream(rng, last)
    upstream[bad_rows] = math.nan
    grads = averaged_backward(upstream, *of.all, last=last, validate=None)
    upstream[bad_rows] = 0
    wanted = tl.reduced_predictor_backward(np.nan_to_num(upstream), *good.all, last=last)
    unit = 64 * epsilon(COMPUTE[dtype])
    for name in ("embedding", "positions"):
        exact = np.asarray(getattr(wanted, name), float)
        expect_close(getattr(grads, name), exact, (unit + epsilon(dtype)) * np.abs(exact).max())


# ---- arguments

GOOD: dict[str, Any] = {
    "embedding": np.ones((4, 3), np.float32), "positions": np.ones((2, 2, 3), np.float32), "targets": np.ones((2, 5), np.int64),
    "target_lengths": [5, 0],
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embedding": np.ones((4, 3), int)}, TypeError, "embedding: expected dtype float16, bfloat16, float32, float64, got int64"),
    ({"embedding": np.ones(3, "f")}, ValueError, "embedding: expected 2 dimensions (V, E), got shape (3,)"),
    ({"embedding": np.ones((0, 3), "f")}, ValueError, "embedding: expected at least one of each of (V, E), got shape (0, 3)"),
    ({"positions": np.ones((2, 2, 3))}, TypeError, "positions: expected dtype float32 as embedding, got float64"),
    ({"positions": np.ones((2, 3), "f")}, ValueError, "positions: expected 3 dimensions (heads, N, E), got shape (2, 3)"),
    ({"positions": np.ones((2, 2, 4), "f")}, ValueError, "positions: expected shape (heads, N, E) = (2, 2, 3), got (2, 2, 4)"),
    ({"targets": np.ones((2, 5))}, TypeError, "targets: expected integers, got dtype float64"),
    ({"targets": np.ones(5, int)}, ValueError, "targets: expected shape (B, U) of at least one utterance, got (5,)"),
    ({"targets": [[1], [2, 3]]}, ValueError, "targets: expected integers, in rows of one length, got [[1], [2, 3]]"),
    ({"targets": [[1, 1, 1, 1, 4], [0] * 5]}, ValueError, "targets: expected labels in [0, V = 4), got 4 at index (0, 4)"),
    ({"targets": [[1, -1, 1, 1, 4], [0] * 5]}, ValueError, "targets: expected labels in [0, V = 4), got -1 at index (0, 1)"),
    ({"target_lengths": [6, 0]}, ValueError, "target_lengths: expected lengths in [0, U = 5], got 6 at index 0"),
    ({"target_lengths": [5, -1]}, ValueError, "target_lengths: expected lengths in [0, U = 5], got -1 at index 1"),
    ({"target_lengths": [5]}, ValueError, "target_lengths: expected shape (B,) = (2,), got (1,)"),
    ({"target_lengths": [5.0, 1.0]}, TypeError, "target_lengths: expected integers, got dtype float64"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.reduced_predictor(**{**GOOD, **change})
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.reduced_predictor_backward(np.ones((2, 6, 3), "f") if "embedding" not in change else change["embedding"], **{**GOOD, **change})


@pytest.mark.parametrize(("gradient", "last", "error", "message"), [
    (np.ones((2, 5, 3), "f"), False, ValueError, "gradient: expected shape (B, U+1, E) = (2, 6, 3), got (2, 5, 3)"),
    (np.ones((2, 3), "f"), False, ValueError, "gradient: expected 3 dimensions (B, U+1, E), got shape (2, 3)"),
    (np.ones((2, 6, 3), "f"), True, ValueError, "gradient: expected 2 dimensions (B, E), got shape (2, 6, 3)"),
    (np.ones((3, 3), "f"), True, ValueError, "gradient: expected shape (B, E) = (2, 3), got (3, 3)"),
    (np.ones((2, 6, 3)), False, TypeError, "gradient: expected dtype float32 as embedding, got float64"),
])
def test_errors_of_the_gradient(gradient: Array, last: bool, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.reduced_predictor_backward(gradient, **GOOD, last=last)


def test_classes_of_many_labels() -> None:
    """More than one block adds up, and rows that are many are summed in parts."""
    rng = np.random.default_rng(3)
    embedding, positions = rng.normal(size=(5, 6)), rng.normal(size=(2, 3, 6))
    targets = np.where(rng.random((70, 70)) < 0.9, 2, rng.integers(0, 5, (70, 70)))
    lengths = rng.integers(0, 71, 70)
    gradient = rng.normal(size=(70, 71, 6))
    grads = tl.reduced_predictor_backward(gradient, embedding, positions, targets, lengths)
    expected = reference.reduced_predictor_backward(gradient, embedding, positions, targets, lengths)
    for got, wanted in zip((grads.embedding, grads.positions), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-9)
    one = averaged_backward(gradient, embedding, positions, targets, lengths, last=False, validate=None, threads=1)
    np.testing.assert_array_equal(one.embedding, grads.embedding)
    np.testing.assert_array_equal(one.positions, grads.positions)
