"""`embr_loss` against the reference and finite differences, on lists that hold padding, repetitions and what has no path."""

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
from transducer_loss.embr import risk

every_dtype = pytest.mark.parametrize("dtype", FLOATS)

DISTANCES = ("int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64", "list")


def batch(rng: np.random.Generator, dtype: str, *, listed: bool = True, of_distances: str = "float64") -> dict[str, Any]:
    """Arguments of `embr_loss`: NaN in padding and for what is not looked at, +inf for what has no path."""
    B, N, L = (int(rng.integers(1, n + 1)) for n in (5, 9, 4))
    kind = numpy_dtype(dtype)
    nll = rng.normal(4.0, 3.0, (B, N)).astype(kind)
    nll[rng.random((B, N)) < 0.1] = math.inf
    distances: Any = rng.integers(0, 7, (B, N))
    if of_distances not in ("list", "int32", "int64", "uint8"):
        distances = (distances / 3).astype(numpy_dtype(of_distances))
        distances[nll == math.inf] = math.nan
    distances = distances.tolist() if of_distances == "list" else distances.astype(numpy_dtype(of_distances))
    arguments: dict[str, Any] = {
        "nll": nll, "distances": distances, "temperature": float(rng.choice([0.25, 1.0, 3.0])),
        "interpolation": float(rng.choice([0.0, 0.0, 0.3, 2.0])), "infeasible": str(rng.choice(["inf", "inf", "zero"])),
    }  # fmt: skip
    if arguments["interpolation"] or rng.random() < 0.3:
        arguments["reference_nll"] = rng.normal(4.0, 1.0, B).astype(kind)
    if listed:
        lengths = rng.integers(-1, L + 1, (B, N))
        nll[lengths < 0] = math.nan
        arguments["hypothesis_lengths"] = lengths
        if rng.random() < 0.7:
            hypotheses = rng.integers(0, 3, (B, N, L))
            hypotheses[np.arange(L) >= lengths[..., None]] = int(rng.choice([-1, 1]))
            arguments |= {"hypotheses": hypotheses, "blank": rng.choice([None, 0, 2])}
    return arguments


def exact(of: dict[str, Any], weights: Any = None) -> tuple[Array, Array, Array | None]:
    """Loss, weighted gradient by nll, and that by reference_nll, of numbers as the kernel reads them."""
    dtype = of["nll"].dtype.name
    read = {**of, "nll": of["nll"].astype(np.float64), "distances": np.asarray(of["distances"]).astype(COMPUTE[dtype])}
    if of.get("reference_nll") is not None:
        read["reference_nll"] = of["reference_nll"].astype(np.float64)
    loss, grad = reference.embr_loss(**read)
    w = np.ones(len(loss)) if weights is None else np.asarray(weights, np.float64)
    by_reference = None if of.get("reference_nll") is None else np.where(np.isfinite(loss), w * of.get("interpolation", 0.0), 0.0)
    return loss, grad * w[:, None], by_reference


def expect_same(got: tuple[Any, Any], of: dict[str, Any], weights: Any = None) -> None:
    """Raise unless loss and gradients are the reference's, rounded once."""
    loss, grad, by_reference = exact(of, weights)
    dtype = of["nll"].dtype.name
    assert got[0].dtype == COMPUTE[dtype]
    assert got[1].nll.dtype == of["nll"].dtype
    temperature = of.get("temperature", 1.0)
    x, d = (np.asarray(of[name]).astype(np.float64) for name in ("nll", "distances"))
    spread, furthest = (float(np.ptp(a[np.isfinite(a)])) if np.isfinite(a).any() else 0.0 for a in (x, d))
    largest = float(np.abs(d[np.isfinite(d)]).max(initial=0.0))
    # Softmaxes of float64, whose exponents are differences of numbers in units of the temperature.
    relative = epsilon("float64") * (8 + x.shape[1] + spread / temperature)
    total = np.where(np.isfinite(loss), np.abs(loss), 0.0)
    expect_close(got[0], loss, relative * (largest + total))
    upstream = np.ones(len(x)) if weights is None else np.abs(np.asarray(weights, np.float64))
    expect_close(got[1].nll, grad, 2 * relative * furthest / temperature * upstream[:, None])
    assert (got[1].reference_nll is None) == (by_reference is None)
    if by_reference is not None:
        assert got[1].reference_nll.dtype == of["nll"].dtype
        expect_close(got[1].reference_nll, by_reference, 0.0)


@pytest.mark.parametrize("listed", [False, True], ids=["all", "listed"])
@every_dtype
def test_random_lists(dtype: str, listed: bool) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), listed])
    seen = {"finite": 0, "none": 0, "moving": 0, "ignored": 0}
    for i in range(120):
        of = batch(rng, dtype, listed=listed, of_distances=DISTANCES[i % len(DISTANCES)])
        B = len(of["nll"])
        weights = None if rng.random() < 0.4 else rng.choice([0.0, -1.5, 0.25, 3.0], B)
        got = tl.embr_loss(**of, weights=weights)
        expect_same(got, of, weights)
        alone, none = tl.embr_loss(**of, weights=weights, gradient=False)
        np.testing.assert_array_equal(alone, got[0])
        assert none is None
        seen["finite"] += int(np.isfinite(got[0]).sum())
        seen["none"] += int((np.isinf(exact({**of, "infeasible": "inf"})[0])).sum())
        seen["moving"] += int(np.asarray(got[1].nll).any())
        seen["ignored"] += int((np.asarray(got[1].nll) == 0).any())
    assert min(seen.values()) >= (10 if listed else 1), f"{seen}"


def test_gradient_by_finite_differences() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        of = batch(rng, "float64")
        weights = rng.normal(0.0, 1.0, len(of["nll"]))
        loss, grads = tl.embr_loss(**of, weights=weights)
        finite = np.isfinite(loss)
        names = ["nll"] if "reference_nll" not in of else ["nll", "reference_nll"]
        for name in names:
            numeric = np.zeros_like(of[name])
            for i in np.ndindex(numeric.shape):
                values = []
                for step in (1e-5, -1e-5):
                    moved = of[name].copy()
                    moved[i] += step
                    values.append(float(weights[finite] @ tl.embr_loss(**{**of, name: moved}, gradient=False)[0][finite]))
                numeric[i] = (values[0] - values[1]) / 2e-5
            np.testing.assert_allclose(getattr(grads, name), numeric, rtol=0, atol=3e-9)


@pytest.mark.parametrize("distance", [0, 1, 7, 0.1, 1 / 3, 1e30, -2.5])
@every_dtype
def test_equal_distances_have_no_gradient_at_all(dtype: str, distance: float) -> None:
    rng = np.random.default_rng(2)
    for N in (1, 2, 3, 16, 100):
        nll = rng.normal(50.0, 30.0, (4, N)).astype(numpy_dtype(dtype))
        nll[0, 0] = math.inf
        loss, grads = tl.embr_loss(nll, np.full((4, N), distance), temperature=0.3, weights=[1.0, -7.0, 1e6, 0.0])
        assert not np.asarray(grads.nll, np.float64).any()
        if N > 1:
            expect_close(loss, np.full(4, np.asarray(distance, COMPUTE[dtype]), np.float64), 1e-14 * N * abs(distance))
    # Those that do not count may differ, and those that nothing is expected of.
    distances = np.array([[distance, distance, distance + 5.0, distance + 6.0, distance + 7.0]])
    hypotheses, lengths = np.array([[[1], [2], [1], [0], [3]]]), np.array([[1, 1, 1, -1, 1]])
    nll = np.array([[2.0, 1.0, 0.5, 0.25, math.inf]]).astype(numpy_dtype(dtype))
    _, grads = tl.embr_loss(nll, distances, hypotheses=hypotheses, hypothesis_lengths=lengths)
    assert not np.asarray(grads.nll, np.float64).any()


@every_dtype
def test_what_does_not_count_holds_what_it_likes(dtype: str) -> None:
    rng = np.random.default_rng(3)
    hypotheses = np.array([[[1, 2, 0], [1, 0, 2], [0, 0, 0], [2, 1, 9], [0, 9, 9], [1, 2, 3], [1, 2, 0]]] * 2)
    lengths = np.array([[2, 3, 3, 2, 1, 3, -1]] * 2)  # the second is the first, the fifth the third
    these, others = [0, 2, 3, 5], [1, 4, 6]
    nll, distances = rng.normal(3.0, 1.0, (2, 2, 7))
    nll = nll.astype(numpy_dtype(dtype))
    expected, grads = tl.embr_loss(nll[:, these], distances[:, these])
    for bad in (math.nan, math.inf, -math.inf, -60.0, 1e4):
        nll[:, others] = bad
        for far in (math.nan, math.inf, 1e4):
            distances[:, others] = far
            loss, got = tl.embr_loss(nll, distances, hypotheses=hypotheses, hypothesis_lengths=lengths, blank=0)
            np.testing.assert_array_equal(loss, expected)
            np.testing.assert_array_equal(got.nll[:, these], grads.nll)
            assert not np.asarray(got.nll, np.float64)[:, others].any()


@pytest.mark.parametrize("negative", [-2, -100])
def test_padding_has_the_length_minus_one(negative: int) -> None:
    nll, distances = np.array([[1.0, math.nan, 2.0, math.nan]]), [[0, 1, 2, 3]]
    hypotheses = np.arange(8).reshape(1, 4, 2)
    expected = tl.embr_loss(nll[:, ::2], np.asarray(distances)[:, ::2])[0]
    for given in ({}, {"hypotheses": hypotheses}):
        assert tl.embr_loss(nll, distances, hypothesis_lengths=[[0, -1, 2, -1]], **given)[0] == expected
        lengths = np.array([[0, negative, 2, negative]])
        with pytest.raises(ValueError, match="hypothesis_lengths: expected lengths in \\[-1, "):
            tl.embr_loss(nll, distances, hypothesis_lengths=lengths, **given)


def test_lengths_alone_tell_no_hypotheses_apart() -> None:
    nll, distances = np.array([[1.0, 2.0, 3.0]]), np.array([[0, 3, 5]])
    expected = tl.embr_loss(nll, distances)
    for lengths in ([[2, 2, 2]], [[0, 0, 2**20]]):
        loss, grads = tl.embr_loss(nll, distances, hypothesis_lengths=lengths)
        assert loss == expected[0]
        np.testing.assert_array_equal(grads.nll, expected[1].nll)


@every_dtype
def test_nothing_to_expect(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    nll, distances = np.full((3, 2), math.inf, kind), np.full((3, 2), math.nan)
    nll[1, 0], distances[1, 0] = 0.0, 3.0
    lengths = [[0, 1], [2, 2], [-1, -1]]
    for infeasible, none in (("inf", math.inf), ("zero", 0.0)):
        loss, grads = tl.embr_loss(nll, distances, hypothesis_lengths=lengths, infeasible=infeasible)
        np.testing.assert_array_equal(loss, [none, 3.0, none])
        assert not np.asarray(grads.nll, np.float64).any()
        loss, grads = tl.embr_loss(nll, distances, hypothesis_lengths=lengths, infeasible=infeasible,
                                   reference_nll=np.full(3, 2, kind), interpolation=0.5, weights=[1.0, 2.0, 3.0])
        np.testing.assert_array_equal(loss, [none + 1.0, 4.0, none + 1.0])
        np.testing.assert_array_equal(np.asarray(grads.reference_nll, float), np.where(np.isinf(loss), 0.0, [0.5, 1.0, 1.5]))
    with pytest.raises(ValueError, match=r"^nll: .*utterances \[0, 2\]$"):
        tl.embr_loss(nll, distances, hypothesis_lengths=lengths, infeasible="raise")
    assert tl.embr_loss(nll[1:2], distances[1:2], infeasible="raise")[0] == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_what_is_not_finite_spoils_its_own_utterance(dtype: str, bad: float) -> None:
    rng = np.random.default_rng(4)
    nll, distances = rng.normal(1.0, 1.0, (2, 3, 40))
    nll = nll.astype(numpy_dtype(dtype))
    loss, grads = tl.embr_loss(nll, distances)
    others = [0, 2]
    for name, far in (("nll", 0), ("distances", 0), ("distances", 1)):
        if name == "nll" and bad == math.inf:
            continue  # a hypothesis without a path
        spoilt = {"nll": nll.copy(), "distances": distances.copy()}
        spoilt[name][1, 33] = bad
        if far:
            spoilt["nll"][1, 33] = 6e4  # a probability of exp(-6e4) is 0, and its distance nobody's business
        found, of = tl.embr_loss(**spoilt)
        assert np.isnan(found[1]) == (not far)
        assert np.asarray(of.nll, np.float64)[1].any() == bool(far)
        np.testing.assert_array_equal(found[others], loss[others])
        np.testing.assert_array_equal(of.nll[others], grads.nll[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_dtype
def test_a_reference_without_a_finite_loss_leaves_no_gradient(dtype: str, bad: float) -> None:
    kind = numpy_dtype(dtype)
    nll, distances = np.array([[1.0, 2.0], [1.0, 2.0]], kind), [[0, 3], [0, 3]]
    of: dict[str, Any] = {"nll": nll, "distances": distances, "reference_nll": np.array([bad, 2.0], kind), "interpolation": 0.5}
    loss, grads = tl.embr_loss(**of, weights=[1.0, -2.0])
    assert np.isnan(loss[0]) if math.isnan(bad) else loss[0] == bad
    expect_same((loss, grads), of, [1.0, -2.0])
    assert not np.asarray(grads.nll, np.float64)[0].any()
    if bad == math.inf:
        with pytest.raises(ValueError, match=r"^nll: .*utterances \[0\]$"):
            tl.embr_loss(**of, infeasible="raise")
        assert tl.embr_loss(**of, infeasible="zero")[0][0] == math.inf
    # It is not even read where it has no weight.
    without, none = tl.embr_loss(nll, distances)
    assert none.reference_nll is None
    loss, grads = tl.embr_loss(**{**of, "interpolation": 0.0})
    np.testing.assert_array_equal(loss, without)
    np.testing.assert_array_equal(grads.nll, none.nll)
    assert not np.asarray(grads.reference_nll, np.float64).any()


@every_dtype
def test_improbable_hypotheses(dtype: str) -> None:
    # Differences of thousands of nats, sums near the largest float16.
    nll = np.array([[0.0, 700.0, 5000.0, 60000.0], [60000.0] * 4, [-60000.0, -60000.0, 60000.0, math.inf]]).astype(numpy_dtype(dtype))
    distances = [[1, 2, 3, 4]] * 3
    for temperature in (1e-3, 1.0, 1e3):
        of: dict[str, Any] = {"nll": nll, "distances": distances, "temperature": temperature}
        got = tl.embr_loss(**of)
        assert np.isfinite(got[0]).all()
        expect_same(got, of)


STRIDES: dict[str, Any] = {
    "members first": lambda x: np.asfortranarray(x),
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "inside": lambda x: np.pad(x, 2, constant_values=1)[(slice(2, -2),) * x.ndim],
}


@pytest.mark.parametrize("how", STRIDES)
@every_dtype
def test_strides(dtype: str, how: str) -> None:
    rng = np.random.default_rng(5)
    for i in range(8):
        of = batch(rng, dtype, of_distances=DISTANCES[i % 7])
        weights = rng.choice([-1.5, 0.25, 3.0], len(of["nll"]))
        loss, grads = tl.embr_loss(**of, weights=weights)
        views = {name: STRIDES[how](value) if isinstance(value, np.ndarray) else value for name, value in of.items()}
        before = {name: value.copy() for name, value in views.items() if isinstance(value, np.ndarray)}
        found, same = tl.embr_loss(**views, weights=STRIDES[how](weights))
        np.testing.assert_array_equal(found, loss)
        for one, other in zip(dataclasses.astuple(same), dataclasses.astuple(grads), strict=True):
            np.testing.assert_array_equal(one, other)
        for name, value in before.items():
            assert views[name].tobytes() == value.tobytes()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rng = np.random.default_rng(6)
    nll, distances = rng.normal(3.0, 2.0, (37, 50)).astype("f"), rng.integers(0, 9, (37, 50))
    hypotheses, lengths = rng.integers(0, 2, (37, 50, 6)), rng.integers(-1, 7, (37, 50))
    options: dict[str, Any] = {
        "hypotheses": hypotheses, "hypothesis_lengths": lengths, "blank": 0, "temperature": 1.5, "reference_nll": nll[:, 0].copy(),
        "interpolation": 0.1, "infeasible": "inf", "weights": None, "gradient": True, "validate": False,
    }  # fmt: skip
    one, *more = (risk(nll, distances, **options, threads=threads) for threads in (1, 2, 3, 16))
    expect_same(one, {"nll": nll, "distances": distances, **{k: options[k] for k in list(options)[:7]}})
    for other in more:
        np.testing.assert_array_equal(other[0], one[0])
        np.testing.assert_array_equal(other[1].nll, one[1].nll)
    for array in (one[0], one[1].nll, one[1].reference_nll):
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0


def test_many_hypotheses() -> None:
    rng = np.random.default_rng(7)
    of = {"nll": rng.normal(10.0, 1.0, (2, 700)).astype("f"), "distances": rng.integers(0, 30, (2, 700))}
    expect_same(tl.embr_loss(**of), of)
    counting = Counting()
    options: dict[str, Any] = {
        "hypotheses": None, "hypothesis_lengths": None, "blank": None, "temperature": 1.0, "reference_nll": None,
        "interpolation": 0.0, "infeasible": "inf", "weights": None, "gradient": True, "validate": False,
    }  # fmt: skip
    risk(of["nll"], of["distances"], **options, allocate=counting)
    assert counting.most <= 2 * 700 * 30  # some numbers for each, and not for each two


def test_lengths_that_nobody_has_checked() -> None:
    # As those on a device: nothing outside of the arrays is touched, and the loss says that something is wrong.
    options: dict[str, Any] = {
        "blank": None, "temperature": 1.0, "reference_nll": None, "interpolation": 0.0, "infeasible": "inf", "weights": None,
        "gradient": True, "validate": None, "hypotheses": np.zeros((3, 2, 4), np.int64),
    }  # fmt: skip
    lengths = np.array([[1, 2], [1, 5], [2**62, -1]])
    loss, grads = risk(np.ones((3, 2)), [[1, 2]] * 3, **options, hypothesis_lengths=lengths)
    np.testing.assert_array_equal(loss, [1.5, math.nan, math.nan])
    np.testing.assert_array_equal(grads.nll, [[0.25, -0.25], [0.0, 0.0], [0.0, 0.0]])


GOOD: dict[str, Any] = {"nll": np.ones((2, 3), "f"), "distances": np.ones((2, 3), int)}
LISTED = {"hypotheses": np.ones((2, 3, 4), int), "hypothesis_lengths": np.full((2, 3), 4)}


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"nll": np.ones((2, 3), int)}, TypeError, "nll: expected dtype float16, bfloat16, float32, float64, got int64"),
    ({"nll": np.ones(3, "f")}, ValueError, "nll: expected 2 dimensions (B, N), got shape (3,)"),
    ({"nll": np.ones((2, 0), "f")}, ValueError, "nll: expected at least one of each of (B, N), got shape (2, 0)"),
    ({"distances": np.ones((2, 4))}, ValueError, "distances: expected shape (B, N) = (2, 3), got (2, 4)"),
    ({"distances": np.ones((2, 3), bool)}, TypeError, "distances: expected numbers, got dtype bool"),
    ({"distances": [["a", "b", "c"]] * 2}, ValueError, f"distances: expected numbers, got {[['a', 'b', 'c']] * 2}"),
    ({"hypotheses": LISTED["hypotheses"]}, ValueError, "hypothesis_lengths: expected an array of shape (B, N) with hypotheses, got None"),
    ({**LISTED, "hypotheses": np.ones((2, 4, 4), int)}, ValueError, "hypotheses: expected shape (B, N, L) = (2, 3, 4), got (2, 4, 4)"),
    ({**LISTED, "hypotheses": np.ones((2, 4), int)}, ValueError, "hypotheses: expected shape (B, N, L) = (2, 3, 4), got (2, 4)"),
    ({**LISTED, "hypothesis_lengths": [[4, 4, 5]] * 2}, ValueError, "hypothesis_lengths: expected lengths in [-1, L = 4], got 5 at index (0, 2)"),
    ({"hypothesis_lengths": np.ones((2, 4), int)}, ValueError, "hypothesis_lengths: expected shape (B, N) = (2, 3), got (2, 4)"),
    ({"hypothesis_lengths": np.ones((2, 3))}, TypeError, "hypothesis_lengths: expected integers, got dtype float64"),
    ({**LISTED, "blank": "a"}, TypeError, "blank: expected an int, got str"),
    ({"temperature": 0.0}, ValueError, "temperature: expected more than 0, got 0.0"),
    ({"temperature": math.nan}, ValueError, "temperature: expected a finite number, got nan"),
    ({"interpolation": -0.1}, ValueError, "interpolation: expected 0 or more, got -0.1"),
    ({"interpolation": 0.1}, ValueError, "reference_nll: expected an array of shape (B,) with interpolation=0.1, got None"),
    ({"reference_nll": np.ones(2)}, TypeError, "reference_nll: expected dtype float32 as nll, got float64"),
    ({"reference_nll": np.ones(3, "f")}, ValueError, "reference_nll: expected shape (B,) = (2,), got (3,)"),
    ({"infeasible": "none"}, ValueError, "infeasible: expected one of 'inf', 'zero', 'raise', got 'none'"),
    ({"weights": [1.0]}, ValueError, "weights: expected shape (B,) = (2,), got (1,)"),
    ({"weights": np.ones(2, int)}, TypeError, "weights: expected dtype float16, bfloat16, float32, float64, got int64"),
])
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.embr_loss(**{**GOOD, **change})
