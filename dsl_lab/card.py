"""The model card of an exported network: what it is, how to run it, what it learned from, what is not known.

In the form that Hugging Face reads: Markdown, with facts in YAML on top.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from common.ended import Ended
from common.methods.base import ClientPart, Tail
from common.run import MEAN, STD
from dsl_lab.runs import FinishedRun


@dataclass(frozen=True)
class Facts:
    """What the card needs beside the run: a client's end, what was written, the shape of one sample."""

    client: Ended[ClientPart]
    formats: Sequence[str]
    sample: tuple[int, ...]
    images: bool
    alone: bool


def text(run: FinishedRun, facts: Facts) -> str:
    """The card, as Markdown."""
    sections = [
        _front(run, facts),
        _title(run, facts),
        _use(facts),
        _input(facts),
        _classes(facts),
        _training(run, facts),
        _measured(run, facts),
        _limits(run),
        _privacy(facts),
    ]
    return "\n".join(sections)


def scored(run: FinishedRun, facts: Facts) -> float | None:
    """What is exported, by the run's metric on its test set."""
    return run.summary.test.client_only if facts.alone else run.summary.test.joined


def _front(run: FinishedRun, facts: Facts) -> str:
    score = scored(run, facts)
    metrics = [{"type": run.summary.test.name, "value": round(score, 4)}] if score is not None else []
    result = {
        "task": {"type": "image-classification" if facts.images else "classification"},
        "dataset": {"name": run.fact("data"), "type": run.fact("data")},
        "metrics": metrics,
    }
    front = {
        "library_name": "pytorch",
        "tags": ["split-learning", run.method, *facts.formats],
        **({"pipeline_tag": "image-classification"} if facts.images else {}),
        "model-index": [{"name": run.about.name, "results": [result]}],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---", ""])


def _title(run: FinishedRun, facts: Facts) -> str:
    what = "a client's part and its auxiliary head" if facts.alone else "all of its parts joined"
    clients = facts.client.run.clients
    return f"""# {run.about.name}

A classifier ({run.fact("model")}) trained by split learning ({run.method}) with {clients} \
client{"s" if clients > 1 else ""} that kept the samples, cut
at {facts.client.run.place}. These files have {what}; where it was cut no longer matters.
"""


def _use(facts: Facts) -> str:
    batch = ", ".join(map(str, (1, *facts.sample)))
    made = f"torch.rand({batch})" if facts.images else f"torch.zeros({batch}, dtype=...)"
    name = "images" if facts.images else "input"
    parts = ["## Use\n"]
    if "pt2" in facts.formats:
        parts.append(f"""```python
import torch

network = torch.export.load("model.pt2").module()
logits = network({made})
```
""")
    if "onnx" in facts.formats:
        parts.append(f"""```python
import onnxruntime
import torch

network = onnxruntime.InferenceSession("model.onnx")
(logits,) = network.run(None, {{"{name}": {made}.numpy()}})
```
""")
    if "safetensors" in facts.formats:
        kept = " The head's begin with `head.`." if facts.alone else ""
        parts.append(
            "`model.safetensors` has all weights by the names that they have in the whole network, for code "
            f"that builds it.{kept}\n"
        )
    return "\n".join(parts)


def _input(facts: Facts) -> str:
    shape = ", ".join(["n", *map(str, facts.sample)])
    if not facts.images:
        return f"""## Input

({shape}): what the network itself takes, as it is. n may be any number from 1.
"""
    colours = {1: "grey", 3: "red, green, blue"}.get(facts.sample[0], f"{facts.sample[0]} channels")
    return f"""## Input

Float32 of shape ({shape}), {colours}, from 0 (black) to 1, as torchvision's
`ToTensor` gives it; n may be any number from 1. **Do not normalise it**: that is part of the network
((x - {MEAN}) / {STD}). Pictures of other sizes are to be scaled to this one, by bilinear interpolation, as in
training. Out come logits; softmax makes them probabilities.
"""


def _classes(facts: Facts) -> str:
    if facts.client.run.numbers:
        return f"## Outputs\n\n{facts.client.run.numbers} numbers a sample.\n"
    count = facts.client.run.class_count
    names = [*facts.client.names, *map(str, range(len(facts.client.names), count))]
    rows = "\n".join(f"| {index} | {_cell(name)} |" for index, name in enumerate(names))
    return f"## Classes\n\n| index | class |\n|---:|---|\n{rows}\n"


def _training(run: FinishedRun, facts: Facts) -> str:
    settings, ended = facts.client.run, facts.client
    kept = "their own, never averaged" if settings.sync == "none" and settings.clients > 1 else settings.sync
    rows = {
        "method": " ".join([settings.method, *settings.method_arg]),
        "network": settings.model,
        "cut": f"{settings.place}, of {'x'.join(map(str, ended.net.cut_shape))} a sample",
        "data": f"{run.fact('data')}, dealt {settings.partition}",
        "clients": f"{settings.clients}; these files have the part of client {ended.client}",
        "clients' parts": kept,
        "epochs, batch, learning rate": f"{settings.epochs}, {settings.batch_size}, {settings.lr:g}",
        "codec": " ".join(settings.codec) or "none (fp32)",
        "seed": str(settings.seed),
        "begun": run.about.started,
        "versions": ", ".join(f"{name} {number}" for name, number in run.about.versions.items()),
        "machine of the server": run.about.machine,
    }
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"


def _measured(run: FinishedRun, facts: Facts) -> str:
    score, summary = scored(run, facts), run.summary
    settings = facts.client.run
    whose = ""
    if settings.clients > 1 and settings.sync == "none":
        whose = " (the mean of all clients, each with its own part)"
    rows = {
        f"test {summary.test.name}{whose}": _score(score, summary.test.name),
        "bytes that all clients sent in training": f"{run.serialized_up:,}",
        "bytes that they got": f"{run.serialized_down:,}",
        "seconds": f"{summary.seconds.wall:,.1f}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"## Measured\n\nOn the run's own test data, by the split system.\n\n| | |\n|---|---|\n{table}\n"


def _score(score: float | None, metric: str) -> str:
    if score is None:
        return "not scored"
    return f"{score:.2%}" if metric == "accuracy" else f"{score:.4f}"


def _limits(run: FinishedRun) -> str:
    return f"""## What it is not tested for

Any data but {run.fact("data")}: other sites, cameras or times. Whether its probabilities are calibrated,
whether it errs more for some groups of people than for others, whether it notices samples of no class that
it knows, and whether it withstands samples that are made to deceive it. It is not tested for use in
medicine, or where errors harm.
"""


def _privacy(facts: Facts) -> str:
    went = {
        Tail.NONE: "Activations at the cut, and labels, went to the server",
        Tail.LAST: "Labels stayed there, too. Activations at the cut went to the server",
        Tail.ALL: "Labels stayed there, too. Weights went to the server",
    }[facts.client.method.tail]
    return f"""## Privacy

Samples stayed with the clients. {went}, and these can
tell about the samples that they came from. So can the weights in these files: whoever has them may find out
whether a sample was trained on, and more, and no noise was added against it. Publish them only where the
training data would let you.
"""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
