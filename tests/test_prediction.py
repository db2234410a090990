"""Predictions of finished runs: split they are the joined network's bit for bit, alone the head's."""

import csv
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from common.ended import Ended, client_end, server_end
from common.errors import (
    ClosedError,
    ConfigError,
    IdentityError,
    RefusedError,
    SplitLearningError,
)
from common.meter import Traffic
from common.methods.base import ClientPart
from common.run import Run
from common.tls import Credentials
from common.wire import prediction_pb2 as pb
from common.wire import split_learning_pb2 as training
from common.wire.prediction_pb2_grpc import PredictionServiceStub
from dsl_client import predict
from dsl_client.predictor import AHEAD, Predictor, Remote
from dsl_client.samples import Portion
from dsl_lab.evaluate import scores
from dsl_lab.joined import joined
from dsl_server import __main__ as server_program
from dsl_server import predictor
from tests import certificates
from tests.ended import NAMES, RUNS, Runs, asked, portions_of, predicting, train
from tests.federation import CPU, connect, serving, small_run
from tests.ordinary import channel_to
from tests.test_graph import any_run, quick  # noqa: F401  # a fixture
from tests.threads import in_thread, wait_for

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("quick")]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


# ---------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("name", ["dsl", "csl", "relay", "each its own", "two tensors cross"])
def test_split_predictions_are_those_of_the_joined_network_bit_for_bit(name: str, trained: Runs) -> None:
    server_folder, clients = trained(name)
    whole, ended = joined(server_folder, clients[-1])
    with predicting(server_folder) as server, torch.no_grad():
        for size in (8, 3):
            portions = portions_of(ended, size)
            found = asked(server, ended, portions)
            assert [predicted.portion for predicted in found] == portions
            assert not any(predicted.alone for predicted in found)
            for predicted in found:
                pixels = predicted.portion.x * 0.25 + 0.5  # exact: a spread and a mean of powers of two
                assert torch.equal(predicted.logits, whole(pixels))
        assert server.tally.samples == 2 * 20


@pytest.mark.parametrize("name", ["dsl", "csl", "ushape", "relay"])
def test_the_accuracy_of_split_predictions_is_that_of_the_run(
    name: str, trained: Runs, tmp_path: Path
) -> None:
    """ushape: with a codec that rounds at random, by the same dice."""
    server_folder, clients = trained(name)
    test = summary_of(server_folder)["test"]
    with predicting(server_folder) as server:
        where = ["--run", clients[-1], "--server", f"127.0.0.1:{server.port}"]
        lines = predicted_lines(tmp_path, *where)
    found = scores(lines)
    assert (found.samples, found.accuracy) == (len(lines), test["accuracy"])
    assert found.loss == pytest.approx(test["loss"], rel=1e-6)
    assert list(found.names) == list(NAMES)
    assert {line["by"] for line in lines} == {"server"}


@pytest.mark.parametrize(
    ("name", "key"),
    [("dsl", "client_only_accuracy"), ("each its own", "client_only_accuracy"), ("fedavg", "accuracy")],
)
def test_the_accuracy_of_a_client_alone_is_that_of_the_run(
    name: str, key: str, trained: Runs, tmp_path: Path
) -> None:
    server_folder, clients = trained(name)
    lines = [line for client in clients for line in predicted_lines(tmp_path, "--run", client, "--alone")]
    assert scores(lines).accuracy == summary_of(server_folder)["test"][key]
    assert {line["by"] for line in lines} == {"alone"}


def predicted_lines(folder: Path, *flags: object) -> list[dict[str, Any]]:
    """What the command writes of each sample."""
    out = folder / "predictions.jsonl"
    assert predict.main([*map(str, flags), "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_who_else_asks_changes_nothing(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    portions = portions_of(ended) * 5
    with predicting(folder) as server, ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: asked(server, ended, portions), range(3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("codec", ["", "int8", "fp16+zstd"])
def test_a_codec_may_be_chosen(codec: str, trained: Runs) -> None:
    """The bytes are the activations' and the logits', and nothing else is large."""
    folder, (client,) = trained("dsl")
    whole, ended = joined(folder, client)
    traffic = Traffic()
    with predicting(folder) as server:
        remote = Remote(f"127.0.0.1:{server.port}", ended, traffic, 10, None, codec)
        found = list(Predictor(ended, remote).predict(portions_of(ended)))
        remote.close()
        up, down = server.traffic.by_kind()["up"], server.traffic.by_kind()["down"]
    assert traffic.by_kind() == {"up": up, "down": down}
    numbers = 20 * 16 * 8 * 8
    plain = {"": 4 * numbers, "int8": numbers + 3 * (16 * 4 + 1)}
    assert up["activations"] == plain.get(codec, up["activations"])
    assert up["activations"] < 4 * numbers or not codec
    assert down["activations"] == 20 * 4 * 4
    for predicted in found:
        due = whole(predicted.portion.x * 0.25 + 0.5)
        torch.testing.assert_close(predicted.logits, due, rtol=0, atol=0.05 if codec else 0)


def test_more_than_fits_between_the_ends_does_not_stop_them(trained: Runs) -> None:
    """Outputs of a U-shape are as large as what is sent: neither end may wait for the other to read."""
    folder, (client,) = trained("ushape")
    ended = client_end(client, CPU)
    portions = portions_of(ended) * 20
    with predicting(folder) as server:
        assert len(asked(server, ended, portions, "fp32")) == 60


# ---------------------------------------------------------------- when the server is away


def leaving(server: predictor.Predictor, portions: Sequence[Portion]) -> Iterator[Portion]:
    """The portions; the server is gone before the last ones."""
    yield from portions[:AHEAD]
    server.stop(0)
    yield from portions[AHEAD:]


def test_a_client_goes_on_alone_when_its_server_goes(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended, why = client_end(client, CPU), list[ClosedError]()
    portions = portions_of(ended, 2)
    head = ended.part.head
    assert head is not None
    with predicting(folder) as server:
        remote = Remote(f"127.0.0.1:{server.port}", ended, Traffic(), 10)
        found = list(Predictor(ended, remote, why.append).predict(leaving(server, portions)))
        remote.close()
    assert len(why) == 1
    assert [predicted.portion for predicted in found] == portions
    assert found[-1].alone
    by = [predicted.alone for predicted in found]
    assert by == sorted(by), "once it is gone it is not asked again"
    with torch.no_grad():
        for predicted in found:
            if predicted.alone:
                z = ended.part.bottom(predicted.portion.x)
                assert torch.equal(predicted.logits, head(z))


def test_otherwise_it_says_that_the_server_went(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    with predicting(folder) as server:
        remote = Remote(f"127.0.0.1:{server.port}", ended, Traffic(), 10)
        with pytest.raises(ClosedError):
            list(Predictor(ended, remote).predict(leaving(server, portions_of(ended, 2))))
        remote.close()


def test_a_server_that_is_asked_to_end_lets_calls_end_that_are_open(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    portions, stopping = portions_of(ended, 2), list[Future[None]]()

    def meanwhile() -> Iterator[Portion]:
        yield from portions[:AHEAD]
        stopping.append(in_thread(server.stop, 20))
        yield from portions[AHEAD:]

    with predicting(folder) as server:
        target = f"127.0.0.1:{server.port}"
        remote = Remote(target, ended, Traffic(), 10)
        found = list(Predictor(ended, remote).predict(meanwhile()))
        with pytest.raises(ClosedError):
            Remote(target, ended, Traffic(), 0.5)  # no more calls
        remote.close()
        stopping[0].result(timeout=10)
    assert [predicted.portion for predicted in found] == portions


def test_a_server_that_never_came_is_done_without_and_the_table_says_so(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (client,) = trained("dsl")
    away = ["--run", client, "--server", "127.0.0.1:1", "--patience", 0.1]
    lines = predicted_lines(tmp_path, *away, "--alone-if-away")
    assert {line["by"] for line in lines} == {"alone"}
    assert "no server at 127.0.0.1:1 within 0.1 s" in (said := capsys.readouterr().err)
    assert "this client goes on alone" in said
    with pytest.raises(ClosedError, match=r"no server at 127.0.0.1:1 within 0.1 s"):
        predicted_lines(tmp_path, *away)


def test_a_caller_that_goes_leaves_nothing_behind(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    with predicting(folder) as server:
        channel, call = opened(server, ended)
        wait_for(lambda: server.tally.calls == 1)
        call.cancel()
        wait_for(lambda: server.tally.calls == 0)
        wait_for(lambda: not any(thread.name == "reader" for thread in threading.enumerate()))
        channel.close()
        assert len(asked(server, ended, portions_of(ended))) == 3


# ---------------------------------------------------------------- what is refused


def opened(
    server: predictor.Predictor, ended: Ended[ClientPart], *messages: Any, **changes: Any
) -> tuple[grpc.Channel, Any]:
    """A call by the generated classes alone, as of a client in another language. Without messages it stays
    open."""
    channel = channel_to(server)  # type: ignore[arg-type]
    stub: Any = PredictionServiceStub(channel)  # type: ignore[no-untyped-call]
    opening = {"run_id": ended.run_id, "network": ended.net.fingerprint, **changes}
    over = threading.Event()

    def requests() -> Iterator[Any]:
        yield pb.PredictRequest(prediction=pb.Prediction(**opening))
        yield from messages
        if not messages:
            over.wait(20)

    call = stub.Predict(requests())
    call.add_callback(over.set)
    return channel, call


def batch(samples: int = 2, value: float = 0.0, labels: int = 0, **changes: Any) -> pb.PredictRequest:
    head = training.Batch(
        sequence=1,
        activations=training.TensorSpec(dtype=training.DTYPE_FLOAT32, shape=[samples, 16, 8, 8]),
        **changes,
    )
    if labels:
        head.labels.CopyFrom(training.TensorSpec(dtype=training.DTYPE_UINT8, shape=[labels]))
    data = np.full((samples, 16, 8, 8), value, "<f4").tobytes() + bytes(labels)
    return pb.PredictRequest(batch=head, data=data)


INVALID, REFUSED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("changes", "messages", "code", "words"),
    [
        ({"run_id": "0" * 16}, [batch()], REFUSED, "the client's part is of run '0000000000000000'"),
        ({"network": "0" * 64}, [batch()], REFUSED, "serves another network than the client has"),
        ({"codec": "int5"}, [batch()], INVALID, "codec 'int5': choose fp32"),
        ({"codec": "int8"}, [batch()], INVALID, "int8: 0 tensors came; 3 were due"),
        ({}, [batch(9)], INVALID, "a batch of 9 samples: the run allows 1 to 8"),
        ({}, [batch(0)], INVALID, "a batch of 0 samples: the run allows 1 to 8"),
        ({}, [batch(value=np.nan)], INVALID, "activations of batch 1: NaN or infinite"),
        ({}, [batch(labels=2)], INVALID, "batch 1 has labels; in this run they stay"),
        ({}, [pb.PredictRequest(data=b"1234")], INVALID, r"beginning of a frame \(batch\), got only data"),
        ({}, [batch(), pb.PredictRequest(prediction=pb.Prediction())], INVALID, "got prediction"),
    ],
)
def test_a_call_that_is_wrong_ends_with_its_reason_and_harms_no_other(
    changes: dict[str, str],
    messages: list[pb.PredictRequest],
    code: grpc.StatusCode,
    words: str,
    trained: Runs,
) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    with predicting(folder) as server:
        channel, call = opened(server, ended, *messages, **changes)
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
        assert refused.value.code() == code
        assert re.search(words, refused.value.details())
        channel.close()
        assert len(asked(server, ended, portions_of(ended))) == 3


def test_an_ordinary_client_reads_what_is_served_and_its_answers(trained: Runs) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    with predicting(folder) as server:
        channel, call = opened(server, ended, batch(), batch(1))
        answers = list(call)
        stub: Any = PredictionServiceStub(channel)  # type: ignore[no-untyped-call]
        told = stub.Inspect(pb.InspectRequest(oldest_version=1, newest_version=1))
        with pytest.raises(grpc.RpcError, match="speaks protocol version 1, the client 2 to 3"):
            stub.Inspect(pb.InspectRequest(oldest_version=2, newest_version=3))
        channel.close()
    assert (told.classes, told.batch_size, list(told.activations)) == (4, 8, [16, 8, 8])
    assert (told.run_id, told.network, list(told.output)) == (ended.run_id, ended.net.fingerprint, [4])
    assert Run.from_json(told.run) == ended.run
    (two, one) = [np.frombuffer(answer.data, "<f4").reshape(-1, 4) for answer in answers]
    with torch.no_grad():
        top = server_end(folder, CPU).part.top
        np.testing.assert_allclose(two, top(torch.zeros(2, 16, 8, 8)), atol=1e-6)
        np.testing.assert_allclose(one, top(torch.zeros(1, 16, 8, 8)), atol=1e-6)


def test_parts_of_other_runs_do_not_meet(trained: Runs, tmp_path: Path) -> None:
    """Of the same settings even: the run's own name tells. And of another network."""
    _, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    other_server, _ = train(RUNS["dsl"](), tmp_path)
    with pytest.raises(ConfigError, match="are of two runs: their parts do not fit together"):
        joined(other_server, client)
    with predicting(other_server) as server, pytest.raises(ConfigError, match=r"serves run .* is of run"):
        asked(server, ended, [])
    deeper = train(small_run(epochs=1, split="2"), tmp_path / "deeper")[0]
    facts = json.loads((deeper / "checkpoint/facts.json").read_text())
    (deeper / "checkpoint/facts.json").write_text(json.dumps({**facts, "run_id": ended.run_id}))
    with predicting(deeper) as server, pytest.raises(ConfigError, match="serves another network"):
        asked(server, ended, [])


def test_who_trains_does_not_predict_and_who_predicts_does_not_train(trained: Runs, tmp_path: Path) -> None:
    folder, (client,) = trained("dsl")
    with predicting(folder) as server, pytest.raises(RefusedError, match="does it train"):
        connect(server)  # type: ignore[arg-type]
    with serving(small_run(), tmp_path) as trainer, pytest.raises(RefusedError, match="does it train"):
        asked(trainer, client_end(client, CPU), [])  # type: ignore[arg-type]


def test_with_certificates_a_revoked_client_and_a_stranger_are_refused(trained: Runs, tmp_path: Path) -> None:
    folder, (client,) = trained("dsl")
    ended = client_end(client, CPU)
    certs = certificates.make(tmp_path / "certs", "ward-7", "ward-8")
    seven, eight = (Credentials.read(certs / "clients" / name, "client") for name in ("ward-7", "ward-8"))
    refusals: list[str] = []
    own = Credentials.read(certs, "server")
    with predicting(folder, credentials=own, on_refused=refusals.append) as server:
        target = f"localhost:{server.port}"
        certificates.certs.run(certificates.certs.Revoke(certs, "ward-8"))
        remote = Remote(target, ended, Traffic(), 10, seven)
        assert len(list(Predictor(ended, remote).predict(portions_of(ended)))) == 3
        remote.close()
        with pytest.raises(IdentityError, match=r"the certificate of ward-8 .* is revoked"):
            Remote(target, ended, Traffic(), 10, eight)
        with pytest.raises(IdentityError, match="takes clients with a certificate: say --certs"):
            Remote(target, ended, Traffic(), 2)
    assert len(refusals) == 1
    assert re.search(r"refused .*: the certificate of ward-8 .* is revoked", refusals[0])


@pytest.mark.parametrize(
    ("spoil", "end", "words"),
    [
        (lambda f: shutil.rmtree(f), "server", "holds no run .no run.json.: give the folder that dsl-server"),
        (
            lambda f: (f / "summary.json").unlink(),
            "server",
            "has not ended .no summary.json.: give the",
        ),
        (lambda f: shutil.rmtree(f / "checkpoint"), "server", "checkpoint .* cannot be read: .*facts.json"),
        (lambda f: (f / "checkpoint/part.safetensors").unlink(), "server", "checkpoint .* cannot be read"),
        (lambda f: None, "client", "was left by a server: give the folder that dsl-client left of a run"),
        (lambda f: change(f, run={"model": "resnet14"}), "server", "is of another network, split or head"),
        (lambda f: change(f, run={"modle": 1}), "server", "unknown key 'modle'; did you mean 'model'"),
    ],
)
def test_a_folder_that_holds_no_finished_run_is_named(
    spoil: Callable[[Path], None],
    end: str,
    words: str,
    trained: Runs,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(trained("dsl")[0], tmp_path / "server")
    spoil(folder)
    with pytest.raises(ConfigError, match=words) as refused:
        {"server": server_end, "client": client_end}[end](folder, CPU)
    assert str(folder) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def change(folder: Path, run: dict[str, Any]) -> None:
    """Other settings in a checkpoint's facts."""
    path = folder / "checkpoint/facts.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "run": {**facts["run"], **run}}))


def test_the_part_of_a_relay_is_at_its_last_client(trained: Runs) -> None:
    _, (first, _) = trained("relay")
    with pytest.raises(ConfigError, match="in a relay the part went on to the last one: give the folder of"):
        client_end(first, CPU)


def test_where_the_whole_network_is_at_the_clients_nothing_is_served(trained: Runs) -> None:
    folder, (client,) = trained("fedavg")
    with pytest.raises(ConfigError, match="a server has nothing to add: dsl-client predict --alone"):
        predicting(folder).__enter__()
    with pytest.raises(ConfigError, match="a server has nothing to add"):
        Remote("127.0.0.1:1", client_end(client, CPU), Traffic(), 0.1)


def test_what_cannot_be_served_is_said_in_one_line(trained: Runs, tmp_path: Path) -> None:
    folder, _ = trained("dsl")
    with pytest.raises(ConfigError, match="nothing is trained; leave --resume, --out and --config out"):
        server_program._main(["--serve", str(folder), "--resume", str(folder)])
    with pytest.raises(ConfigError, match=r"holds no run \(no run.json\)"):
        server_program._main(["--serve", str(tmp_path)])
    with pytest.raises(ConfigError, match="without --certs nothing is encrypted"):
        server_program._main(["--serve", str(folder), "--listen", "0.0.0.0:0"])
    with predicting(folder) as server, pytest.raises(ConfigError, match="is the port in use"):
        server_program._main(["--serve", str(folder), "--listen", f"127.0.0.1:{server.port}"])


# ---------------------------------------------------------------- the command


def pictures(folder: Path, count: int = 3) -> Path:
    """Of other sizes than the run's, some a folder further down."""
    rng = np.random.default_rng(1)
    for index in range(count):
        path = folder / ("deeper" if index % 2 else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (11, 9, 3), np.uint8)).save(path)
    return folder


def test_pictures_without_labels_become_a_table(trained: Runs, tmp_path: Path) -> None:
    """Files, folders and an npz. They are what the joined network takes them for, and named as the client's
    own data names them."""
    folder, (client,) = trained("dsl")
    scans, out = pictures(tmp_path / "scans"), tmp_path / "new" / "table.csv"
    stacked = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "more.npz", images=stacked)
    with predicting(folder) as server:
        where = ["--server", f"127.0.0.1:{server.port}", "--run", str(client), "--out", str(out)]
        assert predict.main([*where, str(scans), str(scans / "0.png"), str(tmp_path / "more.npz")]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = [scans / "0.png", scans / "2.png", scans / "deeper/1.png", scans / "0.png"]
    assert [row["image"] for row in rows] == [*map(str, files), *(f"{tmp_path}/more.npz:{i}" for i in (0, 1))]
    assert {(row["label"], row["by"]) for row in rows} == {("", "server")}

    scaled = [Image.open(file).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR) for file in files]
    pixels = np.concatenate([np.stack(scaled), stacked]).transpose(0, 3, 1, 2)
    whole, _ = joined(folder, client)
    with torch.no_grad():
        chances = whole(torch.from_numpy(pixels / np.float32(255))).softmax(1)
    assert [row["class"] for row in rows] == [NAMES[index] for index in chances.argmax(1).tolist()]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], chances.amax(1), atol=1e-5)


def test_a_data_source_has_labels_and_either_of_its_sets(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (client,) = trained("dsl")
    source = f"npz:{client.parent / 'data.npz'}"
    lines = predicted_lines(tmp_path, "--run", client, "--alone", "--data", source, "--split", "train")
    assert len(lines) == 24
    assert [line["label"] for line in lines[:5]] == [*NAMES, NAMES[0]]
    right = sum(line["label"] == line["class"] for line in lines) / 24
    said = capsys.readouterr().err
    assert f"accuracy {right:.4f}" in said
    assert re.search(r"24 images in [\d.]+ s, [\d,]+ images/s; 0 bytes up and 0 down an image", said)


def test_a_client_with_a_state_has_its_part_within_it(trained: Runs, tmp_path: Path) -> None:
    _, (client,) = trained("dsl")
    shutil.copytree(client, tmp_path / "state" / "out")
    assert len(predicted_lines(tmp_path, "--run", tmp_path / "state", "--alone")) == 20


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("csl", ["--alone"], "csl gives its clients no head of their own, so they cannot predict --alone"),
        ("csl", ["--alone-if-away"], "csl gives its clients no head of their own, so they cannot"),
        ("dsl", ["--alone", "--codec", "int8"], "--alone asks no server: leave --codec int8 out"),
        ("dsl", ["--alone", "--alone-if-away"], "--alone asks no server: leave --alone-if-away out"),
        ("dsl", ["--alone", "--batch-size", "9"], "--batch-size 9: choose 1 to 8, the run's"),
        ("dsl", ["--alone", "--out", "table.txt"], "--out table.txt: say a file that ends in .csv or .jsonl"),
        (
            "dsl",
            ["--alone", "here.png", "--data", "sample"],
            "--data sample, and images beside it: leave",
        ),
        ("dsl", ["--alone", "/nowhere"], "/nowhere holds no pictures .* and is none"),
        ("dsl", ["--alone", "nothing.png"], "nothing.png is no readable picture"),
        ("dsl", ["--alone", "nothing.npz"], "nothing.npz cannot be read .* it needs an array `images`"),
        ("dsl", ["--codec", "int5"], "codec 'int5': choose fp32"),
        ("dsl", ["--server", "gpu-host:50051"], "without --certs nothing is encrypted"),
        ("dsl", ["--alone", "--device", "cuda:9"], "--device 'cuda:9': this machine has cpu"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_one_line(
    name: str,
    flags: list[str],
    words: str,
    trained: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.png").write_text("no picture")
    (tmp_path / "nothing.npz").write_text("no archive")
    client = trained(name)[1][0]
    with pytest.raises(SplitLearningError, match=words) as refused:
        predict.main(["--run", str(client), *flags])
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "predictions.csv").exists()
