"""`dsl export`: the parts of a finished run put together, as files that need none of this project.

model.pt2           a program of torch.export       model.safetensors   the weights by name
model.onnx          the same for other runtimes     README.md           a model card (card.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from dsl_lab.joined import Joined

Format = Literal["pt2", "onnx", "safetensors"]
EXTRA = "pip install 'decoupled-split-learning[export]'"
WITHIN = 1e-5  # of what the parts give, absolute and relative


@dataclass(frozen=True)
class Export:
    """Joins the parts of a finished run into one network, and writes it with a model card."""

    server: tyro.conf.Positional[Path]
    """The server's folder of the run."""
    client: tyro.conf.Positional[Path]
    """A client's folder of it: with --sync none each client has a part of its own."""
    out: Path
    """Where the files go."""
    format: tuple[Format, ...] = ("pt2", "onnx", "safetensors")
    """What to write: pt2 (torch.export), onnx, safetensors."""
    alone: bool = False
    """The client's part with its own head, without the server's."""


def export(options: Export, console: Console) -> None:
    """Raises ConfigError where the folders are not two ends of one run, or the network cannot be exported."""
    formats = list(dict.fromkeys(options.format))
    if "onnx" in formats and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise ConfigError(f"--format onnx needs more packages: {EXTRA}; or say --format pt2 safetensors")
    if any((options.out / name).exists() for name in ("README.md", *(f"model.{kind}" for kind in formats))):
        raise ConfigError(f"--out {options.out} holds a model already; choose another folder or remove it")
    import torch

    from dsl_lab import card, runs
    from dsl_lab.joined import example_of_run, joined

    whole, ended = joined(options.server, options.client, options.alone)
    whole.to(memory_format=torch.contiguous_format)  # weights lie as every other program has them
    run = runs.read(options.server)
    example = example_of_run(ended.run)
    program = _program(whole, example) if {"pt2", "onnx"} & set(formats) else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if program is not None:
            _write_program(program, whole.images, formats, options.out)
        if "safetensors" in formats:
            _write_weights(whole, options.out)
        facts = card.Facts(ended, formats, tuple(example.shape[1:]), whole.images, options.alone)
        (options.out / "README.md").write_text(card.text(run, facts), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {options.out}: {error.strerror}") from error
    names = ", ".join([*(f"model.{kind}" for kind in formats), "README.md"])
    console.print(f"{names} in {options.out}", soft_wrap=True)


def _program(whole: "Joined", example: "Tensor") -> "ExportedProgram":
    """For batches of any size. A program is not taken on trust: it must give what the parts give."""
    import torch

    from common.nets.export import quiet
    from common.own import first_words

    try:
        with quiet():
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(whole, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # the network's code may raise anything
        raise ConfigError(f"torch.export cannot follow the joined network: {first_words(error)}") from error
    samples = torch.rand(3, *example.shape[1:]) if whole.images else torch.cat([example, example[:1]])
    with torch.no_grad():
        given, due = program.module()(samples), whole(samples)
    if not torch.allclose(given, due, rtol=WITHIN, atol=WITHIN):
        worst = float((given - due).abs().max())
        raise ConfigError(f"the exported program gives other logits than the parts do, by up to {worst:.2g}")
    return program


def _write_program(program: "ExportedProgram", images: bool, formats: Sequence[Format], out: Path) -> None:
    import torch

    from common.nets.export import quiet
    from common.own import first_words

    if "pt2" in formats:
        torch.export.save(program, out / "model.pt2")
    if "onnx" not in formats:
        return
    try:
        with quiet():
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: "batch"},),  # what the dimension is called
                input_names=["images" if images else "input"],
                output_names=["logits"],
            )
    except Exception as error:  # torch's translators of operators may raise anything
        raise ConfigError(
            f"torch.onnx cannot translate the network: {first_words(error)}; --format pt2 safetensors does "
            "without"
        ) from error
    assert onnx is not None, "the new exporter gives its program"
    onnx.save(out / "model.onnx")


def _write_weights(whole: "Joined", out: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().clone().contiguous() for name, tensor in whole.weights().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
