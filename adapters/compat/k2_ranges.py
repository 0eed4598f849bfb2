"""k2's helpers of pruning by its own names: see `transducer_loss.adapters.compat.k2`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from transducer_loss import pruning
from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.shared import named
from transducer_loss.adapters.torch.operators import caller, core_arguments, expect_tensor
from transducer_loss.arrays import as_array
from transducer_loss.band import Band
from transducer_loss.checks import whole_number
from transducer_loss.paths import Occupancy


def lengths_of(boundary: Any, batch: int, frames: int, labels: int) -> tuple[list[int], list[int]]:
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


def expect_rows(value: Any, name: str) -> None:
    """Raise unless `value` is a tensor of rows (B, rows, C)."""
    expect_tensor(value, name)
    if value.ndim != 3:
        raise ValueError(f"{name}: expected 3 dimensions (B, rows, C), got shape {tuple(value.shape)}")


def band_of(ranges: Tensor, shape: tuple[int, ...], frames: list[int], labels: list[int]) -> Band:
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


@named(am_lengths="boundary", target_lengths="boundary")
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
            Occupancy(blank, label, None), *lengths_of(boundary, batch, frames, columns - 1), s_range=s_range,
            strategy="local", topology="regular" if regular else "modified", as_k2=True, **core_arguments(py_grad),
        )  # fmt: skip
        first = torch.as_tensor(band.first, device=py_grad.device).to(torch.int64)
    return first[:, :, None] + torch.arange(band.width, device=py_grad.device)


@named(predictor="lm")
def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of am and lm for the kept cells, each (B, T, s_range, C), as ``k2.do_rnnt_pruning``; am is not copied."""
    for value, name in ((am, "am"), (lm, "lm")):
        expect_rows(value, name)
    batch, frames = am.shape[:2]
    if lm.shape[0] != batch:
        raise ValueError(f"lm: expected shape (B, S+1, C) of B = {batch} as am, got {tuple(lm.shape)}")
    band = band_of(ranges, (batch, frames), [frames] * batch, [lm.shape[1] - 1] * batch)
    return am[:, :, None].expand(-1, -1, ranges.shape[2], -1), losses.gather_predictor(lm, band)


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
