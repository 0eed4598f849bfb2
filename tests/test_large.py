"""Sizes beyond 32-bit offsets, and the memory of a batch whose logits nobody could hold."""

import math
import re
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import PEAK, Array, run_python

pytestmark = pytest.mark.slow


def need_memory(count: int) -> None:
    """Skip where so many bytes are not there."""
    with open("/proc/meminfo") as lines:
        found = re.search(r"MemAvailable: +(\d+)", lines.read())
    available = 1024 * int(found[1]) if found else 0
    if available < count:
        pytest.skip(f"needs {count / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available")


def ways(T: int, U: int) -> int:
    """Number of paths of `regular` from the first cell to the last."""
    return math.comb(T + U, U)


def used(T: int, U: int, t: int, u: int) -> tuple[float, float]:
    """How often the paths take the blank and the label out of (t, u), when all are equally probable."""
    here, every = ways(t, u), ways(T - 1, U)
    blank = here * ways(T - 2 - t, U - u) if t < T - 1 else here * (u == U)
    label = here * ways(T - 1 - t, U - u - 1) if u < U else 0
    return blank / every, label / every


def expect_closed_form(loss: Any, grad: Array, T: int, U: int, V: int, above: float, label: int) -> None:
    """Of logits that are 0, but `above` for the blank, class 0."""
    z = math.log(V - 1 + math.exp(above))
    exact = T * (z - above) + U * z - math.log(ways(T - 1, U))
    assert abs(loss - exact) <= 1e-6 * exact
    for t, u in ((0, 0), (0, 1), (1, 0), (T // 2, U // 2), (T - 1, U - 1), (T - 1, U)):
        gb, ge = used(T, U, t, u)
        expected = np.full(V, (gb + ge) * math.exp(-z))
        expected[0] = (gb + ge) * math.exp(above - z) - gb
        if u < U:
            expected[label] -= ge
        # Rounded to float16, whose smallest step is 6e-8.
        np.testing.assert_allclose(grad[t, u].astype(np.float64), expected, rtol=2e-3, atol=6e-8)


T, U, V = 1030, 31, 65536
"""One utterance has more than 2^31 logits."""


def test_packed_logits_beyond_two_to_the_31() -> None:
    need_memory(6_000_000_000)
    T2, U2 = 40, 9
    first, second = T * (U + 1), T2 * (U2 + 1)
    assert first * V > 2**31
    logits = np.zeros((first + second, V), np.float16)
    logits[first:, 0] = -2.0
    targets = np.zeros((2, U), np.int64)
    targets[0], targets[1] = 7, V - 1
    loss, grad = tl.rnnt_loss(logits, targets, [T, T2], [U, U2], inplace=True)
    assert grad is logits
    expect_closed_form(loss[0], grad[:first].reshape(T, U + 1, V), T, U, V, 0.0, 7)
    expect_closed_form(loss[1], grad[first:].reshape(T2, U2 + 1, V), T2, U2, V, -2.0, V - 1)


def test_padded_logits_beyond_two_to_the_31() -> None:
    need_memory(11_000_000_000)
    T2, U2 = 700, 20
    logits = np.zeros((2, T, U + 1, V), np.float16)
    assert logits[0].size > 2**31
    logits[1, :T2, : U2 + 1, 0] = -2.0
    logits[1, T2:, :, 3] = np.nan
    targets = np.full((2, U), 7)
    targets[1, :U2], targets[1, U2:] = V - 1, -1
    loss, grad = tl.rnnt_loss(logits, targets, [T, T2], [U, U2], inplace=True)
    expect_closed_form(loss[0], grad[0], T, U, V, 0.0, 7)
    expect_closed_form(loss[1], grad[1, :T2, : U2 + 1], T2, U2, V, -2.0, V - 1)
    assert not grad[1, T2:].any()
    assert not grad[1, :, U2 + 1 :].any()


def test_memory_does_not_grow_with_the_batch() -> None:
    """64 MiB, for parts of a batch of 1024 utterances whose logits would take 843 GB."""
    program = PEAK + """
    import sys, time
    rng = np.random.default_rng(0)
    T, U, V, H = 1000, 200, 1024, 64
    def call(B, T, U):
        arrays = [rng.normal(size=size).astype("float32") for size in ((B, T, H), (B, U + 1, H), (V, H), (V,))]
        arrays[2] /= 8  # as at the start of training: flat, so that a good share of the cells gets a gradient
        targets = rng.integers(1, V, (B, U))
        start = time.perf_counter()
        beyond, (loss, grads) = peak(
            lambda: tl.joint_rnnt_loss(*arrays, targets, [T] * B, [U] * B, workspace="64MiB"),
            lambda result: [getattr(result[1], name) for name in ("encoder", "predictor", "weight", "bias")])
        assert np.isfinite(loss).all() and np.isfinite(grads.weight).all() and grads.encoder[B - 1].any()
        return beyond, time.perf_counter() - start, grads.dropped
    call(1, 50, 10)
    print(json.dumps(call(BATCH, T, U)))
    """
    peaks = []
    for batch in (16, 32):
        beyond, seconds, dropped = run_python(program.replace("BATCH", str(batch)))
        print(f"B={batch}: {beyond / 1e6:.1f} MB beyond inputs and outputs, {seconds:.0f} s, {dropped:.0%} of cells dropped")
        assert dropped < 0.9
        peaks.append(beyond)
    assert max(peaks) <= (64 << 20) + 20_000_000
    assert abs(peaks[1] - peaks[0]) <= 10_000_000
