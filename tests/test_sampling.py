"""`sample_classes` against the reference, pick by pick, and against its probabilities over many seeds; `Classes.from_ids`."""

import dataclasses
import functools
import math
import time
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, Array, numpy_dtype
from transducer_loss import reference, sampling
from transducer_loss.processors import Host
from transducer_loss.sampling import PROPOSALS, SCOPES

every_scope = pytest.mark.parametrize("scope", SCOPES)
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS)

# ---- many draws


SEEDS = 20_000
V, BLANK = 24, 20
TARGETS, LENGTHS = np.array([[3, 5, 3], [11, 3, -1]]), [3, 2]
RNG = np.random.default_rng(0)
COUNTS = RNG.uniform(0.4, 2.0, V)
# Of all magnitudes: some classes are certain, some are drawn with next to no probability, some never.
SKEWED = 10.0 ** RNG.uniform(-8.0, 2.5, V) * (RNG.random(V) < 0.85)
SKEWED[[0, 1, 2]] = 900.0, 700.0, 300.0
LOGITS, FRAMES = RNG.normal(0.0, 0.7, (2, 5, V)).astype(np.float32), [5, 3]
LOGITS[1, 3:] = 9.0 * np.eye(V)[[7, 8]]
X = RNG.normal(0.0, 1.5, V)

PROBLEMS: dict[str, dict[str, Any]] = {
    "uniform": {"proposal": "uniform"},
    "unigram": {"proposal": "unigram", "counts": COUNTS},
    "skewed": {"proposal": "unigram", "counts": SKEWED},
    "ctc": {"proposal": "ctc", "ctc_logits": LOGITS, "ctc_lengths": FRAMES},
}


@dataclasses.dataclass(frozen=True)
class Draws:
    """One utterance's or the batch's classes for many seeds, and the exact probability of each class."""

    ids: Array
    probability: Array
    exact: Array
    kept: set[int]


@functools.cache
def draws(problem: str, scope: str, correction: bool) -> list[Draws]:
    """Of the batch, or of its two utterances."""
    options = {"vocab_size": V, "blank": BLANK, "num_samples": 5, "scope": scope, "correction": correction, **PROBLEMS[problem]}
    arguments = TARGETS, np.array(LENGTHS)
    copies = 100 if scope == "utterance" else 1
    if copies > 1:  # as utterances of one call have draws of their own
        arguments = np.tile(TARGETS, (copies, 1)), np.tile(LENGTHS, copies)
        if problem == "ctc":
            options |= {"ctc_logits": np.tile(LOGITS, (copies, 1, 1)), "ctc_lengths": np.tile(FRAMES, copies)}
    with Host(1):  # which holds BLAS at one thread once, instead of in every call
        found = [tl.sample_classes(*arguments, seed=seed, **options) for seed in range(SEEDS // copies)]
    ids, probability = (np.stack([getattr(classes, name) for classes in found]) for name in ("ids", "probability"))
    if copies == 1:
        return [Draws(ids, probability, exact(problem, [0, 1], ids.shape[1], correction), {BLANK, 3, 5, 11})]
    return [
        Draws(*(array[:, b::2].reshape(SEEDS, -1) for array in (ids, probability)),
              exact(problem, [b], ids.shape[2], correction), {BLANK, *TARGETS[b, :LENGTHS[b]].tolist()})
        for b in (0, 1)
    ]  # fmt: skip


def exact(problem: str, batch: list[int], slots: int, correction: bool) -> Array:
    """Probabilities of all classes, by textbook and in float64."""
    weights = {"uniform": np.ones(V), "unigram": COUNTS, "skewed": SKEWED}.get(problem)
    if weights is None:
        frames = np.concatenate([LOGITS[b, : FRAMES[b]] for b in batch]).astype(np.float64)
        weights = (np.exp(frames) / np.exp(frames).sum(-1, keepdims=True)).mean(0)
    if correction:
        weights = 0.99 * weights / weights.sum() + 0.01 / V
    kept = {BLANK, *(int(v) for b in batch for v in TARGETS[b, : LENGTHS[b]])}
    return reference.inclusion_probabilities(weights, kept, slots - len(kept))


every_draw = pytest.mark.parametrize(
    ("problem", "scope", "correction"),
    [
        ("uniform", "batch", True), ("unigram", "batch", True), ("ctc", "batch", True), ("skewed", "batch", False),
        *((problem, "utterance", correction) for problem in PROBLEMS for correction in (False, True)),
    ],
)  # fmt: skip


@every_draw
def test_classes_are_drawn_as_often_as_their_probability(problem: str, scope: str, correction: bool) -> None:
    for of in draws(problem, scope, correction):
        often = np.bincount(of.ids.ravel(), minlength=V) / SEEDS
        noise = np.sqrt(of.exact * (1.0 - of.exact) / SEEDS)
        sure = (of.exact == 0.0) | (of.exact == 1.0)
        np.testing.assert_array_equal(often[sure], of.exact[sure])
        # The noise of what is hardly ever drawn is that of the whole numbers 0, 1 and 2.
        assert (np.abs(often - of.exact)[~sure] <= 4.0 * noise[~sure] + 2.0 / SEEDS).all()
        # All deviations together: squares of the share of noise that each is, whose mean is 1.
        drawn = noise > math.sqrt(20.0) / SEEDS
        assert np.mean(np.square((often - of.exact)[drawn] / noise[drawn])) < 2.2
        assert ((of.exact == 1.0).sum() > len(of.kept) + 2) == (problem == "skewed")
        assert (of.exact == 0.0).any() == (problem == "skewed" and not correction)
        np.testing.assert_allclose(of.probability, of.exact[of.ids], rtol=3e-6, atol=1e-8)


@every_draw
def test_no_class_comes_twice_and_those_kept_always(problem: str, scope: str, correction: bool) -> None:
    for of in draws(problem, scope, correction):
        assert (of.ids[:, 0] == BLANK).all()
        assert (np.diff(of.ids[:, 1:], axis=1) > 0).all()
        assert not (of.ids[:, 1:] == BLANK).any()
        for v in of.kept:
            at = of.ids == v
            assert (at.sum(axis=1) == 1).all()
            assert (of.probability[at] == 1.0).all()


@every_scope
@every_proposal
def test_corrected_exponentials_sum_to_those_of_all_classes(proposal: str, scope: str) -> None:
    for of in draws(proposal, scope, True):
        assert of.exact.min() >= 0.05
        assert ((of.exact > 0.1) & (of.exact < 0.9)).sum() >= 10
        sums = np.exp(X[of.ids] - np.log(of.probability.astype(np.float64))).sum(axis=1)
        error = sums.std(ddof=1) / math.sqrt(SEEDS)
        assert abs(sums.mean() - np.exp(X).sum()) <= 4.0 * error
        # A correction that is left out, or a few percent off, would be seen.
        assert error < 0.01 * np.exp(X).sum()
        assert np.exp(X[of.ids]).sum(axis=1).mean() < 0.8 * np.exp(X).sum()


def test_pairs_of_classes_are_drawn_together_alike() -> None:
    # As often as independent draws without replacement would, roughly. Systematic sampling owes this to the order alone.
    for classes, samples in ((8, 3), (16, 3), (16, 8), (17, 4), (32, 5), (64, 16)):
        together = np.zeros((classes, classes))
        for seed in range(40):
            found = tl.sample_classes(np.zeros((500, 0), int), np.zeros(500, int), vocab_size=classes, num_samples=samples,
                                      scope="utterance", seed=seed)  # fmt: skip
            member = np.zeros((500, classes))
            np.put_along_axis(member, found.ids, 1.0, axis=1)
            together += member.T @ member
        of_pair = together[1:, 1:][~np.eye(classes - 1, dtype=bool)] / 20_000
        alike = samples * (samples - 1) / ((classes - 1) * (classes - 2))
        assert np.abs(of_pair - alike).max() < 0.25 * alike + 4.5 * math.sqrt(alike / 20_000)


# ---- the very picks of the reference


def targets_laid_out(rng: np.random.Generator, targets: Array) -> Any:
    """The same labels in some integer type and memory layout."""
    batch, columns = targets.shape
    fits = [dtype for dtype in ("int16", "uint8", "uint32", "uint64") if columns and targets.min() >= 0 and targets.max() < 256]
    kind = str(rng.choice(["list", "int32", "int64", *fits]))
    if kind == "list":
        return targets.tolist()
    layout = rng.integers(4)
    if layout == 0:
        return targets.astype(kind)
    if layout == 1:
        base = np.full((batch, 2 * columns + 1), 99, kind)
        view = base[:, 1::2]
    elif layout == 2:
        view = np.full((columns, batch), 99, kind).T
    else:
        view = np.full((batch + 2, columns), 99, kind)[1:-1][::-1]
    view[...] = targets
    return view


def logits_laid_out(rng: np.random.Generator, logits: Array) -> Array:
    """The same logits in some memory layout."""
    batch, frames, classes = logits.shape
    base, view = [
        lambda: ((batch, frames, classes), lambda x: x),
        lambda: ((frames, batch, classes), lambda x: x.transpose(1, 0, 2)),
        lambda: ((classes, batch, frames), lambda x: np.moveaxis(x, 0, -1)),
        lambda: ((batch, frames, 3 * classes), lambda x: x[..., 1::3]),
        lambda: ((batch, 2 * frames, classes + 5), lambda x: x[:, ::2, 2:-3]),
        lambda: ((batch, frames, classes), lambda x: x[::-1, ::-1, ::-1]),
    ][rng.integers(6)]()
    array = view(np.full(base, 7, logits.dtype))
    array[...] = logits
    return array


def some_counts(rng: np.random.Generator, classes: int) -> Any:
    """Counts of all magnitudes, of any type; not all of them 0."""
    kind = rng.integers(6)
    counts = np.exp(rng.normal(0.0, rng.choice([0.5, 3.0, 30.0]), classes))
    counts[rng.random(classes) < rng.choice([0.0, 0.4, 0.95])] = 0.0
    if kind == 0:
        counts *= rng.choice([5e-324, 1e-310, 1e-280, 1.0], classes) * rng.choice([1.0, 1e-30])
    elif kind == 1:
        counts = np.minimum(counts, 1e5) * rng.choice([1.0, 1e-300, 1e300], classes)
    elif kind == 2:
        counts = np.minimum(counts * 1000.0, 1e18).astype(rng.choice(["int64", "uint64"]))
    elif kind == 3:
        counts = np.clip(counts, 1e-3, 1e4).astype(numpy_dtype(str(rng.choice(FLOATS))))
    elif kind == 4:
        return [int(min(count, 1e9)) for count in counts] if (counts >= 1).any() else [1] * classes
    if not (counts > 0).any():
        counts[rng.integers(classes)] = 3
    return counts[::-1] if rng.random() < 0.2 else counts


def some_logits(rng: np.random.Generator, batch: int, classes: int) -> tuple[Array, Array]:
    """CTC logits with something else in the padding, and lengths."""
    most = int(rng.integers(1, 5))
    frames = rng.integers(1, most + 1, batch)
    logits = rng.normal(0.0, rng.choice([0.3, 2.0, 20.0]), (batch, most, classes)) + rng.choice([0.0, 500.0])
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.1, 0.9])] = rng.choice([np.nan, -np.inf])
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.0, 0.02])] = rng.choice([np.inf, 3e38, -3e38])
    if rng.random() < 0.2:  # frames that tell nothing
        logits[:, 0] = rng.choice([np.nan, -np.inf])
    for b in range(batch):
        logits[b, frames[b] :] = rng.choice([np.nan, np.inf, 0.0])
    with np.errstate(over="ignore"):
        return logits_laid_out(rng, logits.astype(numpy_dtype(str(rng.choice(FLOATS))))), frames


def some_case(rng: np.random.Generator, classes: int) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Arguments of `sample_classes`."""
    batch, columns = int(rng.integers(1, 5)), int(rng.integers(0, 7))
    labels = rng.integers(0, columns + 1, batch)
    some = rng.integers(0, classes, 1 + int(rng.integers(0, 4)))  # so that labels repeat
    targets = rng.choice(some, (batch, columns))
    targets[np.arange(columns) >= labels[:, None]] = rng.choice([-1, classes, 2**31 - 1, 0])
    proposal = str(rng.choice(PROPOSALS))
    options: dict[str, Any] = {
        "vocab_size": classes, "num_samples": int(rng.choice([0, 1, 2, 7, classes // 4, classes // 2, classes])),
        "proposal": proposal, "scope": str(rng.choice(SCOPES)), "blank": int(rng.integers(-classes, classes)),
        "correction": bool(rng.integers(2)), "seed": int(rng.integers(-(2**63), 2**63)), "step": int(rng.integers(0, 2**40)),
    }  # fmt: skip
    if proposal == "unigram":
        options["counts"] = some_counts(rng, classes)
    if proposal == "ctc":
        options["ctc_logits"], options["ctc_lengths"] = some_logits(rng, batch, classes)
    return (targets_laid_out(rng, targets), labels.tolist() if rng.random() < 0.3 else labels), options


def expect_those_of_the_reference(arguments: Any, options: dict[str, Any]) -> Array:
    """Raise unless classes and probabilities are those of the reference; returns the probabilities of all classes."""
    found = tl.sample_classes(*arguments, **options)
    ids, probability = reference.sample_classes(*arguments, **options)
    assert found.ids.dtype == np.int32
    assert found.probability.dtype == np.float32
    assert (found.vocab_size, found.blank) == (options["vocab_size"], options["blank"] % options["vocab_size"])
    assert found.correction is options["correction"]
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(
        found.probability, np.take_along_axis(probability, ids, axis=-1).astype(np.float64).astype(np.float32)
    )
    assert (np.atleast_2d(probability).sum(axis=1) == found.slots).all()
    return np.atleast_2d(probability)


@pytest.mark.parametrize("part", range(4))
def test_picks_are_those_of_the_reference(part: int) -> None:
    rng = np.random.default_rng([1, part])
    fractional = certain = never = 0
    for _ in range(150):
        classes = int(rng.choice([1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 65, 100, 257]))
        probability = expect_those_of_the_reference(*some_case(rng, classes)).astype(np.float64)
        fractional += bool(((probability > 0) & (probability < 1)).any())
        certain += bool(((probability > 0) & (probability < 1)).any() and (np.unique(probability) > 0).sum() > 2)
        never += bool((probability == 0).any())
    assert fractional >= 50
    assert certain >= 25
    assert never >= 10


def test_picks_of_many_classes_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(2)
    for classes in (1000, 1023, 1024, 1025, 2047, 2048, 2500, 3000):
        expect_those_of_the_reference(*some_case(rng, classes))


def test_logits_of_nothing_and_counts_of_next_to_nothing() -> None:
    common: dict[str, Any] = {"vocab_size": 9, "num_samples": 3, "blank": 0, "correction": False}
    for logits in (np.nan, -np.inf, np.inf):
        options = {**common, "proposal": "ctc", "ctc_logits": np.full((1, 2, 9), logits, np.float32), "ctc_lengths": [2]}
        uniform = expect_those_of_the_reference(([[4]], [1]), options)[0]
        assert uniform.tolist() == [1, *[Fraction(3, 7)] * 3, 1, *[Fraction(3, 7)] * 4]
    # A count that is very small beside the largest, or by itself, is still one.
    for count in ([1e300, 1.0, 0, 0, 5e-324, 0, 0, 0, 0], [5e-324, 1e-323, 0, 0, 1e-310, 0, 0, 0, 0]):
        options = {**common, "proposal": "unigram", "counts": count, "num_samples": 1}
        probability = expect_those_of_the_reference(([[]], [0]), options)[0]
        assert [v for v, p in enumerate(probability) if p > 0] == [0, 1, 4]


# ---- in how many pieces


def everything(proposal: str, rng: np.random.Generator, batch: int = 16, classes: int = 2000) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {
        "vocab_size": classes, "num_samples": 40, "proposal": proposal, "blank": 0, "correction": True, "seed": 5, "step": 6,
        "counts": rng.random(classes) if proposal == "unigram" else None,
        "ctc_logits": rng.normal(0.0, 2.0, (batch, 4, classes)).astype(np.float32) if proposal == "ctc" else None,
        "ctc_lengths": rng.integers(1, 5, batch) if proposal == "ctc" else None,
    }  # fmt: skip
    return (rng.integers(0, classes, (batch, 3)), rng.integers(0, 4, batch)), options


@every_scope
@every_proposal
def test_threads_change_nothing(proposal: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[int] = []
    run = Host.run
    monkeypatch.setattr(Host, "run", lambda self, work: (tasks.append(len(work)), run(self, work)))
    arguments, options = everything(proposal, np.random.default_rng(3))
    first = sampling.draw(*arguments, **options, scope=scope, validate=True, threads=1)
    assert not tasks
    for threads in (2, 3, 7):
        found = sampling.draw(*arguments, **options, scope=scope, validate=False, threads=threads)
        np.testing.assert_array_equal(found.ids, first.ids)
        np.testing.assert_array_equal(found.probability, first.probability)
    assert bool(tasks) == (scope == "utterance" or proposal == "ctc")  # there is one block in the others


@every_proposal
def test_utterances_at_once_change_nothing(proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options = everything(proposal, np.random.default_rng(4), classes=300)
    together = tl.sample_classes(*arguments, **options, scope="utterance")
    for at_once in (1, 2, 5, 15):
        monkeypatch.setattr(sampling, "_SCRATCH", at_once * 9 * 300)
        monkeypatch.setattr(sampling, "_PART", 100 // at_once)
        found = tl.sample_classes(*arguments, **options, scope="utterance")
        np.testing.assert_array_equal(found.ids, together.ids)
        np.testing.assert_array_equal(found.probability, together.probability)


@every_proposal
def test_scope_of_one_utterance_is_that_of_the_batch(proposal: str) -> None:
    arguments, options = everything(proposal, np.random.default_rng(5), batch=1, classes=50)
    one, other = (tl.sample_classes(*arguments, **options, scope=scope) for scope in SCOPES)
    assert (one.per_utterance, other.per_utterance) == (False, True)
    np.testing.assert_array_equal(one.ids, other.ids[0])
    np.testing.assert_array_equal(one.probability, other.probability[0])


def test_padding_is_never_read() -> None:
    arguments, options = everything("ctc", np.random.default_rng(6), classes=60)
    targets, labels = arguments
    logits, frames = options["ctc_logits"], options["ctc_lengths"]
    clean = tl.sample_classes(targets, labels, **options, scope="utterance")
    dirty = targets.copy()
    dirty[np.arange(3) >= labels[:, None]] = -(2**62)
    for b in range(16):
        logits[b, frames[b] :] = np.inf
    found = tl.sample_classes(dirty, labels, **options, scope="utterance")
    np.testing.assert_array_equal(found.ids, clean.ids)
    np.testing.assert_array_equal(found.probability, clean.probability)


def test_arguments_are_left_as_they_are() -> None:
    for proposal in PROPOSALS:
        arguments, options = everything(proposal, np.random.default_rng(7), classes=60)
        given = [array for array in (*arguments, *options.values()) if isinstance(array, np.ndarray)]
        before = [array.copy() for array in given]
        for array in given:
            array.flags.writeable = False
        tl.sample_classes(*arguments, **options)
        for array, same in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, same)


# ---- numbers of classes


@every_proposal
def test_slots_depend_on_shapes_alone(proposal: str) -> None:
    rng = np.random.default_rng(8)
    for batch, columns, classes, samples in ((3, 4, 200, 9), (3, 0, 200, 9), (2, 5, 12, 0), (2, 5, 11, 0), (4, 9, 6, 2), (1, 1, 1, 0)):
        for fill in ("same", "distinct", "blank", "empty"):
            targets = np.zeros((batch, columns), int)
            if fill == "same":
                targets[...] = classes - 1
            elif fill == "distinct":
                targets[...] = np.arange(batch * columns).reshape(batch, columns) % classes
            lengths = np.full(batch, 0 if fill == "empty" else columns)
            _, options = everything(proposal, rng, batch, classes)
            options["num_samples"] = samples
            for scope in SCOPES:
                found = tl.sample_classes(targets, lengths, **options, scope=scope)
                labels = columns if scope == "utterance" else batch * columns
                slots = min(classes, 1 + min(labels, classes - 1) + samples)
                assert found.slots == slots
                assert found.ids.shape == found.probability.shape == ((batch, slots) if scope == "utterance" else (slots,))
                for row in np.atleast_2d(found.ids):
                    assert len(set(row.tolist())) == slots


@every_scope
@every_proposal
def test_as_many_samples_as_classes_take_all_for_certain(proposal: str, scope: str) -> None:
    arguments, options = everything(proposal, np.random.default_rng(9), classes=70)
    for samples in (66, 70, 10_000, 2**70):
        found = tl.sample_classes(*arguments, **{**options, "num_samples": samples, "blank": 30}, scope=scope)
        everyone = [30, *(v for v in range(70) if v != 30)]
        assert found.ids.tolist() == ([everyone] * 16 if scope == "utterance" else everyone)
        assert (found.probability == 1.0).all()


@every_proposal
def test_no_samples_leave_the_labels(proposal: str) -> None:
    _, options = everything(proposal, np.random.default_rng(10), batch=2)
    options |= {"num_samples": 0, "blank": -2000}
    targets = np.array([[7, 3, 1500], [4, 9, 2]])
    found = tl.sample_classes(targets, [3, 3], **options)
    assert found.ids.tolist() == [0, 2, 3, 4, 7, 9, 1500]
    assert (found.probability == 1.0).all()
    found = tl.sample_classes(targets, [3, 2], **options, scope="utterance")
    assert found.ids[0].tolist() == [0, 3, 7, 1500]
    assert {0, 4, 9} < set(found.ids[1].tolist())  # the slot that a label leaves empty is a negative's
    assert (found.probability[1] < 1.0).sum() == 1


@every_scope
@every_proposal
def test_one_class(proposal: str, scope: str) -> None:
    _, options = everything(proposal, np.random.default_rng(11), batch=2, classes=1)
    for targets, lengths in (([[0, 0], [0, 0]], [2, 1]), ([[], []], [0, 0])):
        found = tl.sample_classes(targets, lengths, **{**options, "blank": -1}, scope=scope)
        assert found.ids.tolist() == ([[0], [0]] if scope == "utterance" else [0])
        assert found.probability.tolist() == ([[1.0], [1.0]] if scope == "utterance" else [1.0])


# ---- seeds


def test_rows_seeds_and_steps_have_draws_of_their_own() -> None:
    def rows(**options: Any) -> list[tuple[int, ...]]:
        found = tl.sample_classes([[1]] * 6, [1] * 6, vocab_size=500, num_samples=20, scope="utterance", **options)
        return [tuple(row) for row in found.ids.tolist()]

    numbers = (0, 1, 2, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 2, -1, -(2**32), -(2**61))
    every = [row for number in numbers for row in rows(seed=number)]
    every += [row for number in numbers[1:] for row in rows(step=number)]
    every += rows(seed=1, step=1) + rows(seed=2, step=1) + rows(seed=1, step=2)
    assert len(set(every)) == len(every)
    for options in ({"seed": -(2**40), "step": 3}, {"seed": 7, "step": -9}, {"seed": np.int64(-5), "step": np.uint8(200)}):
        assert rows(**options) == rows(**{name: int(number) for name, number in options.items()})
    assert rows(seed=2**64 + 7, step=10**30) == rows(seed=7, step=10**30 % 2**63)


# ---- large vocabularies and memory


def peak(call: Any) -> tuple[tl.Classes, int]:
    """What a call returns, and the most memory that it took beyond this."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return result, tracemalloc.get_traced_memory()[1] - before - result.ids.nbytes - result.probability.nbytes
    finally:
        tracemalloc.stop()


MILLION = 1_000_000


@pytest.mark.parametrize("proposal", ["uniform", "unigram"])
def test_a_million_classes(proposal: str) -> None:
    rng = np.random.default_rng(12)
    targets, lengths = rng.integers(0, MILLION, (64, 20)), rng.integers(0, 21, 64)
    options = {"vocab_size": MILLION, "num_samples": 100, "proposal": proposal, "blank": MILLION - 1, "correction": True,
               "counts": rng.random(MILLION) if proposal == "unigram" else None}  # fmt: skip
    kept = [{MILLION - 1, *row[:length].tolist()} for row, length in zip(targets, lengths, strict=True)]
    begun = time.process_time()
    batch, most = peak(lambda: tl.sample_classes(targets, lengths, **options))
    assert time.process_time() - begun < 1.0
    assert set().union(*kept) <= set(batch.ids.tolist())
    each, most_each = peak(lambda: tl.sample_classes(targets, lengths, **options, scope="utterance"))
    for row, own in zip(each.ids, kept, strict=True):
        assert own <= set(row.tolist())
        assert len(set(row.tolist())) == 1 + 20 + 100
    assert len({tuple(row) for row in each.ids.tolist()}) == 64
    for bytes_of in (most, most_each):
        assert bytes_of < (1 if proposal == "uniform" else 9) * MILLION + 300_000


@pytest.mark.parametrize("layout", ["dense", "strided", "classes first"])
@every_scope
def test_ctc_logits_are_not_copied(scope: str, layout: str) -> None:
    batch, frames, classes = 6, 40, 8000
    rng = np.random.default_rng(13)
    base: Array = rng.normal(0.0, 1.0, {"dense": (batch, frames, classes), "strided": (batch, frames, 2 * classes),
                                        "classes first": (classes, batch, frames)}[layout]).astype(np.float16)  # fmt: skip
    logits = {"dense": lambda: base, "strided": lambda: base[..., ::2], "classes first": lambda: np.moveaxis(base, 0, -1)}[layout]()
    assert logits.shape == (batch, frames, classes)
    found, most = peak(lambda: tl.sample_classes(
        rng.integers(0, classes, (batch, 5)), [5] * batch, vocab_size=classes, num_samples=50, proposal="ctc", scope=scope,
        ctc_logits=logits, ctc_lengths=[frames] * batch,
    ))  # fmt: skip
    assert found.slots == 1 + 5 * (batch if scope == "batch" else 1) + 50
    assert most < 9 * classes * (batch if scope == "utterance" else 1) + 12 * batch * frames + 100_000
    assert logits.size * 2 > 5 * most


# ---- bad arguments


GOOD: dict[str, Any] = {"targets": [[1, 2], [3, 0]], "target_lengths": [2, 1], "vocab_size": 7, "num_samples": 2}
UNIGRAM: dict[str, Any] = {"proposal": "unigram", "counts": [1.0] * 7}
CTC: dict[str, Any] = {"proposal": "ctc", "ctc_logits": np.zeros((2, 3, 7)), "ctc_lengths": [3, 1]}
Bad = tuple[dict[str, Any], str, type[Exception], str]

# Arguments, the name of the bad one, and what the error says after it.
BAD: list[Bad] = [
    ({"num_samples": -1}, "num_samples", ValueError, "expected 0 or more, got -1"),
    ({"num_samples": True}, "num_samples", TypeError, "expected an int, got bool"),
    ({"num_samples": 2.0}, "num_samples", TypeError, "expected an int, got float"),
    ({"num_samples": None}, "num_samples", TypeError, "expected an int, got NoneType"),
    ({"vocab_size": 2**22 + 1}, "vocab_size", ValueError, "expected at most 4194304 classes to draw from, got 4194305"),
    ({"vocab_size": 0}, "vocab_size", ValueError, "expected 1 or more, got 0"),
    ({"vocab_size": 7.0}, "vocab_size", TypeError, "expected an int, got float"),
    ({"vocab_size": True}, "vocab_size", TypeError, "expected an int, got bool"),
    ({"counts": [1.0] * 7}, "counts", ValueError, "expected None with proposal='uniform', got list"),
    ({**CTC, "counts": [1.0] * 7}, "counts", ValueError, "expected None with proposal='ctc', got list"),
    ({**UNIGRAM, "counts": None}, "counts", ValueError, "expected an array with proposal='unigram', got NoneType"),
    ({**UNIGRAM, "counts": [1.0] * 6}, "counts", ValueError, r"expected shape \(V,\) = \(7,\), got \(6,\)"),
    ({**UNIGRAM, "counts": np.ones((1, 7))}, "counts", ValueError, r"expected shape \(V,\) = \(7,\), got \(1, 7\)"),
    ({**UNIGRAM, "counts": [[1, 2], [3]]}, "counts", ValueError, r"expected numbers of shape \(V,\), got \[\[1, 2\], \[3\]\]"),
    ({**UNIGRAM, "counts": [1, 2, math.nan, 1, 1, 1, 1]}, "counts", ValueError, "expected finite numbers .*, got nan at index 2"),
    ({**UNIGRAM, "counts": [1, math.inf, 1, 1, 1, 1, 1]}, "counts", ValueError, "expected finite numbers .*, got inf at index 1"),
    ({**UNIGRAM, "counts": [1, 1, 1, 1, 1, 1, -2]}, "counts", ValueError, "expected finite numbers .*, got -2.0 at index 6"),
    ({**UNIGRAM, "counts": [0] * 7}, "counts", ValueError, "expected some above 0, got none"),
    ({**UNIGRAM, "counts": [-0.0] * 7}, "counts", ValueError, "expected some above 0, got none"),
    ({**UNIGRAM, "counts": ["a"] * 7}, "counts", TypeError, "expected numbers, got dtype str"),
    ({**UNIGRAM, "counts": [True] * 7}, "counts", TypeError, "expected numbers, got dtype bool"),
    ({**UNIGRAM, "counts": [2**70] * 7}, "counts", TypeError, "expected numbers, got dtype object"),
    ({**UNIGRAM, "counts": np.ones(7, complex)}, "counts", TypeError, "expected numbers, got dtype complex128"),
    ({**UNIGRAM, "counts": np.ones(7, "V8")}, "counts", TypeError, "expected numbers, got dtype void64"),
    ({**UNIGRAM, "counts": np.ones(7, ">f8")}, "counts", TypeError, "expected native byte order, got dtype '>f8'"),
    ({**UNIGRAM, "counts": 3.0}, "counts", TypeError, "expected an array with __dlpack__, got float"),
    ({**UNIGRAM, "ctc_logits": CTC["ctc_logits"]}, "ctc_logits", ValueError, "expected None with proposal='unigram', got ndarray"),
    ({**CTC, "ctc_logits": None}, "ctc_logits", ValueError, "expected an array with proposal='ctc', got NoneType"),
    ({**CTC, "ctc_logits": np.zeros((2, 3, 6))}, "ctc_logits", ValueError, r"expected shape .* = \(2, 3, 7\), got \(2, 3, 6\)"),
    ({**CTC, "ctc_logits": np.zeros((3, 3, 7))}, "ctc_logits", ValueError, r"expected shape .* = \(2, 3, 7\), got \(3, 3, 7\)"),
    ({**CTC, "ctc_logits": np.zeros((2, 7))}, "ctc_logits", ValueError, r"expected 3 dimensions .*, got shape \(2, 7\)"),
    ({**CTC, "ctc_logits": np.zeros((2, 0, 7))}, "ctc_logits", ValueError, r"expected at least one .*, got shape \(2, 0, 7\)"),
    ({**CTC, "ctc_logits": np.zeros((2, 3, 7), int)}, "ctc_logits", TypeError, "expected dtype float16, .*, got int64"),
    ({**CTC, "ctc_logits": [[[0.0] * 7] * 3] * 2}, "ctc_logits", TypeError, "expected an array with __dlpack__, got list"),
    ({**CTC, "ctc_lengths": None}, "ctc_lengths", ValueError, "expected an array with proposal='ctc', got NoneType"),
    ({"ctc_lengths": [3, 1]}, "ctc_lengths", ValueError, "expected None with proposal='uniform', got list"),
    ({**CTC, "ctc_lengths": [4, 1]}, "ctc_lengths", ValueError, r"expected lengths in \[1, T = 3\], got 4 at index 0"),
    ({**CTC, "ctc_lengths": [3, 0]}, "ctc_lengths", ValueError, r"expected lengths in \[1, T = 3\], got 0 at index 1"),
    ({**CTC, "ctc_lengths": [3]}, "ctc_lengths", ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ({**CTC, "ctc_lengths": [3.0, 1.0]}, "ctc_lengths", TypeError, "expected integers, got dtype float64"),
    ({"targets": [[1, 7], [3, 0]]}, "targets", ValueError, r"expected labels in \[0, V = 7\), got 7 at index \(0, 1\)"),
    ({"targets": [[1, 2], [-1, 0]]}, "targets", ValueError, r"expected labels in \[0, V = 7\), got -1 at index \(1, 0\)"),
    ({"targets": [[1, 2], [3]]}, "targets", ValueError, r"expected integers, in rows of one length, got \[\[1, 2\], \[3\]\]"),
    ({"targets": [1, 2]}, "targets", ValueError, r"expected shape \(B, U\) of at least one utterance, got \(2,\)"),
    ({"targets": []}, "targets", ValueError, r"expected shape \(B, U\) of at least one utterance, got \(0,\)"),
    ({"targets": [[1.0, 2.0], [3.0, 0.0]]}, "targets", TypeError, "expected integers, got dtype float64"),
    ({"targets": None}, "targets", TypeError, "expected an array with __dlpack__, got NoneType"),
    ({"target_lengths": [3, 1]}, "target_lengths", ValueError, r"expected lengths in \[0, U = 2\], got 3 at index 0"),
    ({"target_lengths": [2, -1]}, "target_lengths", ValueError, r"expected lengths in \[0, U = 2\], got -1 at index 1"),
    ({"target_lengths": [2]}, "target_lengths", ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ({"target_lengths": [True, True]}, "target_lengths", TypeError, "expected integers, got dtype bool"),
    ({"proposal": "zipf"}, "proposal", ValueError, "expected one of 'uniform', 'unigram', 'ctc', got 'zipf'"),
    ({"proposal": None}, "proposal", ValueError, "expected one of 'uniform', 'unigram', 'ctc', got None"),
    ({"scope": "frame"}, "scope", ValueError, "expected one of 'batch', 'utterance', got 'frame'"),
    ({"scope": 0}, "scope", ValueError, "expected one of 'batch', 'utterance', got 0"),
    ({"blank": 7}, "blank", ValueError, r"expected a class in \[-7, 7\), got 7"),
    ({"blank": -8}, "blank", ValueError, r"expected a class in \[-7, 7\), got -8"),
    ({"blank": False}, "blank", TypeError, "expected an int, got bool"),
    ({"seed": 0.5}, "seed", TypeError, "expected an int, got float"),
    ({"seed": None}, "seed", TypeError, "expected an int, got NoneType"),
    ({"step": True}, "step", TypeError, "expected an int, got bool"),
    ({"step": "1"}, "step", TypeError, "expected an int, got str"),
]


@pytest.mark.parametrize(("change", "name", "kind", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^{name}: {message}"):
        tl.sample_classes(**{**GOOD, **change})


def test_the_good_arguments_are_good() -> None:
    for change in ({}, UNIGRAM, CTC):
        assert tl.sample_classes(**{**GOOD, **change}).slots == 7


# ---- classes of one's own


def test_classes_from_ids() -> None:
    ids = np.array([[5, 2, 9, 0], [2, 8, 7, 1]])
    probability = np.array([[0.5, 1.0, 0.25, 0.125], [1.0, 0.75, 2.0**-20, 0.5]])
    for given in (ids, ids.tolist(), ids.astype(np.uint8), ids[:, ::-1][:, ::-1], np.asfortranarray(ids.astype(np.int32))):
        found = tl.Classes.from_ids(given, 10, blank=-8, probability=probability)
        assert found.ids.tolist() == [[2, 0, 5, 9], [2, 1, 7, 8]]
        assert found.probability.tolist() == [[1.0, 0.125, 0.5, 0.25], [1.0, 0.5, 2.0**-20, 0.75]]
        assert (found.ids.dtype, found.probability.dtype) == (np.int32, np.float32)
        assert (found.vocab_size, found.blank, found.correction) == (10, 2, True)
        assert (found.slots, found.per_utterance) == (4, True)
    found = tl.Classes.from_ids([9, 4, 0], 10, blank=9)
    assert found.ids.tolist() == [9, 0, 4]
    assert found.probability.tolist() == [1.0, 1.0, 1.0]
    assert (found.slots, found.per_utterance, found.correction) == (3, False, False)
    for dtype in FLOATS:
        shares = np.array([0.25, 1.0], numpy_dtype(dtype))
        assert tl.Classes.from_ids([3, 0], 4, probability=shares).probability.tolist() == [1.0, 0.25]


def test_from_ids_leaves_its_arguments_alone() -> None:
    ids, probability = np.array([0, 1], np.int32), np.array([0.5, 1.0], np.float32)
    found = tl.Classes.from_ids(ids, 3, probability=probability)
    ids[1], probability[0] = 2, 0.125
    assert found.ids.tolist() == [0, 1]
    assert found.probability.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("change", "name", "kind", "message"), [
    ({"ids": [0, 3, 3]}, "ids", ValueError, "expected distinct classes, got 3 twice"),
    ({"ids": [0, 3, 0]}, "ids", ValueError, "expected distinct classes, got 0 twice"),
    ({"ids": [[0, 3], [2, 2]], "blank": 2}, "ids", ValueError, r"expected the blank \(2\) among them"),
    ({"ids": [[0, 3, 1], [0, 2, 2]]}, "ids", ValueError, "expected distinct classes, got 2 twice"),
    ({"ids": [3, 4]}, "ids", ValueError, r"expected the blank \(0\) among them, got \[3, 4\]"),
    ({"ids": [[0, 3], [3, 4]]}, "ids", ValueError, r"expected the blank \(0\) among them, got \[\[0, 3\], \[3, 4\]\]"),
    ({"ids": [0, 5]}, "ids", ValueError, r"expected classes in \[0, V = 5\), got 5"),
    ({"ids": [0, -1]}, "ids", ValueError, r"expected classes in \[0, V = 5\), got -1"),
    ({"ids": np.array([0, 2**63 + 1], np.uint64)}, "ids", ValueError, r"expected classes in \[0, V = 5\), got 9223372036854775809"),
    ({"ids": []}, "ids", ValueError, r"expected shape \(K,\) or \(B, K\), got \(0,\)"),
    ({"ids": [[[0]]]}, "ids", ValueError, r"expected shape \(K,\) or \(B, K\), got \(1, 1, 1\)"),
    ({"ids": [[0, 1], [0]]}, "ids", ValueError, r"expected shape \(K,\) or \(B, K\), in rows of one length, got \[\[0, 1\], \[0\]\]"),
    ({"ids": [0.0, 1.0]}, "ids", TypeError, "expected integers, got dtype float64"),
    ({"ids": [False, True]}, "ids", TypeError, "expected integers, got dtype bool"),
    ({"ids": 0}, "ids", TypeError, "expected an array with __dlpack__, got int"),
    ({"blank": 5}, "blank", ValueError, r"expected a class in \[-5, 5\), got 5"),
    ({"vocab_size": 2**22 + 1}, "vocab_size", ValueError, "expected at most 4194304 classes to draw from, got 4194305"),
    ({"probability": [1.0, 0.0]}, "probability", ValueError, r"expected probabilities in \(0, 1\], got \[1.0, 0.0\]"),
    ({"probability": [1.0, -0.5]}, "probability", ValueError, r"expected probabilities in \(0, 1\], got \[1.0, -0.5\]"),
    ({"probability": [1.5, 1.0]}, "probability", ValueError, r"expected probabilities in \(0, 1\], got \[1.5, 1.0\]"),
    ({"probability": [1.0, math.nan]}, "probability", ValueError, r"expected probabilities in \(0, 1\], got \[1.0, nan\]"),
    ({"probability": [1.0]}, "probability", ValueError, r"expected shape \(2,\) as ids, got \(1,\)"),
    ({"probability": [[1.0, 1.0]]}, "probability", ValueError, r"expected shape \(2,\) as ids, got \(1, 2\)"),
    ({"probability": [1, 1]}, "probability", TypeError, "expected floats, got dtype int64"),
    ({"probability": np.ones(2, "V4")}, "probability", TypeError, "expected floats, got dtype void32"),
    ({"probability": 0.5}, "probability", TypeError, "expected an array with __dlpack__, got float"),
])  # fmt: skip
def test_bad_ids_are_named(change: dict[str, Any], name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^{name}: {message}"):
        tl.Classes.from_ids(**{"ids": [0, 3], "vocab_size": 5, **change})
