"""EMBR for PyTorch: edit distances and expected edit distances have the core's bits; gradients reach every model that made the losses."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import transducer_loss as tl
from helpers import FLOATS, Array
from naive_torch import WEIGHTS, error, same
from torch_cases import CONTEXTS, array_of, expect_bits, expect_graphs, expect_once, expect_unchanged_inputs, outcome, tensor_of
from transducer_loss import reference
from transducer_loss.adapters.torch import EMBRLoss, JointRNNTLoss, beam_search, edit_distance, embr_loss

BLANK = 2
COUNTS = ("total", "insertions", "deletions", "substitutions")
rng = np.random.default_rng(0)
B, N, L, U = 4, 5, 6, 4
HYPOTHESES = rng.integers(0, 5, (B, N, L))
LENGTHS = np.array([[6, 0, 3, -1, 2], [5, 5, 4, 1, -1], [-1, -1, 2, 6, 1], [3, 3, 0, 6, 4]])
HYPOTHESES[1, 1] = HYPOTHESES[1, 0]
HYPOTHESES[3, 1, :3] = [4, BLANK, 4]
HYPOTHESES[3, 4, :4] = [4, 4, BLANK, BLANK]  # the same after removal of the blanks
HYPOTHESES[np.arange(L) >= LENGTHS[..., None]] = -1
REFERENCES = rng.integers(0, 5, (B, U))
REFERENCE_LENGTHS = np.array([4, 2, 0, 3])
NLL, REFERENCE_NLL = rng.uniform(0.0, 4.0, (B, N)), rng.uniform(1.0, 5.0, B)
DISTANCES = tl.edit_distance(HYPOTHESES, LENGTHS, REFERENCES, REFERENCE_LENGTHS, blank=BLANK).total
NLL[LENGTHS < 0] = np.nan
NLL[2, 4] = np.inf

OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"hypothesis_lengths": LENGTHS}, False),
    "interpolated": ({"hypothesis_lengths": LENGTHS, "interpolation": 0.25}, True),
    "not interpolated": ({"hypothesis_lengths": LENGTHS}, True),
    "merged": ({"hypotheses": HYPOTHESES, "hypothesis_lengths": LENGTHS, "blank": BLANK, "temperature": 1.7}, False),
    "merged with blanks": ({"hypotheses": HYPOTHESES, "hypothesis_lengths": LENGTHS, "interpolation": 1.5}, True),
}
of_each_option = pytest.mark.parametrize(("options", "with_reference"), OPTIONS.values(), ids=OPTIONS)
of_each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def converted(options: dict[str, Any]) -> dict[str, Any]:
    """With tensors for arrays."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


def call_of(options: dict[str, Any], with_reference: bool, **more: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A loss of nll, and of reference_nll; and these, which are finite."""
    inputs = [tensor_of(np.nan_to_num(NLL, posinf=9.0)), *([tensor_of(REFERENCE_NLL)] if with_reference else [])]

    def call(nll: Tensor, reference_nll: Tensor | None = None) -> Tensor:
        return embr_loss(nll, torch.from_numpy(DISTANCES), reference_nll=reference_nll, **converted(options), **more)

    return call, inputs


# Edit distances.


def expect_distances(found: Any, wanted: Any) -> None:
    for name in COUNTS:
        expect_bits(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("blank", [None, BLANK])
def test_distances_have_the_bits_of_the_core(blank: int | None) -> None:
    arrays = HYPOTHESES, LENGTHS, REFERENCES, REFERENCE_LENGTHS
    wanted = tl.edit_distance(*arrays, blank=blank)
    expect_distances(edit_distance(*map(torch.from_numpy, arrays), blank=blank), wanted)
    expect_distances(edit_distance(*(array.tolist() for array in arrays), blank=blank), wanted)
    expect_distances(edit_distance(*arrays, blank=blank), wanted)
    strided = [torch.stack([torch.from_numpy(array.astype(np.int32))] * 2, -1)[..., 0] for array in arrays]
    assert not any(tensor.is_contiguous() for tensor in strided)
    expect_distances(edit_distance(*strided, blank=blank), wanted)
    of_one = HYPOTHESES[:, 0], np.abs(LENGTHS[:, 0]), *arrays[2:]
    expect_distances(edit_distance(*map(torch.from_numpy, of_one), blank=blank), tl.edit_distance(*of_one, blank=blank))
    for b, n in itertools.product(range(B), range(N)):
        if LENGTHS[b, n] >= 0:
            exact = reference.edit_distance(HYPOTHESES[b, n, : LENGTHS[b, n]], REFERENCES[b, : REFERENCE_LENGTHS[b]], blank)
            assert tuple(getattr(wanted, name)[b, n] for name in COUNTS) == exact


def test_distances_in_a_graph() -> None:
    torch._dynamo.reset()
    arrays = list(map(torch.from_numpy, (HYPOTHESES, LENGTHS, REFERENCES, REFERENCE_LENGTHS)))
    call = torch.compile(lambda *arrays: edit_distance(*arrays, blank=BLANK), fullgraph=True, backend="aot_eager")
    expect_distances(call(*arrays), tl.edit_distance(*map(array_of, arrays), blank=BLANK))
    torch._dynamo.reset()
    mode = FakeTensorMode()
    with mode:
        found = edit_distance(*map(mode.from_tensor, arrays))
    assert isinstance(found.total, FakeTensor) and found.total.shape == (B, N) and found.total.dtype == torch.int32


# The loss.


@pytest.mark.parametrize("dtype", FLOATS)
@of_each_reduction
@of_each_option
def test_losses_have_the_bits_of_the_core(options: dict[str, Any], with_reference: bool, reduction: str, dtype: str) -> None:
    inputs = [tensor_of(array, dtype).requires_grad_() for array in (NLL, REFERENCE_NLL)][: 1 + with_reference]
    of_reference = {"reference_nll": inputs[1]} if with_reference else {}
    loss = embr_loss(inputs[0], torch.from_numpy(DISTANCES), reduction=reduction, **of_reference, **converted(options))
    weights = np.array(WEIGHTS) if reduction == "none" else np.full(B, -2.0 if reduction == "sum" else -0.5)
    of_reference = {"reference_nll": array_of(inputs[1])} if with_reference else {}
    wanted, gradients = tl.embr_loss(array_of(inputs[0]), DISTANCES, weights=weights, **of_reference, **options)
    whole = tensor_of(wanted)
    expect_bits(loss, array_of({"mean": whole.mean(), "sum": whole.sum(), "none": whole}[reduction]))
    upstream = torch.tensor(WEIGHTS if reduction == "none" else -2.0, dtype=loss.dtype)
    for _ in range(2):
        found = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        expect_bits(found[0], gradients.nll)
        if with_reference:
            expect_bits(found[1], gradients.reference_nll)
    assert np.isfinite(wanted).all() and (np.asarray(gradients.nll, np.float64) != 0).any()


@of_each_option
def test_losses_of_the_reference(options: dict[str, Any], with_reference: bool) -> None:
    call, inputs = call_of(options, with_reference, reduction="none")
    loss, gradient, *_ = outcome(call, inputs)
    given = {"reference_nll": REFERENCE_NLL} if with_reference else {}
    wanted, by_nll = reference.embr_loss(array_of(inputs[0]), DISTANCES, **given, **options)
    np.testing.assert_allclose(loss, wanted, rtol=1e-14)
    np.testing.assert_allclose(gradient, np.linspace(-2, 2, 2 * B + 1)[:B, None] * by_nll, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(call, [each.requires_grad_() for each in inputs])


def test_equal_distances_have_no_gradient() -> None:
    nll = tensor_of(np.nan_to_num(NLL, posinf=9.0), "float32").requires_grad_()
    (gradient,) = torch.autograd.grad(embr_loss(nll, torch.full((B, N), 0.3), hypothesis_lengths=LENGTHS), nll)
    assert (gradient == 0).all()


@pytest.mark.parametrize("context", CONTEXTS)
@of_each_option
def test_what_is_around_changes_no_bit(options: dict[str, Any], with_reference: bool, context: str) -> None:
    call, inputs = call_of(options, with_reference, reduction="none")
    for kind in (torch.float32, torch.bfloat16):
        given = [each.to(kind) for each in inputs]
        assert same(outcome(CONTEXTS[context](call), given), outcome(call, given))
    torch._dynamo.reset()


@of_each_option
def test_losses_are_differentiated_once(options: dict[str, Any], with_reference: bool) -> None:
    expect_once(*call_of(options, with_reference))
    expect_unchanged_inputs(*call_of(options, with_reference))


def test_one_graph_for_all_lengths_and_distances() -> None:
    def call(nll: Tensor, reference_nll: Tensor, hypotheses: Tensor, lengths: Tensor, references: Tensor, counts: Tensor) -> Tensor:
        edits = edit_distance(hypotheses, lengths, references, counts)
        return embr_loss(
            nll, edits.total / counts.clamp(min=1)[:, None], hypotheses=hypotheses, hypothesis_lengths=lengths,
            reference_nll=reference_nll, interpolation=0.1,
        )  # fmt: skip

    arrays = [torch.from_numpy(array) for array in (HYPOTHESES, LENGTHS, REFERENCES, REFERENCE_LENGTHS)]
    other = [arrays[0].flip(1).contiguous(), arrays[1].flip(1).contiguous(), arrays[2] + 1, torch.tensor([0, 1, 4, 1])]
    inputs = [tensor_of(np.nan_to_num(NLL, posinf=9.0)), tensor_of(REFERENCE_NLL)]
    expect_graphs(1, call, inputs, [tuple(arrays), tuple(other)])


def test_no_gradient_where_none_is_wanted() -> None:
    nll, reference_nll = tensor_of(np.nan_to_num(NLL)).requires_grad_(), tensor_of(REFERENCE_NLL).requires_grad_()
    with torch.no_grad():
        assert not embr_loss(nll, DISTANCES).requires_grad
    loss = embr_loss(nll.detach(), DISTANCES, reference_nll=reference_nll, interpolation=0.5)
    assert torch.autograd.grad(loss, reference_nll)[0].tolist() == [0.125] * B
    loss = embr_loss(nll, DISTANCES, reference_nll=reference_nll.detach(), interpolation=0.5)
    assert (torch.autograd.grad(loss, nll)[0] != 0).any()


def test_infeasible_utterances() -> None:
    nll = torch.tensor([[1.0, 2.0], [np.inf, np.inf], [1.0, np.nan]], requires_grad=True)
    for infeasible, value in (("inf", np.inf), ("zero", 0.0)):
        loss = embr_loss(nll, [[0, 2], [1, 1], [0, 1]], reduction="none", infeasible=infeasible)
        assert loss[1] == value and loss[2].isnan()
        (gradient,) = torch.autograd.grad(loss, nll, torch.tensor([1.0, -3.0, 2.0]))
        assert (gradient[0] != 0).all() and (gradient[1:] == 0).all()
    reference_nll = torch.ones(3, requires_grad=True)
    for infeasible, weight in (("inf", 0.0), ("zero", -1.5)):  # only in the second is there a loss to differentiate
        loss = embr_loss(
            nll, [[0, 2], [1, 1], [0, 1]], reduction="none", infeasible=infeasible, reference_nll=reference_nll, interpolation=0.5
        )
        assert torch.autograd.grad(loss, reference_nll, torch.tensor([1.0, -3.0, 2.0]))[0].tolist() == [0.5, weight, 0.0]
    with pytest.raises(ValueError, match=r"^nll: expected a hypothesis.* got none for utterances \[1\]"):
        embr_loss(nll, [[0, 2], [1, 1], [0, 1]], infeasible="raise")
    loss = embr_loss(nll[:1], [[0, 2]], infeasible="raise")
    assert (torch.autograd.grad(loss, nll)[0][0] != 0).all()


def test_distances_of_any_kind() -> None:
    nll = tensor_of(np.nan_to_num(NLL, posinf=9.0), "float32")
    wanted = embr_loss(nll, torch.from_numpy(DISTANCES))
    for distances in (DISTANCES, DISTANCES.tolist(), torch.from_numpy(DISTANCES).double(), DISTANCES.astype(np.int64).T.copy().T):
        assert torch.equal(embr_loss(nll, distances), wanted)


# The module, and a model.


def test_the_module() -> None:
    options = {"temperature": 1.3, "interpolation": 0.25, "blank": BLANK, "reduction": "none"}
    nll, reference_nll = tensor_of(NLL), tensor_of(REFERENCE_NLL)
    given = {"hypotheses": torch.from_numpy(HYPOTHESES), "hypothesis_lengths": LENGTHS, "reference_nll": reference_nll}
    assert torch.equal(EMBRLoss(**options)(nll, DISTANCES, **given), embr_loss(nll, DISTANCES, **given, **options))
    for name, value, kind, message in (
        ("temprature", 1.0, TypeError, "expected one of blank, .*, got a keyword that is none of them"),
        ("hypotheses", None, TypeError, "expected one of blank, .*, got a keyword that is none of them"),
        ("reduction", "max", ValueError, "expected one of 'mean', .*, got 'max'"),
        ("interpolation", np.inf, ValueError, "expected a finite number, got inf"),
    ):
        with pytest.raises(kind, match=f"^{name}: {message}"):
            EMBRLoss(**{name: value})


class Model(torch.nn.Module):
    def __init__(self, features: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(classes, features)
        self.loss = JointRNNTLoss(features, classes, reduction="none", occupancy_floor=0.0)

    def predictor(self, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Of the last label alone."""
        return self.embedding(labels), None

    def joint(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Logits."""
        return self.loss.output(torch.tanh(encoder + predictor))  # type: ignore[no-any-return]

    def nll(self, encoder: Tensor, frames: Any, labels: Tensor, lengths: Tensor, index: Any = None) -> Tensor:
        """Exact losses."""
        rows = self.embedding(torch.nn.functional.pad(labels, (1, 0)).clamp(min=0))
        return self.loss(encoder, rows, labels, frames, lengths.clamp(min=0), encoder_index=index)  # type: ignore[no-any-return]


def test_a_model_of_an_n_best_list_whose_hypotheses_share_encoders() -> None:
    torch.manual_seed(1)
    model, frames, beam = Model().double(), [9, 4, 1], 4
    encoder = torch.randn(3, 9, 6, dtype=torch.float64, requires_grad=True)
    references, counts = torch.tensor([[1, 2, 3], [4, 4, -1], [-1, -1, -1]]), torch.tensor([3, 2, 0])
    found = beam_search(encoder, frames, model.predictor, model.joint, beam=beam, nbest=beam)
    assert (found.lengths >= 0).all()
    edits = edit_distance(found.hypotheses, found.lengths, references, counts)
    labels, lengths = found.hypotheses.flatten(0, 1), found.lengths.flatten()

    def loss(shared: bool) -> Tensor:
        index = [b for b in range(3) for _ in range(beam)]
        rows, given = (encoder, frames) if shared else (encoder[index], [frames[b] for b in index])
        nll = model.nll(rows, given, labels, lengths, index if shared else None)
        return embr_loss(
            nll.view(3, beam), edits.total, hypotheses=found.hypotheses, hypothesis_lengths=found.lengths, interpolation=0.1,
            reference_nll=model.nll(encoder, frames, references, counts),
        )  # fmt: skip

    inputs = [encoder, *model.parameters()]
    one, other = (torch.autograd.grad(loss(shared), inputs) for shared in (True, False))
    assert all(error(a, b) < 1e-12 for a, b in zip(one, other, strict=True))

    # The same by torch's own operators, of losses that only know about the gradient they are multiplied with.
    nll = model.nll(encoder, frames, labels, lengths, [b for b in range(3) for _ in range(beam)]).view(3, beam)
    risk = (torch.softmax(-nll, 1) * edits.total).sum(1) + 0.1 * model.nll(encoder, frames, references, counts)
    torch.testing.assert_close(risk.mean(), loss(True), rtol=1e-13, atol=0.0)
    assert all(error(a, b) < 1e-12 for a, b in zip(one, torch.autograd.grad(risk.mean(), inputs), strict=True))


ONES: Array = np.ones((B, N))
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nll": (lambda: embr_loss(ONES, DISTANCES), TypeError, r"nll: expected a torch\.Tensor, got ndarray"),
    "dtype": (lambda: embr_loss(torch.ones(B, N).int(), DISTANCES), TypeError, r"nll: expected dtype .*, got int32"),
    "dimensions": (lambda: embr_loss(torch.ones(B * N), DISTANCES), ValueError, r"nll: expected 2 dimensions \(B, N\)"),
    "distances": (
        lambda: embr_loss(torch.ones(B, N), DISTANCES[:, 1:]), ValueError, r"distances: .*\(B, N\) = \(4, 5\), got \(4, 4\)",
    ),
    "words": (lambda: embr_loss(torch.ones(1, 1), [["a"]]), ValueError, r"distances: expected numbers, got \[\['a'\]\]"),
    "counts": (
        lambda: embr_loss(torch.ones(1, 1), edit_distance([[1]], [1], [[1]], [1])), TypeError,
        r"distances: expected an array with __dlpack__, got EditDistance",
    ),
    "learned": (
        lambda: embr_loss(torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)), ValueError,
        r"distances: expected numbers without gradient, got a tensor that requires one",
    ),
    "reference": (
        lambda: embr_loss(torch.ones(B, N), DISTANCES, interpolation=0.5), ValueError, r"reference_nll: .*interpolation=0.5, got None",
    ),
    "other dtype": (
        lambda: embr_loss(torch.ones(B, N), DISTANCES, reference_nll=torch.ones(B).double()), TypeError,
        r"reference_nll: expected dtype float32 as nll, got float64",
    ),
    "no lengths": (
        lambda: embr_loss(torch.ones(B, N), DISTANCES, hypotheses=torch.from_numpy(HYPOTHESES)), ValueError,
        r"hypothesis_lengths: expected an array of shape \(B, N\) with hypotheses, got None",
    ),
    "temperature": (lambda: embr_loss(torch.ones(B, N), DISTANCES, temperature=0), ValueError, "temperature: .* more than 0, got 0"),
    "interpolation": (lambda: embr_loss(torch.ones(B, N), DISTANCES, interpolation=-1), ValueError, "interpolation: .*, got -1"),
    "reduction": (lambda: embr_loss(torch.ones(B, N), DISTANCES, reduction="max"), ValueError, "reduction: expected one of"),
    "hypothesis lengths": (
        lambda: edit_distance([[1, 2]], [3], [[1]], [1]), ValueError, r"hypothesis_lengths: .*\[-1, L = 2\], got 3 at index 0",
    ),
    "references": (
        lambda: edit_distance([[1, 2]], [2], torch.ones(2, 3).int(), [1]), ValueError, r"references: .* = \(1, U\), got \(2, 3\)",
    ),
    "labels": (lambda: edit_distance(torch.ones(1, 2), [2], [[1]], [1]), TypeError, "hypotheses: expected integers, got dtype float32"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()
