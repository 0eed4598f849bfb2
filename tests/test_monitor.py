"""What losses tell of themselves in a training step, by themselves and through the callbacks of Lightning and Keras."""

import os
import threading
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import jax
import keras
import lightning.pytorch as lightning
import numpy as np
import pytest
import tensorflow as tf
import torch

import transducer_loss as tl
from transducer_loss import monitor
from transducer_loss.adapters.jax import joint_rnnt_loss as jax_loss
from transducer_loss.adapters.keras import RNNTJoint
from transducer_loss.adapters.keras import TransducerMonitor as KerasMonitor
from transducer_loss.adapters.lightning import TransducerMonitor as LightningMonitor
from transducer_loss.adapters.tensorflow import joint_rnnt_loss as tensorflow_loss
from transducer_loss.adapters.torch import PrunedRNNTLoss, joint_rnnt_loss, rnnt_loss

FRAMES, LABELS = [9, 7, 5], [4, 2, 0]
TARGETS = [[1, 2, 3, 4], [5, 1, -1, -1], [-1, -1, -1, -1]]
NOTHING = tl.Statistics(None, None, None)


def joint_arguments(seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in ((3, 9, 8), (3, 5, 8), (6, 8), (6,))]
    return (*arrays, TARGETS, FRAMES, LABELS)


def delay_of(occupancy: tl.Occupancy) -> float:
    """By the definition: the mean over labels of the frame, less the middle of the utterance."""
    total = labels = 0.0
    for b, frames in enumerate(FRAMES):
        for t in range(frames):
            for value in np.asarray(occupancy.label)[b, t]:
                total += value * (t - (frames - 1) / 2)
                labels += value
    return total / labels


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.5])
def test_the_delay_of_a_joint(topology, fastemit_lambda):
    arguments = joint_arguments()
    with tl.Monitor() as heard:
        tl.joint_rnnt_loss(*arguments, topology=topology, fastemit_lambda=fastemit_lambda)
    encoder, predictor, weight, bias = arguments[:4]
    logits = np.tanh(encoder[:, :, None] + predictor[:, None]) @ weight.T + bias
    wanted = delay_of(tl.occupancy(logits, *arguments[4:], topology=topology))
    assert heard.statistics().emission_delay == pytest.approx(wanted, rel=1e-9)


def test_the_delay_in_a_band_and_of_several_groups_and_calls():
    arguments = joint_arguments()
    logits = np.random.default_rng(1).normal(size=(3, 9, 5, 6))
    whole = tl.occupancy(logits, *arguments[4:])
    band = tl.prune(whole, FRAMES, LABELS, s_range=2)
    with tl.Monitor() as heard:
        tl.joint_rnnt_loss(*arguments, band=band, workspace=4096)
    inside = tl.occupancy(*arguments, band=band)
    assert heard.statistics().emission_delay == pytest.approx(delay_of(inside), rel=1e-9)
    with heard:
        tl.rnnt_loss(logits, *arguments[4:])
    both = (delay_of(inside) + delay_of(whole)) / 2  # of as many labels
    assert heard.statistics().emission_delay == pytest.approx(both, rel=1e-9)


def test_a_delay_penalty_pushes_it_down():
    delays = []
    for penalty in (0.0, 0.3):
        with tl.Monitor() as heard:
            tl.joint_rnnt_loss(*joint_arguments(), delay_penalty=penalty)
        delays.append(heard.statistics().emission_delay)
    assert delays[1] < delays[0] - 0.1


def test_the_dropped_share_is_of_the_cells_of_all_calls():
    arguments = joint_arguments()
    with tl.Monitor() as heard:
        shares = [tl.joint_rnnt_loss(*arguments, occupancy_floor=floor)[1].dropped for floor in (0.0, 0.05)]
    assert shares[0] == 0 < shares[1] < 1
    assert heard.statistics().dropped_share == pytest.approx(shares[1] / 2)


@pytest.mark.parametrize("strategy", ["local", "optimal"])
def test_the_kept_mass_is_a_mean_over_utterances(strategy):
    rng = np.random.default_rng(0)
    am, lm = rng.normal(size=(3, 9, 6)), rng.normal(size=(3, 5, 6))
    am[1] = np.nan
    with tl.Monitor() as heard:
        _, _, occupancy = tl.simple_rnnt_loss(am, lm, TARGETS, FRAMES, LABELS)
        band = tl.prune(occupancy, FRAMES, LABELS, s_range=2, strategy=strategy)
    assert band.mass[1] == 0 < band.mass[0] < 1
    assert heard.statistics() == tl.Statistics(pytest.approx(band.mass.mean()), None, None)


def test_nothing_is_heard_where_there_is_no_gradient_and_after_the_end():
    arguments = joint_arguments()
    with tl.Monitor() as heard:
        tl.joint_rnnt_loss(*arguments, gradient=False)
        tl.rnnt_loss(np.zeros((3, 9, 5, 6)), *arguments[4:], gradient=False)
    tl.joint_rnnt_loss(*arguments)
    assert heard.statistics() == NOTHING
    assert NOTHING.known() == {}
    with pytest.raises(ValueError, match="expected"), heard:
        tl.joint_rnnt_loss(*arguments, workspace=-1)
    assert monitor._active == ()


def test_utterances_without_a_path_or_with_nan_do_not_count():
    logits = np.random.default_rng(0).normal(size=(3, 9, 5, 6))
    with tl.Monitor() as heard:
        tl.rnnt_loss(logits[:1], TARGETS[:1], FRAMES[:1], LABELS[:1])
    broken = logits.copy()
    broken[1, 0, 0, 0] = np.nan
    broken[2, :, :, 0] = -np.inf
    with tl.Monitor() as others:
        tl.rnnt_loss(broken, TARGETS, FRAMES, LABELS)
    assert others.statistics().emission_delay == pytest.approx(heard.statistics().emission_delay, rel=1e-12)


def test_monitors_inside_each_other_and_of_other_threads():
    arguments = joint_arguments()
    with tl.Monitor() as outer:
        tl.joint_rnnt_loss(*arguments)
        with tl.Monitor() as inner:
            thread = threading.Thread(target=tl.joint_rnnt_loss, args=joint_arguments(1))
            thread.start()
            thread.join()
    with tl.Monitor() as alone:
        tl.joint_rnnt_loss(*joint_arguments(1))
    assert inner.statistics() == alone.statistics() != outer.statistics()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_tells_when_the_gradient_is_made(reduction):
    tensors = [torch.tensor(array, requires_grad=True) for array in joint_arguments()[:4]]
    with tl.Monitor() as wanted:
        _, grads = tl.joint_rnnt_loss(*joint_arguments(), occupancy_floor=0.05)
    with tl.Monitor() as heard:
        joint_rnnt_loss(*tensors, TARGETS, FRAMES, LABELS, reduction=reduction, occupancy_floor=0.05).sum().backward()
    assert heard.statistics().dropped_share == pytest.approx(grads.dropped)
    assert heard.statistics().emission_delay == pytest.approx(wanted.statistics().emission_delay)


def test_jax_and_tensorflow_tell_the_same():
    arrays = [array.astype("f") for array in joint_arguments()[:4]]
    with tl.Monitor() as wanted:
        tl.joint_rnnt_loss(*arrays, TARGETS, FRAMES, LABELS, occupancy_floor=0.05)
    integers = np.array(TARGETS), np.array(FRAMES), np.array(LABELS)

    def mean(*leaves: Any) -> Any:
        return jax_loss(*leaves, *integers, occupancy_floor=0.05).mean()

    with tl.Monitor() as by_jax:
        jax.block_until_ready(jax.jit(jax.grad(mean, argnums=(0, 1, 2, 3)))(*arrays))
    variables = [tf.Variable(array) for array in arrays]
    with tl.Monitor() as by_tensorflow, tf.GradientTape() as tape:
        loss = tf.reduce_mean(tensorflow_loss(*variables, *integers, occupancy_floor=0.05))
        tape.gradient(loss, variables)
    assert by_jax.statistics().known() == pytest.approx(wanted.statistics().known())
    assert by_tensorflow.statistics().known() == pytest.approx(wanted.statistics().known())


def test_a_monitor_entered_twice_listens_until_both_ends():
    heard = tl.Monitor()
    with heard:
        with heard:
            pass
        tl.joint_rnnt_loss(*joint_arguments())
    assert heard.statistics().emission_delay is not None
    assert monitor._active == ()


def test_a_step_that_is_broken_off_is_not_listened_to_any_more():
    steps = monitor.Steps(2)
    steps.begin(0)
    steps.begin(1)
    assert monitor._active == ()
    assert steps.end() is None
    steps.begin(2)
    tl.joint_rnnt_loss(*joint_arguments())
    heard = steps.end()
    assert heard is not None and heard.dropped_share > 0
    assert monitor._active == ()


def test_what_is_kept_is_no_view_of_what_may_change():
    logits = torch.randn(3, 9, 5, 6, requires_grad=True)
    with tl.Monitor() as heard:
        rnnt_loss(logits, TARGETS, FRAMES, LABELS).backward()
        before = heard.statistics()
        rng = np.random.default_rng(0)
        _, _, occupancy = tl.simple_rnnt_loss(rng.normal(size=(3, 9, 6)), rng.normal(size=(3, 5, 6)), TARGETS, FRAMES, LABELS)
        band = tl.prune(occupancy, FRAMES, LABELS, s_range=2)
        mass = float(band.mass.mean())
        band.mass[:] = 2
    assert heard.statistics().emission_delay == before.emission_delay
    assert heard.statistics().kept_mass == pytest.approx(mass)


class Recogniser(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.losses = PrunedRNNTLoss(8, 6, s_range=3)
        self.wrong = False

    def training_step(self, batch: Any, index: int) -> Any:
        encoder, predictor = batch
        if self.wrong:
            raise RuntimeError("no loss")
        return self.losses(encoder, predictor, TARGETS, FRAMES, LABELS).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Noted(lightning.loggers.Logger):
    """What is logged, by step."""

    name, version = "noted", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps[step] = metrics


def trained(callback: Any, wrong: bool = False) -> dict[int, dict[str, float]]:
    """What a training of four batches logs."""
    module, noted = Recogniser(), Noted()
    module.wrong = wrong
    batches = torch.utils.data.DataLoader([[torch.randn(3, 9, 8), torch.randn(3, 5, 8)] for _ in range(4)], batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=noted, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, batches)
    return noted.steps


def test_lightning_logs_every_so_manieth_batch():
    logged = trained(LightningMonitor(every_n_batches=2, prefix="loss/"))
    assert logged[0] == logged[1] != logged[2] == logged[3]  # Lightning says again what it was told last
    for values in (logged[0], logged[2]):
        assert set(values) == {"epoch", "loss/kept_mass", "loss/dropped_share", "loss/emission_delay"}
        assert 0 < values["loss/kept_mass"] <= 1
        assert 0 <= values["loss/dropped_share"] < 1
        assert abs(values["loss/emission_delay"]) < 4
    assert monitor._active == ()


def test_lightning_stops_to_listen_after_an_error():
    with pytest.raises(RuntimeError, match="no loss"):
        trained(LightningMonitor(), wrong=True)
    assert monitor._active == ()


def test_keras_adds_to_the_logs_and_the_history():
    encoder, predictor, *_ = joint_arguments()
    inputs = keras.Input((9, 8)), keras.Input((5, 8)), keras.Input((4,), dtype="int32"), keras.Input((), dtype="int32")
    model = keras.Model(inputs, RNNTJoint(6)(*inputs[:2], targets=inputs[2], encoder_lengths=inputs[3]))
    model.compile("sgd", jit_compile=False)
    logged: list[dict[str, float]] = []
    noted = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: logged.append(dict(logs)))
    data = [np.concatenate([array, array]).astype("f") for array in (encoder, predictor)]
    history = model.fit(
        [*data, np.array(TARGETS * 2, "i4"), np.array(FRAMES * 2, "i4")], batch_size=2, epochs=2, verbose=0, shuffle=False,
        callbacks=[KerasMonitor(every_n_batches=2), noted],
    ).history  # fmt: skip
    names = {"transducer_dropped_share", "transducer_emission_delay"}
    assert [names <= set(logs) for logs in logged] == [True, False, True] * 2
    for name in names:
        assert history[name] == pytest.approx([(logged[i][name] + logged[i + 2][name]) / 2 for i in (0, 3)])
    assert monitor._active == ()


@pytest.mark.parametrize("callback", [KerasMonitor, LightningMonitor])
def test_batches_are_counted_from_one_on(callback):
    with pytest.raises(ValueError, match="every_n_batches"):
        callback(every_n_batches=0)
    with pytest.raises(TypeError, match="every_n_batches"):
        callback(every_n_batches=1.5)
