"""Every loss, dtype and topology on small inputs, for NVIDIA's compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitizer_cases.py

With ``--device cpu`` the cases run on the host, to try them. With ``--fault memcheck | racecheck | initcheck`` one kernel does
what that tool is there to see.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import transducer_loss as tl
from transducer_loss import joint_loss, logits_loss, simple_loss
from transducer_loss.amortized import STATISTICS
from transducer_loss.arrays import FLOATS, numpy_dtype
from transducer_loss.check import _least_workspace
from transducer_loss.checks import TOPOLOGIES
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.pruning import STRATEGIES
from transducer_loss.sampling import SCOPES

Case = tuple[str, Callable[[], Any]]
ToDevice = Callable[[Any], Any]

FAULTS = {
    "memcheck": "out[1 << 20] = 0;",
    "racecheck": "__shared__ float row[64]; row[threadIdx.x] = threadIdx.x; out[threadIdx.x] = row[63 - threadIdx.x];",
    "initcheck": "out[threadIdx.x] = in[threadIdx.x] + 1;",
}


def make(
    to_device: ToDevice, dtype: str = "float32", frames: tuple[int, ...] = (5, 1, 4), labels: tuple[int, ...] = (3, 0, 2),
    classes: int = 37, features: int = 19,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # fmt: skip
    """Arguments of `rnnt_loss` and of `joint_rnnt_loss`: ragged, NaN in the padding."""
    rng = np.random.default_rng(0)
    batch, T, U = len(frames), max(frames), max(labels)

    def draw(*shape: int) -> Any:
        return rng.normal(size=shape).astype(numpy_dtype(dtype))

    logits, encoder, predictor = draw(batch, T, U + 1, classes), draw(batch, T, features), draw(batch, U + 1, features)
    for b in range(batch):
        logits[b, frames[b] :] = logits[b, :, labels[b] + 1 :] = np.nan
        encoder[b, frames[b] :] = predictor[b, labels[b] + 1 :] = np.nan
    integers = rng.integers(1, classes, (batch, U)), list(frames), list(labels)
    joint = encoder, predictor, draw(classes, features), draw(classes)
    return (to_device(logits), *integers), (*map(to_device, joint), *integers)


def make_simple(
    to_device: ToDevice, dtype: str = "float32", frames: tuple[int, ...] = (5, 1, 4), labels: tuple[int, ...] = (3, 0, 2),
    classes: int = 37, scale: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `simple_rnnt_loss`: ragged, NaN in the padding."""
    rng = np.random.default_rng(1)
    am, lm = (rng.normal(0, scale, (len(frames), rows, classes)) for rows in (max(frames), max(labels) + 1))
    for b in range(len(frames)):
        am[b, frames[b] :] = lm[b, labels[b] + 1 :] = np.nan
    targets = rng.integers(1, classes, (len(frames), max(labels)))
    kind = numpy_dtype(dtype)
    return to_device(am.astype(kind)), to_device(lm.astype(kind)), targets, list(frames), list(labels)


def pruned_cases(to_device: ToDevice) -> Iterator[Case]:
    """The simple loss, bands of its occupancies, and losses within them."""
    rng = np.random.default_rng(2)
    for topology, dtype in itertools.product(TOPOLOGIES, FLOATS):
        name, simple = f"{topology} {dtype}", make_simple(to_device, dtype)
        for lm_only, am_only in ((0.0, 0.0), (0.25, 0.125), (1.0, 0.0)):
            scales = {"lm_only_scale": lm_only, "am_only_scale": am_only, "topology": topology, "fastemit_lambda": 0.1}
            yield f"simple_rnnt_loss {name} {lm_only} {am_only}", functools.partial(tl.simple_rnnt_loss, *simple, **scales)
        yield f"simple_rnnt_loss {name}, loss alone", functools.partial(tl.simple_rnnt_loss, *simple, gradient=False)
        _, _, occupancy = tl.simple_rnnt_loss(*simple, topology=topology)
        for strategy in STRATEGIES:
            yield f"prune {name} {strategy}", functools.partial(_mass, occupancy, *simple[3:], strategy, topology)
        band = tl.prune(occupancy, *simple[3:], s_range=3, strategy="optimal", topology=topology)
        logits, joint = make(to_device, dtype)
        rows = to_device(rng.normal(size=(3, 5, band.width, 37)).astype(numpy_dtype(dtype)))
        call = functools.partial(tl.joint_rnnt_loss, *joint, topology=topology, band=band)
        yield f"rnnt_loss {name}, band", functools.partial(tl.rnnt_loss, rows, *logits[1:], topology=topology, band=band)
        yield f"joint_rnnt_loss {name}, band", call
        yield f"joint_rnnt_loss {name}, band, small tiles", functools.partial(_in_small_tiles, call)
        yield f"joint_rnnt_loss {name}, band, every cell", functools.partial(call, occupancy_floor=0.0, dropout=0.2)
        yield f"occupancy {name}, band", functools.partial(_posterior, *joint, topology=topology, band=band)
        yield f"align {name}, band", functools.partial(_best_score, rows, *logits[1:], topology=topology, band=band)
        yield f"gather {name}", functools.partial(_there_and_back, joint[1], band)
    shared = {"shared_unigram": True, "lm_only_scale": 0.25, "am_only_scale": 0.125}
    for dtype in FLOATS:
        finite = make_simple(to_device, dtype, (5, 5, 5), (3, 3, 3))
        yield f"simple_rnnt_loss {dtype}, shared unigram", functools.partial(_simple, *finite, **shared)
    yield "simple_rnnt_loss, far apart", functools.partial(tl.simple_rnnt_loss, *make_simple(to_device, scale=100.0))
    for name, sizes in {
        "many classes": ((2, 3), (1, 2), 2100), "wide lattice": ((3,), (1100,), 3), "one cell": ((1,), (0,), 1),
        "many frames": ((1500, 2), (3, 1), 4),
    }.items():  # fmt: skip
        simple = make_simple(to_device, "float32", *sizes)
        yield f"simple_rnnt_loss, {name}", functools.partial(tl.simple_rnnt_loss, *simple, lm_only_scale=0.25, am_only_scale=0.125)
        _, _, occupancy = tl.simple_rnnt_loss(*simple)
        for strategy in STRATEGIES:
            yield f"prune, {name}, {strategy}", functools.partial(_mass, occupancy, *simple[3:], strategy)


def sampled_cases(to_device: ToDevice) -> Iterator[Case]:
    """Classes drawn by every proposal, and losses over them, alone and in a band."""
    rng = np.random.default_rng(3)
    for scope, dtype in itertools.product(SCOPES, FLOATS):
        (_, targets, frames, labels), joint = make(to_device, dtype, classes=700)
        head = to_device(rng.normal(size=(3, 5, 700)).astype(numpy_dtype(dtype)))
        given: dict[str, dict[str, Any]] = {
            "uniform": {}, "unigram": {"counts": to_device(rng.integers(0, 9, 700))},
            "ctc": {"ctc_logits": head, "ctc_lengths": frames},
        }  # fmt: skip
        _, _, occupancy = tl.simple_rnnt_loss(*make_simple(to_device, dtype, classes=700))
        band = tl.prune(occupancy, frames, labels, s_range=3)
        for proposal, options in given.items():
            classes = tl.sample_classes(
                to_device(targets), labels, vocab_size=700, num_samples=20, proposal=proposal, scope=scope, correction=True,
                **options,
            )  # fmt: skip
            name = f"{dtype} {scope} {proposal}"
            call = functools.partial(tl.joint_rnnt_loss, *joint, classes=classes)
            yield f"joint_rnnt_loss {name}", call
            yield f"joint_rnnt_loss {name}, sparse", functools.partial(call, sparse=True, hat=True)
            yield f"joint_rnnt_loss {name}, band, small tiles", functools.partial(
                _in_small_tiles, functools.partial(call, band=band, occupancy_floor=0.0)
            )
    for name, count in {"few classes": 2, "one class": 1, "many classes": 100_000}.items():
        drawn = tl.sample_classes(
            to_device(np.zeros((2, 3), np.int64)), [3, 0], vocab_size=count, num_samples=40, scope="utterance"
        )
        yield f"sample_classes, {name}", functools.partial(getattr, drawn, "probability")


def edit_cases(to_device: ToDevice) -> Iterator[Case]:
    """Edit distances of short and long sequences, on the device and from the host."""
    rng = np.random.default_rng(4)
    for name, members, columns, width in (
        ("short", 3, 9, 7), ("longer than a block", 2, 700, 600), ("beyond shared memory", 2, 40, 1100), ("empty", 2, 0, 3),
    ):  # fmt: skip
        said, meant = rng.integers(0, 4, (3, members, columns)), rng.integers(0, 4, (3, width))
        lengths, counts = rng.integers(0, columns + 1, (3, members)), rng.integers(0, width + 1, 3)
        lengths[1, 1], lengths[0], counts[0] = -1, columns, width
        for dtype, blank in (("int32", None), ("int64", 2)):
            arrays = (to_device(array.astype(dtype)) for array in (said, lengths, meant, counts))
            yield f"edit_distance, {name}, {dtype}", functools.partial(_edits, *arrays, blank=blank)
    strided = to_device(said.copy()).transpose(2, 1, 0).copy().transpose(2, 1, 0)
    yield "edit_distance, strided", functools.partial(_edits, strided, lengths, meant.tolist(), counts.tolist())


def _edits(*arguments: Any, **options: Any) -> Any:
    edits = tl.edit_distance(*arguments, **options)
    return edits.total, edits.insertions, edits.deletions, edits.substitutions


def system_cases(to_device: ToDevice) -> Iterator[Case]:
    """EMBR training with shared encoders, the reduced decoder, and Amortized Networks."""
    rng = np.random.default_rng(5)

    def draw(*shape: int, dtype: str = "float64") -> Any:
        return to_device(rng.normal(size=shape).astype(numpy_dtype(dtype)))

    for dtype in FLOATS:
        kind = numpy_dtype(dtype)
        said, lengths = to_device(rng.integers(0, 2, (3, 40, 3))), rng.integers(-1, 4, (3, 40))
        lengths[:, 0] = 3
        embr = functools.partial(
            tl.embr_loss, to_device(rng.gamma(2, 2, (3, 40)).astype(kind)), to_device(rng.integers(0, 9, (3, 40))),
            reference_nll=to_device(np.ones(3, kind)), interpolation=0.1, weights=[1.0, 0.0, -0.5],
        )  # fmt: skip
        yield f"embr_loss {dtype}", functools.partial(embr, hypotheses=said, hypothesis_lengths=to_device(lengths), blank=1)
        yield f"embr_loss {dtype}, lengths alone", functools.partial(embr, hypothesis_lengths=lengths, temperature=2.0)
        yield f"embr_loss {dtype}, no gradient", functools.partial(embr, gradient=False)
        (_, targets, frames, labels), joint = make(to_device, dtype, (5, 1, 4), (3, 0, 2))
        index = functools.partial(tl.joint_rnnt_loss, *joint[:5], frames, labels, encoder_index=[2, 0, 2])
        yield f"joint_rnnt_loss {dtype}, shared encoders", index
        yield f"joint_rnnt_loss {dtype}, shared encoders, small tiles", functools.partial(_in_small_tiles, index)
        gates, counts = draw(3, 1100, 5, dtype=dtype), [1100, 1, 700]
        yield f"amortized_cost {dtype}", functools.partial(tl.amortized_cost, gates, [1.0, 0.5, 0.2, 0.1, 0.0], counts)
        for statistic in STATISTICS:
            yield f"amortized_backlog {dtype} {statistic}", functools.partial(
                tl.amortized_backlog, gates.transpose(2, 0, 1).copy().transpose(1, 2, 0), draw(5),
                to_device(np.array(counts)), statistic=statistic, frame_period=0.1,
            )  # fmt: skip
        for hard in (False, True):
            yield f"gumbel_gate {dtype} {hard=}", functools.partial(tl.gumbel_gate, gates, counts, hard=hard, seed=3)
        yield f"gumbel_gate_backward {dtype}", functools.partial(
            tl.gumbel_gate_backward, draw(3, 1100, 5, dtype=dtype), gates, to_device(np.array(counts)), seed=3
        )
        decoder = draw(37, 700, dtype=dtype), draw(2, 3, 700, dtype=dtype), to_device(targets), labels
        for last in (False, True):
            upstream = draw(*((3, 700) if last else (3, targets.shape[1] + 1, 700)), dtype=dtype)
            yield f"reduced_predictor {dtype} {last=}", functools.partial(tl.reduced_predictor, *decoder, last=last)
            yield f"reduced_predictor_backward {dtype} {last=}", functools.partial(_both, upstream, *decoder, last=last)
    long = to_device(rng.integers(0, 5, (2, 300)))
    of_long = draw(2, 301, 9), draw(5, 9), draw(1, 4, 9), long, [300, 3]
    yield "reduced_predictor_backward, long", functools.partial(_both, *of_long)


def _both(*arguments: Any, **options: Any) -> Any:
    grads = tl.reduced_predictor_backward(*arguments, **options)
    return grads.embedding, grads.positions


def _simple(*arguments: Any, **options: Any) -> Any:
    return simple_loss.forward(simple_loss.problem(
        *arguments, blank=0, topology="regular", fastemit_lambda=0.0, delay_penalty=0.0, infeasible="inf", **options
    )).loss  # fmt: skip


def _mass(occupancy: Any, frames: list[int], labels: list[int], strategy: str, topology: str = "regular") -> Any:
    return tl.prune(occupancy, frames, labels, s_range=2, strategy=strategy, topology=topology).mass


def _there_and_back(rows: Any, band: tl.Band) -> Any:
    gathered = tl.gather_predictor(rows, band)  # none of the padding's NaN
    return tl.gather_predictor_backward(gathered, band, rows.shape[1])


def regular_cases(to_device: ToDevice) -> Iterator[Case]:
    """Both losses in all their forms."""
    for topology, dtype in itertools.product(TOPOLOGIES, FLOATS):
        logits, joint = make(to_device, dtype)
        name = f"{topology} {dtype}"
        for hat in (False, True):
            yield f"rnnt_loss {name} {hat=}", functools.partial(tl.rnnt_loss, *logits, topology=topology, hat=hat)
            call = functools.partial(tl.joint_rnnt_loss, *joint, topology=topology, hat=hat)
            yield f"joint_rnnt_loss {name} {hat=}", call
            yield f"joint_rnnt_loss {name} {hat=}, small tiles", functools.partial(_in_small_tiles, call)
        yield f"joint_rnnt_loss {name}, every cell", functools.partial(call, occupancy_floor=0.0)
        yield f"joint_rnnt_loss {name}, gradient later", functools.partial(_later, joint, topology)
        yield f"occupancy {name}", functools.partial(_posterior, *joint, topology=topology)
        yield f"align {name}", functools.partial(_best_score, *logits, topology=topology)
    for activation in ACTIVATIONS:
        yield activation, functools.partial(tl.joint_rnnt_loss, *joint, activation=activation, dropout=0.25, seed=1)


def _in_small_tiles(call: Callable[..., Any]) -> Any:
    return call(workspace=_least_workspace(call))


def _posterior(*arguments: Any, **options: Any) -> Any:
    return tl.occupancy(*arguments, **options).loss


def _best_score(*arguments: Any, **options: Any) -> Any:
    return tl.align(*arguments, **options).score


def _later(joint: tuple[Any, ...], topology: str) -> Any:
    """As a framework asks for it: the gradient once the weights of the losses are known."""
    of = joint_loss.problem(
        *joint, blank=0, topology=topology, fastemit_lambda=0.1, delay_penalty=0.1, hat=False, infeasible="inf"
    )
    done = joint_loss.forward(of, later=True)
    joint_loss.backward(of, done, logits_loss.weights_of(of, [1.0, 0.0, -0.5]))
    return done.loss


def special_cases(to_device: ToDevice, on_host: bool) -> Iterator[Case]:
    """Borders: of blocks, of shared memory, of what is read."""
    (values, *integers), joint = make(to_device)
    yield "inplace", functools.partial(tl.rnnt_loss, values.copy(), *integers, inplace=True)
    yield "classes first", functools.partial(tl.rnnt_loss, values.transpose(3, 0, 1, 2).copy().transpose(1, 2, 3, 0), *integers)
    yield "normalized", functools.partial(tl.rnnt_loss, -abs(values), *integers, normalized=True)
    yield "no gradient", functools.partial(tl.rnnt_loss, values, *integers, gradient=False)
    real = to_device(np.isfinite(values if on_host else values.get()).all(axis=-1))
    yield "packed", functools.partial(tl.rnnt_loss, values[real], *integers)
    encoder, predictor, weight, _, *rest = joint
    yield "no bias", functools.partial(tl.joint_rnnt_loss, encoder, predictor, weight, None, *rest)
    strided = encoder.transpose(1, 0, 2).copy().transpose(1, 0, 2), predictor, weight.T.copy().T, joint[3]
    yield "strided", functools.partial(tl.joint_rnnt_loss, *strided, *rest)
    lengths = [to_device(np.array(part)) for part in integers]
    yield "integers on the device", functools.partial(tl.rnnt_loss, values, *lengths)
    if not on_host:  # the host refuses them
        bad = to_device(np.array([[36, 37, 1 << 40], [0, 0, 0], [-1, 1, 1]]))
        yield "labels out of range", functools.partial(_some_nan, tl.rnnt_loss, values, bad, *integers[1:])
        yield "labels out of range, joint", functools.partial(_some_nan, tl.joint_rnnt_loss, *joint[:4], bad, *integers[1:])
        am, lm, *_ = make_simple(to_device)
        yield "labels out of range, simple", functools.partial(_some_nan, tl.simple_rnnt_loss, am, lm, bad, *integers[1:])
        yield from unchecked_cases(to_device)
    first = np.array([[0, 2**31 - 1, -9, 1, 0], [0] * 5, [3, 1, -(2**31), 0, 0]], np.int32)
    band = tl.Band(to_device(first), to_device(np.array([[3, 0, 4, 1, 2], [1] * 5, [0, 3, 99, 1, 1]], np.int32)), 3,
                   np.array([5, 1, 4]), np.array([3, 0, 2]), 3)  # fmt: skip
    rows = to_device(np.zeros((3, 5, 3, 37), np.float32))
    yield "band out of order", functools.partial(_some_nan, tl.rnnt_loss, rows, *integers, band=band)
    yield "band out of order, joint", functools.partial(_some_nan, tl.joint_rnnt_loss, *joint, band=band)
    yield "band out of order, gather", functools.partial(_there_and_back, to_device(np.zeros((3, 4, 19), np.float32)), band)
    for name, sizes in {
        "many classes": ((2, 3), (1, 2), 2100, 5),
        "wide lattice": ((3,), (1100,), 3, 4),
        "many features": ((2, 2), (1, 0), 5, 1300),
        "one cell": ((1,), (0,), 1, 1),
    }.items():
        logits, joint = make(to_device, "float32", *sizes)
        yield name, functools.partial(tl.rnnt_loss, *logits)
        yield f"{name}, joint", functools.partial(tl.joint_rnnt_loss, *joint)
        yield f"{name}, alignment", functools.partial(_best_score, *logits)


def unchecked_cases(to_device: ToDevice) -> Iterator[Case]:
    """Lengths and labels out of range, of the first and the last of three utterances, where only kernels can look at them."""
    rng = np.random.default_rng(6)
    gates, counts = to_device(rng.normal(size=(3, 6, 2))), to_device(np.array([7, 6, -(1 << 40)]))
    for function in (tl.amortized_cost, tl.amortized_backlog):
        yield f"lengths out of range, {function.__name__}", functools.partial(_some_nan, function, gates, [1.0, 2.0], counts)
    yield "lengths out of range, gate", functools.partial(_some_nan, lambda: [tl.gumbel_gate(gates, counts).sum((1, 2))])
    yield "lengths out of range, gate backward", functools.partial(tl.gumbel_gate_backward, gates, gates, counts)
    labels, lengths = to_device(np.array([[0, 9, 1], [1, 2, 0], [0, 0, 0]])), to_device(np.array([3, 3, 4]))
    decoder = to_device(rng.normal(size=(3, 5))), to_device(rng.normal(size=(1, 2, 5))), labels, lengths
    for last in (False, True):
        upstream = to_device(rng.normal(size=(3, 5) if last else (3, 4, 5)))
        yield f"labels out of range, decoder {last=}", functools.partial(
            _some_nan, lambda last: [tl.reduced_predictor(*decoder, last=last).reshape(3, -1).sum(1)], last
        )
        yield f"labels out of range, decoder backward {last=}", functools.partial(_both, upstream, *decoder, last=last)
    far = to_device(np.array([[2, 99], [1, 3], [-(1 << 40), 1 << 40]]))
    yield "lengths out of range, distances", functools.partial(
        _edits, to_device(rng.integers(0, 3, (3, 2, 3))), far, labels, to_device(np.array([4, 3, -1]))
    )
    yield "lengths out of range, risk", lambda: tl.embr_loss(
        gates[:, 0], gates[:, 1], hypotheses=to_device(rng.integers(0, 3, (3, 2, 3))), hypothesis_lengths=far
    )[0][1:2]


def _some_nan(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The loss of the one utterance whose labels, or band, are in range; the others must be NaN."""
    loss = function(*arguments, **options)[0]
    loss = loss.get() if hasattr(loss, "get") else loss
    if np.isnan(loss).tolist() != [True, False, True]:
        raise AssertionError(f"losses of what is out of range: {loss}")
    return loss[1:2]


def fault(tool: str) -> None:
    """Launch a kernel that does what the tool is there to see. The broken context may raise, which is no news."""
    import cupy

    code = f'extern "C" __global__ void fault(const float* in, float* out) {{ {FAULTS[tool]} }}'
    try:
        cupy.RawKernel(code, "fault")((1,), (64,), (cupy.empty(64, np.float32), cupy.empty(64, np.float32)))
        cupy.cuda.Device().synchronize()
    except Exception as error:
        print(f"after the fault: {error}")


def main() -> None:
    """Run all cases, or one fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--fault", choices=FAULTS)
    arguments = parser.parse_args()
    on_host = arguments.device == "cpu"
    to_device: ToDevice = np.array
    if not on_host:
        import cupy

        from transducer_loss.cuda import Cuda

        cupy.cuda.set_allocator(None)  # a pool would hide what lies beyond an array, or was never written
        to_device = Cuda(0).to_device
    if arguments.fault:
        fault(arguments.fault)
        return
    count = 0
    cases = (
        regular_cases(to_device), pruned_cases(to_device), sampled_cases(to_device), edit_cases(to_device), system_cases(to_device),
        special_cases(to_device, on_host),
    )  # fmt: skip
    for name, call in itertools.chain(*cases):
        result = call()
        loss = result[0] if isinstance(result, tuple) else result
        if not np.isfinite(loss.get() if hasattr(loss, "get") else loss).all():
            sys.exit(f"{name}: loss {loss}")
        count += 1
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
