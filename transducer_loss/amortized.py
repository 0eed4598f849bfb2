"""Gates, cost and backlog of Amortized Networks. Launches `kernels/amortized.cu`."""

from __future__ import annotations

from typing import Any

import numpy as np

from transducer_loss.arrays import COMPUTE, element_strides
from transducer_loss.checks import choice, expect_shape, finite, float_array, lengths_on, numbers_for, weights_for, whole_number
from transducer_loss.processors import Allocate, processor_for

STATISTICS = ("mean", "last")


def amortized_cost(
    gates: Any, costs: Any, lengths: Any, *, weights: Any = None, gradient: bool = True, validate: bool = False
) -> tuple[Any, Any]:
    """Average cost of a frame (Amortized Networks, arXiv 2108.01553): ``1 / T_b sum_t sum_k gates_tk costs_k``.

    Parameters
    ----------
    gates : (B, T, K) array
        How far each frame takes each branch. Any float dtype, any strides. Padding may hold anything.
    costs : (K,) array or list of float
        Of a frame in each branch, in any unit, as multiplications.
    lengths : (B,) array or list of int
        T_b, from 1 to T.
    weights : (B,) array, optional
        Of the utterances, in the gradient.
    gradient : bool
        Whether to make the gradient.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    cost : (B,) array
        float32, or float64 for float64 gates. NaN, with gradient 0, where it is not finite.
    grad : (B, T, K) array or None
        Of ``sum_b weights_b cost_b`` by the gates, in their dtype; 0 in padding.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    The paper's amortised cost is the mean over the frames; that padding is left out and each utterance is divided by its own
    frames is this library's reading. There is no gradient by the costs.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> cost, grad = tl.amortized_cost(np.array([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]), [1.0, 0.2], [2])
    >>> cost, grad[0, :, 0]
    (array([0.6]), array([0.5, 0.5, 0. ]))
    """
    return mean_cost(gates, costs, lengths, weights=weights, gradient=gradient, validate=validate)


def mean_cost(
    gates: Any, costs: Any, lengths: Any, *, weights: Any, gradient: bool, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """See `amortized_cost`."""
    of = float_array(gates, "gates", "B T K")
    batch, frames, branches = (int(size) for size in of.shape)
    kind = of.dtype.name
    with processor_for(of, threads, allocate) as processor:
        known, each, upstream = _read(processor, of, lengths, costs, "costs", weights, validate)
        (native, cost), (native_gradient, view) = _made(processor, of, gradient)
        processor.launch(
            f"amortized_cost<{kind}>", batch, frames,
            batch, of, *element_strides(of), frames, branches, known, each, upstream, cost, view, steps=branches,
        )  # fmt: skip
    return native, native_gradient


def amortized_backlog(
    gates: Any, durations: Any, lengths: Any, *, frame_period: float = 1.0, statistic: str = "mean", weights: Any = None,
    gradient: bool = True, validate: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Work that waits, of a recogniser that takes longer for some frames than they last (arXiv 2108.01553).

    The backlog after frame t is ``q_t = max(0, q_{t-1} + sum_k gates_tk durations_k - frame_period)``; before frame 0 it is 0.

    Parameters
    ----------
    gates : (B, T, K) array
        How far each frame takes each branch. Any float dtype, any strides. Padding may hold anything.
    durations : (K,) array or list of float
        Time that a frame takes in each branch, in the unit of `frame_period`.
    lengths : (B,) array or list of int
        T_b, from 1 to T.
    frame_period : float
        Time from a frame to the next, 0 or more.
    statistic : {"mean", "last"}
        The mean of q_t over an utterance's frames, or its value after the last one, which is what a user waits for.
    weights : (B,) array, optional
        Of the utterances, in the gradient.
    gradient : bool
        Whether to make the gradient.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    backlog : (B,) array
        float32, or float64 for float64 gates. NaN, with gradient 0, where it is not finite.
    grad : (B, T, K) array or None
        Of ``sum_b weights_b backlog_b`` by the gates, in their dtype; 0 in padding.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    Computed in float64. The slope of ``max(0, x)`` is 0 where ``x <= 0``: a frame that leaves no backlog has no gradient. Where
    the sums that make x cancel to 0, durations that binary fractions cannot hold leave it to rounding which side that is. That
    delay matters beside cost is the paper's, as far as it could be read; queue and statistics are this library's reading.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> backlog, grad = tl.amortized_backlog(np.array([[[1.0], [1.0], [0.0]]]), [3.0], [3], frame_period=1.0)
    >>> backlog, grad[0, :, 0]  # 2, 4 and 3 wait
    (array([3.]), array([3., 2., 1.]))
    """
    return waiting(
        gates, durations, lengths, frame_period=frame_period, statistic=statistic, weights=weights, gradient=gradient,
        validate=validate,
    )  # fmt: skip


def waiting(
    gates: Any, durations: Any, lengths: Any, *, frame_period: float, statistic: str, weights: Any, gradient: bool,
    validate: bool | None, threads: int | None = None, allocate: Allocate | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """See `amortized_backlog`."""
    of = float_array(gates, "gates", "B T K")
    batch, frames, branches = (int(size) for size in of.shape)
    kind = of.dtype.name
    if finite(frame_period, "frame_period") < 0:
        raise ValueError(f"frame_period: expected 0 or more, got {frame_period}")
    which = choice(statistic, STATISTICS, "statistic")
    with processor_for(of, threads, allocate) as processor:
        known, each, upstream = _read(processor, of, lengths, durations, "durations", weights, validate)
        (native, backlog), (native_gradient, view) = _made(processor, of, gradient)
        processor.launch(
            f"amortized_backlog<{kind}>", batch, frames,
            batch, of, *element_strides(of), frames, branches, known, each, float(frame_period), which, upstream,
            processor.empty((batch, frames), "float64"), backlog, view, steps=branches, per_thread=1,
        )  # fmt: skip
    return native, native_gradient


def gumbel_gate(
    logits: Any, lengths: Any = None, *, temperature: float = 1.0, hard: bool = False, noise: bool = True, seed: int = 0,
    validate: bool = False,
) -> Any:  # fmt: skip
    """Gates that choose a branch in every frame: ``softmax((logits + gumbel) / temperature)`` over the branches.

    Parameters
    ----------
    logits : (B, T, K) array
        Of the arbitrator. Any float dtype, any strides; -inf rules a branch out.
    lengths : (B,) array or list of int, optional
        T_b, from 1 to T: frames past it get gates of 0, and may hold anything.
    temperature : float
        Towards 0 the gates become hard, towards infinity alike.
    hard : bool
        One-hot gates of the largest, the first of equals; their gradient is that of the soft ones (straight-through).
    noise : bool
        False for inference, where nothing is drawn.
    seed : int
        The same noise for the same number, modulo 2^64, on every processor.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    (B, T, K) array
        In the dtype of the logits; NaN in frames without finite gates. Its gradient is `gumbel_gate_backward`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    The hard gates of noisy logits take branch k with probability ``softmax(logits)_k``. The noise is ``-log(-log((r + 0.5) /
    2^32))``, r being 32 bits of Philox 4x32-10 at the frame and branch. That Amortized Networks (arXiv 2108.01553) train such
    gates is the paper's; straight-through gates and the seed are this library's reading.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> logits = np.array([[[2.0, 0.0], [0.0, 1.0]]])
    >>> tl.gumbel_gate(logits, hard=True, noise=False)[0]
    array([[1., 0.],
           [0., 1.]])
    """
    return gated(logits, lengths, temperature=temperature, hard=hard, noise=noise, seed=seed, validate=validate)


def gated(
    logits: Any, lengths: Any, *, temperature: float, hard: bool, noise: bool, seed: int, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> Any:  # fmt: skip
    """See `gumbel_gate`."""
    of, how = noisy(logits, temperature, noise, seed)
    batch, frames, branches = (int(size) for size in of.shape)
    with processor_for(of, threads, allocate) as processor:
        known = _lengths(processor, of, lengths, validate)
        native, gates = processor.output(of.shape, of.dtype.name)
        processor.launch(
            f"amortized_gate<{of.dtype.name}>", -(-batch * frames // _FRAMES), _FRAMES,
            batch * frames, of, *element_strides(of), frames, branches, known, how[0], int(bool(hard)), *how[1:], gates,
            steps=_STEPS * branches, per_thread=1,
        )  # fmt: skip
    return native


def gumbel_gate_backward(
    gradient: Any, logits: Any, lengths: Any = None, *, temperature: float = 1.0, noise: bool = True, seed: int = 0
) -> Any:
    """Gradient of `gumbel_gate` by its logits, of soft and of hard gates alike.

    Parameters
    ----------
    gradient : (B, T, K) array
        By the gates, in the dtype of the logits, any strides; what is past a length is not read.
    logits, lengths, temperature, noise, seed
        As given to `gumbel_gate`.

    Returns
    -------
    (B, T, K) array
        0 in padding, and in frames without finite gates.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> tl.gumbel_gate_backward(np.array([[[1.0, 0.0]]]), np.zeros((1, 1, 2)), noise=False)
    array([[[ 0.25, -0.25]]])
    """
    return gated_backward(gradient, logits, lengths, temperature=temperature, noise=noise, seed=seed, validate=False)


def gated_backward(
    gradient: Any, logits: Any, lengths: Any, *, temperature: float, noise: bool, seed: int, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> Any:  # fmt: skip
    """See `gumbel_gate_backward`."""
    of, how = noisy(logits, temperature, noise, seed)
    given = float_array(gradient, "gradient", "B T K", of, "logits")
    expect_shape(given, "gradient", "(B, T, K)", tuple(of.shape))
    batch, frames, branches = (int(size) for size in of.shape)
    with processor_for(of, threads, allocate) as processor:
        known = _lengths(processor, of, lengths, validate)
        native, out = processor.output(of.shape, of.dtype.name)
        processor.launch(
            f"amortized_gate_backward<{of.dtype.name}>", -(-batch * frames // _FRAMES), _FRAMES,
            batch * frames, given, *element_strides(given), of, *element_strides(of), frames, branches, known, *how, out,
            steps=_STEPS * branches, per_thread=1,
        )  # fmt: skip
    return native


def _lengths(processor: Any, of: Any, lengths: Any, validate: bool | None) -> Any:
    """Lengths as the kernels read them; None where every frame is real."""
    if lengths is None:
        return None
    batch, frames = (int(size) for size in of.shape[:2])
    return lengths_on(processor, lengths, "lengths", (batch,), 1, frames, "(B,) T", validate)


def _read(
    processor: Any, of: Any, lengths: Any, per_branch: Any, name: str, weights: Any, validate: bool | None
) -> tuple[Any, Any, Any]:
    """Lengths, the branches' costs or durations, and utterance weights, beside the gates."""
    batch, _, branches = (int(size) for size in of.shape)
    each = numbers_for(per_branch, processor, name, "(K,)", (branches,), "float64")
    # Not by _lengths: without lengths it would be an error here.
    known = lengths_on(processor, lengths, "lengths", (batch,), 1, int(of.shape[1]), "(B,) T", validate)
    return known, each, weights_for(weights, processor, batch, COMPUTE[of.dtype.name])


def _made(processor: Any, of: Any, gradient: bool) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """A number for each utterance, and the gradient by the gates, if there is one: the framework's arrays, and views."""
    numbers = processor.output((int(of.shape[0]),), COMPUTE[of.dtype.name])
    return numbers, processor.output(of.shape, of.dtype.name) if gradient else (None, None)


# Frames that a block's threads share out: FRAMES of kernels/amortized.cu.
_FRAMES = 256

# A gate's noise costs the host about as much as so many columns of a softmax.
_STEPS = 32


def noisy(logits: Any, temperature: float, noise: bool, seed: int) -> tuple[Any, tuple[float, int, int]]:
    """Checked logits; temperature, whether there is noise, and the seed as the kernels take it."""
    of = float_array(logits, "logits", "B T K")
    if finite(temperature, "temperature") <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    bits = np.uint64(whole_number(seed, "seed") & (1 << 64) - 1)
    return of, (float(temperature), int(bool(noise)), int(bits.astype(np.int64)))
