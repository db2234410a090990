"""What the paper (arXiv 2601.19261) and its authors say of a run, to stand beside what was measured.

Only of runs with the paper's settings: ResNet-110, all of CIFAR-10 or CIFAR-100, batch 128, 50 epochs of SGD
at 1e-3, and one client's part that goes from client to client. Of any other run there is nothing to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.run import RECIPES, Run
from dsl_lab.runs import FinishedRun

EPOCHS = 50
NOTE = (
    "Paper: arXiv 2601.19261, its 6.5 GB an epoch at s and m (half at d), which DSL halves. "
    "Authors: what their public code has logged at d, in one process on one GPU; accuracy is the best of 50 "
    "epochs. The paper's 58% less memory at s is of one process that holds both ends in turn."
)

# Settings that change nothing of what the paper's experiment is, or that are judged below.
_FREE = frozenset(
    {"name", "method", "split", "clients", "data", "seed", "head", "sync", "recipe", "image", "classes"}
    | {"eval_every", "fixed_order", "deterministic", "outbox", "inbox", "quorum", "round_timeout"}
    | {"checkpoint_every", "checkpoints", "spool", "lease", "on_nonfinite", "reuse", "replay_on"}
    | {"measure_memory"}
)
_FIXED: Mapping[str, object] = {
    **{key: value for key, value in vars(Run()).items() if key not in _FREE},
    **RECIPES["paper"],
    "model": "resnet110",
}
_DATA = ("cifar10", "cifar100")
_IMAGES = 50_000  # to train on, in both

# Bytes of one sample's activations in fp32 (the paper, section IV: 6.5 GB = 2 x 50,000 x 65,536 an epoch).
_SAMPLE = {"s": 65_536, "m": 65_536, "d": 32_768}

# The authors' result files (github.com/juniorfelix998/decoupled-split-learning-via-aux-loss), d split: best
# test accuracy of 50 epochs, by data set, clients and method.
_ACCURACY = {
    ("cifar10", 1): {"dsl": 0.8512, "csl": 0.8448},
    ("cifar10", 5): {"dsl": 0.8647, "csl": 0.8435},
    ("cifar10", 10): {"dsl": 0.8445, "csl": 0.8506},
    ("cifar100", 1): {"dsl": 0.5526, "csl": 0.5580},
    ("cifar100", 5): {"dsl": 0.5592, "csl": 0.5741},
    ("cifar100", 10): {"dsl": 0.5614, "csl": 0.5637},
}
_SECONDS = {"dsl": 27.6, "csl": 24.2}  # an epoch of CIFAR-10 with one client at d, ibidem
_PEAK_MB = {"dsl": 761, "csl": 1059}  # of the GPU's memory in that run, in MB as they log it


@dataclass(frozen=True)
class Reference:
    """up, down: bytes of the whole run. wall: its seconds. peak: bytes, of both ends in one process.

    None where neither the paper nor its authors give the number.
    """

    accuracy: float | None = None
    up: int | None = None
    down: int | None = None
    wall: float | None = None
    peak: int | None = None


def reference(run: FinishedRun) -> Reference:
    """What there is to compare the run with; nothing, unless its settings are the paper's."""
    method, split = run.method, str(run.about.run.get("split"))
    if not _is_the_papers(run):
        return Reference()
    way = EPOCHS * _IMAGES * _SAMPLE[split]
    traffic = Reference(up=way, down=way if method == "csl" else 0)
    if split != "d":
        return traffic
    data, clients = str(run.about.run["data"]), int(run.about.run["clients"])
    logged = _ACCURACY.get((data, clients), {}).get(method)
    if (data, clients) != ("cifar10", 1):
        return Reference(logged, traffic.up, traffic.down)
    wall, peak = EPOCHS * _SECONDS[method], _PEAK_MB[method] * 10**6
    return Reference(logged, traffic.up, traffic.down, wall, peak)


def _is_the_papers(run: FinishedRun) -> bool:
    settings = run.about.run
    head = settings.get("head") in ("flat", "mlp") or run.method == "csl"  # read literally; of their code
    turns = settings.get("clients") == 1 or settings.get("sync") == "relay"
    return (
        run.method in ("csl", "dsl")
        and settings.get("data") in _DATA
        and settings.get("split") in _SAMPLE
        and head
        and turns
        and all(_same(settings.get(key), value) for key, value in _FIXED.items())
    )


def _same(said: object, wanted: object) -> bool:
    """JSON has lists where a run has tuples."""
    return (tuple(said) if isinstance(said, list) else said) == wanted
