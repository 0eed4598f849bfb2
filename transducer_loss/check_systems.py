"""What `check` asks of EMBR, of the reduced decoder and of Amortized Networks, and what the reference makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import transducer_loss
from transducer_loss import reference
from transducer_loss.arrays import as_numpy

Array = np.ndarray[Any, Any]
Found = tuple[Any, tuple[Any, ...]]
ToDevice = Callable[[Array], Any]

VARIANTS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "edit_distance": {"plain": {}, "blank": {"blank": 0}},
    "embr_loss": {"plain": {}, "repeated hypotheses": {"temperature": 2.0, "blank": 0}, "reference": {"interpolation": 0.25}},
    "reduced_predictor": {"plain": {}, "last": {"last": True}},
    "amortized_cost": {"plain": {}},
    "amortized_backlog": {"mean": {"frame_period": 0.5}, "last": {"frame_period": 0.5, "statistic": "last"}},
    "gumbel_gate": {"soft": {}, "hard": {"hard": True}, "without noise": {"noise": False, "temperature": 2.0}},
}
"""Functions without a lattice, and their variants."""


@dataclasses.dataclass(frozen=True)
class System:
    """A call of the library.

    Attributes
    ----------
    floats : tuple of array
        Inputs in the dtype at hand, in float64.
    run : callable
        ``run(to_device, *floats)`` is the library's value and gradients.
    wanted : callable
        The reference's.
    """

    floats: tuple[Array, ...]
    run: Callable[..., Found]
    wanted: Callable[[], Found]


def system(function: str, variant: str, draw: Callable[..., Array], frames: Array, labels: Array, weights: Array) -> System:
    """A call of a function for a batch of these lengths; `draw` makes numbers that every dtype holds exactly."""
    return _SYSTEMS[function](VARIANTS_OF[function][variant], draw, frames, labels, weights)


def _labels(draw: Callable[..., Array], *shape: int) -> Array:
    """Labels of a few classes, so that some are alike."""
    return (abs(draw(*shape)) * 32).astype(np.int64) % 4


def _hypotheses(draw: Callable[..., Array], labels: Array) -> tuple[Array, Array]:
    """Five of each reference's length and less, some of them padding."""
    columns = int(labels.max())
    lengths = labels[:, None] - np.array([0, 1, 0, 2, 0])
    return _labels(draw, len(labels), 5, columns), np.where(lengths < 0, -1, lengths)


def _edits(options: dict[str, Any], draw: Callable[..., Array], _: Array, labels: Array, __: Array) -> System:
    said, lengths = _hypotheses(draw, labels)
    meant = _labels(draw, len(labels), int(labels.max()))

    def run(to_device: ToDevice) -> Found:
        edits = transducer_loss.edit_distance(*map(to_device, (said, lengths, meant, labels)), **options)
        parts = (edits.total, edits.insertions, edits.deletions, edits.substitutions)
        return np.stack([as_numpy(part) for part in parts], axis=-1), ()

    def wanted() -> Found:
        counts = np.full((*lengths.shape, 4), -1.0)
        for b, n in np.argwhere(lengths >= 0):
            counts[b, n] = reference.edit_distance(said[b, n, : lengths[b, n]], meant[b, : labels[b]], **options)
        return counts, ()

    return System((), run, wanted)


def _embr(options: dict[str, Any], draw: Callable[..., Array], _: Array, labels: Array, weights: Array) -> System:
    scores, far, of_reference = abs(draw(len(labels), 5, scale=2.0)), abs(draw(len(labels), 5)), abs(draw(len(labels)))
    given = dict(options)
    if "blank" in options:
        said, lengths = _hypotheses(draw, np.minimum(labels, 2))
        given |= {"hypotheses": said, "hypothesis_lengths": np.where(np.arange(5) < 1, np.minimum(labels, 2)[:, None], lengths)}
    floats = (scores, of_reference) if "interpolation" in options else (scores,)

    def run(to_device: ToDevice, nll: Any, reference_nll: Any = None) -> Found:
        loss, grads = transducer_loss.embr_loss(nll, to_device(far), weights=weights, reference_nll=reference_nll, **given)
        return loss, () if grads is None else (grads.nll, grads.reference_nll)[: len(floats)]

    def wanted() -> Found:
        loss, grad = reference.embr_loss(scores, far, reference_nll=of_reference, **given)
        return loss, (grad * weights[:, None], options.get("interpolation", 0.0) * weights)[: len(floats)]

    return System(floats, run, wanted)


def _padded(values: Array, frames: Array) -> Array:
    """With NaN past each utterance's frames."""
    return np.where(np.arange(values.shape[1])[:, None] < frames[:, None, None], values, np.nan)


def _of_gates(function: str, options: dict[str, Any], draw: Callable[..., Array], frames: Array, weights: Array) -> System:
    gates, each = _padded(abs(draw(len(frames), int(frames.max()), 3)), frames), [1.0, 0.5, 0.125]

    def run(_: ToDevice, given: Any) -> Found:
        value, grad = getattr(transducer_loss, function)(given, each, frames, weights=weights, **options)
        return value, (grad,)

    def wanted() -> Found:
        value, grad = getattr(reference, function)(gates, each, frames, **options)
        return value, (grad * weights[:, None, None],)

    return System((gates,), run, wanted)


def _cost(options: dict[str, Any], draw: Callable[..., Array], frames: Array, _: Array, weights: Array) -> System:
    return _of_gates("amortized_cost", options, draw, frames, weights)


def _backlog(options: dict[str, Any], draw: Callable[..., Array], frames: Array, _: Array, weights: Array) -> System:
    return _of_gates("amortized_backlog", options, draw, frames, weights)


def _gate(options: dict[str, Any], draw: Callable[..., Array], frames: Array, _: Array, __: Array) -> System:
    shape = len(frames), int(frames.max()), 3
    logits, upstream = (_padded(draw(*shape), frames) for _ in range(2))
    soft = {key: value for key, value in options.items() if key != "hard"}

    def run(_: ToDevice, given: Any, gradient: Any) -> Found:
        gates = transducer_loss.gumbel_gate(given, frames, seed=1, **options)
        return gates, (transducer_loss.gumbel_gate_backward(gradient, given, frames, seed=1, **soft),)

    def wanted() -> Found:
        gates = reference.gumbel_gate(logits, frames, seed=1, **options)
        return gates, (reference.gumbel_gate_backward(upstream, logits, frames, seed=1, **soft),)

    return System((logits, upstream), run, wanted)


def _reduced(options: dict[str, Any], draw: Callable[..., Array], _: Array, labels: Array, __: Array) -> System:
    columns, features = int(labels.max()), 33
    table, positions = draw(4, features, scale=0.5), draw(2, 3, features, scale=0.5)
    targets = np.where(np.arange(columns) < labels[:, None], _labels(draw, len(labels), columns), -1)
    shape = (len(labels), features) if options else (len(labels), columns + 1, features)
    upstream = draw(*shape)
    if not options:
        upstream[np.arange(columns + 1) > labels[:, None]] = np.nan

    def run(to_device: ToDevice, embedding: Any, vectors: Any, gradient: Any) -> Found:
        out = transducer_loss.reduced_predictor(embedding, vectors, targets, labels, **options)
        grads = transducer_loss.reduced_predictor_backward(gradient, embedding, vectors, to_device(targets), labels, **options)
        return out, (grads.embedding, grads.positions)

    def wanted() -> Found:
        out = reference.reduced_predictor(table, positions, targets, labels, **options)
        return out, reference.reduced_predictor_backward(upstream, table, positions, targets, labels, **options)

    return System((table, positions, upstream), run, wanted)


_SYSTEMS: dict[str, Callable[..., System]] = {
    "edit_distance": _edits, "embr_loss": _embr, "reduced_predictor": _reduced, "amortized_cost": _cost,
    "amortized_backlog": _backlog, "gumbel_gate": _gate,
}  # fmt: skip
