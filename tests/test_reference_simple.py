"""The simple joiner of the reference against the loss of its explicit logits, and against finite differences."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from test_reference import ATOL, TARGETS, TOPOLOGIES, numeric
from transducer_loss import reference

F8 = npt.NDArray[np.float64]

LENGTHS = ((4, 3), (3, 2))  # frames and labels of two utterances
SCALES = ((0.0, 0.0), (0.25, 0.0), (0.0, 0.3), (0.2, 0.5), (1.0, 0.0), (0.0, 1.0), (0.6, 0.4))  # lm_only, am_only


def batch(scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Arguments of `simple_rnnt_loss`: utterances of unlike lengths, four classes."""
    am, lm = np.random.default_rng(seed).normal(0.0, scale, (2, 2, 4, 4))
    return {"am": am, "lm": lm, "targets": TARGETS, "am_lengths": LENGTHS[0], "target_lengths": LENGTHS[1]}


def options(scales: tuple[float, float], **others: Any) -> dict[str, Any]:
    return {"lm_only_scale": scales[0], "am_only_scale": scales[1], **others}


def smoothed(am: F8, lm: F8, scales: tuple[float, float], shared: bool) -> F8:
    """Log-probability of every class in every cell, (B, T, U + 1, V), in long doubles where there are any."""

    def log_softmax(x: npt.NDArray[np.longdouble]) -> npt.NDArray[np.longdouble]:
        return np.asarray(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))

    x, y = am.astype(np.longdouble), lm.astype(np.longdouble)
    of_lm = log_softmax(y)
    result = np.zeros((*am.shape[:2], lm.shape[1], am.shape[2]), np.longdouble)
    for b, U in enumerate(LENGTHS[1]):
        rows = of_lm.reshape(-1, lm.shape[2]) if shared else of_lm[b, :U + 1]
        unigram = np.logaddexp.reduce(rows, axis=0) - np.log(np.longdouble(len(rows)))
        result[b] = ((1 - sum(scales)) * log_softmax(x[b, :, None] + y[b]) + scales[0] * of_lm[b]
                     + scales[1] * log_softmax(x[b] + unigram)[:, None])
    return result.astype(np.float64)


def padding(frames: bool) -> npt.NDArray[np.bool_]:
    """Rows of am, or of lm, that are padding."""
    real = np.array(LENGTHS[0]) if frames else np.array(LENGTHS[1]) + 1
    return np.asarray(np.arange(4) >= real[:, None])


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_smoothing_it_is_the_loss_of_the_sums(topology: str, scale: float) -> None:
    arguments = batch(scale)
    logits = arguments["am"][:, :, None] + arguments["lm"][:, None]
    common: dict[str, Any] = {"topology": topology, "delay_penalty": 0.3, "blank": -2}  # some targets are blank
    trained: dict[str, Any] = {**common, "fastemit_lambda": 0.5, "weights": [-0.7, 1.4]}
    loss, (by_am, by_lm), raw = reference.simple_rnnt_loss(**arguments, **trained)
    expected, grad = reference.rnnt_loss(logits, TARGETS, *LENGTHS, **trained)
    np.testing.assert_allclose(loss, expected, rtol=1e-14)
    np.testing.assert_allclose(by_am, grad.sum(axis=2), rtol=0, atol=1e-14)
    np.testing.assert_allclose(by_lm, grad.sum(axis=1), rtol=0, atol=1e-14)
    for actual, wanted in zip(raw, reference.occupancy(logits, TARGETS, *LENGTHS, **common)[1:], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 100.0, 3000.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scales", SCALES)
def test_smoothing_mixes_log_probabilities(scales: tuple[float, float], shared: bool, scale: float) -> None:
    arguments = batch(scale)
    logp = smoothed(arguments["am"], arguments["lm"], scales, shared)
    for topology in TOPOLOGIES:
        loss, _, raw = reference.simple_rnnt_loss(
            **arguments, **options(scales, shared_unigram=shared, topology=topology, delay_penalty=-0.2))
        for b, (T, U) in enumerate(zip(*LENGTHS, strict=True)):
            le = np.take_along_axis(logp[b, :T, :U], TARGETS[b, None, :U, None], axis=2)[..., 0]
            expected, *arcs = reference.lattice_loss(logp[b, :T, :U + 1, 0], np.pad(le, ((0, 0), (0, 1))), U,
                                                     topology=topology, delay_penalty=-0.2)
            assert loss[b] == pytest.approx(expected, rel=1e-12)
            for actual, wanted in zip(raw, arcs, strict=True):
                # Probabilities of paths that weigh some 1e4 nats are good to 1e4 roundings.
                np.testing.assert_allclose(actual[b, :T, :U + 1], wanted, rtol=0, atol=1e-13 * max(scale, 10.0))
                assert not np.any(actual[b, T:]) and not np.any(actual[b, :, U + 1:])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradient_by_finite_differences(topology: str, scales: tuple[float, float], shared: bool) -> None:
    arguments, weights = batch(1.5), np.array([0.7, -1.3])
    chosen = options(scales, topology=topology, shared_unigram=shared, delay_penalty=0.2)
    losses, grads, _ = reference.simple_rnnt_loss(**arguments, **chosen, weights=weights)
    assert np.isfinite(losses).all()
    for name, grad in zip(("am", "lm"), grads, strict=True):

        def loss(x: F8, name: str = name) -> float:
            return float(weights @ reference.simple_rnnt_loss(**{**arguments, name: x}, **chosen)[0])

        np.testing.assert_allclose(grad, numeric(loss, arguments[name]), rtol=0, atol=ATOL, err_msg=name)
        of_padding = grad[padding(name == "am")]
        # The shared mean is the only way on which padding is read.
        assert np.any(of_padding) == (shared and scales[1] > 0.0 and name == "lm")
        assert np.any(grad) == (scales != ((1.0, 0.0) if name == "am" else None))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_gradient_of_large_inputs(scale: float, shared: bool) -> None:
    # Softmaxes whose smallest probability is no float64, not even a subnormal one.
    arguments = batch(scale, seed=2)
    chosen = options((0.3, 0.4), shared_unigram=shared)
    assert (arguments["lm"].max(axis=-1) - arguments["lm"].min(axis=-1)).max() > (750 if scale > 500.0 else 100)
    _, grads, _ = reference.simple_rnnt_loss(**arguments, **chosen)
    for name, grad in zip(("am", "lm"), grads, strict=True):

        def loss(x: F8, name: str = name) -> float:
            return float(reference.simple_rnnt_loss(**{**arguments, name: x}, **chosen)[0].sum())

        # Losses near 1e4 are rounded to 1e-12, and their differences divided by 2e-5.
        np.testing.assert_allclose(grad, numeric(loss, arguments[name]), rtol=0, atol=2e-9 * scale)
        assert np.abs(grad).max() > 0.1


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_fastemit_goes_through_the_same_chain(topology: str, scales: tuple[float, float]) -> None:
    arguments = batch()
    chosen: dict[str, Any] = {"topology": topology, "fastemit_lambda": 0.6, "weights": [1.1, -0.4]}
    loss, grads, raw = reference.simple_rnnt_loss(**arguments, **options(scales, **chosen))
    plain, _, plain_raw = reference.simple_rnnt_loss(**arguments, **options(scales, topology=topology))
    np.testing.assert_array_equal(loss, plain)
    np.testing.assert_array_equal(raw, plain_raw)
    logp = smoothed(arguments["am"], arguments["lm"], scales, False)
    _, by_logp = reference.rnnt_loss(logp, TARGETS, *LENGTHS, normalized=True, **chosen)
    for name, grad in zip(("am", "lm"), grads, strict=True):

        def chain(x: F8, name: str = name) -> float:
            inputs = {**arguments, name: x}
            return float((by_logp * smoothed(inputs["am"], inputs["lm"], scales, False)).sum())

        np.testing.assert_allclose(grad, numeric(chain, arguments[name]), rtol=0, atol=ATOL)


def test_padding_is_never_read() -> None:
    for scales in SCALES:
        arguments = batch()
        loss, grads, raw = reference.simple_rnnt_loss(**arguments, **options(scales))
        arguments["am"][padding(True)] = math.nan
        arguments["lm"][padding(False)] = math.nan
        dirty_loss, dirty_grads, dirty_raw = reference.simple_rnnt_loss(**arguments, **options(scales))
        np.testing.assert_array_equal(dirty_loss, loss)
        for dirty, clean in zip((*dirty_grads, *dirty_raw), (*grads, *raw), strict=True):
            np.testing.assert_array_equal(dirty, clean)
        for labels in (-1, 99):
            arguments["targets"] = np.where(TARGETS == -1, labels, TARGETS)
            np.testing.assert_array_equal(reference.simple_rnnt_loss(**arguments, **options(scales))[0], loss)


def test_a_shared_unigram_reads_padding() -> None:
    arguments = batch()
    chosen = options((0.0, 0.5), shared_unigram=True)
    loss, _, _ = reference.simple_rnnt_loss(**arguments, **chosen)
    arguments["lm"][1, 3] += [1.0, 0.0, 0.0, 0.0]
    assert np.abs(reference.simple_rnnt_loss(**arguments, **chosen)[0] - loss).min() > 1e-3
    arguments["lm"][1, 3, 0] = math.nan
    spoilt, grads, raw = reference.simple_rnnt_loss(**arguments, **chosen)
    assert np.isnan(spoilt).all()
    for zero in (*grads, *raw):
        np.testing.assert_array_equal(zero, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["am", "lm"])
@pytest.mark.parametrize("scales", SCALES)
def test_an_invalid_utterance_has_loss_nan_and_gradient_zero(scales: tuple[float, float], name: str, bad: float) -> None:
    arguments = batch()
    loss, grads, raw = reference.simple_rnnt_loss(**arguments, **options(scales))
    arguments[name][1, 2, 3] = bad  # the last real row
    spoilt, *others = reference.simple_rnnt_loss(**arguments, **options(scales, weights=[1.0, -2.0]))
    np.testing.assert_array_equal(spoilt, [loss[0], math.nan])
    for after, before in zip((*others[0], *others[1]), (*grads, *raw), strict=True):
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], 0.0)


def test_frames_of_an_invalid_utterance_leave_a_shared_unigram_alone() -> None:
    arguments = batch()
    chosen = options((0.1, 0.5), shared_unigram=True)
    loss, (by_am, by_lm), _ = reference.simple_rnnt_loss(**arguments, **chosen, weights=[1.0, 0.0])
    arguments["am"][1, 0, 0] = math.nan
    spoilt, (spoilt_am, spoilt_lm), _ = reference.simple_rnnt_loss(**arguments, **chosen)
    np.testing.assert_array_equal(spoilt, [loss[0], math.nan])
    np.testing.assert_array_equal(spoilt_am, by_am)
    np.testing.assert_array_equal(spoilt_lm, by_lm)  # the second utterance's rows are still part of the mean
    assert np.any(spoilt_lm[1])


@pytest.mark.parametrize("name", ["am", "lm"])
@pytest.mark.parametrize("scales", SCALES)
def test_class_of_probability_zero(scales: tuple[float, float], name: str) -> None:
    # A class that no label of the first utterance needs. exp(-5000) is 0 too, but its logarithm is finite.
    outcomes = []
    for low in (-math.inf, -5000.0):
        arguments = batch()
        arguments[name][0, :, 1] = low
        outcomes.append(reference.simple_rnnt_loss(**arguments, **options(scales)))
    (loss, grads, raw), (near_loss, near_grads, near_raw) = outcomes
    np.testing.assert_allclose(loss, near_loss, rtol=1e-15)
    for exact, near in zip((*grads, *raw), (*near_grads, *near_raw), strict=True):
        np.testing.assert_allclose(exact, near, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["am", "lm"])
def test_label_of_probability_zero_in_one_term(name: str) -> None:
    for scales in SCALES:
        arguments = batch()
        arguments[name][1, :, 1] = -math.inf  # the first label of the second utterance
        chosen = options(scales, weights=[1.0, -1.0])
        loss, grads, raw = reference.simple_rnnt_loss(**arguments, **chosen)
        # Only where all terms that see the class are left out.
        assert np.isfinite(loss[1]) == (name == "am" and scales == (1.0, 0.0))
        assert np.isfinite(loss[0]) and not np.isnan(loss[1])
        for array in (*grads, *raw):
            assert np.isfinite(array).all()
            assert not np.any(array[1]) or np.isfinite(loss[1])


def test_cells_of_nothing_but_minus_infinity() -> None:
    def losses(am: Any, lm: Any, lengths: tuple[int, int]) -> list[float]:
        outcomes = []
        for scales in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
            loss, grads, raw = reference.simple_rnnt_loss([am], [lm], [[1]], [lengths[0]], [lengths[1]], **options(scales))
            assert np.isfinite(loss[0]) or not any(np.any(array) for array in (*grads, *raw))
            assert all(np.isfinite(array).all() for array in (*grads, *raw))
            outcomes.append(float(loss[0]))
        return outcomes

    inf = math.inf
    # A frame without any class: the lm's own term alone does not see it.
    nothing = losses([[0.0, 0.0], [-inf, -inf]], [[0.0, 0.0], [0.0, 0.0]], (2, 1))
    np.testing.assert_array_equal(np.isnan(nothing), [True, True, True, False, True])
    # A row of lm without any class: every term sees it.
    nothing = losses([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [-inf, -inf]], (2, 1))
    assert np.isnan(nothing).all()
    # Frame and row without a class in common; the mean of the rows has both classes.
    nothing = losses([[-inf, 0.0]], [[-inf, 0.0], [0.0, -inf]], (1, 1))
    np.testing.assert_array_equal(np.isnan(nothing), [True, True, True, False, False])


def test_a_class_that_no_row_has() -> None:
    for shared in (False, True):
        arguments = batch()
        arguments["lm"][..., 3] = -math.inf
        arguments["targets"] = [[2, 1, 2], [1, 1, -1]]
        chosen = options((0.2, 0.5), shared_unigram=shared)
        loss, grads, _ = reference.simple_rnnt_loss(**arguments, **chosen)
        fewer = {**arguments, "am": arguments["am"][..., :3], "lm": arguments["lm"][..., :3]}
        expected, expected_grads, _ = reference.simple_rnnt_loss(**fewer, **chosen)
        np.testing.assert_allclose(loss, expected, rtol=1e-14)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            np.testing.assert_array_equal(grad[..., 3], 0.0)
            np.testing.assert_allclose(grad[..., :3], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_labels_and_one_frame(topology: str) -> None:
    rng = np.random.default_rng(3)
    for T, U in ((1, 0), (5, 0), (1, 1), (1, 3)):
        am, lm = rng.normal(0.0, 1.0, (1, T, 4)), rng.normal(0.0, 1.0, (1, U + 1, 4))
        for scales in SCALES:
            chosen = options(scales, topology=topology)
            loss, grads, _ = reference.simple_rnnt_loss(am, lm, np.ones((1, U), int), [T], [U], **chosen)
            if topology != "regular" and U > T:
                assert loss[0] == math.inf and not np.any(grads[0]) and not np.any(grads[1])
                continue
            unigram = np.log((np.exp(lm[0]) / np.exp(lm[0]).sum(axis=1, keepdims=True)).mean(axis=0))
            parts = [am[0, :, None] + lm[0], np.broadcast_to(lm[0], (T, U + 1, 4)),
                     np.broadcast_to((am[0] + unigram)[:, None], (T, U + 1, 4))]
            logp = sum(scale * (part - np.log(np.exp(part).sum(axis=2, keepdims=True)))
                       for scale, part in zip((1.0 - sum(scales), *scales), parts, strict=True))
            # One path: all labels, and then all blanks.
            labels = logp[0, :U, 1].sum()
            blanks = logp[:, U, 0].sum() if topology != "modified" or U == 0 else 0.0
            np.testing.assert_allclose(loss, [-(labels + blanks)], rtol=1e-13)


def test_infeasible_and_weights() -> None:
    arguments = {**batch(), "am_lengths": (4, 1)}
    loss, grads, _ = reference.simple_rnnt_loss(**arguments, topology="modified", weights=[-2.0, 1.0])
    zero, zero_grads, _ = reference.simple_rnnt_loss(**arguments, topology="modified", infeasible="zero")
    np.testing.assert_array_equal(loss, [zero[0], math.inf])
    assert zero[1] == 0.0
    for grad, plain in zip(grads, zero_grads, strict=True):
        np.testing.assert_array_equal(grad, -2.0 * plain)
        np.testing.assert_array_equal(grad[1], 0.0)
    with pytest.raises(ValueError, match=r"no path for utterances \[1\]"):
        reference.simple_rnnt_loss(**arguments, topology="modified", infeasible="raise")


@pytest.mark.parametrize(("change", "message"), [
    ({"topology": "straight"}, "topology: "),
    ({"infeasible": "ignore"}, "infeasible: "),
    ({"blank": 4}, "blank: "),
    ({"targets": [[2, 4, 2], [1, 3, -1]]}, "targets: "),
    ({"am_lengths": [5, 3]}, "am_lengths, "),
    ({"am_lengths": [4, 0]}, "am_lengths, "),
    ({"target_lengths": [4, 2]}, "am_lengths, "),
    ({"lm": np.zeros((2, 3, 4))}, "am_lengths, "),
    ({"lm_only_scale": -0.1}, "lm_only_scale, "),
    ({"am_only_scale": math.nan}, "lm_only_scale, "),
    ({"lm_only_scale": 0.6, "am_only_scale": 0.5}, "lm_only_scale, "),
])
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.simple_rnnt_loss(**{**batch(), **change})


def test_arguments_are_not_modified() -> None:
    arguments = batch()
    before = {name: np.array(value) for name, value in arguments.items()}
    reference.simple_rnnt_loss(**arguments, **options((0.2, 0.3), fastemit_lambda=0.5, shared_unigram=True))
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)
