"""PyTorch: the losses as functions and modules with autograd, on every device, dtype and stream.

Under ``torch.compile`` each of them is an operator of the graph: no break, and no new compilation for other lengths or labels.
Lengths in tensors, on the host or a device, take one graph; lists of int take two, the first of which serves one step alone.
`Band` and `Classes` may be made inside or outside; those made inside have tensors for attributes. Saved arrays are as large as
padded lattices there. These break a graph, and with ``fullgraph=True`` raise: ``inplace=True``, ``sparse=True``,
``process_group=``, `samplewise_rnnt_loss`, and `gather_predictor` of a band made in the same region. An option that is a float
is part of the graph: one that changes from step to step, as a schedule of ``fastemit_lambda``, compiles for each of its values.

No loss can be differentiated twice, and trying to raises. Of a graph of ``torch.compile`` it is torch that refuses, and only
``backward()`` surely does: like ``log_softmax`` there, ``autograd.grad`` of a penalty on the gradient leaves the penalty out.

A CUDA graph can be captured of a loss with ``occupancy_floor=0`` and lengths on the host, which are then those of every replay;
labels on the device are read at each, a dropout's seed is the captured one. Call the step a few times before, on the stream of
the capture, so that kernels are compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch_autograd import REDUCTIONS, expect_options, logits_losses, reduced
from transducer_loss.adapters.torch_band import gather_predictor, prune
from transducer_loss.adapters.torch_joint import JointRNNTLoss, joint_rnnt_loss
from transducer_loss.adapters.torch_pruned import PrunedLosses, PrunedRNNTLoss, simple_rnnt_loss
from transducer_loss.adapters.torch_sampled import labels_in, sample_classes
from transducer_loss.adapters.torch_samplewise import SamplewiseRNNTLoss, samplewise_rnnt_loss
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
