"""PyTorch: pruned RNN-T (arXiv 2206.13236): the simple loss, the band, and a module of both losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transducer_loss import logits_loss, pruning, simple_loss
from transducer_loss.adapters.torch.autograd import (
    REDUCTIONS,
    Gradients,
    anchored,
    expect_options,
    once_differentiable,
    reduced,
    wants_gradient,
)
from transducer_loss.adapters.torch.band import prune
from transducer_loss.adapters.torch.joint import joint_rnnt_loss
from transducer_loss.adapters.torch.operators import (
    OPTIONS,
    as_tensor,
    caller,
    class_tensors,
    compute_dtype,
    constants,
    core_arguments,
    expect_tensor,
    operator,
    plain,
)
from transducer_loss.adapters.torch.sampled import labels_in
from transducer_loss.band import Band
from transducer_loss.checks import choice, finite, whole_number
from transducer_loss.classes import Classes
from transducer_loss.paths import Occupancy


def _simple_shapes(am: Tensor, lm: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, weights: Tensor | None,
                   gradient: bool, **options: Any) -> list[Tensor]:  # fmt: skip
    lattice, real = (am.shape[0], am.shape[1], lm.shape[1]), compute_dtype(am)
    shapes = [(am.shape[0],), lattice, lattice, *([am.shape, lm.shape] if gradient else [])]
    return [am.new_empty(shape, dtype=real) for shape in shapes]


@operator(
    "simple_rnnt_loss(Tensor am, Tensor lm, Tensor targets, Tensor am_lengths, Tensor target_lengths, Tensor? weights, "
    f"bool gradient, *, float lm_only_scale, float am_only_scale, bool shared_unigram, {OPTIONS}) -> Tensor[]",
    _simple_shapes,
)
def _simple(
    am: Tensor, lm: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, weights: Tensor | None, gradient: bool,
    **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Losses (B,), occupancies, and the gradients of their weighted sum."""
    with caller(am):
        of = simple_loss.problem(am, lm, targets, frames, labels, **options, **core_arguments(am))
        done = simple_loss.forward(of, logits_loss.weights_of(of, weights), gradient)
        return [done.loss, *done.occupancy, *(done.gradients or ())]


class _SimpleLoss(torch.autograd.Function):
    """Losses (B,) of am and lm, and occupancies."""

    @staticmethod
    def forward(
        ctx: Any, am: Tensor, lm: Tensor, needed: bool, options: dict[str, Any], *integers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A unigram of the whole batch carries gradients from one utterance to another: they need the true weights.
        ctx.later = needed and options["shared_unigram"] and options["am_only_scale"] != 0.0
        loss, blank, label, *gradients = _simple(am.detach(), lm.detach(), *integers, None, needed and not ctx.later, **options)
        ctx.dtype, ctx.options = am.dtype, options
        ctx.save_for_backward(*((am, lm, *integers) if ctx.later else gradients))
        if needed:
            anchored(ctx, am, lm)
        ctx.mark_non_differentiable(blank, label)
        ctx.set_materialize_grads(False)  # which would make zeros of the size of the occupancies
        return loss, blank, label

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        natives = ctx.saved_tensors
        weights = upstream[:, None, None]
        if ctx.later:
            am, lm, *integers = map(plain, natives)
            options = {**ctx.options, "validate": False}
            natives = _simple(am, lm, *integers, upstream, True, **options)[3:]
            weights = torch.ones_like(weights)
        # An utterance that is not finite has gradient 0, whatever comes back to it.
        gradients = [
            (native * weights).masked_fill_(native == 0, 0).to(ctx.dtype) if needed else None
            for native, needed in zip(natives, ctx.needs_input_grad, strict=False)
        ]
        return tuple(gradients)


def simple_losses(
    am: Tensor, lm: Tensor, arguments: tuple[Any, Any, Any], *, shared_unigram: bool = False, **options: Any
) -> tuple[Tensor, Occupancy]:
    """Losses (B,) with autograd, and occupancies; `arguments` and `options` as of `transducer_loss.simple_loss.problem`."""
    expect_tensor(am, "am")
    expect_tensor(lm, "lm")
    names = ("targets", "am_lengths", "target_lengths")
    integers = [as_tensor(value, name) for value, name in zip(arguments, names, strict=True)]
    options = {**options, "shared_unigram": shared_unigram}
    loss, blank, label = _SimpleLoss.apply(am, lm, wants_gradient(am, lm), constants(options), *integers)
    return loss, Occupancy(blank, label, loss.detach())


def simple_rnnt_loss(
    am: Tensor,
    lm: Tensor,
    targets: Any,
    am_lengths: Any,
    target_lengths: Any,
    *,
    lm_only_scale: float = 0.0,
    am_only_scale: float = 0.0,
    blank: int = 0,
    reduction: str = "mean",
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    infeasible: str = "inf",
    validate: bool = False,
) -> tuple[Tensor, Occupancy]:
    """Transducer loss of a joiner that only adds, smoothed, with autograd; and the occupancies to prune by.

    Parameters
    ----------
    am : (B, T, V) tensor
    lm : (B, U+1, V) tensor
    targets, am_lengths, target_lengths
        As of `rnnt_loss`.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch.
    lm_only_scale, am_only_scale, blank, topology, fastemit_lambda, delay_penalty, infeasible, validate
        As of `transducer_loss.simple_rnnt_loss`.

    Returns
    -------
    loss : Tensor
        Scalar, or (B,).
    occupancy : Occupancy
        For `prune`; without gradient.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import prune, simple_rnnt_loss
    >>> am, lm = torch.randn(1, 9, 5, requires_grad=True), torch.randn(1, 7, 5)
    >>> loss, occupancy = simple_rnnt_loss(am, lm, torch.tensor([[1, 2, 3, 4, 1, 2]]), [9], [6])
    >>> loss.backward()
    >>> prune(occupancy, [9], [6], s_range=3).to_ranges().shape
    (1, 9, 3)
    """
    choice(reduction, REDUCTIONS, "reduction")
    loss, occupancy = simple_losses(
        am, lm, (targets, am_lengths, target_lengths), lm_only_scale=lm_only_scale, am_only_scale=am_only_scale,
        blank=blank, topology=topology, fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty,
        infeasible=infeasible, validate=validate,
    )  # fmt: skip
    return reduced(loss, reduction), occupancy


class PrunedLosses(NamedTuple):
    """What `PrunedRNNTLoss` returns: `loss` is what to differentiate, the weighted sum of the other two."""

    loss: Tensor
    simple_loss: Tensor
    pruned_loss: Tensor
    band: Band


class PrunedRNNTLoss(torch.nn.Module):
    """Pruned RNN-T in one module: owns the two simple projections and the output layer, and the warm-up of their weights.

    Over the first `warm_step` calls in training mode the simple loss's weight falls from 1 to `simple_scale` and the pruned
    loss's rises from 0.1 to 1, as in the paper's recipes; the count is saved with the module's state.

    Parameters
    ----------
    features, classes : int
        H and V.
    encoder_features, predictor_features : int, optional
        Of the inputs to the simple projections, where those are not the joint's.
    bias : bool
        Of the output layer.
    s_range, strategy
        As of `prune`.
    lm_only_scale, am_only_scale : float
        As of `simple_rnnt_loss`.
    warm_step : int
    simple_scale : float
        Weight of the simple loss after the warm-up.
    dropout : float
        Of the joint, in training mode.
    sparse : bool
        Of the gradients of the three layers' weights, in calls with `classes`.
    reduction : {"mean", "sum", "none"}
    blank, topology, fastemit_lambda, delay_penalty, infeasible, validate
        Of both losses.
    device, dtype
        Of the parameters, as of `torch.nn.Linear`.
    **options
        Other keywords of `joint_rnnt_loss`, as ``hat`` and ``workspace``.

    Attributes
    ----------
    step : int
        Calls in training mode so far.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import PrunedRNNTLoss
    >>> losses = PrunedRNNTLoss(16, 50)
    >>> encoder, predictor = torch.randn(2, 30, 16), torch.randn(2, 8, 16)
    >>> out = losses(encoder, predictor, torch.randint(1, 50, (2, 7)), [30, 21], [7, 4])
    >>> out.loss.backward()
    >>> out.band.width
    5
    """

    def __init__(
        self, features: int, classes: int, *, encoder_features: int | None = None, predictor_features: int | None = None,
        bias: bool = True, s_range: int = 5, strategy: str = "local", lm_only_scale: float = 0.25, am_only_scale: float = 0.0,
        warm_step: int = 2000, simple_scale: float = 0.5, dropout: float = 0.0, sparse: bool = False, reduction: str = "mean",
        blank: int = 0, topology: str = "regular", fastemit_lambda: float = 0.0, delay_penalty: float = 0.0,
        infeasible: str = "inf", validate: bool = False, device: Any = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        choice(strategy, pruning.STRATEGIES, "strategy")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.simple_encoder = torch.nn.Linear(encoder_features or features, classes, **where)
        self.simple_predictor = torch.nn.Linear(predictor_features or features, classes, **where)
        self.output = torch.nn.Linear(features, classes, bias=bias, **where)
        self.s_range, self.strategy = whole_number(s_range, "s_range", 1), strategy
        self.warm_step, self.simple_scale = whole_number(warm_step, "warm_step", 0), finite(simple_scale, "simple_scale")
        self.dropout, self.sparse, self.options, self.step = dropout, sparse, options, 0
        self.scales: dict[str, Any] = {
            "lm_only_scale": finite(lm_only_scale, "lm_only_scale"), "am_only_scale": finite(am_only_scale, "am_only_scale"),
        }  # fmt: skip
        self.common: dict[str, Any] = {
            "reduction": reduction, "blank": blank, "topology": topology, "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty, "infeasible": infeasible, "validate": validate,
        }  # fmt: skip
        expect_options(joint_rnnt_loss, {"dropout": dropout, **self.common, **options}, "band", "classes", "encoder_index")

    @property
    def step(self) -> int:
        """Calls in training mode so far."""
        return int(self._step)

    @step.setter
    def step(self, step: int) -> None:
        # A tensor, or a compiled region would be compiled again for each of them.
        self._step = torch.full((), step, dtype=torch.float64, device="cpu")

    def get_extra_state(self) -> dict[str, int]:
        """The count of steps, which is part of the state."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take up the count of steps."""
        self.step = state["step"]

    def weights(self) -> tuple[float, float]:
        """Weights of the simple and of the pruned loss at this step."""
        of_simple, of_pruned = self._weights()
        return float(of_simple), float(of_pruned)

    def _weights(self) -> tuple[Tensor, Tensor]:
        warm = (self._step / self.warm_step).clamp(max=1.0) if self.warm_step else torch.ones_like(self._step)
        return 1.0 - warm * (1.0 - self.simple_scale), 0.1 + 0.9 * warm

    def forward(
        self, encoder: Tensor, predictor: Tensor, targets: Any, encoder_lengths: Any, target_lengths: Any, *,
        simple_encoder: Tensor | None = None, simple_predictor: Tensor | None = None, classes: Classes | None = None,
    ) -> PrunedLosses:  # fmt: skip
        """Both losses and their weighted sum.

        Parameters
        ----------
        encoder : (B, T, H) tensor
        predictor : (B, U+1, H) tensor
        targets, encoder_lengths, target_lengths
            As of `rnnt_loss`.
        simple_encoder : (B, T, encoder_features) tensor, optional
        simple_predictor : (B, U+1, predictor_features) tensor, optional
            Inputs to the simple projections, where those are not the joint's.
        classes : Classes, optional
            As `sample_classes` returns them for the whole batch: both losses are over them alone, and no array of all V
            classes is made but for the parameters' gradients. The simple loss takes no correction.

        Returns
        -------
        PrunedLosses
        """
        simple_encoder = encoder if simple_encoder is None else simple_encoder
        simple_predictor = predictor if simple_predictor is None else simple_predictor
        if classes is None:
            am, lm = self.simple_encoder(simple_encoder), self.simple_predictor(simple_predictor)
            simple, occupancy = simple_rnnt_loss(am, lm, targets, encoder_lengths, target_lengths, **self.scales, **self.common)
        else:
            tensors, _ = class_tensors(classes)
            if classes.per_utterance:
                raise ValueError("classes: expected those of the whole batch, as the simple loss takes one set, got one each")
            slots = labels_in(classes, targets, target_lengths, validate=self.common["validate"])
            ids = tensors[0].to(encoder.device, torch.int64)
            am, lm = (
                torch.nn.functional.linear(
                    rows, torch.nn.functional.embedding(ids, layer.weight, sparse=self.sparse), layer.bias[ids]
                )
                for rows, layer in ((simple_encoder, self.simple_encoder), (simple_predictor, self.simple_predictor))
            )
            simple, occupancy = simple_rnnt_loss(
                am, lm, slots, encoder_lengths, target_lengths, **self.scales, **{**self.common, "blank": 0}
            )
        band = prune(
            occupancy, encoder_lengths, target_lengths, s_range=self.s_range, strategy=self.strategy,
            topology=self.common["topology"],
        )  # fmt: skip
        pruned = joint_rnnt_loss(
            encoder, predictor, self.output.weight, self.output.bias, targets, encoder_lengths, target_lengths, band=band,
            classes=classes, sparse=self.sparse and classes is not None, dropout=self.dropout if self.training else 0.0,
            **self.common, **self.options,
        )  # fmt: skip
        of_simple, of_pruned = (weight.to(simple.dtype) for weight in self._weights())
        if self.training:
            self._step = self._step + 1
        return PrunedLosses(of_simple * simple + of_pruned * pruned, simple, pruned, band)
