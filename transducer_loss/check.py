"""Every loss and gradient on the device at hand, against float64 loops (`transducer_loss.reference`)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import transducer_loss
from transducer_loss import reference
from transducer_loss.arrays import COMPUTE, FLOATS, numpy_dtype
from transducer_loss.checks import TOPOLOGIES, choice

Array = np.ndarray[Any, Any]

FUNCTIONS = ("rnnt_loss", "joint_rnnt_loss")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fastemit": {"fastemit_lambda": 0.25},
    "delay penalty": {"delay_penalty": 0.0625},
    "hat": {"hat": True},
    "normalized": {"normalized": True},
}

_BLANK = 1
_WEIGHTS = (1.0, -0.5, 2.0, 0.25)


@dataclasses.dataclass(frozen=True)
class Row:
    """What `check` found for one way to call one loss.

    Attributes
    ----------
    function, topology, dtype, variant : str
        How it was called.
    loss_error : float
        Worst of ``|loss - reference| / max(1, |reference|)`` over the utterances.
    gradient_error : float
        Worst of ``norm(gradient - reference) / norm(reference)`` over the gradients.
    loss_budget, gradient_budget : float
        What these may be at most.
    problem : str
        The error that was raised instead, or empty.
    """

    function: str
    topology: str
    dtype: str
    variant: str
    loss_error: float
    gradient_error: float
    loss_budget: float
    gradient_budget: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether both errors are within their budgets; NaN is not."""
        return not self.problem and self.loss_error <= self.loss_budget and self.gradient_error <= self.gradient_budget


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of both losses, the same for every dtype."""

    logits: Array
    joint: tuple[Array, Array, Array, Array]
    """Encoder, predictor, weight, bias."""
    targets: Array
    frames: Array
    labels: Array
    weights: Array


def _draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Multiples of 1/32 below 8 in magnitude: exact in every dtype, so that one reference serves all of them."""
    return np.clip(np.rint(32 * scale * rng.normal(size=shape)), -255, 255) / 32


def _case(frames: Sequence[int], labels: Sequence[int], classes: int, features: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    batch, T, U = len(frames), max(frames), max(labels)
    # Past the last label there is what some toolkits pad with; it must not be read. A label may be the blank, save in HAT.
    targets = np.where(np.arange(U) < np.array(labels)[:, None], rng.integers(0, classes, (batch, U)), -1)
    logits = _draw(rng, batch, T, U + 1, classes, scale=2.0)
    encoder, predictor = _draw(rng, batch, T, features), _draw(rng, batch, U + 1, features)
    for b in range(batch):
        logits[b, frames[b] :] = logits[b, :, labels[b] + 1 :] = np.nan
        encoder[b, frames[b] :] = predictor[b, labels[b] + 1 :] = np.nan
    output = _draw(rng, classes, features, scale=0.5), _draw(rng, classes)
    return Case(
        logits, (encoder, predictor, *output), targets, np.array(frames), np.array(labels), np.array(_WEIGHTS[:batch])
    )  # fmt: skip


@functools.cache
def _cases(seed: int) -> tuple[Case, ...]:
    """Utterances with every kind of border; more classes than a block has threads; rows wider than a warp."""
    return (
        _case([13, 1, 7, 9], [5, 0, 7, 0], 19, 8, seed),
        _case([4], [3], 1500, 33, seed + 1),
        _case([45], [40], 7, 16, seed + 2),
    )


def _options(variant: str, topology: str, case: Case) -> dict[str, Any]:
    return {"topology": topology, "blank": _BLANK, "weights": case.weights, **VARIANTS[variant]}


def _inputs(function: str, variant: str, case: Case) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Float and integer arguments of a function."""
    targets = np.where(case.targets == _BLANK, _BLANK + 1, case.targets) if variant == "hat" else case.targets
    floats = case.joint if function == "joint_rnnt_loss" else (-abs(case.logits) if variant == "normalized" else case.logits,)
    return floats, (targets, case.frames, case.labels)


@functools.cache
def _expected(function: str, topology: str, variant: str, seed: int, index: int) -> tuple[Array, tuple[Array, ...]]:
    """Loss and gradients of a case by the reference; dtypes share them."""
    case = _cases(seed)[index]
    floats, integers = _inputs(function, variant, case)
    loss, gradients = getattr(reference, function)(*floats, *integers, **_options(variant, topology, case))
    return loss, gradients if isinstance(gradients, tuple) else (gradients,)


def _least_workspace(call: Callable[..., Any]) -> int:
    """The least workspace that would do, as the error for a single byte says."""
    try:
        call(workspace=1)
    except ValueError as error:
        least = re.search(r"at least (\d+) bytes", str(error))
        if least is None:
            raise
        return int(least[1])
    raise ValueError("workspace: expected an error for a workspace of 1 byte, got a loss")


def _results(function: str, case: Case, topology: str, variant: str, dtype: str, to_device: Callable[[Array], Any]) -> Iterator[Any]:
    """Loss and gradients of a case, in every way that the function has to make them."""
    floats, integers = _inputs(function, variant, case)
    call = functools.partial(
        getattr(transducer_loss, function),
        *(to_device(array.astype(numpy_dtype(dtype))) for array in floats), *integers, **_options(variant, topology, case),
    )  # fmt: skip
    if function == "rnnt_loss":
        loss, gradient = call()
        yield loss, (gradient,)
        return
    # So low a floor drops cells, yet changes no gradient by more than a rounding does.
    call = functools.partial(call, occupancy_floor=float(np.finfo(COMPUTE[dtype]).eps) / 4)
    for workspace in (None, _least_workspace(call)):  # logits kept between the passes, and logits made again in small tiles
        loss, grads = call(workspace=workspace)
        yield loss, (grads.encoder, grads.predictor, grads.weight, grads.bias)


def _float64(array: Any) -> Array:
    return np.asarray(array if isinstance(array, np.ndarray) else array.get()).astype(np.float64)


def _relative(value: Array, expected: Array) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
