"""1ytic's warp-rnnt by its own names.

A recipe changes the import::

    -from warp_rnnt import rnnt_loss
    +from transducer_loss.adapters.compat.warp_rnnt import rnnt_loss

warp-rnnt's habits, kept:

- it takes log-probabilities, does not normalise them, and its gradient is by them: -gb at the blank, -ge at the label;
- ``average_frames=True`` divides each loss by its number of frames, before any reduction, and so its gradient;
- nothing is reduced unless asked for; ``"mean"`` is the mean over the batch;
- ``compact=True`` takes packed log-probabilities (cells, V), utterance after utterance, and labels in one row;
- ``blank=-1`` says that `log_probs` were gathered by the caller: two classes, the blank and the cell's own label; labels are
  not read then;
- with FastEmit the reported cost stays the negative log-likelihood.

What differs: it runs on the CPU, too; `gather` changes nothing, as two log-probabilities a cell are all that is ever kept
beside the gradient, which has their shape; float32 sums that disagree, where warp-rnnt prints and zeroes the gradient, do not
occur; labels and lengths may be int64 and lie on the host (``compact=True`` copies the label lengths of a device there);
log-probabilities may have strides, half types, float64 elements, more than 2^31 of them and longer padding; U = 0 works; a
label equal to blank gets the right gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.shared import named
from transducer_loss.adapters.torch.autograd import REDUCTIONS, reduced
from transducer_loss.adapters.torch.operators import as_tensor, expect_tensor, plain
from transducer_loss.checks import choice, integers, lengths

__all__ = ["rnnt_loss"]


def _padded(labels: Tensor, labels_lengths: Tensor, batch: int) -> Tensor:
    """(B, U) of labels in one row."""
    expect_tensor(labels, "labels")
    counts = lengths(plain(labels_lengths), "labels_lengths", batch, 0, labels.numel(), "labels").tolist()
    if tuple(labels.shape) != (sum(counts),):
        raise ValueError(f"labels: expected shape (sum of labels_lengths,) = ({sum(counts)},), got {tuple(labels.shape)}")
    return torch.nn.utils.rnn.pad_sequence(plain(labels).split(counts), batch_first=True)


@named(logits="log_probs", targets="labels", logit_lengths="frames_lengths", target_lengths="labels_lengths")
def rnnt_loss(
    log_probs: Tensor, labels: Tensor, frames_lengths: Tensor, labels_lengths: Tensor, average_frames: bool = False,
    reduction: str | None = None, blank: int = 0, gather: bool = False, fastemit_lambda: float = 0.0, compact: bool = False,
) -> Tensor:  # fmt: skip
    """Transducer loss, as ``warp_rnnt.rnnt_loss``.

    Parameters
    ----------
    log_probs : (B, T, U+1, V) tensor, or (cells, V) with `compact`
    labels : (B, U) tensor of int, or (sum of labels_lengths,) with `compact`
    frames_lengths, labels_lengths : (B,) tensor of int
    average_frames : bool
    reduction : {"mean", "sum", "none"} or None
    blank : int
        -1: `log_probs` are gathered, V = 2.
    gather : bool
        Of no effect.
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148).
    compact : bool

    Returns
    -------
    Tensor
        (B,), or scalar.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.warp_rnnt import rnnt_loss
    >>> log_probs = torch.zeros(1, 4, 3, 5, requires_grad=True).log_softmax(-1)
    >>> rnnt_loss(log_probs, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]), average_frames=True)
    tensor([1.8385], grad_fn=<DivBackward0>)
    """
    reduction = "none" if reduction is None else reduction
    choice(reduction, REDUCTIONS, "reduction")
    expect_tensor(log_probs, "log_probs")
    if compact:
        labels = _padded(labels, labels_lengths, integers(plain(frames_lengths), "frames_lengths").size)
    if blank == -1:
        if log_probs.shape[-1:] != (2,):
            raise ValueError(f"log_probs: expected 2 classes (blank, label) with blank=-1, got shape {tuple(log_probs.shape)}")
        labels, blank = torch.ones_like(as_tensor(plain(labels), "labels")), 0
    loss = losses.rnnt_loss(
        log_probs, labels, frames_lengths, labels_lengths, blank=blank, normalized=True, reduction="none",
        fastemit_lambda=fastemit_lambda,
    )  # fmt: skip
    if average_frames:
        loss = loss / torch.as_tensor(frames_lengths).to(loss)
    return reduced(loss, reduction)
