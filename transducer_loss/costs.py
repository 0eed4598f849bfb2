"""What each way to compute the loss costs: its memory, by the accounts of the code that runs, and its matrix products."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from transducer_loss import lattice, tiling
from transducer_loss.arrays import COMPUTE, numpy_dtype
from transducer_loss.cells import Cells
from transducer_loss.classes import MOST_CLASSES
from transducer_loss.pruning import least_width
from transducer_loss.simple_loss import utterances_of_a_task


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to compute the loss and all its gradients.

    Attributes
    ----------
    name : str
    exact : bool
        Whether it is the loss of all paths over all classes; else it approximates.
    inputs, gradients, temporary : int
        Bytes of the arrays that go in, of the gradients by them, and of all else at the peak.
    flops : int
        Of the matrix products, forward and backward.
    workspace : int or None
        Bytes of the call's `workspace`; None where it has none, or the default.
    fits : bool or None
        Whether `bytes` are no more than the device's memory; None where that is not known.
    call : str
        Lines of code to copy.
    """

    name: str
    exact: bool
    inputs: int
    gradients: int
    temporary: int
    flops: int
    workspace: int | None
    fits: bool | None
    call: str

    @property
    def bytes(self) -> int:
        """Peak memory, all together."""
        return self.inputs + self.gradients + self.temporary


_LOGITS = """\
hidden = np.tanh(encoder[:, :, None] + predictor[:, None])
logits = hidden @ weight.T
logits += bias
loss, grad = tl.rnnt_loss(logits, targets, frames, labels{})"""
_SAMPLE = "classes = tl.sample_classes(targets, labels, vocab_size={}, num_samples={})\n"
_SLOTS = """\
slots = tl.labels_in(classes, targets, labels)
# am, lm: of classes.ids alone
"""
_PRUNE = """\
simple_loss, simple_grads, occupancy = tl.simple_rnnt_loss(am, lm, {}, frames, labels)
band = tl.prune(occupancy, frames, labels, s_range={})
"""
_JOINT = "loss, grads = tl.joint_rnnt_loss(encoder, predictor, weight, bias, targets, frames, labels{})"


class _Joint(NamedTuple):
    """A strategy, and whether its workspace keeps all logits."""

    strategy: Strategy
    workspace: int
    keeps: bool


@dataclasses.dataclass(frozen=True)
class Costs:
    """A batch of utterances of one size, and what it costs on a processor, of which the class alone is looked at."""

    B: int
    T: int
    U: int
    V: int
    H: int
    dtype: str
    processor: Any
    threads: int
    memory: int | None

    def strategies(self, s_range: int, samples: int) -> Iterator[Strategy]:
        """All that make sense, exact ones first."""
        yield self._logits(inplace=False)
        yield self._logits(inplace=True)
        frames, labels = self._lengths
        width = min(max(s_range, least_width(frames, labels, "regular")), self.U + 1)
        samples = min(samples, self.V)
        slots = min(self.V, 1 + self.B * self.U + samples)
        bands = [None] if width > self.U else [None, width]
        yield from self._joints("exact joint", None, None)
        if width <= self.U:
            yield from self._joints("pruned", width, None)
        if slots < self.V <= MOST_CLASSES:
            for band in bands:
                yield from self._joints("sampled" if band is None else "pruned and sampled", band, (slots, samples))

    @property
    def _lengths(self) -> tuple[Any, Any]:
        return np.full(self.B, self.T), np.full(self.B, self.U)

    @property
    def _cells(self) -> int:
        return self.B * self.T * (self.U + 1)

    @property
    def _rows(self) -> int:
        """Of encoder and predictor."""
        return self.B * (self.T + self.U + 1)

    @property
    def _size(self) -> int:
        return numpy_dtype(self.dtype).itemsize

    @property
    def _sum(self) -> int:
        """Bytes of a sum, a loss or an occupancy."""
        return numpy_dtype(COMPUTE[self.dtype]).itemsize

    @property
    def _parameters(self) -> int:
        """Elements of encoder, predictor, weight and bias."""
        return self._rows * self.H + self.V * (self.H + 1)

    def _strategy(
        self, name: str, exact: bool, inputs: int, gradients: int, beyond: int, flops: int, workspace: int | None, call: str
    ) -> Strategy:
        """`inputs` as elements beside the targets; `beyond`: the peak of all bytes that are no inputs."""
        given = inputs * self._size + 8 * self.B * (self.U + 2)
        fits = None if self.memory is None else given + beyond <= self.memory
        made = gradients * self._size
        return Strategy(name, exact, given, made, beyond - made, flops, workspace, fits, call)

    def _logits(self, inplace: bool) -> Strategy:
        hidden, logits = (self._size * self._cells * columns for columns in (self.H, self.V))
        gradient = 0 if inplace else logits
        steps = (
            (5 * self._sum + 2 * lattice.scaled_bytes(self.dtype)) * self._cells,  # within the loss
            3 * self._sum * self._cells + gradient,
            gradient + hidden,
            2 * hidden,  # no gradient of the logits is left where tanh makes that of its input
        )
        beyond = self._parameters * self._size + hidden + logits + max(steps) + self.processor.reserved
        return self._strategy(
            "logits, in place" if inplace else "logits", True, self._parameters, self._parameters, beyond,
            6 * self._cells * self.V * self.H, None, _LOGITS.format(", inplace=True" if inplace else ""),
        )  # fmt: skip

    def _joints(self, name: str, band: int | None, sample: tuple[int, int] | None) -> Iterator[Strategy]:
        """With a workspace that suits the device; and with one that keeps the logits, where that is another."""
        suits = self._suiting(name, band, sample)
        yield suits.strategy
        if not suits.keeps:
            tried = (self._joint(f"{name}, logits kept", band, sample, each) for each in _powers(suits.workspace))
            yield next(found.strategy for found in tried if found is not None and found.keeps)

    def _suiting(self, name: str, band: int | None, sample: tuple[int, int] | None) -> _Joint:
        default, suits = self.processor.default_workspace, None
        for workspace in (default, *reversed([1 << exponent for exponent in range(default.bit_length() - 1)])):
            found = self._joint(name, band, sample, workspace)
            suits = found or suits
            if found is None or found.strategy.fits is not False:
                break
        if suits is not None:
            return suits
        tried = (self._joint(name, band, sample, workspace) for workspace in _powers(default))
        return next(found for found in tried if found is not None)

    def _joint(self, name: str, band: int | None, sample: tuple[int, int] | None, workspace: int) -> _Joint | None:
        """By one workspace; None where it is too small."""
        frames, labels = self._lengths
        cells = Cells(frames, labels, labels + 1 if band is None else np.full(self.B, band))
        projected = self.V if sample is None else sample[0]
        sizes = tiling.Sizes(
            self.processor, self.dtype, cells, projected, self.H, workspace, band=band is not None, sampled=sample is not None
        )
        try:
            cuts = tiling.cut(sizes)
        except ValueError:
            return None
        each = int(cells.counts[0])
        kept = sum((end - begin) * each for (begin, end), keeps in zip(cuts.groups, cuts.retained, strict=True) if keeps)
        flops = 2 * (4 * self.B * each - kept) * projected * self.H
        # What the calls leave behind, and their peaks: sampling and pruning take less than what follows and goes before.
        held, peaks, inputs, before, keywords = 0, [], self._parameters, "", []
        if sample is not None:
            held = 8 * projected
            before, keywords = _SAMPLE.format(self.V, sample[1]), ["classes=classes"]
        if band is not None:
            peaks.append(held + self._simple(projected))
            held += self._rows * projected * self._size + 2 * self._sum * self._cells + 8 * self.B * self.T
            inputs += self._rows * projected
            flops += 6 * self._cells * projected + 6 * self._rows * projected * self.H
            before += (_SLOTS if sample else "") + _PRUNE.format("slots" if sample else "targets", band)
            keywords.insert(0, "band=band")
        sums = self._parameters * self._sum
        peaks.append(held + sums + tiling.allocated(sizes, cuts, self.threads))
        if self._size != self._sum:
            peaks.append(held + sums + self._parameters * self._size)
        other = None if workspace == self.processor.default_workspace else workspace
        if other is not None:
            keywords.append(f'workspace="{_in_words(other)}"')
        call = before + _JOINT.format("".join(f", {keyword}" for keyword in keywords))
        exact = band is None and sample is None
        strategy = self._strategy(name, exact, inputs, inputs, max(peaks), flops, other, call)
        return _Joint(strategy, workspace, all(cuts.retained))

    def _simple(self, classes: int) -> int:
        """Bytes within `simple_rnnt_loss`, with its gradients and occupancies."""
        rows, scaled = self.T + self.U + 1, lattice.scaled_bytes(self.dtype)
        per_task = utterances_of_a_task(self.processor.host, self.B, rows, classes)
        tasks = min(self.threads, -(-self.B // per_task))
        spreads = tasks * per_task * rows * classes * self._sum
        within = (4 * self._sum + 2 * scaled) * self._cells + spreads + self.processor.reserved
        cast = self._rows * classes * self._size if self._size != self._sum else 0
        return int(self._rows * classes * self._sum + 2 * self._sum * self._cells + max(within, cast))


def _powers(above: int) -> Iterator[int]:
    """Powers of two above a number."""
    return (1 << exponent for exponent in itertools.count(above.bit_length()))


def _in_words(workspace: int) -> str:
    """A power of two as `workspace` takes it."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if workspace >> exponent:
            return f"{workspace >> exponent}{unit}"
    return f"{workspace}B"
