"""csukuangfj's optimized_transducer by its own names.

A recipe changes the import::

    -import optimized_transducer
    +from transducer_loss.adapters.compat import optimized_transducer

optimized_transducer's habits, kept:

- `logits` are packed, (sum_all_TU, V): the real cells alone, utterance after utterance, rows of t;
- in backward the gradient is written over the logits, which saves their memory (not with ``from_log_softmax=True``); the peer
  does so in forward, where losses that are only evaluated keep their logits in both. A second backward raises;
- ``from_log_softmax=True`` takes log-probabilities, and the gradient is by them;
- ``one_sym_per_frame=True`` is the `modified` topology whose last frame has to be a blank: of T_b frames T_b - 1 may have a
  label. k2's `modified` allows one in the last frame, too, so that its loss is lower. To leave that arc out the logits are
  copied.

What differs: ``reduction="none"`` works; an utterance with too few frames has loss inf and gradient 0 instead of anything;
``from_log_softmax`` may be left out, as in versions before it existed; targets and lengths may be int64 and lie on the host;
logits may have strides, half types, float64 elements and more than 2^31 of them; a target equal to blank gets the right
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.torch.autograd import REDUCTIONS
from transducer_loss.adapters.torch.operators import expect_tensor, plain
from transducer_loss.checks import choice, lengths

__all__ = ["TransducerLoss", "transducer_loss"]


def _without_last_label(logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """A copy in which no path emits its last label in its last frame: that cell, of (T_b - 1, U_b - 1), leads nowhere else."""
    expect_tensor(logits, "logits")
    expect_tensor(targets, "targets")
    if logits.ndim != 2 or targets.ndim != 2:
        raise ValueError(
            f"logits: expected 2 dimensions (sum_all_TU, V), and targets (B, U), got shapes {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    batch, cells = targets.shape[0], logits.shape[0]
    frames, labels = (
        torch.from_numpy(lengths(plain(value), name, batch, low, most, of))
        for value, name, low, most, of in (
            (logit_lengths, "logit_lengths", 1, cells, "cells"), (target_lengths, "target_lengths", 0, targets.shape[1], "U")
        )
    )  # fmt: skip
    past = (frames * (labels + 1)).cumsum(0)
    if past[-1] != cells:
        raise ValueError(f"logits: expected shape (sum_all_TU, V) of {past[-1]} cells, got {tuple(logits.shape)}")
    utterances = labels.nonzero()[:, 0]
    rows = (past - 2)[utterances].to(logits.device)
    last = plain(targets).to(logits.device)[utterances.to(logits.device), (labels[utterances] - 1).to(logits.device)]
    # No other class of these cells matters, and 0 has a normaliser whatever stood there. A label out of range is for the loss
    # to find.
    label = last.long().clamp(0, logits.shape[1] - 1)[:, None]
    return logits.index_put((rows,), logits.new_zeros(len(rows), logits.shape[1]).scatter(1, label, -torch.inf))


def transducer_loss(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int, from_log_softmax: bool = False,
    one_sym_per_frame: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Transducer loss, as ``optimized_transducer.transducer_loss``.

    Parameters
    ----------
    logits : (sum_all_TU, V) tensor
        Overwritten in backward, unless they are log-probabilities.
    targets : (B, U) tensor of int
    logit_lengths, target_lengths : (B,) tensor of int
    blank : int
    from_log_softmax : bool
    one_sym_per_frame : bool
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.

    Returns
    -------
    Tensor
        Scalar, or (B,).

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.optimized_transducer import transducer_loss
    >>> logits = torch.nn.Linear(8, 5)(torch.randn(4 * 3 + 2 * 2, 8))
    >>> targets = torch.tensor([[1, 2], [3, 0]])
    >>> transducer_loss(logits, targets, torch.tensor([4, 2]), torch.tensor([2, 1]), blank=0, from_log_softmax=False).backward()
    """
    if one_sym_per_frame:
        logits = _without_last_label(logits, targets, logit_lengths, target_lengths)
    return losses.rnnt_loss(
        logits, targets, logit_lengths, target_lengths, blank=blank, topology="modified" if one_sym_per_frame else "regular",
        normalized=from_log_softmax, inplace=not from_log_softmax, reduction=reduction,
    )  # fmt: skip


class TransducerLoss(torch.nn.Module):
    """`transducer_loss` as a module, as ``optimized_transducer.TransducerLoss``.

    Parameters
    ----------
    blank : int
    reduction : {"mean", "sum", "none"}

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.optimized_transducer import TransducerLoss
    >>> loss = TransducerLoss(blank=0, reduction="sum")
    >>> loss(torch.zeros(4 * 3, 5), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]), from_log_softmax=False)
    tensor(7.3540)
    """

    def __init__(self, blank: int, reduction: str = "mean") -> None:
        super().__init__()
        choice(reduction, REDUCTIONS, "reduction")
        self.blank, self.reduction = blank, reduction

    def forward(
        self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, from_log_softmax: bool = False,
        one_sym_per_frame: bool = False,
    ) -> Tensor:  # fmt: skip
        """See `transducer_loss`."""
        return transducer_loss(
            logits, targets, logit_lengths, target_lengths, self.blank, from_log_softmax, one_sym_per_frame, self.reduction
        )
