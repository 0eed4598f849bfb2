"""What the recognisers share whatever their framework: sizes, schedule, decoding, progress and command line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import spoken_numbers
from spoken_numbers import BLANK, Batch, Utterance

TRAINING_UTTERANCES, HELD_OUT_UTTERANCES = 3000, 400
BATCH_SIZE = 32
WIDTH = 128
SUBSAMPLING = 4  # feature frames per encoder frame
PEAK_LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY, LARGEST_GRADIENT_NORM = 3e-3, 50, 1e-2, 5.0
MOST_CHARACTERS_PER_FRAME = 4

console = Console()


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar; call what it yields after each of the steps, if you will with another ``name``."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda name=name: bar.update(task, advance=1, description=name)


def synthesise(seed: int, tuning: bool = False) -> tuple[list[Utterance], list[Utterance]]:
    """Make the training set and the held-out one, if for tuning of other speakers than results are reported by."""
    with progress("speaking", TRAINING_UTTERANCES + HELD_OUT_UTTERANCES) as advance:
        return spoken_numbers.corpus(TRAINING_UTTERANCES, HELD_OUT_UTTERANCES, seed, advance, tuning)


def encoder_lengths(feature_lengths: np.ndarray) -> np.ndarray:
    """Encoder frames of so many feature frames; the last may be of fewer than SUBSAMPLING."""
    return -(-feature_lengths // SUBSAMPLING)


def greedy(likeliest: Callable[[Any, np.ndarray, np.ndarray], Any], encodings: Iterable[Any], lengths: np.ndarray) -> list[str]:
    """Texts of B utterances, by the likeliest character of every cell.

    Parameters
    ----------
    likeliest : callable
        From an encoding (B, H) and two labels (B,) int32, the last character and first the one before it, to labels (B,).
    encodings : iterable of arrays (B, H)
        One a frame; it may make them while it is asked for them.
    lengths : ndarray (B,)
        Frames of every utterance.
    """
    before = last = np.full(len(lengths), BLANK, np.int32)
    emitted: list[np.ndarray] = []  # each (B,), blank where an utterance emits nothing
    for frame, encoding in enumerate(encodings):
        speaking = frame < lengths
        for _ in range(MOST_CHARACTERS_PER_FRAME):
            best = np.asarray(likeliest(encoding, before, last), np.int32)
            speaking = speaking & (best != BLANK)
            if not speaking.any():
                break
            before, last = np.where(speaking, last, before), np.where(speaking, best, last)
            emitted.append(np.where(speaking, best, BLANK))
    labels = np.stack(emitted, axis=1) if emitted else np.empty((len(lengths), 0), np.int32)
    return [spoken_numbers.to_text(row[row != BLANK]) for row in labels]


def character_error_rate(utterances: list[Utterance], hypotheses: list[str]) -> float:
    """Edit distance per character of the references."""
    return spoken_numbers.error_rate([utterance.text for utterance in utterances], hypotheses)


def main(
    description: str,
    train: Callable[[list[Utterance], int, int], tuple[Any, list[float]]],
    recognise: Callable[[Any, Batch], list[str]],
) -> None:
    """Train a recogniser from the command line, and say how many characters of unheard speakers it gets wrong.

    Parameters
    ----------
    description : str
        Its first line is shown by ``--help``.
    train : callable
        From the training set, steps and seed to a model and the loss of each step.
    recognise : callable
        From the model and a batch to texts.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    training, held_out = synthesise(arguments.seed)
    started = time.perf_counter()
    model, losses = train(training, arguments.steps, arguments.seed)
    trained = time.perf_counter()
    hypotheses = recognise(model, spoken_numbers.batch(held_out))
    results = {
        "seed": arguments.seed,
        "losses": losses,
        "character_error_rate": character_error_rate(held_out, hypotheses),
        "hypotheses": hypotheses,
        "seconds": {"training": trained - started, "recognition": time.perf_counter() - trained},
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))
    print(f"loss {np.mean(losses[-20:]):.3f} after {len(losses)} steps in {trained - started:.0f} s")
    print(f"character error rate on held-out speakers {100 * results['character_error_rate']:.2f} %")
