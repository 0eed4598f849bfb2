"""Launches of `kernels/simple_joint.cu`: the sums, arcs and gradients of a joiner that only adds."""

from __future__ import annotations

import dataclasses
from typing import Any

from transducer_loss.arrays import COMPUTE, element_strides
from transducer_loss.cells import Group
from transducer_loss.checks import Targets


@dataclasses.dataclass(frozen=True)
class SimpleJoint:
    """am (B, T, V) and lm (B, U+1, V), classes dense, and how their three distributions are mixed."""

    processor: Any
    group: Group
    """Cells in (B, T, U + 1) arrays."""
    am: Any
    lm: Any
    targets: Targets
    blank: int
    lm_only: float
    am_only: float
    shared_unigram: bool

    @property
    def dtype(self) -> str:
        """Of sums and gradients."""
        return COMPUTE[self.am.dtype.name]

    @property
    def classes(self) -> int:
        """V."""
        return int(self.am.shape[2])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, U + 1)."""
        return (*self.am.shape[:2], self.lm.shape[1])

    def launch(self, name: str, typed: str, blocks: int, columns: int, *arguments: Any, **how: Any) -> None:
        """Run a kernel of the file; `typed` is the dtype of its instance, if it has one."""
        self.processor.launch(f"simple_joint_{name}" + (f"<{typed}>" if typed else ""), blocks, columns, *arguments, **how)

    def inputs(self) -> tuple[Any, ...]:
        """am, lm and targets as kernels take them."""
        return (
            self.am, *element_strides(self.am)[:2], self.lm, *element_strides(self.lm)[:2], self.classes,
            *self.targets.arguments, self.blank, self.lm_only, self.am_only,
        )  # fmt: skip


@dataclasses.dataclass
class Sums:
    """What the arcs and the gradients are made of."""

    products: Any
    """(B, T, U+1): sums of products of exponentials; later the ratios of occupancy and product."""
    am_highest: Any
    am_sums: Any
    """(B, T): of am alone, under the unigram."""
    lm_highest: Any
    lm_sums: Any
    unigram: Any
    """(B, V), or (1, V) where it is shared: log probabilities; None where it has no part."""
    direct: Any
    """(B, T, U+1): normalisers of cells that are summed directly, +inf elsewhere."""

    @property
    def unigram_stride(self) -> int:
        """Elements from one utterance's unigram to the next."""
        return 0 if self.unigram is None or len(self.unigram) == 1 else int(self.unigram.shape[1])


def empty_sums(of: SimpleJoint) -> Sums:
    """Arrays for them."""
    empty, (batch, frames, columns) = of.processor.empty, of.shape
    unigram = empty((1 if of.shared_unigram else batch, of.classes), of.dtype) if of.am_only else None
    return Sums(
        empty(of.shape, of.dtype), empty((batch, frames), of.dtype), empty((batch, frames), of.dtype),
        empty((batch, columns), of.dtype), empty((batch, columns), of.dtype), unigram, empty(of.shape, of.dtype),
    )  # fmt: skip


def exponentials(of: SimpleJoint, sums: Sums, begin: int, end: int, of_am: Any, of_lm: Any) -> None:
    """Exponentials of the rows of utterances [begin, end), their largest logits and log-sums."""
    for of_labels, rows, out, highest, log_sum in (
        (0, of.am, of_am, sums.am_highest, sums.am_sums), (1, of.lm, of_lm, sums.lm_highest, sums.lm_sums)
    ):  # fmt: skip
        padded = rows.shape[1]
        of.launch(
            "exponentials", rows.dtype.name, (end - begin) * padded, of.classes,
            (end - begin) * padded, begin * padded, of.group.table, of_labels, int(of.shared_unigram and of_labels), rows,
            padded, *element_strides(rows)[:2], of.classes, out, highest, log_sum, alone=True,
        )  # fmt: skip


def unigram(of: SimpleJoint, sums: Sums) -> None:
    """Mean of the softmaxes of lm, and the sums of am under it."""
    batch, frames, columns = of.shape
    source = of.am.dtype.name
    number = len(sums.unigram)
    of.launch(
        "unigram", source, number, of.classes,
        number, of.group.table, batch, int(of.shared_unigram), of.lm, columns, *element_strides(of.lm)[:2], of.classes,
        sums.lm_sums, sums.unigram, steps=2 * columns,
    )  # fmt: skip
    of.launch(
        "unigram_sums", source, of.group.rows, of.classes,
        of.group.rows, of.group.table, batch, of.am, *element_strides(of.am)[:2], of.classes, sums.unigram,
        sums.unigram_stride, frames, sums.am_sums,
    )  # fmt: skip


def arcs(of: SimpleJoint, sums: Sums, log_blank: Any, log_label: Any) -> None:
    """Log-probabilities of every cell's two arcs."""
    batch, frames = of.shape[:2]
    of.launch(
        "arcs", of.am.dtype.name, of.group.rows, of.classes,
        of.group.rows, of.group.table, batch, *of.inputs(), sums.products, sums.am_highest, sums.lm_highest, sums.lm_sums,
        sums.unigram, sums.unigram_stride, sums.am_sums, frames, sums.direct, log_blank, log_label,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shares:
    """Occupancies as the gradients need them."""

    blank: Any
    label: Any
    row_sums: Any
    """(B, T): of both arcs."""
    blank_sums: Any
    label_sums: Any
    """(B, U+1): over the frames."""
    chains: Any
    """(B, U+1) int32: which labels are the same."""
    excess: Any
    """What the unigrams are asked for beyond their share, shaped as they are; or None."""
    loss: Any
    weights: Any


def shares(of: SimpleJoint, sums: Sums, occupancy: tuple[Any, Any], loss: Any, weights: Any) -> Shares:
    """Sums of the occupancies; turns the products into ratios."""
    empty, (batch, frames, columns) = of.processor.empty, of.shape
    blank, label = occupancy
    row_sums, chains = empty((batch, frames), of.dtype), empty((batch, columns), "int32")
    blank_sums, label_sums = (empty((batch, columns), of.dtype) for _ in range(2))
    of.launch(
        "ratios", of.dtype, of.group.rows, columns,
        of.group.rows, of.group.table, batch, blank, label, loss, frames, sums.products, row_sums, per_thread=1,
    )  # fmt: skip
    of.launch(
        "column_sums", of.dtype, batch * columns, frames,
        batch * columns, of.group.table, blank, label, blank_sums, label_sums,
    )  # fmt: skip
    of.launch("chains", "", batch, columns, batch, of.group.table, *of.targets.arguments, columns, chains, per_thread=1)
    excess = None
    if sums.unigram is not None:
        excess = empty((batch, of.classes), of.dtype)
        of.launch(
            "backward_unigram", of.am.dtype.name, batch, of.classes,
            batch, of.group.table, of.am, *element_strides(of.am)[:2], of.classes, *of.targets.arguments, of.blank, chains,
            sums.unigram, sums.unigram_stride, sums.am_sums, row_sums, blank_sums, label_sums, frames, loss, weights, excess,
            steps=frames,
        )  # fmt: skip
        if of.shared_unigram:
            excess = excess.sum(axis=0, keepdims=True)
    return Shares(blank, label, row_sums, blank_sums, label_sums, chains, excess, loss, weights)


def backward(
    of: SimpleJoint, sums: Sums, shares: Shares, begin: int, end: int, am_spread: Any, lm_spread: Any, am: Any, lm: Any
) -> None:
    """Gradients of the rows of utterances [begin, end), in place of their exponentials `am` and `lm`."""
    batch, frames, columns = of.shape
    source = of.am.dtype.name
    of.launch(
        "backward_am", source, (end - begin) * frames, of.classes,
        (end - begin) * frames, begin * frames, of.group.table, *of.inputs(), shares.chains, sums.unigram,
        sums.unigram_stride, sums.am_sums, shares.row_sums, sums.direct, shares.blank, shares.label, frames, shares.loss,
        shares.weights, am_spread, am, alone=True,
    )  # fmt: skip
    of.launch(
        "backward_lm", source, (end - begin) * columns, of.classes,
        (end - begin) * columns, begin * columns, of.group.table, *of.inputs(), int(of.shared_unigram),
        batch * columns if of.shared_unigram else 0, sums.unigram, shares.excess, sums.unigram_stride, sums.lm_sums,
        shares.blank_sums, shares.label_sums, sums.direct, shares.blank, shares.label, shares.loss, shares.weights,
        lm_spread, lm, alone=True,
    )  # fmt: skip
