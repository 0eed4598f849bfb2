"""Edit distance of the reference against all alignments there are; EMBR against finite differences and closed forms."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from test_reference import ATOL, numeric
from transducer_loss import reference

F8 = npt.NDArray[np.float64]
Labels = tuple[int, ...]

# ---- edit distance


def alignments(hypothesis: Labels, meant: Labels) -> Iterator[tuple[int, int, int]]:
    """Insertions, deletions and substitutions of every alignment of two sequences."""
    if not hypothesis and not meant:
        yield 0, 0, 0
    if hypothesis:
        for i, d, s in alignments(hypothesis[1:], meant):
            yield i + 1, d, s
    if meant:
        for i, d, s in alignments(hypothesis, meant[1:]):
            yield i, d + 1, s
    if hypothesis and meant:
        for i, d, s in alignments(hypothesis[1:], meant[1:]):
            yield i, d, s + (hypothesis[0] != meant[0])


def best(hypothesis: Labels, meant: Labels) -> tuple[int, int, int, int]:
    """Of the alignments with the fewest errors, those with the fewest insertions: all with the same counts."""
    every = list(alignments(hypothesis, meant))
    least = min(map(sum, every))
    fewest = min(i for i, d, s in every if i + d + s == least)
    (found,) = {counts for counts in every if sum(counts) == least and counts[0] == fewest}
    assert found[1] == min(d for i, d, s in every if i + d + s == least)
    assert found[2] == max(s for i, d, s in every if i + d + s == least)
    return least, *found


def test_it_is_the_best_of_all_alignments() -> None:
    short = [labels for length in range(4) for labels in itertools.product(range(3), repeat=length)]
    kinds = set()
    for pair in itertools.product(short, repeat=2):
        found = reference.edit_distance(*pair)
        assert found == best(*pair)
        kinds.add(found)
    assert {(0, 0, 0, 0), (3, 3, 0, 0), (3, 0, 3, 0), (3, 0, 0, 3), (2, 1, 1, 0)} <= kinds
    rng = np.random.default_rng(0)
    choices = 0
    for _ in range(250):
        first, second = (tuple(rng.integers(0, 3, rng.integers(0, 6)).tolist()) for _ in range(2))
        found = reference.edit_distance(first, second)
        assert found == best(first, second)
        choices += len({counts for counts in alignments(first, second) if sum(counts) == found[0]}) > 1
    assert choices >= 20


def test_distances_of_long_sequences() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        a, b, c = (tuple(rng.integers(0, 4, rng.integers(0, 40)).tolist()) for _ in range(3))

        @functools.cache
        def levenshtein(i: int, j: int, a: Labels = a, b: Labels = b) -> int:
            if i == 0 or j == 0:
                return i + j
            same = levenshtein(i - 1, j - 1) + (a[i - 1] != b[j - 1])
            return min(same, 1 + min(levenshtein(i - 1, j), levenshtein(i, j - 1)))

        total, insertions, deletions, substitutions = reference.edit_distance(a, b)
        assert total == levenshtein(len(a), len(b)) == insertions + deletions + substitutions
        assert insertions - deletions == len(a) - len(b)
        assert min(insertions, deletions, substitutions) >= 0
        # Said and meant change places, and so do what is too much and what is missing.
        assert reference.edit_distance(b, a) == (total, deletions, insertions, substitutions)
        assert reference.edit_distance(a[::-1], b[::-1])[0] == total
        assert total <= reference.edit_distance(a, c)[0] + reference.edit_distance(c, b)[0]
        assert reference.edit_distance(a, a) == (0, 0, 0, 0)


def test_closed_forms_of_edit_distances() -> None:
    for m, n in itertools.product(range(6), repeat=2):
        nothing_alike = [*range(m)], [*range(10, 10 + n)]
        assert reference.edit_distance(*nothing_alike) == (max(m, n), max(m - n, 0), max(n - m, 0), min(m, n))
        assert reference.edit_distance([7] * m, [7] * n) == (abs(m - n), max(m - n, 0), max(n - m, 0), 0)
    # One to the left or right costs one of each, however long; two substitutions cost the same and win.
    assert reference.edit_distance([*range(1, 9)], [*range(8)]) == (2, 1, 1, 0)
    assert reference.edit_distance([1, 2], [0, 1]) == (2, 0, 0, 2)
    assert reference.edit_distance([2**40, -3], [2**40, 3]) == (1, 0, 0, 1)


def test_blanks_are_left_out() -> None:
    rng = np.random.default_rng(2)
    fewer = 0
    for _ in range(100):
        a, b = (rng.integers(-1, 3, rng.integers(0, 12)) for _ in range(2))
        blank = int(rng.integers(-1, 3))
        found = reference.edit_distance(a, b, blank=blank)
        assert found == reference.edit_distance(a[a != blank], b[b != blank])
        fewer += found != reference.edit_distance(a, b)
    assert fewer >= 50


# ---- expected distances


def batch(rng: np.random.Generator, most: int = 6) -> dict[str, Any]:
    """Arguments of `embr_loss`: some hypotheses are padding, some come twice, some have no path."""
    B, N, L = 4, int(rng.integers(1, most + 1)), 3
    lengths = rng.integers(-1, L + 1, (B, N))
    lengths[0] = np.abs(lengths[0])
    nll, distances = rng.normal(3.0, 2.0, (B, N)), rng.integers(0, 6, (B, N)).astype(float)
    nll[rng.random((B, N)) < 0.1] = math.inf
    distances[nll == math.inf] = math.nan
    nll[lengths < 0] = distances[lengths < 0] = math.nan
    hypotheses = rng.integers(0, 3, (B, N, L))
    hypotheses[np.arange(L) >= lengths[..., None]] = -1
    return {
        "nll": nll, "distances": distances, "hypotheses": hypotheses, "hypothesis_lengths": lengths, "blank": int(rng.integers(0, 3)),
        "temperature": float(rng.choice([0.3, 1.0, 2.5])), "reference_nll": rng.normal(3.0, 1.0, B),
        "interpolation": float(rng.choice([0.0, 0.4, -0.2])),
    }  # fmt: skip


def counted(of: dict[str, Any], b: int) -> list[int]:
    """Which hypotheses of an utterance count, told apart by their text."""
    texts: list[str] = []
    found = []
    for i, length in enumerate(of["hypothesis_lengths"][b]):
        text = "".join("abc"[v] for v in of["hypotheses"][b, i, :max(length, 0)]).replace("abc"[of["blank"]], "")
        if length >= 0 and text not in texts:
            texts.append(text)
            found.append(i)
    return found


def test_it_is_the_mean_over_those_that_count() -> None:
    rng = np.random.default_rng(3)
    seen = {"none": 0, "twice": 0, "no path": 0}
    for _ in range(100):
        of = batch(rng)
        loss, grad = reference.embr_loss(**of)
        for b in range(len(loss)):
            these = counted(of, b)
            odds = np.exp(-of["nll"][b, these].astype(np.longdouble) / of["temperature"])
            seen["none"] += not odds.any()
            seen["twice"] += len(these) < (of["hypothesis_lengths"][b] >= 0).sum()
            seen["no path"] += bool(odds.any()) and not odds.all()
            if not odds.any():
                assert loss[b] == math.inf
                assert not grad[b].any()
                continue
            d = np.where(odds > 0.0, of["distances"][b, these], 0.0)
            expected = (odds @ d) / odds.sum() + of["interpolation"] * of["reference_nll"][b]
            assert loss[b] == pytest.approx(float(expected), rel=1e-13, abs=1e-13)
            ignored = np.setdiff1d(np.arange(len(grad[b])), these)
            np.testing.assert_array_equal(grad[b, ignored], 0.0)
    assert min(seen.values()) >= 20


def test_gradient_by_finite_differences() -> None:
    rng = np.random.default_rng(4)
    for _ in range(40):
        of = batch(rng)
        loss, grad = reference.embr_loss(**of)
        finite = np.isfinite(loss)
        weights = rng.normal(0.0, 1.0, len(loss)) * finite

        def weighted(x: F8, of: dict[str, Any] = of, finite: Any = finite, weights: F8 = weights) -> float:
            return float(weights[finite] @ reference.embr_loss(**{**of, "nll": x})[0][finite])

        np.testing.assert_allclose(weights[:, None] * grad, numeric(weighted, of["nll"]), rtol=0, atol=ATOL)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_two_hypotheses(temperature: float) -> None:
    rng = np.random.default_rng(5)
    x, d = rng.normal(5.0, 2.0, (50, 2)), rng.normal(0.0, 3.0, (50, 2))
    loss, grad = reference.embr_loss(x, d, temperature=temperature)
    p = 0.5 + 0.5 * np.tanh((x[:, 1] - x[:, 0]) / (2 * temperature))
    np.testing.assert_allclose(loss, d[:, 1] + p * (d[:, 0] - d[:, 1]), rtol=1e-12, atol=1e-12)
    slope = -p * (1 - p) * (d[:, 0] - d[:, 1]) / temperature
    np.testing.assert_allclose(grad, np.stack([slope, -slope], axis=1), rtol=1e-9, atol=1e-12)


def test_what_changes_nothing() -> None:
    rng = np.random.default_rng(6)
    x, d = rng.normal(0.0, 2.0, (20, 7)), rng.normal(0.0, 3.0, (20, 7))
    loss, grad = reference.embr_loss(x, d)
    np.testing.assert_allclose(grad.sum(axis=1), 0.0, rtol=0, atol=1e-14)
    # All twice as improbable; all worse by the same.
    for moved, of in ((loss, (x + 1e4, d)), (loss + 5.0, (x, d + 5.0)), (loss, (x - 1e4, d))):
        found, same = reference.embr_loss(*of)
        np.testing.assert_allclose(found, moved, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(same, grad, rtol=0, atol=1e-11)
    for temperature in (0.1, 4.0):
        found, by_x = reference.embr_loss(temperature * x, d, temperature=temperature)
        np.testing.assert_allclose(found, loss, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(temperature * by_x, grad, rtol=0, atol=1e-13)
    order = rng.permutation(7)
    np.testing.assert_allclose(reference.embr_loss(x[:, order], d[:, order])[1], grad[:, order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("distance", [0, 3, 0.1, 1 / 3, 1e300, -7.7])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_equal_distances_have_no_gradient_at_all(count: int, distance: float) -> None:
    x = np.random.default_rng(count).normal(0.0, 10.0, (5, count))
    loss, grad = reference.embr_loss(x, np.full((5, count), distance), temperature=0.7)
    np.testing.assert_allclose(loss, distance, rtol=1e-14)
    np.testing.assert_array_equal(grad, 0.0)
    x[:, 1:] = math.nan
    loss, grad = reference.embr_loss(x, x, hypothesis_lengths=np.where(np.isnan(x), -1, 0))
    np.testing.assert_array_equal(loss, x[:, 0])  # of one alone the distance is certain
    np.testing.assert_array_equal(grad, 0.0)


def test_repetitions_hold_what_they_like() -> None:
    hypotheses = np.array([[[1, 2, 0], [1, 0, 2], [0, 0, 0], [2, 1, 9], [0, 9, 9], [1, 2, 3]]])
    lengths = np.array([[2, 3, 3, 2, 1, 3]])  # the second is the first, the fifth the third; the sixth goes on
    d = np.array([[1.0, math.nan, 2.0, 4.0, math.inf, 8.0]])
    for bad in (math.nan, math.inf, -math.inf, -50.0):
        x = np.array([[0.5, bad, 1.5, 2.5, bad, 1.0]])
        loss, grad = reference.embr_loss(x, d, hypotheses=hypotheses, hypothesis_lengths=lengths, blank=0)
        expected, slope = reference.embr_loss(x[:, [0, 2, 3, 5]], d[:, [0, 2, 3, 5]])
        np.testing.assert_array_equal(loss, expected)
        np.testing.assert_array_equal(grad[:, [0, 2, 3, 5]], slope)
        np.testing.assert_array_equal(grad[:, [1, 4]], 0.0)
    # Without a blank 1, 0, 2 is another hypothesis than 1, 2; and one without a path is there all the same.
    x = np.array([[0.5, 0.7, 1.5, 2.5, 3.5, 1.0]])
    told = reference.embr_loss(x, np.arange(6.0)[None], hypotheses=hypotheses, hypothesis_lengths=lengths)[0]
    assert told == reference.embr_loss(x, np.arange(6.0)[None])[0]
    x[0, 0] = math.inf
    loss = reference.embr_loss(x, np.arange(6.0)[None], hypotheses=hypotheses, hypothesis_lengths=lengths, blank=0)[0]
    assert loss == reference.embr_loss(x[:, [2, 3, 5]], [[2.0, 3.0, 5.0]])[0]


def test_nothing_to_expect() -> None:
    x, d = np.full((3, 2), math.inf), np.full((3, 2), math.nan)
    x[1], d[1] = [0.0, math.inf], [3.0, math.nan]
    lengths = [[0, 1], [2, 2], [-1, -4]]
    for infeasible, none in (("inf", math.inf), ("zero", 0.0)):
        loss, grad = reference.embr_loss(x, d, hypothesis_lengths=lengths, infeasible=infeasible)
        np.testing.assert_array_equal(loss, [none, 3.0, none])
        np.testing.assert_array_equal(grad, 0.0)
        loss, _ = reference.embr_loss(x, d, hypothesis_lengths=lengths, infeasible=infeasible, interpolation=0.5, reference_nll=[2.0] * 3)
        np.testing.assert_array_equal(loss, [none + 1.0, 4.0, none + 1.0])
    with pytest.raises(ValueError, match=r"utterances \[0, 2\]"):
        reference.embr_loss(x, d, hypothesis_lengths=lengths, infeasible="raise")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_utterance(bad: float) -> None:
    rng = np.random.default_rng(7)
    x, d = rng.normal(0.0, 1.0, (2, 4)), rng.normal(0.0, 1.0, (2, 4))
    loss, grad = reference.embr_loss(x, d)
    for name in ("nll", "distances"):
        if name == "nll" and bad == math.inf:
            continue  # a hypothesis without a path
        arguments = {"nll": x.copy(), "distances": d.copy()}
        arguments[name][1, 2] = bad
        spoilt, zero = reference.embr_loss(**arguments)
        np.testing.assert_array_equal(spoilt, [loss[0], math.nan])
        np.testing.assert_array_equal(zero, [grad[0], [0.0] * 4])
        arguments["nll"][1, 2] = 1e4 if name == "distances" else bad  # of probability exp(-1e4), which is 0
        ignored, _ = reference.embr_loss(**arguments)
        assert np.isnan(ignored[1]) == (name == "nll")
    of_reference = {"reference_nll": [0.5, bad], "interpolation": 0.5}
    spoilt, zero = reference.embr_loss(x, d, **of_reference)
    np.testing.assert_array_equal(spoilt, [loss[0] + 0.25, bad])
    np.testing.assert_array_equal(zero, [grad[0], [0.0] * 4])
    np.testing.assert_array_equal(reference.embr_loss(x, d, **{**of_reference, "interpolation": 0.0})[0], loss)
    if bad == math.inf:
        with pytest.raises(ValueError, match=r"utterances \[1\]"):
            reference.embr_loss(x, d, **of_reference, infeasible="raise")
        assert reference.embr_loss(x, d, **of_reference, infeasible="zero")[0][1] == math.inf


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 0.0}, "temperature: "),
    ({"temperature": -1.0}, "temperature: "),
    ({"temperature": math.nan}, "temperature: "),
    ({"temperature": math.inf}, "temperature: "),
    ({"interpolation": 0.1, "reference_nll": None}, "reference_nll: "),
    ({"hypothesis_lengths": None}, "hypothesis_lengths: "),
    ({"infeasible": "ignore"}, "infeasible: "),
])
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.embr_loss(**{**batch(np.random.default_rng(8)), **change})


def test_arguments_are_not_modified() -> None:
    of = batch(np.random.default_rng(9))
    before = {name: np.array(value) for name, value in of.items()}
    reference.embr_loss(**of)
    for name, value in before.items():
        np.testing.assert_array_equal(of[name], value)
