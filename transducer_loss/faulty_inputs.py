"""Which elements of a loss's inputs make cells of its lattice NaN."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from transducer_loss import joint
from transducer_loss.arrays import as_numpy
from transducer_loss.cells import Cells, Group, Ints
from transducer_loss.checks import DISTRIBUTIONS
from transducer_loss.engine import Engine
from transducer_loss.faults import HIGHEST_WEIGHT, Bools, Finding, Lattice, counted, first_of, place
from transducer_loss.logits_loss import Problem as OfLogits
from transducer_loss.tiling import Problem as OfJoint

_BLOCK = 4 << 20
"""Bytes of the output layer that are looked at together."""


def faulty_labels(lattice: Lattice, spoiled: Bools, known: Ints, classes: int, kept: Ints | None) -> tuple[list[Finding], Ints]:
    """Labels (U_b,) that no class has, that are not among those `kept`, or that HAT does not emit; and all their columns."""
    b = lattice.utterance
    outside = (known < 0) | (known >= classes)
    missing = np.zeros_like(outside) if kept is None else ~outside & ~np.isin(known, kept)
    silent = np.zeros_like(outside)
    if DISTRIBUTIONS[lattice.options.distribution] == "hat":
        silent = known == lattice.options.blank
    found, columns = [], np.flatnonzero((outside | missing | silent) & spoiled[:, : lattice.labels].any(axis=0))
    for wrong, expected in (
        (outside, f"which is no class: they are [0, {classes})"), (missing, "which is not among the classes of classes="),
        (silent, "the blank, which hat=True does not emit"),
    ):  # fmt: skip
        at = columns[wrong[columns]]
        if at.size:
            u = int(at[0])
            more = f"; found at {at.size} labels" if at.size > 1 else ""
            found.append(Finding(
                "label", "targets", (b, u), int(np.argmax(spoiled[:, u])), u,
                f"{place('targets', (b, u))} is {known[u]}, {expected}{more}",
            ))  # fmt: skip
    return found, columns


def _worst(row: np.ndarray[Any, Any]) -> int:
    """The first NaN or +inf of a row of logits, or -1."""
    bad = np.isnan(row) | (row == np.inf)
    return int(np.argmax(bad)) if bad.any() else -1


def _number(value: Any, dtype: Any) -> str:
    """A number, and what an infinity of float16 may come from."""
    return f"{value}{' (float16 holds numbers up to 65,504)' if dtype.name == 'float16' and np.isinf(value) else ''}"


class LogitsInputs:
    """Arguments of `rnnt_loss`."""

    def __init__(self, of: OfLogits, known: Ints) -> None:
        self.of, self.known, self.blank = of, known, of.options.blank
        self.classes = int(of.logits.shape[-1])

    def kept(self, b: int) -> Ints | None:
        """Classes of the utterance, where these are not all."""
        return None

    def _row(self, lattice: Lattice, t: int, u: int) -> tuple[int, ...]:
        b, column = lattice.utterance, u - int(lattice.first[t])
        if self.of.logits.ndim == 4:
            return (b, t, column)
        return (int(self.of.group.offsets[b]) + t * int(self.of.cells.width[b]) + column,)

    def where(self, lattice: Lattice, t: int, u: int, v: int) -> tuple[str, tuple[int, ...] | None]:
        """See `Inputs`."""
        return "logits", (*self._row(lattice, t, u), v)

    def faulty(self, lattice: Lattice, spoiled: Bools) -> list[Finding]:
        """What spoils the first of the cells."""
        t, u = first_of(spoiled)
        index = self._row(lattice, t, u)
        row = as_numpy(self.of.logits[index]).astype(np.float64)
        if DISTRIBUTIONS[lattice.options.distribution] == "normalized":
            read = [self.blank, *self.known[lattice.utterance, u : min(u + 1, lattice.labels)]]
            v = next((int(v) for v in read if not row[v] <= HIGHEST_WEIGHT), -1)
            if v >= 0 and np.isfinite(row[v]):
                text = f"{place('logits', (*index, v))} is {row[v]:.4g}, a log-probability above {HIGHEST_WEIGHT:,.0f}"
                return [Finding("weight", "logits", (*index, v), t, u, text)]
        else:
            v = _worst(row)
        number = int(spoiled.sum())
        more = f"; it is the first of {number} such cells" if number > 1 else ""
        if v >= 0:
            text = f"{place('logits', (*index, v))} is {_number(row[v], self.of.logits.dtype)}{more}"
            return [Finding("value", "logits", (*index, v), t, u, text)]
        beside = " but the blank" if (row > -np.inf).any() else ""
        text = f"{place('logits', (*index, ':'))} is -inf for every class{beside}{more}"
        return [Finding("value", "logits", (*index, int(np.argmax(row == -np.inf))), t, u, text)]


class JointInputs:
    """Arguments of `joint_rnnt_loss`, with the output layer that the engine has for a group."""

    def __init__(self, of: OfJoint, known: Ints, engine: Engine, group: Group) -> None:
        self.of, self.known, self.blank, self.engine, self.group = of, known, of.options.blank, engine, group
        self.classes = int(of.weight.shape[0]) if of.shard is None else of.shard.vocab_size

    def kept(self, b: int) -> Ints | None:
        """Classes of the utterance, where these are not all."""
        classes = self.of.classes
        if classes is None:
            return None
        return as_numpy(classes.ids[b] if classes.per_utterance else classes.ids).astype(np.int64)

    def where(self, lattice: Lattice, t: int, u: int, v: int) -> tuple[str, tuple[int, ...] | None]:
        """See `Inputs`."""
        row = v if self.of.shard is None else v - self.of.shard.first
        bias = self.of.bias
        if bias is not None and 0 <= row < len(bias) and as_numpy(bias[row : row + 1])[0] == -np.inf:
            return "bias", (row,)
        return "logits", None

    def faulty(self, lattice: Lattice, spoiled: Bools) -> list[Finding]:
        """Rows of the encoder and the predictor that spoil cells by themselves; what spoils the first cell beside them."""
        b, encoders = lattice.utterance, self.of.cells.encoders
        e = b if encoders is None else int(encoders[b])
        found, rest = [], spoiled.copy()
        for name, array, row, length, across in (
            ("encoder", self.of.joint.encoder, e, lattice.frames, 1),
            ("predictor", self.of.joint.predictor, b, lattice.labels + 1, 0),
        ):
            rows = as_numpy(array[row, :length])
            at = np.flatnonzero(spoiled.any(axis=across) & ~np.isfinite(rows).all(axis=1))
            if not at.size:
                continue
            lost = ~np.isfinite(rows[at]) & ~np.isfinite(self._activated(rows[at]))
            at, lost = at[lost.any(axis=1)], lost[lost.any(axis=1)]
            if not at.size:
                continue
            rest[(slice(None), at) if across == 0 else at] = False
            first, feature = int(at[0]), int(np.argmax(lost[0]))
            other = int(np.argmax(spoiled[first] if across else spoiled[:, first]))
            t, u = (first, other) if across else (other, first)
            index = (row, first, feature)
            number = _number(rows[first, feature], rows.dtype)
            text = f"{place(name, index)} is {number}; found in {at.size} of {counted(length, 'row')}"
            found.append(Finding("value", name, index, t, u, text))
        if rest.any():
            found += self._of_cell(lattice, *first_of(rest), e)
        return found

    def _activated(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Hidden features of rows (n, H) alone, beside a row of zeros."""
        of, processor = self.of, self.of.processor
        one = dataclasses.replace(
            of.joint, encoder=processor.to_device(np.ascontiguousarray(rows)[None]),
            predictor=processor.to_device(np.zeros((1, 1, rows.shape[1]), rows.dtype)), dropout=0.0,
        )  # fmt: skip
        group = Cells.full(np.array([len(rows)]), np.array([0])).group(processor)
        hidden = processor.empty(rows.shape, of.operand)
        joint.forward(processor, group, one, None, 0, hidden, alone=False)
        return processor.to_host(hidden)  # type: ignore[no-any-return]

    def _of_cell(self, lattice: Lattice, t: int, u: int, e: int) -> list[Finding]:
        """What spoils a cell whose rows do not by themselves: their sum, the output layer, or the product of both."""
        of, processor, b, weight = self.of, self.of.processor, lattice.utterance, self.engine.weight
        row, width = b - self.group.begin, int(of.cells.width[b])
        cell = int(self.group.offsets[row]) + t * width + u - int(lattice.first[t])
        hidden = processor.empty((1, of.joint.features), of.operand)
        logits = processor.empty((1, of.projected), of.dtype)
        joint.forward(processor, self.group, of.joint, processor.to_device(np.array([cell])), 0, hidden)
        with np.errstate(over="ignore", invalid="ignore"):
            processor.gemm(hidden, weight.T, logits)
        features, values = processor.to_host(hidden)[0], processor.to_host(logits)[0].astype(np.float64)
        kind = joint.ACTIVATIONS[of.joint.activation]
        if not np.isfinite(features).all():
            h = int(np.argmin(np.isfinite(features)))
            pair = (("encoder", of.joint.encoder, (e, t, h)), ("predictor", of.joint.predictor, (b, u, h)))
            x, y = (float(as_numpy(array[index[:2]])[h]) for _, array, index in pair)
            name, _, index = pair[0] if not np.isfinite(x) or np.isfinite(y) else pair[1]
            cause = "overflow" if np.isfinite(x) and np.isfinite(y) else "value"
            one, other = (place(argument, each) for argument, _, each in pair)
            text = f"{one} is {x:.4g}, {other} is {y:.4g}, and {kind} of their sum is {features[h]}"
            return [Finding(cause, name, index, t, u, text)]
        if self.engine.bias is not None:
            bias = processor.to_host(self.engine.bias)
            with np.errstate(over="ignore", invalid="ignore"):  # as the kernels add: in the type of the sums
                values = (processor.to_host(logits)[0] + bias).astype(np.float64)
            at = _worst(bias)
            if at >= 0:
                v = self._class(b, at)
                given = of.bias is not None and not np.isfinite(as_numpy(of.bias[v : v + 1]))[0]
                name, text = ("bias", "") if given else ("classes", ", as its probability is 0")
                return [Finding("value", name, (v,), t, u, f"{place(name, (v,))} is {bias[at]}{text}; it spoils every cell")]
        bad = np.isnan(values) | (values == np.inf)
        broken = np.flatnonzero(bad & self._broken_rows)
        if broken.size:
            at = int(broken[0])
            numbers = as_numpy(weight[at])
            element = (self._class(b, at), int(np.argmin(np.isfinite(numbers))))
            number = _number(numbers[element[1]], of.weight.dtype)
            text = f"{place('weight', element)} is {number}; found in {counted(broken.size, 'class', 'classes')}"
            return [Finding("value", "weight", element, t, u, text)]
        if bad.any():
            at = int(np.argmax(bad))
            v = self._class(b, at)
            largest, heaviest = (float(np.abs(each.astype(np.float64)).max()) for each in (features, as_numpy(weight[at])))
            text = (
                f"the logit of class {v} is {values[at]} in {of.dtype}: hidden features reach {largest:.4g}, its weights "
                f"{heaviest:.4g}"
            )
            return [Finding("overflow", "weight", (v,), t, u, text)]
        if of.shard is not None and (values > -np.inf).any():
            return [Finding("value", "weight", None, t, u, "weight or bias of another process makes a logit NaN or inf")]
        return [Finding("value", "weight", None, t, u, "the logits have no number above -inf to normalise by")]

    @functools.cached_property
    def _broken_rows(self) -> Bools:
        """(V,) or (K,): whether a class's weights are not all finite."""
        weight = self.engine.weight
        rows = max(1, _BLOCK // (weight.shape[1] * weight.itemsize))
        return np.concatenate([
            ~np.isfinite(as_numpy(weight[begin : begin + rows])).all(axis=1) for begin in range(0, len(weight), rows)
        ])

    def _class(self, b: int, row: int) -> int:
        """The index, in weight and bias, of a row of the engine's."""
        kept = self.kept(b)
        return row if kept is None else int(kept[row])
