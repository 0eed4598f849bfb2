"""What the functions for PyTorch share: rules of autograd, and the loss of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transducer_loss import logits_loss
from transducer_loss.adapters.torch.operators import (
    OPTIONS,
    as_tensor,
    band_of,
    band_tensors,
    caller,
    compiling,
    compute_dtype,
    constants,
    core_arguments,
    expect_tensor,
    lengths_like,
    lengths_of,
    operator,
    padded_to,
    tensor_of,
    uncompiled,
)
from transducer_loss.arrays import as_array
from transducer_loss.checks import INFEASIBLE, TOPOLOGIES, choice, dropout_rate, finite, keywords_of, whole_number
from transducer_loss.joint import ACTIVATIONS

REDUCTIONS = ("mean", "sum", "none")

_WORDS = {"reduction": REDUCTIONS, "topology": TOPOLOGIES, "infeasible": INFEASIBLE, "activation": ACTIVATIONS}

Gradients = tuple[Tensor | None, ...]


def wants_gradient(*tensors: Any) -> bool:
    """Whether autograd is to follow any of them: under no_grad, ``needs_input_grad`` would say so, too."""
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum, or the losses (B,) themselves."""
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor) -> Tensor:
        return gradient.clone() if gradient.is_sparse else gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        raise RuntimeError("what transducer_loss computes cannot be differentiated twice: its gradient has no gradient")


def anchored(ctx: Any, *inputs: Tensor | None) -> None:
    """In a forward pass, keep for `once_differentiable` a tensor without numbers whose graph leads to the inputs.

    The inputs themselves may not be saved, as gradients are made without them, and would be checked for changes in between.
    """
    origins = [each for each in inputs if each is not None and each.requires_grad]
    if origins and not compiling():
        with torch.enable_grad():
            ctx.anchor = _Once.apply(torch.empty(0, device="cpu"), *origins)


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward whose gradients raise when they are differentiated.

    torch's decorator of that name passes them on as constants where the upstream gradient is one: a penalty on the gradient
    would do nothing, without a word. In a compiled region it is torch that may raise. Inputs past the gradients have none.
    Its forward pass is to call `anchored`, so that whoever differentiates by the inputs comes by here.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, upstream: Tensor | None, *others: Any) -> Gradients:
        inputs = len(ctx.needs_input_grad)
        if upstream is None:
            return (None,) * inputs
        if compiling():
            gradients = backward(ctx, upstream)
        else:
            with torch.no_grad():
                gradients = backward(ctx, upstream.detach())
            if torch.is_grad_enabled():
                gradients = tuple(None if each is None else _Once.apply(each, ctx.anchor, upstream) for each in gradients)
        return (*gradients, *((None,) * (inputs - len(gradients))))

    return checked


def expect_options(function: Callable[..., Any], options: dict[str, Any], *of_the_call: str) -> None:
    """Raise for what is no keyword of the function, or given with each call, and for values that no call could take."""
    keywords = keywords_of(function, *of_the_call)
    for name, value in options.items():
        if name not in keywords:
            raise TypeError(f"{name}: expected one of {', '.join(keywords)}, got a keyword that is none of them")
        if name in _WORDS:
            choice(value, _WORDS[name], name)
        elif isinstance(keywords[name], float):
            finite(value, name)
        elif type(keywords[name]) is int:
            whole_number(value, name)
    dropout_rate(options.get("dropout", 0.0))


_INPUTS = "Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths, Tensor[] band"
_OPTIONS = f"bool normalized, bool hat, {OPTIONS}, float clamp=0.0"


def _loss_shapes(
    logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, band: Any, keep: bool, **options: Any
) -> list[Tensor]:
    real = compute_dtype(logits)
    loss = logits.new_empty((frames.shape[0],), dtype=real)
    if not keep:
        return [loss]
    return [loss, lengths_like(frames), *(logits.new_empty((_most_cells(logits),), dtype=real) for _ in range(3))]


def _most_cells(logits: Tensor) -> int:
    return logits.shape[0] if logits.ndim == 2 else logits.shape[0] * logits.shape[1] * logits.shape[2]


@operator(f"rnnt_loss({_INPUTS}, bool keep, *, {_OPTIONS}) -> Tensor[]", _loss_shapes, padded=True)
def _loss(
    logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, band: list[Tensor], keep: bool, *,
    padded: bool = False, inplace: bool = False, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Losses (B,); with `keep` also the lengths on the host, and what is saved of each cell."""
    with caller(logits):
        of = logits_loss.problem(logits, targets, frames, labels, band=band_of(band), **options, **core_arguments(logits))
        logits_loss.check_inplace(of, inplace)
        loss, _, saved = logits_loss.forward(of, keep=keep)
        if saved is None:
            return [loss]
        cells = [tensor_of(array) for array in (saved.normaliser, saved.blank_occupancy, saved.label_occupancy)]
    return [loss, lengths_of(of), *(padded_to(cells, _most_cells(logits)) if padded else cells)]


@operator(
    f"rnnt_loss_backward(Tensor upstream, Tensor[] saved, {_INPUTS}, *, {_OPTIONS}) -> Tensor",
    lambda upstream, saved, logits, *arguments, **options: logits.new_empty(logits.shape),
)
def _loss_backward(
    upstream: Tensor, saved: list[Tensor], logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor,
    band: list[Tensor], *, inplace: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """Gradient by the logits, with the true upstream weights."""
    with caller(logits):
        options = {**options, "validate": False}
        of = logits_loss.problem(logits, targets, frames, labels, band=band_of(band), **options, **core_arguments(logits))
        kept = logits_loss.Saved(*(as_array(tensor, "saved") for tensor in saved))
        gradient = logits_loss.backward(of, kept, logits_loss.weights_of(of, upstream), inplace)
    return logits if inplace else gradient


class LogitsLoss(torch.autograd.Function):
    """Losses (B,) of logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, keep: bool, inplace: bool, options: dict[str, Any], *arguments: Any) -> Tensor:
        """Keep what the gradient needs where it is needed."""
        targets, frames, labels, *band = arguments
        loss, *saved = _loss(logits.detach(), targets, frames, labels, band, keep, **_only(inplace and keep), **options)
        # Saved in this way, autograd notices when they were changed in between, and gives them up with the graph, where an
        # attribute would live as long as the loss.
        ctx.save_for_backward(logits, targets, *band, *saved)
        ctx.options, ctx.inplace, ctx.rows = options, inplace, len(band)
        if keep:
            anchored(ctx, logits)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        """With the true upstream weights."""
        logits, targets, *others = ctx.saved_tensors
        band, (lengths, *saved) = others[: ctx.rows], others[ctx.rows :]
        arguments = (upstream, saved, logits.detach(), targets, lengths[0], lengths[1], band)
        gradient = _loss_backward(*arguments, **_only(ctx.inplace), **ctx.options)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # a second backward raises, as the logits are gone
        return (gradient,)


def _only(inplace: bool) -> dict[str, bool]:
    """The keyword that no operator has."""
    return {"inplace": True} if inplace else {}


_inplace = uncompiled(LogitsLoss.apply, "inplace=True writes over the logits, which torch.compile cannot follow: leave it out")


def logits_losses(
    logits: Tensor, targets: Any, frames: Any, labels: Any, *, band: Any = None, inplace: bool = False, **options: Any
) -> Tensor:
    """Losses (B,) of logits, with autograd; `options` as of `transducer_loss.logits_loss.problem`."""
    expect_tensor(logits, "logits")
    keep = wants_gradient(logits)
    integers = (
        as_tensor(targets, "targets"), as_tensor(frames, "logit_lengths"), as_tensor(labels, "target_lengths"),
    )  # fmt: skip
    apply = _inplace if inplace else LogitsLoss.apply
    return apply(logits, keep, inplace, constants(options), *integers, *band_tensors(band))  # type: ignore[no-any-return]
