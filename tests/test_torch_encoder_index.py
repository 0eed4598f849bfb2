"""`encoder_index=` of the joint-fused loss for PyTorch: utterances that share encoders, as the hypotheses of an N-best list do."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers import FLOATS
from naive_torch import case, error, leaves, same
from torch_cases import CONTEXTS, array_of, expect_bits, expect_graphs, expect_once, expect_unchanged_inputs, outcome, tensor_of
from transducer_loss import joint_loss, logits_loss, reference
from transducer_loss.adapters.torch import (
    JointRNNTLoss,
    PrunedRNNTLoss,
    joint_rnnt_loss,
    prune,
    sample_classes,
    simple_rnnt_loss,
)

V, H = 13, 6
FRAMES, LABELS = [9, 1, 7, 4], [5, 0, 3, 4, 2, 5]
INDEX = [2, 0, 1, 2, 2, 0]  # nobody reads the last
UPSTREAM = [1.5, -0.75, 0.0, 2.0, -1.25, 0.5]
rng = np.random.default_rng(4)
ENCODER, PREDICTOR, WEIGHT, BIAS = (rng.normal(size=shape) for shape in ((4, 9, H), (6, 6, H), (V, H), (V,)))
TARGETS = rng.integers(1, V, (6, 5))
for row, (frames, labels) in enumerate(zip([*FRAMES, 9, 9], LABELS, strict=True)):
    TARGETS[row, labels:], PREDICTOR[row, labels + 1 :] = -1, np.nan
    if row < 4:
        ENCODER[row, frames:] = np.nan
ENCODER[3] = np.nan
FLOATING = [tensor_of(array) for array in (ENCODER, PREDICTOR, WEIGHT, BIAS)]
FINITE = [tensor.nan_to_num() for tensor in FLOATING]
INTEGERS = (torch.from_numpy(TARGETS), FRAMES, LABELS)
TENSORS = (torch.from_numpy(TARGETS), torch.tensor(FRAMES), torch.tensor(LABELS))

of_each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def loss_of(*inputs: Tensor, index: Any = INDEX, integers: Any = INTEGERS, **options: Any) -> Tensor:
    return joint_rnnt_loss(*inputs, *integers, encoder_index=index, **{"occupancy_floor": 0.0, **options})


def expanded(encoder: Tensor, *others: Tensor, frames: Any = FRAMES, index: Any = INDEX, **options: Any) -> Tensor:
    """Without an index."""
    lengths = [frames[i] for i in index]
    return joint_rnnt_loss(encoder[index], *others, TARGETS, lengths, LABELS, **{"occupancy_floor": 0.0, **options})


@pytest.mark.parametrize("dtype", FLOATS)
@of_each_reduction
def test_the_bits_of_the_core(reduction: str, dtype: str) -> None:
    inputs = [tensor.detach().to(getattr(torch, dtype)).requires_grad_() for tensor in FLOATING]
    loss = loss_of(*inputs, reduction=reduction)
    of = joint_loss.problem(
        *map(array_of, inputs), TARGETS, FRAMES, LABELS, encoder_index=INDEX, blank=0, topology="regular", fastemit_lambda=0.0,
        delay_penalty=0.0, hat=False, infeasible="inf", occupancy_floor=0.0,
    )  # fmt: skip
    if reduction == "none":
        upstream = torch.tensor(UPSTREAM, dtype=loss.dtype)
        done = joint_loss.forward(of, later=True)
        gradients = joint_loss.backward(of, done, logits_loss.weights_of(of, array_of(upstream))).native
    else:
        upstream = torch.tensor(-2.5, dtype=loss.dtype)
        done = joint_loss.forward(of, weight=1 / 6 if reduction == "mean" else 1.0)
        gradients = [total * array_of(upstream) for total in done.gradients.native]
    whole = tensor_of(done.native)
    expect_bits(loss, array_of({"mean": whole.mean(), "sum": whole.sum(), "none": whole}[reduction]))
    for _ in range(2):
        for found, wanted in zip(torch.autograd.grad(loss, inputs, upstream, retain_graph=True), gradients, strict=True):
            expect_bits(found, wanted.astype(array_of(found).dtype))
            assert found.isfinite().all() and found.any()


@of_each_reduction
def test_losses_of_the_reference(reduction: str) -> None:
    inputs = leaves(*FLOATING)
    loss = loss_of(*inputs, reduction=reduction)
    weights = np.array(UPSTREAM) if reduction == "none" else np.full(6, -2.0 if reduction == "sum" else -1 / 3)
    wanted, (by_encoder, *gradients) = reference.joint_rnnt_loss(
        ENCODER[INDEX], *map(array_of, FLOATING[1:]), TARGETS, np.array(FRAMES)[INDEX], LABELS, weights=weights
    )
    summed = np.zeros_like(ENCODER)
    np.add.at(summed, INDEX, by_encoder)
    np.testing.assert_allclose(loss.detach(), {"mean": wanted.mean(), "sum": wanted.sum(), "none": wanted}[reduction], rtol=1e-12)
    upstream = torch.tensor(UPSTREAM if reduction == "none" else -2.0, dtype=torch.float64)
    for found, exact in zip(torch.autograd.grad(loss, inputs, upstream), (summed, *gradients), strict=True):
        assert error(found, exact) < 1e-12


@of_each_reduction
def test_finite_differences(reduction: str) -> None:
    encoder, predictor = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    inputs = leaves(encoder, predictor, torch.randn(4, 2), torch.randn(4))
    integers = torch.tensor([[1, 2], [3, -1], [1, 1]]), [3, 2], [2, 1, 2]
    assert torch.autograd.gradcheck(lambda *x: loss_of(*x, index=[1, 1, 0], integers=integers, reduction=reduction), inputs)


OPTIONS: dict[str, dict[str, Any]] = {
    "small workspace": {"workspace": 30_000},
    "floor": {"occupancy_floor": 1e-6},
    "hat": {"hat": True},
    "regularised": {"topology": "constrained", "fastemit_lambda": 0.3, "delay_penalty": 0.1, "infeasible": "zero"},
    "dropout": {"dropout": 0.4, "seed": 3, "activation": "relu"},
    "band": {"band": True},
    "classes": {"classes": "batch"},
    "classes of each": {"classes": "utterance", "sparse": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@of_each_reduction
def test_as_with_a_copy_of_the_encoder_for_each(name: str, reduction: str) -> None:
    options, repeated = {**OPTIONS[name], "reduction": reduction}, [FRAMES[i] for i in INDEX]
    if "band" in options:
        am, lm = torch.randn(6, 9, V), torch.randn(6, 6, V)
        options["band"] = prune(simple_rnnt_loss(am, lm, TARGETS, repeated, LABELS)[1], repeated, LABELS, s_range=3)
    if "classes" in options:
        options["classes"] = sample_classes(
            torch.from_numpy(TARGETS), LABELS, vocab_size=V, num_samples=2, seed=1, scope=options["classes"]
        )
    inputs, upstream = leaves(*FINITE), torch.tensor(UPSTREAM if reduction == "none" else -2.0, dtype=torch.float64)
    results = []
    for function in (loss_of, expanded):
        loss = function(*inputs, **options)
        upstream = upstream.where(loss.isfinite(), 0.0)
        results.append([loss, *torch.autograd.grad(loss, inputs, upstream)])
    assert results[0][0].isfinite().any()
    finite = results[1][0].isfinite()
    assert torch.equal(finite, results[0][0].isfinite()) and error(results[0][0][finite], results[1][0][finite]) < 1e-14
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert one.is_sparse == other.is_sparse and error(one.to_dense(), other.to_dense()) < 1e-12


@of_each_reduction
def test_encoders_that_nobody_reads_have_no_gradient(reduction: str) -> None:
    inputs = leaves(*FLOATING)
    (gradient,) = torch.autograd.grad(loss_of(*inputs, reduction=reduction).sum(), inputs[:1])
    assert not gradient[3].any() and gradient[:3].flatten(1).any(1).all()
    real = torch.arange(9) < torch.tensor(FRAMES)[:, None]
    assert not gradient[~real].any()


def test_more_encoders_than_utterances_and_none_shared() -> None:
    of = case()
    wanted = joint_rnnt_loss(*of.joint, *of.integers, reduction="none")
    frames, order = [of.frames[i] for i in (3, 1, 0, 2)] + [1, 9], [2, 1, 3, 0]
    encoder = torch.cat([of.joint[0][[3, 1, 0, 2]], torch.full((2, 9, 6), torch.nan).double()])
    inputs = leaves(encoder, *of.joint[1:])
    loss = joint_rnnt_loss(*inputs, of.targets, frames, of.labels, encoder_index=order, reduction="none")
    assert torch.equal(loss.detach(), wanted)
    expected = leaves(*of.joint)
    value = joint_rnnt_loss(*expected, *of.integers, reduction="none")
    upstream = torch.tensor(UPSTREAM[:4])
    found = torch.autograd.grad(loss, inputs, upstream)
    assert not found[0][4:].any()
    for one, other in zip((found[0][order], *found[1:]), torch.autograd.grad(value, expected, upstream), strict=True):
        assert error(one, other) < 1e-13


def test_an_index_of_any_kind() -> None:
    wanted = outcome(lambda *inputs: loss_of(*inputs, reduction="none"), FINITE)
    strided = torch.tensor([INDEX, INDEX]).T[:, 0]
    for index in (tuple(INDEX), torch.tensor(INDEX), torch.tensor(INDEX, dtype=torch.uint8), np.array(INDEX, np.int16), strided):
        assert same(outcome(lambda *inputs, index=index: loss_of(*inputs, index=index, reduction="none"), FINITE), wanted)


@of_each_reduction
def test_the_index_and_lengths_may_change_before_backward(reduction: str) -> None:
    inputs, index, integers = leaves(*FINITE), torch.tensor(INDEX), [tensor.clone() for tensor in TENSORS]
    wanted = torch.autograd.grad(loss_of(*inputs, reduction=reduction).sum(), inputs)
    loss = loss_of(*inputs, index=index, integers=integers, reduction=reduction)
    for tensor in (index, *integers[1:]):
        tensor.zero_()
    assert same(torch.autograd.grad(loss.sum(), inputs), wanted)


@pytest.mark.parametrize("context", [name for name in CONTEXTS if name != "autocast"])
@of_each_reduction
def test_what_is_around_changes_no_bit(context: str, reduction: str) -> None:
    def call(*inputs: Tensor) -> Tensor:
        return loss_of(*inputs, reduction=reduction, dropout=0.2)

    given = [each.float() for each in FINITE]
    assert same(outcome(CONTEXTS[context](call), given), outcome(call, given))
    torch._dynamo.reset()


@of_each_reduction
def test_autocast(reduction: str) -> None:
    """As with everything in autocast's dtype, but for the sums of the gradients, which are float32."""
    inputs, halves = leaves(*FINITE, dtype=torch.float32), leaves(*FINITE, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(*inputs, reduction=reduction)
    wanted = loss_of(*halves, reduction=reduction)
    assert torch.equal(loss, wanted) and loss.dtype == torch.float32
    for one, other in zip(*(torch.autograd.grad(each.sum(), of) for each, of in ((loss, inputs), (wanted, halves))), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one.bfloat16(), other) and not torch.equal(one, other.float())


def test_without_gradient() -> None:
    inputs = leaves(*FINITE)
    with torch.no_grad():
        loss = loss_of(*inputs)
    assert not loss.requires_grad and torch.equal(loss, loss_of(*inputs).detach())
    frozen = [inputs[0], *(tensor.detach() for tensor in inputs[1:])]
    assert same(torch.autograd.grad(loss_of(*frozen), inputs[:1]), torch.autograd.grad(loss_of(*inputs), inputs[:1]))


@of_each_reduction
def test_it_is_differentiated_once(reduction: str) -> None:
    expect_once(lambda *inputs: loss_of(*inputs, reduction=reduction), FINITE)
    if reduction == "none":  # others have made their gradients
        expect_unchanged_inputs(lambda *inputs: loss_of(*inputs, reduction=reduction), FINITE)


@of_each_reduction
def test_one_graph_for_all_indices_and_lengths(reduction: str) -> None:
    def call(*given: Any) -> Tensor:
        return loss_of(*given[:4], index=given[4], integers=(given[5], *given[6:]), reduction=reduction)

    steps = [
        (INDEX, FRAMES, LABELS), ([0, 1, 0, 0, 0, 1], [1, 9, 9, 9], [0, 1, 1, 0, 1, 0]), ([3, 2, 1, 0, 1, 1], [5, 6, 7, 8], [5] * 6),
        ([1, 1, 2, 2, 3, 3], [9, 9, 9, 9], [1, 2, 3, 4, 5, 0]),
    ]  # fmt: skip
    targets, given = TENSORS[0].clamp(min=0), [each.float() for each in FINITE]
    expect_graphs(1, call, given, [(torch.tensor(i), targets, torch.tensor(f), torch.tensor(u)) for i, f, u in steps])
    # Of numbers in lists torch takes those for constants that have not changed yet: here all do at the second step.
    expect_graphs(2, call, given, [(i, targets, f, u) for i, f, u in steps])


def test_shapes_that_change() -> None:
    def call(encoder: Tensor, predictor: Tensor, weight: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return joint_rnnt_loss(encoder, predictor, weight, None, targets, frames, labels, encoder_index=index, reduction="none")

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for E, B, T, U in ((3, 6, 5, 4), (2, 8, 7, 6), (5, 3, 9, 2), (4, 4, 4, 4)):
        inputs = [torch.randn(shape) for shape in ((E, T, H), (B, U + 1, H), (V, H))]
        rest = torch.ones(B, U, dtype=torch.int64), torch.full((E,), T), torch.full((B,), U), torch.arange(B) % E
        assert same(*(outcome(lambda *x, each=each: each(*x, *rest), inputs) for each in (compiled, call)))  # noqa: B023
    assert counter.frame_count == 2
    torch._dynamo.reset()


@of_each_reduction
def test_fake_tensors_have_shapes_and_no_numbers(reduction: str) -> None:
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(tensor).requires_grad_() for tensor in FINITE]
        loss = loss_of(*fakes, index=mode.from_tensor(torch.tensor(INDEX)), integers=map(mode.from_tensor, TENSORS), reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), fakes)
    assert isinstance(loss, FakeTensor) and loss.shape == ((6,) if reduction == "none" else ())
    assert [each.shape for each in gradients] == [each.shape for each in FINITE]


# Modules and processes.


def test_the_module_takes_it_at_the_call() -> None:
    module = JointRNNTLoss(H, V, reduction="sum", occupancy_floor=0.0).double()
    encoder, predictor = FLOATING[:2]
    with_index = module(encoder, predictor, *INTEGERS, encoder_index=INDEX)
    assert torch.equal(with_index, loss_of(encoder, predictor, module.output.weight, module.output.bias, reduction="sum"))
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(encoder, predictor, *TENSORS, encoder_index=torch.tensor(INDEX)), with_index)
    torch._dynamo.reset()
    for made in (lambda: JointRNNTLoss(H, V, encoder_index=None), lambda: PrunedRNNTLoss(H, V, encoder_index=None)):
        with pytest.raises(TypeError, match=r"^encoder_index: expected one of"):
            made()


@of_each_reduction
def test_with_a_process_group(reduction: str) -> None:
    """Of one process; tests/test_torch_distributed.py has two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        found = outcome(lambda *inputs: loss_of(*inputs, reduction=reduction, process_group=group), FINITE)
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(found, outcome(lambda *inputs: loss_of(*inputs, reduction=reduction), FINITE), strict=True):
        assert error(one, other) < 1e-14


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "large": (lambda: loss_of(*FINITE, index=[0, 1, 2, 3, 4, 0]), ValueError, r"encoder_index: .*\[0, E - 1 = 3\], got 4 at index 4"),
    "negative": (lambda: loss_of(*FINITE, index=torch.tensor([-1] * 6)), ValueError, r"encoder_index: .*got -1 at index 0"),
    "shape": (lambda: loss_of(*FINITE, index=INDEX[:5]), ValueError, r"encoder_index: expected shape \(B,\) = \(6,\), got \(5,\)"),
    "floats": (lambda: loss_of(*FINITE, index=torch.ones(6)), TypeError, "encoder_index: expected integers, got dtype float32"),
    "word": (lambda: loss_of(*FINITE, index="all"), TypeError, "encoder_index: expected an array .*, got str"),
    "none": (lambda: loss_of(*FINITE, index=None), ValueError, r"predictor: expected shape .* = \(4, 6, 6\), got \(6, 6, 6\)"),
    "lengths": (
        lambda: loss_of(*FINITE, integers=(TARGETS, [9] * 6, LABELS)), ValueError,
        r"encoder_lengths: expected shape \(E,\) = \(4,\), got \(6,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()
