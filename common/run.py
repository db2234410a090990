"""One frozen description of a run. The server owns it; clients receive it when they join.

Knows flags, TOML and JSON. Knows no tensors: `--help` must not wait for torch.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common.errors import ConfigError

Sync = Literal["auto", "none", "average", "relay"]
Schedule = Literal["constant", "cosine", "step"]
Recipe = Literal["modern", "paper"]
Link = Literal["fixed", "auto"]
Store = Literal["memory", "disk"]
OnNonfinite = Literal["halt", "skip"]

# What a recipe sets where neither a flag nor the file says otherwise. `paper`: arXiv 2601.19261,
# section IV, with the weight decay of its authors' code. `modern`: benchmarks/accuracy.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "modern": {
        "epochs": 20,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup": 0.2,
    },
    "paper": {
        "epochs": 50,
        "batch_size": 128,
        "lr": 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "warmup": 0.0,
    },
}

# Image shape and classes of the data sets that are known by name.
KNOWN_DATA: Mapping[str, tuple[tuple[int, int, int], int]] = {
    "sample": ((3, 32, 32), 10),
    "fashion-mnist": ((3, 32, 32), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
_OTHER_DATA = ((3, 32, 32), 10)

# Of the pixels in [0, 1] before training, one mean and spread for every source and every client: no
# statistics of private data are computed, so none can leave a client, and no client must be told
# another's.
MEAN = 0.5
STD = 0.25


@dataclass(frozen=True)
class Run:
    """What is trained, on what, by whom and how."""

    name: str = "run"
    """What the run is called in logs and folders."""
    method: str = "dsl"
    """Who learns from what: dsl, csl and the others that `dsl methods` lists."""
    method_arg: tuple[str, ...] = ()
    """The method's own settings, such as alpha=1.0 phi=0.5. In a file: the [method] table, beside name."""
    model: str = "resnet20"
    """The network: resnet20, 32, 44, 56, 110, or any other 6n+2; torchvision:NAME, timm:NAME, or
    package.module:function, which builds an nn.Module (docs/networks.md)."""
    split: str = "m"
    """Where a resnetN is cut: s, m, d (12/54, 17/54, 26/54 of the blocks at the client) or a block count."""
    cut: str = ""
    """The layer after which any other network is cut, such as layer2: dsl cuts lists them."""
    head: str = "gap"
    """The client's auxiliary head: gap, flat, mlp, conv, strided, copy or infopro, where a client has one."""
    client_modules: int = 1
    """Cut the client's part again into so many modules, each learning from a head of its own."""
    server_modules: int = 1
    """Likewise the server's part."""
    keep_blocks: int = 0
    """Gradient checkpointing: keep the activations of so many of the client's blocks at a time; the backward
    pass makes those of the others again. 0: of all."""
    clients: int = 1
    """How many clients make the run."""
    sync: Sync = "auto"
    """The clients' parts: none (each its own), average (each epoch), relay (one part, in turn).
    auto: as the method has it, none where it does not say."""
    sync_every: int = 1
    """Epochs from one average of the clients' parts to the next; there is one at the end in any case."""
    sample_fraction: float = 1.0
    """With --sync average: the fraction of the clients that train in a round, drawn anew for each by the
    seed. The others sit it out."""
    data: str = "sample"
    """sample, fashion-mnist, cifar10, cifar100, npz:FILE, folder:DIR, or package.module:function, which gives
    two torch Datasets (docs/data.md). Only clients read it."""
    partition: str = "iid"
    """Each client's share: iid, dirichlet:ALPHA, or own (all of what it has)."""
    image: tuple[int, int, int] | None = None
    """Image shape (channels, height, width). Default: that of the data set, else 3 32 32."""
    classes: int | None = None
    """How many classes there are. Default: that of the data set, else 10."""
    targets: str = "classes"
    """What there is to learn: classes, or float:K, K numbers a sample (then say --loss and --metric)."""
    loss: str = "cross-entropy"
    """What is minimised: cross-entropy; mse or bce of float:K; or package.module:function (docs/data.md)."""
    metric: str = "accuracy"
    """What is scored: accuracy; mse or mae of float:K; or package.module:function."""
    train_limit: int = 0
    """Deal out only this many training images, drawn by the seed; 0: all."""
    test_limit: int = 0
    """Score only this many test images, drawn by the seed; 0: all."""
    augment: bool = True
    """Random crop (4 pixels) and flip of each training image."""
    recipe: Recipe = "modern"
    """Defaults for the seven settings below: modern, or paper (arXiv 2601.19261)."""
    epochs: int = 20
    """Passes over the data."""
    batch_size: int = 128
    """Samples in a batch."""
    lr: float = 0.1
    """Peak learning rate of both sides (SGD)."""
    momentum: float = 0.9
    """Momentum of both sides."""
    weight_decay: float = 5e-4
    """Weight decay of both sides."""
    schedule: Schedule = "cosine"
    """The learning rate after the warm-up: constant, cosine to zero, or step (x0.1 at 1/2, 3/4)."""
    warmup: float = 0.2
    """Fraction of the run in which the learning rate rises linearly from lr/100."""
    eval_every: int = 1
    """Score the test set after every this many epochs, and at the end; 0: only at the end."""
    seed: int = 0
    """Seeds the first weights, the shares, the order and the augmentation."""
    fixed_order: bool = False
    """Step on the clients' batches strictly in turn, so that a run repeats bit for bit."""
    deterministic: bool = False
    """As --fixed-order, with one thread for each process's arithmetic: also a run that was interrupted ends
    with the very weights of one that was not."""
    checkpoint_every: float = 0.0
    """Seconds from one checkpoint of the server to the next: then the run survives crashes of either end, and
    each batch is learned from exactly once (docs/reliability.md). 0: none."""
    checkpoints: int = 3
    """How many of the last checkpoints are kept."""
    spool: str = "1GB"
    """With checkpoints: bytes that a client that is not answered keeps, at most, of what the server might
    forget."""
    lease: float = 60.0
    """With checkpoints: seconds for which a client that is gone may come back; then it is lost."""
    codec: tuple[str, ...] = ()
    """How tensors are made small for the wire: activations=NAME gradients=NAME, of fp32, fp16, bf16, fp8,
    int8, int4, int3, int2, topk:K, randtopk:K, each also with +zstd (compressed) and +ef (error feedback:
    what coding takes away is added to the next tensor). Default: fp32, as they are."""
    send_every: int = 0
    """One-way methods: batches from one that is sent to the next; 0: as the method has it."""
    send_every_epochs: int = 1
    """One-way methods: epochs from one in which batches are sent to the next; the last is one of them."""
    send_last_epochs: int = 0
    """One-way methods: send only in so many of the last epochs, when features are ready; 0: in all."""
    replay: str = ""
    """One-way methods: the server keeps what it receives, as it came, up to so many bytes (such as 500MB),
    and learns from it again: when nothing else waits, and before anything is scored."""
    reuse: int = 4
    """With --replay: how often the server learns from a batch at most, the first time included."""
    replay_on: Store = "memory"
    """Where it is kept: memory, or disk (in the run's folder)."""
    concatenate: int = 1
    """One-way methods: make one step of the server of up to so many clients' waiting batches, as one batch:
    faster where batches are small, but the server then learns with larger ones. 1: each on its own."""
    link: Link = "fixed"
    """One-way methods: auto lets each client choose codec and sending rate so that it never waits for the
    link."""
    budget: str = ""
    """One-way methods: bytes that all clients together may send to train on (such as 500MB): they choose
    codec and epochs so that it is spent late, when features are ready."""
    outbox: int = 2
    """Batches that may wait at a client to be sent."""
    inbox: int = 2
    """Batches of each client that may wait at the server."""
    quorum: int = 0
    """Go on without clients that are lost as long as so many of the run's remain; 0: all."""
    round_timeout: float = 0.0
    """In fixed order: seconds that batches wait for a client that is late, if the others are a quorum; 0:
    as long as it takes. Such a run repeats bit for bit only if nobody is late. ushape: seconds for which
    the server waits for a gradient; then that client is lost."""
    measure_memory: bool = False
    """Count the bytes of live tensors in the first three steps of each side, into summary.json."""
    on_nonfinite: OnNonfinite = "halt"
    """Where a step of the server comes to a loss or gradients that are not finite: halt ends the run; skip
    leaves the step out, as if it had not been, and counts it."""

    def __post_init__(self) -> None:
        self._check()  # raises ConfigError, naming the value and what is allowed

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W): as said, or the data set's."""
        return self.image or KNOWN_DATA.get(self.data, _OTHER_DATA)[0]

    @property
    def class_count(self) -> int:
        """As said, or the data set's."""
        return KNOWN_DATA.get(self.data, _OTHER_DATA)[1] if self.classes is None else self.classes

    @property
    def numbers(self) -> int:
        """How many numbers a sample's target has; 0 where targets are classes."""
        return int(self.targets.partition(":")[2] or 0)

    @property
    def outputs(self) -> int:
        """How many numbers the network gives for a sample: a logit a class, or as many as a target has."""
        return self.numbers or self.class_count

    @property
    def place(self) -> str:
        """Where the network is cut, for people."""
        return self.cut or self.split

    @property
    def least_clients(self) -> int:
        """With fewer that remain the run is over: the quorum, where there is one."""
        return self.quorum or self.clients

    @property
    def chooses(self) -> bool:
        """Whether clients choose their codecs, batch by batch."""
        return self.link == "auto" or bool(self.budget)

    @property
    def replay_bytes(self) -> int:
        return bytes_of("--replay", self.replay)

    @property
    def lasts(self) -> bool:
        """Whether it survives crashes: there are checkpoints, and clients may come back."""
        return self.checkpoint_every > 0

    @property
    def spool_bytes(self) -> int:
        return bytes_of("--spool", self.spool)

    @property
    def budget_bytes(self) -> int:
        return bytes_of("--budget", self.budget)

    def averages(self, epoch: int) -> bool:
        """Whether the clients' parts are averaged after this epoch, counted from 0."""
        due = (epoch + 1) % self.sync_every == 0 or epoch == self.epochs - 1
        return self.sync == "average" and due

    def evaluates(self, epoch: int) -> bool:
        """Whether the test set is scored after this epoch, counted from 0."""
        last = epoch == self.epochs - 1
        return last or (self.eval_every > 0 and (epoch + 1) % self.eval_every == 0)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Run":
        """Raises ConfigError for unknown keys, wrong types or values."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:  # the latter where it is nested too deep
            raise ConfigError(f"the run's description is not JSON: {error}") from error
        return Run(**checked(values, "the run's description"))

    def _check(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"--{_flag(name)} {value} is below {least}")
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"--{_flag(name)} {value!r}: choose from {', '.join(allowed)}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"--lr {self.lr} is not a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"--weight-decay {self.weight_decay} is not a number from 0 on")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"--warmup {self.warmup} is not a fraction from 0 to 1")
        if not 0 < self.sample_fraction <= 1:
            raise ConfigError(
                f"--sample-fraction {self.sample_fraction} is not a fraction above 0 and at most 1"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"--momentum {self.momentum} is not in [0, 1)")
        if not 0 <= self.round_timeout < math.inf:
            raise ConfigError(f"--round-timeout {self.round_timeout} is not a number of seconds from 0 on")
        for name in ("checkpoint_every", "lease"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"--{_flag(name)} {getattr(self, name)} is not a number of seconds from 0 on"
                )
        if min(self.image_shape) < 1:
            raise ConfigError(f"--image {' '.join(map(str, self.image_shape))} has an empty side")
        if not self.spool:
            raise ConfigError("--spool: say how many bytes, such as 1GB")
        for name in ("replay", "budget", "spool"):
            bytes_of(f"--{name}", getattr(self, name))  # raises where it is no size
        if not re.fullmatch(r"classes|float:[1-9][0-9]{0,5}", self.targets):
            raise ConfigError(f"--targets {self.targets!r}: choose classes, or float:K, such as float:1")
        if not self.name or set(self.name) - _NAME_CHARACTERS:
            raise ConfigError(f"--name {self.name!r}: use letters, digits, '.', '_' and '-'")
        if self.partition not in ("iid", "own") and not _is_dirichlet(self.partition):
            raise ConfigError(
                f"--partition {self.partition!r}: choose iid, own, or dirichlet:ALPHA, 0 < ALPHA <= 1e6"
            )


_LEAST = {
    "client_modules": 1,
    "server_modules": 1,
    "keep_blocks": 0,
    "clients": 1,
    "epochs": 1,
    "batch_size": 1,
    "class_count": 2,
    "train_limit": 0,
    "test_limit": 0,
    "eval_every": 0,
    "seed": 0,
    "outbox": 1,
    "inbox": 1,
    "quorum": 0,
    "sync_every": 1,
    "send_every": 0,
    "send_every_epochs": 1,
    "send_last_epochs": 0,
    "reuse": 2,
    "concatenate": 1,
    "checkpoints": 1,
}
_ALLOWED = {
    "sync": ("auto", "none", "average", "relay"),
    "schedule": ("constant", "cosine", "step"),
    "recipe": tuple(RECIPES),
    "link": ("fixed", "auto"),
    "replay_on": ("memory", "disk"),
    "on_nonfinite": ("halt", "skip"),
}
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def bytes_of(flag: str, size: str) -> int:
    """The bytes of a size such as 500MB, 1.5GB, 64MiB; 0 of none. Raises ConfigError, naming the flag."""
    if not size:
        return 0
    match = re.fullmatch(r"([0-9]{1,15}(?:[.][0-9]{1,15})?) ?(?:([kMGT])(i?))?B", size)
    if match is None:
        raise ConfigError(f"{flag} {size[:40]!r} is not a size; say it as 500MB, 1.5GB or 64MiB")
    number, prefix, binary = match.groups()
    unit: int = (1024 if binary else 1000) ** " kMGT".index(prefix or " ")
    total = round(float(number) * unit)
    if not 1 <= total < 2**62:
        raise ConfigError(f"{flag} {size[:40]!r}: choose from 1B to 1000TB")
    return total


def checked(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values of a file, each for a known key and of its type.

    Raises ConfigError that names the key, the origin and the nearest key there is.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} is not a table of settings")
    defaults = {field.name: field.default for field in fields(Run)}
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{origin}: unknown key {key!r}{hint}")
        if not _fits(name, value, defaults[name]):
            raise ConfigError(f"{origin}: {key} = {value!r} is of the wrong type")
        result[name] = tuple(value) if isinstance(value, list) else value
    return result


def defaults_from(file: Path | None, recipe: str | None) -> Run:
    """The run that flags then change: built-in defaults, then the recipe's, then the file's.

    Raises ConfigError when the file is missing, not TOML, or has unknown keys.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = checked(_flattened(tomllib.loads(file.read_text())), str(file))
        except OSError as error:
            raise ConfigError(f"--config {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file} is not TOML: {error}") from error
    values["recipe"] = recipe or values.get("recipe", "modern")
    if values["recipe"] not in RECIPES:
        raise ConfigError(f"--recipe {values['recipe']!r}: choose from {', '.join(RECIPES)}")
    return Run(**{**RECIPES[values["recipe"]], **values})


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """A file's tables: [method] as the method's name and its settings, [codec] as its settings."""
    flat = dict(values)
    if isinstance(codec := values.get("codec"), dict):
        flat["codec"] = tuple(f"{key}={value}" for key, value in codec.items())
    if isinstance(method := values.get("method"), dict):
        del flat["method"]
        if "name" in method:
            flat["method"] = method["name"]
        flat["method_arg"] = tuple(f"{key}={value}" for key, value in method.items() if key != "name")
    return flat


def _fits(name: str, value: object, default: object) -> bool:
    if name == "image":
        return value is None or (
            isinstance(value, list | tuple) and len(value) == 3 and all(type(side) is int for side in value)
        )
    if name in ("method_arg", "codec"):
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if name == "classes":
        return value is None or type(value) is int
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def _flag(name: str) -> str:
    return {"class_count": "classes"}.get(name, name).replace("_", "-")


def _is_dirichlet(partition: str) -> bool:
    scheme, _, alpha = partition.partition(":")
    try:
        return scheme == "dirichlet" and 0 < float(alpha) <= 1e6
    except ValueError:
        return False
