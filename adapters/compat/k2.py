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

import numpy as np
import torch
from torch import Tensor

from transducer_loss import pruning
from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.torch_autograd import REDUCTIONS, caller, core_arguments, expect_tensor, reduced
from transducer_loss.adapters.torch_pruned import simple_losses
from transducer_loss.arrays import as_array
from transducer_loss.band import Band
from transducer_loss.checks import choice, finite, whole_number
from transducer_loss.paths import Occupancy

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


def _lengths(boundary: Any, batch: int, frames: int, labels: int) -> tuple[list[int], list[int]]:
    """T_b and U_b of k2's (B, 4) begin_symbol, begin_frame, end_symbol, end_frame."""
    if boundary is None:
        return [frames] * batch, [labels] * batch
    expect_tensor(boundary, "boundary")
    if tuple(boundary.shape) != (batch, 4):
        raise ValueError(f"boundary: expected shape (B, 4) = ({batch}, 4), got {tuple(boundary.shape)}")
    rows = boundary.tolist()
    for b, row in enumerate(rows):
        if row[0] != 0 or row[1] != 0:
            raise ValueError(f"boundary: expected to begin at symbol 0 and frame 0, got {row} at index {b}")
    return [row[3] for row in rows], [row[2] for row in rows]


def _expect_rows(value: Any, name: str) -> None:
    expect_tensor(value, name)
    if value.ndim != 3:
        raise ValueError(f"{name}: expected 3 dimensions (B, rows, C), got shape {tuple(value.shape)}")


def _options(termination_symbol: int, rnnt_type: str, delay_penalty: float) -> dict[str, Any]:
    if finite(delay_penalty, "delay_penalty") < 0:
        raise ValueError(f"delay_penalty: expected 0 or more, as k2 leaves any other out, got {delay_penalty}")
    return {"blank": termination_symbol, "topology": rnnt_type, "delay_penalty": delay_penalty}


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
        _expect_rows(value, name)
    frames, labels = _lengths(boundary, am.shape[0], am.shape[1], lm.shape[1] - 1)
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


def rnnt_loss(
    logits: Tensor, symbols: Tensor, termination_symbol: int, boundary: Tensor | None = None, rnnt_type: str = "regular",
    delay_penalty: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Exact loss of logits (B, T, S+1, C), as ``k2.rnnt_loss``."""
    expect_tensor(logits, "logits")
    if logits.ndim != 4:
        raise ValueError(f"logits: expected 4 dimensions (B, T, S+1, C), got shape {tuple(logits.shape)}")
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], logits.shape[2] - 1)
    return losses.rnnt_loss(
        logits, symbols, frames, labels, reduction=reduction, **_options(termination_symbol, rnnt_type, delay_penalty)
    )


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> Tensor:
    """Labels to keep of each frame, as ``k2.get_rnnt_prune_ranges``.

    Parameters
    ----------
    px_grad : (B, S, T + 1) or (B, S, T) tensor
    py_grad : (B, S + 1, T) tensor
    boundary : (B, 4) tensor of int
    s_range : int
        At most S + 1 of them are kept. As in k2 it is not raised: where it is too narrow for any path, the pruned loss is inf.

    Returns
    -------
    (B, T, s_range) tensor of int64
    """
    expect_tensor(px_grad, "px_grad")
    expect_tensor(py_grad, "py_grad")
    if py_grad.ndim != 3:
        raise ValueError(f"py_grad: expected 3 dimensions (B, S+1, T), got shape {tuple(py_grad.shape)}")
    batch, columns, frames = py_grad.shape
    if px_grad.shape not in ((batch, columns - 1, frames), (batch, columns - 1, frames + 1)):
        raise ValueError(
            f"px_grad: expected shape (B, S, T) or (B, S, T + 1) = ({batch}, {columns - 1}, {frames} or {frames + 1}), "
            f"got {tuple(px_grad.shape)}"
        )
    regular = px_grad.shape[2] == frames + 1
    if regular and whole_number(s_range, "s_range", 1) < 2 and columns > 1:
        raise ValueError(f"s_range: expected 2 or more for the regular type, got {s_range}")
    label = torch.nn.functional.pad(px_grad.detach()[:, :, :frames], (0, 0, 0, 1)).transpose(1, 2)
    blank = py_grad.detach().transpose(1, 2)
    with caller(py_grad):
        band = pruning.pruned(
            Occupancy(blank, label, None), *_lengths(boundary, batch, frames, columns - 1), s_range=s_range,
            strategy="local", topology="regular" if regular else "modified", as_k2=True, **core_arguments(py_grad),
        )  # fmt: skip
        first = torch.as_tensor(band.first).to(torch.int64)
    return first[:, :, None] + torch.arange(band.width, device=py_grad.device)


def _band(ranges: Tensor, shape: tuple[int, ...], frames: list[int], labels: list[int]) -> Band:
    """The band of k2's ranges; an impossible row, which only the device knows, makes the loss NaN."""
    expect_tensor(ranges, "ranges")
    if ranges.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"ranges: expected integers, got {ranges.dtype}")
    if ranges.ndim != 3 or tuple(ranges.shape[: len(shape)]) != shape or 0 in ranges.shape:
        raise ValueError(f"ranges: expected shape (B, T, s_range), beginning with {shape}, got {tuple(ranges.shape)}")
    width = ranges.shape[2]
    with caller(ranges):
        first = ranges[:, :, 0].to(torch.int64)
        consecutive = (ranges == first[:, :, None] + torch.arange(width, device=ranges.device)).all(dim=2)
        first = torch.where(consecutive, first.clamp(-1, 2**31 - 1 - width), -1).to(torch.int32)
        begin, end = (as_array(each, "ranges") for each in (first, first + width))
    return Band(begin, end, width, np.asarray(frames), np.asarray(labels), width)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of am and lm for the kept cells, each (B, T, s_range, C), as ``k2.do_rnnt_pruning``; am is not copied."""
    for value, name in ((am, "am"), (lm, "lm")):
        _expect_rows(value, name)
    batch, frames = am.shape[:2]
    band = _band(ranges, (batch, frames), [frames] * batch, [lm.shape[1] - 1] * batch)
    return am[:, :, None].expand(-1, -1, ranges.shape[2], -1), losses.gather_predictor(lm, band)


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
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    band = _band(ranges, tuple(logits.shape[:3]), frames, labels)
    return losses.rnnt_loss(
        logits, symbols, frames, labels, band=band, hat=use_hat_loss, reduction=reduction,
        **_options(termination_symbol, rnnt_type, delay_penalty),
    )  # fmt: skip


def monotonic_lower_bound(src: Tensor) -> Tensor:
    """Smallest of each element and those after it along the last dimension, as ``k2.monotonic_lower_bound``.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat import k2
    >>> k2.monotonic_lower_bound(torch.tensor([0, 2, 1, 3, 6, 5, 8]))
    tensor([0, 1, 1, 3, 5, 5, 8])
    """
    expect_tensor(src, "src")
    return src.flip(-1).cummin(-1).values.flip(-1)


def roll_by_shifts(src: Tensor, shifts: Tensor) -> Tensor:
    """Each row of src (B, T, S) rolled to the right by its own shift (B, T), as k2 documents it.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat import k2
    >>> k2.roll_by_shifts(torch.arange(10).reshape(1, 2, 5), torch.tensor([[1, 2]]))
    tensor([[[4, 0, 1, 2, 3],
             [8, 9, 5, 6, 7]]])
    """
    expect_tensor(src, "src")
    columns = torch.arange(src.shape[-1], device=src.device)
    return src.gather(-1, (columns - shifts[..., None]) % src.shape[-1])
