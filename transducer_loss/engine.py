"""The two-pass engine of the joint-fused loss: groups of utterances, tiles of cells, bounded memory.

For each group: tiles of joint, matrix product and softmax leave 12 bytes a cell (pass one); the lattice turns them into
occupancies; tiles of the cells that matter turn those into gradients (pass two). Where the workspace holds a group's logits,
pass two finds their exponentials there, else it makes them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from transducer_loss import compact, joint, lattice, monitor, output_layer, softmax
from transducer_loss.arrays import numpy_dtype
from transducer_loss.cells import Group
from transducer_loss.processors import Workers
from transducer_loss.tiling import Problem, plan


@dataclasses.dataclass(frozen=True)
class Saved:
    """What pass two needs of the cells of a group, or of all groups one after the other. Never modified."""

    normaliser: Any
    occupancy: tuple[Any, Any]
    logits: Any = None
    """Exponentials of the cells, or None where they are to be made again."""

    @property
    def vectors(self) -> tuple[Any, Any, Any]:
        """All but the logits: an array of a number for each cell."""
        return self.normaliser, *self.occupancy

    def part(self, begin: int, end: int) -> Saved:
        """Of cells [begin, end)."""
        normaliser, blank, label = (vector[begin:end] for vector in self.vectors)
        return Saved(normaliser, (blank, label))


@dataclasses.dataclass
class Gradients:
    """Sums in the compute dtype: the framework's arrays, and views of them."""

    native: tuple[Any, Any, Any, Any]
    encoder: Any
    predictor: Any
    weight: Any
    bias: Any
    kept: int = 0
    unscale: Any = 1.0
    """Factor that the finished sums are still to be multiplied by."""


@dataclasses.dataclass
class _Tile:
    """Scratch of one task."""

    hidden: Any
    logits: Any
    gradient: Any
    hidden_gradient: Any
    product: Any = None
    column_sums: Any = None


@dataclasses.dataclass
class _Strip:
    """Sums of the tiles of one strip, which lie in order. `carry`: of the utterance that an earlier strip began."""

    weight: Any
    bias: Any
    carry: Any
    used: bool = False
    carried: int = -1

    def add(self, other: _Strip) -> None:
        """Add another's sums, or take them where there are none yet."""
        for mine, theirs in ((self.weight, other.weight), (self.bias, other.bias)):
            if theirs is not None:
                if self.used:
                    mine += theirs
                else:
                    mine[...] = theirs
        self.used = True


class Engine:
    """Runs one problem. Use inside ``with problem.processor``."""

    def __init__(self, of: Problem) -> None:
        self.of, self.plan, self.processor = of, plan(of), of.processor
        processor, operand = self.processor, of.operand
        self.classes, self.features = of.projected, of.joint.features
        self.targets, self.options = of.targets, of.options
        if of.classes is None:
            widen = operand != of.joint.encoder.dtype.name
            self.weight = of.weight.astype(operand) if widen else of.weight
            self.bias = None if of.bias is None else processor.dense(of.bias, of.dtype)
        else:
            self.targets = output_layer.slots_of(processor, of.classes, of.cells.labels, of.targets)
            self.options = dataclasses.replace(of.options, blank=0)
            self.weight = processor.empty((self.classes, self.features), operand)
            has_bias = of.bias is not None or of.classes.correction
            self.bias = processor.empty((self.classes,), of.dtype) if has_bias else None
            if not of.one_by_one:
                output_layer.gather(processor, of.classes, 0, of.weight, of.bias, self.weight, self.bias)
        self.ones = processor.to_device(np.ones((self.plan.tile, 1), numpy_dtype(operand)))
        cells = max(int(of.cells.counts[slice(*g)].sum()) for g in self.plan.groups)
        self.scratch = processor.empty((2 * lattice.scaled_bytes(of.dtype) * cells + 16,), "uint8")
        self.tiles = Workers(self._tile, min(processor.threads, self.plan.strips))

    def _tile(self) -> _Tile:
        empty, tile, of = self.processor.empty, self.plan.tile, self.of
        logits = empty((tile, self.classes), of.dtype)
        return _Tile(
            hidden=empty((tile, self.features), of.operand),
            logits=logits,
            gradient=logits if of.operand == of.dtype else empty((tile, self.classes), of.operand),
            hidden_gradient=empty((tile, self.features), of.dtype),
        )

    @functools.cached_property
    def retained(self) -> Any:
        """Room for the logits of the largest group that keeps them; not made where there is no second pass at once."""
        kept = (group for group, keeps in zip(self.plan.groups, self.plan.retained, strict=True) if keeps)
        most = max(int(self.of.cells.counts[slice(*group)].sum()) for group in kept)
        return self.processor.empty((most, self.classes), self.of.dtype)

    def groups(self) -> Iterator[tuple[Group, bool]]:
        """The groups, and whether the workspace holds their logits; each with the output layer of its utterances."""
        for (begin, end), retained in zip(self.plan.groups, self.plan.retained, strict=True):
            if self.of.classes is not None and self.of.one_by_one:
                output_layer.gather(
                    self.processor, self.of.classes, begin, self.of.weight, self.of.bias, self.weight, self.bias
                )  # fmt: skip
            yield self.of.cells.group(self.processor, begin, end), retained

    def arcs(self, group: Group, keep: bool) -> tuple[softmax.Arcs, Any]:
        """Pass one: arcs of a group's cells, and with `keep` the exponentials of their logits."""
        shard, log_sum = self.of.shard, None
        if shard is None:
            arcs = softmax.empty_arcs(self.processor, group.cells, self.of.dtype)
        else:
            arcs, log_sum, exchanged = softmax.sharded_arcs(self.processor, group.cells, self.of.dtype)
        logits = self.retained[: group.cells] if keep else None
        self.processor.run([
            functools.partial(self._arcs_of_tile, group, arcs, log_sum, logits, begin, end)
            for begin, end in _spans(0, group.cells, self.plan.tile)
        ])
        if shard is not None:
            softmax.join(self.processor, shard, self.options, keep, arcs, log_sum, exchanged)
        return arcs, logits

    def _logits(self, group: Group, kept: Any, begin: int, hidden: Any, logits: Any, loss: Any = None) -> None:
        joint.forward(self.processor, group, self.of.joint, kept, begin, hidden, loss)
        self.processor.gemm(hidden, self.weight.T, logits)

    def _arcs_of_tile(
        self, group: Group, arcs: softmax.Arcs, log_sum: Any, retained: Any, begin: int, end: int
    ) -> None:
        with self.tiles.one() as tile:
            logits = tile.logits[: end - begin] if retained is None else retained[begin:end]
            self._logits(group, None, begin, tile.hidden[: end - begin], logits)
            softmax.forward(
                self.processor, group, logits, self.targets, self.options, arcs, begin, end - begin,
                keep=retained is not None, alone=True, bias=self.bias, shard=self.of.shard, log_sum=log_sum,
            )  # fmt: skip

    def occupancy(self, group: Group, arcs: softmax.Arcs, loss: Any, reported: Any, gradient: bool) -> tuple[Any, Any] | None:
        """Loss of the group's utterances; and effective occupancies where there will be a `gradient`."""
        values = lattice.sums(self.processor, group, arcs, self.of.options, loss, reported, self.scratch)
        if not gradient:
            return None
        pair = (
            self.processor.empty((group.cells,), self.of.dtype),
            self.processor.empty((group.cells,), self.of.dtype),
        )
        lattice.occupancy(self.processor, group, arcs, self.of.options, values, True, pair)
        monitor.emission_delay(self.of.cells, group, pair[1], self.of.options.fastemit_lambda)
        return pair

    def gradients(self) -> Gradients:
        """Zeros to add to."""
        of, processor = self.of, self.processor
        weight = of.weight.shape
        if of.classes is not None and of.sparse:
            weight = (*of.classes.ids.shape, self.features)
        pairs = [
            processor.output(shape, of.dtype, zero=True)
            for shape in (of.joint.encoder.shape, of.joint.predictor.shape, weight, weight[:-1])[: 3 if of.bias is None else 4]
        ]
        natives, views = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if of.bias is None:
            natives, views = [*natives, None], [*views, None]
        return Gradients(tuple(natives), *views)

    def strips(self, gradients: Gradients) -> list[_Strip]:
        """Partial sums, one for each strip, the first of them in the gradients themselves where they are not scattered."""
        empty, of = self.processor.empty, self.of

        def sums() -> tuple[Any, Any]:
            bias = None if of.bias is None else empty((self.classes, 1), of.dtype)
            return empty((self.classes, self.features), of.dtype), bias

        if of.classes is not None and not of.sparse:
            strips = [_Strip(*sums(), None)]
        else:
            strips = [_Strip(*_first_sums(gradients, 0 if of.one_by_one else ...), None)]
        if self.plan.strips > 1:
            columns = int(of.cells.labels.max()) + 1
            strips += [
                _Strip(*sums(), empty((columns, self.features), of.dtype)) for _ in range(self.plan.strips - 1)
            ]
        return strips

    def backward(
        self, group: Group, saved: Saved, loss: Any, weights: Any, weight: float, strips: list[_Strip], gradients: Gradients
    ) -> None:
        """Pass two: add the gradient of ``weight * sum_b weights_b loss_b`` of a group to the strips and `gradients`."""
        if self.of.occupancy_floor > 0:
            kept = compact.kept_cells(
                self.processor, group, saved.occupancy, loss, weights, self.of.occupancy_floor, self.scratch
            )
        else:
            kept = compact.Kept(None, None, group.cells, None)
        gradients.kept += kept.number
        by_encoder = gradients.encoder
        if self.of.shared:  # sums of the utterances' own, first: they may be worked on side by side
            by_encoder = self.processor.empty((group.rows, self.features), self.of.dtype)
            self.processor.zero(by_encoder)
        if self.of.one_by_one and self.of.sparse:
            strips[0].weight, strips[0].bias = _first_sums(gradients, group.begin)
        bounds = self._bounds(group, kept)
        tasks = []
        for strip, (begin, end) in zip(strips, itertools.pairwise(bounds), strict=True):
            strip.carried = -1
            if end > begin:
                tasks.append(functools.partial(
                    self._backward_of_strip, strip, group, saved, kept, begin, end, loss, weights, weight, by_encoder,
                    gradients.predictor,
                ))  # fmt: skip
        self.processor.run(tasks)
        if self.of.shared:
            joint.backward_shared(self.processor, group, by_encoder, gradients.encoder)
        for strip in strips:
            if strip.carried >= 0:
                labels = int(self.of.cells.labels[group.begin + strip.carried]) + 1
                gradients.predictor[group.begin + strip.carried, :labels] += strip.carry[:labels]
        if self.of.one_by_one:
            self._add_up(strips, gradients, group.begin)

    def _bounds(self, group: Group, kept: compact.Kept) -> list[int]:
        """Where strips begin in the list of kept cells: about equal parts, each beginning with a lattice row."""
        if self.plan.strips == 1:
            return [0, kept.number]
        if kept.before_row is None:
            part = slice(group.begin, group.begin + group.count)
            starts = np.concatenate([[0], np.cumsum(np.repeat(self.of.cells.width[part], self.of.cells.frames[part]))])
        else:
            starts = kept.before_row
        wanted = [kept.number * strip // self.plan.strips for strip in range(self.plan.strips + 1)]
        return [int(starts[i]) for i in np.searchsorted(starts, wanted)]

    def _utterances(self, group: Group, kept: compact.Kept, begin: int, end: int) -> tuple[int, int]:
        """Utterances of the group that have one of the kept cells [begin, end), or all where only the device knows."""
        if kept.cells is None:
            cells = begin, end - 1
        elif self.processor.host:
            cells = kept.cells.view(np.int64)[[begin, end - 1]]
        else:
            return 0, group.count
        low, high = np.searchsorted(group.offsets, cells, side="right") - 1
        return int(low), int(high) + 1

    def _backward_of_strip(
        self, strip: _Strip, group: Group, saved: Saved, kept: compact.Kept, begin: int, end: int, loss: Any,
        weights: Any, weight: float, by_encoder: Any, by_predictor: Any,
    ) -> None:  # fmt: skip
        of, processor = self.of, self.processor
        if self.plan.strips > 1:
            first = self._utterances(group, kept, begin, begin + 1)[0]
            start = group.offsets[first] if kept.positions is None else kept.positions.view(np.int64)[group.offsets[first]]
            if start < begin:
                strip.carried = first
                strip.carry[...] = 0
        with self.tiles.one() as tile:
            for low, high in _spans(begin, end, self.plan.tile):
                cells = high - low
                hidden, gradient, hidden_gradient = (
                    buffer[:cells] for buffer in (tile.hidden, tile.gradient, tile.hidden_gradient)
                )
                logits = tile.logits[:cells]
                if saved.logits is None:
                    self._logits(group, kept.cells, low, hidden, logits, loss)
                else:
                    joint.forward(processor, group, of.joint, kept.cells, low, hidden, loss)
                    logits = saved.logits
                softmax.backward(
                    processor, group, kept.cells, low, logits, saved.logits is not None, self.bias,
                    self.targets, self.options, saved.normaliser, saved.occupancy, weights, weight, gradient, of.shard,
                )  # fmt: skip
                if strip.used and tile.product is None and processor.host:  # cuBLAS adds by itself
                    tile.product = processor.empty((self.classes, self.features), of.dtype)
                    tile.column_sums = processor.empty((self.classes, 1), of.dtype)
                # The first product is written, not added: the partial sums need no zeros.
                processor.gemm(gradient.T, hidden, strip.weight, strip.used, tile.product)
                if strip.bias is not None:
                    processor.gemm(gradient.T, self.ones[:cells], strip.bias, strip.used, tile.column_sums)
                strip.used = True
                processor.gemm(gradient, self.weight, hidden_gradient)
                joint.backward(
                    processor, group, of.joint, kept.cells, kept.positions, low, self._utterances(group, kept, low, high),
                    loss, hidden, hidden_gradient, by_encoder, by_predictor, strip.carried, strip.carry,
                )  # fmt: skip

    def scaled(self, weights: Any, weight: float, gradients: Gradients) -> tuple[Any, float]:
        """The weights as tiles of float16 take them: by a power of two so large that no gradient underflows."""
        if self.of.operand != "float16":
            return weights, weight
        if weights is None:
            exponent = 10 - math.frexp(weight)[1]
            gradients.unscale = 2.0**-exponent
            return None, weight * 2.0**exponent
        scale, gradients.unscale = self.processor.power_of_two_above(weights)
        return weights * scale, weight

    def _add_up(self, strips: list[_Strip], gradients: Gradients, row: int) -> None:
        """The strips' sums, in order, to the gradients of the output layer, and new sums to begin with."""
        total = strips[0]
        for strip in strips[1:]:
            if strip.used:
                total.add(strip)
        if self.of.classes is not None and not self.of.sparse and total.used:
            output_layer.scatter(
                self.processor, self.of.classes, row, total.weight, total.bias, gradients.weight, gradients.bias
            )
        for strip in strips:
            strip.used = False

    def finish(self, strips: list[_Strip], gradients: Gradients) -> Gradients:
        """Add the strips' sums, and what other shards have to say of the hidden features; undo the scale."""
        cells = int(self.of.cells.counts.sum())
        monitor.dropped_share(cells - gradients.kept, cells)
        if not self.of.one_by_one:
            self._add_up(strips, gradients, 0)
        if self.of.shard is not None:
            for array in (gradients.encoder, gradients.predictor):
                self.of.shard.all_reduce(array, "sum")
        if self.of.operand == "float16":
            for array in (gradients.encoder, gradients.predictor, gradients.weight, gradients.bias):
                if array is not None:
                    array *= gradients.unscale
        return gradients


def _first_sums(gradients: Gradients, row: Any) -> tuple[Any, Any]:
    """The first strip's sums where they are gradients themselves: of all, or of one utterance."""
    return gradients.weight[row], None if gradients.bias is None else gradients.bias[row].reshape(-1, 1)


def _spans(begin: int, end: int, most: int) -> list[tuple[int, int]]:
    """[begin, end) in equal parts of at most `most`: no short tile at the end, whose matrix products would be slow."""
    parts = max(1, -(-(end - begin) // most))
    bounds = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


@contextlib.contextmanager
def running(of: Problem) -> Iterator[Engine]:
    """The engine of a problem, on its processor."""
    with of.processor:
        yield Engine(of)
