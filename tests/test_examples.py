"""The pure parts of the examples: text, error rates, batches, noise, decoding; the recognisers' models; and short runs."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import spoken_numbers
import transducer_loss


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (215, "two hundred fifteen"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (1100, "one thousand one hundred"),
        (342006, "three hundred forty two thousand and six"),
        (999999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_number_words(number, words):
    assert spoken_numbers.number_words(number) == words


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_numbers_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match="number: expected 0 to 999999"):
        spoken_numbers.number_words(number)


def test_every_number_has_its_own_words_in_the_alphabet():
    numbers = range(0, 1_000_000, 997)
    texts = [spoken_numbers.number_words(number) for number in numbers]
    assert len(set(texts)) == len(numbers)
    for text in texts:
        labels = spoken_numbers.to_labels(text)
        assert spoken_numbers.BLANK not in labels
        assert spoken_numbers.to_text(labels) == text


@pytest.mark.parametrize(
    ("reference", "hypothesis", "distance"),
    [
        ("", "", 0),
        ("", "ab", 2),
        ("ab", "", 2),
        ("six", "six", 0),
        ("six", "fix", 1),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(reference, hypothesis, distance):
    assert spoken_numbers.edit_distance(reference, hypothesis) == distance


def test_the_error_rate_is_of_all_characters_together():
    assert spoken_numbers.error_rate(["six", "thirteen"], ["fix", "thirty"]) == pytest.approx(4 / 11)


def utterance(frames, text="six"):
    features = np.full((frames, spoken_numbers.MEL_BINS), frames, np.float32)
    return spoken_numbers.Utterance(text, "f1", np.inf, features, np.zeros(1))


def test_a_batch_is_padded_with_zeros():
    batch = spoken_numbers.batch([utterance(3, "six"), utterance(5, "eight")])
    assert batch.features.shape == (2, 5, spoken_numbers.MEL_BINS)
    assert batch.features.dtype == np.float32
    assert batch.feature_lengths.tolist() == [3, 5]
    assert batch.target_lengths.tolist() == [3, 5]
    assert (batch.features[0, :3] == 3).all()
    assert (batch.features[0, 3:] == 0).all()
    assert spoken_numbers.to_text(batch.targets[0, :3]) == "six"
    assert batch.targets[0, 3:].tolist() == [0, 0]


def test_a_batch_is_padded_to_multiples():
    utterances = [utterance(3, "six"), utterance(5, "eight")]
    batch, padded = spoken_numbers.batch(utterances), spoken_numbers.batch(utterances, (4, 5))
    assert padded.features.shape == (2, 8, spoken_numbers.MEL_BINS)
    assert padded.targets.shape == (2, 5)
    assert padded.feature_lengths.tolist() == [3, 5]
    assert padded.target_lengths.tolist() == [3, 5]
    np.testing.assert_array_equal(padded.features[:, :5], batch.features)
    np.testing.assert_array_equal(padded.targets, batch.targets)
    assert (padded.features[:, 5:] == 0).all()


def test_an_epoch_holds_every_utterance_once_and_the_seed_decides_the_order():
    utterances = [utterance(frames) for frames in range(1, 24)]

    def lengths(seed):
        batches = spoken_numbers.epoch(utterances, 5, np.random.default_rng(seed))
        return [batch.feature_lengths.tolist() for batch in batches]

    assert sorted(length for batch in lengths(0) for length in batch) == list(range(1, 24))
    assert [len(batch) for batch in sorted(lengths(0), key=len)] == [3, 5, 5, 5, 5]
    assert lengths(0) == lengths(0)
    assert lengths(0) != lengths(1)


def test_batches_go_on_in_another_order():
    utterances = [utterance(frames) for frames in range(1, 24)]
    batches = spoken_numbers.batches(utterances, 5, np.random.default_rng(0), (8, 1))
    first, second = (list(itertools.islice(batches, 5)) for _ in range(2))
    for epoch in (first, second):
        assert sorted(length for batch in epoch for length in batch.feature_lengths.tolist()) == list(range(1, 24))
        assert {batch.features.shape[1] for batch in epoch} == {8, 16, 24}
    assert [b.feature_lengths.tolist() for b in first] != [b.feature_lengths.tolist() for b in second]


@pytest.mark.parametrize("ratio", [20.0, 5.0])
def test_noise_comes_at_its_ratio(ratio):
    samples = np.sin(np.arange(10_000, dtype=np.float32))
    noise = spoken_numbers.add_noise(samples, ratio, np.random.default_rng(0)) - samples
    assert 10 * np.log10(np.mean(samples**2) / np.mean(noise**2)) == pytest.approx(ratio, abs=0.01)


def test_no_noise_changes_nothing():
    samples = np.ones(100, np.float32)
    assert spoken_numbers.add_noise(samples, np.inf, np.random.default_rng(0)) is samples


def test_no_held_out_speaker_is_heard_in_training():
    assert not set(spoken_numbers.HELD_OUT_SPEAKERS) & set(spoken_numbers.TRAINING_SPEAKERS)


def test_a_corpus_of_speech():
    pytest.importorskip("espeakng_loader", reason="the speech comes from espeakng-loader")
    pytest.importorskip("kaldi_native_fbank", reason="the features come from kaldi-native-fbank")
    training, held_out = spoken_numbers.corpus(4, 3, seed=1)
    assert {u.speaker for u in held_out} <= set(spoken_numbers.HELD_OUT_SPEAKERS)
    assert (len(training), len(held_out)) == (4, 3)
    assert not {u.text for u in training} & {u.text for u in held_out}
    for u in training + held_out:
        assert u.features.dtype == np.float32
        assert np.isfinite(u.features).all()
        # The last word begins within the speech, and speech is no faster than 40 characters a second.
        assert len(u.word_starts) == len(u.text.split())
        assert u.word_starts[-1] < len(u.features) * spoken_numbers.FRAME_PERIOD
        assert len(u.text) < 40 * len(u.features) * spoken_numbers.FRAME_PERIOD


def test_speakers_to_tune_by_are_none_of_those_reported_by(monkeypatch):
    monkeypatch.setattr(spoken_numbers.Synthesiser, "say", lambda *_: (np.zeros(8000, np.float32), np.zeros(1)))
    training, held_out = spoken_numbers.corpus(100, 20, tuning=True)
    heard, judged = ({u.speaker for u in part} for part in (training, held_out))
    assert not heard & judged
    assert heard | judged == set(spoken_numbers.TRAINING_SPEAKERS)


def test_an_unknown_voice_is_refused():
    pytest.importorskip("espeakng_loader", reason="the speech comes from espeakng-loader")
    synthesiser = spoken_numbers.Synthesiser()
    with pytest.raises(ValueError, match="no voice variant 'nobody'"):
        synthesiser.say("six", "en-us", "nobody", 200, 50)
    with pytest.raises(ValueError, match="no voice 'nowhere'"):
        synthesiser.say("six", "nowhere", "f1", 200, 50)


@pytest.fixture
def recipe():
    pytest.importorskip("rich", reason="the recognisers show their progress")
    import recipe

    return recipe


def test_greedy_decoding_takes_characters_until_every_utterance_is_blank(recipe):
    blank, (s, e, v) = spoken_numbers.BLANK, spoken_numbers.to_labels("sev")
    said = {  # by frame: what is likeliest, in turn
        0: [[blank, blank]],
        1: [[s, blank], [e, v], [blank, blank]],  # utterance 1 is over at its first blank
        2: [[v, s], [blank, blank]],
        3: [[s, e], [s, s], [s, blank]],  # past the end of utterance 0
        4: [[s, s]],  # past the end of both
    }
    asked = []

    def likeliest(frame, before, last):
        asked.append((frame, before.tolist(), last.tolist()))
        return np.array(said[frame].pop(0))

    assert recipe.greedy(likeliest, range(5), np.array([3, 4])) == ["sev", "ses"]
    assert asked == [
        (0, [blank, blank], [blank, blank]),
        (1, [blank, blank], [blank, blank]),
        (1, [blank, blank], [s, blank]),
        (1, [s, blank], [e, blank]),
        (2, [s, blank], [e, blank]),
        (2, [e, blank], [v, s]),
        (3, [e, blank], [v, s]),
        (3, [e, s], [v, e]),
        (3, [e, e], [v, s]),
        (4, [e, e], [v, s]),
    ]


def test_greedy_decoding_of_a_talkative_model_ends(recipe):
    texts = recipe.greedy(lambda frame, before, last: np.full(2, 5), range(6), np.array([3, 1]))
    assert [len(text) for text in texts] == [3 * recipe.MOST_CHARACTERS_PER_FRAME, recipe.MOST_CHARACTERS_PER_FRAME]
    assert recipe.greedy(lambda frame, before, last: np.zeros(2), range(6), np.array([3, 1])) == ["", ""]


@pytest.fixture
def recogniser():
    torch = pytest.importorskip("torch", reason="the recogniser is a PyTorch model")
    pytest.importorskip("matplotlib", reason="the recogniser draws pictures")
    pytest.importorskip("rich", reason="the recogniser shows its progress")
    import pytorch_recogniser

    torch.manual_seed(0)
    return pytorch_recogniser.Recogniser(width=8)


def test_the_encoder_hears_the_same_in_pieces(recogniser):
    import torch

    features = torch.randn(2, 23, spoken_numbers.MEL_BINS)
    whole, _ = recogniser.encoder(features)
    state, pieces = None, []
    for start in range(0, 23, 8):
        piece, state = recogniser.encoder(features[:, start : start + 8], state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert whole.shape == (2, 6, 8)


def test_the_encoder_does_not_hear_the_future(recogniser):
    import torch

    features = torch.randn(1, 24, spoken_numbers.MEL_BINS)
    other = features.clone()
    other[:, 12:] = 0
    now, _ = recogniser.encoder(features)
    then, _ = recogniser.encoder(other)
    torch.testing.assert_close(now[:, :3], then[:, :3], rtol=0, atol=0)
    assert not torch.equal(now[:, 3:], then[:, 3:])


def test_decoding_stops_at_the_length_of_an_utterance(recogniser):
    import torch

    with torch.no_grad():
        recogniser.output.bias[5] = 100  # always the same character
    import pytorch_recogniser

    features = torch.zeros(2, 16, spoken_numbers.MEL_BINS)
    texts = pytorch_recogniser.recognise(recogniser, features, torch.tensor([4, 1]))
    most = pytorch_recogniser.recipe.MOST_CHARACTERS_PER_FRAME
    assert [len(text) for text in texts] == [4 * most, most]


def test_words_in_time(recogniser):
    import pytorch_recogniser

    heard = spoken_numbers.Utterance("six two", "f1", np.inf, np.zeros((1, 1), np.float32), np.array([0.1, 0.5]))
    words = pytorch_recogniser.words_in_time(heard, np.array([3, 4, 5, 6, 15, 15, 16]))
    assert [(word.text, word.spoken) for word in words] == [("six", 0.1), ("two", 0.5)]
    assert [word.emitted for word in words] == pytest.approx([0.12, 0.6])


def noises(count):
    """Utterances of noise, which need no synthesiser."""
    rng = np.random.default_rng(count)
    return [
        spoken_numbers.Utterance(
            "six thousand two", "f1", ratio, rng.normal(size=(frames, spoken_numbers.MEL_BINS)).astype("f"), np.array([0.0, 0.2, 0.6])
        )
        for frames, ratio in zip(rng.integers(60, 90, count), np.resize([np.inf, 10.0], count), strict=True)
    ]


@pytest.mark.parametrize("loss", ["exact", "pruned", "sampled"])
def test_the_loss_trains_the_layer_that_decoding_uses(recogniser, loss):
    import torch

    import pytorch_recogniser

    model = pytorch_recogniser.Recogniser(8, loss)
    batch = pytorch_recogniser.TensorBatch.of(spoken_numbers.batch(noises(3)), torch.device("cpu"))
    objective, _ = pytorch_recogniser.loss_of(model, batch)
    objective.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    encoding, prediction = torch.randn(2, 8)
    hidden = torch.tanh(encoding + prediction)
    torch.testing.assert_close(model.logits(encoding, prediction), model.loss.output(hidden))


def test_the_band_looked_into_is_the_one_trained_with(recogniser):
    import torch

    import pytorch_recogniser

    model = pytorch_recogniser.Recogniser(8, "pruned")
    arguments = pytorch_recogniser.loss_arguments(model, noises(3))
    encoder, predictor, _, _, *labels = map(torch.from_numpy, arguments)
    trained = model.loss(encoder, predictor, *labels).band
    seen = pytorch_recogniser.band_of(pytorch_recogniser.simple_loss(model, arguments)[2], arguments)
    assert seen.width == trained.width == pytorch_recogniser.CHARACTERS_IN_BAND
    np.testing.assert_array_equal(seen.first, trained.first)
    np.testing.assert_allclose(seen.mass, trained.mass, rtol=1e-4)


@pytest.mark.parametrize("loss", ["exact", "pruned", "sampled"])
def test_a_run_of_a_few_steps(recogniser, monkeypatch, tmp_path, loss):
    import pytorch_recogniser

    monkeypatch.setattr(spoken_numbers, "corpus", lambda *_, **__: (noises(8), noises(4)))
    monkeypatch.setattr(pytorch_recogniser, "BATCH_SIZE", 4)
    arguments = f"--loss {loss} --steps 3 --device cpu --out {tmp_path} --json {tmp_path}/results.json"
    monkeypatch.setattr(sys, "argv", ["recogniser", *arguments.split()])
    pytorch_recogniser.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["trained_by"] == loss
    assert len(results["training"]["losses"]) == 3
    assert np.isfinite(results["training"]["losses"]).all()
    assert len(results["training"]["hypotheses"]) == 4
    assert list(results["character_error_rate_by_noise"]) == ["clean", "10 dB"]
    assert [word["text"] for word in results["words"]] == ["six", "thousand", "two"]
    assert 0 < results["share_needing_gradient"] <= 1
    assert results["megabytes"] > 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning-curve.png", "lattice.png"}
    assert ("pruning" in results) == (loss == "pruned")
    assert ("sampling" in results) == (loss == "sampled")
    if loss == "sampled":
        sampling = results["sampling"]
        assert sampling["vocabulary"] == 5000
        assert sampling["classes"] == 1 + len("six thousand two") + pytorch_recogniser.SAMPLES
        # Without correction most of the sum is missing; with it what is left is noise.
        assert sampling["bias"]["without"]["mean"] < -10 * abs(sampling["bias"]["with"]["mean"])
    if loss == "pruned":
        pruning = results["pruning"]
        assert pruning["width"] == pytorch_recogniser.CHARACTERS_IN_BAND
        assert pruning["share_of_cells"] == pytest.approx(5 / len("_six thousand two"))
        assert 0 < pruning["kept_per_frame"] < 1
        local, optimal = pruning["kept"]["local"], pruning["kept"]["optimal"]
        assert 0 < local["least"] <= local["mean"] < 1
        assert all(local[which] <= optimal[which] < 1 for which in ("mean", "least"))


@pytest.fixture(params=["jax_recogniser", "keras_recogniser"])
def example(request, recipe, monkeypatch):
    """A script whose model is a narrow one."""
    needed = {"jax_recogniser": ("flax", "optax"), "keras_recogniser": ("keras", "tensorflow")}[request.param]
    for package in needed:
        pytest.importorskip(package, reason=f"{request.param} is written with it")
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "WIDTH", 16)
    return module


@pytest.fixture
def parts(example):
    """A model, its losses (B,) of a batch, and its joint network from (B, T, H) and (B, 1, H) to logits (B, T, V)."""
    features = np.random.default_rng(0).normal(size=(100, spoken_numbers.MEL_BINS)).astype("f")
    if example.__name__ == "jax_recogniser":
        model = example.Recogniser(features, example.nnx.Rngs(0))
        return model, model.losses, lambda encoding, prediction: model.output(np.tanh(encoding + prediction))
    model = example.Recogniser()
    model.encoder.normalise.adapt(features)
    return model, lambda batch: model(vars(batch)), lambda encoding, prediction: model.joint(encoding, prediction)[:, :, 0]


def test_training_and_decoding_are_of_one_model(parts, recipe):
    model, losses, joint = parts
    batch = spoken_numbers.batch(noises(3), (32, 24))
    encodings = np.asarray(model.encoder(batch.features))
    spoken = np.pad(batch.targets, [(0, 0), (2, 0)], constant_values=spoken_numbers.BLANK)
    pairs = [(spoken[:, u], spoken[:, u + 1]) for u in range(spoken.shape[1] - 1)]
    predictions = [np.asarray(model.predictor(*pair)) for pair in pairs]
    logits = np.stack([np.asarray(joint(encodings, each[:, None])) for each in predictions], axis=2)
    lengths = recipe.encoder_lengths(batch.feature_lengths), batch.target_lengths
    expected, _ = transducer_loss.rnnt_loss(logits, batch.targets, *lengths, blank=spoken_numbers.BLANK)
    np.testing.assert_allclose(np.asarray(losses(batch)), expected, rtol=1e-5)
    for u in (0, 1, 5):
        np.testing.assert_array_equal(model.likeliest(encodings[:, 7], *pairs[u]), logits[:, 7, u].argmax(-1))


def test_the_encoder_of_whole_utterances_does_not_hear_the_future(parts):
    encoder = parts[0].encoder
    features = np.random.default_rng(1).normal(size=(2, 23, spoken_numbers.MEL_BINS)).astype("f")
    other = features.copy()
    other[:, 12:] = 0
    now, then = np.asarray(encoder(features)), np.asarray(encoder(other))
    assert now.shape == (2, 6, 16)
    np.testing.assert_allclose(now[:, :3], then[:, :3], rtol=0, atol=1e-6)
    assert np.abs(now[:, 3:] - then[:, 3:]).max(axis=(0, 2)).min() > 1e-3


def test_a_script_of_a_few_steps(example, recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(spoken_numbers, "corpus", lambda *_, **__: (noises(8), noises(4)))
    monkeypatch.setattr(recipe, "BATCH_SIZE", 4)
    monkeypatch.setattr(recipe, "WARM_UP_STEPS", 5)
    method = "losses" if example.__name__ == "jax_recogniser" else "call"
    losses, traces = getattr(example.Recogniser, method), []
    monkeypatch.setattr(example.Recogniser, method, lambda model, batch: (traces.append(0), losses(model, batch))[1])
    monkeypatch.setattr(sys, "argv", f"script --steps 40 --seed 3 --json {tmp_path}/new/results.json".split())
    example.main()
    assert len(traces) == {"jax_recogniser": 1, "keras_recogniser": 3}[example.__name__]  # Keras's first two build the model
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["seed"] == 3
    assert len(results["losses"]) == 40
    assert np.mean(results["losses"][-4:]) < 0.7 * np.mean(results["losses"][:4])
    assert len(results["hypotheses"]) == 4
    assert results["character_error_rate"] == pytest.approx(
        spoken_numbers.error_rate([each.text for each in noises(4)], results["hypotheses"])
    )
    assert set(results["seconds"]) == {"training", "recognition"}
