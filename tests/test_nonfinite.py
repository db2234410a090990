"""Steps that come to what is not finite: they leave no trace, and the run halts or goes on without them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.codecs import Encoded, Parcel
from common.codecs.floats import fp32
from common.errors import NonFiniteError, SplitLearningError, StepError
from common.methods import METHODS, build_method, settled
from common.methods.base import Answer, Received, ServerPart, Smashed
from common.methods.guard import Guard
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.optim import sgd
from common.parts import server_part, state_of
from common.run import Run
from dsl_server.server import Server
from tests.federation import CPU, Batches, connect, federation, serving, small_run, train
from tests.ordinary import member, refused, smashed

pytestmark = pytest.mark.timeout(60)

State = dict[str, Tensor]
ABSURD = 1e38  # finite, and the sum of four of them is not


def hosting_of(run: Run, change: Callable[[Answer], Answer] = lambda answer: answer) -> Hosting:
    """change: what becomes of each answer of the method's rule."""
    method = build_method(settled(run))

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        return change(method.server_step(part, group))

    return Hosting(run, replace(method, server_step=step), server_part(run, method, build(run), CPU))


def states(hosting: Hosting) -> State:
    """Copies of all that the server's parts are."""
    return {
        f"{index}.{name}": tensor.clone()
        for index, part in enumerate(hosting.parts)
        for name, tensor in state_of(part).items()
    }


def same(ours: State, theirs: State) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def finite(state: State) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def received(run: Run, client: int = 0, seed: int = 0, value: float | None = None) -> Received:
    """A batch; of this value everywhere, if one is given."""
    z, y = smashed(run, seed=seed).z, smashed(run, seed=seed).y
    if value is not None:
        z = torch.full_like(z, value)
    labels = y[:0] if run.method == "ushape" else y
    parcel = Parcel(fp32(), Encoded(tuple(z.shape), [z]))
    return Received(z, labels, client, 0.5, through_tail=torch.ones_like, parcel=parcel)


def group_of(run: Run, bad: bool = False, seed: int = 0) -> list[Received]:
    """What makes a step: one batch, or one of each client, of which the second may be absurd."""
    clients = run.clients if build_method(run).gather.value == "all" else 1
    absurd = [ABSURD if bad and client == clients - 1 else None for client in range(clients)]
    return [received(run, client, seed + client, value) for client, value in enumerate(absurd)]


# ---------------------------------------------------------------- every method


CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name not in ("fedavg", "ampere")},
    "dsl-answered": {"method": "dsl", "method_arg": ("lambda_=0.5",)},
    "dsl-modules": {"method": "dsl", "server_modules": 2},
    "gapsl-of-three": {"method": "gapsl", "clients": 3},  # of two the angles are always alike
    "gapsl-exact": {"method": "gapsl", "method_arg": ("gda=exact",)},
    "gapsl-direction": {"method": "gapsl", "method_arg": ("gda=direction",)},
    "cyclesl-small-steps": {"method": "cyclesl", "method_arg": ("server_batch=2",)},
    "epsl-all": {"method": "epsl", "method_arg": ("phi=1",)},
    "sglr-position": {"method": "sglr", "method_arg": ("splitavg=position", "phi=1")},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_halts_keeps_its_part_as_it_was(case: str) -> None:
    run = small_run(**{"clients": 2, **CASES[case]})
    hosting = hosting_of(run)
    hosting.step(group_of(run))
    hosting.step(group_of(run, seed=5))  # from here on there is momentum, and gapsl has an angle to compare
    before = states(hosting)
    with pytest.raises(StepError, match=r"not finite|the loss is (nan|inf); lower --lr"):
        hosting.step(group_of(run, bad=True))
    assert same(states(hosting), before)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_skips_goes_on_from_where_it_was(case: str) -> None:
    run = small_run(**{"clients": 2, "on_nonfinite": "skip", **CASES[case]})
    hosting, other = hosting_of(run), hosting_of(run)
    for which in (hosting, other):
        which.step(group_of(run))
        which.step(group_of(run, seed=5))
    before, group = states(hosting), group_of(run, bad=True)
    answer = hosting.step(group)
    assert same(states(hosting), before)
    assert (answer.skipped, answer.loss) == (1, None)
    for batch, gradient in zip(group, answer.gradients, strict=True):
        if run.method == "gapsl":
            assert gradient is None, "its clients can be told that they had no part in it"
        else:
            assert gradient is not None
            assert torch.equal(gradient, torch.zeros_like(batch.z))
    for ours, theirs in zip(hosting.parts, other.parts, strict=True):  # chance alone has gone on
        theirs.generator.set_state(ours.generator.get_state())
    assert hosting.step(group_of(run, seed=3)).skipped == 0
    other.step(group_of(run, seed=3))
    assert not same(states(hosting), before)
    assert same(states(hosting), states(other))
    assert finite(states(hosting))


def test_a_client_that_awaits_nothing_is_given_nothing() -> None:
    run = small_run(on_nonfinite="skip")
    answer = hosting_of(run).step([replace(received(run, value=ABSURD), wanted=False)])
    assert list(answer.gradients) == [None]


@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_ampere_leaves_out_the_steps_that_have_an_absurd_sample_and_no_others(policy: str) -> None:
    run = small_run(
        method="ampere", on_nonfinite=policy, method_arg=("server_epochs=3", "server_batch=8", "augment=0")
    )
    hosting = hosting_of(run)
    begun = states(hosting)
    for seed in range(3):
        hosting.step([received(run, seed=seed)])
    one = smashed(run, samples=1)
    hosting.step([Received(torch.full_like(one.z, ABSURD), one.y, 0, 0.0)])
    if policy == "halt":
        with pytest.raises(NonFiniteError):
            hosting.end_round()
    else:
        answer = hosting.end_round()
        assert answer is not None
        assert answer.skipped == 3, "one in each of its epochs"
        assert answer.loss is not None
        assert answer.loss.isfinite()
        assert not same(states(hosting), begun)
    assert finite(states(hosting))


# ---------------------------------------------------------------- what may be not finite


def test_an_infinite_loss_with_finite_gradients_is_no_step() -> None:
    run = small_run()
    hosting = hosting_of(run, lambda answer: replace(answer, loss=torch.tensor(math.inf)))
    before = states(hosting)
    with pytest.raises(NonFiniteError, match="the loss is inf; lower --lr"):
        hosting.step([received(run)])
    assert same(states(hosting), before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_no_step_though_the_loss_is(value: float) -> None:
    run = small_run()
    hosting = hosting_of(run)
    hosting.step([received(run)])
    before = states(hosting)
    weight = next(hosting.parts[0].top.parameters())
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    with pytest.raises(NonFiniteError, match=r"a gradient, or a weight, is not finite; lower --lr"):
        hosting.step([received(run, seed=1)])
    assert same(states(hosting), before)


def test_a_gradient_for_a_client_that_is_not_finite_is_no_step() -> None:
    run = small_run(method="csl")
    hosting = hosting_of(
        run,
        lambda answer: replace(answer, gradients=[g * math.inf for g in answer.gradients if g is not None]),
    )
    before = states(hosting)
    with pytest.raises(NonFiniteError, match="a gradient, or a weight, is not finite"):
        hosting.step([received(run)])
    assert same(states(hosting), before)


def test_statistics_that_overflow_are_no_step_though_loss_and_gradients_are_finite() -> None:
    run = small_run()
    top = nn.Sequential(nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 8 * 8, 4))
    part = ServerPart(top, sgd(top.parameters(), run), torch.Generator())
    guard, rule = Guard(list(state_of(part).values())), build_method(run).server_step
    guard.step(lambda: rule(part, [received(run)]))
    before = {name: tensor.clone() for name, tensor in state_of(part).items()}
    large = replace(received(run), z=received(run).z * 1e30, wanted=False)  # whose squares overflow
    loss = rule(part, [large]).loss
    assert loss is not None
    assert loss.isfinite()
    assert not finite(state_of(part)), "the rule alone does not notice"
    for name, tensor in state_of(part).items():
        tensor.copy_(before[name])
    with pytest.raises(NonFiniteError):
        guard.step(lambda: rule(part, [large]))
    assert same(state_of(part), before)


def test_whatever_goes_wrong_in_a_step_it_leaves_no_trace() -> None:
    run = small_run()

    def fails(_: Answer) -> Answer:
        raise RuntimeError("out of luck")

    hosting = hosting_of(run, fails)
    before = states(hosting)
    with pytest.raises(RuntimeError, match="out of luck"):
        hosting.step([received(run)])
    assert same(states(hosting), before)


@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_an_output_that_is_not_finite_is_not_sent_to_a_client(policy: str) -> None:
    run, seen = small_run(method="ushape", on_nonfinite=policy), list[Tensor]()

    def through_tail(output: Tensor) -> Tensor:
        seen.append(output)
        return torch.ones_like(output)

    hosting = hosting_of(run)
    hosting.parts[0].top.register_forward_hook(lambda *passed: passed[2] * math.nan)
    batch = replace(received(run), through_tail=through_tail)
    if policy == "halt":
        with pytest.raises(NonFiniteError, match="the output for a client is not finite"):
            hosting.step([batch])
        assert seen == []
    else:
        assert hosting.step([batch]).skipped == 1
        assert [bool(output.any()) for output in seen] == [False], "it waits for one: of zeros"


# ---------------------------------------------------------------- learning again, and heads


def test_a_batch_whose_step_was_left_out_is_not_kept_to_be_learned_from_again() -> None:
    run = small_run(replay="1MB", reuse=2, on_nonfinite="skip")
    hosting = hosting_of(run)
    hosting.step([received(run, value=ABSURD)])
    assert not hosting.can_replay
    hosting.step([received(run)])
    assert hosting.can_replay


@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_learning_again_is_guarded_too(policy: str) -> None:
    run = small_run(replay="1MB", reuse=3, on_nonfinite=policy)
    hosting = hosting_of(run)
    hosting.step([replace(received(run), wanted=False)])
    before = states(hosting)
    weight = next(hosting.parts[0].top.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    if policy == "halt":
        with pytest.raises(NonFiniteError):
            hosting.replay()
    else:
        answer = hosting.replay()
        assert (answer.replayed, answer.skipped) == (8, 1)
        rest = hosting.end_round()
        assert rest is not None
        assert (rest.loss, rest.replayed, rest.skipped) == (None, 8, 1)
    assert same(states(hosting), before)


def test_a_head_is_not_fitted_to_samples_whose_step_was_left_out() -> None:
    run = small_run(method="fsl-sage", on_nonfinite="skip")
    hosting = hosting_of(run)
    for seed in range(13):
        hosting.step([received(run, seed=seed)])
    hosting.step([received(run, value=ABSURD)])
    fresh = hosting.parts[0].head
    assert fresh is not None
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    made = hosting.new_head(0, 0).state_dict()
    assert finite(made)
    assert not same(made, before), "the other samples teach it something"


# ---------------------------------------------------------------- a real server


def of_value(run: Run, value: float) -> Smashed:
    batch = smashed(run)
    return Smashed(torch.full_like(batch.z, value), batch.y)


def part_of(server: Server) -> State:
    """A copy of the server's part, for when all that was sent has its answer."""
    return {name: tensor.clone() for name, tensor in state_of(server.part).items()}


@pytest.mark.parametrize("method", ["dsl", "csl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_c9_activations_that_are_not_finite_are_an_invalid_argument(
    method: str, value: float, tmp_path: Path
) -> None:
    with serving(small_run(method=method), tmp_path) as server, member(server) as client:
        client.send([smashed(server.run)])
        before = part_of(server)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "activations of batch 2: NaN or infinite values"):
            client.send([of_value(server.run, value)])
        assert same(part_of(server), before)
        client.send([smashed(server.run)])


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_c9_denormal_activations_are_learned_from(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method), tmp_path) as server, member(server) as client:
        before = part_of(server)
        client.send([of_value(server.run, 1e-45)])
        assert not same(part_of(server), before)
        assert finite(part_of(server))


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_c9_c10_a_finite_but_absurd_activation_halts_the_run_in_one_line(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method), tmp_path) as server, member(server) as client:
        client.send([smashed(server.run)])
        before = part_of(server)
        says = "the server's step on batch 2 of client 0 failed: the loss is nan; lower --lr"
        with refused(grpc.StatusCode.FAILED_PRECONDITION, says):
            client.send([of_value(server.run, ABSURD)])
        with pytest.raises(SplitLearningError) as caught:
            server.wait(timeout=10)
        assert says in str(caught.value)
        assert "--on-nonfinite skip" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert same(part_of(server), before)
    assert not (tmp_path / "server" / "checkpoint").exists()


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_c9_c10_a_step_that_is_left_out_is_counted_and_the_run_ends_well(method: str, tmp_path: Path) -> None:
    run = small_run(method=method, on_nonfinite="skip", epochs=3)
    with serving(run, tmp_path) as server, member(server) as client:
        client.send([smashed(run)])
        before = part_of(server)
        client.send([of_value(run, ABSURD)])
        assert same(part_of(server), before)
        client.send([smashed(run, seed=1)])
        assert not same(part_of(server), before)
        client.leave()
        assert server.wait(timeout=10)
        summary = server.finish()
    assert (summary["steps_skipped"], summary["samples_trained"]) == (1, 3 * run.batch_size)
    assert json.loads((tmp_path / "server" / "summary.json").read_text()) == summary
    assert finite(load_file(tmp_path / "server" / "checkpoint" / "part.safetensors"))


def test_c10_a_client_whose_step_was_left_out_is_sent_a_gradient_of_zeros(tmp_path: Path) -> None:
    run = small_run(method="csl", on_nonfinite="skip")
    with serving(run, tmp_path) as server, member(server) as client:
        (answer,) = client.train([of_value(run, ABSURD)])
    assert list(answer.gradient.gradient.shape) == [8, 16, 8, 8]
    assert answer.data == bytes(8 * 16 * 8 * 8 * 4)


def test_c10_steps_that_are_left_out_note_nothing_in_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, ordinary = iter(range(100)), METHODS["gapsl"]()

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        answer = ordinary.server_step(part, group)
        return replace(answer, loss=torch.tensor(math.nan)) if next(steps) % 2 else answer

    monkeypatch.setitem(METHODS, "gapsl", lambda: replace(ordinary, server_step=step))
    run = small_run(method="gapsl", clients=2, on_nonfinite="skip")
    _, parts, summary = federation(run, tmp_path, [Batches(run, seed, 32) for seed in range(2)])
    assert (summary["steps_skipped"], summary["samples_trained"]) == (4, 2 * 64)
    lines = (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train"]["clients_kept"] for line in lines] == [1.0, 1.0]
    assert all(finite(state_of(part)) for part in parts)


def test_without_such_steps_the_summary_has_no_word_of_them(tmp_path: Path) -> None:
    run = small_run(epochs=1, on_nonfinite="skip")
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=1, samples=16)])
    assert "steps_skipped" not in summary


# ---------------------------------------------------------------- the client


def ends(server: Server, samples: int = 24, image: float = 0.0) -> StepError:
    """What ends a client, which the server is told; this much is added to an element of its last image."""
    connection, client = connect(server, "ann")
    data = Batches(server.run, 0, samples)
    data.x[-1, 0, 0, 0] += image
    with pytest.raises(StepError) as caught:
        train(server.run, connection, client, data, data)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 70
    with pytest.raises(Exception, match=r"client 0 \(ann\) failed: .*not finite"):
        server.wait(timeout=10)
    return caught.value


@pytest.mark.parametrize("method", ["dsl", "csl", "ushape"])
def test_c10_a_client_does_not_send_what_is_not_finite(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method), tmp_path) as server:
        said = str(ends(server, image=math.nan))
        assert said == "what the client was to send is not finite; lower --lr, or check the data"
        assert server.record.samples_trained <= 16, "the third batch has not come"
        assert finite(state_of(server.part))


@pytest.mark.parametrize(
    "settings", [{"send_every": 5}, {"method": "cse-fsl"}, {"method": "ampere"}, {"method": "fedavg"}]
)
def test_c10_a_client_whose_own_loss_is_not_finite_ends_before_it_shares_its_part(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with serving(small_run(sync="average", clients=1, **settings), tmp_path) as server:
        said = str(ends(server, image=math.nan))  # in a batch that is not sent
        assert said == "the client's loss in epoch 1 is not finite; lower --lr, or check the data"
        assert finite(state_of(server.part))
