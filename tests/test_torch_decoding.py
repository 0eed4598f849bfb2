"""Greedy decoding and beam search for PyTorch: against the losses, and against plain loops over one utterance."""

import functools
import itertools
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transducer_loss
from helpers import TOPOLOGIES
from transducer_loss.adapters.torch import beam_search, greedy, joint_rnnt_loss, prefixes

H = 5
DISTRIBUTIONS: list[dict[str, bool]] = [{}, {"normalized": True}, {"hat": True}]
of_each_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
of_each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: next(iter(each), "softmax"))


class Model(nn.Module):
    """A recurrent predictor and a joint, of random weights; no more than `most` labels have a probability."""

    def __init__(self, classes: int, most: int | None = None, blank: int = 0, seed: int = 0, normalized: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(classes, H, dtype=torch.float64)
        self.cell = nn.GRUCell(H, H, dtype=torch.float64)
        self.output = nn.Linear(H, classes, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.8)
        self.most, self.blank, self.normalized = most, blank % classes, normalized
        self.asked: list[int] = []

    def predictor(self, labels: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        assert labels.dtype == torch.int64
        self.asked.append(len(labels))
        hidden, count = state or (None, None)
        if state is None:
            assert labels.tolist() in ([self.blank], [0])  # 0 where the number of classes is still unknown
        following = self.cell(self.embedding(labels), hidden)
        count = torch.zeros(len(labels), dtype=torch.int64) if count is None else count + 1
        return torch.cat([following, count[:, None]], 1), (following, count)

    def joint(self, encoder: Tensor, features: Tensor) -> Tensor:
        hidden, count = features[..., :-1], features[..., -1]
        logits = self.output(torch.tanh(encoder + hidden))
        if self.most is not None:
            label = torch.arange(logits.shape[-1]) != self.blank
            logits = logits.masked_fill((count >= self.most)[..., None] & label, -math.inf)
        return logits.log_softmax(-1) if self.normalized else logits

    @torch.no_grad()
    def logits(self, encoder: Tensor, labels: list[int]) -> Tensor:
        """Of one utterance's (T, H) cells, (1, T, U+1, V)."""
        features, state = self.predictor(torch.tensor([self.blank]), None)
        rows = [features]
        for label in labels:
            features, state = self.predictor(torch.tensor([label]), state)
            rows.append(features)
        return self.joint(encoder[:, None], torch.cat(rows)[None])[None]

    def score(self, encoder: Tensor, labels: list[int], **options: Any) -> float:
        """Log-probability, by the loss."""
        arguments = np.array([labels], np.int64).reshape(1, -1), [len(encoder)], [len(labels)]
        loss, _ = transducer_loss.rnnt_loss(self.logits(encoder, labels).numpy(), *arguments, gradient=False, **options)
        return -float(loss[0])


def speech(*lengths: int, seed: int = 0, padding: float = math.nan) -> tuple[Tensor, list[int]]:
    """Encodings (B, T, H), and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(len(lengths), max(1, *lengths), H, generator=generator, dtype=torch.float64)
    for b, length in enumerate(lengths):
        encoder[b, length:] = padding
    return encoder, list(lengths)


def hypotheses(found: Any, b: int) -> dict[tuple[int, ...], float]:
    """Those of an utterance that exist, and their scores, in order."""
    assert found.hypotheses.dtype == found.lengths.dtype == torch.int64
    result: dict[tuple[int, ...], float] = {}
    for labels, length, score in zip(found.hypotheses[b].tolist(), found.lengths[b].tolist(), found.scores[b].tolist(), strict=True):
        if length < 0:
            assert (length, score) == (-1, -math.inf)
            assert set(labels) <= {-1}
            continue
        assert score > -math.inf
        assert set(labels[length:]) <= {-1}
        assert tuple(labels[:length]) not in result
        result[tuple(labels[:length])] = score
    assert sorted(result.values(), reverse=True) == list(result.values())
    return result


# What the scores mean.


@of_each_distribution
@of_each_topology
@pytest.mark.parametrize(("classes", "blank"), [(3, 0), (4, 2), (3, -1)])
def test_with_room_for_every_prefix_the_scores_are_the_losses(topology: str, distribution: Any, classes: int, blank: int) -> None:
    most, hat = 3, "hat" in distribution
    # HAT has labels always, so that the longest hypotheses have as many as the frames take.
    model = Model(classes, None if hat else most, blank, normalized="normalized" in distribution)
    encoder, lengths = speech(*((2, 1) if hat else (4, 1, 3, 2)))
    labels = [label for label in range(classes) if label != blank % classes]
    every = [list(each) for U in range(most + 1) for each in itertools.product(labels, repeat=U)]
    room = sum(len(labels) ** U for U in range(1 + (2 * most if hat else most)))
    options = {"topology": topology, "blank": blank, **distribution}
    exact = functools.cache(lambda b, each: model.score(encoder[b, : lengths[b]], list(each), **options))
    for beam in (room, room + 3):
        found = beam_search(encoder, lengths, model.predictor, model.joint, beam=beam, max_symbols=most, **options)
        assert found.scores.dtype == torch.float64
        assert found.lengths.shape == found.scores.shape == found.hypotheses.shape[:2] == (len(lengths), beam)
        for b, T in enumerate(lengths):
            possible = [tuple(each) for each in every if topology == "regular" or len(each) <= T]
            got = {each: score for each, score in hypotheses(found, b).items() if len(each) <= most}
            assert got.keys() == set(possible)
            for each, score in got.items():
                assert score == pytest.approx(exact(b, each), abs=1e-9)


@of_each_topology
def test_of_a_narrow_beam_no_score_is_above_the_loss(topology: str) -> None:
    model = Model(6)
    encoder, lengths = speech(9, 7, 8)
    found = beam_search(encoder, lengths, model.predictor, model.joint, beam=3, max_symbols=4, topology=topology)
    below = []
    for b, T in enumerate(lengths):
        for labels, score in hypotheses(found, b).items():
            below.append(model.score(encoder[b, :T], list(labels), topology=topology) - score)
    assert min(below) > -1e-9
    assert max(below) > 1e-3  # the beam is narrow


@of_each_topology
def test_scores_are_those_of_the_joint_loss(topology: str) -> None:
    model = Model(4)
    encoder, lengths = speech(3, 2, padding=0.0)
    count = torch.zeros(1, dtype=torch.float64)
    found = beam_search(
        encoder, lengths, lambda labels, state: (model.predictor(labels, state)[0][:, :-1], model.predictor(labels, state)[1]),
        lambda e, p: model.joint(e, torch.cat([p, count.expand(len(p), 1)], 1)), beam=500, max_symbols=4, topology=topology,
    )  # fmt: skip
    for b, T in enumerate(lengths):
        some = [labels for labels in hypotheses(found, b) if len(labels) <= 4][:20]
        assert len(some) >= 3 * T
        for labels in some:
            state, rows = None, []
            for label in (0, *labels):
                features, state = model.predictor(torch.tensor([label]), state)
                rows.append(features[:, :-1])
            loss = joint_rnnt_loss(
                encoder[b : b + 1], torch.stack(rows, 1), model.output.weight, model.output.bias, torch.tensor([labels], dtype=torch.int64),
                [T], [len(labels)], topology=topology, occupancy_floor=0.0,
            )  # fmt: skip
            assert hypotheses(found, b)[labels] == pytest.approx(-loss.item(), abs=1e-9)


# The search itself, against plain loops.


def plain_beam_search(
    model: Model, encoder: Tensor, beam: int, max_symbols: int, topology: str
) -> list[tuple[tuple[int, ...], float]]:
    """Of one utterance (T, H), by the rule of the docstring, with dictionaries."""

    def log_probs(prefix: tuple[int, ...], t: int) -> list[float]:
        return list(model.logits(encoder[t : t + 1], list(prefix))[0, 0, -1].log_softmax(-1).tolist())

    def add(scores: dict[tuple[int, ...], float], prefix: tuple[int, ...], score: float) -> None:
        scores[prefix] = float(np.logaddexp(scores.get(prefix, -math.inf), score))

    def best(scores: dict[tuple[int, ...], float]) -> list[tuple[tuple[int, ...], float]]:
        return sorted(scores.items(), key=lambda item: -item[1])[:beam]

    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for t in range(len(encoder)):
        cells = {prefix: log_probs(prefix, t) for prefix in beams}
        leaving = {prefix: score + cells[prefix][model.blank] for prefix, score in beams.items()}
        arrived = beams
        for _ in range(max_symbols if topology == "regular" else 1):
            onward, fresh = {}, {}
            for prefix, score in arrived.items():
                for label, log_prob in enumerate(cells[prefix]):
                    if label != model.blank:
                        (onward if (*prefix, label) in cells else fresh)[(*prefix, label)] = score + log_prob
            for prefix, score in onward.items():
                add(leaving, prefix, score + (0.0 if topology == "modified" else cells[prefix][model.blank]))
            rivals = leaving | dict(best(fresh)) if topology == "modified" else leaving
            last = best(rivals)[-1][1] if len(rivals) >= beam else -math.inf
            new = {prefix: score for prefix, score in best(fresh) if score >= last}
            for prefix, score in new.items():
                cells[prefix] = log_probs(prefix, t)
                leaving[prefix] = score + (0.0 if topology == "modified" else cells[prefix][model.blank])
            arrived = onward | new
        beams = dict(best(leaving))
    return list(beams.items())


def random_search(seed: int) -> tuple[Model, Tensor, list[int], dict[str, int]]:
    """A model that is sometimes silent and often talkative, speech, and how to search."""
    rng = np.random.default_rng(seed)
    model = Model(int(rng.integers(3, 6)), seed=seed)
    with torch.no_grad():
        model.output.bias[0] += int(rng.integers(-2, 3))
        model.output.weight *= int(rng.integers(1, 4))
    encoder, lengths = speech(*rng.integers(1, 8, 5).tolist(), seed=seed)
    return model, encoder * int(rng.integers(1, 3)), lengths, dict(beam=int(rng.integers(1, 6)), max_symbols=int(rng.integers(1, 5)))


@of_each_topology
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 9, 23, 95])  # in the last three a prefix that was passed over comes again
def test_beam_search_is_the_plain_one(topology: str, seed: int) -> None:
    model, encoder, lengths, options = random_search(seed)
    found = beam_search(encoder, lengths, model.predictor, model.joint, topology=topology, **options)
    for b, T in enumerate(lengths):
        exact = plain_beam_search(model, encoder[b, :T], topology=topology, **options)
        got = list(hypotheses(found, b).items())
        assert [labels for labels, _ in got] == [labels for labels, _ in exact]
        np.testing.assert_allclose([score for _, score in got], [score for _, score in exact], rtol=0, atol=1e-9)


def plain_greedy(model: Model, encoder: Tensor, max_symbols: int, topology: str) -> tuple[list[int], list[int], float]:
    labels: list[int] = []
    frames: list[int] = []
    score = 0.0
    for t in range(len(encoder)):
        said = 0
        while True:
            cell = model.logits(encoder[t : t + 1], labels)[0, 0, -1].log_softmax(-1)
            most = max_symbols if topology == "regular" else 1
            best = model.blank if said == most else int(cell.argmax())
            score += float(cell[best])
            if best == model.blank:
                break
            labels.append(best)
            frames.append(t)
            said += 1
            if topology == "modified":
                break
    return labels, frames, score


@of_each_topology
@pytest.mark.parametrize(("max_symbols", "blank"), [(1, 0), (2, 3), (10, -1)])
def test_greedy_is_the_plain_one(topology: str, max_symbols: int, blank: int) -> None:
    model = Model(6, blank=blank, seed=max_symbols)
    encoder, lengths = speech(9, 1, 4, 12, 7, seed=1)
    path = greedy(
        encoder, torch.tensor(lengths), model.predictor, model.joint, blank=blank, max_symbols=max_symbols, topology=topology
    )
    assert path.labels.shape == path.frames.shape == (5, int(path.lengths.max()))
    for b, T in enumerate(lengths):
        labels, frames, score = plain_greedy(model, encoder[b, :T], max_symbols, topology)
        n = int(path.lengths[b])
        assert path.labels[b].tolist() == labels + [-1] * (path.labels.shape[1] - n)
        assert path.frames[b].tolist() == frames + [-1] * (path.labels.shape[1] - n)
        assert path.scores[b].item() == pytest.approx(score, abs=1e-9)
        assert n == len(labels)
    assert path.lengths.max() > 3


@of_each_distribution
@of_each_topology
def test_a_greedy_path_is_no_likelier_than_all_paths_of_its_labels(topology: str, distribution: Any) -> None:
    model = Model(4, blank=1, seed=5, normalized="normalized" in distribution)
    encoder, lengths = speech(3, 5, seed=2)
    options = {"topology": topology, "blank": 1, **distribution}
    path = greedy(encoder, lengths, model.predictor, model.joint, **options)
    for b, T in enumerate(lengths):
        best = model.score(encoder[b, :T], path.labels[b, : path.lengths[b]].tolist(), **options)
        arguments = model.logits(encoder[b, :T], path.labels[b, : path.lengths[b]].tolist()).numpy(), path.labels[b : b + 1].numpy()
        viterbi = transducer_loss.align(*arguments, [T], path.lengths[b : b + 1], **options)
        assert path.scores[b].item() <= float(viterbi.score[0]) + 1e-9 <= best + 2e-9


# Batches.


@of_each_topology
def test_a_batch_is_decoded_as_its_utterances_are(topology: str) -> None:
    model = Model(5, seed=3)
    encoder, lengths = speech(6, 11, 1, 8, 3, seed=4)
    options: dict[str, Any] = {"topology": topology, "max_symbols": 3}
    found = beam_search(encoder, lengths, model.predictor, model.joint, beam=4, **options)
    path = greedy(encoder, lengths, model.predictor, model.joint, **options)
    for b, T in enumerate(lengths):
        alone = encoder[b : b + 1, :T], [T], model.predictor, model.joint
        one = hypotheses(beam_search(*alone, beam=4, **options), 0)
        assert list(one) == list(hypotheses(found, b))
        np.testing.assert_allclose(list(one.values()), list(hypotheses(found, b).values()), rtol=0, atol=1e-9)
        one_path = greedy(*alone, **options)
        assert one_path.labels[0].tolist() == path.labels[b, : path.lengths[b]].tolist()
        assert one_path.scores[0].item() == pytest.approx(path.scores[b].item(), abs=1e-9)


def test_an_utterance_without_frames_is_empty() -> None:
    model = Model(4)
    for lengths in (0, 3), (0, 0):
        encoder, _ = speech(*lengths)
        found = beam_search(encoder, lengths, model.predictor, model.joint, beam=3)
        assert hypotheses(found, 0) == {(): 0.0}
        path = greedy(encoder, lengths, model.predictor, model.joint)
        assert path.lengths[0] == path.scores[0] == 0
    assert found.hypotheses.shape == (2, 3, 0)
    assert path.labels.shape == path.frames.shape == (2, 0)


@of_each_topology
def test_nbest_is_the_head_of_the_beam(topology: str) -> None:
    model = Model(4)
    encoder, lengths = speech(4, 5)
    whole = beam_search(encoder, lengths, model.predictor, model.joint, beam=6, topology=topology)
    head = beam_search(encoder, lengths, model.predictor, model.joint, beam=6, nbest=2, topology=topology)
    assert head.scores.shape == (2, 2)
    for b in range(2):
        assert list(hypotheses(head, b).items()) == list(hypotheses(whole, b).items())[:2]


@of_each_topology
def test_equals_are_taken_by_lowest_label_and_repeat(topology: str) -> None:
    def search(beam: int) -> Any:
        return beam_search(
            torch.zeros(2, 2, 1), [2, 1], lambda labels, state: (torch.zeros(len(labels), 1), None),
            lambda e, p: torch.zeros(len(e), 5), beam=beam, blank=1, max_symbols=2, topology=topology,
        )  # fmt: skip

    # Five classes of equal probability: all prefixes of a length are equal.
    seven = search(7)
    singles = [(0,), (2,), (3,), (4,)]
    assert list(hypotheses(seven, 1))[:5] == [(), *singles]
    # In two frames a label has two places, or as many as the blank and one more.
    assert list(hypotheses(seven, 0))[:5] == ([*singles, ()] if topology == "modified" else [(), *singles])
    for narrow in (1, 2, 3):
        for b in range(2):
            assert list(hypotheses(search(narrow), b)) == list(hypotheses(search(narrow), b))


# What runs.


def test_the_predictor_runs_once_on_every_prefix() -> None:
    model = Model(3, 3)
    every = sum(2**U for U in range(4))
    encoder, lengths = speech(4, 5, 3)
    beam_search(encoder, lengths, model.predictor, model.joint, beam=every, max_symbols=3)
    # All utterances begin with one empty prefix.
    assert sum(model.asked) == 1 + len(lengths) * (every - 1)
    assert len(model.asked) == 1 + 3
    model.asked.clear()
    path = greedy(encoder, lengths, model.predictor, model.joint)
    assert sum(model.asked) == 1 + int(path.lengths.sum())


def test_the_predictor_runs_on_no_prefix_that_leaves_the_beam_at_once() -> None:
    model = Model(5)
    with torch.no_grad():
        model.output.bias[model.blank] += 9  # the empty prefix is the best, and one other has room
    beam_search(*speech(1), model.predictor, model.joint, beam=2, topology="modified")
    assert model.asked == [1, 1]


@of_each_topology
def test_the_joint_runs_once_on_every_cell(topology: str) -> None:
    model = Model(3, 2)
    cells: list[tuple[float, ...]] = []

    def joint(encoder: Tensor, features: Tensor) -> Tensor:
        assert not encoder.isnan().any()
        cells.extend(tuple(row) for row in torch.cat([encoder, features], 1).tolist())
        return model.joint(encoder, features)

    encoder, lengths = speech(4, 5, 3)
    beam_search(encoder, lengths, model.predictor, joint, beam=7, max_symbols=2, topology=topology)
    assert len(cells) == len(set(cells)) <= 7 * 12
    cells.clear()
    path = greedy(encoder, lengths, model.predictor, joint, topology=topology)
    assert len(cells) == len(set(cells)) == 12 + (0 if topology == "modified" else int(path.lengths.sum()))


@of_each_topology
def test_hashes_that_collide_change_nothing(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(4, seed=1)
    arguments = *speech(5, 6), model.predictor, model.joint
    expected = beam_search(*arguments, beam=9, max_symbols=2, topology=topology)
    for multiplier in (0, 1):
        monkeypatch.setattr(prefixes, "_MULTIPLIER", multiplier)
        found = beam_search(*arguments, beam=9, max_symbols=2, topology=topology)
        for name in ("hypotheses", "lengths", "scores"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


State = namedtuple("State", ["hidden", "rest"])
NESTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda state: state),
    "tuple": (lambda x: (x, x + 1), lambda state: state[1] - 1),
    "empty": (lambda x: ((), x), lambda state: state[1]),
    "list": (lambda x: [x, [x + 1]], lambda state: state[1][0] - 1),
    "dict": (lambda x: {"a": x, "b": {"c": (x + 1,)}}, lambda state: state["b"]["c"][0] - 1),
    "ordered dict": (lambda x: OrderedDict(a=x), lambda state: state["a"]),
    "named tuple": (lambda x: State(x, None), lambda state: state.hidden),
    "deep": (lambda x: [({"a": State([x], (x, None))},)], lambda state: state[0][0]["a"].rest[0]),
    "more dimensions": (lambda x: x[:, None, :, None], lambda state: state[:, 0, :, 0]),
    "not contiguous": (lambda x: x.t().contiguous().t(), lambda state: state),
}


@pytest.mark.parametrize("nest", NESTS)
def test_state_of_any_nest(nest: str) -> None:
    made, read = NESTS[nest]
    model = Model(5, seed=2)
    arguments = speech(6, 4, 5)

    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden = model.cell(model.embedding(labels), None if state is None else read(state))
        return torch.cat([hidden, torch.zeros(len(hidden), 1)], 1), made(hidden)

    expected = beam_search(*arguments, model.predictor, model.joint, max_symbols=2)
    found = beam_search(*arguments, predictor, model.joint, max_symbols=2)
    # The count of labels that the model's own features have has no part in a joint without `most`.
    assert torch.equal(found.hypotheses, expected.hypotheses)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-12)
    path, expected_path = (greedy(*arguments, each, model.joint, max_symbols=2) for each in (predictor, model.predictor))
    assert torch.equal(path.labels, expected_path.labels)


def test_a_predictor_without_state() -> None:
    embedding = nn.Embedding(4, H, dtype=torch.float64)
    model = Model(4)

    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert state is None
        return torch.cat([embedding(labels), torch.zeros(len(labels), 1)], 1), None

    assert beam_search(*speech(3, 2), predictor, model.joint).scores.isfinite().all()
    assert greedy(*speech(3, 2), predictor, model.joint).scores.isfinite().all()


def test_a_transposed_lstm() -> None:
    torch.manual_seed(0)
    lstm, embedding, output = nn.LSTM(4, 4, 2, batch_first=True), nn.Embedding(5, 4), nn.Linear(4, 5)

    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        before = None if state is None else tuple(each.transpose(0, 1).contiguous() for each in state)
        features, after = lstm(embedding(labels)[:, None], before)
        return features[:, 0], tuple(each.transpose(0, 1) for each in after)

    encoder = torch.randn(2, 6, 4)
    found = beam_search(encoder, [6, 4], predictor, lambda e, p: output(torch.tanh(e + p)), beam=40)
    for b, T in enumerate([6, 4]):
        for labels, score in list(hypotheses(found, b).items())[:5]:
            features, _ = lstm(embedding(torch.tensor([[0, *labels]])))
            loss = joint_rnnt_loss(
                encoder[b : b + 1], features, output.weight, output.bias, torch.tensor([labels], dtype=torch.int64), [T], [len(labels)]
            )
            assert -0.2 < score + loss.item() < 1e-4


# Numbers.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    T = 200
    log_probs = torch.full((1, T, 4), -40.0, dtype=dtype)
    log_probs[..., 0] = -torch.rand(1, T, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = log_probs.double()[0, :, 0].sum().item()

    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(len(labels), 1, dtype=dtype), None

    arguments: tuple[Any, ...] = log_probs, [T], predictor, lambda encoder, features: encoder
    path = greedy(*arguments, normalized=True)
    found = beam_search(*arguments, beam=2, normalized=True)
    for score in (path.scores, found.scores[:, :1]):
        assert score.dtype == torch.float32
        assert score.item() == pytest.approx(expected, rel=1e-6)
    assert found.lengths[0, 0] == 0


def test_one_utterance_of_nan_leaves_the_others_alone() -> None:
    model = Model(5, blank=2, seed=1)
    options = {"blank": 2, "max_symbols": 3}
    encoder, lengths = speech(5, 4, 6)
    expected = [search(encoder, lengths, model.predictor, model.joint, **options) for search in (beam_search, greedy)]
    for poison in (math.nan, math.inf):
        encoder[1, 2] = math.nan if math.isnan(poison) else encoder[1, 2]

        def joint(e: Tensor, p: Tensor, poison: float = poison) -> Tensor:
            logits = model.joint(e.nan_to_num(), p)
            return logits.index_fill(1, torch.tensor([3]), poison).where(e.isnan().any(1, keepdim=True), logits)

        found, path = (search(encoder, lengths, model.predictor, joint, **options) for search in (beam_search, greedy))
        assert found.scores[1].isnan().all()
        assert (found.lengths[1] == -1).all()
        assert (found.hypotheses[1] == -1).all()
        assert path.scores[1].isnan()
        assert (path.frames[1] != 2).all()
        for b in (0, 2):
            assert hypotheses(found, b) == hypotheses(expected[0], b)
            assert path.scores[b] == expected[1].scores[b]


@of_each_topology
def test_what_has_no_probability_is_not_there(topology: str) -> None:
    def joint(encoder: Tensor, features: Tensor) -> Tensor:  # blank, or class 2
        return torch.tensor([0.0, -math.inf, 1.0, -math.inf]).expand(len(encoder), 4)

    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert set(labels.tolist()) <= {0, 2}
        return torch.zeros(len(labels), 1), None

    found = beam_search(torch.zeros(1, 2, 1), [2], predictor, joint, beam=20, max_symbols=2, topology=topology)
    most = 4 if topology == "regular" else 2
    assert set(hypotheses(found, 0)) == {(2,) * U for U in range(most + 1)}
    assert found.hypotheses.shape == (1, 20, most)


def test_nothing_but_labels_leaves_no_hypothesis() -> None:
    def joint(encoder: Tensor, features: Tensor) -> Tensor:
        return torch.tensor([-math.inf, 0.0]).expand(len(encoder), 2)

    arguments = torch.zeros(1, 2, 1), [2], lambda labels, state: (torch.zeros(len(labels), 1), None), joint
    assert hypotheses(beam_search(*arguments, max_symbols=2), 0) == {}
    assert hypotheses(beam_search(*arguments, topology="constrained"), 0) == {}
    assert hypotheses(beam_search(*arguments, topology="modified"), 0) == {(1, 1): 0.0}
    assert greedy(*arguments, max_symbols=2).scores.item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blank_alone(dtype: torch.dtype) -> None:
    encoder, lengths = speech(3, 2)
    arguments = lengths, lambda labels, state: (torch.zeros(1, 1), None), lambda e, p: torch.zeros(len(e), 1, dtype=dtype)
    for options in DISTRIBUTIONS:
        found = beam_search(encoder.float(), *arguments, beam=2, **options)
        assert list(hypotheses(found, 0)) == list(hypotheses(found, 1)) == [()]
        path = greedy(encoder, *arguments, **options)
        assert path.lengths.tolist() == [0, 0]
        assert found.scores.dtype == path.scores.dtype == dtype


def test_neither_history_nor_mode_changes() -> None:
    model = Model(5)
    encoder, lengths = speech(4, 3)
    encoder.requires_grad_()
    found, path = (search(encoder, lengths, model.predictor, model.joint) for search in (beam_search, greedy))
    assert not found.scores.requires_grad
    assert not path.scores.requires_grad
    assert torch.is_grad_enabled()
    assert (found.scores * torch.ones((), requires_grad=True)).requires_grad  # no inference tensor


def test_lengths_of_every_kind() -> None:
    model = Model(4)
    encoder, lengths = speech(4, 3)
    expected = greedy(encoder, lengths, model.predictor, model.joint)
    for kind in (tuple, np.array, torch.tensor, lambda value: torch.tensor(value, dtype=torch.int32)):
        assert torch.equal(greedy(encoder, kind(lengths), model.predictor, model.joint).labels, expected.labels)


# Errors.


def zeros(M: int, *shape: int) -> Tensor:
    return torch.zeros(M, *shape)


GOOD: dict[str, Any] = {
    "encoder": torch.zeros(2, 3, 4),
    "encoder_lengths": [3, 2],
    "predictor": lambda labels, state: (zeros(len(labels), 4), zeros(len(labels), 1)),
    "joint": lambda e, p: zeros(len(e), 5),
}


@pytest.mark.parametrize("search", [greedy, beam_search])
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"encoder": [1.0]}, TypeError, r"encoder: expected a torch\.Tensor, got list"),
        ({"encoder": torch.zeros(2, 4)}, ValueError, r"encoder: expected shape \(B, T, H\) .* got \(2, 4\)"),
        ({"encoder": torch.zeros(2, 0, 4)}, ValueError, r"encoder: expected shape \(B, T, H\) with B and T of 1 or more"),
        ({"encoder_lengths": [3]}, ValueError, r"encoder_lengths: expected shape \(B,\) = \(2,\), got \(1,\)"),
        ({"encoder_lengths": [3, 4]}, ValueError, r"encoder_lengths: expected lengths in \[0, T = 3\], got 4 at index 1"),
        ({"encoder_lengths": torch.tensor([-1, 3])}, ValueError, r"expected lengths in \[0, T = 3\], got -1 at index 0"),
        ({"encoder_lengths": [3.0, 2.0]}, TypeError, "encoder_lengths: expected integers, got dtype float64"),
        ({"blank": 5}, ValueError, r"blank: expected a class in \[-5, 5\), got 5"),
        ({"blank": -6}, ValueError, r"blank: expected a class in \[-5, 5\), got -6"),
        ({"blank": 0.0}, TypeError, "blank: expected an int, got float"),
        ({"max_symbols": 0}, ValueError, "max_symbols: expected 1 or more, got 0"),
        ({"topology": "ctc"}, ValueError, "topology: expected one of 'regular', 'modified', 'constrained', got 'ctc'"),
        ({"hat": True, "normalized": True}, ValueError, "hat: expected False with normalized=True"),
        ({"predictor": lambda labels, state: zeros(len(labels), 4)}, TypeError, "predictor: expected a pair of features and state, got Tensor"),
        ({"predictor": lambda labels, state: (None, None)}, TypeError, r"predictor: features: expected a torch\.Tensor, got NoneType"),
        ({"predictor": lambda labels, state: (zeros(len(labels), 4), zeros(2, len(labels), 4))}, ValueError, r"predictor: expected a row for each of the M = 1 labels .* got shape \(2, 1, 4\)"),
        ({"predictor": lambda labels, state: (zeros(len(labels), 4), {"a": object()})}, TypeError, "predictor: expected a state of tensors, .* got object"),
        ({"joint": lambda e, p: zeros(len(e), 1, 5)}, ValueError, r"joint: expected float logits \(M, V\), M = 1, got torch.float32 of shape \(1, 1, 5\)"),
        ({"joint": lambda e, p: zeros(len(e), 5).long()}, ValueError, r"joint: expected float logits \(M, V\), M = 1, got torch.int64"),
        ({"joint": lambda e, p: None}, TypeError, r"joint: expected a torch\.Tensor, got NoneType"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(search: Any, changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = GOOD | changed
    positional = [arguments.pop(name) for name in GOOD]
    if "joint" in changed:
        positional[0], positional[1] = positional[0][:1], [3]
    with pytest.raises(kind, match=message):
        search(*positional, **arguments)


def test_a_state_that_changes_its_kind_is_an_error() -> None:
    def predictor(labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        return zeros(len(labels), 4), (zeros(len(labels)),) * (1 if state is None else 2)

    for search in (greedy, beam_search):
        with pytest.raises(TypeError, match="made alike in every call, got tuple and tuple"):
            search(*list(GOOD.values())[:2], predictor, lambda e, p: zeros(len(e), 5) + torch.arange(5))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"beam": 0}, ValueError, "beam: expected 1 or more, got 0"),
        ({"beam": 2.0}, TypeError, "beam: expected an int, got float"),
        ({"nbest": 0}, ValueError, "nbest: expected 1 or more, got 0"),
        ({"nbest": 5}, ValueError, "nbest: expected at most beam = 4, got 5"),
    ],
)
def test_errors_of_the_beam(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        beam_search(**GOOD, **options)
