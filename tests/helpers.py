"""What the tests of the losses share: random ragged batches, memory layouts, error budgets, a second process."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from transducer_loss.arrays import COMPUTE, FLOATS, numpy_dtype
from transducer_loss.checks import TOPOLOGIES
from transducer_loss.processors import aligned_empty

Array = npt.NDArray[Any]

__all__ = ["FLOATS", "TOPOLOGIES", "numpy_dtype"]


def epsilon(dtype: str) -> float:
    """Distance of 1 from the next larger number."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)


def rounding(dtype: str, exact: Array) -> Array:
    """The most that rounding `exact` to a dtype may change it: half a unit in the last place, subnormals included."""
    smallest = float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_subnormal)
    return np.maximum(0.5 * epsilon(dtype) * np.abs(exact), 0.5 * smallest)


def expect_close(actual: Array, exact: Array, noise: float | Array) -> None:
    """Raise unless `actual` is `exact` but for `noise`, absolute, and for its dtype's own rounding.

    NaN and infinities have to be in the same places.
    """
    got = np.asarray(actual, np.float64)
    assert got.shape == np.shape(exact)
    known = np.isfinite(exact)
    np.testing.assert_array_equal(np.where(known, 0.0, got), np.where(known, 0.0, exact))
    got, exact = np.where(known, got, 0.0), np.where(known, exact, 0.0)
    error = np.abs(got - exact)
    # What noise moves past a boundary of rounding is rounded to the next number.
    allowed = np.where(known, noise + rounding(actual.dtype.name, np.abs(exact) + noise), 0.0)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape) if error.size else ()
    assert (error <= allowed).all(), f"at {worst}: got {got[worst]}, expected {exact[worst]} +- {allowed[worst]}"


def path_noise(dtype: str, steps: int, largest: float) -> float:
    """Relative error of the probability of a path of `steps` arcs, computed in the type that `dtype` is computed in.

    An arc's log-probability is a difference of numbers up to `largest`, rounded; the exponential, the product and the sums on
    its way add a few units each. Occupancies are ratios of such sums.
    """
    return epsilon(COMPUTE[dtype]) * steps * (largest + 8)


@dataclasses.dataclass
class Batch:
    """Arguments of `rnnt_loss`."""

    logits: Array
    targets: Array
    frames: Array
    labels: Array
    blank: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional ones."""
        return self.logits, self.targets, self.frames, self.labels

    @property
    def steps(self) -> int:
        """Arcs of the longest path."""
        return int((self.frames + self.labels).max())

    @property
    def largest(self) -> float:
        """Largest finite logit."""
        x = np.abs(self.logits.astype(np.float64))
        return float(x[np.isfinite(x)].max(initial=0.0))

    @property
    def real(self) -> Array:
        """Which cells are not padding, (B, T, U+1)."""
        T, U1 = self.logits.shape[1:3]
        return (np.arange(T)[:, None] < self.frames[:, None, None]) & (np.arange(U1) <= self.labels[:, None, None])


def random_lengths(rng: np.random.Generator, batch: int, T: int, U: int, topology: str) -> tuple[Array, Array]:
    """Ragged lengths, some of them 1 and 0; mostly with a path."""
    frames, labels = rng.integers(1, T + 1, batch), rng.integers(0, U + 1, batch)
    if topology != "regular" and rng.random() < 0.9:
        labels = np.minimum(labels, frames)
    return frames, labels


def random_targets(rng: np.random.Generator, labels: Array, columns: int, classes: int, without: int | None = None) -> Array:
    """Labels (B, columns) of any class, with -1 past U_b; none of class `without`."""
    allowed = [v for v in range(classes) if v != without]
    targets = rng.choice(allowed, (len(labels), columns)) if allowed else np.full((len(labels), columns), -1)
    targets[np.arange(columns) >= labels[:, None]] = -1
    return targets


def random_batch(
    rng: np.random.Generator, dtype: str, topology: str = "regular", *, most: tuple[int, int, int, int] = (3, 6, 4, 8),
    hat: bool = False, normalized: bool = False, scale: float = 2.0, impossible: float = 0.03,
) -> Batch:  # fmt: skip
    """Ragged, of sizes up to `most` (B, T, U, V), NaN in the padding, some logits -inf."""
    B, T, U, V = (int(rng.integers(1, n + 1)) for n in most)
    U = U if V > 1 or not hat else 0
    frames, labels = random_lengths(rng, B, T, U, topology)
    blank = int(rng.integers(-V, V))
    logits = rng.normal(0.0, scale, (B, T, U + 1, V))
    if V > 1:
        logits[rng.random(logits.shape) < impossible] = -np.inf
    if normalized:
        with np.errstate(invalid="ignore"):  # a cell with nothing but -inf becomes NaN
            logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for b in range(B):
        logits[b, frames[b] :] = logits[b, :, labels[b] + 1 :] = np.nan
    targets = random_targets(rng, labels, U + int(rng.integers(0, 3)), V, blank % V if hat else None)
    return Batch(logits.astype(numpy_dtype(dtype)), targets, frames, labels, blank)


def naive_occupancies(lb: Array, le: Array, topology: str) -> tuple[Any, Array, Array]:
    """Loss, and effective occupancies, by the recursions in log-space, each operation rounded to the dtype of the arcs."""
    kind, (T, columns) = lb.dtype, lb.shape
    U = columns - 1
    le = le.copy()
    le[:, U] = -np.inf
    step = 0 if topology == "regular" else 1
    if topology == "constrained":
        le[:, :U] += lb[:, 1:]
    ahead = np.full((T + 1, U + 2), -np.inf, kind)
    back = ahead.copy()
    ahead[0, 0] = back[T, U] = 0
    for t, u in np.ndindex(T + 1, U + 1):
        if t > 0:
            ahead[t, u] = np.logaddexp(ahead[t, u], ahead[t - 1, u] + lb[t - 1, u])
        if u > 0 and step <= t < T + step:
            ahead[t, u] = np.logaddexp(ahead[t, u], ahead[t - step, u - 1] + le[t - step, u - 1])
    for t, u in reversed(list(np.ndindex(T, U + 1))):
        back[t, u] = np.logaddexp(lb[t, u] + back[t + 1, u], le[t, u] + back[t + step, u + 1])
    gb = np.exp(ahead[:T, : U + 1] + lb + back[1:, : U + 1] - back[0, 0])
    ge = np.exp(ahead[:T, : U + 1] + le + back[step : T + step, 1:] - back[0, 0])
    if topology == "constrained":
        gb[:, 1:] += ge[:, :U]
    return -back[0, 0], gb, ge


def naive_gradient(batch: Batch, topology: str) -> Array:
    """Gradient by the recursions in log-space, each operation rounded to the dtype of the logits."""
    kind = batch.logits.dtype
    result = np.zeros_like(batch.logits)
    for b, (T, U) in enumerate(zip(batch.frames, batch.labels, strict=True)):
        x = batch.logits[b, :T, : U + 1]
        top = x.max(-1, keepdims=True)
        logp = x - (top + np.log(np.exp(x - top).sum(-1, keepdims=True, dtype=kind)))
        lb = logp[..., batch.blank]
        le = np.take_along_axis(logp, np.append(batch.targets[b, :U], 0)[None, :, None], -1)[..., 0]
        _, gb, ge = naive_occupancies(lb, le, topology)
        grad = (gb + ge)[..., None] * np.exp(logp)
        grad[..., batch.blank] -= gb
        for u in range(U):
            grad[:, u, batch.targets[b, u]] -= ge[:, u]
        result[b, :T, : U + 1] = grad
    return result


Layout = Callable[[tuple[int, ...], Any], tuple[Array, Array]]


def _within(base_shape: Callable[..., tuple[int, ...]], view: Callable[[Array], Array]) -> Layout:
    def make(shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
        base = np.full(base_shape(*shape), 7, dtype)
        return base, view(base)

    return make


# An array of 7 and a view of the shape asked for.
LAYOUTS: dict[str, Layout] = {
    "contiguous": _within(lambda *shape: shape, lambda base: base),
    "transposed": _within(lambda b, t, u, v: (t, b, u, v), lambda base: base.transpose(1, 0, 2, 3)),
    "sliced": _within(
        lambda b, t, u, v: (b + 1, 2 * t + 1, 3 * u, v + 3), lambda base: base[1:, 1::2, ::3, 1:-2]
    ),
    "negative": _within(lambda *shape: shape, lambda base: base[::-1, ::-1, ::-1, ::-1]),
    "inner strided": _within(lambda b, t, u, v: (b, t, u, 2 * v), lambda base: base[..., ::2]),
    "classes first": _within(lambda b, t, u, v: (v, b, t, u), lambda base: np.moveaxis(base, 0, -1)),
}  # fmt: skip


def laid_out(array: Array, layout: str) -> tuple[Array, Array]:
    """A base array, and a view of it that equals `array`."""
    base, view = LAYOUTS[layout](array.shape, array.dtype)
    assert view.shape == array.shape
    view[...] = array
    return base, view


class Counting:
    """An allocator that knows how many bytes of its arrays are alive, and were at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate."""
        array = aligned_empty(shape, dtype)
        self.now += array.nbytes
        self.most = max(self.most, self.now)
        # Slices of the array keep its base alive, not the array.
        weakref.finalize(array.base, self._freed, array.nbytes)
        return array

    def _freed(self, count: int) -> None:
        self.now -= count


def error(actual: Array, exact: Array) -> float:
    """Relative, by the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact))


def run_python(code: str, **environment: str) -> Any:
    """What a program printed in a Python process of its own, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A program's own measure: `peak(call)` is how far the resident memory rises over what it is before and, of that, the result.
PEAK = """
    import ctypes, gc, json, resource
    import numpy as np
    import transducer_loss as tl

    def resident(key):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def peak(call, of_result):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = resident("VmRSS")
        result = call()
        return resident("VmHWM") - before - sum(array.nbytes for array in of_result(result)), result
"""
