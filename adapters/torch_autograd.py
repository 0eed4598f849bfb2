"""What the functions for PyTorch share: the core called with tensors, and rules of autograd."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from transducer_loss import logits_loss
from transducer_loss.arrays import as_array

REDUCTIONS = ("mean", "sum", "none")

Gradients = tuple[Tensor | None, ...]


def core_arguments(tensor: Tensor) -> dict[str, Any]:
    """Arguments that the core takes from the framework: its allocator and its number of threads."""
    device = tensor.device
    return {
        "allocate": lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device=device),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def caller(tensor: Tensor) -> Iterator[None]:
    """CuPy's device and stream are per thread, and autograd's backward runs in another one: set them from the tensor."""
    if tensor.device.type != "cuda":
        yield
        return
    import cupy

    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    with cupy.cuda.Device(tensor.device.index), cupy.cuda.ExternalStream(stream):
        yield


def tensor_of(array: Any) -> Tensor:
    """A tensor over the memory of one of the core's arrays."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor


def plain(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def expect_tensor(value: Any, name: str) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def followed(*tensors: Any) -> tuple[Any, ...]:
    """What autograd is to follow: nothing under no_grad, where `Function.apply` by itself would have gradients made."""
    return tensors if torch.is_grad_enabled() else tuple(map(plain, tensors))


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum, or the losses (B,) themselves."""
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone() if gradient.is_sparse else gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError("transducer losses cannot be differentiated twice: their gradient has no gradient")


def once_differentiable(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """A backward whose gradients raise when they are differentiated.

    torch's decorator of that name passes them on as constants where the upstream gradient is one: a penalty on the gradient
    would do nothing, without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, upstream: Tensor) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, upstream.detach())
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if each is None else _Once.apply(each.detach().requires_grad_()) for each in gradients)

    return checked


class LogitsLoss(torch.autograd.Function):
    """Losses (B,) of logits; `arguments` and `options` as of `transducer_loss.logits_loss.problem`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inplace: bool, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """Keep what the gradient needs where it is needed."""
        with caller(logits):
            of = logits_loss.problem(logits.detach(), *arguments, **options, **core_arguments(logits))
            needed = ctx.needs_input_grad[0]
            logits_loss.check_inplace(of, needed and inplace)
            loss, _, saved = logits_loss.forward(of, keep=needed)
        # The core reads these again. Saved in this way, autograd notices when they were changed in between, and gives them up
        # with the graph, where an attribute would live as long as the loss.
        ctx.save_for_backward(logits, *(tensor for tensor in arguments[:1] if isinstance(tensor, Tensor)))
        ctx.of, ctx.saved, ctx.inplace = dataclasses.replace(of, logits=None), saved, inplace
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        """With the true upstream weights."""
        logits = ctx.saved_tensors[0]
        with caller(logits):
            of = dataclasses.replace(ctx.of, logits=as_array(logits.detach(), "logits"))
            weights = logits_loss.weights_of(of, upstream)
            gradient = logits_loss.backward(of, ctx.saved, weights, ctx.inplace)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)  # a second backward raises, as the logits are gone
            gradient = logits.detach()
        return gradient, None, None, None
