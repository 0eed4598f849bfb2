"""Where a loss that is not finite goes wrong: in the lattice of an utterance, as its arcs tell."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from transducer_loss.arrays import as_numpy
from transducer_loss.cells import Group, Ints
from transducer_loss.checks import TOPOLOGIES, Options
from transducer_loss.softmax import Arcs

HIGHEST_WEIGHT = 10_000.0
"""Log-weights above it are not finite to the lattice: of kernels/lattice.cu, as is the next."""

LOWEST_WEIGHT = -(2.0**28) * float(np.log(2.0))
"""Log-weights below it are probabilities of 0."""

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason, and where it lies.

    Attributes
    ----------
    cause : str
        ``"value"`` (an input holds NaN or an infinity), ``"overflow"`` (of finite inputs, in the joint), ``"weight"`` (a
        log-probability above 10,000), ``"label"``, ``"length"``, ``"band"``, ``"probability"`` (0 on every path) or
        ``"gradient"``.
    argument : str
        The argument of the loss that it lies in.
    index : tuple of int, or None
        Of the first such element of that argument.
    frame, label : int or None
        First cell (t, u) of the utterance that is spoiled by it, or at which paths end.
    text : str
        All this in words.
    """

    cause: str
    argument: str
    index: tuple[int, ...] | None
    frame: int | None
    label: int | None
    text: str

    def __str__(self) -> str:
        return self.text


class Inputs(Protocol):
    """What is asked of the arguments of a loss."""

    known: Ints
    """(B, U) targets."""
    blank: int

    def where(self, lattice: Lattice, t: int, u: int, v: int) -> tuple[str, tuple[int, ...] | None]:
        """Which argument made the probability of class v in a cell 0, and at which index, where one alone did."""


def place(argument: str, index: tuple[Any, ...]) -> str:
    """An element, as Python writes it."""
    return f"{argument}[{', '.join(map(str, index))}]"


def counted(number: int, noun: str, plural: str = "") -> str:
    """As "1 frame" and "2 frames"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_of(cells: Bools) -> tuple[int, int]:
    """The earliest frame's first label among the cells (T, U+1)."""
    t, u = np.unravel_index(int(np.argmax(cells)), cells.shape)
    return int(t), int(u)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The arcs of one utterance, on the host and in full rows of U_b + 1 labels."""

    utterance: int
    frames: int
    labels: int
    options: Options
    first: Ints
    """(T,) first label of each row; as `end`, one past its last."""
    end: Ints
    real: Bools
    """(T, U+1) cells that the rows hold."""
    blank: Floats
    """(T, U+1) log-probabilities; -inf where no row is."""
    label: Floats
    """Likewise, with the delay penalty and what a topology adds."""
    own: Floats
    """Likewise, as the softmax gives them."""

    @classmethod
    def of_group(cls, processor: Any, group: Group, row: int, cells: Any, arcs: Arcs, options: Options) -> Lattice:
        """Utterance `row` of a group."""
        b = group.begin + row
        frames, labels, width = (int(array[b]) for array in (cells.frames, cells.labels, cells.width))
        first, end = np.zeros(frames, np.int64), np.full(frames, labels + 1)
        if group.spans is not None:
            begin = int(cells.frames[group.begin : b].sum())
            spans = processor.to_host(group.spans[begin : begin + frames]).astype(np.int64)
            first, end = spans[:, 0], spans[:, 1]
        columns = first[:, None] + np.arange(width)
        held = columns < end[:, None]
        rows, columns = np.broadcast_to(np.arange(frames)[:, None], held.shape)[held], columns[held]
        part = slice(group.offsets[row], group.offsets[row + 1])

        def dense(packed: Any) -> Floats:
            full = np.full((frames, labels + 1), -np.inf)
            full[rows, columns] = as_numpy(packed[part]).reshape(frames, width)[held]
            return full

        real = np.zeros((frames, labels + 1), np.bool_)
        real[rows, columns] = True
        blank, own = dense(arcs.log_blank), dense(arcs.log_label)
        label = own + options.delay_penalty * (0.5 * (frames - 1 - 2 * np.arange(frames)))[:, None]
        if TOPOLOGIES[options.topology] == "constrained":
            with np.errstate(invalid="ignore"):
                label[:, :-1] += blank[:, 1:]
        return cls(b, frames, labels, options, first, end, real, blank, label, own)

    def spoiled(self) -> Bools:
        """Cells whose own log-probabilities are NaN or too high: what makes a loss NaN, on a path or not."""
        return self.real & ~((self.blank <= HIGHEST_WEIGHT) & (self.own <= HIGHEST_WEIGHT))

    def too_likely(self) -> Finding:
        """A label arc that gets too high by what is added to it."""
        t, u = first_of(self.real & (self.label > HIGHEST_WEIGHT))
        return Finding(
            "weight", "delay_penalty" if self.options.delay_penalty else "logits", None, t, u,
            f"label {u} has log-probability {self.label[t, u]:.4g}, with what is added to it: above {HIGHEST_WEIGHT:,.0f}",
        )  # fmt: skip

    def out_of_order(self) -> Finding | None:
        """Rows of a band that are none."""
        before = np.maximum(np.arange(self.frames) - 1, 0)
        odd = (self.end < 0) | (self.first < self.first[before]) | (self.end < self.end[before])
        if not odd.any():
            return None
        t = int(np.argmax(odd))
        return Finding(
            "band", "band", (self.utterance, t), t, None,
            f"the band's row {t} holds labels [{self.first[t]}, {self.end[t]}): rows begin and end from 0 on, never falling",
        )  # fmt: skip

    def no_path(self, inputs: Inputs) -> Finding:
        """Why no path leads through."""
        b, later = self.utterance, TOPOLOGIES[self.options.topology] != "regular"
        if later and self.labels > self.frames:
            return Finding(
                "length", "target_lengths", (b,), None, None,
                f"no path: topology {TOPOLOGIES[self.options.topology]!r} emits one label a frame at most: "
                f"{counted(self.labels, 'label')} in {counted(self.frames, 'frame')}",
            )  # fmt: skip
        nodes = np.vstack([self.real, np.arange(self.labels + 1) == self.labels])
        blanks, labels = self.real, self.real[:, :-1]
        if TOPOLOGIES[self.options.topology] == "constrained":
            labels = labels & self.real[:, 1:]
        reached = _reached(nodes, blanks, labels, later)
        if not reached[-1, -1]:
            return self._cut_by_band(reached)
        wanted = _reached(nodes[::-1, ::-1], blanks[::-1, ::-1], labels[::-1, ::-1], later, backwards=True)[::-1, ::-1]
        shut_blank, shut_label = (~(weight > LOWEST_WEIGHT) for weight in (self.blank, self.label[:, :-1]))
        reached = _reached(nodes, blanks & ~shut_blank, labels & ~shut_label, later)
        if reached[-1, -1]:
            return Finding(
                "probability", "logits", None, None, None,
                f"no path of a probability above exp({LOWEST_WEIGHT:.2g}), below which the loss takes it for 0",
            )  # fmt: skip
        # Arcs from where paths come to where they would have to go on; those are all shut.
        ahead = wanted & ~reached
        label_rows = slice(1, None) if later else slice(None, -1)
        cut_blank = reached[:-1] & blanks & ahead[1:]
        cut_label = reached[:-1, :-1] & labels & ahead[label_rows, 1:]
        cut = cut_blank.copy()
        cut[:, :-1] |= cut_label
        t, u = first_of(cut)
        by_label = not cut_blank[t, u]
        known = inputs.known[self.utterance]
        which, weight = f"the blank (class {inputs.blank})", self.blank[t, u]
        argument, index = inputs.where(self, t, u, inputs.blank)
        if by_label:
            which, weight = f"label {u} (class {known[u]})", self.label[t, u]
            argument, index = inputs.where(self, t, u, int(known[u]))
            if self.own[t, u] > LOWEST_WEIGHT:  # so it is shut by what is added to it
                if TOPOLOGIES[self.options.topology] == "constrained" and not self.blank[t, u + 1] > LOWEST_WEIGHT:
                    which += " with the blank after it"
                    argument, index = inputs.where(self, t, u + 1, inputs.blank)
                elif self.options.delay_penalty:
                    argument, index = "delay_penalty", None
        by = counted(int(cut_blank.sum() + cut_label.sum()), "such arc")
        text = f"no path: after {counted(u, 'label')}, {which} has log-probability {weight:.4g}; paths are cut by {by}"
        return Finding("probability", argument, index, t, u, text)

    def _cut_by_band(self, reached: Bools) -> Finding:
        alive = reached.any(axis=1)
        t = int(np.argmin(alive))
        b = self.utterance
        if t == 0:
            text = f"row 0 holds labels [{self.first[0]}, {self.end[0]}), and paths begin with none"
        elif t == self.frames:
            t -= 1
            text = f"paths end in the last row, {t}, at labels {_listed(reached[t])}, and there are U = {self.labels}"
        else:
            came = _listed(reached[t - 1])
            text = f"paths come to labels {came} in row {t - 1}, and row {t} holds [{self.first[t]}, {self.end[t]})"
        return Finding("band", "band", (b, t), t, None, f"no path in the band: {text}")


def _listed(reached: Bools) -> str:
    at = np.flatnonzero(reached)
    return f"{at[0]} to {at[-1]}" if len(at) > 1 else str(at[0])


def _reached(nodes: Bools, blanks: Bools, labels: Bools, later: bool, backwards: bool = False) -> Bools:
    """Nodes (T+1, U+1) that open arcs lead to from the first; the last row is the end of the lattice.

    ``blanks[t]`` leads from row t to row t + 1, ``labels[t]`` to the next label of row t, or with `later` of row t + 1. With
    `backwards` all arrays are turned round, and arcs are found where they end.
    """
    columns = np.arange(nodes.shape[1])
    reached = np.zeros_like(nodes)
    for t in range(len(nodes)):
        now = nodes[t] & (columns == 0) if t == 0 else reached[t - 1] & blanks[t - 1]
        if later and t > 0:
            now[1:] |= reached[t - 1, :-1] & labels[t - 1]
        now &= nodes[t]
        row = t - 1 if backwards else t
        if not later and 0 <= row < len(labels):
            # A label is reached if the last way into its row lies behind the last shut arc.
            open_into = np.concatenate([[False], labels[row] & nodes[t, 1:]])
            entered = np.maximum.accumulate(np.where(now, columns, -1))
            now = (entered >= np.maximum.accumulate(np.where(open_into, 0, columns))) & nodes[t]
        reached[t] = now
    return reached
