"""Tie a recogniser's decoder to its output layer and reduce it; then train it by the characters it gets wrong (EMBR).

After the Tied & Reduced RNN-T decoder (Botros et al., arXiv 2109.07513). The paper's: a prediction network of LSTM layers with
embeddings and an output layer of its own, against one without recurrence, whose embeddings are the rows of the output layer;
and fine-tuning by the expected number of errors over the N likeliest hypotheses. This project's reading: the sizes, and errors
counted in characters. With an alphabet of 28 classes it is the LSTM that weighs; with the paper's word pieces, the tables, too.

Errors are mended only where there are some, so the first training stops early; and as any training goes on to help, each
recogniser is also trained further by the transducer loss alone, for as many steps as by EMBR.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pictures
import recipe
import spoken_numbers
from pytorch_recogniser import Encoder, TensorBatch
from recipe import WIDTH
from spoken_numbers import BLANK, Utterance
from transducer_loss.adapters.torch import NBest, TiedReducedDecoder, beam_search, edit_distance, embr_loss, joint_rnnt_loss

CLASSES = len(spoken_numbers.ALPHABET)
DECODERS = ("LSTM", "tied and reduced")
LSTM_LAYERS = 2
FINE_TUNING_RATE, FINE_TUNING_WARM_UP = 1e-3, 10
BEFORE, CONTROL, AFTER = "transducer loss", "more of it", "EMBR"


class LSTMDecoder(nn.Module):
    """A prediction network of the usual kind: embeddings, LSTM layers and a projection."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, features)
        self.lstm = nn.LSTM(features, features, LSTM_LAYERS, batch_first=True)
        self.projection = nn.Linear(features, features)

    def forward(self, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """Features (B, U+1, H) after every label of the targets (B, U), whose padding may be anything."""
        labels = nn.functional.pad(targets.clamp(min=0), (1, 0), value=BLANK)
        return self.projection(self.lstm(self.embedding(labels))[0])

    def step(self, labels: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features (M, H) after one more label each (M,), and the state, whose tensors have M rows, too."""
        before = None if state is None else tuple(each.transpose(0, 1).contiguous() for each in state)
        features, after = self.lstm(self.embedding(labels)[:, None], before)
        return self.projection(features[:, 0]), tuple(each.transpose(0, 1) for each in after)


class Recogniser(nn.Module):
    """An encoder, a decoder of either kind, and the output layer of the joint network."""

    def __init__(self, decoder: str) -> None:
        super().__init__()
        self.encoder = Encoder(WIDTH)
        self.output = nn.Linear(WIDTH, CLASSES)
        own = decoder == "LSTM"
        self.decoder = LSTMDecoder(WIDTH, CLASSES) if own else TiedReducedDecoder(WIDTH, CLASSES, weight=self.output.weight)

    @property
    def decoder_size(self) -> int:
        """Parameters of all but the encoder; one that is shared counts once."""
        return sum(parameter.numel() for parameter in {*self.decoder.parameters(), *self.output.parameters()})

    def losses(
        self, encodings: Tensor, frames: Tensor, labels: Tensor, lengths: Tensor, encoder_index: Tensor | None = None
    ) -> Tensor:
        """Transducer losses (M,) of labels (M, U): -log P, over all paths."""
        return joint_rnnt_loss(
            encodings, self.decoder(labels, lengths), self.output.weight, self.output.bias, labels, frames, lengths,
            encoder_index=encoder_index, blank=BLANK, reduction="none",
        )  # fmt: skip

    def search(self, encodings: Tensor, frames: Tensor, count: int) -> NBest:
        """Find the likeliest texts."""
        return beam_search(encodings, frames, self.decoder.step, self.logits, beam=count, blank=BLANK)

    def logits(self, encoding: Tensor, prediction: Tensor) -> Tensor:
        """Joint network of single cells: (M, H) and (M, H) to (M, V)."""
        return self.output(torch.tanh(encoding + prediction))


def likelihood(model: Recogniser, batch: TensorBatch) -> tuple[Tensor, float]:
    """Mean transducer loss of a batch: what to differentiate, and what to report."""
    encodings, _ = model.encoder(batch.features)
    loss = model.losses(encodings, batch.encoder_lengths, batch.targets, batch.target_lengths).mean()
    return loss, loss.item()


def risk(model: Recogniser, batch: TensorBatch, nbest: int, interpolation: float) -> tuple[Tensor, float]:
    """Expected number of wrong characters over the likeliest texts, to which some transducer loss is added."""
    encodings, _ = model.encoder(batch.features)
    frames, references = batch.encoder_lengths, (batch.targets, batch.target_lengths)
    found = model.search(encodings, frames, nbest)
    wrong = edit_distance(found.hypotheses, found.lengths, *references).total  # (B, N)
    # All texts of an utterance read its encodings where they are.
    owners = torch.arange(len(frames)).repeat_interleave(nbest)
    lengths = found.lengths.clamp(min=0)  # -1 for a text that was not found, which the risk leaves out
    losses = model.losses(encodings, frames, found.hypotheses.flatten(0, 1), lengths.flatten(), owners).view_as(wrong)
    expected = functools.partial(embr_loss, losses, wrong, hypothesis_lengths=found.lengths)
    objective = expected(reference_nll=model.losses(encodings, frames, *references), interpolation=interpolation)
    return objective, expected().item()


Objective = Callable[[Recogniser, TensorBatch], tuple[Tensor, float]]


def train(
    model: Recogniser, utterances: list[Utterance], objective: Objective, schedule: tuple[int, float, int], seed: int,
    advance: Callable[[], object],
) -> list[float]:  # fmt: skip
    """Train for so many steps, at a learning rate that rises to its peak in so many of them; what each step reports."""
    steps, peak, rising = schedule
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=recipe.WEIGHT_DECAY)
    batches = spoken_numbers.batches(utterances, recipe.BATCH_SIZE, np.random.default_rng(seed))
    reported = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / rising) * (1 + math.cos(math.pi * step / steps)) / 2
        loss, value = objective(model, TensorBatch.of(next(batches), model.output.weight.device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.LARGEST_GRADIENT_NORM)
        optimiser.step()
        reported.append(value)
        advance()
    return reported


@torch.no_grad()
def recognise(model: Recogniser, utterances: list[Utterance], beam: int) -> list[str]:
    """Texts of utterances, by beam search."""
    batch = TensorBatch.of(spoken_numbers.batch(utterances), model.output.weight.device)
    found = model.search(model.encoder(batch.features)[0], batch.encoder_lengths, beam)
    best = zip(found.hypotheses[:, 0].cpu(), found.lengths[:, 0].tolist(), strict=True)
    return [spoken_numbers.to_text(labels[:length].numpy()) for labels, length in best]


@dataclass
class Run:
    """A decoder, and what became of its recogniser."""

    decoder: str
    parameters: int
    losses: list[float] = field(default_factory=list)  # of each step of the first training
    risks: list[float] = field(default_factory=list)  # of each step of EMBR: wrong characters an utterance
    hypotheses: dict[str, list[str]] = field(default_factory=dict)  # by how it was trained
    error_rates: dict[str, float] = field(default_factory=dict)  # the same, on speakers never heard in training


def follow(
    run: Run, model: Recogniser, training: list[Utterance], held_out: list[Utterance], arguments: argparse.Namespace,
    advance: Callable[[], object],
) -> None:  # fmt: skip
    """Train a recogniser by the transducer loss, then a copy of it by more of that, then it by EMBR."""

    def evaluate(stage: str, model: Recogniser) -> None:
        run.hypotheses[stage] = recognise(model, held_out, arguments.nbest)
        run.error_rates[stage] = recipe.character_error_rate(held_out, run.hypotheses[stage])

    model.encoder.normalise_by(np.concatenate([utterance.features for utterance in training]))
    first = arguments.steps, recipe.PEAK_LEARNING_RATE, recipe.WARM_UP_STEPS
    run.losses = train(model, training, likelihood, first, arguments.seed, advance)
    evaluate(BEFORE, model)
    control, then = copy.deepcopy(model), (arguments.embr_steps, FINE_TUNING_RATE, FINE_TUNING_WARM_UP)
    train(control, training, likelihood, then, arguments.seed + 1, advance)
    evaluate(CONTROL, control)
    by_errors = functools.partial(risk, nbest=arguments.nbest, interpolation=arguments.interpolation)
    run.risks = train(model, training, by_errors, then, arguments.seed + 1, advance)
    evaluate(AFTER, model)


def report(runs: list[Run], held_out: list[Utterance]) -> None:
    """Print the results; the sentence to remember comes last."""
    print("wrong characters by training:   " + "".join(f"{stage:>18s}" for stage in runs[0].error_rates))
    for run in runs:
        rates = "".join(f"{100 * rate:16.2f} %" for rate in run.error_rates.values())
        print(f"{run.decoder:16s} {run.parameters:8,d} weights {rates}")
    lstm, reduced = runs
    texts = zip((each.text for each in held_out), reduced.hypotheses[BEFORE], reduced.hypotheses[AFTER], strict=True)
    print("\nsome of what EMBR mended:")
    for reference, before, _ in [text for text in texts if text[0] == text[2] != text[1]][:3]:
        print(f"  before  {before}\n  after   {reference}")
    before, control, after = (f"{100 * rate:.2f} %" for rate in reduced.error_rates.values())
    print(f"\nthe tied and reduced decoder is {lstm.parameters / reduced.parameters:.1f} times smaller than the LSTM")
    print(f"its wrong characters: {before}; by as many steps of EMBR {after}, of the transducer loss {control}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the first training (default: %(default)s)")
    parser.add_argument("--embr-steps", type=int, default=40, help="of EMBR, and of its control (default: %(default)s)")
    parser.add_argument("--nbest", type=int, default=4, help="hypotheses of an utterance, and beam (default: %(default)s)")
    parser.add_argument("--interpolation", type=float, default=0.1, help="transducer loss in EMBR (default: %(default)s)")
    parser.add_argument("--tuning", action="store_true", help="hold out some of the training speakers: to choose settings by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tied-reduced-out"), help="of the picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    return parser.parse_args()


def main() -> None:
    """Make the corpus, train both recognisers, and report."""
    arguments = parse_arguments()
    times = [time.perf_counter()]
    training, held_out = recipe.synthesise(arguments.seed, arguments.tuning)
    times.append(time.perf_counter())
    torch.manual_seed(arguments.seed)
    models = [Recogniser(decoder) for decoder in DECODERS]
    runs = [Run(decoder, model.decoder_size) for decoder, model in zip(DECODERS, models, strict=True)]
    # Matrices so small keep but one core busy: each recogniser is trained by a thread, on a core of its own.
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    total = len(runs) * (arguments.steps + 2 * arguments.embr_steps)
    with recipe.progress("training", total) as advance, pool:
        list(pool.map(lambda run, model: follow(run, model, training, held_out, arguments, advance), runs, models))
    times.append(time.perf_counter())
    rates, risks = ({run.decoder: getattr(run, what) for run in runs} for what in ("error_rates", "risks"))
    pictures.mended(arguments.out / "embr.png", rates, risks)
    seconds = dict(zip(("speech", "training"), np.diff(times).tolist(), strict=True))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"seed": arguments.seed, "runs": [asdict(run) for run in runs], "seconds": seconds}
        arguments.json.write_text(json.dumps(results, indent=1))
    report(runs, held_out)
    print(", ".join(f"{phase} {each:.0f} s" for phase, each in seconds.items()), f"(processor {time.process_time():.0f} s)")
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
