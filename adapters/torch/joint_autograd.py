"""PyTorch: operators of the loss fused with the joint network, and its rules of autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_loss import joint_loss, logits_loss
from transducer_loss.adapters.torch.autograd import Gradients, anchored, once_differentiable, reduced
from transducer_loss.adapters.torch.operators import (
    OPTIONS,
    band_of,
    caller,
    classes_of,
    compute_dtype,
    core_arguments,
    operator,
    padded_to,
    plain,
    tensor_of,
)
from transducer_loss.adapters.torch.workspace import resolved
from transducer_loss.arrays import as_array
from transducer_loss.tiling import Problem

_INPUTS = (
    "Tensor encoder, Tensor predictor, Tensor weight, Tensor? bias, Tensor targets, Tensor encoder_lengths, "
    "Tensor target_lengths, Tensor? encoder_index, Tensor seed, Tensor[] band, Tensor[] classes, SymInt[] described"
)
_OPTIONS = f"str activation, float dropout, bool hat, str? workspace, float occupancy_floor, bool sparse, {OPTIONS}"


def _problem(
    encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, frames: Tensor, labels: Tensor,
    index: Tensor | None, seed: Tensor, band: list[Tensor], classes: list[Tensor], described: list[int], **options: Any,
) -> Problem:  # fmt: skip
    # Here, where a compiled graph does not see it.
    options["workspace"] = resolved(options["workspace"], encoder.device)
    return joint_loss.problem(
        encoder, predictor, weight, bias, targets, frames, labels, encoder_index=index, seed=int(seed), band=band_of(band),
        classes=classes_of(classes, described), **options, **core_arguments(encoder),
    )  # fmt: skip


def _gradient_shapes(
    encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, sparse: bool, **options: Any
) -> list[Tensor]:
    shapes = [encoder.shape, predictor.shape, weight.shape, weight.shape[:1]][: 3 if bias is None else 4]
    return [encoder.new_empty(shape, dtype=compute_dtype(encoder)) for shape in shapes]


def _loss_shapes(gradient: str, encoder: Tensor, predictor: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    real = compute_dtype(encoder)
    loss = encoder.new_empty((predictor.shape[0],), dtype=real)
    if gradient == "none":
        return [loss]
    if gradient != "later":
        return [loss, *_gradient_shapes(encoder, predictor, *arguments, **options)]
    sizes = [each.shape[0] for each in ((encoder, predictor) if arguments[5] is None else (encoder, predictor, predictor))]
    known = (torch.empty(size, dtype=torch.int64, device="cpu") for size in sizes)
    cells = (_most_cells(encoder, predictor),)
    return [loss, *known, loss.clone(), *(encoder.new_empty(cells, dtype=real) for _ in range(3))]


def _most_cells(encoder: Tensor, predictor: Tensor) -> int:
    return predictor.shape[0] * encoder.shape[1] * predictor.shape[1]


def _known(of: Problem) -> list[Tensor]:
    """Lengths, and the encoder index, of a checked problem, on the host: backward need not copy them again from a device."""
    arrays = (of.encoder_lengths, of.cells.labels, of.cells.encoders)
    return [torch.tensor(array, device="cpu") for array in arrays if array is not None]


@operator(f"joint_rnnt_loss(str gradient, {_INPUTS}, *, {_OPTIONS}) -> Tensor[]", _loss_shapes, padded=True)
def _loss(gradient: str, *arguments: Any, padded: bool = False, **options: Any) -> list[Tensor]:
    """Losses (B,); with "mean" or "sum" also the gradients, with "later" what they are to be made of."""
    encoder = arguments[0]
    with caller(encoder):
        of = _problem(*arguments, **options)
        share = 1.0 / len(arguments[1]) if gradient == "mean" else 1.0
        done = joint_loss.forward(of, weight=share, gradient=gradient != "none", later=gradient == "later")
        if gradient == "none":
            return [done.native]
        if done.gradients is not None:
            return [done.native, *(native for native in done.gradients.native if native is not None)]
        cells = list(map(tensor_of, done.saved.vectors)) if done.saved is not None else []
        if padded:
            cells = padded_to(cells, _most_cells(*arguments[:2]))
        return [done.native, *_known(of), tensor_of(done.loss), *cells]


@operator(
    f"joint_rnnt_loss_backward(Tensor upstream, Tensor[] saved, {_INPUTS}, *, {_OPTIONS}) -> Tensor[]",
    lambda upstream, saved, *arguments, **options: _gradient_shapes(*arguments, **options),
)
def _loss_backward(upstream: Tensor, saved: list[Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    """Gradients with the true upstream weights."""
    with caller(upstream):
        of = _problem(*arguments, **{**options, "validate": False})
        loss, *cells = (as_array(tensor, "saved") for tensor in saved)
        gradients = joint_loss.backward(of, joint_loss.Forward.resumed(loss, *cells), logits_loss.weights_of(of, upstream))
        return [native for native in gradients.native if native is not None]


class How(NamedTuple):
    """Of a call, all that is no tensor."""

    reduction: str
    gradient: str
    """When: "none", with the loss ("mean" or "sum"), or "later"."""
    rows: int
    """Tensors that are of a band; others are of classes."""
    described: list[int]
    options: dict[str, Any]


class JointLoss(torch.autograd.Function):
    """Scalar reductions make the gradients with the loss; ``"none"`` waits for the true upstream weights."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, how: How,
        targets: Tensor, frames: Tensor, labels: Tensor, index: Tensor | None, *others: Tensor,
    ) -> Tensor:  # fmt: skip
        """Others: the seed, and the tensors of a band and of classes."""
        # The seed is one of the others, for torch.compile takes a forward pass of two of them for one without `ctx`.
        seed, *rows = others
        inputs = (encoder, predictor, weight, bias)
        read = _one_dtype(*map(plain, inputs))
        band, classes = rows[: how.rows], rows[how.rows :]
        integers = (targets, frames, labels, index)
        loss, *saved = _loss(how.gradient, *read, *integers, seed, band, classes, how.described, **how.options)
        ctx.how, ctx.number = how, len(rows)
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        # Saved in this way, gradients are given up with the graph, and autograd notices when inputs were changed in between.
        if how.gradient == "later":
            known, cells = saved[:-4], saved[-4:]
            known += [None] * (3 - len(known))
            ctx.save_for_backward(*rows, *read, targets, *known, seed, *cells)
        else:
            by = [each for each in inputs if each is not None]
            needed = (native if each.requires_grad else None for native, each in zip(saved, by, strict=False))
            ctx.save_for_backward(*rows, *needed)
        if how.gradient != "none":
            anchored(ctx, *inputs)
        return reduced(loss, how.reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        """With the true upstream weights."""
        how, tensors = ctx.how, list(ctx.saved_tensors)  # read once, as torch.utils.checkpoint wants it
        rows, saved = tensors[: ctx.number], tensors[ctx.number :]
        band, classes = rows[: how.rows], rows[how.rows :]
        if how.gradient == "later":
            natives = _loss_backward(upstream, saved[9:], *saved[:9], band, classes, how.described, **how.options)
        else:
            natives = [None if native is None else native * upstream for native in saved]
        gradients = [
            native.to(dtype) if needed else None
            for native, dtype, needed in zip(natives, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        if how.options["sparse"]:
            vocabulary = how.described[0]
            gradients[2:] = [None if each is None else _sparse(classes[0], vocabulary, each) for each in gradients[2:]]
        return tuple(gradients)


def _sparse(ids: Tensor, vocab_size: int, values: Tensor) -> Tensor:
    """Gradient of the output layer that is 0 but for the rows of the classes."""
    each = values.shape[ids.ndim :]
    return torch.sparse_coo_tensor(
        ids.to(torch.int64).reshape(1, -1), values.reshape(-1, *each), (vocab_size, *each), check_invariants=False
    )  # fmt: skip


def _one_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, as a Linear would: parameters are float32 there, and so are their gradients, and activations half."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    kind = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(kind) if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )
