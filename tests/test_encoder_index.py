"""Utterances that share encoders against the same with a copy of the encoder each: of the reference, and of the engine itself."""

import dataclasses
import math
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Array, Counting, epsilon, error, expect_close, path_noise, random_targets, rounding
from test_joint_loss import PARTS, VARIANTS, Inputs, inputs, philox_mask, strided
from test_paths import expect_alignment
from test_pruned_loss import random_band, rows_of
from test_sampled_loss import CUTS, in_full, least, problem, random_classes, wanted
from test_shard import sharded
from transducer_loss import joint_loss, reference, tiling
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.sampling import SCOPES

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_scope = pytest.mark.parametrize("scope", SCOPES)


@dataclasses.dataclass
class Shared:
    """Inputs whose encoders are fewer than their utterances, or more."""

    of: Inputs
    """Of which `encoder` is (E, T, H) and `frames` (E,)."""
    index: Array

    @property
    def all(self) -> tuple[Any, ...]:
        return self.of.all

    @property
    def expanded(self) -> Inputs:
        """With a copy for each utterance."""
        return dataclasses.replace(self.of, encoder=self.of.encoder[self.index], frames=self.of.frames[self.index])

    def summed(self, by_copies: Array) -> Array:
        """Gradient by the encoders, from those by the copies."""
        by_encoder = np.zeros(self.of.encoder.shape)
        np.add.at(by_encoder, self.index, by_copies.astype(np.float64))
        return by_encoder


def shared(
    rng: np.random.Generator, frames: Any, index: Any, labels: Any, V: int, H: int, dtype: str = "float32", **options: Any
) -> Shared:
    """Random ones, NaN in the padding and in encoders that nobody uses."""
    index, labels, frames = np.asarray(index), np.asarray(labels), np.asarray(frames)
    of = inputs(rng, np.resize(frames, max(len(frames), len(labels))), np.resize(labels, max(len(frames), len(labels))), V, H, dtype, **options)
    B, U = len(labels), int(labels.max())
    of = dataclasses.replace(
        of, encoder=of.encoder[: len(frames)], frames=frames, predictor=of.predictor[:B, : U + 1].copy(), labels=labels,
        targets=random_targets(rng, labels, U + 1, V, options.get("without")),
    )  # fmt: skip
    for b in range(B):
        of.predictor[b, labels[b] + 1 :] = math.nan
    of.encoder[np.setdiff1d(np.arange(len(frames)), index)] = math.nan
    return Shared(of, index)


def random_problem(
    rng: np.random.Generator, dtype: str, topology: str, hat: bool, most: tuple[int, int, int, int, int, int] = (7, 4, 6, 4, 8, 20)
) -> tuple[Shared, int]:
    """Small and ragged, in no order; and the blank."""
    B, E, T, U, V, H = (int(rng.integers(low, n + 1)) for low, n in zip((1, 2, 1, 1, 1, 1), most, strict=True))
    V = max(V, 2) if hat else V
    frames, labels, index = rng.integers(1, T + 1, E), rng.integers(0, U + 1, B), rng.integers(0, rng.integers(E - 1, E + 1), B)
    if topology != "regular" and rng.random() < 0.9:
        labels = np.minimum(labels, frames[index])
    blank = int(rng.integers(-V, V))
    without = blank % V if hat else None
    return shared(rng, frames, index, labels, V, H, dtype, bias=bool(rng.random() < 0.8), without=without), blank


def expect_same(got: tuple[Any, Any], given: Shared, mask: Array | None = None, **options: Any) -> None:
    """Raise unless loss and gradients are the reference's of copies, those by the copies added up, but for rounding."""
    of = given.expanded
    loss, exact = reference.joint_rnnt_loss(*of.all, mask=mask, **options)
    dtype = of.encoder.dtype.name
    flat = options.get("activation", "tanh") in ("tanh", "sigmoid")
    hidden = 1.0 if flat else sum(np.nanmax(np.abs(x.astype(np.float64))) for x in (of.encoder, of.predictor))
    scale = 1.0 if mask is None else float(mask.max())
    weight = of.weight.astype(np.float64)
    largest = hidden * scale * np.abs(weight).sum(1).max()
    largest += 0.0 if of.bias is None else np.abs(of.bias.astype(np.float64)).max()
    largest += 0.0 if options.get("offset") is None else np.abs(options["offset"]).max()
    steps = int((of.frames + of.labels).max())
    relative = path_noise(dtype, steps, largest + abs(options.get("delay_penalty", 0.0)) * of.frames.max())
    expect_close(got[0], loss, relative * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))
    upstream = np.abs(options.get("weights", np.ones(len(loss)))) * (1 + options.get("fastemit_lambda", 0.0))
    sharing = np.bincount(given.index, upstream, minlength=len(given.of.encoder))
    used = {"encoder": sharing.max(), "predictor": upstream.max(), "weight": upstream.sum(), "bias": upstream.sum()}
    factor = {"encoder": np.abs(weight).max(), "predictor": np.abs(weight).max(), "weight": hidden, "bias": 1.0}
    for name, expected in zip(PARTS, exact, strict=True):
        actual = getattr(got[1], name)
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == dtype
        expected = given.summed(expected) if name == "encoder" else expected
        expect_close(actual, expected, relative * steps * used[name] * factor[name] * scale)
    unused = np.setdiff1d(np.arange(len(given.of.encoder)), given.index)
    assert not np.asarray(got[1].encoder, np.float64)[unused].any()


def expect_copies(got: tuple[Any, Any], of_copies: tuple[Any, Any], given: Shared, unit: float) -> None:
    """Raise unless the engine finds the same of copies, to a unit of the largest number of each array."""
    np.testing.assert_allclose(got[0], of_copies[0], rtol=unit)
    for name in PARTS:
        actual, copied = getattr(got[1], name), getattr(of_copies[1], name)
        if copied is not None:
            exact = given.summed(copied) if name == "encoder" else copied.astype(np.float64)
            # Gradients by copies are rounded one by one before they are added up here.
            each = rounding(copied.dtype.name, copied)
            rounded = given.summed(each) if name == "encoder" else each
            expect_close(actual, exact, rounded + unit * np.abs(exact).max(initial=0.0))


# ---- against the reference


@pytest.mark.parametrize("variant", VARIANTS)
@every_topology
@every_dtype
def test_random_batches(dtype: str, topology: str, variant: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    seen: dict[str, list[bool]] = {name: [] for name in ("finite", "shared", "unused", "unsorted")}
    for i in range(8):
        given, blank = random_problem(rng, dtype, topology, variant == "hat")
        options = {"blank": blank, "topology": topology, "activation": ACTIVATIONS[i % len(ACTIVATIONS)]}
        options |= VARIANTS[variant](rng, len(given.index))
        got = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, occupancy_floor=0.0, **options)
        expect_same(got, given, **options)
        assert got[1].dropped == 0.0
        alone, none = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, gradient=False, **options)
        np.testing.assert_array_equal(alone, got[0])
        assert none is None
        seen["finite"] += np.isfinite(got[0]).tolist()
        seen["shared"].append(len(set(given.index.tolist())) < len(given.index))
        seen["unused"].append(len(set(given.index.tolist())) < len(given.of.encoder))
        seen["unsorted"].append(bool((np.diff(given.index) < 0).any()))
    assert min(float(np.mean(of)) for of in seen.values()) > 0.1, f"{seen}"


@every_topology
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("few", [False, True], ids=["every class", "classes"])
@pytest.mark.parametrize("banded", [False, True], ids=["every cell", "band"])
def test_bands_classes_and_workspaces(banded: bool, few: bool, small: bool, topology: str) -> None:
    rng = np.random.default_rng([banded, few, small, TOPOLOGIES.index(topology)])
    seen: dict[str, list[bool]] = {name: [] for name in ("finite", "tiles", "groups", "left out", "each")}
    for i in range(20):
        hat = bool(rng.random() < 0.25)
        given, blank = random_problem(rng, ("float64", "float32")[i % 2], topology, hat, (7, 4, 12, 6, 60, 12))
        of, B = given.expanded, len(given.index)
        options: dict[str, Any] = {
            "topology": topology, "blank": blank, "hat": hat, "activation": str(rng.choice(ACTIVATIONS)),
            "fastemit_lambda": float(rng.choice([0.0, 0.5])), "delay_penalty": float(rng.choice([0.0, 0.3])),
            "infeasible": str(rng.choice(["inf", "zero"])), "weights": rng.choice([0.0, -1.5, 0.25, 3.0], B),
        }  # fmt: skip
        extra: dict[str, Any] = {"occupancy_floor": 0.0, "encoder_index": given.index}
        exact: dict[str, Any] = {}
        if banded:
            extra["band"] = random_band(rng, of.frames, of.labels, topology)
            exact |= rows_of(extra["band"])
        if few:
            classes = random_classes(rng, of, blank)
            extra |= {"classes": classes, "sparse": bool(rng.random() < 0.5)}
            exact |= wanted(classes)
            seen["left out"].append(classes.slots < len(of.weight))
            seen["each"].append(classes.per_utterance)
        if small:
            extra["workspace"] = int(float(rng.choice([1, 1, 1.05, 1.5])) * least(given.of, **extra, **options))
            plan = tiling.plan(problem(given.of, **extra, **{name: value for name, value in options.items() if name != "weights"}))
            cells = problem(of, band=extra.get("band")).cells.counts
            seen["tiles"].append(any(plan.tile < cells[begin:end].sum() for begin, end in plan.groups))
            seen["groups"].append(len(plan.groups) > 1)
        loss, grads = tl.joint_rnnt_loss(*given.all, **extra, **options)
        expect_same((loss, in_full(grads, of)), given, **exact, **options)
        seen["finite"] += np.isfinite(loss).tolist()
    share = {name: float(np.mean(values)) if values else 0.0 for name, values in seen.items()}
    assert share["finite"] > 0.4
    assert not small or min(share["tiles"], share["groups"]) > 0.3
    assert not few or min(share["left out"], share["each"]) > 0.2


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@every_dtype
def test_dropout_is_drawn_for_utterances_not_for_encoders(dtype: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    for probability, seed in ((0.1, 0), (0.5, 12345), (0.9, (1 << 62) + 977)):
        given = shared(rng, [4, 7], [1, 0, 1, 1], [2, 3, 3, 0], 6, 10, dtype)
        mask = philox_mask(4, 7, 4, 10, probability, seed)
        options: dict[str, Any] = {"encoder_index": given.index, "dropout": probability, "seed": seed, "occupancy_floor": 0.0}
        expect_same(tl.joint_rnnt_loss(*given.all, activation=activation, **options), given, mask, activation=activation)
    given.of.predictor[2], given.of.targets[2], given.of.labels[2] = given.of.predictor[0], given.of.targets[0], given.of.labels[0]
    loss, _ = tl.joint_rnnt_loss(*given.all, **{**options, "encoder_index": [1, 0, 1, 1]})
    assert loss[2] != loss[0]


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path(topology: str) -> None:
    # One utterance has more labels than its encoder has frames, another of the same encoder has not.
    given = shared(np.random.default_rng(2), [2, 5], [0, 1, 0, 0], [3, 3, 1, 0], 6, 8, "float64")
    for infeasible, none in (("inf", math.inf), ("zero", 0.0)):
        options = {"topology": topology, "infeasible": infeasible}
        got = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, occupancy_floor=0.0, **options)
        expect_same(got, given, **options)
        assert got[0][0] == none
    with pytest.raises(ValueError, match=r"targets: expected a path for every utterance, got none for utterances \[0\]"):
        tl.joint_rnnt_loss(*given.all, encoder_index=given.index, topology=topology, infeasible="raise")


@every_dtype
def test_an_utterance_that_is_not_finite_leaves_its_encoder_to_the_others(dtype: str) -> None:
    rng = np.random.default_rng(3)
    given = shared(rng, [9, 6, 3], [0, 1, 0, 2, 0], [3, 2, 4, 1, 0], 7, 12, dtype)
    options: dict[str, Any] = {"encoder_index": given.index, "occupancy_floor": 0.0}
    given.of.predictor[2, 1, 3] = math.nan
    got = tl.joint_rnnt_loss(*given.all, **options)
    np.testing.assert_array_equal(np.isnan(got[0]), [False, False, True, False, False])
    expect_same(got, given)
    assert np.asarray(got[1].encoder, float)[0].any()
    # An encoder that is not finite spoils all of its own, and no other.
    given.of.encoder[0, 8, 0] = math.nan
    got = tl.joint_rnnt_loss(*given.all, **options)
    np.testing.assert_array_equal(np.isnan(got[0]), [True, False, True, False, True])
    expect_same(got, given)
    assert not np.asarray(got[1].encoder, float)[0].any()


@every_dtype
def test_encoders_that_nobody_uses_have_no_gradient_at_all(dtype: str) -> None:
    given = shared(np.random.default_rng(4), [3, 8, 1, 5, 8, 2], [3, 1, 1], [1, 2, 3], 6, 10, dtype)
    assert np.isnan(given.of.encoder[[0, 2, 4, 5]].astype(float)).all()
    loss, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index)
    assert np.isfinite(loss).all()
    np.testing.assert_array_equal(np.asarray(grads.encoder, float).any(axis=(1, 2)), [False, True, False, True, False, False])
    expect_same(tl.joint_rnnt_loss(*given.all, encoder_index=given.index, occupancy_floor=0.0), given)
    # Nor what has no weight.
    _, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, weights=[0.0, 1.0, -1.0])
    np.testing.assert_array_equal(np.asarray(grads.encoder, float).any(axis=(1, 2)), [False, True, False, False, False, False])


def test_weights_that_cancel() -> None:
    # Twice the same utterance, once with the opposite weight: what is left of the sum is its rounding.
    given = shared(np.random.default_rng(5), [20], [0, 0], [6, 6], 30, 16, "float64")
    for array in (given.of.predictor, given.of.targets):
        array[1] = array[0]
    loss, grads = tl.joint_rnnt_loss(*given.all, encoder_index=[0, 0], weights=[2.0, -2.0])
    assert loss[0] == loss[1]
    np.testing.assert_array_equal(grads.encoder, 0.0)
    _, alone = tl.joint_rnnt_loss(*given.all, encoder_index=[0, 0], weights=[2.0, 0.0])
    _, both = tl.joint_rnnt_loss(*given.all, encoder_index=[0, 0], weights=[2.0, 2.0])
    np.testing.assert_allclose(both.encoder, 2.0 * alone.encoder, rtol=1e-12, atol=1e-14)


# ---- against the engine


def ragged(dtype: str = "float32", seed: int = 11) -> Shared:
    """Some utterances of a batch that groups, tiles and strips cut anywhere."""
    rng = np.random.default_rng(seed)
    return shared(rng, [40, 1, 33, 17, 5], [2, 0, 4, 0, 2, 2, 3, 0], [9, 12, 0, 4, 7, 0, 5, 9], 300, 24, dtype)


@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
@every_dtype
def test_losses_and_gradients_are_those_of_copies(dtype: str, floor: float) -> None:
    given = ragged(dtype)
    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0, -0.25, 0.75])
    options: dict[str, Any] = {"weights": weights, "occupancy_floor": floor}
    got = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, **options)
    copies = tl.joint_rnnt_loss(*given.expanded.all, **options)
    np.testing.assert_array_equal(got[0], copies[0])
    assert got[1].dropped == copies[1].dropped
    assert (got[1].dropped > 0) == (floor > 0)
    expect_copies(got, copies, given, 64 * epsilon("float64" if dtype == "float64" else "float32"))
    np.testing.assert_array_equal(got[1].predictor, copies[1].predictor)


@every_dtype
def test_one_utterance_for_each_encoder_gives_the_same_bits(dtype: str) -> None:
    of = inputs(np.random.default_rng(6), [40, 1, 33, 17], [9, 4, 0, 12], 50, 24, dtype)
    loss, grads = tl.joint_rnnt_loss(*of.all)
    found, same = tl.joint_rnnt_loss(*of.all, encoder_index=np.arange(4))
    np.testing.assert_array_equal(found, loss)
    for name in PARTS:
        np.testing.assert_array_equal(getattr(same, name), getattr(grads, name))
    # In any order of the encoders, whose rows move with them.
    order = np.array([2, 0, 3, 1])
    moved = dataclasses.replace(of, encoder=of.encoder[order], frames=of.frames[order])
    found, same = tl.joint_rnnt_loss(*moved.all, encoder_index=np.argsort(order))
    np.testing.assert_array_equal(found, loss)
    np.testing.assert_array_equal(same.encoder, grads.encoder[order])
    np.testing.assert_array_equal(same.weight, grads.weight)


@pytest.mark.parametrize("kind", ["list", "int8", "int32", "uint64", "strided"])
def test_indices_of_any_kind(kind: str) -> None:
    given = ragged()
    expected, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index)
    index: Any = given.index.tolist() if kind == "list" else given.index.astype("int64" if kind == "strided" else kind)
    index = np.repeat(index, 2)[::2] if kind == "strided" else index
    loss, got = tl.joint_rnnt_loss(*given.all, encoder_index=index)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(got.encoder, grads.encoder)


@pytest.mark.parametrize("how", ["features apart", "reversed", "columns first", "inside"])
@every_dtype
def test_strides_of_the_encoder(dtype: str, how: str) -> None:
    given = ragged(dtype)
    expected, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index)
    loss, got = tl.joint_rnnt_loss(strided(given.of.encoder, how), *given.all[1:], encoder_index=given.index)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(got.encoder, grads.encoder)


@pytest.mark.parametrize("scope", [None, *SCOPES])
@every_dtype
def test_any_workspace_gives_the_same_result_and_is_enough(dtype: str, scope: str | None) -> None:
    given = ragged(dtype)
    extra: dict[str, Any] = {"encoder_index": given.index, "occupancy_floor": 0.0}
    if scope is not None:
        extra["classes"] = tl.sample_classes(given.of.targets, given.of.labels, vocab_size=300, num_samples=40, scope=scope, correction=True)
    expected = tl.joint_rnnt_loss(*given.all, **extra)
    smallest, seen = least(given.of, **extra), set()
    for workspace in (smallest << n for n in range(9)):
        plan = tiling.plan(problem(given.of, workspace=workspace, **extra))
        seen |= {("strips", plan.strips), ("groups", len(plan.groups) > 1), *(("kept", kept) for kept in plan.retained)}
        counting = Counting()
        done = joint_loss.forward(problem(given.of, workspace=workspace, allocate=counting, **extra))
        assert done.gradients is not None
        outputs = sum(array.nbytes for array in (done.native, *done.gradients.native))
        assert 0 < counting.most - outputs <= workspace
        loss, grads = tl.joint_rnnt_loss(*given.all, workspace=workspace, **extra)
        np.testing.assert_array_equal(loss, done.native)
        unit = 64 * epsilon("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(loss, expected[0], rtol=unit)
        for name in PARTS:
            exact = getattr(expected[1], name).astype(np.float64)
            expect_close(getattr(grads, name), exact, unit * np.abs(exact).max() + rounding(dtype, exact))
    assert {("strips", 1), ("strips", 8), ("kept", True), ("kept", False), ("groups", True)} <= seen


@pytest.mark.parametrize("cut", CUTS, ids=str)
@every_topology
def test_tiles_utterances_and_the_batch_give_the_same_result(
    topology: str, cut: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ragged()
    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0, -0.25, 0.75])
    extra: dict[str, Any] = {"encoder_index": given.index, "weights": weights, "topology": topology}
    expected = tl.joint_rnnt_loss(*given.expanded.all, weights=weights, topology=topology)
    for name, value in cut.items():
        monkeypatch.setattr(f"transducer_loss.processors.Host.{name}", value)
    expect_copies(tl.joint_rnnt_loss(*given.all, **extra), expected, given, 64 * epsilon("float32"))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    given = ragged()
    results = [
        joint_loss.forward(problem(given.of, encoder_index=given.index, threads=threads, workspace=workspace))
        for workspace in (None, "2MiB") for threads in (1, 2, 3, 8)
    ]  # fmt: skip
    for same in (results[:4], results[4:]):
        for other in same[1:]:
            np.testing.assert_array_equal(other.native, same[0].native)
            for one, first in zip(other.gradients.native, same[0].gradients.native, strict=True):
                np.testing.assert_array_equal(one, first)


@every_dtype
def test_a_gradient_that_is_made_later(dtype: str) -> None:
    given = ragged(dtype)
    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0, -0.25, 0.75], "f8" if dtype == "float64" else "f4")
    of = problem(given.of, encoder_index=given.index)
    loss, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, weights=weights)
    done = joint_loss.forward(of, later=True)
    np.testing.assert_array_equal(done.native, loss)
    for _ in range(2):
        native = joint_loss.backward(of, done, weights).native
        for name, array in zip(PARTS, native, strict=True):
            exact = np.asarray(getattr(grads, name), np.float64)
            expect_close(array, exact, 64 * epsilon(array.dtype.name) * np.abs(exact).max() + rounding(dtype, exact))


@pytest.mark.parametrize("workspace", [None, "least"])
@every_topology
@every_dtype
def test_occupancy_and_alignment_are_those_of_copies(dtype: str, topology: str, workspace: str | None) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology)])
    finite = 0
    for i in range(6):
        given, blank = random_problem(rng, dtype, topology, False, (7, 3, 12, 6, 20, 12))
        options: dict[str, Any] = {"topology": topology, "blank": blank, "delay_penalty": 0.2}
        of = given.expanded
        if i % 3 == 1:
            options["band"] = random_band(rng, of.frames, of.labels, topology, padded=of.encoder.shape[1])
        if i % 3 == 2:
            options["classes"] = random_classes(rng, of, blank)
        extra: dict[str, Any] = {"encoder_index": given.index}
        if workspace == "least":
            extra["workspace"] = least(given.of, **options, **extra)
        found, expected = tl.occupancy(*given.all, **options, **extra), tl.occupancy(*of.all, **options)
        noise = path_noise(dtype, 20, 60.0)
        for name in ("blank", "label", "loss"):
            exact = getattr(expected, name).astype(np.float64)
            expect_close(getattr(found, name), exact, noise * np.maximum(1.0, np.abs(np.where(np.isfinite(exact), exact, 0.0))))
        aligned = tl.align(*of.all, **options)
        expect_alignment(tl.align(*given.all, **options, **extra), (aligned.frames, aligned.score), noise)
        finite += int(np.isfinite(found.loss).sum())
    assert finite > 5


@pytest.mark.parametrize("cuts", [[300], [100, 150, 50]])
def test_shards_of_the_vocabulary(cuts: list[int]) -> None:
    given = ragged("float64")
    options: dict[str, Any] = {"encoder_index": given.index, "blank": 3}
    expected = tl.joint_rnnt_loss(*given.all, **options)
    of = given.of

    def call(weight: Array, bias: Array | None, shard: tl.Shard) -> Any:
        return tl.joint_rnnt_loss(of.encoder, of.predictor, weight, bias, *of.all[4:], shard=shard, **options)

    for loss, grads in sharded(cuts, of.weight, of.bias, call):
        np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
        assert error(grads.encoder, expected[1].encoder) < 1e-12
        assert error(grads.predictor, expected[1].predictor) < 1e-12


# ---- EMBR


def n_best(rng: np.random.Generator, dtype: str) -> tuple[Shared, dict[str, Any]]:
    """Three utterances with five hypotheses each, some padding, some the same; and what `embr_loss` needs of them."""
    lengths = np.array([[4, 2, 0, 3, 2], [1, 3, 3, -1, -1], [0, -1, 2, 2, 5]])
    given = shared(rng, [12, 7, 9], np.repeat(np.arange(3), 5), np.maximum(lengths, 0).ravel(), 11, 8, dtype)
    given.of.targets[1, :2] = given.of.targets[4, :2]
    references = rng.integers(1, 11, (3, 4))
    hypotheses = given.of.targets.reshape(3, 5, -1)
    distances = tl.edit_distance(hypotheses, lengths, references, [4, 0, 2]).total
    return given, {"distances": distances, "hypotheses": hypotheses, "hypothesis_lengths": lengths, "temperature": 1.7}


@every_dtype
def test_embr_of_shared_encoders_is_that_of_copies(dtype: str) -> None:
    given, of_embr = n_best(np.random.default_rng(8), dtype)
    extra = {"occupancy_floor": 0.0}
    results = []
    for arguments, index in ((given.all, {"encoder_index": given.index}), (given.expanded.all, {})):
        nll, _ = tl.joint_rnnt_loss(*arguments, gradient=False, **index, **extra)
        risk, upstream = tl.embr_loss(nll.reshape(3, 5), **of_embr)
        loss, grads = tl.joint_rnnt_loss(*arguments, weights=upstream.nll.reshape(15), **index, **extra)
        np.testing.assert_array_equal(loss, nll)
        results.append((risk, grads))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    expect_copies(*results, given, 64 * epsilon("float64" if dtype == "float64" else "float32"))
    # And that of definitions alone.
    copies = given.expanded
    nll, _ = reference.joint_rnnt_loss(*copies.all)
    risk, upstream = reference.embr_loss(nll.reshape(3, 5), **of_embr)
    np.testing.assert_allclose(results[0][0], risk, rtol=1e-4 if dtype != "float64" else 1e-12)
    weights = upstream.reshape(15)
    assert (weights < 0).any() and (weights > 0).any() and (weights == 0).sum() >= 4
    loss, grads = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, weights=weights.astype("f8" if dtype == "float64" else "f4"), **extra)
    expect_same((loss, grads), given, weights=weights)


def test_embr_by_finite_differences() -> None:
    given, of_embr = n_best(np.random.default_rng(9), "float64")
    of, index = given.of, {"encoder_index": given.index}

    def risk(encoder: Array) -> float:
        nll, _ = tl.joint_rnnt_loss(encoder, *of.all[1:], gradient=False, **index)
        return float(tl.embr_loss(nll.reshape(3, 5), **of_embr, gradient=False)[0].sum())

    nll, _ = tl.joint_rnnt_loss(*of.all, gradient=False, **index)
    _, upstream = tl.embr_loss(nll.reshape(3, 5), **of_embr)
    _, grads = tl.joint_rnnt_loss(*of.all, weights=upstream.nll.reshape(15), occupancy_floor=0.0, **index)
    rng = np.random.default_rng(0)
    for _ in range(60):
        e = int(rng.integers(3))
        i = e, int(rng.integers(of.frames[e])), int(rng.integers(of.encoder.shape[2]))
        values = []
        for step in (1e-5, -1e-5):
            moved = of.encoder.copy()
            moved[i] += step
            values.append(risk(moved))
        assert grads.encoder[i] == pytest.approx((values[0] - values[1]) / 2e-5, rel=0, abs=3e-9)
    assert np.abs(grads.encoder).max() > 1e-3


# ---- memory


def peak(call: Callable[[], Any]) -> int:
    """The most that is allocated while it runs, beside what was before."""
    tracemalloc.start()
    try:
        result = call()
        most = tracemalloc.get_traced_memory()[1]
        del result
        return most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_memory_is_that_of_the_encoders_not_of_the_hypotheses(gradient: bool) -> None:
    rng = np.random.default_rng(10)
    E, N, T, U, V, H = 2, 16, 250, 4, 30, 256
    given = shared(rng, [T, T - 50], np.repeat([0, 1], N), rng.integers(1, U + 1, E * N), V, H)
    options: dict[str, Any] = {"workspace": "2MiB", "gradient": gradient}

    def copies() -> Any:
        return tl.joint_rnnt_loss(*given.expanded.all, **options)

    def without() -> Any:
        return tl.joint_rnnt_loss(*given.all, encoder_index=given.index, **options)

    without(), copies()
    encoders, expanded = given.of.encoder.nbytes, given.expanded.encoder.nbytes
    assert expanded == 16 * encoders > 8e6
    small = 1_500_000 + 2 * given.of.predictor.nbytes
    assert peak(copies) > (2 if gradient else 1) * expanded
    assert peak(without) < (2 << 20) + encoders + small
    assert peak(without) < peak(copies) / (2.5 if gradient else 2)


def test_a_loss_alone_needs_no_room_for_gradients() -> None:
    given = shared(np.random.default_rng(11), [300], [0] * 12, np.full(12, 2), 10, 512)
    counting, of_copies = Counting(), Counting()
    joint_loss.forward(problem(given.of, encoder_index=given.index, allocate=counting), gradient=False)
    joint_loss.forward(problem(given.expanded, allocate=of_copies), gradient=False)
    assert counting.most <= of_copies.most + 10_000


@pytest.mark.parametrize("U", [2, 20])
def test_utterances_are_worked_on_together_as_their_copies_are(U: int) -> None:
    # Groups of many cells are what makes short utterances fast; rows of shared encoders may take what the workspace has left.
    given = shared(np.random.default_rng(12), [300, 300], np.repeat([0, 1], 12), np.full(24, U), 40, 256)
    mine, copies = (tiling.plan(of) for of in (problem(given.of, encoder_index=given.index), problem(given.expanded)))
    assert len(copies.groups) < 24
    assert len(mine.groups) <= 2 * len(copies.groups)


# ---- arguments


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"encoder_index": [0, 2, 1, 0]}, ValueError, "encoder_index: expected indices in [0, E - 1 = 1], got 2 at index 1"),
    ({"encoder_index": [0, 1, 1, -1]}, ValueError, "encoder_index: expected indices in [0, E - 1 = 1], got -1 at index 3"),
    ({"encoder_index": [0, 1, 1]}, ValueError, "encoder_index: expected shape (B,) = (4,), got (3,)"),
    ({"encoder_index": [[0, 1, 1, 0]]}, ValueError, "encoder_index: expected shape (B,) = (4,), got (1, 4)"),
    ({"encoder_index": np.zeros(4)}, TypeError, "encoder_index: expected integers, got dtype float64"),
    ({"encoder_index": "0101"}, TypeError, "encoder_index: expected an array with __dlpack__, got str"),
    ({"encoder_lengths": [5, 3, 5, 5]}, ValueError, "encoder_lengths: expected shape (E,) = (2,), got (4,)"),
    ({"encoder_lengths": [5, 0]}, ValueError, "encoder_lengths: expected lengths in [1, T = 5], got 0 at index 1"),
    ({"target_lengths": [2, 1]}, ValueError, "target_lengths: expected shape (B,) = (4,), got (2,)"),
    ({"targets": np.ones((2, 2), int)}, ValueError, "targets: expected shape (B, U) = (4, 2), got (2, 2)"),
    ({"encoder_index": None}, ValueError, "predictor: expected shape (B, U+1, H) = (2, 3, 4), got (4, 3, 4)"),
    ({"weights": np.ones(2)}, ValueError, "weights: expected shape (B,) = (4,), got (2,)"),
])
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "encoder": np.ones((2, 5, 4), "f"), "predictor": np.ones((4, 3, 4), "f"), "weight": np.ones((6, 4), "f"), "bias": None,
        "targets": np.ones((4, 2), int), "encoder_lengths": [5, 3], "target_lengths": [2, 1, 0, 2], "encoder_index": [0, 1, 1, 0],
    }  # fmt: skip
    assert np.isfinite(tl.joint_rnnt_loss(**good)[0]).all()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.joint_rnnt_loss(**{**good, **change})


def test_a_band_is_of_the_utterances() -> None:
    given = ragged("float64")
    of = given.expanded
    band = random_band(np.random.default_rng(0), of.frames, of.labels, "regular", padded=40)
    loss, _ = tl.joint_rnnt_loss(*given.all, encoder_index=given.index, band=band)
    np.testing.assert_array_equal(loss, tl.joint_rnnt_loss(*of.all, band=band)[0])
    wrong = random_band(np.random.default_rng(0), of.frames[:5], of.labels[:5], "regular", padded=40)
    with pytest.raises(ValueError, match=r"^band: "):
        tl.joint_rnnt_loss(*given.all, encoder_index=given.index, band=wrong)


def test_inputs_are_not_modified() -> None:
    given = ragged()
    before = [array.tobytes() for array in (*given.all, given.index) if isinstance(array, np.ndarray)]
    tl.joint_rnnt_loss(*given.all, encoder_index=given.index, workspace="2MiB")
    assert before == [array.tobytes() for array in (*given.all, given.index) if isinstance(array, np.ndarray)]
