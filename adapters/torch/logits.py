"""PyTorch: the loss of logits, as a function and as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.autograd import REDUCTIONS, expect_options, logits_losses, reduced
from transducer_loss.band import Band
from transducer_loss.checks import choice


def rnnt_loss(
    logits: Tensor,
    targets: Any,
    logit_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    reduction: str = "mean",
    topology: str = "regular",
    normalized: bool = False,
    band: Band | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    clamp: float = 0.0,
    inplace: bool = False,
    validate: bool = False,
) -> Tensor:
    """Transducer loss of logits, with autograd.

    Parameters
    ----------
    logits : (B, T, U+1, V), or (B, T, S, V) with `band`, or (cells, V) tensor
        Any device, any float dtype, any strides.
    targets : (B, U) tensor of int
    logit_lengths, target_lengths : (B,) tensor or list of int
        On the host they cost no synchronisation.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    band : Band, optional
        As `prune` returns it: `logits` are of its cells.
    inplace : bool
        Write the gradient over the logits in backward, which saves their memory once more; a second backward then raises. Not
        in a graph of `torch.compile`.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, clamp, validate
        As of `transducer_loss.rnnt_loss`.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 logits, also under autocast.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import rnnt_loss
    >>> logits = torch.zeros(1, 4, 3, 5, requires_grad=True)
    >>> loss = rnnt_loss(logits, torch.tensor([[1, 2]]), [4], [2])
    >>> loss.backward()
    """
    choice(reduction, REDUCTIONS, "reduction")
    loss = logits_losses(
        logits, targets, logit_lengths, target_lengths, blank=blank, topology=topology, normalized=normalized, band=band,
        fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty, hat=hat, infeasible=infeasible, clamp=clamp,
        inplace=inplace, validate=validate,
    )  # fmt: skip
    return reduced(loss, reduction)


class RNNTLoss(torch.nn.Module):
    """`rnnt_loss` as a module: its keywords at construction, its tensors at the call.

    Parameters
    ----------
    **options
        Keywords of `rnnt_loss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import RNNTLoss
    >>> loss = RNNTLoss(blank=-1, reduction="sum")
    >>> loss(torch.zeros(1, 4, 3, 5), torch.tensor([[1, 2]]), [4], [2])
    tensor(7.3540)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        expect_options(rnnt_loss, options, "band")
        self.options = options

    def forward(self, logits: Tensor, targets: Any, logit_lengths: Any, target_lengths: Any) -> Tensor:
        """See `rnnt_loss`."""
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, **self.options)
