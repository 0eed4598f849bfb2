"""`rnnt_loss` against the reference: every topology, dtype, option and memory layout, and what it promises beside."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import (
    FLOATS,
    LAYOUTS,
    TOPOLOGIES,
    Batch,
    Counting,
    epsilon,
    error,
    expect_close,
    laid_out,
    naive_gradient,
    numpy_dtype,
    path_noise,
    random_batch,
    run_python,
)
from transducer_loss import logits_loss, reference
from transducer_loss.arrays import COMPUTE

VARIANTS: dict[str, Callable[[np.random.Generator, int], dict[str, Any]]] = {
    "plain": lambda rng, batch: {},
    "hat": lambda rng, batch: {"hat": True},
    "normalized": lambda rng, batch: {"normalized": True},
    "clamp": lambda rng, batch: {"clamp": 0.05, "weights": rng.choice([0.0, -1.5, 1.0, 3.0], batch), "fastemit_lambda": 0.5},
    "clamp normalized": lambda rng, batch: {"clamp": 0.05, "normalized": True},
    "fastemit": lambda rng, batch: {"fastemit_lambda": float(rng.choice([0.01, 0.5, 3.0]))},
    "delay": lambda rng, batch: {"delay_penalty": float(rng.choice([0.3, -0.7, 2.0]))},
    "weights": lambda rng, batch: {"weights": rng.choice([0.0, -1.5, 0.25, 3.0], batch), "fastemit_lambda": 0.1},
}
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)


def exact(batch: Batch, **options: Any) -> tuple[Any, Any]:
    return reference.rnnt_loss(*batch.arguments, blank=batch.blank, **options)


def noise(batch: Batch, options: dict[str, Any]) -> float:
    """What the rounding of a computation may change in an entry of the gradient."""
    largest = batch.largest + abs(options.get("delay_penalty", 0.0)) * batch.frames.max()
    weight = np.abs(options.get("weights", np.ones(1))).max() * (1 + options.get("fastemit_lambda", 0.0))
    return float(weight * path_noise(batch.logits.dtype.name, batch.steps, largest))


def expect_same(got: tuple[Any, Any], batch: Batch, options: dict[str, Any]) -> None:
    loss, grad = exact(batch, **options)
    dtype = batch.logits.dtype
    assert got[0].dtype == COMPUTE[dtype.name]
    assert got[1].dtype == dtype
    of_loss = noise(batch, {**options, "weights": np.ones(1)})
    expect_close(got[0], loss, of_loss * np.maximum(1.0, np.abs(np.where(np.isfinite(loss), loss, 0.0))))
    expect_close(got[1], grad, noise(batch, options))
    assert not np.asarray(got[1], np.float64)[~batch.real].any()


def ways(rng: np.random.Generator, batch: Batch) -> Iterator[tuple[str, Any, Any]]:
    """The batch in every layout, and its integers in types of all kinds."""
    integers = [np.int32, np.int64, np.uint8, list]
    for i, layout in enumerate(LAYOUTS):
        kind = integers[i % 4]
        real = np.where(batch.targets < 0, 0, batch.targets) if kind is np.uint8 else batch.targets
        others = [value.tolist() if kind is list else value.astype(kind) for value in (real, batch.frames, batch.labels)]
        yield layout, laid_out(batch.logits, layout)[1], others
    yield "packed", batch.logits[batch.real], [batch.targets, batch.frames, batch.labels]


@pytest.mark.parametrize("variant", VARIANTS)
@every_topology
@every_dtype
def test_random_batches(dtype: str, topology: str, variant: str) -> None:
    rng = np.random.default_rng([FLOATS.index(dtype), TOPOLOGIES.index(topology), list(VARIANTS).index(variant)])
    finite = []
    for _ in range(10):
        batch = random_batch(rng, dtype, topology, hat=variant == "hat", normalized=variant == "normalized")
        options = {"topology": topology, **VARIANTS[variant](rng, len(batch.frames))}
        for layout, logits, others in ways(rng, batch):
            loss, grad = tl.rnnt_loss(logits, *others, blank=batch.blank, **options)
            if layout == "packed":
                padded = np.zeros_like(batch.logits)
                padded[batch.real] = grad
                grad = padded
            expect_same((loss, grad), batch, options)
        finite += np.isfinite(loss).tolist()
    assert np.mean(finite) > 0.5


@pytest.mark.parametrize("V", [*range(1, 41), 63, 64, 65, 70])
@every_dtype
def test_every_number_of_classes(dtype: str, V: int) -> None:
    # Vector loops have a body and a tail: every length of tail.
    rng = np.random.default_rng(V)
    batch = random_batch(rng, dtype, most=(2, 4, 3, 1))
    batch.logits = np.where(batch.real[..., None], rng.normal(0, 3, (*batch.real.shape, V)), np.nan).astype(numpy_dtype(dtype))
    batch.targets, batch.blank = np.where(batch.targets < 0, -1, V // 2), V - 1
    for layout in ("contiguous", "inner strided"):
        expect_same(tl.rnnt_loss(laid_out(batch.logits, layout)[1], *batch.arguments[1:], blank=V - 1), batch, {})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_as_numpy_rounds_them(dtype: str) -> None:
    # The gradient of one certain blank is -w: weights at every number of the type, at every tie between two, and beside it.
    patterns = np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype)).astype(np.float32)
    numbers = np.sort(patterns[np.isfinite(patterns)])
    ties = (0.5 * (numbers[:-1].astype(np.float64) + numbers[1:])).astype(np.float32)
    weights = np.concatenate([numbers, ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)])
    count = len(weights)
    logits = np.zeros((count, 1, 1, 1), numpy_dtype(dtype))
    _, grad = tl.rnnt_loss(logits, np.zeros((count, 0), int), np.ones(count, int), [0] * count, normalized=True, weights=weights)
    expected = (-weights).astype(numpy_dtype(dtype))
    # Zeros of either sign are zeros.
    same = (grad[:, 0, 0, 0].view(np.uint16) == expected.view(np.uint16)) | ((grad[:, 0, 0, 0] == 0) & (expected == 0))
    assert same.all(), weights[~same]


@every_topology
def test_broadcast_logits(topology: str) -> None:
    rng = np.random.default_rng(0)
    frame = rng.normal(size=(2, 1, 3, 5)).astype(np.float32)
    logits = np.broadcast_to(frame, (2, 4, 3, 5))
    batch = Batch(logits, rng.integers(0, 5, (2, 2)), np.array([4, 3]), np.array([2, 1]), 0)
    assert logits.strides[1] == 0
    expect_same(tl.rnnt_loss(*batch.arguments, topology=topology), batch, {"topology": topology})


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 3, 0]])
@every_topology
def test_transcripts_without_labels(topology: str, labels: list[int]) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 4, max(labels) + 1, 5))
    targets = np.full((3, max(labels)), 2)
    batch = Batch(logits, targets, np.array([4, 3, 1]), np.array(labels), -1)
    options = {"topology": topology}
    expect_same(tl.rnnt_loss(logits, targets.tolist(), [4, 3, 1], labels, blank=-1, **options), batch, options)


@every_topology
def test_targets_equal_to_blank(topology: str) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 5, 4, 3))
    for normalized in (False, True):
        batch = Batch(logits, np.array([[1, 1, 0], [2, 1, 1]]), np.array([5, 4]), np.array([3, 3]), 1)
        options = {"topology": topology, "normalized": normalized}
        expect_same(tl.rnnt_loss(*batch.arguments, blank=1, **options), batch, options)


def log_of_paths(T: int, U: int, topology: str) -> float:
    """Log of the number of paths."""
    above = T - 1 + U if topology == "regular" else T
    return math.lgamma(above + 1) - math.lgamma(U + 1) - math.lgamma(above - U + 1)


@pytest.mark.parametrize(("T", "U", "V"), [(1, 0, 1), (1, 0, 3), (4, 3, 2), (30, 12, 70), (300, 80, 9), (1510, 1500, 4)])
@every_topology
def test_uniform_logits_have_a_closed_form(topology: str, T: int, U: int, V: int) -> None:
    # The last size is wider than the shared memory of a block.
    logits = np.zeros((1, T, U + 1, V), np.float32)
    loss, grad = tl.rnnt_loss(logits, np.full((1, U), V - 1), [T], [U], topology=topology, inplace=True)
    arcs = T if topology == "modified" else T + U
    exact = arcs * math.log(V) - log_of_paths(T, U, topology)
    assert abs(loss[0] - exact) <= epsilon("float32") * (exact + 8 * arcs)
    # Every path takes each of the U labels once and T blanks (T - U in `modified`): the softmax hands back what they take.
    blanks = T - U if topology == "modified" else T
    if V > 1:
        assert abs(grad[..., 0].sum(dtype=np.float64) - ((blanks + U) / V - blanks)) <= 1e-5 * (blanks + U)
        assert abs(grad.sum(dtype=np.float64)) <= 1e-5 * (blanks + U)


def test_transcripts_wider_than_the_shared_memory() -> None:
    rng = np.random.default_rng(3)
    batch = Batch(
        rng.normal(size=(2, 3, 1501, 4)).astype(np.float32), rng.integers(0, 4, (2, 1500)),
        np.array([3, 2]), np.array([1500, 1023]), 3,
    )  # fmt: skip
    expect_same(tl.rnnt_loss(*batch.arguments, blank=3), batch, {})


@every_topology
def test_wide_and_narrow_transcripts_of_one_batch(topology: str) -> None:
    # In lattices with a path, too: U = 1030 needs as many frames in `modified`, where the reference takes too long.
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(2, 1040, 1031, 3)).astype(np.float32)
    targets, frames, labels = rng.integers(0, 3, (2, 1030)), [1040, 40], [1030, 20]
    loss, grad = tl.rnnt_loss(logits, targets, frames, labels, topology=topology)
    alone, of_alone = tl.rnnt_loss(logits[1:, :40, :21], targets[1:], [40], [20], topology=topology)
    assert loss[1] == alone[0]
    np.testing.assert_array_equal(grad[1, :40, :21], of_alone[0])
    logits = logits[:1].astype(np.float64)
    wide, of_wide = tl.rnnt_loss(logits, targets[:1], frames[:1], labels[:1], topology=topology, inplace=True)
    assert abs(loss[0] - wide[0]) <= 1e-6 * wide[0]
    assert error(grad[:1], of_wide) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
def test_inplace(dtype: str, layout: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        batch = random_batch(rng, dtype)
        base, view = laid_out(batch.logits, layout)
        inside = np.zeros(base.shape, bool)
        offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // base.itemsize
        reach = (np.arange(size) * stride // base.itemsize for size, stride in zip(view.shape, view.strides, strict=True))
        inside.reshape(-1)[offset + sum(np.ix_(*reach))] = True
        loss, grad = tl.rnnt_loss(*batch.arguments, blank=batch.blank)
        loss_too, over = tl.rnnt_loss(view, *batch.arguments[1:], blank=batch.blank, inplace=True)
        assert over is view
        np.testing.assert_array_equal(loss_too, loss)
        np.testing.assert_array_equal(over, grad)
        assert (base[~inside] == 7).all()


PACKED_VIEWS = {
    "every other cell": lambda n, v: (np.full((2 * n, v), 7.0), lambda base: base[::2]),
    "classes apart": lambda n, v: (np.full((n, 2 * v), 7.0), lambda base: base[:, ::2]),
    "reversed": lambda n, v: (np.full((n, v), 7.0), lambda base: base[::-1, ::-1]),
    "classes first": lambda n, v: (np.full((v, n), 7.0), lambda base: base.T),
    "inside": lambda n, v: (np.full((n + 2, v + 3), 7.0), lambda base: base[1:-1, 2:-1]),
}


@pytest.mark.parametrize("view", PACKED_VIEWS)
@every_dtype
def test_strides_of_packed_logits(dtype: str, view: str) -> None:
    rng = np.random.default_rng(11)
    batch = random_batch(rng, dtype)
    packed = batch.logits[batch.real]
    base, select = PACKED_VIEWS[view](*packed.shape)
    base = base.astype(packed.dtype)
    logits = select(base)
    logits[...] = packed
    expected, grad = tl.rnnt_loss(packed, *batch.arguments[1:], blank=batch.blank)
    for inplace in (False, True):
        loss, got = tl.rnnt_loss(logits, *batch.arguments[1:], blank=batch.blank, inplace=inplace)
        np.testing.assert_array_equal(loss, expected)
        np.testing.assert_array_equal(got, grad)
    assert got is logits
    select(base)[...] = 7
    assert (base == 7).all()


@pytest.mark.parametrize("option", ["plain", "hat"])
def test_labels_that_nobody_checked(option: str) -> None:
    """As those of a device are not: a label that cannot be makes its utterance's loss NaN and its gradient 0."""
    logits = np.random.default_rng(0).normal(size=(5, 4, 3, 6))
    targets = [[1, 2], [6, 1], [-1, 4], [1, 5], [2, 3]]  # 5 is the blank, which is no label of HAT
    of = logits_loss.problem(
        logits, targets, [4] * 5, [2] * 5, blank=-1, topology="regular", normalized=False, fastemit_lambda=0.0,
        delay_penalty=0.0, hat=option == "hat", infeasible="inf", validate=None,
    )  # fmt: skip
    loss, _, saved = logits_loss.forward(of)
    grad = logits_loss.backward(of, saved, None, False)
    bad = [False, True, True, option == "hat", False]
    assert np.isnan(loss).tolist() == bad
    assert (np.abs(grad).max(axis=(1, 2, 3)) == 0).tolist() == bad


@every_dtype
def test_temporary_memory(dtype: str) -> None:
    counting = Counting()
    shape = (2, 30, 9, 5)
    logits = np.zeros(shape, numpy_dtype(dtype))
    of = logits_loss.problem(
        logits, np.ones((2, 8), int), [30, 20], [8, 8], allocate=counting, blank=0, topology="regular", normalized=False,
        fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf",
    )  # fmt: skip
    loss, reported, saved = logits_loss.forward(of)
    grad = logits_loss.backward(of, saved, None, False)
    assert np.isfinite(loss).all()
    # As documented; and the loss, twice: as it is and as it is reported.
    cells, size = 50 * 9, 8 if dtype == "float64" else 4
    assert counting.most - grad.nbytes <= cells * 9 * size + 4 * size
    del loss, reported, saved, grad
    assert counting.now == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("option", ["plain", "hat", "normalized"])
@every_topology
def test_logits_that_are_not_finite_spoil_their_utterance_alone(topology: str, option: str, bad: float) -> None:
    rng = np.random.default_rng(6)
    options = {"topology": topology, option: True} if option != "plain" else {"topology": topology}
    logits = rng.normal(size=(3, 4, 3, 4)).astype(np.float32)
    targets, frames, labels = np.array([[1, 2], [3, 2], [2, 2]]), np.array([4, 3, 4]), np.array([2, 2, 2])
    loss, grad = tl.rnnt_loss(logits, targets, frames, labels, **options)
    # A log-probability that no arc reads does no harm.
    for t, u, v in np.ndindex(3, 3, 4 if option != "normalized" else 1):
        spoilt = logits.copy()
        spoilt[1, t, u, v] = bad
        for inplace in (False, True):
            loss_too, grad_too = tl.rnnt_loss(spoilt, targets, frames, labels, inplace=inplace, **options)
            assert np.isnan(loss_too[1])
            assert not grad_too[1].any()
            np.testing.assert_array_equal(loss_too[[0, 2]], loss[[0, 2]])
            np.testing.assert_array_equal(grad_too[[0, 2]], grad[[0, 2]])


@every_dtype
def test_a_delay_penalty_beyond_measure_counts_as_not_finite(dtype: str) -> None:
    logits = np.zeros((2, 41, 2, 4), numpy_dtype(dtype))
    # Of the two only the longer utterance has a frame whose penalty is above 10,000: 600 times 20 and 600 times 2.
    loss, grad = tl.rnnt_loss(logits, [[1], [1]], [41, 5], [1, 1], delay_penalty=600.0)
    assert np.isnan(loss[0])
    assert not grad[0].any()
    expected, exact = reference.rnnt_loss(logits[1:], [[1]], [5], [1], delay_penalty=600.0)
    np.testing.assert_allclose(loss[1:], expected, rtol=1e-6)
    expect_close(grad[1:], exact, path_noise(dtype, 6, 1200))


def test_no_path_by_probability_zero() -> None:
    logits = np.zeros((2, 3, 2, 4))
    logits[0, :, :, 1] = -np.inf
    loss, grad = tl.rnnt_loss(logits, [[1], [1]], [3, 3], [1, 1])
    assert np.isposinf(loss[0])
    assert np.isfinite(loss[1])
    assert not grad[0].any()
    assert grad[1].any()


@pytest.mark.parametrize("topology", ["modified", "constrained"])
def test_no_path_by_length(topology: str) -> None:
    logits = np.random.default_rng(7).normal(size=(3, 4, 4, 5)).astype(np.float32)
    arguments = logits, np.ones((3, 3), int), [2, 4, 3], [3, 3, 3]
    for infeasible, expected in (("inf", math.inf), ("zero", 0.0)):
        loss, grad = tl.rnnt_loss(*arguments, topology=topology, infeasible=infeasible)
        assert loss[0] == expected
        assert not grad[0].any()
        assert np.isfinite(loss[1:]).all()
        assert grad[1].any()
    with pytest.raises(ValueError, match=r"targets: expected a path for every utterance, got none for utterances \[0\]"):
        tl.rnnt_loss(*arguments, topology=topology, infeasible="raise")


@every_dtype
def test_loss_alone(dtype: str) -> None:
    rng = np.random.default_rng(8)
    batch = random_batch(rng, dtype, most=(3, 6, 4, 8))
    before = batch.logits.copy()
    loss, _ = tl.rnnt_loss(*batch.arguments, blank=batch.blank)
    alone, none = tl.rnnt_loss(*batch.arguments, blank=batch.blank, gradient=False, inplace=True)
    assert none is None
    np.testing.assert_array_equal(alone, loss)
    assert batch.logits.tobytes() == before.tobytes()


@every_dtype
def test_number_of_threads_changes_no_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    batch = random_batch(rng, dtype, most=(1, 1, 1, 1))
    batch.logits = rng.normal(size=(4, 60, 31, 130)).astype(numpy_dtype(dtype))
    batch.frames, batch.labels = np.array([60, 7, 59, 31]), np.array([30, 2, 0, 30])
    batch.targets = rng.integers(1, 130, (4, 30))
    results = []
    for threads in ("1", "2", "4", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        loss, grad = tl.rnnt_loss(*batch.arguments, fastemit_lambda=0.1)
        results.append(loss.tobytes() + grad.tobytes())
    assert len(set(results)) == 1
    assert np.isfinite(loss).all()


def test_another_process_gets_the_same_bits() -> None:
    program = """
        import hashlib, json
        import numpy as np
        import transducer_loss as tl

        rng = np.random.default_rng(0)
        logits = rng.normal(size=(2, 50, 21, 200)).astype(np.float32)
        loss, grad = tl.rnnt_loss(logits, rng.integers(1, 200, (2, 20)), [50, 40], [20, 11])
        print(json.dumps(hashlib.sha256(loss.tobytes() + grad.tobytes()).hexdigest()))
    """
    assert run_python(program, OMP_NUM_THREADS="1") == run_python(program, OMP_NUM_THREADS="3")


@every_topology
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_error_is_at_most_that_of_a_naive_run_in_the_same_type(dtype: str, topology: str) -> None:
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 2, (2, 40, 11, 20)).astype(numpy_dtype(dtype))
    batch = Batch(logits, rng.integers(1, 20, (2, 10)), np.array([40, 25]), np.array([10, 6]), 0)
    truth = exact(batch, topology=topology)[1]
    of_naive = error(naive_gradient(batch, topology), truth)
    assert epsilon(dtype) / 4 < of_naive < 3000 * epsilon(dtype)  # it is a rival, not a mistake
    assert error(tl.rnnt_loss(*batch.arguments, topology=topology)[1], truth) <= of_naive
