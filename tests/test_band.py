"""Bands: `prune` against the reference, bands from alignments against the paths they allow, bands from k2's ranges."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Array, numpy_dtype
from test_reference import paths
from transducer_loss import reference
from transducer_loss.pruning import STRATEGIES

every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def ragged(rng: np.random.Generator, batch: int, T: int, U: int, topology: str) -> tuple[Array, Array]:
    """Lengths, mostly with a path, some of them 1 and 0."""
    frames, labels = rng.integers(1, T + 1, batch), rng.integers(0, U + 1, batch)
    if topology != "regular" and rng.random() < 0.8:
        labels = np.minimum(labels, frames)
    return frames, labels


def posteriors(
    rng: np.random.Generator, frames: Array, labels: Array, topology: str, scale: float, dtype: str = "float64"
) -> tl.Occupancy:
    """Of random lattices, padded by more than they need."""
    shape = len(frames), int(frames.max()) + int(rng.integers(0, 2)), int(labels.max()) + 1 + int(rng.integers(0, 2))
    logits, targets = rng.normal(0, scale, (*shape, 4)), rng.integers(0, 4, (shape[0], shape[2] - 1))
    found = tl.occupancy(logits, targets, frames, labels, topology=topology)
    return tl.Occupancy(*(array.astype(numpy_dtype(dtype)) for array in (found.blank, found.label)), found.loss)


def short_of_digits(of: tl.Occupancy, digits: int) -> tl.Occupancy:
    """Probabilities of so few digits that sums of them are exact in any order: then equal scores are equal."""
    blank, label = (np.rint(array * 2.0**digits) / 2.0**digits for array in (of.blank, of.label))
    return tl.Occupancy(blank, label, of.loss)


def of_no_lattice(rng: np.random.Generator, frames: Array, labels: Array) -> tl.Occupancy:
    """Numbers whose best places in the rows jump about, as those of a lattice rarely do."""
    blank, label = rng.random((2, len(frames), int(frames.max()), int(labels.max()) + 1)) ** rng.choice([1, 6])
    return tl.Occupancy(blank, label, np.zeros(len(frames)))


def masses(of: tl.Occupancy, band: tl.Band, topology: str) -> Array:
    """What a band keeps of each utterance."""
    return np.array([
        reference.kept_mass(of.blank[b, :T, : U + 1], of.label[b, :T, : U + 1], band.first[b, :T], band.end[b, :T], topology=topology)
        for b, (T, U) in enumerate(zip(band.frames, band.labels, strict=True))
    ])  # fmt: skip


def expect_whole(band: tl.Band, frames: Array, labels: Array, s_range: int) -> None:
    """Raise unless a band is made of what it says it is."""
    assert band.first.dtype == band.end.dtype == np.int32
    assert band.s_range == s_range
    np.testing.assert_array_equal(band.frames, frames)
    np.testing.assert_array_equal(band.labels, labels)
    np.testing.assert_array_equal(band.end, np.minimum(band.first + band.width, labels[:, None] + 1))
    assert (band.mass >= 0).all()
    assert (band.mass <= 1).all()


@every_strategy
@every_topology
def test_prune_is_that_of_the_reference(topology: str, strategy: str) -> None:
    rng = np.random.default_rng([TOPOLOGIES.index(topology), STRATEGIES.index(strategy)])
    narrow = raised = other = 0
    for case in range(200):
        frames, labels = ragged(rng, 3, 11, 7, topology)
        of = posteriors(rng, frames, labels, topology, float(rng.choice([0.3, 2.0, 8.0])))
        of = of_no_lattice(rng, frames, labels) if case % 3 == 0 else of
        of = short_of_digits(of, int(rng.choice([3, 12, 40])))
        s_range = int(rng.choice([1, 1, 2, 3, 4, 6, 9]))
        first, width, mass = reference.prune(of.blank, of.label, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
        band = tl.prune(of, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
        expect_whole(band, frames, labels, s_range)
        assert band.width == width
        np.testing.assert_allclose(band.mass, mass, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(band.mass, np.minimum(masses(of, band, topology), 1.0), rtol=1e-12, atol=1e-15)
        same = (band.first == first).all(axis=1)
        if strategy == "local":
            assert same.all(), case
        else:
            # Of two bands that keep the same but for rounding either may be the better one.
            local = tl.prune(of, frames, labels, s_range=s_range, topology=topology)
            tied = np.isclose(local.mass, mass, rtol=1e-12, atol=0) & (band.first == local.first).all(axis=1)
            assert (same | tied).all(), case
            other += int((band.first != local.first).any())
        narrow += int((width <= labels).any())
        raised += int(width > s_range)
    assert narrow > 60
    assert raised > 10
    assert other > 3 or strategy == "local"


@every_strategy
@every_topology
def test_prune_of_occupancies_as_they_come(topology: str, strategy: str) -> None:
    # Scores that differ by their rounding may be taken for equal, which happens where nothing is: rarely.
    rng = np.random.default_rng([10, TOPOLOGIES.index(topology), STRATEGIES.index(strategy)])
    same = count = 0
    for _ in range(40):
        frames, labels = ragged(rng, 4, 12, 8, topology)
        of = posteriors(rng, frames, labels, topology, float(rng.choice([0.3, 2.0])))
        s_range = int(rng.integers(1, 7))
        first, width, mass = reference.prune(of.blank, of.label, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
        band = tl.prune(of, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
        expect_whole(band, frames, labels, s_range)
        assert band.width == width
        np.testing.assert_allclose(band.mass, masses(of, band, topology), rtol=1e-11, atol=1e-14)
        agree = (band.first == first).all(axis=1)
        np.testing.assert_allclose(band.mass[agree], mass[agree], rtol=1e-11, atol=1e-14)
        same, count = same + agree.sum(), count + len(agree)
    assert same >= 0.97 * count


@pytest.mark.parametrize("dtype", FLOATS)
@every_strategy
@every_topology
def test_prune_in_every_dtype(topology: str, strategy: str, dtype: str) -> None:
    rng = np.random.default_rng(20)
    for _ in range(8):
        frames, labels = ragged(rng, 5, 12, 7, topology)
        wide = short_of_digits(posteriors(rng, frames, labels, topology, 2.0), 7)
        of = tl.Occupancy(*(array.astype(numpy_dtype(dtype)) for array in (wide.blank, wide.label)), wide.loss)
        one, other = (tl.prune(each, frames, labels, s_range=3, strategy=strategy, topology=topology) for each in (wide, of))
        assert other.mass.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(other.mass, one.mass, rtol=1e-5, atol=1e-30)
        tied = np.isclose(other.mass, one.mass, rtol=1e-5, atol=1e-30) & (strategy == "optimal")
        assert ((one.first == other.first).all(axis=1) | tied).all()


@every_topology
def test_optimal_keeps_at_least_what_local_keeps(topology: str) -> None:
    rng = np.random.default_rng(30)
    better = 0
    for T, U, scale, s_range in ((16, 8, 0.5, 2), (30, 12, 2.0, 3), (40, 8, 3.0, 3), (60, 10, 1.0, 4)):
        frames, labels = rng.integers(T // 2, T + 1, 250), rng.integers(0, U + 1, 250)
        of = posteriors(rng, frames, labels, topology, scale)
        local, optimal = (tl.prune(of, frames, labels, s_range=s_range, strategy=name, topology=topology) for name in STRATEGIES)
        assert local.width == optimal.width
        assert (optimal.mass >= local.mass).all()
        better += int((optimal.mass > local.mass).sum())
        # Both obey the same constraints.
        limit = local.width - 1 if topology == "regular" else 1
        for band in (local, optimal):
            step = np.diff(band.first, axis=1)
            assert (step >= 0).all()
            assert (step <= limit).all()
            assert (band.first[:, 0] == 0).all()
            np.testing.assert_array_equal(band.first[:, -1], np.maximum(labels - band.width + 1, 0))
            assert (band.mass > 0).all()
    assert better > 5


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.1)], ids=str)
@every_strategy
@every_topology
def test_mass_is_what_the_loss_loses(topology: str, strategy: str, scales: tuple[float, float]) -> None:
    rng = np.random.default_rng([40, TOPOLOGIES.index(topology)])
    lm_only, am_only = scales
    some = 0
    for s_range in (1, 2, 3, 5):
        frames, labels = ragged(rng, 12, 14, 7, "regular")
        labels = np.minimum(labels, frames)
        B, T, U, V = 12, int(frames.max()), int(labels.max()), 6
        am, lm, targets = rng.normal(0, 2, (B, T, V)), rng.normal(0, 2, (B, U + 1, V)), rng.integers(0, V, (B, U))
        loss, _, occupancy = tl.simple_rnnt_loss(
            am, lm, targets, frames, labels, lm_only_scale=lm_only, am_only_scale=am_only, topology=topology
        )
        band = tl.prune(occupancy, frames, labels, s_range=s_range, strategy=strategy, topology=topology)

        def log_softmax(x: Array) -> Array:
            return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)

        # The joiner's log-probabilities, cell by cell.
        alone = log_softmax(lm)
        real = (np.arange(U + 1) <= labels[:, None])[..., None]
        unigram = np.log(np.where(real, np.exp(alone), 0.0).sum(1, keepdims=True) / (labels + 1)[:, None, None])
        logp = (1 - lm_only - am_only) * log_softmax(am[:, :, None] + lm[:, None]) + lm_only * alone[:, None]
        logp += am_only * log_softmax(am + unigram)[:, :, None]
        whole, _ = tl.rnnt_loss(logp, targets, frames, labels, normalized=True, topology=topology)
        np.testing.assert_allclose(whole, loss, rtol=1e-12)
        columns = np.minimum(band.to_ranges(), U)
        inside, _ = tl.rnnt_loss(
            np.take_along_axis(logp, columns[..., None], axis=2), targets, frames, labels, normalized=True, topology=topology, band=band
        )
        np.testing.assert_allclose(band.mass, np.exp(whole - inside), rtol=1e-10, atol=1e-13)
        some += int(((band.mass > 0.01) & (band.mass < 0.99)).sum())
    assert some > 5


@every_strategy
@every_topology
def test_prune_never_reads_padding(topology: str, strategy: str) -> None:
    rng = np.random.default_rng(50)
    for s_range in (1, 3, 6):
        frames, labels = np.array([9, 5, 1, 7]), np.array([5, 1, 0, 5])
        of = posteriors(rng, frames, labels, topology, 2.0)
        real = (np.arange(of.blank.shape[1])[:, None] < frames[:, None, None]) & (
            np.arange(of.blank.shape[2]) <= labels[:, None, None]
        )
        expected = tl.prune(of, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
        for value in (math.nan, math.inf, 1e30):
            dirty = tl.Occupancy(*(np.where(real, array, value) for array in (of.blank, of.label)), of.loss)
            band = tl.prune(dirty, frames, labels, s_range=s_range, strategy=strategy, topology=topology)
            np.testing.assert_array_equal(band.first, expected.first)
            np.testing.assert_array_equal(band.mass, expected.mass)


@every_strategy
def test_width_is_raised_where_no_path_would_fit(strategy: str) -> None:
    # (topology, T, U, s_range) -> S.
    cases = [
        ("regular", 4, 7, 1, 3), ("regular", 1, 5, 2, 6), ("regular", 8, 7, 1, 2), ("regular", 3, 0, 1, 1),
        ("modified", 5, 3, 1, 1), ("modified", 3, 3, 1, 2), ("modified", 4, 0, 1, 1),
        ("constrained", 5, 3, 1, 2), ("constrained", 4, 0, 1, 1), ("regular", 5, 3, 9, 4), ("modified", 5, 3, 4, 4),
    ]  # fmt: skip
    rng = np.random.default_rng(60)
    for topology, T, U, asked, width in cases:
        frames, labels = np.array([T]), np.array([U])
        of = posteriors(rng, frames, labels, topology, 1.0)
        band = tl.prune(of, [T], [U], s_range=asked, strategy=strategy, topology=topology)
        assert (band.width, band.s_range) == (width, asked)
        assert band.mass[0] > 0
        if width == U + 1:
            np.testing.assert_allclose(band.mass, 1.0, rtol=1e-12)
    # One utterance widens the band of all.
    of = posteriors(rng, np.array([6, 2]), np.array([4, 5]), "regular", 1.0)
    assert tl.prune(of, [6, 2], [4, 5], s_range=1, strategy=strategy).width == 4


@every_strategy
@every_topology
def test_utterances_without_a_loss_keep_nothing(topology: str, strategy: str) -> None:
    logits = np.random.default_rng(70).normal(size=(3, 4, 4, 5))
    logits[1, 0, 0, 0] = np.nan
    frames, labels = np.array([2, 4, 4]), np.array([3, 2, 2])
    of = tl.occupancy(logits, np.ones((3, 3), int), frames, labels, topology=topology)
    band = tl.prune(of, frames, labels, s_range=2, strategy=strategy, topology=topology)
    assert band.mass[1] == 0
    assert (band.mass[0] == 0) == (topology != "regular")
    assert band.mass[2] > 0
    assert (np.diff(band.first, axis=1) >= 0).all()


def test_prune_wider_than_a_block() -> None:
    rng = np.random.default_rng(80)
    T, U = 30, 1100
    frames, labels = np.array([T]), np.array([U])
    of = tl.occupancy(rng.normal(size=(1, T, U + 1, 3)), rng.integers(0, 3, (1, U)), frames, labels)
    for strategy in STRATEGIES:
        band = tl.prune(of, frames, labels, s_range=5, strategy=strategy)
        assert band.width == 1 + math.ceil(U / T)
        assert band.mass[0] > 0


def test_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(90)
    frames, labels = np.array([200, 150, 7]), np.array([60, 20, 3])
    of = posteriors(rng, frames, labels, "regular", 2.0, "float32")
    found = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        band = tl.prune(of, frames, labels, s_range=5, strategy="optimal")
        found.append(band.first.tobytes() + band.end.tobytes() + band.mass.tobytes())
    assert len(set(found)) == 1


GOOD: dict[str, Any] = {
    "occupancy": tl.Occupancy(np.zeros((2, 5, 4)), np.zeros((2, 5, 4)), np.zeros(2)), "am_lengths": [5, 4], "target_lengths": [3, 2],
}  # fmt: skip
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("occupancy", np.zeros((2, 5, 4)), TypeError, "expected an Occupancy, got ndarray"),
    ("occupancy", None, TypeError, "expected an Occupancy, got NoneType"),
    ("occupancy.blank", np.zeros((2, 5, 4), int), TypeError, "expected dtype float16, .*, got int64"),
    ("occupancy.blank", np.zeros((5, 4)), ValueError, r"expected 3 dimensions \(B, T, U\+1\), got shape \(5, 4\)"),
    ("occupancy.label", np.zeros((2, 5, 3)), ValueError, r"expected shape \(B, T, U\+1\) = \(2, 5, 4\), got \(2, 5, 3\)"),
    ("occupancy.label", np.zeros((2, 5, 4), "f"), TypeError, "expected dtype float64 as occupancy.blank, got float32"),
    ("am_lengths", [5, 6], ValueError, r"expected lengths in \[1, T = 5\], got 6 at index 1"),
    ("am_lengths", [5], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("am_lengths", [0, 1], ValueError, r"expected lengths in \[1, T = 5\], got 0 at index 0"),
    ("target_lengths", [3, 4], ValueError, r"expected lengths in \[0, U = 3\], got 4 at index 1"),
    ("target_lengths", [1.0, 2.0], TypeError, "expected integers, got dtype float64"),
    ("s_range", 0, ValueError, "expected 1 or more, got 0"),
    ("s_range", -3, ValueError, "expected 1 or more, got -3"),
    ("s_range", 2.0, TypeError, "expected an int, got float"),
    ("s_range", True, TypeError, "expected an int, got bool"),
    ("s_range", None, TypeError, "expected an int, got NoneType"),
    ("s_range", "5", TypeError, "expected an int, got str"),
    ("strategy", "global", ValueError, "expected one of 'local', 'optimal', got 'global'"),
    ("strategy", None, ValueError, "expected one of 'local', 'optimal', got None"),
    ("topology", "straight", ValueError, "expected one of 'regular', 'modified', 'constrained', got 'straight'"),
]


def label(bad: Any) -> str:
    return f"{bad[0]}={type(bad[1]).__name__}-{bad[3][:30]}"


@pytest.mark.parametrize("bad", BAD, ids=label)
def test_bad_inputs_of_prune(bad: tuple[str, Any, type[Exception], str]) -> None:
    name, value, kind, message = bad
    arguments = dict(GOOD)
    if "." in name:
        arguments["occupancy"] = dataclasses.replace(GOOD["occupancy"], **{name.split(".")[1]: value})
    else:
        arguments[name] = value
    positional = [arguments.pop(key) for key in GOOD]
    with pytest.raises(kind, match=f"^{name}: {message}"):
        tl.prune(*positional, **arguments)


def test_s_range_may_be_any_whole_number() -> None:
    for s_range in (np.int32(2), np.int64(2), 10**12):
        assert tl.prune(*GOOD.values(), s_range=s_range).width == min(int(s_range), 4)


# ---- bands of alignments


def random_alignment(rng: np.random.Generator, frames: Array, labels: Array) -> Array:
    """Frames that never fall; past the last label anything."""
    aligned = np.full((len(frames), int(labels.max()) + int(rng.integers(0, 2))), -1)
    for b, (T, U) in enumerate(zip(frames, labels, strict=True)):
        aligned[b, :U] = np.sort(rng.integers(0, T, U))
        aligned[b, U:] = rng.choice([-1, 99])
    return aligned


@every_topology
def test_band_of_an_alignment_is_that_of_the_reference(topology: str) -> None:
    rng = np.random.default_rng(100)
    for _ in range(100):
        frames, labels = rng.integers(1, 12, 3), rng.integers(0, 7, 3)
        aligned, left, right = random_alignment(rng, frames, labels), int(rng.integers(0, 4)), int(rng.integers(0, 4))
        kind = rng.choice(np.array(["i4", "i8", "list"]))
        given = aligned.tolist() if kind == "list" and aligned.size else aligned.astype("i8" if kind == "list" else kind)
        band = tl.Band.from_alignment(given, frames, labels.tolist(), left, right, topology)
        # In `modified` the arc of a label ends one frame later: see the reference's notes.
        first, end = reference.band_of_alignment(aligned, frames, labels, left - (topology == "modified"), right)
        np.testing.assert_array_equal(band.first, first)
        np.testing.assert_array_equal(band.end, end)
        assert band.width == band.s_range == (end - first).max()
        assert band.first.dtype == band.end.dtype == np.int32
        assert band.mass is None


@every_topology
def test_loss_of_an_alignment_sums_the_paths_near_it(topology: str) -> None:
    rng = np.random.default_rng(110)
    finite = restricted = 0
    for _ in range(80):
        T = int(rng.integers(1, 6))
        U = int(rng.integers(0, min(T, 3) + 1))
        aligned, left, right = np.sort(rng.integers(0, T, U)), int(rng.integers(0, 3)), int(rng.integers(0, 3))
        band = tl.Band.from_alignment(aligned[None], [T], [U], left, right, topology)
        logp, targets = rng.normal(-1, 1, (1, T, U + 1, 4)), rng.integers(1, 4, (1, U))
        lb, le = logp[0, ..., 0], np.take_along_axis(logp[0], np.append(targets[0], 0)[None, :, None], 2)[..., 0]
        every = paths(T, U, topology)
        near = [path for path in every if all(aligned[u] - left <= t <= aligned[u] + right for kind, t, u in path if kind == "label")]
        weights = [
            sum(lb[t, u] if kind == "blank" else le[t, u] + (lb[t, u + 1] if topology == "constrained" else 0) for kind, t, u in path)
            for path in near
        ]
        columns = np.minimum(band.to_ranges(), U)
        rows = np.take_along_axis(logp, columns[..., None], axis=2)
        loss, _ = tl.rnnt_loss(rows, targets, [T], [U], topology=topology, normalized=True, band=band)
        expected = -np.logaddexp.reduce(weights) if near else math.inf
        np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-12)
        finite += bool(near)
        restricted += 0 < len(near) < len(every)
    assert finite > 20
    assert restricted > 15


@every_topology
def test_the_best_path_lies_in_its_own_band(topology: str) -> None:
    rng = np.random.default_rng(120)
    logits, targets = rng.normal(0, 2, (3, 12, 6, 5)), rng.integers(1, 5, (3, 5))
    frames, labels = [12, 8, 12], [5, 3, 0]
    best = tl.align(logits, targets, frames, labels, topology=topology)
    for reach in (0, 2):
        band = tl.Band.from_alignment(best.frames, frames, labels, reach, reach, topology)
        rows = np.take_along_axis(logits, np.minimum(band.to_ranges(), 5)[..., None], axis=2)
        again = tl.align(rows, targets, frames, labels, topology=topology, band=band)
        np.testing.assert_array_equal(again.frames, best.frames)
        np.testing.assert_allclose(again.score, best.score, rtol=1e-14)
        loss, _ = tl.rnnt_loss(rows, targets, frames, labels, topology=topology, band=band)
        if reach == 0 and topology != "regular":  # each label in its frame: one path
            np.testing.assert_allclose(loss, -best.score, rtol=1e-12)
        assert (loss <= -best.score + 1e-12).all()


def test_an_alignment_without_labels() -> None:
    for given in (np.zeros((2, 0), int), [[], []]):
        band = tl.Band.from_alignment(given, [3, 1], [0, 0], 1, 1)
        assert band.width == 1
        assert band.first.tolist() == [[0, 0, 0], [0, 0, 0]]
        assert band.end.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_reach_beyond_all_frames_is_the_whole_lattice() -> None:
    for reach in (5, 10**9, 2**63 - 1):
        band = tl.Band.from_alignment([[1, 2]], [5], [2], reach, reach)
        assert band.first.tolist() == [[0] * 5]
        assert band.end.tolist() == [[3] * 5]


ALIGNED: dict[str, Any] = {
    "frames": [[1, 1, 3], [0, 2, -1]], "encoder_lengths": [5, 4], "target_lengths": [3, 2], "left": 1, "right": 1,
}  # fmt: skip
BAD_ALIGNED: list[tuple[str, Any, type[Exception], str]] = [
    ("frames", [[1, 0, 3], [0, 2, -1]], ValueError, r"expected frames in \[0, T_b = 5\) that never fall, got 0 at index \(0, 1\)"),
    ("frames", [[1, 1, 5], [0, 2, -1]], ValueError, r"expected frames in \[0, T_b = 5\) that never fall, got 5 at index \(0, 2\)"),
    ("frames", [[1, 1, 3], [0, 4, -1]], ValueError, r"expected frames in \[0, T_b = 4\) that never fall, got 4 at index \(1, 1\)"),
    ("frames", [[-1, 1, 3], [0, 2, -1]], ValueError, r"expected frames in \[0, T_b = 5\) .*, got -1 at index \(0, 0\)"),
    ("frames", [[-1, -1, -1], [0, 2, -1]], ValueError, r"expected frames in \[0, T_b = 5\) .*, got -1 at index \(0, 0\)"),
    ("frames", [[1.0, 1.0, 3.0]] * 2, ValueError, r"expected integers of shape \(B, U\), got float64 of shape \(2, 3\)"),
    ("frames", [1, 2, 3], ValueError, r"expected integers of shape \(B, U\), got int64 of shape \(3,\)"),
    ("frames", [[1, 2, 3], [1]], ValueError, "expected integers"),
    ("frames", np.zeros((0, 3), int), ValueError, "expected .*at least one"),
    ("frames", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("encoder_lengths", [5], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("encoder_lengths", [5, 0], ValueError, r"expected lengths in \[1, T = 2147483647\], got 0 at index 1"),
    ("target_lengths", [3, 4], ValueError, r"expected lengths in \[0, U = 3\], got 4 at index 1"),
    ("target_lengths", [3, -1], ValueError, r"expected lengths in \[0, U = 3\], got -1 at index 1"),
    ("left", -1, ValueError, "expected 0 or more, got -1"),
    ("left", 1.0, TypeError, "expected an int, got float"),
    ("right", -2, ValueError, "expected 0 or more, got -2"),
    ("right", True, TypeError, "expected an int, got bool"),
    ("right", None, TypeError, "expected an int, got NoneType"),
    ("topology", "straight", ValueError, "expected one of 'regular', 'modified', 'constrained', got 'straight'"),
]


@pytest.mark.parametrize("bad", BAD_ALIGNED, ids=label)
def test_bad_alignments(bad: tuple[str, Any, type[Exception], str]) -> None:
    name, value, kind, message = bad
    arguments = {**ALIGNED, name: value}
    if name == "frames" and isinstance(value, np.ndarray):
        arguments |= {"encoder_lengths": [], "target_lengths": []}
    with pytest.raises(kind, match=f"^{name}: {message}"):
        tl.Band.from_alignment(**arguments)


# ---- k2's ranges


@every_topology
def test_ranges_there_and_back(topology: str) -> None:
    rng = np.random.default_rng(130)
    for _ in range(30):
        frames, labels = ragged(rng, 3, 11, 7, topology)
        of = posteriors(rng, frames, labels, topology, 2.0)
        band = tl.prune(of, frames, labels, s_range=int(rng.integers(1, 6)), topology=topology)
        ranges = band.to_ranges()
        assert ranges.dtype == np.int64
        assert ranges.shape == (*band.first.shape, band.width)
        np.testing.assert_array_equal(ranges, band.first[..., None] + np.arange(band.width))
        ranges[np.arange(ranges.shape[1]) >= frames[:, None]] = -7  # past the last frame there may be anything
        for given in (ranges, ranges.astype(np.int32), ranges.tolist()):
            again = tl.Band.from_ranges(given, frames, labels)
            np.testing.assert_array_equal(again.first, band.first)
            np.testing.assert_array_equal(again.end, band.end)
            np.testing.assert_array_equal(again.frames, band.frames)
            np.testing.assert_array_equal(again.labels, band.labels)
            assert again.width == again.s_range == band.width
            assert again.mass is None


RANGES: dict[str, Any] = {
    "ranges": [[[0, 1], [0, 1], [1, 2]], [[0, 1], [1, 2], [-1, -1]]], "encoder_lengths": [3, 2], "target_lengths": [2, 2],
}  # fmt: skip
BAD_RANGES: list[tuple[str, Any, type[Exception], str]] = [
    ("ranges", [[[0, 1], [1, 2], [0, 1]]] * 2, ValueError, r"expected .*never falling.*, got \[0, 1\] after \[1, 2\] at index \(0, 2\)"),
    ("ranges", [[[0, 1], [0, 2], [1, 2]]] * 2, ValueError, r"expected consecutive labels .*, got \[0, 2\] after .* at index \(0, 1\)"),
    ("ranges", [[[0, 1], [1, 0], [1, 2]]] * 2, ValueError, r"expected consecutive labels .*, got \[1, 0\] after .* at index \(0, 1\)"),
    ("ranges", [[[-1, 0], [0, 1], [1, 2]]] * 2, ValueError, r"expected consecutive labels from 0 .*, got \[-1, 0\] .* at index \(0, 0\)"),
    ("ranges", [[0, 1], [1, 2]], ValueError, r"expected integers of shape \(B, T, S\), got int64 of shape \(2, 2\)"),
    ("ranges", [[[0.0, 1.0]]], ValueError, r"expected integers of shape \(B, T, S\), got float64 of shape \(1, 1, 2\)"),
    ("ranges", np.zeros((2, 3, 0), int), ValueError, r"expected integers of shape \(B, T, S\), got int64 of shape \(2, 3, 0\)"),
    ("ranges", [[[0, 1], [1]]], ValueError, "expected integers"),
    ("ranges", [[[2**40, 2**40 + 1]] * 3] * 2, ValueError, "expected"),
    ("ranges", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("encoder_lengths", [3, 4], ValueError, r"expected lengths in \[1, T = 3\], got 4 at index 1"),
    ("encoder_lengths", [3], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("target_lengths", [2, -1], ValueError, r"expected lengths in \[0, U = .*\], got -1 at index 1"),
]


@pytest.mark.parametrize("bad", BAD_RANGES, ids=label)
def test_bad_ranges(bad: tuple[str, Any, type[Exception], str]) -> None:
    name, value, kind, message = bad
    with pytest.raises(kind, match=f"^{name}: {message}"):
        tl.Band.from_ranges(**{**RANGES, name: value})


def test_the_inputs_themselves_are_good() -> None:
    assert tl.prune(*GOOD.values()).width == 4
    assert tl.Band.from_alignment(**ALIGNED).width >= 1
    assert tl.Band.from_ranges(**RANGES).first.tolist() == [[0, 0, 1], [0, 1, 1]]


def test_a_band_is_not_to_be_changed() -> None:
    band = tl.Band.from_ranges(**RANGES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        band.width = 3  # type: ignore[misc]
