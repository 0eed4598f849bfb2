"""What takes a CUDA device to know: results there, streams, threads, large sizes, lengths and labels on the device.

With GPU_TESTS_ON_HOST=1 the tests that need no device run on the host: a trial of the tests themselves.
"""

import functools
import math
import os
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import transducer_loss as tl
from transducer_loss import check, reference, simple_loss
from transducer_loss.arrays import FLOATS, numpy_dtype
from transducer_loss.checks import TOPOLOGIES


def count_devices() -> tuple[int, str]:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount()), "no CUDA device"
    except Exception as error:  # without CuPy, a driver or a device: each raises something else
        return 0, f"no CUDA device: {error}"


DEVICES, REASON = count_devices()
ON_HOST = not DEVICES and os.environ.get("GPU_TESTS_ON_HOST") == "1"
DEVICE = "cpu" if ON_HOST else "cuda:0"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES and not ON_HOST, reason=REASON)]
needs_device = pytest.mark.skipif(not DEVICES, reason=REASON)
every_function = pytest.mark.parametrize("function", ("rnnt_loss", "joint_rnnt_loss", "simple_rnnt_loss"))
every_dtype = pytest.mark.parametrize("dtype", FLOATS)

xp: Any = np
if DEVICES:
    import cupy

    from transducer_loss.cuda import Cuda

    xp = cupy


def on_device(array: Any, index: int = 0) -> Any:
    if ON_HOST:
        return np.array(array)
    with cupy.cuda.Device(index):
        return Cuda(index).to_device(np.asarray(array))


GRADIENTS = {"joint_rnnt_loss": ("encoder", "predictor", "weight", "bias"), "simple_rnnt_loss": ("am", "lm")}


def make_batch(batch: int = 3, frames: int = 12, labels: int = 6, classes: int = 40, features: int = 20, seed: int = 0) -> Any:
    """Inputs of all losses in float64, of values that every dtype holds exactly; the first utterance is the longest."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return np.clip(np.rint(32 * rng.normal(size=shape)), -255, 255) / 32

    low = max(1, frames // 2)
    integers = (
        rng.integers(1, classes, (batch, labels)),
        np.r_[frames, rng.integers(low, frames + 1, batch - 1)],
        np.r_[labels, rng.integers(0, min(labels, low) + 1, batch - 1)],
    )
    return SimpleNamespace(
        integers=integers,
        rnnt_loss=[draw(batch, frames, labels + 1, classes)],
        joint_rnnt_loss=[
            draw(batch, frames, features), draw(batch, labels + 1, features), draw(classes, features) / 4, draw(classes),
        ],
        simple_rnnt_loss=[draw(batch, frames, classes), draw(batch, labels + 1, classes)],
    )  # fmt: skip


def given(function: str, of: Any, dtype: str = "float32", index: int = 0) -> list[Any]:
    """The float arguments of a function, on a device."""
    return [on_device(array.astype(numpy_dtype(dtype)), index) for array in getattr(of, function)]


def run(function: str, *arguments: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """Loss and gradients by the library."""
    loss, grads, *_ = getattr(tl, function)(*arguments, **options)
    return loss, tuple(getattr(grads, name) for name in GRADIENTS[function]) if function in GRADIENTS else (grads,)


def expected(function: str, of: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """Loss and gradients by the reference."""
    loss, grads, *_ = getattr(reference, function)(*getattr(of, function), *of.integers, **options)
    return loss, grads if isinstance(grads, tuple) else (grads,)


def plain(array: Any) -> Any:
    """Any framework's array as a NumPy array of float64."""
    if hasattr(array, "detach"):
        return array.detach().cpu().double().numpy()
    return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)


def bits(*arrays: Any) -> list[bytes]:
    return [(array.get() if hasattr(array, "get") else array).tobytes() for array in arrays]


def assert_close(
    found: tuple[Any, tuple[Any, ...]], wanted: tuple[Any, tuple[Any, ...]], budgets: tuple[float, float] = (1e-6, 4e-6)
) -> None:
    """Within the errors of `check.Row`; by default those of float32."""
    loss, wanted_loss = (np.atleast_1d(plain(pair[0])) for pair in (found, wanted))
    finite = np.isfinite(wanted_loss)
    np.testing.assert_array_equal(loss[~finite], wanted_loss[~finite])
    error = abs(loss[finite] - wanted_loss[finite]) / np.maximum(1, abs(wanted_loss[finite]))
    assert np.max(error) <= budgets[0]
    for gradient, want in zip(found[1], map(plain, wanted[1]), strict=True):
        assert gradient.shape == want.shape
        assert np.linalg.norm(plain(gradient) - want) <= budgets[1] * np.linalg.norm(want)


@every_dtype
@pytest.mark.parametrize("function", check.FUNCTIONS)
def test_check_passes(function: str, dtype: str) -> None:
    assert not [row for row in check.check(DEVICE, functions=[function], dtypes=[dtype]) if not row.passed]


@every_dtype
@every_function
def test_results_are_where_the_inputs_are(function: str, dtype: str) -> None:
    of = make_batch()
    floats = given(function, of, dtype)
    loss, gradients = run(function, *floats, *of.integers)
    assert isinstance(loss, xp.ndarray)
    assert loss.dtype == ("float64" if dtype == "float64" else "float32")
    for gradient, array in zip(gradients, floats, strict=True):
        assert isinstance(gradient, xp.ndarray)
        assert (gradient.dtype, gradient.device) == (array.dtype, array.device)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_occupancy_and_alignment(topology: str) -> None:
    of = make_batch()
    wanted_loss, *wanted = reference.occupancy(*of.rnnt_loss, *of.integers, topology=topology)
    found = tl.occupancy(*given("rnnt_loss", of), *of.integers, topology=topology)
    assert_close((found.loss, (found.blank, found.label)), (wanted_loss, tuple(wanted)))

    frames, score = reference.align(*of.rnnt_loss, *of.integers, topology=topology)
    alignment = tl.align(*given("rnnt_loss", of), *of.integers, topology=topology)
    np.testing.assert_array_equal(plain(alignment.frames), frames)
    np.testing.assert_allclose(plain(alignment.score), score, rtol=1e-6)


@pytest.mark.parametrize("form", ["packed", "classes first", "strided", "inplace"])
def test_forms_of_logits(form: str) -> None:
    of = make_batch()
    (logits,), (_, frames, labels) = of.rnnt_loss, of.integers
    loss, (grad,) = expected("rnnt_loss", of)
    array = on_device(logits.astype(np.float32))
    if form == "packed":
        shape = np.indices(logits.shape[:3])
        real = (shape[1] < frames[:, None, None]) & (shape[2] <= labels[:, None, None])
        array, grad = on_device(logits[real].astype(np.float32)), grad[real]
    elif form == "classes first":
        array = xp.ascontiguousarray(array.transpose(3, 0, 2, 1)).transpose(1, 3, 2, 0)
    elif form == "strided":
        array = xp.repeat(array, 2, axis=1)[:, ::2]
    assert array.flags.c_contiguous == (form in ("packed", "inplace"))
    found, gradient = tl.rnnt_loss(array, *of.integers, inplace=form == "inplace")
    assert_close((found, (gradient,)), (loss, (grad,)))
    if form == "inplace":
        assert bits(gradient) == bits(array)


# More than a block has threads, than a grid has in y, than the lattice has in shared memory; a lone cell; many utterances.
SHAPES = [(1, 3, 2, 70_001), (1, 400, 200, 5), (2, 60, 1500, 4), (1, 1, 0, 3), (70, 5, 4, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@every_function
def test_shapes(function: str, shape: tuple[int, int, int, int]) -> None:
    of = make_batch(*shape, features=5)
    wanted = run(function, *getattr(of, function), *of.integers)
    assert_close(run(function, *given(function, of), *of.integers), wanted, (1e-6, 1e-5))


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_a_wide_lattice_of_the_other_topologies(topology: str) -> None:
    of = make_batch(1, 1200, 1100, 3)
    wanted = run("rnnt_loss", *of.rnnt_loss, *of.integers, topology=topology)
    assert_close(run("rnnt_loss", *given("rnnt_loss", of), *of.integers, topology=topology), wanted, (1e-6, 1e-5))
    posterior = tl.occupancy(*given("rnnt_loss", of), *of.integers, topology=topology)
    assert np.isclose(plain(posterior.label).sum(), 1100, rtol=1e-5)  # every label is emitted once


@pytest.mark.parametrize(("frames", "labels"), [(50, 70), pytest.param(4096, 8191, marks=needs_device)])
def test_logits_beyond_2_31_elements(frames: int, labels: int) -> None:
    """Two utterances whose cells are all alike have closed forms; the larger size is 2^31 float16 elements for each of them."""
    classes = 64
    needed = 3 * 2 * frames * (labels + 1) * (classes * 2 + 36) // 2
    if DEVICES and cupy.cuda.runtime.memGetInfo()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    rng = np.random.default_rng(0)
    row = (np.rint(32 * rng.normal(size=classes)) / 32).astype(np.float16)
    targets = rng.integers(1, classes, (2, labels))
    logits = xp.zeros((2, frames, labels + 1, classes), np.float16)
    logits[1] = on_device(row)
    loss, grad = tl.rnnt_loss(logits, targets, [frames] * 2, [labels] * 2, inplace=True)

    paths = math.lgamma(frames + labels) - math.lgamma(labels + 1) - math.lgamma(frames)
    for b, values in enumerate([np.zeros(classes), row.astype(np.float64)]):
        log_p = values - np.log(np.exp(values).sum())
        wanted = -frames * log_p[0] - log_p[targets[b]].sum() - paths
        assert np.isclose(plain(loss)[b], wanted, rtol=1e-5)
        # Over all cells blanks are used T times, label arcs U times.
        used = np.bincount(targets[b], minlength=classes)
        used[0] = frames
        wanted_sums = (frames + labels) * np.exp(log_p) - used
        sums = plain(grad[b].sum(axis=(0, 1), dtype=np.float64))
        assert np.linalg.norm(sums - wanted_sums) <= 2e-3 * np.linalg.norm(wanted_sums)
    if DEVICES:
        del logits, grad
        cupy.get_default_memory_pool().free_all_blocks()


@every_function
def test_lengths_and_targets_on_the_device(function: str) -> None:
    of = make_batch()
    floats, results = given(function, of), []
    for kind in (None, np.int32, np.int64):
        integers = of.integers if kind is None else [on_device(array.astype(kind)) for array in of.integers]
        loss, gradients = run(function, *floats, *integers)
        results.append(bits(loss, *gradients))
    assert results[0] == results[1] == results[2]


@needs_device
@every_function
def test_targets_out_of_range_on_the_device(function: str) -> None:
    of = make_batch(batch=4)
    targets, frames, labels = of.integers
    labels[:] = 3
    floats, bad = given(function, of), targets.copy()
    bad[1, 1], bad[3, 2] = 40, -7
    bad[2, 3] = 1 << 40  # past the last label, where nothing is read
    arguments = (*floats, on_device(bad), frames, labels)
    loss, gradients = run(function, *arguments)
    assert np.isnan(plain(loss)).tolist() == [False, True, False, True]
    wanted_loss, wanted = expected(function, of, weights=[1.0, 0.0, 1.0, 0.0])
    assert_close((plain(loss)[::2], gradients), (wanted_loss[::2], wanted))
    with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 40\), got 40 at index \(1, 1\)"):
        run(function, *arguments, validate=True)


@needs_device
@pytest.mark.parametrize("function", ["rnnt_loss", "joint_rnnt_loss"])
def test_a_blank_that_hat_has_no_label_for(function: str) -> None:
    of = make_batch(batch=3)
    targets, frames, labels = of.integers
    labels[:] = 3
    targets[targets == 39] = 1
    bad = targets.copy()
    bad[1, 2] = 39
    loss, gradients = run(function, *given(function, of), on_device(bad), frames, labels, hat=True, blank=39)
    assert np.isnan(plain(loss)).tolist() == [False, True, False]
    wanted_loss, wanted = expected(function, of, weights=[1.0, 0.0, 1.0], hat=True, blank=39)
    assert_close((plain(loss)[::2], gradients), (wanted_loss[::2], wanted))


@every_function
def test_nan_and_infeasible_utterances(function: str) -> None:
    of = make_batch(batch=3, frames=8, labels=6)
    of.integers[1][0] = 5  # fewer frames than labels: no path in `modified`
    getattr(of, function)[0][1, 0] = np.nan
    wanted = expected(function, of, topology="modified")
    assert [not math.isnan(value) and math.isinf(value) for value in wanted[0]] == [True, False, False]
    assert math.isnan(wanted[0][1])
    floats = given(function, of)
    assert_close(run(function, *floats, *of.integers, topology="modified"), wanted)
    assert plain(run(function, *floats, *of.integers, topology="modified", infeasible="zero")[0])[0] == 0
    with pytest.raises(ValueError, match=r"targets: expected a path .*\[0\]"):
        run(function, *floats, *of.integers, topology="modified", infeasible="raise")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity"])
def test_activations(activation: str) -> None:
    of = make_batch()
    found = run("joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, activation=activation)
    assert_close(found, expected("joint_rnnt_loss", of, activation=activation), (1e-6, 1e-5))


def test_dropout_is_that_of_the_host() -> None:
    of, options = make_batch(), {"dropout": 0.3, "seed": 5}
    wanted = run("joint_rnnt_loss", *of.joint_rnnt_loss, *of.integers, **options)
    assert_close(run("joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, **options), wanted)
    assert plain(wanted[0])[0] != plain(run("joint_rnnt_loss", *of.joint_rnnt_loss, *of.integers)[0])[0]


def small_gradients() -> tuple[Any, tuple[Any, ...], Any]:
    """Inputs whose logits' gradients lie below what float16 holds, weights, and which classes only the softmax touches."""
    of = make_batch(batch=2, frames=20, labels=10, classes=2000)
    of.joint_rnnt_loss[:2] = [abs(array) for array in of.joint_rnnt_loss[:2]]  # features of one sign: their sums do not cancel
    weights = (2.0**-14,) * 2
    untouched = np.setdiff1d(np.arange(1, 2000), of.integers[0])
    return of, weights, untouched


def assert_not_underflown(found: Any, wanted: Any, untouched: Any) -> None:
    error = np.linalg.norm(plain(found)[untouched] - wanted[untouched])
    assert error <= 0.02 * np.linalg.norm(wanted[untouched])  # the result itself is rounded to a subnormal


def test_half_precision_gradients_do_not_underflow() -> None:
    of, weights, untouched = small_gradients()
    _, wanted = expected("joint_rnnt_loss", of, weights=weights)
    _, found = run("joint_rnnt_loss", *given("joint_rnnt_loss", of, "float16"), *of.integers, weights=list(weights))
    for gradient, want in zip(found[2:], wanted[2:], strict=True):
        assert_not_underflown(gradient, want, untouched)


def test_arguments_on_two_devices_are_refused() -> None:
    if ON_HOST:
        pytest.skip("needs two kinds of memory")
    of = make_batch()
    encoder, _, weight, bias = given("joint_rnnt_loss", of)
    with pytest.raises(ValueError, match="predictor: expected device cuda:0 as encoder, got cpu"):
        tl.joint_rnnt_loss(encoder, of.joint_rnnt_loss[1].astype(np.float32), weight, bias, *of.integers)


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@every_function
def test_the_second_device(function: str) -> None:
    of = make_batch()
    floats = given(function, of, index=1)
    with cupy.cuda.Device(0):
        loss, gradients = run(function, *floats, *of.integers)
        assert cupy.cuda.Device().id == 0
    assert {array.device.id for array in (loss, *gradients)} == {1}
    assert_close((loss, gradients), expected(function, of))


# ---- pruned


SMOOTHED = {"lm_only_scale": 0.25, "am_only_scale": 0.125}


@pytest.mark.parametrize("options", [{}, SMOOTHED, {"lm_only_scale": 1.0}, {"am_only_scale": 1.0}], ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_simple_loss_and_its_occupancies(topology: str, options: dict[str, float]) -> None:
    of = make_batch()
    wanted_loss, wanted, pair = reference.simple_rnnt_loss(*of.simple_rnnt_loss, *of.integers, topology=topology, **options)
    loss, grads, occupancy = tl.simple_rnnt_loss(*given("simple_rnnt_loss", of), *of.integers, topology=topology, **options)
    found = grads.am, grads.lm, occupancy.blank, occupancy.label
    assert {type(array) for array in (loss, *found)} == {xp.ndarray}
    # Smoothed, and with fewer labels than frames, gradients are differences of sums.
    assert_close((loss, found), (wanted_loss, (*wanted, *pair)), (1e-6, 2e-5))
    alone, none, posterior = tl.simple_rnnt_loss(
        *given("simple_rnnt_loss", of), *of.integers, topology=topology, gradient=False, **options
    )
    assert none is None
    assert_close((alone, (posterior.blank, posterior.label)), (wanted_loss, pair), (1e-6, 2e-5))


def test_simple_loss_of_logits_far_apart() -> None:
    of = make_batch()
    of.simple_rnnt_loss[:] = [100 * array for array in of.simple_rnnt_loss]
    wanted = expected("simple_rnnt_loss", of, **SMOOTHED)
    assert_close(run("simple_rnnt_loss", *given("simple_rnnt_loss", of), *of.integers, **SMOOTHED), wanted, (1e-5, 1e-3))


@pytest.mark.parametrize("at_a_time", [1, 2, 100])
def test_simple_loss_of_some_utterances_at_a_time(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = make_batch(batch=5)
    monkeypatch.setattr(simple_loss, "_TASK_BYTES", at_a_time * 4 * 40 * (12 + 7))
    wanted = expected("simple_rnnt_loss", of, **SMOOTHED)
    assert_close(run("simple_rnnt_loss", *given("simple_rnnt_loss", of), *of.integers, **SMOOTHED), wanted, (1e-6, 2e-5))


def banded(of: Any, strategy: str, topology: str = "regular", s_range: int = 3, host: bool = False) -> tl.Band:
    """A band of the simple loss's occupancies, of few digits, so that the host and the device find the same."""
    occupancy = tl.simple_rnnt_loss(*of.simple_rnnt_loss, *of.integers, topology=topology, gradient=False)[2]
    pair = (np.rint(4096 * array) / 4096 for array in (occupancy.blank, occupancy.label))
    place = np.asarray if host else on_device
    return tl.prune(
        tl.Occupancy(*map(place, pair), None), *of.integers[1:], s_range=s_range, strategy=strategy, topology=topology
    )


@pytest.mark.parametrize("strategy", ["local", "optimal"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_prune(topology: str, strategy: str) -> None:
    for of in (make_batch(), make_batch(2, 90, 70, 5)):
        wanted, found = (banded(of, strategy, topology, host=host) for host in (True, False))
        assert isinstance(found.first, xp.ndarray)
        assert isinstance(found.mass, xp.ndarray)
        assert found.width == wanted.width
        np.testing.assert_allclose(plain(found.mass), wanted.mass, rtol=1e-9)
        if strategy == "local":  # of two that keep the same but for rounding, either may be the optimal one
            np.testing.assert_array_equal(plain(found.first), wanted.first)
            np.testing.assert_array_equal(plain(found.end), wanted.end)
            np.testing.assert_array_equal(plain(found.to_ranges()), wanted.to_ranges())


def rows_of(band: tl.Band) -> dict[str, Any]:
    """Keywords of the reference."""
    return {"first": plain(band.first).astype(int), "end": plain(band.end).astype(int)}


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_pruned_losses(topology: str, where: str) -> None:
    of = make_batch()
    band = banded(of, "optimal", topology, host=where == "host")
    rows, options = rows_of(band), {"topology": topology, "fastemit_lambda": 0.1}
    of.rnnt_loss[0] = of.rnnt_loss[0][:, :, : band.width]
    found = run("rnnt_loss", *given("rnnt_loss", of), *of.integers, band=band, **options)
    assert_close(found, expected("rnnt_loss", of, **rows, **options))
    found = run("joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, band=band, occupancy_floor=0.0, **options)
    assert_close(found, expected("joint_rnnt_loss", of, width=band.width, **rows, **options))
    least = check._least_workspace(
        lambda workspace: tl.joint_rnnt_loss(*given("joint_rnnt_loss", of), *of.integers, band=band, workspace=workspace)
    )
    small = run(
        "joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, band=band, occupancy_floor=0.0, workspace=least, **options
    )
    assert_close(small, expected("joint_rnnt_loss", of, width=band.width, **rows, **options))

    wanted_loss, *wanted = reference.occupancy(*of.rnnt_loss, *of.integers, topology=topology, **rows)
    posterior = tl.occupancy(*given("rnnt_loss", of), *of.integers, topology=topology, band=band)
    assert_close((posterior.loss, (posterior.blank, posterior.label)), (wanted_loss, tuple(wanted)))
    frames, score = reference.align(*of.rnnt_loss, *of.integers, topology=topology, **rows)
    best = tl.align(*given("rnnt_loss", of), *of.integers, topology=topology, band=band)
    np.testing.assert_array_equal(plain(best.frames), frames)
    np.testing.assert_allclose(plain(best.score), score, rtol=1e-6)


def test_a_band_of_an_alignment_on_the_device() -> None:
    of = make_batch()
    best = tl.align(*given("rnnt_loss", of), *of.integers)
    band = tl.Band.from_alignment(best.frames, *of.integers[1:], 1, 2)
    wanted = tl.Band.from_alignment(plain(best.frames).astype(int), *of.integers[1:], 1, 2)
    assert isinstance(band.first, xp.ndarray)
    np.testing.assert_array_equal(plain(band.first), wanted.first)
    np.testing.assert_array_equal(plain(band.end), wanted.end)
    found = run("joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, band=band, occupancy_floor=0.0)
    assert_close(found, expected("joint_rnnt_loss", of, width=band.width, **rows_of(band)))


@every_dtype
def test_gather(dtype: str) -> None:
    of = make_batch()
    band = banded(of, "local")
    wanted = banded(of, "local", host=True)
    rows = of.joint_rnnt_loss[1].astype(numpy_dtype(dtype))
    found = tl.gather_predictor(on_device(rows), band)
    assert isinstance(found, xp.ndarray)
    assert bits(found) == bits(tl.gather_predictor(rows, wanted))
    gradient = np.random.default_rng(0).normal(size=found.shape).astype(numpy_dtype(dtype))
    back = tl.gather_predictor_backward(on_device(gradient), band, rows.shape[1])
    # Sums in one order on both.
    assert bits(back) == bits(tl.gather_predictor_backward(gradient, wanted, rows.shape[1]))


@needs_device
def test_a_band_on_the_device_out_of_order() -> None:
    of = make_batch(batch=2)
    of.integers[1][:], of.integers[2][:] = 12, 6
    band = banded(of, "local")
    first = band.first.copy()
    first[0] = xp.asarray([0, 2**31 - 1, -(2**31), 5, 0, 1, -7, 99, 3, 2, 1, 0], np.int32)
    band = tl.Band(first, band.end, band.width, band.frames, band.labels, band.s_range)
    logits = given("rnnt_loss", of)[0][:, :, : band.width]
    for loss, gradients in (
        run("rnnt_loss", logits, *of.integers, band=band),
        run("joint_rnnt_loss", *given("joint_rnnt_loss", of), *of.integers, band=band),
    ):
        assert np.isnan(plain(loss)).tolist() == [True, False]
        assert not plain(gradients[0])[0].any()
        assert plain(gradients[0])[1].any()
    assert np.isfinite(plain(tl.gather_predictor(given("joint_rnnt_loss", of)[1], band))).all()


def sampled(
    of: Any, device: bool, proposal: str = "uniform", scope: str = "batch", dtype: str = "float32", **options: Any
) -> tl.Classes:
    """A few of 400 classes, drawn on a device or on the host."""
    rng, (targets, frames, labels) = np.random.default_rng(4), of.integers
    place: Callable[[Any], Any] = on_device if device else np.array
    given_to = {
        "uniform": {},
        "unigram": {"counts": place(rng.integers(0, 1000, 400) ** 3)},
        "ctc": {
            "ctc_logits": place(np.rint(64 * rng.normal(size=(3, 400, 12))).transpose(0, 2, 1).astype(numpy_dtype(dtype)) / 16),
            "ctc_lengths": frames,
        },
    }[proposal]
    return tl.sample_classes(
        place(targets), labels, vocab_size=400, num_samples=30, proposal=proposal, scope=scope, correction=True,
        **{"seed": 7, "step": 1 << 40, **given_to, **options},
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["batch", "utterance"])
@pytest.mark.parametrize(
    ("proposal", "dtype"), [("uniform", "float32"), ("unigram", "float32"), *(("ctc", name) for name in FLOATS)]
)
def test_classes_are_those_of_the_host(proposal: str, dtype: str, scope: str) -> None:
    of = make_batch(classes=400)
    for step in range(20):
        found, wanted = (sampled(of, device, proposal, scope, dtype, step=step) for device in (True, False))
        assert isinstance(found.ids, xp.ndarray)
        assert bits(found.ids, found.probability) == bits(wanted.ids, wanted.probability)
    assert found.slots < 400


def test_classes_of_a_large_vocabulary() -> None:
    of = make_batch(classes=400)
    options: dict[str, Any] = {"vocab_size": 1_000_000, "num_samples": 5000, "scope": "utterance"}
    found, wanted = (tl.sample_classes(place(of.integers[0]), of.integers[2], **options) for place in (on_device, np.array))
    assert bits(found.ids) == bits(wanted.ids)


@pytest.mark.parametrize("scope", ["batch", "utterance"])
@pytest.mark.parametrize("where", ["device", "host"])
@every_dtype
def test_sampled_losses(dtype: str, where: str, scope: str) -> None:
    of = make_batch(classes=400)
    classes = sampled(of, where == "device", scope=scope)
    ids = plain(classes.ids).astype(int)
    wanted = expected("joint_rnnt_loss", of, classes=ids, offset=-np.log(plain(classes.probability)))
    arguments = (*given("joint_rnnt_loss", of, dtype), *of.integers)
    options: dict[str, Any] = {"classes": classes, "occupancy_floor": 0.0}
    found = run("joint_rnnt_loss", *arguments, **options)
    budget = check.budgets("joint_rnnt_loss", dtype, DEVICE)
    assert_close(found, wanted, budget)
    least = check._least_workspace(lambda workspace: tl.joint_rnnt_loss(*arguments, workspace=workspace, **options))
    assert_close(run("joint_rnnt_loss", *arguments, workspace=least, **options), wanted, budget)

    loss, grads = tl.joint_rnnt_loss(*arguments, sparse=True, **options)
    assert grads is not None
    whole = []
    for rows, want in zip((grads.weight, grads.bias), wanted[1][2:], strict=True):
        whole.append(np.zeros_like(want))
        np.add.at(whole[-1], plain(rows.rows).astype(int), plain(rows.values))
    assert_close((loss, (grads.encoder, grads.predictor, *whole)), wanted, budget)


def test_a_label_that_was_not_sampled_on_the_device() -> None:
    if ON_HOST:
        pytest.skip("the host refuses it")
    of = make_batch(classes=400)
    kept = np.unique(np.append(of.integers[0][1:], 0))
    missing = [b for b in range(3) if not np.isin(of.integers[0][b, : of.integers[2][b]], kept).all()]
    assert missing == [0]
    arguments = given("joint_rnnt_loss", of), on_device(of.integers[0])
    loss, grads = tl.joint_rnnt_loss(
        *arguments[0], arguments[1], *of.integers[1:], classes=tl.Classes.from_ids(on_device(kept), 400)
    )
    assert np.isnan(plain(loss)).tolist() == [True, False, False]
    assert grads is not None
    assert np.isfinite(plain(grads.weight)).all()
    assert not plain(grads.encoder)[0].any()


def test_a_host_array_and_a_band_on_the_device_are_refused() -> None:
    if ON_HOST:
        pytest.skip("needs two kinds of memory")
    of = make_batch()
    band = banded(of, "local")
    with pytest.raises(ValueError, match="band: expected one on the host, as the inputs, got one on a device"):
        tl.rnnt_loss(of.rnnt_loss[0][:, :, : band.width], *of.integers, band=band)


# ---- EMBR, the reduced decoder, Amortized Networks


class System(NamedTuple):
    """A function whose value has gradients by its float arguments."""

    floats: list[Any]
    """In float64, of values that every dtype holds exactly."""
    integers: dict[str, Any]
    options: dict[str, Any]
    value_and_gradients: Callable[..., tuple[Any, ...]]
    """Of floats, upstream gradient and keywords."""
    call: Callable[..., Any]
    """Of a framework's function, floats and keywords."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return np.shape(self.on_host(np.float64)[0])

    def on_host(self, kind: Any, upstream: Any = None) -> tuple[Any, ...]:
        """Value and gradients, for an upstream gradient of the shape of the value, or of ones."""
        floats = [array.astype(kind) for array in self.floats]
        return self.value_and_gradients(floats, upstream, **self.integers, **self.options)


def upstream_of(of: System, seed: int = 1) -> Any:
    return np.rint(8 * np.random.default_rng(seed).normal(size=of.shape)) / 8


def make_system(name: str, scale: int = 1, seed: int = 0) -> System:
    """Ragged; with a `scale` of 40, sequences are longer than blocks and rows wider."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return np.clip(np.rint(32 * rng.normal(size=shape)), -255, 255) / 32

    function, _, kind = name.partition(" ")
    batch, frames, labels, members = 3, 30 * scale, 10 * scale, 5 * scale
    if function == "embr_loss":
        lengths = rng.integers(-1, 4, (batch, members))
        lengths[:, 0] = 3
        integers = {
            "distances": rng.integers(0, 30, (batch, members)), "hypotheses": rng.integers(0, 3, (batch, members, 3)),
            "hypothesis_lengths": lengths,
        }  # fmt: skip

        def risk(floats: Any, upstream: Any, *, distances: Any, **options: Any) -> Any:
            loss, grads = tl.embr_loss(floats[0], distances, reference_nll=floats[1], weights=upstream, **options)
            return loss, grads.nll, grads.reference_nll

        def call(of: Any, floats: Any, *, distances: Any, **options: Any) -> Any:
            return of(floats[0], distances, reference_nll=floats[1], **options)

        return System([abs(draw(batch, members)), abs(draw(batch))], integers, {"interpolation": 0.25, "blank": 1}, risk, call)
    counts = {"lengths": np.array([frames, 1, frames // 2 + 1])}
    if function in ("amortized_cost", "amortized_backlog"):
        each = [1.0, 0.5, 0.125]
        options = {"frame_period": 0.5, "statistic": kind} if kind else {}
        gates = abs(draw(batch, frames, 3))

        def waiting(floats: Any, upstream: Any, *, lengths: Any, **options: Any) -> Any:
            return getattr(tl, function)(floats[0], each, lengths, weights=upstream, **options)

        return System(
            [gates], counts, options, waiting, lambda of, floats, *, lengths, **options: of(floats[0], each, lengths, **options)
        )
    if function == "gumbel_gate":

        def gates_of(floats: Any, upstream: Any, *, hard: bool, **options: Any) -> Any:
            value = tl.gumbel_gate(floats[0], hard=hard, **options)
            upstream = value * 0 + 1 if upstream is None else upstream.astype(value.dtype)
            return value, tl.gumbel_gate_backward(upstream, floats[0], **options)

        options = {"hard": kind == "hard", "seed": 5, "temperature": 0.5}
        return System([draw(batch, frames, 3)], counts, options, gates_of, lambda of, floats, **options: of(floats[0], **options))
    integers = {"targets": rng.integers(0, 20, (batch, labels)), "target_lengths": np.array([labels, 0, labels // 2])}

    def averaged(floats: Any, upstream: Any, *, targets: Any, target_lengths: Any, **options: Any) -> Any:
        value = tl.reduced_predictor(*floats, targets, target_lengths, **options)
        upstream = value * 0 + 1 if upstream is None else upstream.astype(value.dtype)
        grads = tl.reduced_predictor_backward(upstream, *floats, targets, target_lengths, **options)
        return value, grads.embedding, grads.positions

    return System(
        [draw(20, 17 * scale), draw(2, 3, 17 * scale) / 4], integers, {"last": True} if kind else {}, averaged,
        lambda of, floats, *, targets, target_lengths, **options: of(*floats, targets, target_lengths, **options),
    )  # fmt: skip


SYSTEMS = (
    "embr_loss", "reduced_predictor", "reduced_predictor last", "amortized_cost", "amortized_backlog mean",
    "amortized_backlog last", "gumbel_gate soft", "gumbel_gate hard",
)  # fmt: skip
every_system = pytest.mark.parametrize("name", SYSTEMS)


def on_device_by(of: System, kind: Any, upstream: Any = None, integers: Any = np.int64, index: int = 0) -> tuple[Any, ...]:
    """Value and gradients there; without a dtype for them, integers stay on the host."""
    given_to = {
        key: value if integers is None else on_device(value.astype(integers), index) for key, value in of.integers.items()
    }
    return of.value_and_gradients(
        [on_device(array.astype(kind), index) for array in of.floats],
        None if upstream is None else on_device(upstream, index), **given_to, **of.options,
    )  # fmt: skip


def assert_results(found: tuple[Any, ...], wanted: tuple[Any, ...], dtype: str) -> None:
    """The same but for the order of sums, and for what is rounded to the other side."""
    budget = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 4e-6, "float64": 1e-12}[dtype]
    assert len(found) == len(wanted)
    for one, other in zip(found, map(plain, wanted), strict=True):
        assert one.shape == other.shape
        assert np.linalg.norm(plain(one) - other) <= budget * np.linalg.norm(other)


@every_dtype
@every_system
def test_systems_are_those_of_the_host(name: str, dtype: str) -> None:
    of, kind = make_system(name), numpy_dtype(dtype)
    upstream = upstream_of(of)
    wanted, results = of.on_host(kind, upstream), []
    for integers in (None, np.int32, np.int64):
        found = on_device_by(of, kind, upstream, integers)
        assert all(isinstance(array, xp.ndarray) for array in found)
        assert [array.dtype for array in found] == [array.dtype for array in wanted]
        assert_results(found, wanted, dtype)
        results.append(bits(*found))
    assert results[0] == results[1] == results[2]
    assert all(plain(array).any() for array in wanted)


@every_system
def test_systems_of_long_sequences(name: str) -> None:
    of = make_system(name, 40)
    upstream = upstream_of(of)
    first, again = (on_device_by(of, np.float32, upstream) for _ in range(2))
    assert_results(first, of.on_host(np.float32, upstream), "float32")
    assert bits(*first) == bits(*again)


# Members, labels of hypotheses and of references: in shared memory, longer than blocks, beyond shared memory, none.
@pytest.mark.parametrize("blank", [None, 2])
@pytest.mark.parametrize("shape", [(5, 9, 7), (2, 1500, 900), (3, 40, 1500), (1, 1200, 1023), (2, 3, 1024), (2, 0, 3), (2, 3, 0)])
def test_edit_distances_are_those_of_the_host(shape: tuple[int, int, int], blank: int | None) -> None:
    members, columns, width = shape
    rng = np.random.default_rng(0)
    said, meant = rng.integers(0, 4, (3, members, columns)), rng.integers(0, 4, (3, width))
    lengths, counts = rng.integers(-1, columns + 1, (3, members)), rng.integers(0, width + 1, 3)
    lengths[0], counts[0] = columns, width
    wanted = vars(tl.edit_distance(said, lengths, meant, counts, blank=blank))
    for kind in (np.int32, np.int64):
        found = tl.edit_distance(*(on_device(array.astype(kind)) for array in (said, lengths, meant, counts)), blank=blank)
        assert bits(*vars(found).values()) == bits(*wanted.values())
    strided = on_device(np.ascontiguousarray(said.transpose(2, 1, 0))).transpose(2, 1, 0)
    from_lists = tl.edit_distance(strided, lengths.tolist(), meant, counts.tolist(), blank=blank)
    assert bits(*vars(from_lists).values()) == bits(*wanted.values())
    assert all(isinstance(array, xp.ndarray) for array in vars(from_lists).values())


@pytest.mark.parametrize("small", [False, True])
@every_dtype
def test_shared_encoders_are_those_that_are_copied(dtype: str, small: bool) -> None:
    of, index, weights = make_batch(batch=5), [2, 0, 2, 0, 2], [1.0, -0.5, 2.0, 0.0, 1.0]
    targets, frames, labels = of.integers
    call = functools.partial(
        run, "joint_rnnt_loss", *given("joint_rnnt_loss", of, dtype), *of.integers, weights=weights, occupancy_floor=0.0
    )
    least = check._least_workspace(functools.partial(call, encoder_index=index)) if small else None
    found = call(encoder_index=index, workspace=least)
    wanted_loss, (by_encoder, *wanted) = reference.joint_rnnt_loss(
        of.joint_rnnt_loss[0][index], *of.joint_rnnt_loss[1:], targets, frames[index], labels, weights=weights
    )
    summed = np.zeros_like(of.joint_rnnt_loss[0])
    np.add.at(summed, index, by_encoder)
    assert_close(found, (wanted_loss, (summed, *wanted)), check.budgets("joint_rnnt_loss", dtype, DEVICE))
    there = call(encoder_index=on_device(np.array(index)), workspace=least)  # from where it is copied
    assert bits(there[0], *there[1]) == bits(found[0], *found[1])


@needs_device
@every_system
def test_lengths_out_of_range_on_the_device(name: str) -> None:
    """Where nobody looks at them: no number, and no gradient, for those utterances alone."""
    of = make_system(name)
    wanted = on_device_by(of, np.float32)
    key = next(key for key in of.integers if key.endswith("lengths"))
    for wrong in (31, 1 << 40):
        lengths = of.integers[key].copy()
        lengths.reshape(3, -1)[1, 0] = wrong
        found = on_device_by(of._replace(integers={**of.integers, key: lengths}), np.float32)
        assert np.isnan(plain(found[0])[1]).all()
        assert bits(found[0][0], found[0][2]) == bits(wanted[0][0], wanted[0][2])
        for gradient in map(plain, found[1:]):
            assert np.isfinite(gradient).all()
            assert len(gradient) != 3 or not gradient[1].any()


@needs_device
def test_labels_and_edits_out_of_range_on_the_device() -> None:
    embedding, positions = (on_device(array) for array in make_system("reduced_predictor").floats)
    labels = on_device(np.array([[1, 20, 2, 3, 4], [5, 6, -1, 0, 1 << 40]]))
    rows = np.isnan(plain(tl.reduced_predictor(embedding, positions, labels, on_device(np.array([5, 2]))))).all(axis=-1)
    assert rows.tolist() == [[False, False, True, True, True, False], [False] * 6]  # those that see label 20
    with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 20\), got 20 at index \(0, 1\)"):
        tl.reduced_predictor(embedding, positions, labels, on_device(np.array([5, 2])), validate=True)
    edits = tl.edit_distance(labels, on_device(np.array([6, 5])), labels, on_device(np.array([5, -1])))
    assert {array.tobytes() for array in map(plain, vars(edits).values())} == {np.full(2, -1.0).tobytes()}
    with pytest.raises(ValueError, match=r"hypothesis_lengths: expected lengths in \[-1, L = 5\], got 6 at index 0"):
        tl.edit_distance(labels, on_device(np.array([6, 5])), labels, [5, 2], validate=True)


def sorts_without_waiting() -> bool:
    """CuPy's sort, which the gradient of the reduced predictor takes, waits for the stream before version 14."""
    return int(cupy.__version__.split(".")[0]) >= 14


@needs_device
@every_system
def test_systems_use_the_callers_stream_and_do_not_wait_for_it(name: str) -> None:
    if name.startswith("reduced_predictor") and not sorts_without_waiting():
        pytest.skip("the sort of this CuPy waits")
    of, stream = make_system(name), cupy.cuda.Stream(non_blocking=True)
    upstream = on_device(upstream_of(of))
    real = [on_device(array.astype(np.float32)) for array in of.floats]
    integers = {key: on_device(value) for key, value in of.integers.items()}
    late = [cupy.zeros_like(array) for array in real]

    def fill_and_run() -> tuple[Any, ...]:
        for array, values in zip(late, real, strict=True):
            array[...] = values
        return of.value_and_gradients(late, upstream, **integers, **of.options)

    cupy.cuda.Device().synchronize()
    with stream:
        spin(0)
        for _ in range(3):
            fill_and_run()
        for array in late:
            array.fill(0)
        stream.synchronize()
        spin(0.5)
        found = fill_and_run()
        waited = stream.done
        stream.synchronize()
    assert not waited
    assert_results(found, of.on_host(np.float32, plain(upstream)), "float32")


@needs_device
def test_edit_distance_and_shared_encoders_do_not_wait() -> None:
    of, stream = make_batch(batch=5), cupy.cuda.Stream(non_blocking=True)
    floats, targets = given("joint_rnnt_loss", of), on_device(of.integers[0])
    lengths = on_device(of.integers[2])

    def step() -> list[Any]:
        edits = tl.edit_distance(targets, lengths, targets, lengths)
        loss, grads = tl.joint_rnnt_loss(*floats, *of.integers, encoder_index=[2, 0, 2, 0, 2], occupancy_floor=0.0)
        return [edits.total, loss, grads.encoder]

    with stream:
        spin(0)
        for _ in range(3):
            step()
        stream.synchronize()
        spin(0.5)
        found = step()
        waited = stream.done
        stream.synchronize()
    assert not waited
    assert not plain(found[0]).any()


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@every_system
def test_systems_on_the_second_device(name: str) -> None:
    of = make_system(name)
    with cupy.cuda.Device(0):
        found = on_device_by(of, np.float32, upstream_of(of), np.int64, 1)
        assert cupy.cuda.Device().id == 0
    assert {array.device.id for array in found} == {1}
    assert_results(found, of.on_host(np.float32, upstream_of(of)), "float32")


SPIN = """
extern "C" __global__ void spin(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - start < nanoseconds);
}
"""


def spin(seconds: float) -> None:
    """Keep the current CuPy stream busy."""
    cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.uint64(seconds * 1e9),))


# A gradient of the cells that matter costs a read-back, and is only that exact; one of all cells costs none.
EVERY_CELL: dict[str, dict[str, Any]] = {"rnnt_loss": {}, "joint_rnnt_loss": {"occupancy_floor": 0.0}, "simple_rnnt_loss": {}}


@needs_device
@every_function
def test_the_callers_stream_is_used_and_not_waited_for(function: str) -> None:
    of, stream = make_batch(), cupy.cuda.Stream(non_blocking=True)
    real = given(function, of)
    late = [cupy.zeros_like(array) for array in real]

    def fill_and_run() -> tuple[Any, tuple[Any, ...]]:
        for array, values in zip(late, real, strict=True):
            array[...] = values
        return run(function, *late, *of.integers, **EVERY_CELL[function])

    cupy.cuda.Device().synchronize()
    with stream:
        spin(0)
        for _ in range(3):
            fill_and_run()  # compiles, and leaves memory in the pools: both may wait
        for array in late:
            array.fill(0)
        stream.synchronize()
        spin(0.5)
        # On any other stream the kernels would find the zeros.
        found = fill_and_run()
        waited = stream.done
        stream.synchronize()
    assert not waited
    assert_close(found, expected(function, of))


@pytest.fixture
def torch() -> ModuleType:
    module: ModuleType = pytest.importorskip("torch")
    if DEVICES and not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


def leaves(torch: Any, function: str, of: Any, dtype: str = "float32", device: str = DEVICE) -> list[Any]:
    return [
        torch.tensor(array).to(getattr(torch, dtype)).to(device).requires_grad_() for array in getattr(of, function)
    ]  # fmt: skip


def of_torch(function: str) -> Callable[..., Any]:
    from transducer_loss.adapters import torch as adapter

    loss: Callable[..., Any] = getattr(adapter, function)
    if function == "simple_rnnt_loss":  # it returns the occupancies as well
        return lambda *arguments, **options: loss(*arguments, **options)[0]
    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_dtype
@every_function
def test_torch(function: str, dtype: str, reduction: str, torch: Any) -> None:
    of = make_batch()
    weights = {"mean": [1 / 3] * 3, "sum": [1.0] * 3, "none": [1.0, -0.5, 0.25]}[reduction]
    wanted_loss, wanted = expected(function, of, weights=weights)
    tensors = leaves(torch, function, of, dtype)
    loss = of_torch(function)(*tensors, *map(torch.tensor, of.integers), reduction=reduction, **EVERY_CELL[function])
    assert (loss.device, loss.dtype) == (tensors[0].device, torch.float64 if dtype == "float64" else torch.float32)
    if reduction == "none":
        loss.backward(torch.tensor(weights, dtype=loss.dtype, device=loss.device))
    else:
        wanted_loss = np.dot(weights, wanted_loss)
        loss.backward()
    assert_close((loss, tuple(t.grad for t in tensors)), (wanted_loss, wanted), check.budgets(function, dtype, DEVICE))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_torch_samplewise(reduction: str, torch: Any) -> None:
    of = make_batch()
    wanted_loss, wanted = expected("joint_rnnt_loss", of)
    tensors = leaves(torch, "joint_rnnt_loss", of)
    encoder, predictor, weight, bias = tensors

    def joint(e: Any, p: Any) -> Any:
        return torch.nn.functional.linear(torch.tanh(e + p), weight, bias)

    loss = of_torch("samplewise_rnnt_loss")(
        joint, encoder, predictor, *of.integers, parameters=[weight, bias], reduction=reduction
    )
    loss.sum().backward()
    wanted_loss = wanted_loss.sum() if reduction == "sum" else wanted_loss
    assert_close((loss, tuple(tensor.grad for tensor in tensors)), (wanted_loss, wanted), (1e-6, 1e-5))


@needs_device
@every_function
def test_torch_launches_without_synchronising(function: str, torch: Any) -> None:
    of, stream = make_batch(), torch.cuda.Stream()
    real = [tensor.detach() for tensor in leaves(torch, function, of)]
    late = [torch.zeros_like(tensor, requires_grad=True) for tensor in real]

    def fill_and_run() -> Any:
        for leaf, values in zip(late, real, strict=True):
            leaf.grad = None
            leaf.data.copy_(values)
        loss = of_torch(function)(*late, *of.integers, reduction="none", **EVERY_CELL[function])
        loss.backward(torch.ones_like(loss))
        return loss

    torch.cuda.synchronize()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        spin(0)
        for _ in range(3):
            fill_and_run()
        for leaf in late:
            leaf.data.zero_()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # notices torch's own waiting; that of others shows in `waited`
        try:
            spin(0.5)
            loss = fill_and_run()
            waited = stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited
    assert_close((loss, tuple(leaf.grad for leaf in late)), expected(function, of))


@needs_device
@pytest.mark.parametrize("scope", ["batch", "utterance"])
@pytest.mark.parametrize("proposal", ["uniform", "ctc"])
def test_torch_samples_without_synchronising(proposal: str, scope: str, torch: Any) -> None:
    from transducer_loss.adapters.torch import joint_rnnt_loss, sample_classes

    of, stream = make_batch(classes=400), torch.cuda.Stream()
    tensors = leaves(torch, "joint_rnnt_loss", of)
    targets = torch.tensor(of.integers[0], device=DEVICE)
    head = torch.randn(3, 12, 400, device=DEVICE)
    options = {"ctc_logits": head, "ctc_lengths": of.integers[1]} if proposal == "ctc" else {}

    def step() -> Any:
        classes = sample_classes(
            targets, of.integers[2], vocab_size=400, num_samples=30, proposal=proposal, scope=scope, seed=3, **options
        )
        loss = joint_rnnt_loss(
            *tensors, targets, *of.integers[1:], classes=classes, sparse=True, reduction="none", occupancy_floor=0.0
        )
        return [loss.detach(), *torch.autograd.grad(loss, tensors, torch.ones_like(loss))]

    torch.cuda.synchronize()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        spin(0)
        for _ in range(3):
            wanted = step()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            spin(0.5)
            found = step()
            waited = stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("where", ["device", "host", "list"])
@pytest.mark.parametrize("drawn", ["device", "host"])
def test_torch_labels_in_classes(drawn: str, where: str, torch: Any) -> None:
    from transducer_loss.adapters.torch import PrunedRNNTLoss, labels_in

    of = make_batch(classes=400)
    classes = sampled(of, drawn == "device")
    targets = torch.tensor(of.integers[0])
    wanted = labels_in(sampled(of, False), targets, of.integers[2])
    given_to = {"device": targets.to(DEVICE), "host": targets, "list": targets.tolist()}[where]
    found = labels_in(classes, given_to, of.integers[2])
    assert torch.equal(found.cpu(), wanted)
    if where != "list":
        torch.manual_seed(0)
        module = PrunedRNNTLoss(20, 400, s_range=3, sparse=True).to(DEVICE)
        encoder, predictor = leaves(torch, "joint_rnnt_loss", of)[:2]
        out = module(encoder, predictor, given_to, *of.integers[1:], classes=classes)
        out.loss.backward()
        assert module.simple_encoder.weight.grad.is_sparse
        assert module.output.weight.grad.is_sparse
        module = module.cpu()
        module.zero_grad()
        module.step = 0
        other = module(encoder.cpu(), predictor.cpu(), targets, *of.integers[1:], classes=sampled(of, False))
        assert float(out.loss) == pytest.approx(float(other.loss), rel=1e-5)


@every_function
def test_torch_backward_in_another_thread(function: str, torch: Any) -> None:
    of = make_batch()
    tensors = leaves(torch, function, of)
    loss = of_torch(function)(*tensors, *of.integers, reduction="none")
    failures: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward(torch.ones_like(loss))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failures
    assert_close((loss, tuple(tensor.grad for tensor in tensors)), expected(function, of))


def test_torch_half_precision_gradients_do_not_underflow(torch: Any) -> None:
    of, weights, untouched = small_gradients()
    _, wanted = expected("joint_rnnt_loss", of, weights=weights)
    tensors = leaves(torch, "joint_rnnt_loss", of, "float16")
    loss = of_torch("joint_rnnt_loss")(*tensors, *of.integers, reduction="none")
    loss.backward(torch.tensor(weights, device=loss.device))
    for tensor, want in zip(tensors[2:], wanted[2:], strict=True):
        assert_not_underflown(tensor.grad, want, untouched)


def test_the_core_reads_torch_tensors_without_a_copy(torch: Any) -> None:
    of = make_batch()
    (logits,) = (tensor.detach() for tensor in leaves(torch, "rnnt_loss", of))
    found = tl.rnnt_loss(logits, *of.integers, inplace=True)
    assert isinstance(found[1], xp.ndarray)
    assert_close((found[0], (logits,)), expected("rnnt_loss", of))


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
@every_function
def test_torch_on_the_second_device(function: str, torch: Any) -> None:
    of = make_batch()
    tensors = leaves(torch, function, of, device="cuda:1")
    with torch.cuda.device(0):
        loss = of_torch(function)(*tensors, *of.integers, reduction="none")
        loss.backward(torch.ones_like(loss))
    assert loss.device == torch.device("cuda:1")
    assert_close((loss, tuple(tensor.grad for tensor in tensors)), expected(function, of))


@needs_device
@pytest.mark.parametrize("function", ["rnnt_loss", "joint_rnnt_loss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_captures_a_cuda_graph(function: str, reduction: str, torch: Any) -> None:
    of, other = make_batch(), make_batch(seed=1)
    tensors = leaves(torch, function, of)
    targets = torch.tensor(of.integers[0], device=DEVICE)
    options = {} if function == "rnnt_loss" else {"occupancy_floor": 0.0}
    frames, labels = (lengths.tolist() for lengths in of.integers[1:])

    def step() -> Any:
        loss = of_torch(function)(*tensors, targets, frames, labels, reduction=reduction, **options)
        return [loss.detach(), *torch.autograd.grad(loss, tensors, torch.full_like(loss, -1.5))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        for tensor, new in zip(tensors, leaves(torch, function, other), strict=True):
            tensor.copy_(new)
        targets.copy_(torch.tensor(other.integers[0]))
    wanted = step()  # in memory that the graph does not have
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, want) for one, want in zip(captured, wanted, strict=True))


def torch_system(torch: Any, of: System, function: str, dtype: str = "float32", late: bool = False) -> tuple[Any, Any, list[Any]]:
    """A step that makes value and gradients, its upstream gradient, and its leaves."""
    from transducer_loss.adapters import torch as adapter

    call = getattr(adapter, function.partition(" ")[0])
    if function.startswith(("embr", "amortized")):
        call = functools.partial(call, reduction="none")
    real = [torch.tensor(array, device=DEVICE).to(getattr(torch, dtype)) for array in of.floats]
    tensors = [(torch.zeros_like(each) if late else each).requires_grad_() for each in real]
    integers = {key: torch.tensor(value, device=DEVICE) for key, value in of.integers.items()}
    upstream = torch.tensor(upstream_of(of), device=DEVICE)

    def step() -> list[Any]:
        if late:
            for tensor, values in zip(tensors, real, strict=True):
                tensor.data.copy_(values)
        value = of.call(call, tensors, **integers, **of.options)
        return [value.detach(), *torch.autograd.grad(value, tensors, upstream.to(value.dtype))]

    return step, upstream, tensors


@every_dtype
@every_system
def test_torch_systems(name: str, dtype: str, torch: Any) -> None:
    of = make_system(name)
    step, upstream, tensors = torch_system(torch, of, name, dtype)
    found = step()
    assert {each.device for each in found} == {tensors[0].device}
    assert [each.dtype for each in found[1:]] == [tensor.dtype for tensor in tensors]
    assert_results(tuple(found), of.on_host(numpy_dtype(dtype), plain(upstream)), dtype)


def test_torch_edit_distance(torch: Any) -> None:
    from transducer_loss.adapters.torch import edit_distance

    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 4, (3, 2, 9)), rng.integers(-1, 10, (3, 2)), rng.integers(0, 4, (3, 7)), rng.integers(0, 8, 3)
    found = edit_distance(*(torch.tensor(array, device=DEVICE) for array in arrays))
    for name, array in vars(tl.edit_distance(*arrays)).items():
        assert getattr(found, name).device == torch.device(DEVICE)
        assert getattr(found, name).tolist() == array.tolist()


def test_torch_shared_encoders(torch: Any) -> None:
    """The gradient of each is what autograd adds up of copies."""
    from transducer_loss.adapters.torch import joint_rnnt_loss

    of, index = make_batch(batch=5), [2, 0, 2, 0, 2]
    targets, frames, labels = of.integers
    results = []
    for shared in (True, False):
        tensors = leaves(torch, "joint_rnnt_loss", of)
        encoder = tensors[0] if shared else tensors[0][index]
        more = {"encoder_index": index} if shared else {}
        loss = joint_rnnt_loss(
            encoder, *tensors[1:], torch.tensor(targets), (frames if shared else frames[index]).tolist(), labels.tolist(),
            occupancy_floor=0.0, **more,
        )  # fmt: skip
        results.append((loss, torch.autograd.grad(loss, tensors)))
    assert_close(*results)


@needs_device
@every_system
def test_torch_systems_launch_without_synchronising(name: str, torch: Any) -> None:
    if name.startswith("reduced_predictor") and not sorts_without_waiting():
        pytest.skip("the sort of this CuPy waits")
    of, stream = make_system(name), torch.cuda.Stream()
    step, upstream, tensors = torch_system(torch, of, name, late=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        spin(0)
        for _ in range(3):
            step()
        for tensor in tensors:
            tensor.data.zero_()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            spin(0.5)
            found = step()
            waited = stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited
    assert_results(tuple(found), of.on_host(np.float32, plain(upstream)), "float32")


@needs_device
@every_system
def test_torch_captures_a_cuda_graph_of_systems(name: str, torch: Any) -> None:
    if name.startswith("reduced_predictor") and not sorts_without_waiting():
        pytest.skip("the sort of this CuPy waits")
    of, other = make_system(name), make_system(name, seed=1)
    step, _, tensors = torch_system(torch, of, name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        for tensor, new in zip(tensors, other.floats, strict=True):
            tensor.copy_(torch.tensor(new))
    wanted = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, want) for one, want in zip(captured, wanted, strict=True))


def test_torch_trains_with_a_tied_reduced_decoder(torch: Any) -> None:
    """Decoder, N-best lists, shared encoders and EMBR, one after the other on the device, as on the host."""
    from transducer_loss.adapters import torch as adapter

    rng = np.random.default_rng(0)
    encoder = rng.normal(size=(2, 9, 16))
    labels, lengths = torch.tensor(rng.integers(1, 12, (6, 5))), torch.tensor([5, 3, 0, 4, 5, 1])
    results = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(0)
        loss = adapter.JointRNNTLoss(16, 12, reduction="none", occupancy_floor=0.0).double()
        decoder = adapter.TiedReducedDecoder(16, 12, weight=loss.output.weight)
        model = torch.nn.ModuleList([loss, decoder]).to(device)
        leaf = torch.tensor(encoder, device=device, requires_grad=True)
        there = labels.to(device)
        nll = loss(leaf, decoder(there, lengths.to(device)), there, [9, 7], lengths, encoder_index=[0, 0, 0, 1, 1, 1]).view(2, 3)
        edits = adapter.edit_distance(there.view(2, 3, 5), lengths.view(2, 3), there[::3], lengths[::3])
        adapter.embr_loss(nll, edits.total).backward()
        results.append([edits.total, nll, leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert_results(tuple(results[0]), tuple(map(plain, results[1])), "float64")


@pytest.mark.parametrize("hat", [False, True])
@every_dtype
def test_a_vocabulary_in_one_shard(dtype: str, hat: bool) -> None:
    """All that a process does of a vocabulary in several, but for the others."""
    of = make_batch()
    of.integers[0][of.integers[0] == 39] = 1
    arguments, exchanged = (*given("joint_rnnt_loss", of, dtype), *of.integers), []
    shard = tl.Shard(lambda array, operation: exchanged.append((type(array), operation)), [40], 0)
    options = {"hat": hat, "blank": 39}
    found, wanted = (run("joint_rnnt_loss", *arguments, **options, **more) for more in ({"shard": shard}, {}))
    assert exchanged == [(xp.ndarray, operation) for operation in ("max", "sum", "sum", "sum")]
    budget = check.budgets("joint_rnnt_loss", dtype, DEVICE)
    assert_close(found, (plain(wanted[0]), tuple(map(plain, wanted[1]))), budget)


@every_dtype
@every_function
def test_jax(function: str, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    if not ON_HOST and jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    from transducer_loss.adapters import jax as losses

    of = make_batch()
    with jax.enable_x64(dtype == "float64"):
        arrays = [jax.numpy.asarray(array.astype(numpy_dtype(dtype))) for array in getattr(of, function)]

        def loss_of(arrays: Any, integers: Any) -> Any:
            options = {"occupancy_floor": 0.0} if function == "joint_rnnt_loss" else {}
            found = getattr(losses, function)(*arrays, *integers, **options)
            return found[0] if isinstance(found, tuple) else found

        def step(arrays: Any, integers: Any, upstream: Any) -> Any:
            loss, gradients = jax.vjp(lambda arrays: loss_of(arrays, integers), arrays)
            return loss, gradients(upstream.astype(loss.dtype))[0]

        weights = jax.numpy.asarray([1.5, -2.0, 0.25])
        loss, gradients = jax.jit(step)(arrays, [jax.numpy.asarray(each) for each in of.integers], weights)
        found = plain(np.asarray(loss)), tuple(plain(np.asarray(each)) for each in gradients)
    assert_close(found, expected(function, of, weights=np.asarray(weights)), check.budgets(function, dtype, DEVICE))


@every_dtype
@every_system
def test_jax_systems(name: str, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    if not ON_HOST and jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    from transducer_loss.adapters import jax as functions

    of = make_system(name)
    with jax.enable_x64(dtype == "float64"):
        arrays = [jax.numpy.asarray(array.astype(numpy_dtype(dtype))) for array in of.floats]

        def step(arrays: Any, integers: Any, upstream: Any) -> Any:
            call = getattr(functions, name.partition(" ")[0])
            value, gradients = jax.vjp(lambda arrays: of.call(call, arrays, **integers, **of.options), arrays)
            return value, *gradients(upstream.astype(value.dtype))[0]

        integers = {key: jax.numpy.asarray(value) for key, value in of.integers.items()}
        found = jax.jit(step)(arrays, integers, jax.numpy.asarray(upstream_of(of)))
        found = tuple(np.asarray(each) for each in found)
    assert_results(found, of.on_host(numpy_dtype(dtype), upstream_of(of)), dtype)


def test_a_monitor_hears_what_it_does_on_the_host() -> None:
    of = make_batch()
    heard = []
    for take in (on_device, np.asarray):
        joint, simple = ([take(array) for array in getattr(of, name)] for name in ("joint_rnnt_loss", "simple_rnnt_loss"))
        with tl.Monitor() as monitor:
            tl.joint_rnnt_loss(*joint, *of.integers, occupancy_floor=0.05)
            *_, occupancy = tl.simple_rnnt_loss(*simple, *of.integers)
            tl.prune(occupancy, *of.integers[1:], s_range=3)
        heard.append(monitor.statistics().known())
    assert len(heard[0]) == 3
    assert heard[0] == pytest.approx(heard[1], rel=1e-9)


def test_explanations_are_those_of_the_host() -> None:
    of = make_batch()
    (logits,) = of.rnnt_loss
    logits[1, 2, 0, 3] = np.nan
    said = str(tl.explain(on_device(logits), *of.integers))
    assert "NaN" in said or "nan" in said
    assert said == str(tl.explain(logits, *of.integers))
