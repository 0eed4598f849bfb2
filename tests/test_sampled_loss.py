"""The joint-fused loss over sampled classes against the reference: alone, in bands, in little memory, row by row."""

import dataclasses
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import (
    FLOATS,
    TOPOLOGIES,
    Array,
    Batch,
    Counting,
    epsilon,
    error,
    expect_close,
    naive_gradient,
    rounding,
)
from test_joint_loss import ACTIVATIONS, PARTS, VARIANTS, Inputs, expect_same, inputs, philox_mask, random_problem, strided
from test_pruned_loss import random_band, rows_of
from transducer_loss import joint_loss, processors, reference, tiling
from transducer_loss.processors import aligned_empty
from transducer_loss.reference.joint import _activate
from transducer_loss.sampling import PROPOSALS, SCOPES

every_dtype = pytest.mark.parametrize("dtype", FLOATS)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_scope = pytest.mark.parametrize("scope", SCOPES)
whole_or_rows = pytest.mark.parametrize("sparse", [False, True])


def sampled(of: Inputs, samples: int, scope: str = "batch", blank: int = 0, correction: bool = True, **options: Any) -> tl.Classes:
    """Of a problem's labels, by uniform negatives if nothing else is asked for."""
    return tl.sample_classes(
        of.targets, of.labels, vocab_size=len(of.weight), num_samples=samples, scope=scope, blank=blank, correction=correction,
        **options,
    )  # fmt: skip


def chosen(rng: np.random.Generator, of: Inputs, blank: int, scope: str) -> tl.Classes:
    """Classes by hand: blank and labels, some others, in any order, some with probabilities."""
    V = len(of.weight)
    kept = [{blank % V, *of.targets[b, :U]} for b, U in enumerate(of.labels)]
    if scope == "batch":
        kept = [set().union(*kept)]
    count = int(rng.integers(max(map(len, kept)), V + 1))
    rows = []
    for these in kept:
        others = rng.permutation([v for v in range(V) if v not in these])[: count - len(these)]
        rows.append(rng.permutation([*these, *others]))
    ids = np.stack(rows) if scope == "utterance" else rows[0]
    return tl.Classes.from_ids(ids, V, blank=blank, probability=None if rng.random() < 0.3 else rng.uniform(0.02, 1, ids.shape))


def random_classes(rng: np.random.Generator, of: Inputs, blank: int) -> tl.Classes:
    """By any proposal and scope, of any number; or by hand."""
    V, scope = len(of.weight), str(rng.choice(SCOPES))
    proposal = str(rng.choice([*PROPOSALS, "hand"]))
    if proposal == "hand":
        return chosen(rng, of, blank, scope)
    given: dict[str, Any] = {}
    if proposal == "unigram":
        given["counts"] = rng.integers(0, 5, V) + np.eye(V, dtype=int)[0]
    if proposal == "ctc":
        given = {"ctc_logits": rng.normal(0, 3, (*of.encoder.shape[:2], V)).astype("f"), "ctc_lengths": of.frames}
    samples, correction = int(rng.integers(0, V + 1)), bool(rng.random() < 0.5)
    return sampled(of, samples, scope, blank, correction, proposal=proposal, seed=int(rng.integers(99)), **given)


def wanted(classes: tl.Classes) -> dict[str, Any]:
    """Keywords of the reference."""
    offset = -np.log(np.asarray(classes.probability, np.float64)) if classes.correction else None
    return {"classes": classes.ids, "offset": offset}


def whole(rows: tl.Rows, shape: tuple[int, ...]) -> Array:
    """A gradient of rows, of all classes."""
    result = np.zeros(shape, rows.values.dtype)
    np.add.at(result, rows.rows.reshape(-1), rows.values.reshape(-1, *shape[1:]))
    return result


def in_full(grads: Any, of: Inputs) -> Any:
    """Gradients by weight and bias of all classes, whatever they came as."""
    if not isinstance(grads.weight, tl.Rows):
        return grads
    assert grads.bias is None or grads.bias.rows is grads.weight.rows
    bias = None if of.bias is None else whole(grads.bias, of.bias.shape)
    return dataclasses.replace(grads, weight=whole(grads.weight, of.weight.shape), bias=bias)


def arrays(grads: Any) -> list[Array]:
    """The gradients, those of rows without what says which."""
    parts = [getattr(grads, name) for name in PARTS]
    return [part.values if isinstance(part, tl.Rows) else part for part in parts if part is not None]


def expect_equal(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Raise unless loss and gradients are the same numbers."""
    np.testing.assert_array_equal(got[0], expected[0])
    for one, other in zip(arrays(got[1]), arrays(expected[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def expect_alike(got: tuple[Any, Any], expected: tuple[Any, Any], unit: float) -> None:
    """Raise unless losses differ by no more than the unit, and gradients by no more than it times the largest of their array."""
    expect_close(got[0], expected[0].astype(np.float64), unit * np.maximum(1, np.abs(expected[0])))
    for one, other in zip(arrays(got[1]), arrays(expected[1]), strict=True):
        exact = other.astype(np.float64)
        # Both are rounded.
        expect_close(one, exact, unit * np.abs(exact).max() + rounding(other.dtype.name, exact))


def problem(of: Inputs, **options: Any) -> tiling.Problem:
    defaults = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}
    return joint_loss.problem(*of.all, **{**defaults, **options})


def least(of: Inputs, **options: Any) -> int:
    """The smallest workspace, as the error for a smaller one states it."""
    with pytest.raises(ValueError, match=r"^workspace: expected at least") as raised:
        tl.joint_rnnt_loss(*of.all, workspace=1, **options)
    found = re.search(r"at least (\d+) bytes for one tile and the longest utterance, got 1$", str(raised.value))
    assert found is not None
    with pytest.raises(ValueError, match=f"^workspace: expected at least {found[1]} bytes"):
        tl.joint_rnnt_loss(*of.all, workspace=int(found[1]) - 1, **options)
    return int(found[1])



@every_scope
@pytest.mark.parametrize("variant", VARIANTS)
@every_topology
def test_all_classes_are_the_exact_loss(topology: str, variant: str, scope: str) -> None:
    rng = np.random.default_rng([TOPOLOGIES.index(topology), list(VARIANTS).index(variant), SCOPES.index(scope)])
    for i in range(10):
        dtype, unit = (("float64", 1e-12), ("float32", 1e-6))[i % 2]
        of, blank = random_problem(rng, dtype, topology, variant == "hat")
        options = {"topology": topology, "blank": blank, "occupancy_floor": 0.0, **VARIANTS[variant](rng, len(of.frames))}
        classes = sampled(of, len(of.weight), scope, blank)
        every = np.broadcast_to(np.arange(len(of.weight)), classes.ids.shape)
        np.testing.assert_array_equal(np.sort(classes.ids), every)
        exact = tl.joint_rnnt_loss(*of.all, **options)
        for sparse in (False, True):
            loss, grads = tl.joint_rnnt_loss(*of.all, classes=classes, sparse=sparse, **options)
            expect_alike((loss, in_full(grads, of)), exact, unit)


def random_options(rng: np.random.Generator, batch: int, hat: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "hat": hat, "activation": str(rng.choice(ACTIVATIONS)), "fastemit_lambda": float(rng.choice([0.0, 0.0, 0.5])),
        "delay_penalty": float(rng.choice([0.0, 0.0, 0.3, -0.7])), "infeasible": str(rng.choice(["inf", "inf", "zero"])),
    }  # fmt: skip
    if rng.random() < 0.5:
        options["weights"] = rng.choice([0.0, -1.5, 0.25, 3.0], batch)
    return options


@every_topology
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("few", [False, True], ids=["every class", "classes"])
@pytest.mark.parametrize("banded", [False, True], ids=["every cell", "band"])
def test_bands_classes_and_workspaces(banded: bool, few: bool, small: bool, topology: str) -> None:
    rng = np.random.default_rng([banded, few, small, TOPOLOGIES.index(topology)])
    seen: dict[str, list[bool]] = {name: [] for name in ("finite", "tiles", "groups", "no path", "left out", "each", "corrected")}
    for i in range(38):
        B, T, V, H = (int(rng.integers(1, n + 1)) for n in (5, 12, 60, 12))
        hat = bool(rng.random() < 0.25)
        V = max(V, 2) if hat else V
        U = int(rng.integers(0, 7))
        frames, labels = rng.integers(1, T + 1, B), rng.integers(0, U + 1, B)
        if topology != "regular" and rng.random() < 0.7:
            labels = np.minimum(labels, frames)
        blank = int(rng.integers(-V, V))
        of = inputs(
            rng, frames, labels, V, H, ("float64", "float32")[i % 2], bias=bool(rng.random() < 0.8), without=blank % V if hat else None
        )  # fmt: skip
        options = {"topology": topology, "blank": blank, **random_options(rng, B, hat)}
        given: dict[str, Any] = {"occupancy_floor": 0.0}
        exact: dict[str, Any] = {}
        if banded:
            given["band"] = random_band(rng, frames, labels, topology)
            exact |= rows_of(given["band"])
        if few:
            classes = random_classes(rng, of, blank)
            given |= {"classes": classes, "sparse": bool(rng.random() < 0.5)}
            exact |= wanted(classes)
            seen["left out"].append(classes.slots < V)
            seen["each"].append(classes.per_utterance)
            seen["corrected"].append(classes.correction and bool((classes.probability < 1).any()))
        if small:
            given["workspace"] = int(float(rng.choice([1, 1, 1.05, 1.5])) * least(of, **given, **options))
            plan = tiling.plan(problem(of, **given, **{name: value for name, value in options.items() if name != "weights"}))
            cells = problem(of, band=given.get("band")).cells.counts
            seen["tiles"].append(any(plan.tile < cells[begin:end].sum() for begin, end in plan.groups))
            seen["groups"].append(len(plan.groups) > 1)
        loss, grads = tl.joint_rnnt_loss(*of.all, **given, **options)
        expect_same((loss, in_full(grads, of)), of, **exact, **options)
        assert grads.dropped == 0.0
        alone, none = tl.joint_rnnt_loss(*of.all, gradient=False, **given, **options)
        np.testing.assert_array_equal(alone, loss)
        assert none is None
        seen["finite"] += np.isfinite(loss).tolist()
        seen["no path"].append(bool(np.isposinf(loss).any()))
    share = {name: float(np.mean(values)) if values else 0.0 for name, values in seen.items()}
    assert share["finite"] > 0.4
    assert (share["no path"] > 0) == (topology != "regular") or banded
    assert not small or min(share["tiles"], share["groups"]) > 0.3
    assert not few or min(share["left out"], share["each"], share["corrected"]) > 0.2


@every_scope
@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
@every_dtype
def test_dropout(dtype: str, activation: str, scope: str) -> None:
    rng = np.random.default_rng(2)
    for probability, seed in ((0.1, 0), (0.5, 12345), (0.9, (1 << 62) + 977)):
        of = inputs(rng, [7, 4], [3, 2], 30, 10, dtype)
        classes = sampled(of, 5, scope)
        mask = philox_mask(2, 7, 4, 10, probability, seed)
        options = {"activation": activation, "classes": classes}
        got = tl.joint_rnnt_loss(*of.all, dropout=probability, seed=seed, occupancy_floor=0.0, **options)
        expect_same(got, of, mask, activation=activation, **wanted(classes))


def slots_of(of: Inputs, classes: tl.Classes) -> Array:
    """Labels as places among their utterance's classes; -1 past the last."""
    found = np.full_like(of.targets, -1)
    rows = np.broadcast_to(classes.ids, (len(of.frames), classes.slots))
    for b, U in enumerate(of.labels):
        found[b, :U] = [rows[b].tolist().index(v) for v in of.targets[b, :U]]
    return found


def layer_of(of: Inputs, classes: tl.Classes, b: int) -> tuple[Array, Array]:
    """Weight and bias of an utterance's classes, these corrected, in float64."""
    ids, share = (np.broadcast_to(x, (len(of.frames), classes.slots))[b] for x in (classes.ids, classes.probability))
    bias = np.zeros(len(ids)) if of.bias is None else of.bias[ids].astype(np.float64)
    return of.weight[ids].astype(np.float64), bias - (np.log(share.astype(np.float64)) if classes.correction else 0.0)


@every_scope
@every_topology
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_that_of_a_naive_run_in_the_same_type(dtype: str, topology: str, scope: str) -> None:
    of = inputs(np.random.default_rng(7), [40, 25], [10, 6], 60, 16, dtype)
    classes = sampled(of, 8, scope)
    assert classes.slots < 60
    exact = reference.joint_rnnt_loss(*of.all, topology=topology, **wanted(classes))[1]
    kind = of.encoder.dtype
    encoder, predictor = (np.where(np.isnan(x), kind.type(0), x) for x in (of.encoder, of.predictor))
    places, rows = slots_of(of, classes), np.broadcast_to(classes.ids, (2, classes.slots))
    rival = [np.zeros_like(x) for x in (of.encoder, of.predictor, of.weight, of.bias)]
    for b in range(2):
        weight, bias = (x.astype(kind) for x in layer_of(of, classes, b))
        hidden = np.tanh(encoder[b, :, None] + predictor[b])[None]
        one = slice(b, b + 1)
        batch = Batch((hidden @ weight.T).astype(kind) + bias, places[one, : of.labels[b]], of.frames[one], of.labels[one], 0)
        grad = naive_gradient(batch, topology)
        back = (grad @ weight).astype(kind) * (1 - hidden * hidden)
        rival[0][b], rival[1][b] = back[0].sum(1), back[0].sum(0)
        flat = grad.reshape(-1, classes.slots)
        rival[2][rows[b]] += flat.T @ hidden.reshape(-1, 16)
        rival[3][rows[b]] += flat.sum(0)
    for sparse in (False, True):
        got = in_full(tl.joint_rnnt_loss(*of.all, topology=topology, classes=classes, sparse=sparse)[1], of)
        for name, of_rival, expected in zip(PARTS, rival, exact, strict=True):
            naive = error(of_rival, expected)
            assert epsilon(dtype) / 4 < naive < 3000 * epsilon(dtype)  # it is a rival, not a mistake
            assert error(getattr(got, name), expected) <= naive



def ragged(dtype: str = "float32", seed: int = 11) -> Inputs:
    return inputs(np.random.default_rng(seed), [40, 1, 33, 17, 5], [9, 4, 0, 12, 5], 300, 24, dtype)


@whole_or_rows
@every_scope
@every_dtype
def test_any_workspace_gives_the_same_result_and_is_enough(dtype: str, scope: str, sparse: bool) -> None:
    of = ragged(dtype)
    classes = sampled(of, 40, scope)
    given: dict[str, Any] = {"classes": classes, "sparse": sparse, "occupancy_floor": 0.0}
    expected = tl.joint_rnnt_loss(*of.all, **given)
    smallest, seen = least(of, **given), set()
    for workspace in (smallest << n for n in range(7)):
        plan = tiling.plan(problem(of, workspace=workspace, **given))
        seen |= {("strips", plan.strips), ("groups", len(plan.groups) > 1), *(("kept", kept) for kept in plan.retained)}
        counting = Counting()
        done = joint_loss.forward(problem(of, workspace=workspace, allocate=counting, **given))
        assert done.gradients is not None
        outputs = sum(array.nbytes for array in (done.native, *done.gradients.native))
        assert 0 < counting.most - outputs <= workspace
        loss, grads = tl.joint_rnnt_loss(*of.all, workspace=workspace, **given)
        np.testing.assert_array_equal(loss, done.native)
        expect_alike((loss, grads), expected, 64 * epsilon("float64" if dtype == "float64" else "float32"))
    assert {("strips", 1), ("strips", 8), ("kept", True), ("kept", False), ("groups", True)} <= seen
    assert (("groups", False) in seen) == (scope == "batch")


CUTS: list[dict[str, int]] = [
    {"tile_cells": 1, "tile_bytes": 1},
    {"tile_cells": 7, "tile_bytes": 1, "group_cells": 1},
    {"strips": 1},
    {"strips": 1, "tile_cells": 5},
    {"strips": 2, "group_cells": 100},
    {"strips": 4, "tile_cells": 33, "group_cells": 1},
]


@whole_or_rows
@every_scope
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_tiles_utterances_and_the_batch_give_the_same_result(
    cut: dict[str, int], scope: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = ragged()
    classes = sampled(of, 40, scope)
    weights = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    given: dict[str, Any] = {"classes": classes, "sparse": sparse, "weights": weights}
    expected = tl.joint_rnnt_loss(*of.all, **given)
    before = tiling.plan(problem(of, classes=classes))
    for name, value in cut.items():
        monkeypatch.setattr(processors.Host, name, value)
    assert tiling.plan(problem(of, classes=classes)) != before
    expect_alike(tl.joint_rnnt_loss(*of.all, **given), expected, 1e-6)
    # Utterance by utterance, each in a call of its own.
    total = {name: np.zeros_like(getattr(of, name), np.float64) for name in PARTS}
    full = in_full(expected[1], of)
    for b in range(5):
        one = slice(b, b + 1)
        alone = Inputs(of.encoder[one], of.predictor[one], of.weight, of.bias, of.targets[one], of.frames[one], of.labels[one])
        own = dataclasses.replace(classes, ids=classes.ids[one], probability=classes.probability[one]) if scope == "utterance" else classes
        loss, grads = tl.joint_rnnt_loss(*alone.all, classes=own, sparse=sparse, weights=weights[one])
        np.testing.assert_allclose(loss, expected[0][one], rtol=1e-6)
        grads = in_full(grads, alone)
        total["encoder"][one], total["predictor"][one] = grads.encoder, grads.predictor
        total["weight"] += grads.weight
        total["bias"] += grads.bias
    for name in PARTS:
        exact = getattr(full, name)
        np.testing.assert_allclose(total[name], exact, rtol=0, atol=1e-6 * max(1.0, float(np.abs(exact).max())))


@pytest.mark.parametrize("workspace", [None, "600KiB"])
@whole_or_rows
@every_scope
def test_number_of_threads_changes_no_bit(
    scope: str, sparse: bool, workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = inputs(np.random.default_rng(18), [90, 7, 61, 80], [20, 2, 0, 17], 2000, 48)
    results = []
    for threads in ("1", "2", "5", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        classes = sampled(of, 100, scope)
        loss, grads = tl.joint_rnnt_loss(*of.all, classes=classes, sparse=sparse, dropout=0.1, workspace=workspace)
        results.append((classes.ids.tobytes(), loss.tobytes(), *(part.tobytes() for part in arrays(grads)), grads.dropped))
    assert len(set(results)) == 1


@whole_or_rows
@every_scope
def test_gradient_made_later(scope: str, sparse: bool) -> None:
    of = ragged()
    given: dict[str, Any] = {"classes": sampled(of, 20, scope), "sparse": sparse}
    later = problem(of, **given)
    done = joint_loss.forward(later, later=True)
    weights = np.array([0.5, -2.0, 0.0, 1.0, 1.0], np.float32)
    first, second = (joint_loss.backward(later, done, weights).native for _ in range(2))
    loss, grads = tl.joint_rnnt_loss(*of.all, weights=weights, **given)
    np.testing.assert_array_equal(done.native, loss)
    for one, two, exact in zip(first, second, arrays(grads), strict=True):
        np.testing.assert_array_equal(one, two)
        assert error(one, exact.astype(np.float64)) < 1e-6



@pytest.mark.parametrize("bias", [True, False])
@every_scope
@every_dtype
def test_rows_add_up_to_the_whole_gradient(dtype: str, scope: str, bias: bool) -> None:
    of = ragged(dtype)
    of.bias = of.bias if bias else None
    classes = sampled(of, 30, scope)
    loss, dense = tl.joint_rnnt_loss(*of.all, classes=classes)
    sparse_loss, sparse = tl.joint_rnnt_loss(*of.all, classes=classes, sparse=True)
    np.testing.assert_array_equal(sparse_loss, loss)
    assert sparse.weight.rows is classes.ids
    assert sparse.weight.values.shape == (*classes.ids.shape, 24)
    assert sparse.weight.values.dtype == of.weight.dtype
    assert (sparse.bias is not None) == (dense.bias is not None) == bias
    if bias:
        assert sparse.bias.values.shape == classes.ids.shape
    full = in_full(sparse, of)
    untouched = ~np.isin(np.arange(300), classes.ids)
    assert untouched.any()
    assert not dense.weight[untouched].any()
    for name in PARTS[: 4 if bias else 3]:
        got, exact = getattr(full, name), getattr(dense, name)
        if scope == "utterance" and dtype in ("float16", "bfloat16") and name in ("weight", "bias"):
            # Rows of several utterances are rounded one by one.
            summed = exact.astype(np.float64)
            expect_close(got, summed, 8 * epsilon(dtype) * max(np.abs(x.astype(np.float64)).max() for x in arrays(sparse)[2:]))
        else:
            np.testing.assert_array_equal(got, exact)
    assert sparse.dropped == dense.dropped


def test_rows_need_classes() -> None:
    of = ragged()
    with pytest.raises(ValueError, match=r"^sparse: expected False without classes, .*, got True$"):
        tl.joint_rnnt_loss(*of.all, sparse=True)


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most."""
    tracemalloc.start()
    try:
        result = call()
        most = tracemalloc.get_traced_memory()[1]
        del result
        return most
    finally:
        tracemalloc.stop()


@every_scope
def test_memory_does_not_grow_with_the_vocabulary(scope: str) -> None:
    V, H = 200_000, 64
    rng = np.random.default_rng(0)
    of = inputs(rng, [6, 4], [3, 2], 50, H)
    of.weight, of.bias = rng.normal(size=(V, H)).astype("f"), rng.normal(size=V).astype("f")
    classes = sampled(of, 20, scope)
    given: dict[str, Any] = {"classes": classes}
    tl.joint_rnnt_loss(*of.all, **given)
    # Not even what has one number a class.
    assert 10_000 < peak(lambda: tl.joint_rnnt_loss(*of.all, sparse=True, **given)) < 4 * V
    # The outputs themselves, and half as much.
    dense = peak(lambda: tl.joint_rnnt_loss(*of.all, **given))
    assert 4 * V * (H + 1) <= dense < 6 * V * (H + 1)
    # Nor are weights copied that no matrix product reads.
    of.weight = np.asfortranarray(of.weight)[::-1, ::-1]
    assert peak(lambda: tl.joint_rnnt_loss(*of.all, sparse=True, **given)) < 4 * V



@pytest.mark.parametrize("how", ["features apart", "reversed", "columns first", "inside"])
@every_scope
@every_dtype
def test_strides_of_weight_and_bias(dtype: str, scope: str, how: str) -> None:
    of = ragged(dtype)
    assert of.bias is not None
    given: dict[str, Any] = {"classes": sampled(of, 20, scope)}
    expected = tl.joint_rnnt_loss(*of.all, **given)
    least_before = least(of, **given)
    of.weight, of.bias = strided(of.weight, how), strided(of.bias, "features apart" if how == "columns first" else how)
    assert not of.weight.flags.c_contiguous
    assert least(of, **given) == least_before
    # The rows that are gathered are the same, so the matrix products are, too.
    expect_equal(tl.joint_rnnt_loss(*of.all, **given), expected)


def test_transposed_and_broadcast_weights() -> None:
    of = ragged("float64")
    kernel = np.ascontiguousarray(of.weight.T)
    for scope in SCOPES:
        given: dict[str, Any] = {"classes": sampled(of, 20, scope)}
        expected = tl.joint_rnnt_loss(*of.all, **given)
        expect_equal(tl.joint_rnnt_loss(of.encoder, of.predictor, kernel.T, *of.all[3:], **given), expected)
        same = dataclasses.replace(of, weight=np.broadcast_to(of.weight[:1], of.weight.shape))
        expect_same(tl.joint_rnnt_loss(*same.all, occupancy_floor=0.0, **given), same, **wanted(given["classes"]))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int16"])
@every_scope
def test_targets_of_any_integers_and_strides(scope: str, dtype: str) -> None:
    of = ragged()
    of.targets %= 100
    expected = tl.joint_rnnt_loss(*of.all, classes=sampled(of, 20, scope))
    wide = np.full((5, 2 * of.targets.shape[1]), 99)
    wide[:, ::2] = of.targets
    of.targets = wide.astype(dtype)[::-1].copy()[::-1, ::2]
    assert not of.targets.flags.c_contiguous
    assert of.targets.strides[0] < 0
    expect_equal(tl.joint_rnnt_loss(*of.all, classes=sampled(of, 20, scope)), expected)


@whole_or_rows
@every_scope
def test_padding_is_not_read(scope: str, sparse: bool) -> None:
    of = ragged()
    assert np.isnan(of.encoder).any()
    assert np.isnan(of.predictor).any()
    assert (of.targets == -1).any()
    expected = tl.joint_rnnt_loss(*of.all, classes=sampled(of, 20, scope), sparse=sparse)
    clean = dataclasses.replace(
        of, encoder=np.nan_to_num(of.encoder), predictor=np.nan_to_num(of.predictor), targets=np.where(of.targets < 0, 7, of.targets)
    )  # fmt: skip
    got = tl.joint_rnnt_loss(*clean.all, classes=sampled(clean, 20, scope), sparse=sparse)
    assert np.isfinite(got[0]).all()
    expect_equal(got, expected)


@whole_or_rows
@every_scope
def test_rows_that_are_not_sampled_are_not_read(scope: str, sparse: bool) -> None:
    of = ragged()
    assert of.bias is not None
    given: dict[str, Any] = {"classes": sampled(of, 20, scope), "sparse": sparse}
    expected = tl.joint_rnnt_loss(*of.all, **given)
    others = ~np.isin(np.arange(300), given["classes"].ids)
    assert others.sum() > 50
    of.weight[others] = np.nan
    of.bias[others] = np.inf
    expect_equal(tl.joint_rnnt_loss(*of.all, **given), expected)


def without(of: Inputs, b: int, classes: tl.Classes) -> tuple[Inputs, tl.Classes]:
    """The batch without one of its utterances."""
    rest = [i for i in range(len(of.frames)) if i != b]
    batch = Inputs(
        of.encoder[rest], of.predictor[rest], of.weight, of.bias, of.targets[rest], of.frames[rest], of.labels[rest]
    )  # fmt: skip
    if classes.per_utterance:
        classes = dataclasses.replace(classes, ids=classes.ids[rest], probability=classes.probability[rest])
    return batch, classes


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@whole_or_rows
@every_scope
@pytest.mark.parametrize("where", ["encoder", "predictor", "weight", "bias"])
def test_an_utterance_that_is_not_finite_spoils_itself_alone(where: str, scope: str, sparse: bool, floor: float) -> None:
    of = ragged("float64")
    classes = sampled(of, 20, scope)
    given: dict[str, Any] = {"sparse": sparse, "occupancy_floor": floor}
    bad = 3
    if where in ("encoder", "predictor"):
        getattr(of, where)[bad, 2, 4] = np.nan
    elif scope == "batch":
        getattr(of, where)[classes.ids[5]] = np.nan
        loss, grads = tl.joint_rnnt_loss(*of.all, classes=classes, **given)
        assert np.isnan(loss).all()
        assert not any(part.any() for part in arrays(grads))
        return
    else:
        own = next(v for v in classes.ids[bad] if v not in np.delete(classes.ids, bad, axis=0))
        getattr(of, where)[own] = np.nan
    loss, grads = tl.joint_rnnt_loss(*of.all, classes=classes, **given)
    assert np.isnan(loss).tolist() == [b == bad for b in range(5)]
    assert not grads.encoder[bad].any()
    assert not grads.predictor[bad].any()
    if sparse and scope == "utterance":
        assert not grads.weight.values[bad].any()
        assert not grads.bias.values[bad].any()
    rest, of_rest = without(of, bad, classes)
    expected, exact = reference.joint_rnnt_loss(*rest.all, **wanted(of_rest))
    np.testing.assert_allclose(np.delete(loss, bad), expected, rtol=1e-12)
    full = in_full(grads, of)
    for name, value in zip(PARTS, exact, strict=True):
        actual = getattr(full, name)
        if name in ("encoder", "predictor"):
            actual = np.delete(actual, bad, axis=0)
        np.testing.assert_allclose(actual, value, rtol=0, atol=1e-4 if floor else 1e-11)


@whole_or_rows
@every_scope
def test_utterances_without_weight_are_not_looked_at(scope: str, sparse: bool) -> None:
    of = ragged("float64")
    given: dict[str, Any] = {"classes": sampled(of, 20, scope), "sparse": sparse}
    loss, grads = tl.joint_rnnt_loss(*of.all, weights=[1.0, 0.0, -2.0, 0.0, 1.0], **given)
    assert not grads.encoder[[1, 3]].any()
    assert grads.encoder[2].any()
    if sparse and scope == "utterance":
        assert not grads.weight.values[[1, 3]].any()
        assert grads.weight.values[[0, 2, 4]].any(axis=(1, 2)).all()
    opposite = tl.joint_rnnt_loss(*of.all, weights=[-1.0, 0.0, 2.0, 0.0, -1.0], **given)
    np.testing.assert_array_equal(opposite[0], loss)
    for one, other in zip(arrays(opposite[1]), arrays(grads), strict=True):
        np.testing.assert_array_equal(one, -other)
    nothing = tl.joint_rnnt_loss(*of.all, weights=[0.0] * 5, **given)[1]
    assert nothing.dropped == 1.0
    assert not any(part.any() for part in arrays(nothing))


@whole_or_rows
@every_scope
@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path(topology: str, scope: str, sparse: bool) -> None:
    of = inputs(np.random.default_rng(3), [2, 5, 4], [3, 3, 0], 40, 8, "float64")
    classes = sampled(of, 5, scope)
    for infeasible in ("inf", "zero"):
        options = {"topology": topology, "infeasible": infeasible}
        loss, grads = tl.joint_rnnt_loss(*of.all, occupancy_floor=0.0, classes=classes, sparse=sparse, **options)
        expect_same((loss, in_full(grads, of)), of, **options, **wanted(classes))
        assert loss[0] == {"inf": np.inf, "zero": 0.0}[infeasible]
        assert not grads.encoder[0].any()
    with pytest.raises(ValueError, match=r"^targets: expected a path for every utterance, got none for utterances \[0\]"):
        tl.joint_rnnt_loss(*of.all, topology=topology, infeasible="raise", classes=classes)



@every_scope
@every_topology
def test_occupancy_and_alignment(topology: str, scope: str) -> None:
    rng = np.random.default_rng([9, TOPOLOGIES.index(topology), SCOPES.index(scope)])
    for i in range(16):
        of, blank = random_problem(rng, "float64", topology, False)
        band = random_band(rng, of.frames, of.labels, topology) if i % 2 else None
        classes = chosen(rng, of, blank, scope)
        columns = np.arange(of.predictor.shape[1]) if band is None else np.minimum(band.to_ranges(), of.predictor.shape[1] - 1)
        u = np.broadcast_to(columns, (*of.encoder.shape[:2], columns.shape[-1])) if band is None else columns
        rows = np.stack([of.predictor[b][u[b]] for b in range(len(u))])
        with np.errstate(invalid="ignore"):  # NaN where there is no cell
            hidden = _activate(of.encoder[:, : u.shape[1], None] + rows, "silu")[0]
        layers = [layer_of(of, classes, b) for b in range(len(u))]
        logits = np.stack([h @ weight.T + bias for h, (weight, bias) in zip(hidden, layers, strict=True)])
        exact: dict[str, Any] = {"topology": topology, "blank": 0}
        given: dict[str, Any] = {"topology": topology, "blank": blank, "activation": "silu", "classes": classes}
        if band is not None:
            exact |= {"first": band.first, "end": band.end}
            given["band"] = band
        arguments = logits, slots_of(of, classes), of.frames, of.labels
        loss, *pair = reference.occupancy(*arguments, **exact)
        frames, score = reference.align(*arguments, **exact)
        for workspace in (None, least(of, **given)):
            got = tl.occupancy(*of.all, workspace=workspace, **given)
            np.testing.assert_allclose(got.loss, loss, rtol=1e-11)
            for array, expected in zip((got.blank, got.label), pair, strict=True):
                np.testing.assert_allclose(array[:, : u.shape[1]], expected, rtol=0, atol=1e-10)
            best = tl.align(*of.all, workspace=workspace, **given)
            np.testing.assert_array_equal(best.frames, frames)
            np.testing.assert_allclose(best.score, score, rtol=1e-11)



def a_problem() -> Inputs:
    of = inputs(np.random.default_rng(1), [6, 4], [3, 2], 12, 8, "float64")
    of.targets = np.array([[3, 5, 3], [11, 0, -1]])
    return of


def test_classes_of_ones_own() -> None:
    of = a_problem()
    shares = [0.5, 1.0, 0.25, 1.0, 0.125, 1.0]
    for ids, probability in (
        ([7, 0, 3, 5, 11, 2], None), (np.array([7, 0, 3, 5, 11, 2], np.uint8), shares), ([[7, 0, 3, 5], [2, 11, 0, 9]], None),
        ([[7, 0, 3, 5], [2, 11, 0, 9]], [shares[:4], shares[2:]]), ([0, 3, 5, 11], [1.0] * 4),
    ):  # fmt: skip
        classes = tl.Classes.from_ids(ids, 12, probability=probability)
        assert classes.correction == (probability is not None)
        # As they were given, but for their order: the reference takes any, with the blank in one place.
        offset = None if probability is None else -np.log(probability)
        given = np.atleast_2d(ids), np.atleast_2d(np.ones(np.shape(ids)) if probability is None else probability)
        for row, of_row, mine, of_mine in zip(*given, *map(np.atleast_2d, (classes.ids, classes.probability)), strict=True):
            assert dict(zip(row, of_row, strict=True)) == dict(zip(mine, of_mine, strict=True))
        for sparse in (False, True):
            loss, grads = tl.joint_rnnt_loss(*of.all, classes=classes, sparse=sparse, occupancy_floor=0.0)
            first = {"classes": ids, "offset": offset} if np.ndim(ids) == 1 else wanted(classes)
            expect_same((loss, in_full(grads, of)), of, **first)
    exact = tl.joint_rnnt_loss(*of.all)[0]
    fewer = [tl.joint_rnnt_loss(*of.all, classes=tl.Classes.from_ids([0, 3, 5, 11, *more], 12))[0] for more in ([], [7, 2])]
    assert (fewer[0] < fewer[1]).all()
    assert (fewer[1] < exact).all()


def by_hand(ids: Any, probability: Any = None) -> tl.Classes:
    """What nobody checked."""
    shares = np.ones(np.shape(ids), np.float32) if probability is None else probability
    return tl.Classes(ids, shares, 12, 0, True)


def test_classes_in_any_memory() -> None:
    # Whoever makes classes by hand need not know how kernels read them.
    of = a_problem()
    shares = np.linspace(0.2, 1, 6)
    for ids in ([0, 2, 3, 5, 9, 11], [[0, 2, 3, 5, 9, 11], [0, 1, 2, 4, 10, 11]]):
        good = by_hand(np.array(ids, np.int32), np.broadcast_to(shares, np.shape(ids)).astype("f").copy())
        expected = tl.joint_rnnt_loss(*of.all, classes=good)
        changes: list[Callable[[Array], Array]] = [
            lambda x: x.astype("int64" if x.dtype.kind == "i" else "float64"),
            lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
            lambda x: x[..., ::-1].copy()[..., ::-1],
            np.asfortranarray,
        ]
        for change in changes:
            moved = by_hand(change(good.ids), change(good.probability))
            for sparse in (False, True):
                got = tl.joint_rnnt_loss(*of.all, classes=moved, sparse=sparse)
                expect_equal((got[0], in_full(got[1], of)), expected)


@pytest.mark.parametrize("ids", [[1, 3, 5, 11, 0], [3, 0, 5, 11], [0, 5, 3, 11], [0, 3, 3, 5, 11], [0, 0, 3, 5, 11]], ids=str)
def test_classes_out_of_order_are_no_number(ids: list[int]) -> None:
    of = a_problem()
    kept = np.array(ids, np.int32)
    loss, grads = tl.joint_rnnt_loss(*of.all, classes=by_hand(kept))
    assert np.isnan(loss).all()
    assert grads is not None
    assert not any(part.any() for part in (grads.encoder, grads.predictor, grads.weight, grads.bias))
    # One utterance's own classes are no other's business.
    each = np.stack([np.array([0, 3, 5, 8, 9][: len(ids)], np.int32), kept])
    assert np.isnan(tl.joint_rnnt_loss(*of.all, classes=by_hand(each))[0]).tolist() == [False, True]


class Guarded:
    """An allocator that sees writes around its arrays."""

    def __init__(self) -> None:
        self.bases: list[Array] = []

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        base = aligned_empty((size + 8192,), "uint8")
        base[...] = 0xA5
        self.bases.append(base)
        return base[4096 : 4096 + size].view(dtype).reshape(shape)

    @property
    def intact(self) -> bool:
        return all((base[:4096] == 0xA5).all() and (base[-4096:] == 0xA5).all() for base in self.bases)


LARGEST = 2**31 - 1


@whole_or_rows
@pytest.mark.parametrize("wild", [-1, 12, 13, LARGEST, -LARGEST - 1, 10**9, -7])
def test_classes_that_do_not_exist_are_no_number(wild: int, sparse: bool) -> None:
    of = a_problem()
    # Around the weights there are others, which must neither be read nor change.
    around = np.random.default_rng(2).normal(size=(40, 8))
    around[14:26], of.weight = of.weight, around[14:26]
    assert of.bias is not None
    more = np.zeros(40)
    more[14:26], of.bias = of.bias, more[14:26]
    ids = sorted([3, 5, 7, 11, wild])
    for classes in (
        by_hand(np.array([0, *ids], np.int32)),
        by_hand(np.array([[0, *ids], [0, 1, 2, 4, 9, 11]], np.int32)),
    ):
        rest = slice(0, 2) if classes.ids.ndim == 1 else slice(0, 1)
        allocate = Guarded()
        done = joint_loss.forward(problem(of, classes=classes, sparse=sparse, allocate=allocate, occupancy_floor=0.0))
        assert allocate.bases
        assert allocate.intact
        assert np.isnan(done.native[rest]).all()
        assert done.gradients is not None
        encoder, predictor, weight, bias = done.gradients.native
        assert not encoder[rest].any()
        assert not predictor[rest].any()
        if classes.ids.ndim == 1:
            assert not weight.any()
            assert not bias.any()
            continue
        # The other utterance is as if it were alone.
        alone, own = without(of, 0, classes)
        expected = tl.joint_rnnt_loss(*alone.all, classes=own, sparse=sparse, occupancy_floor=0.0)
        np.testing.assert_array_equal(done.native[1:], expected[0])
        for got, exact in zip((encoder, predictor, weight, bias), arrays(expected[1]), strict=True):
            np.testing.assert_array_equal(got[1:] if len(got) == 2 else got, exact)
        assert np.isfinite(expected[0]).all()


BAD: list[tuple[Any, type[Exception], str]] = [
    ([0, 3, 5, 11], TypeError, "^classes: expected Classes, got list$"),
    (np.array([0, 3, 5, 11]), TypeError, "^classes: expected Classes, got ndarray$"),
    (7, TypeError, "^classes: expected Classes, got int$"),
    (tl.Classes.from_ids([0, 3, 5, 11], 13), ValueError, "^classes: expected those of vocabulary 12, got 13$"),
    (tl.Classes.from_ids([0, 3, 5, 11], 12, blank=3), ValueError, "^classes: expected those of blank 0, got 3$"),
    (tl.Classes.from_ids([[0, 3, 5, 11]], 12), ValueError, "^classes: expected those of 2 utterances, got 1$"),
    (tl.Classes.from_ids([[0, 3, 5, 11]] * 3, 12), ValueError, "^classes: expected those of 2 utterances, got 3$"),
    (
        by_hand(np.array([0, 3, 5, 11]), np.ones(3)), ValueError,
        r"^classes: expected ids and probability of one shape, \(K,\) or \(B, K\), got \(4,\) and \(3,\)$",
    ),
    (
        by_hand(np.array([[[0, 3, 5, 11]]])), ValueError,
        r"^classes: expected ids and probability of one shape, .*, got \(1, 1, 4\) and \(1, 1, 4\)$",
    ),
    (
        tl.Classes.from_ids([0, 3, 5], 12), ValueError,
        r"^targets: expected labels among the sampled classes, .*, got 11 at index \(1, 0\)$",
    ),
    (
        tl.Classes.from_ids([[0, 3, 11], [0, 11, 5]], 12), ValueError,
        r"^targets: expected labels among the sampled classes, .*, got 5 at index \(0, 1\)$",
    ),
]  # fmt: skip


@pytest.mark.parametrize("function", [tl.joint_rnnt_loss, tl.occupancy, tl.align])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[2][:60])
def test_bad_classes(bad: tuple[Any, type[Exception], str], function: Callable[..., Any]) -> None:
    classes, kind, message = bad
    of = a_problem()
    with pytest.raises(kind, match=message):
        function(*of.all, classes=classes)
    function(*of.all, classes=tl.Classes.from_ids([0, 3, 5, 11], 12))


def test_labels_that_nobody_checked_are_no_number() -> None:
    # As on a device, where looking at them would synchronise.
    of = a_problem()
    for ids, lost in (([0, 3, 5], [False, True]), ([[0, 3, 11], [0, 5, 11]], [True, False]), ([0, 11], [True, False])):
        classes = by_hand(np.array(ids, np.int32))
        unchecked = dataclasses.replace(problem(of), classes=classes)
        done = joint_loss.forward(unchecked)
        assert np.isnan(done.native).tolist() == lost
        assert done.gradients is not None
        assert [bool(rows.any()) for rows in done.gradients.encoder] == [not bad for bad in lost]


def test_a_blank_counted_from_the_end() -> None:
    of = a_problem()
    classes = tl.sample_classes(of.targets, of.labels, vocab_size=12, num_samples=3, blank=-1)
    assert classes.ids[0] == classes.blank == 11
    for blank in (-1, 11):
        expect_same(tl.joint_rnnt_loss(*of.all, classes=classes, blank=blank, occupancy_floor=0.0), of, blank=11, **wanted(classes))
