"""Small problems of EMBR training, of the reduced decoder and of Amortized Networks: `test_emulation.py` runs these, too.

Numbers out of range come as they would on a device, where nobody looks at them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import transducer_loss as tl
from emulation_cases import UNIT, Array, Case, frozen, joint_case, joint_problem, some_band, some_classes
from transducer_loss import amortized, reference
from transducer_loss.arrays import COMPUTE, FLOATS, numpy_dtype
from transducer_loss.embr import risk

# The functions of these names hide their modules.
counted = importlib.import_module("transducer_loss.edit_distance").counted
reduced_predictor = importlib.import_module("transducer_loss.reduced_predictor")

NO_LENGTH = -(2**40)
"""A length that is none, whatever there is."""


def _integers(values: Array, dtype: str, strided: bool) -> Array:
    """Integers of a dtype; backwards in memory, in every second place, where they are `strided`."""
    if not strided:
        return frozen(values.astype(dtype))
    wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), 77, dtype)
    wide[..., ::-2] = values
    return frozen(wide)[..., ::-2]


def edit_case(
    name: str, hypotheses: Sequence[Sequence[int]], references: Sequence[int], *, block: int = 64, longest: tuple[int, int] | None = None,
    classes: int = 4, blank: int | None = None, dtype: str = "int64", strided: bool = False, alike: bool = False, flat: bool = False,
    seed: int = 0,
) -> Case:  # fmt: skip
    """Lengths of the hypotheses (B, N) and references (B,), some of them none; padded to `longest`; labels of a few classes.

    Past the end there are labels, too. `alike` makes every hypothesis its reference but for one label.
    """
    rng = np.random.default_rng(seed)
    lengths, counts = np.array(hypotheses, np.int64), np.array(references, np.int64)
    columns, width = longest or (max(0, int(lengths.max())), max(0, int(counts.max())))
    said, meant = rng.integers(0, classes, (*lengths.shape, columns)), rng.integers(0, classes, (len(counts), width))
    if alike:
        said[..., :width] = meant[:, None, :columns]
        said[..., columns // 2] += 1
    given = _integers(said, dtype, strided), frozen(lengths), _integers(meant, dtype, strided), frozen(counts)
    if flat:
        given = given[0][:, 0], given[1][:, 0], *given[2:]

    def wanted() -> Array:
        found = np.full((4, *lengths.shape), -1)
        for b, n in np.ndindex(*lengths.shape):
            if 0 <= lengths[b, n] <= columns and 0 <= counts[b] <= width:
                found[:, b, n] = reference.edit_distance(said[b, n, : lengths[b, n]], meant[b, : counts[b]], blank)
        return found[..., 0] if flat else found

    return Case(name, lambda: counted(*given, blank=blank, validate=None), block, rounding="float64", wanted=lambda: list(wanted()))


def embr_case(
    name: str, *, block: int = 64, dtype: str = "float32", batch: int = 3, members: int = 5, labels: bool = True,
    lengths: bool = True, nll: dict[tuple[int, int], float] | None = None, distances: dict[tuple[int, int], float] | None = None,
    unreadable: int | None = None, columns: int = 4, seed: int = 0, reference_nll: float | None = 2.5, **options: Any,
) -> Case:  # fmt: skip
    """N-best lists of which some hypotheses are padding and, with `labels`, many are alike; `nll` and `distances` hold exceptions.

    Utterance `unreadable` has a length that is none.
    """
    rng = np.random.default_rng(seed)
    shape = batch, members
    kind = numpy_dtype(dtype)
    x = rng.gamma(2.0, 2.0, shape)
    far = rng.integers(0, 9, shape) + rng.random(shape)
    counts = rng.integers(-1, columns + 1, shape)
    counts[0, 0] = columns
    if lengths:
        x[counts < 0] = far[counts < 0] = np.nan
    for array, exceptions in ((x, nll or {}), (far, distances or {})):
        for place, value in exceptions.items():
            array[place] = value
    x, far = frozen(x.astype(kind)), frozen(far.astype(np.float64 if dtype == "float64" else np.float32))
    said = frozen(rng.integers(0, 2, (*shape, columns)))
    given_lengths = counts.copy()
    if unreadable is not None:
        given_lengths[unreadable, -1] = 2**40
    of = None if reference_nll is None else frozen(np.full(batch, reference_nll, kind))
    given: dict[str, Any] = {
        "hypotheses": said if labels and lengths else None, "hypothesis_lengths": frozen(given_lengths) if lengths else None,
        "blank": None, "temperature": 1.0, "reference_nll": of, "interpolation": 0.0 if of is None else 0.25, "infeasible": "inf",
        "weights": frozen(rng.normal(size=batch)), "gradient": True, "validate": None, **options,
    }  # fmt: skip

    def wanted() -> Any:
        plain = {key: value for key, value in given.items() if key not in ("weights", "gradient", "validate", "hypothesis_lengths")}
        weights = np.ones(batch) if given["weights"] is None else given["weights"]
        loss, grad = reference.embr_loss(
            x.astype(np.float64), far, hypothesis_lengths=counts if lengths else None,
            **{**plain, "reference_nll": None if of is None else of.astype(np.float64)},
        )  # fmt: skip
        if unreadable is not None:
            loss[unreadable], grad[unreadable] = np.nan, 0.0
        if not given["gradient"]:
            return loss
        by_reference = np.where(np.isfinite(loss), given["interpolation"] * weights, 0.0)
        return loss, grad * weights[:, None], None if of is None else by_reference

    return Case(name, lambda: risk(x, far, **given), block, rounding=dtype, wanted=wanted)


def _floats(values: Array, dtype: str, strided: bool) -> Array:
    """Of a dtype; with frames backwards and branches far apart where they are `strided`."""
    values = values.astype(numpy_dtype(dtype))
    if not strided:
        return frozen(values)
    wide = np.full((values.shape[0], values.shape[2], 2 * values.shape[1]), np.nan, values.dtype)
    wide[:, :, ::-2] = values.transpose(0, 2, 1)
    return frozen(wide).transpose(0, 2, 1)[:, ::-2]


@dataclasses.dataclass(frozen=True)
class Frames:
    """Numbers (B, T, K), NaN past each utterance's length, which may be none."""

    values: Array
    lengths: Array
    known: Array
    """Lengths that are, 1 for those that are none."""
    bad: Array

    @classmethod
    def of(
        cls, lengths: Sequence[int], frames: int, branches: int, dtype: str, strided: bool, scale: float, seed: int,
        exceptions: dict[tuple[int, int, int], float] | None,
    ) -> Frames:  # fmt: skip
        """Random ones, but for `exceptions`."""
        rng, given = np.random.default_rng(seed), np.array(lengths, np.int64)
        values = rng.normal(0, scale, (len(given), frames, branches))
        for place, value in (exceptions or {}).items():
            values[place] = value
        bad = (given < 1) | (given > frames)
        known = np.where(bad, 1, given)
        for b in np.flatnonzero(~bad):
            values[b, known[b] :] = np.nan
        return cls(_floats(values, dtype, strided), frozen(given), known, bad)

    @property
    def exact(self) -> Array:
        """The same numbers in float64."""
        return self.values.astype(np.float64)

    def settled(self, value: Array, *gradients: Array) -> tuple[Array, ...]:
        """NaN, and gradient 0, where there is no length."""
        bad = self.bad.reshape(-1, *[1] * (value.ndim - 1))
        return np.where(bad, np.nan, value), *(np.where(self.bad[:, None, None], 0.0, gradient) for gradient in gradients)


def frames_case(
    name: str, what: str, *, block: int = 64, dtype: str = "float32", lengths: Sequence[int] = (70, 1, 33), frames: int = 71,
    branches: int = 3, strided: bool = False, exceptions: dict[tuple[int, int, int], float] | None = None, seed: int = 0,
    gradient: bool = True, weights: bool = True, **options: Any,
) -> Case:  # fmt: skip
    """Cost or backlog of gates."""
    of = Frames.of(lengths, frames, branches, dtype, strided, 1.0, seed, exceptions)
    rng = np.random.default_rng(seed)
    each = frozen(rng.random(branches) * 2)
    upstream = frozen(rng.normal(size=len(lengths)).round(1)) if weights else None
    function, twin = {
        "cost": (amortized.mean_cost, reference.amortized_cost), "backlog": (amortized.waiting, reference.amortized_backlog),
    }[what]  # fmt: skip
    if what == "backlog":
        options = {"frame_period": 0.25, "statistic": "mean", **options}

    def run() -> Any:
        return function(of.values, each, of.lengths, weights=upstream, gradient=gradient, validate=None, **options)

    def wanted() -> Any:
        value, grad = twin(of.exact, each, of.known, **options)
        grad = grad if upstream is None else grad * upstream[:, None, None]
        return of.settled(value, *[grad] * gradient)

    return Case(name, run, block, rounding=COMPUTE[dtype], wanted=wanted)


def gate_case(
    name: str, *, block: int = 64, dtype: str = "float32", lengths: Sequence[int] | None = (70, 1, 33), frames: int = 90,
    branches: int = 3, strided: bool = False, exceptions: dict[tuple[int, int, int], float] | None = None, seed: int = 0,
    backward: bool = False, **options: Any,
) -> Case:  # fmt: skip
    """Gates of logits, or with `backward` their gradient; without lengths two utterances without padding."""
    known = [frames, frames] if lengths is None else lengths
    of = Frames.of(known, frames, branches, dtype, strided, 2.0, seed, exceptions)
    given: dict[str, Any] = {"temperature": 0.7, "noise": True, "seed": 2**63 + seed, **options}
    counts = None if lengths is None else of.lengths
    if not backward:
        given.setdefault("hard", False)

        def gates() -> Any:
            return of.settled(reference.gumbel_gate(of.exact, of.known, **given))

        return Case(
            name, lambda: amortized.gated(of.values, counts, validate=None, **given), block, rounding=COMPUTE[dtype], wanted=gates
        )
    upstream = Frames.of(known, frames, branches, dtype, not strided, 1.0, seed + 1, None)

    def wanted() -> Any:
        grad = reference.gumbel_gate_backward(upstream.exact, of.exact, of.known, **given)
        return of.settled(np.zeros(len(known)), grad)[1]

    # An upstream gradient less its mean over the branches.
    noise = UNIT[COMPUTE[dtype]] * 2 * float(np.abs(np.nan_to_num(upstream.exact)).max(initial=0.0)) / given["temperature"]
    return Case(
        name, lambda: amortized.gated_backward(upstream.values, of.values, counts, validate=None, **given), block,
        rounding=COMPUTE[dtype], noise=noise, wanted=wanted,
    )  # fmt: skip


def reduced_case(
    name: str, *, backward: bool = False, last: bool = False, block: int = 64, dtype: str = "float32",
    lengths: Sequence[int] = (5, 0, 3), columns: int = 6, classes: int = 7, features: int = 70, heads: int = 2, reach: int = 3,
    strided: bool = False, wrong: dict[tuple[int, int], int] | None = None, value: float | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """The reduced predictor or its gradient; with labels that are `wrong`, and an embedding with a `value`."""
    rng = np.random.default_rng(seed)
    kind, given = numpy_dtype(dtype), np.array(lengths, np.int64)
    batch, rows = len(given), columns + 1
    labels = rng.integers(0, classes, (batch, columns))
    for place, label in (wrong or {}).items():
        labels[place] = label
    bad_length = (given < 0) | (given > columns)
    counts = np.where(bad_length, 0, given)
    real = np.arange(columns) < counts[:, None]
    # Rows that see a label which is none, or are of a length which is none.
    none = real & ((labels < 0) | (labels >= classes))
    broken = np.array([[bool(none[b, max(0, u - reach) : u].any()) for u in range(rows)] for b in range(batch)])
    broken[np.arange(rows) > counts[:, None]] = False
    broken |= bad_length[:, None]
    labels[~real] = rng.integers(-(2**31), 2**31, (~real).sum())
    embedding = rng.normal(size=(classes, features + 2))
    if value is not None:
        embedding[classes - 1, features] = value
    positions = frozen(rng.normal(size=(heads, reach, features)).astype(kind))
    table = frozen(embedding.astype(kind))[:, 1:-1]
    given_labels = _integers(labels, "int64" if strided else "int32", strided)
    upstream = rng.normal(size=(batch, rows, features + 1))
    for b in range(batch):
        upstream[b, counts[b] + 1 :] = np.nan
    upstream = frozen(upstream.astype(kind))[..., 1:]
    at = np.arange(batch), counts
    if last:
        upstream, broken = frozen(upstream[at].copy()), broken[at]
    if strided:
        upstream = frozen(upstream.copy(order="F"))
    arguments = table, positions, given_labels, frozen(given)
    exact = [np.nan_to_num(table.astype(np.float64), nan=0.0), positions.astype(np.float64)]
    of_value = np.isnan(table.astype(np.float64)).any(axis=1)
    if of_value.any():
        seen = real & of_value[labels.clip(0, classes - 1)] & (labels >= 0) & (labels < classes)
        touched = np.array([[bool(seen[b, max(0, u - reach) : u].any()) and u <= counts[b] for u in range(rows)] for b in range(batch)])
        broken = broken | (touched[at] if last else touched)
    known = np.where(real & (labels >= 0) & (labels < classes), labels, 0)

    def out() -> Array:
        found = reference.reduced_predictor(*exact, known, counts, last=last)
        return np.where(broken[..., None], np.nan, found)

    def gradients() -> Any:
        usable = np.where(broken[..., None], 0.0, upstream.astype(np.float64))
        return reference.reduced_predictor_backward(usable, *exact, known, counts, last=last)

    if backward:
        usual = [np.where(np.abs(part) < 10, np.abs(part), 0.0) for part in (np.nan_to_num(upstream.astype(np.float64)), *exact)]
        sizes = reference.reduced_predictor_backward(*usual, known, counts, last=last)
        return Case(
            name, lambda: reduced_predictor.averaged_backward(upstream, *arguments, last=last, validate=None), block,
            rounding=dtype, noise=UNIT[COMPUTE[dtype]] * float(max(part.max() for part in sizes)), wanted=gradients,
        )  # fmt: skip
    return Case(
        name, lambda: reduced_predictor.averaged(*arguments, last=last, validate=None), block, rounding=dtype, wanted=out
    )


def _parts(*arguments: Any, encoder_index: Sequence[int], **options: Any) -> Any:
    """The joint-fused loss and its gradients; encoders that no utterance has are NaN."""
    encoder, *rest = arguments
    used = np.isin(np.arange(len(encoder)), encoder_index)
    wide = np.full((*encoder.shape[:2], encoder.shape[2] + 3), np.nan, encoder.dtype)
    wide[used, :, 1:-2] = encoder[used]
    loss, grads = tl.joint_rnnt_loss(frozen(wide)[..., 1:-2], *rest, encoder_index=encoder_index, **options)
    return loss, grads.encoder, grads.predictor, grads.weight, grads.bias


def shared_case(
    name: str, index: Sequence[int], frames: list[int], lengths: list[int], *, options: dict[str, Any] | None = None,
    compared: bool = True, classes: int = 40, dtype: str = "float32", **shape: Any,
) -> Case:  # fmt: skip
    """The joint-fused loss of utterances that share encoders, compared with that of as many encoders as there are utterances."""
    options = {"weights": [2.0, 0.0, -1.0, 0.5, 1.0][: len(index)], **(options or {})}
    case = joint_case(
        name, call=_parts, frames=frames, lengths=lengths, options={**options, "encoder_index": list(index)}, classes=classes,
        dtype=dtype, **shape,
    )  # fmt: skip
    floats = {key: shape[key] for key in ("features",) if key in shape}

    def wanted() -> Any:
        *arrays, targets, _, _ = joint_problem(dtype, frames, lengths, classes, **floats)
        encoder, *others = (np.asarray(array, np.float64) for array in arrays)
        given = {key: value for key, value in options.items() if key not in ("band", "classes", "occupancy_floor")}
        if "band" in options:
            given |= {"first": options["band"].first, "end": options["band"].end, "width": options["band"].width}
        if "classes" in options:
            given |= {"classes": options["classes"].ids, "offset": -np.log(options["classes"].probability.astype(np.float64))}
        loss, (by_encoder, *by_others) = reference.joint_rnnt_loss(
            encoder[list(index)], *others, targets, [frames[i] for i in index], lengths, **given
        )
        summed = np.zeros_like(encoder)
        np.add.at(summed, list(index), by_encoder)
        return loss, summed, *by_others

    return dataclasses.replace(case, wanted=wanted if compared else None)


def _edit_cases() -> list[Case]:
    some = [[5, 0, -1, 7], [3, 4, 4, 1], [-1, -1, 0, 6]], [4, 6, 0]
    wild = [[5, 8, -9, NO_LENGTH], [2**40, 7, 0, -1], [3, 3, 3, 3]], [4, 7, 2**40]
    return [
        *(edit_case(f"edit-{dtype}{'-strided' * strided}", *some, dtype=dtype, strided=strided)
          for dtype in ("int32", "int64") for strided in (False, True)),
        edit_case("edit-int16", *some, dtype="int16"),
        *(edit_case(f"edit-blank-{blank}", *some, blank=blank, classes=3) for blank in (0, 2, -1)),
        edit_case("edit-blanks-alone", *some, blank=0, classes=1),
        edit_case("edit-alike", [[70, 70], [69, 3]], [70, 70], alike=True),
        edit_case("edit-unchecked", *wild, longest=(7, 7)),
        edit_case("edit-one-each", [[4], [0]], [3, 2], flat=True),
        edit_case("edit-no-labels", [[0, -1]], [0], longest=(0, 0)),
        edit_case("edit-no-hypotheses", [[0, 0]], [3], longest=(0, 3)),
        edit_case("edit-no-references", [[3, 2]], [0], longest=(3, 0)),
        # Sequences and diagonals longer than a block, of either kind; blanks counted across its turns.
        edit_case("edit-longer-than-a-block", [[80, 100], [33, 0]], [90, 40], block=32),
        edit_case("edit-long-with-blanks", [[150, 96], [64, 65]], [66, 130], blank=1, classes=3),
        edit_case("edit-block-128", [[150, 40]], [40], block=128, blank=1),
        edit_case("edit-block-1024", [[3, 1]], [2], block=1024),
        # The longest reference that fits the shared memory; one label more; such columns with little in them.
        edit_case("edit-widest-shared", [[2, 3]], [1023], block=128),
        edit_case("edit-widest", [[3, 1]], [1024], block=128),
        edit_case("edit-columns-beyond-shared-memory", [[5, 7, -1], [3, 0, 6]], [6, 2], longest=(8, 1500)),
    ]  # fmt: skip


def _embr_cases() -> list[Case]:
    return [
        *(embr_case(f"embr-{dtype}", dtype=dtype) for dtype in FLOATS),
        *(embr_case(f"embr-block-{block}", block=block, members=members, batch=2)
          for block, members in ((32, 70), (128, 5), (1024, 3))),
        embr_case("embr-one-hypothesis", members=1, lengths=False),
        embr_case("embr-many-alike", members=40, block=32, columns=2, blank=1),
        embr_case("embr-lengths-alone", labels=False, temperature=2.5),
        embr_case("embr-neither", lengths=False, temperature=0.3, dtype="float64", weights=None),
        embr_case("embr-no-reference", reference_nll=None),
        embr_case("embr-reference-without-path", reference_nll=np.inf),
        embr_case("embr-no-gradient", gradient=False),
        embr_case("embr-zero-weights", weights=np.zeros(3)),
        embr_case("embr-not-finite", lengths=False, batch=4, nll={(0, 1): np.nan, (1, 2): -np.inf, (3, 0): np.inf},
                  distances={(2, 3): np.nan, (3, 0): np.nan}),
        embr_case("embr-infinite-distance", lengths=False, distances={(1, 0): np.inf}),
        *(embr_case(f"embr-impossible-{infeasible}", lengths=False, infeasible=infeasible,
                    nll={(1, i): np.inf for i in range(5)}) for infeasible in ("inf", "zero")),
        embr_case("embr-unreadable", unreadable=1),
        embr_case("embr-far-apart", lengths=False, nll={(0, 0): -3e4, (1, 1): 6e4}, dtype="float32"),
        embr_case("embr-far-apart-half", lengths=False, nll={(0, 0): 6e4, (1, 1): 3e4}, dtype="float16"),
    ]  # fmt: skip


def _amortized_cases() -> list[Case]:
    wild = [70, 0, -1, 72, NO_LENGTH, 71]
    bad = {(0, 2, 1): np.nan, (2, 5, 0): np.inf}
    ruled_out = {(0, 0, 0): -np.inf, (0, 1, 1): np.nan, (0, 2, 2): np.inf, **{(2, 3, k): -np.inf for k in range(3)}}
    tiny: dict[str, Any] = {"lengths": [2], "frames": 3, "branches": 2}
    kinds = [
        *(("cost", "", {}) for _ in range(1)), ("backlog", "", {}), ("backlog", "-last", {"statistic": "last"}),
    ]  # fmt: skip
    return [
        *(frames_case(f"{what}{name}-{dtype}", what, dtype=dtype, **options) for what, name, options in kinds for dtype in FLOATS),
        *(frames_case(f"{what}{name}-strided", what, strided=True, dtype="bfloat16", **options) for what, name, options in kinds),
        *(frames_case(f"{what}{name}-unchecked", what, lengths=wild, **options) for what, name, options in kinds),
        *(frames_case(f"{what}{name}-not-finite", what, exceptions=bad, **options) for what, name, options in kinds),
        *(frames_case(f"{what}{name}-no-gradient", what, gradient=False, **options) for what, name, options in kinds),
        # Frames for several turns of the block, the last of them not full, full, and of one frame.
        *(frames_case(f"{what}{name}-block-32-{frames}", what, block=32, lengths=[frames, frames - 31], frames=frames, **options)
          for what, name, options in kinds for frames in (96, 97)),
        *(frames_case(f"{what}{name}-block-128", what, block=128, weights=False, **options) for what, name, options in kinds),
        *(frames_case(f"{what}{name}-block-1024", what, block=1024, **tiny, **options) for what, name, options in kinds),
        *(frames_case(f"{what}{name}-many-branches", what, block=32, branches=70, lengths=[3], frames=4, **options)
          for what, name, options in kinds),
        *(frames_case(f"backlog-{name}", "backlog", frame_period=period) for name, period in (("never", 1e6), ("always", 0.0))),
        *(gate_case(f"gate{'-backward' * backward}-{dtype}", dtype=dtype, backward=backward)
          for backward in (False, True) for dtype in FLOATS),
        *(gate_case(f"gate-hard-{dtype}", dtype=dtype, hard=True) for dtype in ("float16", "float32")),
        *(gate_case(f"gate{'-backward' * backward}-{name}", backward=backward, **options)
          for backward in (False, True) for name, options in (
              ("quiet", {"noise": False}), ("cold", {"temperature": 1e-3}), ("strided", {"strided": True}),
              ("unchecked", {"lengths": wild, "frames": 71}), ("not-finite", {"exceptions": ruled_out}),
              ("no-lengths", {"lengths": None}), ("block-32", {"block": 32, "branches": 9}), ("block-128", {"block": 128}),
              ("block-1024", {"block": 1024, **tiny}), ("one-branch", {"branches": 1}),
          )),
        gate_case("gate-hard-not-finite", hard=True, exceptions=ruled_out),
        gate_case("gate-hard-equals", hard=True, noise=False, exceptions={(0, 0, k): 1.0 for k in range(3)}),
    ]  # fmt: skip


def _reduced_cases() -> list[Case]:
    wild = {"lengths": (5, 7, -1, 4), "wrong": {(0, 1): 7, (3, 0): -1, (3, 3): 2**31 - 1}, "reach": 2}
    ways = [(backward, last, f"reduced{'-backward' * backward}{'-last' * last}") for backward in (False, True) for last in (False, True)]
    return [
        *(reduced_case(f"{name}-{dtype}", backward=backward, last=last, dtype=dtype) for backward, last, name in ways for dtype in FLOATS),
        *(reduced_case(f"{name}-{of}", backward=backward, last=last, **options)
          for backward, last, name in ways for of, options in (
              ("strided", {"strided": True}), ("unchecked", wild), ("not-finite", {"value": np.nan, "classes": 3}),
              ("sees-more-than-there-is", {"reach": 9}), ("no-labels", {"lengths": (0, 0), "columns": 0}),
              ("one-class", {"classes": 1, "features": 1, "heads": 1, "reach": 1}), ("block-32", {"block": 32, "lengths": (40, 2), "columns": 40}),
              ("block-128", {"block": 128, "features": 200}), ("block-1024", {"block": 1024, "lengths": (2,), "columns": 2, "features": 5}),
          )),
        # More rows than there are parts in which the position vectors' gradient is summed.
        reduced_case("reduced-backward-many-rows", backward=True, lengths=(30, 0, 29), columns=30, features=5),
        # Many labels of one class, whose gradients are one sum.
        *(reduced_case(f"reduced-backward-alike-{classes}", backward=True, lengths=(70, 60, 0), columns=75, features=5, classes=classes)
          for classes in (1, 2)),
    ]  # fmt: skip


def _shared_cases() -> list[Case]:
    strips = {"tile_bytes": 1}
    five: dict[str, Any] = {"index": [2, 0, 2, 0, 2], "frames": [5, 3, 4, 1], "lengths": [3, 0, 2, 3, 1]}
    two: dict[str, Any] = {"index": [1, 0], "frames": [4, 5], "lengths": [4, 1]}
    thin: dict[str, Any] = {"index": [1, 1], "frames": [2, 16], "lengths": [7, 7], "classes": 20, "features": 2}
    exact = {"occupancy_floor": 0.0}
    band = some_band([5, 4], [4, 1], 3, "regular")
    drawn = some_classes("utterance", True, frames=[5, 3, 4, 1], lengths=five["lengths"])
    return [
        *(shared_case(f"shared-{dtype}", dtype=dtype, options=exact, **five) for dtype in FLOATS),
        *(shared_case(f"shared-{dtype}-as-on-cuda", dtype=dtype, cuda=True, options=exact, **five) for dtype in ("float16", "float64")),
        *(shared_case(f"shared-block-{block}", block=block, processor=strips, options=exact, **five) for block in (32, 128)),
        shared_case("shared-block-1024", block=1024, index=[0, 0], frames=[1], lengths=[1, 0], features=5),
        shared_case("shared-by-none", index=[1], frames=[2, 3, 2], lengths=[2]),
        shared_case("shared-in-order", index=[0, 1], frames=[3, 2], lengths=[2, 1]),
        shared_case("shared-strips", processor=strips, index=[1, 1, 1], frames=[2, 6], lengths=[4, 4, 2]),
        shared_case("shared-dropout", options={"dropout": 0.3}, compared=False, **five),
        shared_case("shared-band", options={"band": band}, **two),
        shared_case("shared-classes", options={"classes": drawn}, **five),
        shared_case("shared-groups", processor=strips, planned=lambda plan: len(plan.groups) > 1 and all(plan.retained), **thin),
        shared_case("shared-groups-made-again", processor=strips, planned=lambda plan: len(plan.groups) > 1 and not any(plan.retained), **thin),
    ]  # fmt: skip


CASES = [*_edit_cases(), *_embr_cases(), *_amortized_cases(), *_reduced_cases(), *_shared_cases()]
