"""PyTorch: the losses as functions and modules with autograd, on every device, dtype and stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.samplewise import SamplewiseRNNTLoss, samplewise_rnnt_loss
from transducer_loss.adapters.torch_autograd import (
    REDUCTIONS,
    LogitsLoss,
    expect_tensor,
    followed,
    plain,
    reduced,
)
from transducer_loss.adapters.torch_joint import JointRNNTLoss, joint_rnnt_loss
from transducer_loss.adapters.torch_pruned import (
    PrunedLosses,
    PrunedRNNTLoss,
    gather_predictor,
    prune,
    simple_rnnt_loss,
)
from transducer_loss.adapters.torch_sampled import labels_in, sample_classes
from transducer_loss.band import Band
from transducer_loss.checks import choice
from transducer_loss.classes import Classes

__all__ = [
    "Band",
    "Classes",
    "JointRNNTLoss",
    "PrunedLosses",
    "PrunedRNNTLoss",
    "RNNTLoss",
    "SamplewiseRNNTLoss",
    "gather_predictor",
    "joint_rnnt_loss",
    "labels_in",
    "prune",
    "rnnt_loss",
    "sample_classes",
    "samplewise_rnnt_loss",
    "simple_rnnt_loss",
]


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
        Write the gradient over the logits in backward, which saves their memory once more; a second backward then raises.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, validate
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
    options = {
        "blank": blank, "topology": topology, "normalized": normalized, "band": band, "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible, "validate": validate,
    }  # fmt: skip
    expect_tensor(logits, "logits")
    arguments = (plain(targets), plain(logit_lengths), plain(target_lengths))
    loss = LogitsLoss.apply(*followed(logits), inplace, arguments, options)
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
        self.options = options
        choice(options.get("reduction", "mean"), REDUCTIONS, "reduction")

    def forward(self, logits: Tensor, targets: Any, logit_lengths: Any, target_lengths: Any) -> Tensor:
        """See `rnnt_loss`."""
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, **self.options)
