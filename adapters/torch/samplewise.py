"""The loss of any joint network, pack by pack (sample-wise)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.autograd import (
    REDUCTIONS,
    Gradients,
    anchored,
    expect_options,
    once_differentiable,
    reduced,
)
from transducer_loss.adapters.torch.operators import expect_tensor, plain, uncompiled
from transducer_loss.adapters.torch.packs import Joint, Problem, RandomState, Run
from transducer_loss.checks import INFEASIBLE, choice, float_array, lengths
from transducer_loss.logits_loss import expect_paths


def _reported(loss: Tensor, infeasible: str, reduction: str) -> Tensor:
    if infeasible == "raise":
        expect_paths(loss.cpu().numpy())
    if infeasible == "zero":
        loss = loss.masked_fill(loss.isposinf(), 0)
    return reduced(loss, reduction)


class _SamplewiseLoss(torch.autograd.Function):
    """Scalar reductions make the gradients with the loss; ``"none"`` waits for the true upstream weights."""

    @staticmethod
    def forward(ctx: Any, of: Problem, infeasible: str, reduction: str, *inputs: Tensor) -> Tensor:
        later = reduction == "none"
        ctx.later, ctx.dtypes = later, [tensor.dtype for tensor in inputs]
        targets = (of.targets,) if isinstance(of.targets, Tensor) else ()
        if later:
            ctx.of, ctx.random = of, RandomState(inputs[0].device)
        run = Run(of, inputs, graph=True)
        share = 1 / len(of.frames) if reduction == "mean" else 1.0
        loss, ctx.packs = run.forward(None if later else share)
        # Saved in this way they are given up with the graph, and autograd notices when they were changed in between.
        ctx.save_for_backward(*((*inputs, *targets) if later else run.sums))
        anchored(ctx, *inputs)
        return _reported(loss, infeasible, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        sums, factor = ctx.saved_tensors, upstream  # read once, as torch.utils.checkpoint wants it
        if ctx.later:
            run = Run(ctx.of, sums[: len(ctx.dtypes)], graph=True)
            with ctx.random.replayed():
                run.backward(ctx.packs, upstream)
            sums, factor = run.sums, upstream.new_ones(())
        gradients = [
            None if total is None else (total * factor).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return (None, None, None, *gradients)


def _parameters(joint: Joint, parameters: Iterable[Tensor] | None) -> list[Tensor]:
    """Those that need a gradient, each once."""
    if parameters is None:
        if not isinstance(joint, torch.nn.Module):
            raise ValueError("parameters: expected the joint's parameters, as it is not a torch.nn.Module, got None")
        parameters = joint.parameters()
    different = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters: expected torch.Tensors, got {type(parameter).__name__}")
        different[id(parameter)] = parameter
    return [parameter for parameter in different.values() if parameter.requires_grad]


@functools.partial(uncompiled, reason="samplewise_rnnt_loss differentiates the joint itself: torch.compile the joint")
def samplewise_rnnt_loss(
    joint: Joint,
    encoder: Tensor,
    predictor: Tensor,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    parameters: Iterable[Tensor] | None = None,
    pack: int = 0,
    blank: int = 0,
    reduction: str = "mean",
    topology: str = "regular",
    normalized: bool = False,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    inplace: bool = False,
    validate: bool = False,
) -> Tensor:
    """Transducer loss of any joint network, with autograd, in the memory of one pack of utterances (arXiv 2211.16270).

    The same number as these lines, but joint, loss and backward run for one pack after the other, and only the gradients of
    encoder, predictor and parameters stay::

        logits = joint(encoder[:, :, None], predictor[:, None])                     # (B, T, U+1, V)
        loss = rnnt_loss(logits, targets, encoder_lengths, target_lengths)

    For a joint that is ``weight @ activation(encoder + predictor) + bias``, `joint_rnnt_loss` takes less memory and time.

    Parameters
    ----------
    joint : torch.nn.Module or callable
        ``joint(encoder, predictor) -> logits``, from (n, T, 1, D) and (n, 1, U+1, D') to (n, T, U+1, V), each cell by itself:
        n utterances of a pack, cropped to the longest of them.
    encoder : (B, T, D) tensor
        Padding may hold anything.
    predictor : (B, U+1, D') tensor
        Likewise; row u follows label u, row 0 the start.
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    parameters : iterable of tensors, optional
        Every tensor, beside encoder and predictor, that the joint uses and that needs a gradient, leaf or not. By default
        ``joint.parameters()``; a joint that is no module needs them.
    pack : int
        Utterances that follow each other are taken together while ``n * T * (U+1)`` is at most this. 0 is one at a time, which
        takes the least memory; more is faster where utterances are too short to keep the device busy.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch. Scalar reductions make the gradients together with the loss; "none" makes the logits
        twice, the second time in backward, with the same random numbers and the same autocast.
    inplace : bool
        Write the gradient over the logits, which saves their memory once more. Only for a joint whose last step does not need
        its own result in backward (a Linear does not, a log_softmax does): torch raises, otherwise.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, validate
        As of `rnnt_loss`.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 logits.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; also for a tensor that the joint uses and that needs a gradient
        but is not among the `parameters`, whose gradient would be lost.

    Notes
    -----
    Gradients of packs are summed in float32 (float64 for float64). Tensor hooks of parameters see the gradient of every pack,
    and then the sum. A joint in ``DistributedDataParallel`` is to be given as it is inside. State that the joint changes when
    it is called, as of batch normalisation, changes once for every pack, and with "none" again in backward. In a graph of
    `torch.compile` it is a break: compile the joint instead.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import samplewise_rnnt_loss
    >>> class Joint(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.output = torch.nn.Linear(16, 16), torch.nn.Linear(16, 50)
    ...     def forward(self, encoder, predictor):
    ...         return self.output(torch.tanh(encoder + predictor) * torch.sigmoid(self.gate(encoder)))
    >>> joint = Joint()
    >>> encoder, predictor = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
    >>> targets = torch.randint(1, 50, (2, 7))
    >>> loss = samplewise_rnnt_loss(joint, encoder, predictor, targets, [30, 21], [7, 4])
    >>> loss.backward()
    >>> encoder.grad.shape, joint.gate.weight.grad.shape
    (torch.Size([2, 30, 16]), torch.Size([16, 16]))
    """
    choice(reduction, REDUCTIONS, "reduction")
    choice(infeasible, INFEASIBLE, "infeasible")
    if not callable(joint):
        raise TypeError(f"joint: expected a torch.nn.Module or another callable, got {type(joint).__name__}")
    if isinstance(pack, bool) or not isinstance(pack, int):
        raise TypeError(f"pack: expected an int, got {type(pack).__name__}")
    if pack < 0:
        raise ValueError(f"pack: expected a number of cells, 0 or more, got {pack}")
    expect_tensor(encoder, "encoder")
    expect_tensor(predictor, "predictor")
    float_array(plain(encoder), "encoder", "B T D")
    batch, device = encoder.shape[0], encoder.device
    if predictor.device != device:
        raise ValueError(f"predictor: expected device {device} as encoder, got {predictor.device}")
    float_array(plain(predictor), "predictor", "B U+1 D")
    if predictor.shape[0] != batch:
        raise ValueError(f"predictor: expected shape (B, U+1, D) = ({batch}, U+1, D), got {tuple(predictor.shape)}")
    of = Problem(
        joint,
        lengths(plain(encoder_lengths), "encoder_lengths", batch, 1, encoder.shape[1], "T"),
        lengths(plain(target_lengths), "target_lengths", batch, 0, predictor.shape[1] - 1, "U"),
        plain(targets),
        pack, inplace, validate,
        {
            "blank": blank, "topology": topology, "normalized": normalized, "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty, "hat": hat, "infeasible": "inf",
        },
        {
            "device_type": device.type, "dtype": torch.get_autocast_dtype(device.type),
            "enabled": torch.is_autocast_enabled(device.type),
        },
    )  # fmt: skip
    inputs = (encoder, predictor, *_parameters(joint, parameters))
    if not torch.is_grad_enabled():
        return _reported(Run(of, inputs, graph=False).forward(None)[0], infeasible, reduction)
    loss: Tensor = _SamplewiseLoss.apply(of, infeasible, reduction, *inputs)
    return loss


class SamplewiseRNNTLoss(torch.nn.Module):
    """`samplewise_rnnt_loss` as a module, of which the joint network is a part.

    Parameters
    ----------
    joint : torch.nn.Module or callable
    **options
        Keywords of `samplewise_rnnt_loss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import SamplewiseRNNTLoss
    >>> joint = torch.nn.Bilinear(4, 4, 10)
    >>> loss = SamplewiseRNNTLoss(lambda e, p: joint(*torch.broadcast_tensors(e, p)), parameters=joint.parameters())
    >>> value = loss(torch.randn(1, 5, 4), torch.randn(1, 3, 4), torch.tensor([[1, 2]]), [5], [2])
    >>> value.backward()
    """

    def __init__(self, joint: Joint, **options: Any) -> None:
        super().__init__()
        if options.get("parameters") is not None:
            options["parameters"] = list(options["parameters"])  # there is more than one call
        expect_options(samplewise_rnnt_loss, options)
        self.joint, self.options = joint, options

    def forward(self, encoder: Tensor, predictor: Tensor, targets: Any, encoder_lengths: Any, target_lengths: Any) -> Tensor:
        """See `samplewise_rnnt_loss`."""
        return samplewise_rnnt_loss(
            self.joint, encoder, predictor, targets, encoder_lengths, target_lengths, **self.options
        )
