"""Small problems that together launch every kernel in every way: `test_emulation.py` runs each under every sanitizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest

import transducer_loss as tl
from emulation import Driver, Emulated, EmulatedAsOnCuda, Plain, PlainAsOnCuda, running_on
from transducer_loss import joint_loss, lattice, logits_loss, pruning, sampling, simple_loss, softmax
from transducer_loss.arrays import COMPUTE, FLOATS, numpy_dtype
from transducer_loss.cells import Cells
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.processors import Host
from transducer_loss.tiling import Plan, plan

Array = np.ndarray[Any, Any]
P = TypeVar("P", bound=Host)

# Share of the largest number in an array: sums run in another order, and half types round to the other side.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# Unit in the last place of 1. What is left of terms that cancel is off by theirs, however small it is itself.
UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

FRAMES, LABELS = [5, 3, 1, 2], [3, 0, 2, 3]

# Of the package some are hidden by the functions of their names.
MODULES = [
    importlib.import_module(f"transducer_loss.{name}")
    for name in (
        "simple_loss", "pruning", "band", "sampling", "classes", "edit_distance", "embr", "reduced_predictor", "amortized",
    )
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the library, and how its kernels are to be run."""

    name: str
    run: Callable[[], Any]
    block: int = 64
    cuda: bool = False
    """Take the ways that are for CUDA."""
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Attributes that differ from the host processor's."""
    rounding: str = "float32"
    """The coarsest type that anything is rounded to on the way."""
    noise: float | None = None
    """Error of terms that cancel, by default that of a 1 in `rounding`: gradients are sums of occupancies."""
    wanted: Callable[[], Any] | None = None
    """What the reference makes of it."""

    def plain(self) -> Plain:
        """The host processor that the case is for."""
        return self._with_attributes(PlainAsOnCuda() if self.cuda else Plain())

    def emulated(self, driver: Driver) -> Emulated:
        """The same with blocks of threads."""
        return self._with_attributes((EmulatedAsOnCuda if self.cuda else Emulated)(driver, self.block))

    def _with_attributes(self, processor: P) -> P:
        for name, value in self.processor.items():
            setattr(processor, name, value)
        return processor

    def on(self, processor: Host) -> list[Array]:
        """What the call returns on a processor."""
        with running_on(processor), pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "processor_for", lambda *_: processor)
            # Three small utterances at a time, where CUDA would take all.
            patch.setattr(simple_loss, "_TASK_BYTES", 8_000)
            return [array.copy() for array in arrays_of(self.run())]


def frozen(array: Array) -> Array:
    """The array, which no kernel may write to now."""
    array.flags.writeable = False
    return array


def arrays_of(result: Any) -> list[Array]:
    """All arrays in what a call returned."""
    if result is None:
        return []
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, (tuple, list)):
        return [array for part in result for array in arrays_of(part)]
    return [np.asarray(result)]


def expect_equal(got: list[Array], expected: list[Array], case: Case) -> None:
    """Raise unless the arrays are equal but for the case's rounding, infinities and NaN in the same places."""
    noise = UNIT[case.rounding] if case.noise is None else case.noise
    assert [array.shape for array in got] == [array.shape for array in expected]
    for one, other in zip(got, expected, strict=True):
        values, wanted = one.astype(np.float64), other.astype(np.float64)
        largest = max([1e-3, *np.abs(wanted[np.isfinite(wanted)])])
        # Where only the array itself is of a coarser type, each of its numbers is off by its own last place.
        own = UNIT.get(one.dtype.name, 0.0)
        atol = TOLERANCE[case.rounding] * largest + noise + (2.0**-24 if one.dtype.name == "float16" else 0.0)
        np.testing.assert_allclose(values, wanted, rtol=own, atol=atol)


def labels(rng: np.random.Generator, lengths: list[int], classes: int, dtype: str = "int64") -> Array:
    """Random labels other than 0, and past each utterance's last one something that is none."""
    targets = rng.integers(min(1, classes - 1), classes, (len(lengths), max(lengths))).astype(dtype)
    for b, length in enumerate(lengths):
        targets[b, length:] = -1
    return frozen(targets)


def logits_problem(
    dtype: str = "float32", frames: list[int] = FRAMES, lengths: list[int] = LABELS, classes: int = 70, *,
    layout: str = "padded", label_dtype: str = "int64", normalized: bool = False, seed: int = 0,
) -> tuple[Array, Array, list[int], list[int]]:  # fmt: skip
    """Arguments of `rnnt_loss`: padding and gaps hold NaN; labels past the last, -1."""
    rng = np.random.default_rng(seed)
    shape = (len(frames), max(frames), max(lengths) + 1, classes)
    values = rng.normal(size=shape) * 2
    if normalized:
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
    for b, (count, length) in enumerate(zip(frames, lengths, strict=True)):
        values[b, count:] = values[b, :, length + 1 :] = np.nan
    targets = labels(rng, lengths, classes, label_dtype)
    if layout == "packed":
        cells = [
            utterance[:count, : length + 1].reshape(-1, classes)
            for utterance, count, length in zip(values, frames, lengths, strict=True)
        ]
        return frozen(np.concatenate(cells).astype(numpy_dtype(dtype))), targets, frames, lengths
    logits = values.astype(numpy_dtype(dtype))
    if layout == "shifted":
        # Dense rows that lie in memory otherwise than those of the gradient.
        logits = frozen(np.concatenate([np.full_like(logits[..., :1], np.nan), logits], axis=-1))[..., 1:]
    if layout == "strided":
        # Classes far apart, frames from the last to the first, labels in every second column.
        wide = np.full((shape[0], shape[3], shape[1], 2 * shape[2]), np.nan, logits.dtype)
        wide[:, :, ::-1, ::2] = logits.transpose(0, 3, 1, 2)
        logits = frozen(wide).transpose(0, 2, 3, 1)[:, ::-1, ::2]
        targets = frozen(np.repeat(targets, 2, axis=1))[:, ::2]
    return frozen(logits), targets, frames, lengths


def joint_problem(
    dtype: str = "float32", frames: list[int] = FRAMES, lengths: list[int] = LABELS, classes: int = 40, features: int = 70, *,
    bias: bool = True, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `joint_rnnt_loss`: padding holds NaN, encoder and predictor are slices of something wider."""
    rng = np.random.default_rng(seed)
    kind = numpy_dtype(dtype)
    encoder = rng.normal(size=(len(frames), max(frames), features + 3))
    predictor = rng.normal(size=(len(lengths), max(lengths) + 1, features + 1))
    for b, count in enumerate(frames):
        encoder[b, count:] = np.nan
    for b, length in enumerate(lengths):
        predictor[b, length + 1 :] = np.nan
    weight = rng.normal(size=(classes, features)) / np.sqrt(features)
    return (
        frozen(encoder.astype(kind))[..., :features], frozen(predictor.astype(kind))[..., 1:], frozen(weight.astype(kind)),
        frozen(rng.normal(size=classes).astype(kind)) if bias else None, labels(rng, lengths, classes), frames, lengths,
    )  # fmt: skip


def logits_case(
    name: str, *, block: int = 64, call: Callable[..., Any] = tl.rnnt_loss, options: dict[str, Any] | None = None, **shape: Any
) -> Case:
    """A loss of logits, or what else takes their arguments."""
    arguments = logits_problem(**shape)
    given = {"normalized": True, **(options or {})} if shape.get("normalized") else options or {}
    return Case(name, lambda: call(*arguments, **given), block, rounding=COMPUTE[shape.get("dtype", "float32")])


def inplace(name: str, **shape: Any) -> Case:
    """A loss whose gradient overwrites the logits."""
    logits, *rest = logits_problem(**shape)
    return Case(name, lambda: tl.rnnt_loss(logits.copy(), *rest, inplace=True))


def joint_case(
    name: str, *, block: int = 64, cuda: bool = False, call: Callable[..., Any] = tl.joint_rnnt_loss,
    processor: dict[str, Any] | None = None, planned: Callable[[Plan], bool] | None = None,
    options: dict[str, Any] | None = None, **shape: Any,
) -> Case:  # fmt: skip
    """A loss fused with the joint, with the least workspace whose plan is as wanted."""
    arguments = joint_problem(**shape)
    dtype = shape.get("dtype", "float32")

    @functools.cache
    def given() -> dict[str, Any]:
        of = {name: value for name, value in (options or {}).items() if name in ("shard", "encoder_index")}
        bound = {} if planned is None else {"workspace": _least_workspace(planned, arguments, case.plain(), of)}
        return {**(options or {}), **bound}

    case = Case(name, lambda: call(*arguments, **given()), block, cuda, processor or {}, dtype if cuda else COMPUTE[dtype])
    return case


def _least_workspace(
    planned: Callable[[Plan], bool], arguments: tuple[Any, ...], processor: Plain, of: dict[str, Any]
) -> int:
    with running_on(processor):
        for workspace in range(4_000, 400_000, 500):
            with contextlib.suppress(ValueError):
                if planned(plan(_joint(arguments, workspace=workspace, **of))):
                    return workspace
    raise LookupError("no workspace has such a plan")


def damaged(name: str, value: float, at: int = 7, classes: int = 70) -> Case:
    """Logits of which one utterance has a value that is not finite."""
    logits, *rest = logits_problem(classes=classes)
    logits = logits.copy()
    logits[0, 2, 1, at] = value
    return Case(name, lambda: tl.rnnt_loss(frozen(logits), *rest))


def damaged_joint() -> Case:
    """An encoder of which one utterance is not finite."""
    encoder, *rest = joint_problem()
    encoder = encoder.copy()
    encoder[0, 1, 3] = np.nan
    return Case("joint-nan", lambda: tl.joint_rnnt_loss(frozen(encoder), *rest))


def later(*arguments: Any, weights: list[float]) -> Any:
    """The joint-fused loss whose gradient is made after it."""
    of = _joint(arguments)
    done = joint_loss.forward(of, later=True)
    return done.native, joint_loss.backward(of, done, logits_loss.weights_of(of, weights)).native


def shard(classes: int) -> tl.Shard:
    """The middle one of three, of which the others have these numbers for every cell."""

    def all_reduce(array: Array, operation: str) -> None:
        if operation == "sum":
            array += 0.5
        else:  # logits of blank and label, and sums
            array[...] = np.maximum(array, np.array([0.3, -0.2, 1.5], array.dtype)[:, None])

    return tl.Shard(all_reduce, [5, classes, 7], 1)


def _joint(arguments: tuple[Any, ...], **options: Any) -> joint_loss.Problem:
    defaults = {
        "blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf",
    }  # fmt: skip
    return joint_loss.problem(*arguments, **{**defaults, **options})


BAND = Cells(
    np.array([5, 4]), np.array([4, 1]), np.array([4, 3]), np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, -9]], np.int32)
)  # fmt: skip
"""Two utterances of whose lattices only some columns are there, and of the second one that no label belongs to."""


def band_of_joint(*arguments: Any, topology: str = "regular") -> Any:
    """The joint-fused loss over a band."""
    done = joint_loss.forward(dataclasses.replace(_joint(arguments, topology=topology), cells=BAND))
    assert done.gradients is not None
    return done.native, done.gradients.native


def band_of_logits(*arguments: Any, topology: str = "regular") -> Any:
    """Arcs, loss, occupancy, best path and gradient over a band, of logits (B, T, width, V)."""
    options = {"blank": 0, "fastemit_lambda": 0.5, "delay_penalty": 0.1, "hat": False, "infeasible": "inf"}
    of = logits_loss.problem(*arguments, topology=topology, normalized=False, **options)
    of = dataclasses.replace(of, logits=of.logits[:, :, : int(BAND.width.max())], cells=BAND, group=BAND.group(of.processor))
    native, _, saved = logits_loss.forward(of)
    assert saved is not None
    gradient = logits_loss.backward(of, saved, None, inplace=False)
    arcs = softmax.empty_arcs(of.processor, of.group.cells, of.dtype)
    softmax.forward(of.processor, of.group, of.logits, of.targets, of.options, arcs)
    frames, score = of.processor.empty((2, 4), "int64"), of.processor.empty((2,), "float64")
    lattice.best_path(of.processor, of.group, arcs, of.options, frames, score)
    return native, gradient, frames, score


def simple_case(
    name: str, *, block: int = 64, cuda: bool = False, frames: list[int] = FRAMES, lengths: list[int] = LABELS,
    classes: int = 70, dtype: str = "float32", scale: float = 1.5, value: float | None = None, shared: bool = False,
    options: dict[str, Any] | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """The loss of the simple joiner. Inputs are slices of something wider; padding holds NaN, but where it counts (`shared`)."""
    rng = np.random.default_rng(seed)
    am = rng.normal(0, scale, (len(frames), max(frames), classes + 3))
    lm = rng.normal(0, scale, (len(frames), max(lengths) + 1, classes + 1))
    for b, (count, length) in enumerate(zip(frames, lengths, strict=True)):
        if not shared:
            am[b, count:] = lm[b, length + 1 :] = np.nan
    if value is not None:
        am[0, 1, 2] = value
    kind = numpy_dtype(dtype)
    arguments = (
        frozen(am.astype(kind))[..., :classes], frozen(lm.astype(kind))[..., 1:], labels(rng, lengths, classes), frames,
        lengths,
    )  # fmt: skip
    given = options or {}
    run = functools.partial(tl.simple_rnnt_loss, *arguments, **given)
    if shared:
        run = functools.partial(_simple_as_k2, *arguments, **given)
    return Case(name, run, block, cuda, rounding=COMPUTE[dtype])


def _simple_as_k2(*arguments: Any, weights: Any = None, **options: Any) -> Any:
    """With one unigram for the batch, as the stand-in for k2 asks for it."""
    defaults = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "infeasible": "inf"}
    of = simple_loss.problem(*arguments, shared_unigram=True, **{**defaults, **options})
    return simple_loss.forward(of, logits_loss.weights_of(of, weights))


def occupancy_of(frames: list[int], lengths: list[int], topology: str, dtype: str, seed: int = 0) -> tl.Occupancy:
    """Of a random lattice, in sums that no order of adding changes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (len(frames), max(frames), max(lengths) + 1, 5))
    posterior = tl.occupancy(logits, rng.integers(0, 5, (len(frames), max(lengths))), frames, lengths, topology=topology)
    pair = (frozen((np.rint(4096 * array) / 4096).astype(numpy_dtype(dtype))) for array in (posterior.blank, posterior.label))
    return tl.Occupancy(*pair, posterior.loss)


def prune_case(
    name: str, strategy: str, topology: str = "regular", *, block: int = 64, dtype: str = "float32", s_range: int = 2,
    frames: list[int] = FRAMES, lengths: list[int] = LABELS, as_k2: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """A band of occupancies."""
    posterior = occupancy_of(frames, lengths, topology, dtype, seed)
    options = {"s_range": s_range, "strategy": strategy, "topology": topology, "as_k2": as_k2}
    return Case(name, lambda: pruning.pruned(posterior, frames, lengths, **options), block, rounding=COMPUTE[dtype])


def some_band(frames: list[int], lengths: list[int], s_range: int, topology: str, seed: int = 0) -> tl.Band:
    """Made on the host, whatever a case runs on."""
    return tl.prune(occupancy_of(frames, lengths, topology, "float64", seed), frames, lengths, s_range=s_range, topology=topology)


def gather_case(
    name: str, backward: bool, *, block: int = 64, dtype: str = "float32", features: int = 70, frames: list[int] = FRAMES,
    lengths: list[int] = LABELS, s_range: int = 3, seed: int = 0,
) -> Case:  # fmt: skip
    """Rows of the predictor that belong to a band, or their gradient back."""
    of, rng = some_band(frames, lengths, s_range, "regular", seed), np.random.default_rng(seed)
    columns = max(lengths) + 1
    if not backward:
        rows = frozen(rng.normal(size=(len(frames), columns, features + 1)).astype(numpy_dtype(dtype)))[..., 1:]
        return Case(name, lambda: tl.gather_predictor(rows, of), block)
    gradient = frozen(rng.normal(size=(len(frames), max(frames), of.width, features + 2)).astype(numpy_dtype(dtype)))[..., 2:]
    return Case(name, lambda: tl.gather_predictor_backward(gradient, of, columns), block, rounding=COMPUTE[dtype])


def within(of: tl.Band, function: Callable[..., Any], packed: bool = False) -> Callable[..., Any]:
    """A function of logits (B, T, columns, V), for the first columns of which a band is."""

    def call(logits: Array, *others: Any, **options: Any) -> Any:
        rows = logits[:, :, : of.width]
        if packed:
            cells = zip(rows, of.frames, np.minimum(of.width, of.labels + 1), strict=True)
            rows = np.concatenate([utterance[:count, :width].reshape(-1, logits.shape[3]) for utterance, count, width in cells])
        return function(np.nan_to_num(rows), *others, band=of, **options)

    return call


def sample_case(
    name: str, proposal: str, *, scope: str = "batch", block: int = 64, dtype: str = "float32", frames: list[int] = FRAMES,
    lengths: list[int] = LABELS, classes: int = 70, samples: int = 9, correction: bool = False, count: str = "float64",
    label_dtype: str = "int64", some: bool = False, at_once: int = 16 << 20, part: int = 2048, seed: int = 0,
) -> Case:  # fmt: skip
    """Classes of a sampled softmax, the same ones however it is run; with `some`, most classes have no weight.

    Logits are a slice of something wider, with NaN and infinities; scratch is for `at_once` bytes, work cut by `part` classes.
    """
    rng = np.random.default_rng(seed)
    targets = labels(rng, lengths, classes, label_dtype)
    targets.flags.writeable = True
    targets[:, -1:] = targets[:, :1]  # so that several threads keep a class
    given: dict[str, Any] = {}
    if proposal == "unigram":
        counts = rng.zipf(1.5, classes).clip(0, 100) * (rng.random(classes) < (0.1 if some else 0.9))
        counts[0] += 1
        given["counts"] = frozen(counts.astype(numpy_dtype(count)))
    if proposal == "ctc":
        logits = rng.normal(0, 6 if some else 2, (len(frames), max(frames), classes + 3))
        logits[0, 0, ::3] = -np.inf
        logits[-1, -1, ::5] = np.nan
        logits[0, -1, classes // 2] = np.inf
        for b, length in enumerate(frames):
            logits[b, length:] = np.nan
        given |= {"ctc_logits": frozen(logits.astype(numpy_dtype(dtype)))[..., 1:-2], "ctc_lengths": frames}

    def run() -> tl.Classes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_SCRATCH", at_once)
            patch.setattr(sampling, "_PART", part)
            return tl.sample_classes(
                targets, lengths, vocab_size=classes, num_samples=samples, proposal=proposal, scope=scope, blank=classes // 3,
                correction=correction, seed=seed, step=seed + 1, **given,
            )  # fmt: skip

    return Case(name, run, block, rounding="float64")


def some_classes(scope: str, correction: bool, blank: int = 0, **shape: Any) -> tl.Classes:
    """Of a `joint_problem`, drawn on the host, whatever a case runs on."""
    _, _, weight, _, targets, _, lengths = joint_problem(**shape)
    of = tl.sample_classes(
        targets, lengths, vocab_size=len(weight), num_samples=6, scope=scope, correction=correction, blank=blank
    )  # fmt: skip
    frozen(of.ids)
    frozen(of.probability)
    return of


# Two utterances with a band from k2, one of an alignment whose rows end early, and one that nobody checked.
BANDS = {
    "pruned": some_band([5, 4], [4, 1], 3, "regular"),
    "aligned": tl.Band.from_alignment([[0, 2, 2, 4], [1, -1, -1, -1]], [5, 4], [4, 1], 1, 1),
}
BANDS["unordered"] = dataclasses.replace(
    BANDS["pruned"], first=np.array([[0, 2**31 - 1, -9, 1, 2], [0, 0, 0, 0, -9]], np.int32),
    end=np.array([[3, -1, 2**31 - 1, 99, 0], [2, 2, 2, 2, 5]], np.int32),
)  # fmt: skip


def _cases() -> list[Case]:
    tiniest = {"frames": [1], "lengths": [1]}
    wide = {"frames": [3, 2], "lengths": [69, 4]}
    # Beyond the columns that fit the shared memory. Normalised, since their rows need no reductions, which take long here.
    widest = {"frames": [2, 1], "lengths": [1029, 1], "classes": 3, "normalized": True}
    every = {"fastemit_lambda": 0.3, "delay_penalty": -0.2, "weights": [2.0, 0.0, -1.0, 0.5]}
    strips = {"tile_bytes": 1}
    topologies = ("regular", "modified", "constrained")
    long = {"frames": [6, 6], "lengths": [4, 4]}
    # So many cells for so few features and classes that their logits do not fit where several strips do.
    thin = {"frames": [16, 16], "lengths": [7, 7], "classes": 20, "features": 2}
    return [
        *(logits_case(f"logits-{dtype}", dtype=dtype) for dtype in FLOATS),
        *(logits_case(f"logits-block-{block}", block=block, options=every) for block in (32, 128)),
        logits_case("logits-block-1024", block=1024, **tiniest),
        *(logits_case(f"logits-{dtype}-{layout}", dtype=dtype, layout=layout, label_dtype="int32")
          for dtype, layout in (("float16", "packed"), ("float64", "packed"), ("bfloat16", "strided"), ("float32", "strided"))),
        logits_case("logits-clamp", options={"clamp": 0.02, **every}),
        inplace("logits-inplace"),
        inplace("logits-inplace-packed", layout="packed", dtype="float16"),
        *(logits_case(f"logits-{topology}", options={"topology": topology, "infeasible": "zero", **every}, dtype=dtype)
          for topology, dtype in zip(topologies, ("float64", "float32", "float64"), strict=True)),
        logits_case("logits-normalized", normalized=True, options={"blank": -1}),
        logits_case("logits-hat", options={"hat": True}),
        logits_case("logits-hat-strided", layout="strided", options={"hat": True}),
        logits_case("logits-one-class", classes=1, frames=[2, 1], lengths=[1, 1]),
        logits_case("logits-target-is-blank", classes=2, options={"blank": 1}),
        logits_case("logits-no-gradient", options={"gradient": False}),
        # Rows of several packets for each thread, and of several batches of them; of every alignment.
        *(logits_case(f"logits-{classes}-classes-{dtype}-{layout}", block=32, classes=classes, dtype=dtype, layout=layout,
                      frames=[2], lengths=[1], options={"hat": layout == "packed", "blank": classes - 3})
          for classes, dtype, layout in ((1101, "float32", "padded"), (1101, "bfloat16", "packed"), (515, "float16", "shifted"),
                                         (301, "float64", "packed"), (512, "float32", "shifted"))),
        damaged("logits-nan", np.nan),
        # At the edges of a row, too.
        *(damaged(f"logits-nan-at-{at}", np.nan, at, 71) for at in (0, 70)),
        damaged("logits-infinite", np.inf),
        damaged("logits-impossible", -np.inf),
        *(logits_case(f"logits-wide-{topology}", block=block, classes=3, options={"topology": topology}, normalized=True,
                      **wide if topology == "regular" else {"frames": [35, 2], "lengths": [34, 1]})
          for topology, block in zip(topologies, (64, 32, 32), strict=True)),
        # Diagonals of more cells than threads.
        logits_case("logits-wide-diagonals", block=32, frames=[34], lengths=[33], classes=3, normalized=True),
        logits_case("logits-widest", block=32, **widest),
        logits_case("align-widest", block=32, call=tl.align, dtype="float64", **widest),
        *(logits_case(f"align-{topology}", call=tl.align, options={"topology": topology}, dtype=dtype)
          for topology, dtype in zip(topologies, ("float32", "float64", "float32"), strict=True)),
        logits_case("occupancy", call=tl.occupancy),
        *(joint_case(f"joint-{dtype}", dtype=dtype) for dtype in FLOATS),
        *(joint_case(f"joint-{dtype}-as-on-cuda", dtype=dtype, cuda=True, options={"weights": [3.0, 1.0, 0.0, -1.0]})
          for dtype in FLOATS),
        joint_case("joint-float16-made-again-as-on-cuda", dtype="float16", cuda=True, processor=strips,
                   planned=lambda plan: not any(plan.retained), options={"dropout": 0.2}),
        *(joint_case(f"joint-block-{block}", block=block, processor=strips, options=every) for block in (32, 128)),
        joint_case("joint-block-1024", block=1024, features=5, **tiniest),
        *(joint_case(f"joint-1101-classes-{dtype}", block=32, classes=1101, features=2, frames=[2], lengths=[1], dtype=dtype, cuda=cuda,
                     options={"occupancy_floor": 0.0, "hat": cuda})
          for dtype, cuda in (("float32", False), ("bfloat16", True), ("float64", False))),
        *(joint_case(f"joint-{activation}", frames=[2, 1], lengths=[1, 2], dtype=dtype,
                     options={"activation": activation, "dropout": dropout})
          for activation in ACTIVATIONS for dtype, dropout in (("float32", 0.0), ("float64", 0.3))),
        # Features for several blocks of a frame, more cells than are loaded at once; with cells dropped, all there, and a NaN.
        *(joint_case(f"joint-300-features-{name}", features=300, classes=5, frames=[3, 1], lengths=[19, 2], cuda=True, dtype=dtype,
                     options={"occupancy_floor": floor, "dropout": dropout, "activation": activation, "weights": [-1.0, 2.0]})
          for name, dtype, floor, dropout, activation in (("bfloat16", "bfloat16", 0.0, 0.0, "silu"),
                                                          ("float32", "float32", 0.01, 0.0, "tanh"),
                                                          ("float64", "float64", 0.01, 0.3, "gelu"))),
        joint_case("joint-hat", options={"hat": True}),
        joint_case("joint-no-bias", bias=False, options={"occupancy_floor": 0.0}),
        *(joint_case(f"joint-{topology}", options={"topology": topology, "occupancy_floor": 0.02, **every})
          for topology in topologies),
        joint_case("joint-strips", processor=strips, **long),
        joint_case("joint-strips-every-cell", processor=strips, options={"occupancy_floor": 0.0, "dropout": 0.1}, **long),
        joint_case("joint-strips-made-again", processor=strips, options={"occupancy_floor": 0.02},
                   planned=lambda plan: plan.strips > 1 and not any(plan.retained), **thin),
        joint_case("joint-groups", processor=strips, planned=lambda plan: len(plan.groups) > 1 and all(plan.retained), **thin),
        joint_case("joint-groups-made-again", processor=strips,
                   planned=lambda plan: len(plan.groups) > 1 and not any(plan.retained), **thin),
        joint_case("joint-wide", block=32, classes=5, features=3, options={"occupancy_floor": 1e-4}, **wide),
        joint_case("joint-many-rows", block=32, classes=5, features=3, frames=[40, 33], lengths=[1, 0]),
        joint_case("joint-later", call=later, options={"weights": [1.0, 0.0, -2.0, 0.5]}),
        *(joint_case(f"joint-shard-{dtype}{'-hat' * hat}", options={"shard": shard(40), "blank": blank, "hat": hat}, dtype=dtype)
          for dtype, blank, hat in (("float32", 2, False), ("float64", 40, False), ("bfloat16", 0, True), ("float32", 44, True))),
        joint_case("joint-shard-made-again", options={"shard": shard(20), "blank": 2}, block=128,
                   planned=lambda plan: not any(plan.retained), **thin),
        damaged_joint(),
        *(make(f"{name}-band-{topology}", call=call, options={"topology": topology}, frames=[5, 4], lengths=[4, 1])
          for name, make, call in (("joint", joint_case, band_of_joint), ("logits", logits_case, band_of_logits))
          for topology in topologies),
        *_simple_cases(tiniest, every),
        *_band_cases(tiniest),
        *_sampled_cases(tiniest, every),
    ]  # fmt: skip


def _simple_cases(tiniest: dict[str, Any], every: dict[str, Any]) -> list[Case]:
    smoothed = {"lm_only_scale": 0.2, "am_only_scale": 0.3}
    # More labels than a block has threads, of two kinds.
    wide = {"frames": [3, 2], "lengths": [69, 4], "classes": 3}
    return [
        *(simple_case(f"simple-{dtype}", dtype=dtype, options={**smoothed, **every}) for dtype in FLOATS),
        *(simple_case(f"simple-block-{block}", block=block, options=smoothed) for block in (32, 128)),
        simple_case("simple-block-1024", block=1024, classes=3, options=smoothed, **tiniest),
        *(simple_case(f"simple-{topology}", options={"topology": topology, "infeasible": "zero", **every})
          for topology in ("regular", "modified", "constrained")),
        # Where products of exponentials underflow, in some cells.
        *(simple_case(f"simple-far-apart-{dtype}", dtype=dtype, scale=scale, classes=9, options=options)
          for dtype, scale, options in (("float32", 60.0, smoothed), ("float16", 60.0, {}), ("float64", 600.0, {"blank": -1}))),
        simple_case("simple-lm-alone", options={"lm_only_scale": 1.0}),
        simple_case("simple-am-alone", options={"am_only_scale": 1.0}),
        simple_case("simple-no-gradient", options={"gradient": False, **smoothed}),
        simple_case("simple-nan", value=np.nan, options=smoothed),
        simple_case("simple-impossible", value=-np.inf, options=smoothed),
        simple_case("simple-one-class", dtype="float64", classes=1, frames=[2, 1], lengths=[1, 1], options=smoothed),
        simple_case("simple-wide", block=32, options=smoothed, **wide),
        *(simple_case(f"simple-shared-{dtype}", dtype=dtype, shared=True, classes=40, options={**smoothed, "weights": [1.0, 0.0, -1.0, 2.0]})
          for dtype in ("float32", "float64")),
        *(simple_case(f"simple-{dtype}-as-on-cuda", dtype=dtype, cuda=True, options={**smoothed, **every})
          for dtype in ("float32", "bfloat16")),
        simple_case("simple-no-gradient-as-on-cuda", cuda=True, options={"gradient": False}),
    ]  # fmt: skip


def _band_cases(tiniest: dict[str, Any]) -> list[Case]:
    topologies, shape = ("regular", "modified", "constrained"), {"frames": [5, 4], "lengths": [4, 1]}
    long = {"frames": [70, 3], "lengths": [40, 4]}
    return [
        *(prune_case(f"prune-{strategy}-{topology}", strategy, topology, dtype=dtype)
          for strategy in pruning.STRATEGIES for topology, dtype in zip(topologies, ("float64", "float32", "float64"), strict=True)),
        *(prune_case(f"prune-{dtype}", "optimal", dtype=dtype, s_range=3) for dtype in FLOATS),
        *(prune_case(f"prune-block-{block}", "optimal", block=block) for block in (32, 128)),
        prune_case("prune-block-1024", "optimal", block=1024, **tiniest),
        *(prune_case(f"prune-long-{topology}", "optimal", topology, block=32, s_range=4, **long) for topology in topologies),
        *(prune_case(f"prune-as-k2-{topology}", "local", topology, as_k2=True) for topology in topologies[:2]),
        *(gather_case(f"gather{'-backward' * backward}-{dtype}", backward, dtype=dtype)
          for backward in (False, True) for dtype in FLOATS),
        *(gather_case(f"gather{'-backward' * backward}-block-{block}", backward, block=block, features=5)
          for backward in (False, True) for block in (32, 128)),
        *(gather_case(f"gather{'-backward' * backward}-block-1024", backward, block=1024, features=5, **tiniest)
          for backward in (False, True)),
        *(joint_case(f"joint-{name}", cuda=cuda, options={"band": of, "topology": topology, "dropout": 0.2}, **shape)
          for (name, of), topology, cuda in zip(BANDS.items(), topologies, (True, False, False), strict=True)),
        *(logits_case(f"logits-{name}{'-packed' * packed}", call=within(of, tl.rnnt_loss, packed),
                      options={"topology": topology, "fastemit_lambda": 0.2}, **shape)
          for (name, of), topology in zip(BANDS.items(), topologies, strict=True) for packed in (False, True)),
        *(logits_case(f"align-{name}", call=within(of, tl.align), dtype="float64", **shape) for name, of in BANDS.items()),
        *(joint_case(f"occupancy-{name}", call=tl.occupancy, options={"band": of}, **shape) for name, of in BANDS.items()),
        gather_case_of("gather-unordered", BANDS["unordered"]),
    ]  # fmt: skip


def _sampled_cases(tiniest: dict[str, Any], every: dict[str, Any]) -> list[Case]:
    scopes, proposals = ("batch", "utterance"), sampling.PROPOSALS
    shape = {"frames": [5, 4], "lengths": [4, 1]}
    strips = {"tile_bytes": 1}
    wild = dataclasses.replace(
        some_classes("utterance", True, **shape),
        ids=frozen(np.array([[0, -1, 7, 40, 2**31 - 1], [0, 3, 9, 10, -(2**31)]], np.int32)),
        probability=frozen(np.ones((2, 5), np.float32)),
    )
    return [
        *(sample_case(f"sample-{proposal}-{scope}{'-corrected' * correction}", proposal, scope=scope, correction=correction,
                      label_dtype="int32" if correction else "int64", seed=int(correction))
          for proposal in proposals for scope in scopes for correction in (False, True)),
        *(sample_case(f"sample-{scope}-{dtype}", "ctc", scope=scope, dtype=dtype, part=32)
          for scope in scopes for dtype in FLOATS),
        *(sample_case(f"sample-{proposal}-block-{block}", proposal, block=block, scope="utterance", correction=True, classes=150)
          for proposal in proposals for block in (32, 128)),
        *(sample_case(f"sample-{proposal}-block-1024", proposal, block=1024, correction=True, classes=1500, samples=400, **tiniest)
          for proposal in proposals),
        *(sample_case(f"sample-{proposal}-one-by-one", proposal, scope="utterance", at_once=1) for proposal in proposals),
        sample_case("sample-ctc-two-at-once", "ctc", scope="utterance", at_once=2 * 9 * 70),
        # More than there are of any weight; more than there are; none at all.
        *(sample_case(f"sample-{proposal}-{'few' if some else 'all'}", proposal, some=some, samples=40 if some else 200)
          for proposal in proposals for some in (True, False) if some or proposal == "uniform"),
        sample_case("sample-nothing", "uniform", samples=0, lengths=[0, 0, 0, 0]),
        sample_case("sample-one-class", "ctc", classes=1, samples=3, lengths=[0, 0, 0, 0]),
        sample_case("sample-unigram-int32", "unigram", count="int32", correction=True, seed=3),
        *(joint_case(f"joint-classes-{scope}-{dtype}", dtype=dtype, processor=strips,
                     options={"classes": some_classes(scope, True, dtype=dtype), **every})
          for scope in scopes for dtype in FLOATS),
        *(joint_case(f"joint-classes-{scope}-{dtype}-as-on-cuda", dtype=dtype, cuda=True,
                     options={"classes": some_classes(scope, True, dtype=dtype), "weights": [3.0, 1.0, 0.0, -1.0]})
          for scope, dtype in zip(scopes, ("float16", "bfloat16"), strict=True)),
        *(joint_case(f"joint-classes-{scope}-sparse", options={"classes": some_classes(scope, False), "sparse": True})
          for scope in scopes),
        *(joint_case(f"joint-classes-block-{block}", block=block, processor=strips,
                     options={"classes": some_classes("utterance", True), "occupancy_floor": 0.0}) for block in (32, 128)),
        joint_case("joint-classes-block-1024", block=1024, features=5,
                   options={"classes": some_classes("batch", True, features=5, **tiniest)}, **tiniest),
        joint_case("joint-classes-no-bias", bias=False, options={"classes": some_classes("batch", True, 3, bias=False), "blank": 3}),
        joint_case("joint-classes-hat", options={"classes": some_classes("utterance", True), "hat": True}),
        joint_case("joint-classes-made-again", processor=strips, planned=lambda plan: not any(plan.retained),
                   options={"classes": some_classes("utterance", True, **shape)}, **shape),
        *(joint_case(f"joint-classes-{name}", options={"classes": some_classes(scope, True, **shape), "band": of}, **shape)
          for scope, (name, of) in zip(scopes, list(BANDS.items())[:2], strict=True)),
        *(joint_case(f"{call.__name__}-classes", call=call, options={"classes": some_classes("utterance", True)})
          for call in (tl.occupancy, tl.align)),
        joint_case("joint-classes-unchecked", call=with_classes(wild), options={"occupancy_floor": 0.0}, **shape),
    ]  # fmt: skip


def with_classes(of: tl.Classes) -> Callable[..., Any]:
    """The joint-fused loss of classes that nobody checked."""

    def call(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joint_loss, "classes_for", lambda *_: of)
            return tl.joint_rnnt_loss(*arguments, classes=of, **options)

    return call


def gather_case_of(name: str, of: tl.Band) -> Case:
    """Both ways of a band that is out of order: what it does not have is not touched."""
    rng = np.random.default_rng(0)
    rows = frozen(rng.normal(size=(2, 5, 7)))
    gradient = frozen(rng.normal(size=(2, 5, of.width, 7)))
    return Case(name, lambda: (tl.gather_predictor(rows, of), tl.gather_predictor_backward(gradient, of, 5)))


CASES = _cases()
