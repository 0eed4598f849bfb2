"""`joint_rnnt_loss` against the reference, and what it promises beside: bounded memory, repeatable bits, no side effects."""

import dataclasses
import re
import threading
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import transducer_loss as tl
from helpers import (
    FLOATS,
    PEAK,
    TOPOLOGIES,
    Array,
    Batch,
    epsilon,
    error,
    expect_close,
    naive_gradient,
    numpy_dtype,
    path_noise,
    random_lengths,
    random_targets,
    rounding,
    run_python,
)
from transducer_loss import joint_loss, processors, reference, tiling
from transducer_loss.joint import ACTIVATIONS

PARTS = ("encoder", "predictor", "weight", "bias")
every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)


@dataclasses.dataclass
class Inputs:
    """Positional arguments of `joint_rnnt_loss`."""

    encoder: Array
    predictor: Array
    weight: Array
    bias: Array | None
    targets: Array
    frames: Array
    labels: Array

    @property
    def all(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def inputs(
    rng: np.random.Generator, frames: Any, labels: Any, V: int, H: int, dtype: str = "float32", *, bias: bool = True,
    without: int | None = None, scale: float = 1.0,
) -> Inputs:  # fmt: skip
    """Random ones, NaN in the padding."""
    frames, labels = np.asarray(frames), np.asarray(labels)
    B, T, U = len(frames), int(frames.max()), int(labels.max())
    encoder, predictor, weight, offset = (
        rng.normal(0, scale, size).astype(numpy_dtype(dtype)) for size in ((B, T, H), (B, U + 1, H), (V, H), (V,))
    )
    for b in range(B):
        encoder[b, frames[b] :] = np.nan
        predictor[b, labels[b] + 1 :] = np.nan
    targets = random_targets(rng, labels, U + 1, V, without)
    return Inputs(encoder, predictor, weight, offset if bias else None, targets, frames, labels)


def expect_same(got: tuple[Any, Any], of: Inputs, mask: Array | None = None, **options: Any) -> None:
    """Raise unless loss and gradients are the reference's, but for what rounding does to them."""
    loss, exact = reference.joint_rnnt_loss(*of.all, mask=mask, **options)
    dtype = of.encoder.dtype.name
    # Logits are sums of H products: their error is a few units of the sum of the products' sizes.
    flat = options.get("activation", "tanh") in ("tanh", "sigmoid")
    hidden = 1.0 if flat else sum(np.nanmax(np.abs(x.astype(np.float64))) for x in (of.encoder, of.predictor))
    hidden *= 1.0 if mask is None else mask.max()
    weight = of.weight.astype(np.float64)
    largest = hidden * np.abs(weight).sum(1).max() + (0.0 if of.bias is None else np.abs(of.bias.astype(np.float64)).max())
    if options.get("offset") is not None:
        largest += np.abs(options["offset"]).max()
    steps = int((of.frames + of.labels).max())
    delay = abs(options.get("delay_penalty", 0.0)) * of.frames.max()
    relative = path_noise(dtype, steps, largest + delay)
    expect_close(got[0], loss, relative * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))
    upstream = np.abs(options.get("weights", np.ones(len(loss)))) * (1 + options.get("fastemit_lambda", 0.0))
    for name, expected in zip(PARTS, exact, strict=True):
        actual = getattr(got[1], name)
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == dtype
        # An entry is a sum over the cells that paths use, T + U of them, of their gradient times a factor.
        factor = {"encoder": np.abs(weight).max(), "predictor": np.abs(weight).max(), "weight": hidden, "bias": 1.0}[name]
        used = steps * (upstream.sum() if name in ("weight", "bias") else upstream.max())
        expect_close(actual, expected, relative * used * factor * (1.0 if mask is None else mask.max()))


def random_problem(rng: np.random.Generator, dtype: str, topology: str, hat: bool) -> tuple[Inputs, int]:
    """Small and ragged; and the blank."""
    B, T, U, V, H = (int(rng.integers(1, n + 1)) for n in (3, 6, 4, 8, 20))
    V = max(V, 2) if hat else V
    frames, labels = random_lengths(rng, B, T, U, topology)
    blank = int(rng.integers(-V, V))
    return inputs(rng, frames, labels, V, H, dtype, bias=bool(rng.random() < 0.8), without=blank % V if hat else None), blank


VARIANTS: dict[str, Any] = {
    "plain": lambda rng, batch: {},
    "hat": lambda rng, batch: {"hat": True},
    "fastemit": lambda rng, batch: {"fastemit_lambda": float(rng.choice([0.01, 0.5, 3.0]))},
    "delay": lambda rng, batch: {"delay_penalty": float(rng.choice([0.3, -0.7, 2.0]))},
    "weights": lambda rng, batch: {"weights": rng.choice([0.0, -1.5, 0.25, 3.0], batch), "fastemit_lambda": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@every_topology
@every_dtype
def test_random_batches(dtype: str, topology: str, variant: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    finite = []
    for i in range(12):
        of, blank = random_problem(rng, dtype, topology, variant == "hat")
        options = {"blank": blank, "topology": topology, "activation": ACTIVATIONS[i % len(ACTIVATIONS)]}
        options |= VARIANTS[variant](rng, len(of.frames))
        got = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, **options)
        expect_same(got, of, **options)
        assert got[1].dropped == 0.0
        finite += np.isfinite(got[0]).tolist()
    assert np.mean(finite) > 0.5


@pytest.mark.parametrize("H", [*range(1, 20), 63, 64, 65, 130])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_every_number_of_features(activation: str, H: int) -> None:
    # Vector loops have a body and a tail: every length of tail.
    of = inputs(np.random.default_rng(H), [5, 3], [2, 3], 7, H, scale=0.7)
    expect_same(tl.joint_rnnt_loss(*of.all, activation=activation, occupancy_floor=0.0), of, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_dtype
def test_activations_and_their_slopes(dtype: str, activation: str) -> None:
    # One cell, so that each feature shows the value of its activation in dW and the slope in dE.
    rng = np.random.default_rng(0)
    H = 2000
    of = inputs(rng, [1], [0], 2, H, dtype)
    of.encoder[0, 0] = np.concatenate([np.linspace(-30, 30, H // 2), *(s * np.logspace(-6, 2, H // 4) for s in (-1, 1))])
    of.predictor[...] = 0
    of.weight /= np.asarray(1000, of.weight.dtype)
    got = tl.joint_rnnt_loss(*of.all, activation=activation)[1]
    _, (by_encoder, _, by_weight, by_bias) = reference.joint_rnnt_loss(*of.all, activation=activation)
    # A few units of the slope and what rounding z changes in it; of the value, or of z or 1 where terms of it cancel.
    z = np.abs(of.encoder[0, 0].astype(np.float64))
    unit = 16 * epsilon("float64" if dtype == "float64" else "float32")
    expect_close(got.encoder[0, 0], by_encoder[0, 0], unit * (1 + z) * (np.abs(by_bias) @ np.abs(of.weight.astype(np.float64))))
    hidden = np.maximum(np.abs(by_weight[1] / by_bias[1]), np.minimum(z, 1))
    expect_close(got.weight, by_weight, unit * hidden * np.abs(by_bias)[:, None])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_read_exactly(dtype: str) -> None:
    # With classes of equal probability and a weight of 2 the gradient by W is the features themselves.
    patterns = np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype))
    features = patterns[np.isfinite(patterns.astype(np.float32))][None, None]
    H = features.shape[-1]
    weight = np.zeros((2, H), features.dtype)
    loss, grads = tl.joint_rnnt_loss(
        features, np.zeros_like(features), weight, None, [[]], [1], [0], activation="identity", weights=[2.0]
    )
    assert abs(loss[0] - np.log(2)) <= 1e-7
    np.testing.assert_array_equal(grads.weight[1], features[0, 0])
    np.testing.assert_array_equal(grads.weight[0], -features[0, 0])


def philox_mask(B: int, T: int, U1: int, H: int, probability: float, seed: int) -> Array:
    """The factors of dropout: Philox 4x32-10 of the counter (h // 4, u, t, b), of which word h % 4 belongs to h."""
    b, t, u, h = (i.astype(np.uint64) for i in np.indices((B, T, U1, H)))
    c0, c1, c2, c3 = h // 4, u, t, b
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], -1)
    bits = np.take_along_axis(words, (h % 4).astype(np.int64)[..., None], -1)[..., 0]
    return np.where(bits < int(probability * 2**32), 0.0, 1 / (1 - probability))


def test_philox_is_the_published_one() -> None:
    # Random123's known answer for counter and key of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    for word, bits in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        above, below = (bits + 1) / 2**32, bits / 2**32
        assert philox_mask(1, 1, 1, 4, above, 0)[0, 0, 0, word] == 0.0
        assert philox_mask(1, 1, 1, 4, below, 0)[0, 0, 0, word] > 1.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_dtype
def test_dropout(dtype: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    for probability, seed in ((0.1, 0), (0.5, 12345), (0.9, (1 << 62) + 977)):
        of = inputs(rng, [7, 4], [3, 2], 6, 10, dtype)
        mask = philox_mask(2, 7, 4, 10, probability, seed)
        assert 0 < (mask == 0).mean() < 1
        got = tl.joint_rnnt_loss(*of.all, activation=activation, dropout=probability, seed=seed, occupancy_floor=0.0)
        expect_same(got, of, mask, activation=activation)


def test_dropout_does_not_depend_on_how_the_batch_is_cut() -> None:
    of = inputs(np.random.default_rng(2), [30, 20, 25], [6, 3, 8], 40, 16, "float64")
    whole = tl.joint_rnnt_loss(*of.all, dropout=0.3, seed=5)
    cut = tl.joint_rnnt_loss(*of.all, dropout=0.3, seed=5, workspace=least(of))
    other = tl.joint_rnnt_loss(*of.all, dropout=0.3, seed=6)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-14)
    assert not np.isclose(other[0], whole[0]).any()


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path(topology: str) -> None:
    of = inputs(np.random.default_rng(3), [2, 5, 4], [3, 3, 0], 6, 8, "float64")
    for infeasible in ("inf", "zero"):
        options = {"topology": topology, "infeasible": infeasible}
        got = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, **options)
        expect_same(got, of, **options)
        assert got[0][0] == {"inf": np.inf, "zero": 0.0}[infeasible]
        assert not got[1].encoder[0].any()
    with pytest.raises(ValueError, match=r"targets: expected a path for every utterance, got none for utterances \[0\]"):
        tl.joint_rnnt_loss(*of.all, topology=topology, infeasible="raise")


@every_topology
def test_wider_than_the_shared_memory(topology: str) -> None:
    if topology == "regular":
        of = inputs(np.random.default_rng(4), [3, 2], [1100, 1023], 3, 4)
        expect_same(tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0), of)
        return
    # The others need as many frames, where the reference takes too long: the logits' own loss is another witness.
    of = inputs(np.random.default_rng(4), [1060], [1050], 3, 4)
    loss, grads = tl.joint_rnnt_loss(*of.all, topology=topology, activation="identity", workspace="40MiB")
    logits = (of.encoder[:, :, None] + of.predictor[:, None]).astype(np.float64) @ of.weight.T + of.bias
    expected, grad = tl.rnnt_loss(logits, *of.all[4:], topology=topology)
    assert abs(loss[0] - expected[0]) <= 1e-5 * expected[0]
    assert error(grads.encoder, (grad @ of.weight).sum(2)) < 1e-5
    assert error(grads.predictor, (grad @ of.weight).sum(1)) < 1e-5


def strided(array: Array, how: str) -> Array:
    """An equal array with other strides."""
    if how == "features apart":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if how == "reversed":
        return array[::-1].copy()[::-1]
    if how == "columns first":
        return np.asfortranarray(array)
    return np.pad(array, [(1, 2)] * array.ndim)[tuple([slice(1, -2)] * array.ndim)]


@pytest.mark.parametrize("how", ["features apart", "reversed", "columns first", "inside"])
@every_dtype
def test_strides_of_the_inputs(dtype: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = inputs(np.random.default_rng(5), [7, 4], [3, 2], 6, 10, dtype)
    expected, grads = tl.joint_rnnt_loss(*of.all)
    gemm = processors.Host.gemm

    def checked(self: Any, a: Array, b: Array, out: Array, *options: Any) -> None:
        # Otherwise NumPy copies the matrix for every product, beyond the workspace.
        for matrix in (a, b, out):
            assert matrix.itemsize in matrix.strides or 1 in matrix.shape
            assert min(matrix.strides) > 0
        gemm(self, a, b, out, *options)

    monkeypatch.setattr(processors.Host, "gemm", checked)
    views = [strided(getattr(of, name), how) for name in PARTS]
    assert any(view.strides != getattr(of, name).strides for view, name in zip(views, PARTS, strict=True))
    loss, got = tl.joint_rnnt_loss(*views, *of.all[4:])
    # BLAS may take another order of sums for other strides.
    noise = 64 * epsilon("float64" if dtype == "float64" else "float32")
    expect_close(loss, expected.astype(np.float64), noise * np.abs(expected))
    for name in PARTS:
        exact = getattr(grads, name).astype(np.float64)
        expect_close(getattr(got, name), exact, noise * np.abs(exact).max() + rounding(dtype, exact))


def test_broadcast_inputs() -> None:
    of = inputs(np.random.default_rng(6), [5, 5], [2, 2], 6, 8, "float64")
    of.encoder, of.predictor = np.broadcast_to(of.encoder[:1], (2, 5, 8)), np.broadcast_to(of.predictor[:, :1], (2, 3, 8))
    of.weight = np.broadcast_to(of.weight[:1], (6, 8))
    expect_same(tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0), of)


@every_topology
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_that_of_a_naive_run_in_the_same_type(dtype: str, topology: str) -> None:
    of = inputs(np.random.default_rng(7), [40, 25], [10, 6], 20, 16, dtype)
    exact = reference.joint_rnnt_loss(*of.all, topology=topology)[1]
    batch = Batch(np.zeros(0), of.targets[:, :10], of.frames, of.labels, 0)
    encoder, predictor = (np.where(np.isnan(x), x.dtype.type(0), x) for x in (of.encoder, of.predictor))
    hidden = np.tanh(encoder[:, :, None] + predictor[:, None])
    batch.logits = (hidden @ of.weight.T).astype(hidden.dtype) + of.bias
    grad = naive_gradient(batch, topology)
    back = (grad @ of.weight).astype(hidden.dtype) * (1 - hidden * hidden)
    flat = grad.reshape(-1, 20)
    rival = back.sum(2), back.sum(1), flat.T @ hidden.reshape(-1, 16), flat.sum(0)
    got = tl.joint_rnnt_loss(*of.all, topology=topology)[1]
    for name, of_rival, expected in zip(PARTS, rival, exact, strict=True):
        naive = error(of_rival, expected)
        assert epsilon(dtype) / 4 < naive < 3000 * epsilon(dtype)  # it is a rival, not a mistake
        assert error(getattr(got, name), expected) <= naive


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_utterance_that_is_not_finite_spoils_itself_alone(activation: str, dropout: float, floor: float) -> None:
    of = inputs(np.random.default_rng(8), [6, 5, 4], [2, 3, 1], 7, 9, "float64")
    mask = philox_mask(3, 6, 4, 9, dropout, 3)
    options = {"activation": activation, "dropout": dropout, "seed": 3, "occupancy_floor": floor}
    for where, bad in (("encoder", np.nan), ("predictor", np.inf), ("encoder", -np.inf)):
        spoilt = dataclasses.replace(of, **{where: getattr(of, where).copy()})
        getattr(spoilt, where)[1, 2, 4] = bad
        loss, grads = tl.joint_rnnt_loss(*spoilt.all, **options)
        if np.isfinite(loss[1]):  # a flat activation has a value at infinity
            assert np.isinf(bad)
            assert activation in ("tanh", "sigmoid", "relu")
            continue
        assert np.isnan(loss[1])
        without = dataclasses.replace(of, **{name: getattr(of, name)[[0, 2]] for name in ("encoder", "predictor", "targets")})
        without.frames, without.labels = of.frames[[0, 2]], of.labels[[0, 2]]
        expected, exact = reference.joint_rnnt_loss(*without.all, mask=mask[[0, 2]], activation=activation)
        np.testing.assert_allclose(loss[[0, 2]], expected, rtol=1e-12)
        for name, value in zip(PARTS, exact, strict=True):
            actual = getattr(grads, name)
            if name in ("encoder", "predictor"):
                assert not actual[1].any()
                actual = actual[[0, 2]]
            np.testing.assert_allclose(actual, value, rtol=0, atol=1e-5 if floor else 1e-12)


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_a_weight_that_is_not_finite_leaves_no_gradient(floor: float) -> None:
    of = inputs(np.random.default_rng(9), [6, 5], [2, 3], 7, 9)
    of.weight[3, 3] = np.nan
    loss, grads = tl.joint_rnnt_loss(*of.all, occupancy_floor=floor)
    assert np.isnan(loss).all()
    assert not any(getattr(grads, name).any() for name in PARTS)


def test_a_class_that_is_masked_out() -> None:
    of = inputs(np.random.default_rng(10), [6, 5], [2, 3], 7, 9, "float64", without=3)
    assert of.bias is not None
    of.bias[3] = -np.inf
    loss, grads = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0)
    expected, exact = reference.joint_rnnt_loss(*of.all)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    for name, value in zip(PARTS, exact, strict=True):
        np.testing.assert_allclose(getattr(grads, name), value, rtol=0, atol=1e-12)
    assert grads.bias[3] == 0.0


def least(of: Inputs) -> int:
    """The smallest workspace, as the error for a smaller one states it."""
    with pytest.raises(ValueError, match="workspace: expected at least") as raised:
        tl.joint_rnnt_loss(*of.all, workspace=1)
    found = re.search(r"at least (\d+) bytes", str(raised.value))
    assert found is not None
    return int(found[1])


def planned(of: Inputs, workspace: int | None) -> tiling.Plan:
    return tiling.plan(joint_loss.problem(
        *of.all, workspace=workspace, blank=0, topology="regular", fastemit_lambda=0.0, delay_penalty=0.0, hat=False,
        infeasible="inf",
    ))  # fmt: skip


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@every_dtype
def test_any_workspace_gives_the_same_result(dtype: str, floor: float) -> None:
    of = inputs(np.random.default_rng(11), [40, 1, 33, 17, 5], [9, 4, 0, 12, 5], 70, 24, dtype)
    whole = tl.joint_rnnt_loss(*of.all, occupancy_floor=floor)
    assert planned(of, None).retained == (True,)
    smallest = least(of)
    with pytest.raises(ValueError, match=f"expected at least {smallest} bytes .* got {smallest - 1}$"):
        tl.joint_rnnt_loss(*of.all, workspace=smallest - 1)
    seen = set()
    for workspace in (smallest << n for n in range(7)):
        plan = planned(of, workspace)
        seen |= {("strips", plan.strips), ("tile", plan.tile), *(("kept", kept) for kept in plan.retained)}
        loss, grads = tl.joint_rnnt_loss(*of.all, workspace=workspace, occupancy_floor=floor)
        unit = 64 * epsilon("float64" if dtype == "float64" else "float32")
        expect_close(loss, whole[0].astype(np.float64), unit * whole[0])
        for name in PARTS:
            exact = getattr(whole[1], name).astype(np.float64)
            # Both are rounded.
            expect_close(getattr(grads, name), exact, unit * np.abs(exact).max() + rounding(dtype, exact))
        assert grads.dropped == pytest.approx(whole[1].dropped, abs=2e-3)
    assert {("strips", 1), ("strips", 2), ("strips", 4), ("strips", 8), ("tile", 8), ("kept", True), ("kept", False)} <= seen


@pytest.mark.parametrize("workspace", ["2MB", "2 MiB", " 2000KB ", "0.5GiB", 2**21, np.int64(2**21), "2097152", "2097152 b"])
def test_ways_to_say_a_workspace(workspace: Any) -> None:
    of = inputs(np.random.default_rng(12), [5], [2], 7, 4)
    assert np.isfinite(tl.joint_rnnt_loss(*of.all, workspace=workspace)[0]).all()


@pytest.mark.parametrize(
    ("workspace", "count"),
    [("1", 1), ("3KB", 3000), ("3KiB", 3072), ("1.5MiB", 3 << 19), ("2 gb", 2 * 10**9), ("1GiB", 1 << 30), (None, 77)],
)
def test_bytes_of_a_workspace(workspace: Any, count: int) -> None:
    assert joint_loss.workspace_bytes(workspace, 77) == count


def effective(of: Inputs, **options: Any) -> list[Array]:
    """Summed occupancy of each cell, (T_b, U_b + 1) for each utterance."""
    raw = tl.occupancy(*of.all, topology=options.get("topology", "regular"))
    gb, ge = reference.effective_occupancy(raw.blank, raw.label, **options)
    return [(gb + ge)[b, :T, : U + 1] for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True))]


@every_topology
def test_cells_below_the_floor_are_dropped(topology: str) -> None:
    of = inputs(np.random.default_rng(13), [30, 22, 17, 9], [8, 11, 3, 4], 12, 16, "float64", scale=1.5)
    weights = np.array([1.0, -2.0, 0.0, 0.5])
    options = {"topology": topology, "fastemit_lambda": 0.2}
    full = tl.joint_rnnt_loss(*of.all, weights=weights, occupancy_floor=0.0, **options)[1]
    cells = effective(of, **options)
    for floor in (1e-6, 1e-3, 0.05):
        grads = tl.joint_rnnt_loss(*of.all, weights=weights, occupancy_floor=floor, **options)[1]
        kept, bound, of_cells = 0, 0.0, 0.0
        for n, T, U, weight in zip(cells, of.frames, of.labels, weights, strict=True):
            low = n < floor * (T + U) / n.size
            kept += 0 if weight == 0 else int((~low).sum())
            of_cells += 2 * abs(weight) * n[low].sum()
            bound += 2 * abs(weight) * floor * (T + U)
        assert grads.dropped == pytest.approx(1 - kept / sum(n.size for n in cells), abs=1e-12)
        # |dG|_1 <= 2 |w_b| times what is dropped, and the bias' gradient is the sum of G.
        lost = np.abs(grads.bias - full.bias).sum()
        assert 0 < lost <= of_cells + 1e-12
        assert of_cells <= bound


def test_default_floor_drops_cells_and_changes_nothing_that_matters() -> None:
    rng = np.random.default_rng(14)
    # A model that knows what it says: the predictor and the frames agree on where the labels are.
    T, U, H, V = 200, 40, 64, 50
    of = inputs(rng, [T, T - 20], [U, U - 5], V, H, "float64", scale=0.3)
    place = np.linspace(0, 1, H)
    of.encoder = np.nan_to_num(of.encoder) + 8 * (np.linspace(0, 1, T)[None, :, None] - place)
    of.predictor = np.nan_to_num(of.predictor) - 8 * (np.linspace(0, 1, U + 1)[None, :, None] - place)
    of.weight[0] = -np.abs(of.weight[0])
    loss, full = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0)
    loss_too, grads = tl.joint_rnnt_loss(*of.all)
    np.testing.assert_array_equal(loss_too, loss)
    assert 0.3 < grads.dropped < 1.0
    for name in PARTS:
        assert error(getattr(grads, name), getattr(full, name)) < 1e-6


def test_utterances_without_weight_are_dropped() -> None:
    of = inputs(np.random.default_rng(15), [6, 6], [2, 2], 5, 4)
    of.encoder[0] = 0.0
    grads = tl.joint_rnnt_loss(*of.all, weights=[0.0, 1.0])[1]
    assert grads.dropped >= 0.5
    assert not grads.encoder[0].any()
    grads = tl.joint_rnnt_loss(*of.all, weights=[0.0, 0.0])[1]
    assert grads.dropped == 1.0
    assert not any(getattr(grads, name).any() for name in PARTS)


def test_loss_alone() -> None:
    of = inputs(np.random.default_rng(16), [40, 30], [9, 5], 30, 8)
    loss, grads = tl.joint_rnnt_loss(*of.all, gradient=False)
    assert grads is None
    np.testing.assert_array_equal(loss, tl.joint_rnnt_loss(*of.all)[0])


def test_gradient_made_later() -> None:
    of = inputs(np.random.default_rng(17), [40, 30], [9, 5], 30, 8)
    problem = joint_loss.problem(
        *of.all, blank=0, topology="regular", fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf"
    )
    done = joint_loss.forward(problem, later=True)
    assert done.gradients is None
    weights = np.array([0.5, -2.0], np.float32)
    first, second = (joint_loss.backward(problem, done, weights).native for _ in range(2))
    loss, grads = tl.joint_rnnt_loss(*of.all, weights=weights)
    np.testing.assert_array_equal(done.native, loss)
    for name, one, two in zip(PARTS, first, second, strict=True):
        np.testing.assert_array_equal(one, two)
        assert error(one, getattr(grads, name).astype(np.float64)) < 1e-6


def large() -> Inputs:
    """Large enough for several tiles and threads, in all eight strips."""
    return inputs(np.random.default_rng(18), [90, 7, 61, 80], [20, 2, 0, 17], 200, 48)


@pytest.mark.parametrize("workspace", [None, "3MiB"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_number_of_threads_changes_no_bit(dropout: float, workspace: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    of, results = large(), []
    for threads in ("1", "2", "4", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        loss, grads = tl.joint_rnnt_loss(*of.all, dropout=dropout, workspace=workspace)
        results.append((loss.tobytes(), *(getattr(grads, name).tobytes() for name in PARTS), grads.dropped))
    assert len(set(results)) == 1


def test_calls_side_by_side() -> None:
    of = large()
    alone, results = tl.joint_rnnt_loss(*of.all), {}
    start = threading.Barrier(2)

    def call(name: int) -> None:
        start.wait()
        results[name] = [tl.joint_rnnt_loss(*of.all) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for loss, grads in results[0] + results[1]:
        np.testing.assert_array_equal(loss, alone[0])
        np.testing.assert_array_equal(grads.weight, alone[1].weight)


def blas_threads() -> list[int]:
    """Of NumPy's own; other packages bring theirs, which no loss calls."""
    of_blas = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    return [library["num_threads"] for library in of_blas if "numpy" in library["filepath"]] or [
        library["num_threads"] for library in of_blas
    ]


def test_threads_of_blas_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    of = inputs(np.random.default_rng(19), [3, 6], [4, 2], 5, 4)
    during = []
    original = processors.Host.gemm

    def gemm(*arguments: Any, **options: Any) -> None:
        during.extend(blas_threads())
        original(*arguments, **options)

    monkeypatch.setattr(processors.Host, "gemm", gemm)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        assert set(blas_threads()) == {3}
        tl.joint_rnnt_loss(*of.all)
        assert set(blas_threads()) == {3}
        with pytest.raises(ValueError, match="path"):
            tl.joint_rnnt_loss(*of.all, topology="modified", infeasible="raise")
        assert set(blas_threads()) == {3}
        monkeypatch.setattr(processors.Host, "gemm", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tl.joint_rnnt_loss(*of.all)
        assert set(blas_threads()) == {3}
        with pytest.raises(ValueError, match="workspace"):
            tl.align(*of.all, workspace=1)
        assert set(blas_threads()) == {3}
    assert set(during) == {1}


def test_a_forked_child_can_go_on() -> None:
    program = """
        import json, os, signal
        import numpy as np
        import transducer_loss as tl

        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=size).astype(np.float32) for size in ((2, 60, 32), (2, 16, 32), (100, 32), (100,))]
        arguments = *arrays, rng.integers(1, 100, (2, 15)), [60, 50], [15, 9]
        loss, grads = tl.joint_rnnt_loss(*arguments)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            again, of_child = tl.joint_rnnt_loss(*arguments)
            os._exit(0 if np.array_equal(again, loss) and np.array_equal(of_child.weight, grads.weight) else 3)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    """
    assert run_python(program, OMP_NUM_THREADS="4") == 0


def test_a_child_of_a_fork_in_the_middle_of_a_call_can_go_on() -> None:
    program = """
        import json, os, signal
        import numpy as np
        import transducer_loss as tl
        from transducer_loss import processors

        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=size) for size in ((1, 6, 4), (1, 3, 4), (5, 4), (5,))]
        arguments = *arrays, [[1, 2]], [6], [2]
        loss, _ = tl.joint_rnnt_loss(*arguments)
        lock = processors._one_blas_thread._lock
        lock.acquire()  # as another thread may have done, which the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if tl.joint_rnnt_loss(*arguments)[0] == loss else 3)
        lock.release()
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    """
    assert run_python(program) == 0


@pytest.mark.parametrize(("dtype", "workspace"), [("float32", 32), ("float32", 8), ("float64", 64)])
def test_memory_beyond_inputs_and_outputs(dtype: str, workspace: int) -> None:
    program = PEAK + f"""
    rng = np.random.default_rng(0)
    def arguments(B, T, U):
        arrays = [rng.normal(size=size).astype("{dtype}") for size in ((B, T, 64), (B, U + 1, 64), (600, 64), (600,))]
        return *arrays, rng.integers(1, 600, (B, U)), [T] * B, [U] * B
    def call(B, T, U):
        ready = arguments(B, T, U)
        return peak(lambda: tl.joint_rnnt_loss(*ready, workspace="{workspace}MiB"),
                    lambda result: [getattr(result[1], name) for name in ("encoder", "predictor", "weight", "bias")])[0]
    call(1, 20, 5)
    print(json.dumps(call(6, 150, 40)))
    """
    beyond = run_python(program)
    # The logits alone would take 84 MiB, twice that in float64.
    assert 2 << 20 < beyond < (workspace << 20) + 20_000_000


def test_no_subnormal_number_goes_into_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many processors take a hundred times longer for them; the cells far from every path are full of them.
    rng = np.random.default_rng(0)
    encoder, predictor = rng.normal(size=(1, 150, 8)).astype("f"), rng.normal(size=(1, 41, 8)).astype("f")
    weight, bias = (6 * rng.normal(size=(30, 8))).astype("f"), np.zeros(30, "f")
    arguments = (encoder, predictor, weight, bias, rng.integers(1, 30, (1, 40)), [150], [40])
    operands: list[Any] = []
    gemm = processors.Host.gemm

    def watched(self: Any, a: Any, *rest: Any) -> None:
        operands.append(a.copy())
        gemm(self, a, *rest)

    monkeypatch.setattr(processors.Host, "gemm", watched)
    for weights in (None, [-1e-3]):
        for workspace in (None, 250_000):  # with logits kept, and made twice
            operands.clear()
            tl.joint_rnnt_loss(*arguments, weights=weights, workspace=workspace, occupancy_floor=0.0)
            largest = max(np.abs(a).max() for a in operands)
            least = min(np.abs(a[a != 0]).min() for a in operands)
            assert least > np.finfo("f").smallest_normal
            assert largest > 0.1
    posterior = tl.occupancy(*arguments)
    both = posterior.blank + posterior.label
    assert ((both > 0) & (both < 1e-30)).any()


def test_small_weights_keep_their_gradient() -> None:
    of = inputs(np.random.default_rng(3), [9, 5], [4, 2], 11, 6)
    _, wanted = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0)
    batch = len(of.frames)
    for scale in (1e-20, -1e-25):
        _, grads = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, weights=[scale] * batch)
        assert wanted is not None
        assert grads is not None
        for name in ("encoder", "predictor", "weight"):
            np.testing.assert_allclose(getattr(grads, name) / scale, getattr(wanted, name), rtol=1e-4, atol=1e-6)
