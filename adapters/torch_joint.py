"""PyTorch: the loss fused with the joint network, as a function and as a module that owns the output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss import joint_loss, logits_loss
from transducer_loss.adapters.torch_autograd import (
    REDUCTIONS,
    Gradients,
    caller,
    core_arguments,
    expect_tensor,
    followed,
    once_differentiable,
    plain,
    reduced,
    tensor_of,
)
from transducer_loss.band import Band
from transducer_loss.checks import choice
from transducer_loss.classes import Classes


class _JointLoss(torch.autograd.Function):
    """Scalar reductions make the gradients with the loss; ``"none"`` waits for the true upstream weights."""

    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None, reduction: str,
        arguments: tuple[Any, ...], options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        inputs = (encoder, predictor, weight, bias)
        with caller(encoder):
            of = joint_loss.problem(*_one_dtype(*map(plain, inputs)), *arguments, **options, **core_arguments(encoder))
            needed, later = any(ctx.needs_input_grad), reduction == "none"
            share = 1.0 / len(of.cells.frames) if reduction == "mean" else 1.0
            done = joint_loss.forward(of, weight=share, gradient=needed, later=later)
        ctx.later, ctx.dtypes = later, [None if each is None else each.dtype for each in inputs]
        ctx.classes = of.classes if of.sparse else None
        # Saved in this way, gradients are given up with the graph, and autograd notices when inputs were changed in between.
        if later:
            ctx.of, ctx.done = of, done
            ctx.save_for_backward(*inputs, *(tensor for tensor in arguments[:1] if isinstance(tensor, Tensor)))
        elif done.gradients is not None:
            ctx.save_for_backward(*done.gradients.native)
        return reduced(done.native, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        natives = ctx.saved_tensors
        if ctx.later:
            with caller(natives[0]):
                weights = logits_loss.weights_of(ctx.of, upstream)
                natives, upstream = joint_loss.backward(ctx.of, ctx.done, weights).native, torch.ones_like(upstream[0])
        gradients = [
            (native * upstream).to(dtype) if native is not None and needed else None
            for native, dtype, needed in zip(natives, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        if ctx.classes is not None:
            with caller(natives[0]):
                gradients[2:] = [None if values is None else _sparse(ctx.classes, values) for values in gradients[2:]]
        return (*gradients, None, None, None)


def _sparse(classes: Classes, values: Tensor) -> Tensor:
    """Gradient of the output layer that is 0 but for the rows of the classes."""
    ids = tensor_of(classes.ids).to(torch.int64)
    each = values.shape[ids.ndim :]
    return torch.sparse_coo_tensor(
        ids.reshape(1, -1), values.reshape(-1, *each), (classes.vocab_size, *each), check_invariants=False
    )  # fmt: skip


def joint_rnnt_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    activation: str = "tanh",
    blank: int = 0,
    reduction: str = "mean",
    topology: str = "regular",
    band: Band | None = None,
    classes: Classes | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    workspace: int | str | None = None,
    occupancy_floor: float = 1e-6,
    sparse: bool = False,
    validate: bool = False,
) -> Tensor:
    """Transducer loss fused with the joint network, with autograd, in bounded memory.

    Parameters
    ----------
    encoder : (B, T, H) tensor
    predictor : (B, U+1, H) tensor
    weight : (V, H) tensor
        Of the output layer, as ``torch.nn.Linear(H, V).weight``.
    bias : (V,) tensor or None
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch. Scalar reductions make the gradients together with the loss.
    seed : int, optional
        Of the dropout; drawn from torch's generator where it is None.
    band : Band, optional
        As `prune` returns it: only its cells are ever projected.
    classes : Classes, optional
        As `sample_classes` returns them: only their rows of weight and bias are read.
    sparse : bool
        With `classes`, make the gradients of weight and bias sparse tensors, as ``torch.nn.Embedding(sparse=True)`` does: K
        rows, or B K with classes per utterance. ``SGD``, ``Adagrad`` and ``SparseAdam`` take them, without weight decay.
    activation, dropout, workspace, occupancy_floor and the others
        As of `transducer_loss.joint_rnnt_loss`.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 inputs. Under autocast all inputs but float64 ones are brought to
        autocast's dtype, the whole weight, too.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import joint_rnnt_loss
    >>> encoder, predictor = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
    >>> output = torch.nn.Linear(16, 50)
    >>> targets = torch.randint(1, 50, (2, 7))
    >>> loss = joint_rnnt_loss(encoder, predictor, output.weight, output.bias, targets, [30, 21], [7, 4])
    >>> loss.backward()
    """
    choice(reduction, REDUCTIONS, "reduction")
    if dropout and seed is None:
        seed = int(torch.randint(1 << 62, ()).item())
    options = {
        "activation": activation, "blank": blank, "topology": topology, "band": band, "classes": classes,
        "dropout": dropout, "seed": seed or 0, "sparse": sparse,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
        "workspace": workspace, "occupancy_floor": occupancy_floor, "validate": validate,
    }  # fmt: skip
    for value, name in ((encoder, "encoder"), (predictor, "predictor"), (weight, "weight"), (bias, "bias")):
        if name != "bias" or value is not None:
            expect_tensor(value, name)
    inputs = followed(encoder, predictor, weight, bias)
    arguments = (plain(targets), plain(encoder_lengths), plain(target_lengths))
    loss: Tensor = _JointLoss.apply(*inputs, reduction, arguments, options)
    return loss


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


class JointRNNTLoss(torch.nn.Module):
    """`joint_rnnt_loss` with its output layer (`weight`, `bias`) as parameters. Dropout acts in training mode only.

    Parameters
    ----------
    features, classes : int
        H and V.
    bias : bool
    dropout : float
    sparse : bool
        Of the gradients of the output layer, in calls with `classes`.
    **options
        Keywords of `joint_rnnt_loss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import JointRNNTLoss
    >>> loss = JointRNNTLoss(16, 50, dropout=0.1, activation="relu")
    >>> loss(torch.randn(2, 30, 16), torch.randn(2, 8, 16), torch.randint(1, 50, (2, 7)), [30, 21], [7, 4]).backward()
    >>> loss.output.weight.grad.shape
    torch.Size([50, 16])
    """

    def __init__(
        self, features: int, classes: int, *, bias: bool = True, dropout: float = 0.0, sparse: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.output = torch.nn.Linear(features, classes, bias=bias)
        self.dropout, self.sparse, self.options = dropout, sparse, options
        choice(options.get("reduction", "mean"), REDUCTIONS, "reduction")

    def forward(
        self, encoder: Tensor, predictor: Tensor, targets: Any, encoder_lengths: Any, target_lengths: Any, *,
        band: Band | None = None, classes: Classes | None = None,
    ) -> Tensor:  # fmt: skip
        """See `joint_rnnt_loss`; `band` and `classes` are of this batch."""
        return joint_rnnt_loss(
            encoder, predictor, self.output.weight, self.output.bias, targets, encoder_lengths, target_lengths,
            band=band, classes=classes, dropout=self.dropout if self.training else 0.0,
            sparse=self.sparse and classes is not None, **self.options,
        )  # fmt: skip
