"""What a client says it is doing equals what it has done: its own summary and metrics."""

import json
from pathlib import Path

import pytest

from common.methods import settled
from common.run import Run
from dsl_client import watch
from dsl_client.client import Client
from dsl_client.metrics import metrics_of
from dsl_client.trainer import Step
from dsl_client.watch import View, Watch
from tests.federation import CPU, serving

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_the_last_view_is_the_summary(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(
        method=method, model="resnet8", split="1", epochs=2, train_limit=60, test_limit=20, batch_size=20
    )
    seen: list[View] = []
    with serving(settled(run), tmp_path) as server:
        client = Client(f"127.0.0.1:{server.port}", "someone", CPU)
        client.join(patience=10)
        ours = Watch(client)
        seen.append(ours.view())

        def step(step: Step) -> None:
            ours.step(step)
            seen.append(ours.view())
            monkeypatch.setattr(watch, "STALLED_S", -1.0)  # from the second step on it takes too long

        client.train(tmp_path / "client", step, ours.scored)
        last = ours.view()
        client.close()
    assert [view.state for view in seen] == [
        "beginning",
        *["training", "waiting", "between"],
        *["waiting", "waiting", "between"],
    ]
    assert [(view.epoch, view.batch) for view in seen[1:]] == [(e, b) for e in (0, 1) for b in (1, 2, 3)]
    assert [view.samples for view in seen] == list(range(0, 121, 20))
    assert [view.done for view in seen] == pytest.approx([batch / 6 for batch in range(7)])
    assert seen[0].loss is seen[0].score is seen[0].left_s is None
    assert all(view.loss is not None and view.loss > 0 for view in seen[1:])

    summary = json.loads((tmp_path / "client/summary.json").read_text())
    scores = [json.loads(line) for line in (tmp_path / "client/metrics.jsonl").read_text().splitlines()]
    assert last.samples == summary["samples"] == 120
    assert last.wire == summary["wire"]
    assert last.phases == pytest.approx({name: summary["seconds"][name] for name in last.phases}, abs=0.01)
    assert (last.score, last.alone) == (scores[-1]["accuracy"], scores[-1]["alone"])
    assert (last.done, last.left_s, last.queue) == (1.0, 0.0, 0)

    told = {
        sample.name: sample.value for family in metrics_of(last, "dsl-client") for sample in family.samples
    }
    assert told["dsl_samples_trained_total"] == 120
    assert told["dsl_test_accuracy"] == last.score
    assert ("dsl_test_client_only_accuracy" in told) == (method == "dsl"), (
        "where there is no value it is not told"
    )


def test_what_it_waited_is_a_share_of_the_last_seconds() -> None:
    ours = Watch.__new__(Watch)
    ours._waited = watch.deque([(100.0, 0.0)])
    assert ours._waits(101.0, 0.25) == 0.25
    assert ours._waits(102.0, 0.5) == 0.25
    for second in range(103, 110):
        ours._waits(float(second), 0.5)
    assert ours._waits(110.0, 3.0) == 0.5, "2.5 s of the last five"
