"""`explain` against the losses: it finds an utterance if and only if its loss is not finite, and the first bad cell of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transducer_loss as tl
import transducer_loss.adapters.jax as tl_jax
import transducer_loss.adapters.tensorflow as tl_tensorflow
import transducer_loss.adapters.torch as tl_torch
from helpers import FLOATS, LAYOUTS, TOPOLOGIES, Array, numpy_dtype, random_batch, random_targets
from transducer_loss.joint import ACTIVATIONS

POISONS = [np.nan, np.inf, -np.inf, 2e4, 3e38, -3e38]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Products of NaN and infinities are what all this is about."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(invalid value|overflow) encountered in matmul")
        yield


def poisoned(rng: np.random.Generator, array: Array, number: int) -> None:
    """A number of elements anywhere, padding included, made NaN, infinite or huge."""
    for _ in range(number):
        array[tuple(int(rng.integers(0, size)) for size in array.shape)] = rng.choice(POISONS)


def random_band(rng: np.random.Generator, columns: int, frames: Array, labels: Array) -> tl.Band:
    """Of any rows that never fall: many cut every path."""
    first = np.sort(rng.integers(0, labels.max() + 1, (len(frames), columns)), axis=1)
    first[:, 0] *= rng.random() < 0.3
    return tl.Band.from_ranges(first[..., None] + np.arange(rng.integers(1, 4)), frames, labels)


def cells_of(band: tl.Band | None, b: int, frames: int, labels: int) -> Array:
    """Real cells (T_b, U_b + 1) of an utterance."""
    u = np.arange(labels + 1)
    if band is None:
        return np.ones((frames, labels + 1), bool)
    return (u >= band.first[b, :frames, None]) & (u < band.end[b, :frames, None])


def spoiled(logits: Array, blank: int, targets: Array, options: dict[str, Any]) -> Array:
    """Which cells of logits (T_b, U_b + 1, V) in float64 give no log-probabilities, by their definition."""
    labels = logits.shape[1] - 1
    own = np.full(logits.shape[:2], -np.inf)
    for u in range(labels):
        own[:, u] = logits[:, u, targets[u]]
    if options.get("normalized"):
        return ~((logits[..., blank] <= 1e4) & (own <= 1e4))
    bad = (np.isnan(logits) | (logits == np.inf)).any(axis=-1)
    normalised = np.delete(logits, blank, axis=-1) if options.get("hat") else logits
    return bad | ((normalised == -np.inf).all(axis=-1) & (normalised.shape[-1] > 0))


def expect_agreement(found: tl.Explanation, loss: Array) -> None:
    """Raise unless the utterances found are those of which the loss is not finite."""
    assert [each.index for each in found.utterances] == np.flatnonzero(~np.isfinite(loss)).tolist()
    assert bool(found) == (not np.isfinite(loss).all())
    for each in found.utterances:
        assert each.findings
        assert np.isnan(each.loss) == np.isnan(loss[each.index])
        assert f"utterance {each.index}: loss {each.loss}, T = {each.frames}, U = {each.labels}" in str(found)
        for finding in each.findings:
            assert finding.frame is None or 0 <= finding.frame < each.frames
            assert finding.label is None or 0 <= finding.label <= each.labels
            assert str(finding) in str(found)


seeds = st.integers(0, 2**32 - 1)
topologies = st.sampled_from(TOPOLOGIES)
distributions = st.sampled_from(["plain", "plain", "hat", "normalized"])


@settings(max_examples=200)
@given(seeds, st.sampled_from(FLOATS), topologies, distributions, st.sampled_from([0.0, 0.03, 0.5]), st.integers(0, 3), st.booleans())
def test_agrees_with_the_loss_of_logits(
    seed: int, dtype: str, topology: str, distribution: str, impossible: float, poisons: int, banded: bool
) -> None:
    rng = np.random.default_rng(seed)
    kind = {distribution: True} if distribution != "plain" else {}
    batch = random_batch(rng, dtype, topology, **kind, impossible=impossible)
    logits, band = batch.logits, None
    if banded:
        band = random_band(rng, logits.shape[1], batch.frames, batch.labels)
        logits = rng.normal(size=(*logits.shape[:2], band.width, logits.shape[3])).astype(logits.dtype)
    poisoned(rng, logits, poisons)
    options = {"blank": batch.blank, "topology": topology, "band": band, **kind}
    arguments = (logits, batch.targets, batch.frames, batch.labels)
    loss, _ = tl.rnnt_loss(*arguments, **options, gradient=False)
    found = tl.explain(*arguments, **options, infeasible=rng.choice(["inf", "zero", "raise"]).item())
    expect_agreement(found, loss)
    if np.isnan(loss).any() and band is None:
        for each in found.utterances:
            if np.isnan(each.loss):
                b = each.index
                bad = spoiled(
                    logits[b, : each.frames, : each.labels + 1].astype(np.float64), batch.blank, batch.targets[b], options
                )
                t, u = np.argwhere(bad)[0]
                (finding,) = each.findings
                assert (finding.argument, finding.frame, finding.label) == ("logits", t, u)
                assert finding.index is not None
                value = logits[finding.index].astype(np.float64)
                assert finding.index[:3] == (b, t, u)
                assert not np.isfinite(value) or finding.cause == "weight"
    if band is None:
        packed = np.concatenate([logits[b, :T, : U + 1].reshape(-1, logits.shape[3]) for b, (T, U) in enumerate(zip(batch.frames, batch.labels, strict=True))])
        again = tl.explain(packed, *arguments[1:], **options)
        expect_agreement(again, loss)
        assert [each.frame for each in again.utterances] == [each.frame for each in found.utterances]


@settings(max_examples=200)
@given(seeds, st.sampled_from(FLOATS), topologies, st.sampled_from(ACTIVATIONS), st.integers(0, 3), st.booleans(), st.sampled_from(["all", "batch", "utterance"]), st.booleans())
def test_agrees_with_the_loss_of_the_joint(
    seed: int, dtype: str, topology: str, activation: str, poisons: int, banded: bool, scope: str, shared: bool
) -> None:
    rng = np.random.default_rng(seed)
    B, T, U, V, H = (int(rng.integers(1, most + 1)) for most in (4, 6, 4, 8, 4))
    E = int(rng.integers(1, 4)) if shared else B
    index = rng.integers(0, E, B) if shared else None
    given_frames, labels = rng.integers(1, T + 1, E), rng.integers(0, U + 1, B)
    frames = given_frames if index is None else given_frames[index]
    blank = int(rng.integers(V))
    targets = random_targets(rng, labels, U, V)
    arrays = {name: rng.normal(size=shape) for name, shape in {"encoder": (E, T, H), "predictor": (B, U + 1, H), "weight": (V, H), "bias": (V,)}.items()}
    for _ in range(poisons):
        poisoned(rng, arrays[rng.choice(list(arrays), p=[0.4, 0.3, 0.2, 0.1])], 1)
    for lengths, name in ((given_frames, "encoder"), (labels + 1, "predictor")):
        for i, length in enumerate(lengths):
            arrays[name][i, length:] = np.nan
    arrays = {name: array.astype(numpy_dtype(dtype)) for name, array in arrays.items()}
    band = random_band(rng, T, frames, labels) if banded else None
    classes = tl.sample_classes(targets, labels, vocab_size=V, num_samples=1, blank=blank, scope=scope, seed=seed) if scope != "all" else None
    arguments = (*arrays.values(), targets, given_frames, labels)
    options = {
        "blank": blank, "topology": topology, "band": band, "classes": classes, "encoder_index": index, "activation": activation,
        "dropout": float(rng.choice([0.0, 0.3])), "seed": 5,
    }  # fmt: skip
    loss, _ = tl.joint_rnnt_loss(*arguments, **options, gradient=False)
    found = tl.explain(*arguments, **options)
    expect_agreement(found, loss)
    with pytest.raises(ValueError, match="at least") as error:
        tl.joint_rnnt_loss(*arguments, **options, workspace=8)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert str(tl.explain(*arguments, **options, workspace=least)) == str(found)
    for each in found.utterances:
        for finding in each.findings:
            if finding.cause == "value" and finding.index is not None and finding.argument in arrays:
                assert not np.isfinite(arrays[finding.argument][finding.index].astype(np.float64)).all()


@settings(max_examples=150)
@given(seeds, st.lists(st.tuples(st.sampled_from(["encoder", "predictor", "weight", "bias"]), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1, max_size=3), st.sampled_from(["tanh", "relu", "identity"]))
def test_names_the_first_bad_cell_of_the_joint(seed: int, poisons: list[tuple[str, float]], activation: str) -> None:
    """Against the logits, made whole in float64."""
    rng = np.random.default_rng(seed)
    B, T, U, V, H = 3, 6, 3, 5, 3
    frames, labels, targets = rng.integers(1, T + 1, B), rng.integers(0, U + 1, B), rng.integers(0, V, (B, U))
    arrays = {name: rng.normal(size=shape) for name, shape in {"encoder": (B, T, H), "predictor": (B, U + 1, H), "weight": (V, H), "bias": (V,)}.items()}
    for name, value in poisons:
        arrays[name][tuple(int(rng.integers(0, size)) for size in arrays[name].shape)] = value
    act = {"tanh": np.tanh, "relu": lambda z: np.where(z < 0, 0.0, z), "identity": lambda z: z}[activation]
    hidden = act(arrays["encoder"][:, :, None] + arrays["predictor"][:, None])
    logits = (hidden[..., None, :] * arrays["weight"]).sum(axis=-1) + arrays["bias"]
    found = tl.explain(*arrays.values(), targets, frames, labels, activation=activation)
    by_index = {each.index: each for each in found.utterances}
    for b in range(B):
        bad = spoiled(logits[b, : frames[b], : labels[b] + 1], 0, targets[b], {})
        if not bad.any():
            assert b not in by_index or by_index[b].loss == np.inf
            continue
        t, u = np.argwhere(bad)[0]
        assert by_index[b].frame == t
        assert (t, u) in [(finding.frame, finding.label) for finding in by_index[b].findings]
        for name, length in (("encoder", frames[b]), ("predictor", labels[b] + 1)):
            # A NaN always spoils its row, an infinity maybe.
            at = np.argwhere(np.isnan(arrays[name][b, :length]))
            named = [finding.index for finding in by_index[b].findings if finding.argument == name and finding.index is not None]
            if at.size and not np.isinf(arrays[name][b, :length]).any():
                assert (b, *at[0]) in named


@settings(max_examples=150)
@given(seeds, topologies, st.booleans())
def test_names_an_arc_without_which_there_is_no_path(seed: int, topology: str, banded: bool) -> None:
    """Where logits of -inf cut every path, the one named is such; and no path needs anything else but such to be mended."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, "float64", topology, most=(2, 6, 4, 6), impossible=0.5)
    logits, band = batch.logits, None
    if banded:
        band = random_band(rng, logits.shape[1], batch.frames, batch.labels)
        logits = rng.normal(size=(*logits.shape[:2], band.width, logits.shape[3]))
        logits[rng.random(logits.shape) < 0.5] = -np.inf
    options = {"blank": batch.blank, "topology": topology, "band": band}
    rest = batch.targets, batch.frames, batch.labels
    possible = tl.rnnt_loss(np.zeros_like(logits), *rest, **options, gradient=False)[0]
    for each in tl.explain(logits, *rest, **options).utterances:
        if each.loss != np.inf:
            continue
        (finding,) = each.findings
        if possible[each.index] == np.inf:
            too_long = topology != "regular" and each.labels > each.frames
            assert finding.cause == ("length" if too_long else "band")
            continue
        assert finding.cause == "probability"
        assert finding.index is not None and logits[finding.index] == -np.inf
        frame, label = finding.frame, finding.label
        assert frame is not None and label is not None
        assert cells_of(band, each.index, each.frames, each.labels)[frame, label]
        # Nothing before the frame cuts: with all arcs from there on open there is a path.
        mended = logits.copy()
        mended[each.index, frame:] = 0.0
        assert np.isfinite(tl.rnnt_loss(mended, *rest, **options, gradient=False)[0][each.index])


def joint_arguments(dtype: str = "float32", *, B: int = 2, T: int = 6, U: int = 3, V: int = 7, H: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {"encoder": (B, T, H), "predictor": (B, U + 1, H), "weight": (V, H), "bias": (V,)}
    return {
        **{name: rng.normal(size=shape).astype(numpy_dtype(dtype)) for name, shape in arrays.items()},
        "targets": rng.integers(1, V, (B, U)), "encoder_lengths": np.array([T, 4]), "target_lengths": np.array([U, 2]),
    }  # fmt: skip


def only(found: tl.Explanation) -> Any:
    """The only finding."""
    ((finding,),) = (each.findings for each in found.utterances)
    return finding


def changed(array: Array, index: Any, value: float) -> Array:
    copy = array.copy()
    copy[index] = value
    return copy


def test_all_is_well() -> None:
    arguments = joint_arguments()
    found = tl.explain(**arguments)
    assert found == tl.Explanation((), (), 2)
    assert not found
    assert str(found) == "all 2 losses are finite"


def test_report() -> None:
    arguments = joint_arguments()
    arguments["encoder"][1, 2:4, 1] = np.nan
    found = tl.explain(**arguments)
    assert str(found) == (
        "1 of 2 losses are not finite\n"
        "utterance 1: loss nan, T = 4, U = 2\n"
        "  frame 2: encoder[1, 2, 1] is nan; found in 2 of 4 rows"
    )
    (utterance,) = found.utterances
    assert (utterance.index, utterance.frames, utterance.labels, utterance.frame) == (1, 4, 2, 2)
    assert dataclasses.astuple(only(found))[:5] == ("value", "encoder", (1, 2, 1), 2, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch = 3  # type: ignore[misc]


def test_long_reports_are_cut() -> None:
    logits = np.full((20, 2, 2, 3), np.nan, np.float32)
    found = tl.explain(logits, np.zeros((20, 1), int), [2] * 20, [1] * 20)
    assert len(found.utterances) == len(found.notes) == 20
    lines = str(found).splitlines()
    assert "and 12 more utterances, from 8 on" in lines
    assert lines[-1] == "and 12 more notes"


def test_each_cause_in_every_argument() -> None:
    good = joint_arguments()
    for name, index, frame, label in (
        ("encoder", (0, 5, 3), 5, 0), ("predictor", (0, 3, 1), 0, 3), ("weight", (6, 2), 0, 0), ("bias", (5,), 0, 0),
    ):
        for value in (np.nan, np.inf):
            found = tl.explain(**{**good, name: changed(good[name], index, value)}, activation="identity")
            finding = found.utterances[0].findings[0]
            first = (finding.frame, finding.label)
            assert (finding.cause, finding.argument, finding.index) == ("value", name, index)
            # Only where the feature is above 0 does an infinite weight make a logit of +inf.
            assert first == (frame, label) or (name == "weight" and value == np.inf)


def test_padding_is_not_looked_at() -> None:
    arguments = joint_arguments()
    arguments["encoder"][1, 4:] = arguments["predictor"][1, 3:] = np.nan
    assert not tl.explain(**arguments)


def test_an_infinity_that_does_no_harm_is_no_finding() -> None:
    arguments = joint_arguments()
    arguments["encoder"][0, 2, 1], arguments["bias"][3] = np.inf, -np.inf
    arguments["targets"][:] = 1
    assert not tl.explain(**arguments, activation="tanh")
    assert only(tl.explain(**arguments, activation="relu")).index == (0, 2, 1)
    arguments["predictor"][0, 1, 1] = -np.inf
    finding = only(tl.explain(**arguments, activation="tanh"))
    assert (finding.index, finding.frame, finding.label) == ((0, 2, 1), 2, 1)
    assert "predictor[0, 1, 1] is -inf, and tanh of their sum is nan" in str(finding)


def test_overflow_of_finite_inputs() -> None:
    arguments = joint_arguments("float32")
    arguments["weight"][4] = 3e38
    arguments["encoder"][0, :2] = arguments["predictor"][0, 1] = -10.0
    arguments["encoder"][0, 3] = 10.0
    finding = tl.explain(**arguments).utterances[0].findings[0]
    assert (finding.cause, finding.argument, finding.index) == ("overflow", "weight", (4,))
    large = joint_arguments("float32")
    large["encoder"][1, 1, 2], large["predictor"][1, 2, 2] = 3e38, 2e38
    finding = only(tl.explain(**large, activation="relu"))
    assert (finding.cause, finding.index, finding.frame, finding.label) == ("overflow", (1, 1, 2), 1, 2)


def test_several_reasons_of_one_utterance_come_by_frame() -> None:
    arguments = joint_arguments()
    arguments["encoder"][0, 4, 0] = arguments["predictor"][0, 2, 0] = np.nan
    arguments["targets"][0, 1] = 99
    (utterance,) = tl.explain(**arguments).utterances
    assert [(each.argument, each.frame, each.label) for each in utterance.findings] == [
        ("targets", 0, 1), ("predictor", 0, 2), ("encoder", 4, 0),
    ]  # fmt: skip
    assert utterance.frame == 0


@pytest.mark.parametrize("joined", [False, True])
def test_labels_that_no_class_has(joined: bool) -> None:
    arguments = joint_arguments()
    arguments["targets"][0, 1], arguments["targets"][1, 2] = -3, 99  # the second is padding
    if not joined:
        arguments = {"logits": np.zeros((2, 6, 4, 7)), "logit_lengths": arguments.pop("encoder_lengths"), **{name: arguments[name] for name in ("targets", "target_lengths")}}
    finding = only(tl.explain(**arguments))
    assert (finding.cause, finding.argument, finding.index, finding.frame, finding.label) == ("label", "targets", (0, 1), 0, 1)
    assert "targets[0, 1] is -3, which is no class: they are [0, 7)" in str(finding)


def test_labels_that_the_classes_lack() -> None:
    arguments = joint_arguments()
    arguments["targets"][:] = [[1, 2, 3], [1, 5, 5]]
    classes = tl.Classes.from_ids([0, 1, 2, 3], vocab_size=7)
    with pytest.raises(ValueError, match="among the sampled classes"):
        tl.joint_rnnt_loss(**arguments, classes=classes)
    finding = only(tl.explain(**arguments, classes=classes))
    assert (finding.cause, finding.index) == ("label", (1, 1))


def test_a_label_that_is_the_blank() -> None:
    arguments = joint_arguments()
    arguments["targets"][1, 1] = 3
    arguments["targets"][0] = 2
    found = tl.explain(**arguments, blank=3)
    assert not found
    (note,) = found.notes
    assert (note.cause, note.index) == ("label", (1, 1))
    assert "note: targets[1, 1] is the blank, as are 1 of 2 labels" in str(found)
    finding = only(tl.explain(**arguments, blank=-4, hat=True))
    assert (finding.cause, finding.index, finding.label) == ("label", (1, 1), 1)


def test_lengths_out_of_range() -> None:
    arguments = joint_arguments()
    arguments["encoder"][1, 0] = np.nan
    found = tl.explain(**{**arguments, "encoder_lengths": [0, 4]})
    assert [(each.index, each.frames, each.findings[0].cause) for each in found.utterances] == [(0, 0, "length"), (1, 4, "value")]
    assert "encoder_lengths[0] is 0, not in [1, T = 6]" in str(found)
    found = tl.explain(**{**arguments, "target_lengths": [4, 2]})
    assert found.utterances[0].findings[0].text == "target_lengths[0] is 4, not in [0, U = 3]"
    found = tl.explain(**{**arguments, "encoder_lengths": [9, 4]}, encoder_index=[0, 0])
    assert [(each.index, each.frames) for each in found.utterances] == [(0, 9), (1, 9)]
    logits = np.zeros((2, 6, 4, 7))
    found = tl.explain(logits, arguments["targets"], [6, 7], [3, -1])
    assert [each.index for each in found.utterances] == [1]
    assert len(found.utterances[0].findings) == 2


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_more_labels_than_frames(topology: str) -> None:
    logits = np.zeros((2, 3, 5, 4))
    found = tl.explain(logits, np.ones((2, 4), int), [3, 3], [4, 3], topology=topology, infeasible="raise")
    finding = only(found)
    assert (finding.cause, finding.index, found.utterances[0].loss) == ("length", (0,), np.inf)
    assert "4 labels in 3 frames" in str(finding)


def test_a_band_that_breaks() -> None:
    frames, labels = [5], [4]
    broken = tl.Band.from_ranges([[[0, 1], [0, 1], [0, 1], [3, 4], [3, 4]]], frames, labels)
    short = tl.Band.from_ranges([[[0, 1], [0, 1], [1, 2], [1, 2], [2, 3]]], frames, labels)
    late = tl.Band.from_ranges([[[1, 2]] * 5], frames, labels)
    logits, targets = np.zeros((1, 5, 2, 6)), np.ones((1, 4), int)
    for band, frame, words in (
        (broken, 3, "paths come to labels 0 to 1 in row 2, and row 3 holds [3, 5)"),
        (short, 4, "paths end in the last row, 4, at labels 2 to 3, and there are U = 4"),
        (late, 0, "row 0 holds labels [1, 3), and paths begin with none"),
    ):
        finding = only(tl.explain(logits, targets, frames, labels, band=band))
        assert (finding.cause, finding.index, finding.frame) == ("band", (0, frame), frame)
        assert words in str(finding)
    whole = tl.Band.from_ranges([[[0, 1], [1, 2], [2, 3], [3, 4], [3, 4]]], frames, labels)
    assert not tl.explain(logits, targets, frames, labels, band=whole)
    falling = dataclasses.replace(whole, first=np.array([[0, 1, 0, 3, 3]], np.int32))
    finding = only(tl.explain(logits, targets, frames, labels, band=falling))
    assert (finding.cause, finding.index) == ("band", (0, 2))


def test_what_the_delay_penalty_does() -> None:
    logits, targets = np.zeros((1, 4, 2, 3)), [[1]]
    high = only(tl.explain(logits, targets, [4], [1], delay_penalty=1e4))
    assert (high.cause, high.argument, high.frame, high.label) == ("weight", "delay_penalty", 0, 0)
    band = tl.Band.from_ranges([[[0, 1], [1, 2], [1, 2], [1, 2]]], [4], [1])
    low = only(tl.explain(logits, targets, [4], [1], band=band, delay_penalty=-1e9))
    assert (low.cause, low.argument, low.frame, low.label) == ("probability", "delay_penalty", 0, 0)
    assert not tl.explain(logits, targets, [4], [1], delay_penalty=-100.0)


def test_paths_of_no_probability_altogether() -> None:
    logits = np.zeros((1, 4, 1, 2), np.float64)
    logits[..., 1] = 1e8  # each blank costs 1e8 nats, and four of them more than the lattice holds
    finding = only(tl.explain(logits, np.zeros((1, 0), int), [4], [0]))
    assert (finding.cause, finding.frame) == ("probability", None)


def test_a_class_that_the_bias_forbids() -> None:
    arguments = joint_arguments()
    arguments["targets"][:] = [[1, 2, 3], [4, 4, 4]]
    arguments["bias"][2] = -np.inf
    finding = only(tl.explain(**arguments))
    assert (finding.cause, finding.argument, finding.index, finding.frame, finding.label) == ("probability", "bias", (2,), 0, 1)
    assert "label 1 (class 2) has log-probability -inf; paths are cut by 6 such arcs" in str(finding)


def test_gradients_that_float16_does_not_hold() -> None:
    arguments = joint_arguments("float16")
    assert not tl.explain(**arguments).notes
    found = tl.explain(**arguments, weights=[65536.0, 65536.0])
    _, grads = tl.joint_rnnt_loss(**arguments, weights=[65536.0, 65536.0])
    infinite = [name for name in ("encoder", "predictor", "weight", "bias") if np.isinf(getattr(grads, name)).any()]
    assert [note.argument for note in found.notes] == infinite
    assert infinite
    for note in found.notes:
        assert note.cause == "gradient"
        assert np.isinf(getattr(grads, note.argument)[note.index])
    assert not found
    assert not tl.explain(**arguments, weights=[65536.0, 65536.0], gradient=False).notes
    logits = np.zeros((1, 1, 1, 4), np.float16)
    rest = (np.zeros((1, 0), int), [1], [0])
    assert not tl.explain(logits, *rest, weights=[60000.0]).notes
    (note,) = tl.explain(logits, *rest, weights=[131072.0]).notes
    assert (note.argument, note.index) == ("logits", (0, 0, 0, 0))
    assert not tl.explain(logits.astype("f"), *rest, weights=[131072.0]).notes
    (note,) = tl.explain(logits.astype("f"), *rest, weights=[np.nan]).notes
    assert (note.argument, note.index) == ("weights", (0,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(2, 5, 4, 6)).astype("f")
    values[1, 3, 2, 4] = np.nan
    _, view = LAYOUTS[layout]((2, 5, 4, 6), "f")
    view[...] = values
    found = tl.explain(view, rng.integers(1, 6, (2, 3)), [5, 4], [3, 2])
    assert only(found).index == (1, 3, 2, 4)


def test_a_shard_of_the_vocabulary() -> None:
    arguments = joint_arguments()
    shard = tl.Shard(lambda array, operation: None, sizes=[7], rank=0)
    assert not tl.explain(**arguments, shard=shard)
    arguments["weight"][5, 1] = np.nan
    assert [each.findings[0].index for each in tl.explain(**arguments, shard=shard).utterances] == [(5, 1)] * 2


def test_memory_of_the_joint_is_its_workspace() -> None:
    B, T, U, V, H = 4, 200, 40, 500, 64
    arguments = joint_arguments(B=B, T=T, U=U, V=V, H=H)
    arguments |= {"encoder_lengths": [T] * B, "target_lengths": [U] * B}
    arguments["encoder"][:, 100] = np.nan
    arguments["weight"][7] = np.nan
    tl.explain(**arguments, workspace="6MiB")
    tracemalloc.start()
    found = tl.explain(**arguments, workspace="6MiB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.utterances) == B
    allowed = (6 << 20) + 60 * (T + 1) * (U + 1) + 2 * 4 * (T + U) * H + (1 << 20)
    assert peak < allowed, (peak, allowed)
    assert 8 * allowed < 4 * B * T * (U + 1) * V


def test_errors_are_those_of_the_loss() -> None:
    arguments = joint_arguments()
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, H\)"):
        tl.explain(**{**arguments, "weight": np.zeros((7, 5), "f")})
    with pytest.raises(TypeError, match="encoder: expected an array"):
        tl.explain(**{**arguments, "encoder": [1.0]})
    with pytest.raises(TypeError, match="topologie"):
        tl.explain(**arguments, topologie="regular")
    with pytest.raises(TypeError, match="missing a required argument: 'logit_lengths'"):
        tl.explain(np.zeros((1, 1, 1, 2)), [[1]])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="missing a required argument: 'target_lengths'"):
        tl.explain(*list(arguments.values())[:6])
    with pytest.raises(ValueError, match="dtype: expected one of 'float16'"):
        tl.explain(**arguments, dtype="half")
    with pytest.raises(TypeError, match="dtype: expected the one that the loss runs in, as autocast's, for inputs of float16, float32"):
        tl.explain(**{**arguments, "encoder": arguments["encoder"].astype(np.float16)})
    with pytest.raises(ValueError, match="band: expected the band of this batch"):
        tl.explain(**arguments, band=tl.Band.from_ranges([[[0, 1]] * 6] * 2, [6, 6], [3, 2]))
    with pytest.raises(TypeError, match="band: expected a Band"):
        tl.explain(**arguments, band="wide")  # type: ignore[call-overload]


def test_dtype_is_that_of_autocast() -> None:
    arguments = {name: torch.from_numpy(np.asarray(value)) for name, value in joint_arguments().items()}
    arguments["weight"][2, 1] = 1e6
    assert not tl.explain(**arguments)
    with torch.autocast("cpu", torch.float16):
        loss = tl_torch.joint_rnnt_loss(**arguments, reduction="none")
    assert not loss.isfinite().any()
    found = tl.explain(**arguments, dtype="float16")
    assert [each.findings[0].index for each in found.utterances] == [(2, 1)] * 2
    assert "(float16 holds numbers up to 65,504)" in str(found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_tensors_as_the_loss_takes_them(dtype: str) -> None:
    arguments: dict[str, Any] = {name: torch.from_numpy(np.asarray(value)) for name, value in joint_arguments().items()}
    kind = getattr(torch, dtype)
    for name in ("encoder", "predictor", "weight", "bias"):
        arguments[name] = torch.nn.Parameter(arguments[name].to(kind)) if name in ("weight", "bias") else arguments[name].to(kind).requires_grad_()
    arguments["target_lengths"] = arguments["target_lengths"].int()
    with torch.no_grad():
        arguments["encoder"][1, 3, 2] = torch.nan
        arguments["encoder"][1, 4:] = torch.nan
    loss = tl_torch.joint_rnnt_loss(**arguments, reduction="none", topology="modified")
    found = tl.explain(**arguments, reduction="none", topology="modified", seed=None)
    expect_agreement(found, loss.detach().numpy())
    assert only(found).index == (1, 3, 2)
    assert arguments["encoder"].requires_grad
    logits = torch.tanh(arguments["encoder"][:, :, None] + arguments["predictor"][:, None]) @ arguments["weight"].T
    assert logits.requires_grad
    assert only(tl.explain(logits, arguments["targets"], [6, 4], [3, 2], reduction="mean")).index[:3] == (1, 3, 0)


def test_bands_and_classes_of_the_frameworks() -> None:
    given = joint_arguments()
    given["encoder"][1, 2, 0] = np.nan
    rng = np.random.default_rng(1)
    am, lm = rng.normal(size=(2, 6, 7)).astype("f"), rng.normal(size=(2, 4, 7)).astype("f")
    frames, labels = given["encoder_lengths"], given["target_lengths"]
    for module, tensor, variable in (
        (tl_torch, torch.from_numpy, torch.nn.Parameter), (tl_jax, jnp.asarray, jnp.asarray),
        (tl_tensorflow, tf.constant, tf.Variable), (tl_tensorflow, tf.constant, keras.Variable),
    ):
        there = {name: tensor(value) for name, value in given.items()}
        there["weight"] = variable(there["weight"])
        _, occupancy = module.simple_rnnt_loss(tensor(am), tensor(lm), tensor(given["targets"]), tensor(frames), tensor(labels))
        band = module.prune(occupancy, tensor(frames), tensor(labels), s_range=3)
        classes = module.sample_classes(tensor(given["targets"]), tensor(labels), vocab_size=7, num_samples=2)
        assert only(tl.explain(**there, band=band, classes=classes)).index == (1, 2, 0)


def test_needs_no_framework() -> None:
    code = "import sys, numpy as np, transducer_loss as tl; tl.explain(np.zeros((1, 2, 2, 3)), [[1]], [2], [1]); print([m for m in ('torch', 'jax', 'tensorflow', 'cupy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
