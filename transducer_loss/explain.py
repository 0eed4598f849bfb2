"""Why a loss is infinite or NaN: which utterances, and what in which argument."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, overload

import numpy as np

from transducer_loss import joint_loss, lattice, logits_loss, softmax
from transducer_loss.arrays import as_array, as_numpy
from transducer_loss.called import bound, host_integers, in_one_dtype, mend_lengths, plain
from transducer_loss.cells import Group, Ints
from transducer_loss.checks import DISTRIBUTIONS
from transducer_loss.engine import running
from transducer_loss.faults import Finding, Lattice, place
from transducer_loss.faulty_inputs import JointInputs, LogitsInputs, faulty_labels

_SHOWN = 8
"""Utterances, and notes, that a report for people lists."""

_OF_JOINT = {"encoder", "predictor", "weight", "bias", "encoder_lengths"}
"""Arguments of `joint_rnnt_loss` alone, one of which is named where the first four do not tell."""

_ROUNDED_AWAY = 65_520.0
"""The least number that float16 takes to infinity."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """An utterance whose loss is not finite.

    Attributes
    ----------
    index : int
        b.
    frames, labels : int
        T_b and U_b, as they were given.
    loss : float
        NaN, or +inf where there is no path, whatever `infeasible` would report.
    findings : tuple of Finding
        By frame; at least one.
    """

    index: int
    frames: int
    labels: int
    loss: float
    findings: tuple[Finding, ...]

    @property
    def frame(self) -> int | None:
        """The first bad frame, where the reason lies in one."""
        return min((each.frame for each in self.findings if each.frame is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; true where it found an utterance, and its `str` is a report for people.

    Attributes
    ----------
    utterances : tuple of Utterance
        Those whose loss is not finite; none where all is well.
    notes : tuple of Finding
        What leaves the loss finite: a target that equals the blank, a gradient that float16 does not hold.
    batch : int
        B.
    """

    utterances: tuple[Utterance, ...]
    notes: tuple[Finding, ...]
    batch: int

    def __bool__(self) -> bool:
        return bool(self.utterances)

    def __str__(self) -> str:
        if not self:
            lines = [f"all {self.batch} losses are finite"]
        else:
            lines = [f"{len(self.utterances)} of {self.batch} losses are not finite"]
        for each in self.utterances[:_SHOWN]:
            lines.append(f"utterance {each.index}: loss {each.loss}, T = {each.frames}, U = {each.labels}")
            for finding in each.findings:
                at = "" if finding.frame is None else f"frame {finding.frame}: "
                lines.append(f"  {at}{finding}")
        if len(self.utterances) > _SHOWN:
            lines.append(f"and {len(self.utterances) - _SHOWN} more utterances, from {self.utterances[_SHOWN].index} on")
        lines += [f"note: {note}" for note in self.notes[:_SHOWN]]
        if len(self.notes) > _SHOWN:
            lines.append(f"and {len(self.notes) - _SHOWN} more notes")
        return "\n".join(lines)


@overload
def explain(
    logits: Any, targets: Any, logit_lengths: Any, target_lengths: Any, *, dtype: str | None = None, blank: int = 0,
    topology: str = "regular", normalized: bool = False, band: Any = None, fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0, hat: bool = False, infeasible: str = "inf", clamp: float = 0.0, weights: Any = None,
    gradient: bool = True, inplace: bool = False, validate: bool = False, reduction: str = "mean",
) -> Explanation: ...  # fmt: skip
@overload
def explain(
    encoder: Any, predictor: Any, weight: Any, bias: Any, targets: Any, encoder_lengths: Any, target_lengths: Any, *,
    dtype: str | None = None, activation: str = "tanh", encoder_index: Any = None, blank: int = 0, topology: str = "regular",
    band: Any = None, classes: Any = None, dropout: float = 0.0, seed: int | None = 0, fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0, hat: bool = False, infeasible: str = "inf", weights: Any = None, gradient: bool = True,
    workspace: int | str | None = None, occupancy_floor: float = 1e-6, sparse: bool = False, shard: Any = None,
    validate: bool = False, reduction: str = "mean",
) -> Explanation: ...  # fmt: skip
def explain(*inputs: Any, dtype: str | None = None, **options: Any) -> Explanation:
    """Why a loss is infinite or NaN: which utterances, their T and U, the first bad frame, and what to look at.

    Parameters
    ----------
    *inputs : array
        The arguments of `rnnt_loss` (4) or of `joint_rnnt_loss` (7), by position or by name: of NumPy, CuPy, or any framework
        whose tensors have ``__dlpack__``, with or without a gradient of their own.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Copy the float inputs to this type first, as PyTorch's autocast does for `joint_rnnt_loss`.
    **options
        Keyword arguments of that function. Those that change neither loss nor gradient (`inplace`, `validate`, the adapters'
        `reduction`) are taken and not looked at. With ``gradient=True`` (the default) gradients are looked at where they are
        float16, times `weights`.

    Returns
    -------
    Explanation
        Its `utterances` are those whose loss is infinite or NaN, each with T, U, and findings: argument, index and first bad
        cell (t, u). Only real cells are looked at, never padding.

    Raises
    ------
    ValueError, TypeError
        As the loss for shapes, dtypes and options; but lengths, of padded inputs without a band, and labels out of range are
        findings.

    Notes
    -----
    The answer is the loss's own: its forward pass is run, and what makes its arcs NaN or leaves no path is looked for in the
    inputs. An infinity that does no harm, as one that tanh takes to 1, is no finding.

    It synchronises, and takes the memory of that forward pass: of logits 28 bytes a cell (56 for float64), of the joint its
    `workspace`, never its logits. On the host come the targets and, for one utterance with a bad loss at a time, some 60 bytes
    for each of its (T_b + 1)(U_b + 1) cells, its rows of encoder and predictor if they are on a device, and those of them that
    are not finite; further the features and logits of one cell, and 4 MiB of weight rows. Gradients are made where float16 may
    not hold them: of the joint always, of logits if `weights` reach 32,760 / (1 + fastemit_lambda).

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> logits = np.zeros((2, 4, 3, 5), np.float32)
    >>> logits[1, 2, 0, 4] = np.nan
    >>> found = tl.explain(logits, [[1, 2], [3, 4]], [4, 3], [2, 1])
    >>> print(found)
    1 of 2 losses are not finite
    utterance 1: loss nan, T = 3, U = 1
      frame 2: logits[1, 2, 0, 4] is nan
    >>> found.utterances[0].index, found.utterances[0].frame
    (1, 2)
    >>> bool(tl.explain(logits[:1], [[1, 2]], [4], [2]))
    False
    """
    joined = len(inputs) > 4 or not _OF_JOINT.isdisjoint(options)
    given = bound(joint_loss.joint_rnnt_loss if joined else logits_loss.rnnt_loss, inputs, options)
    in_one_dtype(given, ("encoder", "predictor", "weight", "bias") if joined else ("logits",), dtype)
    weights, gradient = given.pop("weights"), given.pop("gradient")
    told = {name: host_integers(value, name) for name, value in given.items() if name.endswith("_lengths")}
    mended = mend_lengths(given, told)
    known = host_integers(given["targets"], "targets")
    arguments = [given.pop(name) for name in list(given)[: 7 if joined else 4]]
    # Labels are left to the kernels, which make the loss of a wrong one NaN: findings, not errors.
    given.update(infeasible="inf", validate=None)
    of: Any = (joint_loss.problem if joined else logits_loss.problem)(*arguments, **given)
    found = {b: (loss, reasons) for b, loss, reasons in (_of_joint if joined else _of_logits)(of, known)}
    found |= {b: (math.nan, reasons) for b, reasons in mended.items()}
    frames = next(iter(told.values()))
    if of.cells.encoders is not None:
        frames = frames[of.cells.encoders]
    utterances = tuple(
        Utterance(b, int(frames[b]), int(told["target_lengths"][b]), loss, tuple(sorted(reasons, key=_by_frame)))
        for b, (loss, reasons) in sorted(found.items())
    )  # fmt: skip
    notes = _blank_labels(of, known) + (_gradient_notes(of, weights, joined) if gradient else [])
    return Explanation(utterances, tuple(notes), len(of.cells.frames))


def _by_frame(finding: Finding) -> tuple[int, int]:
    return (-1 if finding.frame is None else finding.frame, -1 if finding.label is None else finding.label)


def _of_logits(of: Any, known: Ints) -> Iterator[tuple[int, float, list[Finding]]]:
    with of.processor as processor:
        arcs = softmax.empty_arcs(processor, of.group.cells, of.dtype)
        softmax.forward(processor, of.group, of.logits, of.targets, of.options, arcs)
        loss, reported = (processor.empty((of.group.count,), of.dtype) for _ in range(2))
        lattice.sums(processor, of.group, arcs, of.options, loss, reported)
        yield from _explained(of, of.group, arcs, loss, LogitsInputs(of, known))


def _of_joint(of: Any, known: Ints) -> Iterator[tuple[int, float, list[Finding]]]:
    with running(of) as engine:
        loss, reported = (of.processor.empty((len(of.cells.frames),), of.dtype) for _ in range(2))

        def of_group(group: Group) -> Iterator[tuple[int, float, list[Finding]]]:
            # A function, so that a group's arrays are gone before those of the next are made.
            arcs = engine.arcs(group, keep=False)[0]
            engine.occupancy(group, arcs, loss, reported, gradient=False)
            yield from _explained(of, group, arcs, loss, JointInputs(of, known, engine, group))

        for group, _ in engine.groups():
            yield from of_group(group)


def _explained(
    of: Any, group: Group, arcs: softmax.Arcs, loss: Any, inputs: LogitsInputs | JointInputs
) -> Iterator[tuple[int, float, list[Finding]]]:
    """Utterances of a group whose loss is not finite: which, the loss, and why."""
    losses = of.processor.to_host(loss)
    for row in range(group.count):
        b = group.begin + row
        if not np.isfinite(losses[b]):
            one = Lattice.of_group(of.processor, group, row, of.cells, arcs, of.options)
            yield b, float(losses[b]), _spoilers(one, inputs) if np.isnan(losses[b]) else [one.no_path(inputs)]


def _spoilers(one: Lattice, inputs: LogitsInputs | JointInputs) -> list[Finding]:
    """What makes a loss NaN."""
    rest, b = one.spoiled(), one.utterance
    found, columns = faulty_labels(one, rest, inputs.known[b, : one.labels], inputs.classes, inputs.kept(b))
    rest[:, columns] = False
    if rest.any():
        found += inputs.faulty(one, rest)
    odd = one.out_of_order()
    if odd is not None:
        found.append(odd)
    return found or [one.too_likely()]


def _blank_labels(of: Any, known: Ints) -> list[Finding]:
    """Targets that equal the blank: ordinary arcs, but for HAT, and rarely meant."""
    if DISTRIBUTIONS[of.options.distribution] == "hat":
        return []
    found = []
    for b, labels in enumerate(of.cells.labels):
        at = np.flatnonzero(known[b, :labels] == of.options.blank)
        if at.size:
            index = (b, int(at[0]))
            text = f"{place('targets', index)} is the blank, as are {at.size} of {labels} labels: an ordinary arc to the loss"
            found.append(Finding("label", "targets", index, None, int(at[0]), text))
    return found


def _gradient_notes(of: Any, weights: Any, joined: bool) -> list[Finding]:
    """Gradients that the inputs' dtype does not hold, though losses are finite."""
    kind = (of.joint.encoder if joined else of.logits).dtype
    upstream = logits_loss.weights_of(of, None if weights is None else plain(weights))
    largest = 1.0
    if upstream is not None:
        sizes = np.abs(as_numpy(upstream).astype(np.float64))
        if not np.isfinite(sizes).all():
            index = (int(np.argmin(np.isfinite(sizes))),)
            text = f"{place('weights', index)} is not finite, nor are gradients then"
            return [Finding("gradient", "weights", index, None, None, text)]
        largest = float(sizes.max())
    arrays: dict[str, Any] = {}
    if kind.name == "float16" and joined:
        sums = joint_loss.forward(of, upstream).gradients
        arrays = {name: getattr(sums, name) for name in ("encoder", "predictor", "weight", "bias")}
    # No occupancy of an arc is above 1 + lambda, nor the sum of a cell's two above twice that.
    elif kind.name == "float16" and largest * 2 * (1 + of.options.fastemit_lambda) >= _ROUNDED_AWAY:
        saved = logits_loss.forward(of)[2]
        if saved is not None:
            arrays = {"logits": as_array(logits_loss.backward(of, saved, upstream, inplace=False), "gradient")}
    found = []
    for name, array in arrays.items():
        if array is None:
            continue
        sizes = abs(array)
        at = int(sizes.argmax())
        reached = float(as_numpy(sizes.reshape(-1)[at : at + 1])[0])
        if reached >= _ROUNDED_AWAY:
            where = tuple(int(i) for i in np.unravel_index(at, array.shape))
            text = f"the gradient of {name} is {reached:.4g} at {list(where)}, and float16 holds numbers up to 65,504"
            found.append(Finding("gradient", name, where, None, None, text))
    return found
