"""warp-transducer's binding for PyTorch by its own names: HawkAaron's, and the fork with FastEmit that ESPnet imports.

A recipe changes the import::

    -from warprnnt_pytorch import RNNTLoss
    +from transducer_loss.adapters.compat.warprnnt_pytorch import RNNTLoss

Habits of warp-transducer, kept:

- ``"mean"`` and ``"sum"`` come as a tensor of shape (1,), not as a scalar; ``"mean"`` is the mean over the batch, whatever its
  docstring says of target lengths;
- with FastEmit the reported cost stays the negative log-likelihood; only the gradient of label arcs is scaled;
- any `reduction` but these two means none; here None does and ``"none"``, and other words are errors.

What differs:

- The log-softmax. HawkAaron's C library takes log-probabilities on the CPU and logits on CUDA, and bindings of different age
  made up for that or did not. Here the softmax is always part of the loss, on every device: right for logits, and the same for
  log-probabilities, since the log-softmax of log-probabilities is themselves, in value and in gradient.
- `fastemit_lambda` is 0 unless given. The fork's default is 0.001, which changes gradients without being asked to; ESPnet
  always passes it.
- The module's second and third argument come in either order: HawkAaron's second is `reduction`, the fork's `fastemit_lambda`.
- Targets and lengths may be int64 and lie on the host; acts may have strides, half types, more than 2^31 elements and longer
  padding than the longest utterance; U = 0 works; a target equal to blank gets the right gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.shared import named
from transducer_loss.adapters.torch.autograd import REDUCTIONS
from transducer_loss.checks import choice

__all__ = ["RNNTLoss", "rnnt_loss"]


@named(logits="acts", targets="labels", logit_lengths="act_lens", target_lengths="label_lens")
def rnnt_loss(
    acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor, blank: int = 0, reduction: str | None = "mean",
    fastemit_lambda: float = 0.0,
) -> Tensor:  # fmt: skip
    """Transducer loss, as ``warprnnt_pytorch.rnnt_loss``.

    Parameters
    ----------
    acts : (B, T, U+1, V) tensor
        Logits, or log-probabilities.
    labels : (B, U) tensor of int
    act_lens, label_lens : (B,) tensor of int
    blank : int
    reduction : {"mean", "sum", "none"} or None
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148).

    Returns
    -------
    (1,) tensor, or (B,)

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.warprnnt_pytorch import rnnt_loss
    >>> acts, labels = torch.zeros(1, 4, 3, 5, requires_grad=True), torch.tensor([[1, 2]], dtype=torch.int32)
    >>> rnnt_loss(acts, labels, torch.tensor([4]), torch.tensor([2])).backward()
    """
    loss = losses.rnnt_loss(
        acts, labels, act_lens, label_lens, blank=blank, reduction="none" if reduction is None else reduction,
        fastemit_lambda=fastemit_lambda,
    )  # fmt: skip
    return loss.reshape(-1)


class RNNTLoss(torch.nn.Module):
    """`rnnt_loss` as a module, as ``warprnnt_pytorch.RNNTLoss``.

    Parameters
    ----------
    blank, reduction, fastemit_lambda
        As of `rnnt_loss`; the last two in either order.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.warprnnt_pytorch import RNNTLoss
    >>> loss = RNNTLoss(blank=0, fastemit_lambda=0.01)
    >>> loss(torch.zeros(1, 4, 3, 5), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))
    tensor([7.3540])
    """

    def __init__(self, blank: int = 0, reduction: Any = "mean", fastemit_lambda: Any = 0.0) -> None:
        super().__init__()
        if isinstance(reduction, (int, float)):  # the fork's order
            reduction, fastemit_lambda = fastemit_lambda if fastemit_lambda != 0.0 else "mean", reduction
        choice("none" if reduction is None else reduction, REDUCTIONS, "reduction")
        self.blank, self.reduction, self.fastemit_lambda = blank, reduction, fastemit_lambda

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """See `rnnt_loss`."""
        return rnnt_loss(acts, labels, act_lens, label_lens, self.blank, self.reduction, self.fastemit_lambda)
