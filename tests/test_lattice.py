"""The lattice itself: bands, cuts, and the accuracy that its scaled sums are for."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Array, epsilon, error, expect_close, numpy_dtype, path_noise
from helpers import Batch as Logits
from transducer_loss import joint_loss, lattice, reference, softmax
from transducer_loss.arrays import COMPUTE
from transducer_loss.cells import Cells
from transducer_loss.checks import Options, targets_for
from transducer_loss.processors import Host

every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)


@dataclasses.dataclass
class Banded:
    """A batch of which row t of utterance b has the cells first[b, t] <= u < first[b, t] + width[b]."""

    logits: Array
    """Packed, (cells, V)."""
    targets: Array
    cells: Cells

    def padded(self, b: int, packed: Array) -> Array:
        """The rows of an utterance."""
        offsets = np.cumsum([0, *self.cells.counts])
        T, W = int(self.cells.frames[b]), int(self.cells.width[b])
        return packed[offsets[b] : offsets[b + 1]].reshape(T, W, *packed.shape[1:])


def random_band(rng: np.random.Generator, T: int, U: int, topology: str) -> tuple[Array, int]:
    """First labels that rise from 0 as pruning makes them, and a width; mostly with a path."""
    W = int(rng.integers(1, U + 3))
    first = np.sort(rng.integers(0, max(U - W + 1, 0) + 1, T))
    first[0] = 0
    if T > 1 and rng.random() < 0.9:
        first[-1] = max(U - W + 1, 0)
        limit = W - 1 if topology == "regular" else 1
        for t in range(T - 2, -1, -1):  # no row so low that the next one is out of reach
            first[t] = max(first[t], first[t + 1] - max(limit, 1))
        first -= first[0] if first[0] > 0 else 0
    return first, W


def random_banded(rng: np.random.Generator, dtype: str, topology: str) -> Banded:
    B, V = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    frames, labels = rng.integers(1, 9, B), rng.integers(0, 6, B)
    first, width = np.full((B, frames.max()), -99, np.int32), np.zeros(B, np.int64)
    for b in range(B):
        first[b, : frames[b]], width[b] = random_band(rng, int(frames[b]), int(labels[b]), topology)
    targets = rng.integers(0, V, (B, labels.max()))
    targets[np.arange(labels.max()) >= labels[:, None]] = -1
    cells = Cells(frames, labels, width, first)
    logits = rng.normal(0, 2, (cells.counts.sum(), V)).astype(numpy_dtype(dtype))
    for b in range(B):  # what is stored past the last label may be anything
        rows = Banded(logits, targets, cells).padded(b, logits)
        u = first[b, : frames[b], None] + np.arange(width[b])
        rows[u > labels[b]] = np.nan
    return Banded(logits, targets, cells)


def options_of(topology: str, classes: int, **other: Any) -> Options:
    chosen = {"blank": 0, "normalized": False, "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}
    return Options.checked(classes, topology=topology, **{**chosen, **other})


def run(of: Banded, options: Options, effective: bool = False) -> tuple[Array, ...]:
    """Loss, packed occupancies of blank and label arcs, frames and score of the best path."""
    real = COMPUTE[of.logits.dtype.name]
    with Host() as processor:
        group = of.cells.group(processor)
        targets = targets_for(of.targets, processor, of.cells.labels, of.logits.shape[1], options, False)
        arcs = softmax.empty_arcs(processor, group.cells, real)
        softmax.forward(processor, group, of.logits, targets, options, arcs)
        loss, reported = (processor.empty((group.count,), real) for _ in range(2))
        values = lattice.sums(processor, group, arcs, options, loss, reported)
        pair = processor.empty((group.cells,), real), processor.empty((group.cells,), real)
        lattice.occupancy(processor, group, arcs, options, values, effective, pair)
        np.testing.assert_array_equal(loss, reported)
        frames, score = np.empty(of.targets.shape, np.int64), np.empty(group.count)
        lattice.best_path(processor, group, arcs, options, frames, score)
        return (loss, *pair, frames, score)


@pytest.mark.parametrize("delay", [0.0, 0.4])
@every_topology
@every_dtype
def test_bands(dtype: str, topology: str, delay: float) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology)])
    finite = narrow = 0
    for _ in range(60):
        of = random_banded(rng, dtype, topology)
        fastemit = float(rng.choice([0.0, 0.5]))
        options = options_of(topology, of.logits.shape[1], delay_penalty=delay, fastemit_lambda=fastemit)
        raw, effective = run(of, options), run(of, options, effective=True)
        steps, largest = int((of.cells.frames + of.cells.labels).max()), float(np.nanmax(np.abs(of.logits)))
        noise = path_noise(dtype, steps, largest + 8 * delay)
        for b, (T, U) in enumerate(zip(of.cells.frames, of.cells.labels, strict=True)):
            first, logits = of.cells.first[b, :T], of.padded(b, of.logits).astype(np.float64)
            lb, le = reference.log_probs(logits, of.targets[b, :U], first=first)
            loss, *expected = reference.lattice_loss(lb, le, U, topology=topology, first=first, delay_penalty=delay)
            adjusted = reference.effective_occupancy(*expected, topology=topology, fastemit_lambda=fastemit)
            frames, score = reference.align(
                logits[None], of.targets[b : b + 1], [T], [U], topology=topology, first=first[None], delay_penalty=delay
            )
            reach = noise * max(1.0, abs(loss)) if math.isfinite(loss) else 0.0
            expect_close(raw[0][b : b + 1], np.array([loss]), reach)
            expect_close(raw[4][b : b + 1], score, reach)
            np.testing.assert_array_equal(raw[3][b], frames[0])
            for got, exact in zip((*raw[1:3], *effective[1:3]), (*expected, *adjusted), strict=True):
                expect_close(of.padded(b, got), exact, noise * (1 + fastemit))
            finite += math.isfinite(loss)
            narrow += math.isfinite(loss) and of.cells.width[b] <= U
    assert finite > 60
    assert narrow > 15


@every_topology
@every_dtype
def test_a_band_of_everything_is_the_lattice(dtype: str, topology: str) -> None:
    rng = np.random.default_rng(0)
    frames, labels = np.array([9, 4, 7]), np.array([3, 4, 0])
    full = Cells.full(frames, labels)
    logits = rng.normal(size=(full.counts.sum(), 5)).astype(numpy_dtype(dtype))
    targets = rng.integers(0, 5, (3, 4))
    options = options_of(topology, 5)
    band = dataclasses.replace(full, first=np.zeros((3, 9), np.int32))
    results = (run(Banded(logits, targets, cells), options) for cells in (full, band))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("floor", [0.0, 1e-7])
@every_topology
def test_bands_through_the_fused_loss(topology: str, floor: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(15):
        of = random_banded(rng, "float64", topology)
        B, T, U, V, H = *of.cells.first.shape, int(of.cells.labels.max()), of.logits.shape[1], 6
        arrays = [rng.normal(size=size) for size in ((B, T, H), (B, U + 1, H), (V, H), (V,))]
        full = joint_loss.problem(
            *arrays, of.targets, of.cells.frames, of.cells.labels, occupancy_floor=floor, blank=0, topology=topology,
            fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf",
        )  # fmt: skip
        # Its bands have one width.
        cells = dataclasses.replace(of.cells, width=np.full(B, of.cells.width.max()))
        done = joint_loss.forward(dataclasses.replace(full, cells=cells))
        loss, exact = reference.joint_rnnt_loss(
            *arrays, of.targets, cells.frames, cells.labels, topology=topology, first=cells.first, width=int(cells.width[0])
        )
        expect_close(done.native, loss, 1e-12)
        for got, expected in zip(done.gradients.native, exact, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 if floor == 0 else 1e-4)


def test_a_band_wider_than_the_shared_memory() -> None:
    # Rows of 40 cells of a lattice that is 1100 wide.
    rng = np.random.default_rng(2)
    T, U, W = 60, 1099, 40
    first = np.linspace(0, U - W + 1, T).astype(np.int32)
    cells = Cells(np.array([T]), np.array([U]), np.array([W]), first[None])
    of = Banded(rng.normal(size=(T * W, 3)), rng.integers(0, 3, (1, U)), cells)
    loss, *pair = run(of, options_of("regular", 3))[:3]
    lb, le = reference.log_probs(of.padded(0, of.logits), of.targets[0], first=first)
    expected = reference.lattice_loss(lb, le, U, first=first)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
    for got, exact in zip(pair, expected[1:], strict=True):
        np.testing.assert_allclose(of.padded(0, got), exact, rtol=0, atol=1e-10)


@every_topology
def test_every_cut_sums_to_one(topology: str) -> None:
    rng = np.random.default_rng(3)
    T, U = 120, 50
    logits = rng.normal(0, 3, (1, T, U + 1, 7)).astype(np.float32)
    raw = tl.occupancy(logits, rng.integers(0, 7, (1, U)), [T], [U], topology=topology)
    # Arcs out of the cells of an anti-diagonal cross it; so do, in the other two, the arcs out of a row.
    t, u = np.mgrid[:T, : U + 1]
    cut = t + u if topology == "regular" else t
    both = (raw.blank + raw.label)[0].astype(np.float64)
    sums = np.array([both[cut == i].sum() for i in range(cut.max() + 1)])
    # Two sums of T + U factors, each off by some units.
    np.testing.assert_allclose(sums, 1.0, rtol=0, atol=epsilon("float32") * 4 * (T + U))


DISTRIBUTIONS = {
    "flat": lambda rng, shape: rng.normal(0, 1e-3, shape),
    "sharp": lambda rng, shape: rng.normal(0, 50, shape),
    "peaked": lambda rng, shape: np.where(np.arange(shape[-1]) == rng.integers(0, shape[-1], (*shape[:-1], 1)), 30.0, 0.0),
    "far from zero": lambda rng, shape: rng.normal(0, 2, shape) + 1000,
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@every_topology
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_flat_and_sharp_distributions(dtype: str, topology: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    shape = (2, 30, 11, 8)
    logits = DISTRIBUTIONS[kind](rng, shape).astype(dtype)
    targets, frames, labels = rng.integers(0, 8, (2, 10)), np.array([30, 17]), np.array([10, 6])
    loss, grad = tl.rnnt_loss(logits, targets, frames, labels, topology=topology)
    expected, exact = reference.rnnt_loss(logits, targets, frames, labels, topology=topology)
    # The reference's own sums of logarithms are rounded as well.
    noise = path_noise(dtype, 40, float(np.abs(logits).max())) + 4 * epsilon("float64") * expected.max()
    expect_close(loss, expected, noise * np.abs(expected))
    expect_close(grad, exact, noise)


@every_topology
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_long_lattices_of_tiny_probabilities_do_not_underflow(dtype: str, topology: str) -> None:
    rng = np.random.default_rng(5)
    T, U = 3000, 20
    logits = rng.normal(0, 50, (1, T, U + 1, 6)).astype(numpy_dtype(dtype))
    targets = rng.integers(1, 6, (1, U))
    loss, grad = tl.rnnt_loss(logits, targets, [T], [U], topology=topology)
    truth, exact = tl.rnnt_loss(logits.astype(np.float64), targets, [T], [U], topology=topology)
    assert truth[0] > 20_000  # a probability of e^-20000
    assert abs(loss[0] - truth[0]) <= epsilon("float32") * 8 * truth[0]
    # Log-probabilities of some hundreds have an error of some 1e-5 each in float32, whatever is made of them.
    assert error(grad, exact) < max(2e-4, epsilon(dtype))


def test_gradient_of_forty_seconds_of_audio() -> None:
    """At T = 2000 and U = 300, where float32 sums of logarithms are off by a percent."""
    rng = np.random.default_rng(6)
    T, U, V = 2000, 300, 64
    logits = rng.normal(0, 1, (1, T, U + 1, V)).astype(np.float32)
    targets = rng.integers(1, V, (1, U))
    # The truth is our own float64, which is right where the reference is not too slow.
    part = Logits(logits[:, :60, :21].astype(np.float64), targets[:, :20], np.array([60]), np.array([20]), 0)
    small, of_small = tl.rnnt_loss(*part.arguments)
    expected, exact = reference.rnnt_loss(*part.arguments)
    assert abs(small[0] - expected[0]) <= 1e-14 * expected[0]
    assert error(of_small, exact) < 1e-13
    loss, grad = tl.rnnt_loss(logits, targets, [T], [U])
    wide = logits.astype(np.float64)
    truth, over = tl.rnnt_loss(wide, targets, [T], [U], inplace=True)
    assert abs(loss[0] - truth[0]) <= 1e-6 * truth[0]
    assert error(grad, over) < 1e-5
