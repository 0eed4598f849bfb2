"""The losses for PyTorch inside of what torch wraps around them: second derivatives, checkpoints, devices, modes, torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from naive_torch import case, leaves, same
from transducer_loss.adapters.torch import (
    gather_predictor,
    joint_rnnt_loss,
    prune,
    rnnt_loss,
    sample_classes,
    samplewise_rnnt_loss,
    simple_rnnt_loss,
)

OF = case()
V = OF.joint[2].shape[0]
TENSORS = (OF.targets, torch.tensor(OF.frames), torch.tensor(OF.labels))


def projected(*joint: Tensor) -> list[Tensor]:
    return [torch.nn.functional.linear(tensor, *joint[2:]) for tensor in joint[:2]]


def samplewise(encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor, *integers: Any, **options: Any) -> Tensor:
    def joint(encoder: Tensor, predictor: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.tanh(encoder + predictor), weight, bias)

    return samplewise_rnnt_loss(joint, encoder, predictor, *integers, parameters=[weight, bias], **options)


def pruned(*inputs: Any, reduction: str) -> Tensor:
    joint, integers = inputs[:4], inputs[4:]
    loss, occupancy = simple_rnnt_loss(*projected(*joint), *integers, reduction=reduction)
    band = prune(occupancy, *integers[1:], s_range=3)
    return loss + joint_rnnt_loss(*joint, *integers, band=band, reduction=reduction)


def gathered(*inputs: Any, reduction: str) -> Tensor:
    joint, integers = inputs[:4], inputs[4:]
    _, occupancy = simple_rnnt_loss(*(tensor.detach() for tensor in projected(*joint)), *integers)
    band = prune(occupancy, *integers[1:], s_range=3)
    cells = torch.tanh(joint[0][:, :, None] + gather_predictor(joint[1], band))
    return rnnt_loss(torch.nn.functional.linear(cells, *joint[2:]), *integers, band=band, reduction=reduction)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "rnnt_loss": lambda e, p, w, b, *integers, **options: rnnt_loss((e[:, :, None] + p[:, None]) @ w.T + b, *integers, **options),
    "joint_rnnt_loss": joint_rnnt_loss,
    "simple_rnnt_loss": lambda *inputs, **options: simple_rnnt_loss(*projected(*inputs[:4]), *inputs[4:], **options)[0],
    "pruned": pruned,
    "gathered": gathered,
    "samplewise": samplewise,
}  # fmt: skip

of_each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
of_each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


def outcome(loss: Callable[..., Tensor], integers: Any = OF.integers, reduction: str = "mean") -> list[Tensor]:
    inputs = leaves(*OF.joint)
    torch.manual_seed(5)
    value = loss(*inputs, *integers, reduction=reduction)
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.full_like(value, -1.5))]


# Second derivatives.

TWICE = "cannot be differentiated twice"


@of_each_loss
@of_each_reduction
def test_a_penalty_on_the_gradient_raises_whichever_way_it_is_differentiated(loss: Callable[..., Tensor], reduction: str) -> None:
    inputs = leaves(*OF.joint)
    value = loss(*inputs, *OF.integers, reduction=reduction).sum()
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    penalised = value + torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    for tensor in inputs:
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(penalised, tensor, retain_graph=True)
        with pytest.raises(RuntimeError, match=TWICE):
            penalised.backward(inputs=[tensor], retain_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        penalised.backward()


def test_a_hessian_is_not_zero_but_an_error() -> None:
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.functional.hessian(lambda x: rnnt_loss(x, *OF.integers), OF.logits)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.gradgradcheck(lambda x: rnnt_loss(x, *OF.integers, reduction="none"), leaves(OF.logits))


def test_a_second_derivative_by_the_upstream_gradient_alone_raises() -> None:
    (logits,), weight = leaves(OF.logits), torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = rnnt_loss(logits, *OF.integers, reduction="none")
    (gradient,) = torch.autograd.grad(loss, logits, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(gradient.sum(), weight)


@of_each_loss
def test_what_backward_does_not_read_may_be_overwritten(loss: Callable[..., Tensor]) -> None:
    inputs = leaves(*OF.joint)
    expected = torch.autograd.grad(loss(*inputs, *OF.integers, reduction="mean"), inputs[:1])
    value = loss(*inputs, *OF.integers, reduction="mean")
    with torch.no_grad():
        inputs[3].add_(1)
    assert same(torch.autograd.grad(value, inputs[:1]), expected)


# Checkpoints.


@of_each_loss
@of_each_reduction
def test_checkpoints_give_the_same_bits(loss: Callable[..., Tensor], reduction: str) -> None:
    def recomputed(*inputs: Any, **options: Any) -> Any:
        return checkpoint(loss, *inputs, use_reentrant=False, **options)

    assert same(outcome(recomputed, reduction=reduction), outcome(loss, reduction=reduction))


@of_each_reduction
def test_saved_tensors_are_read_once(reduction: str) -> None:
    read: list[int] = []

    def unpack(position: int) -> Tensor:
        read.append(position)
        return saved[position]

    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    inputs = leaves(*OF.joint)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = joint_rnnt_loss(*inputs, *OF.integers, reduction=reduction)
    value.sum().backward()
    assert sorted(read) == list(range(len(saved)))


def test_gradients_of_a_frozen_output_layer_are_not_kept() -> None:
    encoder, predictor, weight, bias = leaves(*OF.joint)
    whole = torch.autograd.grad(joint_rnnt_loss(encoder, predictor, weight, bias, *OF.integers), [encoder, predictor, bias])
    weight.requires_grad_(False)
    loss = joint_rnnt_loss(encoder, predictor, weight, bias, *OF.integers)
    kept = [None if tensor is None else tensor.shape for tensor in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert kept == [encoder.shape, predictor.shape, None, bias.shape]
    assert same(torch.autograd.grad(loss, [encoder, predictor, bias]), whole)


# The default device.


@of_each_loss
@of_each_reduction
def test_the_default_device_is_not_ours(loss: Callable[..., Tensor], reduction: str) -> None:
    expected = outcome(loss, reduction=reduction)
    torch.set_default_device("meta")
    try:
        found = outcome(loss, reduction=reduction)
    finally:
        torch.set_default_device(None)
    assert same(found, expected)


def test_the_default_device_is_not_that_of_a_process_group() -> None:
    joint = [tensor.float() for tensor in OF.joint]
    expected = joint_rnnt_loss(*joint, *OF.integers, dropout=0.2, seed=3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.set_default_device("meta")
    try:
        found = joint_rnnt_loss(*joint, *OF.integers, dropout=0.2, seed=3, process_group=torch.distributed.group.WORLD)
    finally:
        torch.set_default_device(None)
        torch.distributed.destroy_process_group()
    assert torch.equal(found, expected)


# Modes that follow operators.


@of_each_loss
def test_make_fx_records_the_loss_and_not_its_number(loss: Callable[..., Tensor]) -> None:
    def call(*joint: Tensor) -> Tensor:
        return loss(*joint, *OF.integers, reduction="mean")

    with torch.no_grad():
        if loss is gathered:  # has a shape that depends on numbers
            with pytest.raises(RuntimeError, match="tracing tensor"):
                make_fx(call)(*OF.joint)
            return
        graph = make_fx(call)(*OF.joint)
        other = [tensor.flip(0) for tensor in OF.joint]
        assert torch.equal(graph(*other), call(*other)) and not torch.equal(call(*OF.joint), call(*other))


def test_make_fx_records_the_gradient() -> None:
    def call(*joint: Tensor) -> Any:
        return torch.autograd.grad(joint_rnnt_loss(*joint, *OF.integers, workspace=1 << 20), joint)

    graph = make_fx(call)(*leaves(*OF.joint))
    other = leaves(*(tensor.flip(0) for tensor in OF.joint))
    assert same(graph(*other), call(*other))


@of_each_reduction
def test_fake_tensors_have_shapes_and_no_numbers(reduction: str) -> None:
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(tensor).requires_grad_() for tensor in OF.joint]
    integers = [mode.from_tensor(tensor) for tensor in TENSORS]
    shapes = [tensor.shape for tensor in inputs]
    logits = mode.from_tensor(OF.logits).requires_grad_()

    with mode:
        loss = joint_rnnt_loss(*inputs, *integers, reduction=reduction)
        gradients = torch.autograd.grad(loss, inputs, torch.ones_like(loss))
        assert isinstance(loss, FakeTensor) and [gradient.shape for gradient in gradients] == shapes
        assert isinstance(rnnt_loss(logits, *integers, reduction=reduction), FakeTensor)
        band = prune(simple_rnnt_loss(*projected(*inputs), *integers)[1], *integers[1:])
        assert isinstance(band.first, FakeTensor)
        assert isinstance(joint_rnnt_loss(*inputs, *integers, band=band), FakeTensor)
        classes = sample_classes(integers[0], integers[2], vocab_size=V, num_samples=2, seed=1)
        assert isinstance(classes.ids, FakeTensor)
        assert isinstance(rnnt_loss(logits, integers[0], OF.frames, OF.labels), FakeTensor)
    # Without the mode lengths in lists would be real.
    assert isinstance(rnnt_loss(logits, *integers, reduction=reduction), FakeTensor)
    with mode, pytest.raises(RuntimeError, match="rnnt_loss"):
        rnnt_loss(logits * 1, *integers, inplace=True)


@of_each_loss
def test_a_mode_with_real_tensors_changes_nothing(loss: Callable[..., Tensor]) -> None:
    expected = outcome(loss)
    with FlopCounterMode(display=False):
        found = outcome(loss)
    assert same(found, expected)


def test_what_no_operator_can_do_works_in_a_mode() -> None:
    inputs = leaves(*OF.joint)
    with FlopCounterMode(display=False):
        logits = OF.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rnnt_loss(logits, *OF.integers, inplace=True), logits)
        classes = sample_classes(OF.targets, OF.labels, vocab_size=V, num_samples=2, seed=1)
        sparse = torch.autograd.grad(joint_rnnt_loss(*inputs, *OF.integers, classes=classes, sparse=True), inputs[2])[0]
    assert gradient.data_ptr() == logits.data_ptr()
    dense = torch.autograd.grad(joint_rnnt_loss(*inputs, *OF.integers, classes=classes), inputs[2])[0]
    assert sparse.is_sparse and torch.equal(sparse.to_dense(), dense)


# torch.func.


def test_transforms_of_torch_func_are_named() -> None:
    def loss(logits: Tensor) -> Tensor:
        return rnnt_loss(logits, *OF.integers)

    func, message = torch.func, "logits: expected a torch.Tensor, got one that torch.func or vmap transforms"
    for call in (func.grad(loss), func.jacrev(loss), lambda x: func.jvp(loss, (x,), (x,)), lambda x: func.vmap(loss)(x[None])):
        with pytest.raises(TypeError, match=message):
            call(OF.logits)
