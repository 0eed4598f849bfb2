"""The loss of any joint network for PyTorch, pack by pack: the same numbers, in the memory of one pack."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from naive_torch import DTYPES, HALVES, WEIGHTS, Case, case, error, leaves, naive_rnnt_loss, same
from transducer_loss import reference
from transducer_loss.adapters.torch import SamplewiseRNNTLoss, joint_rnnt_loss, rnnt_loss, samplewise_rnnt_loss
from transducer_loss.check import budgets

REDUCTIONS = ("mean", "sum", "none")
EVERYTHING = 10**6
PACKS = (0, 60, EVERYTHING)  # each utterance by itself, some together, all of them together

of_each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
of_each_pack = pytest.mark.parametrize("pack", PACKS)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Every dtype of the joint has an equal float64 twin, so that what is compared is rounding alone.
ROUNDING = budgets("joint_rnnt_loss", "float64", "cpu")[1]


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    """One thread of torch's, which waits for no busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Added(nn.Module):
    """Encoder plus predictor, as most are, with a gate that makes it none that can be fused."""

    def __init__(self, features: int = 6, classes: int = 13, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.output = nn.Linear(features, features), nn.Linear(features, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        hidden = torch.tanh(encoder + predictor) * torch.sigmoid(self.gate(encoder))
        return self.output(self.dropout(hidden))


class Joined(nn.Module):
    """Encoder beside predictor, as the first ones were."""

    def __init__(self, features: int = 6, classes: int = 13) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(2 * features, features), nn.Linear(features, classes)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        both = torch.cat(torch.broadcast_tensors(encoder, predictor), dim=-1)
        return self.output(nn.functional.gelu(self.hidden(both)))


class Multiplied(nn.Module):
    """One feature against each other, and log-probabilities."""

    def __init__(self, features: int = 6, classes: int = 13) -> None:
        super().__init__()
        self.both = nn.Bilinear(features, features, classes)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self.both(*(x.contiguous() for x in torch.broadcast_tensors(encoder, predictor))).log_softmax(-1)


JOINTS: dict[str, Callable[[], nn.Module]] = {"added": Added, "joined": Joined, "multiplied": Multiplied}
of_each_joint = pytest.mark.parametrize("name", JOINTS)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return JOINTS[name]().to(dtype)


def naive_logits(joint: Callable[[Tensor, Tensor], Tensor], encoder: Tensor, predictor: Tensor) -> Tensor:
    return joint(encoder[:, :, None], predictor[:, None])


def expected(
    joint: nn.Module, inputs: Iterable[Tensor], of: Case, weights: Any, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses (B,) and gradients by encoder, predictor and parameters: the reference, and a float64 joint by autograd."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = naive_logits(joint, *inputs)
    loss, gradient = reference.rnnt_loss(logits.detach().numpy(), *of.integers, weights=weights, **options)
    return torch.as_tensor(loss), torch.autograd.grad(logits, [*inputs, *joint.parameters()], torch.as_tensor(gradient))


def weights_of(upstream: Any, reduction: str, batch: int) -> list[float]:
    share = torch.tensor(upstream, dtype=torch.float64) / (batch if reduction == "mean" else 1)
    return share.expand(batch).tolist()


def relative(got: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    return max(error(g, e) for g, e in zip(got, exact, strict=True))


def gradients_of(loss: Tensor, inputs: Iterable[Tensor], weight: Any = 1.0, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(inputs), torch.tensor(weight, dtype=loss.dtype).expand(loss.shape), **options)


# Values and gradients.


@of_each_joint
@of_each_pack
@pytest.mark.parametrize(("reduction", "upstream"), [("mean", 1.0), ("mean", -3.5), ("sum", 0.375), ("none", WEIGHTS)])
def test_any_joint(name: str, pack: int, reduction: str, upstream: Any) -> None:
    of, joint = case(), made(name)
    inputs = leaves(*of.joint[:2])
    exact_loss, exact = expected(joint, inputs, of, weights_of(upstream, reduction, 4))
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
    if reduction != "none":
        exact_loss = exact_loss.mean() if reduction == "mean" else exact_loss.sum()
    assert error(loss, exact_loss) <= budgets("joint_rnnt_loss", "float64", "cpu")[0]
    assert relative(gradients_of(loss, [*inputs, *joint.parameters()], upstream), exact) <= ROUNDING


@of_each_dtype
@of_each_pack
@pytest.mark.parametrize(("reduction", "upstream"), [("mean", 1.0), ("sum", -2.0), ("none", WEIGHTS)])
def test_within_the_error_budget(dtype: torch.dtype, pack: int, reduction: str, upstream: Any) -> None:
    """At most twice the error of the whole batch's joint and torch's own operators, in the same dtype."""
    of, joint = case(), made("added", dtype)
    inputs = leaves(*of.joint[:2], dtype=dtype)
    everything = [*inputs, *joint.parameters()]
    twin = Added().double()
    twin.load_state_dict(joint.state_dict())
    weights = weights_of(upstream, reduction, 4)
    exact_loss, exact = expected(twin, inputs, of, weights)

    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
    gradients = gradients_of(loss, everything, upstream)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in gradients] == [dtype] * len(everything)

    naive = naive_rnnt_loss(naive_logits(joint, *inputs), *of.integers)
    of_naive = torch.autograd.grad(naive, everything, torch.tensor(weights, dtype=dtype))
    if reduction != "none":
        exact_loss, naive = (x.mean() if reduction == "mean" else x.sum() for x in (exact_loss, naive))
    # Above the halves the naive error may by chance be next to nothing.
    least = 0.0 if dtype in HALVES else 8 * torch.finfo(dtype).eps
    assert error(loss, exact_loss) <= max(2 * error(naive, exact_loss), least)
    for got, other, e in zip(gradients, of_naive, exact, strict=True):
        assert error(got, e) <= max(2 * error(other, e), 4 * least)


@of_each_pack
@pytest.mark.parametrize("options", [
    {"topology": "modified"}, {"topology": "constrained"}, {"fastemit_lambda": 0.5}, {"delay_penalty": 0.125}, {"blank": -1},
    {"hat": True},
], ids=str)  # fmt: skip
def test_options_reach_the_loss(options: dict[str, Any], pack: int) -> None:
    of, joint = case(frames=(9, 1, 7, 5)), made("added")
    inputs = leaves(*of.joint[:2])
    exact_loss, exact = expected(joint, inputs, of, WEIGHTS, **options)
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction="none", pack=pack, **options)
    assert error(loss, exact_loss) <= budgets("joint_rnnt_loss", "float64", "cpu")[0]
    assert relative(gradients_of(loss, [*inputs, *joint.parameters()], WEIGHTS), exact) <= ROUNDING


def test_log_probabilities() -> None:
    of, joint = case(), made("multiplied")
    inputs = leaves(*of.joint[:2])
    _, exact = expected(joint, inputs, of, None, normalized=True)
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction="sum", normalized=True)
    assert relative(gradients_of(loss, [*inputs, *joint.parameters()]), exact) <= ROUNDING


def test_the_same_as_the_fused_loss() -> None:
    of = case()
    inputs, others = leaves(*of.joint), leaves(*of.joint)
    fused = joint_rnnt_loss(*inputs, *of.integers, occupancy_floor=0.0)
    encoder, predictor, *parameters = others

    def joint(e: Tensor, p: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(e + p), *parameters)

    loss = samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, parameters=parameters)
    assert relative([loss], [fused]) <= budgets("joint_rnnt_loss", "float64", "cpu")[0]
    assert relative(gradients_of(loss, others), gradients_of(fused, inputs)) <= ROUNDING


@given(
    shape=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4),
    pack=st.integers(0, 60), reduction=st.sampled_from(REDUCTIONS),
)  # fmt: skip
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_any_shape(shape: list[tuple[int, int]], pack: int, reduction: str) -> None:
    of, joint = case(*zip(*shape, strict=True), features=6), made("added")
    inputs = leaves(*of.joint[:2])
    _, exact = expected(joint, inputs, of, weights_of(1.0, reduction, len(shape)))
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
    for got, e in zip(gradients_of(loss, [*inputs, *joint.parameters()]), exact, strict=True):
        assert torch.linalg.vector_norm(got - e) <= ROUNDING * max(1.0, float(torch.linalg.vector_norm(e)))


@of_each_reduction
def test_gradcheck(reduction: str) -> None:
    of, joint = case(frames=(3, 2), labels=(2, 1), classes=4, features=3), Added(3, 4).double()
    parameters = list(joint.parameters())

    def loss(encoder: Tensor, predictor: Tensor, *_: Tensor) -> Tensor:
        return samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, reduction=reduction, pack=12)

    assert torch.autograd.gradcheck(loss, (*leaves(*of.joint[:2]), *parameters))


@of_each_pack
def test_reductions_agree(pack: int) -> None:
    of, joint = case(), made("added", torch.float32)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    everything = [*inputs, *joint.parameters()]

    def run(reduction: str, weight: float) -> list[Tensor]:
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
        return [loss, *gradients_of(loss, everything, weight)]

    each = run("none", 1.0)
    # Powers of two change no bit, and the batch is of four.
    assert same(run("sum", 1.0), [each[0].sum(), *each[1:]])
    assert same(run("mean", 4.0), [each[0].mean(), *each[1:]])


@of_each_reduction
@of_each_pack
def test_backward_twice_gives_the_same_bits(reduction: str, pack: int) -> None:
    of = case()
    joint = Added(dropout=0.5)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    everything = [*inputs, *joint.parameters()]
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
    first = gradients_of(loss, everything, -1.5, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    gradients_of(loss, everything, 7.0, retain_graph=True)
    assert same(gradients_of(loss, everything, -1.5), kept)
    assert same(first, kept)
    with pytest.raises(RuntimeError, match="second time"):
        gradients_of(loss, everything)


def test_expanded_upstream() -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction="none")
    upstream = torch.tensor(-0.5, dtype=torch.float64)
    expanded, dense = upstream.expand(4), upstream.repeat(4)
    assert expanded.stride() == (0,)
    assert same(*(torch.autograd.grad(loss, inputs, weight, retain_graph=True) for weight in (expanded, dense)))


@of_each_reduction
def test_second_order_raises(reduction: str) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, [*inputs, *joint.parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        (gradients[-1].square().sum() + inputs[0].sum()).backward()


# Packs and memory.


class Watched:
    """A joint that tells of its calls."""

    def __init__(self, joint: nn.Module) -> None:
        self.joint = joint
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.recorded: list[bool] = []
        self.autocast: list[bool] = []
        self.alive: list[int] = []
        self._made: list[StorageWeakRef] = []

    def __call__(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        self.alive.append(sum(not made.expired() for made in self._made))
        self.calls.append((tuple(encoder.shape), tuple(predictor.shape)))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        logits: Tensor = self.joint(encoder, predictor)
        self.recorded.append(logits.requires_grad)
        self._made.append(StorageWeakRef(logits.untyped_storage()))
        return logits


@pytest.mark.parametrize(
    ("pack", "shapes"),
    [
        (0, [(1, 9, 6), (1, 1, 1), (1, 7, 4), (1, 4, 5)]),
        (2 * 9 * 6 - 1, [(1, 9, 6), (3, 7, 5)]),  # one cell too few for the first two
        (2 * 9 * 6, [(2, 9, 6), (2, 7, 5)]),
        (EVERYTHING, [(4, 9, 6)]),
    ],
)
def test_what_the_joint_is_given(pack: int, shapes: list[tuple[int, int, int]]) -> None:
    of, joint = case(), Watched(made("added"))
    padded = [nn.functional.pad(tensor, (0, 0, 0, 3)) for tensor in of.joint[:2]]
    samplewise_rnnt_loss(joint, *padded, *of.integers, pack=pack, parameters=joint.joint.parameters())
    assert joint.calls == [((n, T, 1, 6), (n, 1, U1, 6)) for n, T, U1 in shapes]


@of_each_reduction
@pytest.mark.parametrize("inplace", [False, True])
def test_one_graph_at_a_time(reduction: str, inplace: bool) -> None:
    of, joint = case(), Watched(made("added"))
    inputs = leaves(*of.joint[:2])
    loss = samplewise_rnnt_loss(
        joint, *inputs, *of.integers, reduction=reduction, parameters=joint.joint.parameters(), inplace=inplace
    )
    loss.sum().backward()
    assert len(joint.calls) == (8 if reduction == "none" else 4)
    assert joint.alive == [0] * len(joint.calls)
    assert [made.expired() for made in joint._made] == [True] * len(joint.calls)


@of_each_reduction
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_no_gradient_is_wanted(
    reduction: str, mode: Callable[[], contextlib.AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, joint = case(), Watched(made("added"))
    inputs, parameters = leaves(*of.joint[:2]), list(joint.joint.parameters())
    wanted = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, parameters=parameters)
    assert joint.recorded == [True] * 4
    monkeypatch.setattr(torch.autograd, "grad", None)
    joint.recorded.clear()
    with mode():
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, parameters=parameters, pack=EVERYTHING)
        assert joint.recorded == [False]
    assert not loss.requires_grad
    assert error(loss, wanted.detach()) <= 8 * torch.finfo(torch.float64).eps


@of_each_reduction
def test_only_some_need_a_gradient(reduction: str) -> None:
    of = case()

    def run(*wanted: str) -> list[Tensor | None]:
        joint = made("added")
        encoder, predictor = leaves(*of.joint[:2])
        named = {"encoder": encoder, "predictor": predictor, **dict(joint.named_parameters())}
        for name, tensor in named.items():
            tensor.requires_grad_(name in wanted or not wanted)
        samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, reduction=reduction).sum().backward()
        assert all((tensor.grad is not None) == tensor.requires_grad for tensor in named.values())
        return [tensor.grad for tensor in named.values()]

    everything = run()
    for wanted in (("encoder",), ("predictor",), ("output.bias",), ("encoder", "gate.weight"), ("predictor", "output.weight")):
        for full, gradient in zip(everything, run(*wanted), strict=True):
            assert gradient is None or torch.equal(gradient, full)


def test_nothing_needs_a_gradient() -> None:
    of, joint = case(), made("added").requires_grad_(False)
    loss = samplewise_rnnt_loss(joint, *of.joint[:2], *of.integers)
    assert not loss.requires_grad
    assert torch.equal(loss, rnnt_loss(naive_logits(joint, *of.joint[:2]), *of.integers))


@of_each_reduction
def test_a_parameter_without_a_use_has_no_gradient(reduction: str) -> None:
    of, joint = case(), made("added")
    joint.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    samplewise_rnnt_loss(joint, *leaves(*of.joint[:2]), *of.integers, reduction=reduction).sum().backward()
    assert joint.unused.grad is None
    assert joint.output.weight.grad is not None


# Parameters.


@of_each_reduction
@pytest.mark.parametrize("encoder_too", [False, True])
def test_a_leaf_that_is_no_parameter_raises(reduction: str, encoder_too: bool) -> None:
    of, (weight, bias) = case(), leaves(*case().joint[2:])
    inputs = leaves(*of.joint[:2]) if encoder_too else of.joint[:2]

    def joint(encoder: Tensor, predictor: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(encoder + predictor), 2 * weight, bias)

    with pytest.raises(ValueError, match=r"^parameters: expected every tensor .* got none for one of shape \(13, 6\)$"):
        samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, parameters=[bias])
    with pytest.raises(ValueError, match=r"shape \(13,\)$"):
        samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, parameters=[weight])
    with torch.no_grad():
        samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, parameters=[])  # nothing is lost


def test_an_input_of_the_batch_in_a_closure_raises() -> None:
    of, joint = case(), made("added")
    encoder, predictor = leaves(*of.joint[:2])
    longer = encoder * 2
    with pytest.raises(ValueError, match=r"^parameters: .* shape \(4, 9, 6\)$"):
        samplewise_rnnt_loss(
            lambda e, p: joint(e + longer.mean(), p), longer, predictor, *of.integers, parameters=joint.parameters()
        )


@of_each_reduction
def test_parameters_that_are_no_leaves(reduction: str) -> None:
    """As the output layer tied to a transformed embedding; the gradient goes on to the leaf."""
    of = case()
    results = []
    for call in ("samplewise", "naive"):
        encoder, predictor, source, bias = leaves(*of.joint)
        weight = torch.sin(source)

        def joint(e: Tensor, p: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return nn.functional.linear(torch.tanh(e + p), weight, bias)

        if call == "naive":
            loss = rnnt_loss(naive_logits(joint, encoder, predictor), *of.integers, reduction=reduction)
        else:
            loss = samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, reduction=reduction, parameters=(weight, bias))
        (loss.sum() + weight.sum()).backward()
        results.append([tensor.grad for tensor in (encoder, predictor, source, bias)])
    assert relative(*results) <= ROUNDING


@of_each_reduction
def test_a_parameter_named_twice_counts_once(reduction: str) -> None:
    of = case()
    encoder, predictor, weight, bias = leaves(*of.joint)

    def joint(e: Tensor, p: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(e + p), weight, bias)

    def gradients(parameters: list[Tensor]) -> tuple[Tensor, ...]:
        loss = samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, reduction=reduction, parameters=parameters)
        return gradients_of(loss, [encoder, predictor, weight, bias])

    assert same(gradients([weight, bias, weight]), gradients([weight, bias]))


def test_tied_weights() -> None:
    of, joint = case(classes=6), Added(6, 6).double()
    joint.output.weight = joint.gate.weight
    inputs = leaves(*of.joint[:2])
    _, exact = expected(joint, inputs, of, None)
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction="sum")
    assert relative(gradients_of(loss, [*inputs, *joint.parameters()]), exact) <= ROUNDING


# Random numbers and autocast.


def test_dropout_draws_what_the_joint_by_itself_would() -> None:
    of, joint = case(frames=(5, 5), labels=(3, 3)), Added(dropout=0.5).double()
    inputs = leaves(*of.joint[:2])
    everything = [*inputs, *joint.parameters()]
    torch.manual_seed(7)
    whole = rnnt_loss(naive_logits(joint, *inputs), *of.integers, reduction="sum")
    wanted, after = gradients_of(whole, everything), torch.rand(3)
    for reduction in ("sum", "none"):
        torch.manual_seed(7)
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=EVERYTHING).sum()
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(loss, whole)
        assert relative(gradients_of(loss, everything), wanted) <= ROUNDING

    torch.manual_seed(7)
    by_hand = []
    for b in (0, 1):
        alone = [tensor[b : b + 1] for tensor in inputs]
        by_hand.append(rnnt_loss(naive_logits(joint, *alone), of.targets[b : b + 1], [5], [3]))
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction="none"), torch.stack(by_hand))
    assert torch.equal(torch.rand(3), after)


@of_each_pack
@of_each_reduction
def test_random_numbers_before_and_after(reduction: str, pack: int) -> None:
    of, joint = case(), Added(dropout=0.5)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    everything = [*inputs, *joint.parameters()]

    def run() -> list[Tensor]:
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
        torch.rand(5)  # somebody else draws between forward and backward
        before = torch.get_rng_state()
        gradients = gradients_of(loss, everything)
        assert torch.equal(torch.get_rng_state(), before)
        return [loss, *gradients]

    torch.manual_seed(1)
    first, second = run(), run()
    assert not same(first, second)
    torch.manual_seed(1)
    assert same(run(), first)
    assert same(run(), second)


@of_each_pack
def test_the_same_masks_in_forward_and_backward(pack: int) -> None:
    of, joint = case(), Added(dropout=0.5)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    everything = [*inputs, *joint.parameters()]
    results = []
    for reduction in ("sum", "none"):
        torch.manual_seed(2)
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
        torch.manual_seed(99)
        results.append([loss.sum(), *gradients_of(loss, everything)])
    assert same(*results)


@of_each_reduction
@of_each_pack
def test_autocast(reduction: str, pack: int) -> None:
    of, joint = case(), Watched(made("added", torch.float32))
    parameters = list(joint.joint.parameters())
    encoder, predictor = leaves(*of.joint[:2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = samplewise_rnnt_loss(
            joint, encoder.bfloat16(), predictor, *of.integers, reduction=reduction, parameters=parameters, pack=pack
        )
        naive = naive_rnnt_loss(naive_logits(joint.joint, encoder.bfloat16(), predictor), *of.integers)
    assert naive.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    everything = [encoder, predictor, *parameters]
    gradients = gradients_of(loss, everything)
    assert joint.autocast == [True] * len(joint.calls)  # in backward too, which is outside
    assert all(gradient.dtype == torch.float32 for gradient in gradients)

    weights = weights_of(1.0, reduction, 4)
    twin = Added().double()
    twin.load_state_dict(joint.joint.state_dict())
    exact_loss, exact = expected(twin, (encoder, predictor), of, weights)
    if reduction != "none":
        exact_loss, naive = (x.mean() if reduction == "mean" else x.sum() for x in (exact_loss, naive))
    of_naive = gradients_of(naive, everything)
    assert error(loss, exact_loss) <= 2 * error(naive, exact_loss)
    for got, other, e in zip(gradients, of_naive, exact, strict=True):
        assert error(got, e) <= 2 * error(other, e)


def test_autocast_keeps_no_casts() -> None:
    """Before pytorch/pytorch#165068 a cast that was made without a graph was found later, and a gradient lost."""
    of, joint = case(), made("added", torch.float32)
    caches: list[bool] = []

    def watched(encoder: Tensor, predictor: Tensor) -> Tensor:
        caches.append(torch.is_autocast_cache_enabled())
        return joint(encoder, predictor)

    with torch.autocast("cpu", torch.bfloat16):
        samplewise_rnnt_loss(watched, *leaves(*of.joint[:2], dtype=torch.float32), *of.integers, parameters=joint.parameters())
        assert torch.is_autocast_cache_enabled()
    assert caches == [False] * 4


def test_autocast_outside_but_not_where_it_matters() -> None:
    """Backward of the joint runs as it would outside of autocast, though it runs where the loss is called."""
    of = case()
    seen: list[bool] = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return upstream

    joint = made("added", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        samplewise_rnnt_loss(
            lambda e, p: Identity.apply(joint(e, p)), *leaves(*of.joint[:2], dtype=torch.float32), *of.integers,
            parameters=joint.parameters(),
        )  # fmt: skip
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 4


@of_each_pack
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_in_float16_do_not_underflow(reduction: str, pack: int) -> None:
    """Loss scaling comes with the upstream gradient, after the gradients are made."""
    of = case(frames=(30,) * 8, labels=(10,) * 8, classes=1000)
    joint = Added(classes=1000).half()
    with torch.no_grad():
        joint.output.weight /= 4096  # and with it the gradients of all that comes before
    inputs = leaves(*of.joint[:2], dtype=torch.float16)
    everything = [*inputs, *joint.parameters()]
    twin = Added(classes=1000).double()
    twin.load_state_dict(joint.state_dict())
    scale = 1024.0
    _, exact = expected(twin, inputs, of, weights_of(scale, reduction, 8))
    # The whole batch at once gets its scaled gradient, and so rounds as little as float16 can.
    whole = rnnt_loss(naive_logits(joint, *inputs), *of.integers, reduction=reduction)
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
    for got, other, e in zip(*(gradients_of(x, everything, scale) for x in (loss, whole)), exact, strict=True):
        assert error(got, e) <= 2 * error(other, e)


# Padding, NaN, utterances without a path.


@of_each_joint
@of_each_pack
@of_each_reduction
def test_padding_may_hold_anything(name: str, pack: int, reduction: str) -> None:
    of, joint = case(), made(name)
    clean = of.joint[:2]
    results = []
    for value in (None, torch.nan, torch.inf):
        inputs = [tensor.clone() for tensor in clean]
        for tensor in inputs if value is not None else []:
            tensor[of.padding(tensor)] = value
        encoder, predictor = (tensor.requires_grad_() for tensor in inputs)
        loss = samplewise_rnnt_loss(joint, encoder, predictor, *of.integers, reduction=reduction, pack=pack)
        gradients = gradients_of(loss, [encoder, predictor, *joint.parameters()])
        for gradient, tensor in zip(gradients, clean, strict=False):
            assert (gradient[of.padding(tensor)] == 0).all()
        results.append([loss, *gradients])
    assert all(tensor.isfinite().all() for tensor in results[0])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_padding_is_no_value_of_its_own() -> None:
    """A joint that is finite for real rows only: zeros in the padding of a pack would be NaN."""
    of = case()
    inputs = leaves(*(tensor.abs() + 0.5 for tensor in of.joint[:2]))
    joint = made("added")
    loss = samplewise_rnnt_loss(
        lambda e, p: joint(e / e.norm(dim=-1, keepdim=True), p.log()), *inputs, *of.integers, pack=EVERYTHING,
        parameters=joint.parameters(),
    )  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, [*inputs, *joint.parameters()]))


@of_each_joint
@of_each_pack
@pytest.mark.parametrize("where", [0, 1])
def test_an_utterance_with_nan_leaves_the_others_alone(name: str, pack: int, where: int) -> None:
    of, joint = case(), made(name)
    inputs = leaves(*of.joint[:2])
    _, exact = expected(joint, inputs, of, [1.5, -0.75, 0.0, 2.0])
    with torch.no_grad():
        inputs[where][2, 0, 1] = torch.nan
    for reduction in ("none", "sum"):
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
        everything = [*inputs, *joint.parameters()]
        if reduction == "none":
            assert loss.isnan().tolist() == [False, False, True, False]
            assert relative(gradients_of(loss, everything, [1.5, -0.75, 5.0, 2.0]), exact) <= ROUNDING
        else:
            assert loss.isnan()
            assert all(gradient.isfinite().all() for gradient in gradients_of(loss, everything))


def test_random_numbers_where_a_pack_is_taken_apart() -> None:
    of, joint = case(), Added(dropout=0.5)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    with torch.no_grad():
        inputs[0][1, 0, 0] = torch.nan
    everything = [*inputs, *joint.parameters()]
    results = []
    for reduction in ("sum", "none"):
        for pack in (EVERYTHING, 0):
            torch.manual_seed(4)
            loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack)
            results.append([torch.rand(2), *gradients_of(loss, everything)])
    assert all(same(result, results[0]) for result in results)


@of_each_pack
def test_an_utterance_without_a_path(pack: int) -> None:
    of, joint = case(frames=(4, 2, 3), labels=(3, 3, 2)), made("added")
    inputs = leaves(*of.joint[:2])
    _, exact = expected(joint, inputs, of, None, topology="modified")
    options: dict[str, Any] = {"topology": "modified", "pack": pack}
    for infeasible, reported in (("inf", torch.inf), ("zero", 0.0)):
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, infeasible=infeasible, reduction="none", **options)
        assert loss[1] == reported
        assert loss[[0, 2]].isfinite().all()
        assert relative(gradients_of(loss, [*inputs, *joint.parameters()]), exact) <= ROUNDING
    total = samplewise_rnnt_loss(joint, *inputs, *of.integers, infeasible="zero", reduction="sum", **options)
    assert torch.equal(total, loss.sum())
    with pytest.raises(ValueError, match=r"targets: expected a path .* utterances \[1\]$"):
        samplewise_rnnt_loss(joint, *inputs, *of.integers, infeasible="raise", **options)


@of_each_pack
def test_labels_past_the_end_are_not_read(pack: int) -> None:
    of, joint = case(), made("added")
    assert (of.targets == -1).any()
    wild = torch.where(of.targets < 0, 10**6, of.targets)
    losses = [samplewise_rnnt_loss(joint, *of.joint[:2], t, of.frames, of.labels, pack=pack) for t in (of.targets, wild)]
    assert torch.equal(*losses)


@of_each_reduction
def test_integers_of_every_kind(reduction: str) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])

    def run(targets: Any, frames: Any, labels: Any) -> list[Tensor]:
        loss = samplewise_rnnt_loss(joint, *inputs, targets, frames, labels, reduction=reduction, pack=100)
        return [loss, *gradients_of(loss, inputs)]

    wanted = run(*of.integers)
    for targets in (
        of.targets.int(), of.targets.to(torch.int16), of.targets.tolist(), of.targets.numpy(), of.targets.T.contiguous().T,
    ):  # fmt: skip
        assert same(run(targets, of.frames, of.labels), wanted)
    for kind in (torch.int32, torch.int64):
        assert same(run(of.targets, torch.tensor(of.frames, dtype=kind), torch.tensor(of.labels, dtype=kind)), wanted)


@of_each_reduction
def test_strides(reduction: str) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    strided = [tensor.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for tensor in inputs]
    assert not any(tensor.is_contiguous() for tensor in strided)
    expanded = [tensor[:1].detach().expand(tensor.shape).requires_grad_() for tensor in inputs]
    dense = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in expanded]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        loss = samplewise_rnnt_loss(joint, *tensors, *of.integers, reduction=reduction, pack=100)
        return [loss, *gradients_of(loss, tensors)]

    assert same(run(strided), run(inputs))
    assert same(run(expanded), run(dense))


# In place, and changes between forward and backward.


@of_each_reduction
@of_each_pack
def test_in_place(reduction: str, pack: int) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    results = []
    for inplace in (False, True):
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=pack, inplace=inplace)
        results.append([loss, *gradients_of(loss, [*inputs, *joint.parameters()], -2.0)])
    assert same(*results)


def test_in_place_of_what_the_joint_needs_raises() -> None:
    of, joint = case(), made("multiplied")  # ends with a log_softmax, whose backward reads its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        samplewise_rnnt_loss(joint, *of.joint[:2], *of.integers, inplace=True)


@pytest.mark.parametrize("changed", ["encoder", "predictor", "parameter", "targets"])
def test_changes_before_backward_raise(changed: str) -> None:
    of, joint = case(), made("added")
    encoder, predictor = leaves(*of.joint[:2])
    targets = of.targets.clone()
    loss = samplewise_rnnt_loss(joint, encoder, predictor, targets, of.frames, of.labels, reduction="none")
    tensors = {"encoder": encoder, "predictor": predictor, "parameter": joint.output.bias, "targets": targets}
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_made_with_the_loss_are_those_of_then(reduction: str) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    everything = [*inputs, *joint.parameters()]
    wanted = gradients_of(samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction), everything)
    loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction)
    with torch.no_grad():
        for tensor in everything:
            tensor.fill_(torch.nan)
    assert same(gradients_of(loss, everything), wanted)


# Threads and processes.


def test_calls_from_several_threads_at_once() -> None:
    of = case(frames=(30, 20), labels=(9, 5), classes=60, features=6)
    joint = Added(classes=60)

    def run(reduction: str) -> list[Tensor]:
        inputs = leaves(*of.joint[:2], dtype=torch.float32)
        loss = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction)
        return [loss, *gradients_of(loss, [*inputs, *joint.parameters()])]

    wanted = {reduction: run(reduction) for reduction in REDUCTIONS}
    failures: list[Any] = []
    start = threading.Barrier(len(REDUCTIONS))

    def many(reduction: str) -> None:
        start.wait()
        try:
            failures.extend(reduction for _ in range(5) if not same(run(reduction), wanted[reduction]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=many, args=(reduction,)) for reduction in REDUCTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# The module, and errors.


@of_each_reduction
def test_the_module(reduction: str) -> None:
    of, joint = case(), made("added")
    inputs = leaves(*of.joint[:2])
    module = SamplewiseRNNTLoss(joint, reduction=reduction, pack=100, blank=-1)
    assert dict(module.named_parameters()).keys() == {f"joint.{name}" for name, _ in joint.named_parameters()}
    value = module(*inputs, *of.integers)
    wanted = samplewise_rnnt_loss(joint, *inputs, *of.integers, reduction=reduction, pack=100, blank=-1)
    assert torch.equal(value, wanted)
    everything = [*inputs, *joint.parameters()]
    assert same(gradients_of(value, everything), gradients_of(wanted, everything))


def test_the_module_keeps_its_parameters() -> None:
    of, joint = case(), made("added")
    module = SamplewiseRNNTLoss(lambda e, p: joint(e, p), parameters=(p for p in joint.parameters()))
    assert torch.equal(*(module(*leaves(*of.joint[:2]), *of.integers) for _ in range(2)))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        SamplewiseRNNTLoss(joint, reduction="average")


OF_CASE = case()


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"joint": None}, TypeError, "joint: expected a torch.nn.Module or another callable, got NoneType"),
        ({"joint": lambda e, p: e + p}, ValueError, "parameters: expected the joint's parameters, .* got None"),
        ({"joint": lambda e, p: None, "parameters": ()}, TypeError, "joint: expected a torch.Tensor, got NoneType"),
        (
            {"joint": lambda e, p: e, "parameters": ()}, ValueError,
            r"joint: expected logits of shape \(n, T, U\+1, V\) = \(1, 9, 6, V\), got \(1, 9, 1, 6\)",
        ),
        (
            {"joint": lambda e, p: (e + p)[0], "parameters": ()}, ValueError,
            r"joint: expected logits of shape \(n, T, U\+1, V\) = \(1, 9, 6, V\), got \(9, 6, 6\)",
        ),
        ({"joint": lambda e, p: (e + p).long(), "parameters": ()}, TypeError, "logits: expected dtype float16, .* got int64"),
        ({"parameters": [None]}, TypeError, "parameters: expected torch.Tensors, got NoneType"),
        ({"pack": -1}, ValueError, "pack: expected a number of cells, 0 or more, got -1"),
        ({"pack": 10.0}, TypeError, "pack: expected an int, got float"),
        ({"pack": True}, TypeError, "pack: expected an int, got bool"),
        ({"encoder": OF_CASE.joint[0].numpy()}, TypeError, "encoder: expected a torch.Tensor, got ndarray"),
        ({"encoder": OF_CASE.joint[0][0]}, ValueError, r"encoder: expected 3 dimensions .* got shape \(9, 6\)"),
        ({"encoder": OF_CASE.joint[0].long()}, TypeError, "encoder: expected dtype float16, .* got int64"),
        ({"encoder": OF_CASE.joint[0][:0]}, ValueError, "encoder: expected at least one of each"),
        ({"predictor": None}, TypeError, "predictor: expected a torch.Tensor, got NoneType"),
        ({"predictor": OF_CASE.joint[1][:3]}, ValueError, r"predictor: expected shape .* = \(4, U\+1, D\), got \(3, 6, 6\)"),
        ({"predictor": OF_CASE.joint[1].to("meta")}, ValueError, "predictor: expected device cpu as encoder, got meta"),
        ({"targets": OF_CASE.targets[:, :4]}, ValueError, r"targets: expected shape \(B, U\) = \(4, 5\), got \(4, 4\)"),
        ({"targets": OF_CASE.targets.float()}, TypeError, "targets: expected integers, got dtype float32"),
        (
            {"targets": OF_CASE.targets + 20 * (torch.arange(4) == 3)[:, None]}, ValueError,
            r"targets: expected labels in \[0, V = 13\), got [0-9]+ at index \(3, 0\)",
        ),
        ({"encoder_lengths": [9, 1, 7, 10]}, ValueError, r"encoder_lengths: expected lengths in .* got 10 at index 3"),
        ({"encoder_lengths": [9, 1, 7]}, ValueError, r"encoder_lengths: expected shape .* got \(3,\)"),
        ({"target_lengths": [5, 0, 3, 6]}, ValueError, r"target_lengths: expected lengths in \[0, U = 5\], got 6 at index 3"),
        ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
        ({"infeasible": "nan"}, ValueError, "infeasible: expected one of 'inf', 'zero', 'raise', got 'nan'"),
        ({"topology": "normal"}, ValueError, "topology: expected one of"),
        ({"fastemit_lambda": -1.0}, ValueError, "fastemit_lambda: expected 0 or more"),
        ({"hat": True, "normalized": True}, ValueError, "hat: expected False with normalized=True"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "joint": made("added"), "encoder": OF_CASE.joint[0], "predictor": OF_CASE.joint[1], "targets": OF_CASE.targets,
        "encoder_lengths": OF_CASE.frames, "target_lengths": OF_CASE.labels, **wrong,
    }  # fmt: skip
    with pytest.raises(kind, match=f"^{message}"):
        samplewise_rnnt_loss(**arguments)
