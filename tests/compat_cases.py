"""What the tests of the drop-in modules share: published vectors as tensors, and the core on the same numbers.

A drop-in is a function of (x, targets, frames, labels): x of logits or of log-probabilities (B, T, U + 1, V), losses (B,) back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import transducer_loss
from naive_torch import Case, case
from test_public_vectors import CASES, PRECISION

DropIn = Callable[..., Tensor]

every_vector = pytest.mark.parametrize("vector", [pytest.param(each, id=each["id"]) for each in CASES])


def vector_tensors(vector: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in float64, the integers as most recipes have them."""
    logits = torch.tensor(vector["logits"], dtype=torch.float64)
    targets = torch.tensor(vector["targets"], dtype=torch.int32).reshape(len(logits), -1)
    return logits, targets, *(torch.tensor(vector[name], dtype=torch.int32) for name in ("T_len", "U_len"))


def expect_vector(vector: dict[str, Any], drop_in: DropIn, *, log_probs: bool = False, reported: bool = False, clamps: bool = False) -> None:
    """Raise unless a drop-in gives what was published: the cost, and the gradient by the logits and by what it takes.

    Parameters
    ----------
    log_probs
        Whether it takes log-probabilities.
    reported
        Whether it multiplies the cost by (1 + lambda) of FastEmit.
    clamps
        Whether it clamps gradients as the vector says.
    """
    logits, *integers = vector_tensors(vector)
    logits.requires_grad_()
    x = logits.log_softmax(-1) if log_probs else logits
    loss = drop_in(x, *integers)
    of_cost, of_gradient = PRECISION[vector["id"]]
    scale = 1.0 if reported else 1.0 + vector.get("fastemit_lambda", 0.0)
    np.testing.assert_allclose(scale * loss.detach(), vector["expected_cost"], rtol=0, atol=of_cost)
    if vector["expected_grads"] is None or (vector["kind"] == "clamp" and not clamps):
        return
    published = torch.tensor(vector["expected_grads"], dtype=torch.float64)
    by_logits, by_x = torch.autograd.grad(loss.sum(), (logits, x))
    if vector["grad_wrt"] == "log_probs":
        if log_probs:
            np.testing.assert_allclose(by_x, published, rtol=0, atol=of_gradient)
        published = published - logits.detach().softmax(-1) * published.sum(-1, keepdim=True)
        of_gradient *= 2  # an entry of the sum and the entry itself carry what was published
    np.testing.assert_allclose(by_logits, published, rtol=0, atol=of_gradient)


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same numbers for NumPy, which has no bfloat16 of its own."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def of_core(x: Tensor, of: Case, weights: Sequence[float], **options: Any) -> tuple[Tensor, Tensor]:
    """Losses (B,) of the core on NumPy, and the gradient of ``sum_b weights_b loss_b``."""
    loss, gradient = transducer_loss.rnnt_loss(array_of(x), *of.integers, weights=weights, **options)
    bits = gradient.view(np.int16) if x.dtype == torch.bfloat16 else gradient
    return torch.from_numpy(np.array(loss)), torch.from_numpy(bits.copy()).view(x.dtype)


def padded_case(dtype: torch.dtype, *, log_probs: bool = False) -> tuple[Case, Tensor, Tensor]:
    """A ragged batch with more of everything: two frames and a label too many, NaN and -1 in them, and strides.

    Returns the case, its logits or log-probabilities, a view that needs a gradient, and its targets in int64.
    """
    of = case()
    B, T, U1, V = of.logits.shape
    base = torch.full((T + 2, B, U1 + 1, V), torch.nan, dtype=dtype)
    x = base.transpose(0, 1)
    real = ~of.padding(of.logits)
    x[:, :T, :U1][real] = (of.logits.log_softmax(-1) if log_probs else of.logits).to(dtype)[real]
    targets = torch.nn.functional.pad(of.targets, (0, 1), value=-1)
    assert not x.is_contiguous()
    return of, x.requires_grad_(), targets


def spied(monkeypatch: pytest.MonkeyPatch, name: str = "rnnt_loss") -> list[tuple[Any, ...]]:
    """The positional arguments of calls to a loss of `transducer_loss.adapters.torch`."""
    from transducer_loss.adapters import torch as losses

    calls, original = [], getattr(losses, name)

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(losses, name, spy)
    return calls
