"""Bands of the reference against enumerated paths and enumerated bands."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from test_reference import ATOL, TARGETS, TOPOLOGIES, Path, numeric, paths
from transducer_loss import reference
from transducer_loss.reference.band import _local, _optimal, _scores

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]

STRATEGIES = ("local", "optimal")


def stays(path: Path, first: I8, end: I8, topology: str) -> bool:
    """Whether all cells of a path, and those whose blanks its labels weigh, are in the rows."""
    return all(first[t] <= u < end[t] and (kind == "blank" or topology != "constrained" or u + 1 < end[t])
               for kind, t, u in path)


def probabilities(lb: F8, le: F8, topology: str) -> list[tuple[Path, float]]:
    """Every path of the full lattice and its posterior."""

    def weight(path: Path) -> float:
        return sum(lb[t, u] if kind == "blank" else le[t, u] + (lb[t, u + 1] if topology == "constrained" else 0.0)
                   for kind, t, u in path)

    every = paths(len(lb), lb.shape[1] - 1, topology)
    weights = [math.exp(weight(path)) for path in every]
    return [(path, w / math.fsum(weights)) for path, w in zip(every, weights, strict=True)]


def bands(T: int, last: int, furthest: int) -> Iterator[tuple[int, ...]]:
    """Every band of T rows from 0 to `last` in steps up to `furthest`."""
    for steps in itertools.product(range(min(furthest, last) + 1), repeat=T - 1):
        if sum(steps) == last:
            yield tuple(itertools.accumulate((0, *steps)))


def posteriors(rng: np.random.Generator, sizes: list[tuple[int, int]], topology: str, spread: float = 2.0) -> tuple[F8, F8]:
    """Raw occupancies of random lattices, NaN in the padding."""
    T, U = (max(size[i] for size in sizes) for i in range(2))
    gb, ge = np.full((2, len(sizes), T + 1, U + 2), math.nan)
    for b, (T, U) in enumerate(sizes):
        lb, le = rng.normal(0.0, spread, (2, T, U + 1))
        _, gb[b, :T, :U + 1], ge[b, :T, :U + 1] = reference.lattice_loss(lb, le, U, topology=topology)
    return gb, ge


def ragged(rng: np.random.Generator, topology: str, count: int = 3) -> list[tuple[int, int]]:
    """Frames and labels of a few utterances, each with a path."""
    frames = rng.integers(1, 10, count)
    return [(int(T), int(rng.integers(0, 8 if topology == "regular" else T + 1))) for T in frames]


def furthest(width: int, topology: str) -> int:
    return width - 1 if topology == "regular" else 1


# ---- rows of unlike width


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_that_end_early_are_the_paths_inside(topology: str) -> None:
    rng = np.random.default_rng(1)
    finite = early = 0
    for _ in range(150):
        T, U = int(rng.integers(1, 7)), int(rng.integers(0, 4))
        W = int(rng.integers(1, U + 3))
        first = np.sort(rng.integers(-1, max(U + 2 - W, 1), T)) if rng.random() < 0.7 else np.zeros(T, np.int64)
        end = first + rng.integers(W // 2, W + 2, T)  # none, fewer, or more than the columns hold
        stop = np.minimum(first + W, end)
        lb, le = rng.normal(-1.0, 1.0, (2, T, W))
        full = np.full((2, T, U + 1), -math.inf)
        for t, s in np.ndindex(T, W):
            if 0 <= first[t] + s <= U:
                full[:, t, first[t] + s] = lb[t, s], le[t, s]
        kept = [path for path in paths(T, U, topology) if stays(path, np.maximum(first, 0), stop, topology)]
        weights = [sum(full[int(kind == "label"), t, u]
                       + (full[0, t, u + 1] if kind == "label" and topology == "constrained" else 0.0)
                       for kind, t, u in path) for path in kept]
        cut = first[:, None] + np.arange(W) >= end[:, None]
        lb[cut] = le[cut] = math.nan  # these cells are never read
        loss, gb, ge = reference.lattice_loss(lb, le, U, topology=topology, first=first, end=end)
        assert loss == (pytest.approx(-math.log(math.fsum(np.exp(weights))), abs=1e-12) if kept else math.inf)
        assert not np.any(gb[cut]) and not np.any(ge[cut])
        finite += bool(kept)
        early += bool(kept) and len(kept) < len([p for p in paths(T, U, topology) if stays(p, first, first + W, topology)])
    assert finite >= 30 and early >= 8


FIRST = np.array([[0, 0, 0, 1], [0, 0, 0, 7]])  # three wide; the last row of the second utterance is padding
END = np.array([[2, 2, 2, 9], [1, 9, 2, 7]])  # beyond the columns, or beyond U, an end means nothing
LENGTHS = ([4, 3], [2, 1])


def cut_cells() -> npt.NDArray[np.bool_]:
    u = FIRST[:, :, None] + np.arange(3)
    real = np.arange(4)[:, None] < np.array(LENGTHS[0])[:, None, None]
    return np.asarray(~real | (u >= END[..., None]) | (u > np.array(LENGTHS[1])[:, None, None]))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_losses_of_rows_that_end_early(topology: str) -> None:
    logits = np.random.default_rng(2).normal(0.0, 1.5, (2, 4, 3, 4))
    weights = np.array([0.7, -1.3])
    rows: dict[str, Any] = {"first": FIRST, "end": END, "topology": topology}
    arguments = (TARGETS, *LENGTHS)

    def loss(x: F8) -> float:
        return float(weights @ reference.rnnt_loss(x, *arguments, **rows)[0])

    losses, grad = reference.rnnt_loss(logits, *arguments, weights=weights, **rows)
    whole, _ = reference.rnnt_loss(logits, *arguments, first=FIRST, topology=topology)
    assert np.isfinite(losses).all() and losses[0] > whole[0] + 1e-3
    np.testing.assert_allclose(grad, numeric(loss, logits), rtol=0, atol=ATOL)
    np.testing.assert_array_equal(grad[cut_cells()], 0.0)
    dirty = np.where(cut_cells()[..., None], math.nan, logits)
    np.testing.assert_array_equal(reference.rnnt_loss(dirty, *arguments, **rows)[0], losses)
    # A cell of weight -inf is a cell that does not exist, for all that a lattice tells.
    logp = logits - np.logaddexp.reduce(logits, axis=3, keepdims=True)
    logp[cut_cells()] = -math.inf
    for function in (reference.occupancy, reference.align):
        for actual, wanted in zip(function(dirty, *arguments, **rows),
                                  function(logp, *arguments, first=FIRST, topology=topology, normalized=True), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-13, atol=1e-14)


def test_joint_loss_of_rows_that_end_early() -> None:
    rng = np.random.default_rng(3)
    encoder, predictor, weight = rng.normal(0.0, 1.0, (2, 4, 3)), rng.normal(0.0, 1.0, (2, 4, 3)), rng.normal(0.0, 1.0, (4, 3))
    mask = rng.random((2, 4, 3, 3))
    u = np.minimum(FIRST[:, :, None] + np.arange(3), 3)
    hidden = np.tanh(encoder[:, :, None] + np.stack([predictor[b][u[b]] for b in range(2)])) * mask
    mask[cut_cells()] = math.nan
    loss, (_, _, by_weight, _) = reference.joint_rnnt_loss(encoder, predictor, weight, None, TARGETS, *LENGTHS, mask=mask,
                                                           first=FIRST, end=END, width=3)
    expected, grad = reference.rnnt_loss(hidden @ weight.T, TARGETS, *LENGTHS, first=FIRST, end=END)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    np.testing.assert_allclose(by_weight, np.einsum("btsv,btsh->vh", grad, hidden), rtol=0, atol=1e-13)


def test_rows_may_end_without_beginning_late() -> None:
    logits = np.random.default_rng(4).normal(0.0, 1.0, (1, 3, 3, 4))
    end = np.array([[2, 2, 3]])
    loss, grad = reference.rnnt_loss(logits, [[1, 2]], [3], [2], end=end)
    same, same_grad = reference.rnnt_loss(logits, [[1, 2]], [3], [2], first=np.zeros((1, 3), int), end=end)
    np.testing.assert_array_equal(loss, same)
    np.testing.assert_array_equal(grad, same_grad)
    np.testing.assert_array_equal(grad[0, :2, 2], 0.0)


# ---- kept mass


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kept_mass_is_the_probability_of_the_paths_inside(topology: str) -> None:
    rng = np.random.default_rng(5)
    none = some = 0
    for _ in range(250):
        T = int(rng.integers(1, 7))
        U = int(rng.integers(0, 5 if topology == "regular" else min(T, 4) + 1))
        lb, le = rng.normal(0.0, 2.0, (2, T, U + 1))
        lb[rng.random(lb.shape) < 0.05] = -math.inf
        loss, *arcs = reference.lattice_loss(lb, le, U, topology=topology)
        first = np.sort(rng.integers(0, U + 1, T)) * (rng.random() < 0.8)
        end = np.minimum(first + rng.integers(1, U + 3, T), U + 1)
        first[0] *= rng.random() < 0.3
        mass = reference.kept_mass(*arcs, first, end, topology=topology)
        if loss == math.inf:
            assert mass == 0.0
            continue
        expected = math.fsum(p for path, p in probabilities(lb, le, topology) if stays(path, first, end, topology))
        assert mass == pytest.approx(expected, rel=1e-11, abs=1e-14)
        columns = np.maximum(U + 1, 1)
        wide = np.full((2, T, columns), -math.inf)  # the same lattice, as columns of the band
        for t, s in np.ndindex(T, columns):
            if first[t] + s <= U:
                wide[:, t, s] = lb[t, first[t] + s], le[t, first[t] + s]
        banded, _, _ = reference.lattice_loss(wide[0], wide[1], U, topology=topology, first=first, end=end)
        assert mass == pytest.approx(math.exp(loss - banded), rel=1e-11, abs=1e-14)
        none += mass == 0.0
        some += 0.0 < mass < 0.999
    assert none >= 10 and some >= 30


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kept_mass_of_everything_and_of_nothing(topology: str) -> None:
    gb, ge = posteriors(np.random.default_rng(6), [(9, 5)], topology, spread=30.0)
    arcs = gb[0, :9, :6], ge[0, :9, :6]
    zero, six = np.zeros(9, int), np.full(9, 6)
    assert reference.kept_mass(*arcs, zero, six, topology=topology) == pytest.approx(1.0, abs=1e-12)
    assert reference.kept_mass(*arcs, six, six, topology=topology) == 0.0
    assert reference.kept_mass(np.zeros((9, 6)), np.zeros((9, 6)), zero, six, topology=topology) == 0.0
    with pytest.raises(ValueError, match="topology: "):
        reference.kept_mass(*arcs, zero, six, topology="straight")


# ---- pruning


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bands_obey_their_constraints_and_admit_a_path(topology: str, strategy: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        sizes = ragged(rng, topology)
        gb, ge = posteriors(rng, sizes, topology)
        s_range = int(rng.integers(1, 6))
        first, width, mass = reference.prune(gb, ge, *np.transpose(sizes), s_range=s_range, strategy=strategy,
                                             topology=topology)
        assert first.shape == gb.shape[:2] and first.dtype == np.int64
        most = max(U for _, U in sizes)
        assert min(s_range, most + 1) <= width <= most + 1
        for b, (T, U) in enumerate(sizes):
            rows, last = first[b, :T], max(U - width + 1, 0)
            assert rows[0] == 0 and rows[-1] == last
            assert (np.diff(rows) >= 0).all() and (np.diff(rows) <= furthest(width, topology)).all()
            assert (first[b, T:] == last).all()
            loss, _, _ = reference.lattice_loss(np.zeros((T, width)), np.zeros((T, width)), U, first=rows, topology=topology)
            assert math.isfinite(loss)
            arcs = gb[b, :T, :U + 1], ge[b, :T, :U + 1]
            assert mass[b] == reference.kept_mass(*arcs, rows, rows + width, topology=topology)
            assert 0.0 <= mass[b] <= 1.0 + 1e-12
            if width == most + 1:
                assert mass[b] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_width_is_the_least_that_always_admits_a_path(topology: str) -> None:
    for T, U in itertools.product(range(1, 6), range(6)):
        if topology != "regular" and U > T:
            continue

        def admits(width: int, T: int = T, U: int = U) -> bool:
            """Whether there are bands of this width, and every one has a path."""
            every = list(bands(T, max(U - width + 1, 0), furthest(width, topology)))
            arcs = np.zeros((T, width))
            return bool(every) and all(
                math.isfinite(reference.lattice_loss(arcs, arcs, U, first=first, topology=topology)[0]) for first in every)

        least = next(width for width in range(1, U + 2) if admits(width))
        assert all(admits(width) for width in range(least, U + 2))
        empty = np.zeros((1, T, U + 1))
        for s_range in range(1, 8):
            _, width, _ = reference.prune(empty, empty, [T], [U], s_range=s_range, topology=topology)
            assert width == min(max(s_range, least), U + 1)


def test_one_utterance_widens_the_band_of_all() -> None:
    for topology, expected in (("regular", 4), ("modified", 2), ("constrained", 2)):
        sizes = [(6, 4), (2, 5 if topology == "regular" else 2)]
        gb, ge = posteriors(np.random.default_rng(8), sizes, topology)
        assert reference.prune(gb, ge, *np.transpose(sizes), s_range=1, topology=topology)[1] == expected
    gb, ge = posteriors(np.random.default_rng(8), [(6, 4), (3, 2)], "modified")
    first, width, _ = reference.prune(gb, ge, [6, 3], [4, 2], s_range=1, topology="modified")
    assert width == 1 and first[:, -1].tolist() == [4, 2]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_scores_are_sums_over_the_window(topology: str) -> None:
    gb, ge = np.random.default_rng(9).random((2, 3, 6))
    for width in (1, 2, 4, 6, 9):
        scores = _scores(gb, ge, width, topology)
        assert scores.shape == (3, max(6 - width, 0) + 1)
        for t, p in np.ndindex(*scores.shape):
            window = range(p, min(p + width, 6))
            if topology == "regular":
                expected = math.fsum(gb[t, u] for u in window) - (ge[t, p - 1] if p > 0 else 0.0)
            else:
                cut = [window[-1]] if topology == "constrained" and len(window) == width else []
                expected = math.fsum(gb[t, u] + (0.0 if u in cut else ge[t, u]) for u in window)
            assert scores[t, p] == pytest.approx(expected, rel=1e-14)


def test_local_moves_as_little_as_it_must() -> None:
    rng = np.random.default_rng(10)
    unmoved = 0
    for _ in range(300):
        T, last, step = int(rng.integers(1, 9)), int(rng.integers(0, 5)), int(rng.integers(1, 4))
        scores = rng.integers(0, 4, (T, last + 1)).astype(float)
        wanted = [row.tolist().index(max(row)) for row in scores[:-1]] + [last]
        rows = _local(scores, step)
        # The lowest of what is wanted later, pulled up by what a later row could not reach, held down by the start.
        lowest = [min(wanted[t:]) for t in range(T)]
        expected = [min(step * t, max(lowest[i] - step * (i - t) for i in range(t, T))) for t in range(T)]
        assert rows.tolist() == expected
        if tuple(wanted) in bands(T, last, step):
            assert rows.tolist() == wanted
            unmoved += 1
    assert unmoved >= 20


def test_optimal_has_the_largest_sum_and_its_ties_are_lowest_from_the_end() -> None:
    rng = np.random.default_rng(11)
    ties = unreachable = 0
    for _ in range(400):
        T, last, step = int(rng.integers(1, 7)), int(rng.integers(0, 5)), int(rng.integers(0, 4))
        scores = rng.integers(-2, 3, (T, last + 1)).astype(float)  # exact sums
        every = {rows: sum(scores[t, p] for t, p in enumerate(rows)) for rows in bands(T, last, step)}
        rows = _optimal(scores, step)
        if not every:
            assert rows is None
            unreachable += 1
            continue
        assert rows is not None
        best = [band for band, total in every.items() if total == max(every.values())]
        ties += len(best) > 1
        assert tuple(rows.tolist()) == min(best, key=lambda band: band[::-1])
    assert ties >= 50 and unreachable >= 20


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_optimal_keeps_no_less_than_local(topology: str) -> None:
    rng = np.random.default_rng(12)
    more = 0
    for _ in range(80):
        sizes = [(int(T), int(rng.integers(4, 9))) for T in rng.integers(9, 20, 3)]
        gb, ge = posteriors(rng, sizes, topology, spread=1.0)
        outcomes = [reference.prune(gb, ge, *np.transpose(sizes), s_range=2, strategy=strategy, topology=topology)
                    for strategy in STRATEGIES]
        (local, width, local_mass), (optimal, same_width, mass) = outcomes
        assert width == same_width
        assert (mass >= local_mass).all()
        np.testing.assert_array_equal(optimal[mass == local_mass], local[mass == local_mass])
        for b in np.flatnonzero(mass > local_mass):
            T, U = sizes[b]
            scores = _scores(gb[b, :T, :U + 1], ge[b, :T, :U + 1], width, topology)
            sums = [sum(scores[np.arange(T), band[b, :T]]) for band in (local, optimal)]
            assert sums[1] > sums[0]
        more += int((mass > local_mass).sum())
    assert more >= 3


def test_local_is_taken_where_both_keep_as_much() -> None:
    rng = np.random.default_rng(16)
    unlike = 0
    for _ in range(200):
        T, U = 8, int(rng.integers(3, 7))
        # One path: a band keeps it or does not.
        emitted = rng.integers(0, T, U)
        gb, ge = np.zeros((2, 1, T, U + 1))
        for t in range(T):
            gb[0, t, (emitted <= t).sum()] = ge[0, t, (emitted < t).sum():(emitted <= t).sum()] = 1.0
        local, width, mass = reference.prune(gb, ge, [T], [U], s_range=2)
        optimal, _, same = reference.prune(gb, ge, [T], [U], s_range=2, strategy="optimal")
        if mass[0] == same[0]:
            np.testing.assert_array_equal(optimal, local)
            unlike += int((_optimal(_scores(gb[0], ge[0], width, "regular"), width - 1) != local[0]).any())
    assert unlike >= 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_utterances_do_not_mix(topology: str, strategy: str) -> None:
    rng = np.random.default_rng(13)
    sizes = [(7, 4), (4, 2), (9, 3)]
    gb, ge = posteriors(rng, sizes, topology)
    first, width, mass = reference.prune(gb, ge, *np.transpose(sizes), s_range=2, strategy=strategy, topology=topology)
    for b, (T, U) in enumerate(sizes):
        alone = reference.prune(gb[b:b + 1, :T, :U + 1], ge[b:b + 1, :T, :U + 1], [T], [U], s_range=width,
                                strategy=strategy, topology=topology)
        np.testing.assert_array_equal(first[b, :T], alone[0][0])
        assert mass[b] == alone[2][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_utterance_without_a_path(strategy: str) -> None:
    gb, ge = np.zeros((2, 1, 3, 6))
    for topology in TOPOLOGIES:  # in `regular` these are the occupancies of a loss that is NaN
        first, width, mass = reference.prune(gb, ge, [3], [5], s_range=2, strategy=strategy, topology=topology)
        assert mass.tolist() == [0.0]
        assert first[0].tolist() == ([0, 1, 3] if topology == "regular" else [0, 1, 2])
        assert width == (3 if topology == "regular" else 2)


@pytest.mark.parametrize(("change", "message"), [
    ({"s_range": 0}, "s_range: "),
    ({"strategy": "global"}, "strategy: "),
    ({"topology": "straight"}, "topology: "),
    ({"frame_lengths": [4]}, "frame_lengths, "),
    ({"frame_lengths": [0]}, "frame_lengths, "),
    ({"target_lengths": [3]}, "frame_lengths, "),
    ({"target_lengths": [-1]}, "frame_lengths, "),
])
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    empty = np.zeros((1, 3, 3))
    arguments: dict[str, Any] = {"blank_occupancy": empty, "label_occupancy": empty, "frame_lengths": [3],
                                 "target_lengths": [2], **change}
    with pytest.raises(ValueError, match=message):
        reference.prune(**arguments)


# ---- alignments


def near(path: Path, frames: I8, left: int, right: int) -> bool:
    """Whether each label of a path is emitted near its frame."""
    emitted = [t for kind, t, _ in path if kind == "label"]
    return all(a - left <= t <= a + right for a, t in zip(frames, emitted, strict=True))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_of_an_alignment_are_the_paths_near_it(topology: str) -> None:
    rng = np.random.default_rng(14)
    earlier = 1 if topology == "modified" else 0  # its label arc leads to the next row
    kept = cut = 0
    for _ in range(200):
        T, U = int(rng.integers(1, 7)), int(rng.integers(0, 4))
        left, right = (int(n) for n in rng.integers(0, 3, 2))
        frames = np.sort(rng.integers(0, T, U))
        first, end = reference.band_of_alignment(np.append(frames, -1)[None], [T], [U], left - earlier, right)
        every = paths(T, U, topology)
        inside = [stays(path, first[0], end[0], topology) for path in every]
        assert inside == [near(path, frames, left, right) for path in every]
        if topology == "modified":
            first, end = reference.band_of_alignment(frames[None], [T], [U], left, right)
            assert [stays(path, first[0], end[0], topology) for path in every] == [
                near(path, frames, left + 1, right) for path in every]
        kept += any(inside)
        cut += any(inside) and not all(inside)
    assert kept >= 80 and cut >= 30


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_losses_near_an_alignment(topology: str) -> None:
    rng = np.random.default_rng(15)
    logits, targets, frames, labels = rng.normal(0.0, 1.0, (2, 7, 4, 5)), np.array([[1, 2, 3], [4, 1, -1]]), [7, 5], [3, 2]
    aligned, score = reference.align(logits, targets, frames, labels, topology=topology)
    loss, _ = reference.rnnt_loss(logits, targets, frames, labels, topology=topology)
    previous = np.full(2, math.inf)
    for slack in (0, 1, 2, 9):
        first, end = reference.band_of_alignment(aligned, frames, labels, slack, slack)
        assert first.shape == end.shape == (2, 7)
        assert (first[1, 5:] == first[1, 4]).all() and (end[1, 5:] == end[1, 4]).all()
        width = int((end - first).max())
        u = np.minimum(first[..., None] + np.arange(width), 3)
        rows = np.take_along_axis(logits, u[..., None], axis=2)
        near_loss, _ = reference.rnnt_loss(rows, targets, frames, labels, topology=topology, first=first, end=end)
        assert (near_loss <= previous).all() and (near_loss >= loss - 1e-12).all()
        if slack == 0 and topology != "modified":  # the best path is the only one left
            np.testing.assert_allclose(near_loss, -score, rtol=1e-13)
        previous = near_loss
    np.testing.assert_allclose(previous, loss, rtol=1e-13)


@pytest.mark.parametrize("frames", [[2, 1], [-1, -1], [1, 3]])
def test_alignments_that_are_none_are_refused(frames: list[int]) -> None:
    with pytest.raises(ValueError, match="frames: "):
        reference.band_of_alignment([frames], [3], [2], 1, 1)
