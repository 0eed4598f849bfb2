"""PyTorch: edit-based minimum Bayes risk (EMBR, arXiv 2109.07513), and the edit distances that it is the mean of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss import embr
from transducer_loss.adapters.torch.autograd import (
    REDUCTIONS,
    Gradients,
    anchored,
    expect_options,
    once_differentiable,
    reduced,
)
from transducer_loss.adapters.torch.operators import (
    as_tensor,
    caller,
    compute_dtype,
    constants,
    core_arguments,
    expect_tensor,
    numbers,
    operator,
    plain,
)
from transducer_loss.checks import choice
from transducer_loss.edit_distance import EditDistance, counted


def _where(hypotheses: Tensor, references: Tensor) -> Tensor:
    return references if hypotheses.device.type == "cpu" else hypotheses


@operator(
    "edit_distance(Tensor hypotheses, Tensor hypothesis_lengths, Tensor references, Tensor reference_lengths, *, int? blank, "
    "bool validate) -> Tensor[]",
    lambda hypotheses, lengths, references, *arguments, **options: [
        _where(hypotheses, references).new_empty(hypotheses.shape[:-1], dtype=torch.int32) for _ in range(4)
    ],
)
def _counted(
    hypotheses: Tensor, lengths: Tensor, references: Tensor, reference_lengths: Tensor, **options: Any
) -> list[Tensor]:
    where = _where(hypotheses, references)
    with caller(where):
        edits = counted(hypotheses, lengths, references, reference_lengths, **options, **core_arguments(where))
    return [edits.total, edits.insertions, edits.deletions, edits.substitutions]


def edit_distance(
    hypotheses: Any, hypothesis_lengths: Any, references: Any, reference_lengths: Any, *, blank: int | None = None,
    validate: bool = False,
) -> EditDistance:  # fmt: skip
    """Edit distance of every hypothesis and the reference of its utterance: `transducer_loss.edit_distance`, of tensors.

    Parameters
    ----------
    hypotheses : (B, L) or (B, N, L) tensor of int
    hypothesis_lengths : (B,) or (B, N) tensor or list of int
        -1 for padding, which is no hypothesis.
    references : (B, U) tensor of int
    reference_lengths : (B,) tensor or list of int
    blank : int, optional
        A label that is left out before they are compared.
    validate : bool
        Also check lengths that are on a device, which synchronises.

    Returns
    -------
    EditDistance
        Of tensors on the device of the hypotheses; -1 for padding.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import edit_distance
    >>> edit_distance(torch.tensor([[1, 2, 3, 4]]), [4], torch.tensor([[1, 3, 4]]), [3]).total
    tensor([1], dtype=torch.int32)
    """
    return EditDistance(
        *_counted(
            as_tensor(hypotheses, "hypotheses"), as_tensor(hypothesis_lengths, "hypothesis_lengths"),
            as_tensor(references, "references"), as_tensor(reference_lengths, "reference_lengths"),
            blank=blank, validate=validate,
        )
    )  # fmt: skip


def _risk_shapes(
    nll: Tensor, reference_nll: Tensor | None, distances: Tensor, hypotheses: Tensor | None, lengths: Tensor | None,
    weights: Tensor | None, gradient: bool, **options: Any,
) -> list[Tensor]:  # fmt: skip
    by = [nll, *([] if reference_nll is None else [reference_nll])] if gradient else []
    return [nll.new_empty(nll.shape[:1], dtype=compute_dtype(nll)), *(each.new_empty(each.shape) for each in by)]


@operator(
    "embr_loss(Tensor nll, Tensor? reference_nll, Tensor distances, Tensor? hypotheses, Tensor? hypothesis_lengths, "
    "Tensor? weights, bool gradient, *, int? blank, float temperature, float interpolation, str infeasible, bool? validate) "
    "-> Tensor[]",
    _risk_shapes,
)
def _risk(
    nll: Tensor, reference_nll: Tensor | None, distances: Tensor, hypotheses: Tensor | None, lengths: Tensor | None,
    weights: Tensor | None, gradient: bool, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Losses (B,), and the gradients of their weighted sum."""
    with caller(nll):
        loss, grads = embr.risk(
            nll, distances, hypotheses=hypotheses, hypothesis_lengths=lengths, reference_nll=reference_nll, weights=weights,
            gradient=gradient, **options, **core_arguments(nll),
        )  # fmt: skip
    return [loss] if grads is None else [each for each in (loss, grads.nll, grads.reference_nll) if each is not None]


class _Risk(torch.autograd.Function):
    """Losses (B,)."""

    @staticmethod
    def forward(
        ctx: Any, nll: Tensor, reference_nll: Tensor | None, options: dict[str, Any], distances: Tensor,
        hypotheses: Tensor | None, lengths: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(nll, reference_nll, distances, hypotheses, lengths)
        ctx.options = options
        anchored(ctx, nll, reference_nll)
        (loss,) = _risk(plain(nll), plain(reference_nll), distances, hypotheses, lengths, None, False, **options)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        # What was to be raised has been: the loss is not looked at again, which would synchronise.
        infeasible = "inf" if ctx.options["infeasible"] == "raise" else ctx.options["infeasible"]
        options = {**ctx.options, "infeasible": infeasible, "validate": None}
        _, *gradients = _risk(*map(plain, ctx.saved_tensors), upstream, True, **options)
        return tuple(gradients)


def embr_loss(
    nll: Tensor,
    distances: Any,
    *,
    hypotheses: Any = None,
    hypothesis_lengths: Any = None,
    blank: int | None = None,
    temperature: float = 1.0,
    reference_nll: Tensor | None = None,
    interpolation: float = 0.0,
    infeasible: str = "inf",
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Expected edit distance over the renormalised N-best hypotheses (EMBR, arXiv 2109.07513), with autograd.

    Parameters
    ----------
    nll : (B, N) tensor
        Transducer loss of each hypothesis, whose paths are all counted.
    distances : (B, N) tensor or list
        Of each hypothesis from the reference, as `edit_distance` counts them. There is no gradient by them.
    hypotheses : (B, N, L) tensor of int, optional
        With `hypothesis_lengths`: one equal to an earlier one is left out.
    hypothesis_lengths : (B, N) tensor or list of int, optional
        Negative for padding, which is left out whatever it holds.
    reference_nll : (B,) tensor, optional
        Transducer loss of the reference.
    interpolation : float
        Weight of `reference_nll`.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    blank, temperature, infeasible, validate
        As of `transducer_loss.embr_loss`.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 losses.

    Notes
    -----
    See `transducer_loss.embr_loss`, which also says what of it is the paper's.

    Examples
    --------
    The N hypotheses of an utterance share its encoder, and the transducer loss of the reference keeps training stable:

    >>> import torch
    >>> from transducer_loss.adapters.torch import beam_search, edit_distance, embr_loss, joint_rnnt_loss
    >>> encoder, frames = torch.randn(2, 12, 8, requires_grad=True), torch.tensor([12, 7])
    >>> embedding, output = torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)
    >>> def predictor(labels, state):
    ...     return embedding(labels), None
    >>> def nll(labels, lengths, index):
    ...     rows = embedding(torch.nn.functional.pad(labels, (1, 0)).clamp(min=0))
    ...     return joint_rnnt_loss(
    ...         encoder, rows, output.weight, output.bias, labels, frames, lengths.clamp(min=0), encoder_index=index,
    ...         reduction="none",
    ...     )
    >>> references, lengths = torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.tensor([3, 2])
    >>> found = beam_search(encoder, frames, predictor, lambda e, p: output(torch.tanh(e + p)), beam=3)
    >>> edits = edit_distance(found.hypotheses, found.lengths, references, lengths)
    >>> each = nll(found.hypotheses.flatten(0, 1), found.lengths.flatten(), torch.arange(2).repeat_interleave(3))
    >>> loss = embr_loss(
    ...     each.view(2, 3), edits.total, hypothesis_lengths=found.lengths, interpolation=0.1,
    ...     reference_nll=nll(references, lengths, None),
    ... )
    >>> loss.backward()
    """
    choice(reduction, REDUCTIONS, "reduction")
    expect_tensor(nll, "nll")
    if reference_nll is not None:
        expect_tensor(reference_nll, "reference_nll")
    options = {
        "blank": blank, "temperature": temperature, "interpolation": interpolation, "infeasible": infeasible,
        "validate": validate,
    }  # fmt: skip
    labels, lengths = (
        None if value is None else as_tensor(value, name)
        for name, value in (("hypotheses", hypotheses), ("hypothesis_lengths", hypothesis_lengths))
    )
    loss = _Risk.apply(nll, reference_nll, constants(options), numbers(distances, "distances"), labels, lengths)
    return reduced(loss, reduction)


class EMBRLoss(torch.nn.Module):
    """`embr_loss` as a module: its keywords at construction, its tensors at the call.

    Parameters
    ----------
    **options
        Keywords of `embr_loss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import EMBRLoss
    >>> loss = EMBRLoss(temperature=2.0, reduction="sum")
    >>> loss(torch.zeros(1, 2), torch.tensor([[0, 2]]))
    tensor(1.)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        expect_options(embr_loss, options, "hypotheses", "hypothesis_lengths", "reference_nll")
        self.options = options

    def forward(
        self, nll: Tensor, distances: Any, *, hypotheses: Any = None, hypothesis_lengths: Any = None,
        reference_nll: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `embr_loss`."""
        return embr_loss(
            nll, distances, hypotheses=hypotheses, hypothesis_lengths=hypothesis_lengths, reference_nll=reference_nll,
            **self.options,
        )  # fmt: skip
