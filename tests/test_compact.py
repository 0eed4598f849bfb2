"""The list of cells that get a gradient, against NumPy."""

import numpy as np
import pytest

from transducer_loss import compact
from transducer_loss.cells import Cells
from transducer_loss.processors import Host


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(30))
def test_kept_cells(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    B = int(rng.integers(1, 6))
    frames, labels = rng.integers(1, 40, B), rng.integers(0, 70, B)
    if seed % 2:
        cells = Cells.full(frames, labels)
    else:
        cells = Cells(frames, labels, rng.integers(1, 12, B), np.zeros((B, frames.max()), np.int32))
    begin = int(rng.integers(0, B))
    floor = float(rng.choice([1e-6, 1e-3, 0.3]))
    loss = rng.choice([1.0, np.nan, np.inf], B, p=[0.7, 0.15, 0.15]).astype(dtype)
    weights = rng.choice([1.0, -1.0, 0.0], B).astype(dtype) if seed % 3 else None
    with Host() as processor:
        group = cells.group(processor, begin)
        pair = tuple(10.0 ** rng.uniform(-9, 0, group.cells) * (rng.random(group.cells) < 0.8) for _ in range(2))
        blank, label = (array.astype(dtype) for array in pair)
        scratch = np.full(16 * group.cells + 16, 255, np.uint8)
        kept = compact.kept_cells(processor, group, (blank, label), loss, weights, floor, scratch)
    thresholds = np.repeat(floor * (frames + labels) / cells.counts, cells.counts)[-group.cells :].astype(dtype)
    live = np.isfinite(loss) & (True if weights is None else weights != 0)
    used = blank + label
    expected = np.flatnonzero(np.repeat(live, cells.counts)[-group.cells :] & (used > 0) & (used >= thresholds))
    assert kept.number == len(expected)
    np.testing.assert_array_equal(kept.cells.view(np.int64)[: kept.number], expected)
    np.testing.assert_array_equal(kept.positions.view(np.int64), np.searchsorted(expected, np.arange(group.cells + 1)))
    part = slice(begin, None)
    rows = np.concatenate([[0], np.cumsum(np.repeat(cells.width[part], frames[part]))])
    np.testing.assert_array_equal(kept.before_row, np.searchsorted(expected, rows))
    # What is dropped of a live utterance is at most floor (T + U).
    gone = np.ones(group.cells, bool)
    gone[expected] = False
    for i, b in enumerate(range(begin, B)):
        part = slice(group.offsets[i], group.offsets[i + 1])
        if live[b]:
            assert used[part][gone[part]].sum(dtype=np.float64) <= floor * (frames[b] + labels[b]) * (1 + 1e-6)
        else:
            assert gone[part].all()


def test_both_kinds_are_met() -> None:
    """The cases above drop some cells and keep some."""
    rng = np.random.default_rng(0)
    cells = Cells.full(np.array([50]), np.array([20]))
    with Host() as processor:
        group = cells.group(processor)
        used = 10.0 ** rng.uniform(-9, 0, group.cells)
        shares = []
        for floor in (1e-9, 1e-6, 1e-3, 0.3):
            scratch = np.empty(16 * group.cells + 16, np.uint8)
            kept = compact.kept_cells(processor, group, (used, np.zeros_like(used)), np.ones(1), None, floor, scratch)
            shares.append(kept.number / group.cells)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert 0 < shares[-1] < 0.5
