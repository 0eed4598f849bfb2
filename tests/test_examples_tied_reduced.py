"""The example of the Tied & Reduced decoder: its decoders, its risk, and a short run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the recognisers are PyTorch models")
pytest.importorskip("matplotlib", reason="the example draws a picture")
pytest.importorskip("rich", reason="the example shows its progress")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pytorch_recogniser  # noqa: E402
import recipe  # noqa: E402
import spoken_numbers  # noqa: E402
import tied_reduced  # noqa: E402
from transducer_loss import reference  # noqa: E402

of_each_decoder = pytest.mark.parametrize("decoder", tied_reduced.DECODERS)


def noises(count, text="six two"):
    """Utterances of noise, which need no synthesiser."""
    rng = np.random.default_rng(count)
    return [
        spoken_numbers.Utterance(text[: 4 + b], "f1", np.inf, rng.normal(size=(frames, spoken_numbers.MEL_BINS)).astype("f"), None)
        for b, frames in enumerate(rng.integers(30, 60, count))
    ]


@pytest.fixture
def batch():
    return pytorch_recogniser.TensorBatch.of(spoken_numbers.batch(noises(3)), torch.device("cpu"))


@pytest.fixture
def model(decoder):
    torch.manual_seed(0)
    return tied_reduced.Recogniser(decoder)


@of_each_decoder
def test_steps_of_a_decoder_are_the_rows_of_the_whole(model, batch):
    whole = model.decoder(batch.targets, batch.target_lengths)
    features, state = model.decoder.step(torch.full((3,), spoken_numbers.BLANK), None)
    rows = [features]
    for u in range(batch.targets.shape[1]):
        features, state = model.decoder.step(batch.targets[:, u].long(), state)
        rows.append(features)
    for b, length in enumerate(batch.target_lengths.tolist()):
        torch.testing.assert_close(torch.stack(rows, 1)[b, : length + 1], whole[b, : length + 1], rtol=0, atol=1e-5)


def test_the_decoders_sizes():
    lstm, reduced = (tied_reduced.Recogniser(decoder) for decoder in tied_reduced.DECODERS)
    H, V = recipe.WIDTH, len(spoken_numbers.ALPHABET)
    output, layer = H * V + V, 4 * H * 2 * H + 8 * H
    assert lstm.decoder_size == V * H + 2 * layer + H * H + H + output
    positions = 4 * 5 * H
    assert reduced.decoder_size == positions + H * H + 2 * H + output  # the embeddings are in the output layer
    assert lstm.decoder_size >= 5 * reduced.decoder_size
    assert reduced.decoder.weight is reduced.output.weight


@of_each_decoder
def test_the_risk_is_the_mean_over_the_renormalised_texts(model, batch):
    nbest, interpolation = 3, 0.3
    objective, expected = tied_reduced.risk(model, batch, nbest, interpolation)
    with torch.no_grad():
        encodings, _ = model.encoder(batch.features)
        found = model.search(encodings, batch.encoder_lengths, nbest)

        def loss(b, labels):
            labels = torch.tensor([labels], dtype=torch.int64)
            frames = int(batch.encoder_lengths[b])
            features = model.decoder(labels, torch.tensor([labels.shape[1]]))
            logits = model.logits(encodings[b, None, :frames, None], features[:, None])
            return reference.rnnt_loss(logits.numpy(), labels.numpy(), [frames], [labels.shape[1]], blank=spoken_numbers.BLANK)[0][0]

        risks, losses = [], []
        for b, length in enumerate(batch.target_lengths.tolist()):
            wanted = batch.targets[b, :length].tolist()
            texts = [labels[:n] for labels, n in zip(found.hypotheses[b].tolist(), found.lengths[b].tolist(), strict=True)]
            weights = np.exp([-loss(b, text) for text in texts])
            risks.append(weights / weights.sum() @ [spoken_numbers.edit_distance(wanted, text) for text in texts])
            losses.append(loss(b, wanted))
    assert expected == pytest.approx(np.mean(risks), rel=1e-3)
    assert objective.item() == pytest.approx(np.mean(risks) + interpolation * np.mean(losses), rel=1e-3)
    objective.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_one_text_alone_teaches_nothing(batch):
    torch.manual_seed(0)
    model = tied_reduced.Recogniser(tied_reduced.DECODERS[1])
    with torch.no_grad():
        model.output.bias[spoken_numbers.BLANK] = 1000  # one text, the empty one
    objective, expected = tied_reduced.risk(model, batch, 1, 0.0)
    assert expected == pytest.approx(batch.target_lengths.float().mean().item())
    objective.backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(recipe, "synthesise", lambda *_: (noises(8), noises(4)))
    monkeypatch.setattr(recipe, "BATCH_SIZE", 4)
    monkeypatch.setattr(tied_reduced, "WIDTH", 32)
    given = ["tied_reduced", *arguments, "--out", str(tmp_path), "--json", str(tmp_path / "new" / "results.json")]
    monkeypatch.setattr(sys, "argv", given)
    tied_reduced.main()
    return json.loads((tmp_path / "new" / "results.json").read_text())


def test_a_run_of_a_few_steps(monkeypatch, tmp_path, capsys):
    results = run(monkeypatch, tmp_path, "--steps", "40", "--embr-steps", "10", "--nbest", "3", "--seed", "3")
    assert results["seed"] == 3
    assert set(results["seconds"]) == {"speech", "training"}
    assert [each["decoder"] for each in results["runs"]] == list(tied_reduced.DECODERS)
    for each in results["runs"]:
        assert (len(each["losses"]), len(each["risks"])) == (40, 10)
        assert np.mean(each["losses"][-4:]) < 0.7 * np.mean(each["losses"][:4])
        assert np.isfinite(each["risks"]).all()
        assert list(each["error_rates"]) == list(each["hypotheses"]) == [tied_reduced.BEFORE, tied_reduced.CONTROL, tied_reduced.AFTER]
        for stage, rate in each["error_rates"].items():
            assert rate == pytest.approx(spoken_numbers.error_rate([u.text for u in noises(4)], each["hypotheses"][stage]))
    assert {path.name for path in tmp_path.glob("*.png")} == {"embr.png"}
    printed = capsys.readouterr().out
    for each in results["runs"]:
        assert f"{each['parameters']:,}" in printed


def test_what_comes_after_starts_from_the_same_recogniser(monkeypatch, tmp_path):
    results = run(monkeypatch, tmp_path, "--steps", "2", "--embr-steps", "1")
    monkeypatch.setattr(tied_reduced, "FINE_TUNING_RATE", 0.0)
    same = run(monkeypatch, tmp_path, "--steps", "2", "--embr-steps", "1")
    for each, other in zip(results["runs"], same["runs"], strict=True):
        assert each["losses"] == other["losses"]
        assert each["risks"] == other["risks"]
        assert len(set(other["error_rates"].values())) == 1
