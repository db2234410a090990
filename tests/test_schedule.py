"""What is sent when: contradictions are told by flag and remedy; the server's schedule is of what is sent."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.methods import METHODS, build_method, settled
from common.methods.base import Answer, Received
from common.methods.hosting import Hosting
from common.optim import learning_rate, progress_of
from common.run import Run, bytes_of
from tests.federation import Batches, federation, small_run

pytestmark = pytest.mark.timeout(60)

STREAMING = {"dsl", "cse-fsl"}
FLAGS: dict[str, dict[str, Any]] = {
    "--send-every": {"send_every": 2},
    "--send-every-epochs": {"send_every_epochs": 2},
    "--send-last-epochs": {"send_last_epochs": 1},
    "--replay": {"replay": "1MB"},
    "--link auto": {"link": "auto"},
    "--budget": {"budget": "1MB"},
}


def refused(**values: Any) -> str:
    """The one line in which such a run is refused."""
    with pytest.raises(ConfigError) as caught:
        settled(small_run(**values))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in STREAMING])
def test_a_method_that_does_not_stream_is_refused_each_flag(method: str, flag: str) -> None:
    says = refused(method=method, **FLAGS[flag])
    assert says.startswith(f"{flag}: only for methods that send one way")
    assert says.endswith(f"cse-fsl, and dsl without lambda_; {method} does not")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("method", sorted(STREAMING))
def test_a_method_that_streams_takes_each_flag(method: str, flag: str) -> None:
    run = settled(small_run(method=method, **FLAGS[flag]))
    assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize("flag", FLAGS)
def test_dsl_whose_batches_are_answered_does_not_stream(flag: str) -> None:
    says = refused(method_arg=("lambda_=0.5",), **FLAGS[flag])
    assert says.startswith(flag)
    assert says.endswith("dsl lambda_=0.5 does not")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"send_last_epochs": 3}, "--send-last-epochs 3 is above --epochs 2"),
        ({"send_every_epochs": 3}, "--send-every-epochs 3 is above --epochs 2"),
        ({"budget": "1MB", "send_every_epochs": 2}, "--budget and --send-every-epochs: both say in which"),
        ({"link": "auto", "fixed_order": True}, "--link auto: .* no order holds; drop --fixed-order"),
        ({"link": "auto", "budget": "1MB"}, "--link auto and --budget: both choose what is sent; say one"),
        (
            {"budget": "1MB", "send_last_epochs": 1},
            "--budget and --send-last-epochs: both say in which epochs to send; say one",
        ),
        (
            {"link": "auto", "codec": ("activations=int4",)},
            "--codec activations=int4: the clients choose, by --link auto or --budget; leave one out",
        ),
        ({"budget": "1MB", "codec": ("activations=fp16+ef",)}, r"--codec activations=fp16\+ef: the clients"),
        ({"codec": ("activations=fp32+ef",)}, r"codec 'fp32\+ef': fp32 takes nothing away; leave \+ef out"),
        ({"send_every": -1}, "--send-every -1 is below 0"),
        ({"send_last_epochs": -1}, "--send-last-epochs -1 is below 0"),
        ({"reuse": 1}, "--reuse 1 is below 2"),
        ({"link": "fast"}, "--link 'fast': choose from fixed, auto"),
        ({"replay_on": "tape"}, "--replay-on 'tape': choose from memory, disk"),
        ({"replay": "much"}, "--replay 'much' is not a size; say it as 500MB, 1.5GB or 64MiB"),
        ({"budget": "500"}, "--budget '500' is not a size"),
    ],
)
def test_what_contradicts_itself_is_refused_by_flag_and_remedy(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        settled(small_run(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"send_last_epochs": 2},
        {"send_every": 3, "send_last_epochs": 1, "replay": "1MB", "fixed_order": True},
        {"budget": "1MB", "fixed_order": True, "replay": "1kB", "replay_on": "disk"},
        {"link": "auto", "send_last_epochs": 1, "send_every": 2},
        {"budget": "1MB", "codec": ("activations=fp32",)},
    ],
)
def test_what_goes_together_is_taken(values: dict[str, Any]) -> None:
    settled(small_run(**values))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "of"),
    [
        ("", 0),
        ("1B", 1),
        ("500MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        ("64MiB", 64 * 2**20),
        ("0.5 kB", 500),
        ("1.001kB", 1001),
        ("4.1MB", 4_100_000),
        ("2TiB", 2 * 2**40),
        ("1000TB", 10**15),
    ],
)
def test_a_size_is_its_bytes(size: str, of: int) -> None:
    assert bytes_of("--budget", size) == of


@pytest.mark.parametrize(
    "size",
    [
        *(
            "500",
            "MB",
            "-1MB",
            "+1MB",
            "1mb",
            "1KB",
            "1,5MB",
            "1e6B",
            ".5MB",
            "5.MB",
            " 5MB",
            "5MB ",
            "5  MB",
        ),
        *(
            "5MB\n",
            "5iB",
            "5Mi",
            "nanB",
            "infB",
            "٥MB",
            "9" * 400 + "B",
            "1." + "0" * 5000 + "MB",
            "5 MB of it",
        ),
    ],
)
def test_what_is_no_size_is_refused_in_one_short_line(size: str) -> None:
    with pytest.raises(ConfigError, match=r"^--replay .* is not a size; say it as 500MB, 1\.5GB") as caught:
        bytes_of("--replay", size)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("size", ["0B", "0.0MB", "0.4B", "999999999999TB"])
def test_a_size_of_nothing_or_of_too_much_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="choose from 1B to 1000TB"):
        bytes_of("--replay", size)


@given(st.integers(1, 999_999), st.integers(0, 999), st.sampled_from(["", "k", "M", "G", "ki", "Mi", "Gi"]))
def test_a_size_is_exact_to_the_byte(whole: int, part: int, prefix: str) -> None:
    unit = (1024 if prefix.endswith("i") else 1000) ** " kMG".index(prefix[:1] or " ")
    exact = (Fraction(whole) + Fraction(part, 1000)) * unit
    assert abs(bytes_of("--budget", f"{whole}.{part:03}{prefix}B") - exact) <= Fraction(1, 2)


# ---------------------------------------------------------------- the schedule


def steps_of(run: Run, folder: Path, data: Sequence[Batches]) -> tuple[list[float], dict[str, Any], Path]:
    """The server's learning rate at each step of a real run; its summary, and its folder."""
    rates, step = list[float](), Hosting.step

    def noted(hosting: Hosting, group: Sequence[Received]) -> Answer:
        answer = step(hosting, group)
        rates.append(hosting.parts[0].optimizer.param_groups[0]["lr"])
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hosting, "step", noted)
        server, _, summary = federation(run, folder, data)
    expected = len(build_method(run).sent(run.epochs - 1, len(data[0])))
    epochs = run.send_last_epochs or run.epochs
    assert [member.received.sequence for member in server.rounds.members()] == [
        epochs * expected
    ] * run.clients
    return rates, summary, next(folder.glob("server*"))


@pytest.mark.parametrize(
    ("every", "last", "epochs"),
    [
        (3, 0, [0, 3, 6, 9]),
        (4, 0, [1, 5, 9]),
        (10, 0, [9]),
        (1, 3, [7, 8, 9]),
        (2, 5, [5, 7, 9]),
        (3, 5, [6, 9]),
    ],
)
def test_the_last_epoch_is_always_one_of_those_in_which_batches_are_sent(
    every: int, last: int, epochs: list[int]
) -> None:
    method = build_method(small_run(epochs=10, send_every_epochs=every, send_last_epochs=last))
    assert [epoch for epoch in range(10) if method.sent(epoch, 4)] == epochs
    assert method.first_epoch == epochs[0], "where the server's schedule begins"


@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_servers_schedule_is_whole_over_the_epochs_in_which_it_is_sent_anything(
    schedule: str, last: int, tmp_path: Path
) -> None:
    run = small_run(epochs=4, lr=0.1, warmup=0.25, schedule=schedule, send_last_epochs=last)
    rates, summary, folder = steps_of(run, tmp_path, [Batches(run, seed=1, samples=40)])
    assert rates == pytest.approx([learning_rate(run, i / (5 * last)) for i in range(5 * last)])
    assert rates[0] == pytest.approx(0.001), "it warms up, however late"
    assert summary["samples_trained"] == 40 * last
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(5 - last, 5))


def test_it_is_whole_where_only_some_batches_are_sent_and_two_clients_send(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"send_every": 3, "send_last_epochs": 2, "fixed_order": True}
    run = small_run(clients=2, epochs=3, lr=0.1, warmup=0.0, **settings)
    rates, summary, _ = steps_of(run, tmp_path, [Batches(run, seed=seed, samples=52) for seed in range(2)])
    each = [learning_rate(run, i / 6) for i in range(6)]  # of 7 batches the 1st, 4th and 7th, of 4 samples
    assert rates == pytest.approx([rate for rate in each for _ in range(2)])
    assert summary["samples_trained"] == 2 * 2 * 20


def test_with_a_budget_it_is_whole_over_the_epochs_that_are_sent(tmp_path: Path) -> None:
    run = small_run(epochs=4, lr=0.1, warmup=0.0, fixed_order=True, budget="55kB")  # of 82 kB in int4
    rates: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        step = Hosting.step

        def noted(hosting: Hosting, group: Sequence[Received]) -> Answer:
            answer = step(hosting, group)
            rates.append(hosting.parts[0].optimizer.param_groups[0]["lr"])
            return answer

        patch.setattr(Hosting, "step", noted)
        federation(run, tmp_path, [Batches(run, seed=1, samples=40)])
    epochs = len(rates) // 5
    assert 0 < epochs < 4
    assert rates == pytest.approx([learning_rate(run, i / (5 * epochs)) for i in range(5 * epochs)])


@given(st.integers(1, 50), st.data())
def test_progress_runs_from_nothing_to_nearly_all_from_wherever_it_begins(epochs: int, data: Any) -> None:
    run = Run(epochs=epochs)
    first, batches = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(1, 9))
    steps = [progress_of(run, e, b, batches, first) for e in range(first, epochs) for b in range(batches)]
    assert steps == pytest.approx([i / len(steps) for i in range(len(steps))])
    assert max(steps) < 1
