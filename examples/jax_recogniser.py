"""Train the recogniser of spoken numbers in JAX, with Flax and Optax.

The joint network is fused into the loss, which runs inside the jitted step: the logits of every (frame, character) pair are
never held. Only decoding makes logits, those of one cell at a time.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import recipe
import spoken_numbers
from recipe import SUBSAMPLING, WIDTH
from spoken_numbers import ALPHABET, BLANK, MEL_BINS, Batch, Utterance
from transducer_loss.adapters.jax import joint_rnnt_loss

# Batches are padded to these, frames and labels: XLA compiles a step for each shape.
MULTIPLES = (128, 64)

jax.tree_util.register_dataclass(Batch, ["features", "feature_lengths", "targets", "target_lengths"], [])


class Encoder(nnx.Module):
    """Features (B, T, MEL_BINS) to encodings (B, ceil(T / 4), H), each from the past alone."""

    def __init__(self, features: np.ndarray, rngs: nnx.Rngs) -> None:
        """Normalise by the mean and the variance of features (frames, MEL_BINS)."""
        self.mean, self.scale = nnx.Variable(jnp.asarray(features.mean(0))), nnx.Variable(jnp.asarray(1 / features.std(0)))
        self.convolution = nnx.Conv(
            MEL_BINS, WIDTH, 2 * SUBSAMPLING, strides=SUBSAMPLING, padding=[(SUBSAMPLING, SUBSAMPLING - 1)], rngs=rngs
        )
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])
        self.project = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Encode whole utterances."""
        x = self.norms[0](nnx.relu(self.convolution((features - self.mean) * self.scale)))
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            x = norm(x + layer(x))
        return self.project(x)


class Predictor(nnx.Module):
    """Encodings of the last two characters: no recurrence, which two characters of context do without."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(len(ALPHABET), WIDTH // 2, rngs=rngs)
        self.project = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, before: jax.Array, last: jax.Array) -> jax.Array:
        """Encode the last character (...,) and the one before it (...,) to (..., H)."""
        return self.project(nnx.relu(jnp.concatenate([self.embedding(before), self.embedding(last)], axis=-1)))

    def sequence(self, targets: jax.Array) -> jax.Array:
        """Encode every prefix of the targets (B, U), the empty one first: (B, U+1, H)."""
        padded = jnp.pad(targets, [(0, 0), (2, 0)], constant_values=BLANK)
        return self(padded[:, :-1], padded[:, 1:])


class Recogniser(nnx.Module):
    """An encoder, a predictor, and the output layer that the loss and decoding share."""

    def __init__(self, features: np.ndarray, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(features, rngs)
        self.predictor = Predictor(rngs)
        self.output = nnx.Linear(WIDTH, len(ALPHABET), rngs=rngs)

    def losses(self, batch: Batch) -> jax.Array:
        """Losses (B,)."""
        return joint_rnnt_loss(
            self.encoder(batch.features), self.predictor.sequence(batch.targets), self.output.kernel.T, self.output.bias,
            batch.targets, recipe.encoder_lengths(batch.feature_lengths), batch.target_lengths, blank=BLANK,
        )  # fmt: skip

    def likeliest(self, encoding: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
        """Label (B,) of a frame (B, H) after two characters."""
        return self.output(jnp.tanh(encoding + self.predictor(before, last))).argmax(-1)


@nnx.jit
def train_step(model: Recogniser, optimiser: nnx.Optimizer, batch: Batch) -> jax.Array:
    """Update a model; returns the mean loss before."""
    loss, gradients = nnx.value_and_grad(lambda model: model.losses(batch).mean())(model)
    optimiser.update(model, gradients)
    return loss


def train(utterances: list[Utterance], steps: int, seed: int) -> tuple[Recogniser, list[float]]:
    """Train a model, and note the loss of every step."""
    model = Recogniser(np.concatenate([utterance.features for utterance in utterances]), nnx.Rngs(seed))
    warm_up = optax.linear_schedule(0.0, 1.0, recipe.WARM_UP_STEPS)
    decay = optax.cosine_decay_schedule(recipe.PEAK_LEARNING_RATE, steps)
    rule = optax.chain(
        optax.clip_by_global_norm(recipe.LARGEST_GRADIENT_NORM),
        optax.adamw(lambda step: warm_up(step + 1) * decay(step), weight_decay=recipe.WEIGHT_DECAY),
    )
    optimiser = nnx.Optimizer(model, rule, wrt=nnx.Param)
    batches = spoken_numbers.batches(utterances, recipe.BATCH_SIZE, np.random.default_rng(seed), MULTIPLES)
    losses: list[float] = []
    with recipe.progress("training", steps) as advance:
        for batch in itertools.islice(batches, steps):
            losses.append(float(train_step(model, optimiser, batch)))
            advance(f"training, loss {losses[-1]:7.3f}")
    return model, losses


def recognise(model: Recogniser, batch: Batch) -> list[str]:
    """Texts of a batch."""
    encodings = np.asarray(nnx.jit(Encoder.__call__)(model.encoder, batch.features)).swapaxes(0, 1)
    likeliest = nnx.cached_partial(nnx.jit(Recogniser.likeliest), model)
    return recipe.greedy(likeliest, encodings, recipe.encoder_lengths(batch.feature_lengths))


def main() -> None:
    """Make the corpus, train, and report."""
    recipe.main(__doc__, train, recognise)


if __name__ == "__main__":
    main()
