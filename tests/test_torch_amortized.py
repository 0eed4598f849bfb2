"""Amortized Networks for PyTorch: the core's bits, gradients by autograd, random numbers of torch's generator, torch.compile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import transducer_loss as tl
from helpers import FLOATS, Array
from naive_torch import WEIGHTS, same
from torch_cases import CONTEXTS, array_of, expect_bits, expect_graphs, expect_once, expect_unchanged_inputs, outcome, tensor_of
from transducer_loss import reference
from transducer_loss.adapters.torch import amortized_backlog, amortized_cost, gumbel_gate

FRAMES = [7, 1, 5, 3]
COSTS = [1.1, 0.3, -0.7]  # no numbers of float32

rng = np.random.default_rng(0)
GATES = rng.uniform(size=(4, 8, 3))
LOGITS = 2 * rng.normal(size=(4, 8, 3))
UPSTREAM = rng.normal(size=(4, 8, 3))
for b, frames in enumerate(FRAMES):
    GATES[b, frames:] = LOGITS[b, frames:] = UPSTREAM[b, frames:] = np.nan

STATISTICS: dict[str, tuple[Callable[..., Tensor], str, dict[str, Any]]] = {
    "cost": (amortized_cost, "amortized_cost", {}),
    "backlog": (amortized_backlog, "amortized_backlog", {"frame_period": 0.4}),
    "last backlog": (amortized_backlog, "amortized_backlog", {"frame_period": 0.1, "statistic": "last"}),
}
of_each_statistic = pytest.mark.parametrize(("function", "name", "options"), STATISTICS.values(), ids=STATISTICS)
of_each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
of_each_dtype = pytest.mark.parametrize("dtype", FLOATS)


@of_each_dtype
@of_each_reduction
@of_each_statistic
def test_statistics_have_the_bits_of_the_core(
    function: Callable[..., Tensor], name: str, options: dict[str, Any], reduction: str, dtype: str
) -> None:
    gates = tensor_of(GATES, dtype).requires_grad_()
    value = function(gates, COSTS, FRAMES, reduction=reduction, **options)
    weights = np.array(WEIGHTS) if reduction == "none" else np.full(4, -2.0 if reduction == "sum" else -0.5)
    wanted, gradient = getattr(tl, name)(array_of(gates), COSTS, FRAMES, weights=weights, **options)
    whole = tensor_of(wanted)
    expect_bits(value, array_of({"mean": whole.mean(), "sum": whole.sum(), "none": whole}[reduction]))
    upstream = torch.tensor(WEIGHTS if reduction == "none" else -2.0, dtype=value.dtype)
    for _ in range(2):
        expect_bits(torch.autograd.grad(value, gates, upstream, retain_graph=True)[0], gradient)
    assert np.isfinite(array_of(value.detach())).all() and (np.asarray(gradient, np.float64) != 0).any()


@of_each_statistic
def test_statistics_of_the_reference(function: Callable[..., Tensor], name: str, options: dict[str, Any]) -> None:
    wanted, gradient = getattr(reference, name)(GATES, COSTS, FRAMES, **options)
    value, found = outcome(lambda gates: function(gates, COSTS, FRAMES, reduction="none", **options), [tensor_of(GATES)])
    np.testing.assert_allclose(value, wanted, rtol=1e-14)
    upstream = np.linspace(-2.0, 2.0, 9)[:4]
    np.testing.assert_allclose(found, upstream[:, None, None] * gradient, rtol=1e-13)
    gates = tensor_of(np.nan_to_num(GATES)).requires_grad_()
    assert torch.autograd.gradcheck(lambda gates: function(gates, COSTS, FRAMES, **options), gates)


@pytest.mark.parametrize("hard", [False, True])
@of_each_dtype
def test_gates_have_the_bits_of_the_core(dtype: str, hard: bool) -> None:
    logits, upstream = tensor_of(LOGITS, dtype).requires_grad_(), tensor_of(UPSTREAM, dtype)
    for options in ({"seed": 3}, {"seed": 3, "temperature": 0.3}, {"noise": False}, {"seed": -1}, {"seed": (1 << 64) - 2}):
        for lengths in (FRAMES, None):
            gates = gumbel_gate(logits, lengths, hard=hard, **options)
            expect_bits(gates, tl.gumbel_gate(array_of(logits), lengths, hard=hard, **options))
            wanted = tl.gumbel_gate_backward(array_of(upstream), array_of(logits), lengths, **options)
            for _ in range(2):
                expect_bits(torch.autograd.grad(gates, logits, upstream, retain_graph=True)[0], wanted)


def test_gates_of_the_reference() -> None:
    options = {"temperature": 0.7, "seed": 11}
    gates, gradient = outcome(lambda x: gumbel_gate(x, FRAMES, **options), [tensor_of(LOGITS)])
    np.testing.assert_allclose(gates, reference.gumbel_gate(LOGITS, FRAMES, **options), rtol=1e-13)
    upstream = np.linspace(-2.0, 2.0, 2 * LOGITS.size + 1)[: LOGITS.size].reshape(LOGITS.shape)
    wanted = reference.gumbel_gate_backward(upstream, LOGITS, FRAMES, **options)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-11, atol=1e-14)
    logits = tensor_of(np.nan_to_num(LOGITS)).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: gumbel_gate(logits, FRAMES, **options), logits)


def test_hard_gates_have_the_gradient_of_the_soft_ones() -> None:
    logits = tensor_of(LOGITS).requires_grad_()
    soft, hard = (gumbel_gate(logits, FRAMES, hard=how, seed=4, temperature=2.0) for how in (False, True))
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    assert (hard.sum(-1) == (torch.arange(8) < torch.tensor(FRAMES)[:, None])).all()
    upstream = tensor_of(UPSTREAM)
    assert same(torch.autograd.grad(soft, logits, upstream), torch.autograd.grad(hard, logits, upstream))


def test_noise_is_of_the_generator_of_torch() -> None:
    logits = tensor_of(LOGITS)
    torch.manual_seed(8)
    first, second = (gumbel_gate(logits, FRAMES) for _ in range(2))
    torch.manual_seed(8)
    assert torch.equal(gumbel_gate(logits, FRAMES), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    gumbel_gate(logits, FRAMES, noise=False)
    gumbel_gate(logits, FRAMES, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def network(logits: Tensor, lengths: Any = FRAMES, **options: Any) -> Tensor:
    """All of it: gates, their cost and their backlog."""
    gates = gumbel_gate(logits, lengths, **options)
    cost = amortized_cost(gates, COSTS, lengths, reduction="none")
    return cost + amortized_backlog(gates, COSTS, lengths, frame_period=0.2, reduction="sum")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_around_changes_no_bit(context: str, dtype: str) -> None:
    logits = tensor_of(np.nan_to_num(LOGITS), dtype)
    assert same(outcome(CONTEXTS[context](network), [logits]), outcome(network, [logits]))


def test_numbers_of_any_kind() -> None:
    """Lengths, and costs in float64, wherever they lie: bits do not depend on it."""
    gates = tensor_of(GATES, "float32")
    wanted = amortized_cost(gates, COSTS, FRAMES)
    for lengths in (torch.tensor(FRAMES), torch.tensor(FRAMES, dtype=torch.uint8), np.array(FRAMES, np.int32), tuple(FRAMES)):
        for costs in (torch.tensor(COSTS, dtype=torch.float64), np.array(COSTS), tuple(COSTS), np.array(COSTS[::-1])[::-1]):
            assert torch.equal(amortized_cost(gates, costs, lengths), wanted)
    assert torch.equal(amortized_cost(gates, [2, 0, 1], FRAMES), amortized_cost(gates, torch.tensor([2, 0, 1]), FRAMES))


def test_without_gradient() -> None:
    gates = tensor_of(GATES).requires_grad_()
    with torch.no_grad():
        assert not amortized_cost(gates, torch.tensor(COSTS, requires_grad=True), FRAMES).requires_grad
        assert not gumbel_gate(gates, FRAMES).requires_grad
    assert not amortized_backlog(gates.detach(), COSTS, FRAMES).requires_grad


@of_each_statistic
def test_statistics_are_differentiated_once(function: Callable[..., Tensor], name: str, options: dict[str, Any]) -> None:
    def call(gates: Tensor) -> Tensor:
        return function(gates, COSTS, FRAMES, reduction="none", **options)

    expect_once(call, [tensor_of(GATES)])
    expect_unchanged_inputs(call, [tensor_of(GATES)])


def test_gates_are_differentiated_once() -> None:
    for hard in (False, True):
        expect_once(lambda x, hard=hard: gumbel_gate(x, FRAMES, hard=hard), [tensor_of(LOGITS)])
    expect_unchanged_inputs(lambda x: gumbel_gate(x, FRAMES), [tensor_of(LOGITS)])


STEPS = [(torch.tensor(lengths), heat, seed) for lengths, heat, seed in (
    (FRAMES, 1.0, 3), ([8, 8, 8, 8], 0.7, 4), ([1, 2, 1, 8], 0.3, -5), ([1, 1, 1, 1], 0.11, 1 << 62), (FRAMES, 0.05, 0),
)]  # fmt: skip


@pytest.mark.parametrize("hard", [False, True])
def test_one_graph_for_all_lengths_temperatures_and_seeds(hard: bool) -> None:
    """But for the first temperature and seed, which torch takes for constants."""
    def call(logits: Tensor, lengths: Tensor, heat: float, seed: int) -> Tensor:
        return network(logits, lengths, temperature=heat, seed=seed, hard=hard)

    logits = [tensor_of(np.nan_to_num(LOGITS), "float32")]
    expect_graphs(2, call, logits, STEPS)
    expect_graphs(1, lambda logits, lengths: network(logits, lengths, hard=hard), logits, [step[:1] for step in STEPS])


def test_the_default_compiler_draws_other_noise_every_time() -> None:
    torch._dynamo.reset()
    call = torch.compile(lambda logits: network(logits).sum(), fullgraph=True)
    logits = tensor_of(np.nan_to_num(LOGITS), "float32")
    with torch.no_grad():
        assert len({float(call(logits)) for _ in range(4)}) == 4
    found = outcome(call, [logits])
    assert all(tensor.isfinite().all() for tensor in found) and (found[1][0, :7] != 0).all()
    torch._dynamo.reset()


def test_fake_tensors_have_shapes_and_no_numbers() -> None:
    mode = FakeTensorMode()
    logits = mode.from_tensor(tensor_of(LOGITS, "bfloat16")).requires_grad_()
    with mode:
        gates = gumbel_gate(logits, FRAMES)
        value = network(logits)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert isinstance(value, FakeTensor) and value.shape == (4,) and value.dtype == torch.float32
    assert gates.shape == gradient.shape == logits.shape and gates.dtype == gradient.dtype == torch.bfloat16


GOOD: Any = (tensor_of(GATES, "float32"), COSTS, FRAMES)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "gates": (lambda: amortized_cost(GATES, *GOOD[1:]), TypeError, r"gates: expected a torch\.Tensor, got ndarray"),
    "dtype": (lambda: amortized_cost(GOOD[0].int(), *GOOD[1:]), TypeError, r"gates: expected dtype .*, got int32"),
    "dimensions": (lambda: amortized_cost(GOOD[0][0], *GOOD[1:]), ValueError, r"gates: expected 3 dimensions \(B, T, K\)"),
    "costs": (lambda: amortized_cost(GOOD[0], [1, 2], FRAMES), ValueError, r"costs: expected shape \(K,\) = \(3,\), got \(2,\)"),
    "word": (lambda: amortized_cost(GOOD[0], [1, "2", 3], FRAMES), ValueError, r"costs: expected numbers, got \[1, '2', 3\]"),
    "ragged": (lambda: amortized_backlog(GOOD[0], [[1], 2, 3], FRAMES), ValueError, r"durations: expected numbers, got \[\[1\]"),
    "nothing": (lambda: amortized_cost(GOOD[0], None, FRAMES), TypeError, r"costs: expected an array .*, got NoneType"),
    "learned": (
        lambda: amortized_backlog(GOOD[0], torch.ones(3, requires_grad=True), FRAMES), ValueError,
        r"durations: expected numbers without gradient, got a tensor that requires one",
    ),
    "lengths": (lambda: amortized_cost(*GOOD[:2], [9, 1, 1, 1]), ValueError, r"lengths: .* in \[1, T = 8\], got 9 at index 0"),
    "no frame": (lambda: gumbel_gate(GOOD[0], [1, 0, 1, 1]), ValueError, r"lengths: .* in \[1, T = 8\], got 0 at index 1"),
    "reduction": (lambda: amortized_cost(*GOOD, reduction="max"), ValueError, r"reduction: expected one of 'mean', .* got 'max'"),
    "statistic": (lambda: amortized_backlog(*GOOD, statistic="max"), ValueError, r"statistic: expected one of 'mean', 'last', got"),
    "period": (lambda: amortized_backlog(*GOOD, frame_period=-1), ValueError, r"frame_period: expected 0 or more, got -1"),
    "cold": (lambda: gumbel_gate(GOOD[0], temperature=0), ValueError, r"temperature: expected more than 0, got 0"),
    "no heat": (lambda: gumbel_gate(GOOD[0], temperature="1"), TypeError, r"temperature: expected a number, got str"),
    "seed": (lambda: gumbel_gate(GOOD[0], seed=1.5), TypeError, r"seed: expected an int, got float"),
    "logits": (lambda: gumbel_gate(LOGITS), TypeError, r"logits: expected a torch\.Tensor, got ndarray"),
    "vmap": (
        lambda: torch.func.vmap(lambda x: gumbel_gate(x))(GOOD[0][None]), TypeError, r"logits: .* torch\.func or vmap transforms",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()


def test_an_arbitrator_learns_to_be_cheap() -> None:
    """Straight-through gradients lead where they should: frames take the branch that costs least."""
    torch.manual_seed(0)
    arbitrator = torch.nn.Linear(5, 3)
    features: Array = rng.normal(size=(4, 8, 5))
    optimiser = torch.optim.Adam(arbitrator.parameters(), 0.1)
    costs = []
    for _ in range(60):
        cost = amortized_cost(gumbel_gate(arbitrator(tensor_of(features, "float32")), FRAMES, hard=True), COSTS, FRAMES)
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
        costs.append(cost.item())
    assert costs[0] > 0 > -0.6 > np.mean(costs[-10:])
