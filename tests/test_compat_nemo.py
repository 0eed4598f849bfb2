"""NeMo's losses by their own names, its resolver patched, and its joint fused: against a stand-in for NeMo."""

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import nemo_stub
from compat_cases import every_vector, expect_vector, of_core, padded_case, spied
from naive_torch import DTYPES, WEIGHTS, Case, case, leaves, naive_rnnt_loss, same
from nemo_stub import RNNTJoint
from transducer_loss.adapters.compat import nemo, warprnnt_pytorch
from transducer_loss.adapters.compat.nemo import FusedJoint, RNNTLoss, RNNTLossNumba

EXACT = {"rtol": 1e-12, "atol": 1e-12}
REDUCTIONS = ("mean_batch", "mean", "mean_volume", "sum", None)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for ``nemo.collections.asr.losses.rnnt``."""
    return nemo_stub.installed(monkeypatch)


def lengths(of: Case) -> tuple[Tensor, Tensor]:
    return torch.tensor(of.frames), torch.tensor(of.labels)


def reduced(losses: Tensor, labels: list[int], reduction: str | None) -> Tensor:
    """The sentences of NeMo's docstring."""
    if reduction == "mean_batch":
        return losses.sum() / len(losses)
    if reduction == "mean":
        return sum(loss / U for loss, U in zip(losses, labels, strict=True)) / len(losses)
    if reduction == "mean_volume":
        return losses.sum() / sum(labels)
    return losses.sum() if reduction == "sum" else losses


# The inner loss.


@every_vector
def test_vectors(vector: dict[str, Any]) -> None:
    loss = RNNTLossNumba(vector["blank"], "none", vector.get("fastemit_lambda", 0.0), vector.get("clamp", -1))
    expect_vector(vector, lambda *tensors: loss(**dict(zip(("acts", "labels", "act_lens", "label_lens"), tensors, strict=True))), reported=True, clamps=True)
    loss.clamp = 0.0
    expect_vector(vector, lambda x, *integers: loss(x.log_softmax(-1), *integers), reported=True)


@every_vector
def test_vectors_of_the_outer_loss(vector: dict[str, Any]) -> None:
    """Whose blank is the last class: where it is another, classes are renumbered."""
    classes = len(vector["logits"][0][0][0])
    order = [v for v in range(classes) if v != vector["blank"]] + [vector["blank"]]
    back = torch.tensor([order.index(v) for v in range(classes)])
    options = {name: vector[name] for name in ("fastemit_lambda", "clamp") if name in vector}
    loss = RNNTLoss(classes - 1, None, loss_kwargs=options)

    def drop_in(x: Tensor, targets: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        return loss(log_probs=x[..., order], targets=back[targets.long()], input_lengths=frames, target_lengths=labels)

    expect_vector(vector, drop_in, reported=True, clamps=True)


def test_signatures() -> None:
    defaults = {"blank": 0, "reduction": "mean", "fastemit_lambda": 0.0, "clamp": -1}
    parameters = inspect.signature(RNNTLossNumba).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == defaults
    assert list(inspect.signature(RNNTLossNumba.forward).parameters)[1:] == ["acts", "labels", "act_lens", "label_lens"]
    assert list(inspect.signature(RNNTLoss).parameters) == ["num_classes", "reduction", "loss_name", "loss_kwargs"]
    assert list(inspect.signature(RNNTLoss.forward).parameters)[1:] == ["log_probs", "targets", "input_lengths", "target_lengths"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_core_with_strides_and_padding(dtype: torch.dtype) -> None:
    of, x, targets = padded_case(dtype)
    loss = RNNTLossNumba(reduction="none")(acts=x, labels=targets, act_lens=torch.tensor(of.frames), label_lens=torch.tensor(of.labels))
    upstream = torch.tensor(WEIGHTS, dtype=loss.dtype)
    first, second = (torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert same((loss, first), of_core(x, of, WEIGHTS))
    assert torch.equal(first, second)


@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.01, 1.5])
@pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
def test_fastemit_is_reported_and_not_in_the_gradient_twice(fastemit_lambda: float, reduction: str | None) -> None:
    of = case()
    (x,) = leaves(of.logits)
    loss = RNNTLossNumba(0, reduction, fastemit_lambda)(x, of.targets, *lengths(of))
    share = [0.25 if reduction == "mean" else 1.0] * 4
    of_losses, gradient = of_core(of.logits, of, share, fastemit_lambda=fastemit_lambda)
    wanted = (1.0 + fastemit_lambda) * share[0] * of_losses
    torch.testing.assert_close(loss, wanted if reduction in (None, "none") else wanted.sum()[None], **EXACT)
    torch.testing.assert_close(torch.autograd.grad(-2.0 * loss.sum(), x)[0], -2.0 * gradient, **EXACT)


@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.5])
def test_the_cost_of_no_path_stays_what_it_is(fastemit_lambda: float) -> None:
    of = case()
    logits = of.logits.clone()
    logits[0, :, :, 0], logits[2, 0, 0] = -torch.inf, torch.nan
    loss = RNNTLossNumba(0, None, fastemit_lambda)(logits, of.targets, *lengths(of))
    assert loss[0] == torch.inf
    assert loss[2].isnan()


@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.5])
def test_clamp_comes_before_reduction_and_upstream(fastemit_lambda: float) -> None:
    of, clamp = case(), 0.1
    (x,) = leaves(of.logits)
    _, plain = of_core(of.logits, of, [1.0] * 4, fastemit_lambda=fastemit_lambda)
    loss = RNNTLossNumba(0, "mean", fastemit_lambda, clamp)(x, of.targets, *lengths(of))
    assert plain.abs().max() > clamp
    torch.testing.assert_close(torch.autograd.grad(-8.0 * loss, x)[0], -8.0 / 4 * plain.clamp(-clamp, clamp), **EXACT)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, targets = padded_case(torch.float32)
    calls = spied(monkeypatch)
    RNNTLossNumba()(x, targets, of.frames, of.labels)
    RNNTLoss(0)(x, targets, of.frames, torch.tensor(of.labels))
    for call in calls:
        assert call[0] is x
        assert call[1] is targets


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: RNNTLossNumba(clamp="1"), TypeError, "clamp: expected a number, got str"),
        (lambda: RNNTLoss(4, "batch"), ValueError, "reduction: expected one of 'mean_batch', .* got 'batch'"),
        (lambda: RNNTLoss(4, loss_name="tdt"), ValueError, "loss_name: expected one of 'default', .* got 'tdt'"),
        (lambda: RNNTLoss(4, loss_kwargs={"sigma": 0.1}), TypeError, ".*sigma"),
    ],
)
def test_wrong_options_are_named(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        make()


# The outer loss.


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_the_outer_loss(reduction: str | None) -> None:
    of = case((9, 1, 7, 4), (5, 1, 3, 4))
    x, naive = leaves(of.logits, of.logits)
    loss = RNNTLoss(0)
    assert loss.reduction == "mean_batch"
    loss.reduction = reduction  # NeMo changes it between calls
    frames, labels = lengths(of)
    value = loss(log_probs=x, targets=of.targets, input_lengths=frames, target_lengths=labels)
    exact = reduced(naive_rnnt_loss(naive, *of.integers), of.labels, reduction)
    torch.testing.assert_close(value, exact, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(-2.0 * value.sum(), x), torch.autograd.grad(-2.0 * exact.sum(), naive), **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts_of_a_batch(reduction: str | None) -> None:
    of = case((9, 1, 7, 4), (5, 1, 3, 4))
    losses = naive_rnnt_loss(of.logits, *of.integers)
    value = RNNTLoss(0, reduction).reduce([losses[:3], losses[3:]], [torch.tensor(of.labels[:3]), torch.tensor(of.labels[3:])])
    torch.testing.assert_close(value, reduced(losses, of.labels, reduction), **EXACT)


# The resolver.


@pytest.mark.parametrize("config", [nemo_stub.RNNTLossConfig, nemo_stub.OldConfig])
@pytest.mark.parametrize("loss_name", ["default", "warprnnt_numba", "transducer_loss"])
def test_install(monkeypatch: pytest.MonkeyPatch, config: Any, loss_name: str) -> None:
    resolver = nemo_stub.installed(monkeypatch, config)
    with pytest.raises((ImportError, ValueError)):  # no numba here
        resolver.RNNTLoss(4, loss_name=loss_name)
    nemo.install()
    loss = resolver.RNNTLoss(4, loss_name=loss_name, loss_kwargs={"fastemit_lambda": 0.25, "clamp": 0.5, "sigma": 0.1})
    assert type(loss._loss) is RNNTLossNumba
    assert (loss._loss.blank, loss._loss.fastemit_lambda, loss._loss.clamp) == (4, 0.25, 0.5)
    assert resolver.warned == [("transducer_loss" if loss_name == "transducer_loss" else "warprnnt_numba", {"sigma": 0.1})]
    assert not loss._force_float32


@pytest.mark.parametrize("config", [nemo_stub.RNNTLossConfig, nemo_stub.OldConfig])
@pytest.mark.parametrize("names", [(), ("warprnnt_numba", "warprnnt", "pytorch")])
def test_uninstall(monkeypatch: pytest.MonkeyPatch, config: Any, names: tuple[str, ...]) -> None:
    def entries() -> dict[str, Any]:
        return {name: dict(vars(entry)) for name, entry in resolver.RNNT_LOSS_RESOLVER.items()}

    resolver = nemo_stub.installed(monkeypatch, config)
    original, before = resolver.resolve_rnnt_loss, entries()
    nemo.uninstall()  # nothing to undo
    nemo.install(*names)
    nemo.install(*names)  # again is the same as once
    assert resolver.resolve_rnnt_loss is not original
    nemo.uninstall()
    nemo.uninstall()
    assert resolver.resolve_rnnt_loss is original
    assert entries() == before
    assert resolver.RNNT_LOSS_RESOLVER["default"] is resolver.RNNT_LOSS_RESOLVER["warprnnt_numba"]


def test_others_stay_with_nemo(resolver: Any) -> None:
    nemo.install()
    kinds = {
        "tdt_pytorch": nemo_stub.TDTLossPytorch, "graph_w_transducer": nemo_stub.GraphWTransducerLoss,
        "pytorch": nemo_stub.RNNTLossPytorch, "multiblank_rnnt_pytorch": nemo_stub.RNNTLossPytorch,
    }  # fmt: skip
    for name, kind in kinds.items():
        assert type(resolver.RNNTLoss(4, loss_name=name)._loss) is kind
    with pytest.raises(ImportError):
        resolver.RNNTLoss(4, loss_name="warprnnt")
    with pytest.raises(ValueError, match="no loss"):
        resolver.RNNTLoss(4, loss_name="ctc")
    nemo.install("warprnnt", "pytorch")
    for name, kind in (("warprnnt", RNNTLossNumba), ("pytorch", RNNTLossNumba), ("multiblank_rnnt_pytorch", nemo_stub.RNNTLossPytorch)):
        assert type(resolver.RNNTLoss(4, loss_name=name)._loss) is kind
    with pytest.raises(ImportError):
        resolver.RNNTLoss(4)


def test_only_what_can_be_replaced_is_installed(resolver: Any) -> None:
    with pytest.raises(ValueError, match=r"^names: expected one of 'warprnnt_numba', 'warprnnt', 'pytorch', got 'tdt'"):
        nemo.install("tdt")
    assert not hasattr(resolver.resolve_rnnt_loss, "before")
    assert "transducer_loss" not in resolver.RNNT_LOSS_RESOLVER
    nemo.install()
    with pytest.raises(ValueError, match=r"^names: expected"):
        nemo.install("tdt")
    assert type(resolver.RNNTLoss(4)._loss) is RNNTLossNumba  # what was installed stays


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nemo_calls_it(resolver: Any, dtype: torch.dtype, reduction: str | None) -> None:
    """NeMo's own wrapper around ours, and ours alone, give the same bits; half logits come as they are."""
    nemo.install()
    of = case((9, 2, 7, 4), (5, 1, 3, 4))
    frames, labels = lengths(of)
    outer, ours = resolver.RNNTLoss(12, reduction), RNNTLoss(12, reduction)
    targets = of.targets.clamp(min=1) - 1
    values, gradients = [], []
    for loss in (outer, ours):
        (x,) = leaves(of.logits, dtype=dtype)
        values.append(loss(log_probs=x, targets=targets, input_lengths=frames, target_lengths=labels))
        gradients.append(torch.autograd.grad(values[-1].sum(), x)[0])
    assert same(values[:1], values[1:])
    assert same(gradients[:1], gradients[1:])


# The joint.

ACTIVATIONS = {"relu": lambda: torch.nn.ReLU(inplace=True), "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh}


class WER:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, encoder: Tensor, *rest: Any) -> tuple[int, int]:
        assert not encoder.requires_grad
        self.calls.append((encoder, *rest))
        return len(encoder), 4


def joint_batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """As NeMo passes it: features before time, and padding."""
    generator = torch.Generator().manual_seed(0)
    frames, labels = torch.tensor([7, 3, 5, 1]), torch.tensor([4, 2, 1, 1])
    return {
        "encoder_outputs": torch.randn(4, 5, 7, generator=generator, dtype=dtype).requires_grad_(),
        "decoder_outputs": torch.randn(4, 6, 5, generator=generator, dtype=dtype).requires_grad_(),
        "encoder_lengths": frames,
        "transcripts": torch.randint(0, 9, (4, 4), generator=generator),
        "transcript_lengths": labels,
    }


def joints(activation: str = "relu", reduction: str | None = "mean_batch", **options: Any) -> tuple[RNNTJoint, FusedJoint]:
    """One of NeMo with its loss, and ours around a copy of it."""
    torch.manual_seed(0)
    joint = RNNTJoint(5, 6, 8, 9, ACTIVATIONS[activation](), fused=3, **options).double()
    twin = copy.deepcopy(joint)
    for each in (joint, twin):
        each.set_loss(nemo_stub.losses_rnnt().RNNTLoss(9, reduction, "pytorch"))
        each.set_wer(WER())
    return joint, FusedJoint(twin, occupancy_floor=0.0)


def gradients(loss: Tensor, joint: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    inputs = [*joint.parameters(), batch["encoder_outputs"], batch["decoder_outputs"]]
    return list(torch.autograd.grad(-1.5 * loss.sum(), inputs))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_joint_is_the_same(activation: str, reduction: str | None) -> None:
    joint, fused = joints(activation, reduction)
    batch = joint_batch()
    wanted, *nothing = joint(**batch)
    loss, *wer = fused(**batch)
    assert wer == nothing == [None] * 3
    torch.testing.assert_close(loss, wanted, **EXACT)
    for mine, theirs in zip(gradients(loss, fused, batch), gradients(wanted, joint, batch), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = joints()
    calls = spied(monkeypatch, "joint_rnnt_loss")
    sizes: list[int] = []
    for module in fused.modules():
        module.register_forward_hook(lambda _, __, out: sizes.append(out.numel()) if isinstance(out, Tensor) else None)
    fused(**joint_batch())[0].backward()
    assert len(calls) == 1
    assert calls[0][2] is fused.joint_net[-1].weight
    assert sizes == [4 * 7 * 8, 4 * 5 * 8]  # the two projections


def test_parameters_keep_their_names() -> None:
    joint, fused = joints(dropout=0.5)
    assert list(fused.state_dict()) == list(joint.state_dict())
    fused.load_state_dict(joint.state_dict())
    assert all(mine is theirs for mine, theirs in zip(fused.parameters(), fused.peer.parameters(), strict=True))
    again = copy.deepcopy(fused)
    assert all(mine is theirs for mine, theirs in zip(again.parameters(), again.peer.parameters(), strict=True))
    assert again.peer is not fused.peer
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file)) == list(joint.state_dict())


def test_the_rest_is_the_joints_own() -> None:
    joint, fused = joints()
    assert fused.num_classes_with_blank == 10
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    assert torch.equal(fused.project_encoder(x), joint.project_encoder(x))
    fused.eval()
    assert not fused.peer.training
    fused.train()
    assert fused.peer.training
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fused.nothing_of_the_kind  # noqa: B018
    fused.set_fuse_loss_wer(False)
    batch = joint_batch()
    logits = fused(encoder_outputs=batch["encoder_outputs"], decoder_outputs=batch["decoder_outputs"])
    assert logits.shape == (4, 7, 5, 10)


@pytest.mark.parametrize("with_loss", [True, False])
def test_word_error_rate(with_loss: bool) -> None:
    joint, fused = joints()
    batch: dict[str, Any] = joint_batch()
    if not with_loss:
        batch["decoder_outputs"] = None
    wanted, *rates = joint(**batch, compute_wer=True, keep_hypotheses=True)
    loss, *mine = fused(**batch, compute_wer=True, keep_hypotheses=True)
    assert mine == rates == [0.5, 4, 8]
    for call, of_joint in zip(fused.wer.calls, joint.wer.calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(call[:4], of_joint[:4], strict=True))
        assert call[4] is of_joint[4] is True
    if with_loss:
        torch.testing.assert_close(loss, wanted, **EXACT)
    else:
        assert loss is wanted is None


@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.5])
def test_fastemit_of_the_joint(resolver: Any, fastemit_lambda: float) -> None:
    """As our loss of the joint's logits."""
    nemo.install()
    joint, fused = joints("tanh")
    loss = resolver.RNNTLoss(9, loss_kwargs={"fastemit_lambda": fastemit_lambda})
    joint.set_loss(loss)
    fused.set_loss(loss)
    batch = joint_batch()
    wanted, value = joint(**batch)[0], fused(**batch)[0]
    torch.testing.assert_close(value, wanted, **EXACT)
    for mine, theirs in zip(gradients(value, fused, batch), gradients(wanted, joint, batch), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_dropout_acts_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = joints(dropout=0.25)
    batch = joint_batch()
    torch.manual_seed(1)
    first, second = fused(**batch)[0], fused(**batch)[0]
    torch.manual_seed(1)
    assert torch.equal(fused(**batch)[0], first)
    assert not torch.equal(first, second)
    plain = joints()[1]
    plain.load_state_dict({name.replace("joint_net.2", "joint_net.1"): value for name, value in fused.state_dict().items()})
    assert torch.equal(fused.eval()(**batch)[0], plain(**batch)[0])


def test_padding_and_no_labels() -> None:
    """More padding than the longest utterance, -1 in it, and an utterance without labels, which the joint alone cannot have."""
    joint, fused = joints()
    batch = joint_batch()
    wanted = joint(**batch)[0]
    longer: dict[str, Any] = {
        **batch, "encoder_outputs": torch.nn.functional.pad(batch["encoder_outputs"], (0, 3)),
        "decoder_outputs": torch.nn.functional.pad(batch["decoder_outputs"], (0, 2)),
        "transcripts": torch.nn.functional.pad(batch["transcripts"], (0, 1)).to(torch.int32),
    }  # fmt: skip
    longer["transcripts"][torch.arange(5) >= batch["transcript_lengths"][:, None]] = -1
    loss = fused(**longer)[0]
    torch.testing.assert_close(loss, wanted, **EXACT)
    for mine, theirs in zip(gradients(loss, fused, batch), gradients(wanted, joint, batch), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)

    longer["transcript_lengths"] = torch.tensor([4, 0, 1, 1])
    shorter = fused(**longer)[0]
    shorter.backward()
    assert shorter.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in fused.parameters())


def test_the_joint_under_autocast() -> None:
    """Half projections, a loss in float32, gradients in float32: close to those without."""
    _, fused = joints()
    fused.float()
    batch = joint_batch(torch.float32)
    exact = fused(**batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(**batch)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for mine, theirs in zip(gradients(loss, fused, batch), gradients(exact, fused, batch), strict=True):
        assert mine.dtype == torch.float32
        assert torch.linalg.vector_norm(mine - theirs) <= 0.05 * torch.linalg.vector_norm(theirs)


def test_what_the_loss_says_is_not_said_again() -> None:
    fused = FusedJoint(joints()[0], reduction="sum")
    with pytest.raises(TypeError, match="reduction"):
        fused(**joint_batch())


def test_a_joint_that_was_not_fused() -> None:
    joint = RNNTJoint(5, 6, 8, 9, torch.nn.Tanh()).double()
    loss = nemo_stub.losses_rnnt().RNNTLoss(9, "sum", "pytorch")
    fused = FusedJoint(joint, loss, WER(), workspace="1MiB")
    assert fused.fuse_loss_wer
    value, *rates = fused(**joint_batch(), compute_wer=True)
    assert value.shape == ()
    assert rates == [1.0, 4, 4]
    assert len(fused.wer.calls) == 1  # the whole batch


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        (lambda: RNNTJoint(5, 6, 8, 9, torch.nn.GELU()), "joint: expected joint_net of activation, dropout and Linear"),
        (lambda: RNNTJoint(5, 6, 8, 9, torch.nn.Sequential(torch.nn.Tanh())), "joint: expected joint_net of activation"),
        (lambda: RNNTJoint(5, 6, 8, 9, torch.nn.Tanh(), num_extra_outputs=3), "joint: expected no extra outputs"),
        (lambda: RNNTJoint(5, 6, 8, 9, torch.nn.Tanh(), masking_prob=0.5), "joint: expected no extra outputs and no masking_prob"),
        (lambda: nemo_stub.SampledRNNTJoint(5, 6, 8, 9, torch.nn.Tanh()), "joint: expected NeMo's RNNTJoint itself, got SampledRNNTJoint"),
    ],
)
def test_other_joints_are_refused(joint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        FusedJoint(joint())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fused: fused.set_loss(nemo_stub.losses_rnnt().RNNTLoss(9, loss_name="tdt_pytorch")), "loss: expected NeMo's plain .* got TDTLossPytorch"),
        (
            lambda fused: fused.set_loss(nemo_stub.losses_rnnt().RNNTLoss(9, loss_name="graph_w_transducer")),
            "loss: expected NeMo's plain RNN-T loss, one of RNNTLossNumba, .* got GraphWTransducerLoss",
        ),
        (lambda fused: fused.set_loss(None), r"loss: expected one, as of FusedJoint\(model.joint, model.loss, model.wer\), got None"),
        (lambda fused: setattr(fused.peer, "temperature", 2.0), "joint: expected a temperature of 1, got 2.0"),
        (lambda fused: setattr(fused.loss._loss, "clamp", 0.5), "joint: expected neither adapters nor a loss with clamp"),
        (lambda fused: setattr(fused.peer, "adapters", True), "joint: expected neither adapters nor a loss with clamp"),
    ],
)
def test_other_losses_are_refused(change: Any, message: str) -> None:
    _, fused = joints()
    change(fused)
    with pytest.raises(ValueError, match=f"^{message}"):
        fused(**joint_batch())


@pytest.mark.parametrize("loss_name", ["warprnnt", "pytorch"])
def test_plain_losses_of_other_names(loss_name: str) -> None:
    """Only NeMo's loss in Numba reports (1 + lambda) times the likelihood."""
    _, fused = joints()
    wanted = fused(**joint_batch())[0]
    if loss_name == "warprnnt":
        fused.loss._loss = warprnnt_pytorch.RNNTLoss(9, None, fastemit_lambda=0.5)
    assert torch.equal(fused(**joint_batch())[0], wanted)


# Errors of calls.

wrong_arguments = pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("acts", None, TypeError, "expected a torch.Tensor, got NoneType"),
        ("labels", None, TypeError, "expected .* got NoneType"),
        ("labels", torch.full((4, 5), 13), ValueError, r"expected labels in \[0, V = 13\), got 13"),
        ("act_lens", torch.tensor([10, 2, 7, 4]), ValueError, r"expected lengths in \[1, T = 9\], got 10 at index 0"),
        ("label_lens", torch.tensor([6, 0, 3, 4]), ValueError, r"expected lengths in \[0, U = 5\], got 6 at index 0"),
    ],
)


@wrong_arguments
def test_wrong_arguments_are_named(name: str, value: Any, kind: type[Exception], message: str) -> None:
    """As each of the two conventions has them."""
    of = case((9, 2, 7, 4), (5, 0, 3, 4))
    frames, labels = lengths(of)
    inner = {"acts": of.logits, "labels": of.targets.clamp(min=0), "act_lens": frames, "label_lens": labels, name: value}
    with pytest.raises(kind, match=f"^{name}: {message}"):
        RNNTLossNumba()(**inner)
    outer = {"acts": "log_probs", "labels": "targets", "act_lens": "input_lengths", "label_lens": "target_lengths"}
    with pytest.raises(kind, match=f"^{outer[name]}: {message}"):
        RNNTLoss(0)(**{outer[key]: each for key, each in inner.items()})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_lengths", None, "expected integers, as fuse_loss_wer is set, got None"),
        ("transcripts", None, "expected integers, as fuse_loss_wer is set, got None"),
        ("transcript_lengths", None, "expected integers, as fuse_loss_wer is set, got None"),
        ("encoder_lengths", torch.tensor([8, 3, 5, 1]), r"expected lengths in \[1, T = 7\], got 8"),
        ("transcripts", torch.full((4, 4), 10), r"expected labels in \[0, V = 10\), got 10"),
        ("transcript_lengths", torch.tensor([5, 2, 1, 1]), "expected lengths in .* got 5"),
        ("decoder_outputs", torch.zeros(3, 6, 5, dtype=torch.float64), "expected"),
    ],
)
def test_wrong_arguments_of_the_joint_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        joints()[1](**{**joint_batch(), name: value})
