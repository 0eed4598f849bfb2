"""What the lattice knows beside the loss: the occupancy of its arcs, and the best path."""

from __future__ import annotations

import dataclasses
from typing import Any

from transducer_loss import joint_loss, lattice, logits_loss, softmax
from transducer_loss.engine import running
from transducer_loss.tiling import Problem


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Posterior probability of every arc.

    Attributes
    ----------
    blank, label : (B, T, U+1) array, or (B, T, S) with a band
        That a path takes the blank, or the label, out of cell (t, u); 0 in the padding. Over any cut of a lattice they
        sum to 1. Of packed logits T and U are the longest.
    loss : (B,) array
        As of the loss function.
    """

    blank: Any
    label: Any
    loss: Any


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The most probable path.

    Attributes
    ----------
    frames : (B, U) array of int64
        Frame at which each of the targets is emitted; -1 past U_b, and for an utterance without a path.
    score : (B,) array of float64
        Log-probability of the path; -inf without one, NaN for logits that are not finite.
    """

    frames: Any
    score: Any


def _each_arcs(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Problem, and an iterator of (group, arcs), for the arguments of either loss."""
    if len(inputs) == 4:
        of = logits_loss.problem(*inputs, **{**_DEFAULTS, "normalized": False, **options})

        def arcs_of_logits() -> Any:
            with of.processor as processor:
                arcs = softmax.empty_arcs(processor, of.group.cells, of.dtype)
                softmax.forward(processor, of.group, of.logits, of.targets, of.options, arcs)
                yield of.group, arcs

        return of, arcs_of_logits()
    if len(inputs) != 7:
        raise TypeError(
            "inputs: expected (logits, targets, logit_lengths, target_lengths) or (encoder, predictor, weight, bias, targets, "
            f"encoder_lengths, target_lengths), got {len(inputs)} positional arguments"
        )
    joint_of = joint_loss.problem(*inputs, **{**_DEFAULTS, **options})

    def arcs_of_joint() -> Any:
        with running(joint_of) as engine:
            for group, _ in engine.groups():
                yield group, engine.arcs(group, keep=False)[0]

    return joint_of, arcs_of_joint()


def _padded(of: Any) -> tuple[int, int, int]:
    """(B, T, U+1) or (B, T, S) of the arguments; of packed logits, the longest ones."""
    if isinstance(of, Problem):
        columns = of.cells.columns or of.joint.predictor.shape[1]
        return len(of.cells.frames), int(of.joint.encoder.shape[1]), columns
    if of.logits.ndim == 4:
        return tuple(of.logits.shape[:3])
    return len(of.cells.frames), int(of.cells.frames.max()), of.cells.columns or int(of.cells.labels.max()) + 1


_DEFAULTS: dict[str, Any] = {
    "blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf",
}  # fmt: skip


def occupancy(*inputs: Any, **options: Any) -> Occupancy:
    """Posterior probability of every arc of the lattice.

    Parameters
    ----------
    *inputs : array
        The positional arguments of `rnnt_loss` (4) or of `joint_rnnt_loss` (7).
    **options
        Keyword arguments of that function, but for `weights`, `gradient` and `inplace`. Occupancies are raw: `fastemit_lambda`,
        which only scales gradients, has no effect.

    Returns
    -------
    Occupancy

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> posterior = tl.occupancy(np.zeros((1, 4, 3, 5)), [[1, 2]], [4], [2])
    >>> np.round(posterior.label.sum((1, 2)), 6)  # two labels, each emitted once
    array([2.])
    """
    of, parts = _each_arcs(inputs, options)
    processor, cells = of.processor, of.cells
    shape = _padded(of)
    with processor:
        (_, blank), (_, label) = (processor.output(shape, of.dtype, zero=True) for _ in range(2))
        loss, reported = (processor.empty((shape[0],), of.dtype) for _ in range(2))
        for group, arcs in parts:
            pair = tuple(processor.empty((group.cells,), of.dtype) for _ in range(2))
            values = lattice.sums(processor, group, arcs, of.options, loss, reported)
            lattice.occupancy(processor, group, arcs, of.options, values, False, pair)
            for i in range(group.count):
                b = group.begin + i
                frames, width = int(cells.frames[b]), int(cells.width[b])
                part = slice(group.offsets[i], group.offsets[i + 1])
                for out, packed in zip((blank, label), pair, strict=True):
                    out[b, :frames, :width] = packed[part].reshape(frames, width)
            del arcs, values, pair, packed  # before those of the next group are made
        logits_loss.raise_infeasible(processor, loss, of.options)
    return Occupancy(blank, label, reported)


def align(*inputs: Any, **options: Any) -> Alignment:
    """Most probable alignment: the frame of each label. Ties take the earliest frames.

    Parameters
    ----------
    *inputs : array
        The positional arguments of `rnnt_loss` (4) or of `joint_rnnt_loss` (7).
    **options
        Keyword arguments of that function, but for `weights`, `gradient` and `inplace`. `delay_penalty` counts in the score.

    Returns
    -------
    Alignment

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> logits = np.zeros((1, 4, 3, 5))
    >>> logits[0, 1, 0, 3] = logits[0, 3, 1, 4] = 9.0
    >>> tl.align(logits, [[3, 4]], [4], [2]).frames
    array([[1, 3]])
    """
    of, parts = _each_arcs(inputs, options)
    processor = of.processor
    with processor:
        frames = processor.output(tuple(of.targets.array.shape), "int64")[1]
        score = processor.output((len(of.cells.frames),), "float64")[1]
        for group, arcs in parts:
            lattice.best_path(processor, group, arcs, of.options, frames, score)
        logits_loss.raise_infeasible(processor, -score, of.options)
    return Alignment(frames, score)
