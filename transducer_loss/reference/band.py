"""Posteriors, or an alignment -> the rows of a band, and how much of the posterior it keeps."""

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8, I8, _forward, _step


def prune(blank_occupancy: ArrayLike, label_occupancy: ArrayLike, frame_lengths: ArrayLike,
          target_lengths: ArrayLike, *, s_range: int = 5, strategy: str = "local",
          topology: str = "regular") -> tuple[I8, int, F8]:
    """Band of equal width around the probable paths.

    It begins at 0, reaches U_b, never goes back and never steps so far that no path could follow: up to S - 1 labels
    from frame to frame in `regular`, where S is the width, and up to 1 in the other topologies.

    Parameters
    ----------
    blank_occupancy, label_occupancy : array_like, float, shape (B, T, U + 1)
        Posteriors of the arcs, as those of `simple_rnnt_loss`; padding is never read.
    frame_lengths, target_lengths : array_like, int, shape (B,)
        T_b >= 1 and U_b >= 0.
    s_range : int
        Cells to keep of a row, at least 1; more are kept where less would leave an utterance without a path, and never
        more than there are.
    strategy : {"local", "optimal"}
        `local` takes the best position of each row by itself, and then moves as few as it must to make them a band.
        `optimal` finds the band whose scores have the largest sum, of equal ones that which is lower, later rows
        first; as a sum of scores only stands for the kept mass, it returns the better by mass of the two, `local`
        where they are equal. If no band reaches U_b there is no path at all, and `local` is returned.
    topology
        As in `rnnt_loss`.

    Returns
    -------
    first : ndarray, int64, shape (B, T)
        First u of each row; frames from T_b on repeat that of the last real one.
    width : int
        Cells of a row, for all utterances the same.
    mass : ndarray, float64, shape (B,)
        `kept_mass` of each utterance.

    Raises
    ------
    ValueError
        For an argument out of range.

    References
    ----------
    Kuang et al., arXiv 2206.13236, section 3.2.

    Examples
    --------
    One path, which emits both labels in the last frame:

    >>> blank, label = [[[1, 0, 0], [1, 0, 0], [0, 0, 1]]], [[[0, 0, 0], [0, 0, 0], [1, 1, 0]]]
    >>> prune(blank, label, [3], [2], s_range=2)  # the band has to reach row 2 at u = 1
    (array([[0, 0, 1]]), 2, array([0.]))
    >>> prune(blank, label, [3], [2], s_range=3)
    (array([[0, 0, 0]]), 3, array([1.]))
    """
    gb, ge = np.array([blank_occupancy, label_occupancy], dtype=np.float64)
    frames, labels = np.asarray(frame_lengths, np.int64), np.asarray(target_lengths, np.int64)
    if s_range < 1:
        raise ValueError(f"s_range: expected at least 1, got {s_range}")
    if strategy not in ("local", "optimal"):
        raise ValueError(f"strategy: expected 'local' or 'optimal', got {strategy!r}")
    if not ((frames >= 1) & (frames <= gb.shape[1]) & (labels >= 0) & (labels < gb.shape[2])).all():
        raise ValueError(f"frame_lengths, target_lengths: expected 1 to {gb.shape[1]} and 0 to {gb.shape[2] - 1}, "
                         f"got {frames} and {labels}")
    regular = _step(topology) == 0
    width = _width(frames, labels, s_range, topology)
    furthest = width - 1 if regular else 1
    first, mass = np.zeros(gb.shape[:2], np.int64), np.zeros(len(gb))
    for b, (T, U) in enumerate(zip(frames, labels, strict=True)):
        arcs = gb[b, :T, :U + 1], ge[b, :T, :U + 1]
        scores = _scores(*arcs, width, topology)
        rows = _local(scores, furthest)
        mass[b] = kept_mass(*arcs, rows, rows + width, topology=topology)
        best = _optimal(scores, furthest) if strategy == "optimal" else None
        if best is not None:
            best_mass = kept_mass(*arcs, best, best + width, topology=topology)
            if best_mass > mass[b]:
                rows, mass[b] = best, best_mass
        first[b, :T], first[b, T:] = rows, rows[-1]
    return first, width, mass


def kept_mass(blank_occupancy: ArrayLike, label_occupancy: ArrayLike, first: ArrayLike, end: ArrayLike, *,
              topology: str = "regular") -> float:
    """Probability that a path of one utterance, drawn from the posterior, stays inside a band.

    That is exp(loss - loss restricted to the band), from the posteriors alone: they say which arc a path takes out of
    a cell that it has come to.

    Parameters
    ----------
    blank_occupancy, label_occupancy : array_like, float, shape (T, U + 1)
        Posteriors of the arcs.
    first, end : array_like, int, shape (T,)
        Row t keeps the cells first[t] <= u < end[t]. In `constrained` a label arc out of (t, u) needs (t, u + 1) too,
        whose blank it weighs.
    topology
        As in `rnnt_loss`.

    Returns
    -------
    float
        0 for an utterance without a finite loss, whose posteriors are all zero.

    Examples
    --------
    Two paths, of which the band keeps that with the label in the first frame:

    >>> round(kept_mass([[0.75, 0.25], [0, 1]], [[0.25, 0], [0.75, 0]], [0, 1], [2, 2]), 12)
    0.25
    """
    gb, ge = arcs = np.array([blank_occupancy, label_occupancy], dtype=np.float64)
    u = np.arange(gb.shape[1])
    kept = (u >= np.asarray(first)[:, None]) & (u < np.asarray(end)[:, None])
    chance = np.divide(arcs, gb + ge, out=np.zeros_like(arcs), where=kept & (gb + ge > 0.0))
    if topology == "constrained":
        chance[1, :, :-1] *= kept[:, 1:]
    with np.errstate(divide="ignore"):
        blank, label = np.log(chance)
    return float(np.exp(_forward(blank, label, _step(topology), np.logaddexp)[-1, -1]))


def band_of_alignment(frames: ArrayLike, frame_lengths: ArrayLike, target_lengths: ArrayLike, left: int,
                      right: int) -> tuple[I8, I8]:
    """Rows of the lattice in which each label stays near the frame that an alignment gives it.

    Label u + 1, aligned to frame a, can be emitted at the frames a - left to a + right only. So row t begins with as
    many labels as must have come before it, and ends with as many as may have come up to it.

    Parameters
    ----------
    frames : array_like, int, shape (B, U)
        Frame of each label, 0 <= a < T_b and never falling, as `align` returns them; those beyond U_b are never read.
    frame_lengths, target_lengths : array_like, int, shape (B,)
        T_b and U_b.
    left, right : int
        How many frames earlier or later than aligned a label may come.

    Returns
    -------
    first, end : ndarray, int64, shape (B, T)
        Row t keeps the cells first[t] <= u < end[t], T is the largest T_b; frames from T_b on repeat the last real row.

    Raises
    ------
    ValueError
        For frames that fall or lie outside the utterance, as does the -1 of one without a path.

    Notes
    -----
    The restriction is one of cells. That is the same as one of frames where the cell that a label arc weighs or leads
    to is in the row of the frame that emits it: in `regular`, where the arc leads to (t, u + 1), and in `constrained`,
    whose arc needs (t, u + 1). In `modified` the arc leads to row t + 1, so that a label may come one frame earlier, at
    a - left - 1. There, ``left - 1`` gives the frames from a - left on.

    References
    ----------
    Mahadeokar et al., arXiv 2011.03072.

    Examples
    --------
    >>> band_of_alignment([[1, 3]], [5], [2], left=0, right=1)
    (array([[0, 0, 0, 1, 1]]), array([[1, 2, 2, 3, 3]]))
    """
    lengths = np.asarray(frame_lengths, np.int64)
    first, end = np.zeros((2, len(lengths), lengths.max(initial=0)), np.int64)
    for b, (T, U) in enumerate(zip(lengths, np.asarray(target_lengths), strict=True)):
        a, t = np.asarray(frames, np.int64)[b, :U], np.arange(T)[:, None]
        if (np.diff(a) < 0).any() or (a < 0).any() or (a >= T).any():
            raise ValueError(f"frames: expected frames from 0 to {T - 1} that never fall, got {a} for utterance {b}")
        first[b, :T] = (a + right < t).sum(axis=1)
        end[b, :T] = 1 + (a - left <= t).sum(axis=1)
        first[b, T:], end[b, T:] = first[b, T - 1], end[b, T - 1]
    return first, end


def _width(frames: I8, labels: I8, s_range: int, topology: str) -> int:
    """Cells of a row: `s_range`, unless some utterance needs more for a path, or none has as many."""
    if topology == "regular":
        least = 1 - (-labels // frames)  # the last cell of a row is the first of the next: T (S - 1) >= U
    elif topology == "modified":
        least = 1 + (labels >= frames)  # of one cell each: the last row is at U, so the labels come before it
    else:
        least = 1 + (labels > 0)  # a label arc needs two cells of its row
    return int(min(max(s_range, least.max(initial=1)), labels.max(initial=0) + 1))


def _scores(gb: F8, ge: F8, width: int, topology: str) -> F8:
    """How good it is for row t to begin at p, (T, positions): the last position ends at U."""
    positions = max(gb.shape[1] - width, 0) + 1
    if topology == "regular":  # paths that leave the row from inside, without those that came up from below
        below = np.pad(ge, ((0, 0), (1, 0)))
        columns = [gb[:, p:p + width].sum(axis=1) - below[:, p] for p in range(positions)]
    else:  # of one path one cell of a row; in constrained the label arc of the window's last cell is cut
        last = width - 1 if topology == "constrained" else width
        columns = [gb[:, p:p + width].sum(axis=1) + ge[:, p:p + last].sum(axis=1) for p in range(positions)]
    return np.stack(columns, axis=1)


def _local(scores: F8, furthest: int) -> I8:
    """The best position of each row, then made a band."""
    p = scores.argmax(axis=1)
    p[-1] = scores.shape[1] - 1
    p = np.minimum.accumulate(p[::-1])[::-1]  # never back
    # Never too far: the distance to the furthest position that frame t can have does not shrink, and starts at 0 or more.
    limit = furthest * np.arange(len(p))
    distance = np.minimum.accumulate((limit - p)[::-1])[::-1]
    return np.asarray(limit - np.maximum(distance, 0), dtype=np.int64)


def _optimal(scores: F8, furthest: int) -> I8 | None:
    """The band with the largest sum of scores; None if the last position is out of reach."""
    T, positions = scores.shape
    best = np.full(scores.shape, -np.inf)  # largest sum of rows 0..t, the last of them at p
    best[0, 0] = scores[0, 0]
    for t in range(1, T):
        for p in range(positions):
            best[t, p] = scores[t, p] + best[t - 1, max(p - furthest, 0):p + 1].max()
    if best[-1, -1] == -np.inf:
        return None
    rows = np.full(T, positions - 1, dtype=np.int64)
    for t in reversed(range(1, T)):
        lowest = max(rows[t] - furthest, 0)
        rows[t - 1] = lowest + best[t - 1, lowest:rows[t] + 1].argmax()  # argmax takes the lowest of equal ones
    return rows
