"""Every function and gradient on the device at hand, against float64 loops (`transducer_loss.reference`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import transducer_loss
from transducer_loss import check_systems
from transducer_loss.arrays import COMPUTE, FLOATS, as_numpy, numpy_dtype
from transducer_loss.check_cases import VARIANTS_OF, Array, Case, cases, expected, inputs, options
from transducer_loss.checks import TOPOLOGIES, choice
from transducer_loss.info import cuda

FUNCTIONS = tuple(VARIANTS_OF)

# Functions whose value is an array of the inputs' dtype.
_OF_THE_DTYPE = ("reduced_predictor", "gumbel_gate")

_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclasses.dataclass(frozen=True)
class Row:
    """What `check` found for one way to call one function.

    Attributes
    ----------
    function, topology, dtype, variant : str
        How it was called; without a lattice there is no topology.
    loss_error : float
        Worst of ``|loss - reference| / max(1, |reference|)`` over the utterances; of what is no loss, over the elements.
    gradient_error : float
        Worst of ``norm(gradient - reference) / norm(reference)`` over the gradients; 0 where there are none.
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


def topologies_of(function: str) -> tuple[str, ...]:
    """Those of a function with a lattice; else one that is empty."""
    return ("",) if function in check_systems.VARIANTS_OF else TOPOLOGIES


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


def _results(
    function: str, topology: str, variant: str, dtype: str, case: Case, to_device: Callable[[Array], Any]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Loss and gradients of a case, in every way that the function has to make them."""
    if function in check_systems.VARIANTS_OF:
        of = case.system(function, variant)
        yield of.run(to_device, *(to_device(array.astype(numpy_dtype(dtype))) for array in of.floats))
        return
    floats, integers = inputs(function, variant, case)
    parts: dict[str, Any] = {"band": case.band} if "band" in variant else {}
    if variant == "shared encoders":
        parts["encoder_index"] = case.encoder_index
    if "classes" in variant:
        parts["classes"] = case.classes(variant, dtype, to_device)
    call = functools.partial(
        getattr(transducer_loss, function), *(to_device(array.astype(numpy_dtype(dtype))) for array in floats), *integers,
        **options(variant, topology, case), **parts,
    )  # fmt: skip
    if function == "rnnt_loss":
        loss, gradient = call()
        yield loss, (gradient,)
        return
    if function == "simple_rnnt_loss":
        loss, grads, _ = call()
        yield loss, (grads.am, grads.lm)
        return
    # So low a floor drops cells, yet changes no gradient by more than a rounding does.
    call = functools.partial(call, occupancy_floor=_EPSILON[COMPUTE[dtype]] / 4)
    for workspace in (None, _least_workspace(call)):  # logits kept between the passes, and logits made again in small tiles
        loss, grads = call(workspace=workspace)
        yield loss, (grads.encoder, grads.predictor, grads.weight, grads.bias)


def _difference(array: Any, expected: Array) -> Array:
    if array.shape != expected.shape:
        raise ValueError(f"expected a result of shape {expected.shape}, got {array.shape}")
    return as_numpy(array).astype(np.float64) - expected


def budgets(function: str, dtype: str, device: str) -> tuple[float, float]:
    """Errors that rounding alone may cause, of a loss and of a gradient.

    With e the epsilon of `dtype`, and c that of the type it is computed in (float32 for half types):

    - A loss sums path weights as mantissa and exponent, and takes one logarithm: 8 c.
    - A float32 gradient is a product over a path of up to 85 arcs, each off by the rounding of its log-probability (about 5 c):
      5 sqrt(85) c for independent roundings, and less than 32 c.
    - A float64 gradient is as good, but the reference is not: it exponentiates sums of log-probabilities that reach the loss
      (300 in these cases), so that it is off by some hundred e itself: 2048 e.
    - A half-type gradient is computed in float32 and rounded once, to within e / 2: e.
    - On CUDA the joint-fused loss hands half types to the tensor cores: hidden features and the gradient of the logits are
      rounded too, which adds a loss error of up to e / 2 and makes the gradient's budget 3 e.
    - What is no loss but of the inputs' dtype, as gates are, is rounded once to half types: e.
    - Edits are counted: 0.

    Parameters
    ----------
    function, dtype : str
        One of `FUNCTIONS`, and of float16, bfloat16, float32, float64.
    device : str
        ``"cpu"`` or a CUDA device.

    Returns
    -------
    loss, gradient : float
        Budgets of the errors of `Row`.

    Examples
    --------
    >>> budgets("rnnt_loss", "float16", "cpu")[1]
    0.0009765625
    """
    epsilon, computed = _EPSILON[dtype], _EPSILON[COMPUTE[dtype]]
    if function == "edit_distance":
        return 0.0, 0.0
    if dtype == COMPUTE[dtype]:
        return 8 * computed, (2048 if dtype == "float64" else 32) * epsilon
    if function == "joint_rnnt_loss" and device != "cpu":
        return 8 * computed + epsilon / 2, 3 * epsilon
    return epsilon if function in _OF_THE_DTYPE else 8 * computed, epsilon


def _errors(function: str, topology: str, dtype: str, variant: str, seed: int, to_device: Callable[[Array], Any]) -> Array:
    """Worst error of the loss, and of the gradients, over the cases. NaN is the worst of all."""
    worst = np.zeros(2)
    for index, case in enumerate(cases(seed)):
        wanted_loss, wanted_gradients = expected(function, topology, variant, seed, index)
        for loss, gradients in _results(function, topology, variant, dtype, case, to_device):
            by_utterance = abs(_difference(loss, wanted_loss)) / np.maximum(1.0, abs(wanted_loss))
            by_gradient = [0.0] + [
                np.linalg.norm(_difference(gradient, wanted)) / np.linalg.norm(wanted)
                for gradient, wanted in zip(gradients, wanted_gradients, strict=True)
            ]
            worst = np.maximum(worst, [np.max(by_utterance), np.max(by_gradient)])
    return worst


def _device(name: str) -> tuple[str, contextlib.AbstractContextManager[Any], Callable[[Array], Any]]:
    """Name of a device, a context in which it is the current one, and how arrays get there."""
    if name == "cpu":
        return name, contextlib.nullcontext(), lambda array: array
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    found, index = cuda(), int(match[1] or 0)
    if not found["usable"]:
        raise ValueError(f"device: expected a usable CUDA device, got {name!r}: {found['reason']}")
    if index >= len(found["devices"]):
        raise ValueError(f"device: expected a CUDA device below {len(found['devices'])}, got {name!r}")
    from transducer_loss.cuda import Cuda

    return f"cuda:{index}", (processor := Cuda(index)), processor.to_device


def check(
    device: str = "cpu", *, functions: Sequence[str] = FUNCTIONS, dtypes: Sequence[str] = FLOATS, seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:  # fmt: skip
    """Compare every function and gradient with the float64 reference.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. Inputs are NumPy or CuPy arrays.
    functions, dtypes : sequence of str
        Which of `FUNCTIONS`, and which of float16, bfloat16, float32, float64.
    seed : int
        Of the inputs.
    progress : callable, optional
        Told what comes next.

    Returns
    -------
    list of Row
        One for each function, topology, variant and dtype. A function that raises fails its row, not the check.

    Raises
    ------
    ValueError
        For a device that is not usable, or a function or dtype that there is not.

    Examples
    --------
    >>> rows = check("cpu", functions=["rnnt_loss"], dtypes=["float32"])
    >>> len(rows), all(row.passed for row in rows)
    (21, True)
    """
    for name, asked, known in (("functions", functions, FUNCTIONS), ("dtypes", dtypes, FLOATS)):
        for one in asked:
            choice(one, known, name)
    device, current, to_device = _device(device)
    rows = []
    with current:
        each = (itertools.product((name,), topologies_of(name), VARIANTS_OF[name]) for name in functions)
        for function, topology, variant in itertools.chain.from_iterable(each):
            if progress is not None:
                progress(" ".join(filter(None, (function, topology, variant))))
            for dtype in dtypes:
                (loss_error, gradient_error), problem = (np.nan, np.nan), ""
                try:
                    loss_error, gradient_error = _errors(function, topology, dtype, variant, seed, to_device)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                loss_budget, gradient_budget = budgets(function, dtype, device)
                rows.append(Row(
                    function, topology, dtype, variant, float(loss_error), float(gradient_error), loss_budget, gradient_budget,
                    problem,
                ))  # fmt: skip
    return rows
