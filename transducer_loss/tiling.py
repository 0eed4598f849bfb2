"""How a joint-fused problem is cut: into groups of utterances and tiles of cells that fit its workspace."""

from __future__ import annotations

import dataclasses
from typing import Any

from transducer_loss import lattice
from transducer_loss.arrays import COMPUTE, numpy_dtype
from transducer_loss.cells import Cells
from transducer_loss.checks import Options, Targets
from transducer_loss.joint import Joint


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

    @property
    def dtype(self) -> str:
        """Of sums, losses and occupancies."""
        return COMPUTE[self.joint.encoder.dtype.name]

    @property
    def operand(self) -> str:
        """Of the matrix products' operands: the host widens half types, whose products it cannot make fast."""
        return str(self.dtype if self.processor.host else self.joint.encoder.dtype.name)


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
    size = numpy_dtype(of.dtype).itemsize
    classes, features = of.weight.shape
    columns = int(of.cells.labels.max()) + 1
    per_cell = 5 * size + 2 * lattice.scaled_bytes(of.dtype)
    per_row = 8 if of.cells.first is None else 80  # of a band also its labels, and what they are gathered with
    # Exchange rows of lattices that are wider than the shared memory, the table of utterances, losses.
    per_utterance = 4 * lattice.scaled_bytes(of.dtype) * lattice.scratch_columns(columns) + 64
    counts, frames = of.cells.counts, of.cells.frames
    arrays = per_cell * counts + per_row * frames + per_utterance
    widened = classes * (features + 1) * size if of.operand != of.joint.encoder.dtype.name else 0
    # Beside the groups' arrays: losses and weights of the batch, and what the arrays are rounded up by.
    reserved = widened + of.copied + of.processor.reserved + 2 * size * len(counts) + 64
    split = of.operand != of.dtype  # a half-type gradient beside float32 logits
    halves = numpy_dtype(of.operand).itemsize

    def fixed(strips: int, tile: int) -> int:
        of_tile = tile * (classes * (size + (halves if split else 0)) + features * (halves + size) + size)
        sums = 0 if strips == 1 else classes * (features + 1) + columns * features
        product = classes * (features + 1) if of.processor.host else 0
        return int(strips * (of_tile + (sums + product) * size))

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
    for_arrays = max(int(arrays.max()), min(int(share * room), int(arrays.sum()), per_cell * of.processor.group_cells))
    for_logits = room - for_arrays

    groups, retained = [], []
    begin, batch = 0, len(counts)
    while begin < batch:
        keep = bool(logits[begin] <= for_logits)
        end, spent, kept, cells = begin + 1, int(arrays[begin]), int(logits[begin]), int(counts[begin])
        while (
            end < batch and cells < of.processor.group_cells and spent + arrays[end] <= for_arrays
            and (not keep or kept + logits[end] <= for_logits)
        ):  # fmt: skip
            spent, kept, cells = spent + int(arrays[end]), kept + int(logits[end]), cells + int(counts[end])
            end += 1
        groups.append((begin, end))
        retained.append(keep)
        begin = end
    return Plan(strips, tile, tuple(groups), tuple(retained))
