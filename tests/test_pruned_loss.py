"""Losses over a band against the reference: logits, padded and packed, the fused joint, and a joiner of one's own."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import (
    FLOATS,
    TOPOLOGIES,
    Array,
    Counting,
    epsilon,
    error,
    expect_close,
    numpy_dtype,
    path_noise,
    random_lengths,
    random_targets,
    rounding,
)
from test_joint_loss import ACTIVATIONS, PARTS, Inputs, philox_mask
from test_joint_loss import expect_same as expect_same_joint
from test_joint_loss import inputs as joint_inputs
from transducer_loss import joint_loss, reference, tiling
from transducer_loss.arrays import COMPUTE
from transducer_loss.reference.joint import _activate

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

VARIANTS: dict[str, Any] = {
    "plain": lambda rng, batch: {},
    "hat": lambda rng, batch: {"hat": True},
    "fastemit": lambda rng, batch: {"fastemit_lambda": float(rng.choice([0.01, 0.5, 3.0]))},
    "delay": lambda rng, batch: {"delay_penalty": float(rng.choice([0.3, -0.7, 2.0]))},
    "weights": lambda rng, batch: {"weights": rng.choice([0.0, -1.5, 0.25, 3.0], batch), "fastemit_lambda": 0.1},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def random_band(rng: np.random.Generator, frames: Array, labels: Array, topology: str, padded: int = 0) -> tl.Band:
    """Pruned, aligned or written down; rows end before their width, some utterances have no path."""
    T, U = max(int(frames.max()), padded), int(labels.max())
    kind = rng.choice(["local", "optimal", "alignment", "ranges"])
    if kind == "alignment":
        aligned = np.full((len(frames), U), -1)
        for b, count in enumerate(labels):
            aligned[b, :count] = np.sort(rng.integers(0, frames[b], count))
        return tl.Band.from_alignment(aligned, frames, labels, int(rng.integers(0, 3)), int(rng.integers(0, 3)), topology)
    S = int(rng.integers(1, U + 3))
    if kind == "ranges":
        first = np.sort(rng.integers(0, np.maximum(labels - S + 1, 0)[:, None] + 1, (len(frames), T)), axis=1)
        first[:, 0] = 0
        return tl.Band.from_ranges(first[..., None] + np.arange(S), frames, labels)
    logits, targets = rng.normal(0, 3, (len(frames), T, U + 1, 3)), rng.integers(0, 3, (len(frames), U))
    occupancy = tl.occupancy(logits, targets, frames, labels, topology=topology)
    return tl.prune(occupancy, frames, labels, s_range=S, strategy=str(kind), topology=topology)


def columns_of(band: tl.Band) -> Array:
    """Which (b, t, s) are cells of the band, (B, T, S)."""
    u = band.to_ranges()
    real = np.arange(band.first.shape[1])[:, None] < band.frames[:, None, None]
    return np.asarray(real & (u < band.end[..., None]))


def packed_columns(band: tl.Band, T: int) -> Array:
    """Which (b, t, s) are stored in packed logits."""
    return np.asarray(
        (np.arange(T)[:, None] < band.frames[:, None, None])
        & (np.arange(band.width) < np.minimum(band.width, band.labels + 1)[:, None, None])
    )


@dataclasses.dataclass
class Banded:
    """Arguments of `rnnt_loss` with a band."""

    logits: Array
    """(B, T, S, V), NaN where the band has no cell."""
    targets: Array
    band: tl.Band
    blank: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.targets, self.band.frames, self.band.labels

    @property
    def packed(self) -> tuple[Any, ...]:
        """With packed logits."""
        return self.logits[packed_columns(self.band, self.logits.shape[1])], *self.arguments[1:]

    @property
    def rows(self) -> dict[str, Any]:
        """Keywords of the reference."""
        return {"first": self.band.first, "end": self.band.end, "blank": self.blank}

    @property
    def largest(self) -> float:
        values = np.abs(self.logits.astype(np.float64))
        return float(values[np.isfinite(values)].max(initial=0.0))

    @property
    def steps(self) -> int:
        return int((self.band.frames + self.band.labels).max())


def random_banded(
    rng: np.random.Generator, dtype: str, topology: str, *, hat: bool = False, most: tuple[int, int, int, int] = (3, 9, 6, 8)
) -> Banded:
    B, T, U, V = (int(rng.integers(low, n + 1)) for low, n in zip((1, 2, 1, 1), most, strict=True))
    V = max(V, 2) if hat else V
    frames, labels = random_lengths(rng, B, T, U, topology)
    band = random_band(rng, frames, labels, topology)
    blank = int(rng.integers(-V, V))
    logits = rng.normal(0, 2, (*band.first.shape, band.width, V))
    logits[~columns_of(band)] = np.nan
    targets = random_targets(rng, labels, int(labels.max()) + int(rng.integers(0, 2)), V, blank % V if hat else None)
    return Banded(logits.astype(numpy_dtype(dtype)), targets, band, blank)


def expect_same(got: tuple[Any, Any], of: Banded, options: dict[str, Any]) -> None:
    """Raise unless loss and gradient are the reference's, but for rounding; 0 outside of the band."""
    loss, grad = reference.rnnt_loss(*of.arguments, **of.rows, **options)
    dtype = of.logits.dtype.name
    assert got[0].dtype == COMPUTE[dtype]
    assert got[1].dtype == of.logits.dtype
    relative = path_noise(dtype, of.steps, of.largest + abs(options.get("delay_penalty", 0.0)) * of.band.frames.max())
    expect_close(got[0], loss, relative * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))
    upstream = np.abs(options.get("weights", np.ones(1))).max() * (1 + options.get("fastemit_lambda", 0.0))
    expect_close(got[1], grad, relative * upstream)
    assert not np.asarray(got[1], np.float64)[~columns_of(of.band)].any()


# ---- the whole lattice as a band


@every_topology
@every_variant
def test_a_band_of_everything_is_the_exact_loss(topology: str, variant: str) -> None:
    rng = np.random.default_rng([TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    for _ in range(14):
        B, T, U, V, H = (int(rng.integers(1, n + 1)) for n in (4, 9, 6, 9, 12))
        V = max(V, 2)
        frames, labels = random_lengths(rng, B, T, U, topology)
        T, U = int(frames.max()), int(labels.max())
        of = joint_inputs(rng, frames, labels, V, H, without=0 if variant == "hat" else None)
        options = {"topology": topology, **VARIANTS[variant](rng, B)}
        occupancy = tl.occupancy(*of.all, topology=topology)
        if rng.random() < 0.5:
            band = tl.prune(occupancy, frames, labels, s_range=U + int(rng.integers(1, 3)), topology=topology)
        else:
            band = tl.Band.from_ranges(np.broadcast_to(np.arange(U + 1), (B, T, U + 1)), frames, labels)
        assert band.width == U + 1
        logits = rng.normal(0, 2, (B, T, U + 1, V)).astype("f")
        real = (np.arange(T)[:, None] < frames[:, None, None]) & (np.arange(U + 1) <= labels[:, None, None])
        for given in (logits, logits[real]):
            exact, grad = tl.rnnt_loss(given, of.targets, frames, labels, **options)
            loss, banded = tl.rnnt_loss(given, of.targets, frames, labels, band=band, **options)
            np.testing.assert_allclose(loss, exact, rtol=1e-6)
            np.testing.assert_allclose(banded, grad, rtol=0, atol=1e-6)
        for floor in (0.0, 1e-6):
            exact, grads = tl.joint_rnnt_loss(*of.all, occupancy_floor=floor, **options)
            loss, pruned = tl.joint_rnnt_loss(*of.all, occupancy_floor=floor, band=band, **options)
            np.testing.assert_allclose(loss, exact, rtol=1e-6)
            for name in PARTS:
                largest = np.abs(getattr(grads, name)).max()
                np.testing.assert_allclose(getattr(pruned, name), getattr(grads, name), rtol=0, atol=1e-6 * max(1.0, largest))


# ---- the reference, restricted to the band


@every_variant
@every_topology
@every_dtype
def test_logits(dtype: str, topology: str, variant: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    finite, narrow = [], 0
    for _ in range(20):
        of = random_banded(rng, dtype, topology, hat=variant == "hat")
        options = {"topology": topology, **VARIANTS[variant](rng, len(of.band.frames))}
        got = tl.rnnt_loss(*of.arguments, blank=of.blank, band=of.band, **options)
        expect_same(got, of, options)
        alone, none = tl.rnnt_loss(*of.arguments, blank=of.blank, band=of.band, gradient=False, **options)
        np.testing.assert_array_equal(alone, got[0])
        assert none is None
        loss, grad = tl.rnnt_loss(*of.packed, blank=of.blank, band=of.band, **options)
        np.testing.assert_array_equal(loss, got[0])
        np.testing.assert_array_equal(grad, got[1][packed_columns(of.band, of.logits.shape[1])])
        finite += np.isfinite(loss).tolist()
        narrow += int((np.isfinite(loss) & (columns_of(of.band).sum((1, 2)) < of.band.frames * (of.band.labels + 1))).sum())
    assert np.mean(finite) > 0.4
    assert narrow > 2


@every_topology
@every_dtype
def test_log_probabilities(dtype: str, topology: str) -> None:
    rng = np.random.default_rng([50, FLOATS.index(dtype), TOPOLOGIES.index(topology)])
    for _ in range(10):
        of = random_banded(rng, dtype, topology)
        wide = of.logits.astype(np.float64)
        with np.errstate(invalid="ignore"):  # NaN where there is no cell
            of.logits = (wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)).astype(of.logits.dtype)
        options = {"topology": topology, "normalized": True}
        expect_same(tl.rnnt_loss(*of.arguments, blank=of.blank, band=of.band, **options), of, options)


@every_topology
def test_layouts_and_inplace(topology: str) -> None:
    rng = np.random.default_rng(60)
    for dtype in FLOATS:
        of = random_banded(rng, dtype, topology)
        options: dict[str, Any] = {"topology": topology, "blank": of.blank, "band": of.band}
        loss, grad = tl.rnnt_loss(*of.arguments, **options)
        base = np.full((of.logits.shape[0] + 1, *of.logits.shape[1:-1], 2 * of.logits.shape[-1] + 1), 7, of.logits.dtype)
        view = base[1:, ::-1, ::-1, 1::2]
        for inplace in (False, True):
            view[...] = of.logits
            loss_too, found = tl.rnnt_loss(view, *of.arguments[1:], inplace=inplace, **options)
            np.testing.assert_array_equal(loss_too, loss)
            np.testing.assert_array_equal(found, grad)
        assert found is view
        assert (base[0] == 7).all()
        assert (base[..., ::2] == 7).all()
        packed = of.packed[0].copy()
        _, found = tl.rnnt_loss(packed, *of.arguments[1:], inplace=True, **options)
        assert found is packed
        np.testing.assert_array_equal(packed, grad[packed_columns(of.band, of.logits.shape[1])])


def test_frames_beyond_the_longest() -> None:
    # A band from an alignment has as many rows as its longest utterance has frames; the logits may have more.
    rng = np.random.default_rng(61)
    band = tl.Band.from_alignment([[1, 2], [0, -1]], [5, 3], [2, 1], 1, 1)
    logits, targets = rng.normal(size=(2, 8, band.width, 4)), np.array([[1, 2], [3, -1]])
    loss, grad = tl.rnnt_loss(logits, targets, [5, 3], [2, 1], band=band)
    expected, exact = tl.rnnt_loss(logits[:, :5], targets, [5, 3], [2, 1], band=band)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(grad[:, :5], exact)
    assert not grad[:, 5:].any()
    occupancy = tl.occupancy(logits, targets, [5, 3], [2, 1], band=band)
    assert occupancy.blank.shape == (2, 8, band.width)


def random_joint(rng: np.random.Generator, dtype: str, topology: str, hat: bool) -> tuple[Inputs, int, tl.Band]:
    B, T, U, V, H = (int(rng.integers(1, n + 1)) for n in (3, 8, 5, 8, 16))
    V = max(V, 2) if hat else V
    frames, labels = random_lengths(rng, B, T, U, topology)
    blank = int(rng.integers(-V, V))
    of = joint_inputs(rng, frames, labels, V, H, dtype, bias=bool(rng.random() < 0.8), without=blank % V if hat else None)
    return of, blank, random_band(rng, frames, labels, topology)


def rows_of(band: tl.Band) -> dict[str, Any]:
    """Keywords of the reference's joint loss."""
    return {"first": band.first, "end": band.end, "width": band.width}


@every_variant
@every_topology
@every_dtype
def test_joint(dtype: str, topology: str, variant: str) -> None:
    rng = np.random.default_rng([1, FLOATS.index(dtype), TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    finite = []
    for i in range(10):
        of, blank, band = random_joint(rng, dtype, topology, variant == "hat")
        options = {"blank": blank, "topology": topology, "activation": ACTIVATIONS[i % len(ACTIVATIONS)]}
        options |= VARIANTS[variant](rng, len(of.frames))
        got = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, band=band, **options)
        expect_same_joint(got, of, **options, **rows_of(band))
        assert got[1].dropped == 0.0
        np.testing.assert_array_equal(tl.joint_rnnt_loss(*of.all, band=band, gradient=False, **options)[0], got[0])
        finite += np.isfinite(got[0]).tolist()
    assert np.mean(finite) > 0.4


def mask_of(band: tl.Band, H: int, probability: float, seed: int) -> Array:
    """The exact loss's mask of dropout, for the cells of a band."""
    U1 = int(band.labels.max()) + 1
    mask = philox_mask(*band.first.shape, U1, H, probability, seed)
    return np.take_along_axis(mask, np.minimum(band.to_ranges(), U1 - 1)[..., None], axis=2)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@every_dtype
def test_dropout(dtype: str, activation: str) -> None:
    rng = np.random.default_rng(2)
    for probability, seed in ((0.1, 0), (0.5, 12345), (0.9, (1 << 62) + 977)):
        of = joint_inputs(rng, [7, 4, 6], [3, 2, 4], 6, 10, dtype)
        band = random_band(rng, of.frames, of.labels, "regular")
        mask = mask_of(band, 10, probability, seed)
        got = tl.joint_rnnt_loss(*of.all, activation=activation, dropout=probability, seed=seed, occupancy_floor=0.0, band=band)
        expect_same_joint(got, of, mask, activation=activation, **rows_of(band))


def test_every_number_of_features() -> None:
    rng = np.random.default_rng(3)
    for H in (*range(1, 18), 31, 33, 64, 65):
        of = joint_inputs(rng, [5, 3], [3, 2], 5, H, scale=0.7)
        band = random_band(rng, of.frames, of.labels, "regular")
        expect_same_joint(tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, band=band), of, **rows_of(band))


# ---- what is special about the fused loss


def wide_problem(dtype: str = "float64", topology: str = "regular") -> tuple[Inputs, tl.Band]:
    """Of some size, with a band a third as wide as the lattice."""
    rng = np.random.default_rng(4)
    of = joint_inputs(rng, [30, 22, 17, 9], [11, 8, 4, 3], 12, 16, dtype, scale=1.5)
    occupancy = tl.occupancy(*of.all, topology=topology)
    return of, tl.prune(occupancy, of.frames, of.labels, s_range=4, strategy="optimal", topology=topology)


@every_topology
def test_cells_below_the_floor_are_dropped(topology: str) -> None:
    of, band = wide_problem(topology=topology)
    weights = np.array([1.0, -2.0, 0.0, 0.5])
    options: dict[str, Any] = {"topology": topology, "band": band}
    effective = {"topology": topology, "fastemit_lambda": 0.2}
    full = tl.joint_rnnt_loss(*of.all, weights=weights, occupancy_floor=0.0, fastemit_lambda=0.2, **options)[1]
    assert full.dropped == 0.0
    raw = tl.occupancy(*of.all, **options)
    gb, ge = reference.effective_occupancy(raw.blank, raw.label, **effective)
    for floor in (1e-6, 1e-3, 0.05):
        grads = tl.joint_rnnt_loss(*of.all, weights=weights, occupancy_floor=floor, fastemit_lambda=0.2, **options)[1]
        kept, bound, lost_cells, every = 0, 0.0, 0.0, 0
        for b, (T, U, weight) in enumerate(zip(of.frames, of.labels, weights, strict=True)):
            used = (gb + ge)[b, :T, : min(band.width, U + 1)]
            low = (used < floor * (T + U) / used.size) | (used == 0)
            kept += 0 if weight == 0 else int((~low).sum())
            lost_cells += 2 * abs(weight) * used[low].sum()
            bound += 2 * abs(weight) * floor * (T + U)
            every += used.size
        assert grads.dropped == pytest.approx(1 - kept / every, abs=1e-12)
        # |dG|_1 <= 2 |w_b| times what is dropped, and the bias' gradient is the sum of G.
        assert np.abs(grads.bias - full.bias).sum() <= lost_cells + 1e-12
        assert lost_cells <= bound


def problem(of: Inputs, band: tl.Band, **options: Any) -> tiling.Problem:
    chosen = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}
    return joint_loss.problem(*of.all, band=band, **{**chosen, **options})


def least(of: Inputs, band: tl.Band) -> int:
    """The smallest workspace, as the error for a smaller one states it."""
    with pytest.raises(ValueError, match="workspace: expected at least") as raised:
        tl.joint_rnnt_loss(*of.all, band=band, workspace=1)
    return int(str(raised.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_any_workspace_gives_the_same_result(dtype: str, dropout: float, floor: float) -> None:
    rng = np.random.default_rng(5)
    of = joint_inputs(rng, [40, 1, 33, 17, 5], [9, 4, 0, 12, 5], 70, 24, dtype)
    occupancy = tl.occupancy(*of.all)
    band = tl.prune(occupancy, of.frames, of.labels, s_range=5)
    options: dict[str, Any] = {"occupancy_floor": floor, "dropout": dropout, "seed": 3}
    whole = tl.joint_rnnt_loss(*of.all, band=band, **options)
    seen, smallest = set(), least(of, band)
    for workspace in (smallest << n for n in range(7)):
        plan = tiling.plan(problem(of, band, workspace=workspace))
        seen |= {("strips", plan.strips > 1), ("groups", len(plan.groups) > 1), *(("kept", kept) for kept in plan.retained)}
        counting = Counting()
        done = joint_loss.forward(problem(of, band, workspace=workspace, allocate=counting, **options))
        assert done.gradients is not None
        outputs = sum(array.nbytes for array in (done.native, *done.gradients.native))
        widened = of.weight.size * 4 if dtype == "float16" else 0
        assert 0 < counting.most + widened - outputs <= workspace
        unit = 64 * epsilon("float64" if dtype == "float64" else "float32")
        expect_close(done.native, whole[0].astype(np.float64), unit * whole[0])
        for name, native in zip(PARTS, done.gradients.native, strict=True):
            exact = getattr(whole[1], name).astype(np.float64)
            expect_close(native, exact, unit * np.abs(exact).max() + rounding(dtype, exact))
    assert {(key, value) for key in ("strips", "groups", "kept") for value in (False, True)} <= seen


def test_only_cells_of_the_band_are_counted() -> None:
    # What no longer is in the band takes no memory: a lattice far too large for its logits fits with few columns.
    of, band = wide_problem("float32")
    narrow = least(of, band)
    every = tl.Band.from_ranges(np.broadcast_to(np.arange(12), (4, 30, 12)), of.frames, of.labels)
    assert narrow < least(of, every)
    assert int(problem(of, band).cells.counts.sum()) == int((of.frames * np.minimum(of.labels + 1, band.width)).sum())


@pytest.mark.parametrize("workspace", [None, "100KiB"])
def test_number_of_threads_changes_no_bit(workspace: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    of = joint_inputs(rng, [90, 7, 61, 80], [20, 2, 0, 17], 100, 24)
    band = tl.prune(tl.occupancy(*of.all), of.frames, of.labels, s_range=8)
    logits = rng.normal(size=(*band.first.shape, 8, 100)).astype("f")
    results = []
    for threads in ("1", "2", "4", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        loss, grads = tl.joint_rnnt_loss(*of.all, band=band, dropout=0.1, workspace=workspace)
        of_logits = tl.rnnt_loss(logits, *of.all[4:], band=band)
        results.append((loss.tobytes(), *(getattr(grads, name).tobytes() for name in PARTS), *(x.tobytes() for x in of_logits)))
    assert len(set(results)) == 1


@every_topology
def test_batch_mates_change_no_bit(topology: str) -> None:
    rng = np.random.default_rng(7)
    frames, labels = np.array([20, 7, 13]), np.array([9, 3, 0])
    band = random_band(rng, frames, labels, topology)
    logits, targets = rng.normal(size=(*band.first.shape, band.width, 6)).astype("f"), rng.integers(0, 6, (3, 9))
    loss, grad = tl.rnnt_loss(logits, targets, frames, labels, band=band, topology=topology)
    for b, T in enumerate(frames):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            band, first=band.first[one], end=band.end[one], frames=frames[one], labels=labels[one], mass=None
        )
        loss_too, found = tl.rnnt_loss(
            logits[one, :T], targets[one], frames[one], labels[one], band=alone, topology=topology
        )  # fmt: skip
        np.testing.assert_array_equal(loss_too, loss[one])
        np.testing.assert_array_equal(found, grad[one, :T])


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_an_utterance_that_is_not_finite_spoils_itself_alone(activation: str, floor: float) -> None:
    of, band = wide_problem()
    loss, grads = tl.joint_rnnt_loss(*of.all, band=band, activation=activation, occupancy_floor=floor, weights=[1.0, 0.0, 1.0, 1.0])
    for where in ("encoder", "predictor"):
        spoilt = dataclasses.replace(of, **{where: getattr(of, where).copy()})
        # A predictor row that some frame of the band has.
        getattr(spoilt, where)[1, int(band.first[1, 3]), 4] = np.nan
        got, found = tl.joint_rnnt_loss(*spoilt.all, band=band, activation=activation, occupancy_floor=floor)
        assert np.isnan(got).tolist() == [False, True, False, False]
        np.testing.assert_allclose(got[[0, 2, 3]], loss[[0, 2, 3]], rtol=1e-14)
        for name in PARTS:
            np.testing.assert_allclose(getattr(found, name), getattr(grads, name), rtol=0, atol=1e-4 if floor else 1e-11)
        assert not found.encoder[1].any()
        assert not found.predictor[1].any()


def test_rows_outside_of_the_band_are_not_looked_at() -> None:
    of, band = wide_problem()
    loss, grads = tl.joint_rnnt_loss(*of.all, band=band)
    untouched = ~np.isin(np.arange(of.predictor.shape[1]), band.to_ranges()[0, :9])
    early = tl.Band.from_ranges(np.broadcast_to(np.arange(4), (4, 30, 4)), of.frames, of.labels)
    dirty = dataclasses.replace(of, predictor=of.predictor.copy())
    dirty.predictor[0, 4:] = np.nan
    # A band that never reaches the last label has no path; what it does not hold, may be anything.
    got, found = tl.joint_rnnt_loss(*dirty.all, band=early)
    assert np.isposinf(got[0])
    assert not found.predictor[0].any()
    assert untouched.any()
    assert np.isfinite(loss).all()
    assert np.isfinite(grads.predictor).all()


# ---- occupancies and alignments of a band


@pytest.mark.parametrize("delay", [0.0, -0.4])
@every_topology
@every_dtype
def test_occupancy_and_alignment(dtype: str, topology: str, delay: float) -> None:
    rng = np.random.default_rng([8, FLOATS.index(dtype), TOPOLOGIES.index(topology)])
    for _ in range(12):
        of = random_banded(rng, dtype, topology)
        options: dict[str, Any] = {"topology": topology, "delay_penalty": delay}
        noise = path_noise(dtype, of.steps, of.largest + abs(delay) * of.band.frames.max())
        loss, *pair = reference.occupancy(*of.arguments, **of.rows, **options)
        reach = noise * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0)))
        for arguments in (of.arguments, of.packed):
            got = tl.occupancy(*arguments, blank=of.blank, band=of.band, fastemit_lambda=0.5, **options)
            expect_close(got.loss, loss, reach)
            for array, exact in zip((got.blank, got.label), pair, strict=True):
                T, S = array.shape[1:]
                expect_close(array, exact[:, :T, :S], noise)
                assert not exact[:, T:].any()
                assert not exact[:, :, S:].any()
            frames, score = reference.align(*of.arguments, **of.rows, **options)
            best = tl.align(*arguments, blank=of.blank, band=of.band, **options)
            np.testing.assert_array_equal(best.frames, frames)
            expect_close(best.score, score, reach)


@every_topology
def test_occupancy_and_alignment_of_the_joint(topology: str) -> None:
    rng = np.random.default_rng(9)
    for i in range(16):
        of, blank, band = random_joint(rng, "float64", topology, False)
        activation = ACTIVATIONS[i % len(ACTIVATIONS)]
        u = np.minimum(band.to_ranges(), of.predictor.shape[1] - 1)
        rows = np.stack([of.predictor[b][u[b]] for b in range(len(u))])
        with np.errstate(invalid="ignore"):  # NaN where there is no cell
            hidden = _activate(of.encoder[:, : u.shape[1], None] + rows, activation)[0]
        logits = hidden @ of.weight.T + (0.0 if of.bias is None else of.bias)
        wanted: dict[str, Any] = {"topology": topology, "blank": blank, "first": band.first, "end": band.end}
        loss, *pair = reference.occupancy(logits, *of.all[4:], **wanted)
        frames, score = reference.align(logits, *of.all[4:], **wanted)
        for workspace in (None, 200_000):
            options = {"topology": topology, "blank": blank, "activation": activation, "band": band, "workspace": workspace}
            got = tl.occupancy(*of.all, **options)
            assert got.blank.shape == got.label.shape == (len(u), of.encoder.shape[1], band.width)
            np.testing.assert_allclose(got.loss, loss, rtol=1e-11)
            for array, exact in zip((got.blank, got.label), pair, strict=True):
                np.testing.assert_allclose(array, exact, rtol=0, atol=1e-10)
            best = tl.align(*of.all, **options)
            np.testing.assert_array_equal(best.frames, frames)
            np.testing.assert_allclose(best.score, score, rtol=1e-11)


# ---- the predictor's rows


def gathered(rows: Array, band: tl.Band) -> Array:
    """`gather_predictor`, by NumPy."""
    u = np.minimum(band.to_ranges(), rows.shape[1] - 1)
    out = np.stack([rows[b][u[b]] for b in range(len(rows))])
    out[~columns_of(band)] = 0
    return out


def gather_problem(rng: np.random.Generator, dtype: str) -> tuple[Array, tl.Band]:
    B, T, U, H = (int(rng.integers(1, n + 1)) for n in (4, 9, 6, 40))
    frames, labels = random_lengths(rng, B, T, U, "regular")
    band = random_band(rng, frames, labels, "regular", padded=T)
    rows = rng.normal(size=(B, int(labels.max()) + 1 + int(rng.integers(0, 2)), H))
    for b, U in enumerate(labels):
        rows[b, U + 1 :] = np.nan
    return rows.astype(numpy_dtype(dtype)), band


@every_dtype
def test_gather(dtype: str) -> None:
    rng = np.random.default_rng(10)
    for _ in range(25):
        rows, band = gather_problem(rng, dtype)
        got = tl.gather_predictor(rows, band)
        assert got.shape == (*band.first.shape, band.width, rows.shape[2])
        assert got.dtype == rows.dtype
        np.testing.assert_array_equal(got, gathered(rows, band))
        wide = np.full((rows.shape[0], 2 * rows.shape[1], rows.shape[2] + 3), 7, rows.dtype)
        views = [rows[::-1].copy()[::-1], np.asfortranarray(rows), np.repeat(rows, 2, axis=2)[..., ::2], wide[:, ::2, 1:-2]]
        views[-1][...] = rows
        for view in views:
            np.testing.assert_array_equal(tl.gather_predictor(view, band), got)


@every_dtype
def test_gather_backward(dtype: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(25):
        rows, band = gather_problem(rng, dtype)
        gradient = rng.normal(size=(*band.first.shape, band.width, rows.shape[2])).astype(rows.dtype)
        real = columns_of(band)
        gradient[~real] = np.nan  # of cells that are not there nothing is read
        expected = np.zeros(rows.shape)
        for b, t, s in np.argwhere(real):
            expected[b, band.first[b, t] + s] += gradient[b, t, s].astype(np.float64)
        got = tl.gather_predictor_backward(gradient, band, rows.shape[1])
        assert got.dtype == rows.dtype
        expect_close(got, expected, 16 * epsilon(COMPUTE[dtype]) * real.shape[1])
        base = np.full((*gradient.shape[:3], 2 * gradient.shape[3]), 7, gradient.dtype)
        for view in (base[::-1, ::-1, ::-1, ::2], np.asfortranarray(gradient)):
            view[...] = gradient
            np.testing.assert_array_equal(tl.gather_predictor_backward(view, band, rows.shape[1]), got)


def test_gather_and_its_backward_are_adjoint() -> None:
    rng = np.random.default_rng(12)
    for _ in range(30):
        rows, band = gather_problem(rng, "float64")
        rows = np.nan_to_num(rows)
        gradient = rng.normal(size=(*band.first.shape, band.width, rows.shape[2]))
        there = np.vdot(tl.gather_predictor(rows, band), gradient)
        back = np.vdot(rows, tl.gather_predictor_backward(gradient, band, rows.shape[1]))
        assert there == pytest.approx(back, rel=1e-12, abs=1e-12)


@every_topology
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_joiner_of_ones_own_gives_the_fused_loss(dtype: str, topology: str) -> None:
    rng = np.random.default_rng(13)
    of = joint_inputs(rng, [20, 13, 7], [8, 5, 0], 11, 12, dtype)
    encoder, predictor = np.nan_to_num(of.encoder), np.nan_to_num(of.predictor)
    am, lm = encoder @ of.weight.T, predictor @ of.weight.T
    _, _, occupancy = tl.simple_rnnt_loss(am, lm, *of.all[4:], topology=topology)
    for strategy in ("local", "optimal"):
        band = tl.prune(occupancy, of.frames, of.labels, s_range=3, strategy=strategy, topology=topology)
        rows = tl.gather_predictor(predictor, band)
        hidden = np.tanh(encoder[:, :, None] + rows)
        loss, grad = tl.rnnt_loss(hidden @ of.weight.T + of.bias, *of.all[4:], band=band, topology=topology, fastemit_lambda=0.1)
        of_hidden = (grad @ of.weight) * (1 - hidden * hidden)
        fused, grads = tl.joint_rnnt_loss(
            *of.all, band=band, topology=topology, fastemit_lambda=0.1, occupancy_floor=0.0
        )  # fmt: skip
        unit = 100 * epsilon(dtype)
        np.testing.assert_allclose(fused, loss, rtol=unit)
        assert error(grads.encoder, of_hidden.sum(2).astype(np.float64)) < unit
        assert error(grads.predictor, tl.gather_predictor_backward(of_hidden, band, predictor.shape[1]).astype(np.float64)) < unit
        assert error(grads.weight, np.einsum("btsv,btsh->vh", grad, hidden).astype(np.float64)) < unit
        assert error(grads.bias, grad.sum((0, 1, 2)).astype(np.float64)) < unit


# ---- borders


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 3, 0]])
@every_topology
def test_transcripts_without_labels(topology: str, labels: list[int]) -> None:
    rng = np.random.default_rng(14)
    of = joint_inputs(rng, [4, 3, 1], labels, 5, 6)
    for s_range in (1, 2, 5):
        band = tl.prune(tl.occupancy(*of.all), of.frames, of.labels, s_range=s_range, topology="regular")
        expect_same_joint(
            tl.joint_rnnt_loss(*of.all, band=band, topology=topology, occupancy_floor=0.0), of, topology=topology, **rows_of(band)
        )
        logits = rng.normal(size=(3, 4, band.width, 5))
        banded = Banded(logits, of.targets, band, 0)
        expect_same(tl.rnnt_loss(*banded.arguments, band=band, topology=topology), banded, {"topology": topology})
        np.testing.assert_array_equal(tl.gather_predictor(of.predictor, band)[2, 1:], 0)


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_fewer_frames_than_labels(topology: str) -> None:
    rng = np.random.default_rng(15)
    of = joint_inputs(rng, [2, 5, 4], [3, 3, 0], 6, 8, "float64")
    occupancy = tl.occupancy(*of.all, topology=topology)
    band = tl.prune(occupancy, of.frames, of.labels, s_range=2, topology=topology)
    assert band.mass[0] == 0
    logits = rng.normal(size=(3, 5, band.width, 6))
    for infeasible, value in (("inf", math.inf), ("zero", 0.0)):
        options = {"topology": topology, "infeasible": infeasible}
        got = tl.joint_rnnt_loss(*of.all, band=band, occupancy_floor=0.0, **options)
        expect_same_joint(got, of, **options, **rows_of(band))
        loss, grad = tl.rnnt_loss(logits, *of.all[4:], band=band, **options)
        assert got[0][0] == loss[0] == value
        assert np.isfinite(loss[1:]).all()
        assert not grad[0].any()
        assert not got[1].encoder[0].any()
    for call in (
        lambda: tl.joint_rnnt_loss(*of.all, band=band, topology=topology, infeasible="raise"),
        lambda: tl.rnnt_loss(logits, *of.all[4:], band=band, topology=topology, infeasible="raise"),
    ):
        with pytest.raises(ValueError, match=r"^targets: expected a path .* got none for utterances \[0\]"):
            call()


def test_a_band_that_misses_every_path() -> None:
    # Its last row ends before the last label; its first row begins after 0; its rows are apart.
    for rows, U in (([[0, 1], [0, 1]], 3), ([[1, 2], [1, 2]], 2), ([[0, 1], [3, 4]], 4)):
        band = tl.Band.from_ranges([rows], [2], [U])
        for topology in TOPOLOGIES:
            loss, grad = tl.rnnt_loss(np.zeros((1, 2, 2, 4)), np.ones((1, U), int), [2], [U], band=band, topology=topology)
            assert np.isposinf(loss[0])
            assert not grad.any()


def test_packed_logits_of_a_band_with_fewer_cells_than_labels() -> None:
    band = tl.Band.from_ranges([[[0], [1]]], [2], [5])
    padded, _ = tl.rnnt_loss(np.zeros((1, 2, 1, 4)), np.ones((1, 5), int), [2], [5], band=band)
    packed, _ = tl.rnnt_loss(np.zeros((2, 4)), np.ones((1, 5), int), [2], [5], band=band)
    assert np.isposinf(padded[0])
    assert np.isposinf(packed[0])


# ---- bad input


def a_band() -> tl.Band:
    return tl.Band.from_ranges([[[0, 1], [0, 1], [1, 2]], [[0, 1], [0, 1], [0, 1]]], [3, 2], [2, 1])


LOGITS: dict[str, Any] = {
    "logits": np.zeros((2, 3, 2, 4), "f"), "targets": [[1, 2], [3, -1]], "logit_lengths": [3, 2], "target_lengths": [2, 1],
}  # fmt: skip
JOINT: dict[str, Any] = {
    "encoder": np.zeros((2, 3, 5), "f"), "predictor": np.zeros((2, 3, 5), "f"), "weight": np.zeros((4, 5), "f"), "bias": None,
    "targets": [[1, 2], [3, -1]], "encoder_lengths": [3, 2], "target_lengths": [2, 1],
}  # fmt: skip
BAD_BANDS: list[tuple[Any, type[Exception], str]] = [
    (np.zeros((2, 3)), TypeError, "^band: expected a Band, got ndarray"),
    ([[0, 0, 1]], TypeError, "^band: expected a Band, got list"),
    (5, TypeError, "^band: expected a Band, got int"),
    (
        tl.Band.from_ranges([[[0, 1]] * 3] * 2, [3, 3], [2, 1]), ValueError,
        r"^band: expected the band of this batch, of frame lengths \[3, 2\], got \[3, 3\]",
    ),
    (
        tl.Band.from_ranges([[[0, 1]] * 3] * 2, [3, 2], [2, 2]), ValueError,
        r"^band: expected the band of this batch, of target lengths \[2, 1\], got \[2, 2\]",
    ),
    (
        tl.Band.from_ranges([[[0, 1]] * 3], [3], [2]), ValueError,
        r"^band: expected the band of this batch, of frame lengths \[3, 2\], got \[3\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_BANDS, ids=lambda bad: bad[2][7:60])
def test_bad_bands(bad: tuple[Any, type[Exception], str]) -> None:
    band, kind, message = bad
    for function, arguments in (
        (tl.rnnt_loss, LOGITS), (tl.occupancy, LOGITS), (tl.align, LOGITS),
        (tl.joint_rnnt_loss, JOINT), (tl.occupancy, JOINT), (tl.align, JOINT),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            function(*arguments.values(), band=band)


BAD_LOGITS: list[tuple[str, Any, str]] = [
    ("logits", np.zeros((2, 3, 3, 4), "f"), r"expected shape \(B, T, S, V\) = \(2, 3, 2, 4\), got \(2, 3, 3, 4\)"),
    ("logits", np.zeros((2, 3, 1, 4), "f"), r"expected shape \(B, T, S, V\) = \(2, 3, 2, 4\), got \(2, 3, 1, 4\)"),
    ("logits", np.zeros((3, 2, 4), "f"), r"expected 4 dimensions \(B, T, S, V\), got shape \(3, 2, 4\)"),
    ("logits", np.zeros((9, 4), "f"), r"expected shape \(sum of T_b min\(S, U_b \+ 1\), V\) = \(10, 4\), got \(9, 4\)"),
    ("logits", np.zeros((2, 2, 2, 4), "f"), r"expected lengths in \[1, T = 2\], got 3 at index 0"),
    ("targets", [[1], [3]], r"expected shape \(B, U\) = \(2, 2\), got \(2, 1\)"),
    ("targets", [[1, 4], [3, -1]], r"expected labels in \[0, V = 4\), got 4 at index \(0, 1\)"),
    ("target_lengths", [2, -1], r"expected lengths in \[0, U = .*\], got -1 at index 1"),
]


@pytest.mark.parametrize("bad", BAD_LOGITS, ids=lambda bad: bad[2][:50])
def test_bad_logits_of_a_band(bad: tuple[str, Any, str]) -> None:
    name, value, message = bad
    named = "logit_lengths" if "T = 2" in message else name
    with pytest.raises(ValueError, match=f"^{named}: {message}"):
        tl.rnnt_loss(*{**LOGITS, name: value}.values(), band=a_band())


GATHER: list[tuple[Any, Any, type[Exception], str]] = [
    (np.zeros((3, 3, 5)), a_band(), ValueError, "^band: expected one of 3 utterances .*, got target lengths"),
    (np.zeros((2, 2, 5)), a_band(), ValueError, r"^band: expected one of 2 utterances of less than 2 labels, got target lengths \[2, 1\]"),
    (np.zeros((2, 3, 5)), None, TypeError, "^band: expected a Band, got NoneType"),
    (np.zeros((2, 3, 5), int), a_band(), TypeError, "^predictor: expected dtype float16, .*, got int64"),
    (np.zeros((2, 3)), a_band(), ValueError, r"^predictor: expected 3 dimensions \(B, U\+1, H\), got shape \(2, 3\)"),
    (None, a_band(), TypeError, "^predictor: expected an array with __dlpack__, got NoneType"),
]
GATHER_BACKWARD: list[tuple[Any, Any, type[Exception], str]] = [
    (np.zeros((2, 3, 3, 5)), 3, ValueError, r"^gradient: expected shape \(B, T, S, H\) = \(2, 3, 2, 5\), got \(2, 3, 3, 5\)"),
    (np.zeros((2, 4, 2, 5)), 3, ValueError, r"^gradient: expected shape \(B, T, S, H\) = \(2, 3, 2, 5\), got \(2, 4, 2, 5\)"),
    (np.zeros((2, 3, 5)), 3, ValueError, r"^gradient: expected 4 dimensions \(B, T, S, H\), got shape \(2, 3, 5\)"),
    (np.zeros((1, 3, 2, 5)), 3, ValueError, "^band: expected one of 1 utterances .*, got target lengths"),
    (np.zeros((2, 3, 2, 5)), 2, ValueError, "^band: expected one of 2 utterances of less than 2 labels, got target lengths"),
    (np.zeros((2, 3, 2, 5)), 3.0, TypeError, "^labels: expected an int, got float"),
    (np.zeros((2, 3, 2, 5)), True, TypeError, "^labels: expected an int, got bool"),
    (np.zeros((2, 3, 2, 5)), None, TypeError, "^labels: expected an int, got NoneType"),
    (np.zeros((2, 3, 2, 5), int), 3, TypeError, "^gradient: expected dtype float16, .*, got int64"),
]


@pytest.mark.parametrize("bad", GATHER, ids=lambda bad: bad[3][1:50])
def test_bad_inputs_of_gather(bad: tuple[Any, Any, type[Exception], str]) -> None:
    with pytest.raises(bad[2], match=bad[3]):
        tl.gather_predictor(bad[0], bad[1])


@pytest.mark.parametrize("bad", GATHER_BACKWARD, ids=lambda bad: bad[3][1:50])
def test_bad_inputs_of_gather_backward(bad: tuple[Any, Any, type[Exception], str]) -> None:
    with pytest.raises(bad[2], match=bad[3]):
        tl.gather_predictor_backward(bad[0], a_band(), bad[1])


def test_the_inputs_themselves_are_good() -> None:
    assert np.isfinite(tl.rnnt_loss(*LOGITS.values(), band=a_band())[0]).all()
    assert np.isfinite(tl.joint_rnnt_loss(*JOINT.values(), band=a_band())[0]).all()
    assert tl.gather_predictor(np.zeros((2, 3, 5)), a_band()).shape == (2, 3, 2, 5)
    assert tl.gather_predictor_backward(np.zeros((2, 3, 2, 5)), a_band(), 3).shape == (2, 3, 5)


# ---- bands that nobody checked, as they may come from a device

NONE = 2**31 - 1
# First labels of five frames of an utterance of four labels, three columns wide.
UNORDERED = [[0, 1, 0, 1, 2], [0, 2, 1, 2, 2], [2, 1, 1, 1, 0], [0, 0, NONE, 1, 2], [0, 4, 4, 2, 2]]
BELOW = [[-1, 0, 1, 2, 2], [-NONE - 1, 0, 1, 2, 2], [-1, -1, 0, 1, 2], [0, -3, 1, 2, 2], [-9, -8, -7, -6, 2]]
BEYOND = [[0, 0, 1, 2, 5], [0, 0, 1, 2, 99], [0, 1, 2, 2, NONE], [NONE] * 5, [0, 5, 5, 5, 5]]


def by_hand(first: list[int], ends: str) -> tl.Band:
    """A band of two utterances: this one, and a good one after it."""
    good = tl.Band.from_ranges([[[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]] * 2, [5, 5], [4, 4])
    rows = good.first.copy()
    rows[0] = first
    end = {"kept": good.end, "moved": np.minimum(rows.astype(np.int64) + 3, 5).astype(np.int32), "junk": good.end.copy()}[ends]
    if ends == "junk":
        end[0] = [NONE, -5, 7, -NONE - 1, 3]
    return dataclasses.replace(good, first=rows, end=end)


@pytest.mark.parametrize("ends", ["kept", "moved", "junk"])
@pytest.mark.parametrize("first", [*UNORDERED, *BELOW, *BEYOND], ids=str)
@every_topology
def test_a_band_out_of_order_is_no_number(topology: str, first: list[int], ends: str) -> None:
    rng = np.random.default_rng(16)
    band = by_hand(first, ends)
    of = joint_inputs(rng, [5, 5], [4, 4], 6, 7)
    # Around all that is read or written over there is something that must stay as it is.
    base = np.full((4, 5, 3, 6), 7, np.float32)
    base[1:3] = rng.normal(size=(2, 5, 3, 6))
    before = base.copy()
    integers = of.targets, [5, 5], [4, 4]
    loss, grad = tl.rnnt_loss(base[1:3], *integers, band=band, topology=topology, inplace=True)
    alone = tl.Band.from_ranges(band.to_ranges()[1:], [5], [4])
    expected, of_alone = tl.rnnt_loss(before[2:3], of.targets[1:], [5], [4], band=alone, topology=topology)
    for edge in (0, 3):
        np.testing.assert_array_equal(base[edge], before[edge])
    packed, grad_packed = tl.rnnt_loss(before[1:3].reshape(-1, 6), *integers, band=band, topology=topology)
    fused, grads = tl.joint_rnnt_loss(*of.all, band=band, topology=topology)
    occupancy = tl.occupancy(before[1:3], *integers, band=band, topology=topology)
    best = tl.align(before[1:3], *integers, band=band, topology=topology)
    gathered_rows = tl.gather_predictor(of.predictor, band)
    back = tl.gather_predictor_backward(gathered_rows, band, 5)
    assert np.isfinite(gathered_rows).all()
    assert np.isfinite(back).all()
    for values, gradient in ((loss, grad), (packed, grad_packed.reshape(2, 5, 3, 6)), (fused, grads.encoder), (fused, grads.predictor)):
        # Where rows lie beyond the last label there is no path; else, what they mean is not known.
        assert np.isnan(values[0]) or (np.isposinf(values[0]) and first in BEYOND), values
        assert not gradient[0].any()
    assert not occupancy.blank[0].any()
    assert not occupancy.label[0].any()
    assert not np.isfinite(best.score[0])
    assert (best.frames[0] == -1).all()
    # The other utterance is as if it were alone.
    np.testing.assert_array_equal(loss[1:], expected)
    np.testing.assert_array_equal(grad[1:], of_alone)
    assert np.isfinite(fused[1])


def test_rows_in_any_memory() -> None:
    # Whoever makes a band by hand need not know how kernels read it.
    rng = np.random.default_rng(17)
    good = a_band()
    rows, gradient = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 2, 5))
    expected, back = tl.gather_predictor(rows, good), tl.gather_predictor_backward(gradient, good, 3)
    for change in (
        lambda x: x.astype(np.int64), np.asfortranarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2], lambda x: x[:, ::-1].copy()[:, ::-1],
    ):  # fmt: skip
        band = dataclasses.replace(good, first=change(good.first), end=change(good.end))
        np.testing.assert_array_equal(tl.gather_predictor(rows, band), expected)
        np.testing.assert_array_equal(tl.gather_predictor_backward(gradient, band, 3), back)
        loss, _ = tl.rnnt_loss(*LOGITS.values(), band=band)
        np.testing.assert_array_equal(loss, tl.rnnt_loss(*LOGITS.values(), band=good)[0])
