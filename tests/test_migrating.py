"""What docs/migrating.md says of recipes: each one's calls, with its arguments and dtypes, against the loss in float64."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nemo_stub
from helpers import run_python
from naive_torch import Case, case, error, leaves, naive_rnnt_loss, same
from transducer_loss.adapters.compat import nemo, optimized_transducer, torchaudio, warp_rnnt, warprnnt_pytorch
from transducer_loss.adapters.torch import joint_rnnt_loss
from transducer_loss.check import budgets

DOCUMENT = Path(__file__).parents[1] / "docs" / "migrating.md"
B, T, H, V = 4, 9, 6, 13
# No utterance of SpeechBrain's relative lengths, nor of these recipes, is without labels.
FRAMES, LABELS = [9, 2, 7, 4], [5, 1, 3, 4]


class Model(torch.nn.Module):
    """Encodings in, logits out, by a joint of ESPnet's names; float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin_enc, self.lin_dec = torch.nn.Linear(5, H), torch.nn.Linear(7, H, bias=False)
        self.lin_out = torch.nn.Linear(H, V)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.lin_out(torch.tanh(self.lin_enc(encoder_out) + self.lin_dec(decoder_out)))

    def logits(self, of: Case, encodings: tuple[Tensor, Tensor]) -> Tensor:
        return self(encodings[0].unsqueeze(2), encodings[1].unsqueeze(1))


def batch() -> tuple[Case, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return case(FRAMES, LABELS, V, H), (torch.randn(B, T, 5, generator=generator), torch.randn(B, 6, 7, generator=generator))


def int32(of: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Targets padded with 0, and lengths."""
    targets = of.targets.clamp(min=0).to(torch.int32)
    return targets, *(torch.tensor(each, dtype=torch.int32) for each in (of.frames, of.labels))


def blank_last(x: Tensor) -> Tensor:
    return torch.cat([x[..., 1:], x[..., :1]], -1)


def expect_recipe(loss_of: Callable[[Model, Case, Any], Tensor], exact_of: Callable[[Tensor, Case], Tensor], shape: tuple[int, ...] = (),
                  clamped: Callable[[Tensor], Tensor] | None = None) -> None:  # fmt: skip
    """Raise unless a recipe's loss and the gradients of its model are those of the naive losses (B,) in float64, reduced by `exact_of`.

    The gradient by the logits is `clamped` on its way.
    """
    of, encodings = batch()
    model, exact_model = Model(), Model().double()
    loss = loss_of(model, of, encodings)
    assert loss.shape == shape
    assert loss.dtype == torch.float32
    logits = exact_model.logits(of, tuple(each.double() for each in encodings))
    if clamped is not None:
        logits.register_hook(clamped)
    exact = exact_of(naive_rnnt_loss(logits, *of.integers), of)
    loss_budget, budget = budgets("joint_rnnt_loss", "float32", "cpu")
    assert error(loss.reshape(()), exact) <= 4 * loss_budget
    gradients = torch.autograd.grad(loss.reshape(()), list(model.parameters()))
    for gradient, wanted in zip(gradients, torch.autograd.grad(exact, list(exact_model.parameters())), strict=True):
        assert error(gradient, wanted) <= 4 * budget  # torch's own products add theirs


def mean(losses: Tensor, of: Case) -> Tensor:
    return losses.mean()


def total(losses: Tensor, of: Case) -> Tensor:
    return losses.sum()


# ESPnet.


@pytest.mark.parametrize("options", [{"reduction": "mean", "fastemit_lambda": 0.0}, {"blank": 0, "fastemit_lambda": 0.0}], ids=["standalone", "asr"])
def test_espnet(options: dict[str, Any]) -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        return warprnnt_pytorch.RNNTLoss(**options)(model.logits(of, encodings), *int32(of))

    expect_recipe(loss_of, mean, (1,))


# The lines of ESPnet's model that the document's diffs are of, with as much around them as makes them run.
ESPNET = """
import torch

class ESPnetModel(torch.nn.Module):
    def __init__(self, joint_network, fastemit_lambda):
        super().__init__()
        self.joint_network, self.fastemit_lambda, self.criterion_transducer = joint_network, fastemit_lambda, None

    def forward(self, encoder_out, decoder_out, target, t_len, u_len):
        joint_out = self.joint_network(
            encoder_out.unsqueeze(2), decoder_out.unsqueeze(1)
        )
        return self._calc_transducer_loss(
            encoder_out,
            joint_out,
            target,
            t_len,
            u_len,
        )

    def _calc_transducer_loss(
        self,
        encoder_out: torch.Tensor,
        joint_out: torch.Tensor,
        target: torch.Tensor,
        t_len: torch.Tensor,
        u_len: torch.Tensor,
    ):
        if self.criterion_transducer is None:
            try:
                from warprnnt_pytorch import RNNTLoss
                self.criterion_transducer = RNNTLoss(reduction="mean", fastemit_lambda=self.fastemit_lambda)
            except ImportError:
                raise SystemExit(1)
        loss_transducer = self.criterion_transducer(
            joint_out,
            target,
            t_len,
            u_len,
        )
        return loss_transducer
"""


def patched(source: str, diff: str) -> str:
    """As ``patch`` would, whose hunks each fit one place."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert source.count(before) == 1 or not hunk, hunk
        source = source.replace(before, after) if hunk else source
    return source


def espnet(fastemit_lambda: float, diffs: int) -> Callable[[Model, Case, Any], Tensor]:
    """Its model with the first of the document's diffs."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## ESPnet")[1].split("\n## ")[0]
    source = ESPNET
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL)[:diffs]:
        source = patched(source, diff)
    names: dict[str, Any] = {}
    exec(source, names)
    return lambda model, of, encodings: names["ESPnetModel"](model, fastemit_lambda)(*encodings, *int32(of))


@pytest.mark.parametrize(("diffs", "shape"), [(1, (1,)), (2, ())])
def test_the_diffs_for_espnet_apply(diffs: int, shape: tuple[int, ...]) -> None:
    expect_recipe(espnet(0.0, diffs), mean, shape)


def test_espnet_with_fastemit() -> None:
    """With logits and without."""
    (of, encodings), model = batch(), Model()
    with_logits, without = (espnet(0.25, diffs)(model, of, encodings) for diffs in (1, 2))
    torch.testing.assert_close(with_logits[0], without)
    each = [torch.autograd.grad(loss, list(model.parameters())) for loss in (with_logits, without)]
    assert error(torch.cat([g.flatten() for g in each[0]]), torch.cat([g.flatten() for g in each[1]]).double()) < 1e-5


# NeMo.


@pytest.mark.parametrize("reduction", ["mean_batch", "mean_volume"])
def test_nemo(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    resolver = nemo_stub.installed(monkeypatch)
    nemo.install()

    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        loss = resolver.RNNTLoss(num_classes=V - 1, reduction=reduction, loss_kwargs={"fastemit_lambda": 0.0, "clamp": -1.0})
        log_probs = blank_last(model.logits(of, encodings)).log_softmax(-1)  # as its joint makes them on the CPU
        targets = (of.targets - 1).clamp(min=0)
        return loss(log_probs=log_probs, targets=targets, input_lengths=torch.tensor(FRAMES), target_lengths=torch.tensor(LABELS))

    expect_recipe(loss_of, mean if reduction == "mean_batch" else lambda losses, of: losses.sum() / sum(LABELS))


def test_nemo_without_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training step of a model with ``joint.fuse_loss_wer: true``, before and after `FusedJoint`."""
    resolver = nemo_stub.installed(monkeypatch)
    nemo.install()
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.joint = nemo_stub.RNNTJoint(5, 7, H, V - 1, torch.nn.ReLU(inplace=True), fused=2)
    model.joint.set_loss(resolver.RNNTLoss(num_classes=V - 1))
    model.joint.set_wer(object())
    of, (encoded, decoder) = batch()
    values, gradients, names = [], [], []
    for _ in range(2):
        loss, *_ = model.joint(
            encoder_outputs=encoded.transpose(1, 2), decoder_outputs=decoder.transpose(1, 2), encoder_lengths=torch.tensor(FRAMES),
            transcripts=(of.targets - 1).clamp(min=0), transcript_lengths=torch.tensor(LABELS), compute_wer=False,
        )  # fmt: skip
        values.append(loss)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        names.append(list(model.state_dict()))
        model.joint = nemo.FusedJoint(model.joint)
    torch.testing.assert_close(*values)
    assert error(gradients[1], gradients[0].double()) < 1e-5
    assert names[0] == names[1]


# SpeechBrain.


def relative(of: Case) -> tuple[Tensor, Tensor]:
    """Lengths as its data loader has them: shares of the longest, as floats."""
    return torch.tensor(of.frames) / max(of.frames), torch.tensor(of.labels) / max(of.labels)


def speechbrain_lengths(of: Case, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As its `transducer_loss` makes them of these."""
    input_lens, target_lens = relative(of)
    return (input_lens * logits.shape[1]).round().int(), (target_lens * targets.shape[1]).round().int()


def test_speechbrain_with_torchaudio() -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        logits, targets = model.logits(of, encodings), of.targets.clamp(min=0)
        return torchaudio.rnnt_loss(logits, targets.int(), *speechbrain_lengths(of, logits, targets), blank=0, reduction="mean")

    expect_recipe(loss_of, mean)


def test_speechbrain_with_numba() -> None:
    """Its gradient is that of the sum; what it reports is the mean of loss over frames."""
    reports = []

    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        logits, targets = model.logits(of, encodings), of.targets.clamp(min=0)
        arguments = (logits.log_softmax(-1), targets, *speechbrain_lengths(of, logits, targets))
        reports.append(warp_rnnt.rnnt_loss(*arguments, average_frames=True, reduction="mean", blank=0))
        return warp_rnnt.rnnt_loss(*arguments, reduction="sum", blank=0)

    def exact_of(losses: Tensor, of: Case) -> Tensor:
        reports.append((losses / torch.tensor(of.frames)).mean())
        return losses.sum()

    expect_recipe(loss_of, exact_of)
    assert error(*reports) < 1e-6


# torchaudio, WeNet.


@pytest.mark.parametrize("clamp", [None, 0.05], ids=["conformer", "emformer"])
def test_torchaudio(clamp: float | None) -> None:
    """The recipe's own clamp is 1.0, which no element of a gradient exceeds; a smaller one shows that it arrives."""
    options = {} if clamp is None else {"clamp": clamp}
    exceeded = []

    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        targets, src_lengths, target_lengths = int32(of)
        loss = torchaudio.RNNTLoss(reduction="sum", **options)
        return loss(blank_last(model.logits(of, encodings)), (targets - 1).clamp(min=0), src_lengths, target_lengths)

    def clamped(gradient: Tensor) -> Tensor:
        exceeded.append(bool(gradient.abs().max() > clamp))
        return gradient.clamp(-clamp, clamp)

    expect_recipe(loss_of, total, clamped=clamped if clamp else None)
    assert exceeded == ([True] if clamp else [])


def test_torchaudio_without_logits() -> None:
    """Its joiner is a sum, a ReLU and a Linear; the blank is the last class."""
    (of, _), linear = batch(), torch.nn.Linear(H, V)
    source, target = leaves(*of.joint[:2], dtype=torch.float32)
    targets, frames, labels = int32(of)
    targets = (targets - 1).clamp(min=0)
    logits = linear(torch.relu(source.unsqueeze(2) + target.unsqueeze(1)))
    values = [
        torchaudio.RNNTLoss(reduction="sum")(logits, targets, frames, labels),
        joint_rnnt_loss(source, target, linear.weight, linear.bias, targets, frames, labels, activation="relu", blank=-1, reduction="sum"),
    ]
    torch.testing.assert_close(*values)
    for expected, actual in zip(*(torch.autograd.grad(value, [source, target, *linear.parameters()]) for value in values), strict=True):
        assert error(actual, expected.double()) < 1e-5


def test_wenet() -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        rnnt_text = of.targets.to(torch.int64)
        rnnt_text = torch.where(rnnt_text == -1, 0, rnnt_text).to(torch.int32)
        lengths = (torch.tensor(each).to(torch.int32) for each in (FRAMES, LABELS))
        return torchaudio.rnnt_loss(model.logits(of, encodings), rnnt_text, *lengths, blank=0, reduction="mean")

    expect_recipe(loss_of, mean)


# icefall.


def packed(model: Model, encodings: Any, x_lens: Tensor, y_lens: Tensor) -> Tensor:
    """Its joiner: a sum of each utterance's rows, (sum_all_TU, V)."""
    encoder_out, decoder_out = model.lin_enc(encodings[0]), model.lin_dec(encodings[1])
    x = [
        (encoder_out[i, :T_i].unsqueeze(1) + decoder_out[i, : U_i + 1].unsqueeze(0)).reshape(-1, H)
        for i, (T_i, U_i) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), strict=True))
    ]
    return model.lin_out(torch.tanh(torch.cat(x)))


@pytest.mark.parametrize("form", ["logits", "log-probabilities", "module"])
def test_icefall_with_optimized_transducer(form: str) -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        y_padded, x_lens, y_lens = int32(of)
        logits = packed(model, encodings, x_lens, y_lens)
        if form == "module":
            return optimized_transducer.TransducerLoss(blank=0, reduction="sum")(logits, y_padded, x_lens, y_lens, from_log_softmax=False)
        if form == "logits":
            return optimized_transducer.transducer_loss(
                logits=logits, targets=y_padded, logit_lengths=x_lens, target_lengths=y_lens, blank=0, reduction="sum",
                one_sym_per_frame=False, from_log_softmax=False,
            )  # fmt: skip
        return optimized_transducer.transducer_loss(
            logits=logits.log_softmax(dim=-1), targets=y_padded, logit_lengths=x_lens, target_lengths=y_lens, blank=0,
            reduction="sum", from_log_softmax=True,
        )  # fmt: skip

    expect_recipe(loss_of, total)


def test_icefall_without_logits() -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        encoder_out, decoder_out, output = model.lin_enc(encodings[0]), model.lin_dec(encodings[1]), model.lin_out
        y_padded, x_lens, y_lens = int32(of)
        return joint_rnnt_loss(encoder_out, decoder_out, output.weight, output.bias, y_padded, x_lens, y_lens, reduction="sum")

    expect_recipe(loss_of, total)


def test_icefall_with_torchaudio() -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        y_padded, x_lens, y_lens = int32(of)
        return torchaudio.rnnt_loss(
            logits=model.logits(of, encodings), targets=y_padded, logit_lengths=x_lens, target_lengths=y_lens, blank=0, reduction="sum"
        )

    expect_recipe(loss_of, total)


# warp_rnnt.


@pytest.mark.parametrize("gather", [False, True])
def test_warp_rnnt(gather: bool) -> None:
    def loss_of(model: Model, of: Case, encodings: Any) -> Tensor:
        labels, frames_lengths, labels_lengths = int32(of)
        log_probs = torch.nn.functional.log_softmax(model.logits(of, encodings), dim=-1)
        return warp_rnnt.rnnt_loss(
            log_probs.float(), labels, frames_lengths, labels_lengths, average_frames=False, reduction="mean", blank=0, gather=gather
        )

    expect_recipe(loss_of, mean)


# TensorFlowASR.


def test_tensorflow_asr() -> None:
    """Its `rnnt_loss`, with the diff, under `tf.function`, with and without its log-softmax for the CPU."""
    pytest.importorskip("tensorflow")
    of = case(FRAMES, LABELS, V, H)
    (logits,) = leaves(of.logits)
    loss = naive_rnnt_loss(logits, *of.integers)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    found = run_python(f"""
        import json
        import tensorflow as tf
        from transducer_loss.adapters.compat.warprnnt_tensorflow import rnnt_loss as warp_rnnt_loss

        @tf.function
        def rnnt_loss(logits, labels, label_length, logit_length, blank=0, use_cpu=False):
            if use_cpu:
                logits = tf.nn.log_softmax(logits)
            return warp_rnnt_loss(
                acts=tf.cast(logits, tf.float32), label_lengths=tf.cast(label_length, tf.int32), labels=tf.cast(labels, tf.int32),
                input_lengths=tf.cast(logit_length, tf.int32), blank_label=blank,
            )

        logits, found = tf.constant({of.logits.tolist()}, tf.float32), []
        for use_cpu in (True, False):
            with tf.GradientTape() as tape:
                tape.watch(logits)
                loss = rnnt_loss(logits, tf.constant({of.targets.tolist()}), tf.constant({LABELS}), tf.constant({FRAMES}), use_cpu=use_cpu)
            found.append([loss.numpy().tolist(), tape.gradient(loss, logits).numpy().tolist()])
        print(json.dumps(found))
    """)
    assert len(found) == 2
    for values, gradients in found:
        assert error(torch.tensor(values), loss) < 1e-6
        assert error(torch.tensor(gradients), gradient) < 1e-5


# The document.


def test_every_import_that_the_document_adds() -> None:
    added = [line[1:].strip() for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if re.match(r"\+\s*from transducer_loss", line)]
    named = set(re.findall(r"`(transducer_loss\.adapters\.compat\.\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert {re.sub(r"^from (\S+) import (\w+).*", r"\1 \2", line) for line in added} >= {
        "transducer_loss.adapters.compat.torchaudio rnnt_loss", "transducer_loss.adapters.compat nemo",
        "transducer_loss.adapters.compat.warp_rnnt rnnt_loss", "transducer_loss.adapters.compat optimized_transducer",
    }  # fmt: skip
    assert {name.rsplit(".", 1)[1] for name in named} == {
        "k2", "nemo", "optimized_transducer", "torchaudio", "warp_rnnt", "warprnnt_pytorch", "warprnnt_tensorflow",
    }  # fmt: skip
    for line in added:
        if "tensorflow" not in line:
            exec(line, {})


def test_importing_them_imports_no_peer_and_no_other_framework() -> None:
    """Nor tries to: no peer is installed here."""
    names = ["k2", "nemo", "optimized_transducer", "torchaudio", "warp_rnnt", "warprnnt_pytorch"]
    loaded = run_python(f"""
        import importlib, json, sys
        import torch

        tried = []

        class Tried:
            def find_spec(name, path=None, target=None):
                tried.append(name)

        sys.meta_path.insert(0, Tried)
        for name in {names}:
            importlib.import_module("transducer_loss.adapters.compat." + name)
        print(json.dumps(tried))
    """)
    assert {"transducer_loss.adapters.compat." + name for name in names} <= set(loaded)
    assert not {*names, "tensorflow", "jax", "cupy", "numba"} & {name.partition(".")[0] for name in loaded}


def test_nothing_changes_between_calls() -> None:
    """One process, all of them: the same bits as before."""
    of = case(FRAMES, LABELS, V, H)
    integers = int32(of)

    def values() -> list[Tensor]:
        return [
            torchaudio.rnnt_loss(of.logits, *integers, blank=0), warprnnt_pytorch.rnnt_loss(of.logits, *integers)[0],
            nemo.RNNTLossNumba(0)(of.logits, *integers)[0], warp_rnnt.rnnt_loss(of.logits.log_softmax(-1), *integers, reduction="mean"),
        ]  # fmt: skip

    first = values()
    assert same(first, values())
    assert same(first[:1] * 2, first[1:3])
