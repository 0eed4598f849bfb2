"""PyTorch: the Tied & Reduced decoder (arXiv 2109.07513): a predictor whose embeddings are the joint's output layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.autograd import Gradients, anchored, once_differentiable
from transducer_loss.adapters.torch.operators import as_tensor, caller, core_arguments, expect_tensor, operator
from transducer_loss.checks import dropout_rate, whole_number
from transducer_loss.reduced_predictor import averaged, averaged_backward


def _shape(
    embedding: Tensor, positions: Tensor, targets: Tensor, lengths: Tensor, *, last: bool, validate: bool | None
) -> Tensor:
    rows = targets.shape[:1] if last else (targets.shape[0], targets.shape[1] + 1)
    return embedding.new_empty((*rows, embedding.shape[1]))


@operator(
    "reduced_predictor(Tensor embedding, Tensor positions, Tensor targets, Tensor target_lengths, *, bool last, "
    "bool? validate) -> Tensor",
    _shape,
)
def _averaged(embedding: Tensor, *arguments: Tensor, last: bool, validate: bool | None) -> Tensor:
    with caller(embedding):
        return averaged(  # type: ignore[no-any-return]
            embedding, *arguments, last=last, validate=validate, **core_arguments(embedding)
        )


@operator(
    "reduced_predictor_backward(Tensor upstream, Tensor embedding, Tensor positions, Tensor targets, Tensor target_lengths, "
    "*, bool last) -> Tensor[]",
    lambda upstream, embedding, positions, *arguments, **options: [
        each.new_empty(each.shape) for each in (embedding, positions)
    ],
)
def _averaged_backward(upstream: Tensor, *arguments: Tensor, last: bool) -> list[Tensor]:
    with caller(upstream):
        grads = averaged_backward(upstream, *arguments, last=last, validate=None, **core_arguments(upstream))
    return [grads.embedding, grads.positions]


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, positions: Tensor, last: bool, validate: bool, targets: Tensor, lengths: Tensor
    ) -> Tensor:
        ctx.save_for_backward(embedding, positions, targets, lengths)
        ctx.last = last
        anchored(ctx, embedding, positions)
        return _averaged(  # type: ignore[no-any-return]
            embedding.detach(), positions.detach(), targets, lengths, last=last, validate=validate
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        embedding, positions, *integers = ctx.saved_tensors
        return tuple(_averaged_backward(upstream, embedding.detach(), positions.detach(), *integers, last=ctx.last))


def reduced_predictor(
    embedding: Tensor, positions: Tensor, targets: Any, target_lengths: Any, *, last: bool = False, validate: bool = False
) -> Tensor:
    """Average of the embeddings of the last N labels, each weighted by position vectors (arXiv 2109.07513), with autograd.

    Parameters
    ----------
    embedding : (V, E) tensor
        Any device, any float dtype. Of a tied decoder, the weight of the joint's output layer.
    positions : (heads, N, E) tensor
        n = 0 is for the label just emitted.
    targets : (B, U) tensor of int
    target_lengths : (B,) tensor or list of int
    last : bool
        Give row U_b alone.
    validate : bool
        Also check labels and lengths that are on a device, which synchronises.

    Returns
    -------
    (B, U+1, E) tensor
        In the dtype of the embedding, also under autocast, like ``torch.nn.functional.embedding``; with `last` (B, E).

    Notes
    -----
    See `transducer_loss.reduced_predictor`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import reduced_predictor
    >>> output, positions = torch.nn.Linear(16, 50), torch.randn(4, 5, 16, requires_grad=True)
    >>> reduced_predictor(output.weight, positions, torch.randint(1, 50, (2, 7)), [7, 4]).shape
    torch.Size([2, 8, 16])
    """
    expect_tensor(embedding, "embedding")
    expect_tensor(positions, "positions")
    return _Average.apply(  # type: ignore[no-any-return]
        embedding, positions, last, validate, as_tensor(targets, "targets"), as_tensor(target_lengths, "target_lengths")
    )


class TiedReducedDecoder(torch.nn.Module):
    """Prediction network without recurrence: `reduced_predictor`, a projection, LayerNorm and Swish (arXiv 2109.07513).

    Its embeddings are the rows of the joint's output layer, which makes for most of its parameters: give it that layer's
    `weight`, or give the layer its own. As elsewhere in torch the parameter has two names then, ``parameters()`` of a model of
    both modules has it once, both gradients add up in it, and a copy of that model ties its own two. What gives a model other
    parameters, as ``load_state_dict(assign=True)`` does, unties it: set ``decoder.weight`` again then.

    Parameters
    ----------
    features, classes : int
        E and V, as of `JointRNNTLoss`.
    heads, context : int
        Position vectors for each of the last `context` labels.
    weight : (V, E) Parameter, optional
        Of the joint's output layer. Otherwise one is made as that of ``torch.nn.Linear(features, classes)``.
    dropout : float
        Of the result, in training mode.
    device, dtype
        Of the parameters; those of `weight`, where one is given.

    Attributes
    ----------
    weight : (V, E) Parameter
    positions : (heads, context, E) Parameter

    Notes
    -----
    Formula, tie, projection, LayerNorm and Swish are the paper's. Default sizes, dropout and initial values are this library's:
    position vectors are drawn so large that the average is about as large as an embedding, and the projection has no bias, as
    LayerNorm has one.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import JointRNNTLoss, TiedReducedDecoder
    >>> loss = JointRNNTLoss(16, 50)
    >>> decoder = TiedReducedDecoder(16, 50, weight=loss.output.weight)
    >>> targets, lengths = torch.randint(1, 50, (2, 7)), torch.tensor([7, 4])
    >>> loss(torch.randn(2, 30, 16), decoder(targets, lengths), targets, [30, 21], lengths).backward()

    In decoding, it is the predictor of `greedy` and `beam_search`:

    >>> from transducer_loss.adapters.torch import greedy
    >>> path = greedy(
    ...     torch.randn(2, 30, 16), [30, 21], decoder.step, lambda encoder, features: loss.output((encoder + features).tanh())
    ... )
    """

    def __init__(
        self, features: int, classes: int, *, heads: int = 4, context: int = 5, weight: torch.nn.Parameter | None = None,
        dropout: float = 0.0, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"features": features, "classes": classes, "heads": heads, "context": context}
        for name, value in sizes.items():
            whole_number(value, name, 1)
        if weight is None:
            layer = torch.nn.Linear(features, classes, bias=False, device=device, dtype=dtype)
            weight = torch.nn.Parameter(layer.weight)
        elif not isinstance(weight, torch.nn.Parameter):
            raise TypeError(f"weight: expected a torch.nn.Parameter, as gradients add up in it, got {type(weight).__name__}")
        elif weight.shape != (classes, features):
            raise ValueError(f"weight: expected shape (V, E) = {(classes, features)}, got {tuple(weight.shape)}")
        elif device is not None or dtype is not None:
            raise ValueError(f"device, dtype: expected None with weight, which has its own, got {device}, {dtype}")
        self.weight = weight
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.positions = torch.nn.Parameter(torch.empty(heads, context, features, **where))
        self.projection = torch.nn.Linear(features, features, bias=False, **where)
        self.norm = torch.nn.LayerNorm(features, **where)
        self.dropout = torch.nn.Dropout(dropout_rate(dropout))
        # A Linear draws x with |x|^2 = 1/3: then the sum of heads * context terms x (x . p), so divided, is as large as x.
        torch.nn.init.normal_(self.positions, std=math.sqrt(3 * heads * context))

    def extra_repr(self) -> str:
        """The sizes."""
        (classes, features), (heads, context, _) = self.weight.shape, self.positions.shape
        return f"features={features}, classes={classes}, heads={heads}, context={context}"

    def forward(self, targets: Any, target_lengths: Any, *, validate: bool = False) -> Tensor:
        """Features after every label, for training.

        Parameters
        ----------
        targets : (B, U) tensor of int
        target_lengths : (B,) tensor or list of int
        validate : bool
            As of `reduced_predictor`.

        Returns
        -------
        (B, U+1, E) tensor
            Row u follows label u, row 0 the start.
        """
        return self._features(reduced_predictor(self.weight, self.positions, targets, target_lengths, validate=validate))

    def step(self, labels: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Features after one more label, for decoding: the rows of `forward`.

        Parameters
        ----------
        labels : (M,) tensor of int
            Not looked at without a state: at the start there is no label yet.
        state : tuple of tensors, optional
            As the last step returned it: the last labels (M, context), from the left, and how many they are (M,).

        Returns
        -------
        features : (M, E) tensor
        state : tuple of tensors
            Every M-th part of it belongs to one of the labels: `greedy` and `beam_search` of this module take it for `state`.
        """
        context = self.positions.shape[1]
        if state is None:
            count = torch.zeros_like(labels)
            seen = count[:, None].repeat(1, context)
        else:
            seen, count = state
            full = count == context
            seen = torch.where(full[:, None], seen.roll(-1, 1), seen)
            seen = seen.scatter(1, (count - full.to(count.dtype))[:, None], labels[:, None])
            count = (count + 1).clamp(max=context)
        return self._features(reduced_predictor(self.weight, self.positions, seen, count, last=True)), (seen, count)

    def _features(self, average: Tensor) -> Tensor:
        features: Tensor = self.dropout(torch.nn.functional.silu(self.norm(self.projection(average))))
        return features
