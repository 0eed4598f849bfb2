"""The encoder of the amortized example: its branches, what they cost, how it switches; and a short run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the example is a PyTorch model")
pytest.importorskip("matplotlib", reason="the example draws pictures")
pytest.importorskip("rich", reason="the example shows its progress")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import amortized  # noqa: E402
import pytorch_recogniser  # noqa: E402
import spoken_numbers  # noqa: E402

WIDTH, BRANCHES = 16, ("dense", "sparse", "low-rank")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def recogniser(*branches, share=0.3):
    model = pytorch_recogniser.Recogniser(WIDTH)
    model.encoder = amortized.AmortizedEncoder(model.encoder, branches, share)
    return model


def noises(count):
    """Utterances of noise, which need no synthesiser."""
    rng = np.random.default_rng(count)
    return [
        spoken_numbers.Utterance(
            "six thousand two", "f1", np.inf, rng.normal(size=(frames, spoken_numbers.MEL_BINS)).astype("f"), np.array([0.0, 0.2, 0.6])
        )
        for frames in rng.integers(60, 90, count)
    ]


def one_hot(*shape, branches):
    return torch.nn.functional.one_hot(torch.randint(branches, shape), branches).float()


def test_the_sparse_branch_keeps_the_largest_weights_and_no_others_through_training():
    weight = torch.randn(48, 16)
    layer = amortized.sparse(weight, torch.randn(48), 0.25)
    kept = layer.weight != 0
    assert amortized.multiply_adds(layer) == kept.sum() == weight.numel() // 4
    torch.testing.assert_close(layer.weight[kept], weight[kept], rtol=0, atol=0)
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    before = layer.weight.detach().clone()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        layer(torch.randn(5, 16)).square().sum().backward()
        optimiser.step()
    assert (layer.weight[~kept] == 0).all()
    assert (layer.weight[kept] != before[kept]).all()


def test_the_low_rank_branch_is_the_nearest_of_its_rank():
    weight, bias = torch.randn(48, 16), torch.randn(48)
    layer = amortized.low_rank(weight, bias, 0.25)
    assert amortized.multiply_adds(layer) == 3 * (48 + 16)  # 0.25 * 48 * 16 / (48 + 16)
    x = torch.eye(16)
    product = (layer(x) - bias).T
    torch.testing.assert_close((weight - product).norm(), torch.linalg.svdvals(weight)[3:].norm())
    torch.testing.assert_close(layer(torch.zeros(1, 16))[0], bias)


def test_switching_computes_what_weighing_by_hard_gates_does():
    layer = amortized.Switched(torch.randn(48, 16), torch.randn(48), BRANCHES, 0.3)
    x, gates = torch.randn(4, 9, 16), one_hot(4, 9, branches=3)
    weighed = layer.train()(x, gates)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, gates), weighed)
    outputs = torch.stack([branch(x) for branch in layer.branches], dim=-1)
    torch.testing.assert_close(weighed, (outputs * gates[..., None, :]).sum(-1))


def test_in_use_only_the_chosen_branch_is_computed():
    layer = amortized.Switched(torch.randn(48, 16), torch.randn(48), ("dense", "low-rank"), 0.3).eval()
    heard = []
    for branch in layer.branches:
        branch.register_forward_hook(lambda module, inputs, _: heard.append(len(inputs[0])))
    gates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        layer(torch.randn(3, 16), gates)
    assert heard == [1, 2]


def test_the_dense_branch_is_the_trained_layer():
    layer = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
    switched = amortized.SwitchedGRU(layer, ("dense",), 1.0)
    x, state = torch.randn(3, 7, WIDTH, requires_grad=True), torch.randn(3, WIDTH)
    (expected, last), (got, next_state) = layer(x, state[None]), switched(x, state, torch.ones(3, 7, 1))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(next_state, last[0])
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_what_a_frame_costs():
    trained = pytorch_recogniser.Encoder(WIDTH)
    encoder = amortized.AmortizedEncoder(trained, BRANCHES, 0.25)
    recurrent = 2 * 2 * 3 * WIDTH * WIDTH  # two layers, inputs and state, three gates
    shared = spoken_numbers.MEL_BINS * 8 * WIDTH + WIDTH * WIDTH
    arbitrator = amortized.ARBITRATOR_WIDTH * (WIDTH + 3)
    rank = 3  # 0.25 * 48 * 16 / (48 + 16)
    each = (recurrent, recurrent // 4, 4 * rank * 4 * WIDTH)
    assert encoder.costs == pytest.approx([(shared + arbitrator + cost) / (shared + recurrent) for cost in each])
    assert amortized.AmortizedEncoder(trained, ("dense",), 0.25).costs == [1.0]


def test_the_costs_are_of_what_is_computed():
    """Multiply-adds that the layers of an encoder in use were asked for, by branch."""
    trained = pytorch_recogniser.Encoder(WIDTH)
    encoder = amortized.AmortizedEncoder(trained, ("dense", "low-rank"), 0.25).eval()
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            module.register_forward_hook(count)
    with torch.no_grad():
        features = torch.randn(3, 80, spoken_numbers.MEL_BINS)
        encoder(features)
        chosen = amortized.gumbel_gate(encoder.preferences(encoder.listen(features, None)[0]), hard=True, noise=False)
    again = sum(amortized.multiply_adds(module) for module in (encoder.convolution, encoder.arbitrator)) * 3 * 20
    assert 0 < chosen[..., 0].mean() < 1  # both branches
    frames = chosen.sum((0, 1)).double()
    assert counted - again == pytest.approx(float(frames @ torch.tensor(encoder.costs).double()) * amortized.multiply_adds(trained))


@pytest.mark.parametrize("branches", [("dense",), ("dense", "low-rank"), BRANCHES])
def test_the_encoder_hears_the_same_in_pieces_and_not_the_future(branches):
    encoder = recogniser(*branches).encoder.eval()
    features = torch.randn(2, 23, spoken_numbers.MEL_BINS)
    with torch.no_grad():
        whole, _ = encoder(features)
        state, pieces = None, []
        for start in range(0, 23, 8):
            piece, state = encoder(features[:, start : start + 8], state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
        features[:, 12:] = 0
        other, _ = encoder(features)
    torch.testing.assert_close(other[:, :3], whole[:, :3])
    assert not torch.equal(other[:, 3:], whole[:, 3:])


def test_the_cost_is_the_mean_of_real_frames_and_the_wait_that_of_utterances():
    model, utterances = recogniser("dense", "low-rank"), noises(5)
    run = amortized.Run(("dense", "low-rank"), 0.0)
    amortized.evaluate(run, model, utterances)
    taken, waits = [], []
    for utterance in utterances:
        batch = pytorch_recogniser.TensorBatch.of(spoken_numbers.batch([utterance]), torch.device("cpu"))
        taken += (each := [model.encoder.costs[gate.argmax()] for gate in amortized.gates_of(model, batch)[0]])
        waiting = 0.0
        for cost in each:
            waiting = max(0.0, waiting + 1.5 * 0.04 * cost - 0.04)
        waits.append(waiting)
    assert len(set(taken)) == 2
    assert run.cost == pytest.approx(np.mean(taken))
    assert 0 < run.wait == pytest.approx(np.mean(waits))


def arguments(**options):
    return amortized.argparse.Namespace(**{"seed": 0, "steps": 1, "backlog": 0.0} | options)


def test_the_loss_alone_trains_every_branch_and_the_arbitrator():
    model = recogniser("dense", "low-rank")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    amortized.amortize(amortized.Run(("dense", "low-rank"), 0.0), model, noises(8), arguments(steps=3), lambda: None)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_by_chance_all_branches_are_as_likely():
    encoder = amortized.AmortizedEncoder(pytorch_recogniser.Encoder(WIDTH), BRANCHES, 0.25, arbitrated=False)
    gates = encoder.choose(torch.randn(20, 100, WIDTH))
    assert torch.equal(gates.sum(-1), torch.ones(20, 100))
    torch.testing.assert_close(gates.mean((0, 1)), torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    assert amortized.multiply_adds(encoder) == amortized.multiply_adds(encoder.layers) + sum(
        amortized.multiply_adds(module) for module in (encoder.convolution, encoder.project)
    )


@pytest.mark.parametrize(("price", "backlog"), [(1000.0, 0.0), (0.0, 1000.0)])
def test_a_high_price_makes_the_encoder_cheap(monkeypatch, price, backlog):
    monkeypatch.setattr(amortized, "PEAK_LEARNING_RATE", 0.1)
    model, utterances = recogniser("dense", "sparse"), noises(8)
    run = amortized.Run(("dense", "sparse"), price)
    with torch.no_grad():
        model.encoder.arbitrator[-1].bias.copy_(torch.tensor([1.0, -1.0]))
    amortized.evaluate(run, model, utterances)
    before = run.cost, run.wait
    amortized.amortize(run, model.train(), utterances, arguments(steps=12, backlog=backlog), lambda: None)
    amortized.evaluate(run, model, utterances)
    assert before[0] > 0.9 * model.encoder.costs[0]
    assert run.cost == pytest.approx(model.encoder.costs[1], rel=0.03)
    assert 0 < run.wait < before[1] / 2
    assert len(run.losses) == 12


def test_a_run_of_a_few_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(spoken_numbers, "corpus", lambda *_, **__: (noises(8), noises(4)))
    monkeypatch.setattr(pytorch_recogniser.recipe, "BATCH_SIZE", 4)
    monkeypatch.setattr(pytorch_recogniser, "BATCH_SIZE", 4)
    options = f"--dense-steps 3 --steps 2 --lambdas 0 5 --seed 3 --out {tmp_path} --json {tmp_path}/new/results.json"
    monkeypatch.setattr(sys, "argv", ["amortized", *options.split()])
    amortized.main()
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["seed"] == 3
    runs = {run["name"]: run for run in results["runs"]}
    assert list(runs) == [
        "dense alone",
        "sparse, lambda 0", "sparse, lambda 5", "sparse, by chance", "sparse alone",
        "low-rank, lambda 0", "low-rank, lambda 5", "low-rank, by chance", "low-rank alone",
    ]  # fmt: skip
    for run in runs.values():
        assert len(run["losses"]) == 2
        assert np.isfinite(run["losses"]).all()
        assert run["character_error_rate"] == pytest.approx(
            spoken_numbers.error_rate([each.text for each in noises(4)], run["hypotheses"])
        )
    assert runs["dense alone"]["cost"] == pytest.approx(1)
    for kind in ("sparse", "low-rank"):
        dense, cheap = sum(amortized.AmortizedEncoder(pytorch_recogniser.Encoder(128), ("dense", kind), 0.06).costs[:1]), runs[f"{kind} alone"]
        assert cheap["cost"] < 0.3
        assert cheap["cost"] <= runs[f"{kind}, lambda 5"]["cost"] <= dense + 1e-6
        assert cheap["cost"] < runs[f"{kind}, by chance"]["cost"] < dense
        assert cheap["wait"] == 0 < runs["dense alone"]["wait"]
    assert set(results["seconds"]) == {"speech", "dense training", "amortizing"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"error-over-cost.png", "gates.png"}
