"""What `torch.compile` needs of the losses: operators with known shapes, and tensors for everything that goes in.

An operator's function runs as it is outside of a compiled region, where the core checks arguments of any kind by their names.
Inside of one, the operator stands for it in the graph, and all that reaches it is tensors and plain numbers. So it does for
`make_fx`, for fake tensors and for every mode that follows operators.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from transducer_loss.arrays import as_array, on_host
from transducer_loss.band import Band, expect_band
from transducer_loss.checks import integers, whole_number
from transducer_loss.classes import Classes, expect_classes

Function = TypeVar("Function", bound=Callable[..., Any])

compiling = torch.compiler.is_compiling


def _numberless(tensors: Iterable[Any]) -> bool:
    """Whether one of them is of a class with operators of its own, as a FakeTensor, which has no memory to read."""
    return any(isinstance(each, Tensor) and type(each).__torch_dispatch__ is not Tensor.__torch_dispatch__ for each in tensors)


def recorded(*tensors: Any) -> bool:
    """Whether operators are to be seen, by a graph that is made or by a mode that follows every one."""
    return compiling() or torch._C._len_torch_dispatch_stack() > 0 or _numberless(tensors)


OPTIONS = "int blank, str topology, float fastemit_lambda, float delay_penalty, str infeasible, bool validate=False"
"""Keywords of every loss, as operators declare them."""

_LIBRARY = torch.library.Library("transducer_loss", "FRAGMENT")
# Lengths may have to be copied to the host, which the capture of a CUDA graph does not survive.
_TAGS = [torch.Tag.pt2_compliant_tag, *(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))]


def operator(schema: str, shapes: Callable[..., Any], **always: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of tensors an operator; `shapes` makes results of the same shapes without their values.

    `always` are keywords that the function gets as an operator only.
    """
    name = schema[: schema.index("(")]

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(*arguments: Any, **options: Any) -> Any:
            # A compiler that knows of no gradient here drops the detach that came before.
            inputs = ([plain(each) for each in value] if isinstance(value, list) else plain(value) for value in arguments)
            return function(*inputs, **options, **always)

        if not hasattr(torch.ops.transducer_loss, name):  # as it is where a module is loaded again
            _LIBRARY.define(schema, tags=_TAGS)
            _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(f"transducer_loss::{name}", shapes, lib=_LIBRARY)
        overload = getattr(torch.ops.transducer_loss, name).default
        keywords = {argument.name for argument in overload._schema.arguments}

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            # A mode with real tensors does not see what no operator can do, as inplace=.
            if compiling() or _numberless(arguments) or (recorded() and options.keys() <= keywords):
                return overload(*arguments, **options)
            return _interpreted(function)(*arguments, **options)

        return call

    return made


def uncompiled(function: Function, reason: str) -> Function:
    """A function that breaks a graph, or with ``fullgraph=True`` raises with the reason."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return _interpreted(function)(*arguments, **options)

    # What torch.compiler.disable does, which would import the compiler.
    call.__dict__ |= {"_torchdynamo_disable": True, "_torchdynamo_disable_msg": reason}
    return call  # type: ignore[return-value]


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself; after a graph break, so that nothing in it is compiled function by function."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def core_arguments(tensor: Tensor) -> dict[str, Any]:
    """Arguments that the core takes from the framework: its allocator and its number of threads."""
    device = tensor.device
    return {
        "allocate": lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device=device),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def caller(where: Tensor | torch.device) -> Iterator[None]:
    """CuPy's device, stream and memory are per thread, and autograd's backward has another one: set them from the tensor."""
    device = where.device if isinstance(where, Tensor) else where
    if device.type != "cuda":
        yield
        return
    import cupy

    def allocate(size: int) -> Any:  # of torch's pool: while a CUDA graph is captured, of that graph's own
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.data_ptr(), size, memory, device.index), 0)

    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream), cupy.cuda.using_allocator(allocate):
        yield


def tensor_of(array: Any) -> Tensor:
    """A tensor over the memory of one of the core's arrays."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor


def plain(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def expect_tensor(value: Any, name: str) -> None:
    """Raise unless `value` is a tensor whose numbers are all here."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "to_local"):
        raise TypeError(
            f"{name}: expected a torch.Tensor of this process, got a {type(value).__name__}: fully_shard the module of the "
            "loss, or one around it, whose forward pass gathers its parameters"
        )
    if not compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got one that torch.func or vmap transforms, which cannot follow a transducer "
            "loss: differentiate by torch.autograd, one batch after the other"
        )


def constants(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose floats a graph takes as they are: dynamic ones may not go to two losses."""
    if not compiling():
        return options
    return {name: float(value) if isinstance(value, (float, torch.SymFloat)) else value for name, value in options.items()}


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of losses, and of sums."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_tensor(value: Any, name: str, read: Callable[[Any, str], Any] = integers) -> Tensor:
    """A tensor without history over the memory of an array, or of the list of ints that is taken for one."""
    if isinstance(value, Tensor):
        return value.detach()
    if compiling():
        if isinstance(value, (list, tuple)) and all(isinstance(each, (int, torch.SymInt)) for each in value):
            return host_integers(value)  # type: ignore[no-any-return]
        return torch.as_tensor(value, device="cpu")
    array = read(value, name)
    if on_host(array):  # torch takes no negative strides, and warns of memory that is not to be written
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    with caller(torch.device("cuda", array.device.id)):
        return tensor_of(array)


@operator("host_integers(SymInt[] values) -> Tensor", lambda values: torch.empty(len(values), dtype=torch.int64, device="cpu"))
def host_integers(values: Any) -> Tensor:
    """Numbers that change from step to step, as a tensor on the host: a graph serves all of them."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def numbers(value: Any, name: str) -> Tensor:
    """Numbers of any dtype, or a nested list of them, as a tensor that no gradient is made by."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected numbers without gradient, got a tensor that requires one: detach() it")
    if not isinstance(value, (list, tuple)):
        return as_tensor(value, name, as_array)
    try:
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name}: expected numbers, got {value}") from None


def seed_tensor(seed: Any) -> Tensor:
    """A seed as operators take it; drawn from torch's generator where it is None. A graph serves all of them."""
    if seed is None:
        return torch.randint(1 << 62, (), device="cpu")
    if isinstance(seed, Tensor):
        return seed
    bits = whole_number(seed, "seed")
    if not -(1 << 63) <= bits < 1 << 63:  # modulo 2^64, as the core takes it
        bits = (bits + (1 << 63)) % (1 << 64) - (1 << 63)
    return torch.full((), bits, dtype=torch.int64, device="cpu")


def lengths_of(of: Any) -> Tensor:
    """Lengths (2, B) of a checked problem, on the host, so that backward need not copy them again from a device."""
    return torch.from_numpy(np.stack([of.cells.frames, of.cells.labels]))


def lengths_like(lengths: Tensor) -> Tensor:
    """Of the shape of `lengths_of`."""
    return torch.empty((2, lengths.shape[0]), dtype=torch.int64, device="cpu")


def padded_to(tensors: list[Tensor], cells: int) -> list[Tensor]:
    """Arrays of packed cells, as long as the shapes of the inputs say, for lengths are numbers that no graph knows."""
    return [torch.nn.functional.pad(tensor, (0, cells - len(tensor))) for tensor in tensors]


def band_tensors(band: Any) -> list[Tensor]:
    """A band, or None, as operators take it."""
    if band is None:
        return []
    expect_band(band)
    return [
        as_tensor(value, f"band.{name}")
        for name, value in (
            ("first", band.first), ("end", band.end), ("frames", band.frames), ("labels", band.labels), ("width", band.width),
        )
    ]  # fmt: skip


def band_of(tensors: list[Tensor], s_range: int = 0, mass: Tensor | None = None) -> Any:
    """A band of the core, or None, of what operators took or gave."""
    if not tensors:
        return None
    first, end, frames, labels, width = (as_array(tensor, "band") for tensor in tensors)
    return Band(first, end, int(width), frames, labels, s_range, None if mass is None else as_array(mass, "band"))


def class_tensors(classes: Any) -> tuple[list[Tensor], list[int]]:
    """Classes, or None, as operators take them: ids and probability; vocabulary, blank and whether they are corrected."""
    if classes is None:
        return [], []
    expect_classes(classes)
    tensors = [as_tensor(classes.ids, "classes.ids"), as_tensor(classes.probability, "classes.probability", as_array)]
    return tensors, [classes.vocab_size, classes.blank, int(classes.correction)]


def classes_of(tensors: list[Tensor], numbers: list[int]) -> Any:
    """Classes of the core, or None, of what operators took."""
    if not tensors:
        return None
    ids, probability = (as_array(tensor, "classes") for tensor in tensors)
    return Classes(ids, probability, numbers[0], numbers[1], bool(numbers[2]))
