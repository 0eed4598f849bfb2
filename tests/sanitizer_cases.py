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
from transducer_loss import joint_loss, logits_loss
from transducer_loss.arrays import FLOATS, numpy_dtype
from transducer_loss.check import _least_workspace
from transducer_loss.checks import TOPOLOGIES
from transducer_loss.joint import ACTIVATIONS

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


def _posterior(*arguments: Any, topology: str) -> Any:
    return tl.occupancy(*arguments, topology=topology).loss


def _best_score(*arguments: Any, topology: str = "regular") -> Any:
    return tl.align(*arguments, topology=topology).score


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


def _some_nan(function: Callable[..., Any], *arguments: Any) -> Any:
    """The loss of the one utterance whose labels are in range; the others must be NaN."""
    loss = function(*arguments)[0].get()
    if np.isnan(loss).tolist() != [True, False, True]:
        raise AssertionError(f"losses of labels out of range: {loss}")
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
    for name, call in itertools.chain(regular_cases(to_device), special_cases(to_device, on_host)):
        result = call()
        loss = result[0] if isinstance(result, tuple) else result
        if not np.isfinite(loss.get() if hasattr(loss, "get") else loss).all():
            sys.exit(f"{name}: loss {loss}")
        count += 1
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
