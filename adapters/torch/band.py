"""PyTorch: the band of a pruned loss (arXiv 2206.13236), and the predictor's rows that it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss import pruning
from transducer_loss.adapters.torch.autograd import Gradients, anchored, once_differentiable
from transducer_loss.adapters.torch.operators import (
    as_tensor,
    band_of,
    band_tensors,
    caller,
    compute_dtype,
    core_arguments,
    expect_tensor,
    operator,
    plain,
    recorded,
    tensor_of,
    uncompiled,
)
from transducer_loss.band import Band, expect_band
from transducer_loss.paths import Occupancy


def _band_shapes(blank: Tensor, label: Tensor, frames: Tensor, *arguments: Any) -> list[Tensor]:
    rows = [blank.new_empty(blank.shape[:2], dtype=torch.int32) for _ in range(2)]
    numbers = [torch.empty(shape, dtype=torch.int64, device="cpu") for shape in (frames.shape, frames.shape, ())]
    return [*rows, *numbers, blank.new_empty(blank.shape[:1], dtype=compute_dtype(blank))]


@operator(
    "prune(Tensor blank, Tensor label, Tensor am_lengths, Tensor target_lengths, int s_range, str strategy, str topology) "
    "-> Tensor[]",
    _band_shapes,
)
def _pruned(
    blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor, s_range: int, strategy: str, topology: str
) -> list[Tensor]:
    """First and end of the rows, lengths and width, which are on the host, and the kept mass."""
    with caller(blank):
        band = pruning.pruned(
            Occupancy(blank, label, None), frames, labels, s_range=s_range, strategy=strategy, topology=topology,
            **core_arguments(blank),
        )  # fmt: skip
        rows, mass = [tensor_of(band.first), tensor_of(band.end)], tensor_of(band.mass)
    return [*rows, torch.from_numpy(band.frames), torch.from_numpy(band.labels), torch.tensor(band.width, device="cpu"), mass]


def prune(
    occupancy: Occupancy, am_lengths: Any, target_lengths: Any, *, s_range: int = 5, strategy: str = "local",
    topology: str = "regular",
) -> Band:  # fmt: skip
    """Band of the labels that matter in each frame: `transducer_loss.prune`, on the caller's stream and memory.

    Parameters
    ----------
    occupancy : Occupancy
        As `simple_rnnt_loss` returns it.
    am_lengths, target_lengths : (B,) tensor or list of int
    s_range, strategy, topology
        As of `transducer_loss.prune`.

    Returns
    -------
    Band
    """
    if not all(isinstance(getattr(occupancy, name, None), Tensor) for name in ("blank", "label")):
        return pruning.prune(
            occupancy, plain(am_lengths), plain(target_lengths), s_range=s_range, strategy=strategy, topology=topology
        )
    lengths = (as_tensor(am_lengths, "am_lengths"), as_tensor(target_lengths, "target_lengths"))
    *tensors, mass = _pruned(occupancy.blank.detach(), occupancy.label.detach(), *lengths, s_range, strategy, topology)
    if recorded(occupancy.blank):
        first, end, frames, labels, width = tensors
        return Band(first, end, width, frames, labels, s_range, mass)  # of tensors, in a graph
    band: Band = band_of(tensors, s_range, mass)
    return band


@operator(
    "gather_predictor(Tensor predictor, Tensor[] band, SymInt width) -> Tensor",
    lambda predictor, band, width: predictor.new_empty(
        (predictor.shape[0], band[0].shape[1], width, predictor.shape[2])
    ),
)
def _gathered(predictor: Tensor, band: list[Tensor], width: int) -> Tensor:
    with caller(predictor):
        return pruning.gathered(predictor, band_of(band), **core_arguments(predictor))  # type: ignore[no-any-return]


@operator(
    "gather_predictor_backward(Tensor upstream, Tensor[] band, SymInt labels) -> Tensor",
    lambda upstream, band, labels: upstream.new_empty((upstream.shape[0], labels, upstream.shape[3])),
)
def _gathered_backward(upstream: Tensor, band: list[Tensor], labels: int) -> Tensor:
    with caller(upstream):
        return pruning.gathered_backward(  # type: ignore[no-any-return]
            upstream, band_of(band), labels, **core_arguments(upstream)
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predictor: Tensor, width: int, *band: Tensor) -> Tensor:
        ctx.labels = predictor.shape[1] if predictor.ndim == 3 else 0
        ctx.save_for_backward(*band)
        anchored(ctx, predictor)
        return _gathered(predictor.detach(), list(band), width)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        band = list(ctx.saved_tensors)
        return (_gathered_backward(upstream, band, ctx.labels),)


_gather_unknown = uncompiled(
    lambda predictor, width, *band: _Gather.apply(predictor, int(width), *band),
    "the width of a band that a compiled region has made is no number there: gather the predictor outside of it",
)  # fmt: skip


def gather_predictor(predictor: Tensor, band: Band) -> Tensor:
    """The predictor's rows of a band's cells, with autograd, for a joiner of one's own.

    Parameters
    ----------
    predictor : (B, U+1, H) tensor
    band : Band
        In a graph of `torch.compile` one made outside of it, as the width is part of the result's shape.

    Returns
    -------
    (B, T, S, H) tensor
        To be joined with ``encoder[:, :, None]``; the logits of it go to ``rnnt_loss(..., band=band)``.
    """
    expect_tensor(predictor, "predictor")
    expect_band(band)
    apply = _gather_unknown if isinstance(band.width, Tensor) else _Gather.apply
    return apply(predictor, band.width, *band_tensors(band))  # type: ignore[no-any-return]
