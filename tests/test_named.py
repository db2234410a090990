"""Networks by name: what cannot be is refused in one line; whose code runs at a client; who does not fit."""

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.methods import build_method
from common.nets.cut import build
from common.nets.named import build_named, is_named, is_own, versions
from common.parts import after_cut
from dsl_client.client import Client
from tests.federation import CPU, serving, small_run
from tests.programs import ends, programs
from tests.test_graph import ROOT, any_run, quick  # noqa: F401  # a fixture

VIT = {"model": "tests.networks:vit", "cut": "encoder.dropout"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "torchvision:resnet18"}, "--model torchvision:resnet18 needs --cut LAYER: dsl cuts"),
        ({**VIT, "split": "s"}, "--split s: only for resnetN"),
        ({**VIT, "client_modules": 2}, "--client-modules, --server-modules: only for resnetN"),
        ({"model": "resnet8", "cut": "layer1"}, "--cut layer1: resnet8 is cut by --split"),
        ({**VIT, "model": "torchvision:resnet81"}, "there is no 'resnet81' here; near it are resnet"),
        ({**VIT, "model": "torchvision:fcn_resnet50"}, "there is no 'fcn_resnet50' here"),
        ({**VIT, "model": "tests.networks:vti"}, "has no function 'vti'; did you mean 'vit'"),
        ({**VIT, "model": "tests.network:vit"}, "no module named 'tests.network' here: install it, or put"),
        ({**VIT, "model": "tests.networks:nothing"}, "gives NoneType; it must build an nn.Module"),
        (
            {**VIT, "model": "tests.networks:fails"},
            "its code failed: RuntimeError: no such file: weights.bin$",
        ),
        (
            {**VIT, "model": "tests/networks:vit"},
            "say torchvision:NAME, timm:NAME or package.module:function",
        ),
        ({**VIT, "model": "tests.networks:"}, "say torchvision:NAME, timm:NAME or package.module:function"),
        ({**VIT, "model": "tests.networks:tied"}, "has no such layer in use; near it are"),
        (
            {"model": "tests.networks:tied", "cut": "middle"},
            "--cut middle: would have first.weight = last.weight on both sides, and a weight must be on one",
        ),
        ({"model": "tests.networks:tied", "cut": "last"}, "would leave the client nothing to learn"),
        (
            {"model": "tests.networks:branches", "cut": "first"},
            r"follow it on an input of \[3, 8, 8\], networks.py line \d+: .*; its code must not depend",
        ),
        ({"model": "tests.networks:skip", "cut": "last"}, "would leave the server nothing to learn; near it"),
        (
            {"model": "tests.networks:skip", "cut": "second", "image": (1, 8, 8)},
            "cannot follow it on an input of",
        ),
        ({"model": "tests.networks:skip", "cut": "secnd"}, "--cut 'secnd': .* near it are second"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        build(any_run(**settings))
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 400


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "strided"}, r"--head strided: takes maps \(C, H, W\), and at this cut \[5, 16\] crosses"),
        ({"head": "copy"}, r"--head copy: takes maps"),
        ({"head": "copy", "model": "tests.networks:skip", "cut": "first"}, "--head copy: copies the blocks"),
        ({"classes": 5}, "gives 4 logits, and the run has 5 classes: have its function take num_classes"),
    ],
)
def test_what_does_not_fit_what_crosses_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(any_run(**{**VIT, **settings}))


@pytest.mark.usefixtures("quick")
def test_a_u_shape_is_of_a_resnet() -> None:
    run = any_run(**VIT, method="ushape")
    with pytest.raises(ConfigError, match="--method ushape: cuts off the last layer"):
        after_cut(build(run), build_method(run))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("head", ["gap", "flat"])
@pytest.mark.parametrize("cut", ["encoder.dropout", "encoder.layers.encoder_layer_0.ln_1"])
def test_heads_classify_tokens(head: str, cut: str) -> None:
    net = build(any_run(**{**VIT, "cut": cut}, head=head))
    assert net.head(torch.zeros(3, *net.cut_shape)).shape == (3, 4)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="it is installed")
def test_a_library_that_is_missing_is_named_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="no module named 'timm' here: pip install timm"):
        build_named("timm:vit_tiny_patch16_224", 10, 3, 0)


def test_timm_is_asked_for_first_weights_and_the_images_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = types.ModuleType("timm")
    asked: list[Any] = []

    def create(name: str, **settings: Any) -> nn.Module:
        asked.append((name, settings))
        return nn.Linear(1, 1)

    monkeypatch.setattr(timm, "list_models", lambda: ["vit_tiny", "vit_small"], raising=False)
    monkeypatch.setattr(timm, "create_model", create, raising=False)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(build_named("timm:vit_tiny.in1k", 7, 1, 0), nn.Linear)
    assert asked == [("vit_tiny.in1k", {"pretrained": False, "num_classes": 7, "in_chans": 1})]
    with pytest.raises(ConfigError, match="there is no 'vit_tny' here; near it are vit_tiny"):
        build_named("timm:vit_tny", 7, 1, 0)


def test_names_tell_whose_code_it_is() -> None:
    assert [is_named(model) for model in ("resnet20", "timm:x", "a.b:c")] == [False, True, True]
    assert [is_own(model) for model in ("resnet20", "torchvision:x", "timm:x", "a.b:c")] == [False] * 3 + [
        True
    ]
    assert versions("torchvision:resnet18").startswith(f"torch {torch.__version__.split('+')[0]}")


# ---------------------------------------------------------------- at Join


def joined(server: Any, **settings: Any) -> Client:
    client = Client(f"127.0.0.1:{server.port}", "ward", CPU, **settings)
    client.join(patience=10)
    return client


@pytest.mark.usefixtures("quick")
def test_no_server_can_have_a_client_run_code_that_it_does_not_name(tmp_path: Path) -> None:
    with serving(any_run(**VIT), tmp_path) as server:
        client = joined(server, allow=["tests.networks:skip"])
        with pytest.raises(
            ConfigError, match=r"start dsl-client with --allow tests.networks:vit$"
        ) as refused:
            client.train(tmp_path / "client")
        client.close(refused.value)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.usefixtures("quick")
def test_a_client_that_builds_another_network_says_so_before_it_trains(named: bool, tmp_path: Path) -> None:
    run = any_run(**VIT) if named else small_run()
    with serving(run, tmp_path) as server:
        server._service._network = "0" * 64
        client = joined(server, allow=[run.model])
        with pytest.raises(
            ConfigError, match="builds another network than the server from --model"
        ) as refused:
            client.train(tmp_path / "client")
        assert "install what is installed there (here: torch 2" in str(refused.value)
        client.close(refused.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "consents", "code"), [("dsl", True, 0), ("csl", True, 0), ("dsl", False, 2)]
)
def test_the_programs_train_a_network_of_ones_own(
    method: str, consents: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes and real images; two tensors cross. What a client does not name it does not run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model = ["--model", "tests.networks:skip"]
    small = ["--train-limit", 64, "--test-limit", 32, "--batch-size", 16, "--epochs", 1]
    with programs(tmp_path) as start:
        flags = [*model, "--cut", "second", "--method", method, *small, "--listen", "127.0.0.1:0"]
        server = start("dsl-server", *flags)
        assert server.stdout is not None
        greeting = server.stdout.readline()
        assert f"{method} on tests.networks:skip cut at second" in greeting
        address = re.search(r"--server \S+:(\d+)", greeting)
        assert address is not None
        client = start(
            "dsl-client", "--server", f"127.0.0.1:{address[1]}", *(["--allow", model[1]] if consents else [])
        )
        ended, words = ends(client, 150)
        assert ended == code, words
        assert ("start dsl-client with --allow tests.networks:skip" in words) == (code == 2)
        assert ends(server, 60)[0] == (69 if code else 0)
