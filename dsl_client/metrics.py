"""A view of the client as Prometheus asks for it: nothing is counted here, so nothing is counted twice."""

from collections.abc import Iterable

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric

from common.exporter import build, counter, gauge, of_phases, of_wire
from common.objective import ACCURACY
from dsl_client.watch import View


def metrics_of(view: View, program: str) -> Iterable[Metric]:
    yield build(program)
    run = {"name": view.name, "method": view.method, "model": view.model, "place": view.place}
    who = "" if view.replicas else str(view.client)
    yield InfoMetricFamily("dsl_run", "What is trained and how.", {**run, "client": who})
    if view.replicas:
        yield gauge("dsl_replicas", "Clients of this process; all else is of them together.", view.replicas)
        yield gauge("dsl_replicas_ended", "Of these, those that have ended.", view.ended)
    yield gauge("dsl_epoch", "The epoch that it is in, from 1.", view.epoch + 1)
    yield gauge("dsl_epochs", "Epochs of the run.", view.epochs)
    yield gauge("dsl_done_ratio", "The fraction of the epochs that is behind it.", view.done)
    yield gauge("dsl_run_seconds", "Seconds since it joined.", view.seconds)
    yield counter("dsl_samples_trained", "Samples that this process trained on.", view.samples)
    yield gauge("dsl_loss", "Of the last batch: the client's own or the server's.", view.loss)
    of = "accuracy" if view.metric == ACCURACY else "metric"  # in a run of another metric, that
    yield gauge(f"dsl_test_{of}", f"{view.metric} of the joined network, at the last evaluation.", view.score)
    yield gauge(f"dsl_test_client_only_{of}", f"{view.metric} of its own head.", view.alone)
    yield gauge("dsl_outbox_batches", "Batches that wait to be sent.", view.queue)
    yield of_wire(view.wire)
    yield of_phases(view.phases)
