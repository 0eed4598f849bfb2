"""torchaudio's transducer loss by its own names: ``torchaudio.functional.rnnt_loss`` and ``torchaudio.transforms.RNNTLoss``.

A recipe changes the import::

    -from torchaudio.transforms import RNNTLoss
    +from transducer_loss.adapters.compat.torchaudio import RNNTLoss

torchaudio's own habits, kept:

- ``blank=-1``, the default, is the last class;
- ``clamp`` bounds each element of the gradient to [-clamp, clamp] before the upstream gradient, and so the 1/B of
  ``reduction="mean"``, is multiplied in; 0 and below is off;
- ``fused_log_softmax=False`` takes log-probabilities, and the gradient (and its clamp) is by them.

What differs: targets and lengths may be int64 and lie on the host; logits may have strides, bfloat16 or float64 elements, more
than 2^31 of them and more frames and labels of padding than the longest utterance; targets may be padded with anything; U = 0
works; a target equal to blank gets the right gradient. The loss of float16 logits is float32. There is no TorchScript.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.shared import bound_of
from transducer_loss.adapters.torch.autograd import REDUCTIONS
from transducer_loss.checks import choice

__all__ = ["RNNTLoss", "rnnt_loss"]


def rnnt_loss(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int = -1, clamp: float = -1,
    reduction: str = "mean", fused_log_softmax: bool = True,
) -> Tensor:  # fmt: skip
    """Transducer loss, as ``torchaudio.functional.rnnt_loss``.

    Parameters
    ----------
    logits : (B, T, U+1, V) tensor
        Log-probabilities with ``fused_log_softmax=False``.
    targets : (B, U) tensor of int
    logit_lengths, target_lengths : (B,) tensor of int
    blank : int
    clamp : float
        Bound of each element of the gradient; 0 and below is none.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    fused_log_softmax : bool

    Returns
    -------
    Tensor
        Scalar, or (B,).

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.torchaudio import rnnt_loss
    >>> logits = torch.zeros(1, 4, 3, 5, requires_grad=True)
    >>> rnnt_loss(logits, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]), clamp=0.1).backward()
    >>> logits.grad.abs().max()
    tensor(0.1000)
    """
    return losses.rnnt_loss(
        logits, targets, logit_lengths, target_lengths, blank=blank, clamp=bound_of(clamp), reduction=reduction,
        normalized=not fused_log_softmax,
    )  # fmt: skip


class RNNTLoss(torch.nn.Module):
    """`rnnt_loss` as a module, as ``torchaudio.transforms.RNNTLoss``.

    Parameters
    ----------
    blank, clamp, reduction, fused_log_softmax
        As of `rnnt_loss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.torchaudio import RNNTLoss
    >>> loss = RNNTLoss(blank=0, reduction="sum")
    >>> loss(torch.zeros(1, 4, 3, 5), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))
    tensor(7.3540)
    """

    def __init__(
        self, blank: int = -1, clamp: float = -1.0, reduction: str = "mean", fused_log_softmax: bool = True
    ) -> None:
        super().__init__()
        choice(reduction, REDUCTIONS, "reduction")
        self.blank, self.clamp, self.reduction, self.fused_log_softmax = blank, clamp, reduction, fused_log_softmax

    def forward(self, logits: Any, targets: Any, logit_lengths: Any, target_lengths: Any) -> Tensor:
        """See `rnnt_loss`."""
        return rnnt_loss(
            logits, targets, logit_lengths, target_lengths, self.blank, self.clamp, self.reduction, self.fused_log_softmax
        )
