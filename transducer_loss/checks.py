"""What every loss checks of its arguments, and the options they share."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transducer_loss.arrays import FLOATS, as_array, as_numpy, device_name, element_strides, on_host
from transducer_loss.cells import Ints

TOPOLOGIES = ("regular", "modified", "constrained")
DISTRIBUTIONS = ("softmax", "normalized", "hat")
INFEASIBLE = ("inf", "zero", "raise")


def choice(value: Any, allowed: Sequence[str], name: str) -> int:
    """Position of `value` among the words of an enumeration, the same in Python and in the kernels."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return list(allowed).index(value)


def finite(value: Any, name: str) -> float:
    """A finite Python float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number


def dropout_rate(value: Any) -> float:
    """A probability to drop by, which is not certain."""
    if not 0.0 <= finite(value, "dropout") < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")
    return float(value)


def keywords_of(function: Callable[..., Any], *left_out: str) -> dict[str, Any]:
    """Keywords of a function, but for those `left_out`, and their defaults."""
    return {
        name: each.default for name, each in inspect.signature(function).parameters.items()
        if each.kind is each.KEYWORD_ONLY and name not in left_out
    }  # fmt: skip


def whole_number(value: Any, name: str, low: int | None = None) -> int:
    """An int, of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected {low} or more, got {value}")
    return int(value)


def blank_class(blank: Any, classes: int) -> int:
    """The class of a blank that may be counted from the end."""
    if not -classes <= whole_number(blank, "blank") < classes:
        raise ValueError(f"blank: expected a class in [{-classes}, {classes}), got {blank}")
    return int(blank) % classes


@dataclasses.dataclass(frozen=True)
class Options:
    """The keywords that losses share, checked; words as the kernels number them."""

    blank: int
    topology: int
    distribution: int
    fastemit_lambda: float
    delay_penalty: float
    infeasible: str

    @property
    def changes_occupancy(self) -> bool:
        """Whether gradients need other occupancies than the arcs' posteriors."""
        return self.fastemit_lambda != 0.0 or self.topology == TOPOLOGIES.index("constrained")

    @classmethod
    def checked(
        cls,
        classes: int,
        *,
        blank: int,
        topology: str,
        normalized: bool,
        fastemit_lambda: float,
        delay_penalty: float,
        hat: bool,
        infeasible: str,
    ) -> Options:
        """Raise for what is not an option; resolve a negative `blank`."""
        silent = blank_class(blank, classes)
        if hat and normalized:
            raise ValueError("hat: expected False with normalized=True (HAT normalises the logits itself), got True")
        choice(infeasible, INFEASIBLE, "infeasible")
        if finite(fastemit_lambda, "fastemit_lambda") < 0:
            raise ValueError(f"fastemit_lambda: expected 0 or more, got {fastemit_lambda}")
        return cls(
            silent, choice(topology, TOPOLOGIES, "topology"), 2 if hat else int(bool(normalized)),
            float(fastemit_lambda), finite(delay_penalty, "delay_penalty"), infeasible,
        )  # fmt: skip


ANY_LABELS = Options(0, 0, 0, 0.0, 0.0, "inf")
"""Options of whoever checks labels for no loss: only HAT allows some classes and not others."""


def float_array(value: Any, name: str, dims: str, like: Any = None, like_name: str = "") -> Any:
    """A non-empty float array whose dimensions are named by `dims`, of the dtype and device of `like`."""
    array = as_array(value, name)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected dtype {', '.join(FLOATS)}, got {array.dtype.name}")
    names = dims.split()
    if array.ndim != len(names):
        raise ValueError(f"{name}: expected {len(names)} dimensions ({', '.join(names)}), got shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{name}: expected at least one of each of ({', '.join(names)}), got shape {array.shape}")
    if like is not None:
        if array.dtype != like.dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype.name} as {like_name}, got {array.dtype.name}")
        if device_name(array) != device_name(like):
            raise ValueError(f"{name}: expected device {device_name(like)} as {like_name}, got {device_name(array)}")
    return array


def expect_shape(array: Any, name: str, dims: str, shape: tuple[int, ...]) -> None:
    """Raise unless `array` has `shape`, whose dimensions are named by `dims`."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{name}: expected shape {dims} = {shape}, got {tuple(array.shape)}")


def integers(value: Any, name: str) -> Any:
    """An array of integers, or a nested list of them as one on the host."""
    if isinstance(value, (list, tuple, int)):
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name}: expected integers, in rows of one length, got {value}") from None
        array = array if array.size else array.astype(np.int64)
    else:
        array = as_array(value, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype.name}")
    return array


def lengths(
    value: Any, name: str, batch: int, low: int, high: int, dims: str, what: str = "lengths", shape: str = "(B,)"
) -> Ints:
    """(B,) lengths on the host, each in [low, high]; those on a device are copied, which synchronises."""
    array = integers(value, name)
    expect_shape(array, name, shape, (batch,))
    host = as_numpy(array).astype(np.int64)
    bad = (host < low) | (host > high)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"{name}: expected {what} in [{low}, {dims} = {high}], got {host[at]} at index {at}")
    return host


def lengths_on(
    processor: Any, value: Any, name: str, shape: tuple[int, ...], low: int, high: int, dims: str, validate: bool | None
) -> Any:
    """Lengths as kernels read them, dense int64 on the processor; `dims` names shape and bound, as "(B,) T".

    Those on the host are checked here, those on a device only with `validate`, and otherwise by the kernels: none is copied to
    the host.
    """
    names, bound = dims.rsplit(" ", 1)
    array = integers(value, name)
    expect_shape(array, name, names, shape)
    if looked_at(validate, array):
        host = as_numpy(array)
        bad = np.argwhere((host < low) | (host > high))
        if len(bad):
            at = tuple(int(i) for i in bad[0])
            where = f"index {at[0] if len(at) == 1 else at}"
            raise ValueError(f"{name}: expected lengths in [{low}, {bound} = {high}], got {host[at]} at {where}")
    return processor.dense(on_processor(array, processor, name), "int64")


def numbers_for(value: Any, processor: Any, name: str, dims: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers of any dtype, or a nested list of them, dense and of a dtype on the processor."""
    if isinstance(value, (list, tuple)):
        try:
            array = np.asarray(value, dtype)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}: expected numbers, got {value}") from None
    else:
        array = as_array(value, name)
    expect_shape(array, name, dims, shape)
    if array.dtype.kind not in "iu" and array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype.name}")
    return processor.dense(on_processor(array.astype(dtype) if on_host(array) else array, processor, name), dtype)


@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels (B, U) as kernels read them."""

    array: Any

    @property
    def arguments(self) -> tuple[Any, int, int, int]:
        """Array, whether its labels are 64 bits wide, strides in elements."""
        by_utterance, by_label = element_strides(self.array)
        return self.array, int(self.array.itemsize == 8), by_utterance, by_label


def on_processor(array: Any, processor: Any, name: str) -> Any:
    """An array where a processor reads it: one of the host is copied to a device, one of another device is an error."""
    if on_host(array):
        return array if processor.host else processor.to_device(np.ascontiguousarray(array))
    if device_name(array) != processor.device:
        raise ValueError(f"{name}: expected device {processor.device} or the host, got {device_name(array)}")
    return array


def looked_at(validate: bool | None, *arrays: Any) -> bool:
    """Whether numbers are checked here: on the host for free, on a device with `validate`; None leaves them to the kernels."""
    return validate is not None and (validate or all(map(on_host, arrays)))


def expect_labels(known: np.ndarray[Any, Any], labels: Ints, classes: int) -> np.ndarray[Any, Any]:
    """Raise for labels (B, U) on the host that no class has; which of them are real, otherwise."""
    real: np.ndarray[Any, Any] = np.arange(known.shape[1])[None] < labels[:, None]
    bad = real & ((known < 0) | (known >= classes))
    if bad.any():
        b, u = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"targets: expected labels in [0, V = {classes}), got {known[b, u]} at index ({b}, {u})")
    return real


def targets_for(
    value: Any, processor: Any, labels: Ints, classes: int, options: Options, validate: bool | None
) -> Targets:
    """Check labels (B, at least max U_b) and bring them to the processor.

    Labels on the host are checked here; labels on a device only with `validate`, as that synchronises. Unchecked, the kernels
    give an utterance with a label out of range the loss NaN.
    """
    array = integers(value, "targets")
    batch, longest = len(labels), int(labels.max())
    if array.ndim != 2 or array.shape[0] != batch or array.shape[1] < longest:
        raise ValueError(f"targets: expected shape (B, U) = ({batch}, {longest}), got {tuple(array.shape)}")
    if looked_at(validate, array):
        known = as_numpy(array)
        real = expect_labels(known, labels, classes)
        if options.distribution == DISTRIBUTIONS.index("hat"):
            same = real & (known == options.blank)
            if same.any():
                b, u = (int(i) for i in np.argwhere(same)[0])
                raise ValueError(f"targets: expected no blank ({options.blank}) with hat=True, got it at index ({b}, {u})")
    if array.dtype.name not in ("int32", "int64"):
        array = array.astype(np.int64)
    return Targets(on_processor(array, processor, "targets"))


def weights_for(value: Any, processor: Any, batch: int, dtype: str) -> Any:
    """Utterance weights (B,), dense, of the compute dtype, on the processor; or None."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        value = as_array(value, "weights")
        if value.dtype.name not in FLOATS:
            raise TypeError(f"weights: expected dtype {', '.join(FLOATS)}, got {value.dtype.name}")
    return numbers_for(value, processor, "weights", "(B,)", (batch,), dtype)
