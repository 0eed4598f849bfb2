"""Sampling of the reference against published vectors, closed forms, and all draws there can be."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from transducer_loss import reference
from transducer_loss.reference.sampling import count_weights, draw, fixed_exponential, order, philox, posteriors

# ---- random words and orders


@pytest.mark.parametrize(("counter", "key", "words"), [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: str) -> None:
    assert philox(key[0] | key[1] << 32, counter) == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("number", [*range(1, 71), 127, 128, 129, 1000, 2047, 2048, 2049, 10_007, 65_537])
def test_orders_are_permutations(number: int) -> None:
    for key in range(12 if number <= 70 else 1):
        assert sorted(order(number, philox(key, (1, 0, 0, 0)))) == list(range(number))
    for word in (0, 2**32 - 1) if number <= 2049 else ():
        assert sorted(order(number, [word] * 4)) == list(range(number))


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 9, 16, 17, 40])
def test_orders_put_every_class_at_every_place(number: int) -> None:
    # Alike for powers of two. It need not be for others, as the draw's offset alone makes the probabilities exact.
    count = 4000
    at = np.zeros((number, number))
    for key in range(count):
        at[range(number), order(number, philox(key, (1, 7, 0, 0)))] += number / count
    noise = 5 * math.sqrt(number / count)
    assert np.abs(at - 1.0).max() < noise + (0.0 if number in (2, 4, 16) else 0.3)


@pytest.mark.parametrize("number", [4, 5, 6, 7, 8, 12, 15, 16, 32])
def test_any_two_classes_are_drawn_together_alike(number: int) -> None:
    # Two rounds of the order instead of three keep some pairs of 16 or 32 classes apart for ever, and draw others three
    # times as often.
    rng = np.random.default_rng(number)
    orders = [order(number, philox(key, (1, 0, 0, 0))) for key in range(1500)]
    for drawn in sorted({2, 3, 5} & set(range(2, number - 1))):
        together = np.zeros((number, number))
        for places in orders:
            picked, _ = draw([1] * number, [0], drawn, int(rng.integers(number - 1)), places)
            together[np.ix_(list(picked), list(picked))] += 1
        alike = drawn * (drawn - 1) / ((number - 1) * (number - 2)) * len(orders)
        found = together[1:, 1:][~np.eye(number - 1, dtype=bool)]
        assert np.abs(found - alike).max() < 0.2 * alike + 5 * math.sqrt(alike)


# ---- exponentials


def test_fixed_exponentials_are_exponentials() -> None:
    distances = np.concatenate([[0.0], np.random.default_rng(0).uniform(0.0, 22.0, 3000), 2.0 ** np.arange(-30.0, 4.5)])
    for distance in distances.astype(np.float32):
        exact = 2.0**31 * math.exp(-distance)
        # The polynomial is that good; the product is rounded to 24 digits and cut to 2^-23; then the last bit is cut off.
        assert abs(fixed_exponential(distance) - exact) <= exact * (5e-7 + 6e-8 * distance) + 1.0


def test_fixed_exponentials_fall_to_nothing() -> None:
    values = [fixed_exponential(distance) for distance in np.linspace(0.0, 21.6, 20_000).astype(np.float32)]
    assert values[0] == 2**31
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    last = np.float32(31 * math.log(2))
    while np.float32(last) * np.float32(12102203.0) >= 31 * 2**23:
        last = np.nextafter(last, np.float32(0))
    assert fixed_exponential(last) == 1
    assert fixed_exponential(np.nextafter(last, np.float32(99))) == 0
    assert [fixed_exponential(x) for x in (22.0, 1e6, 3e38, math.inf, math.nan)] == [0] * 5


def test_posteriors_are_a_softmax() -> None:
    rng = np.random.default_rng(1)
    for scale, classes in itertools.product((0.1, 1.0, 5.0, 100.0), (1, 2, 7, 500)):
        x = rng.normal(0.0, scale, classes) + rng.choice([0.0, -1e4, 1e4])
        x[rng.random(classes) < 0.1] = rng.choice([-math.inf, math.nan])
        known = np.where(np.isnan(x), -math.inf, x).astype(np.float32).astype(float)
        if not np.isfinite(known).any():
            continue
        expected = np.exp(known - known.max()) / np.exp(known - known.max()).sum()
        found = np.array([Fraction(p, 2**36) for p in posteriors(x)], float)
        np.testing.assert_allclose(found, expected, rtol=4e-6, atol=2.0**-30)
        assert (found[known == -math.inf] == 0.0).all()


@pytest.mark.parametrize("frame", [
    [math.nan, math.nan], [-math.inf, math.nan], [-math.inf] * 3, [1.0, math.inf], [math.inf, math.nan, 0.0], [1e300, 0.0],
])
def test_frames_that_say_nothing(frame: list[float]) -> None:
    assert posteriors(frame) == [0] * len(frame)


def test_frames_that_say_one_thing() -> None:
    # A share is a number of 32 bits, and so just below 1.
    assert posteriors([-math.inf, 5.0, math.nan, -30.0]) == [0, 2**36 - 16, 0, 0]


# ---- counts


def test_weights_of_counts() -> None:
    for counts in ([1, 2, 3], [0.1, 0.0, 7.5], [1e300, 1e290, 0.0], [1e-290, 3e-290], [5], [2**53 + 1, 3], [1e308, 1.7e308]):
        weights = count_weights(counts)
        assert 2**39 <= max(weights) < 2**40
        scale = Fraction(2) ** (40 - math.frexp(max(counts))[1])
        assert weights == [max(math.floor(Fraction(float(count)) * scale), count > 0) for count in counts]
    # What has a count has a weight.
    assert count_weights([1e300, 1.0, 0.0, 5e-324])[1:] == [1, 0, 1]
    assert count_weights([5e-324, 0.0, 1e-323]) == [1, 0, 1]


# ---- inclusion probabilities


def enumerated(weights: list[int], kept: set[int], number: int) -> list[Fraction]:
    """Of all sets of certain classes, the one that is the very set of those whose share is 1 or more."""
    left = [v for v in range(len(weights)) if v not in kept]
    if number == 0:
        return [Fraction(v in kept) for v in range(len(weights))]
    if sum(weights[v] > 0 for v in left) <= number:
        certain = {v for v in left if weights[v] > 0}
        others = [v for v in left if v not in certain]
        share = Fraction(number - len(certain), max(len(others), 1))
        return [share if v in others else Fraction(1) for v in range(len(weights))]
    found = []
    for size in range(number):
        for certain in map(set, itertools.combinations(left, size)):
            scale = Fraction(number - size, sum(weights[v] for v in left if v not in certain))
            if all((weights[v] * scale >= 1) == (v in certain) for v in left):
                found.append([Fraction(1) if v in kept | certain else weights[v] * scale for v in range(len(weights))])
    assert len(found) == 1
    return found[0]


def test_probabilities_are_those_of_the_only_set_that_fits() -> None:
    rng = np.random.default_rng(2)
    certain = without = 0
    for _ in range(600):
        classes = int(rng.integers(1, 9))
        weights = [int(w) for w in rng.choice([0, 1, 1, 2, 3, 5, 20, 1000], classes) * (rng.random(classes) < rng.choice([0.3, 1]))]
        kept = {int(v) for v in rng.permutation(classes)[:rng.integers(0, classes + 1)]}
        number = int(rng.integers(0, classes - len(kept) + 1))
        expected = enumerated(weights, kept, number)
        _, exact = draw(weights, kept, number, 0, range(classes))
        assert exact == expected
        assert sum(exact) == len(kept) + number
        np.testing.assert_allclose(reference.inclusion_probabilities(weights, kept, number), np.array(expected, float), rtol=1e-13)
        certain += any(p == 1 for v, p in enumerate(expected) if v not in kept) and any(0 < p < 1 for p in expected)
        without += any(w == 0 and 0 < p < 1 for w, p in zip(weights, expected, strict=True))
    assert certain >= 40
    assert without >= 30


def test_probabilities_of_equal_weights() -> None:
    for classes, kept, number in ((10, [3], 4), (7, [], 7), (7, [0, 6], 1), (300, [1], 299), (5, [1], 0)):
        expected = [1.0 if v in kept else number / (classes - len(kept)) for v in range(classes)]
        for weight in (1, 9, 0):  # of nothing but 0, all are alike
            found = reference.inclusion_probabilities([weight] * classes, kept, number)
            np.testing.assert_allclose(found, expected, rtol=1e-14)
            assert draw([weight] * classes, kept, number, 0, range(classes))[1] == [
                Fraction(1) if v in kept else Fraction(number, classes - len(kept)) for v in range(classes)]


def test_probabilities_of_weights_of_all_magnitudes() -> None:
    # Sums beyond 2^39 lose their last bits, which moves a probability by no more than that.
    rng = np.random.default_rng(3)
    shifted = 0
    for _ in range(60):
        classes = int(rng.integers(2, 400))
        weights = [int(w) for w in np.exp(rng.normal(0.0, rng.choice([1.0, 6.0]), classes) + rng.choice([10.0, 30.0]))]
        weights = [min(w, 2**62) for w in weights]
        kept = {int(v) for v in rng.integers(0, classes, 3)}
        number = int(rng.integers(0, classes - len(kept) + 1))
        expected = reference.inclusion_probabilities(weights, kept, number)
        _, exact = draw(weights, kept, number, 0, order(classes, philox(7, (1, 0, 0, 0))))
        assert sum(exact) == len(kept) + number
        np.testing.assert_allclose(np.array(exact, float), expected, rtol=0, atol=1e-8)
        assert all(p > 0 for p, w in zip(exact, weights, strict=True) if w > 0 and number > sum(map(bool, weights)))
        shifted += sum(w for v, w in enumerate(weights) if exact[v] < 1) >= 2**39
    assert shifted >= 15


def test_what_has_a_weight_keeps_one() -> None:
    weights = [2**61] * 3 + [1] * 5 + [0]
    _, exact = draw(weights, [], 1, 0, range(9))
    assert all(0 < p < 1e-11 for p in exact[3:8])
    assert exact[8] == 0
    assert sum(exact) == 1


# ---- draws


def test_every_offset_together_draws_each_class_as_often_as_its_probability() -> None:
    rng = np.random.default_rng(4)
    fractions = 0
    for _ in range(200):
        classes = int(rng.integers(1, 12))
        weights = [int(w) for w in rng.choice([0, 1, 2, 3, 7, 40], classes)]
        kept = {int(v) for v in rng.permutation(classes)[:rng.integers(0, classes + 1)]}
        number = int(rng.integers(0, classes - len(kept) + 1))
        places = order(classes, philox(int(rng.integers(2**40)), (1, 0, 0, 0)))
        _, probability = draw(weights, kept, number, 0, places)
        left = [v for v, p in enumerate(probability) if p < 1]
        total = sum(weights[v] for v in left) or max(len(left), 1)
        drawn = np.zeros(classes, int)
        for random in range(total):
            picked, _ = draw(weights, kept, number, random, places)
            assert len(picked) == number
            assert not picked & kept
            drawn[list(picked | kept)] += 1
        assert [Fraction(int(count), total) for count in drawn] == probability
        fractions += any(0 < p < 1 for p in probability)
    assert fractions >= 50


# ---- classes of a batch

TARGETS = [[4, 2, 4, -1], [5, 0, 9, 9]]


def sampled(**options: Any) -> tuple[Any, Any]:
    arguments = {"vocab_size": 12, "num_samples": 3, "blank": -2, **options}
    return reference.sample_classes(TARGETS, [3, 2], **arguments)


def test_labels_of_the_batch_or_of_each_utterance_are_kept() -> None:
    ids, probability = sampled()
    assert ids.shape == (1 + 8 + 3,)
    ids, probability = sampled(vocab_size=40, blank=10)
    assert ids.shape == (12,)
    assert [v for v, p in enumerate(probability) if p == 1] == [0, 2, 4, 5, 10]
    assert set(probability) == {1, Fraction(7, 35)}
    ids, probability = sampled(vocab_size=40, blank=10, scope="utterance")
    assert ids.shape == (2, 8)
    assert [[v for v, p in enumerate(of) if p == 1] for of in probability] == [[2, 4, 10], [0, 5, 10]]
    assert [set(of) for of in probability] == [{1, Fraction(5, 37)}] * 2
    for row in ids:
        assert row[0] == 10
        assert (np.diff(row[1:]) > 0).all()
        assert 10 not in row[1:]


def test_classes_that_are_certain_are_there() -> None:
    counts = np.arange(40.0) ** 4
    for scope, seed in itertools.product(("batch", "utterance"), range(20)):
        ids, probability = sampled(vocab_size=40, proposal="unigram", counts=counts, scope=scope, seed=seed)
        for row, of in zip(np.atleast_2d(ids), np.atleast_2d(probability), strict=True):
            assert sum(of) == len(row)
            assert {v for v, p in enumerate(of) if p == 1} <= set(row.tolist()) <= {v for v, p in enumerate(of) if p > 0}


def test_one_percent_is_uniform_with_correction() -> None:
    rng = np.random.default_rng(5)
    logits, frames = rng.normal(0.0, 2.0, (2, 3, 40)), [3, 2]
    logits[1, 2, 7] = 50.0  # padding
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = rng.random(40) * (rng.random(40) < 0.5)
    of_batch = np.concatenate([shares[0], shares[1, :2]]).sum(0) / 5
    of_each = [shares[0].mean(0), shares[1, :2].mean(0)]
    for proposal, scope, options, weights in (
        ("unigram", "batch", {"counts": counts}, [counts / counts.sum()]),
        ("unigram", "utterance", {"counts": counts}, [counts / counts.sum()] * 2),
        ("ctc", "batch", {"ctc_logits": logits, "ctc_lengths": frames}, [of_batch]),
        ("ctc", "utterance", {"ctc_logits": logits, "ctc_lengths": frames}, of_each),
    ):
        for correction in (False, True):
            _, probability = sampled(vocab_size=40, blank=10, proposal=proposal, scope=scope, correction=correction, **options)
            for of, w, kept in zip(np.atleast_2d(probability), weights, [{0, 2, 4, 5, 10}] if scope == "batch" else
                                   [{2, 4, 10}, {0, 5, 10}], strict=True):
                mixed = 0.99 * w + 0.01 / 40 if correction else w
                expected = reference.inclusion_probabilities(mixed, kept, int(sum(of)) - len(kept))
                np.testing.assert_allclose(of.astype(float), expected, rtol=0, atol=3e-6)
                assert correction == (of > 0).all() or proposal == "ctc"


def test_rows_seeds_and_steps_have_draws_of_their_own() -> None:
    draws = [
        reference.sample_classes([[1]] * 3, [1] * 3, vocab_size=200, num_samples=20, scope="utterance", seed=seed, step=step)[0]
        for seed, step in ((0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), (-1, 0), (0, -1))]
    rows = {tuple(row) for ids in draws for row in ids.tolist()}
    assert len(rows) == 21


def test_slots_do_not_depend_on_the_labels() -> None:
    for targets in ([[1, 1, 1]], [[1, 2, 3]], [[7, 0, 7]]):
        for lengths, samples in itertools.product(([0], [2], [3]), (0, 2, 5, 50)):
            ids, _ = reference.sample_classes(targets, lengths, vocab_size=10, num_samples=samples)
            assert ids.shape == (min(4 + samples, 10),)
