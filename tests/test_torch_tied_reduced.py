"""The Tied & Reduced decoder for PyTorch: the core's bits, steps that are the rows of training, and a tie that copies keep."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import transducer_loss as tl
from helpers import FLOATS
from naive_torch import error, same
from torch_cases import CONTEXTS, array_of, expect_bits, expect_graphs, expect_once, expect_unchanged_inputs, outcome, tensor_of
from transducer_loss import reference
from transducer_loss.adapters.torch import JointRNNTLoss, TiedReducedDecoder, beam_search, greedy, reduced_predictor

V, E, HEADS, CONTEXT = 9, 6, 2, 3
rng = np.random.default_rng(0)
EMBEDDING, POSITIONS = rng.normal(size=(V, E)), rng.normal(size=(HEADS, CONTEXT, E))
LENGTHS = np.array([5, 2, 0, 4])
TARGETS = rng.integers(0, V, (4, 5))
TARGETS[0] = [3, 3, 0, 3, 8]
TARGETS[np.arange(5) >= LENGTHS[:, None]] = -1
INPUTS = [tensor_of(EMBEDDING), tensor_of(POSITIONS)]
INTEGERS = torch.from_numpy(TARGETS), torch.from_numpy(LENGTHS)

of_each_last = pytest.mark.parametrize("last", [False, True])


def poisoned(*shape: int) -> np.ndarray[Any, Any]:
    """A gradient with NaN in the rows that are none."""
    upstream = rng.normal(size=shape)
    if len(shape) == 3:
        upstream[np.arange(shape[1]) > LENGTHS[:, None]] = np.nan
    return upstream


@of_each_last
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_average_has_the_bits_of_the_core(dtype: str, last: bool) -> None:
    inputs = [tensor_of(array, dtype).requires_grad_() for array in (EMBEDDING, POSITIONS)]
    out = reduced_predictor(*inputs, *INTEGERS, last=last)
    arrays = [array_of(tensor) for tensor in inputs]
    expect_bits(out, tl.reduced_predictor(*arrays, TARGETS, LENGTHS, last=last))
    upstream = tensor_of(poisoned(*out.shape), dtype)
    wanted = tl.reduced_predictor_backward(array_of(upstream), *arrays, TARGETS, LENGTHS, last=last)
    for _ in range(2):
        found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        for one, other in zip(found, (wanted.embedding, wanted.positions), strict=True):
            expect_bits(one, other)
            assert one.isfinite().all() and one.any()


@of_each_last
def test_the_average_of_the_reference(last: bool) -> None:
    out, *gradients = outcome(lambda *inputs: reduced_predictor(*inputs, *INTEGERS, last=last), INPUTS)
    np.testing.assert_allclose(out, reference.reduced_predictor(EMBEDDING, POSITIONS, TARGETS, LENGTHS, last=last), atol=1e-14)
    upstream = np.linspace(-2.0, 2.0, 2 * out.numel() + 1)[: out.numel()].reshape(out.shape)
    wanted = reference.reduced_predictor_backward(upstream, EMBEDDING, POSITIONS, TARGETS, LENGTHS, last=last)
    for found, exact in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-13)
    leaves = [tensor.clone().requires_grad_() for tensor in INPUTS]
    assert torch.autograd.gradcheck(lambda *inputs: reduced_predictor(*inputs, *INTEGERS, last=last), leaves)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_around_changes_no_bit(context: str) -> None:
    def call(*inputs: Tensor) -> Tensor:
        return reduced_predictor(*inputs, TARGETS, LENGTHS.tolist()).sum(1) + reduced_predictor(*inputs, *INTEGERS, last=True)

    for kind in (torch.float32, torch.bfloat16):
        given = [each.to(kind) for each in INPUTS]
        assert same(outcome(CONTEXTS[context](call), given), outcome(call, given))
    torch._dynamo.reset()


@of_each_last
def test_the_average_is_differentiated_once(last: bool) -> None:
    expect_once(lambda *inputs: reduced_predictor(*inputs, *INTEGERS, last=last), INPUTS)
    expect_unchanged_inputs(lambda *inputs: reduced_predictor(*inputs, *INTEGERS, last=last), INPUTS)


def test_no_gradient_where_none_is_wanted() -> None:
    embedding, positions = (tensor.clone().requires_grad_() for tensor in INPUTS)
    with torch.no_grad():
        assert not reduced_predictor(embedding, positions, *INTEGERS).requires_grad
    both = torch.autograd.grad(reduced_predictor(embedding, positions, *INTEGERS).sum(), [embedding, positions])
    assert same(torch.autograd.grad(reduced_predictor(embedding, positions.detach(), *INTEGERS).sum(), [embedding]), both[:1])
    assert same(torch.autograd.grad(reduced_predictor(embedding.detach(), positions, *INTEGERS).sum(), [positions]), both[1:])


def test_fake_tensors_have_shapes_and_no_numbers() -> None:
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(tensor).requires_grad_() for tensor in INPUTS]
        out = reduced_predictor(*fakes, *map(mode.from_tensor, INTEGERS))
        gradients = torch.autograd.grad(out.sum(), fakes)
        assert reduced_predictor(*fakes, *map(mode.from_tensor, INTEGERS), last=True).shape == (4, E)
    assert isinstance(out, FakeTensor) and out.shape == (4, 6, E)
    assert [each.shape for each in gradients] == [each.shape for each in INPUTS]


# The decoder.


class Model(torch.nn.Module):
    """Decoder and joint, tied."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = JointRNNTLoss(E, V, reduction="sum", occupancy_floor=0.0)
        self.decoder = TiedReducedDecoder(E, V, heads=HEADS, context=CONTEXT, weight=self.loss.output.weight, **options)

    def forward(self, encoder: Tensor, frames: Any, targets: Any, lengths: Any) -> Tensor:
        """The loss."""
        return self.loss(encoder, self.decoder(targets, lengths), targets, frames, lengths)  # type: ignore[no-any-return]

    def joint(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Logits, for decoding."""
        return self.loss.output(torch.tanh(encoder + predictor))  # type: ignore[no-any-return]


def model_of(dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    torch.manual_seed(3)
    model = Model(**options).to(dtype)
    with torch.no_grad():  # or start and padding would be alike
        for parameter in (model.decoder.norm.weight, model.decoder.norm.bias):
            parameter.add_(torch.randn(E))
    return model


FRAMES = [7, 1, 4, 5]
ENCODER = tensor_of(rng.normal(size=(4, 7, E)))


def naive_features(decoder: TiedReducedDecoder, targets: Tensor) -> Tensor:
    """By torch's own operators."""
    U = targets.shape[1]
    x = torch.nn.functional.pad(decoder.weight[targets.clamp(min=0)], (0, 0, CONTEXT, 0))
    seen = torch.stack([x[:, CONTEXT - 1 - n : CONTEXT + U - n] for n in range(CONTEXT)], 2)  # (B, U+1, N, E)
    scores = torch.einsum("bune,hne->bun", seen, decoder.positions)
    average = (seen * scores[..., None]).sum(2) / (HEADS * CONTEXT)
    return torch.nn.functional.silu(decoder.norm(average @ decoder.projection.weight.T))


def test_the_decoder_is_what_it_says() -> None:
    decoder = model_of().decoder
    inputs = list(decoder.parameters())
    real = torch.arange(6) <= INTEGERS[1][:, None]
    upstream = torch.randn(4, 6, E, dtype=torch.float64) * real[..., None]
    wanted, found = naive_features(decoder, INTEGERS[0]), decoder(*INTEGERS)
    assert error(found[real], wanted[real]) < 1e-14
    for one, exact in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, wanted)), strict=True):
        assert error(one, exact) < 1e-12


def test_both_gradients_add_up() -> None:
    model = model_of()
    apart = copy.deepcopy(model)
    apart.decoder.weight = torch.nn.Parameter(apart.decoder.weight.detach().clone())
    for each in (model, apart):
        each(ENCODER, FRAMES, *INTEGERS).backward()
    of_output, of_embedding = apart.loss.output.weight.grad, apart.decoder.weight.grad
    assert (of_output != 0).any() and (of_embedding != 0).any()
    assert error(model.loss.output.weight.grad, of_output + of_embedding) < 1e-14
    assert model.decoder.weight.grad is model.loss.output.weight.grad


def expect_tied(model: Model) -> None:
    assert model.decoder.weight is model.loss.output.weight
    assert len(list(model.parameters())) == 6  # output (2), positions, projection, norm (2)


def test_the_tie_lasts() -> None:
    model = model_of()
    expect_tied(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
        expect_tied(twin)
        assert twin.decoder.weight is not model.decoder.weight
        assert same(list(twin.parameters()), list(model.parameters()))
        with torch.no_grad():
            twin.loss.output.weight.zero_()
        assert not twin.decoder.weight.any() and model.decoder.weight.any()
    for changed in (copy.deepcopy(model).float(), copy.deepcopy(model).half().double()):
        expect_tied(changed)


def test_the_state() -> None:
    model, other = model_of(), Model().double()
    state = model.state_dict()
    assert {"decoder.weight", "loss.output.weight", "decoder.positions"} <= state.keys()
    other.load_state_dict(state)
    expect_tied(other)
    assert same(list(other.parameters()), list(model.parameters()))
    assert torch.equal(other(ENCODER, FRAMES, *INTEGERS), model(ENCODER, FRAMES, *INTEGERS))
    other.load_state_dict(state, assign=True)  # with other parameters, one for each name
    assert other.decoder.weight is not other.loss.output.weight
    other.decoder.weight = other.loss.output.weight
    expect_tied(other)


def test_a_weight_of_its_own() -> None:
    torch.manual_seed(0)
    decoder = TiedReducedDecoder(E, V)
    assert [name for name, _ in decoder.named_parameters()] == [
        "weight", "positions", "projection.weight", "norm.weight", "norm.bias",
    ]  # fmt: skip
    assert decoder.positions.shape == (4, 5, E) and isinstance(decoder.weight, torch.nn.Parameter)
    output = torch.nn.Linear(E, V)
    output.weight = decoder.weight
    both = torch.nn.ModuleList([decoder, output])
    assert len(list(both.parameters())) == 6
    assert "features=6, classes=9, heads=4, context=5" in repr(decoder)
    meta = TiedReducedDecoder(E, V, device="meta", dtype=torch.float16)
    assert {(each.device.type, each.dtype) for each in meta.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("features", [16, 256])
def test_the_average_starts_as_large_as_an_embedding(features: int) -> None:
    torch.manual_seed(0)
    decoder = TiedReducedDecoder(features, 100)
    rows = reduced_predictor(decoder.weight, decoder.positions, torch.randint(0, 100, (1, 500)), [500])[0, 10:]
    assert 0.7 < rows.square().mean().sqrt() / decoder.weight.square().mean().sqrt() < 1.4


def test_optimisers_move_the_tied_weight_once() -> None:
    model = model_of()
    before = model.decoder.weight.detach().clone()
    model(ENCODER, FRAMES, *INTEGERS).backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    assert torch.equal(model.decoder.weight, before - 0.5 * model.decoder.weight.grad)
    expect_tied(model)


def test_dropout_acts_in_training() -> None:
    model = model_of(dropout=0.5)
    features = model.decoder(*INTEGERS)
    assert 0.2 < float((features == 0).double().mean()) < 0.8
    evaluated = model.decoder.eval()(*INTEGERS)
    assert not (evaluated == 0).any()
    kept = features != 0
    torch.testing.assert_close(features[kept], 2 * evaluated[kept])


# Steps.


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_steps_are_the_rows_of_training(kind: torch.dtype) -> None:
    decoder = model_of().decoder.eval()
    targets = torch.randint(0, V, (5, 8), dtype=kind)
    rows = decoder(targets, torch.full((5,), 8))
    averages = reduced_predictor(decoder.weight, decoder.positions, targets, torch.full((5,), 8))
    features, state = decoder.step(torch.full((5,), -1, dtype=kind))
    for u in range(9):
        assert error(features, rows[:, u]) < 1e-15
        assert torch.equal(reduced_predictor(decoder.weight, decoder.positions, *state, last=True), averages[:, u])
        if u < 8:
            features, state = decoder.step(targets[:, u], state)


def test_states_go_separate_ways() -> None:
    """Rows of a state may be picked, repeated and put together, of prefixes of any length."""
    decoder = model_of().decoder
    prefixes = [[], [1], [2, 3, 4, 5, 6], [7, 7, 0]]
    states, wanted = [], []
    for prefix in prefixes:
        features, state = decoder.step(torch.zeros(1, dtype=torch.int64))
        for label in prefix:
            features, state = decoder.step(torch.tensor([label]), state)
        states.append(state)
        wanted.append(decoder(torch.tensor([[*prefix, 8]]), [len(prefix) + 1])[0, -1])
    together = tuple(torch.cat(parts)[[2, 0, 3, 1, 2]] for parts in zip(*states, strict=True))
    before = [part.clone() for part in together]
    features, _ = decoder.step(torch.full((5,), 8), together)
    assert error(features, torch.stack([wanted[i] for i in (2, 0, 3, 1, 2)])) < 1e-14
    assert same(together, before)  # they are also those of other prefixes


def test_decoding() -> None:
    model = model_of()
    with torch.no_grad():
        model.loss.output.bias[0] = 1.0

    def whole(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        """All labels so far, by the forward pass."""
        seen, count = (labels.new_zeros(len(labels), 40), torch.zeros_like(labels)) if state is None else state
        if state is not None:
            seen = seen.scatter(1, count[:, None], labels[:, None])
            count = count + 1
        rows = model.decoder(seen, count)
        return rows[torch.arange(len(labels)), count], (seen, count)

    one, other = (greedy(ENCODER, FRAMES, step, model.joint, max_symbols=3) for step in (model.decoder.step, whole))
    assert one.labels.shape[1] > CONTEXT and torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.scores, other.scores)
    found, wanted = (beam_search(ENCODER, FRAMES, step, model.joint, beam=3) for step in (model.decoder.step, whole))
    assert torch.equal(found.hypotheses, wanted.hypotheses)
    torch.testing.assert_close(found.scores, wanted.scores)


# Autocast and torch.compile.


def test_autocast_leaves_the_parameters_gradients_in_float32() -> None:
    model = model_of(torch.float32)
    exact = torch.autograd.grad(model(ENCODER.float(), FRAMES, *INTEGERS), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ENCODER.float(), FRAMES, *INTEGERS)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(each.dtype == torch.float32 for each in found)
    assert all(error(one, other) < 0.05 for one, other in zip(found, exact, strict=True))


def test_one_graph_for_all_lengths_and_labels() -> None:
    model = model_of(torch.float32)
    steps = [(*INTEGERS,), (INTEGERS[0].flip(0).clamp(min=0), torch.tensor([1, 5, 4, 0])), (INTEGERS[0] * 0, torch.tensor([0, 0, 1, 5]))]

    def call(encoder: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        return model(encoder, torch.tensor(FRAMES), targets, lengths)

    expect_graphs(1, call, [ENCODER.float()], steps)
    wider = [(torch.ones(4, columns, dtype=torch.int64), torch.tensor([columns, 1, 0, 2])) for columns in (3, 5, 9, 12)]
    expect_graphs(2, call, [ENCODER.float()], wider)


def test_steps_in_a_graph() -> None:
    torch._dynamo.reset()
    decoder = model_of().decoder
    step = torch.compile(decoder.step, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        state = expected_state = None
        for _ in range(5):
            (features, state), (expected, expected_state) = step(labels, state), decoder.step(labels, expected_state)
            assert same([features, *state], [expected, *expected_state])
    torch._dynamo.reset()


# Errors.

WEIGHT = torch.nn.Parameter(torch.ones(V, E))
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "embedding": (lambda: reduced_predictor(EMBEDDING, INPUTS[1], *INTEGERS), TypeError, r"embedding: expected a torch\.Tensor"),
    "positions": (lambda: reduced_predictor(INPUTS[0], POSITIONS, *INTEGERS), TypeError, r"positions: expected a torch\.Tensor"),
    "dtypes": (
        lambda: reduced_predictor(INPUTS[0], INPUTS[1].float(), *INTEGERS), TypeError,
        "positions: expected dtype float64 as embedding, got float32",
    ),
    "features": (
        lambda: reduced_predictor(INPUTS[0][:, 1:], INPUTS[1], *INTEGERS), ValueError, r"positions: .* = \(2, 3, 5\), got \(2, 3, 6\)",
    ),
    "label": (
        lambda: reduced_predictor(*INPUTS, torch.tensor([[1, V]]), [2]), ValueError, r"targets: .*\[0, V = 9\), got 9 at index \(0, 1\)",
    ),
    "length": (lambda: reduced_predictor(*INPUTS, torch.tensor([[1, 2]]), [3]), ValueError, r"target_lengths: .*\[0, U = 2\], got 3"),
    "shape": (lambda: reduced_predictor(*INPUTS, torch.tensor([1, 2]), [2]), ValueError, r"targets: expected shape \(B, U\)"),
    "tensor": (lambda: TiedReducedDecoder(E, V, weight=WEIGHT.detach()), TypeError, r"weight: expected a torch\.nn\.Parameter.*got Tensor"),
    "other sizes": (lambda: TiedReducedDecoder(V, E, weight=WEIGHT), ValueError, r"weight: .*\(V, E\) = \(6, 9\), got \(9, 6\)"),
    "dtype": (
        lambda: TiedReducedDecoder(E, V, weight=WEIGHT, dtype=torch.float64), ValueError,
        r"device, dtype: expected None with weight, which has its own, got None, torch\.float64",
    ),
    "heads": (lambda: TiedReducedDecoder(E, V, heads=0), ValueError, "heads: expected 1 or more, got 0"),
    "context": (lambda: TiedReducedDecoder(E, V, context=2.0), TypeError, "context: expected an int, got float"),
    "dropout": (lambda: TiedReducedDecoder(E, V, dropout=1.0), ValueError, r"dropout: .*\[0, 1\), got 1\.0"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()
