"""The losses inside of `torch.compile`: one graph without a break, no recompilation per step, operators as torch wants them."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import run_python
from naive_torch import Case, case, leaves, same
from transducer_loss.adapters.torch import (
    JointRNNTLoss,
    PrunedRNNTLoss,
    gather_predictor,
    joint_rnnt_loss,
    labels_in,
    prune,
    rnnt_loss,
    sample_classes,
    samplewise_rnnt_loss,
    simple_rnnt_loss,
)

V = 40
BASE = case(classes=V)
LIBRARY = torch.ops.transducer_loss


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(seed: int, frames: Sequence[int], labels: Sequence[int]) -> Case:
    """A batch of the shapes of `BASE`, of other lengths, labels and numbers."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, V, BASE.targets.shape, generator=generator)
    targets[torch.arange(targets.shape[1]) >= torch.tensor(labels)[:, None]] = -1
    joint = tuple(tensor + 0.1 * torch.randn(tensor.shape, generator=generator).double() for tensor in BASE.joint)
    return Case(BASE.logits + seed, joint, targets, list(frames), list(labels))


# Every length changes from the first to the second, as in a real corpus; 0 and 1 come and go.
STEPS = [
    BASE, step(1, (8, 5, 6, 9), (4, 5, 2, 0)), step(2, (3, 9, 9, 1), (5, 5, 0, 1)), step(3, (1, 2, 1, 4), (0, 1, 1, 2)),
    step(4, (9, 9, 9, 9), (5, 5, 5, 5)),
]  # fmt: skip


def floats(of: Case, names: str) -> list[Tensor]:
    """Inputs that need a gradient: logits (L), the joint's (J), its encoder and predictor (E), or am and lm (S)."""
    found = {
        "L": [of.logits], "J": of.joint, "E": of.joint[:2], "S": [of.logits[:, :, 0], of.logits[:, 1]],
        "B": [*of.joint, of.logits[:, :, 0], of.logits[:, 1]],
    }[names]  # fmt: skip
    return leaves(*found, dtype=torch.float32)


def integers(of: Case, kind: str) -> tuple[Tensor, Any, Any]:
    if kind == "lists":
        return of.integers
    return of.targets, torch.tensor(of.frames), torch.tensor(of.labels)


def outcome(call: Callable[..., Tensor], inputs: list[Tensor], rest: Any) -> list[Tensor | None]:
    """Loss and gradients for an upstream gradient that is not 1."""
    torch.manual_seed(3)
    loss = call(*inputs, *rest)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, -1.5), allow_unused=True)]


def graphs(call: Callable[..., Tensor], names: str, kind: str = "tensors", steps: Sequence[Case] = STEPS, **options: Any) -> int:
    """How many graphs were compiled for all steps, each of which has the bits of the call as it is."""
    counter = CompileCounterWithBackend(options.pop("backend", "aot_eager"))
    compiled = torch.compile(call, fullgraph=True, backend=counter, **options)
    for of in steps:
        rest = integers(of, kind)
        assert same(outcome(compiled, floats(of, names), rest), outcome(call, floats(of, names), rest))
    return counter.frame_count


def banded(e: Tensor, p: Tensor, w: Tensor, b: Tensor, am: Tensor, lm: Tensor, *of: Any) -> Tensor:
    simple, occupancy = simple_rnnt_loss(am, lm, *of, lm_only_scale=0.25, am_only_scale=0.1, reduction="none")
    band = prune(occupancy, *of[1:], s_range=3)
    return simple + joint_rnnt_loss(e, p, w, b, *of, band=band, reduction="none")


def sampled(e: Tensor, p: Tensor, w: Tensor, b: Tensor, *of: Any) -> Tensor:
    return joint_rnnt_loss(e, p, w, b, *of, classes=sample_classes(of[0], of[2], vocab_size=V, num_samples=2, correction=True))


def sampled_each(e: Tensor, p: Tensor, w: Tensor, b: Tensor, *of: Any) -> Tensor:
    classes = sample_classes(of[0], of[2], vocab_size=V, num_samples=2, scope="utterance", seed=4)
    return joint_rnnt_loss(e, p, w, b, *of, classes=classes, reduction="none")


def among_the_sampled(am: Tensor, lm: Tensor, *of: Any) -> Tensor:
    classes = sample_classes(of[0], of[2], vocab_size=V, num_samples=2, proposal="ctc", ctc_logits=am, ctc_lengths=of[1])
    slots, ids = labels_in(classes, of[0], of[2]), torch.as_tensor(classes.ids).long()
    return simple_rnnt_loss(am[..., ids], lm[..., ids], slots, *of[1:])[0]


def autocast(e: Tensor, p: Tensor, w: Tensor, b: Tensor, *of: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return joint_rnnt_loss(e, p, w, b, *of, reduction="none")


CALLS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "logits": (lambda x, *of: rnnt_loss(x, *of, reduction="none", clamp=0.5), "L"),
    "logits mean": (lambda x, *of: rnnt_loss(x, *of, fastemit_lambda=0.1), "L"),
    "joint": (lambda *all: joint_rnnt_loss(*all, reduction="none", workspace="200 KB"), "J"),
    "joint mean": (lambda *all: joint_rnnt_loss(*all, dropout=0.3, activation="relu"), "J"),
    "no bias": (lambda e, p, w, b, *of: joint_rnnt_loss(e, p, w, None, *of, topology="modified", infeasible="zero"), "J"),
    "simple": (lambda *all: simple_rnnt_loss(*all, lm_only_scale=0.25, reduction="sum")[0], "S"),
    "banded": (banded, "B"),
    "sampled": (sampled, "J"),
    "sampled each": (sampled_each, "J"),
    "labels in": (among_the_sampled, "S"),
    "autocast": (autocast, "J"),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_for_all_lengths_in_tensors(name: str) -> None:
    call, names = CALLS[name]
    assert graphs(call, names) == 1


@pytest.mark.parametrize("name", ["logits", "joint mean", "banded", "sampled"])
def test_lengths_in_lists_do_not_compile_a_graph_per_step(name: str) -> None:
    """One for the first list, whose numbers torch takes for constants, and one for all others."""
    call, names = CALLS[name]
    assert graphs(call, names, "lists") == 2


@pytest.mark.parametrize("name", ["logits", "joint mean", "banded"])
def test_shapes_that_change(name: str) -> None:
    call, names = CALLS[name]
    steps = [
        case(frames, labels, V) for frames, labels in (
            ((9, 1, 7, 4), (5, 0, 3, 4)), ((12, 3, 7, 4), (6, 2, 3, 4)), ((8, 1, 7, 2), (3, 0, 2, 2)), ((15, 11, 3, 4), (9, 5, 3, 1)),
        )
    ]  # fmt: skip
    assert graphs(call, names, steps=steps) == 2


def test_the_default_compiler() -> None:
    """Its own memory plan, and its own random numbers: a seed for every call."""
    call = torch.compile(CALLS["joint"][0], fullgraph=True)
    for of in STEPS[:2]:
        rest = integers(of, "tensors")
        assert same(outcome(call, floats(of, "J"), rest), outcome(CALLS["joint"][0], floats(of, "J"), rest))
    dropped = torch.compile(lambda *all: joint_rnnt_loss(*all, dropout=0.3), fullgraph=True)
    with torch.no_grad():
        losses = [float(dropped(*floats(BASE, "J"), *integers(BASE, "tensors"))) for _ in range(4)]
    assert len(set(losses)) == 4


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from transducer_loss import engine

    made: list[int] = []
    gradients = engine.Engine.gradients
    monkeypatch.setattr(engine.Engine, "gradients", lambda self: (made.append(1), gradients(self))[1])
    call = torch.compile(lambda *all: joint_rnnt_loss(*all), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        without = call(*floats(BASE, "J"), *BASE.integers)
    detached = call(*(tensor.detach() for tensor in floats(BASE, "J")), *BASE.integers)
    assert made == []
    assert not without.requires_grad
    assert torch.equal(without, detached)
    assert torch.equal(call(*floats(BASE, "J"), *BASE.integers).detach(), without)
    assert made == [1]


@pytest.mark.parametrize("kind", ["joint", "pruned", "sampled"])
def test_modules_train(kind: str) -> None:
    """The warm-up's step count is no constant of the graph."""
    torch.manual_seed(0)
    module = JointRNNTLoss(6, V, dropout=0.2) if kind == "joint" else PrunedRNNTLoss(6, V, s_range=3, warm_step=3, dropout=0.2)
    twin = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for of in STEPS:
        results = []
        for each, call in ((module, compiled), (twin, twin)):
            torch.manual_seed(3)
            more = {}
            if kind == "sampled":
                more["classes"] = sample_classes(of.targets, of.labels, vocab_size=V, num_samples=2)
            out = call(*floats(of, "E"), *integers(of, "tensors"), **more)
            out = out if isinstance(out, Tensor) else out.loss
            each.zero_grad()
            out.backward()
            results.append([out.detach(), *(parameter.grad for parameter in each.parameters())])
        assert same(*results)
    assert counter.frame_count <= 2
    if kind != "joint":
        assert module.step == twin.step == 5
        assert module.weights() == twin.weights() == (0.5, 1.0)


def band_and_classes(am: Tensor, lm: Tensor, *of: Any) -> tuple[Any, Any]:
    return prune(simple_rnnt_loss(am, lm, *of)[1], *of[1:], s_range=3), sample_classes(*of[::2], vocab_size=V, num_samples=2, seed=1)


def test_bands_and_classes_leave_a_graph() -> None:
    """What a compiled region has made is good outside of it, and in the next one."""
    inner = torch.compile(band_and_classes, fullgraph=True, backend="aot_eager")
    am, lm = (tensor.detach() for tensor in floats(BASE, "S"))
    made, wanted = (call(am, lm, *integers(BASE, "tensors")) for call in (inner, band_and_classes))
    assert made[0].to_ranges().tolist() == wanted[0].to_ranges().tolist()
    joint = [tensor.detach() for tensor in floats(BASE, "J")]
    rows = gather_predictor(joint[1], wanted[0])
    outer = torch.compile(lambda *all, **more: joint_rnnt_loss(*all, **more), fullgraph=True, backend="aot_eager")
    for call, (band, classes) in itertools.product((joint_rnnt_loss, outer), (made, wanted)):
        assert torch.equal(call(*joint, *BASE.integers, band=band), joint_rnnt_loss(*joint, *BASE.integers, band=wanted[0]))
        assert torch.equal(
            call(*joint, *BASE.integers, classes=classes), joint_rnnt_loss(*joint, *BASE.integers, classes=wanted[1])
        )
        assert torch.equal(gather_predictor(joint[1], band), rows)


def test_a_joiner_of_ones_own() -> None:
    """A band made outside, its rows gathered and its logits' loss taken inside."""
    of = BASE
    am, lm = floats(of, "S")
    band = prune(simple_rnnt_loss(am, lm, *of.integers)[1], of.frames, of.labels, s_range=3)

    def call(e: Tensor, p: Tensor, w: Tensor, b: Tensor, *integers: Any) -> Tensor:
        return rnnt_loss(torch.tanh(e[:, :, None] + gather_predictor(p, band)) @ w.T + b, *integers, band=band)

    assert graphs(call, "J", steps=[of]) == 1


UNCOMPILED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "inplace": (lambda x, *of: rnnt_loss(2 * x, *of, inplace=True).sin(), "L", "inplace=True writes over the logits"),
    "sparse": (
        lambda *all: joint_rnnt_loss(
            *all, classes=sample_classes(*all[4::2], vocab_size=V, num_samples=2, seed=1), sparse=True
        ).sin(), "J", "sparse=True makes sparse gradients",
    ),
    "gather": (
        lambda p, am, lm, *of: gather_predictor(p, prune(simple_rnnt_loss(am, lm, *of)[1], *of[1:])).sin(), "P",
        "the width of a band that a compiled region has made",
    ),
    "samplewise": (
        lambda e, p, w, b, *of: samplewise_rnnt_loss(
            lambda e, p: torch.tanh(e + p) @ w.T + b, e, p, *of, parameters=[w, b]
        ).sin(), "J", "samplewise_rnnt_loss differentiates the joint itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOMPILED)
def test_what_breaks_a_graph_says_so(name: str) -> None:
    """And without ``fullgraph=True`` runs between two graphs."""
    call, names, message = UNCOMPILED[name]

    def inputs() -> list[Tensor]:
        return [floats(BASE, "E")[1], *floats(BASE, "S")] if names == "P" else floats(BASE, names)

    rest = integers(BASE, "tensors")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs(), *rest)
    found, wanted = (
        outcome(each, inputs(), rest) for each in (torch.compile(call, backend="aot_eager"), call)
    )  # fmt: skip
    assert same(*([each if each is None else each.to_dense() for each in tensors] for tensors in (found, wanted)))


@pytest.mark.parametrize("name", ["logits", "joint", "banded", "sampled"])
def test_around_a_graph_break(name: str) -> None:
    """The core runs as it is, and is not compiled function by function."""
    call, names = CALLS[name]

    def broken(*arguments: Any) -> Tensor:
        arguments = (arguments[0].sin(), *arguments[1:])
        torch._dynamo.graph_break()
        return call(*arguments).cos()

    rest = integers(BASE, "tensors")
    counter = CompileCounterWithBackend("aot_eager")
    found = outcome(torch.compile(broken, backend=counter), floats(BASE, names), rest)
    assert same(found, outcome(broken, floats(BASE, names), rest))
    assert counter.frame_count == 2


def test_wrong_arguments_are_named() -> None:
    call = torch.compile(lambda *all, **more: joint_rnnt_loss(*all, **more), fullgraph=True, backend="aot_eager")
    joint = floats(BASE, "J")
    with pytest.raises(ValueError, match="topology: expected one of 'regular', 'modified', 'constrained', got 'normal'"):
        call(*joint, *BASE.integers, topology="normal")
    with pytest.raises(ValueError, match=r"encoder_lengths: expected lengths in \[1, T = 9\], got 10 at index 0"):
        call(*joint, BASE.targets, [10, 1, 1, 1], BASE.labels)
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, H\) = \(12, 6\), got \(12, 5\)"):
        call(*joint[:2], joint[2][:12, :5], None, *BASE.integers)


def test_second_order_raises() -> None:
    (logits,) = floats(BASE, "L")
    call = torch.compile(lambda x: rnnt_loss(x, *BASE.integers), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(call(logits), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_dynamic_floats_may_go_to_two_losses() -> None:
    """``dynamic=True`` makes symbols of a module's floats, too."""
    module = PrunedRNNTLoss(6, V, s_range=3, delay_penalty=0.05, fastemit_lambda=0.02)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for of in STEPS[:2]:
        rest = integers(of, "tensors")
        module.step = 7
        expected = outcome(lambda *all: module(*all).loss, floats(of, "E"), rest)
        module.step = 7
        assert same(outcome(lambda *all: compiled(*all).loss, floats(of, "E"), rest), expected)


def test_export() -> None:
    class Whole(torch.nn.Module):
        def forward(self, *all: Any) -> Tensor:
            return joint_rnnt_loss(*all)

    arguments = (*(tensor.detach() for tensor in floats(BASE, "J")), *integers(BASE, "tensors"))
    program = torch.export.export(Whole(), arguments)
    other = (*(tensor.detach() for tensor in floats(STEPS[1], "J")), *integers(STEPS[1], "tensors"))
    assert torch.equal(program.module()(*other), joint_rnnt_loss(*other))


def test_nobody_pays_for_a_compiler_that_is_not_used() -> None:
    """Importing it takes as long as importing torch."""
    found = run_python("""
        import json, sys
        import torch
        from transducer_loss.adapters.torch import rnnt_loss, samplewise_rnnt_loss
        e, p, of = torch.ones(1, 4, 5, requires_grad=True), torch.ones(1, 3, 5), (torch.tensor([[1, 2]]), [4], [2])
        rnnt_loss(e[:, :, None] + p[:, None], *of).backward()
        samplewise_rnnt_loss(lambda e, p: e + p, e, p, *of, parameters=[]).backward()
        before = "torch._dynamo" in sys.modules
        torch.compile(lambda: None)
        print(json.dumps([before, "torch._dynamo" in sys.modules]))
    """)
    assert found == [False, True]


# The operators themselves.

COMMON = {
    "blank": 0, "topology": "regular", "fastemit_lambda": 0.1, "delay_penalty": 0.0, "infeasible": "inf", "validate": False,
}  # fmt: skip
OF_LOGITS = {**COMMON, "normalized": False, "hat": False, "clamp": 0.0}
OF_JOINT = {
    **COMMON, "activation": "tanh", "dropout": 0.2, "hat": False, "workspace": None, "occupancy_floor": 0.0, "sparse": False,
}  # fmt: skip
OF_SIMPLE = {**COMMON, "lm_only_scale": 0.2, "am_only_scale": 0.1, "shared_unigram": False}
OF_EMBR = {"blank": 3, "temperature": 1.5, "infeasible": "inf", "validate": False}
OF_BACKLOG = {"frame_period": 1.0, "statistic": "mean", "validate": False}
OF_SAMPLING = {
    "vocab_size": V, "num_samples": 2, "proposal": "uniform", "scope": "batch", "blank": 0, "correction": False, "step": 0,
    "validate": False,
}  # fmt: skip


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    logits, *joint = (tensor.detach() for tensor in [*floats(BASE, "L"), *floats(BASE, "J")])
    am, lm = (tensor.detach() for tensor in floats(BASE, "S"))
    given, seed, upstream = integers(BASE, "tensors"), torch.tensor(5), torch.tensor([1.5, -0.75, 0.0, 2.0])
    simple = LIBRARY.simple_rnnt_loss(am, lm, *given, None, True, **OF_SIMPLE)
    band = LIBRARY.prune(*simple[1:3], *given[1:], 3, "local", "regular")[:5]
    classes = LIBRARY.sample_classes(*given[::2], None, None, None, seed, **OF_SAMPLING)
    nothing: tuple[Any, ...] = ([], [], [])
    saved = LIBRARY.rnnt_loss(logits, *given, [], True, **OF_LOGITS)[2:]
    later = LIBRARY.joint_rnnt_loss("later", *joint, *given, None, seed, *nothing, **OF_JOINT)[3:]
    index = torch.tensor([1, 0, 0, 2])
    sharing = (joint[0][:3], *joint[1:], given[0], given[1][:3], given[2], index, seed, *nothing)
    shared = LIBRARY.joint_rnnt_loss("later", *sharing, **OF_JOINT)[4:]
    rows = torch.ones(4, 9, int(band[4]), 6)
    hypotheses, lengths = torch.randint(1, V, (4, 3, 6)), torch.tensor([[6, 0, -1], [3, 3, 3], [-1, 2, 1], [5, 4, 6]])
    nll, distances = torch.randn(4, 3), torch.tensor([[1, 0, 9], [2, 2, 2], [9, 3, 1], [0, 4, 1]])
    each, positions, heat = torch.rand(V, dtype=torch.float64), torch.randn(2, 3, 6), torch.tensor(0.5, dtype=torch.float64)
    by_ctc = {**OF_SAMPLING, "proposal": "ctc", "scope": "utterance"}
    return {
        "host integers": (LIBRARY.host_integers, ([3, 1, 2],), {}),
        "logits": (LIBRARY.rnnt_loss, (logits, *given, [], True), OF_LOGITS),
        "logits, no gradient": (LIBRARY.rnnt_loss, (logits.bfloat16(), *given, [], False), OF_LOGITS),
        "logits backward": (LIBRARY.rnnt_loss_backward, (upstream, saved, logits, *given, []), OF_LOGITS),
        **{
            f"joint, {gradient}": (LIBRARY.joint_rnnt_loss, (gradient, *joint, *given, None, seed, *nothing), OF_JOINT)
            for gradient in ("none", "mean", "sum", "later")
        },
        "joint, band": (LIBRARY.joint_rnnt_loss, ("later", *joint, *given, None, seed, band, [], []), OF_JOINT),
        "joint, classes": (
            LIBRARY.joint_rnnt_loss, ("mean", *joint[:3], None, *given, None, seed, [], classes, [V, 0, 0]), OF_JOINT,
        ),
        **{
            f"joint, encoder index, {gradient}": (LIBRARY.joint_rnnt_loss, (gradient, *sharing), OF_JOINT)
            for gradient in ("none", "mean", "later")
        },
        "joint backward": (LIBRARY.joint_rnnt_loss_backward, (upstream, later, *joint, *given, None, seed, *nothing), OF_JOINT),
        "joint, encoder index, backward": (LIBRARY.joint_rnnt_loss_backward, (upstream, shared, *sharing), OF_JOINT),
        "simple": (LIBRARY.simple_rnnt_loss, (am, lm, *given, None, True), OF_SIMPLE),
        "simple, weights": (LIBRARY.simple_rnnt_loss, (am, lm, *given, upstream, True), OF_SIMPLE),
        "prune": (LIBRARY.prune, (*simple[1:3], *given[1:], 3, "optimal", "constrained"), {}),
        "gather": (LIBRARY.gather_predictor, (joint[1], band, int(band[4])), {}),
        "gather backward": (LIBRARY.gather_predictor_backward, (rows, band, 6), {}),
        "sample": (LIBRARY.sample_classes, (*given[::2], None, None, None, seed), OF_SAMPLING),
        "sample by ctc": (LIBRARY.sample_classes, (*given[::2], None, am, given[1], seed), by_ctc),
        "labels in": (LIBRARY.labels_in, (*given[::2], classes, [V, 0, 0], False), {}),
        "edit distance": (
            LIBRARY.edit_distance, (hypotheses, lengths, given[0], given[2]), {"blank": 3, "validate": False},
        ),
        **{
            f"embr, {name}": (LIBRARY.embr_loss, (nll, *arguments), {**OF_EMBR, "interpolation": interpolation})
            for name, arguments, interpolation in (
                ("alone", (None, distances, None, None, None, False), 0.0),
                ("backward", (None, distances, None, lengths, upstream, True), 0.0),
                ("reference", (nll[:, 0], distances, hypotheses, lengths, None, True), 0.5),
            )
        },
        "cost": (LIBRARY.amortized_cost, (am, each, given[1], None, False), {"validate": False}),
        "cost backward": (LIBRARY.amortized_cost, (am.bfloat16(), each, given[1], upstream, True), {"validate": None}),
        "backlog": (LIBRARY.amortized_backlog, (am, each, given[1], None, False), OF_BACKLOG),
        "backlog backward": (LIBRARY.amortized_backlog, (am, each, given[1], upstream, True), OF_BACKLOG),
        "gate": (LIBRARY.gumbel_gate, (am, given[1], heat, seed), {"hard": True, "noise": True, "validate": False}),
        "gate backward": (LIBRARY.gumbel_gate_backward, (am, am, None, heat, seed), {"noise": True}),
        "reduced": (LIBRARY.reduced_predictor, (joint[2], positions, *given[::2]), {"last": False, "validate": False}),
        "reduced, last": (LIBRARY.reduced_predictor, (joint[2], positions, *given[::2]), {"last": True, "validate": None}),
        "reduced backward": (
            LIBRARY.reduced_predictor_backward, (joint[1], joint[2], positions, *given[::2]), {"last": False},
        ),
    }  # fmt: skip


OPERATORS = operator_calls()


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments, options = OPERATORS[name]
    assert set(torch.library.opcheck(operator.default, arguments, options).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    defined = {str(name).split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("transducer_loss::")}
    assert {operator.__name__ for operator, _, _ in OPERATORS.values()} == defined
