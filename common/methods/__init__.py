"""Every method by its name. Each has a file of its own that holds both halves and its citation."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from common.codecs.travel import Travel
from common.errors import ConfigError
from common.methods.ampere import ampere
from common.methods.base import Method, Tail
from common.methods.cse_fsl import cse_fsl
from common.methods.csl import csl
from common.methods.cyclesl import cyclesl
from common.methods.dsl import dsl
from common.methods.epsl import epsl
from common.methods.fedavg import fedavg
from common.methods.fsl_sage import fsl_sage
from common.methods.gapsl import gapsl
from common.methods.psl import psl
from common.methods.sglr import sglr
from common.methods.splitfed import splitfed_v1, splitfed_v2, splitfed_v3
from common.methods.ushape import ushape
from common.objective import loss_of, metric_of
from common.run import Run

METHODS: Mapping[str, Callable[..., Method]] = {
    "dsl": dsl,
    "csl": csl,
    "psl": psl,
    "splitfed-v1": splitfed_v1,
    "splitfed-v2": splitfed_v2,
    "splitfed-v3": splitfed_v3,
    "sglr": sglr,
    "gapsl": gapsl,
    "epsl": epsl,
    "cyclesl": cyclesl,
    "cse-fsl": cse_fsl,
    "fsl-sage": fsl_sage,
    "ampere": ampere,
    "ushape": ushape,
    "fedavg": fedavg,
}


def build_method(run: Run) -> Method:
    """The run's method with its settings. Raises ConfigError, naming what there is."""
    if run.method not in METHODS:
        raise ConfigError(f"--method {run.method!r}: choose from {', '.join(METHODS)}")
    make = METHODS[run.method]
    settings = [_setting(run.method, arguments(make), text) for text in run.method_arg]
    for name, count in Counter(name for name, _ in settings).items():
        if count > 1:
            raise ConfigError(f"--method-arg {name}=...: given {count} times; say it once")
    given = dict(settings)
    if "augment" in arguments(make):
        given.setdefault("augment", int(run.augment))
    return _scheduled(run, make(**given))


def _scheduled(run: Run, method: Method) -> Method:
    """The method, sending as seldom as the run says."""
    first = max(0, run.epochs - run.send_last_epochs) if run.send_last_epochs else 0
    first += (run.epochs - 1 - first) % run.send_every_epochs
    every = run.send_every or method.send_every
    return replace(method, send_every=every, first_epoch=first, epoch_every=run.send_every_epochs)


def settled(run: Run) -> Run:
    """The run with `sync` as the method has it. Raises ConfigError where settings contradict each other.

    (A Run alone is not the place: one made of a file is not whole before the flags are read.)
    """
    method = build_method(run)
    if max(run.client_modules, run.server_modules) > 1 and not method.modular:
        raise ConfigError(
            f"--client-modules {run.client_modules}, --server-modules {run.server_modules}: {run.method} "
            "learns across each end as a whole; leave the flags out, or choose dsl or cse-fsl"
        )
    if run.head == "infopro" and run.server_modules > 1:
        raise ConfigError("--head infopro needs the images, which the server has not: --server-modules 1")
    # An average of one is the part itself: nothing need travel. (Of a method without a server it is how the
    # server is told anything at all.)
    alone = run.clients == 1 and method.tail is not Tail.ALL
    if method.sync and run.sync not in ("auto", method.sync) and not (alone and run.sync == "none"):
        raise ConfigError(f"--sync {run.sync}: {run.method} needs {method.sync}; leave the flag out")
    sync = (method.sync or "none") if run.sync == "auto" else run.sync
    if sync == "average" and alone:
        sync = "none"
    if run.sync_every > 1 and (sync == "relay" or method.copies or method.new_head):
        raise ConfigError(
            f"--sync-every {run.sync_every}: {run.method} with --sync {sync} meets after every epoch; leave "
            "it out"
        )
    _check_sampling(replace(run, sync=sync), method)
    _check_objective(run, method)
    travel = Travel.of(run.codec, run.seed)  # raises where there is no such codec
    if run.lasts and (travel.activations.feedback or travel.gradients.feedback):
        raise ConfigError("--codec +ef: what it owes is in no checkpoint; drop it, or --checkpoint-every")
    _check_schedule(run, method)
    if run.chooses and travel.activations.name != "fp32":
        raise ConfigError(
            f"--codec activations={travel.activations.name}: the clients choose, by --link auto or --budget; "
            "leave one out"
        )
    if run.quorum > run.clients:
        raise ConfigError(f"--quorum {run.quorum} is above --clients {run.clients}")
    if sync == "relay" and run.least_clients < run.clients:
        raise ConfigError(
            f"--quorum {run.quorum}: a relay needs all of its {run.clients} clients; leave the flag out"
        )
    return replace(run, sync=sync, fixed_order=run.fixed_order or run.deterministic)


def _check_sampling(run: Run, method: Method) -> None:
    """Raises ConfigError where clients are to sit rounds out, and there are none, or all must be there."""
    if run.sample_fraction == 1:
        return
    given = f"--sample-fraction {run.sample_fraction:g}"
    if run.sync != "average":
        raise ConfigError(
            f"{given}: only rounds that end with an average of the clients' parts can be sat out; say --sync "
            f"average, where {run.method} with --clients {run.clients} allows it, or leave the flag out"
        )
    if method.new_head or method.afterwards:
        raise ConfigError(f"{given}: {run.method} needs every client in every round; leave the flag out")
    if run.budget:
        raise ConfigError(f"{given} and --budget: clients plan by epochs that they train in; say one")


def _check_objective(run: Run, method: Method) -> None:
    """Raises ConfigError where the run's loss or metric cannot be had, or the method or head has its own."""
    loss_of(run)
    metric_of(run)
    if run.loss == "cross-entropy":
        return
    if not method.any_loss:
        raise ConfigError(
            f"--loss {run.loss}: {run.method} is of cross-entropy; leave it out, or choose another method"
        )
    if run.head == "infopro" and method.local_loss:
        raise ConfigError(
            f"--loss {run.loss}: --head infopro has a loss of its own, with cross-entropy; choose another"
        )
    if run.numbers and run.partition.startswith("dirichlet"):
        raise ConfigError(
            f"--partition {run.partition}: deals by classes, and targets are {run.targets}; say iid or own"
        )


def _check_schedule(run: Run, method: Method) -> None:
    """Raises ConfigError for settings of what is sent when, where the method does not let them be."""
    given = [flag for flag, said in (
        ("--send-every", run.send_every),
        ("--send-every-epochs", run.send_every_epochs > 1),
        ("--send-last-epochs", run.send_last_epochs),
        ("--replay", run.replay),
        ("--concatenate", run.concatenate > 1),
        ("--link auto", run.link == "auto"),
        ("--budget", run.budget),
    ) if said]  # fmt: skip
    if given and not method.streams:
        raise ConfigError(
            f"{given[0]}: only for methods that send one way and learn from each batch on its own: cse-fsl, "
            f"and dsl without lambda_; {' '.join([run.method, *run.method_arg])} does not"
        )
    for flag, epochs in (
        ("--send-last-epochs", run.send_last_epochs),
        ("--send-every-epochs", run.send_every_epochs),
    ):
        if epochs > run.epochs:
            raise ConfigError(f"{flag} {epochs} is above --epochs {run.epochs}")
    if run.link == "auto" and (run.fixed_order or run.deterministic):
        raise ConfigError(
            "--link auto: what is sent depends on the link, and no order holds; drop --fixed-order"
        )
    if run.link == "auto" and run.budget:
        raise ConfigError("--link auto and --budget: both choose what is sent; say one")
    if run.budget and (run.send_last_epochs or run.send_every_epochs > 1):
        late = "--send-last-epochs" if run.send_last_epochs else "--send-every-epochs"
        raise ConfigError(f"--budget and {late}: both say in which epochs to send; say one")


def arguments(make: Callable[..., Method]) -> dict[str, tuple[Any, Any]]:
    """A method's own settings: name to (type, default)."""
    hints = get_type_hints(make)
    return {name: (hints[name], p.default) for name, p in inspect.signature(make).parameters.items()}


def _setting(method: str, known: Mapping[str, tuple[Any, Any]], text: str) -> tuple[str, Any]:
    """A `name=value`, the value of the setting's type."""
    name, equals, given = text.partition("=")
    if name not in known or not equals:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"--method-arg {text}: {method} has no setting {name!r}; {there} (name=value)")
    kind = known[name][0]
    choices = get_args(kind)
    try:
        if not choices:
            value = kind(given)
            if not math.isfinite(value):
                raise ValueError
            return name, value
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"--method-arg {text}: {method} takes {what}") from None
    if given not in choices:
        raise ConfigError(f"--method-arg {text}: {method} takes {', '.join(choices)}")
    return name, given
