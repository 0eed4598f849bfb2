"""Joint, loss and backward of one pack of utterances after the other: the graph of one pack is all that exists at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from transducer_loss.adapters.torch.autograd import logits_losses
from transducer_loss.adapters.torch.operators import caller, expect_tensor
from transducer_loss.cells import Ints
from transducer_loss.checks import Options, float_array, targets_for
from transducer_loss.packs import gradient_scale, packs_of
from transducer_loss.processors import processor_for

Joint = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class Problem:
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
    """As it was where the loss was called. Casts are not cached: older torch finds those made without a graph again."""
    checked: bool = False

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


class RandomState:
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
        now = RandomState(self.devices[0] if self.devices else torch.device("cpu"))
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


class Run:
    """One pass over packs of the inputs: encoder, predictor, parameters."""

    def __init__(self, of: Problem, inputs: Sequence[Tensor], graph: bool) -> None:
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
            return logits_losses(logits, targets, frames, labels, inplace=of.inplace, **of.options), leaves

    def forward(self, share: float | None) -> tuple[Tensor, list[tuple[int, int]]]:
        """Losses (B,), and the packs they were made in; with `share` add the gradients of ``share * sum_b loss_b``."""
        losses, done, todo = [], [], packs_of(self.of.frames, self.of.labels, self.of.pack)[::-1]
        while todo:
            begin, end = todo.pop()
            random = RandomState(self.inputs[0].device) if self.graph and end - begin > 1 else None
            loss, leaves = self.pack(begin, end)
            if random is not None and not bool(loss.isfinite().all()):
                # Its NaN would reach the others by way of the parameters: one utterance at a time, then.
                random.restore()
                todo.extend((b, b + 1) for b in reversed(range(begin, end)))
            else:
                if share is not None:
                    part = slice(begin, end)
                    scale = gradient_scale(self.of.frames[part], self.of.labels[part], self.of.options["fastemit_lambda"])
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
