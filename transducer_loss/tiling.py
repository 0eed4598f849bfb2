"""How a joint-fused problem is cut: into groups of utterances and tiles of cells that fit its workspace."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from transducer_loss import lattice
from transducer_loss.arrays import COMPUTE, numpy_dtype
from transducer_loss.cells import Cells
from transducer_loss.checks import Options, Targets
from transducer_loss.classes import Classes
from transducer_loss.joint import Joint
from transducer_loss.shard import Shard


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cuts of a problem, and the memory that they take, depend on."""

    processor: Any
    """A processor, or the class of one, whose constants are looked at."""
    source: str
    """Dtype of the inputs."""
    cells: Cells
    """Their numbers alone count."""
    classes: int
    """That a cell is projected to."""
    features: int
    workspace: int
    band: bool = False
    sampled: bool = False
    one_by_one: bool = False
    sparse: bool = False
    copied: int = 0
    sharded: bool = False
    shared: bool = False
    """Whether utterances share their encoders."""

    @property
    def dtype(self) -> str:
        """Of sums, losses and occupancies."""
        return COMPUTE[self.source]

    @property
    def operand(self) -> str:
        """Of the matrix products' operands: the host widens half types, whose products it cannot make fast."""
        return self.dtype if self.processor.host else self.source

    @property
    def size(self) -> int:
        """Bytes of a sum."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def columns(self) -> int:
        """Labels plus one of the longest transcript."""
        return int(self.cells.labels.max()) + 1

    @property
    def per_cell(self) -> int:
        """Bytes of a group's cell: arcs and occupancies, and the lattice's values, whose memory also lists the kept cells."""
        # Shards have six numbers to make arcs of, before there are occupancies.
        return (6 if self.sharded else 5) * self.size + 2 * lattice.scaled_bytes(self.dtype)

    @property
    def per_row(self) -> int:
        """Bytes of a group's lattice row: of a band also its labels, and what they are gathered with."""
        return (80 if self.band else 8) + self.shared_row

    @property
    def shared_row(self) -> int:
        """Bytes of a row's gradient before utterances that share an encoder are added up."""
        return self.features * self.size if self.shared else 0

    @property
    def layer(self) -> int:
        """Bytes of what stands for the caller's output layer."""
        halves = numpy_dtype(self.operand).itemsize
        if self.sampled:  # gathered rows, and sums of their gradients before these are scattered; slots of the labels
            rows = self.classes * (self.features * halves + self.size) + 4 * len(self.cells.labels) * self.columns
            return rows + (0 if self.sparse else self.layer_sums)
        return self.layer_sums if self.operand != self.source else 0

    @property
    def layer_sums(self) -> int:
        """Bytes of a gradient of the output layer, or of a tile's addition to it."""
        return self.classes * (self.features + 1) * self.size

    @property
    def strip_sums(self) -> int:
        """Bytes of the sums of every strip but the first."""
        return self.layer_sums + self.columns * self.features * self.size

    def tile(self, cells: int) -> int:
        """Bytes of a tile's hidden features and logits, and of their gradients."""
        halves = numpy_dtype(self.operand).itemsize
        split = halves if self.operand != self.dtype else 0  # a half-type gradient beside float32 logits
        return cells * (self.classes * (self.size + split) + self.features * (halves + self.size))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Checked arguments of the joint-fused losses, on their processor."""

    processor: Any
    joint: Joint
    weight: Any
    """(V, H)."""
    bias: Any
    """(V,) or None."""
    cells: Cells
    targets: Targets
    options: Options
    workspace: int
    occupancy_floor: float
    copied: int = 0
    """Bytes of the inputs that had to be copied."""
    classes: Classes | None = None
    sparse: bool = False
    """Whether gradients of the output layer are of the sampled rows alone."""
    shard: Shard | None = None
    """What of the vocabulary `weight` is, where that is not all of it."""
    encoder_lengths: Any = None
    """Frames of the rows of the encoder, on the host."""

    @property
    def shared(self) -> bool:
        """Whether utterances share their encoders."""
        return self.cells.encoders is not None

    @property
    def dtype(self) -> str:
        """Of sums, losses and occupancies."""
        return COMPUTE[self.joint.encoder.dtype.name]

    @property
    def projected(self) -> int:
        """Classes that a cell is projected to."""
        return int(self.weight.shape[0]) if self.classes is None else self.classes.slots

    @property
    def one_by_one(self) -> bool:
        """Whether utterances have output layers of their own."""
        return self.classes is not None and self.classes.per_utterance

    @property
    def operand(self) -> str:
        """Of the matrix products' operands."""
        return self.sizes.operand

    @property
    def sizes(self) -> Sizes:
        """What its cuts depend on: those of shards, which meet after every group, on what all processes know."""
        classes, copied = self.projected, self.copied
        if self.shard is not None:
            classes, copied = max(self.shard.sizes), 0
        return Sizes(
            self.processor, self.joint.encoder.dtype.name, self.cells, classes, self.joint.features, self.workspace,
            self.cells.first is not None, self.classes is not None, self.one_by_one, self.sparse, copied,
            self.shard is not None, self.shared,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a problem is cut. A function of shapes, lengths and workspace alone."""

    strips: int
    tile: int
    """Cells."""
    groups: tuple[tuple[int, int], ...]
    """First and past the last utterance of each."""
    retained: tuple[bool, ...]
    """Whether a group's logits stay in the workspace."""


def plan(of: Problem) -> Plan:
    """Cut a problem so that all temporary memory stays within its workspace, or raise with the least that would do."""
    return cut(of.sizes)


def cut(of: Sizes) -> Plan:
    """See `plan`."""
    classes, size, columns, per_cell = of.classes, of.size, of.columns, of.per_cell
    # Exchange rows of lattices that are wider than the shared memory, the table of utterances, losses.
    per_utterance = 4 * lattice.scaled_bytes(of.dtype) * lattice.scratch_columns(columns) + 80
    counts, frames = of.cells.counts, of.cells.frames
    arrays = per_cell * counts + of.per_row * frames + per_utterance
    # Beside the groups' arrays: losses and weights of the batch, and what the arrays are rounded up by.
    reserved = of.layer + of.copied + of.processor.reserved + 2 * size * len(counts) + 64

    def fixed(strips: int, tile: int) -> int:
        sums = 0 if strips == 1 else of.strip_sums
        product = of.layer_sums if of.processor.host else 0
        return strips * (of.tile(tile) + tile * size + sums + product)

    full_tile = min(of.processor.tile_cells, max(32, of.processor.tile_bytes // (classes * size)))
    full_tile = min(full_tile, -(-int(counts.sum()) // of.processor.strips) + 1)
    shapes = [(strips, full_tile) for strips in (8, 4, 2) if strips <= of.processor.strips]
    tile = full_tile
    while tile > 8:
        shapes.append((1, tile))
        tile //= 2
    shapes.append((1, min(full_tile, 8)))
    least = fixed(*shapes[-1]) + reserved + int(arrays.max())
    if least > of.workspace:
        raise ValueError(
            f"workspace: expected at least {least} bytes for one tile and the longest utterance, got {of.workspace}"
        )

    def fits(shape: tuple[int, int], share: float) -> bool:
        spent = fixed(*shape) + reserved
        return bool(spent <= share * of.workspace and spent + arrays.max() <= of.workspace)

    # Half of the workspace is left to the groups where that is possible.
    strips, tile = next(shape for share in (0.5, 1.0) for shape in shapes if fits(shape, share))
    room = of.workspace - reserved - fixed(strips, tile)
    logits = classes * size * counts
    # Logits have a room of their own: their memory stays while groups are at work that keep none and have more cells.
    share = max(0.25, per_cell / (per_cell + classes * size))
    of_rows = -(-of.shared_row * int(frames.sum()) // int(counts.sum()))
    most = (per_cell + of_rows) * of.processor.group_cells
    for_arrays = max(int(arrays.max()), min(int(share * room), int(arrays.sum()), most))
    for_logits = room - for_arrays

    groups, retained = [], []
    begin, batch = 0, len(counts)
    while begin < batch:
        keep = bool(logits[begin] <= for_logits)
        end, spent, kept, cells = begin + 1, int(arrays[begin]), int(logits[begin]), int(counts[begin])
        while (
            end < batch and not of.one_by_one and cells < of.processor.group_cells and spent + arrays[end] <= for_arrays
            and (not keep or kept + logits[end] <= for_logits)
        ):  # fmt: skip
            spent, kept, cells = spent + int(arrays[end]), kept + int(logits[end]), cells + int(counts[end])
            end += 1
        groups.append((begin, end))
        retained.append(keep)
        begin = end
    return Plan(strips, tile, tuple(groups), tuple(retained))


def _adding(of: Sizes, cuts: Plan) -> int:
    """How many strips have more than one tile, whose products add up, if no cell is dropped."""
    if not of.processor.host:  # cuBLAS adds by itself
        return 0
    if len(cuts.groups) > 1 and not of.one_by_one:
        return cuts.strips

    def strips(group: tuple[int, int]) -> int:
        width = int(of.cells.width[slice(*group)].max())
        cells = int(of.cells.counts[slice(*group)].sum())
        # Strips begin with a row; rows are taken to be as wide as the widest.
        bounds = [-(-(cells * strip // cuts.strips) // width) * width for strip in range(cuts.strips + 1)]
        return sum(end - begin > cuts.tile for begin, end in itertools.pairwise(bounds))

    return max(map(strips, cuts.groups))


def allocated(of: Sizes, cuts: Plan, threads: int) -> int:
    """Bytes of the engine's arrays at their most, gradients apart: with `threads` tasks side by side, and no cell dropped.

    Less than the workspace, which is enough for any number of threads, and for all steps of a group at once.
    """
    tasks, size, scaled, each = min(threads, cuts.strips), of.size, lattice.scaled_bytes(of.dtype), of.cells.counts
    counts = [int(each[slice(*group)].sum()) for group in cuts.groups]

    def arrays(group: tuple[int, int], cells: int) -> int:
        rows, columns = int(of.cells.frames[slice(*group)].sum()), int(of.cells.labels[slice(*group)].max()) + 1
        exchange = 4 * scaled * lattice.scratch_columns(columns) * (group[1] - group[0])
        # One after the other: labels of a band's rows are gathered, the lattice runs, gradients are made.
        arcs = (6 if of.sharded else 3) * size * cells
        by_row = (16 if of.band else 8) + of.shared_row
        return max(80 * rows if of.band else 0, arcs + exchange, 5 * size * cells + by_row * rows)

    kept = max((cells for cells, keeps in zip(counts, cuts.retained, strict=True) if keeps), default=0)
    return int(
        of.layer + of.copied + of.processor.reserved + 2 * size * len(each)
        + tasks * of.tile(cuts.tile) + min(tasks, _adding(of, cuts)) * of.layer_sums + (cuts.strips - 1) * of.strip_sums
        + kept * of.classes * size + 2 * scaled * max(counts) + max(map(arrays, cuts.groups, counts))
    )  # fmt: skip
