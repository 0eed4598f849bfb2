"""The loss of any joint network, pack by pack: the graph of one pack is all that exists at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from transducer_loss.adapters.torch_autograd import (
    REDUCTIONS,
    Gradients,
    LogitsLoss,
    caller,
    expect_tensor,
    once_differentiable,
    plain,
    reduced,
)
from transducer_loss.cells import Ints
from transducer_loss.checks import INFEASIBLE, Options, choice, float_array, lengths, targets_for
from transducer_loss.processors import processor_for

Joint = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class _Problem:
    """What is the same for every pack."""

    joint: Joint
    frames: Ints
    labels: Ints
    targets: Any
    pack: int
    inplace: bool
    validate: bool
    options: dict[str, Any]
    """Of the loss of a pack, in which having no path is always a loss of +inf."""
    autocast: dict[str, Any]
    """As it was where the loss was called. Casts are not cached: one made without a graph would be found by later calls."""
    checked: bool = False

    def packs(self) -> list[tuple[int, int]]:
        """First and past the last utterance of each pack."""
        packs, begin, batch = [], 0, len(self.frames)
        for end in range(1, batch + 1):
            longer = slice(begin, end + 1)
            cells = (end + 1 - begin) * self.frames[longer].max() * (self.labels[longer].max() + 1)
            if end == batch or cells > self.pack:
                packs.append((begin, end))
                begin = end
        return packs

    def scale(self, begin: int, end: int) -> float:
        """Power of two that a pack's gradient is made with while the upstream one is not known.

        Logits of float16 would lose the small parts of their gradient, for loss scaling comes later. Over all cells the
        gradient of a class sums to at most twice the steps of a path, so that 2 ** 13 leaves hidden features of 8 in range.
        """
        steps = int(self.frames[begin:end].sum() + self.labels[begin:end].sum())
        return 2.0 ** (13 - math.frexp(2 * steps * (1 + self.options["fastemit_lambda"]))[1])

    def check(self, logits: Tensor) -> None:
        """Check of the whole batch what needs the number of classes, so that errors tell an utterance's own index."""
        if self.checked:
            return
        with caller(logits):
            array = float_array(logits.detach(), "logits", "n T U+1 V")
            options = Options.checked(array.shape[-1], **self.options)
            with processor_for(array) as processor:
                targets = targets_for(self.targets, processor, self.labels, array.shape[-1], options, self.validate)
        self.targets, self.checked = targets.array, True


class _Random:
    """Where torch's random generators stand, that of the host and that of a device."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.cuda.get_rng_state(each) for each in self.devices]
        self.host = torch.get_rng_state()

    def restore(self) -> None:
        """Go back there."""
        torch.set_rng_state(self.host)
        for device, state in zip(self.devices, self.states, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw once more what was drawn from there on, and leave the generators where they are now."""
        now = _Random(self.devices[0] if self.devices else torch.device("cpu"))
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(padded: Tensor, counts: Ints) -> Tensor:
    """A pack's rows, cropped; past its end an utterance's last row is repeated: no value there that is not a real one."""
    longest = torch.arange(int(counts.max()), device=padded.device)
    index = torch.stack([longest.clamp(max=int(count) - 1) for count in counts])
    return padded[torch.arange(len(counts), device=padded.device)[:, None], index]


def _expect_known(logits: Tensor, known: Sequence[Tensor]) -> None:
    """Raise where the graph of the logits ends in a leaf that is not known: its gradient would be lost."""
    edges = [get_gradient_edge(tensor) for tensor in known if tensor.requires_grad]
    ends = {(edge.node, edge.output_nr) for edge in edges}
    start = get_gradient_edge(logits)
    seen: set[Any] = set()
    todo: list[tuple[Any, int]] = [(start.node, start.output_nr)]
    while todo:
        node, output = todo.pop()
        if node is None or node in seen or (node, output) in ends:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            raise ValueError(
                "parameters: expected every tensor that the joint uses and that needs a gradient, got none for one of shape "
                f"{tuple(node.variable.shape)}"
            )
        todo.extend(node.next_functions)


class _Run:
    """One pass over packs of the inputs: encoder, predictor, parameters."""

    def __init__(self, of: _Problem, inputs: Sequence[Tensor], graph: bool) -> None:
        self.of, self.inputs, self.graph = of, inputs, graph
        self.needed = [i for i, tensor in enumerate(inputs) if graph and tensor.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(inputs)
        """Gradients, summed over packs in float32 or better; None for parameters that the joint did not use."""

    def pack(self, begin: int, end: int) -> tuple[Tensor, list[Tensor]]:
        """Losses of utterances [begin, end), and the tensors that their graph begins with, in the order of the inputs."""
        of, frames, labels = self.of, self.of.frames[begin:end], self.of.labels[begin:end]
        encoder, predictor = (
            _rows(self.inputs[i].detach()[begin:end], counts).requires_grad_(i in self.needed)
            for i, counts in enumerate((frames, labels + 1))
        )
        leaves = [encoder, predictor, *self.inputs[2:]]
        with torch.set_grad_enabled(self.graph):
            with torch.autocast(**of.autocast, cache_enabled=False):
                logits = of.joint(encoder[:, :, None], predictor[:, None])
            expect_tensor(logits, "joint")
            cells = (end - begin, int(frames.max()), int(labels.max()) + 1)
            if logits.ndim != 4 or tuple(logits.shape[:3]) != cells:
                raise ValueError(
                    f"joint: expected logits of shape (n, T, U+1, V) = ({', '.join(map(str, cells))}, V), "
                    f"got {tuple(logits.shape)}"
                )
            of.check(logits)
            if logits.requires_grad:
                _expect_known(logits, leaves)
            targets = of.targets[begin:end, : int(labels.max())]
            return LogitsLoss.apply(logits, of.inplace, (targets, frames, labels), of.options), leaves

    def forward(self, share: float | None) -> tuple[Tensor, list[tuple[int, int]]]:
        """Losses (B,), and the packs they were made in; with `share` add the gradients of ``share * sum_b loss_b``."""
        losses, done, todo = [], [], self.of.packs()[::-1]
        while todo:
            begin, end = todo.pop()
            random = _Random(self.inputs[0].device) if self.graph and end - begin > 1 else None
            loss, leaves = self.pack(begin, end)
            if random is not None and not bool(loss.isfinite().all()):
                # Its NaN would reach the others by way of the parameters: one utterance at a time, then.
                random.restore()
                todo.extend((b, b + 1) for b in reversed(range(begin, end)))
            else:
                if share is not None:
                    scale = self.of.scale(begin, end)
                    self.add_gradients(begin, loss, leaves, torch.full_like(loss, scale), share / scale)
                losses.append(loss.detach())
                done.append((begin, end))
            del loss, leaves  # and so the pack's graph, before there is the next one's
        return torch.cat(losses), done

    def backward(self, packs: Sequence[tuple[int, int]], weights: Tensor) -> None:
        """Add the gradients of ``sum_b weights_b loss_b``."""
        for begin, end in packs:
            self.add_gradients(begin, *self.pack(begin, end), weights[begin:end], 1.0)

    def add_gradients(self, begin: int, loss: Tensor, leaves: Sequence[Tensor], weights: Tensor, factor: float) -> None:
        """Add those of ``factor * sum_b weights_b loss_b`` of the pack from utterance `begin` on, whose graph they use up."""
        if not loss.requires_grad or not self.needed:
            return
        with torch.autocast(self.of.autocast["device_type"], enabled=False):
            gradients = torch.autograd.grad(loss, [leaves[i] for i in self.needed], weights, allow_unused=True)
        # An utterance without a finite loss is alone in its pack. Its logits' gradient is 0, but 0 * NaN is NaN.
        lost = ~loss.isfinite().all()
        for i, gradient in zip(self.needed, gradients, strict=True):
            if gradient is not None:
                part = gradient.to(_sum_dtype(gradient)).mul(factor).masked_fill_(lost, 0)
                self._add(i, part, begin)

    def _add(self, i: int, part: Tensor, begin: int) -> None:
        total = self.sums[i]
        if i > 1:
            self.sums[i] = part if total is None else total.add_(part)
            return
        if total is None:
            total = self.sums[i] = torch.zeros(self.inputs[i].shape, dtype=part.dtype, device=part.device)
        total[begin : begin + len(part), : part.shape[1]] = part  # the logits' gradient, and so this, is 0 in the padding


def _reported(loss: Tensor, infeasible: str, reduction: str) -> Tensor:
    if infeasible == "raise":
        without = np.flatnonzero(loss.isposinf().cpu().numpy())
        if without.size:
            raise ValueError(f"targets: expected a path for every utterance, got none for utterances {without.tolist()}")
    if infeasible == "zero":
        loss = loss.masked_fill(loss.isposinf(), 0)
    return reduced(loss, reduction)


class _SamplewiseLoss(torch.autograd.Function):
    """Scalar reductions make the gradients with the loss; ``"none"`` waits for the true upstream weights."""

    @staticmethod
    def forward(ctx: Any, of: _Problem, infeasible: str, reduction: str, *inputs: Tensor) -> Tensor:
        later = reduction == "none"
        ctx.later, ctx.dtypes = later, [tensor.dtype for tensor in inputs]
        targets = (of.targets,) if isinstance(of.targets, Tensor) else ()
        if later:
            ctx.of, ctx.random = of, _Random(inputs[0].device)
        run = _Run(of, inputs, graph=True)
        share = 1 / len(of.frames) if reduction == "mean" else 1.0
        loss, ctx.packs = run.forward(None if later else share)
        # Saved in this way they are given up with the graph, and autograd notices when they were changed in between.
        ctx.save_for_backward(*((*inputs, *targets) if later else run.sums))
        return _reported(loss, infeasible, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        sums, factor = ctx.saved_tensors, upstream
        if ctx.later:
            run = _Run(ctx.of, ctx.saved_tensors[: len(ctx.dtypes)], graph=True)
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
    it is called, as of batch normalisation, changes once for every pack, and with "none" again in backward.

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
    of = _Problem(
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
        return _reported(_Run(of, inputs, graph=False).forward(None)[0], infeasible, reduction)
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
        choice(options.get("reduction", "mean"), REDUCTIONS, "reduction")
        self.joint, self.options = joint, options

    def forward(self, encoder: Tensor, predictor: Tensor, targets: Any, encoder_lengths: Any, target_lengths: Any) -> Tensor:
        """See `samplewise_rnnt_loss`."""
        return samplewise_rnnt_loss(
            self.joint, encoder, predictor, targets, encoder_lengths, target_lengths, **self.options
        )
