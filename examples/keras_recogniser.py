"""Train the recogniser of spoken numbers in Keras, on TensorFlow.

The last layer is the joint network with its loss inside: in training, where it is given the targets, the logits of every
(frame, character) pair are never held. Only decoding makes logits, those of one cell at a time.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import recipe
import spoken_numbers
from recipe import SUBSAMPLING, WIDTH
from spoken_numbers import ALPHABET, BLANK, MEL_BINS, Batch, Utterance
from transducer_loss.adapters.keras import RNNTJoint

# What a Batch holds; sizes are open, so that the step is traced once for all of them.
SIGNATURE = {
    "features": tf.TensorSpec((None, None, MEL_BINS), tf.float32),
    "feature_lengths": tf.TensorSpec((None,), tf.int32),
    "targets": tf.TensorSpec((None, None), tf.int32),
    "target_lengths": tf.TensorSpec((None,), tf.int32),
}


class Encoder(layers.Layer):
    """Features (B, T, MEL_BINS) to encodings (B, ceil(T / 4), H), each from the past alone."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = layers.Normalization()
        self.pad = layers.ZeroPadding1D((SUBSAMPLING, SUBSAMPLING - 1))
        self.convolution = layers.Conv1D(WIDTH, 2 * SUBSAMPLING, strides=SUBSAMPLING, activation="relu")
        self.recurrent = [layers.GRU(WIDTH, return_sequences=True) for _ in range(2)]
        self.norms = [layers.LayerNormalization() for _ in range(3)]
        self.project = layers.Dense(WIDTH)

    def call(self, features: Any) -> Any:
        """Encode whole utterances."""
        x = self.norms[0](self.convolution(self.pad(self.normalise(features))))
        for layer, norm in zip(self.recurrent, self.norms[1:], strict=True):
            x = norm(x + layer(x))
        return self.project(x)


class Predictor(layers.Layer):
    """Encodings of the last two characters: no recurrence, which two characters of context do without."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = layers.Embedding(len(ALPHABET), WIDTH // 2)
        self.project = layers.Dense(WIDTH)

    def call(self, before: Any, last: Any) -> Any:
        """Encode the last character (...,) and the one before it (...,) to (..., H)."""
        return self.project(ops.relu(ops.concatenate([self.embedding(before), self.embedding(last)], axis=-1)))


class Recogniser(keras.Model):
    """An encoder, a predictor, and a joint network, which adds the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = Encoder(), Predictor()
        self.joint = RNNTJoint(len(ALPHABET), loss_options={"blank": BLANK})

    def call(self, batch: dict[str, Any]) -> Any:
        """Losses (B,)."""
        padded = ops.pad(batch["targets"], [(0, 0), (2, 0)], constant_values=BLANK)
        return self.joint(
            self.encoder(batch["features"]), self.predictor(padded[:, :-1], padded[:, 1:]), targets=batch["targets"],
            encoder_lengths=recipe.encoder_lengths(batch["feature_lengths"]), target_lengths=batch["target_lengths"],
        )  # fmt: skip

    @tf.function
    def likeliest(self, encoding: Any, before: Any, last: Any) -> Any:
        """Label (B,) of a frame (B, H) after two characters."""
        logits = self.joint(encoding[:, None], self.predictor(before, last)[:, None])
        return ops.argmax(logits[:, 0, 0], axis=-1)


def learning_rate(steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up to the peak, then half a cosine to 0."""
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - recipe.WARM_UP_STEPS), warmup_target=recipe.PEAK_LEARNING_RATE, warmup_steps=recipe.WARM_UP_STEPS
    )


def train(utterances: list[Utterance], steps: int, seed: int) -> tuple[Recogniser, list[float]]:
    """Train a model, and note the loss of every step."""
    keras.utils.set_random_seed(seed)
    model = Recogniser()
    model.encoder.normalise.adapt(np.concatenate([utterance.features for utterance in utterances]))
    model.compile(
        keras.optimizers.AdamW(learning_rate(steps), recipe.WEIGHT_DECAY, global_clipnorm=recipe.LARGEST_GRADIENT_NORM)
    )
    rng = np.random.default_rng(seed)
    batches = tf.data.Dataset.from_generator(
        lambda: map(vars, spoken_numbers.batches(utterances, recipe.BATCH_SIZE, rng)), output_signature=SIGNATURE
    )
    losses: list[float] = []
    # Keras reports the mean loss of an epoch so far, and all of the training is one epoch here.
    each_step = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda step, logs: model.reset_metrics(),
        on_train_batch_end=lambda step, logs: losses.append(float(logs["loss"])),
    )
    model.fit(batches, steps_per_epoch=steps, shuffle=False, callbacks=[each_step])
    return model, losses


def recognise(model: Recogniser, batch: Batch) -> list[str]:
    """Texts of a batch."""
    encodings = model.encoder(batch.features)
    return recipe.greedy(model.likeliest, ops.unstack(encodings, axis=1), recipe.encoder_lengths(batch.feature_lengths))


def main() -> None:
    """Make the corpus, train, and report."""
    recipe.main(__doc__, train, recognise)


if __name__ == "__main__":
    main()
