"""The transducer loss fused with the joint network, which never makes the (B, T, U+1, V) logits."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from transducer_loss.arrays import element_strides
from transducer_loss.band import Band, band_for
from transducer_loss.cells import Group
from transducer_loss.checks import (
    Options,
    choice,
    dropout_rate,
    expect_shape,
    finite,
    float_array,
    integers,
    lengths,
    targets_for,
    whole_number,
)
from transducer_loss.classes import Classes, classes_for
from transducer_loss.engine import Gradients, Saved, running
from transducer_loss.joint import ACTIVATIONS, Joint
from transducer_loss.logits_loss import raise_infeasible, weights_of
from transducer_loss.processors import Allocate, processor_for
from transducer_loss.shard import Shard, expect_shard
from transducer_loss.tiling import Problem


@dataclasses.dataclass(frozen=True)
class Grads:
    """Gradients of `joint_rnnt_loss`, each shaped as its input.

    Attributes
    ----------
    encoder, predictor, weight, bias : array
        `bias` is None where there is none. With ``sparse=True`` those of weight and bias are `Rows`.
    dropped : float
        Share of the cells that needed no gradient, in [0, 1].
    """

    encoder: Any
    predictor: Any
    weight: Any
    bias: Any
    dropped: float


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A gradient that is 0 but for a few rows.

    Attributes
    ----------
    rows : (K,) or (B, K) array of int32
        Which; a row that several utterances have is to be added up.
    values : (K, ...) or (B, K, ...) array
    """

    rows: Any
    values: Any


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def workspace_bytes(workspace: int | str | None, default: int, name: str = "workspace") -> int:
    """Bytes of ``"256MiB"``, ``"1 GB"``, a number of bytes, or None."""
    if workspace is None:
        return default
    if isinstance(workspace, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", workspace)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{name}: expected bytes or a size as '256MiB', got {workspace!r}")
        return int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(workspace, bool) or not isinstance(workspace, (int, np.integer)):
        raise TypeError(f"{name}: expected an int or a str, got {type(workspace).__name__}")
    if workspace <= 0:
        raise ValueError(f"{name}: expected more than 0 bytes, got {workspace}")
    return int(workspace)


def problem(
    encoder: Any, predictor: Any, weight: Any, bias: Any, targets: Any, encoder_lengths: Any, target_lengths: Any, /,
    *, activation: str = "tanh", encoder_index: Any = None, band: Band | None = None, classes: Classes | None = None,
    sparse: bool = False, shard: Shard | None = None, dropout: float = 0.0, seed: int = 0, workspace: int | str | None = None,
    occupancy_floor: float = 1e-6, validate: bool = False, threads: int | None = None, allocate: Allocate | None = None,
    **options: Any,
) -> Problem:  # fmt: skip
    """Check the arguments of the joint-fused losses."""
    encoder = float_array(encoder, "encoder", "B T H")
    predictor = float_array(predictor, "predictor", "B U+1 H", encoder, "encoder")
    weight = float_array(weight, "weight", "V H", encoder, "encoder")
    encoders, most_frames, features = encoder.shape
    batch = encoders if encoder_index is None else predictor.shape[0]
    vocabulary = rows = weight.shape[0]
    expect_shape(predictor, "predictor", "(B, U+1, H)", (batch, predictor.shape[1], features))
    if shard is not None:
        expect_shard(shard)
        if classes is not None:
            raise ValueError("shard: expected None with classes, which are rows of the whole output layer, got a Shard")
        vocabulary, rows = shard.vocab_size, shard.classes
    expect_shape(weight, "weight", "(V, H)" if shard is None else "(V of the shard, H)", (rows, features))
    if bias is not None:
        bias = float_array(bias, "bias", "V", encoder, "encoder")
        expect_shape(bias, "bias", "(V,)" if shard is None else "(V of the shard,)", (rows,))
    if options.pop("normalized", False):
        raise ValueError("normalized: expected False, as the joint makes logits, got True")
    checked = Options.checked(vocabulary, normalized=False, **options)
    rate = dropout_rate(dropout)
    if not 0.0 <= finite(occupancy_floor, "occupancy_floor") < 1.0:
        raise ValueError(f"occupancy_floor: expected a share in [0, 1), got {occupancy_floor}")
    if sparse and classes is None:
        raise ValueError("sparse: expected False without classes, as every row of the weight has a gradient then, got True")
    drawn_from = whole_number(seed, "seed") & (1 << 63) - 1
    kind = choice(activation, ACTIVATIONS, "activation")
    shape = "(B,)" if encoder_index is None else "(E,)"
    frames = all_frames = lengths(encoder_lengths, "encoder_lengths", encoders, 1, most_frames, "T", shape=shape)
    index = None
    if encoder_index is not None:
        index = lengths(encoder_index, "encoder_index", batch, 0, encoders - 1, "E - 1", "indices")
        frames = all_frames[index]
    labels = lengths(target_lengths, "target_lengths", batch, 0, predictor.shape[1] - 1, "U")
    processor = processor_for(encoder, threads, allocate)
    with processor:
        # Kernels read features in order, matrix products rows or columns; the rest may have any strides.
        inputs = (encoder, predictor, weight, bias)
        encoder, predictor = (array if _features_in_order(array) else array.copy() for array in (encoder, predictor))
        if classes is None:  # else rows are gathered
            weight = weight if _matrix(weight) else weight.copy()
            bias = bias if bias is None or _features_in_order(bias) else bias.copy()
        read = (encoder, predictor, weight, bias)
        copied = sum(new.nbytes for old, new in zip(inputs, read, strict=True) if new is not None and new is not old)
        known = targets_for(targets, processor, labels, vocabulary, checked, validate)
        return Problem(
            processor, Joint(encoder, predictor, kind, rate, drawn_from), weight, bias,
            dataclasses.replace(band_for(band, processor, frames, labels), encoders=index),
            known, checked,
            workspace_bytes(workspace, processor.default_workspace), float(occupancy_floor), copied,
            None if classes is None else classes_for(
                classes, processor, vocabulary, checked.blank, integers(targets, "targets"), labels, validate
            ),
            bool(sparse), shard, all_frames,
        )  # fmt: skip


def _features_in_order(array: Any) -> bool:
    return bool(array.shape[-1] == 1 or element_strides(array)[-1] == 1)


def _matrix(array: Any) -> bool:
    """Whether BLAS reads the array as it lies."""
    (rows, columns), (by_row, by_column) = array.shape, element_strides(array)
    return bool((by_column == 1 and by_row >= columns) or (by_row == 1 and by_column >= rows))


@dataclasses.dataclass(frozen=True)
class Forward:
    """A loss and what belongs to it."""

    native: Any
    """(B,) array of the caller's framework."""
    loss: Any
    """(B,) with +inf where there is no path, whatever `native` reports."""
    saved: Saved | None
    """Of all cells, where the gradient is made later."""
    gradients: Gradients | None = None

    @classmethod
    def resumed(cls, loss: Any, *vectors: Any) -> Forward:
        """For `backward`, of the loss and the vectors of `saved` that an adapter has kept, which may be longer."""
        normaliser, blank, label = vectors
        return cls(None, loss, Saved(normaliser, (blank, label)))


def forward(of: Problem, weights: Any = None, weight: float = 1.0, gradient: bool = True, later: bool = False) -> Forward:
    """Losses; and the gradient of ``weight * sum_b weights_b loss_b``, or `later` what is needed to make it."""
    with running(of) as engine:
        batch = len(of.cells.frames)
        loss = engine.processor.empty((batch,), of.dtype)
        native, reported = engine.processor.output((batch,), of.dtype)
        now = gradient and not later
        saved = None
        if gradient and later:
            normaliser, *occupancies = (engine.processor.empty((int(of.cells.counts.sum()),), of.dtype) for _ in range(3))
            saved = Saved(normaliser, (occupancies[0], occupancies[1]))
        gradients = engine.gradients() if now else None
        strips = []
        if gradients is not None:
            strips = engine.strips(gradients)
            weights, weight = engine.scaled(weights, weight, gradients)

        def of_group(group: Group, keep: bool, begin: int) -> None:
            # A function, so that a group's arrays are gone before those of the next are made.
            arcs, logits = engine.arcs(group, keep)
            occupancy = engine.occupancy(group, arcs, loss, reported, gradient)
            if occupancy is None:
                return
            of_cells = Saved(arcs.normaliser, occupancy, logits)
            if gradients is not None:
                engine.backward(group, of_cells, loss, weights, weight, strips, gradients)
            elif saved is not None:
                for vector, part in zip(saved.vectors, of_cells.vectors, strict=True):
                    vector[begin : begin + group.cells] = part

        begin = 0
        for group, retained in engine.groups():
            of_group(group, retained and now, begin)
            begin += group.cells
        raise_infeasible(engine.processor, loss, of.options)
        return Forward(native, loss, saved, None if gradients is None else engine.finish(strips, gradients))


def backward(of: Problem, done: Forward, weights: Any) -> Gradients:
    """Gradient of ``sum_b weights_b loss_b`` by pass two alone."""
    if done.saved is None:
        raise ValueError("done: expected a forward pass with later=True, got one that made its gradients")
    with running(of) as engine:
        gradients = engine.gradients()
        strips = engine.strips(gradients)
        weights, weight = engine.scaled(weights, 1.0, gradients)
        begin = 0
        for group, _ in engine.groups():
            part = done.saved.part(begin, begin + group.cells)
            engine.backward(group, part, done.loss, weights, weight, strips, gradients)
            begin += group.cells
        return engine.finish(strips, gradients)


def dropped_share(of: Problem, gradients: Gradients) -> float:
    """Share of the cells that needed no gradient."""
    return 1.0 - gradients.kept / int(of.cells.counts.sum())


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
    seed: int = 0,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    weights: Any = None,
    gradient: bool = True,
    workspace: int | str | None = None,
    occupancy_floor: float = 1e-6,
    sparse: bool = False,
    shard: Shard | None = None,
    validate: bool = False,
) -> tuple[Any, Grads | None]:
    """Transducer loss of ``logits(t, u) = weight @ activation(encoder_t + predictor_u) + bias``, in bounded memory.

    The same number as these lines, without their (B, T, U+1, V) and (B, T, U+1, H) arrays::

        hidden = activation(encoder[:, :, None] + predictor[:, None])
        loss, grad = rnnt_loss(hidden @ weight.T + bias, targets, encoder_lengths, target_lengths)

    Parameters
    ----------
    encoder : (B, T, H) array
        float16, bfloat16, float32 or float64; projected to the joint's features. Padding may hold anything. With
        `encoder_index` (E, T, H).
    predictor : (B, U+1, H) array
        Likewise; row u follows label u, row 0 the start.
    weight : (V, H) array
        The output layer (``kernel.T`` of Keras and Flax).
    bias : (V,) array or None
        Of the output layer.
    targets, encoder_lengths, target_lengths, blank, topology
        As of `rnnt_loss`.
    encoder_index : (B,) array or list of int, optional
        Where several utterances share an encoder, as the hypotheses of an N-best list do: utterance b reads ``encoder[i]`` for
        ``i = encoder_index[b]``. Encoder and `encoder_lengths` have as many rows as there are encoders then, in any number, and
        the gradient of each is the sum over its utterances, of which those of a group have one of their own in the workspace
        first. One on a device is copied to the host, which synchronises.
    band : Band, optional
        Pruned (arXiv 2206.13236) or alignment-restricted loss: only the band's cells are ever projected.
    classes : Classes, optional
        Of `sample_classes`, for these targets: the loss normalises over them alone (sampled softmax, arXiv 2203.16868), and
        only their rows of weight and bias are read. With classes per utterance, utterances are worked on one by one, which on
        CUDA costs a read-back each unless ``occupancy_floor=0``.
    fastemit_lambda, delay_penalty, hat, infeasible, weights, validate
        As of `rnnt_loss`.
    activation : {"tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity"}
        Of the hidden features; "gelu" is the exact one, "leaky_relu" has slope 0.01.
    dropout : float
        Probability that a hidden feature is zeroed; the others are scaled by ``1 / (1 - dropout)``.
    seed : int
        Of the dropout: the same mask for the same seed, whatever the batch is cut into.
    gradient : bool
        Whether to make the gradients.
    workspace : int or str, optional
        Bound on all temporary memory, in bytes or as "256MiB" (the default on the host; 1 GiB on CUDA). Larger is faster,
        up to the point where a group's logits fit.
    occupancy_floor : float
        Cells that the paths of an utterance use less than ``occupancy_floor * (T_b + U_b) / cells_b`` times get no
        gradient: all dropped ones together are used less than ``occupancy_floor * (T_b + U_b)`` times. 0 keeps every cell.
    sparse : bool
        With `classes`, give the gradients of weight and bias as `Rows`, without their (V, H) and (V,) arrays: K rows, or
        with classes per utterance B K, of which those of common classes come several times.
    shard : Shard, optional
        Where the rows of the output layer lie in several processes: what of them `weight`, `bias` and their gradients are.
        Labels and blank are classes of the whole vocabulary. Four numbers a cell are exchanged, and the gradients of encoder
        and predictor are summed over the processes. A weight that has to be copied, as rows that are far apart, comes on top
        of the workspace.

    Returns
    -------
    loss : (B,) array
        float32, or float64 for float64 inputs.
    grads : Grads or None
        Of ``sum_b weights_b loss_b``, in the inputs' dtype.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; for a `workspace` too small, the least that would do.

    Notes
    -----
    Two passes over tiles of cells (sample-wise training, arXiv 2211.16270, is the case of one utterance at a time); see
    `transducer_loss.engine`. Sums run in one order, so the same input gives the same bits for any number of threads.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> rng = np.random.default_rng(0)
    >>> encoder, predictor = rng.normal(size=(2, 30, 16)), rng.normal(size=(2, 8, 16))
    >>> weight, bias = rng.normal(size=(50, 16)), np.zeros(50)
    >>> targets = rng.integers(1, 50, size=(2, 7))
    >>> loss, grads = tl.joint_rnnt_loss(encoder, predictor, weight, bias, targets, [30, 21], [7, 4])
    >>> loss.shape, grads.weight.shape
    ((2,), (50, 16))
    """
    of = problem(
        encoder, predictor, weight, bias, targets, encoder_lengths, target_lengths, activation=activation,
        encoder_index=encoder_index, band=band, classes=classes, sparse=sparse, shard=shard, dropout=dropout, seed=seed,
        workspace=workspace, occupancy_floor=occupancy_floor, validate=validate, blank=blank, topology=topology,
        fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty, hat=hat, infeasible=infeasible,
    )  # fmt: skip
    done = forward(of, weights_of(of, weights), gradient=gradient)
    if done.gradients is None:
        return done.native, None
    encoder, predictor, weight, bias = (
        None if native is None else _cast(of, native) for native in done.gradients.native
    )
    if of.classes is not None and of.sparse:
        rows = of.classes.ids
        weight, bias = Rows(rows, weight), None if bias is None else Rows(rows, bias)
    return done.native, Grads(encoder, predictor, weight, bias, dropped_share(of, done.gradients))


def _cast(of: Problem, sums: Any) -> Any:
    """Sums in the inputs' dtype."""
    kind = of.joint.encoder.dtype
    if sums.dtype == kind:
        return sums
    with of.processor as processor:
        native, view = processor.output(sums.shape, kind.name)
        view[...] = sums
        return native
