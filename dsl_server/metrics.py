"""A view of the run as Prometheus asks for it: nothing is counted here, so nothing is counted twice."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric

from common.exporter import Values, build, counter, counters, gauge, gauges, of_phases, of_wire
from dsl_server.watch import ClientView, State, View


def metrics_of(view: View, program: str) -> Iterable[Metric]:
    yield build(program)
    run = {"name": view.name, "method": view.method, "model": view.model, "place": view.place}
    yield InfoMetricFamily("dsl_run", "What is trained and how.", run)
    yield gauge("dsl_finished", "1 once all clients have trained to the end.", view.finished)
    yield gauge("dsl_failed", "1 once the run has ended before that.", view.reason is not None)
    yield gauge("dsl_epoch", "The latest epoch that a client has begun, from 1.", view.epoch + 1)
    yield gauge("dsl_epochs", "Epochs of the run.", view.epochs)
    yield gauge("dsl_done_ratio", "The fraction of the clients' epochs that is behind them.", view.done)
    yield gauge("dsl_run_seconds", "Seconds since the first client joined.", view.seconds)
    yield counter("dsl_samples_trained", "Samples trained on.", view.samples)
    yield counter("dsl_samples_replayed", "Samples learned from once more.", view.replayed)
    yield counter("dsl_steps_skipped", "Steps left out, since they came to what is not finite.", view.skipped)
    yield gauge("dsl_loss", "Training loss at the server, a running mean.", view.loss)
    yield gauge("dsl_test_accuracy", "Of the joined network, at the last evaluation.", view.test["accuracy"])
    yield gauge("dsl_test_loss", "Of the joined network, at the last evaluation.", view.test["loss"])
    alone = view.test["client_only_accuracy"]
    yield gauge("dsl_test_client_only_accuracy", "Of the clients' own heads, at the last evaluation.", alone)
    if other := view.test.get("metric"):
        of_it = [(("joined",), other["joined"]), (("client_only",), other["client_only"])]
        known = [(labels, value) for labels, value in of_it if value is not None]
        about = f"The run's metric ({other['name']}), at the last evaluation."
        yield gauges("dsl_test_metric", about, ("of",), known)
    yield of_wire(view.wire)
    if view.socket is not None:
        socket = [((direction,), n) for direction, n in view.socket.items()]
        yield counters("dsl_socket_bytes", "Bytes by the kernel's count, in all.", ("direction",), socket)
    yield of_phases(view.phases)
    if view.saved_s is not None:
        yield gauge("dsl_checkpoint_age_seconds", "Since a checkpoint was last on disk.", view.saved_s)
    yield from _clients(view)


def _clients(view: View) -> Iterable[Metric]:
    counted = Counter(client.state for client in view.clients)
    states = [((state,), counted[state]) for state in get_args(State)]
    yield gauges("dsl_clients", "Clients by state.", ("state",), states)
    known = [client for client in view.clients if client.state != "awaited"]

    def each(number: Callable[[ClientView], float | None]) -> Values:
        numbers = [((str(client.client), client.name), number(client)) for client in known]
        return [(labels, n) for labels, n in numbers if n is not None]

    labels = ("client", "name")
    present = each(lambda client: client.state in ("training", "waiting"))
    yield gauges("dsl_client_up", "1 while it is there and has not left.", labels, present)
    yield gauges("dsl_client_epoch", "Its latest epoch, from 1.", labels, each(lambda c: c.epoch + 1))
    lag = each(lambda client: client.lag_s)
    yield gauges("dsl_client_lag_seconds", "Since its last batch came; 0 while none is due.", labels, lag)
    queue = each(lambda client: client.queue)
    yield gauges("dsl_queue_batches", "Its batches that wait at the server.", labels, queue)
    loss = each(lambda client: client.loss)
    yield gauges("dsl_client_loss", "Training loss on its batches, a running mean.", labels, loss)
    samples = each(lambda client: client.samples)
    yield counters("dsl_client_samples_trained", "Its samples trained on.", labels, samples)
    passed = [
        ((str(client.client), client.name, direction), n)
        for client in known
        for direction, n in (("up", client.up), ("down", client.down))
    ]
    yield counters("dsl_client_bytes", "Its serialized bytes.", (*labels, "direction"), passed)
