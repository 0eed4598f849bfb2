"""Train a small streaming recogniser of spoken numbers, and look into its loss.

The joint network is fused into the loss: in training the model only ever makes an encoding per frame and one per character;
the logits of every (frame, character) pair are never held. The loss is exact, or pruned to the characters that matter in each
frame, or normalised over sampled classes of a vocabulary that is much larger than the alphabet.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import pictures
import recipe
import spoken_numbers
import transducer_loss
from recipe import (
    BATCH_SIZE,
    PEAK_LEARNING_RATE,
    SUBSAMPLING,
    WARM_UP_STEPS,
    WEIGHT_DECAY,
    WIDTH,
    character_error_rate,
)
from spoken_numbers import BLANK, Batch, Utterance
from transducer_loss import Band, Classes, Grads, Occupancy
from transducer_loss.adapters.torch import JointRNNTLoss, PrunedRNNTLoss, sample_classes

ENCODER_PERIOD = SUBSAMPLING * spoken_numbers.FRAME_PERIOD  # seconds
EVALUATIONS = 10
# Beyond the alphabet there are classes that no text has, as a vocabulary of word pieces has for any one batch.
SAMPLED_VOCABULARY, SAMPLES = 5000, 100
BIAS_DRAWS, BIAS_UTTERANCES = 20, 8
CHARACTERS_IN_BAND, LM_ONLY_SCALE, PRUNED_WARM_UP_STEPS = 5, 0.1, 200


class Encoder(nn.Module):
    """Features (B, T, MEL_BINS) to encodings (B, ceil(T / 4), H), each from the past alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(spoken_numbers.MEL_BINS))
        self.register_buffer("scale", torch.ones(spoken_numbers.MEL_BINS))
        self.convolution = nn.Conv1d(spoken_numbers.MEL_BINS, width, 2 * SUBSAMPLING, stride=SUBSAMPLING)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.project = nn.Linear(width, width)

    def normalise_by(self, features: np.ndarray) -> None:
        """Give every mel bin zero mean and unit variance on features (frames, MEL_BINS)."""
        self.mean.copy_(torch.from_numpy(features.mean(0)))
        self.scale.copy_(torch.from_numpy(1 / features.std(0)))

    def listen(self, features: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Low-level features (B, ceil(T / 4), H) of a piece of speech, and what the next piece needs of it."""
        features = (features - self.mean) * self.scale
        features = nn.functional.pad(features, (0, 0, 0, -features.shape[1] % SUBSAMPLING))
        past = torch.zeros_like(features[:, :SUBSAMPLING]) if past is None else past
        window = torch.cat([past, features], dim=1)
        x = self.norms[0](self.convolution(window.transpose(1, 2)).relu().transpose(1, 2))
        return x, window[:, -SUBSAMPLING:]

    def understand(self, x: Tensor, hidden: list[Tensor | None], *each: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encodings (B, T, H) of low-level features, and what the layers remember; each layer is also given `each`."""
        after = []
        for layer, norm, before in zip(self.layers, self.norms[1:], hidden, strict=True):
            y, last = layer(x, before, *each)
            x = norm(x + y)
            after.append(last)
        return self.project(x), after

    def forward(self, features: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode a piece of speech; the state returned continues with the next one.

        A piece other than the last must hold a multiple of 4 frames.
        """
        past, *hidden = state or [None, None, None]
        x, following = self.listen(features, past)
        encodings, after = self.understand(x, hidden)
        return encodings, [following, *after]


class Predictor(nn.Module):
    """Encodings of the last two characters: no recurrence, which two characters of context do without."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width // 2)
        self.project = nn.Linear(width, width)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Encode the last character (...,) and the one before it (...,) to (..., H)."""
        return self.project(torch.cat([self.embedding(before), self.embedding(last)], dim=-1).relu())

    def sequence(self, targets: Tensor) -> Tensor:
        """Encode every prefix of the targets (B, U), the empty one first: (B, U+1, H)."""
        padded = nn.functional.pad(targets.long(), (2, 0), value=BLANK)
        return self(padded[:, :-1], padded[:, 1:])


class Recogniser(nn.Module):
    """An encoder, a predictor, and a loss that owns the output layer, which decoding shares."""

    def __init__(
        self, width: int = WIDTH, loss: str = "exact", workspace: str = "4MiB", vocabulary: int = len(spoken_numbers.ALPHABET)
    ) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.predictor = Predictor(width, vocabulary)
        self.pruned, self.sampled = loss == "pruned", loss == "sampled"
        shape, options = (width, vocabulary), {"blank": BLANK, "workspace": workspace}
        self.loss: JointRNNTLoss | PrunedRNNTLoss
        if self.pruned:
            self.loss = PrunedRNNTLoss(
                *shape, s_range=CHARACTERS_IN_BAND, lm_only_scale=LM_ONLY_SCALE, warm_step=PRUNED_WARM_UP_STEPS, **options
            )
        else:
            self.loss = JointRNNTLoss(*shape, **options)

    @property
    def output(self) -> nn.Linear:
        """Output layer: weight (V, H) and bias (V,)."""
        return self.loss.output

    def logits(self, encoding: Tensor, prediction: Tensor) -> Tensor:
        """Joint network of single cells, as decoding wants it: (..., H) and (..., H) to (..., V)."""
        return self.output(torch.tanh(encoding + prediction))


@dataclass
class TensorBatch:
    """A batch on the model's device, but for the lengths: the loss reads them on the host without waiting for the device."""

    features: Tensor
    targets: Tensor
    encoder_lengths: Tensor
    target_lengths: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TensorBatch:
        """Move a batch to a device."""
        return cls(
            torch.from_numpy(batch.features).to(device),
            torch.from_numpy(batch.targets).to(device),
            torch.from_numpy(recipe.encoder_lengths(batch.feature_lengths)),
            torch.from_numpy(batch.target_lengths),
        )


def loss_of(model: Recogniser, batch: TensorBatch) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch: what to differentiate, and what of it is a loss of the recogniser, without the simple loss."""
    encoder, _ = model.encoder(batch.features)
    predictor = model.predictor.sequence(batch.targets)
    chosen = {}
    if model.sampled:
        chosen["classes"] = sample_classes(batch.targets, batch.target_lengths, **sampling_of(model))
    losses = model.loss(encoder, predictor, batch.targets, batch.encoder_lengths, batch.target_lengths, **chosen)
    return (losses.loss, losses.pruned_loss) if model.pruned else (losses, losses)


def sampling_of(model: Recogniser, correction: bool = False) -> dict[str, Any]:
    """How classes are sampled: for each utterance its own, as the few characters of a batch are those of an utterance.

    Without correction: uniform draws of 1 in 50 would weigh 50 times as much, and training hears their noise.
    """
    vocabulary = model.output.weight.shape[0]
    return {"vocab_size": vocabulary, "num_samples": SAMPLES, "scope": "utterance", "correction": correction, "blank": BLANK}


@torch.no_grad()
def recognise(model: Recogniser, features: Tensor, encoder_lengths: Tensor, chunk: int = 32) -> list[str]:
    """Greedy streaming decoding: the features (B, T, MEL_BINS) come in chunks of frames, each is heard once."""

    def encodings() -> Iterator[Tensor]:
        state = None
        for start in range(0, features.shape[1], chunk):
            piece, state = model.encoder(features[:, start : start + chunk], state)
            yield from piece.unbind(1)

    def likeliest(encoding: Tensor, *labels: np.ndarray) -> Tensor:
        prediction = model.predictor(*(torch.from_numpy(each).to(features.device) for each in labels))
        return model.logits(encoding, prediction).argmax(-1).cpu()

    return recipe.greedy(likeliest, encodings(), encoder_lengths.numpy())


@dataclass(frozen=True)
class Budget:
    """How long to train: so many steps, unless minutes are given."""

    steps: int
    minutes: float | None = None

    def used(self, steps: int, seconds: float) -> float:
        """Share of the budget that so many steps and seconds of training have used."""
        return steps / self.steps if self.minutes is None else seconds / (60 * self.minutes)


@dataclass
class Training:
    """What happened: the loss of every step, and the held-out texts recognised now and then."""

    losses: list[float] = field(default_factory=list)
    evaluated_steps: list[int] = field(default_factory=list)
    error_rates: list[float] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    utterances_per_second: float = 0.0


def train(model: Recogniser, training: list[Utterance], held_out: list[Utterance], budget: Budget, seed: int) -> Training:
    """Train a model, and follow its character error rate on the held-out utterances."""
    rng = np.random.default_rng(seed)
    device = model.output.weight.device
    model.encoder.normalise_by(np.concatenate([utterance.features for utterance in training]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    held_out_batch = TensorBatch.of(spoken_numbers.batch(held_out), device)
    batches = spoken_numbers.batches(training, BATCH_SIZE, rng)
    done = Training()
    seconds = used = 0.0
    columns = (
        TextColumn("training {task.percentage:3.0f} %"),
        BarColumn(bar_width=20),
        TextColumn("loss {task.fields[loss]:.3f}   {task.fields[speed]:.0f} utterances/s  "),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=recipe.console) as bar:
        task = bar.add_task("", total=1.0, loss=math.nan, speed=0.0)
        while used < 1:
            started = time.perf_counter()
            warm_up = min(1.0, (len(done.losses) + 1) / WARM_UP_STEPS)
            optimiser.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warm_up * (1 + math.cos(math.pi * used)) / 2
            objective, loss = loss_of(model, TensorBatch.of(next(batches), device))
            optimiser.zero_grad()
            objective.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.LARGEST_GRADIENT_NORM)
            optimiser.step()
            done.losses.append(loss.item())
            seconds += time.perf_counter() - started
            used = budget.used(len(done.losses), seconds)
            done.utterances_per_second = len(done.losses) * BATCH_SIZE / seconds
            bar.update(task, completed=used, loss=done.losses[-1], speed=done.utterances_per_second)
            if used >= (len(done.error_rates) + 1) / EVALUATIONS:
                done.hypotheses = recognise(model, held_out_batch.features, held_out_batch.encoder_lengths)
                done.evaluated_steps.append(len(done.losses))
                done.error_rates.append(character_error_rate(held_out, done.hypotheses))
                bar.console.print(
                    f"step {len(done.losses):4d}   loss {np.mean(done.losses[-20:]):7.3f}   "
                    f"character error rate on held-out speakers {100 * done.error_rates[-1]:6.2f} %"
                )
    return done


@torch.no_grad()
def loss_arguments(model: Recogniser, utterances: list[Utterance]) -> tuple[np.ndarray, ...]:
    """Make the arguments of the loss of some utterances, as NumPy arrays: for the functions that look into it."""
    batch = TensorBatch.of(spoken_numbers.batch(utterances), model.output.weight.device)
    encoder, _ = model.encoder(batch.features)
    predictor = model.predictor.sequence(batch.targets)
    tensors = (encoder, predictor, model.output.weight, model.output.bias, batch.targets)
    return *(tensor.cpu().numpy() for tensor in tensors), batch.encoder_lengths.numpy(), batch.target_lengths.numpy()


@dataclass(frozen=True)
class Word:
    """A word, when its sound begins and when the recogniser emits its first character, in seconds."""

    text: str
    spoken: float
    emitted: float


def words_in_time(utterance: Utterance, alignment: np.ndarray) -> list[Word]:
    """Words of an utterance and when they came, from the frame (U,) of every character."""
    words = utterance.text.split()
    starts = itertools.accumulate((len(word) + 1 for word in words[:-1]), initial=0)
    return [
        Word(word, spoken=float(spoken), emitted=float(alignment[start] * ENCODER_PERIOD))
        for word, start, spoken in zip(words, starts, utterance.word_starts, strict=True)
    ]


def simple_loss(model: Recogniser, arguments: tuple[np.ndarray, ...], gradient: bool = False) -> tuple[Any, Any, Occupancy]:
    """Loss, gradients and occupancies of a pruned model's simple joiner, from the arguments of the exact loss."""
    layers = (model.loss.simple_encoder, model.loss.simple_predictor)
    am, lm = (
        array @ layer.weight.numpy(force=True).T + layer.bias.numpy(force=True)
        for array, layer in zip(arguments[:2], layers, strict=True)
    )
    return transducer_loss.simple_rnnt_loss(
        am, lm, *arguments[4:], lm_only_scale=LM_ONLY_SCALE, blank=BLANK, gradient=gradient
    )


def band_of(occupancy: Occupancy, arguments: tuple[np.ndarray, ...], strategy: str = "local") -> Band:
    """Band of the characters that matter in each frame; a model is trained with the local one."""
    return transducer_loss.prune(occupancy, *arguments[5:], s_range=CHARACTERS_IN_BAND, strategy=strategy)


def gradients_of(model: Recogniser, arguments: tuple[np.ndarray, ...], workspace: str) -> Grads:
    """Make the gradients of a model's loss, as training makes them but in NumPy."""
    simple = simple_loss(model, arguments, gradient=True) if model.pruned else None
    band = band_of(simple[2], arguments) if simple else None
    classes = classes_of(model, arguments) if model.sampled else None
    return transducer_loss.joint_rnnt_loss(*arguments, blank=BLANK, band=band, classes=classes, workspace=workspace)[1]


def classes_of(model: Recogniser, arguments: tuple[np.ndarray, ...], seed: int = 0, correction: bool = False) -> Classes:
    """Sampled classes for the arguments of the exact loss."""
    return transducer_loss.sample_classes(arguments[4], arguments[6], seed=seed, **sampling_of(model, correction))


def sampling_results(model: Recogniser, utterances: list[Utterance]) -> dict[str, Any]:
    """How many classes a sampled loss looks at, and how far it is from the exact one, with and without correction."""
    arguments = loss_arguments(model, utterances[:BIAS_UTTERANCES])

    def mean_loss(classes: Classes | None) -> float:
        loss, _ = transducer_loss.joint_rnnt_loss(*arguments, blank=BLANK, classes=classes, gradient=False)
        return float(loss.mean())

    exact = mean_loss(None)
    draws = {
        name: [mean_loss(classes_of(model, arguments, seed, name == "with")) - exact for seed in range(BIAS_DRAWS)]
        for name in ("with", "without")
    }
    return {
        "vocabulary": int(model.output.weight.shape[0]),
        "classes": classes_of(model, arguments).slots,
        "exact_loss": exact,
        "bias": {
            name: {"mean": float(np.mean(values)), "standard_deviation": float(np.std(values, ddof=1))}
            for name, values in draws.items()
        },
    }


def loss_megabytes(model: Recogniser, arguments: tuple[np.ndarray, ...], workspace: str) -> tuple[float, float]:
    """Measure how much more memory a loss takes than its gradients; and say what its logits would have taken."""
    encoder, predictor, weight, bias, *labels = arguments
    device = model.output.weight.device
    if device.type == "cuda":
        tensors = [torch.from_numpy(array).to(device).requires_grad_() for array in (encoder, predictor)]
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        chosen = {"classes": classes_of(model, arguments)} if model.sampled else {}
        model.loss(*tensors, *map(torch.from_numpy, labels), **chosen)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        tracemalloc.start()  # NumPy reports its arrays there
        gradients_of(model, arguments, workspace)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    gradients = sum(array.nbytes for array in (encoder, predictor, weight, bias))
    logits = 4 * encoder.shape[0] * encoder.shape[1] * predictor.shape[1] * weight.shape[0]
    return (peak - gradients) / 1e6, logits / 1e6


def pruning_results(model: Recogniser, utterances: list[Utterance]) -> dict[str, Any]:
    """How wide the band of some utterances is, and what it keeps of their cells and of the simple joiner's paths."""
    arguments = loss_arguments(model, utterances)
    _, _, occupancy = simple_loss(model, arguments)
    bands = {strategy: band_of(occupancy, arguments, strategy) for strategy in ("local", "optimal")}
    band = bands["local"]
    positions = np.arange(occupancy.blank.shape[2])
    inside = (positions >= band.first[..., None]) & (positions < band.end[..., None])
    real = np.arange(inside.shape[1]) < band.frames[:, None]
    return {
        "width": band.width,
        "share_of_cells": float(inside[real].sum() / (band.frames * (band.labels + 1)).sum()),
        # A path has one blank a frame.
        "kept_per_frame": float(occupancy.blank[inside].sum() / band.frames.sum()),
        "kept": {
            strategy: {"mean": float(band.mass.mean()), "least": float(band.mass.min())} for strategy, band in bands.items()
        },
    }


def pick_device(name: str) -> torch.device:
    """Device by name; ``auto`` is the GPU where both PyTorch and CuPy, which runs the loss there, can use it."""
    if name == "auto":
        usable = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
        name = "cuda" if usable else "cpu"
    return torch.device(name)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=600, help="steps of training (default: %(default)s)")
    length.add_argument("--minutes", type=float, help="minutes of training, in place of steps")
    losses = ("exact", "pruned", "sampled")
    parser.add_argument("--loss", choices=losses, default=losses[0], help="what to train by (default: %(default)s)")
    parser.add_argument(
        "--vocabulary", type=int,
        help=f"classes; those beyond the alphabet are in no text (default: {SAMPLED_VOCABULARY} if sampled, else none of them)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--workspace", default="4MiB", help="temporary memory of the loss (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    return parser.parse_args()


def to_show(utterances: list[Utterance], hypotheses: list[str]) -> Utterance:
    """Utterance for a picture: one that was heard right, where there is one."""
    right = (utterance for utterance, hypothesis in zip(utterances, hypotheses, strict=True) if hypothesis == utterance.text)
    # Long enough to be of interest, short enough for the characters to be readable along an axis.
    return next((utterance for utterance in right if 25 <= len(utterance.text) <= 40), utterances[0])


def look_into(
    model: Recogniser, training: list[Utterance], held_out: list[Utterance], done: Training, workspace: str, out: Path
) -> dict[str, Any]:
    """Draw the pictures, and gather the results that are known once training is over."""
    heard = list(zip(held_out, done.hypotheses, strict=True))
    shown = to_show(held_out, done.hypotheses)
    arguments = loss_arguments(model, [shown])
    alignment = transducer_loss.align(*arguments, blank=BLANK)
    occupancy = transducer_loss.occupancy(*arguments, blank=BLANK)
    band = band_of(simple_loss(model, arguments)[2], arguments) if model.pruned else None
    pictures.learning_curve(out / "learning-curve.png", done.losses, done.evaluated_steps, done.error_rates, target=0.03)
    pictures.lattice(
        out / "lattice.png", shown.text, shown.features, spoken_numbers.FRAME_PERIOD, shown.word_starts,
        occupancy, ENCODER_PERIOD, alignment, band,
    )  # fmt: skip
    longest = sorted(training, key=lambda utterance: len(utterance.features))[-BATCH_SIZE:]
    largest = loss_arguments(model, longest)
    taken, avoided = loss_megabytes(model, largest, workspace)
    wrong = [(utterance.text, hypothesis) for utterance, hypothesis in heard if hypothesis != utterance.text]
    return {
        "loss": float(np.mean(done.losses[-20:])),
        "character_error_rate": done.error_rates[-1],
        "character_error_rate_by_noise": {
            f"{ratio:g} dB" if np.isfinite(ratio) else "clean": character_error_rate(*zip(*some, strict=True))
            for ratio in spoken_numbers.SIGNAL_TO_NOISE
            if (some := [pair for pair in heard if pair[0].signal_to_noise == ratio])
        },
        "examples": [(utterance.text, hypothesis) for utterance, hypothesis in heard[:3]] + wrong[:2],
        "words": [asdict(word) for word in words_in_time(shown, alignment.frames[0])],
        "share_needing_gradient": 1 - gradients_of(model, largest, workspace).dropped,
        "megabytes": taken,
        "megabytes_of_logits": avoided,
        "training": asdict(done),
    } | ({"pruning": pruning_results(model, held_out)} if model.pruned else {}) | (
        {"sampling": sampling_results(model, held_out)} if model.sampled else {}
    )


def report(results: dict[str, Any]) -> None:
    """Print the results; the sentence to remember comes last."""
    print(f"\nloss {results['loss']:.3f}")
    noise = ", ".join(f"{name} {100 * rate:.1f}" for name, rate in results["character_error_rate_by_noise"].items())
    print(f"character error rate on held-out speakers {100 * results['character_error_rate']:.2f} %  ({noise})")
    print("\nsome of what was heard, and the first mistakes:")
    for reference, hypothesis in results["examples"]:
        print(f"  reference   {reference}\n  hypothesis  {hypothesis}")
    print("\nwhen words begin, and when the alignment has their first character:")
    for word in results["words"]:
        print(f"  {word['text']:10s} {word['spoken']:5.2f} s {word['emitted']:5.2f} s")
    print()
    if pruning := results.get("pruning"):
        print(
            f"the band of {pruning['width']} characters a frame is {100 * pruning['share_of_cells']:.0f} % of the lattice, "
            f"and has {100 * pruning['kept_per_frame']:.1f} % of the simple joiner's paths in a frame"
        )
        for strategy, kept in pruning["kept"].items():
            print(f"  from end to end, {strategy:7s} {100 * kept['mean']:.2g} % (least {100 * kept['least']:.2g} %)")
    if sampling := results.get("sampling"):
        print(
            f"an utterance's loss looked at {sampling['classes']} of {sampling['vocabulary']} classes; the exact loss is "
            f"{sampling['exact_loss']:.4f}, the sampled one differs by"
        )
        for name, bias in sampling["bias"].items():
            print(f"  {bias['mean']:+.2g} {name} correction (standard deviation over draws {bias['standard_deviation']:.2g})")
    cells = "band" if pruning else "lattice"
    print(f"{100 * results['share_needing_gradient']:.0f} % of the {cells}'s cells needed a gradient")
    print(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results["seconds"].items()))
    print(f"pictures: {results['pictures']}")
    print(f"trained in {results['megabytes']:.1f} MB where the logits would have taken {results['megabytes_of_logits']:.1f} MB")


def main() -> None:
    """Make the corpus, train, and report."""
    arguments = parse_arguments()
    times = [time.perf_counter()]
    device = pick_device(arguments.device)
    torch.manual_seed(arguments.seed)
    training, held_out = recipe.synthesise(arguments.seed)
    times.append(time.perf_counter())
    alphabet = len(spoken_numbers.ALPHABET)
    vocabulary = arguments.vocabulary or (SAMPLED_VOCABULARY if arguments.loss == "sampled" else alphabet)
    if vocabulary < alphabet:
        raise SystemExit(f"--vocabulary: expected at least the {alphabet} classes of the alphabet, got {vocabulary}")
    model = Recogniser(loss=arguments.loss, workspace=arguments.workspace, vocabulary=vocabulary).to(device)
    budget = Budget(arguments.steps, arguments.minutes)
    done = train(model, training, held_out, budget, arguments.seed)
    times.append(time.perf_counter())
    results = look_into(model, training, held_out, done, arguments.workspace, arguments.out)
    times.append(time.perf_counter())
    phases = ("speech", "training", "report")
    results |= {
        "seed": arguments.seed,
        "trained_by": arguments.loss,
        "device": str(device),
        "seconds": dict(zip(phases, np.diff(times).tolist(), strict=True)),
        "pictures": str(arguments.out),
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))
    report(results)


if __name__ == "__main__":
    main()
