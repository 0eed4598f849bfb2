"""PyTorch: Amortized Networks (arXiv 2108.01553): gates that choose a branch in each frame, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transducer_loss import amortized
from transducer_loss.adapters.torch.autograd import (
    REDUCTIONS,
    Gradients,
    anchored,
    once_differentiable,
    reduced,
)
from transducer_loss.adapters.torch.operators import (
    as_tensor,
    caller,
    compiling,
    compute_dtype,
    constants,
    core_arguments,
    expect_tensor,
    numbers,
    operator,
    seed_tensor,
)
from transducer_loss.checks import choice, finite


def _shapes(
    gates: Tensor, each: Tensor, lengths: Tensor, weights: Tensor | None, gradient: bool, **options: Any
) -> list[Tensor]:
    result = gates.new_empty(gates.shape[:1], dtype=compute_dtype(gates))
    return [result, gates.new_empty(gates.shape)] if gradient else [result]


@operator(
    "amortized_cost(Tensor gates, Tensor costs, Tensor lengths, Tensor? weights, bool gradient, *, bool? validate) -> Tensor[]",
    _shapes,
)
def _cost(
    gates: Tensor, costs: Tensor, lengths: Tensor, weights: Tensor | None, gradient: bool, *, validate: bool | None
) -> list[Tensor]:
    """Costs (B,), and the gradient of their weighted sum."""
    return _made(amortized.mean_cost, gates, costs, lengths, weights=weights, gradient=gradient, validate=validate)


@operator(
    "amortized_backlog(Tensor gates, Tensor durations, Tensor lengths, Tensor? weights, bool gradient, *, float frame_period, "
    "str statistic, bool? validate) -> Tensor[]",
    _shapes,
)
def _backlog(
    gates: Tensor, durations: Tensor, lengths: Tensor, weights: Tensor | None, gradient: bool, **options: Any
) -> list[Tensor]:
    """Backlogs (B,), and the gradient of their weighted sum."""
    return _made(amortized.waiting, gates, durations, lengths, weights=weights, gradient=gradient, **options)


def _made(of: Callable[..., tuple[Any, Any]], gates: Tensor, *arguments: Tensor, **options: Any) -> list[Tensor]:
    with caller(gates):
        result, gradient = of(gates, *arguments, **options, **core_arguments(gates))
    return [result] if gradient is None else [result, gradient]


class _OfGates(torch.autograd.Function):
    """What each utterance's gates cost, (B,), by either operator."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, operator: Callable[..., list[Tensor]], options: dict[str, Any], each: Tensor, lengths: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gates, each, lengths)
        ctx.operator, ctx.options = operator, options
        anchored(ctx, gates)
        (result,) = operator(gates.detach(), each, lengths, None, False, **options)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        gates, *others = ctx.saved_tensors
        return (ctx.operator(gates.detach(), *others, upstream, True, **{**ctx.options, "validate": None})[1],)


def _of_gates(
    operator: Callable[..., list[Tensor]], gates: Tensor, each: Any, name: str, lengths: Any, reduction: str, **options: Any
) -> Tensor:
    choice(reduction, REDUCTIONS, "reduction")
    expect_tensor(gates, "gates")
    result = _OfGates.apply(gates, operator, constants(options), numbers(each, name), as_tensor(lengths, "lengths"))
    return reduced(result, reduction)


def amortized_cost(gates: Tensor, costs: Any, lengths: Any, *, reduction: str = "mean", validate: bool = False) -> Tensor:
    """Average cost of a frame (Amortized Networks, arXiv 2108.01553), with autograd.

    Parameters
    ----------
    gates : (B, T, K) tensor
        As `gumbel_gate` makes them. Any device, any float dtype, any strides.
    costs : (K,) tensor or list of float
        Of a frame in each branch, in any unit. There is no gradient by them.
    lengths : (B,) tensor or list of int
        Frames of each utterance, from 1 to T: what it is divided by. Padding may hold anything.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 gates.

    Notes
    -----
    See `transducer_loss.amortized_cost`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import amortized_cost, gumbel_gate
    >>> arbitrator = torch.randn(2, 9, 2, requires_grad=True)
    >>> gates = gumbel_gate(arbitrator, [9, 5], hard=True)
    >>> amortized_cost(gates, [1.0, 0.2], [9, 5]).backward()
    """
    return _of_gates(_cost, gates, costs, "costs", lengths, reduction, validate=validate)


def amortized_backlog(
    gates: Tensor, durations: Any, lengths: Any, *, frame_period: float = 1.0, statistic: str = "mean",
    reduction: str = "mean", validate: bool = False,
) -> Tensor:  # fmt: skip
    """Work that waits while frames take longer than they last (Amortized Networks, arXiv 2108.01553), with autograd.

    Parameters
    ----------
    gates : (B, T, K) tensor
        As `gumbel_gate` makes them. Any device, any float dtype, any strides.
    durations : (K,) tensor or list of float
        Time that a frame takes in each branch, in the unit of `frame_period`. There is no gradient by them.
    lengths : (B,) tensor or list of int
        Frames of each utterance, from 1 to T. Padding may hold anything.
    frame_period : float
        Time from a frame to the next.
    statistic : {"mean", "last"}
        The mean over an utterance's frames, or what waits after its last one.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 gates.

    Notes
    -----
    See `transducer_loss.amortized_backlog`, which also says what of it is the paper's.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import amortized_backlog
    >>> gates = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    >>> backlog = amortized_backlog(gates, [3.0, 0.5], [3], statistic="last")
    >>> backlog
    tensor(3.5000, grad_fn=<MeanBackward0>)
    >>> backlog.backward()
    """
    return _of_gates(
        _backlog, gates, durations, "durations", lengths, reduction, frame_period=frame_period, statistic=statistic,
        validate=validate,
    )  # fmt: skip


@operator(
    "gumbel_gate(Tensor logits, Tensor? lengths, Tensor temperature, Tensor seed, *, bool hard, bool noise, bool? validate) "
    "-> Tensor",
    lambda logits, *arguments, **options: logits.new_empty(logits.shape),
)
def _gated(
    logits: Tensor, lengths: Tensor | None, temperature: Tensor, seed: Tensor, *, hard: bool, noise: bool, validate: bool | None
) -> Tensor:
    with caller(logits):
        return amortized.gated(  # type: ignore[no-any-return]
            logits, lengths, temperature=float(temperature), hard=hard, noise=noise, seed=int(seed), validate=validate,
            **core_arguments(logits),
        )  # fmt: skip


@operator(
    "gumbel_gate_backward(Tensor upstream, Tensor logits, Tensor? lengths, Tensor temperature, Tensor seed, *, bool noise) "
    "-> Tensor",
    lambda upstream, *arguments, **options: upstream.new_empty(upstream.shape),
)
def _gated_backward(
    upstream: Tensor, logits: Tensor, lengths: Tensor | None, temperature: Tensor, seed: Tensor, *, noise: bool
) -> Tensor:
    with caller(upstream):
        return amortized.gated_backward(  # type: ignore[no-any-return]
            upstream, logits, lengths, temperature=float(temperature), noise=noise, seed=int(seed), validate=None,
            **core_arguments(upstream),
        )  # fmt: skip


class _Gate(torch.autograd.Function):
    """Straight-through: the gradient is that of the soft gates, whatever the gates are."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, options: dict[str, Any], lengths: Tensor | None, temperature: Tensor, seed: Tensor
    ) -> Tensor:
        # Not `*others`: torch.compile takes a forward pass of two of them for one without `ctx`.
        ctx.save_for_backward(logits, lengths, temperature, seed)
        ctx.noise = options["noise"]
        anchored(ctx, logits)
        return _gated(logits.detach(), lengths, temperature, seed, **options)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        logits, *others = ctx.saved_tensors
        return (_gated_backward(upstream, logits.detach(), *others, noise=ctx.noise),)


def gumbel_gate(
    logits: Tensor, lengths: Any = None, *, temperature: float = 1.0, hard: bool = False, noise: bool = True,
    seed: int | None = None, validate: bool = False,
) -> Tensor:  # fmt: skip
    """Gates that choose a branch in every frame (Amortized Networks, arXiv 2108.01553), with autograd.

    Parameters
    ----------
    logits : (B, T, K) tensor
        Of the arbitrator. Any device, any float dtype, any strides.
    lengths : (B,) tensor or list of int, optional
        Frames of each utterance, from 1 to T; those past it get gates of 0, and no gradient.
    temperature : float
        Towards 0 the gates become hard. One that changes from step to step is no constant of a graph of `torch.compile`.
    hard : bool
        One-hot gates, with the gradient of the soft ones (straight-through).
    noise : bool
        False for inference.
    seed : int, optional
        Drawn from torch's generator where it is None.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    (B, T, K) tensor
        In the dtype of the logits.

    Notes
    -----
    See `transducer_loss.gumbel_gate`, which also says what of it is the paper's.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import gumbel_gate
    >>> arbitrator = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    >>> gumbel_gate(arbitrator, hard=True, noise=False)
    tensor([[[1., 0.],
             [0., 1.]]], grad_fn=<_GateBackward>)
    """
    expect_tensor(logits, "logits")
    known = None if lengths is None else as_tensor(lengths, "lengths")
    # A product, for torch.compile makes no tensor of a float that changes in any other way.
    number = temperature if compiling() else finite(temperature, "temperature")
    heat = torch.ones((), dtype=torch.float64, device="cpu") * number
    options = {"hard": hard, "noise": noise, "validate": validate}
    return _Gate.apply(logits, options, known, heat, seed_tensor(seed if noise else seed or 0))  # type: ignore[no-any-return]
