"""JAX: the loss fused with the joint network."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from transducer_loss import joint_loss, logits_loss, tiling
from transducer_loss.adapters.jax.callback import Memory, Options, alike, call, compute_dtype, on_device, store
from transducer_loss.adapters.jax.given import (
    Given,
    array_of,
    as_callbacks,
    blanked,
    given,
    number_of,
    shape_of,
    traced,
    words_of,
)
from transducer_loss.band import Band
from transducer_loss.cells import Cells
from transducer_loss.classes import Classes
from transducer_loss.processors import OnCuda

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""Encoder, predictor, weight, bias."""


def _problem(memory: Memory, options: dict[str, Any], inputs: Any, batch: Given, seed: Any) -> tuple[tiling.Problem, Any]:
    """And which utterances have lengths that do not fit."""
    batch, bad = batch.mended(inputs[0].shape[1], inputs[1].shape[1] - 1, options["validate"])
    of = joint_loss.problem(
        *(*inputs, *batch.positional), encoder_index=batch.index, band=batch.band, classes=batch.classes,
        seed=0 if seed is None else number_of(seed), allocate=memory, **options,
    )  # fmt: skip
    return of, bad


def _forward(
    memory: Memory, options: dict[str, Any], outputs: list[Any], inputs: Any, batch: Given, seed: Any
) -> None:
    of, bad = _problem(memory, options, inputs, batch, seed)
    keep = len(outputs) > 1
    done = joint_loss.forward(of, gradient=keep, later=keep)
    outputs[0][...] = blanked(of.processor, outputs[0], bad, np.nan)
    if done.saved is not None:
        outputs[1][...] = done.loss
        store(outputs[2:], done.saved.vectors)


def _backward(
    memory: Memory, options: dict[str, Any], outputs: list[Any], inputs: Any, batch: Given, seed: Any, kept: list[Any],
    upstream: Any,
) -> None:  # fmt: skip
    of, bad = _problem(memory, options, inputs, batch, seed)
    weights = logits_loss.weights_of(of, blanked(of.processor, upstream, bad, 0))
    joint_loss.backward(of, joint_loss.Forward.resumed(*kept), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, inputs: Inputs, batch: Given, seed: Any) -> jax.Array:
    results = ((batch.labels.shape, compute_dtype(inputs[0])),)
    (loss,) = call(_forward, options, results, inputs, batch, seed, scratch=_scratch(options, inputs, batch))
    return loss


def _loss_fwd(options: Options, inputs: Inputs, batch: Given, seed: Any) -> tuple[jax.Array, Any]:
    encoder, predictor = inputs[:2]
    kind = compute_dtype(encoder)
    columns = predictor.shape[1] if batch.band is None else min(batch.band.width, predictor.shape[1])
    losses, cells = (batch.labels.shape, kind), ((predictor.shape[0] * encoder.shape[1] * columns,), kind)
    loss, *kept = call(
        _forward, options, (losses, losses, cells, cells, cells), inputs, batch, seed,
        scratch=_scratch(options, inputs, batch),
    )  # fmt: skip
    return loss, (inputs, batch, seed, kept)


def _loss_bwd(options: Options, residuals: Any, upstream: jax.Array) -> tuple[Inputs, None, None]:
    inputs, batch, seed, kept = residuals
    given_ = [each for each in inputs if each is not None]
    kind = compute_dtype(inputs[0])
    sums = call(
        _backward, options, tuple((each.shape, kind) for each in given_), inputs, batch, seed, kept, upstream,
        scratch=_scratch(options, inputs, batch),
    )  # fmt: skip
    encoder, predictor, weight, *bias = (total.astype(each.dtype) for total, each in zip(sums, given_, strict=True))
    return (encoder, predictor, weight, bias[0] if bias else None), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _padded(inputs: Any, batch: Given) -> Cells:
    """Cells of utterances as long as the arrays are."""
    size, columns = inputs[1].shape[:2]
    cells = Cells.full(np.full(size, inputs[0].shape[1]), np.full(size, columns - 1))
    width = cells.width if batch.band is None else np.minimum(cells.width, batch.band.width)
    return dataclasses.replace(cells, width=width, encoders=None if batch.index is None else np.zeros(size, np.int64))


def _scratch(options: Options, inputs: Inputs, batch: Given) -> int:
    """The workspace, or what the padded lengths need where they fit it as one group: shorter ones need less, then."""
    if not on_device():
        return 0
    encoder, _, weight, _ = inputs
    keywords, classes = dict(options), batch.classes
    workspace = joint_loss.workspace_bytes(keywords["workspace"], OnCuda.default_workspace)
    sizes = tiling.Sizes(
        OnCuda, encoder.dtype.name, _padded(inputs, batch), weight.shape[0] if classes is None else classes.slots,
        encoder.shape[2], workspace, batch.band is not None, classes is not None,
        classes is not None and classes.per_utterance, shared=batch.index is not None,
    )  # fmt: skip
    cuts = tiling.cut(sizes)
    return workspace if len(cuts.groups) > 1 else min(workspace, tiling.allocated(sizes, cuts, 1) + (1 << 20))


def joint_rnnt_loss(
    encoder: Any,
    predictor: Any,
    weight: Any,
    bias: Any,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    activation: str = "tanh",
    encoder_index: Any = None,
    blank: int = 0,
    topology: str = "regular",
    band: Band | None = None,
    classes: Classes | None = None,
    dropout: float = 0.0,
    seed: Any = 0,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    workspace: int | str | None = None,
    occupancy_floor: float = 1e-6,
    validate: bool = False,
) -> jax.Array:
    """Transducer loss fused with the joint network, with gradients, in bounded memory.

    Parameters
    ----------
    encoder : (B, T, H) array
        A JAX array, traced or not, or a NumPy array. With `encoder_index` (E, T, H).
    predictor : (B, U+1, H) array
    weight : (V, H) array
        Of the output layer: ``kernel.T`` of Flax.
    bias : (V,) array or None
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    encoder_index : (B,) array or list of int, optional
        Where several utterances share an encoder, as the hypotheses of an N-best list do: utterance b reads ``encoder[i]`` for
        ``i = encoder_index[b]``. May be traced. `encoder_lengths` are (E,) then, and the gradient of an encoder is the sum over
        its utterances. Unchecked, an utterance whose index is none of the encoders has loss NaN and gradient 0, as one whose
        encoder has a length out of range.
    band : Band, optional
        As `prune` returns it: only its cells are ever projected.
    classes : Classes, optional
        As `sample_classes` returns them: only their rows of weight and bias are read. The gradients are (V, H) and (V,).
    seed : int, integer scalar or PRNG key
        Of the dropout; may be traced, as in ``seed=jax.random.fold_in(key, step)``.
    activation, dropout, workspace, occupancy_floor and the others
        As of `transducer_loss.joint_rnnt_loss`. They are not traced: other values compile anew.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 inputs.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    Where there is a gradient, forward keeps 12 bytes a cell (24 for float64) beside the `workspace`, padding included, and
    backward makes the logits again, with the true upstream weights: 1 + 3k products of all cells, k being the share that
    `occupancy_floor` keeps. On a device the workspace, or as much of it as the shapes can need, is an output of the callback,
    and so is of XLA's own memory.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import joint_rnnt_loss
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> encoder, predictor = jax.random.normal(keys[0], (2, 30, 16)), jax.random.normal(keys[1], (2, 8, 16))
    >>> layer = {"kernel": jax.random.normal(keys[2], (16, 50)), "bias": jnp.zeros(50)}
    >>> targets = jax.random.randint(keys[3], (2, 7), 1, 50)
    >>> @jax.jit
    ... def loss(layer, frames, labels):
    ...     return joint_rnnt_loss(
    ...         encoder, predictor, layer["kernel"].T, layer["bias"], targets, frames, labels
    ...     ).mean()
    >>> gradient = jax.grad(loss)(layer, jnp.array([30, 21]), jnp.array([7, 4]))
    >>> gradient["kernel"].shape
    (16, 50)
    """
    options: dict[str, Any] = {
        "activation": activation, "blank": blank, "topology": topology, "dropout": dropout,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
        "workspace": workspace, "occupancy_floor": occupancy_floor, "validate": validate,
    }  # fmt: skip
    names = ("encoder", "predictor", "weight", "bias")
    inputs = tuple(
        None if value is None and name == "bias" else array_of(value, name)
        for value, name in zip((encoder, predictor, weight, bias), names, strict=True)
    )
    lengths = ("encoder_lengths", "target_lengths")
    batch = given(targets, encoder_lengths, target_lengths, lengths, band, classes, encoder_index)
    words, known = words_of(seed, "seed"), batch.known()
    of = joint_loss.problem(
        *(*jax.tree.map(shape_of, inputs), *known.positional), encoder_index=known.index, band=known.band,
        classes=known.classes, **options,
    )  # fmt: skip
    # Raises where the workspace is too small; for traced lengths, for the longest.
    tiling.plan(dataclasses.replace(of, cells=_padded(inputs, batch)) if traced(batch) else of)
    return _loss(as_callbacks(options), *alike(inputs, batch.on_device(), words if dropout else None))
