"""Make the recogniser of spoken numbers cheaper: its encoder switches, frame by frame, to a cheap branch where that will do.

After Amortized Networks (Macoskey et al., arXiv 2108.01553), of which only the abstract and part of the introduction could be
read. The paper's: a recurrent encoder with branches of different cost, by sparse pruning and by matrix factorisation, and a
small arbitrator that chooses one of them in each frame. This project's reading: the objective, transducer loss plus a price
times the cost of what was chosen; delay as a queue of frames that wait; gated recurrent units, whose branches share one
state; straight-through Gumbel gates with an annealed temperature; pruning (by magnitude) and factorisation (by singular
values) of a trained dense encoder; and cost counted in multiply-adds.

Every encoder starts from one trained dense encoder and is trained further for as many steps; so are, to compare with, each
branch alone, and branches that no arbitrator chooses but chance.
"""

from __future__ import annotations

import argparse
import copy
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
from pytorch_recogniser import ENCODER_PERIOD, Budget, Encoder, Recogniser, TensorBatch, recognise, to_show, train
from spoken_numbers import FRAME_PERIOD, Utterance
from transducer_loss.adapters.torch import amortized_backlog, amortized_cost, gumbel_gate

PEAK_LEARNING_RATE, WARM_UP_STEPS = 2e-3, 10
FIRST_TEMPERATURE, LAST_TEMPERATURE = 2.0, 0.5
ARBITRATOR_WIDTH = 16
# For the backlog: a device on which the dense encoder takes half as long again as the frames last.
DENSE_DURATION = 1.5 * ENCODER_PERIOD
LEAST_SAVING, MOST_WORSE = 0.4, 0.01  # the goal


def multiply_adds(module: nn.Module) -> int:
    """Multiplications with weights in a frame: the non-zeros of a module's matrices, each of which a frame uses once.

    What an index of the non-zeros costs is not counted.
    """
    return sum(int(parameter.count_nonzero()) for parameter in module.parameters() if parameter.ndim > 1)


def dense(weight: Tensor, bias: Tensor, share: float = 1.0) -> nn.Linear:
    """Make a layer of a weight (O, I) and a bias (O,)."""
    layer = nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def sparse(weight: Tensor, bias: Tensor, share: float) -> nn.Linear:
    """Make a layer that keeps the share of a weight that is largest in magnitude; the others are 0 and stay so in training."""
    threshold = weight.abs().quantile(1 - share)
    mask = (weight.abs() > threshold).to(weight.dtype)
    layer = dense(weight * mask, bias)
    layer.weight.register_hook(mask.mul)  # Adam leaves a weight of 0 that never has a gradient
    return layer


def low_rank(weight: Tensor, bias: Tensor, share: float) -> nn.Sequential:
    """Make two layers whose product is the nearest to a weight that so small a share of its size can be."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, round(share * weight.numel() / sum(weight.shape)))
    root = values[:rank].sqrt()
    narrow = nn.Linear(weight.shape[1], rank, bias=False)
    narrow.load_state_dict({"weight": root[:, None] * right[:rank]})
    return nn.Sequential(narrow, dense(left[:, :rank] * root, bias))


BRANCHES: dict[str, Callable[[Tensor, Tensor, float], nn.Module]] = {"dense": dense, "sparse": sparse, "low-rank": low_rank}


class Switched(nn.Module):
    """A linear layer in several branches: the gates (..., K) say which of them a frame takes."""

    def __init__(self, weight: Tensor, bias: Tensor, branches: tuple[str, ...], share: float) -> None:
        super().__init__()
        self.width = len(weight)
        self.branches = nn.ModuleList(BRANCHES[name](weight, bias, share) for name in branches)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Weigh all branches by the gates in training, which needs their gradient; compute only the chosen one otherwise."""
        if self.training:
            return sum(gate * branch(x) for gate, branch in zip(gates.split(1, dim=-1), self.branches, strict=True))
        y = x.new_empty(*x.shape[:-1], self.width)
        for gate, branch in zip(gates.unbind(-1), self.branches, strict=True):
            y[gate == 1] = branch(x[gate == 1])
        return y


class SwitchedGRU(nn.Module):
    """An ``nn.GRU`` of one layer whose matrices are switched in each frame; the branches share its state."""

    def __init__(self, layer: nn.GRU, branches: tuple[str, ...], share: float) -> None:
        super().__init__()
        weights = {name.removesuffix("_l0"): parameter.detach() for name, parameter in layer.named_parameters()}
        self.inputs = Switched(weights["weight_ih"], weights["bias_ih"], branches, share)
        self.recurrence = Switched(weights["weight_hh"], weights["bias_hh"], branches, share)

    def forward(self, x: Tensor, state: Tensor | None, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H) of a sequence (B, T, H), and the last of them, which is the next state."""
        width = x.shape[-1]
        state = x.new_zeros(x.shape[0], width) if state is None else state
        states = []
        for heard, gate in zip(self.inputs(x, gates).unbind(1), gates.unbind(1), strict=True):
            heard, proposed = heard.split([2 * width, width], dim=-1)
            remembered, recalled = self.recurrence(state, gate).split([2 * width, width], dim=-1)
            reset, keep = (heard + remembered).sigmoid().chunk(2, dim=-1)
            state = torch.lerp(torch.addcmul(proposed, reset, recalled).tanh(), state, keep)
            states.append(state)
        return torch.stack(states, dim=1), state


class AmortizedEncoder(Encoder):
    """A trained encoder whose recurrent layers have branches, and an arbitrator that chooses by the low-level features."""

    def __init__(self, trained: Encoder, branches: tuple[str, ...], share: float, arbitrated: bool = True) -> None:
        width = trained.project.in_features
        super().__init__(width)
        self.load_state_dict(trained.state_dict())
        self.layers = nn.ModuleList(SwitchedGRU(layer, branches, share) for layer in self.layers)
        arbitrator = (nn.Linear(width, ARBITRATOR_WIDTH), nn.ReLU(), nn.Linear(ARBITRATOR_WIDTH, len(branches)))
        self.arbitrator = nn.Sequential(*arbitrator) if arbitrated and len(branches) > 1 else None
        # Of a frame in each branch, by that of the trained encoder; the arbitrator and what is not switched are counted in all.
        switched = [module.branches for module in self.modules() if isinstance(module, Switched)]
        each = [sum(multiply_adds(layers[k]) for layers in switched) for k in range(len(branches))]
        self.costs = [(multiply_adds(self) - sum(each) + cost) / multiply_adds(trained) for cost in each]

    def preferences(self, x: Tensor) -> Tensor:
        """Logits (B, T, K) of the branches, from low-level features (B, T, H)."""
        return self.arbitrator(x) if self.arbitrator else x.new_zeros(*x.shape[:2], len(self.costs))

    def choose(self, x: Tensor) -> Tensor:
        """Hard gates (B, T, K) of an encoder in use: without noise, or by chance where there is no arbitrator."""
        return gumbel_gate(self.preferences(x), hard=True, noise=self.arbitrator is None, seed=0)

    def forward(self, features: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode a piece of speech as a recogniser in use does."""
        past, *hidden = state or [None, None, None]
        x, following = self.listen(features, past)
        encodings, after = self.understand(x, hidden, self.choose(x))
        return encodings, [following, *after]


@dataclass
class Run:
    """An encoder's branches and the price of cost it is trained at (lambda, in nats an utterance); and what became of it.

    Without a price there is no arbitrator.
    """

    branches: tuple[str, ...]
    price: float | None = None
    losses: list[float] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    character_error_rate: float = math.nan  # on speakers never heard in training
    cost: float = math.nan  # of a frame, by that of the dense encoder
    wait: float = math.nan  # seconds, after the last frame

    @property
    def name(self) -> str:
        """Name for people."""
        if self.price is not None:
            return f"{self.branches[-1]}, lambda {self.price:g}"
        return f"{self.branches[-1]}, by chance" if self.by_chance else f"{self.branches[-1]} alone"

    @property
    def by_chance(self) -> bool:
        """Whether there are branches that no arbitrator chooses."""
        return self.price is None and len(self.branches) > 1


def amortize(
    run: Run, model: Recogniser, utterances: list[Utterance], arguments: argparse.Namespace, advance: Callable[[], object]
) -> None:
    """Train a model whose encoder is an `AmortizedEncoder`."""
    encoder = model.encoder
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=recipe.WEIGHT_DECAY)
    batches = spoken_numbers.batches(utterances, recipe.BATCH_SIZE, np.random.default_rng(arguments.seed))
    for step in range(arguments.steps):
        used = step / arguments.steps
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        optimiser.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warm_up * (1 + math.cos(math.pi * used)) / 2
        temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** used
        batch = TensorBatch.of(next(batches), model.output.weight.device)
        lengths = batch.encoder_lengths
        x, _ = encoder.listen(batch.features, None)
        seed = (arguments.seed << 32) + step
        gates = gumbel_gate(encoder.preferences(x), lengths, temperature=temperature, hard=True, seed=seed)
        encodings, _ = encoder.understand(x, [None, None], gates)
        predictions = model.predictor.sequence(batch.targets)
        loss = model.loss(encodings, predictions, batch.targets, lengths, batch.target_lengths)
        objective = loss + (run.price or 0.0) * amortized_cost(gates, encoder.costs, lengths)
        if arguments.backlog:
            objective = objective + arguments.backlog * wait(gates, encoder.costs, lengths, "mean")
        optimiser.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.LARGEST_GRADIENT_NORM)
        optimiser.step()
        run.losses.append(loss.item())
        advance()


def wait(gates: Tensor, costs: list[float], lengths: Tensor, statistic: str) -> Tensor:
    """Seconds that speech waits for the encoder on a device that is too slow for the dense one."""
    durations = [DENSE_DURATION * cost for cost in costs]
    return amortized_backlog(gates, durations, lengths, frame_period=ENCODER_PERIOD, statistic=statistic)


@torch.no_grad()
def evaluate(run: Run, model: Recogniser, held_out: list[Utterance]) -> None:
    """Recognise by hard gates, of which the encoder computes the chosen branch alone, and count what that costs."""
    model.eval()
    batch = TensorBatch.of(spoken_numbers.batch(held_out), model.output.weight.device)
    lengths, costs = batch.encoder_lengths, model.encoder.costs
    run.hypotheses = recognise(model, batch.features, lengths)
    run.character_error_rate = recipe.character_error_rate(held_out, run.hypotheses)
    gates = gates_of(model, batch)
    run.cost = float(lengths / lengths.sum() @ amortized_cost(gates, costs, lengths, reduction="none"))
    run.wait = float(wait(gates, costs, lengths, "last"))


@torch.no_grad()
def gates_of(model: Recogniser, batch: TensorBatch) -> Tensor:
    """Hard gates (B, T, K) of whole utterances."""
    x, _ = model.encoder.listen(batch.features, None)
    return model.encoder.choose(x)


def draw(runs: list[Run], models: list[Recogniser], held_out: list[Utterance], out: Path) -> None:
    """Draw error rates over costs, and which frames of an utterance are dense at each price; the first run is the dense one."""
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for run in runs[1:]:
        label = "" if run.by_chance else run.name if run.price is None else f"{run.price:g}"
        points = curves.setdefault(run.name if run.by_chance else run.branches[-1], [])
        points.append((run.cost, run.character_error_rate, label))
    for points in curves.values():
        points.sort()
        if len(points) > 1:
            points.append((runs[0].cost, runs[0].character_error_rate, runs[0].name))
    goal = 1 - LEAST_SAVING, runs[0].character_error_rate + MOST_WORSE
    pictures.trade_off(out / "error-over-cost.png", curves, *goal)
    shown = to_show(held_out, runs[0].hypotheses)
    batch = TensorBatch.of(spoken_numbers.batch([shown]), models[0].output.weight.device)
    arbitrated = [(run, model) for run, model in zip(runs, models, strict=True) if run.price is not None]
    gates = {run.name: gates_of(model, batch)[0, :, 0].cpu() for run, model in arbitrated}
    pictures.switching(out / "gates.png", shown.text, shown.features, FRAME_PERIOD, shown.word_starts, gates, ENCODER_PERIOD)


def report(runs: list[Run]) -> None:
    """Print the results; the sentence to remember comes last."""
    print("encoder                wrong characters   cost of a frame   wait after the last")
    for run in runs:
        rate, cost = 100 * run.character_error_rate, 100 * run.cost
        print(f"{run.name:22s} {rate:14.2f} % {cost:15.0f} % {1000 * run.wait:18.0f} ms")
    dense_rate = runs[0].character_error_rate
    good = [run for run in runs if run.price is not None and run.character_error_rate <= dense_rate + MOST_WORSE]
    print(f"\nat no more than {100 * MOST_WORSE:g} point above the dense encoder:")
    for kind in dict.fromkeys(run.branches[-1] for run in good):
        best = min((run for run in good if kind in run.branches), key=lambda run: run.cost)
        worse = 100 * (best.character_error_rate - dense_rate)
        print(f"  {best.name}: {100 * (1 - best.cost):.0f} % less cost at {worse:+.2f} points")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cheap = [name for name in BRANCHES if name != "dense"]
    parser.add_argument("--cheap", nargs="+", choices=cheap, default=cheap, help="cheap branches to try (default: all)")
    parser.add_argument("--share", type=float, default=0.08, help="of the dense weights that they keep (default: %(default)s)")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[1.0, 3.0, 6.0], help="prices of cost, in nats")
    parser.add_argument("--backlog", type=float, default=0.0, help="price of a second that frames wait (default: %(default)s)")
    parser.add_argument("--dense-steps", type=int, default=400, help="of the dense encoder's training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=110, help="of each encoder's further training (default: %(default)s)")
    parser.add_argument("--tuning", action="store_true", help="hold out some of the training speakers: to choose settings by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("amortized-out"), help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    return parser.parse_args()


def main() -> None:
    """Make the corpus, train the dense encoder, then the switched ones, and report."""
    arguments = parse_arguments()
    times = [time.perf_counter()]
    torch.manual_seed(arguments.seed)
    training, held_out = recipe.synthesise(arguments.seed, arguments.tuning)
    times.append(time.perf_counter())
    trained = Recogniser()
    train(trained, training, held_out, Budget(arguments.dense_steps), arguments.seed)
    times.append(time.perf_counter())
    runs = [Run(("dense",))]
    for kind in arguments.cheap:
        runs += [Run(("dense", kind), price) for price in arguments.lambdas] + [Run(("dense", kind)), Run((kind,))]
    models = [copy.deepcopy(trained) for _ in runs]
    for run, model in zip(runs, models, strict=True):
        model.encoder = AmortizedEncoder(trained.encoder, run.branches, arguments.share, run.price is not None)

    def follow(run: Run, model: Recogniser) -> None:
        amortize(run, model, training, arguments, advance)
        evaluate(run, model, held_out)

    # Matrices so small keep but one core busy: each encoder is trained by a thread, on a core of its own.
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    with recipe.progress("amortizing", len(runs) * arguments.steps) as advance, pool:
        list(pool.map(follow, runs, models))
    times.append(time.perf_counter())
    draw(runs, models, held_out, arguments.out)
    seconds = dict(zip(("speech", "dense training", "amortizing"), np.diff(times).tolist(), strict=True))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        results = [{"name": run.name} | asdict(run) for run in runs]
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "runs": results, "seconds": seconds}, indent=1))
    report(runs)
    print(", ".join(f"{phase} {each:.0f} s" for phase, each in seconds.items()), f"(processor {time.process_time():.0f} s)")
    print(f"pictures: {arguments.out}")


if __name__ == "__main__":
    main()
