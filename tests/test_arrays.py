"""Arrays come in without a copy, whatever they are and however they lie, and go out aligned."""

import contextlib
import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import transducer_loss as tl
from helpers import FLOATS, numpy_dtype
from transducer_loss import arrays, processors
from transducer_loss.arrays import as_array
from transducer_loss.processors import address_of, aligned_empty

every_dtype = pytest.mark.parametrize("dtype", FLOATS)


class Exporter:
    """Another framework's array: nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


class Made:
    """What CuPy would have made an array of."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


VIEWS = {
    "all": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[1:, ::2, 1:-1],
    "one": lambda x: x[:1, :1],
    "expanded": lambda x: x[:, :1].expand(3, 4, 5),
    "last": lambda x: x[2, 3],
    "scalar": lambda x: x[2, 3, 4],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64", "uint8", "bool"])
def test_tensors_are_viewed_where_they_lie(dtype: str, view: str) -> None:
    base = (torch.arange(60) - 20).reshape(3, 4, 5).to(getattr(torch, dtype))
    tensor = VIEWS[view](base)
    array = as_array(tensor, "x")
    assert array.dtype == (np.dtype(bool) if dtype == "bool" else numpy_dtype(dtype))
    assert array.shape == tuple(tensor.shape)
    assert address_of(array) == tensor.data_ptr()
    assert all(n == 1 or s == array.itemsize * t for n, s, t in zip(array.shape, array.strides, tensor.stride(), strict=True))
    np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())
    base[...] = 1
    assert (array.astype(np.float64) == 1).all()


def test_an_array_of_nothing() -> None:
    assert as_array(torch.zeros(3, 0, 2), "x").shape == (3, 0, 2)


def test_numpy_arrays_are_themselves() -> None:
    array = np.zeros((3, 4))[::-1, ::2]
    array.flags.writeable = False
    assert as_array(array, "x") is array


def test_negative_strides_through_dlpack() -> None:
    base = np.arange(24.0).reshape(4, 6)
    view = base[::-1, ::-2]
    array = as_array(Exporter(view), "x")
    assert address_of(array) == address_of(view)
    np.testing.assert_array_equal(array, view)


def test_the_view_keeps_the_memory_alive() -> None:
    class Watched(np.ndarray):  # a plain array's memory cannot be watched
        pass

    base = np.arange(1000.0).view(Watched)
    gone = weakref.ref(base)
    array = as_array(Exporter(base[::2]), "x")[3:]
    del base
    gc.collect()
    assert gone() is not None
    np.testing.assert_array_equal(array, np.arange(6.0, 1000.0, 2.0))
    del array
    gc.collect()
    assert gone() is None


def test_what_is_no_array() -> None:
    for value in (3.0, [1.0], "text", None, np.float64(3), object()):
        with pytest.raises(TypeError, match=rf"^x: expected an array with __dlpack__, got {type(value).__name__}"):
            as_array(value, "x")


def test_tensors_that_dlpack_does_not_export() -> None:
    for tensor in (torch.zeros(3, requires_grad=True), torch.zeros(3, device="meta")):
        with pytest.raises(TypeError, match=r"^x: expected an array that DLPack exports, got Tensor"):
            as_array(tensor, "x")


def test_types_that_no_kernel_reads() -> None:
    for tensor in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match=r"^x: expected real numbers, got DLPack type code"):
            as_array(tensor, "x")
    with pytest.raises(TypeError, match=r"^x: expected native byte order, got dtype '>f4'"):
        as_array(np.zeros(3, ">f4"), "x")


def test_devices_that_no_kernel_runs_on() -> None:
    class Elsewhere(Exporter):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 10, 0  # ROCm

    with pytest.raises(TypeError, match=r"^x: expected an array on the host or on a CUDA device, got DLPack device type 10"):
        as_array(Elsewhere(np.zeros(3)), "x")


@pytest.mark.parametrize("refuses", [False, True])
def test_devices_whose_exporter_takes_no_stream(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's, for one, raises NumPy's error for any stream; CuPy is a stand-in, as no device is touched."""

    class OnDevice(Exporter):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            streams.append(stream)
            return super().__dlpack__(**({"stream": stream} if refuses else {}))

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    streams: list[Any] = []
    awaited: list[Any] = []
    cuda = SimpleNamespace(
        Device=lambda index: contextlib.nullcontext(), Stream=SimpleNamespace(null=SimpleNamespace(record=lambda: "event")),
        get_current_stream=lambda: SimpleNamespace(ptr=7, wait_event=awaited.append),
        UnownedMemory=lambda address, *_: address, MemoryPointer=lambda address, offset: address + offset,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, ndarray=Made))
    base = np.arange(24.0).reshape(4, 6)[::-1, ::2]
    assert as_array(OnDevice(base), "x").arguments == (base.shape, base.dtype, address_of(base), base.strides)
    assert (streams, awaited) == (([7, None], ["event"]) if refuses else ([7], []))


def test_elements_that_lie_across_their_size() -> None:
    record = np.zeros(12, np.dtype([("value", "f4"), ("flag", "i1")]))["value"]
    shifted = np.zeros(49, np.uint8)[1:].view(np.float32)
    for array in (record, shifted):
        with pytest.raises(ValueError, match=r"^x: expected elements at multiples of their 4 bytes"):
            as_array(array, "x")


@every_dtype
def test_buffers_that_begin_anywhere(dtype: str) -> None:
    # At every element of a cache line, for which vectors have no alignment to rely on.
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 5, 3, 19)).astype(numpy_dtype(dtype))
    arguments = [[1, 2], [3, 4]], [5, 4], [2, 1]
    expected = tl.rnnt_loss(values, *arguments)
    for shift in range(0, 64, values.itemsize):
        memory = aligned_empty((values.nbytes + 64,), "uint8")
        array = memory[shift : shift + values.nbytes].view(values.dtype).reshape(values.shape)
        array[...] = values
        assert address_of(array) % 64 == shift
        array.flags.writeable = False
        loss, grad = tl.rnnt_loss(array, *arguments)
        np.testing.assert_array_equal(loss, expected[0])
        np.testing.assert_array_equal(grad, expected[1])


@pytest.mark.parametrize("requires_copy", [False, True])
@every_dtype
def test_losses_of_tensors(dtype: str, requires_copy: bool) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 5, 3, 7))
    targets, frames, labels = np.array([[1, 2], [3, -1]]), np.array([5, 4]), np.array([2, 1])
    tensor = torch.from_numpy(values).to(getattr(torch, dtype))
    tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2) if requires_copy else tensor
    expected = tl.rnnt_loss(values.astype(numpy_dtype(dtype)), targets, frames, labels)
    loss, grad = tl.rnnt_loss(tensor, *map(torch.from_numpy, (targets, frames, labels)))
    np.testing.assert_array_equal(loss, expected[0])
    np.testing.assert_array_equal(grad, expected[1])
    assert grad.dtype == numpy_dtype(dtype)
    _, over = tl.rnnt_loss(tensor, torch.from_numpy(targets), frames, labels, inplace=True)
    assert address_of(over) == tensor.data_ptr()
    np.testing.assert_array_equal(tensor.float().numpy(), grad.astype(np.float32))


def test_no_copy_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and matrix products are handed the caller's own memory."""
    rng = np.random.default_rng(2)
    logits, encoder, predictor, weight, bias = (
        torch.from_numpy(rng.normal(size=size)).float()
        for size in ((2, 5, 3, 7), (5, 2, 8), (2, 3, 8), (8, 7), (7,))
    )  # fmt: skip
    encoder, weight = encoder.transpose(0, 1), weight.T  # frames first, and a kernel as Keras and Flax keep it
    targets, frames, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 4]), torch.tensor([2, 1])
    seen: set[int] = set()
    launch, gemm = processors.Host.launch, processors.Host.gemm

    def note(arguments: Any) -> None:
        seen.update(address_of(argument) for argument in arguments if isinstance(argument, np.ndarray))

    monkeypatch.setattr(processors.Host, "launch", lambda *a, **o: (note(a), launch(*a, **o))[1])
    monkeypatch.setattr(processors.Host, "gemm", lambda *a, **o: (note(a), gemm(*a, **o))[1])
    tl.rnnt_loss(logits, targets, frames, labels)
    tl.joint_rnnt_loss(encoder, predictor, weight, bias, targets, frames, labels)
    for tensor in (logits, targets, encoder, predictor, weight):
        assert tensor.data_ptr() in seen


@every_dtype
def test_outputs_are_aligned(dtype: str) -> None:
    rng = np.random.default_rng(3)
    logits, encoder, predictor, weight, bias = (
        rng.normal(size=size).astype(numpy_dtype(dtype)) for size in ((2, 5, 3, 7), (2, 5, 9), (2, 3, 9), (7, 9), (7,))
    )
    others = [[1, 2], [3, 4]], [5, 4], [2, 1]
    joint = encoder, predictor, weight, bias, *others
    grads = tl.joint_rnnt_loss(*joint)[1]
    results = [*tl.rnnt_loss(logits, *others), grads.encoder, grads.predictor, grads.weight, grads.bias]
    for inputs in ((logits, *others), joint):
        posterior, alignment = tl.occupancy(*inputs), tl.align(*inputs)
        results += [posterior.blank, posterior.label, posterior.loss, alignment.frames, alignment.score]
    for array in results:
        assert isinstance(array, np.ndarray)
        assert address_of(array) % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5), (4, 0, 2)])
@pytest.mark.parametrize("dtype", [*FLOATS, "uint8", "int64"])
def test_aligned_empty(dtype: str, shape: tuple[int, ...]) -> None:
    array = aligned_empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == numpy_dtype(dtype)
    assert array.size == 0 or address_of(array) % 64 == 0


def test_names_of_dtypes() -> None:
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert all(numpy_dtype(name).name == name for name in arrays.FLOATS)
