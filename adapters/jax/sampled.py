"""JAX: sampled softmax (arXiv 2203.16868): the classes that a loss is normalised over, drawn under jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transducer_loss import checks, output_layer, sampling
from transducer_loss.adapters.jax.callback import Memory, alike, call, device_bytes
from transducer_loss.adapters.jax.given import Given, array_of, given, number_of, shape_of, words_of
from transducer_loss.classes import Classes, expect_classes, vocabulary_size

# Frames that are not looked at.
_ANY = 1 << 62


def _draw(
    memory: Memory, options: dict[str, Any], outputs: list[Any], batch: Given, proposal: dict[str, Any], seed: Any, step: Any
) -> None:
    # Lengths of CTC logits stand where those of an encoder do.
    logits = proposal["ctc_logits"]
    frames = _ANY if logits is None else logits.shape[1]
    batch, _ = batch.mended(frames, batch.targets.shape[1], options["validate"])
    sampling.draw(
        batch.targets, batch.labels, **options, **proposal,
        ctc_lengths=None if logits is None else batch.frames,
        seed=number_of(seed), step=number_of(step), allocate=memory,
    )  # fmt: skip


def sample_classes(
    targets: Any,
    target_lengths: Any,
    *,
    vocab_size: int,
    num_samples: int,
    proposal: str = "uniform",
    scope: str = "batch",
    counts: Any = None,
    ctc_logits: Any = None,
    ctc_lengths: Any = None,
    blank: int = 0,
    correction: bool = False,
    seed: Any = 0,
    step: Any = 0,
    validate: bool = False,
) -> Classes:
    """Classes for a sampled softmax: `transducer_loss.sample_classes`, under jit, too.

    Parameters
    ----------
    targets : (B, U) array or nested list of int
    target_lengths : (B,) array or list of int
    seed, step : int, integer scalar or PRNG key
        May be traced: count `step` up in training, or give ``seed=jax.random.fold_in(key, step)``. The same classes for the
        same numbers, as of the core. Give data-parallel workers a seed each.
    ctc_logits : (B, T, V) array, optional
        Without gradient: train the head by a CTC loss on the same logits, as optax has one.
    vocab_size, num_samples, proposal, scope, counts, ctc_lengths, blank, correction
        As of `transducer_loss.sample_classes`. All but `counts` and `ctc_lengths` are not traced.
    validate : bool
        Raise for traced numbers out of range when a compiled function runs. Unchecked, labels and counts that are none are left
        out, an utterance whose labels are more than there are has none, and one whose frames are has one.

    Returns
    -------
    Classes
        For ``classes=`` of `joint_rnnt_loss`: a pytree, of which `ids` and `probability` are arrays.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import sample_classes
    >>> draw = jax.jit(lambda step: sample_classes([[3, 5]], [2], vocab_size=1000, num_samples=4, step=step))
    >>> draw(0).ids.shape, draw(1).ids[0]
    ((7,), Array(0, dtype=int32))
    """
    vocabulary, samples = vocabulary_size(vocab_size), checks.whole_number(num_samples, "num_samples", 0)
    silent = checks.blank_class(blank, vocabulary)
    checks.choice(proposal, sampling.PROPOSALS, "proposal")
    each = checks.choice(scope, sampling.SCOPES, "scope") == sampling.SCOPES.index("utterance")
    wanted = {"counts": (counts, "unigram"), "ctc_logits": (ctc_logits, "ctc"), "ctc_lengths": (ctc_lengths, "ctc")}
    for name, (value, of) in wanted.items():
        if (value is not None) != (proposal == of):
            expected = "an array" if proposal == of else "None"
            raise ValueError(f"{name}: expected {expected} with proposal={proposal!r}, got {type(value).__name__}")
    frames = target_lengths if ctc_lengths is None else ctc_lengths
    batch = given(targets, frames, target_lengths, ("ctc_lengths", "target_lengths"))
    known = batch.known()
    if known.targets.ndim != 2 or not known.targets.shape[0]:
        raise ValueError(f"targets: expected shape (B, U) of at least one utterance, got {tuple(known.targets.shape)}")
    size, columns = known.targets.shape
    labels = checks.lengths(known.labels, "target_lengths", size, 0, columns, "U")
    checks.expect_labels(known.targets, labels, vocabulary)
    arrays: dict[str, Any] = {"counts": None, "ctc_logits": None}
    room = 17 * vocabulary
    if counts is not None:
        arrays["counts"] = array_of(counts, "counts")
        checks.expect_shape(arrays["counts"], "counts", "(V,)", (vocabulary,))
        if not jnp.issubdtype(arrays["counts"].dtype, jnp.floating):
            arrays["counts"] = arrays["counts"].astype(np.float32)
    if ctc_logits is not None:
        logits = array_of(ctc_logits, "ctc_logits")
        checks.float_array(shape_of(logits), "ctc_logits", "B T V")
        checks.expect_shape(logits, "ctc_logits", "(B, T, V)", (size, logits.shape[1], vocabulary))
        checks.lengths(known.frames, "ctc_lengths", size, 1, logits.shape[1], "T")
        arrays["ctc_logits"] = logits
        room += 12 * size * logits.shape[1]
    slots = min(vocabulary, 1 + (columns if each else size * columns) + samples)
    shape = (size, slots) if each else (slots,)
    options = (
        ("vocab_size", vocabulary), ("num_samples", samples), ("proposal", proposal), ("scope", scope), ("blank", silent),
        ("correction", bool(correction)), ("validate", True if validate else None),
    )  # fmt: skip
    ids, probability = call(
        _draw, options, ((shape, "int32"), (shape, "float32")),
        *alike(batch.on_device(), jax.lax.stop_gradient(arrays), words_of(seed, "seed"), words_of(step, "step")),
        scratch=device_bytes("float32", 0, size, room + (17 << 20)),
    )  # fmt: skip
    return Classes(ids, probability, vocabulary, silent, bool(correction))


def _find(memory: Memory, options: dict[str, Any], outputs: list[Any], batch: Given) -> None:
    batch, _ = batch.mended(_ANY, batch.targets.shape[1], options["validate"])
    found = output_layer.found_in(batch.classes, batch.targets, batch.labels, allocate=memory, **options)
    (slots,) = outputs
    columns = min(found.shape[1], slots.shape[1])
    slots[...] = -1
    slots[:, :columns] = found[:, :columns]


def labels_in(classes: Classes, targets: Any, target_lengths: Any, *, validate: bool = False) -> jax.Array:
    """Labels (B, U) as positions among the sampled classes, for losses of logits over these alone.

    Parameters
    ----------
    classes : Classes
    targets : (B, U) array or nested list of int
    target_lengths : (B,) array or list of int
    validate : bool
        Also check what is on a device, which synchronises.

    Returns
    -------
    (B, U) array of int32
        The blank is class 0 there. -1 past the last label, and for a label on a device that is not among the classes.

    Examples
    --------
    >>> from transducer_loss.adapters.jax import Classes, labels_in
    >>> labels_in(Classes.from_ids([0, 4, 7, 9], vocab_size=10), [[7, 4]], [2])
    Array([[2, 1]], dtype=int32)
    """
    expect_classes(classes)
    batch = given(targets, target_lengths, target_lengths, ("target_lengths", "target_lengths"), classes=classes)
    known = batch.known()
    output_layer.found_in(known.classes, known.targets, known.labels, validate)
    options, results = (("validate", True if validate else None),), ((batch.targets.shape, "int32"),)
    (on_device,) = alike(jax.lax.stop_gradient(batch.on_device()))
    (slots,) = call(_find, options, results, on_device, scratch=device_bytes("float32", 0))
    return slots
