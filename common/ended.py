"""A run that has ended, as one end left it: its description, its network, its part, ready to predict.

Knows folders; knows no images, no wire.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from common import checkpoint
from common.errors import ConfigError
from common.methods import build_method
from common.methods.base import ClientPart, Method, Part, ServerPart, Tail
from common.nets.cut import CutNet, build, shape_after
from common.nets.heads import Shape
from common.parts import after_cut, client_part, server_part
from common.run import Run, checked

P = TypeVar("P", ClientPart, ServerPart)
Role = Literal["server", "client"]


@dataclass(frozen=True)
class Ended(Generic[P]):
    """What one end knows.

    output_shape: of what the server's layers make of a sample. part: in evaluation mode. run_id: empty of
    runs that did not note it. Only at a client: client, its index; data, the source that it had; names, of
    the classes, where that source has them.
    """

    folder: Path
    run: Run
    method: Method
    net: CutNet
    output_shape: Shape
    part: P
    run_id: str
    client: int = 0
    data: str = ""
    names: tuple[str, ...] = ()


def server_end(folder: Path, device: torch.device) -> Ended[ServerPart]:
    """Of the folder that a server left. Raises ConfigError, naming the folder and the remedy."""
    run, facts = described(folder, "server")
    method, net = build_method(run), build(run)
    output = _output_shape(run, method, net)
    part = server_part(run, method, net, device)
    _fill(part, folder)
    return Ended(folder, run, method, net, output, part, _text(facts, "run_id"))


def client_end(folder: Path, device: torch.device) -> Ended[ClientPart]:
    """Of the folder that a client left, its --out, or its --state. Raises ConfigError."""
    run, facts = described(folder, "client")
    client = facts["client"]
    if run.sync == "relay" and client != run.clients - 1:
        raise ConfigError(
            f"{folder} is of client {client}, and in a relay the part went on to the last one: give the "
            f"folder of client {run.clients - 1}"
        )
    method, net = build_method(run), build(run)
    output = _output_shape(run, method, net)
    part = client_part(run, method, net, device)
    _fill(part, _kept(folder))
    names = tuple(map(str, facts.get("classes") or ()))
    data = _text(facts, "data") or run.data
    return Ended(folder, run, method, net, output, part, _text(facts, "run_id"), client, data, names)


def described(folder: Path, role: Role) -> tuple[Run, dict[str, Any]]:
    """The run that an end left here, and what it saved beside its weights. Raises ConfigError."""
    folder, remedy = _kept(folder), f"give the folder that dsl-{role} left of a run that has ended"
    if not (folder / "run.json").exists():
        raise ConfigError(f"{folder} holds no run (no run.json): {remedy}")
    if not (folder / "summary.json").exists():
        raise ConfigError(f"{folder}: that run has not ended (no summary.json): {remedy}")
    facts = checkpoint.facts_of(folder / "checkpoint")
    if ("client" in facts) != (role == "client"):
        raise ConfigError(f"{folder} was left by a {'server' if role == 'client' else 'client'}: {remedy}")
    if type(facts.get("client", 0)) is not int or "run" not in facts:
        raise ConfigError(f"{folder}/checkpoint: its facts are not of this release: {remedy}")
    # Gradient checkpointing is of training, and changes no weight and no name.
    return replace(Run(**checked(facts["run"], f"{folder}/checkpoint")), keep_blocks=0), facts


def _kept(folder: Path) -> Path:
    """A client that has a --state has its outputs within it."""
    return folder / "out" if (folder / "out" / "run.json").exists() else folder


def check_joined(client: Ended[ClientPart], server: Ended[ServerPart]) -> None:
    """Raises ConfigError unless the two parts learned together."""
    other = client.run_id and server.run_id and client.run_id != server.run_id
    if other or client.run != server.run:
        raise ConfigError(
            f"{client.folder} and {server.folder} are of two runs: their parts do not fit together"
        )


def check_served(ended: Ended[Any]) -> None:
    """Raises ConfigError where the server has nothing to predict by."""
    if ended.method.tail is Tail.ALL:
        raise ConfigError(
            f"{ended.folder}: by {ended.run.method} the whole network is at the clients, and a server has "
            "nothing to add: dsl-client predict --alone"
        )


def check_alone(client: Ended[ClientPart]) -> None:
    """Raises ConfigError where a client cannot predict without its server."""
    if client.part.head is None and client.method.tail is not Tail.ALL:
        raise ConfigError(
            f"{client.folder}: {client.run.method} gives its clients no head of their own, so they cannot "
            "predict --alone; leave it out"
        )


def _output_shape(run: Run, method: Method, net: CutNet) -> Shape:
    """Of logits, or of what the client's last layers take."""
    if method.tail is Tail.NONE:
        return (run.outputs,)
    return shape_after(after_cut(net, method)[0], net.cut_shape)


def _fill(part: Part, folder: Path) -> None:
    checkpoint.restore(folder / "checkpoint", part)
    for module in part.modules.values():
        module.eval()


def _text(facts: dict[str, Any], key: str) -> str:
    return str(facts.get(key) or "")
