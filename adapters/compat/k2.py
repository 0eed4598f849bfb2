"""k2's pruned RNN-T by its own names, argument order and return values, for PyTorch.

An icefall recipe keeps its ``import k2``, since it needs other things of it, and changes the prefix of four calls::

    +from transducer_loss.adapters.compat import k2 as tl_k2
    -simple_loss, (px_grad, py_grad) = k2.rnnt_loss_smoothed(lm=lm, am=am, symbols=y, ..., return_grad=True)
    +simple_loss, (px_grad, py_grad) = tl_k2.rnnt_loss_smoothed(lm=lm, am=am, symbols=y, ..., return_grad=True)
    -ranges = k2.get_rnnt_prune_ranges(px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=prune_range)
    +ranges = tl_k2.get_rnnt_prune_ranges(px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=prune_range)
    -am_pruned, lm_pruned = k2.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
    +am_pruned, lm_pruned = tl_k2.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
    -pruned_loss = k2.rnnt_loss_pruned(logits=logits, symbols=y, ranges=ranges, termination_symbol=blank_id, ...)
    +pruned_loss = tl_k2.rnnt_loss_pruned(logits=logits, symbols=y, ranges=ranges, termination_symbol=blank_id, ...)

What differs: bad arguments raise ValueError or TypeError and not AssertionError; `boundary` must begin at 0, and costs a
synchronising copy where it is on a device; am and lm that lie too far apart for float32's exponentials, where k2's loss is
silently wrong, are summed exactly. With ``am_only_scale > 0`` the unigram average is over all rows of the batch, padding
included, so that a loss depends on its batch-mates: that is k2's value. `transducer_loss.adapters.torch.simple_rnnt_loss`
averages over the utterance's own rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.k2_ranges import (
    band_of,
    do_rnnt_pruning,
    expect_rows,
    get_rnnt_prune_ranges,
    lengths_of,
    monotonic_lower_bound,
    roll_by_shifts,
)
from transducer_loss.adapters.compat.shared import named
from transducer_loss.adapters.torch.autograd import REDUCTIONS, reduced
from transducer_loss.adapters.torch.operators import expect_tensor
from transducer_loss.adapters.torch.pruned import simple_losses
from transducer_loss.checks import choice, finite

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_prune_ranges",
    "monotonic_lower_bound",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "roll_by_shifts",
]

Occupancies = tuple[Tensor, Tensor]

_as_k2 = named(
    targets="symbols", blank="termination_symbol", topology="rnnt_type", logit_lengths="boundary", am_lengths="boundary",
    target_lengths="boundary",
)  # fmt: skip


def _options(termination_symbol: int, rnnt_type: str, delay_penalty: float) -> dict[str, Any]:
    if finite(delay_penalty, "delay_penalty") < 0:
        raise ValueError(f"delay_penalty: expected 0 or more, as k2 leaves any other out, got {delay_penalty}")
    return {"blank": termination_symbol, "topology": rnnt_type, "delay_penalty": delay_penalty}


@_as_k2
def rnnt_loss_smoothed(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, lm_only_scale: float = 0.1, am_only_scale: float = 0.1,
    boundary: Tensor | None = None, rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean",
    return_grad: bool = False,
) -> Tensor | tuple[Tensor, Occupancies]:  # fmt: skip
    """Smoothed simple loss, as ``k2.rnnt_loss_smoothed``.

    Parameters
    ----------
    lm, am : (B, S+1, C) and (B, T, C) tensor
    symbols : (B, S) tensor of int
    termination_symbol : int
    lm_only_scale, am_only_scale : float
    boundary : (B, 4) tensor of int, optional
    rnnt_type : {"regular", "modified", "constrained"}
    delay_penalty : float
    reduction : {"mean", "sum", "none"}
    return_grad : bool

    Returns
    -------
    Tensor, or (Tensor, (px_grad, py_grad))
        With `return_grad` also the occupancies of labels (B, S, T + 1), or (B, S, T) if not regular, and of blanks
        (B, S + 1, T).
    """
    choice(reduction, REDUCTIONS, "reduction")
    for value, name in ((am, "am"), (lm, "lm")):
        expect_rows(value, name)
    frames, labels = lengths_of(boundary, am.shape[0], am.shape[1], lm.shape[1] - 1)
    loss, occupancy = simple_losses(
        am, lm, (symbols, frames, labels), lm_only_scale=lm_only_scale, am_only_scale=am_only_scale, shared_unigram=True,
        infeasible="inf", fastemit_lambda=0.0, **_options(termination_symbol, rnnt_type, delay_penalty),
    )  # fmt: skip
    if not return_grad:
        return reduced(loss, reduction)
    px = occupancy.label[:, :, :-1].transpose(1, 2)
    if rnnt_type == "regular":  # no symbol after the last frame
        px = torch.nn.functional.pad(px, (0, 1))
    return reduced(loss, reduction), (px.contiguous(), occupancy.blank.transpose(1, 2).contiguous())


def rnnt_loss_simple(
    lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean", return_grad: bool = False,
) -> Tensor | tuple[Tensor, Occupancies]:  # fmt: skip
    """Simple loss, as ``k2.rnnt_loss_simple``: `rnnt_loss_smoothed` with both scales 0."""
    return rnnt_loss_smoothed(
        lm, am, symbols, termination_symbol, 0.0, 0.0, boundary, rnnt_type, delay_penalty, reduction, return_grad
    )


@_as_k2
def rnnt_loss(
    logits: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None, rnnt_type: str = "regular",
    delay_penalty: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Exact loss of logits (B, T, S+1, C), as ``k2.rnnt_loss``."""
    expect_tensor(logits, "logits")
    if logits.ndim != 4:
        raise ValueError(f"logits: expected 4 dimensions (B, T, S+1, C), got shape {tuple(logits.shape)}")
    frames, labels = lengths_of(boundary, logits.shape[0], logits.shape[1], logits.shape[2] - 1)
    return losses.rnnt_loss(
        logits, symbols, frames, labels, reduction=reduction, **_options(termination_symbol, rnnt_type, delay_penalty)
    )


@_as_k2
def rnnt_loss_pruned(
    logits: Tensor, symbols: Tensor, ranges: Tensor, termination_symbol: int, boundary: Tensor | None = None,
    rnnt_type: str = "regular", delay_penalty: float = 0.0, reduction: str = "mean", use_hat_loss: bool = False,
) -> Tensor:  # fmt: skip
    """Loss of the kept cells' logits (B, T, s_range, C), as ``k2.rnnt_loss_pruned``."""
    expect_tensor(logits, "logits")
    expect_tensor(symbols, "symbols")
    if logits.ndim != 4 or symbols.ndim != 2:
        raise ValueError(
            f"logits: expected 4 dimensions (B, T, s_range, C), and symbols (B, S), got shapes {tuple(logits.shape)} and "
            f"{tuple(symbols.shape)}"
        )
    frames, labels = lengths_of(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    band = band_of(ranges, tuple(logits.shape[:3]), frames, labels)
    return losses.rnnt_loss(
        logits, symbols, frames, labels, band=band, hat=use_hat_loss, reduction=reduction,
        **_options(termination_symbol, rnnt_type, delay_penalty),
    )  # fmt: skip
