"""What tests of functions for PyTorch share: arrays as tensors and back, and what may be wrapped around a call and changes nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers import Array, numpy_dtype
from naive_torch import same

Call = Callable[..., Tensor]
"""Of tensors that have gradients."""

TWICE = "cannot be differentiated twice"


def tensor_of(array: Array, dtype: str = "") -> Tensor:
    """A copy in a dtype, its own by default."""
    array = array.astype(numpy_dtype(dtype or array.dtype.name))
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else torch.from_numpy(array)


def array_of(tensor: Tensor) -> Array:
    """The numbers of a tensor."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16")) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def expect_bits(got: Tensor, expected: Array) -> None:
    """The dtype, and all numbers; zeros of either sign are zeros."""
    found = array_of(got)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))  # as NumPy knows NaN there


def outcome(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Value, and gradients for an upstream gradient with numbers of both signs, that is 0 somewhere, of copies of the inputs."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    torch.manual_seed(5)
    value = call(*leaves)
    upstream = torch.linspace(-2.0, 2.0, 2 * value.numel() + 1, dtype=value.dtype, device="cpu")[: value.numel()]
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.view(value.shape))]


def _with_default_device(call: Call) -> Call:
    @functools.wraps(call)
    def wrapped(*inputs: Tensor) -> Tensor:
        torch.set_default_device("meta")
        try:
            return call(*inputs)
        finally:
            torch.set_default_device(None)

    return wrapped


def _with_default_dtype(call: Call) -> Call:
    def wrapped(*inputs: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float16)
        try:
            return call(*inputs)
        finally:
            torch.set_default_dtype(torch.float32)

    return wrapped


def _in(manager: Callable[[], Any]) -> Callable[[Call], Call]:
    def around(call: Call) -> Call:
        def wrapped(*inputs: Tensor) -> Tensor:
            with manager():
                return call(*inputs)

        return wrapped

    return around


def _strided(call: Call) -> Call:
    """Of the same numbers, with gaps and the dimensions the other way round."""

    def wrapped(*inputs: Tensor) -> Tensor:
        turned = [each.transpose(0, -1) for each in inputs]
        strided = [torch.stack([each, each + 7], -1)[..., 0].transpose(0, -1) for each in turned]
        assert same(strided, inputs) and not any(each.is_contiguous() for each in strided)
        return call(*strided)

    return wrapped


CONTEXTS: dict[str, Callable[[Call], Call]] = {
    "default device": _with_default_device,
    "default dtype": _with_default_dtype,
    "autocast": _in(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a mode": _in(lambda: FlopCounterMode(display=False)),
    "checkpoint": lambda call: lambda *inputs: checkpoint(call, *inputs, use_reentrant=False),
    "strides": _strided,
    "compiled": lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
}
"""What changes no bit of a value and its gradients."""


def expect_graphs(number: int, call: Callable[..., Tensor], inputs: Sequence[Tensor], steps: Sequence[tuple[Any, ...]], **how: Any) -> None:
    """How many graphs are compiled of `call` for all steps, which have other arguments after the inputs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, **how)
    for step in steps:
        assert same(
            outcome(lambda *leaves, step=step: compiled(*leaves, *step), inputs),
            outcome(lambda *leaves, step=step: call(*leaves, *step), inputs),
        )
    assert counter.frame_count == number
    torch._dynamo.reset()


def expect_once(call: Call, inputs: Sequence[Tensor]) -> None:
    """Second derivatives raise, whichever way they are asked for."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = call(*leaves)
    scale = torch.ones_like(value, requires_grad=True)
    gradients = torch.autograd.grad(value, leaves, scale, create_graph=True)
    penalty = sum((gradient.square().sum() for gradient in gradients), sum((leaf.sum() for leaf in leaves), value.sum()))
    for tensor in (*leaves, scale):
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(penalty, tensor, retain_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        penalty.backward()


def expect_unchanged_inputs(call: Call, inputs: Sequence[Tensor]) -> None:
    """Autograd notices when an input that backward reads was changed in between."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    for leaf in leaves:
        value = call(*leaves).sum()
        with torch.no_grad():
            leaf.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
