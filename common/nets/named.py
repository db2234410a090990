"""Networks by name: torchvision's, timm's, or what a function of the user's own builds.

    torchvision:resnet18    timm:vit_tiny_patch16_224    mypackage.module:function

Both ends build from the name: code never travels. Nothing is downloaded: weights are those that its code
draws.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.own import first_words, function_of, imported

LIBRARIES = ("torchvision", "timm")


def is_named(model: str) -> bool:
    """Whether it is of this file, and no `resnetN`."""
    return ":" in model


def is_own(model: str) -> bool:
    """Whether its code is neither torchvision's nor timm's."""
    return is_named(model) and model.partition(":")[0] not in LIBRARIES


def build_named(model: str, classes: int, channels: int, seed: int) -> nn.Module:
    """The network, with the first weights that its own code draws: of one seed always the same ones.

    Raises ConfigError, naming what is missing.
    """
    make = _builder(model, classes, channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            net = make()
        except Exception as error:  # it is someone else's code
            raise ConfigError(
                f"--model {model}: its code failed: {type(error).__name__}: {first_words(error)}"
            ) from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--model {model}: gives {type(net).__name__}; it must build an nn.Module")
    return net.cpu()


def example_of(net: nn.Module, image: Sequence[int]) -> Tensor:
    """A batch of two samples of what the network takes: images of this shape; or, where the network has an
    attribute `example_input`, a tensor (n, ...), what that is made of."""
    example = getattr(net, "example_input", None)
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        return torch.zeros(2, *image)
    return example.detach().cpu()[:1].repeat(2, *[1] * (example.dim() - 1))


def versions(model: str) -> str:
    """Those that a named network's code depends on, as text: `torch 2.15.0, torchvision 0.29.2`."""
    packages = ["torch", model.partition(":")[0].partition(".")[0]]
    return ", ".join(f"{package} {_version(package)}" for package in packages if _version(package))


def _builder(model: str, classes: int, channels: int) -> Callable[[], Any]:
    source, _, name = model.partition(":")
    if re.fullmatch(r"[A-Za-z_]\w*([.]\w+)*", source) is None or re.fullmatch(r"\w[\w.-]*", name) is None:
        raise ConfigError(
            f"--model {model[:80]!r}: say torchvision:NAME, timm:NAME or package.module:function"
        )
    if source == "torchvision":
        models = imported("--model", model, "torchvision.models", "pip install torchvision")
        _check_listed(model, name, models.list_models(module=models))  # without those of other tasks
        return partial(models.get_model, name, weights=None, num_classes=classes)
    if source == "timm":
        timm = imported("--model", model, "timm", "pip install timm")
        _check_listed(model, name.partition(".")[0], timm.list_models())
        return partial(timm.create_model, name, pretrained=False, num_classes=classes, in_chans=channels)
    function = function_of("--model", model)
    return partial(function, num_classes=classes) if _takes(function, "num_classes") else function


def _check_listed(model: str, name: str, there: Sequence[str]) -> None:
    if name not in there:
        near = ", ".join(get_close_matches(name, there, 3, 0.3)) or ", ".join(list(there)[:3])
        raise ConfigError(f"--model {model}: there is no {name!r} here; near it are {near}")


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a function that is not Python's
        return False
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
